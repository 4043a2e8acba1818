"""Where torch modules sit in what a product holds: a module, or an object that keeps modules among its attributes.

Products seldom hold a bare module. They hold an object with a `model` attribute, or one whose `model` is such an object,
and call that with an image and a mask. Only `vars()` of plain objects is looked into, a few levels deep: no property is
run, no container, class or Python module is entered. TorchScript modules are never entered either: they are replaced
whole, in the attribute that holds them, and the attribute's holder remembers what was there.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 3
_REPLACED = "_inpaintrt_replaced"
_NO_HOLDERS = (type, types.ModuleType, types.FunctionType, types.MethodType, Tensor)


@dataclass(frozen=True)
class Slot:
    """An attribute that holds a module; `path` leads to it from the object that was searched."""

    path: str
    holder: Any
    name: str
    module: nn.Module


def roots(target: Any) -> list[tuple[str, nn.Module]]:
    """The torch modules that `target` is or holds, with their paths.

    Raises: `TypeError` when it is no module and holds none; the message names what it does hold.
    """
    if isinstance(target, nn.Module):
        return [("", target)]
    slots = [slot for path, holder in _objects(target) for slot in _slots(path, holder)]
    if not slots:
        held = [f"{path or '(object)'}: {_contents(holder)}" for path, holder in _objects(target)]
        raise TypeError(
            f"a {type(target).__name__} was given; accepted: a torch module, or an object that holds one in an attribute, "
            f"at most {DEPTH} levels deep. Found {'; '.join(held[:8]) or 'no attributes'}"
        )
    return [(slot.path, slot.module) for slot in slots]


def named_modules(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """All modules of `target` with their paths, each once, containers before what they contain."""
    seen: set[int] = set()
    for path, root in roots(target):
        yield from _descend(path, root, seen)


def scripts(target: Any) -> list[Slot]:
    """The attributes in which TorchScript modules sit. `target` itself is no attribute."""
    found = [slot for path, holder in _objects(target) for slot in _slots(path, holder)]
    for path, module in named_modules(target):
        if not isinstance(module, torch.jit.ScriptModule):
            children: dict[str, Any] = module._modules
            found += [Slot(_join(path, name), module, name, child) for name, child in children.items()]
    return [slot for slot in found if isinstance(slot.module, torch.jit.ScriptModule)]


def replace(slot: Slot, module: nn.Module) -> None:
    """Put `module` in the slot; `put_back` undoes it. Raises what the holder's own `__setattr__` raises."""
    setattr(slot.holder, slot.name, module)
    vars(slot.holder).setdefault(_REPLACED, {}).setdefault(slot.name, slot.module)


def put_back(target: Any) -> None:
    """Undo every `replace` in `target`."""
    holders = [holder for _, holder in _objects(target)] + [module for _, module in named_modules(target)]
    for holder in holders:
        for name, module in vars(holder).pop(_REPLACED, {}).items():
            setattr(holder, name, module)


def _objects(target: Any) -> Iterator[tuple[str, Any]]:
    """`target` and the plain objects within it, breadth first; a module is none."""
    level, seen = [("", target)], {id(target)}
    for _ in range(DEPTH):
        following = []
        for path, holder in level:
            if isinstance(holder, (nn.Module, *_NO_HOLDERS)) or not hasattr(holder, "__dict__"):
                continue
            yield path, holder
            for name, value in vars(holder).items():
                if id(value) not in seen:
                    seen.add(id(value))
                    following.append((_join(path, name), value))
        level = following


def _slots(path: str, holder: Any) -> list[Slot]:
    found = [(name, value) for name, value in vars(holder).items() if isinstance(value, nn.Module)]
    return [Slot(_join(path, name), holder, name, value) for name, value in found]


def _descend(path: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    if not isinstance(module, torch.jit.ScriptModule):
        for name, child in module.named_children():
            yield from _descend(_join(path, name), child, seen)


def _contents(holder: Any) -> str:
    held = ", ".join(f"{name} ({type(value).__name__})" for name, value in list(vars(holder).items())[:8])
    return held or "nothing"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

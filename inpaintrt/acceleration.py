"""Model-level calls: accelerate, restore, refresh. `explain` and `verify` have their own files."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch import nn

from . import adapters, holders
from .explanation import explain
from .recognition import Found, forget_refusal, recognise, refusal, refuse
from .runtime.errors import UnsupportedError
from .runtime.library import dispatchers
from .runtime.policy import use_backend
from .runtime.probe import probe as run_probe
from .runtime.swap import Record, obstacles, record_of, restore_module, swap, why_not_float16
from .verification import verify

__all__ = ["accelerate", "explain", "refresh", "restore", "verify"]

log = logging.getLogger("inpaintrt")
T = TypeVar("T")
PRECISIONS = ("fp32", "ieee", "bf16", "fp16")
Modules = list[tuple[str, nn.Module]]


@overload
def accelerate(  # type: ignore[overload-overlap]  # a TorchScript module is the one thing of which another comes back
    model: torch.jit.ScriptModule,
    *,
    backend: str = ...,
    precision: str = ...,
    only: str | Iterable[str] | None = ...,
    skip: str | Iterable[str] | None = ...,
    probe: bool = ...,
    strict: bool = ...,
    composited: bool = ...,
) -> nn.Module: ...
@overload
def accelerate(
    model: T,
    *,
    backend: str = ...,
    precision: str = ...,
    only: str | Iterable[str] | None = ...,
    skip: str | Iterable[str] | None = ...,
    probe: bool = ...,
    strict: bool = ...,
    composited: bool = ...,
) -> T: ...
def accelerate(
    model: Any,
    *,
    backend: str = "auto",
    precision: str = "fp32",
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    probe: bool = True,
    strict: bool = False,
    composited: bool = False,
) -> Any:
    """Swap the modules of `model` that have a fused form, in place, and return the same object.

    Nothing that a caller can see changes: parameters, state-dict keys, dtypes, memory layouts and outputs (within the
    tolerance rule of `inpaintrt.testing.compare`) stay. Calling it again re-applies the options. In training mode, or
    while a hook sits on a bypassed child, a swapped module runs its original forward; `explain` says so.

    A TorchScript module cannot be changed in place: **another model comes back**, a reference network rebuilt from its
    weights, accelerated, in eval mode, on its device, called as it is called. It is rebuilt only if it gives the
    archive's own numbers; otherwise the archive itself comes back, and `explain` says why.

    Of an object that is no module, the modules in its attributes are accelerated in place; a TorchScript module there, or
    inside a module, is replaced in its attribute by the rebuilt model.

    Args:
        model: any module, of which containers are swapped where recognised, else what they contain; or an object that
            holds modules, such as an application's (image, mask) → image callable.
        backend: "auto", or a backend that every op inside must use (`UnsupportedError` on the call where it cannot).
        precision: "fp32" (torch's own switches decide about TF32), "ieee" (no TF32: where torch's switches allow it, the
            original forward runs; no Winograd), "bf16" (convolutions in bfloat16, spectra in float32), "fp16" where a
            model survives it (LaMa does not: its activations overflow, so it is refused).
        only, skip: module paths or adapter names, with shell wildcards ("model.*", "lama.*").
        probe: compare original and fused forward on small inputs before keeping a swap. What is rebuilt from TorchScript
            is always compared with it.
        strict: raise `UnsupportedError` when a recognised module cannot be swapped or a TorchScript module not be rebuilt.
        composited: a promise that the caller composites the output with the mask; adapters may then skip work that
            cannot reach the hole. The output elsewhere is not the original's, so `verify` finds it wrong. DeepFill's
            attention uses it; `explain` says what it came to.

    Raises:
        ValueError: unknown option value, or a pattern that fits no module and no adapter.
        TypeError: an object that holds no torch module.
        UnsupportedError: with `strict`, or for fp16 on a model that does not survive it.
    """
    with use_backend(backend):
        pass  # the name is checked where all names are
    if precision not in PRECISIONS:
        near = difflib.get_close_matches(precision, PRECISIONS, n=1)
        raise ValueError(
            f"precision is {precision!r}{f'; did you mean {near[0]!r}?' if near else ''} "
            f"Accepted: {', '.join(PRECISIONS)}"
        )
    chosen, skipped = _patterns(only), _patterns(skip) or ()
    options = _Options(backend, precision, chosen, skipped, probe, strict, composited)
    box = _Box(model)
    modules = list(holders.named_modules(model))
    alone = isinstance(model, torch.jit.ScriptModule)
    rebuilt = _rebuild_scripts([holders.Slot("", box, "model", model)] if alone else holders.scripts(model), options)
    for slot, network in {id(network): (slot, network) for slot, network in rebuilt}.values():
        modules += network.named_modules(prefix=slot.path)
    for pattern in (*(chosen or ()), *skipped):
        _check_pattern(pattern, modules)
    if precision == "fp16":
        _refuse_fp16(modules, options)
    try:
        _swap_all(modules, options)
        if composited:
            adapters.deepfill.restrict(module for _, module in modules)
        for path, network in adapters.mat.networks(modules):
            _restrict_mat(path, network, options)
        for slot, network in rebuilt:
            _put(slot, network, options)
    except UnsupportedError:
        restore(model)
        raise
    return box.model


@dataclass(frozen=True)
class _Options:
    backend: str
    precision: str
    chosen: tuple[str, ...] | None
    skipped: tuple[str, ...]
    probe: bool
    strict: bool
    composited: bool


class _Box:
    """Holds the one thing that has no holder: a TorchScript module given by itself."""

    def __init__(self, model: Any) -> None:
        self.model = model


def restore(model: T) -> T:
    """Undo `accelerate`: original classes, TorchScript modules back in their attributes, nothing left behind.

    Returns the same object. A model rebuilt from a TorchScript module given by itself stays the rebuilt one, and plain.
    """
    holders.put_back(model)
    for _, module in holders.named_modules(model):
        restore_module(module)
        forget_refusal(module)
    return model


def refresh(model: T) -> T:
    """Forget everything derived from the weights of `model` that is kept between calls; returns the same object.

    Needed only after writes that torch cannot see (through `.data` or a numpy view). Folded weights are recomputed on
    each call and need no refresh; backends are looked up again.
    """
    for dispatcher in dispatchers.values():
        dispatcher.clear()
    return model


# ---- parts ----------------------------------------------------------------------------------------------------------


def _swap_all(modules: Modules, options: _Options) -> None:
    recognised = swapped = 0
    inside: set[nn.Module] = set()  # what swapped containers hold; shared modules are listed once
    for path, module in modules:
        item = None if module in inside else recognise(path, module)
        if item is None or not _wanted(item.path, item.adapter.name, options):
            continue
        recognised += 1
        why_not = _swap_one(item, options)
        if why_not:
            restore_module(module)
            refuse(module, item.adapter.name, why_not)
            if options.strict:
                raise UnsupportedError(item.name, {item.adapter.name: [why_not]})
            continue
        forget_refusal(module)
        if not getattr(item.adapter, "holds", False):
            inside.update(module.modules())
        swapped += 1
    log.info("%d of %d recognised modules accelerated (see inpaintrt.explain)", swapped, recognised)


def _swap_one(item: Found, options: _Options) -> str:
    """Swap, probe; the reason against it, which may be found only after the class was replaced."""
    if item.why_not:
        return item.why_not
    record = Record(item.adapter, options.backend, options.precision, options.composited)
    swap(item.module, record)
    if not options.probe:
        return ""
    finding = run_probe(item.module)
    if finding.note:
        swap(item.module, dataclasses.replace(record, note=finding.note))
    return finding.why_not


def _restrict_mat(path: str, network: nn.Module, options: _Options) -> None:
    adapters.mat.release(network)
    if not options.composited or not _wanted(path, adapters.mat.NAME, options):
        return
    record = Record(adapters.mat.NetworkAdapter(0), options.backend, options.precision, options.composited)
    if why_not := next(obstacles(network), "") or adapters.mat.restrict(network, record):
        refuse(network, adapters.mat.NAME, why_not)
        if options.strict:
            raise UnsupportedError(path or type(network).__name__, {adapters.mat.NAME: [why_not]})


def _refuse_fp16(modules: Modules, options: _Options) -> None:
    """No family of today survives float16. Asked before anything is changed."""
    for path, module in modules:
        item = recognise(path, module)
        if item is not None and not item.why_not and _wanted(path, item.adapter.name, options):
            raise UnsupportedError(item.name, {"fp16": [why_not_float16(item.adapter)]})


def _rebuild_scripts(slots: list[holders.Slot], options: _Options) -> list[tuple[holders.Slot, nn.Module]]:
    """Reference networks for the TorchScript modules that can have one, each with the attribute where it would go."""
    made: dict[int, nn.Module | str] = {}
    found = []
    for slot in slots:
        script: Any = slot.module
        forget_refusal(script)
        if any(
            fnmatch.fnmatchcase(name, p) for p in options.skipped for name in (slot.path, adapters.torchscript.NAME)
        ):
            continue
        if id(script) not in made:
            made[id(script)] = adapters.torchscript.rebuild(script)
        network = made[id(script)]
        if isinstance(network, str):
            _refuse_script(slot, network, options)
        else:
            found.append((slot, network))
    return found


def _put(slot: holders.Slot, network: nn.Module, options: _Options) -> None:
    """The rebuilt network in place of its archive, if acceleration found anything to do in it."""
    if not any(record_of(m) for m in network.modules()):
        reasons = [why[1] for m in network.modules() if (why := refusal(m))]
        if reasons or (options.chosen is None and not options.skipped):
            _refuse_script(slot, f"nothing in it can be accelerated: {'; '.join(reasons) or 'unknown parts'}", options)
        return
    try:
        holders.replace(slot, network)
    except (AttributeError, TypeError, ValueError) as error:
        _refuse_script(slot, f"its holder does not let the attribute {slot.name!r} be replaced: {error}", options)


def _refuse_script(slot: holders.Slot, why: str, options: _Options) -> None:
    refuse(slot.module, adapters.torchscript.NAME, why)
    if options.strict:
        raise UnsupportedError(slot.path or "the TorchScript module", {adapters.torchscript.NAME: [why]})


def _patterns(value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    return None if value is None else (value,) if isinstance(value, str) else tuple(value)


def _wanted(path: str, adapter: str, options: _Options) -> bool:
    def fits(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in patterns for name in (path, adapter))

    return (options.chosen is None or fits(options.chosen)) and not fits(options.skipped)


def _check_pattern(pattern: str, modules: Modules) -> None:
    known = (
        [path for path, _ in modules]
        + [a.name for a in adapters.ADAPTERS]
        + [adapters.torchscript.NAME, adapters.mat.NAME]
    )
    if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
        near = difflib.get_close_matches(pattern, known, n=1)
        raise ValueError(f"{pattern!r} fits no module and no adapter{f'; did you mean {near[0]!r}?' if near else ''}")

"""Trials: which of several known forms a stranger's module computes, found by running it.

Modules of one kind differ in ways that leave no trace in their structure: how they sample, what they do with masked keys,
whether a norm that they hold is ever called. So the module is run on small inputs, in float64, and the known forms are
tried in a fixed order; the first with the same numbers, to float32's resolution, is what the module is. The answer depends
on the class and the plain attributes of the module only, and is remembered by them: an attribute that changes later asks
again. Compiled code finds what was remembered before and never runs a trial.

A module is tried as a copy: with recipe weights where it has weights, in eval mode, without hooks; the module itself, its
random numbers and its buffers are not touched.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from inpaintrt.runtime.swap import disabled
from inpaintrt.runtime.wide import Widened
from inpaintrt.testing.recipe import state_for

T = TypeVar("T")
_PLAIN = (int, float, str, types.NoneType, types.FunctionType, types.BuiltinFunctionType)
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_names: dict[type, tuple[str, ...]] = {}


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """The class of a module and its plain attributes, in a fixed order."""
    cls = getattr(type(module), "__inpaintrt_original__", type(module))
    if not torch.compiler.is_compiling():  # accelerate() has seen every module that a compiled graph holds
        known = _names.get(cls, ())
        found = {name for name, value in vars(module).items() if _is_plain(value)} - _OF_ANY_MODULE
        if not found.issubset(known):
            _names[cls] = tuple(sorted(found.union(known)))
    return (cls, *[_hashable(getattr(module, name, None)) for name in _names.get(cls, ())])


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, (tuple, list)) else value


class Verdicts(Generic[T]):
    """What trials found, by the settings of modules: a form, or the sentence that says why there is none."""

    def __init__(self, judge: Callable[[Any], T | str]) -> None:
        self._judge = judge
        self._known: dict[tuple[Any, ...], T | str] = {}

    def of(self, module: nn.Module, key: tuple[Any, ...]) -> T | str:
        found = self._known.get(key)
        if found is None:
            if torch.compiler.is_compiling():
                return "it was changed after it was accelerated; accelerate it again before compiling"
            found = self._known[key] = self._judge(module)
        return found


def bare_copy(module: nn.Module, instead: dict[int, Tensor] | None = None) -> Any:
    """A deep copy in eval mode, without hooks; with other tensors `instead` of those with these ids."""
    # Tensors that an earlier forward left in plain attributes may have a graph, which cannot be copied.
    left = (v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor))
    twin = copy.deepcopy(module, {id(t): t.detach().clone() for t in left} | (instead or {}))
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin.eval()


class Twin:
    """A copy of a module to run in trials; both of its dtypes start from the same state."""

    def __init__(self, module: nn.Module) -> None:
        self._single = bare_copy(module)
        state = state_for(self._single)
        with torch.no_grad():
            for name, tensor in (*self._single.named_parameters(), *self._single.named_buffers()):
                if name in state:  # integers stay
                    tensor.copy_(state[name])
        own = next(iter(state.values()), None)
        wanted = "cuda" if getattr(module, "use_cuda", False) and torch.cuda.is_available() else "cpu"
        self.device = torch.device(wanted) if own is None else own.device

    def copy(self, dtype: torch.dtype) -> Any:
        """A fresh module in `dtype`."""
        module = copy.deepcopy(self._single)
        return module.double() if dtype == torch.float64 else module.float()

    def run(self, *args: Any) -> Any:
        """The original's result for arguments of one dtype; raises what it raises."""
        dtype = next(t.dtype for t in args if isinstance(t, Tensor))
        wide = Widened() if dtype == torch.float64 else contextlib.nullcontext()
        with torch.no_grad(), disabled(), _default_dtype(dtype), torch.random.fork_rng(devices=[]), wide:
            return self.copy(dtype).forward(*args)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules that make constants in their forward can be run in float64 only so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same(got: Any, exact: Any) -> bool:
    """Equal shapes and, to float32's resolution, equal values in float64; non-finite ones in the same places."""
    if not isinstance(got, Tensor) or not isinstance(exact, Tensor) or got.shape != exact.shape:
        return False
    finite = exact.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    gap = (got.double() - exact.double())[finite].abs()
    limit = torch.finfo(torch.float32).eps * exact[finite].abs().max() if gap.numel() else 0.0
    return not gap.numel() or bool(gap.max() <= limit)

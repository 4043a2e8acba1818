"""How a module becomes fast: its class is replaced by a generated subclass whose `forward` is an adapter's.

The object stays the same object, so parameters, state-dict keys, hooks, `.to()`, DataParallel and isinstance keep
working; a deep copy stays swapped; a pickle holds the original class, so that saved files never need this library.
The subclass decides on every call whether the fused forward applies, and runs the original one where it does not.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from .policy import use_backend, use_ieee
from .settings import settings

_RECORD = "_inpaintrt"
_disabled: ContextVar[bool] = ContextVar("inpaintrt_disabled", default=settings.disable)
_insistent: ContextVar[bool] = ContextVar("inpaintrt_insistent", default=False)


class Adapter(Protocol):
    """One kind of module that can be swapped. Stateless: everything is read from the module on each call."""

    name: str
    ops: tuple[str, ...]
    algorithm: str
    deep: bool
    """A container of many layers, whose rounding error its depth amplifies; `verify` judges its parts."""
    # `named = True`, which is optional: calls by keywords come with these in the places that the original's forward
    # gives them, omitted ones at their defaults. Without it such calls are the original's. `holds = True`, also optional:
    # what the module contains is swapped by itself, and called by its fused forward.
    # `takes_keywords = True`, optional as well: forward and refuses take the other keywords by name.
    # `step_table(module, timesteps, y, batch)`, of diffusion networks: a `StepTable`.

    def match(self, module: nn.Module) -> str | None:
        """None: can be swapped. "": not this kind of module. Otherwise: of this kind, and why it cannot be swapped."""

    def forward(self, module: Any, *args: Any) -> Any:
        """The fused forward; equals the module's own."""

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        """Sentences against this call (types, dtypes); nothing when `forward` can take it."""

    def probe_inputs(self, module: nn.Module) -> Iterator[tuple[Any, ...]]:
        """Small inputs on which original and fused forward are compared before the swap is kept."""


@dataclass(frozen=True)
class Record:
    """Why and how one module was swapped."""

    adapter: Adapter
    backend: str
    precision: str
    composited: bool
    note: str = ""
    """What the probe found worth telling although the swap is kept."""


class StepTable(Protocol):
    """Timesteps of a schedule, each (batch,), which carry what a swapped network makes of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int | Tensor) -> Tensor:
        """Of a number, or of an int64 tensor () on their device, which the host does not read."""


def step_tables(model: object) -> Callable[[Tensor, Tensor | None, int], StepTable] | None:
    """What turns timesteps (N,), labels (batch,) or None and the batch into a `StepTable` of a swapped diffusion network.
    None for any other model."""
    record = record_of(model) if isinstance(model, nn.Module) else None
    make = getattr(record and record.adapter, "step_table", None)
    return None if make is None else functools.partial(make, model)


def why_not_float16(adapter: Adapter) -> str:
    """Of no family a fused forward in float16 is known to be safe; spectra grow with the size of the image, too."""
    what = "its activations and spectra" if "fourier_unit" in adapter.ops else "its activations"
    return f"{what} may overflow float16, which gives black images (use bf16)"


def record_of(module: nn.Module) -> Record | None:
    return module.__dict__.get(_RECORD)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Within this context accelerated modules run their original forward."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


@contextlib.contextmanager
def insistent() -> Iterator[None]:
    """Within this context fused forwards run also where the original is known to be faster: for comparisons."""
    token = _insistent.set(True)
    try:
        yield
    finally:
        _insistent.reset(token)


def is_insistent() -> bool:
    return _insistent.get()


def swap(module: nn.Module, record: Record) -> None:
    if record_of(module) is None:
        module.__class__ = _subclass(type(module))  # type: ignore[arg-type]
    module.__dict__[_RECORD] = record


def restore_module(module: nn.Module) -> None:
    """Undo `swap`: class and `__dict__` as before."""
    if record_of(module) is not None:
        module.__class__ = type(module).__inpaintrt_original__  # type: ignore[attr-defined]
        del module.__dict__[_RECORD]


def obstacles(module: nn.Module) -> Iterator[str]:
    """What keeps a module's class from being replaced."""
    if "forward" in module.__dict__:
        yield "its forward is overridden on the instance (an offloading library's hook), which would hide the swap"
    if hasattr(module, "parametrizations"):
        yield "the module itself is parametrized; remove the parametrization first"
    if isinstance(module, torch.jit.ScriptModule):
        yield "it is a TorchScript module, which cannot be changed in place"


def why_original(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The reason why this call runs the original forward, or an empty string. Evaluated on every call.

    `kwargs` are the keyword arguments that say more than the original's defaults.
    """
    # A compiled graph is fixed: it takes what holds when it is compiled, and context variables cannot be traced.
    if not torch.compiler.is_compiling() and _disabled.get():
        return "acceleration is disabled"
    record: Record = module.__dict__[_RECORD]
    if kwargs and not getattr(record.adapter, "takes_keywords", False):
        return f"called with keyword arguments ({', '.join(kwargs)})"
    if _torch_module._has_any_global_hook():
        return "global module hooks are installed"
    for child in module.modules():
        if child.training:
            return "the module is in training mode"
        if child is not module and (
            child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
        ):
            return f"a hook sits on a child that the fused forward bypasses ({type(child).__name__})"
    given = (*args, *kwargs.values())
    if record.precision == "ieee" and torch.compiler.is_compiling():
        return "precision='ieee' is a context around the ops, which a compiled graph does not keep"
    if record.precision == "ieee" and _tf32_allowed(given):
        return "precision='ieee', but torch's switches allow TF32 on this device, and they are not ours to change"
    if refusal := next(record.adapter.refuses(module, *args, **kwargs), ""):
        return refusal
    if _autocast_dtype(given) == torch.float16:  # the caller's choice, and the original's result
        return f"under float16 autocast: {why_not_float16(record.adapter)}"
    return ""


def _autocast_dtype(args: tuple[Any, ...]) -> torch.dtype | None:
    """What autocast computes in on the device of this call; None where it is off."""
    device = next((t.device.type for t in _tensors(args)), "meta")
    if device == "meta" or not torch.is_autocast_enabled(device):  # the meta device knows no autocast
        return None
    return torch.get_autocast_dtype(device)


def _tf32_allowed(args: tuple[Any, ...]) -> bool:
    """Whether torch may round the inputs of this call's convolutions or products to TF32."""
    if not any(t.is_cuda for t in _tensors(args)):
        return False
    cudnn: Any = torch.backends.cudnn  # its `conv` is made at run time
    return "tf32" in (cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


def arranged(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of a swapped module as `why_original` takes it: without keywords that say no more than the defaults, and,
    for adapters that are `named`, with the others in the places that the original's forward gives them, if it does."""
    record = record_of(module)
    if not kwargs or record is None:
        return args, kwargs
    names, defaults = type(module).__inpaintrt_parameters__  # type: ignore[attr-defined]
    left = {name: value for name, value in kwargs.items() if value is not defaults.get(name, module)}
    if not getattr(record.adapter, "named", False):
        return args, left
    placed = list(args)
    for name in names[len(args) :]:
        if not any(key in names for key in left):
            break
        if name not in kwargs and defaults[name] is inspect.Parameter.empty:
            return args, left
        placed.append(kwargs.get(name, defaults[name]))
        left.pop(name, None)
    return tuple(placed), left


def _parameters(original: Any) -> tuple[list[str], dict[str, Any]]:
    """Names of a forward's positional parameters, and the defaults of all (`empty` where there is none)."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return names, {p.name: p.default for p in parameters}


def _run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    record: Record = module.__dict__[_RECORD]
    forward = functools.partial(record.adapter.forward, module, **kwargs)
    given = (*args, *kwargs.values())
    if record.precision == "bf16" and _autocast_dtype(given) is None:
        result_dtype = _dtype(given)
        # Without its cache: inside a caller's autocast it would keep weights that may change before the next call.
        with torch.autocast(_device_type(given), dtype=torch.bfloat16, cache_enabled=False):
            return _cast(_with_backend(record, forward, args), result_dtype)
    return _with_backend(record, forward, args)


def _with_backend(record: Record, forward: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if not record.adapter.ops or (record.backend == "auto" and record.precision != "ieee"):
        return forward(*args)
    with policy_of(record):
        return forward(*args)


@contextlib.contextmanager
def policy_of(record: Record) -> Iterator[None]:
    """The context in which the ops of a swapped module run."""
    with contextlib.ExitStack() as stack:
        if record.backend != "auto":
            stack.enter_context(use_backend(record.backend))
        if record.precision == "ieee":
            stack.enter_context(use_ieee())
        yield


def _tensors(args: Any) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (tuple, list)):
            yield from _tensors(a)


def _device_type(args: tuple[Any, ...]) -> str:
    return next(_tensors(args)).device.type


def _dtype(args: tuple[Any, ...]) -> torch.dtype:
    return next(_tensors(args)).dtype


def _cast(result: Any, dtype: torch.dtype) -> Any:
    if isinstance(result, Tensor):
        return result.to(dtype)
    return type(result)(_cast(r, dtype) for r in result) if isinstance(result, (tuple, list)) else result


@functools.cache
def _subclass(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A slice of a Sequential is made by its class, so it has the class but was never swapped.
        placed, left = arranged(self, args, kwargs)
        if record_of(self) is None or why_original(self, placed, left):
            return original.forward(self, *args, **kwargs)
        return _run(self, placed, left)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != _RECORD}
        return copyreg._reconstructor, (original, object, None), state  # type: ignore[attr-defined]

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        twin = cls.__new__(cls)  # type: ignore[call-overload]
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != _RECORD}, memo))
        if record := record_of(self):
            twin.__dict__[_RECORD] = record
        return twin

    def extra_repr(self: Any) -> str:
        record = record_of(self)
        mark = f"accelerated: {record.adapter.name}" if record else ""
        return ", ".join(filter(None, (original.extra_repr(self), mark)))

    cls = type(
        original.__name__,
        (original,),
        {
            "forward": forward,
            "__reduce_ex__": __reduce_ex__,
            "__deepcopy__": __deepcopy__,
            "extra_repr": extra_repr,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__inpaintrt_original__": original,
            "__inpaintrt_parameters__": _parameters(original),
        },
    )
    return cls

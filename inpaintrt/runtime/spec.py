"""An op's specification: its reference and what is true of it, from which everything else is derived."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inpaintrt.testing.compare import DIRECT, Numerics

Outputs = tuple[Tensor, ...]
Args = tuple[Any, ...]

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


def direct(*args: Any) -> Numerics:
    """The numerics of most kernels."""
    return DIRECT


@dataclass(frozen=True)
class Lane:
    """What one backend can do for one op."""

    dtypes: frozenset[torch.dtype] = FLOATS
    refuses: Callable[..., Iterator[str]] | None = None
    """Called with the op's arguments; yields one sentence per problem, nothing when the call is supported."""
    numerics: Callable[..., Numerics] = direct
    """What may be asked of a call with these arguments."""


@dataclass(frozen=True)
class Cost:
    """What a call needs at least, for % of floor: floating-point operations, and bytes read plus written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Sample:
    """One call for tests and benchmarks: shapes of the tensor arguments by name, and the other arguments."""

    id: str
    shapes: Mapping[str, tuple[int, ...]]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    """Tensors that hold 0 and 1 instead of any number; no gradient is asked of them."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that hold these numbers, in this dtype (coefficients, seeds); their shapes are in `shapes` too."""

    def tensors(self, generator: torch.Generator, scale: float = 1.0) -> dict[str, Tensor]:
        """Normal numbers of standard deviation `scale`; masks are 1 in a box of about a third of each side."""
        return {name: self._tensor(name, shape, generator, scale) for name, shape in self.shapes.items()}

    def _tensor(self, name: str, shape: tuple[int, ...], generator: torch.Generator, scale: float) -> Tensor:
        if name in self.values:
            return self.values[name].clone()
        return _box(shape, generator) if name in self.masks else scale * torch.randn(shape, generator=generator)


def _box(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mask = torch.zeros(shape)
    for image in mask.unbind():
        box = image
        for dim, size in enumerate(shape[1:]):
            length = -(-size // 3)
            if size > 1:
                start = int(torch.randint(size - length + 1, (), generator=generator))
                box = box.narrow(dim, start, length)
        box.fill_(1.0)
    return mask


@dataclass(frozen=True, eq=False)
class OpSpec:
    """Everything the runtime knows of an op.

    reference: the definition. A typed, differentiable function of plain torch operations; its signature is the schema.
    out: allocates the outputs from the arguments, checks them (`ValueError`), and serves as the fake kernel; strides
        depend on the inputs only.
    lanes: backends in order of preference. The reference is always last and implicit.
    backward_lanes: backends that have a kernel for the gradient; elsewhere it is the reference's.
    samples: calls for the generated tests; level "smoke" is a subset of "full"; "bench" is real layer shapes.
    cost: of a call, from its arguments.
    into: for ops that write into tensors of their callers too: called with those tensors as a tuple and then the arguments,
        checks both (`ValueError`).
    """

    name: str
    reference: Callable[..., Any]
    out: Callable[..., Outputs]
    lanes: Mapping[str, Lane]
    samples: Callable[[str], Iterator[Sample]]
    cost: Callable[..., Cost]
    summary: str
    backward_lanes: Mapping[str, Lane] = field(default_factory=dict)
    differentiable: bool = True
    into: Callable[..., None] | None = None

    def run_reference(self, *args: Any) -> Any:
        """The reference, given the arguments as one tuple in schema order."""
        return apply_in_order(self.reference, self.signature, args)

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.reference, eval_str=True)

    def bind(self, *args: Any, **kwargs: Any) -> Args:
        """The arguments in schema order, defaults filled in; a stack of tensors stands for a list of them."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor) and self.signature.parameters[name].annotation == list[Tensor]:
                bound.arguments[name] = list(value.unbind())
        return tuple(bound.arguments.values())


def apply_in_order(function: Callable[..., Any], signature: inspect.Signature, args: Args) -> Any:
    """Call `function` with arguments in schema order, keyword-only ones by name."""
    bound = inspect.BoundArguments(signature, dict(zip(signature.parameters, args, strict=True)))  # type: ignore[arg-type]
    return function(*bound.args, **bound.kwargs)


def as_outputs(result: Any) -> Outputs:
    """An op's Python result as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)

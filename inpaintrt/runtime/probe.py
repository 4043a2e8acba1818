"""The numeric probe: original and fused forward on small inputs, before a swap is kept.

Structure proposes a swap, numbers decide. Both forwards run through `torch.func.functional_call`, so the module's own
parameters and buffers are never written; once with recipe weights (a fresh model has zeros and ones where a mistake
would hide), once with the module's own. Two questions are asked:

1. Do they compute the same function? Both in float64, where rounding is nine digits below anything a mistake causes: they
   must agree to float32's resolution.
2. Is the fused form as accurate? In the module's dtype, by the library's one rule (`testing.compare`). Deep containers skip
   this: depth amplifies rounding chaotically (for big-lama at 16×16 the ratio of two equally accurate computations'
   errors scatters from 0.5 to 6), so there it would reject by chance; `verify` judges their parts instead.

An original that fails because this device's inverse FFT is not the CPU's (`runtime.inverse`) is asked again under the
numpy rule; where it then agrees the swap is kept, with a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from inpaintrt.testing.compare import Numerics, close_to_truth, flat_tensors
from inpaintrt.testing.recipe import state_for

from .dispatch import launches, numerics_of
from .inverse import inverse_note, numpy_inverse
from .swap import Adapter, disabled, insistent, record_of
from .wide import Widened


@dataclass(frozen=True)
class Finding:
    """What a probe found: `why_not` is empty where both forwards agree; `note` is worth telling nevertheless."""

    why_not: str = ""
    note: str = ""


def probe(module: nn.Module) -> Finding:
    """Compare a swapped module with its original."""
    record = record_of(module)
    assert record is not None, "probe() needs a swapped module"
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    device = next((t.device for t in own.values()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    fused = _Fused(module, record.adapter)
    training = {m: m.training for m in module.modules()}
    note = ""

    def ours(state: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
        return functional_call(fused, _inside(state), args)

    def original(state: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
        with disabled():
            return functional_call(module, state, args)

    try:
        module.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad(), insistent():
            if next(record.adapter.probe_inputs(module), None) is None:  # compared while it was recognised
                return Finding()
            for weights, state in (("recipe weights", state_for(module)), ("the model's own weights", own)):
                state = {name: tensor.detach().clone() for name, tensor in state.items()}
                double = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
                for args in record.adapter.probe_inputs(module):
                    args = _convert(args, device)
                    if reason := next(record.adapter.refuses(module, *args), ""):
                        return Finding(f"the fused forward cannot run: {reason}")
                    wide = (double, in_double(args))
                    finding = compare(ours, original, (state, args), wide, deep=record.adapter.deep)
                    if finding.why_not:
                        return Finding(f"probe with {weights}, input {_shapes(args)}: {finding.why_not}")
                    note = finding.note or note
    finally:
        for m, mode in training.items():
            m.training = mode
    return Finding(note=note)


def compare(
    ours: Callable[..., Any], original: Callable[..., Any], own: tuple[Any, ...], wide: tuple[Any, ...], *, deep: bool
) -> Finding:
    """Ask both questions of two computations, each called with `own` (its own dtype) and with `wide` (float64)."""
    with launches() as heard:
        actual = flat_tensors(ours(*own))
    numerics, double = numerics_of(heard), flat_tensors(ours(*wide))
    try:
        expected = flat_tensors(original(*own))
        with Widened():
            truth = flat_tensors(original(*wide))
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return Finding(f"the original cannot run on the probe's input: {type(error).__name__}: {error}")
    why_not = _difference(actual, double, truth, expected, numerics, deep=deep)
    if not why_not:
        return Finding()
    with numpy_inverse() as inverse:
        by_rule, exact = flat_tensors(original(*own)), flat_tensors(original(*wide))
    if not inverse.calls or _difference(actual, double, exact, by_rule, numerics, deep=deep):
        return Finding(why_not)
    return Finding(note=inverse_note(truth, exact))


class _Fused(nn.Module):
    """The fused forward alone, without the per-call decision, so that the probe cannot compare the original to itself."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.module = module
        self.adapter = adapter

    def forward(self, *args: Any) -> Any:
        return self.adapter.forward(self.module, *args)


def _inside(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def _difference(
    actual: list[Tensor],
    wide: list[Tensor],
    truth: list[Tensor],
    expected: list[Tensor],
    numerics: Numerics,
    *,
    deep: bool,
) -> str:
    if len(actual) != len(expected):
        return f"{len(actual)} outputs where the original has {len(expected)}"
    for got, exact, double, base in zip(actual, truth, wide, expected, strict=True):
        if got.shape != base.shape or got.dtype != base.dtype or got.stride() != base.stride():
            return (
                f"output {tuple(got.shape)} {got.dtype} strides {got.stride()} where the original has "
                f"{tuple(base.shape)} {base.dtype} strides {base.stride()}"
            )
        if not bool(got.isfinite().all()) and bool(base.isfinite().all()):
            return "non-finite output where the original's is finite"
        gap = (double - exact).abs().max().item() if exact.numel() else 0.0
        limit = torch.finfo(torch.float32).eps * exact.abs().max().item() if exact.numel() else 0.0
        if not gap <= limit:
            return f"another function: in float64 the outputs differ by {gap:.3g}, float32's resolution is {limit:.3g}"
        if not deep and not (verdict := close_to_truth(got, exact, base, numerics=numerics)).ok:
            return verdict.message
    return ""


def in_double(args: Any) -> Any:
    """`args` with floating-point tensors in float64, also those within tuples and lists; masks of integers stay as they are."""
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)


def _convert(args: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(device), args)


def _shapes(args: Any) -> str:
    return ", ".join(str(tuple(t.shape)) for t in flat_tensors(args))

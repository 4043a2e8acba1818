"""The tolerance rule. It is derived from the reference's own rounding error, so no test carries a hand-made number.

error(actual) ≤ 2 · error(baseline) + 2 · eps(dtype) · max|truth|, where errors are taken against a float64 truth and the
baseline is the reference in the dtype under test; checked as maximum and as root mean square. The first factor is 12 and
8 for Winograd convolutions, whose products cancel more. NaN and infinities of the actual result must be where the
baseline has them. (The rule flash-attention's tests made common, with a rounding band so that an exact baseline does not
demand an exact kernel.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BAND = 2.0


@dataclass(frozen=True)
class Numerics:
    """How many times the reference's rounding error a kernel may make (before the rounding band)."""

    rms: float = 2.0
    max: float = 2.0


DIRECT = Numerics()
WINOGRAD = Numerics(rms=8.0, max=12.0)
"""Fewer products, whose sums cancel more: a second class of float32, with a bound of its own."""


@dataclass(frozen=True)
class Verdict:
    """Result of one comparison; `ok` or a `message` that says where and by how much."""

    ok: bool
    max_error: float
    rms_error: float
    max_allowed: float
    rms_allowed: float
    message: str = ""

    @property
    def share(self) -> float:
        """The larger of both errors as a share of what is allowed: 1 is the limit."""
        return max(_ratio(self.max_error, self.max_allowed), _ratio(self.rms_error, self.rms_allowed))


def close_to_truth(actual: Tensor, truth: Tensor, baseline: Tensor, *, numerics: Numerics = DIRECT) -> Verdict:
    """Judge `actual` by the tolerance rule.

    Args:
        actual: the result under test.
        truth: the reference in float64, same shape.
        baseline: the reference in `actual`'s dtype, same shape.
        numerics: how many times the baseline's error is allowed; only Winograd convolutions state another than 2.

    Raises: `ValueError` where shapes or dtypes do not fit, which is never a matter of tolerance.
    """
    if actual.shape != truth.shape or baseline.shape != truth.shape:
        raise ValueError(
            f"shapes differ: actual {tuple(actual.shape)}, truth {tuple(truth.shape)}, baseline {tuple(baseline.shape)}"
        )
    if truth.dtype != torch.float64:
        raise ValueError(f"truth has dtype {truth.dtype}; accepted: float64")
    if actual.dtype != baseline.dtype:
        raise ValueError(f"dtypes differ: actual {actual.dtype}, baseline {baseline.dtype}")
    if actual.numel() == 0:
        return Verdict(True, 0.0, 0.0, 0.0, 0.0)
    got, expected, exact = (t.detach().to("cpu", torch.float64) for t in (actual, baseline, truth))

    finite = expected.isfinite() & exact.isfinite()
    odd = (
        ~got.isfinite() if bool(finite.all()) else (got.isfinite() != expected.isfinite()) | _other_kind(got, expected)
    )
    if bool(odd.any()):
        at = tuple(odd.nonzero()[0].tolist())
        return Verdict(
            False,
            torch.inf,
            torch.inf,
            0.0,
            0.0,
            f"non-finite values differ in {int(odd.sum())} places, first at {at}: "
            f"{got[at].item()} where the baseline has {expected[at].item()}",
        )
    got, expected, exact = (torch.where(finite, t, 0.0) for t in (got, expected, exact))
    error, own = (got - exact).abs(), (expected - exact).abs()
    band = BAND * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    max_error, max_allowed = error.max().item(), numerics.max * own.max().item() + band
    rms_error, rms_allowed = _rms(error), numerics.rms * _rms(own) + band
    message = ""
    if max_error > max_allowed or rms_error > rms_allowed:
        at = tuple(_index(int(error.argmax()), error.shape))
        message = (
            f"max error {max_error:.3g} (allowed {max_allowed:.3g}), RMS {rms_error:.3g} (allowed {rms_allowed:.3g}); "
            f"worst at {at}: {got[at].item():.9g}, truth {exact[at].item():.9g}, baseline {expected[at].item():.9g}"
        )
    return Verdict(not message, max_error, rms_error, max_allowed, rms_allowed, message)


def assert_close_to_truth(
    actual: Tensor, truth: Tensor, baseline: Tensor, *, numerics: Numerics = DIRECT, context: str = ""
) -> None:
    """`close_to_truth` as an assertion; `context` (op, backend, case) opens the message."""
    verdict = close_to_truth(actual, truth, baseline, numerics=numerics)
    assert verdict.ok, f"{context + ': ' if context else ''}{verdict.message}"


def flat_tensors(result: Any) -> list[Tensor]:
    """All tensors of a model's output, depth first: a tensor, or nested tuples, lists and dictionaries of them."""
    if isinstance(result, Tensor):
        return [result]
    items = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [tensor for item in items for tensor in flat_tensors(item)]


def _other_kind(a: Tensor, b: Tensor) -> Tensor:
    """Both non-finite, but NaN against infinity or of other sign."""
    both = ~a.isfinite() & ~b.isfinite()
    return both & ((a.isnan() != b.isnan()) | (~a.isnan() & ~b.isnan() & (a != b)))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt().item())


def _ratio(error: float, allowed: float) -> float:
    return 0.0 if error == 0 else error / allowed if allowed > 0 else float("inf")


def _index(flat: int, shape: torch.Size) -> list[int]:
    index: list[int] = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return index[::-1]

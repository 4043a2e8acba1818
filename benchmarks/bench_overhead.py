"""What a call costs before and after its kernel: Python, torch's dispatcher, allocation, binding.

Three things cannot be avoided: a registered op, one `torch.empty` for the result, and the binding's call. The design
allows 3 µs of Python beyond them. The kernel itself works on one element here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.runtime import native
from inpaintrt.testing.timing import interleave, median_interval, summary

MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}
ALLOWED_US = 3.0


@pytest.fixture
def bare_op() -> Iterator[object]:
    """An op of the same signature that does nothing: what torch charges for being an op."""
    library = torch.library.Library("inpaintrt_bench", "DEF")
    library.define("bare(Tensor y, str activation, float? alpha, float gain) -> Tensor")
    kept = torch.empty(1, 1, 1, 1)

    def bare(y: Tensor, activation: str, alpha: float | None, gain: float) -> Tensor:
        return kept

    library.impl("bare", bare, "CompositeExplicitAutograd")
    yield torch.ops.inpaintrt_bench.bare.default
    library._destroy()


@pytest.mark.skipif(bool(native.missing()), reason=f"not run: {native.missing()}")
@pytest.mark.parametrize("mode", MODES)
def test_call(versus, bare_op, mode):
    y = torch.randn(1, 2, 1, 1)
    args = (y, "elu", None, 1.0)
    outs = (torch.empty(1, 1, 1, 1),)
    kernel = native.library().cpu_kernel("gated_activation")
    parts = {
        "bare op": lambda: bare_op(*args),
        "torch.empty": lambda: torch.empty((1, 1, 1, 1), dtype=torch.float32, device=y.device),
        "binding": lambda: kernel(args, outs, 1),
    }
    candidates = {"inpaintrt": lambda: ops.gated_activation(y), **parts}
    with MODES[mode]():
        kernel(args, outs, 1)
        assert torch.equal(ops.gated_activation(y), outs[0])
        for call in parts.values():
            call()
        if versus.smoke:
            versus.skip_timing()
            return
        times = interleave(candidates, rounds=100)
    beyond = [whole - sum(own) for whole, *own in zip(*(times[name] for name in candidates), strict=True)]
    median, low, high = (1e6 * v for v in median_interval(beyond))
    listed = " + ".join(f"{name} {1e6 * summary(times[name]).p50:.2f}" for name in parts)
    versus.record(
        times,
        shape=y.shape,
        op="gated_activation",
        mode=mode,
        beyond_us={"median": median, "low": low, "high": high, "allowed": ALLOWED_US},
        notes=[f"{median:.2f} µs [{low:.2f}, {high:.2f}] beyond {listed}; allowed {ALLOWED_US}"],
    )

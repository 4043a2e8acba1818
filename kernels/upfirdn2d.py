"""upfirdn2d in Triton: zeros between the samples, padding, a FIR filter and decimation as index arithmetic (`_fir.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._conv2d import example
from ._fir import resampling
from ._lib import Budget, Launch, run


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> Launch | None:
    """The launch for (x, f, up, down, padding, flip_filter, gain) -> (out,), or None where out is empty. Reads no data."""
    x, f, up, down, padding, flip_filter, gain = args
    return resampling(x, f, outs[0], up=up, down=down, padding=padding, flipped=flip_filter, factor=gain)


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,) from the op's arguments."""
    run(forward(args, outs), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------

BUDGET = Budget(registers=128, shared_bytes=0)


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: Co-ModGAN's resampling in each dtype and layout, 64-bit offsets."""
    for label, batch, channels, side, up, down in (
        ("float32 NCHW", 1, 64, 128, 2, 1),
        ("float32 NHWC", 1, 64, 128, 1, 2),
        ("bfloat16 NCHW", 1, 64, 128, 1, 1),
        ("float16 NHWC", 1, 64, 128, 2, 1),
        ("float32 NCHW wide", 64, 64, 1024, 2, 1),
    ):
        x, size = example(label, batch, channels, side, side), side * up // down
        out, f = example(label, batch, channels, size, size), torch.empty((4, 4), device="meta")
        launch = forward((x, f, [up, up], [down, down], [2, 1, 2, 1], False, 4.0), (out,))
        assert launch is not None, "variants are not empty"
        yield f"forward {label}", launch

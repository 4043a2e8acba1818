"""partial_conv2d in Triton: u · (window/(s + eps) · u · conv(x · mask) + bias), and u = s within [0, 1]; without a bias
the outer u is left out.

s, the sum of the mask over each window, is the same for every output channel: one plane, made by a small kernel. The
convolution masks what it reads, finds ratio and u of each pixel from that plane, and writes the result once
(`_conv2d.py`). Windows where u is 0 give exactly 0, whatever eps is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ._conv2d import BUDGET as BUDGET
from ._conv2d import box_sums, convolution, example, example_precision
from ._lib import Launch, run


def forward(args: Sequence[Any], outs: Sequence[Tensor], precision: str | None = None) -> list[Launch]:
    """The launches for the op's arguments -> (out, updated mask), in order. `precision`: see `convolution`."""
    x, mask, weight, bias, stride, padding, dilation, scale, eps = args
    out, updated = outs
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    launches, sums = box_sums(mask, updated, kernel=weight.shape[2:], **geometry)
    window = mask.shape[1] * weight.shape[2] * weight.shape[3] if scale == "window" else 1
    return launches + convolution(
        x, weight, out, bias=bias, mask=mask, sums=sums, window=window, eps=eps, precision=precision, **geometry
    )


def launch(args: Sequence[Any], outs: Sequence[Tensor], precision: str | None = None) -> None:
    """Fill outs = (out, updated mask) from the op's arguments. `precision`: see `convolution`."""
    run(forward(args, outs, precision), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: PConv-UNet's layers in each precision and layout, both kinds of mask."""
    for label, batch, channels, outputs, side, planes in (
        ("float32 NCHW", 1, 192, 64, 256, 1),
        ("float32 NHWC", 1, 192, 64, 256, 192),
        ("tf32 NHWC", 1, 192, 64, 256, 192),
        ("bfloat16 NCHW", 1, 192, 64, 256, 192),
        ("bfloat16 NHWC", 1, 192, 64, 256, 1),
        ("float16 NCHW wide", 8, 64, 64, 2048, 1),
    ):
        x, out = example(label, batch, channels, side, side), example(label, batch, outputs, side, side)
        mask, updated = example(label, batch, planes, side, side), x.new_empty(batch, 1, side, side)
        args = (x, mask, x.new_empty(outputs, channels, 3, 3), x.new_empty(outputs), 1, [1] * 4, 1, "window", 1e-8)
        *sums, _, last = forward(args, (out, updated), example_precision(label))
        for stage, launch in enumerate(sums):
            yield f"forward {label} sums {stage}", launch
        yield f"forward {label}", last

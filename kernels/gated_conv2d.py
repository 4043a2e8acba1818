"""gated_conv2d in Triton: gain · act(f) · sigmoid(g), where f and g are the halves of one convolution's channels.

A program holds a tile of features and the same tile of gates: two accumulators that share every read of the input
(`_conv2d.py`). C channels are written instead of 2C written, and read and written again by activation and product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ._conv2d import BUDGET as BUDGET
from ._conv2d import convolution, example, example_precision
from ._lib import Launch, run


def forward(args: Sequence[Any], outs: Sequence[Tensor], precision: str | None = None) -> list[Launch]:
    """The launches for the op's arguments -> (out,), in order; none where out is empty. `precision`: see `convolution`."""
    x, weight, bias, stride, padding, dilation, padding_mode, activation, alpha, gain = args
    return convolution(
        x,
        weight,
        outs[0],
        bias=bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
        activation=activation,
        alpha=alpha,
        gated=True,
        gain=gain,
        precision=precision,
    )


def launch(args: Sequence[Any], outs: Sequence[Tensor], precision: str | None = None) -> None:
    """Fill outs = (out,) from the op's arguments. `precision`: see `convolution`."""
    run(forward(args, outs, precision), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: DeepFill's layers in each precision and layout."""
    for label, batch, channels, outputs, side, kernel, stride, padding_mode, activation in (
        ("float32 NCHW", 1, 96, 96, 128, 3, 1, "zeros", "elu"),
        ("float32 NHWC", 1, 24, 24, 256, 3, 1, "reflect", "leaky_relu"),
        ("tf32 NCHW", 1, 96, 96, 128, 3, 1, "zeros", "elu"),
        ("tf32 NHWC", 1, 96, 96, 128, 3, 1, "zeros", "elu"),
        ("bfloat16 NCHW", 1, 5, 24, 512, 5, 1, "replicate", "elu"),
        ("bfloat16 NHWC", 1, 96, 96, 128, 3, 1, "zeros", "elu"),
        ("float16 NHWC", 1, 24, 48, 512, 3, 2, "zeros", "silu"),
        ("bfloat16 NHWC wide", 8, 96, 96, 2048, 3, 1, "zeros", "elu"),
    ):
        x = example(label, batch, channels, side, side)
        weight = x.new_empty(2 * outputs, channels, kernel, kernel)
        out = example(label, batch, outputs, side // stride, side // stride)
        args = (x, weight, x.new_empty(2 * outputs), stride, [kernel // 2] * 4, 1, padding_mode, activation, None, 1.0)
        yield f"forward {label}", forward(args, (out,), example_precision(label))[-1]

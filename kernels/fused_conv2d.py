"""fused_conv2d in Triton: act(scale · conv(x) + shift + bias) + residual, all of it in one pass (`_conv2d.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ._conv2d import BUDGET as BUDGET
from ._conv2d import convolution, example, example_precision
from ._lib import Launch, run

# The options in schema order, with the values of a plain 3×3 convolution.
_PLAIN = {
    "bias": None,
    "stride": 1,
    "padding": [1, 1, 1, 1],
    "dilation": 1,
    "groups": 1,
    "padding_mode": "zeros",
    "mask": None,
    "upsample": 1,
    "transposed": False,
    "output_padding": 0,
    "scale": None,
    "shift": None,
    "activation": "none",
    "alpha": None,
    "residual": None,
    "residual_mode": "after",
    "second": None,
    "second_weight": None,
}


def forward(args: Sequence[Any], outs: Sequence[Tensor], precision: str | None = None) -> list[Launch]:
    """The launches for the op's arguments -> (out,), in order; none where out is empty. `precision`: see `convolution`."""
    x, weight, *values = args
    options = dict(zip(_PLAIN, values, strict=True))
    del options["output_padding"]  # the shape of out says it
    if options.pop("second_weight") is not None:
        raise ValueError("a second part of x with a weight of its own is not covered")
    return convolution(x, weight, outs[0], precision=precision, **options)


def launch(args: Sequence[Any], outs: Sequence[Tensor], precision: str | None = None) -> None:
    """Fill outs = (out,) from the op's arguments. `precision`: see `convolution`."""
    run(forward(args, outs, precision), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: layers of LaMa, DeepFill, GLCIC; each precision, layout and form."""
    for label, channels, outputs, side, options, tensors in (
        ("float32 NCHW", 512, 128, 64, {"padding_mode": "reflect", "activation": "relu"}, "bias residual"),
        ("float32 NHWC", 512, 128, 64, {"padding_mode": "reflect", "residual_mode": "before"}, "residual"),
        ("float32 NHWC masked", 64, 64, 256, {"activation": "elu"}, "mask scale shift"),
        ("tf32 NCHW", 512, 128, 64, {"padding_mode": "reflect", "activation": "relu"}, "bias"),
        ("tf32 NHWC", 128, 384, 64, {"padding_mode": "reflect", "activation": "relu"}, "bias residual second"),
        ("bfloat16 NCHW transposed", 512, 256, 64, {"transposed": True, "stride": 2, "output_padding": 1}, "bias"),
        ("bfloat16 NHWC", 256, 256, 128, {"activation": "relu"}, "scale shift residual"),
        ("bfloat16 NHWC doubled", 192, 96, 128, {"upsample": 2, "activation": "elu"}, "bias"),
        ("float16 NHWC halved", 96, 96, 128, {"upsample": 2, "padding": [2] * 4, "dilation": 2, "groups": 2}, ""),
        ("float32 NCHW wide", 64, 64, 8192, {"padding_mode": "replicate", "activation": "silu"}, "bias"),
        ("bfloat16 NHWC wide", 64, 64, 8192, {"padding_mode": "replicate", "activation": "silu"}, "bias"),
    ):
        values: dict[str, Any] = _PLAIN | options
        x, out_side = example(label, 1, channels, side, side), side * values["upsample"] * (1 + values["transposed"])
        inputs = channels * (1 + ("second" in tensors))
        rows, columns = (inputs, outputs) if values["transposed"] else (outputs, inputs // values["groups"])
        out = example(label, 1, outputs, out_side, out_side)
        for name in tensors.split():
            values[name] = {"mask": x[:, :1], "residual": out, "second": x}.get(name, x.new_empty(outputs))
        args = (x, x.new_empty(rows, columns, 3, 3), *values.values())
        pack, launch = forward(args, (out,), example_precision(label))
        if "bfloat16 NHWC" in label or label == "float32 NCHW":
            yield f"pack {label}", pack
        yield f"forward {label}", launch

r"""Gated convolution: one convolution makes features and gates, and the gates weigh the features.

$$ [f \mid g] = \mathrm{conv}(\mathrm{pad}(x), W) + b, \qquad
   \mathrm{out} = \mathrm{gain} \cdot \mathrm{act}(f) \cdot \sigma(g) $$

The gate is a learned soft mask per channel and pixel (Yu et al., "Free-Form Image Inpainting with Gated Convolution",
ICCV 2019, eq. 2). Eager torch writes 2C channels and reads and writes them three times more; the kernels hold feature
and gate of a pixel in registers side by side and write C channels once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from ._convolution import (
    NO_PADDING,
    check_operands,
    check_parameters,
    check_shape,
    convolve,
    output_size,
    refuses_wide,
    single,
)
from ._engine import cpu_numerics, cpu_refuses
from ._shared import activate, check_activation, empty_output, pad_sides


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: list[int] = NO_PADDING,
    dilation: int = 1,
    padding_mode: str = "zeros",
    activation: str = "elu",
    alpha: float | None = None,
    gain: float = 1.0,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        inside = bias if bias is not None and bias.dtype == x.dtype else None
        y = single(convolve(x, weight.to(x.dtype), inside, stride, padding, dilation, 1, padding_mode))
        if bias is not None and inside is None:
            y = y + bias.view(-1, 1, 1)
        features, gates = y.chunk(2, dim=1)
        return (gain * activate(features, activation, alpha) * torch.sigmoid(gates)).to(x.dtype)


def _out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    padding_mode: str,
    activation: str,
    alpha: float | None,
    gain: float,
) -> Outputs:
    check_operands(x, weight, stride, dilation, padding, padding_mode)
    check_activation(activation, alpha)
    outputs, inputs = weight.shape[:2]
    if x.shape[1] != inputs or outputs % 2:
        raise ValueError(
            f"x has {x.shape[1]} channels, weight is {tuple(weight.shape)}; accepted: (2C, {x.shape[1]}, kh, kw)"
        )
    check_shape("bias", bias, (outputs,))
    check_parameters(x, weight=weight, bias=bias)
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation, padding_mode)
    shape = (x.shape[0], outputs // 2, *size)
    return (empty_output(shape, x),)


def _gpu_refuses(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> Iterator[str]:
    """Float32 weights or bias beside half precision."""
    yield from refuses_wide(x, weight, bias)


def _cpu_refuses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    *rest: object,
) -> Iterator[str]:
    """Kernels longer than 64, strides above 8."""
    yield from cpu_refuses(x, weight, stride, padding, dilation)


def _cpu_numerics(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: list[int], dilation: int, *rest: object
) -> object:
    return cpu_numerics(x, weight, stride, padding, dilation)


def _samples(level: str) -> Iterator[Sample]:
    def sample(
        id: str,
        x: tuple[int, ...],
        outputs: int,
        kernel: int | tuple[int, int] = 3,
        *,
        bias: bool = True,
        **kwargs: object,
    ) -> Sample:
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        shapes = {"x": x, "weight": (2 * outputs, x[1], kh, kw)}
        if bias:
            shapes["bias"] = (2 * outputs,)
        reach = int(kwargs.get("dilation", 1))  # type: ignore[call-overload]
        sides = [reach * (kh // 2), reach * (kw // 2)] * 2
        return Sample(id, shapes, {"padding": sides, **kwargs})

    if level == "bench":
        # DeepFill v2 at 512 pixels, widths after gating: the first layer, a strided one, stride-1 and dilated ones.
        yield sample("5to24x512-k5", (1, 5, 512, 512), 24, 5)
        yield sample("24to48x512-s2", (1, 24, 512, 512), 48, stride=2)
        for channels, side in ((24, 256), (48, 256), (96, 128)):
            yield sample(f"{channels}to{channels}x{side}", (1, channels, side, side), channels)
        for dilation in (2, 4, 8, 16):
            yield sample(f"96to96x128-d{dilation}", (1, 96, 128, 128), 96, dilation=dilation)
        return
    yield sample("winograd", (1, 5, 18, 22), 7)
    yield sample("reflect", (2, 18, 17, 14), 17, padding_mode="reflect", activation="relu")
    yield sample("dilated", (1, 6, 37, 21), 5, dilation=4, activation="silu", gain=1.8)
    yield sample("strided", (1, 4, 12, 9), 3, stride=2, padding=[0, 0, 1, 1], activation="leaky_relu", alpha=0.1)
    yield sample("k5", (1, 3, 9, 8), 4, 5, activation="none", bias=False)
    yield sample("small", (1, 4, 3, 5), 6, padding_mode="replicate", activation="tanh")
    yield sample("one", (1, 1, 1, 1), 1, 1, activation="sigmoid")
    yield sample("oblong", (1, 3, 6, 7), 2, (2, 4), padding=[1, 2, 0, 1])
    yield sample("empty_batch", (0, 3, 4, 4), 2)
    if level == "full":
        yield sample("pointwise", (2, 33, 12, 11), 20, 1)
        yield sample("wide", (1, 130, 24, 20), 65)
        yield sample("k5_wide", (1, 20, 40, 33), 24, 5, padding_mode="replicate")
        yield sample("k4_strided", (1, 12, 20, 18), 9, 4, stride=2, padding=[1, 1, 1, 1])
        yield sample("k7", (1, 4, 30, 26), 8, 7, padding_mode="reflect")
        yield sample("far", (1, 3, 40, 39), 4, dilation=16, padding_mode="reflect")
        yield sample("threads", (3, 33, 45, 31), 25, activation="elu", alpha=0.5)


def _cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: list[int], dilation: int, *_: object
) -> Cost:
    h, w = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    out = x.shape[0] * weight.shape[0] // 2 * h * w
    flops = 4.0 * out * weight[0].numel() + 25.0 * out
    return Cost(flops=flops, bytes=x.nbytes + weight.nbytes + out * x.element_size())


SPEC = OpSpec(
    name="gated_conv2d",
    summary="gain · act(f) · sigmoid(g) of one convolution's halves f and g, in one pass",
    reference=_reference,
    out=_out,
    lanes={
        "triton": Lane(refuses=_gpu_refuses),
        "cuda": Lane(refuses=_gpu_refuses),
        "cupy": Lane(refuses=_gpu_refuses),
        "cpu": Lane(dtypes=frozenset({torch.float32, torch.bfloat16}), refuses=_cpu_refuses, numerics=_cpu_numerics),  # type: ignore[arg-type]
    },
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int = 1,
    padding_mode: str = "zeros",
    activation: str = "elu",
    alpha: float | None = None,
    gain: float = 1.0,
) -> Tensor:
    """gain · act(f) · sigmoid(g), where f and g are the halves of conv(x, weight) + bias along the channels, f first.

    Args:
        x: (B, Cin, H, W), float32, bfloat16, float16 (float64: reference only); any strides.
        weight: (2C, Cin, kh, kw), filters of features first, then of gates. Two convolutions are one with their weights
            concatenated. Dtype of x, or float32 beside x of half precision: rounded to x's dtype as it is read.
        bias: (2C,), dtype of x, or float32 beside x of half precision: used as it is.
        stride, dilation: as in torch, the same in both directions.
        padding: on all sides, or (vertical, horizontal), or (top, left, bottom, right), or "same" (torch's: the larger
            half last, for stride 1), or "tf_same" (TensorFlow's, for any stride: output size ⌈size/stride⌉).
        padding_mode: "zeros", "reflect" (edge not repeated) or "replicate".
        activation: of the features: "none", "relu", "leaky_relu", "elu", "silu", "sigmoid" or "tanh".
        alpha: slope of "leaky_relu" (default 0.2) or scale of "elu" (default 1.0); None for the others.
        gain: factor on the result.

    Returns:
        (B, C, H', W'), dtype of x, channels_last if x is, else contiguous. Differentiable.

    Raises:
        ValueError: shapes, dtypes or options do not fit; the message names them.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Sums and what follows them are float32, rounded once. On the CPU, stride-1 3×3 and 5×5 convolutions of float32 are
    Winograd's (see `fused_conv2d`). Source: Yu et al., ICCV 2019, eq. 2.
    """
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; accepted: 4-D tensors")
    sides = pad_sides(padding, x.shape[2:], weight.shape[2:], stride, dilation)
    return _call(x, weight, bias, stride, sides, dilation, padding_mode, activation, alpha, gain)  # type: ignore[no-any-return]

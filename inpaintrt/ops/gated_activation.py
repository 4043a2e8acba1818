r"""Gated activation: the pointwise end of a gated convolution.

$$ y = [f \mid g], \qquad \mathrm{out} = \mathrm{gain} \cdot \mathrm{act}(f) \cdot \sigma(g) $$

The gate σ(g) is a learned soft mask per channel and pixel (Yu et al., "Free-Form Image Inpainting with Gated
Convolution", ICCV 2019, eq. 2); DeepFill v2 and its ports end nearly every layer with it. Eager torch makes three passes
with two temporaries; the kernels make one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from ._shared import ACTIVATIONS, activate, check_activation, memory_format


def _reference(y: Tensor, *, activation: str = "elu", alpha: float | None = None, gain: float = 1.0) -> Tensor:
    features, gates = y.chunk(2, dim=1)
    return gain * activate(features, activation, alpha) * torch.sigmoid(gates)


def _out(y: Tensor, activation: str, alpha: float | None, gain: float) -> Outputs:
    if y.dim() != 4 or y.shape[1] % 2:
        raise ValueError(f"y has shape {tuple(y.shape)}; accepted: (B, 2C, H, W), an even number of channels")
    if not y.is_floating_point():
        raise ValueError(f"y has dtype {y.dtype}; accepted: floating point")
    check_activation(activation, alpha)
    b, c, h, w = y.shape
    return (torch.empty((b, c // 2, h, w), dtype=y.dtype, device=y.device, memory_format=memory_format(y)),)


def _samples(level: str) -> Iterator[Sample]:
    if level == "bench":
        # DeepFill v2's layers for a 512-pixel image: (48, 256²), (96, 128²) and (192, 64²) after the split.
        for channels, side in ((96, 256), (192, 128), (384, 64)):
            yield Sample(f"{channels}x{side}", {"y": (1, channels, side, side)})
        return
    yield Sample("odd", {"y": (2, 6, 5, 7)})
    yield Sample("one", {"y": (1, 2, 1, 1)}, {"activation": "none"})
    yield Sample("long_row", {"y": (1, 2, 3, 1031)}, {"activation": "silu", "gain": 1.41421356})
    yield Sample("empty_batch", {"y": (0, 4, 3, 3)})
    for activation in ACTIVATIONS:
        yield Sample(activation, {"y": (1, 4, 9, 4)}, {"activation": activation})
    yield Sample("alpha", {"y": (1, 4, 3, 5)}, {"activation": "leaky_relu", "alpha": 0.01})
    if level == "full":
        yield Sample("elu_alpha", {"y": (3, 34, 33, 17)}, {"activation": "elu", "alpha": 0.5, "gain": 0.3})
        yield Sample("many_rows", {"y": (2, 130, 65, 3)}, {"activation": "tanh"})
        yield Sample("threads", {"y": (1, 16, 96, 97)}, {"activation": "elu"})


def _cost(y: Tensor, activation: str, alpha: float | None, gain: float) -> Cost:
    return Cost(flops=12.5 * y.numel(), bytes=1.5 * y.numel() * y.element_size())


SPEC = OpSpec(
    name="gated_activation",
    summary="gain · act(f) · sigmoid(g), the end of a gated convolution",
    reference=_reference,
    out=_out,
    lanes={"cuda": Lane(), "triton": Lane(), "cupy": Lane(), "cpu": Lane()},
    backward_lanes={"triton": Lane(), "cpu": Lane()},
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)


def gated_activation(y: Tensor, *, activation: str = "elu", alpha: float | None = None, gain: float = 1.0) -> Tensor:
    """gain · act(f) · sigmoid(g), with features f = y[:, :C] and gates g = y[:, C:].

    Args:
        y: (B, 2C, H, W), float32, bfloat16, float16 (float64: reference only); any strides.
        activation: of the features: "none", "relu", "leaky_relu", "elu", "silu", "sigmoid" or "tanh".
        alpha: slope of "leaky_relu" (default 0.2) or scale of "elu" (default 1.0); None for the others.
        gain: factor on the result.

    Returns:
        (B, C, H, W), dtype of y, channels_last if y is, else contiguous. Differentiable.

    Raises:
        ValueError: y is not 4-D with an even channel count, or activation and alpha do not fit.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Arithmetic is float32 for half-precision inputs, rounded once. Source: Yu et al., ICCV 2019, eq. 2.
    """
    return _call(y, activation, alpha, gain)  # type: ignore[no-any-return]

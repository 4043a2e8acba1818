r"""Modulated convolution: a convolution whose filters a style vector scales, once per image.

$$ w'_{oik} = \gamma\, W_{oik}\, s_i, \quad d_o = \Big(\textstyle\sum_{ik} {w'_{oik}}^2 + \varepsilon\Big)^{-1/2}, \quad
   y = d_o \, \mathrm{conv}(x, w'), \quad
   \mathrm{out} = \mathrm{clamp}(g \cdot \mathrm{act}(y + \nu n + b)) $$

StyleGAN 2's layer (Karras et al., CVPR 2020, section 2.2 and appendix B), with its noise n of strength ν, and with doubling
(zeros, convolution, FIR filter) or halving (FIR filter, convolution) in the same call. Co-ModGAN, MAT and FcF are built of it.
Public code makes filters for each image and convolves in as many groups. The same in reals, without them: scale the
channels of x by γs, convolve once with W, and scale the outputs by d, for which Σ_k W² per pair of channels is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample
from inpaintrt.testing.compare import Numerics

from ._convolution import check_alike, check_shape, single
from ._engine import cpu_numerics, cpu_refuses
from ._resampling import resample, resampled_size
from ._shared import activate, check_activation, empty_output
from .upfirdn2d import as_filter

LARGEST_FILTER = 8
AMPLIFIED = ("relu", "leaky_relu", "silu")
"""Activations whose default gain is √2: of normal numbers they leave about half the variance."""


def default_gain(activation: str) -> float:
    return 2**0.5 if activation in AMPLIFIED else 1.0


def modulated(weight: Tensor, style: Tensor, demodulate: bool, eps: float, gain: float) -> Tensor:
    """Filters of each image, (B, Cout, Cin, kh, kw), in the dtype of weight; computed in float32 at least."""
    filters = single(weight)[None] * (gain * single(style))[:, None, :, None, None]
    if demodulate:
        filters = filters * (filters.square().sum((2, 3, 4), keepdim=True) + eps).rsqrt()
    return filters.to(weight.dtype)


def sides(kernel: int, taps: int, up: int, down: int, padding: int) -> tuple[int, int]:
    """Zeros before and after one dimension of the enlarged image: the convolution's padding and what centres the filter."""
    if up > 1:
        return padding + (taps + up - 1) // 2, padding + (taps - up) // 2
    if down > 1:
        return padding + (taps - down + 1) // 2, padding + (taps - down) // 2
    return padding, padding


def convolve_resampled(x: Tensor, filters: Tensor, up: int, down: int, padding: int, f: Tensor) -> Tensor:
    """Image b of x (B, Cin, H, W) convolved with filters[b] (Cout, Cin, kh, kw), doubled or halved by f (rows, columns)."""
    b, outputs, inputs, *kernel = filters.shape
    (top, bottom), (left, right) = (sides(k, taps, up, down, padding) for k, taps in zip(kernel, f.shape, strict=True))

    def fir(x: Tensor, pads: tuple[int, int, int, int], gain: float = 1.0) -> Tensor:
        return resample(x, f, padding=pads, gain=gain).to(filters.dtype)

    if up > 1:
        across = filters.flip([3, 4]).transpose(1, 2).reshape(b * inputs, outputs, *kernel)
        y = F.conv_transpose2d(x.reshape(1, b * inputs, *x.shape[2:]), across, stride=up, groups=b)
        y = y.reshape(b, outputs, *y.shape[2:])
        # The zeros that followed the last sample, and the reach of the kernel, are outputs of the transposed one.
        pads = (left - kernel[1] + 1, right - kernel[1] + up, top - kernel[0] + 1, bottom - kernel[0] + up)
        return fir(y, pads, float(up * up))
    if down > 1:
        x = fir(x, (left, right, top, bottom))
    grouped = x.reshape(1, b * inputs, *x.shape[2:])
    filters = filters.reshape(b * outputs, inputs, *kernel)
    y = F.conv2d(grouped, filters, stride=down, padding=0 if down > 1 else padding, groups=b)
    return y.reshape(b, outputs, *y.shape[2:])


def _reference(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    eps: float = 1e-8,
    weight_gain: float = 1.0,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    flip_weight: bool = False,
    resample_filter: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    alpha: float | None = None,
    gain: float = 1.0,
    clamp: float | None = None,
) -> Tensor:
    images = x.shape[0]
    if not images:  # as many groups as images: of none, torch has no convolution
        x, style = F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)), F.pad(style, (0, 0, 0, 1))
    with torch.autocast(x.device.type, enabled=False):
        filters = modulated(weight.flip([2, 3]) if flip_weight else weight, style, demodulate, eps, weight_gain)
        y = single(convolve_resampled(x, filters, up, down, padding, as_filter(resample_filter, x)))
        if noise is not None:
            y = y + single(noise) * (1 if noise_strength is None else single(noise_strength))
        if bias is not None:
            y = y + single(bias).view(-1, 1, 1)
        y = gain * activate(y, activation, alpha)[:images]
        return (y if clamp is None else y.clamp(-clamp, clamp)).to(x.dtype)


def _size(x: Tensor, weight: Tensor, up: int, down: int, padding: int, f: Tensor | None) -> list[int]:
    """Rows and columns of the output."""
    taps = (1, 1) if f is None or up == down else tuple(f.shape)
    (top, bottom), (left, right) = (sides(k, n, up, down, padding) for k, n in zip(weight.shape[2:], taps, strict=True))
    whole = [k + n - 1 for k, n in zip(weight.shape[2:], taps, strict=True)]
    return resampled_size(x.shape[2:], whole, (up, up), (down, down), (left, right, top, bottom))


def _out(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool,
    eps: float,
    weight_gain: float,
    up: int,
    down: int,
    padding: int,
    flip_weight: bool,
    resample_filter: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    activation: str,
    alpha: float | None,
    gain: float,
    clamp: float | None,
) -> Outputs:
    if x.dim() != 4 or weight.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)}; accepted: 4-D floating-point tensors"
        )
    b, c, *_ = x.shape
    if min(weight.shape) < 1 or weight.shape[1] != c:
        raise ValueError(f"x has {c} channels, weight is {tuple(weight.shape)}; accepted: (Cout, {c}, kh, kw)")
    if (up, down) not in ((1, 1), (2, 1), (1, 2)):
        raise ValueError(f"up is {up}, down {down}; accepted: 1 or 2, not both 2")
    if padding < 0 or not eps >= 0 or (clamp is not None and not clamp >= 0):
        raise ValueError(f"padding is {padding}, eps {eps}, clamp {clamp}; accepted: 0 or more")
    check_activation(activation, alpha)
    check_shape("style", style, (b, c))
    check_shape("bias", bias, (weight.shape[0],))
    if resample_filter is not None and (resample_filter.dim() != 2 or min(resample_filter.shape) < 1):
        raise ValueError(f"resample_filter is {tuple(resample_filter.shape)}; accepted: (rows, columns) or (taps,)")
    if resample_filter is not None and resample_filter.device != x.device:
        raise ValueError(f"resample_filter is on {resample_filter.device}; accepted: x's {x.device}")
    size = _size(x, weight, up, down, padding, resample_filter)
    if noise is None and noise_strength is not None:
        raise ValueError(
            "noise_strength is given and noise is not; accepted: both, noise alone (strength 1) or neither"
        )
    check_shape("noise", noise, *((n, 1, *size) for n in (b, 1)))
    check_shape("noise_strength", noise_strength, (), (1,))
    check_alike(x, weight=weight, style=style, noise=noise, noise_strength=noise_strength, bias=bias)
    return (empty_output((b, weight.shape[0], *size), x),)


def _triton_refuses(x: Tensor, weight: Tensor, *_: object) -> Iterator[str]:
    """Batches whose factors, one for each image and channel, are 2³¹ or more."""
    if x.shape[0] * max(weight.shape[:2]) >= 2**31:
        yield f"{x.shape[0]} images of {max(weight.shape[:2])} channels have more factors than 32 bits count"


def _native_refuses(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool,
    eps: float,
    weight_gain: float,
    up: int,
    down: int,
    padding: int,
    flip_weight: bool,
    resample_filter: Tensor | None,
    *_: object,
) -> Iterator[str]:
    """Kernels longer than 64, FIR filters longer than 8."""
    yield from cpu_refuses(x, weight, down, [padding] * 4, 1)
    if resample_filter is not None and max(resample_filter.shape) > LARGEST_FILTER:
        yield (f"resample_filter is {tuple(resample_filter.shape)}; up to {LARGEST_FILTER} taps on a side are covered")


def _cpu_numerics(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool,
    eps: float,
    weight_gain: float,
    up: int,
    down: int,
    padding: int,
    *_: object,
) -> Numerics:
    return cpu_numerics(x, weight, down, [padding] * 4, 1)


def _samples(level: str) -> Iterator[Sample]:
    def sample(
        id: str, x: tuple[int, ...], outputs: int, kernel: int = 3, *, tensors: str = "", **kwargs: object
    ) -> Sample:
        up, down = int(kwargs.get("up", 1)), int(kwargs.get("down", 1))  # type: ignore[call-overload]
        shapes: dict[str, tuple[int, ...]] = {
            "x": x,
            "weight": (outputs, x[1], kernel, kernel),
            "style": (x[0], x[1]),
        }
        if up != down:
            shapes["resample_filter"] = (4, 4)
        size = [n * up // down for n in x[2:]]
        for name in tensors.split():
            noises = {"noise": (x[0], 1, *size), "noises": (1, 1, *size), "noise_strength": (1,), "bias": (outputs,)}
            shapes[name.replace("noises", "noise")] = noises[name]
        return Sample(id, shapes, {"padding": kernel // 2, **kwargs})

    if level == "bench":
        # Co-ModGAN's decoder at 512 pixels, from its widest to its largest layers, and MAT's first decoder at 512.
        styled: dict[str, Any] = {"tensors": "noises noise_strength bias", "activation": "leaky_relu", "gain": 2**0.5}
        for inputs, outputs, side in ((512, 512, 16), (512, 512, 64), (256, 128, 128), (128, 64, 256)):
            yield sample(f"{inputs}to{outputs}x{side}-up", (1, inputs, side, side), outputs, up=2, **styled)
            yield sample(f"{outputs}to{outputs}x{2 * side}", (1, outputs, 2 * side, 2 * side), outputs, **styled)
        yield sample("64to3x512-rgb", (1, 64, 512, 512), 3, 1, demodulate=False, tensors="bias", clamp=256.0)
        return
    styled = {"tensors": "noise noise_strength bias", "activation": "leaky_relu", "gain": 2**0.5}
    yield sample("styled", (2, 5, 13, 18), 7, **styled)
    yield sample("up", (2, 6, 5, 7), 17, up=2, **styled)
    yield sample("down", (1, 18, 10, 9), 4, down=2, tensors="bias", weight_gain=0.25)
    yield sample("rgb", (3, 9, 8, 6), 3, 1, demodulate=False, tensors="bias", clamp=1.5)
    yield sample("up_flipped", (1, 3, 9, 8), 5, up=2, flip_weight=True, tensors="noises", eps=0.5)
    yield sample("one", (1, 1, 1, 1), 1, 1)
    yield sample("strided", (1, 4, 8, 6), 5, 1, down=2, activation="silu", gain=1.5)
    yield sample("empty_batch", (0, 3, 4, 4), 2)
    if level == "full":
        yield sample("flipped", (1, 5, 9, 7), 6, flip_weight=True, activation="tanh")
        yield sample("k5", (1, 4, 11, 10), 6, 5, tensors="noise")
        yield sample("pointwise_up", (1, 5, 6, 7), 4, 1, up=2, tensors="bias")
        yield sample(
            "wide", (1, 70, 20, 18), 40, up=2, tensors="noise noise_strength bias", activation="relu", gain=2**0.5
        )
        yield sample("threads", (3, 33, 24, 21), 25, down=2, **styled)


def _cost(x: Tensor, weight: Tensor, style: Tensor, *rest: object) -> Cost:
    up, down, padding, f = rest[3], rest[4], rest[5], rest[7]
    h, w = _size(x, weight, up, down, padding, f)  # type: ignore[arg-type]
    out = x.shape[0] * weight.shape[0] * h * w
    # A kernel that doubles by phases has each tap of the filters once, for one of four outputs.
    flops = 2.0 * out * weight[0].numel() / (up * up)  # type: ignore[operator]
    return Cost(flops=flops, bytes=float(x.numel() + weight.numel() + out) * x.element_size())


SPEC = OpSpec(
    name="modulated_conv2d",
    summary="style-modulated convolution with FIR resampling, noise, bias, activation, gain and clamp",
    reference=_reference,
    out=_out,
    lanes={
        "cuda": Lane(refuses=_native_refuses),
        "cupy": Lane(refuses=_native_refuses),
        "triton": Lane(refuses=_triton_refuses),
        "cpu": Lane(dtypes=frozenset({torch.float32, torch.bfloat16}), refuses=_native_refuses, numerics=_cpu_numerics),
    },
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    eps: float = 1e-8,
    weight_gain: float = 1.0,
    up: int = 1,
    down: int = 1,
    padding: int | None = None,
    flip_weight: bool = False,
    resample_filter: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """clamp(gain · act(d · conv(x · style, weight) + noise_strength · noise + bias)), each image in its own style.

    Args:
        x: (B, Cin, H, W), float32, bfloat16, float16 (float64: reference only); any strides.
        weight: (Cout, Cin, kh, kw), shared by all images. Dtype of x, as all tensors but resample_filter.
        style: (B, Cin), what a layer's affine map makes of the style vector, bias included.
        demodulate: whether each output is divided by the norm of its modulated filter, d = (Σ (weight_gain·weight·style)² +
            eps)^−½; else d = 1.
        eps: see `demodulate`; 0 or more.
        weight_gain: factor on the weight, 1/√fan_in where training equalised learning rates.
        up: 2 inserts a zero after each sample, convolves, and filters with 4 · resample_filter.
        down: 2 filters, convolves, and keeps every second sample. Not together with up=2.
        padding: zeros on all sides, in pixels of the enlarged image; None: ⌊kw/2⌋, which keeps, doubles or halves the size.
        flip_weight: True convolves, False correlates as torch does. The public doubling layers of StyleGAN 2 convolve, MAT's
            correlate.
        resample_filter: (rows, columns) or (taps,), for up=2 and down=2; floating point, used as float32; None: 1, no filter.
        noise: (1|B, 1, H', W'), the same for all channels; noise_strength: () or (1,), None: 1.
        bias: (Cout,).
        activation: "none", "relu", "leaky_relu", "elu", "silu", "sigmoid" or "tanh"; `alpha` as in `gated_activation`.
        gain: factor on the activation's result; None: √2 for relu, leaky_relu and silu, else 1.
        clamp: bound of the result's magnitude; None: no bound.

    Returns:
        (B, Cout, H', W'), dtype of x, channels_last if x is, else contiguous. Differentiable.

    Raises:
        ValueError: shapes, dtypes or options do not fit, or there is a noise_strength but no noise; the message names them.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Filters are modulated and demodulated in float32, whatever x is, so that float16 neither overflows nor loses eps. On the
    CPU, Winograd's forms compute what they compute in `fused_conv2d`. Source: Karras et al., CVPR 2020.
    """
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; accepted: 4-D tensors")
    pads = weight.shape[3] // 2 if padding is None else padding
    f = None if resample_filter is None or up == down else as_filter(resample_filter, x, "resample_filter")
    amplified = default_gain(activation) if gain is None else gain
    return _call(  # type: ignore[no-any-return]
        x, weight, style, demodulate, eps, weight_gain, up, down, pads, flip_weight, f, noise, noise_strength, bias,
        activation, alpha, amplified, clamp,
    )  # fmt: skip

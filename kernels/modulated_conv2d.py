"""modulated_conv2d in Triton: the shared weight's convolution, with the style on its input and the demodulation on its sums.

No filters per image: a small kernel makes of each image's style a factor per channel and a factor per output, and the
convolution (`_conv2d.py`) reads x times the one and multiplies its sums by the other. Doubling is a transposed
convolution, by phases, whose result the filter reads (`_fir.py`), with noise, bias, activation, gain and bound behind it;
halving filters first.

The factors are taken apart so that 16-bit products stay in range whatever the style is: the input is multiplied by
s/u, at most 1 in magnitude, where u is the power of two above the largest |s|, and the sums by
(Σ (s/u · W)² + eps/(γ·u)²)^−½, which is d·γ·u.

**Cost.** Doubling by phases has 9 products for each input and output channel and pixel of the small image; its
intermediate image is written and read once, 2 · 34 MB for 512 channels at 128×128 in float32, 20 µs at 3.3 TB/s.

Considered:
- The filter folded into the phases' weights, 3×3 taps for each of four: no intermediate image, but 36 products for 9: 77
  GFLOP instead of 19 for 512→512 at 64×64, 1.1 ms instead of 0.3 in IEEE float32 and 75 µs more at 800 TFLOP/s. It would
  win below some 30 channels only.
- Halving with the filter folded into a kernel of 6×6 taps: the same factor of four.
- The sums of squares of the weight, kept between calls: they cost one read of the weight, which the convolution needs in
  the cache anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._conv2d import BUDGET as BUDGET
from ._conv2d import broadcast, convolution, example, example_precision
from ._fir import resampling
from ._lib import Launch, needs_wide, run, to_float32, widened

_OUTPUTS, _CHANNELS = 4, 64  # of a program of `_modulate`


@triton.jit(do_not_specialize=["outputs", "channels", "taps_x", "taps", "sb", "sc", "wn", "wc", "wy", "wx"])
def _modulate(
    weight,  # (outputs, channels, taps_y, taps_x), any strides
    style,  # (B, channels), any strides
    inputs,  # (B, channels) float32: factors on the input
    scales,  # (B, outputs) float32: factors on the sums
    gain,  # on the weight
    eps,
    outputs,
    channels,
    taps_x,
    taps,  # taps_y · taps_x
    sb,
    sc,
    wn,
    wc,
    wy,
    wx,
    DEMODULATE: tl.constexpr,
    WIDE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(outputs, OUTPUTS)
    image, block = widened(tl.program_id(0) // blocks, WIDE), tl.program_id(0) % blocks
    n = block * OUTPUTS + tl.arange(0, OUTPUTS)
    most = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        most = tl.maximum(most, tl.abs(to_float32(tl.load(style + image * sb + c * sc, mask=c < channels, other=0.0))))
    # The power of two above the largest style, between 2⁻⁵⁹ and 2⁶¹.
    largest = tl.minimum(tl.maximum(tl.max(most, 0), 8.7e-19), 1.2e18)
    unit = ((largest.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000).to(tl.float32, bitcast=True)

    total = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        in_c = c < channels
        factor = to_float32(tl.load(style + image * sb + c * sc, mask=in_c, other=0.0)) / unit
        if block == 0:
            tl.store(inputs + image * channels + c, factor, mask=in_c)
        if DEMODULATE:
            at = weight + widened(n, WIDE)[:, None] * wn + (widened(c, WIDE) * wc)[None, :]
            exists = (n < outputs)[:, None] & in_c[None, :]
            for tap in range(taps):
                value = to_float32(tl.load(at + tap // taps_x * wy + tap % taps_x * wx, mask=exists, other=0.0))
                value *= factor[None, :]
                total += value * value
    scale = tl.zeros((OUTPUTS,), tl.float32) + gain * unit
    if DEMODULATE:
        root = tl.sqrt_rn(tl.sum(total, 1) + eps / (scale * scale))
        scale = tl.div_rn(tl.where(scale < 0.0, -1.0, 1.0), root)
    tl.store(scales + image * outputs + n, scale, mask=n < outputs)


def _modulation(
    weight: Tensor, style: Tensor, gain: float, eps: float, demodulate: bool
) -> tuple[Launch, Tensor, Tensor]:
    """The launch that fills factors on the input (B, channels) and on the sums (B, outputs), and these."""
    outputs, channels, taps_y, taps_x = weight.shape
    inputs, scales = (style.new_empty((style.shape[0], n), dtype=torch.float32) for n in (channels, outputs))
    launch = Launch(
        kernel=_modulate,
        grid=(style.shape[0] * triton.cdiv(outputs, _OUTPUTS),),
        args=(
            *(weight, style, inputs, scales, float(gain), float(eps)),
            *(outputs, channels, taps_x, taps_y * taps_x, *style.stride(), *broadcast(weight)),
        ),
        constants={
            "DEMODULATE": demodulate,
            "WIDE": needs_wide(weight, style),
            "OUTPUTS": _OUTPUTS,
            "CHANNELS": _CHANNELS,
        },
        options={"num_warps": 4, "enable_fp_fusion": False},
    )
    return launch, inputs, scales


def _sides(kernel: int, taps: int, up: int, down: int, padding: int) -> tuple[int, int]:
    """Zeros before and after one dimension for the filter: of the transposed convolution's result, or of the input."""
    if up > 1:
        return padding + (taps + up - 1) // 2 - kernel + 1, padding + (taps - up) // 2 - kernel + up
    return padding + (taps - down + 1) // 2, padding + (taps - down) // 2


def forward(args: Sequence[Any], outs: Sequence[Tensor], precision: str | None = None) -> list[Launch]:
    """The launches for the op's arguments -> (out,), in order; none where out is empty. `precision`: see `convolution`."""
    x, weight, style, demodulate, eps, weight_gain, up, down, padding, flip, f, *finish = args
    noise, strength, bias, activation, alpha, gain, bound = finish
    (out,) = outs
    if out.numel() == 0:
        return []
    modulate, inputs, scales = _modulation(weight, style, weight_gain, eps, demodulate)
    launches = [modulate]
    styled = {"mask": inputs[:, :, None, None], "scale": scales, "dilation": 1, "precision": precision}
    after = {"bias": bias, "activation": activation, "alpha": alpha, "gain": gain, "bound": bound}

    def like(t: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=_format(t))

    def filtered(t: Tensor, to: Tensor, **options: Any) -> None:
        taps = f if f is not None else torch.ones((1, 1), device=x.device)
        (top, bottom), (left, right) = (
            _sides(k, n, up, down, padding) for k, n in zip(weight.shape[2:], taps.shape, strict=True)
        )
        launch = resampling(t, taps, to, padding=(left, right, top, bottom), **options)
        assert launch is not None, "neither the output nor what it is made of is empty"
        launches.append(launch)

    if up > 1:
        size = ((n - 1) * up + k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True))
        enlarged = like(out, x.shape[0], weight.shape[0], *size)
        options = {"bias": None, "stride": up, "padding": [0] * 4, "transposed": True, "flipped": not flip}
        launches += convolution(x, weight.transpose(0, 1), enlarged, **options, **styled)
        filtered(enlarged, out, factor=float(up * up), noise=noise, strength=strength, **after)
        return launches
    if down > 1:
        size = ((n - 1) * down + k for n, k in zip(out.shape[2:], weight.shape[2:], strict=True))
        smooth = like(x, *x.shape[:2], *size)
        filtered(x, smooth)
        x, padding = smooth, 0
    more = {"residual": noise, "residual_mode": "before", "residual_strength": strength}
    launches += convolution(x, weight, out, stride=down, padding=[padding] * 4, flipped=flip, **more, **after, **styled)
    return launches


def _format(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.stride(1) == 1 and t.shape[1] > 1 else torch.contiguous_format


def launch(args: Sequence[Any], outs: Sequence[Tensor], precision: str | None = None) -> None:
    """Fill outs = (out,) from the op's arguments. `precision`: see `convolution`."""
    run(forward(args, outs, precision), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: Co-ModGAN's layers in each precision and layout, and its RGB layer."""
    for label, channels, outputs, side, kernel, up, down in (
        ("float32 NCHW", 512, 512, 64, 3, 1, 1),
        ("float32 NHWC up", 128, 64, 128, 3, 2, 1),
        ("tf32 NHWC", 512, 512, 64, 3, 1, 1),
        ("tf32 NCHW up", 128, 64, 128, 3, 2, 1),
        ("bfloat16 NHWC", 512, 512, 64, 3, 1, 1),
        ("bfloat16 NHWC down", 64, 128, 128, 3, 1, 2),
        ("float16 NCHW rgb", 64, 3, 256, 1, 1, 1),
        ("float32 NCHW wide", 64, 64, 8192, 3, 1, 1),
    ):
        x, size = example(label, 1, channels, side, side), side * up // down
        out, rgb = example(label, 1, outputs, size, size), kernel == 1
        f = torch.empty((4, 4), device="meta") if up != down else None
        noise, strength = (None, None) if rgb else (x.new_empty(1, 1, size, size), x.new_empty(1))
        tensors = (x, x.new_empty(outputs, channels, kernel, kernel), x.new_empty(1, channels))
        options = (not rgb, 1e-8, 1.0, up, down, kernel // 2, False, f, noise, strength, x.new_empty(outputs))
        finish = ("none", None, 1.0, 256.0) if rgb else ("leaky_relu", None, 2**0.5, None)
        stages = {"_modulate": "modulate", "_pack": "pack", "_convolve": "forward", "_resample": "filter"}
        for launch in forward((*tensors, *options, *finish), (out,), example_precision(label)):
            yield f"{stages[launch.kernel.__name__]} {label}", launch

"""FIR resampling in Triton, and what may follow it in a modulated convolution: noise, bias, activation, gain, bound.

A program computes BLOCK neighbouring outputs in the order in which they lie in memory. Taps that would meet the zeros
between the samples are left out: of each axis every up-th tap counts, from one that depends on the output's place. All
indices are lifted by a multiple of up, so that none that is divided is negative.

**Cost.** Bound by memory where the filter has 4×4 taps: the reads of neighbouring outputs overlap, and come from the
first cache but once. Counted, not yet timed on a GPU.

Considered:
- Rows and columns in turn, for filters that are outer products, as the CPU kernel does: 8 taps for 16, but the halves meet
  in shared memory or in a second launch, and the products are not what bounds it.
- Vectors of channels in channels_last: Triton proves no contiguity of an index that was divided at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._conv2d import broadcast
from ._lib import Launch, activate, clamp, from_float32, needs_wide, resolve_alpha, to_float32, widened

_INTS = [
    *("total", "channels", "out_h", "out_w", "h", "w", "taps_y", "taps_x", "up_y", "up_x", "down_y", "down_x"),
    *("top", "left", "lift_y", "lift_x", "xb", "xc", "xy", "xx", "fy", "fx", "ob", "oc", "oy", "ox"),
    *("nb", "ny", "nx", "bias_n"),
]


@triton.jit
def _axis(i, up, down, before, lift):
    """Of outputs i along an axis: the first tap that meets a sample, and that sample."""
    at = i * down - before + lift  # of the enlarged, lifted image, at least 0
    first = (up - at % up) % up
    return first, (at + first) // up - lift // up


@triton.jit(do_not_specialize=[*_INTS, "factor", "alpha", "gain", "bound"])
def _resample(
    x,  # (B, channels, h, w), any strides
    f,  # (taps_y, taps_x), any strides
    out,  # (B, channels, out_h, out_w), any strides
    noise,  # (1|B, 1, out_h, out_w), or None
    strength,  # of the noise: one element, or None
    bias,  # (channels,), or None
    factor,  # on the filter
    alpha,
    gain,
    bound,
    total,  # elements of out
    channels,
    out_h,
    out_w,
    h,
    w,
    taps_y,
    taps_x,
    up_y,
    up_x,
    down_y,
    down_x,
    top,  # zeros before the enlarged image; a crop where negative
    left,
    lift_y,  # multiples of up, at least top and left
    lift_x,
    xb,
    xc,
    xy,
    xx,
    fy,
    fx,
    ob,
    oc,
    oy,
    ox,
    nb,
    ny,
    nx,
    bias_n,
    FLIPPED: tl.constexpr,  # correlate
    LAST: tl.constexpr,  # channels of out are neighbours in memory
    ACT: tl.constexpr,
    GAINED: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = widened(tl.program_id(0), WIDE) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    if LAST:
        c, p, q, b = (
            i % channels,
            i // channels // out_w % out_h,
            i // channels % out_w,
            i // channels // out_w // out_h,
        )
    else:
        c, p, q, b = i // out_w // out_h % channels, i // out_w % out_h, i % out_w, i // out_w // out_h // channels
    first_y, row = _axis(p, up_y, down_y, top, lift_y)
    first_x, column = _axis(q, up_x, down_x, left, lift_x)
    x += b * xb + c * xc
    acc = tl.zeros((BLOCK,), tl.float32)
    for y in range(tl.cdiv(taps_y, up_y)):
        tap_y, at_y = first_y + y * up_y, row + y
        in_y = inside & (tap_y < taps_y) & (at_y >= 0) & (at_y < h)
        for z in range(tl.cdiv(taps_x, up_x)):
            tap_x, at_x = first_x + z * up_x, column + z
            exists = in_y & (tap_x < taps_x) & (at_x >= 0) & (at_x < w)
            value = to_float32(tl.load(x + at_y * xy + at_x * xx, mask=exists, other=0.0))
            j, k = (tap_y, tap_x) if FLIPPED else (taps_y - 1 - tap_y, taps_x - 1 - tap_x)
            acc += value * to_float32(tl.load(f + j * fy + k * fx, mask=exists, other=0.0))
    acc *= factor
    if noise is not None:
        more = to_float32(tl.load(noise + b * nb + p * ny + q * nx, mask=inside, other=0.0))
        if strength is not None:
            more *= to_float32(tl.load(strength))
        acc += more
    if bias is not None:
        acc += to_float32(tl.load(bias + c * bias_n, mask=inside, other=0.0))
    acc = activate(acc, alpha, ACT, PRECISE)
    if GAINED:
        acc *= gain
    if BOUNDED:
        acc = clamp(acc, -bound, bound)
    at = b * ob + c * oc + p * oy + q * ox
    tl.store(out + at, from_float32(acc, out.dtype.element_ty), mask=inside)


def resampling(
    x: Tensor,
    f: Tensor,
    out: Tensor,
    *,
    up: Sequence[int] = (1, 1),
    down: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    flipped: bool = False,
    factor: float = 1.0,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    alpha: float | None = None,
    gain: float = 1.0,
    bound: float | None = None,
) -> Launch | None:
    """The launch, or None where out is empty. Reads no data. up, down and padding as of `ops.upfirdn2d`, (x, y) and (left,
    right, top, bottom); out = gain · act(factor · resampled + strength · noise + bias), within ±bound unless None."""
    if out.numel() == 0:
        return None
    (up_x, up_y), (down_x, down_y), (left, _, top, _) = up, down, padding
    last, block = out.stride(1) == 1 and out.shape[1] > 1, 256
    tensors = [t for t in (x, out, noise) if t is not None]
    noise_b, _, noise_y, noise_x = broadcast(noise)
    return Launch(
        kernel=_resample,
        grid=(triton.cdiv(out.numel(), block),),
        args=(
            *(x, f, out, noise, strength, bias),
            *(float(factor), resolve_alpha(activation, alpha), float(gain), float(bound or 0.0)),
            *(out.numel(), *out.shape[1:], *x.shape[2:], *f.shape, up_y, up_x, down_y, down_x, top, left),
            *(up_y * max(0, -(-top // up_y)), up_x * max(0, -(-left // up_x))),
            *(*x.stride(), *f.stride(), *out.stride(), noise_b, noise_y, noise_x),
            0 if bias is None else bias.stride(0),
        ),
        constants={
            "FLIPPED": flipped,
            "LAST": last,
            "ACT": activation,
            "GAINED": gain != 1.0,
            "BOUNDED": bound is not None,
            "PRECISE": x.dtype == torch.float32,
            "WIDE": out.numel() > 2**31 - 2**16 or needs_wide(*tensors),
            "BLOCK": block,
        },
        options={"num_warps": 4, "enable_fp_fusion": False},
    )

"""Statistics of channels in Triton, without sums of squares that cancel, and how tensors are walked channel by channel.

A tile is centred in registers, first by its rounded mean and then by what that left. The rounded mean is kept between the
least and the largest value, so that a constant tile has no deviation at all; and deviations are divided by the largest
before they are squared, so that squares neither overflow nor vanish. Who joins tiles does so in float64: three numbers
each, and on GPUs for games a float64 operation costs 64 of float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ._lib import clamp, to_float32, widened

# ---- pieces ---------------------------------------------------------------------------------------------------------
# A program's tile lies in one sample: pixels of one channel, [PIXELS], or, with channels innermost (LAST), of several,
# [PIXELS, CHANNELS]. The dimension that is last in memory is counted in elements; all strides across it, and its size,
# come in vectors of VEC elements, so that the compiler knows what their alignment is.


@triton.jit
def tile_of(
    pixels, channels, tiles,
    VEC: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """This program's sample, tile, pixels and channel or channels, and which of its elements exist."""
    tile, block = widened(tl.program_id(0) % tiles, WIDE), widened(tl.program_id(0) // tiles, WIDE)
    i = tile * PIXELS + tl.arange(0, PIXELS)
    if LAST:
        blocks = tl.cdiv(channels * VEC, CHANNELS)
        sample = block // blocks
        c = block % blocks * CHANNELS + tl.arange(0, CHANNELS)
        inside = (i < pixels)[:, None] & (c < channels * VEC)[None, :]
    else:
        sample, c = block // channels, block % channels
        inside = i < pixels * VEC
    return sample, tile, i, c, inside


@triton.jit
def offsets_of(
    sample, i, c, width, s_sample, s_channel, s_row, s_pixel,
    VEC: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Distances of the elements of a tile from the tensor's first."""
    if LAST:
        pixel = i * s_pixel if FLAT else i // width * s_row + i % width * s_pixel
        inner = c if VEC > 1 else c * s_channel
        offsets = ((sample * s_sample + pixel) * VEC)[:, None] + inner[None, :]
    else:
        column = i if FLAT else i % (width * VEC)
        outer = sample * s_sample + c * s_channel
        if not FLAT:
            outer += i // (width * VEC) * s_row
        offsets = outer * VEC + (column if VEC > 1 else column * s_pixel)
    return offsets


@triton.jit
def planes_of(sample, c, channels, first, total, VEC: tl.constexpr, LAST: tl.constexpr):
    """Indices of these channels among those of all samples, and which of them exist.

    The tensor's channels may be part of a whole: from `first` on, of `total`.
    """
    limit = channels * VEC if LAST else channels
    return widened(sample, True) * total + first + c, c < limit


@triton.jit
def beside(x, LAST: tl.constexpr):
    """A number per channel of a tile, beside its pixels."""
    return x[None, :] if LAST else x


# ---- moments --------------------------------------------------------------------------------------------------------

SIZES = ["pixels", "channels", "tiles", "width"]


@triton.jit(do_not_specialize=[*SIZES, "planes", "first", "total", "xs", "xc", "xr", "xp"])
def moments(
    x,  # (B, C, H, W), any strides
    parts,  # (3, B·total, tiles): rounded mean, what is left of the mean, root mean square deviation
    pixels,
    channels,
    tiles,
    width,
    planes,
    first,
    total,
    xs,
    xc,
    xr,
    xp,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, tile, i, c, inside = tile_of(pixels, channels, tiles, VEC, LAST, WIDE, PIXELS, CHANNELS)
    at = offsets_of(sample, i, c, width, xs, xc, xr, xp, VEC, LAST, FLAT)
    value = to_float32(tl.load(x + at, mask=inside, other=0.0))
    count = tl.minimum(pixels * (1 if LAST else VEC) - tile * PIXELS, PIXELS).to(tl.float32)
    least = tl.min(tl.where(inside, value, float("inf")), 0)
    largest = tl.max(tl.where(inside, value, float("-inf")), 0)
    mean = clamp(tl.sum(value, 0) / count, least, largest)
    centred = tl.where(inside, value - beside(mean, LAST), 0.0)
    rest = tl.sum(centred, 0) / count
    scale = tl.maximum(tl.maximum(largest - mean, mean - least), 1e-37)
    scaled = tl.where(inside, (centred - beside(rest, LAST)) * beside(1.0 / scale, LAST), 0.0)
    deviation = scale * tl.sqrt_rn(tl.sum(scaled * scaled, 0) / count)
    plane, exists = planes_of(sample, c, channels, first, total, VEC, LAST)
    to = parts + plane * tiles + tile
    step = widened(planes, True) * tiles
    tl.store(to, mean, mask=exists)
    tl.store(to + step, rest, mask=exists)
    tl.store(to + 2 * step, deviation, mask=exists)


# ---- forms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How the tensors of a call are walked: sizes and strides as the kernels take them, see "pieces"."""

    vec: int
    last: bool  # channels are innermost
    flat: bool  # the pixels of every tensor are one row
    pixels: int
    channels: int
    width: int
    strides: tuple[tuple[int, int, int, int], ...]  # per tensor: of samples, channels, rows, pixels


def form(tensors: Sequence[Tensor]) -> Form:
    """The form of tensors of one shape, not empty; the last is the output, whose memory format decides."""
    _, c, *image = tensors[-1].shape
    # Of a dimension of size 1 the stride means nothing; as 0 it hinders nothing.
    found = [[s if n > 1 else 0 for n, s in zip(t.shape, t.stride(), strict=True)] for t in tensors]
    across = 3 if image[0] == 1 or (image[1] > 1 and found[-1][3] <= found[-1][2]) else 2  # the inner image dimension
    rows, width = (image[0], image[1]) if across == 3 else (image[1], image[0])
    strides = [(s[0], s[1], s[5 - across], s[across]) for s in found]
    last = c > 1 and strides[-1][1] < strides[-1][3]
    flat = rows == 1 or all(s[2] == s[3] * width for s in strides)
    if flat:
        width *= rows
    inner, size = (1, c) if last else (3, width)
    vec = 16 // tensors[-1].element_size() if all(s[inner] == 1 for s in strides) else 1
    outer = [n for s in strides for d, n in enumerate(s) if d != inner and not (flat and d == 2)]
    while any(n % vec for n in (size, *outer)):
        vec //= 2
    units = tuple(tuple(n if d == inner else n // vec for d, n in enumerate(s)) for s in strides)
    pixels = width if flat else rows * width
    if last:
        return Form(vec, last, flat, pixels, c // vec, width, units)  # type: ignore[arg-type]
    return Form(vec, last, flat, pixels // vec, c, width // vec, units)  # type: ignore[arg-type]

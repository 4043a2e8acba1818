"""aot_gate in Triton: out = x + (fuse − x) · sigmoid(10 · (gate − mean)/(std + eps) − 5), by channel.

Three launches. `_moments` takes mean and deviation of a tile of pixels, of one channel or, in NHWC, of 32 side by side;
`_lines` joins the tiles of each channel, in float64, to the line a·gate + b under the sigmoid; `_blend` does the rest.
What bounds it: memory. The gate is read twice, x and fuse once, out is written: 84 MB for 1×256×128×128 in float32, 17 µs
at 4.8 TB/s, less where the second reading finds the gate in the cache. Counted, not yet timed on a GPU.

No sum of squares cancels: a tile is centred in registers, first by its rounded mean and then by what that left. The
rounded mean is kept between the least and the largest value, so that a constant channel has no deviation at all, whose
rounding eps = 10⁻⁹ would magnify; and deviations are divided by the largest before they are squared, so that squares
neither overflow nor vanish. Only `_lines` computes in float64, on three numbers per tile: on GPUs for games a float64
operation costs 64 of float32.

Considered:
- One launch that keeps a channel in registers between statistics and blend: saves the second reading up to 128² pixels
  of NCHW, and needs this code beside it for all else. To be decided where a GPU can time it.
- Joining tiles at the beginning of `_blend`: in NHWC each program would read as much of them as of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import Budget, Launch, clamp, from_float32, needs_wide, run, sigmoid, to_float32, widened

# ---- pieces ---------------------------------------------------------------------------------------------------------
# A program's tile lies in one sample: pixels of one channel, [PIXELS], or, with channels innermost (LAST), of several,
# [PIXELS, CHANNELS]. The dimension that is last in memory is counted in elements; all strides across it, and its size,
# come in vectors of VEC elements, so that the compiler knows what their alignment is.


@triton.jit
def _tile(
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
def _at(
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
def _planes(sample, c, channels, VEC: tl.constexpr, LAST: tl.constexpr):
    """Indices of these channels among those of all samples, and which of them exist."""
    limit = channels * VEC if LAST else channels
    return widened(sample, True) * limit + c, c < limit


@triton.jit
def _beside(x, LAST: tl.constexpr):
    """A number per channel of a tile, beside its pixels."""
    return x[None, :] if LAST else x


# ---- kernels --------------------------------------------------------------------------------------------------------

_SIZES = ["pixels", "channels", "tiles", "width"]


@triton.jit(do_not_specialize=[*_SIZES, "planes", "gs", "gc", "gr", "gp"])
def _moments(
    gate,  # (B, C, H, W), any strides
    parts,  # (3, B·C, tiles): rounded mean, what is left of the mean, root mean square deviation
    pixels,
    channels,
    tiles,
    width,
    planes,
    gs,
    gc,
    gr,
    gp,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, tile, i, c, inside = _tile(pixels, channels, tiles, VEC, LAST, WIDE, PIXELS, CHANNELS)
    at = _at(sample, i, c, width, gs, gc, gr, gp, VEC, LAST, FLAT)
    value = to_float32(tl.load(gate + at, mask=inside, other=0.0))
    count = tl.minimum(pixels * (1 if LAST else VEC) - tile * PIXELS, PIXELS).to(tl.float32)
    least = tl.min(tl.where(inside, value, float("inf")), 0)
    largest = tl.max(tl.where(inside, value, float("-inf")), 0)
    mean = clamp(tl.sum(value, 0) / count, least, largest)
    centred = tl.where(inside, value - _beside(mean, LAST), 0.0)
    rest = tl.sum(centred, 0) / count
    scale = tl.maximum(tl.maximum(largest - mean, mean - least), 1e-37)
    scaled = tl.where(inside, (centred - _beside(rest, LAST)) * _beside(1.0 / scale, LAST), 0.0)
    deviation = scale * tl.sqrt_rn(tl.sum(scaled * scaled, 0) / count)
    plane, exists = _planes(sample, c, channels, VEC, LAST)
    to = parts + plane * tiles + tile
    step = widened(planes, True) * tiles
    tl.store(to, mean, mask=exists)
    tl.store(to + step, rest, mask=exists)
    tl.store(to + 2 * step, deviation, mask=exists)


@triton.jit(do_not_specialize=["pixels", "tiles", "planes"])
def _lines(
    parts,  # (3, B·C, tiles)
    lines,  # (3, B·C): rounded mean, slope, offset
    eps,
    pixels,
    tiles,
    planes,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
):
    plane = widened(tl.program_id(0), True)
    step = widened(planes, True) * tiles
    parts += plane * tiles
    total = tl.zeros((TILES,), tl.float64)
    for first in range(0, tiles, TILES):
        tile = widened(first + tl.arange(0, TILES), True)
        inside = tile < tiles
        count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float64)
        mean = tl.load(parts + tile, mask=inside, other=0.0).to(tl.float64)
        mean += tl.load(parts + step + tile, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, count * mean, 0.0)
    whole_mean = tl.sum(total, 0) / pixels.to(tl.float64)
    total = tl.zeros((TILES,), tl.float64)
    for first in range(0, tiles, TILES):
        tile = widened(first + tl.arange(0, TILES), True)
        inside = tile < tiles
        count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float64)
        mean = tl.load(parts + tile, mask=inside, other=0.0).to(tl.float64)
        mean += tl.load(parts + step + tile, mask=inside, other=0.0).to(tl.float64) - whole_mean
        deviation = tl.load(parts + 2 * step + tile, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, count * (deviation * deviation + mean * mean), 0.0)
    deviation = tl.sqrt(tl.sum(total, 0) / (pixels - 1).to(tl.float64))  # one pixel: 0/0, NaN as defined
    slope = 10.0 / (deviation + eps)
    rounded = whole_mean.to(tl.float32)
    offset = (rounded.to(tl.float64) - whole_mean) * slope - 5.0
    tl.store(lines + plane, rounded)
    tl.store(lines + planes + plane, slope.to(tl.float32))
    tl.store(lines + 2 * planes + plane, offset.to(tl.float32))


_STRIDES = [f"{tensor}{dim}" for tensor in "xfgo" for dim in "scrp"]


@triton.jit(do_not_specialize=[*_SIZES, "planes", *_STRIDES])
def _blend(
    x,  # (B, C, H, W), as all four; any strides
    fuse,
    gate,
    out,
    lines,  # (3, B·C)
    pixels,
    channels,
    tiles,
    width,
    planes,
    xs,
    xc,
    xr,
    xp,
    fs,
    fc,
    fr,
    fp,
    gs,
    gc,
    gr,
    gp,
    os,
    oc,
    or_,
    op,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    PRECISE: tl.constexpr = x.dtype.element_ty == tl.float32
    sample, _, i, c, inside = _tile(pixels, channels, tiles, VEC, LAST, WIDE, PIXELS, CHANNELS)
    plane, exists = _planes(sample, c, channels, VEC, LAST)
    mean = _beside(tl.load(lines + plane, mask=exists, other=0.0), LAST)
    slope = _beside(tl.load(lines + planes + plane, mask=exists, other=0.0), LAST)
    offset = _beside(tl.load(lines + 2 * planes + plane, mask=exists, other=0.0), LAST)
    at = _at(sample, i, c, width, gs, gc, gr, gp, VEC, LAST, FLAT)
    value = to_float32(tl.load(gate + at, mask=inside, other=0.0))
    mask = sigmoid(tl.fma(value - mean, slope, offset), PRECISE)
    at = _at(sample, i, c, width, xs, xc, xr, xp, VEC, LAST, FLAT)
    value = to_float32(tl.load(x + at, mask=inside))
    at = _at(sample, i, c, width, fs, fc, fr, fp, VEC, LAST, FLAT)
    value = tl.fma(to_float32(tl.load(fuse + at, mask=inside)) - value, mask, value)
    at = _at(sample, i, c, width, os, oc, or_, op, VEC, LAST, FLAT)
    tl.store(out + at, from_float32(value, out.dtype.element_ty), mask=inside)


# ---- launches -------------------------------------------------------------------------------------------------------


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


# A program of 128 threads has 2048 elements for statistics, so that tiles are few, and 1024 for the blend, whose sums
# need not meet. By `last`. Reasoned, not measured.
_PIXELS, _CHANNELS = {False: 2048, True: 64}, {False: 1, True: 32}
_BLENDED = {False: 1024, True: 32}
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> list[Launch]:
    """The launches for (x, fuse, gate, eps) -> (out,); none where out is empty. Reads no data."""
    x, fuse, gate, eps = args
    (out,) = outs
    if out.numel() == 0:
        return []
    b, c, h, w = out.shape
    walk = form((x, fuse, gate, out))
    block, blended, side = _PIXELS[walk.last], _BLENDED[walk.last], _CHANNELS[walk.last]
    blocks, planes = b * -(-c // side), b * c
    tiles, blend_tiles = -(-h * w // block), -(-h * w // blended)
    parts = torch.empty((3, planes, tiles), dtype=torch.float32, device=out.device)
    lines = torch.empty((3, planes), dtype=torch.float32, device=out.device)
    constants = {"VEC": walk.vec, "LAST": walk.last, "FLAT": walk.flat, "WIDE": needs_wide(x, fuse, gate, out)}
    few, many = ({**constants, "PIXELS": n, "CHANNELS": side} for n in (block, blended))
    size = (walk.pixels, walk.channels)
    of_gate, of_all = walk.strides[2], [s for tensor in walk.strides for s in tensor]
    line_args = (parts, lines, float(eps), h * w, tiles, planes)
    tensors = (x, fuse, gate, out, lines)
    return [
        Launch(_moments, (blocks * tiles,), (gate, parts, *size, tiles, walk.width, planes, *of_gate), few, _OPTIONS),
        Launch(_lines, (planes,), line_args, {"PIXELS": block, "TILES": 64}, {**_OPTIONS, "num_warps": 1}),
        Launch(
            _blend, (blocks * blend_tiles,), (*tensors, *size, blend_tiles, walk.width, planes, *of_all), many, _OPTIONS
        ),
    ]


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,) from args = (x, fuse, gate, eps)."""
    run(forward(args, outs), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------

BUDGET = Budget(registers=80, shared_bytes=2048)  # six programs of 128 threads on each processor


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: each dtype in each layout."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = torch.empty((2, 64, 64, 64), dtype=dtype, device="meta")
        nhwc = whole.to(memory_format=torch.channels_last)
        for label, x in (
            ("NCHW", whole),
            ("NHWC", nhwc),
            ("cropped", whole[:, :, :, 8:-8]),
            ("strided", whole[..., ::2]),
        ):
            out = torch.empty_like(x) if label == "NHWC" else torch.empty(x.shape, dtype=dtype, device="meta")
            for stage, launched in zip(("moments", "lines", "blend"), forward((x, x, x, 1e-9), (out,)), strict=True):
                if stage != "lines" or (dtype == torch.float32 and label in ("NCHW", "NHWC")):  # it knows neither
                    yield f"forward {str(dtype).removeprefix('torch.')} {label} {stage}", launched

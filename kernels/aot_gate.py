"""aot_gate in Triton: out = x + (fuse − x) · sigmoid(10 · (gate − mean)/(std + eps) − 5), by channel.

Three launches. `moments` takes mean and deviation of a tile of pixels, of one channel or, in NHWC, of 32 side by side;
`_lines` joins the tiles of each channel, in float64, to the line a·gate + b under the sigmoid; `_blend` does the rest.
What bounds it: memory. The gate is read twice, x and fuse once, out is written: 84 MB for 1×256×128×128 in float32, 17 µs
at 4.8 TB/s, less where the second reading finds the gate in the cache. Counted, not yet timed on a GPU.

No sum of squares cancels (`_planes.py`), and a constant channel has no deviation at all, whose rounding eps = 10⁻⁹ would
magnify. Only `_lines` computes in float64, on three numbers per tile.

Considered:
- One launch that keeps a channel in registers between statistics and blend: saves the second reading up to 128² pixels
  of NCHW, and needs this code beside it for all else. To be decided where a GPU can time it.
- Joining tiles at the beginning of `_blend`: in NHWC each program would read as much of them as of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import Budget, Launch, from_float32, needs_wide, run, sigmoid, to_float32, widened
from ._planes import SIZES, beside, form, moments, offsets_of, planes_of, tile_of

# ---- kernels --------------------------------------------------------------------------------------------------------


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


@triton.jit(do_not_specialize=[*SIZES, "planes", *_STRIDES])
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
    sample, _, i, c, inside = tile_of(pixels, channels, tiles, VEC, LAST, WIDE, PIXELS, CHANNELS)
    plane, exists = planes_of(sample, c, channels, 0, channels * VEC if LAST else channels, VEC, LAST)
    mean = beside(tl.load(lines + plane, mask=exists, other=0.0), LAST)
    slope = beside(tl.load(lines + planes + plane, mask=exists, other=0.0), LAST)
    offset = beside(tl.load(lines + 2 * planes + plane, mask=exists, other=0.0), LAST)
    at = offsets_of(sample, i, c, width, gs, gc, gr, gp, VEC, LAST, FLAT)
    value = to_float32(tl.load(gate + at, mask=inside, other=0.0))
    mask = sigmoid(tl.fma(value - mean, slope, offset), PRECISE)
    at = offsets_of(sample, i, c, width, xs, xc, xr, xp, VEC, LAST, FLAT)
    value = to_float32(tl.load(x + at, mask=inside))
    at = offsets_of(sample, i, c, width, fs, fc, fr, fp, VEC, LAST, FLAT)
    value = tl.fma(to_float32(tl.load(fuse + at, mask=inside)) - value, mask, value)
    at = offsets_of(sample, i, c, width, os, oc, or_, op, VEC, LAST, FLAT)
    tl.store(out + at, from_float32(value, out.dtype.element_ty), mask=inside)


# ---- launches -------------------------------------------------------------------------------------------------------


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
        Launch(
            moments, (blocks * tiles,), (gate, parts, *size, tiles, walk.width, planes, 0, c, *of_gate), few, _OPTIONS
        ),
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

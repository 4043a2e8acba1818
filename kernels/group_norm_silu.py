"""group_norm_silu in Triton: out = act((x − mean)/√(variance + eps) · factor + addend), by groups of channels.

`moments` takes mean and deviation of tiles of pixels, of one channel or, in NHWC, of 32 side by side; `_lines` joins the
tiles of each group, in float64, and gives each of its channels a line (x − mean) · slope + offset; `_apply` does the rest.
Of two parts each has its own first and last launch, and only `_lines`, which sees no pixels, knows of groups: so they may
hold channels of both. Even at batch 1 the passes over x are hundreds of programs, where one per group would leave most
processors idle.
What bounds it: memory. x is read twice, out is written: 25 MB for 1×512×64×64 in float32, 5 µs at 4.8 TB/s, less where the
second reading finds x in the cache. Counted, not yet timed on a GPU.
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


@triton.jit
def _merged(parts, step, pixels, tiles, entries, begin, PIXELS: tl.constexpr, TILES: tl.constexpr):
    """Of TILES tiles from `begin` on: how many pixels they have, rounded means, what is left of them, deviations."""
    entry = widened(begin + tl.arange(0, TILES), True)
    inside = entry < entries
    count = tl.where(inside, tl.minimum(pixels - entry % tiles * PIXELS, PIXELS), 0).to(tl.float64)
    mean = tl.load(parts + entry, mask=inside, other=0.0).to(tl.float64)
    rest = tl.load(parts + step + entry, mask=inside, other=0.0).to(tl.float64)
    deviation = tl.load(parts + 2 * step + entry, mask=inside, other=0.0).to(tl.float64)
    return inside, count, mean, rest, deviation


@triton.jit(
    do_not_specialize=["pixels", "tiles", "planes", "channels", "side", "groups", "ws", "bs", "ss", "sc", "hs", "hc"]
)
def _lines(
    parts,  # (3, B·C, tiles)
    lines,  # (3, B·C): rounded mean, slope, offset
    weight,  # (C,), as bias; or None
    bias,
    scale,  # (B, C), as shift; or None
    shift,
    eps,
    pixels,
    tiles,
    planes,
    channels,
    side,  # channels of a group
    groups,
    ws,
    bs,
    ss,
    sc,
    hs,
    hc,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
    SIDE: tl.constexpr,
):
    sample = widened(tl.program_id(0) // groups, True)
    first = tl.program_id(0) % groups * side
    plane = sample * channels + first
    step = widened(planes, True) * tiles
    parts += plane * tiles
    entries = widened(side, True) * tiles
    total = tl.zeros((TILES,), tl.float64)
    for begin in range(0, entries, TILES):
        inside, count, mean, rest, deviation = _merged(parts, step, pixels, tiles, entries, begin, PIXELS, TILES)
        total += tl.where(inside, count * (mean + rest), 0.0)
    size = side.to(tl.float64) * pixels.to(tl.float64)
    whole = tl.sum(total, 0) / size
    total = tl.zeros((TILES,), tl.float64)
    for begin in range(0, entries, TILES):
        inside, count, mean, rest, deviation = _merged(parts, step, pixels, tiles, entries, begin, PIXELS, TILES)
        away = mean - whole + rest
        total += tl.where(inside, count * (deviation * deviation + away * away), 0.0)
    steep = 1.0 / tl.sqrt(tl.sum(total, 0) / size + eps)
    rounded = whole.to(tl.float32)
    for begin in range(0, side, SIDE):
        own = begin + tl.arange(0, SIDE)
        exists = own < side
        c = widened(first + own, True)
        factor = tl.full((SIDE,), 1.0, tl.float64)
        addend = tl.zeros((SIDE,), tl.float64)
        if weight is not None:
            factor = to_float32(tl.load(weight + c * ws, mask=exists, other=0.0)).to(tl.float64)
        if bias is not None:
            addend = to_float32(tl.load(bias + c * bs, mask=exists, other=0.0)).to(tl.float64)
        if scale is not None:
            film = 1.0 + to_float32(tl.load(scale + sample * ss + c * sc, mask=exists, other=0.0)).to(tl.float64)
            factor *= film
            addend *= film
        if shift is not None:
            addend += to_float32(tl.load(shift + sample * hs + c * hc, mask=exists, other=0.0)).to(tl.float64)
        slope = steep * factor
        # The mean of floats is no float in general. Of an infinite weight the sign of what is lost means nothing.
        lost = (rounded.to(tl.float64) - whole) * slope
        addend += tl.where(tl.abs(slope) == float("inf"), 0.0, lost)
        to = lines + plane + own
        tl.store(to, tl.full((SIDE,), 1.0, tl.float32) * rounded, mask=exists)
        tl.store(to + planes, slope.to(tl.float32), mask=exists)
        tl.store(to + 2 * widened(planes, True), addend.to(tl.float32), mask=exists)


_STRIDES = [f"{tensor}{dim}" for tensor in "xo" for dim in "scrp"]


@triton.jit(do_not_specialize=[*SIZES, "planes", "first", "total", *_STRIDES])
def _apply(
    x,  # (B, C, H, W), as out; any strides
    out,
    lines,  # (3, B·total)
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
    os,
    oc,
    or_,
    op,
    SILU: tl.constexpr,
    VEC: tl.constexpr,
    LAST: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    PRECISE: tl.constexpr = x.dtype.element_ty == tl.float32
    sample, _, i, c, inside = tile_of(pixels, channels, tiles, VEC, LAST, WIDE, PIXELS, CHANNELS)
    plane, exists = planes_of(sample, c, channels, first, total, VEC, LAST)
    mean = beside(tl.load(lines + plane, mask=exists, other=0.0), LAST)
    slope = beside(tl.load(lines + planes + plane, mask=exists, other=0.0), LAST)
    offset = beside(tl.load(lines + 2 * widened(planes, True) + plane, mask=exists, other=0.0), LAST)
    at = offsets_of(sample, i, c, width, xs, xc, xr, xp, VEC, LAST, FLAT)
    value = tl.fma(to_float32(tl.load(x + at, mask=inside, other=0.0)) - mean, slope, offset)
    if SILU:
        value *= sigmoid(value, PRECISE)
    at = offsets_of(sample, i, c, width, os, oc, or_, op, VEC, LAST, FLAT)
    tl.store(out + at, from_float32(value, out.dtype.element_ty), mask=inside)


# ---- launches -------------------------------------------------------------------------------------------------------

# A program of 128 threads has 2048 elements for statistics, so that tiles are few, and 1024 for the rest; fewer where a
# channel has fewer. By whether channels are innermost. Reasoned, not measured.
_PIXELS, _CHANNELS = {False: 2048, True: 64}, {False: 1, True: 32}
_APPLIED = {False: 1024, True: 32}
_LEAST = 64  # pixels of a program
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> list[Launch]:
    """The launches for (x, num_groups, weight, bias, scale, shift, eps, activation, second) -> (out,). Reads no data."""
    x, groups, weight, bias, scale, shift, eps, activation, second = args
    (out,) = outs
    if out.numel() == 0:
        return []
    b, c, h, w = out.shape
    pixels, planes, side = h * w, b * c, c // groups
    last = form((out,)).last
    most = max(_LEAST, triton.next_power_of_2(pixels))
    block, applied = min(_PIXELS[last], most), min(_APPLIED[last], most)
    tiles, applied_tiles = -(-pixels // block), -(-pixels // applied)
    parts = torch.empty((3, planes, tiles), dtype=torch.float32, device=out.device)
    lines = torch.empty((3, planes), dtype=torch.float32, device=out.device)

    measured, finished, first = [], [], 0
    for part in (x, second):
        if part is None or part.shape[1] == 0:
            continue
        to = out.narrow(1, first, part.shape[1])
        walk = form((part, to))
        beside_each_other = _CHANNELS[walk.last]
        blocks = b * -(-part.shape[1] // beside_each_other)
        shape = {"VEC": walk.vec, "LAST": walk.last, "FLAT": walk.flat, "WIDE": needs_wide(part, to)}
        shape["CHANNELS"] = beside_each_other
        whole = (planes, first, c)
        size = (walk.pixels, walk.channels)
        measured.append(
            Launch(
                moments,
                (blocks * tiles,),
                (part, parts, *size, tiles, walk.width, *whole, *walk.strides[0]),
                {**shape, "PIXELS": block},
                _OPTIONS,
            )
        )
        finished.append(
            Launch(
                _apply,
                (blocks * applied_tiles,),
                (part, to, lines, *size, applied_tiles, walk.width, *whole, *walk.strides[0], *walk.strides[1]),
                {**shape, "PIXELS": applied, "SILU": activation == "silu"},
                _OPTIONS,
            )
        )
        first += part.shape[1]

    vectors = (weight, bias, scale, shift)
    strides = [s for vector, n in zip(vectors, (1, 1, 2, 2), strict=True) for s in _strides(vector, n)]
    join = Launch(
        _lines,
        (b * groups,),
        (
            parts,
            lines,
            *vectors,
            float(eps),
            pixels,
            tiles,
            planes,
            c,
            side,
            groups,
            *strides,
        ),
        {
            "PIXELS": block,
            "TILES": min(512, max(64, triton.next_power_of_2(side * tiles))),
            "SIDE": min(128, triton.next_power_of_2(side)),
        },
        _OPTIONS,
    )
    return [*measured, join, *finished]


def _strides(vector: Tensor | None, n: int) -> tuple[int, ...]:
    return (0,) * n if vector is None else vector.stride()


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,) from args = (x, num_groups, weight, bias, scale, shift, eps, activation, second)."""
    run(forward(args, outs), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------

BUDGET = Budget(registers=80, shared_bytes=2048)  # six programs of 128 threads on each processor


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: each dtype in each layout, of all pixels and of few."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        whole = torch.empty((2, 64, 64, 64), dtype=dtype, device="meta")
        vector, film = (torch.empty(n, dtype=dtype, device="meta") for n in ((64,), (2, 64)))
        nhwc = whole.to(memory_format=torch.channels_last)
        for label, x, activation in (
            ("NCHW", whole, "silu"),
            ("NHWC", nhwc, "silu"),
            ("cropped", whole[:, :, :, 8:-8], "silu"),
            ("strided", whole[..., ::2], "none"),
            ("small", whole[..., :8, :8].contiguous(), "silu"),
        ):
            out = torch.empty_like(x) if label == "NHWC" else torch.empty(x.shape, dtype=dtype, device="meta")
            args = (x, 32, vector, vector, film, film, 1e-5, activation, None)
            for stage, launched in zip(("moments", "lines", "apply"), forward(args, (out,)), strict=True):
                if stage != "lines" or label in ("NCHW", "small"):  # it does not know the layout
                    yield f"forward {name} {label} {stage}", launched
    large = torch.empty(
        (1, 64, 512, 512), dtype=torch.float32, device="meta"
    )  # as many tiles as a program of `_lines` takes
    yield "forward float32 large lines", forward((large, 1, None, None, None, None, 1e-5, "silu", None), (large,))[1]

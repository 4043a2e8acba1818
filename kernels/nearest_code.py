"""nearest_code in Triton: a matrix product whose sums become distances in registers, of which each vector keeps the least.

`_nearest` takes VECTORS vectors through a chunk of the codes, CODES at a time; `_first` compares what the chunks found.
With few vectors the chunks are what fills a GPU. Of a dual codebook every vector meets the codes of both halves, but tiles
that no vector of the program may choose from are left out.
What bounds it: arithmetic, 2·N·K·D flops, in float32 without tensor cores: TF32 would choose among near codes at random.
Counted, not yet timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import Budget, Launch, dot_chunk, needs_wide, run, to_float32, widened

# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(at, rows, inside, depth, begin, step, WIDE: tl.constexpr, DEPTH: tl.constexpr):
    """[vectors, DEPTH]: the numbers from `begin` on of the vectors at `rows`, 0 beyond the last."""
    d = begin + tl.arange(0, DEPTH)
    places = rows[:, None] + (widened(d, WIDE) * step)[None, :]
    return tl.load(at + places, mask=inside[:, None] & (d < depth)[None, :], other=0.0)


@triton.jit
def _nearest(
    x,  # (N, D)
    codebook,  # (K, D)
    known,  # (N,), or None
    least,  # (chunks, N), as index
    index,
    vectors,
    codes,
    depth,
    split,
    chunk_codes,
    xn,
    xd,
    ck,
    cd,
    kn,
    WIDE: tl.constexpr,
    VECTORS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    n = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    there = n < vectors
    rows = widened(n, WIDE) * xn
    squares = tl.zeros((VECTORS,), tl.float32)
    for d in range(0, depth, DEPTH):
        part = to_float32(_tile(x, rows, there, depth, d, xd, WIDE, DEPTH))
        squares += tl.sum(part * part, 1)
    best = tl.full((VECTORS,), float("inf"), tl.float32)
    at = tl.zeros((VECTORS,), tl.int32)
    if known is not None:
        first_half = to_float32(tl.load(known + widened(n, WIDE) * kn, mask=there, other=0)) != 0.0
        at = tl.where(first_half, 0, split)
        any_first = tl.max(tl.where(there & first_half, 1, 0), 0) > 0
        any_second = tl.max(tl.where(there & (first_half == 0), 1, 0), 0) > 0
    begin = tl.program_id(1) * chunk_codes
    end = tl.minimum(begin + chunk_codes, codes)
    for start in range(begin, end, CODES):
        wanted = True
        if known is not None:
            wanted = ((start < split) & any_first) | ((start + CODES > split) & any_second)
        if wanted:
            k = start + tl.arange(0, CODES)
            allowed = (k < end)[None, :]
            places = widened(k, WIDE) * ck
            products = tl.zeros((VECTORS, CODES), tl.float32)
            sizes = tl.zeros((CODES,), tl.float32)
            for d in range(0, depth, DEPTH):
                ours = _tile(x, rows, there, depth, d, xd, WIDE, DEPTH)
                theirs = _tile(codebook, places, k < end, depth, d, cd, WIDE, DEPTH)
                products = dot_chunk(ours, tl.trans(theirs), products)
                theirs = to_float32(theirs)
                sizes += tl.sum(theirs * theirs, 1)
            distance = squares[:, None] + sizes[None, :] - 2.0 * products
            distance = tl.where(distance == distance, distance, float("-inf"))  # NaN comes before all numbers
            if known is not None:
                allowed &= (k < split)[None, :] == first_half[:, None]
            distance = tl.where(allowed, distance, float("inf"))
            here = tl.min(distance, 1)
            nearer = here < best
            at = tl.where(nearer, start + tl.argmin(distance, 1), at)
            best = tl.where(nearer, here, best)
    to = widened(tl.program_id(1), True) * vectors + n
    tl.store(least + to, best, mask=there)
    tl.store(index + to, at, mask=there)


@triton.jit
def _first(least, index, out, vectors, chunks, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < vectors
    best = tl.load(least + n, mask=there, other=0.0)
    at = tl.load(index + n, mask=there, other=0)
    for _ in range(1, chunks):
        least += vectors
        index += vectors
        here = tl.load(least + n, mask=there, other=0.0)
        nearer = here < best
        at = tl.where(nearer, tl.load(index + n, mask=there, other=0), at)
        best = tl.where(nearer, here, best)
    tl.store(out + n, at.to(tl.int64), mask=there)


# ---- launches -------------------------------------------------------------------------------------------------------

_VECTORS, _CODES = 64, 64
_CODES_FLOAT32 = 32  # without tensor cores a product's operands are unrolled in registers
_PROGRAMS = 512  # as many as fill large GPUs more than once; reasoned, not measured


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> list[Launch]:
    """The launches for (x, codebook, split, known) -> (out,). Reads no data."""
    x, codebook, split, known = args
    (out,) = outs
    vectors, depth = x.shape
    codes = codebook.shape[0]
    if vectors == 0:
        return []
    if known is not None and known.dtype == torch.bool:
        known = known.view(torch.uint8)
    codes_beside = _CODES if x.dtype != torch.float32 else _CODES_FLOAT32
    blocks, tiles = -(-vectors // _VECTORS), -(-codes // codes_beside)
    each = -(-tiles // max(1, min(tiles, _PROGRAMS // blocks)))  # tiles of a chunk
    chunks = -(-tiles // each)
    wide = needs_wide(*(t for t in (x, codebook, known) if t is not None))
    least = torch.empty((chunks, vectors), dtype=torch.float32, device=x.device)
    index = torch.empty((chunks, vectors), dtype=torch.int32, device=x.device)
    search = Launch(
        _nearest,
        (blocks, chunks),
        (
            x, codebook, known, least, index, vectors, codes, depth, split or 0, each * codes_beside, *x.stride(),
            *codebook.stride(), 0 if known is None else known.stride(0),
        ),
        {
            "WIDE": wide,
            "VECTORS": _VECTORS,
            "CODES": codes_beside,
            "DEPTH": 16 if wide else 32,  # offsets of 64 bits take the registers of half a tile
        },
        {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False},
    )  # fmt: skip
    join = Launch(
        _first,
        (-(-vectors // 128),),
        (least, index, out, vectors, chunks),
        {"BLOCK": 128},
        {"num_warps": 4, "enable_fp_fusion": False},
    )
    return [search, join]


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,) from args = (x, codebook, split, known)."""
    run(forward(args, outs), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------

BUDGET = Budget(registers=168, shared_bytes=49152)


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: each dtype with one half and two, offsets of 64 bits."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        x, codebook = (torch.empty((n, 256), dtype=dtype, device="meta") for n in (1024, 8192))
        known = torch.empty(1024, dtype=torch.bool, device="meta")
        out = torch.empty(1024, dtype=torch.int64, device="meta")
        one = forward((x, codebook, None, None), (out,))
        yield f"{name} one half", one[0]
        yield f"{name} two halves", forward((x, codebook, 512, known), (out,))[0]
        if dtype == torch.float32:
            yield "first", one[1]
            far = (
                torch.empty((1024, 1), dtype=dtype, device="meta").expand(1024, 256).as_strided((1024, 256), (2**22, 1))
            )
            yield f"{name} wide", forward((far, codebook, None, None), (out,))[0]

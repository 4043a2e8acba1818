"""contextual_attention in Triton: tiles of cells, each through five launches, in a workspace that does not grow with them.

A tile is a rectangle of cells that ask. Every key answers each of them, so that what lies between the launches are
matrices of a few hundred cells × all keys, in float32:

    gram     pixel products <f, b>                    matrix product, K = C
    scores   3×3 diagonal sums of those / ‖key‖       nine shifted reads
    weights  propagation, mask, softmax               nine shifted reads, then two passes over the row
    paste    four products with the even/odd phases   matrix products, K = keys, of diagonally summed weights
    store    sum of the parts of K, divisor           elementwise

Two workspaces take turns: weights replace pixel products, parts of the result replace scores. Two small launches per
sample gather the background's pixels and find norms and keys that may be used.

**Wrap-around.** A tile needs more than itself: weights of the cells around it, scores of the cells that propagation
reaches from there, products of the pixels around those. Position (row, column) of such a frame is the cell
row · width + column of the grid modulo all cells, rows and columns below 0 and beyond the end included. Lines wrap
around in the definition in just this way (after the last column comes the next row; above the first row lies the last
one, a column to the left), so neighbours of a cell always have neighbouring positions, and a frame is a rectangle even
at the border. Which neighbours exist is asked of the cell itself. Frames overlap, and the overlap is computed again: at
1024 pixels a tile of 16×26 takes 22×34 rows of products, 17 % more work in all. In return tiles need nothing of each other.

**Memory.** The frames of products and of scores and the background's pixels are at most ROWS · keys numbers, 100 MB at
1024 pixels, whatever the width and the batch. `tiling` finds the tiles with the least overlap that fit.

**Queries.** Whether a cell is asked for is data, which the host must not wait for. So all launches are made, and programs
whose tile or block asks for nothing return at once.

**Accuracy.** Logits reach thousands, so products are IEEE float32 and summed in chunks; errors of logits are then two
thirds of the definition's at 18 and at 96 channels. Pasting is as exact. It cuts the keys into parts, because a tile of
the result alone would leave most of a GPU idle; they are summed in a fixed order.

**Cost.** 2C · 1.8 + 8C operations a pair of cells, on CUDA cores: 300 GFLOP for 96 channels at 1024 pixels, 4.5 ms at
67 TFLOP/s. Scores and weights read each 36 bytes a pair, nearly all from the caches. Counted, not yet timed on a GPU.

Considered:
- One kernel that streams keys past a tile held in shared memory: Triton cannot index shared memory.
- A ring of rows instead of tiles: no overlap, but a whole row of 2048-pixel images × all keys is more than ROWS allow.
- TF32 ×3 on tensor cores: faster on paper; whether its errors are small enough must be measured where a GPU is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import (
    INTERPRETING,
    Budget,
    Launch,
    dot_chunk,
    exp,
    from_float32,
    needs_wide,
    opaque,
    run,
    to_float32,
    widened,
)

ROWS = 12 * 128
"""What the workspaces hold at most, in rows of as many numbers as there are keys (padded to a multiple of 64)."""

_LARGEST = tl.constexpr(512)  # cells in a tile
_PITCH = 64  # rows of keys are padded to a multiple of it, so that products need no masks and every row is aligned

_GRID = ["height", "width"]
_TILE = [*_GRID, "top", "left", "rows", "columns"]
_QUERIES = ["qy", "qx"]

# ---- pieces ---------------------------------------------------------------------------------------------------------
# `height` and `width` are those of the grid of cells. `reach` is 1 with propagation, else 0.


@triton.jit
def _nonzero(x):
    """x ≠ 0 for any dtype."""
    if INTERPRETING and x.dtype == tl.bfloat16:
        x = to_float32(x)
    return x != 0


@triton.jit
def _source(i, step, height):
    """The row of features that row i of cells is sampled from (or column, given the width).

    Each operation is rounded to float32, as in the definition: that decides ties.
    """
    return tl.minimum(tl.floor(i.to(tl.float32) * step + 0.5).to(tl.int32), 2 * height - 1)


@triton.jit
def _cell(row, column, height, width):
    """The cell at a position of a frame. Frames reach at most three rows and four columns beyond the grid."""
    cells = height * width
    flat = (row * width + column + 8 * cells) % cells
    return flat // width, flat % width


@triton.jit
def _within(i, size):
    return (i >= 0) & (i < size)


@triton.jit
def _in_grid(row, column, height, width):
    return _within(row, height) & _within(column, width)


@triton.jit
def _asked(queries, row, column, inside, qy, qx, WIDE: tl.constexpr):
    """Which of these cells are; those that are not inside are not."""
    at = widened(row, WIDE) * qy + widened(column, WIDE) * qx
    return inside & _nonzero(tl.load(queries + at, mask=inside, other=0))


@triton.jit
def _tile_asked(queries, top, left, rows, columns, qy, qx, WIDE: tl.constexpr):
    """Whether any cell of the tile is."""
    i = tl.arange(0, _LARGEST)
    asked = _asked(queries, top + i // columns, left + i % columns, i < rows * columns, qy, qx, WIDE)
    return tl.max(asked.to(tl.int32), 0) > 0


@triton.jit
def _features(at, inside, c, in_c, stride, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Channels c of the pixels at addresses `at`, in float32, [pixel, channel]; 0 outside.

    Triton gives neighbouring threads the last dimension: channels where they are neighbours in memory (LAST).
    """
    offset = widened(c, WIDE) * stride
    if LAST:
        value = tl.load(at[:, None] + offset[None, :], mask=inside[:, None] & in_c[None, :], other=0.0)
    else:
        value = tl.trans(tl.load(at[None, :] + offset[:, None], mask=inside[None, :] & in_c[:, None], other=0.0))
    return opaque(to_float32(value))


# ---- once per sample ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*_GRID, "channels", "bc", "by", "bx"])
def _gather(
    background,  # (C, 2·height, 2·width), any strides
    pixels,  # (C, pitch): those that cells are sampled from; 0 beyond the last
    squares,  # (pitch,): sums over the channels
    y_step,
    x_step,
    height,
    width,
    channels,
    bc,
    by,
    bx,
    pitch,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    k = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    inside, in_row = k < height * width, k < pitch
    y, x = _source(k // width, y_step, height), _source(k % width, x_step, width)
    at = background + widened(y, WIDE) * by + widened(x, WIDE) * bx
    total = tl.zeros((CELLS, CHANNELS), tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        value = _features(at, inside, c, c < channels, bc, LAST, WIDE)
        total += value * value
        to = pixels + widened(c, WIDE)[:, None] * pitch + k[None, :]
        tl.store(to, tl.trans(value), mask=(c < channels)[:, None] & in_row[None, :])
    tl.store(squares + k, tl.sum(total, 1), mask=in_row)


@triton.jit(do_not_specialize=[*_GRID, "stride", "my", "mx"])
def _keys(
    squares,  # (pitch,)
    mask,  # (height, width), any dtype and strides, or None
    inverses,  # (pitch,): 1/‖key‖
    codes,  # (pitch,) uint8: 0 for keys that do not exist, 1 for masked ones, 2 for others
    least,  # norms are at least this,
    extra,  # and squares have this added
    stride,
    height,
    width,
    my,
    mx,
    pitch,
    WIDE: tl.constexpr,
    KEYS: tl.constexpr,
):
    k = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside = k < height * width
    y, x = k // width, k % width
    total = tl.zeros((KEYS,), tl.float32)
    holes = tl.zeros((KEYS,), tl.int32)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            there = inside & _in_grid(y + dy, x + dx, height, width)
            total += tl.load(squares + k + dy * width + dx, mask=there, other=0.0)
            if mask is not None:
                at = widened(y + dy, WIDE) * my + widened(x + dx, WIDE) * mx
                holes += _nonzero(tl.load(mask + at, mask=there, other=0)).to(tl.int32)
    length = tl.maximum(tl.sqrt_rn(total + extra), least, propagate_nan=tl.PropagateNan.ALL)
    tl.store(inverses + k, tl.div_rn(1.0, length), mask=k < pitch)
    exists = inside & (y % stride == 0) & (x % stride == 0)
    code = tl.where(exists, tl.where(holes == 0, 2, 1), 0)
    tl.store(codes + k, code.to(tl.uint8), mask=k < pitch)


# ---- once per tile --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*_TILE, *_QUERIES, "channels", "fc", "fy", "fx"])
def _gram(
    foreground,  # (C, 2·height, 2·width), any strides
    pixels,  # (C, pitch)
    queries,  # (height, width), any dtype and strides, or None
    gram,  # (cells of the frame, pitch)
    y_step,
    x_step,
    height,
    width,
    top,
    left,
    rows,
    columns,
    channels,
    fc,
    fy,
    fx,
    qy,
    qx,
    pitch,
    REACH: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CELLS: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
):
    """gram = <pixel of cell, pixel of key>."""
    if queries is not None:
        asked = _tile_asked(queries, top, left, rows, columns, qy, qx, WIDE)
        if not asked:
            return
    frame_rows, frame_columns = rows + 4 + 2 * REACH, columns + 4 + 4 * REACH
    count = frame_rows * frame_columns
    blocks = tl.cdiv(count, CELLS)
    i = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    k = tl.program_id(0) // blocks * KEYS + tl.arange(0, KEYS)
    row, column = top - 2 - REACH + i // frame_columns, left - 2 - 2 * REACH + i % frame_columns
    y, x = _cell(row, column, height, width)
    y, x = _source(y, y_step, height), _source(x, x_step, width)
    at = foreground + widened(y, WIDE) * fy + widened(x, WIDE) * fx
    acc = tl.zeros((CELLS, KEYS), tl.float32)
    for first in range(0, channels, STEP):
        c = first + tl.arange(0, STEP)
        a = _features(at, i < count, c, c < channels, fc, LAST, WIDE)
        b = tl.load(pixels + widened(c, WIDE)[:, None] * pitch + k[None, :], mask=(c < channels)[:, None], other=0.0)
        acc = dot_chunk(a, b, acc)
    tl.store(gram + widened(i, WIDE)[:, None] * pitch + k[None, :], acc, mask=(i < count)[:, None])


@triton.jit(do_not_specialize=[*_TILE, *_QUERIES])
def _scores(
    gram,  # (cells of its frame, pitch)
    inverses,  # (pitch,)
    queries,  # as above
    scores,  # (cells of this frame, pitch)
    height,
    width,
    top,
    left,
    rows,
    columns,
    qy,
    qx,
    pitch,
    REACH: tl.constexpr,
    WIDE: tl.constexpr,
    CELLS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """scores = <patch of cell, patch of key> / ‖patch of key‖."""
    if queries is not None:
        asked = _tile_asked(queries, top, left, rows, columns, qy, qx, WIDE)
        if not asked:
            return
    frame_rows, frame_columns = rows + 2 + 2 * REACH, columns + 2 + 4 * REACH
    count = frame_rows * frame_columns
    blocks = tl.cdiv(count, CELLS)  # programs that share keys are neighbours, for the caches
    i = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    k = tl.program_id(0) // blocks * KEYS + tl.arange(0, KEYS)
    row, column = i // frame_columns, i % frame_columns
    from_cell = (row + 1) * (frame_columns + 2) + column + 1
    gram += widened(from_cell, WIDE)[:, None] * pitch + k[None, :]
    row, column = _cell(top - 1 - REACH + row, left - 1 - 2 * REACH + column, height, width)
    y, x = k // width, k % width
    total = tl.zeros((CELLS, KEYS), tl.float32)
    for dy in tl.static_range(-1, 2):
        cell_there = (i < count) & _within(row + dy, height)
        key_there = (y < height) & _within(y + dy, height)
        for dx in tl.static_range(-1, 2):
            mask = (cell_there & _within(column + dx, width))[:, None] & (key_there & _within(x + dx, width))[None, :]
            shift = widened(dy * (frame_columns + 2) + dx, WIDE) * pitch + dy * width + dx
            total += tl.load(gram + shift, mask=mask, other=0.0)
    total *= tl.load(inverses + k)[None, :]
    tl.store(scores + widened(i, WIDE)[:, None] * pitch + k[None, :], total, mask=(i < count)[:, None])


@triton.jit
def _propagated(
    scores, k, row, column, height, width, top, left, columns, pitch, REACH: tl.constexpr, WIDE: tl.constexpr
):
    """Scores of cells (row, column) and keys k, propagated: [cell, key].

    Along rows, then along columns, is the definition; the sum runs the other way round: over the neighbours along
    columns, then over their neighbours along rows. Neighbours of cells and of keys have the same form.
    """
    cells, frame_columns = height * width, columns + 2 + 4 * REACH
    y, x = k // width, k % width
    in_grid, key_in_grid = _in_grid(row, column, height, width), k < cells
    flat = row * width + column
    position = (row - (top - 1 - REACH)) * frame_columns + column - (left - 1 - 2 * REACH)
    total = tl.zeros((row.shape[0], k.shape[0]), tl.float32)
    for e in tl.static_range(-REACH, REACH + 1):
        # Below the last row lies the first, a column to the right; a turn says that this happens.
        turn = (row + e >= height).to(tl.int32) - (row + e < 0).to(tl.int32)
        key_turn = (y + e >= height).to(tl.int32) - (y + e < 0).to(tl.int32)
        there, key_there = in_grid & _within(column + turn, width), key_in_grid & _within(x + key_turn, width)
        cell = flat + e * width + turn * (1 - cells)
        key = k + e * width + key_turn * (1 - cells)
        at = scores + widened(position + e * frame_columns + turn, WIDE)[:, None] * pitch + key[None, :]
        for d in tl.static_range(-REACH, REACH + 1):
            mask = (there & _within(cell + d, cells))[:, None] & (key_there & _within(key + d, cells))[None, :]
            total += tl.load(at + d * (pitch + 1), mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=[*_TILE, *_QUERIES])
def _weights(
    scores,  # (cells of its frame, pitch)
    codes,  # (pitch,)
    queries,  # as above
    weights,  # (cells of the tile and around it, pitch)
    scale,
    height,
    width,
    top,
    left,
    rows,
    columns,
    qy,
    qx,
    pitch,
    REACH: tl.constexpr,
    ZERO: tl.constexpr,  # masked keys have logit 0 and then lose their weight
    PRECISE: tl.constexpr,
    WIDE: tl.constexpr,
    CELLS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """weights = softmax(scale · propagated scores); 0 for cells outside the grid. A program takes whole rows."""
    i = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    count = (rows + 2) * (columns + 2)
    row, column = top - 1 + i // (columns + 2), left - 1 + i % (columns + 2)
    if queries is not None:
        j = tl.arange(0, 16)[None, :]  # neighbours, and a fourth row and column that are left out
        y, x = row[:, None] - 1 + j // 4, column[:, None] - 1 + j % 4
        in_tile = (j // 4 < 3) & (j % 4 < 3) & _in_grid(y - top, x - left, rows, columns)
        if tl.max(tl.max(_asked(queries, y, x, in_tile, qy, qx, WIDE).to(tl.int32), 1), 0) == 0:
            return
    weights += widened(i, WIDE)[:, None] * pitch
    lane, in_rows = tl.arange(0, KEYS), (i < count)[:, None]

    best = tl.full((CELLS, KEYS), float("-inf"), tl.float32)
    for first in range(0, pitch, KEYS):
        k = first + lane
        code = tl.load(codes + k, mask=k < pitch, other=0)[None, :]
        logit = scale * _propagated(scores, k, row, column, height, width, top, left, columns, pitch, REACH, WIDE)
        logit = tl.where(code == 2, logit, 0.0 if ZERO else float("-inf"))
        logit = tl.where(code == 0, float("-inf"), logit)
        tl.store(weights + k[None, :], logit, mask=in_rows & (k < pitch)[None, :])
        best = tl.maximum(best, logit)
    largest = tl.max(best, 1)[:, None]
    tl.debug_barrier()  # between passes, elements may change threads
    total = tl.zeros((CELLS, KEYS), tl.float32)
    for first in range(0, pitch, KEYS):
        k = first + lane
        mask = in_rows & (k < pitch)[None, :]
        value = exp(tl.load(weights + k[None, :], mask=mask, other=float("-inf")) - largest, PRECISE)
        tl.store(weights + k[None, :], value, mask=mask)
        total += value
    share = 1.0 / tl.sum(total, 1)[:, None]
    tl.debug_barrier()
    in_grid = _in_grid(row, column, height, width)[:, None]
    for first in range(0, pitch, KEYS):
        k = first + lane
        mask = in_rows & (k < pitch)[None, :]
        value = share * tl.load(weights + k[None, :], mask=mask, other=0.0)
        if ZERO:
            code = tl.load(codes + k, mask=k < pitch, other=0)[None, :]
            value = tl.where(code == 2, value, 0.0)
        tl.store(weights + k[None, :], tl.where(in_grid, value, 0.0), mask=mask)


@triton.jit(do_not_specialize=[*_TILE, *_QUERIES, "channels", "bc", "by", "bx", "span"])
def _paste(
    weights,  # (cells of the tile and around it, pitch)
    background,  # (C, 2·height, 2·width), any strides
    queries,  # as above
    parts,  # (parts, 4, cells of the tile, C), or the last two exchanged
    height,
    width,
    top,
    left,
    rows,
    columns,
    channels,
    bc,
    by,
    bx,
    qy,
    qx,
    span,  # keys in a part
    pitch,
    LAST: tl.constexpr,
    PARTS_LAST: tl.constexpr,  # channels are the last dimension of `parts`
    WIDE: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
):
    """parts = the sum over some keys and the four patches that cover a pixel, for pixels (2·row + odd_y, 2·column + odd_x).

    The patch of key k, pasted at the neighbour (dy, dx) of the cell, puts there the cell's own phase of key k − (dy, dx).
    """
    count = rows * columns
    blocks, strips = tl.cdiv(count, CELLS), tl.cdiv(channels, CHANNELS)
    i = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    if queries is not None:
        asked = _asked(queries, top + i // columns, left + i % columns, i < count, qy, qx, WIDE)
        if tl.max(asked.to(tl.int32), 0) == 0:
            return
    c = tl.program_id(0) // blocks % strips * CHANNELS + tl.arange(0, CHANNELS)
    phase, part = tl.program_id(0) // blocks // strips % 4, tl.program_id(0) // blocks // strips // 4
    odd_y, odd_x = phase // 2, phase % 2
    # An even row is covered by its cell's patch and by the one above, an odd one by its cell's and by the one below.
    up, aside = 2 * odd_y - 1, 2 * odd_x - 1
    from_cell = (i // columns + 1) * (columns + 2) + i % columns + 1
    weights += widened(from_cell, WIDE)[:, None] * pitch
    background += widened(odd_y, WIDE) * by + widened(odd_x, WIDE) * bx

    acc = tl.zeros((CELLS, CHANNELS), tl.float32)
    for first in range(part * span, tl.minimum((part + 1) * span, height * width), STEP):
        k = first + tl.arange(0, STEP)
        y, x = k // width, k % width
        a = tl.zeros((CELLS, STEP), tl.float32)
        for below in range(2):
            for beside in tl.static_range(2):
                dy, dx = below * up, beside * aside
                there = (y < height) & _in_grid(y + dy, x + dx, height, width)
                shift = widened(dy * (columns + 2) + dx, WIDE) * pitch + dy * width + dx
                a += tl.load(weights + shift + k[None, :], mask=(i < count)[:, None] & there[None, :], other=0.0)
        at = background + widened(2 * y, WIDE) * by + widened(2 * x, WIDE) * bx
        b = _features(at, y < height, c, c < channels, bc, LAST, WIDE)
        acc = dot_chunk(a, b, acc)
    parts += widened(part * 4 + phase, WIDE) * count * channels
    in_cells, in_channels = i < count, c < channels
    if PARTS_LAST:
        to = parts + i[:, None] * channels + c[None, :]
        tl.store(to, acc, mask=in_cells[:, None] & in_channels[None, :])
    else:
        to = parts + c[:, None] * count + i[None, :]
        tl.store(to, tl.trans(acc), mask=in_channels[:, None] & in_cells[None, :])


@triton.jit(do_not_specialize=[*_TILE, *_QUERIES, "channels", "oc", "oy", "ox", "count_of_parts"])
def _store(
    parts,  # (count_of_parts, 4, cells of the tile, C), or the last two exchanged
    queries,  # as above
    out,  # (C, 2·height, 2·width), any strides
    height,
    width,
    top,
    left,
    rows,
    columns,
    channels,
    oc,
    oy,
    ox,
    qy,
    qx,
    count_of_parts,
    OVERLAP: tl.constexpr,
    PARTS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = the sum of the parts / the number of patches, 0 where a cell is not asked for."""
    count = rows * columns
    blocks = tl.cdiv(count, CELLS)
    i = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    c = tl.program_id(0) // blocks * CHANNELS + tl.arange(0, CHANNELS)
    row, column = top + i // columns, left + i % columns
    inside = i < count
    asked = inside
    if queries is not None:
        asked = _asked(queries, row, column, inside, qy, qx, WIDE)
    out += widened(2 * row, WIDE) * oy + widened(2 * column, WIDE) * ox
    for phase in tl.static_range(4):
        odd_y, odd_x = phase // 2, phase % 2
        if PARTS_LAST:
            at = i[:, None] * channels + c[None, :]
            mask = asked[:, None] & (c < channels)[None, :]
        else:
            at = c[:, None] * count + i[None, :]
            mask = (c < channels)[:, None] & asked[None, :]
        total = tl.zeros_like(at).to(tl.float32)
        for part in range(count_of_parts):
            start = widened(count * channels, WIDE) * (part * 4 + phase)
            total += tl.load(parts + start + at, mask=mask, other=0.0)
        factor = tl.full((CELLS,), 0.25, tl.float32)
        if OVERLAP:  # a patch less across each border
            factor *= tl.where(row == (height - 1 if odd_y else 0), 2.0, 1.0)
            factor *= tl.where(column == (width - 1 if odd_x else 0), 2.0, 1.0)
        to = out + odd_y * oy + odd_x * ox
        offset = widened(c, WIDE) * oc
        if PARTS_LAST:
            value = from_float32(total * factor[:, None], out.dtype.element_ty)
            tl.store(to[:, None] + offset[None, :], value, mask=inside[:, None] & (c < channels)[None, :])
        else:
            value = from_float32(total * factor[None, :], out.dtype.element_ty)
            tl.store(to[None, :] + offset[:, None], value, mask=(c < channels)[:, None] & inside[None, :])


# ---- launches -------------------------------------------------------------------------------------------------------

_PROGRAMS = 512  # wanted of a product: about four for each processor of the largest GPUs
_SHORTEST = 256  # keys that a part has at least


def config(stage: str, channels: int, wide: bool) -> dict[str, int]:
    """Launch configuration of a stage: what a program takes, and its warps. Reasoned, not measured.

    Neighbouring cells share reads of scores and weights, so programs take several. Pasting takes blocks of 32 channels
    where 64 would leave the last one half empty. 64-bit addresses take registers that half a tile gives back.
    """
    cells = 32 if wide else 64
    few = (channels - 1) % 64 < 32
    return {
        "gather": {"CELLS": 64, "CHANNELS": 16, "num_warps": 4},
        "keys": {"KEYS": 128, "num_warps": 4},
        "gram": {"CELLS": cells, "KEYS": _PITCH, "STEP": 16, "num_warps": 8},
        "scores": {"CELLS": 16, "KEYS": _PITCH, "num_warps": 4},
        "weights": {"CELLS": 4, "KEYS": 256, "num_warps": 8},
        "paste": {"CELLS": cells if few else cells // 2, "CHANNELS": 32 if few else 64, "STEP": 16, "num_warps": 4},
        "store": {"CELLS": 16, "CHANNELS": 32, "num_warps": 4},
    }[stage]


def frames(rows: int, columns: int, reach: int) -> tuple[int, int]:
    """Cells in the frames of a tile: of pixel products, of scores."""
    return (rows + 4 + 2 * reach) * (columns + 4 + 4 * reach), (rows + 2 + 2 * reach) * (columns + 2 + 4 * reach)


@functools.lru_cache(maxsize=256)
def tiling(height: int, width: int, channels: int, reach: int, room: int) -> tuple[int, int]:
    """Rows and columns of the tiles of a grid: of those that `room` rows of the workspaces hold, the least overlapping.

    What is kept of keys takes channels + 3 of the rows. A tile of one cell is always allowed.
    """

    def fits(rows: int, columns: int) -> bool:
        return rows * columns <= _LARGEST.value and sum(frames(rows, columns, reach)) + channels + 3 <= room

    best, fewest = (1, 1), height * width * frames(1, 1, reach)[0]
    for across in range(1, width + 1):
        columns = _ceil(width, across)
        rows = next((n for n in range(min(height, _LARGEST.value), 0, -1) if fits(n, columns)), 0)
        if rows:
            down = _ceil(height, rows)
            rows = _ceil(height, down)  # evenly
            products = down * _ceil(width, columns) * frames(rows, columns, reach)[0]
            if products < fewest:
                best, fewest = (rows, columns), products
    return best


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> list[Launch]:
    """The launches for the op's arguments -> (out,), in order; none where out is empty. Reads no data."""
    foreground, background, mask, _, stride, _, fuse_size, scale, sampling, norm, eps, mask_mode, divisor, queries = (
        args
    )
    (out,) = outs
    if out.numel() == 0:
        return []
    channels, height, width = out.shape[1], out.shape[2] // 2, out.shape[3] // 2
    cells, reach = height * width, fuse_size // 2
    pitch = _ceil(cells, _PITCH) * _PITCH
    tall, broad = tiling(height, width, channels, reach, ROWS)
    gram_cells, score_cells = frames(tall, broad, reach)

    gram = torch.empty(gram_cells * pitch, dtype=torch.float32, device=out.device)
    scores = gram.new_empty(max(score_cells * pitch, 4 * tall * broad * channels))
    weights, parts = gram, scores
    pixels, squares, inverses = (gram.new_empty(rows * pitch) for rows in (channels, 1, 1))
    codes = gram.new_empty(pitch, dtype=torch.uint8)
    tensors = (foreground, background, mask, queries, out, gram, scores, pixels)
    wide = needs_wide(*(t for t in tensors if t is not None))
    # Rounded to float32 when they are passed on, and so as quotients of float32 would be.
    steps = tuple((2 * n - 1) / (n - 1) if sampling == "tf" and n > 1 else 2.0 for n in (height, width))
    least, extra = (float(eps), 0.0) if norm == "max" else (0.0, 9.0 * channels * eps)
    launches: list[Launch] = []

    def add(kernel: Any, args: tuple[Any, ...], sizes: dict[str, int], programs: int, **constants: Any) -> None:
        constants |= {"WIDE": wide} | {name: size for name, size in sizes.items() if name != "num_warps"}
        options = {"num_warps": sizes["num_warps"], "num_stages": 1, "enable_fp_fusion": False}
        launches.append(Launch(kernel, (programs,), args, constants, options))

    for sample in range(out.shape[0]):
        f, b, o = foreground[sample], background[sample], out[sample]
        m, q = (None if t is None else t[min(sample, len(t) - 1), 0] for t in (mask, queries))
        m_strides, q_strides = ((0, 0) if t is None else t.stride() for t in (m, q))
        b_last, o_last = _channels_last(b), _channels_last(o)

        sizes = config("gather", channels, wide)
        args = (b, pixels, squares, *steps, height, width, channels, *b.stride(), pitch)
        add(_gather, args, sizes, _ceil(pitch, sizes["CELLS"]), LAST=b_last)
        sizes = config("keys", channels, wide)
        args = (squares, m, inverses, codes, least, extra, stride, height, width, *m_strides, pitch)
        add(_keys, args, sizes, _ceil(pitch, sizes["KEYS"]))

        for top, left in itertools.product(range(0, height, tall), range(0, width, broad)):
            rows, columns = min(tall, height - top), min(broad, width - left)
            tile, count = (height, width, top, left, rows, columns), rows * columns
            gram_cells, score_cells = frames(rows, columns, reach)

            sizes = config("gram", channels, wide)
            args = (f, pixels, q, gram, *steps, *tile, channels, *f.stride(), *q_strides, pitch)
            programs = _ceil(gram_cells, sizes["CELLS"]) * (pitch // sizes["KEYS"])
            add(_gram, args, sizes, programs, REACH=reach, LAST=_channels_last(f))

            sizes = config("scores", channels, wide)
            args = (gram, inverses, q, scores, *tile, *q_strides, pitch)
            programs = _ceil(score_cells, sizes["CELLS"]) * (pitch // sizes["KEYS"])
            add(_scores, args, sizes, programs, REACH=reach)

            sizes = config("weights", channels, wide)
            args = (scores, codes, q, weights, float(scale), *tile, *q_strides, pitch)
            options = {"REACH": reach, "ZERO": mask_mode == "zero", "PRECISE": out.dtype == torch.float32}
            add(_weights, args, sizes, _ceil((rows + 2) * (columns + 2), sizes["CELLS"]), **options)

            sizes = config("paste", channels, wide)
            programs = 4 * _ceil(count, sizes["CELLS"]) * _ceil(channels, sizes["CHANNELS"])
            split = min(_ceil(_PROGRAMS, programs), _ceil(cells, _SHORTEST), scores.numel() // (4 * count * channels))
            span = _ceil(_ceil(cells, split), sizes["STEP"]) * sizes["STEP"]
            split = _ceil(cells, span)
            args = (weights, b, q, parts, *tile, channels, *b.stride(), *q_strides, span, pitch)
            add(_paste, args, sizes, programs * split, LAST=b_last, PARTS_LAST=o_last)

            sizes = config("store", channels, wide)
            args = (parts, q, o, *tile, channels, *o.stride(), *q_strides, split)
            programs = _ceil(count, sizes["CELLS"]) * _ceil(channels, sizes["CHANNELS"])
            add(_store, args, sizes, programs, OVERLAP=divisor == "overlap", PARTS_LAST=o_last)
    return launches


def _ceil(n: int, size: int) -> int:
    """n / size, rounded up."""
    return -(-n // size)


def _channels_last(t: Tensor) -> bool:
    """Whether neighbours in memory are channels of a pixel of t (C, H, W), and not neighbours in a row."""
    return t.stride(0) < t.stride(2)


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,) from the op's arguments."""
    run(forward(args, outs), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------

BUDGET = Budget(registers=128, shared_bytes=20 * 1024)  # 512 threads on each processor, of four programs or two


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: each stage with its options, dtypes, layouts, 64-bit offsets."""
    stages = ("gather", "keys", "gram", "scores", "weights", "paste", "store")
    features = ("gather", "gram", "paste", "store")
    mask = torch.empty((1, 1, 32, 32), dtype=torch.bool, device="meta")
    for label, dtype, channels, holes, fuse_size, mask_mode, divisor, queries, wanted in (
        ("float32 NCHW", torch.float32, 96, mask, 3, "zero", "const4", None, stages),
        ("float32 NHWC some", torch.float32, 192, None, 0, "neginf", "overlap", mask, stages),
        ("bfloat16 NCHW", torch.bfloat16, 128, mask, 3, "zero", "overlap", None, (*features, "weights")),
        ("float16 NHWC", torch.float16, 96, mask, 3, "zero", "const4", None, features),
        ("float32 wide some", torch.float32, 96, mask, 3, "zero", "overlap", mask, stages),
        ("float32 NHWC wide", torch.float32, 128, mask, 3, "zero", "const4", None, features),
    ):
        far = 2**31 if "wide" in label else 64 * 64 * channels
        strides = (far, 1, 64 * channels, channels) if "NHWC" in label else (far, 64 * 64, 64, 1)
        x = torch.empty_strided((2, channels, 64, 64), strides, dtype=dtype, device="meta")
        args = (x, x, holes, 3, 1, 2, fuse_size, 10.0, "stride", "max", 1e-4, mask_mode, divisor, queries)
        for stage, launch in zip(stages, forward(args, (x,)), strict=False):  # there are more: the next tiles
            if stage in wanted:
                yield f"forward {label} {stage}", launch

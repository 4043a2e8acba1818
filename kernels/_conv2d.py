"""What the convolution ops share in Triton: one implicit GEMM with everything that may surround it, and box sums of masks.

A program computes PIXELS output pixels × OUTPUTS output channels. It walks over taps × channels: the left operand of each
product are CHANNELS channels of the pixels that one tap reads, found by index arithmetic, so that padding of any mode,
stride, dilation and doubled inputs cost no memory; the right operand are weights. What follows the sum (scale, shift,
bias, residual, activation, gate, renormalisation) happens in registers, and each output is written once.

**Three forms** differ only in what they ask of a tap, along each axis by itself (`_taps`):

    plain       output p reads input p · stride − before + tap · dilation
    transposed  outputs of equal p mod stride share their taps, and form a plain convolution of stride 1 ("phase")
    doubled     nearest-2x, then the convolution: even and odd p are phases of a convolution of the small input with
                sums of weights, 2×2 taps each instead of 3×3

A doubled input needs 4/9 of the products that way. It takes stride and dilation 1, and padding that pairs with the doubled
pixels: zeros or replicate, or reflect by 1, which then is replicate of the small input. Others halve the index of each read.
16-bit weights are summed in float32 and rounded once more.

**Weights** are read as (outputs, taps, channels), channels innermost: neighbours in the direction of the sum, which
tensor cores want of both operands (TF32 on sm_90 insists). Weights in channels_last are that already; others are first
copied into that order, together with the sums above. It costs twice the weights' bytes, 4 µs for 512→512 3×3 in float32,
where the product takes 48 µs in TF32 at 64×64 pixels. Strided reads inside the product would cost nine times the sectors.

**Inputs** in channels_last are read in vectors of channels. NCHW inputs are read along pixels, element by element, and
turned in registers: right, not ideal.

**Precision.** float32 follows torch's switch for convolutions, `torch.backends.cudnn.conv.fp32_precision`, at the time of
the call: TF32 on tensor cores, operands rounded to nearest, or IEEE on CUDA cores, with the sum of each chunk kept apart
(`dot_chunk`), and that of every 16 chunks, because long chains err by more than the definition does. The library's
precision="ieee" comes before torch's switch: the backend says so. 16-bit operands are multiplied exactly and summed in
float32.

**Cost.** At bfloat16's and TF32's rates most layers are bound by tensor cores, thin ones at full resolution by memory, and
IEEE ones by 67 TFLOP/s. Reasoned, not timed on a GPU.

Considered:
- Taps and channels as one index, for stems of 3 to 5 channels, which leave most of a step of 16 empty: the left operand
  would need row, column and border of each element, not of each pixel. A stem is 1 to 2 % of a network's products.
- Winograd: its products are small GEMMs in IEEE float32; tensor cores win by more, and its errors have no place in 16 bits.
- The sum over taps and channels in parts for small maps (8×8 at the bottom of a U-Net), which occupy few processors: another
  pass and a workspace for a small share of the time. Measure first.
- Interleaving feature and gate weights: two accumulators over one left operand need no shuffles and no packed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import (
    INTERPRETING,
    Budget,
    Launch,
    activate,
    clamp,
    dot,
    dot_chunk,
    from_float32,
    needs_wide,
    resolve_alpha,
    sigmoid,
    to_float32,
    widened,
)

# ---- pieces ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load(at, rows, columns, in_rows, in_columns, LAST: tl.constexpr):
    """[row, column] at the sum of two offsets, 0 outside. LAST: columns are neighbours in memory, not rows.

    Triton gives neighbouring threads the last dimension.
    """
    if LAST:
        mask = in_rows[:, None] & in_columns[None, :]
        value = tl.load(at + rows[:, None] + columns[None, :], mask=mask, other=0.0)
    else:
        mask = in_rows[None, :] & in_columns[:, None]
        value = tl.trans(tl.load(at + rows[None, :] + columns[:, None], mask=mask, other=0.0))
    return value


@triton.jit
def _store(at, rows, columns, in_rows, in_columns, value, LAST: tl.constexpr):
    """As `_load`, the other way round."""
    value = from_float32(value, at.dtype.element_ty)
    if LAST:
        tl.store(at + rows[:, None] + columns[None, :], value, mask=in_rows[:, None] & in_columns[None, :])
    else:
        tl.store(at + rows[None, :] + columns[:, None], tl.trans(value), mask=in_rows[None, :] & in_columns[:, None])


@triton.jit
def _vector(at, i, stride, inside):
    """Elements i of a vector in float32, as a row."""
    return to_float32(tl.load(at + i * stride, mask=inside, other=0.0))[None, :]


@triton.jit
def _taps(phase, size, stride, before, dilation, shared, inverse, FORM: tl.constexpr):
    """Along one axis, for outputs period · i + phase: origin, (first tap, step between taps, number of taps, move).

    The j-th of these taps, first + j · step, reads input pace · i + origin + j · move, pace being the stride if FORM is
    "plain", else 1. shared = gcd(stride, dilation); inverse: of dilation/shared modulo stride/shared.
    """
    if (
        FORM == "transposed"
    ):  # output p takes tap k of input (p + before − k · dilation)/stride, where that is a whole number
        at, step = phase + before, stride // shared
        first = at // shared * inverse % step
        count = tl.where(at % shared == 0, (size - first + step - 1) // step, 0)
        origin, move = (at - first * dilation) // stride, -(dilation // shared)
    elif FORM == "doubled":  # taps are sums already, of those that read the same input
        first, step, count, origin, move = 0, 1, size, (phase - before) >> 1, 1
    else:
        tl.static_assert(FORM == "plain", "unknown form")
        first, step, count, origin, move = 0, 1, size, -before, dilation
    return origin, (first, step, count, move)


@triton.jit
def _border(i, size, inside, PADDING: tl.constexpr):
    """Where to read coordinate i of an axis, and whether there is anything."""
    if PADDING == "zeros":
        inside = inside & (i >= 0) & (i < size)
    elif PADDING == "replicate":
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    else:
        tl.static_assert(PADDING == "reflect", "unknown padding mode")
        i = size - 1 - tl.abs(size - 1 - tl.abs(i))
    return i, inside


@triton.jit
def _nearest_tf32(x):
    """float32 x rounded to TF32's 10 bits. Tensor cores would cut the others off, with twice the error and a bias."""
    if not INTERPRETING:
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · bᵀ."""
    if PRECISION == "tf32":
        acc = dot(_nearest_tf32(a), tl.trans(_nearest_tf32(b)), acc, PRECISION)
    elif a.dtype == tl.float32:
        acc = dot_chunk(a, tl.trans(b), acc)
    else:
        acc = dot(a, tl.trans(b), acc)
    return acc


@triton.jit
def _sum(
    acc,
    gates,
    x,
    x_strides,  # batch, channel, row, column; all but that of channels in units of X_VEC
    mask,
    mask_strides,
    weight,  # the first channel of the first output
    w_strides,  # output, row, column, in units of VEC
    outputs,  # gates follow so many features
    channels,
    pixel,  # sample, row, column that the first tap reads; whether it is inside
    output,  # number, and whether it is inside
    along_y,  # of `_taps`
    along_x,
    h,
    w,
    PADDING: tl.constexpr,
    HALVED: tl.constexpr,
    GATED: tl.constexpr,
    MASK_CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    X_VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """(acc, gates) + the products over all taps and these channels of x.

    IEEE float32 keeps every 16 steps apart, too: a running sum of 512 · 9 products takes 288 chunks, and rounding
    each of them at the size of the whole errs by three times as much as the definition does.
    """
    APART: tl.constexpr = PRECISION == "ieee" and x.dtype.element_ty == tl.float32
    xb, xc, xy, xx = x_strides
    mb, mc, my, mx = mask_strides
    wn, wy, wx = w_strides
    b, y, z, in_m = pixel
    n, in_n = output
    first_y, step_y, count_y, move_y = along_y
    first_x, step_x, count_x, move_x = along_x
    chunks = tl.cdiv(channels, CHANNELS)
    if APART:
        total, gate_total = acc, gates
        acc = tl.zeros_like(acc)
        if GATED:
            gates = tl.zeros_like(gates)
    for i in range(count_y * count_x * chunks):
        tap = i // chunks
        tap_y, tap_x = tap // count_x, tap % count_x
        c = i % chunks * CHANNELS + tl.arange(0, CHANNELS)
        in_c = c < channels
        row, inside = _border(y + tap_y * move_y, h, in_m, PADDING)
        column, inside = _border(z + tap_x * move_x, w, inside, PADDING)
        if HALVED:
            row, column = row >> 1, column >> 1
        at = (b * xb + row * xy + column * xx) * X_VEC
        a = _load(x, at, c if LAST else widened(c, WIDE) * xc, inside, in_c, LAST)
        if mask is not None:
            at = b * mb + row * my + column * mx
            if MASK_CHANNELS:
                factor = _load(mask, at, widened(c, WIDE) * mc, inside, in_c, LAST)
            else:
                factor = tl.load(mask + at, mask=inside, other=0.0)[:, None]
            a = from_float32(to_float32(a) * to_float32(factor), a.dtype)
        tap_y, tap_x = widened(first_y + tap_y * step_y, WIDE), widened(first_x + tap_x * step_x, WIDE)
        at = (n * wn + tap_y * wy + tap_x * wx) * VEC
        acc = _product(a, _load(weight, at, c, in_n, in_c, True), acc, PRECISION)
        if GATED:
            gates = _product(a, _load(weight + outputs * wn * VEC, at, c, in_n, in_c, True), gates, PRECISION)
        if APART:  # noqa: SIM102 (two ifs: this one is gone when the kernel is compiled)
            if i % 16 == 15:
                total += acc
                acc = tl.zeros_like(acc)
                if GATED:
                    gate_total += gates
                    gates = tl.zeros_like(gates)
    if APART:
        acc += total
        if GATED:
            gates += gate_total
    return acc, gates


# ---- the convolution ------------------------------------------------------------------------------------------------

_INTS = [
    *("pixels", "rows", "columns", "period", "out_h", "out_w", "h", "w", "outputs", "groups", "channels", "of_x"),
    *("taps_y", "taps_x", "stride", "dilation", "shared", "inverse", "top", "left"),
    *("xb", "xc", "xy", "xx", "x2b", "x2c", "x2y", "x2x", "wg", "wn", "wy", "wx", "w_phase"),
    *("ob", "oc", "oy", "ox", "mb", "mc", "my", "mx", "rb", "rc", "ry", "rx", "sb", "bias_n", "scale_n", "shift_n"),
    "scale_b",
]


@triton.jit(do_not_specialize=_INTS)
def _convolve(
    x,  # (B, of_x, h, w), any strides
    second,  # (B, groups · channels − of_x, h, w): the channels that follow those of x; or None
    weight,  # (period², groups, outputs, taps_y, taps_x, channels): wanted strides, the last 1; gates follow features
    out,  # (B, groups · outputs, out_h, out_w), any strides
    mask,  # (1|B, 1|channels of both, h, w), or None
    bias,  # (groups · outputs,) or None, as the next two; (2 · outputs,) with gates
    scale,
    shift,
    residual,  # as out, or None
    strength,  # of the residual: one element, or None
    sums,  # (1|B, out_h, out_w) float32: of the mask over each window; or None
    alpha,
    gain,
    bound,
    window,
    eps,
    pixels,  # B · rows · columns
    rows,  # ⌈out_h / period⌉
    columns,
    period,
    out_h,
    out_w,
    h,
    w,
    outputs,  # in units of OUT_VEC
    groups,
    channels,  # of a group, in units of VEC, as the next
    of_x,
    taps_y,
    taps_x,
    stride,
    dilation,
    shared,
    inverse,
    top,
    left,
    xb,  # strides of x but that of channels: in units of X_VEC
    xc,
    xy,
    xx,
    x2b,  # of second: in units of SECOND_VEC
    x2c,
    x2y,
    x2x,
    wg,  # strides of weight: in units of VEC
    wn,
    wy,
    wx,
    w_phase,
    ob,  # strides of out but that of channels: in units of OUT_VEC
    oc,
    oy,
    ox,
    mb,
    mc,
    my,
    mx,
    rb,
    rc,
    ry,
    rx,
    sb,
    bias_n,
    scale_n,
    shift_n,
    scale_b,
    FORM: tl.constexpr,
    PADDING: tl.constexpr,
    HALVED: tl.constexpr,  # x is read doubled by halving indices
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    BEFORE: tl.constexpr,  # the residual comes before the activation
    PER_IMAGE: tl.constexpr,  # the scale is (B, groups · outputs), fewer than 2³¹ elements
    GAINED: tl.constexpr,  # the result is multiplied by gain
    BOUNDED: tl.constexpr,  # and kept within ±bound
    MASK_CHANNELS: tl.constexpr,  # the mask has a plane per channel
    LAST: tl.constexpr,  # channels of x are neighbours in memory
    VEC: tl.constexpr,  # divides the channels of a group, and of both inputs; up to 16 bytes
    X_VEC: tl.constexpr,  # divides the strides of x as well, or 1
    SECOND_LAST: tl.constexpr,
    SECOND_VEC: tl.constexpr,
    OUT_LAST: tl.constexpr,
    OUT_VEC: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    PRECISE: tl.constexpr = x.dtype.element_ty == tl.float32
    outputs *= OUT_VEC
    # Neighbouring programs share pixels, then phases of the same pixels.
    program, blocks, phases = widened(tl.program_id(0), WIDE), tl.cdiv(outputs, OUTPUTS), period * period
    n = program % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    phase, group = program // blocks % phases, program // (blocks * phases) % groups
    m = program // (blocks * phases * groups) * PIXELS + tl.arange(0, PIXELS)
    v, u, b = m % columns, m // columns % rows, m // columns // rows
    p, q = u * period + phase // period, v * period + phase % period
    in_m, in_n = (m < pixels) & (p < out_h) & (q < out_w), n < outputs

    origin_y, along_y = _taps(phase // period, taps_y, stride, top, dilation, shared, inverse, FORM)
    origin_x, along_x = _taps(phase % period, taps_x, stride, left, dilation, shared, inverse, FORM)
    pace = stride if FORM == "plain" else 1
    y, z = u * pace + origin_y, v * pace + origin_x
    high, wide = (2 * h, 2 * w) if HALVED else (h, w)
    weight += (phase * w_phase + group * wg) * VEC
    start, own = group * channels, channels  # the group's first channel, and how many of them x has
    if second is not None:
        own = tl.minimum(tl.maximum(of_x - start, 0), channels)
    x += start * VEC * xc
    if mask is not None:
        mask += start * VEC * mc
    acc = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    acc, gates = _sum(
        *(acc, acc, x, (xb, xc, xy, xx), mask, (mb, mc, my, mx), weight, (wn, wy, wx), outputs, own * VEC),
        *((b, y, z, in_m), (n, in_n), along_y, along_x, high, wide),
        *(PADDING, HALVED, GATED, MASK_CHANNELS, LAST, VEC, X_VEC, PRECISION, WIDE, CHANNELS),
    )
    if second is not None:
        second += (start + own - of_x) * VEC * x2c
        if mask is not None:
            mask += own * VEC * mc
        acc, gates = _sum(
            *(acc, gates, second, (x2b, x2c, x2y, x2x), mask, (mb, mc, my, mx)),
            *(weight + own * VEC, (wn, wy, wx), outputs, (channels - own) * VEC),
            *((b, y, z, in_m), (n, in_n), along_y, along_x, high, wide),
            *(PADDING, HALVED, GATED, MASK_CHANNELS, SECOND_LAST, VEC, SECOND_VEC, PRECISION, WIDE, CHANNELS),
        )

    n_all = group * outputs + n
    if scale is not None:
        if PER_IMAGE:  # offsets of 64 bits would spill
            at = scale + (b.to(tl.int32) * scale_b)[:, None] + (n_all * scale_n).to(tl.int32)[None, :]
            acc *= to_float32(tl.load(at, mask=in_m[:, None] & in_n[None, :], other=0.0))
        else:
            acc *= _vector(scale, n_all, scale_n, in_n)
    if shift is not None:
        acc += _vector(shift, n_all, shift_n, in_n)
    if sums is not None:
        total = tl.load(sums + b * sb + p * out_w + q, mask=in_m, other=0.0)[:, None]
        updated = clamp(total, 0.0, 1.0)
        acc *= tl.div_rn(window, tl.where(updated == 0.0, 1.0, total + eps)) * updated
    if bias is not None:
        acc += _vector(bias, n_all, bias_n, in_n)
        if GATED:
            gates += _vector(bias + outputs * bias_n, n_all, bias_n, in_n)
        if sums is not None:
            acc *= updated
    if sums is not None:
        acc = tl.where(updated == 0.0, 0.0, acc)
    if residual is not None:
        at = b * rb + p * ry + q * rx
        more = to_float32(_load(residual, at, widened(n_all, WIDE) * rc, in_m, in_n, RESIDUAL_LAST))
        if strength is not None:
            more *= to_float32(tl.load(strength))
        if BEFORE:
            acc = activate(acc + more, alpha, ACT, PRECISE)
        else:
            acc = activate(acc, alpha, ACT, PRECISE) + more
    else:
        acc = activate(acc, alpha, ACT, PRECISE)
    if GAINED:
        acc *= gain
    if GATED:
        acc *= sigmoid(gates, PRECISE)
    if BOUNDED:
        acc = clamp(acc, -bound, bound)
    at = (b * ob + p * oy + q * ox) * OUT_VEC
    _store(out, at, n_all if OUT_LAST else widened(n_all, WIDE) * oc, in_m, in_n, acc, OUT_LAST)


_PACK_INTS = [
    *("total", "all_outputs", "outputs", "channels", "taps_y", "taps_x", "kernel_y", "kernel_x", "top", "left"),
    *("wg", "wn", "wc", "wy", "wx"),
]


@triton.jit(do_not_specialize=_PACK_INTS)
def _pack(
    weight,  # (groups, outputs, channels, kernel_y, kernel_x), any strides
    packed,  # (phases, groups, outputs, taps_y, taps_x, channels), contiguous
    total,  # elements of packed
    all_outputs,  # groups · outputs
    outputs,
    channels,
    taps_y,
    taps_x,
    kernel_y,
    kernel_x,
    top,
    left,
    wg,
    wn,
    wc,
    wy,
    wx,
    DOUBLED: tl.constexpr,
    FLIPPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed = weight, channels innermost; DOUBLED: for each phase, the sums of the taps that read the same input; FLIPPED:
    rows and columns backwards."""
    i = widened(tl.program_id(0), WIDE) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    c, tap, row = i % channels, i // channels, i // channels // taps_x // taps_y
    y, x, n = tap // taps_x % taps_y, tap % taps_x, row % all_outputs
    if DOUBLED:
        phase = row // all_outputs
        y, x = 2 * y - ((phase // 2 - top) & 1), 2 * x - ((phase % 2 - left) & 1)
    if FLIPPED:
        y, x = kernel_y - 1 - y, kernel_x - 1 - x
    weight += n // outputs * wg + n % outputs * wn + c * wc
    value = tl.zeros((BLOCK,), tl.float32)
    for dy in tl.static_range(2 if DOUBLED else 1):
        for dx in tl.static_range(2 if DOUBLED else 1):
            exists = inside & (y + dy >= 0) & (y + dy < kernel_y) & (x + dx >= 0) & (x + dx < kernel_x)
            value += to_float32(tl.load(weight + (y + dy) * wy + (x + dx) * wx, mask=exists, other=0.0))
    tl.store(packed + i, from_float32(value, packed.dtype.element_ty), mask=inside)


# ---- box sums of masks ----------------------------------------------------------------------------------------------


_SUM_INTS = [
    *("pixels", "out_h", "out_w", "h", "w", "channels", "taps_y", "taps_x", "stride", "dilation", "top", "left"),
    *("mb", "mc", "my", "mx", "copies"),
]


@triton.jit(do_not_specialize=_SUM_INTS)
def _box_sums(
    mask,  # (B, channels, h, w), any strides
    sums,  # (B, out_h, out_w) float32
    updated,  # (copies · B, 1, out_h, out_w): the sums within [0, 1]; or None
    pixels,  # B · out_h · out_w
    out_h,
    out_w,
    h,
    w,
    channels,
    taps_y,
    taps_x,
    stride,
    dilation,
    top,
    left,
    mb,
    mc,
    my,
    mx,
    copies,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """sums = the sum of the mask over channels and taps."""
    m = widened(tl.program_id(0), WIDE) * PIXELS + tl.arange(0, PIXELS)
    q, p, b = m % out_w, m // out_w % out_h, m // out_w // out_h
    y, z = p * stride - top, q * stride - left
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tap in range(taps_y * taps_x):
        row, inside = _border(y + tap // taps_x * dilation, h, m < pixels, "zeros")
        column, inside = _border(z + tap % taps_x * dilation, w, inside, "zeros")
        at = b * mb + row * my + column * mx
        for first in range(0, channels, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            acc += to_float32(_load(mask, at, widened(c, WIDE) * mc, inside, c < channels, LAST))
    total = tl.sum(acc, 1)
    tl.store(sums + m, total, mask=m < pixels)
    if updated is not None:
        total = from_float32(clamp(total, 0.0, 1.0), updated.dtype.element_ty)
        to = updated + m
        for _ in range(copies):
            tl.store(to, total, mask=m < pixels)
            to += pixels


# ---- launches -------------------------------------------------------------------------------------------------------

_PROGRAMS = 128  # wanted: about one for each processor of the largest GPUs
_BLOCK = 1024


def switched(dtype: torch.dtype) -> str:
    """The precision of products that torch asks for now: "ieee" or "tf32". 16-bit ones have no choice."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def config(
    pixels: int, outputs: int, channels: int, dtype: torch.dtype, precision: str, gated: bool, heavy: bool
) -> dict[str, int]:
    """Launch configuration: PIXELS × OUTPUTS results (of features and as many of gates) in steps of CHANNELS.

    On tensor cores a step takes 128 bytes of each pixel, in three stages; tiles shrink until there are programs for
    every processor. IEEE float32 has no use for stages: its tile is bound by registers. 64-bit offsets, masks and second
    inputs (heavy) take registers and memory that half a tile gives back. Reasoned, not measured.
    """
    halves = 2 if gated else 1
    widest = max(16, triton.next_power_of_2(outputs))
    if dtype == torch.float32 and precision == "ieee":
        sizes = {"PIXELS": 32 if heavy else 64, "OUTPUTS": min(widest, 64 // halves), "CHANNELS": 16}
        return sizes | {"num_warps": 8, "num_stages": 1}
    m, n = 64 if heavy else 128, min(widest, 128 // halves)
    for smaller_m, smaller_n in ((m, 64 // halves), (64, 64 // halves)):
        if -(-pixels // m) * -(-outputs // n) < _PROGRAMS:
            m, n = smaller_m, min(n, smaller_n)
    step = min(128 // dtype.itemsize, max(16, triton.next_power_of_2(channels)))
    warps = 8 if heavy or m * n * halves >= 128 * 64 else 4
    return {"PIXELS": m, "OUTPUTS": n, "CHANNELS": step, "num_warps": warps, "num_stages": 3}


def convolution(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    groups: int = 1,
    padding_mode: str = "zeros",
    mask: Tensor | None = None,
    upsample: int = 1,
    transposed: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    alpha: float | None = None,
    residual: Tensor | None = None,
    residual_mode: str = "after",
    second: Tensor | None = None,
    gated: bool = False,
    gain: float = 1.0,
    bound: float | None = None,
    flipped: bool = False,
    residual_strength: Tensor | None = None,
    sums: Tensor | None = None,
    window: float = 1.0,
    eps: float = 0.0,
    precision: str | None = None,
) -> list[Launch]:
    """The launches, in order; none where out is empty. Reads no data. Arguments as of `ops.fused_conv2d`, but mask may be
    1 pixel wide and high, a factor per channel, scale may be (B, outputs), a residual may have 1 channel for all; and

    gated: the second half of weight and bias makes the gates.
    gain: factor on the activation's result; bound: of the magnitude of what that gives, None for no bound.
    flipped: the kernel is read backwards; not with upsample=2.
    residual_strength: one element, factor on the residual.
    sums: (1|B, H', W') float32, of the mask over each window, for a partial one; window and eps as of the op.
    precision: "ieee" or "tf32"; None for what torch's switch says.
    """
    if out.numel() == 0:
        return []
    batch, of_x, h, w = x.shape
    inputs = of_x if second is None else of_x + second.shape[1]
    out_h, out_w = out.shape[2:]
    top, left = padding[:2]
    paired = padding_mode != "reflect" or max(padding) <= 1
    doubled = upsample == 2 and stride == dilation == 1 and paired
    if doubled and padding_mode == "reflect":
        padding_mode = "replicate"
    form = "transposed" if transposed else "doubled" if doubled else "plain"
    period = {"transposed": stride, "doubled": 2, "plain": 1}[form]
    rows, columns, shared = -(-out_h // period), -(-out_w // period), math.gcd(stride, dilation)
    pixels, outputs, channels = batch * rows * columns, out.shape[1] // groups, inputs // groups
    vec = _largest(x.dtype, channels, of_x)

    grouped = weight.unflatten(0, (groups, -1))  # (groups, outputs, channels, kernel)
    grouped = grouped.transpose(1, 2) if transposed else grouped
    launches, operand = _packed(grouped, doubled, flipped, top, left, vec)
    taps_y, taps_x = operand.shape[3:5]
    w_phase, *w_strides, _ = broadcast(operand)

    tensors = (x, second, operand, out, mask, residual, sums, bias, scale, shift)
    wide = out.numel() > 2**31 - 2**16 or needs_wide(*(t for t in tensors if t is not None))
    precision = precision or switched(x.dtype)
    per_image = scale is not None and scale.dim() == 2
    heavy = wide or mask is not None or second is not None
    sizes = config(pixels, outputs, channels, x.dtype, precision, gated, heavy)
    x_last, x_vec, x_strides = _channels_last(x, vec)
    second_last, second_vec, second_strides = _channels_last(second, vec)
    out_last, out_vec, out_strides = _channels_last(out, _largest(x.dtype, outputs))
    launches.append(
        Launch(
            kernel=_convolve,
            grid=(-(-pixels // sizes["PIXELS"]) * -(-outputs // sizes["OUTPUTS"]) * groups * period**2,),
            args=(
                *(x, second, operand, out, mask, bias, scale, shift, residual, residual_strength, sums),
                *(resolve_alpha(activation, alpha), float(gain), float(bound or 0.0), float(window), float(eps)),
                *(pixels, rows, columns, period, out_h, out_w, h, w, outputs // out_vec, groups),
                *(channels // vec, of_x // vec),
                *(taps_y, taps_x, stride, dilation, shared, pow(dilation // shared, -1, stride // shared), top, left),
                *x_strides,
                *second_strides,
                *(s // vec for s in (*w_strides, w_phase)),
                *out_strides,
                *broadcast(mask),
                *broadcast(residual),
                broadcast(sums)[0],
                *(broadcast(t)[-1] for t in (bias, scale, shift)),
                broadcast(scale)[0] if per_image else 0,
            ),
            constants={
                "FORM": form,
                "PADDING": padding_mode,
                "HALVED": upsample == 2 and not doubled,
                "GATED": gated,
                "ACT": activation,
                "BEFORE": residual_mode == "before",
                "PER_IMAGE": per_image,
                "GAINED": gain != 1.0,
                "BOUNDED": bound is not None,
                "MASK_CHANNELS": mask is not None and mask.shape[1] > 1,
                "LAST": x_last,
                "VEC": vec,
                "X_VEC": x_vec,
                "SECOND_LAST": second_last,
                "SECOND_VEC": second_vec,
                "OUT_LAST": out_last,
                "OUT_VEC": out_vec,
                "RESIDUAL_LAST": residual is not None and residual.stride(1) == 1,
                "PRECISION": precision,
                "WIDE": wide,
                **{name: sizes[name] for name in ("PIXELS", "OUTPUTS", "CHANNELS")},
            },
            options={
                "num_warps": sizes["num_warps"],
                "num_stages": sizes["num_stages"],
                "enable_fp_fusion": False,
            },
        )
    )
    return launches


def _packed(weight: Tensor, doubled: bool, flipped: bool, top: int, left: int, vec: int) -> tuple[list[Launch], Tensor]:
    """(groups, outputs, channels, kernel) as (phases, groups, outputs, taps, channels): a view, or a copy and its launch.

    Strides (`broadcast`) are multiples of vec, but for the last, which is 1.
    """
    operand = weight.permute(0, 1, 3, 4, 2)
    groups, outputs, kernel_y, kernel_x, channels = operand.shape
    phases, taps_y, taps_x = (4, kernel_y // 2 + 1, kernel_x // 2 + 1) if doubled else (1, kernel_y, kernel_x)
    strides = broadcast(operand)
    flipped = flipped and kernel_y * kernel_x > 1
    if not doubled and not flipped and strides[4] <= 1 and not any(s % vec for s in strides[:4]):
        return [], operand.unsqueeze(0)
    packed = weight.new_empty((phases, groups, outputs, taps_y, taps_x, channels))
    total = packed.numel()
    wide = total > 2**31 - 2 * _BLOCK or needs_wide(weight)
    args = (
        *(weight, packed, total, groups * outputs, outputs, channels, taps_y, taps_x, kernel_y, kernel_x, top, left),
        *weight.stride(),
    )
    constants = {"DOUBLED": doubled, "FLIPPED": flipped, "WIDE": wide, "BLOCK": _BLOCK}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    pack = Launch(_pack, (-(-total // _BLOCK),), args, constants, options)
    return [pack] if total else [], packed


def box_sums(
    mask: Tensor,
    updated: Tensor,
    *,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: int,
) -> tuple[list[Launch], Tensor]:
    """The launches that sum (1|B, C, H, W) over channels and windows, and what they fill: (1|B, H', W') float32.

    updated: (B, 1, H', W'), contiguous: receives the sums within [0, 1].
    A mask of several channels is summed over these first, so that windows read one plane.
    """
    batch, channels, h, w = mask.shape
    copies = updated.shape[0] // max(1, batch)

    def launch(source: Tensor, target: Tensor, out: Tensor | None, *window: int) -> Launch:
        block = 128 if source.shape[1] == 1 else 64
        return Launch(
            kernel=_box_sums,
            grid=(-(-target.numel() // block),),
            args=(
                *(source, target, out, target.numel(), *target.shape[1:], h, w, source.shape[1], *window),
                *source.stride(),
                copies,
            ),
            constants={
                "LAST": source.stride(1) == 1,
                "WIDE": max(target.numel(), updated.numel()) > 2**31 - 2**16 or needs_wide(source),
                "PIXELS": block,
                "CHANNELS": min(16, triton.next_power_of_2(source.shape[1])),
            },
            options={"num_warps": 4, "enable_fp_fusion": False},
        )

    sums = torch.empty((batch, *updated.shape[2:]), dtype=torch.float32, device=updated.device)
    if sums.numel() == 0:
        return [], sums
    window = (*kernel, stride, dilation, *padding[:2])
    if channels == 1:
        return [launch(mask, sums, updated, *window)], sums
    plane = sums.new_empty((batch, h, w))
    return [
        launch(mask, plane, None, 1, 1, 1, 1, 0, 0),
        launch(plane.unsqueeze(1), sums, updated, *window),
    ], sums


def _largest(dtype: torch.dtype, *numbers: int) -> int:
    """The largest power of two, up to 16 bytes of dtype, that divides all numbers."""
    return math.gcd(16 // dtype.itemsize, *numbers)


def _channels_last(t: Tensor | None, vec: int) -> tuple[bool, int, tuple[int, ...]]:
    """Whether neighbours in memory are channels; if so, the largest vector, up to vec, that divides the other strides, and
    these counted in it."""
    strides = broadcast(t)
    if strides[1] != 1:
        return False, 1, strides
    batch, _, row, column = strides
    vec = math.gcd(vec, batch, row, column)
    return True, vec, (batch // vec, 1, row // vec, column // vec)


def broadcast(t: Tensor | None) -> tuple[int, ...]:
    """Strides, 0 along dimensions of one element; zeros for None."""
    return (0, 0, 0, 0) if t is None else tuple(s * (n > 1) for n, s in zip(t.shape, t.stride(), strict=True))


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------

BUDGET = Budget(registers=255, shared_bytes=99 * 1024)
"""For all three ops: a program of 256 threads on each processor, and the memory that sm_86, sm_89 and sm_120 give it."""


def example(label: str, *shape: int) -> Tensor:
    """A tensor on the meta device, of the dtype and in the layout that the label names."""
    dtype = next((d for d in (torch.bfloat16, torch.float16) if str(d).removeprefix("torch.") in label), torch.float32)
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last) if "NHWC" in label else t


def example_precision(label: str) -> str:
    """The precision that the label names."""
    return "tf32" if "tf32" in label else "ieee"

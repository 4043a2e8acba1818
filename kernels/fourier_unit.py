"""fourier_unit in Triton: irfft2(ReLU(W · rfft2(x) + b)) + residual, its transforms as matrix products, for any h and w.

Five launches: rows, columns, channel mix, columns back, rows back. Between them lies the spectrum in float32, as
(B·h, 2, w/2 + 1, C): a real and an imaginary plane per row, channels innermost. To the column transforms a plane is
one long line of independent columns, to the mix it is the left matrix of a product. Two workspaces take turns.

**The transform.** With e_j = x_j + x_{n−j} and o_j = x_j − x_{n−j} for 0 < j < n/2, e_0 = o_0 = x_0, and

    A_k = Σ e_j cos(2πkj/n),   B_k = Σ o_j sin(2πkj/n),

X_k is A_k − iB_k and X_{n−k} is A_k + iB_k: a quarter of a dense complex transform's products, at every n, odd and prime
ones included. j and k run over the integers below n/2. For even n the middle is done apart, so that n = 64 takes
products of 32 × 32 and not 33 × 33: x_{n/2} adds (−1)^k x_{n/2} to A_k, and X_{n/2} is the alternating sum. The inverse
has the same sums, with X_k and X_{n−k} exchanged. That of rows sums real parts times cosine and imaginary parts times
sine; sin 0 = 0, and no sine at all for the middle bin, is numpy's rule about the imaginary parts of these two.

Cosines and sines come from a table of n entries, computed in float64, at the integer k·j mod n. A table has 8n bytes,
so all are kept. Matrices would have to be evicted some day, perhaps from under a captured graph that reads them.

**Accuracy.** An FFT errs by √log n, a running sum by √n: with `dot`, rows of 1023 elements err by one to two times
what the tolerance rule allows. With `dot_chunk` they stay within half of it (tests/test_triton.py has both, with additions
in a GPU's order; the interpreter's BLAS is kinder).

**Cost.** h + w multiply-adds per pixel and channel for all transforms together: 25 thousand a pixel for big-lama's
192×64×64, where dense ones would take 74 and the mix takes 76. All are IEEE float32, so they run on CUDA cores, and bound
the op: 12 µs at 67 TFLOP/s, while eight passes over the spectrum, 26 MB, are 5 µs at 4.8 TB/s. Counted, not yet timed on
a GPU. Work grows as n³ for n×n maps: a true FFT wins somewhere above.

Considered:
- A radix split n = n1·n2: a second algorithm, with its own tails, for the smaller part of the work at n = 64.
- Column transforms and mix in one kernel: its working set (192 complex channels × h) lives in shared memory, which
  Triton cannot index. The CUDA lane can.
- Storing spectra as x is stored: NCHW would give the column transforms short, odd rows (33 bins).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import Budget, Launch, activate, dot_chunk, from_float32, needs_wide, opaque, run, to_float32, widened

_INTS = ["lines", "channels", "h", "w"]

# ---- pieces ---------------------------------------------------------------------------------------------------------
# A "line" is what is transformed: a row of one channel, or a column of one. Tiles are [position, line].


@triton.jit
def _alternate(i):
    """cos(πi) of integers."""
    return (1 - 2 * (i % 2)).to(tl.float32)


@triton.jit
def _at(lines, i, stride, ALONG: tl.constexpr, WIDE: tl.constexpr):
    """Addresses of elements i of `lines` (addresses): [line, i] if ALONG, else [i, line].

    Triton gives neighbouring threads the last dimension, so ALONG is for lines whose elements are neighbours in memory.
    """
    offset = widened(i, WIDE) * stride
    if ALONG:
        at = lines[:, None] + offset[None, :]
    else:
        at = lines[None, :] + offset[:, None]
    return at


@triton.jit
def _mask(in_lines, in_i, ALONG: tl.constexpr):
    """As `_at`, of what is inside."""
    if ALONG:
        mask = in_lines[:, None] & in_i[None, :]
    else:
        mask = in_lines[None, :] & in_i[:, None]
    return mask


@triton.jit
def _load(lines, in_lines, i, in_i, stride, ALONG: tl.constexpr, WIDE: tl.constexpr):
    """Elements i of `lines` in float32, [i, line], 0 outside."""
    value = tl.load(_at(lines, i, stride, ALONG, WIDE), mask=_mask(in_lines, in_i, ALONG), other=0.0)
    if ALONG:
        value = tl.trans(value)
    return to_float32(value)


@triton.jit
def _store(value, lines, in_lines, i, in_i, stride, residual, r_stride, ALONG: tl.constexpr, WIDE: tl.constexpr):
    """value [i, line] (+ residual) to elements i of `lines`; `residual` holds addresses as `lines` does, or is None."""
    mask = _mask(in_lines, in_i, ALONG)
    if ALONG:
        value = tl.trans(value)
    if residual is not None:
        value += to_float32(tl.load(_at(residual, i, r_stride, ALONG, WIDE), mask=mask))
    tl.store(_at(lines, i, stride, ALONG, WIDE), from_float32(value, lines.dtype.element_ty), mask=mask)


@triton.jit
def _transform(
    lines,
    in_lines,
    stride,
    imaginary,
    table,
    k,
    n,
    ALONG: tl.constexpr,
    WIDE: tl.constexpr,
    POINTS: tl.constexpr,
    LINES: tl.constexpr,
    STEP: tl.constexpr,
):
    """The sums of the transform of `lines`: A_k and B_k, [k, line], and for even n the sum at n/2, [line].

    imaginary: None, or how far behind its real part the imaginary part of a bin lies: then lines are bins 0 to n/2 of
        real transforms, and the sums those of the inverse (a bin and its conjugate share a term).
    """
    points, middle, j = (n + 1) // 2, n // 2, tl.arange(0, STEP)
    at, turn = k[:, None] * j[None, :] % n, k * STEP % n
    a = tl.zeros((POINTS, LINES), tl.float32)
    b = tl.zeros((POINTS, LINES), tl.float32)
    total = tl.zeros((STEP, LINES), tl.float32)
    for first in range(0, points, STEP):
        i = first + j
        even = _load(lines, in_lines, i, i < points, stride, ALONG, WIDE)
        if imaginary is None:
            other = _load(lines, in_lines, n - i, (i > 0) & (i < points), stride, ALONG, WIDE)
            even, odd = even + other, even - other
        else:
            even *= tl.where(i == 0, 1.0, 2.0)[:, None]
            odd = 2.0 * _load(lines + imaginary, in_lines, i, i < points, stride, ALONG, WIDE)
        a = dot_chunk(tl.load(table + 2 * at), even, a)
        b = dot_chunk(tl.load(table + 2 * at + 1), odd, b)
        total += even
        at += turn[:, None]
        at = tl.where(at >= n, at - n, at)
    last = tl.load(lines + widened(middle, WIDE) * stride, mask=in_lines & (n % 2 == 0), other=0.0)
    a += _alternate(k)[:, None] * to_float32(last)[None, :]
    total = tl.sum(total * _alternate(j)[:, None], 0) + _alternate(middle) * to_float32(last)
    return a, b, total


# ---- kernels --------------------------------------------------------------------------------------------------------
# `points` is the number of integers below n/2; `middle` is n/2, a position where n is even.


@triton.jit(do_not_specialize=[*_INTS, "xb", "xc", "xy", "xx"])
def _rows(
    x,  # (B, C, h, w), any strides
    table,  # (w, 2)
    spectrum,  # (B·h, 2, w/2 + 1, C)
    scale,
    lines,  # B·h·C
    channels,
    h,
    w,
    xb,
    xc,
    xy,
    xx,
    ALONG: tl.constexpr,
    WIDE: tl.constexpr,
    POINTS: tl.constexpr,
    LINES: tl.constexpr,
    STEP: tl.constexpr,
):
    """spectrum = scale · the transform of each row of x, bins 0 to w/2."""
    program, channels = widened(tl.program_id(0), WIDE), widened(channels, WIDE)
    points, middle = (w + 1) // 2, w // 2
    tiles = tl.cdiv(points, POINTS)
    k = (program % tiles).to(tl.int32) * POINTS + tl.arange(0, POINTS)
    line = program // tiles * LINES + tl.arange(0, LINES)
    inside, even = line < lines, (line < lines) & (w % 2 == 0)
    row, c = line // channels, line % channels
    x += row // h * xb + row % h * xy + c * xc

    a, b, total = _transform(x, inside, xx, None, table, k, w, ALONG, WIDE, POINTS, LINES, STEP)
    plane = (middle + 1) * channels
    spectrum += row * (2 * plane) + c
    to, mask = _at(spectrum, k, channels, False, WIDE), _mask(inside, k < points, False)
    tl.store(to, a * scale, mask=mask)
    tl.store(to + plane, b * -scale, mask=mask)
    to, mask = spectrum + middle * channels, even & (program % tiles == 0)
    tl.store(to, total * scale, mask=mask)
    tl.store(to + plane, tl.zeros_like(total), mask=mask)


@triton.jit(do_not_specialize=["plane", "h"])
def _columns(
    source,  # (B, h, 2, plane): real and imaginary parts of `plane` columns in each sample
    table,  # (h, 2)
    target,  # as source
    plane,
    h,
    INVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    POINTS: tl.constexpr,
    LINES: tl.constexpr,
    STEP: tl.constexpr,
):
    """target = the complex transform of each column of source, unscaled; the inverse exchanges bins k and h − k."""
    program, plane = widened(tl.program_id(0), WIDE), widened(plane, WIDE)
    points, middle = (h + 1) // 2, h // 2
    tiles, strips, pitch = tl.cdiv(points, POINTS), tl.cdiv(plane, LINES // 2), 2 * plane
    k = (program % tiles).to(tl.int32) * POINTS + tl.arange(0, POINTS)
    first, sample = program // tiles % strips * (LINES // 2), program // tiles // strips * h * pitch
    line = tl.arange(0, LINES)  # two for each column: real and imaginary parts alternate
    column = first + line // 2
    source += sample + line % 2 * plane + column
    a, b, total = _transform(source, column < plane, pitch, None, table, k, h, False, WIDE, POINTS, LINES, STEP)
    a_re, a_im = tl.split(tl.reshape(a, (POINTS, LINES // 2, 2)))
    b_re, b_im = tl.split(tl.reshape(b, (POINTS, LINES // 2, 2)))
    if INVERSE:  # a + ib belongs to k, a − ib to h − k; b is 0 where k is
        b_re, b_im = -b_re, -b_im

    column = first + tl.arange(0, LINES // 2)
    inside = column < plane
    target += sample + column
    to, mask = _at(target, k, pitch, False, WIDE), _mask(inside, k < points, False)
    tl.store(to, a_re + b_im, mask=mask)
    tl.store(to + plane, a_im - b_re, mask=mask)
    to, mask = _at(target, h - k, pitch, False, WIDE), _mask(inside, (k > 0) & (k < points), False)
    tl.store(to, a_re - b_im, mask=mask)
    tl.store(to + plane, a_im + b_re, mask=mask)
    total_re, total_im = tl.split(tl.reshape(total, (LINES // 2, 2)))
    to, mask = target + middle * pitch, inside & (h % 2 == 0) & (program % tiles == 0)
    tl.store(to, total_re, mask=mask)
    tl.store(to + plane, total_im, mask=mask)


@triton.jit(do_not_specialize=["bins", "half", "inputs", "outputs", "w_row", "w_column", "b_row"])
def _mix(
    source,  # (B·h, 2, half, inputs)
    weight,  # (2·outputs, 2·inputs), real and imaginary parts alternating in both, any strides
    bias,  # (2·outputs,) or None
    target,  # (B·h, 2, half, outputs)
    bins,  # B·h·half
    half,
    inputs,
    outputs,
    w_row,
    w_column,
    b_row,
    WIDE: tl.constexpr,
    BINS: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """target = ReLU(weight · source + bias) at every bin."""
    program, half = widened(tl.program_id(0), WIDE), widened(half, WIDE)
    tiles = tl.cdiv(2 * outputs, PARTS)
    part = (program % tiles).to(tl.int32) * PARTS + tl.arange(0, PARTS)  # as in target: all real, then all imaginary
    in_parts, output, imaginary = part < 2 * outputs, part % outputs, part // outputs
    row = widened(2 * output + imaginary, WIDE)
    weight += row * w_row
    at = program // tiles * BINS + tl.arange(0, BINS)
    inside = at < bins
    source += at // half * (2 * half * inputs) + at % half * inputs
    target += at // half * (2 * half * outputs) + at % half * outputs

    acc = tl.zeros((BINS, PARTS), tl.float32)
    for _ in tl.static_range(2):  # real parts, imaginary parts
        for first in range(0, inputs, STEP):
            c = first + tl.arange(0, STEP)
            value = tl.load(source[:, None] + c[None, :], mask=_mask(inside, c < inputs, True), other=0.0)
            factor = opaque(_load(weight, in_parts, c, c < inputs, 2 * w_column, True, WIDE))
            acc = dot_chunk(value, factor, acc)
        source += half * inputs
        weight += w_column
    if bias is not None:
        acc += to_float32(tl.load(bias + row * b_row, mask=in_parts, other=0.0))[None, :]
    to = target[:, None] + (imaginary * (half * outputs) + output)[None, :]
    tl.store(to, activate(acc, 0.0, "relu", True), mask=_mask(inside, in_parts, True))


@triton.jit(do_not_specialize=[*_INTS, "ob", "oc", "oy", "ox", "rb", "rc", "ry", "rx"])
def _rows_back(
    spectrum,  # (B·h, 2, w/2 + 1, C)
    table,  # (w, 2)
    residual,  # (B, C, h, w), any strides, or None
    out,  # (B, C, h, w), any strides
    scale,
    lines,  # B·h·C
    channels,
    h,
    w,
    ob,
    oc,
    oy,
    ox,
    rb,
    rc,
    ry,
    rx,
    ALONG: tl.constexpr,
    WIDE: tl.constexpr,
    POINTS: tl.constexpr,
    LINES: tl.constexpr,
    STEP: tl.constexpr,
):
    """out = scale · the real inverse transform of each row of spectrum + residual."""
    program, channels = widened(tl.program_id(0), WIDE), widened(channels, WIDE)
    points, middle = (w + 1) // 2, w // 2
    tiles, plane = tl.cdiv(points, POINTS), (middle + 1) * channels
    k = (program % tiles).to(tl.int32) * POINTS + tl.arange(0, POINTS)
    line = program // tiles * LINES + tl.arange(0, LINES)
    inside, even = line < lines, (line < lines) & (w % 2 == 0)
    row, c = line // channels, line % channels
    spectrum += row * (2 * plane) + c
    out += row // h * ob + row % h * oy + c * oc
    if residual is not None:
        residual += row // h * rb + row % h * ry + c * rc

    a, b, total = _transform(spectrum, inside, channels, plane, table, k, w, False, WIDE, POINTS, LINES, STEP)
    _store((a - b) * scale, out, inside, k, k < points, ox, residual, rx, ALONG, WIDE)
    _store((a + b) * scale, out, inside, w - k, (k > 0) & (k < points), ox, residual, rx, ALONG, WIDE)
    i, mask = middle + tl.arange(0, 1), even & (program % tiles == 0)
    _store((total * scale)[None, :], out, mask, i, i < w, ox, residual, rx, False, WIDE)


# ---- launches -------------------------------------------------------------------------------------------------------

# The products inside a dot are fused multiply-adds whatever this says; the rest computes what the interpreter does.
_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


def transform_config(n: int, wide: bool) -> dict[str, int]:
    """Launch configuration of transforms of n points: tiles of [POINTS, LINES] results, sums in chunks of STEP terms.

    Small tiles: the 2 · 6336 lines of big-lama's columns at 512 pixels make 198 programs, 1.5 for each processor of an
    H200, which can hold two (registers). 64-bit addresses take registers that half a tile gives back. Reasoned, not
    measured.
    """
    return {"POINTS": 16 if n <= 32 else 32, "LINES": 32 if wide else 64, "STEP": 16}


def mix_config(wide: bool) -> dict[str, int]:
    """Launch configuration of the mix: 198 programs for big-lama at 512 pixels, as above. Reasoned, not measured."""
    return {"BINS": 32 if wide else 64, "PARTS": 64, "STEP": 16}


@functools.cache
def _table(n: int, device: torch.device) -> Tensor:
    """(n, 2) float32: cos and sin of 2πi/n. A blocking copy, once per n: afterwards any stream may read it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph is being captured and the table for transforms of {n} points is not on {device} yet; "
            "run the call once before the capture"
        )
    angle = torch.arange(n, dtype=torch.float64, device="cpu") * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], 1).float().to(device)


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> list[Launch]:
    """The launches for (x, weight, bias, residual) -> (out,), in order; none where out is empty. Reads no data."""
    x, weight, bias, residual = args
    (out,) = outs
    if out.numel() == 0:
        return []
    b, inputs, h, w = x.shape
    outputs, half = out.shape[1], w // 2 + 1
    size = -(-b * h * 2 * half * max(inputs, outputs) // 64) * 64  # both aligned: Triton compiles per alignment
    one, two = torch.empty((2, size), dtype=torch.float32, device=x.device)
    wide = needs_wide(one, *(t for t in (x, weight, bias, residual, out) if t is not None))
    vertical, horizontal = _table(h, x.device), _table(w, x.device)
    scale = 1.0 / math.sqrt(h * w)

    def transform(kernel: Any, n: int, batch: int, lines: int, args: tuple[Any, ...], **constants: Any) -> Launch:
        config = transform_config(n, wide)
        tiles = -(-((n + 1) // 2) // config["POINTS"]) * -(-lines // config["LINES"])
        return Launch(kernel, (batch * tiles,), args, {**constants, "WIDE": wide, **config}, _OPTIONS)

    def rows(channels: int) -> tuple[float, int, int, int, int]:
        return scale, b * h * channels, channels, h, w

    def columns(source: Tensor, target: Tensor, channels: int, inverse: bool) -> Launch:
        plane = half * channels
        return transform(_columns, h, b, 2 * plane, (source, vertical, target, plane, h), INVERSE=inverse)

    config = mix_config(wide)
    tiles = -(-b * h * half // config["BINS"]) * -(-2 * outputs // config["PARTS"])
    w_strides = weight.stride()[:2]
    b_stride = 0 if bias is None else bias.stride(0)
    r_strides = (0, 0, 0, 0) if residual is None else residual.stride()
    return [
        transform(_rows, w, 1, b * h * inputs, (x, horizontal, one, *rows(inputs), *x.stride()), ALONG=_along_rows(x)),
        columns(one, two, inputs, inverse=False),
        Launch(
            kernel=_mix,
            grid=(tiles,),
            args=(two, weight, bias, one, b * h * half, half, inputs, outputs, *w_strides, b_stride),
            constants={"WIDE": wide, **config},
            options=_OPTIONS,
        ),
        columns(one, two, outputs, inverse=True),
        transform(
            *(_rows_back, w, 1, b * h * outputs),
            (two, horizontal, residual, out, *rows(outputs), *out.stride(), *r_strides),
            ALONG=_along_rows(out),
        ),
    ]


def _along_rows(t: Tensor) -> bool:
    """Whether neighbours in memory are neighbours in a row, and not in the channels."""
    return t.stride(3) <= t.stride(1)


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,) from args = (x, weight, bias, residual)."""
    run(forward(args, outs), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------

BUDGET = Budget(registers=128, shared_bytes=20 * 1024)  # two programs of 256 threads on each processor


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: each launch, each dtype, both orders in memory, 64-bit offsets."""
    stages = ("rows", "columns", "mix", "columns back", "rows back")
    for label, dtype, shape, nhwc, bare in (
        ("float32 NCHW", torch.float32, (1, 192, 64, 64), False, True),
        ("float32 NHWC", torch.float32, (1, 192, 64, 64), True, False),
        ("bfloat16 NCHW", torch.bfloat16, (1, 192, 64, 64), False, False),
        ("bfloat16 NHWC", torch.bfloat16, (1, 192, 64, 64), True, True),
        ("float16 NHWC", torch.float16, (1, 192, 64, 64), True, False),
        ("float32 small", torch.float32, (1, 192, 32, 32), False, False),
        ("float32 wide", torch.float32, (1, 192, 4096, 4096), False, False),
    ):
        x = torch.empty(shape, dtype=dtype, device="meta")
        x = x.to(memory_format=torch.channels_last) if nhwc else x
        weight, bias = x.new_empty(384, 384), x.new_empty(384)
        args = (x, weight, None, None) if bare else (x, weight, bias, x)
        for stage, launch in zip(stages, forward(args, (torch.empty_like(x),)), strict=True):
            yield f"forward {label} {stage}", launch

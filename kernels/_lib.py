"""What the Triton kernels share: elementary functions, offsets of nested rows, `dot`, and the launch record.

A kernel file describes a launch as data (`Launch`) from shapes alone. `run` executes it; `aot.py` compiles the very
same record for other architectures from tensors on the meta device. So what CI checks is what runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))
IEEE = tl.constexpr("ieee")  # as a default it must be a constant already: Triton 3.6 does not make one of a string

# ---- elementary functions, in float32 -------------------------------------------------------------------------------
# `tl.exp` rounds x·log2(e) to float32 before it takes the power, a relative error of up to |x|·2⁻²⁴ in the result;
# libdevice does not exist in the interpreter. `_reduce` takes x = n·ln2 + r apart first (Cody–Waite: the high part of
# ln 2 has 9 bits, so n·it is exact) and so keeps the error near one ulp for every x. Where the result is rounded to 16
# bits anyway (PRECISE = False) the short form is good enough, and an elu gate takes a sixth fewer instructions: on GPUs
# with more than 2 TB/s the 16-bit kernels would otherwise be bound by instructions, not memory.

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HI = tl.constexpr(0.693359375)
_LN2_LO = tl.constexpr(-2.12194440e-4)
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it rounds to an integer, which the low bits of the sum then hold


@triton.jit
def clamp(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reduce(x):
    """(r, bits) with x = n·ln2 + r, |r| <= ln2/2, and the integer n in the low bits of `bits`. |x| < 2²¹."""
    shifted = x * _LOG2E + _ROUND
    n = shifted - _ROUND
    r = tl.fma(n, -_LN2_LO, tl.fma(n, -_LN2_HI, x))
    return r, shifted.to(tl.int32, bitcast=True)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """e^x, NaN for NaN: to about an ulp (and 0 below −87, where float32 becomes subnormal), or to |x|·2⁻²⁴."""
    if PRECISE:
        r, bits = _reduce(clamp(x, -87.0, 89.0))
        # 2^(n−1) · 2^(1 + r·log2 e): split so that n = 128 is still a number; n = −126 makes the first factor 0.
        scale = ((bits + 126) << 23).to(tl.float32, bitcast=True)
        x = tl.exp2(tl.fma(r, _LOG2E, 1.0)) * scale
    else:
        x = tl.exp2(x * _LOG2E)
    return x


@triton.jit
def expm1(x):
    """e^x − 1 to a few ulp everywhere, so also near 0; saturates at e^88 above 88, NaN for NaN."""
    r, bits = _reduce(clamp(x, -87.0, 88.0))
    # p = e^r − 1 by its Taylor series to degree 8: the rest is below 2⁻²⁹ of it.
    q = tl.fma(r, 2.4801587e-5, 1.9841270e-4)
    q = tl.fma(q, r, 1.3888889e-3)
    q = tl.fma(q, r, 8.3333333e-3)
    q = tl.fma(q, r, 4.1666667e-2)
    q = tl.fma(q, r, 1.6666667e-1)
    q = tl.fma(q, r, 0.5)
    p = tl.fma(q * r, r, r)
    scale = ((bits + 127) << 23).to(tl.float32, bitcast=True)
    return tl.fma(scale, p, scale - 1.0)


@triton.jit
def sigmoid(x, PRECISE: tl.constexpr):
    """1/(1 + e^−x): exactly 1 and 0 at ±inf, NaN for NaN."""
    return 1.0 / (1.0 + exp(-x, PRECISE))


@triton.jit
def tanh(x):
    """tanh, also accurate near 0. Beyond ±10 float32's tanh is ±1."""
    e = expm1(2.0 * clamp(x, -10.0, 10.0))
    return e / (e + 2.0)


@triton.jit
def activate(x, alpha, ACT: tl.constexpr, PRECISE: tl.constexpr):
    """The activation named ACT of float32 x. PRECISE: see above. The comparisons are written so that NaN gives NaN."""
    if ACT == "relu":
        x = tl.where(x <= 0.0, 0.0, x)
    elif ACT == "leaky_relu":
        x = tl.where(x > 0.0, x, x * alpha)
    elif ACT == "elu":
        x = tl.where(x > 0.0, x, alpha * expm1(x))
    elif ACT == "silu":
        x = x * sigmoid(x, PRECISE)
    elif ACT == "sigmoid":
        x = sigmoid(x, PRECISE)
    elif ACT == "tanh":
        x = tanh(x)
    else:
        tl.static_assert(ACT == "none", "unknown activation")
    return x


@triton.jit
def activate_backward(grad, x, a, alpha, ACT: tl.constexpr, PRECISE: tl.constexpr):
    """grad · act'(x), given also a = act(x); at 0 and at NaN what torch's vectorised kernels give."""
    if ACT == "relu":
        grad = tl.where(x <= 0.0, 0.0, grad)
    elif ACT == "leaky_relu":
        grad = tl.where(x > 0.0, grad, grad * alpha)
    elif ACT == "elu":
        # Not a + alpha, which cancels where x is very negative.
        grad = tl.where(x > 0.0, grad, grad * alpha * exp(x, PRECISE))
    elif ACT == "silu":
        s = sigmoid(x, PRECISE)
        grad = grad * s * (1.0 + x * (1.0 - s))
    elif ACT == "sigmoid":
        grad = grad * (1.0 - a) * a
    elif ACT == "tanh":
        grad = grad * (1.0 - a * a)
    else:
        tl.static_assert(ACT == "none", "unknown activation")
    return grad


def resolve_alpha(activation: str, alpha: float | None) -> float:
    """The number a kernel needs, whether or not the caller gave one."""
    if alpha is None:
        return 0.2 if activation == "leaky_relu" else 1.0
    return float(alpha)


# ---- where the interpreter differs from a GPU -----------------------------------------------------------------------
# It keeps bfloat16 as 16-bit integers: its `tl.dot` multiplies those, its conversion from float32 truncates, and both
# conversions get subnormals wrong, all of it silently. Kernels therefore convert and multiply only through these.


@triton.jit
def to_float32(x):
    """The same values in float32."""
    if INTERPRETING and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def from_float32(x, dtype: tl.constexpr):
    """Float32 x in `dtype`, rounded to nearest, ties to even; NaN stays NaN."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, rounded, bits | 0x400000) >> 16
        x = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def opaque(x):
    """Float32 x, of which the compiler does not see where it came from. For operands of `dot` that were 16 bits.

    Triton 3.7 makes such a product TF32 on sm_100, "ieee" or not (triton-lang/triton issue 10176), and so rounds the
    other operand. It looks for the load behind an operand, but not behind an instruction with side effects.
    """
    if not INTERPRETING:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = IEEE):
    """acc + a @ b with float32 accumulation. Every kernel uses this in place of `tl.dot`.

    PRECISION ("ieee", "tf32", "tf32x3") concerns float32 operands only; "ieee" is kept only if none of them is a
    converted one that is not `opaque`.
    """
    if INTERPRETING:
        acc = tl.dot(to_float32(a), to_float32(b), acc, input_precision="ieee", out_dtype=tl.float32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)
    return acc


@triton.jit
def dot_chunk(a, b, acc, PRECISION: tl.constexpr = IEEE):
    """acc + a @ b, where the product is summed by itself before it joins acc: what long float32 sums are made of.

    `dot` carries one running sum through all of K, with a rounding error that grows with √K; this keeps two sums of
    about √K terms each. max_num_imprecise_acc means nothing for these dtypes: it is there because Triton's optimiser
    would else make the addition the dot's accumulator, and so `dot` of this.
    """
    if INTERPRETING:
        part = tl.dot(to_float32(a), to_float32(b), input_precision="ieee", out_dtype=tl.float32)
    else:
        part = tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1, out_dtype=tl.float32)
    return acc + part


# ---- elementwise iteration over tensors of any strides --------------------------------------------------------------


@dataclass(frozen=True)
class Nest:
    """Tensors of one shape as nested rows: sizes and strides, outermost first, everything counted in vectors.

    sizes, strides (per operand): four each, padded with 1 and 0 in front; only the last `ndim` are looked at.
    vec: elements per vector. Above 1 the innermost dimension of every operand is contiguous, and all sizes, strides and
        offsets are whole vectors, so that aligned tensors take 16-byte accesses and no access straddles an edge.
    """

    ndim: int
    vec: int
    total: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def collapse(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], offsets: tuple[int, ...], itemsize: int
) -> Nest:
    """The nest over `shape` (at most 4-D, not empty) with each operand's strides; `offsets` are further distances.

    Dimensions are sorted by falling stride of the first operand and merged where every operand is contiguous across the
    border: a contiguous tensor becomes one row. The CPU kernels do the same (csrc/cpu/loop.h).
    """
    dims = [d for d, n in enumerate(shape) if n != 1] or [0]
    dims.sort(key=lambda d: -strides[0][d])
    rows: list[tuple[int, list[int]]] = []
    for d in dims:
        n, here = shape[d], [s[d] for s in strides]
        if rows and all(outer == s * n for outer, s in zip(rows[-1][1], here, strict=True)):
            rows[-1] = (rows[-1][0] * n, here)
        else:
            rows.append((n, here))

    (inner, steps), outer = rows[-1], rows[:-1]
    vec = 16 // itemsize if all(s == 1 for s in steps) else 1
    whole = [inner, *offsets, *(s for _, row in outer for s in row)]
    while any(n % vec for n in whole):
        vec //= 2
    rows = [(n, [s // vec for s in row]) for n, row in outer] + [(inner // vec, steps)]
    rows = [(1, [0] * len(strides))] * (4 - len(rows)) + rows
    return Nest(
        ndim=len(outer) + 1,
        vec=vec,
        total=math.prod(n for n, _ in rows),
        sizes=tuple(n for n, _ in rows),
        strides=tuple(zip(*(row for _, row in rows), strict=True)),
        offsets=tuple(n // vec for n in offsets),
    )


@triton.jit
def nest_vectors(total, VEC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's BLOCK elements: (vector indices [BLOCK/VEC, 1], their mask, positions in a vector [1, VEC])."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    start = program * (BLOCK // VEC)
    row = tl.arange(0, BLOCK // VEC)[:, None]
    # Compared before it is added: past the end, start + row may leave 32 bits.
    return start + row, row < total - start, tl.arange(0, VEC)[None, :]


@triton.jit
def nest_offsets(i, n1, n2, n3, s0, s1, s2, s3, NDIM: tl.constexpr):
    """Distance, in vectors, of the i-th vector of a nest from its first."""
    if NDIM == 1:
        offsets = i * s3
    else:
        offsets = (i % n3) * s3
        i = i // n3
        if NDIM == 2:
            offsets += i * s2
        else:
            offsets += (i % n2) * s2
            i = i // n2
            if NDIM == 3:
                offsets += i * s1
            else:
                offsets += (i % n1) * s1 + (i // n1) * s0
    return offsets


@triton.jit
def widened(i, WIDE: tl.constexpr):
    """i, in 64 bits if WIDE; what is computed from it is as wide."""
    if WIDE:
        i = i.to(tl.int64)
    return i


def needs_wide(*tensors: Tensor) -> bool:
    """Whether an element lies 2³¹ or more elements from its tensor's first, so that offsets need 64 bits."""
    return any(_reach(t.shape, t.stride()) >= 2**31 for t in tensors)


@functools.lru_cache(maxsize=4096)
def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Distance of the last element from the first, in elements; 0 where there is none."""
    return 0 if 0 in shape else sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


# ---- launches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A kernel launch as data: run-time arguments in order, constexpr arguments by name, compiler options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Budget:
    """What a kernel may use at most on any architecture, per thread and per program; spills are never allowed."""

    registers: int
    shared_bytes: int


def run(launches: Launch | Sequence[Launch] | None, outs: Sequence[Tensor]) -> None:
    """Start one launch, or several in order, on the current stream of the outputs' device; None starts nothing.

    Workspaces may be dropped as soon as this returns: torch's allocator reuses memory in the stream's order.
    """
    if launches is not None:
        with torch.cuda.device_of(outs[0]):  # does nothing for the interpreter's CPU tensors
            for launch in (launches,) if isinstance(launches, Launch) else launches:
                launch.kernel[launch.grid](*launch.args, **launch.constants, **launch.options)

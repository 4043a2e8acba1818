"""Counter-based normal noise in Triton: what inpaintrt.ops defines in `_philox.py`, with the polynomials of csrc/cpu/philox.h."""

from __future__ import annotations

import triton
import triton.language as tl

_TWO_PI = tl.constexpr(6.283185482)
_TWO_PI_REST = tl.constexpr(-1.748455603e-7)  # what float32 leaves of it
_ROOT_HALF = tl.constexpr(0x3F3504F3)  # the bits of √½


@triton.jit
def words(key0, key1, c0, c1, c2, c3):
    """Philox4x32-10 of uint32 counters and keys."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """In [2⁻³³, 1]."""
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def minus_two_log(u):
    """−2 ln u of [2⁻³³, 1]; exactly 0 for 1."""
    bits = u.to(tl.int32, bitcast=True) - _ROOT_HALF
    n = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + _ROOT_HALF).to(tl.float32, bitcast=True) - 1.0
    t = f * f
    p = tl.fma(f, -7.634496689e-2, 1.276157647e-1)
    p = tl.fma(p, f, -1.316018254e-1)
    p = tl.fma(p, f, 1.420175731e-1)
    p = tl.fma(p, f, -1.662335694e-1)
    p = tl.fma(p, f, 2.000122666e-1)
    p = tl.fma(p, f, -2.500081956e-1)
    p = tl.fma(p, f, 3.333333135e-1)
    p = tl.fma(n, -2.12194440e-4, p * f * t)
    p = f + tl.fma(t, -0.5, p)
    return -2.0 * tl.fma(n, 0.693359375, p)


@triton.jit
def circle(u):
    """cos 2πu and sin 2πu of [0, 1]: right angles apart, exactly, then within an eighth of a turn."""
    q = (4.0 * u + 0.5).to(tl.int32)
    f = tl.fma(q.to(tl.float32), -0.25, u)
    t = f * f
    c = tl.fma(t, 5.922924423e1, -8.544324493e1)
    c = tl.fma(c, t, 6.493932343e1)
    c = tl.fma(c, t, -1.973920822e1)
    c = tl.fma(c, t, 1.0)
    s = tl.fma(t, -7.545339966e1, 8.159394073e1)
    s = tl.fma(s, t, -4.134167480e1)
    s = tl.fma(s, t, _TWO_PI_REST)
    s = tl.fma(f, _TWO_PI, f * s)
    odd = (q & 1) == 1
    x = tl.where(odd, s, c)
    y = tl.where(odd, c, s)
    return tl.where(((q + 1) & 2) == 2, -x, x), tl.where((q & 2) == 2, -y, y)


@triton.jit
def normals(seed, block, stream, call, BLOCKS: tl.constexpr):
    """The normals of `block` (BLOCKS of them) as [BLOCKS, 4], which elements 4·block + lane take.

    seed: int64 scalar; block: int32 or int64; stream, call: uint32, scalars or one for each block.
    """
    zero = (block * 0).to(tl.uint32)
    key = seed.to(tl.uint64)
    c0, c1 = block.to(tl.uint32), zero
    if block.dtype == tl.int64:
        c1 = (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = words(
        zero + (key & 0xFFFFFFFF).to(tl.uint32), zero + (key >> 32).to(tl.uint32), c0, c1, zero + stream, zero + call
    )
    radius = tl.sqrt_rn(minus_two_log(uniform(w0)))
    cosine, sine = circle(uniform(w1))
    z0, z1 = radius * cosine, radius * sine
    radius = tl.sqrt_rn(minus_two_log(uniform(w2)))
    cosine, sine = circle(uniform(w3))
    z2, z3 = radius * cosine, radius * sine
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCKS, 4))

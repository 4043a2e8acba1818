"""linear_step in Triton: a sum of up to five tensors and noise, clamped, with the known region blended in, in one pass.

What bounds it: memory, or the launch for latents. Elements go by their index within a sample, as in sampler_step, because
noise does; without noise the order costs nothing where samples are contiguous (FLAT).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import Budget, Launch, clamp, from_float32, needs_wide, run, to_float32, widened
from ._samples import as_int32, draw, flat, place, strides

_MOST = 5


@triton.jit
def _term(factor, t, sample, e, height, width, s0, s1, s2, s3, inside, FLAT: tl.constexpr):
    """A coefficient times its term."""
    at = sample * s0 + place(e, height, width, s1, s2, s3, FLAT)
    return tl.load(factor) * to_float32(tl.load(t + at, mask=inside, other=0.0))


@triton.jit(do_not_specialize=["call"])
def _forward(
    t0,
    t1,
    t2,
    t3,
    t4,
    coefficients,  # N of the terms, of noise, known and its noise; of a sample or of all
    noise,
    seeds,
    counter,
    known,
    mask,
    out,
    call,
    clip,
    programs,  # of a sample
    elements,
    height,
    width,
    r0,
    r1,
    q0,  # of seeds
    u0,  # from one noise to the next
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    b2,
    b3,
    c0,
    c1,
    c2,
    c3,
    d0,
    d1,
    d2,
    d3,
    e0,
    e1,
    e2,
    e3,
    n0,
    n1,
    n2,
    n3,
    k0,
    k1,
    k2,
    k3,
    m0,
    m1,
    m2,
    m3,
    o0,
    o1,
    o2,
    o3,
    N: tl.constexpr,
    CLIP: tl.constexpr,
    DRAWS: tl.constexpr,  # noises given
    SEEDED: tl.constexpr,
    BLEND: tl.constexpr,
    SHARED: tl.constexpr,  # the mask, by all channels
    COUNTED: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    program = widened(tl.program_id(0), WIDE)
    sample = program // programs
    block = (program % programs) * BLOCKS + tl.arange(0, BLOCKS)
    e = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = e < elements
    a = coefficients + sample * r0

    y = _term(a, t0, sample, e, height, width, a0, a1, a2, a3, inside, FLAT)
    if N > 1:
        y += _term(a + r1, t1, sample, e, height, width, b0, b1, b2, b3, inside, FLAT)
    if N > 2:
        y += _term(a + 2 * r1, t2, sample, e, height, width, c0, c1, c2, c3, inside, FLAT)
    if N > 3:
        y += _term(a + 3 * r1, t3, sample, e, height, width, d0, d1, d2, d3, inside, FLAT)
    if N > 4:
        y += _term(a + 4 * r1, t4, sample, e, height, width, e0, e1, e2, e3, inside, FLAT)

    weight = tl.zeros_like(y)
    k = tl.zeros_like(y)
    if BLEND:
        at = sample * m0 + place(e, height, width, m1, m2, m3, FLAT, SHARED)
        weight = to_float32(tl.load(mask + at, mask=inside, other=0.0))
    if SEEDED:
        if COUNTED:
            call = tl.load(counter)
        z, k = draw(tl.load(seeds + sample * q0), block, call.to(tl.uint32), weight, BLEND, BLOCKS)
        y += tl.load(a + N * r1) * z
    elif DRAWS > 0:
        at = sample * n0 + place(e, height, width, n1, n2, n3, FLAT)
        y += tl.load(a + N * r1) * to_float32(tl.load(noise + at, mask=inside, other=0.0))
        if DRAWS > 1:
            k = to_float32(tl.load(noise + u0 + at, mask=inside, other=0.0))
    if CLIP:
        y = clamp(y, -clip, clip)
    if BLEND:
        at = sample * k0 + place(e, height, width, k1, k2, k3, FLAT)
        noised = tl.load(a + (N + 1) * r1) * to_float32(tl.load(known + at, mask=inside, other=0.0))
        if SEEDED or DRAWS > 1:
            noised += tl.load(a + (N + 2) * r1) * k
        y = weight * noised + (1.0 - weight) * y
    at = sample * o0 + place(e, height, width, o1, o2, o3, FLAT)
    tl.store(out + at, from_float32(y, out.dtype.element_ty), mask=inside)


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> Launch | None:
    """The launch for linear_step's arguments -> (out,), or None where it is empty. Reads no data."""
    terms, coefficients, noise, seeds, call, counter, clip, known, mask = args
    (out,) = outs
    if out.numel() == 0:
        return None
    b, c, h, w = out.shape
    blocks = 128
    programs = -(-c * h * w // (4 * blocks))
    present = [t for t in (*terms, noise, known, mask, out) if t is not None]
    slots = [*terms, *[None] * (_MOST - len(terms))]
    layouts = [s for t in slots for s in strides(t)]
    layouts += [*strides(noise, 1), *strides(known), *strides(mask), *strides(out)]
    return Launch(
        kernel=_forward,
        grid=(b * programs,),
        args=(
            *slots, coefficients, noise, seeds, counter, known, mask, out, as_int32(call),
            0.0 if clip is None else float(clip), programs, c * h * w, h, w,
            coefficients.stride(0) if coefficients.dim() == 2 else 0, coefficients.stride(-1),
            0 if seeds is None else seeds.stride(0), 0 if noise is None else noise.stride(0), *layouts,
        ),
        constants={
            "N": len(terms),
            "CLIP": clip is not None,
            "DRAWS": 0 if noise is None else noise.shape[0],
            "SEEDED": seeds is not None,
            "BLEND": known is not None,
            "SHARED": mask is not None and mask.shape[1] == 1,
            "COUNTED": counter is not None,
            "FLAT": flat(present),
            "WIDE": needs_wide(*present),
            "BLOCKS": blocks,
        },
        options={"num_warps": 4, "enable_fp_fusion": False},
    )  # fmt: skip


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,)."""
    run(forward(args, outs), outs)


BUDGET = Budget(registers=128, shared_bytes=4096)


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: each dtype, number of terms, kind of noise, layouts."""

    def variant(x: Tensor, terms: int, *, seeds: bool = False, noise: int = 0, known: bool = False) -> Launch:
        b, _, h, w = x.shape
        mask = torch.empty((b, 1, h, w), dtype=x.dtype, device="meta")
        found = forward(
            (
                [x] * terms, torch.empty(terms + 3, device="meta"),
                torch.empty((noise, *x.shape), dtype=x.dtype, device="meta") if noise else None,
                torch.empty(b, dtype=torch.int64, device="meta") if seeds else None, 3, None, 1.0,
                x if known else None, mask if known else None,
            ),
            (torch.empty_like(x),),
        )  # fmt: skip
        assert found is not None, "variants are not empty"
        return found

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.empty((2, 4, 64, 64), dtype=dtype, device="meta")
        yield f"{str(dtype).removeprefix('torch.')} seeds, known", variant(x, 2, seeds=True, known=True)
    x = torch.empty((2, 4, 64, 64), device="meta")
    for terms in range(1, _MOST + 1):
        yield f"{terms} terms", variant(x, terms)
    yield "given noise, known", variant(x, 1, noise=2, known=True)
    yield "NHWC", variant(x.to(memory_format=torch.channels_last), 3, seeds=True, known=True)
    yield "wide", variant(torch.empty((1, 1, 65536, 32768), device="meta"), 2, seeds=True)

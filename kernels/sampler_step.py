"""sampler_step in Triton: prediction, posterior, noise, undo steps and the known region in one pass.

What bounds it: on large images memory, 25 bytes an element with a known region; on small ones the launch. A program takes
BLOCKS blocks of four elements, in the order of their index within a sample, because noise goes by index; where samples are
contiguous (FLAT) that is also memory's order and no index is taken apart but the mask's.

A pixel needs one noise: the step's where it is unknown, the known region's where it is known. A program draws once, from
the stream that each block of four needs, and a second time only if one of its blocks needs both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import Budget, Launch, clamp, exp, from_float32, needs_wide, run, to_float32, widened
from ._samples import as_int32, draw, flat, place, strides


@triton.jit(do_not_specialize=["call"])
def _forward(
    x,
    model,  # (B, 2C or C, H, W)
    row,  # 16 coefficients, of a sample or of all
    known,
    mask,
    noise,
    seeds,
    counter,
    guidance,
    out,
    clean,
    call,
    clip,
    programs,  # of a sample
    elements,
    channels,
    height,
    width,
    r0,
    r1,
    q0,  # of seeds
    u0,  # from one noise to the next
    x0,
    x1,
    x2,
    x3,
    m0,
    m1,
    m2,
    m3,
    k0,
    k1,
    k2,
    k3,
    a0,
    a1,
    a2,
    a3,
    n0,
    n1,
    n2,
    n3,
    g0,
    g1,
    g2,
    g3,
    o0,
    o1,
    o2,
    o3,
    c0,
    c1,
    c2,
    c3,
    PREDICTION: tl.constexpr,
    VARIANCE: tl.constexpr,
    CLIP: tl.constexpr,
    DRAWS: tl.constexpr,  # noises given; 0: they are drawn here
    BLEND: tl.constexpr,
    SHARED: tl.constexpr,  # the mask, by all channels
    GUIDED: tl.constexpr,
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
    row += sample * r0
    if COUNTED:
        call = tl.load(counter)
    call = call.to(tl.uint32)

    now = tl.load(x + sample * x0 + place(e, height, width, x1, x2, x3, FLAT), mask=inside, other=0.0)
    at = sample * m0 + place(e, height, width, m1, m2, m3, FLAT)
    predicted = to_float32(tl.load(model + at, mask=inside, other=0.0))
    min_log = tl.load(row + 4 * r1)
    if VARIANCE == "fixed":
        log_variance = min_log + tl.zeros_like(now)
    else:
        log_variance = to_float32(tl.load(model + channels * m1 + at, mask=inside, other=0.0))
        if VARIANCE == "learned_range":
            share = (log_variance + 1.0) * 0.5
            log_variance = share * tl.load(row + 5 * r1) + (1.0 - share) * min_log

    if PREDICTION == "epsilon":
        start = tl.load(row) * now - tl.load(row + r1) * predicted
    elif PREDICTION == "v":
        start = (now - tl.load(row + r1) * predicted) / tl.load(row)
    else:
        start = predicted
    if CLIP:
        start = clamp(start, -clip, clip)
    y = tl.load(row + 2 * r1) * start + tl.load(row + 3 * r1) * now
    if GUIDED:
        at = sample * g0 + place(e, height, width, g1, g2, g3, FLAT)
        y += exp(log_variance, True) * tl.load(guidance + at, mask=inside, other=0.0)

    nonzero, undo_scale, undo_var = tl.load(row + 6 * r1), tl.load(row + 7 * r1), tl.load(row + 8 * r1)
    weight = tl.zeros_like(now)
    if BLEND:
        at = sample * a0 + place(e, height, width, a1, a2, a3, FLAT, SHARED)
        weight = tl.load(mask + at, mask=inside, other=0.0)
        weight = tl.where(tl.load(row + 11 * r1) != 0.0, weight, 0.0)
    if DRAWS == 0:
        z, k = draw(tl.load(seeds + sample * q0), block, call, weight, BLEND, BLOCKS)
        spread = nonzero * undo_scale * undo_scale * exp(log_variance, True) + undo_var
        y = undo_scale * y + tl.sqrt_rn(spread) * z
    else:
        at = sample * n0 + place(e, height, width, n1, n2, n3, FLAT)
        y += nonzero * exp(0.5 * log_variance, True) * tl.load(noise + at, mask=inside, other=0.0)
        k = tl.zeros_like(now)
        if DRAWS == 3:
            undone = tl.load(noise + u0 + at, mask=inside, other=0.0)
            y = undo_scale * y + tl.sqrt_rn(undo_var) * undone
            if BLEND:
                k = tl.load(noise + 2 * u0 + at, mask=inside, other=0.0)
    if BLEND:
        at = sample * k0 + place(e, height, width, k1, k2, k3, FLAT)
        kept = tl.load(known + at, mask=inside, other=0.0)
        noised = tl.load(row + 9 * r1) * kept + tl.load(row + 10 * r1) * k
        blended = weight * noised + (1.0 - weight) * y
        y = tl.where(tl.load(row + 11 * r1) != 0.0, blended, y)
    at = sample * o0 + place(e, height, width, o1, o2, o3, FLAT)
    tl.store(out + at, from_float32(y, out.dtype.element_ty), mask=inside)
    at = sample * c0 + place(e, height, width, c1, c2, c3, FLAT)
    tl.store(clean + at, from_float32(start, clean.dtype.element_ty), mask=inside)


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> Launch | None:
    """The launch for sampler_step's arguments -> (next, x0), or None where they are empty. Reads no data."""
    x, model, row, known, mask, noise, seeds, call, counter, prediction, variance, clip, guidance = args
    out, clean = outs
    if out.numel() == 0:
        return None
    b, c, h, w = x.shape
    blocks = 128
    programs = -(-c * h * w // (4 * blocks))
    present = [t for t in (x, model, known, mask, noise, guidance, out, clean) if t is not None]
    r = (row.stride(0) if row.dim() == 2 else 0, row.stride(-1))
    layouts = [
        s for t, first in ((x, 0), (model, 0), (known, 0), (mask, 0), (noise, 1), (guidance, 0), (out, 0), (clean, 0))
        for s in strides(t, first)
    ]  # fmt: skip
    return Launch(
        kernel=_forward,
        grid=(b * programs,),
        args=(
            x, model, row, known, mask, noise, seeds, counter, guidance, out, clean, as_int32(call),
            0.0 if clip is None else float(clip), programs, c * h * w, c, h, w, *r,
            0 if seeds is None else seeds.stride(0), 0 if noise is None else noise.stride(0), *layouts,
        ),
        constants={
            "PREDICTION": prediction,
            "VARIANCE": variance,
            "CLIP": clip is not None,
            "DRAWS": 0 if noise is None else noise.shape[0],
            "BLEND": known is not None,
            "SHARED": mask is not None and mask.shape[1] == 1,
            "GUIDED": guidance is not None,
            "COUNTED": counter is not None,
            "FLAT": flat(present),
            "WIDE": needs_wide(*present),
            "BLOCKS": blocks,
        },
        options={"num_warps": 4, "enable_fp_fusion": False},
    )  # fmt: skip


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (next, x0)."""
    run(forward(args, outs), outs)


BUDGET = Budget(registers=128, shared_bytes=4096)


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: each dtype of the model's, noise drawn and given, layouts."""

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def variant(
        x: Tensor, model: Tensor, *, known: bool = True, noise: int = 0, guided: bool = False, **options: Any
    ) -> Launch:
        b, c, h, w = x.shape
        drawn = None if noise else made(b, dtype=torch.int64)
        found = forward(
            (
                x, model, made(16), x if known else None, made(b, 1, h, w) if known else None,
                made(noise, b, c, h, w) if noise else None, drawn, 3, options.get("counter"),
                options.get("prediction", "epsilon"), options.get("variance", "learned_range"), options.get("clip", 1.0),
                x if guided else None,
            ),
            (torch.empty_like(x), torch.empty_like(x)),
        )  # fmt: skip
        assert found is not None, "variants are not empty"
        return found

    x = made(2, 3, 256, 256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield f"{str(dtype).removeprefix('torch.')}", variant(x, made(2, 6, 256, 256, dtype=dtype))
    model = made(2, 6, 256, 256)
    yield "given noise", variant(x, model, noise=3, guided=True)
    yield "given one noise", variant(x, model, known=False, noise=1)
    yield "no known region, counter", variant(x, model, known=False, counter=made(dtype=torch.int64))
    yield "v, fixed", variant(x, x, prediction="v", variance="fixed", clip=None)
    last = {"memory_format": torch.channels_last}
    yield "NHWC", variant(x.to(**last), model.to(**last), guided=True)
    yield "wide", variant(made(1, 1, 65536, 32768), made(1, 2, 65536, 32768))

"""window_attention in Triton: a program takes some queries of one window and head, and all keys of the window.

Rolling and cutting are addresses: token (y, x) of a window lies at (y' + shift) mod height, and likewise x, where y' counts
on the rolled map. Shift regions are two comparisons with y' and x', so nothing is added that was ever in memory but the
mask, one number per key, and a bias. Logits are float32 and their sums are kept as the definition orders them; softmax is
taken online over blocks of keys, with the sums rescaled whenever the largest logit grows.

**Small weights.** Masked keys have weights near e⁻¹⁰⁰, 4·10⁻⁴⁴, which float32 holds as a subnormal number and a GPU's
exponential does not. They matter where all other values are 0. So float32 and bfloat16 weigh with 2²⁰·e^(s − max), the
square of 2¹⁰·e^((s − max)/2), which holds them to e⁻¹⁰¹ and leaves room for values up to 10³⁰; float16, whose range is
narrower than that, has no use for it.

**Cost.** Two products of 2·N·C operations a token; float32 on CUDA cores: 0.38 GFLOP for 64×64×180 with windows of 8, 6 µs
at 67 TFLOP/s, and 12 MB of memory traffic, 2.5 µs at 4.8 TB/s. Counted, not yet timed on a GPU.

Considered:
- Leaving invalid keys out, as the CPU kernel does: which ones may be is known only after norms of the whole window, and
  blocks of keys that hold no valid one are rare in masks of real holes.
- Several heads per program: at 16×16 tokens there are 24 programs already, too few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import Budget, Launch, dot, exp, from_float32, needs_wide, run, to_float32, widened

_SIZES = ["height", "width", "size", "shift", "heads", "channels"]
_STRIDES = [a + b for a in "qkvo" for b in "byxc"] + ["mb", "my", "mx", "bh", "bi", "bj"]


@triton.jit
def _place(t, row, column, height, width, size, shift):
    """Of tokens t of a window: row and column on the map, and region of the map before it was rolled."""
    y, x = row * size + t // size, column * size + t % size
    down = (y >= height - size).to(tl.int32) + (y >= height - shift).to(tl.int32)
    right = (x >= width - size).to(tl.int32) + (x >= width - shift).to(tl.int32)
    return (y + shift) % height, (x + shift) % width, 3 * down + right


@triton.jit
def _weight(x, RAISED: tl.constexpr, PRECISE: tl.constexpr):
    """e^x, times 2²⁰ if RAISED: no less than the smallest normal number down to x = −101."""
    if RAISED:
        half = exp(0.5 * x, PRECISE) * 1024.0
        x = half * half
    else:
        x = exp(x, PRECISE)
    return x


@triton.jit(do_not_specialize=[*_SIZES, "scale", "mask_value", *_STRIDES])
def _forward(
    q,  # (B, H, W, C), as k, v and out; any strides
    k,
    v,
    mask,  # (1|B, H, W, 1) or None, 1 = valid; a batch of 1 comes with stride 0
    bias,  # (heads, N, N) or None
    out,
    scale,
    mask_value,
    height,
    width,
    size,
    shift,
    heads,
    channels,  # of a head
    qb,
    qy,
    qx,
    qc,
    kb,
    ky,
    kx,
    kc,
    vb,
    vy,
    vx,
    vc,
    ob,
    oy,
    ox,
    oc,
    mb,
    my,
    mx,
    bh,
    bi,
    bj,
    SEAMS: tl.constexpr,  # shift > 0
    RAISED: tl.constexpr,  # see _weight
    WIDE: tl.constexpr,
    PRECISE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tokens = size * size
    blocks = tl.cdiv(tokens, QUERIES)
    program = tl.program_id(0)
    block, head, window = program % blocks, program // blocks % heads, program // blocks // heads
    across, down = width // size, height // size
    column, row, image = window % across, window // across % down, widened(window // across // down, WIDE)
    c = tl.arange(0, CHANNELS)
    own = widened(head * channels + c, WIDE)
    has_c = c < channels

    i = block * QUERIES + tl.arange(0, QUERIES)
    y, x, region = _place(i, row, column, height, width, size, shift)
    at = image * qb + widened(y, WIDE) * qy + widened(x, WIDE) * qx
    has_i = (i < tokens)[:, None]
    queries = tl.load(q + at[:, None] + (own * qc)[None, :], mask=has_i & has_c[None, :], other=0.0)

    best = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, CHANNELS), tl.float32)
    for first in range(0, tokens, KEYS):
        j = first + tl.arange(0, KEYS)
        has_j = j < tokens
        key_y, key_x, key_region = _place(j, row, column, height, width, size, shift)
        key_y, key_x = widened(key_y, WIDE), widened(key_x, WIDE)
        to_keys = image * kb + key_y * ky + key_x * kx
        keys = tl.load(k + to_keys[None, :] + (own * kc)[:, None], mask=has_j[None, :] & has_c[:, None], other=0.0)
        logit = dot(queries, keys, tl.zeros((QUERIES, KEYS), tl.float32)) * scale
        if bias is not None:
            pair = (widened(i, WIDE) * bi)[:, None] + (widened(j, WIDE) * bj)[None, :]
            added = tl.load(bias + widened(head, WIDE) * bh + pair, mask=has_i & has_j[None, :], other=0.0)
            logit += to_float32(added)
        if SEAMS:
            logit += tl.where(region[:, None] == key_region[None, :], 0.0, mask_value)
        if mask is not None:
            valid = to_float32(tl.load(mask + image * mb + key_y * my + key_x * mx, mask=has_j, other=1.0))
            valid = tl.where(valid == 1.0, 0.0, tl.where(valid == 0.0, mask_value, valid))
            logit += valid[None, :]
        logit = tl.where(has_j[None, :], logit, float("-inf"))

        last = best
        best = tl.maximum(best, tl.max(logit, 1))
        base = tl.where(best == float("-inf"), 0.0, best)  # −∞ − (−∞) would be no number
        weight = _weight(logit - base[:, None], RAISED, PRECISE)
        kept = exp(0.5 * (last - base), PRECISE)  # its square may be too small a number
        total = total * kept * kept + tl.sum(weight, 1)
        to_values = image * vb + key_y * vy + key_x * vx
        values = tl.load(v + to_values[:, None] + (own * vc)[None, :], mask=has_j[:, None] & has_c[None, :], other=0.0)
        acc = dot(from_float32(weight, values.dtype), values, acc * kept[:, None] * kept[:, None])

    at = image * ob + widened(y, WIDE) * oy + widened(x, WIDE) * ox
    result = from_float32(acc / total[:, None], out.dtype.element_ty)
    tl.store(out + at[:, None] + (own * oc)[None, :], result, mask=has_i & has_c[None, :])


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> Launch | None:
    """The launch for window_attention's arguments -> (out,), or None where out is empty. Reads no data."""
    q, k, v, size, heads, shift, scale, mask, bias, mask_value = args
    (out,) = outs
    if out.numel() == 0:
        return None
    b, height, width, channels = q.shape
    channels //= heads
    tokens = size * size
    block = min(32, max(16, triton.next_power_of_2(tokens)))
    strides = [s for t in (q, k, v, out) for s in t.stride()]
    strides += (0, 0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, *mask.stride()[1:3])
    strides += (0, 0, 0) if bias is None else bias.stride()
    tensors = [t for t in (q, k, v, mask, bias, out) if t is not None]
    factor = channels**-0.5 if scale is None else float(scale)
    return Launch(
        kernel=_forward,
        grid=(b * (height // size) * (width // size) * heads * triton.cdiv(tokens, block),),
        args=(
            q,
            k,
            v,
            mask,
            bias,
            out,
            factor,
            float(mask_value),
            height,
            width,
            size,
            shift,
            heads,
            channels,
            *strides,
        ),
        constants={
            "SEAMS": shift > 0,
            "RAISED": q.dtype != torch.float16,
            "WIDE": needs_wide(*tensors),
            "PRECISE": q.dtype == torch.float32,
            "QUERIES": block,
            "KEYS": block,
            "CHANNELS": max(16, triton.next_power_of_2(channels)),
        },
        options={"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False},
    )


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,) from the arguments."""
    run(forward(args, outs), outs)


BUDGET = Budget(registers=255, shared_bytes=64 << 10)


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: dtypes, widths of heads, each addend, 64-bit offsets."""
    for label, dtype, size, heads, channels, shift, masked, biased in (
        ("float32 MAT", torch.float32, 8, 6, 180, 4, True, False),
        ("float32 MAT, wide windows", torch.float32, 16, 6, 180, 0, True, False),
        ("float32 Swin", torch.float32, 7, 3, 96, 3, False, True),
        ("float32 heads of 64", torch.float32, 8, 2, 128, 4, True, True),
        ("bfloat16 MAT", torch.bfloat16, 8, 6, 180, 4, True, False),
        ("float16 Swin", torch.float16, 7, 3, 96, 3, False, True),
        ("float32 far apart", torch.float32, 8, 6, 180, 4, True, False),
    ):
        side = 4 * size
        far = 2**31 if "far" in label else side * side * channels
        x = torch.empty_strided(
            (2, side, side, channels), (far, side * channels, channels, 1), dtype=dtype, device="meta"
        )
        mask = torch.empty((1, side, side, 1), device="meta") if masked else None
        bias = torch.empty((heads, size**2, size**2), dtype=dtype, device="meta") if biased else None
        launch = forward((x, x, x, size, heads, shift, None, mask, bias, -100.0), (x,))
        assert launch is not None, "variants are not empty"
        yield f"forward {label}", launch

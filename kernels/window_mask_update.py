"""window_mask_update in Triton: a program sums one window of the mask and writes its clamped sum to all tokens.

A map of 64×64 tokens is 16 KB: what bounds it is the launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import Budget, Launch, clamp, from_float32, needs_wide, run, to_float32, widened


@triton.jit
def _at(t, row, column, height, width, size, shift, sy, sx, WIDE: tl.constexpr):
    """Distances of tokens t of a window from the image's first."""
    y, x = (row * size + t // size + shift) % height, (column * size + t % size + shift) % width
    return widened(y, WIDE) * sy + widened(x, WIDE) * sx


@triton.jit(do_not_specialize=["height", "width", "size", "shift", "mb", "my", "mx", "ob", "oy", "ox"])
def _forward(
    mask,  # (B, H, W, 1), any strides
    out,
    height,
    width,
    size,
    shift,
    mb,
    my,
    mx,
    ob,
    oy,
    ox,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    window, across, down = tl.program_id(0), width // size, height // size
    column, row, image = window % across, window // across % down, widened(window // across // down, WIDE)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size * size, BLOCK):
        t = first + tl.arange(0, BLOCK)
        at = image * mb + _at(t, row, column, height, width, size, shift, my, mx, WIDE)
        total += to_float32(tl.load(mask + at, mask=t < size * size, other=0.0))
    updated = clamp(tl.sum(total, 0), 0.0, 1.0)
    for first in range(0, size * size, BLOCK):
        t = first + tl.arange(0, BLOCK)
        at = image * ob + _at(t, row, column, height, width, size, shift, oy, ox, WIDE)
        value = from_float32(tl.zeros((BLOCK,), tl.float32) + updated, out.dtype.element_ty)
        tl.store(out + at, value, mask=t < size * size)


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> Launch | None:
    """The launch for (mask, window_size, shift) -> (out,), or None where out is empty. Reads no data."""
    mask, size, shift = args
    (out,) = outs
    if out.numel() == 0:
        return None
    b, height, width = mask.shape[:3]
    return Launch(
        kernel=_forward,
        grid=(b * (height // size) * (width // size),),
        args=(mask, out, height, width, size, shift, *mask.stride()[:3], *out.stride()[:3]),
        constants={"WIDE": needs_wide(mask, out), "BLOCK": min(256, max(16, triton.next_power_of_2(size * size)))},
        options={"num_warps": 2, "enable_fp_fusion": False},
    )


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,) from args = (mask, window_size, shift)."""
    run(forward(args, outs), outs)


BUDGET = Budget(registers=64, shared_bytes=2048)


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: each dtype, small windows, 64-bit offsets."""
    for label, dtype, size, far in (
        ("float32", torch.float32, 8, 1024),
        ("bfloat16", torch.bfloat16, 16, 1024),
        ("float16", torch.float16, 2, 1024),
        ("float32 far apart", torch.float32, 8, 2**31),
    ):
        x = torch.empty_strided((2, 32, 32, 1), (far, 32, 1, 1), dtype=dtype, device="meta")
        launch = forward((x, size, 4 % size), (x,))
        assert launch is not None, "variants are not empty"
        yield f"forward {label}", launch

"""What the steps of diffusion samplers share: their noise, the known region they blend in, and checks of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import _philox


def drawn(seeds: Tensor, stream: int, like: Tensor, call: int, counter: Tensor | None) -> Tensor:
    """Philox's noise of a stream in `like`'s shape and dtype."""
    return _philox.normal(seeds, like.shape, stream, call if counter is None else counter, like.dtype)


def column(table: Tensor, index: int) -> Tensor:
    """One coefficient of (n,) or (B, n), to be broadcast over (B, C, H, W)."""
    return table[..., index].reshape(-1, 1, 1, 1)


def blend(mask: Tensor, known: Tensor, unknown: Tensor) -> Tensor:
    """known where mask is 1, unknown where it is 0. As a sum: NaN on either side is not hidden."""
    return mask * known + (1 - mask) * unknown


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_image(name: str, x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; accepted: (B, C, H, W), floating point")


def check_table(name: str, table: Tensor, entries: int, x: Tensor) -> None:
    batch = x.shape[0]
    good = tuple(table.shape) in ((entries,), (batch, entries)) and table.is_floating_point()
    if not good or table.device != x.device:
        raise ValueError(
            f"{name} is {tuple(table.shape)} {table.dtype} on {table.device}; "
            f"accepted: ({entries},) or ({batch}, {entries}), float32 on {x.device}"
        )


def check_like(name: str, t: Tensor, shapes: Sequence[tuple[int, ...]], x: Tensor) -> None:
    if tuple(t.shape) not in shapes or not t.is_floating_point() or t.device != x.device:
        accepted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(
            f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}; accepted: {accepted}, floating point on {x.device}"
        )


def check_known(known: Tensor | None, mask: Tensor | None, x: Tensor) -> None:
    if (known is None) != (mask is None):
        given, absent = ("known", "mask") if mask is None else ("mask", "known")
        raise ValueError(f"{given} is given and {absent} is None; accepted: both, or neither")
    if known is None or mask is None:
        return
    b, c, h, w = x.shape
    check_like("known", known, [(b, c, h, w), (1, c, h, w)], x)
    check_like("mask", mask, [(n, k, h, w) for n in (b, 1) for k in (c, 1)], x)


def check_out(name: str, out: Tensor, x: Tensor) -> None:
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"{name} is {tuple(out.shape)} {out.dtype} on {out.device}; accepted: {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    if out.is_contiguous():
        return
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(out.stride(), out.shape, strict=True) if n > 1):
        if stride < reach:
            raise ValueError(f"{name} has strides {out.stride()}; accepted: such that no two elements share memory")
        reach = stride * (size - 1) + reach


def float32_only(**tensors: Tensor | None) -> Iterator[str]:
    """A sentence for each tensor that is not float32."""
    for name, t in tensors.items():
        if t is not None and t.dtype != torch.float32:
            yield f"{name} is {str(t.dtype).removeprefix('torch.')}, the kernel reads float32"

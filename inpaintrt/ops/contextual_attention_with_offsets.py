"""Contextual attention that also says where each patch came from: the attention flow of the paper's figures.

The output is that of [`contextual_attention`](contextual_attention.md). An offset is the position of the key with the
largest weight minus the cell's own, (row, column) in cells; `inpaintrt.viz.attention_flow` paints it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Lane, OpSpec, Outputs

from .contextual_attention import attend, check, contextual_attention, cost, grid_mask, refuses, samples


def _reference(
    foreground: Tensor,
    background: Tensor,
    mask: Tensor | None = None,
    *,
    patch_size: int = 3,
    stride: int = 1,
    rate: int = 2,
    fuse_size: int = 3,
    softmax_scale: float = 10.0,
    sampling: str = "stride",
    norm: str = "max",
    eps: float = 1e-4,
    mask_mode: str = "zero",
    divisor: str = "const4",
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return attend(
        foreground, background, mask, patch_size, stride, rate, fuse_size, softmax_scale, sampling, norm, eps, mask_mode,
        divisor, queries, want_offsets=True,
    )  # fmt: skip


def _out(*args: object) -> Outputs:
    out = check(*args)  # type: ignore[arg-type]
    b, _, h, w = out.shape
    rate = int(args[5])  # type: ignore[call-overload]
    return out, torch.empty(b, 2, h // rate, w // rate, dtype=torch.int32, device=out.device)


SPEC = OpSpec(
    name="contextual_attention_with_offsets",
    summary="contextual attention and where each patch came from",
    reference=_reference,
    out=_out,
    lanes={"cpu": Lane(refuses=refuses)},
    samples=samples,
    cost=cost,
    differentiable=False,
)

_call = register(SPEC)


def contextual_attention_with_offsets(
    foreground: Tensor,
    background: Tensor,
    mask: Tensor | None = None,
    *,
    patch_size: int = 3,
    stride: int = 1,
    rate: int = 2,
    fuse_size: int = 3,
    softmax_scale: float = 10.0,
    sampling: str = "stride",
    mask_sampling: Sequence[tuple[str, int]] | None = None,
    mask_batch: str = "each",
    norm: str = "max",
    eps: float = 1e-4,
    mask_mode: str = "zero",
    divisor: str = "const4",
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`contextual_attention` and its offsets.

    Args:
        foreground, background, mask: as in `contextual_attention`.
        patch_size, stride, rate, fuse_size, softmax_scale, sampling, mask_sampling, mask_batch: likewise.
        norm, eps, mask_mode, divisor, queries: likewise.

    Returns:
        The output, and offsets int32 (B, 2, h/rate, w/rate): row and column of the key with the largest weight (the first
        of equal ones; the first key where all are masked) minus the cell's own row and column. `queries` does
        not touch them. Where gradients are needed, the output's come from `contextual_attention`.

    Raises:
        ValueError, UnsupportedError: as in `contextual_attention`.
    """
    cells = grid_mask(mask, foreground.shape[-2:], rate, mask_sampling, mask_batch) if rate > 0 else mask
    wanted = None if queries is None else queries != 0
    options = (patch_size, stride, rate, fuse_size, softmax_scale, sampling, norm, eps, mask_mode, divisor, wanted)
    if torch.is_grad_enabled() and (foreground.requires_grad or background.requires_grad):
        out = contextual_attention(
            foreground, background, cells, patch_size=patch_size, stride=stride, rate=rate, fuse_size=fuse_size,
            softmax_scale=softmax_scale, sampling=sampling, norm=norm, eps=eps, mask_mode=mask_mode, divisor=divisor,
            queries=wanted,
        )  # fmt: skip
        return out, _call(foreground.detach(), background.detach(), cells, *options)[1]
    return _call(foreground, background, cells, *options)  # type: ignore[no-any-return]

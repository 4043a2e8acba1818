r"""Window mask update: after attention, a window's tokens are as valid as the window as a whole.

$$ m'_i = \mathrm{clamp}\left(\sum_{j \in \mathrm{window}(i)} m_j,\ 0,\ 1\right) $$

One valid token is enough to make its window valid. The windows are those of `window_attention` with the same size and
shift (Li et al., "MAT: Mask-Aware Transformer for Large Hole Image Inpainting", CVPR 2022, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from .window_attention import MOST_ROWS, check_map, from_windows, windows


def _reference(mask: Tensor, *, window_size: int, shift: int = 0) -> Tensor:
    wide = torch.float64 if mask.dtype == torch.float64 else torch.float32
    cut = windows(mask.to(wide), window_size, shift)
    updated = cut.sum(2, keepdim=True).clamp(0, 1).expand_as(cut)
    return from_windows(updated, mask.shape[1], mask.shape[2], window_size, shift).to(mask.dtype).contiguous()


def _out(mask: Tensor, window_size: int, shift: int) -> Outputs:
    check_map("mask", mask, window_size, shift)
    if mask.shape[3] != 1:
        raise ValueError(f"mask is {tuple(mask.shape)}; accepted: (B, H, W, 1)")
    return (torch.empty(mask.shape, dtype=mask.dtype, device=mask.device),)


def _cuda_refuses(mask: Tensor, window_size: int, shift: int) -> Iterator[str]:
    """Windows of more than 4096 rows."""
    if window_size > MOST_ROWS:
        yield f"a window has {window_size} rows; the kernel counts the tokens of up to {MOST_ROWS} in 32 bits"


def _samples(level: str) -> Iterator[Sample]:
    def sample(id: str, b: int, h: int, w: int, size: int, shift: int = 0, fractional: bool = False) -> Sample:
        return Sample(
            id, {"mask": (b, h, w, 1)}, {"window_size": size, "shift": shift}, masks=() if fractional else ("mask",)
        )

    if level == "bench":
        yield sample("64w8", 1, 64, 64, 8, 4)  # MAT at 512 pixels
        yield sample("32w16", 1, 32, 32, 16, 8)
        return
    yield sample("any_values", 2, 6, 9, 3, 1, fractional=True)
    yield sample("plain", 2, 8, 12, 4)
    yield sample("shifted", 1, 15, 10, 5, 3)
    yield sample("one", 1, 1, 1, 1)
    yield sample("empty_batch", 0, 4, 4, 2)
    if level == "full":
        yield sample("threads", 3, 96, 64, 16, 8)


def _cost(mask: Tensor, window_size: int, shift: int) -> Cost:
    return Cost(flops=float(mask.numel()), bytes=2.0 * mask.numel() * mask.element_size())


SPEC = OpSpec(
    name="window_mask_update",
    summary="validity of tokens after window attention: 1 where their window has a valid one",
    reference=_reference,
    out=_out,
    lanes={"cuda": Lane(refuses=_cuda_refuses), "cupy": Lane(refuses=_cuda_refuses), "triton": Lane(), "cpu": Lane()},
    samples=_samples,
    cost=_cost,
    differentiable=False,
)

_call = register(SPEC)


def window_mask_update(mask: Tensor, *, window_size: int, shift: int = 0) -> Tensor:
    """The sum of a window's mask, clamped to [0, 1], for each of its tokens.

    Args:
        mask: (B, H, W, 1), **1 = valid**, 0 = invalid, or any number; float32, bfloat16, float16 (float64: reference
            only); any strides.
        window_size: side of a window; it divides H and W.
        shift: windows lie on the map rolled by (−shift, −shift), 0 to window_size − 1.

    Returns:
        (B, H, W, 1), contiguous, dtype of mask, in [0, 1]; NaN in windows that hold one. Not differentiable, as in MAT.

    Raises:
        ValueError: mask is not (B, H, W, 1) floating point, or window_size or shift do not fit it.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Sums are float32 or more. Source: Li et al., CVPR 2022, section 3.3.
    """
    return _call(mask, window_size, shift)  # type: ignore[no-any-return]

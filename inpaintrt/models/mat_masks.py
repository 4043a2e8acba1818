"""All masks inside MAT, from the input's mask alone.

Which tokens are valid, and by what partial convolutions multiply their results, depends on no feature. So it can be
computed once for an image: for all calls with the same mask, before the first layer runs, and with integers' exactness
where the mask is 0 and 1. `mask_plan` gives what the layers of `models.mat` compute on their way, where it takes less
than a thousandth of a forward's time: maps of one channel. So layers do not share a plan, and any of them can be called alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .mat import BLOCKS, MASKED_GROUPS, RESOLUTIONS, SIDES, WINDOWS
from .mat_layers import Windows, partial_ratio, to_tokens, wide, window_validity

NONE_VALID, SOME_VALID, ALL_VALID = 0, 1, 2
"""Kinds of windows: every token 0; anything else; every token 1."""


@dataclass(frozen=True)
class PartialStep:
    """Of one partial convolution.

    Attributes:
        ratio: (B, 1, H, W), by which its result is multiplied, after bias and activation; 0 where no token is valid.
        valid: (B, 1, H, W), the mask after it.
    """

    ratio: Tensor
    valid: Tensor


@dataclass(frozen=True)
class AttentionStep:
    """Of one block of window attention.

    Attributes:
        window, shift: side of the windows, and by how many tokens they are rolled.
        mask: (B, H, W, 1), of its keys: what `ops.window_attention` takes.
        valid: (B, H, W, 1), the mask after it: what `ops.window_mask_update` gives.
        kinds: int8 (B, H / window, W / window), of each rolled window. Where all are `ALL_VALID`, the mask changes nothing.
            In one that is `NONE_VALID`, tokens that came in equal leave equal, by one vector for all such windows.
    """

    window: int
    shift: int
    mask: Tensor
    valid: Tensor
    kinds: Tensor

    @property
    def all_valid(self) -> bool:
        """Whether the block gives the same without a mask. Waits for the device."""
        return bool((self.kinds == ALL_VALID).all())


@dataclass(frozen=True)
class MaskPlan:
    """Steps by the path of their module below `first_stage`, in the order in which they run; **1 = valid** everywhere."""

    partial: Mapping[str, PartialStep]
    attention: Mapping[str, AttentionStep]


def mask_plan(mask: Tensor, resolution: int) -> MaskPlan:
    """The masks of all layers of a MAT, at least float32.

    Args:
        mask: (B, 1, H, W), **1 = known**, 0 = hole, fractions as they are; H, W multiples of `resolution`.
        resolution: of the network, 128, 256 or 512: how often the image is halved before the transformer.

    Raises: `ValueError` for other resolutions, shapes and sizes.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution is {resolution}; accepted: {', '.join(map(str, RESOLUTIONS))}")
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] % resolution or mask.shape[3] % resolution:
        raise ValueError(f"mask is {tuple(mask.shape)}; accepted: (B, 1, H, W), H and W divisible by {resolution}")
    partial: dict[str, PartialStep] = {}
    attention: dict[str, AttentionStep] = {}
    current = wide(mask)

    def convolve(path: str, stride: int = 1) -> None:
        nonlocal current
        ratio, current = partial_ratio(current, 3, stride)
        partial[path] = PartialStep(ratio, current)

    def attend(path: str, window: int, shift: int) -> None:
        nonlocal current
        height, width = current.shape[2:]
        windows = Windows(height, width, window, shift)
        keys = windows.cut(to_tokens(current))
        kinds = SOME_VALID + (keys == 1).all(1).to(torch.int8) - (keys == 0).all(1).to(torch.int8)
        valid = windows.join(window_validity(keys)).view(-1, height, width, 1)
        attention[path] = AttentionStep(
            window, shift, current.permute(0, 2, 3, 1), valid, kinds.view(-1, height // window, width // window)
        )
        current = valid.permute(0, 3, 1, 2)

    convolve("conv_first")
    for i in range(resolution.bit_length() - SIDES[0].bit_length()):
        convolve(f"enc_conv.{i}", 2)
    for i in range(MASKED_GROUPS):
        if i:
            convolve(f"tran.{i}.downsample.conv", 2)
        for j in range(BLOCKS[i]):
            attend(f"tran.{i}.blocks.{j}", WINDOWS[i], WINDOWS[i] // 2 * (j % 2))
        convolve(f"tran.{i}.conv")
    return MaskPlan(partial, attention)

"""All masks inside MAT, from the input's mask alone.

Which tokens are valid, and by what partial convolutions multiply their results, depends on no feature. So `models.mat`
computes it once in a call, before the first layer runs, and hands each layer its step; a layer that is called alone with a mask
computes its own. What attention makes of windows without a valid token, `ops.window_attention` knows in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .mat_layers import AttentionStep, PartialStep, Step, Windows, partial_ratio, to_tokens, window_validity
from .stylegan2_layers import wide

RESOLUTIONS = (128, 256, 512)
"""The public code's table of widths ends at 512; below 128 the first stage has no decoder."""
BLOCKS, WINDOWS, SIDES = (2, 3, 4, 3, 2), (8, 16, 16, 16, 8), (64, 32, 16, 32, 64)
"""Of each of the first stage's five groups: attention blocks, side of their windows, side of the map at the network's own
resolution. Groups after the second are given no mask."""
MASKED_GROUPS = 2


@dataclass(frozen=True)
class MaskPlan:
    """Steps by the path of their module below `first_stage`, in the order in which they run; **1 = valid** everywhere."""

    steps: Mapping[str, Step]

    def partial(self, path: str) -> PartialStep:
        step = self.steps[path]
        assert isinstance(step, PartialStep)
        return step

    def below(self, path: str) -> tuple[Step, ...]:
        """Of all layers inside a module."""
        return tuple(step for name, step in self.steps.items() if name.startswith(f"{path}."))


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
    steps: dict[str, Step] = {}
    current = wide(mask)

    def convolve(path: str, stride: int = 1) -> None:
        nonlocal current
        steps[path] = step = partial_ratio(current, 3, stride)
        current = step.valid

    def attend(path: str, window: int, shift: int) -> None:
        nonlocal current
        height, width = current.shape[2:]
        windows = Windows(height, width, window, shift)
        valid = windows.join(window_validity(windows.cut(to_tokens(current)))).view(-1, height, width, 1)
        steps[path] = AttentionStep(window, shift, current.permute(0, 2, 3, 1), valid)
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
    return MaskPlan(steps)

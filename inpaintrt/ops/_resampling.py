"""Resampling by zero insertion, padding, a FIR filter and decimation, in plain torch: what the ops that resample share."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resampled_size(
    size: Sequence[int], taps: Sequence[int], up: Sequence[int], down: Sequence[int], padding: Sequence[int]
) -> list[int]:
    """Rows and columns of `resample`'s output: `size` and `taps` are (rows, columns), the others (x, y) as in the op.

    Raises: `ValueError` where there are none.
    """
    left, right, top, bottom = padding
    sides = ((top, bottom, up[1], down[1]), (left, right, up[0], down[0]))
    out = [(n * u + before + after - k) // d + 1 for n, k, (before, after, u, d) in zip(size, taps, sides, strict=True)]
    if min(out) < 1 or min(size) < 1:
        raise ValueError(
            f"x of {size[0]}×{size[1]} with padding {list(padding)} is smaller than the filter of {taps[0]}×{taps[1]} taps"
        )
    return out


def resample(
    x: Tensor,
    f: Tensor,
    up: Sequence[int] = (1, 1),
    down: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """x (B, C, H, W) resampled by f (rows, columns), in the wider of both dtypes: the definition of `upfirdn2d`."""
    b, c, h, w = x.shape
    if c == 0:  # of no channels torch has no depthwise convolution
        return f.new_empty(b, c, *resampled_size((h, w), f.shape, up, down, padding))
    (up_x, up_y), (down_x, down_y) = up, down
    if up_x > 1 or up_y > 1:
        x = F.pad(x.reshape(b, c, h, 1, w, 1), (0, up_x - 1, 0, 0, 0, up_y - 1)).reshape(b, c, h * up_y, w * up_x)
    x = F.pad(x, list(padding))  # negative numbers crop
    weight = (f if flip_filter else f.flip([0, 1])) * gain
    return F.conv2d(x.to(weight.dtype), weight.expand(c, 1, *weight.shape), stride=(down_y, down_x), groups=c)

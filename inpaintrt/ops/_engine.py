"""What the CPU's convolution engine (csrc/cpu/conv*.h) can run, and what may be asked of its results.

All convolution ops share the engine: which calls it takes, and by which algorithm, is decided by the same facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inpaintrt.runtime.policy import ieee
from inpaintrt.testing.compare import DIRECT, WINOGRAD, Numerics

LARGEST_KERNEL = 64
LARGEST_STRIDE = 8


def cpu_refuses(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int], dilation: int) -> Iterator[str]:
    """Sentences against a call of the engine."""
    if max(weight.shape[2:]) > LARGEST_KERNEL:
        yield f"the kernel is {weight.shape[2]}×{weight.shape[3]}; up to {LARGEST_KERNEL} on a side are covered"
    if stride > LARGEST_STRIDE:
        yield f"the stride is {stride}; up to {LARGEST_STRIDE} is covered"


def cpu_numerics(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    *,
    upsample: int = 1,
    transposed: bool = False,
) -> Numerics:
    """Winograd's where its algorithm may run: float32, never under "ieee".

    That is, at stride 1, 3×3 and 5×5 with any dilation and, along rows, what is undilated and 5 or 7 wide; and by phases,
    undilated, convolutions and transposed ones of stride 2 with filters of 3×3 to 6×6, and those of doubled images with up
    to 5×5.
    """
    sides = tuple(weight.shape[2:])
    plain = stride == 1 and not transposed and sides in ((3, 3), (5, 5))
    if stride == 2 and upsample == 1:
        taps = [(side + 1) // 2 for side in sides]  # of the larger phase
    elif upsample == 2 and stride == 1:
        taps = [side // 2 + 1 for side in sides]
    else:
        taps = [0, 0]
    phases = dilation == 1 and taps in ([2, 2], [3, 3])
    rows = stride == dilation == 1 and not transposed and sides[1] in (5, 7)
    return WINOGRAD if (plain or rows or phases) and x.dtype == torch.float32 and not ieee.get() else DIRECT

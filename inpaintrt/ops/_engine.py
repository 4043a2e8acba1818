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


def cpu_numerics(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int], dilation: int) -> Numerics:
    """Winograd's where its algorithm may run: float32, 3×3 and 5×5, stride 1, any dilation; never under "ieee"."""
    square = tuple(weight.shape[2:]) in ((3, 3), (5, 5))
    return WINOGRAD if square and stride == 1 and x.dtype == torch.float32 and not ieee.get() else DIRECT

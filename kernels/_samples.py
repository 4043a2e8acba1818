"""What the steps of diffusion samplers share in Triton: elements by their index within a sample, and noise under a mask."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._philox import normals

_STEP, _KNOWN = tl.constexpr(1), tl.constexpr(2)  # streams


@triton.jit
def place(e, height, width, s1, s2, s3, FLAT: tl.constexpr, SHARED: tl.constexpr = False):
    """Offset of element e of a sample; FLAT: samples are contiguous; SHARED: of one plane for all channels."""
    plane = height * width
    if FLAT and SHARED:
        offset = e % plane
    elif FLAT:
        offset = e
    else:
        row = e // width
        offset = (e // plane) * s1 + (row % height) * s2 + (e % width) * s3
    return offset


@triton.jit
def draw(seed, block, call, mask, BLEND: tl.constexpr, BLOCKS: tl.constexpr):
    """(z, k): noise of the step and of the known region, each wherever its factor under the mask is not 0."""
    zero = tl.zeros((BLOCKS, 4), tl.float32)
    if BLEND:
        known = tl.max((mask != 0.0).to(tl.int32), 1)
        unknown = tl.max((mask != 1.0).to(tl.int32), 1)
        if tl.max(known * unknown, 0) == 0:
            z = normals(seed, block, tl.where(known != 0, _KNOWN, _STEP).to(tl.uint32), call, BLOCKS)
            k = tl.where(known[:, None] != 0, z, zero)
            z = tl.where(known[:, None] != 0, zero, z)
        else:
            z = normals(seed, block, _STEP, call, BLOCKS)
            k = normals(seed, block, _KNOWN, call, BLOCKS)
    else:
        z, k = normals(seed, block, _STEP, call, BLOCKS), zero
    return z, k


def strides(t: Tensor | None, first: int = 0) -> tuple[int, int, int, int]:
    """Of the last four dimensions; 0 where a size is 1, and of what is absent."""
    if t is None:
        return (0, 0, 0, 0)
    found = [s if n > 1 else 0 for s, n in zip(t.stride()[first:], t.shape[first:], strict=True)]
    return found[0], found[1], found[2], found[3]


def flat(tensors: Sequence[Tensor | None]) -> bool:
    """Whether each sample is contiguous, or all its channels share one contiguous plane."""
    for t in tensors:
        if t is None:
            continue
        one = t[(0,) * (t.dim() - 4)] if t.dim() > 4 else t
        if not one[0].is_contiguous():
            return False
    return True


def as_int32(call: int) -> int:
    """The same 32 bits, so that one kernel serves all calls."""
    return call - (call >> 31 << 32)

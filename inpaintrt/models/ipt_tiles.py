"""Images of overlapping patches, each computed once, in batches under a ceiling of memory, joined where they are computed.

Both ways of joining weigh a patch's rows and columns separately. So an image is a sum of patches, each times a column and a
row of weights, which along each axis add up to 1 at every pixel:

- "original": the rule of `ipt_chop`. Its strips need no patches of their own: along one axis they are what the outermost
  patches and the last one, which ends at the edge, give with weight 1.
- "smooth": a raised cosine over the whole patch. A patch's weight vanishes towards its border, so there are no seams.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

BLENDS = ("original", "smooth")
MAX_BYTES = 1 << 29
MOST = 64
"""Patches at once, however much memory there is: the public code's number."""

Network = Callable[[Tensor], Tensor]
"""Patches (n, 3, P, P) to patches (n, 3, s · P, s · P)."""


def starts(length: int, patch: int) -> list[int]:
    """Where patches begin along an axis: a quarter of a patch apart, and one that ends at the edge."""
    found = [*range(0, length - patch + 1, patch // 4)]
    return found if found[-1] == length - patch else [*found, length - patch]


def weights(length: int, patch: int, scale: int, blend: str) -> Tensor:
    """float64 (patches, scale · patch): what each patch along an axis counts for, at each of its pixels."""
    begins = starts(length, patch)
    size, edge = scale * patch, scale * patch // 4
    if blend == "smooth":
        window = torch.sin(math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size).square()
        raw = window.repeat(len(begins), 1)
    else:
        # Those of the grid give their middles, and the last one, which may lie off the grid, all from the bend on.
        spare, bend = (length - patch) % (patch // 4), _bend(length, patch, scale)
        raw = torch.zeros(len(begins), size, dtype=torch.float64)
        raw[: len(begins) - (spare > 0), edge:-edge] = 1
        raw[0, :edge] = 1
        for row, begin in zip(raw, begins, strict=True):
            row[max(0, bend - scale * begin) :] = 0
        raw[-1, bend - scale * begins[-1] :] = 1
    total = torch.zeros(scale * length, dtype=torch.float64)
    for row, begin in zip(raw, begins, strict=True):
        total[scale * begin : scale * begin + size] += row
    for row, begin in zip(raw, begins, strict=True):
        row /= total[scale * begin : scale * begin + size]
    return raw


def _bend(length: int, patch: int, scale: int) -> int:
    """From which pixel of the result on the last patch of an axis counts alone, by the original's rule."""
    spare = (length - patch) % (patch // 4)
    return scale * (length - spare) - scale * (patch - spare) // 2


def tiled(network: Network, x: Tensor, patch: int, scale: int, *, blend: str = "original", batch: int = MOST) -> Tensor:
    """Images (B, 3, H, W) by a network of patches: (B, 3, scale · H, scale · W).

    Args:
        network: see `Network`. Each patch of each image is given to it once.
        patch: P, a multiple of 12.
        blend: one of `BLENDS`.
        batch: patches at once.

    Raises: `ValueError` for an unknown blend. The image is at least a patch (`ipt_chop.check_image`).
    """
    if blend not in BLENDS:
        raise ValueError(f"blend is {blend!r}; accepted: {', '.join(BLENDS)}")
    count, _, height, width = x.shape
    size, edge = scale * patch, scale * patch // 4
    axes = [weights(n, patch, scale, blend) for n in (height, width)]
    down, across = (
        [*zip(range(len(w)), starts(n, patch), map(_counting, w), strict=True)]
        for n, w in zip((height, width), axes, strict=True)
    )
    result: Tensor | None = None
    corners: dict[int, Tensor] = {}
    places = itertools.product(range(count), down, across)
    while chosen := [*itertools.islice(places, batch)]:
        given = torch.stack(
            [x[i, :, top : top + patch, left : left + patch] for i, (_, top, _), (_, left, _) in chosen]
        )
        made = network(given)
        if result is None:
            result = made.new_zeros(count, made.shape[1], scale * height, scale * width)
            rows, columns = (w.to(made) for w in axes)  # once: the host waits for each copy
        for y, (i, (row, top, r), (column, left, c)) in zip(made, chosen, strict=True):
            if blend == "original" and top == left == 0:
                corners[i] = y[:, :edge].clone()
            # What counts for nothing is not read: most of a patch.
            weighed = y[:, r, c] * rows[row, r, None]
            weighed *= columns[column, c]
            area = (
                slice(scale * top + r.start, scale * top + r.stop),
                slice(scale * left + c.start, scale * left + c.stop),
            )
            result[i, :, *area] += weighed
    assert result is not None
    if blend == "original":
        # The public code lets its left strip, which is a patch wide, win over the top one. So here is no mean along x.
        reach = min(size, _bend(width, patch, scale))
        for i, corner in corners.items():
            result[i, :, :edge, :reach] = corner[..., :reach]
    return result


def _counting(weight: Tensor) -> slice:
    """From the first to the last place of a patch that counts; nothing where none does."""
    places = weight.nonzero().flatten().tolist()
    return slice(places[0], places[-1] + 1) if places else slice(0, 0)

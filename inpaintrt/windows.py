"""Windows of an image in which its holes are filled: each hole pixel belongs to exactly one.

Holes are told apart on a grid of cells. A hole is never cut, and what lies outside its window cannot influence its fill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .runtime.errors import ImageError

_CELL = 32  # pixels: the grid on which holes are told apart; holes that touch on it count as one
_SHARE = 0.75  # of the rows and columns that a network sees: the most that a hole may take of them

Hole = NDArray[np.bool_]


class Box(NamedTuple):
    """Rows and columns of an image, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int


class Sizes(NamedTuple):
    """What a network accepts: sides that are multiples of `multiple` and at least `smallest`."""

    multiple: int
    smallest: int

    def side(self, length: Any) -> Any:
        """The next accepted side, for an integer or an array of them."""
        return -(-np.maximum(length, self.smallest) // self.multiple) * self.multiple

    def pixels(self, boxes: Any) -> Any:
        """Pixels of (..., 4) boxes after padding."""
        boxes = np.asarray(boxes, np.int64)
        return self.side(boxes[..., 2] - boxes[..., 0]) * self.side(boxes[..., 3] - boxes[..., 1])


def crops(hole: Hole, sizes: Sizes, max_pixels: int, margin: int) -> Iterator[tuple[Box, Hole]]:
    """The windows in which `hole` (H, W) is filled, each with the hole pixels (of the window's shape) that it fills.

    Every hole pixel is filled by exactly one window. The sizes are checked before the first window is given, so that a
    hole that is too large stops the work before it starts.
    """
    whole = Box(0, 0, *hole.shape)
    if not hole.any():
        return
    if sizes.pixels(whole) <= max_pixels:
        yield whole, hole
        return
    labels, boxes = _components(hole)
    windows = _windows(boxes, margin, hole.shape)
    costs = sizes.pixels(windows)
    worst = int(costs.argmax())
    if costs[worst] > max_pixels:
        top, left, bottom, right = windows[worst]
        raise ImageError(
            f"a hole with {margin} pixels of context around it needs a crop of {right - left} x {bottom - top} "
            f"({costs[worst]:,} pixels with padding), more than {max_pixels:,} at once; "
            f"--max-pixels {costs[worst]} (max_pixels=) allows it if there is memory, --margin makes it smaller"
        )
    for members in _groups(boxes, sizes, max_pixels, margin, hole.shape):
        window = Box(*map(int, _windows(_union(boxes[members]), margin, hole.shape)))
        view = np.s_[window.top : window.bottom, window.left : window.right]
        yield window, hole[view] & _cells(labels, members, window)


def frames(hole: Hole, size: tuple[int, int]) -> Iterator[tuple[Box, Hole, float]]:
    """The windows in which a network that knows one `size` (rows, columns) fills `hole` (H, W).

    Yields: window, the hole pixels (of the window's shape) that it fills, and by how much it is to be made smaller, 1.0 or
        more. Holes near each other share a frame of the network's size. A hole that would take more than three quarters
        of its rows or columns gets a window as much larger, at most the image.
    """
    whole, limit = Box(0, 0, *hole.shape), np.array(size) * _SHARE
    if not hole.any():
        return
    if np.all(np.array(hole.shape) <= size):
        yield whole, hole, 1.0
        return
    labels, boxes = _components(hole)
    free = list(range(len(boxes)))
    while free:
        members, box = [free[0]], boxes[free[0]]
        for other in free[1:]:
            joined = _union(np.stack([box, boxes[other]]))
            if np.all(joined[2:] - joined[:2] <= limit):
                members.append(other)
                box = joined
        free = [i for i in free if i not in members]
        top, left, bottom, right = map(int, box)
        inside = hole[top:bottom, left:right] & _cells(labels, members, Box(top, left, bottom, right))
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        extent = np.array([rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1])
        centre = np.array([top + rows[0], left + columns[0]]) + extent / 2
        scale = min(max(1.0, *(extent / limit)), max(np.array(hole.shape) / size))
        sides = np.minimum(np.ceil(np.array(size) * scale), hole.shape)
        corner = np.clip(np.round(centre - sides / 2), 0, hole.shape - sides)
        window = Box(*map(int, (*corner, *(corner + sides))))
        view = np.s_[window.top : window.bottom, window.left : window.right]
        yield window, hole[view] & _cells(labels, members, window), float(scale)


def _cells(labels: NDArray[np.int32], members: Sequence[int], window: Box) -> Hole:
    """Which pixels of a window lie in the cells of these holes."""
    rows = np.arange(window.top, window.bottom) // _CELL
    columns = np.arange(window.left, window.right) // _CELL
    cells = np.isin(labels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], np.asarray(members) + 1)
    found: Hole = cells[(rows - rows[0])[:, None], columns - columns[0]]
    return found


def _components(hole: Hole) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Holes on a grid of cells: labels (1, 2, …; 0 = no hole) of the cells, and the boxes (n, 4) in pixels."""
    height, width = hole.shape
    by_rows = np.logical_or.reduceat(hole, np.arange(0, height, _CELL), axis=0)
    occupied = np.logical_or.reduceat(by_rows, np.arange(0, width, _CELL), axis=1)
    labels = np.zeros(occupied.shape, np.int32)
    free = set(zip(*(axis.tolist() for axis in np.nonzero(occupied)), strict=True))
    boxes: list[tuple[int, int, int, int]] = []
    for start in sorted(free):
        if start not in free:
            continue
        free.remove(start)
        found = [start]
        for row, column in found:  # grows while it is walked
            around = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & free
            free -= around
            found.extend(around)
        cells = np.array(found)
        labels[tuple(cells.T)] = len(boxes) + 1
        top, left = cells.min(axis=0) * _CELL
        bottom, right = (cells.max(axis=0) + 1) * _CELL
        boxes.append((top, left, min(bottom, height), min(right, width)))
    return labels, np.array(boxes, np.int64)


def _groups(
    boxes: NDArray[np.int64], sizes: Sizes, max_pixels: int, margin: int, shape: tuple[int, ...]
) -> Iterator[list[int]]:
    """Holes to fill together: grown greedily while one window costs no more than two and stays within `max_pixels`."""
    free = np.ones(len(boxes), bool)
    costs = sizes.pixels(_windows(boxes, margin, shape))
    for first in range(len(boxes)):
        if not free[first]:
            continue
        free[first] = False
        members, box, cost = [first], boxes[first], costs[first]
        while free.any():
            candidates = np.flatnonzero(free)
            joined = np.concatenate(
                [np.minimum(boxes[candidates, :2], box[:2]), np.maximum(boxes[candidates, 2:], box[2:])], axis=1
            )
            together = sizes.pixels(_windows(joined, margin, shape))
            excess = together - cost - costs[candidates]
            excess[together > max_pixels] = 1
            best = int(excess.argmin())
            if excess[best] > 0:
                break
            members.append(int(candidates[best]))
            free[candidates[best]] = False
            box, cost = joined[best], together[best]
        yield members


def _windows(boxes: NDArray[np.int64], margin: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """(..., 4) boxes with their margin, inside an image of `shape`."""
    low, high = np.maximum(boxes[..., :2] - margin, 0), np.minimum(boxes[..., 2:] + margin, shape)
    return np.concatenate([low, high], axis=-1)


def _union(boxes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])

"""From an image and a mask, as arrays, to the filled image: any size, known pixels untouched, memory bounded.

The network sees a crop, padded on the right and bottom by reflection (edge pixel repeated) to a size that it accepts.
An image of up to `max_pixels` is one crop. A larger one is filled in crops around its holes, each with `margin` pixels
of context: a hole is never cut, but what lies outside its crop cannot influence its fill. Crops read the image as
given, never each other's results, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .runtime.errors import ImageError, InpaintRTError

MAX_PIXELS = 4_000_000
MARGIN = 256
_CELL = 32  # pixels: the grid on which holes are told apart; holes that touch on it count as one

Image = TypeVar("Image", bound=NDArray[Any])
Hole = NDArray[np.bool_]


class Box(NamedTuple):
    """Rows and columns of an image, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int


def fill(
    model: nn.Module, image: Image, mask: NDArray[Any], *, max_pixels: int = MAX_PIXELS, margin: int = MARGIN
) -> Image:
    """`image` with the pixels under `mask` filled by `model`; every other pixel is the input's, bit for bit.

    Args:
        model: has `size_multiple`, `min_size` and `inpaint(image, mask)`, as `inpaintrt.load` gives it and `accelerate`
            makes it of a TorchScript archive; any device.
        image: (H, W, 3) RGB, uint8, or floating point in [0, 1]. What lies under the mask is not read.
        mask: (H, W), bool or 0/1; True = hole.
        max_pixels: the most pixels, padding included, that the network sees at once.
        margin: pixels of context around each hole, in images above `max_pixels`.

    Returns:
        A new array of image's shape and dtype. uint8 values are truncated as the public tools do: floor(255 · x). With
        an empty mask, a copy of the input: the network is not run. With a full one, what the network makes of nothing.

    Raises:
        TypeError: the model is no such model.
        ValueError: wrong shapes, dtypes or mask values; known pixels not finite or outside [0, 1]; training mode.
        ImageError: a hole with its margin is larger than `max_pixels`.
        InpaintRTError: the network returned NaN or Inf.
    """
    if lacking := [name for name in ("size_multiple", "min_size", "inpaint") if not hasattr(model, name)]:
        raise TypeError(
            f"the model, {type(model).__name__}, has no {', '.join(lacking)}; accepted: what inpaintrt.load gives, or "
            "what inpaintrt.accelerate makes of a TorchScript archive"
        )
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    hole = _checked_mask(mask)
    _check_image(image, hole)
    if max_pixels < 1 or margin < 0:
        raise ValueError(f"max_pixels is {max_pixels}, margin {margin}; accepted: at least 1, at least 0")
    net: Any = model
    sizes = Sizes(net.size_multiple, net.min_size)
    result = image.copy()
    for window, owned in crops(hole, sizes, max_pixels, margin):
        view = np.s_[window.top : window.bottom, window.left : window.right]
        filled = _run(net, sizes, image[view], hole[view])
        wrong = ~np.isfinite(filled) & owned[..., None]
        if count := int(wrong.sum()):
            raise InpaintRTError(f"the network returned {count} values that are NaN or Inf; nothing was filled")
        if image.dtype == np.uint8:
            filled = np.clip(filled * np.float32(255), 0, 255)
        np.copyto(result[view], filled, where=owned[..., None], casting="unsafe")
    return result


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
        rows = np.arange(window.top, window.bottom) // _CELL
        columns = np.arange(window.left, window.right) // _CELL
        cells = np.isin(labels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], np.asarray(members) + 1)
        yield window, hole[view] & cells[(rows - rows[0])[:, None], columns - columns[0]]


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


def _run(net: Any, sizes: Sizes, image: NDArray[Any], hole: Hole) -> NDArray[np.float32]:
    """The network on one window (h, w, 3), padded; (h, w, 3) float32. What lies under the hole is replaced by 0."""
    height, width = hole.shape
    pad = ((0, int(sizes.side(height)) - height), (0, int(sizes.side(width)) - width))
    known = np.where(hole[..., None], image.dtype.type(0), image).astype(np.float32)
    if image.dtype == np.uint8:
        known /= 255
    weight = next(net.parameters(), torch.empty(0))

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).unsqueeze(0).to(weight.device, weight.dtype)

    pixels = tensor(np.pad(known, (*pad, (0, 0)), "symmetric").transpose(2, 0, 1))
    mask = tensor(np.pad(hole, pad, "symmetric")[None])
    with torch.no_grad():
        output = net.inpaint(pixels, mask)
    if output.shape != pixels.shape:
        raise ValueError(f"inpaint returned shape {tuple(output.shape)} for an image of {tuple(pixels.shape)}")
    filled: NDArray[np.float32] = output[0, :, :height, :width].permute(1, 2, 0).float().cpu().numpy()
    return filled


def _checked_mask(mask: NDArray[Any]) -> Hole:
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {mask.shape}; accepted: (H, W)")
    if mask.dtype == np.bool_:
        return mask
    hole: Hole = mask == 1
    others = mask[~hole & (mask != 0)]
    if others.size:
        raise ValueError(
            f"mask has values such as {others[0]}; accepted: bool, or 0 = known and 1 = hole (mask >= 128)"
        )
    return hole


def _check_image(image: NDArray[Any], hole: Hole) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {image.shape}; accepted: (H, W, 3), at least one pixel")
    if image.shape[:2] != hole.shape:
        raise ValueError(f"image has {image.shape[:2]} rows and columns, mask {hole.shape}; accepted: the same")
    if image.dtype == np.uint8:
        return
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image has dtype {image.dtype}; accepted: uint8, or floating point in [0, 1]")
    known = ~hole[..., None]
    for wrong, what in ((~np.isfinite(image), "that are NaN or Inf"), ((image < 0) | (image > 1), "outside [0, 1]")):
        bad = wrong & known
        if bad.any():
            row, column, channel = (int(i[0]) for i in np.nonzero(bad))
            raise ValueError(
                f"image has {int(bad.sum())} known values {what}; the first, {image[row, column, channel]}, is at "
                f"row {row}, column {column}, channel {channel}; accepted: finite values in [0, 1]"
            )

"""From an image and a mask, as arrays, to the filled image: any size, known pixels untouched, memory bounded.

The network sees a crop, padded on the right and bottom by reflection (edge pixel repeated) to a size that it accepts.
An image of up to `max_pixels` is one crop. A larger one is filled in crops around its holes, each with `margin` pixels
of context: a hole is never cut, but what lies outside its crop cannot influence its fill. Crops read the image as
given, never each other's results, so their order does not matter.

A network that knows one size only sees frames of that size around the holes, and a hole that is too large for it smaller
than it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from .runtime.errors import InpaintRTError
from .windows import Box, Hole, Sizes, crops, frames

MAX_PIXELS = 4_000_000
MARGIN = 256

Image = TypeVar("Image", bound=NDArray[Any])


def fill(
    model: nn.Module,
    image: Image,
    mask: NDArray[Any],
    *,
    max_pixels: int = MAX_PIXELS,
    margin: int = MARGIN,
    options: Mapping[str, Any] | None = None,
) -> Image:
    """`image` with the pixels under `mask` filled by `model`; every other pixel is the input's, bit for bit.

    Args:
        model: has `size_multiple`, `min_size` and `inpaint(image, mask)`, as `inpaintrt.load` gives it and `accelerate`
            makes it of a TorchScript archive; any device. One that knows a single size has `only_size` (rows, columns),
            too. Known pixels replace what the network makes of them, so that `accelerate(model, composited=True)` may be
            promised, and work skipped; a model accelerated without that promise does all of it.
        image: (H, W, 3) RGB, uint8, or floating point in [0, 1]. What lies under the mask is not read.
        mask: (H, W), bool or 0/1; True = hole.
        max_pixels: the most pixels, padding included, that the network sees at once; of no matter for one of a single size.
        margin: pixels of context around each hole, in images above `max_pixels`; likewise.
        options: further arguments of the model's `inpaint`, the same for each crop, such as `{"seed": 3}`.

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
    result = image.copy()
    for window, owned, scale in _views(net, hole, max_pixels, margin):
        view = np.s_[window.top : window.bottom, window.left : window.right]
        filled = _run(net, image[view], hole[view], scale, options or {})
        wrong = ~np.isfinite(filled) & owned[..., None]
        if count := int(wrong.sum()):
            raise InpaintRTError(f"the network returned {count} values that are NaN or Inf; nothing was filled")
        if image.dtype == np.uint8:
            filled = np.clip(filled * np.float32(255), 0, 255)
        np.copyto(result[view], filled, where=owned[..., None], casting="unsafe")
    return result


def reduction(model: nn.Module, mask: NDArray[Any]) -> float:
    """By how much the coarsest of the windows in which `fill` fills a mask is made smaller for the model; 1.0: by nothing.

    Above 1 only for networks of a single size, and holes that are too large for it.
    """
    only = getattr(model, "only_size", None)
    return 1.0 if only is None else max((scale for _, _, scale in frames(_checked_mask(mask), only)), default=1.0)


def _views(net: Any, hole: Hole, max_pixels: int, margin: int) -> Iterator[tuple[Box, Hole, float]]:
    """Windows, the hole pixels that each fills, and by how much it is made smaller."""
    only = getattr(net, "only_size", None)
    if only is not None:
        yield from frames(hole, only)
        return
    for window, owned in crops(hole, Sizes(net.size_multiple, net.min_size), max_pixels, margin):
        yield window, owned, 1.0


def _run(net: Any, image: NDArray[Any], hole: Hole, scale: float, options: Mapping[str, Any]) -> NDArray[np.float32]:
    """The network on one window (h, w, 3), made smaller by `scale` and padded; (h, w, 3) float32.

    What lies under the hole is replaced by 0. A smaller pixel is the mean of those that it stands for; it is known where all
    of them are.
    """
    known = np.where(hole[..., None], image.dtype.type(0), image).astype(np.float32)
    if image.dtype == np.uint8:
        known /= 255
    pixels, mask = known.transpose(2, 0, 1), hole[None]
    only: tuple[int, int] | None = getattr(net, "only_size", None)
    if scale > 1 and only is not None:
        rows, columns = (min(most, max(1, round(n / scale))) for n, most in zip(hole.shape, only, strict=True))
        size = (rows, columns)
        mask = _mean(mask.astype(np.float32), size) > 0
        pixels = np.where(mask, np.float32(0), _mean(pixels, size))
    height, width = pixels.shape[1:]
    rows, columns = only or map(int, Sizes(net.size_multiple, net.min_size).side([height, width]))
    pad = ((0, 0), (0, rows - height), (0, columns - width))
    weight = next(net.parameters(), torch.empty(0))

    def padded(array: NDArray[Any]) -> torch.Tensor:
        whole = np.ascontiguousarray(np.pad(array, pad, "symmetric"))
        return torch.from_numpy(whole).unsqueeze(0).to(weight.device, weight.dtype)

    x = padded(pixels)
    with torch.no_grad():
        output = net.inpaint(x, padded(mask), **options)
    if output.shape != x.shape:
        raise ValueError(f"inpaint returned shape {tuple(output.shape)} for an image of {tuple(x.shape)}")
    output = output[:, :, :height, :width].float()
    if scale > 1:
        output = F.interpolate(output, hole.shape, mode="bilinear", align_corners=False)
    filled: NDArray[np.float32] = output[0].permute(1, 2, 0).cpu().numpy()
    return filled


def _mean(planes: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """(C, H, W) made smaller: means of the pixels that each stands for."""
    smaller: NDArray[np.float32] = F.adaptive_avg_pool2d(torch.tensor(planes), size).numpy()
    return smaller


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

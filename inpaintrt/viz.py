"""The attention flow of the contextual-attention paper: where in the photo each part of a hole was taken from.

Yu et al., "Generative Image Inpainting with Contextual Attention", CVPR 2018, section 4, colour the offset from a cell to
its best patch with the wheel of optical flow (Baker et al., "A Database and Evaluation Methodology for Optical Flow",
ICCV 2007): hue is direction, saturation is length, white is the cell itself. In their pictures, and so here, the wheel's
first axis points down and its second to the right: pink is bottom left, green is top right.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from . import pipeline
from .ops import contextual_attention_with_offsets
from .ops.contextual_attention import SPEC
from .runtime.dispatch import observers
from .runtime.errors import InpaintRTError
from .runtime.policy import use_backend
from .runtime.spec import Args
from .windows import Sizes

Pixels = NDArray[np.uint8]
Numbers = NDArray[np.float64]

_ARCS = ((15, (1, 0, 0)), (6, (1, 1, 0)), (4, (0, 1, 0)), (11, (0, 1, 1)), (13, (0, 0, 1)), (6, (1, 0, 1)))
"""Of the wheel: number of hues, and the colour with which the arc begins. Between some colours people tell more hues apart."""


def _wheel() -> Numbers:
    """(55, 3) RGB in 0 to 1: the hues, one turn of the wheel."""
    arcs = []
    for (count, first), (_, last) in zip(_ARCS, _ARCS[1:] + _ARCS[:1], strict=True):
        part = (np.floor(255 * np.arange(count) / count) / 255)[:, None]  # the scheme rounds its hues to 8 bits
        arcs.append((1 - part) * np.array(first) + part * np.array(last))
    return np.concatenate(arcs)


_WHEEL = _wheel()


def _coloured(down: Numbers, right: Numbers) -> Pixels:
    """(…, 3) colours of vectors; the wheel's rim is at length 1, what is longer is darkened."""
    length = np.hypot(down, right)[..., None]
    position = (np.arctan2(-right, -down) / np.pi + 1) / 2 * (len(_WHEEL) - 1)
    below = np.floor(position).astype(np.intp)
    part = (position - below)[..., None]
    hue = (1 - part) * _WHEEL[below] + part * _WHEEL[(below + 1) % len(_WHEEL)]
    colour = np.where(length <= 1, 1 - length * (1 - hue), 0.75 * hue)
    return np.floor(255 * colour).astype(np.uint8)


def attention_flow(
    offsets: Tensor,
    mask: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    largest: float | None = None,
) -> Pixels:
    """The paper's picture of offsets, one colour per cell.

    Args:
        offsets: (B, 2, h, w), row and column of the best key minus the cell's own, as
            `ops.contextual_attention_with_offsets` and `record_attention` give them; any real dtype and device.
        mask: (1|B, 1, H, W), nonzero = hole: only the hole is coloured, the rest is white; any size and dtype. None: all.
        size: (H, W) of the picture; cells and mask are enlarged by nearest neighbour. None: the mask's, else the cells'.
        largest: length in cells that has full colour; what is longer is darkened. None: the longest offset that is shown,
            of each image.

    Returns:
        (B, H, W, 3) uint8 RGB, such as `PIL.Image.fromarray` takes, one image at a time.

    Raises:
        ValueError: a shape or `largest` does not fit.
    """
    if offsets.dim() != 4 or offsets.shape[1] != 2 or 0 in offsets.shape[2:] or offsets.is_complex():
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)} {offsets.dtype}; accepted: (B, 2, h, w), real numbers"
        )
    batch, _, *grid = offsets.shape
    if mask is not None and (
        mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or not mask.numel()
    ):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; accepted: (1 or {batch}, 1, H, W)")
    height, width = size or (grid if mask is None else mask.shape[2:])
    if height < 1 or width < 1:
        raise ValueError(f"size is {height}×{width}; accepted: 1 or more")
    if largest is not None and not 0 < largest < float("inf"):
        raise ValueError(f"largest is {largest}; accepted: positive")

    def enlarged(image: NDArray[Any]) -> NDArray[Any]:
        """(B, h, w, …) → (B, H, W, …)"""
        rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), image.shape[1:3], strict=True))
        return image[:, rows[:, None], columns]

    down, right = offsets.detach().to("cpu", torch.float64).numpy().swapaxes(0, 1)
    shown = np.ones((1, 1, 1), bool) if mask is None else enlarged((mask.detach().cpu() != 0).squeeze(1).numpy())
    if largest is None:
        lengths = np.where(shown, enlarged(np.hypot(down, right)), 0.0)
        unit = lengths.max(axis=(1, 2), keepdims=True, initial=0.0)
        unit[unit == 0] = 1.0
    else:
        unit = np.full((batch, 1, 1), float(largest))
    return np.where(shown[..., None], enlarged(_coloured(down / unit, right / unit)), np.uint8(255))


def legend(side: int = 129) -> Pixels:
    """(side, side, 3): the wheel by which `attention_flow` colours; an offset as long as the radius is at the rim."""
    axis = np.linspace(-1, 1, side)
    down, right = np.broadcast_arrays(axis[:, None], axis)
    return np.where(np.hypot(down, right)[..., None] <= 1, _coloured(down, right), np.uint8(255))


@dataclass(frozen=True)
class Attention:
    """One call of contextual attention.

    offsets: (B, 2, h, w) int32, in cells; see `ops.contextual_attention_with_offsets`.
    mask: (1|B, 1, h, w) bool, True = hole; None for no hole.
    queries: (1|B, 1, h, w) bool, the cells that were asked for, elsewhere offsets mean nothing; None for all.
    """

    offsets: Tensor
    mask: Tensor | None
    queries: Tensor | None


@contextlib.contextmanager
def record_attention() -> Iterator[list[Attention]]:
    """Within this context each call of `ops.contextual_attention` adds an `Attention` to the list, in order.

    Offsets are computed when the op is called, beside its output (which takes as long again), since a network may write
    over its features afterwards. Calls of `contextual_attention_with_offsets` itself, and those of a network that calls
    neither op (`accelerate` makes it do so where it knows the module), are not heard.
    """
    heard: list[Attention] = []

    def listen(op: str, backend: str, args: Args) -> None:
        if op == SPEC.name:
            call = dict(zip(SPEC.signature.parameters, args, strict=True))
            # A backend that the caller forces for all ops need not have a kernel for this one.
            with torch.no_grad(), use_backend("auto", op="contextual_attention_with_offsets"):
                _, offsets = contextual_attention_with_offsets(**call)
            heard.append(Attention(offsets, call["mask"], call["queries"]))

    observers.append(listen)
    try:
        yield heard
    finally:
        observers.remove(listen)


def flow_of_fill(model: nn.Module, image: NDArray[Any], mask: NDArray[Any], *, whole: bool = False) -> Pixels:
    """The attention flow of filling `image` under `mask` with `model`, in one piece.

    Args:
        model, image, mask: as `pipeline.fill` takes them; image (H, W, 3), mask (H, W), True = hole.
        whole: colour known pixels too.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InpaintRTError: the model calls no contextual attention, or there is no hole.
        TypeError, ValueError: as `pipeline.fill`.
    """
    net: Any = model
    with record_attention() as heard:
        pipeline.fill(model, image, mask, max_pixels=sys.maxsize)
    if not np.any(mask):
        raise InpaintRTError("the mask marks no hole, so there is no flow to show")
    if not heard:
        raise InpaintRTError(f"{type(model).__name__} calls no contextual attention; DeepFill v1 and v2 do")
    height, width = mask.shape
    sizes = Sizes(net.size_multiple, net.min_size)
    below, beside = sizes.side(height) - height, sizes.side(width) - width  # the network saw the image padded
    hole = F.pad(torch.from_numpy(np.asarray(mask) != 0)[None, None], (0, int(beside), 0, int(below)))
    size = (int(height + below), int(width + beside))
    picture = attention_flow(heard[-1].offsets, heard[-1].queries if whole else hole, size=size)
    return picture[0, :height, :width]

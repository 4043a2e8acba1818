"""From a photo, as an array, to what IPT makes of it: larger, without noise, without rain."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .models.ipt_tiles import starts
from .runtime.errors import InpaintRTError


def patches(model: nn.Module, image: NDArray[Any], task: int | str | None = None) -> int:
    """How many patches the network computes for an image. Raises: as `enhance`, before any work."""
    net: Any = model
    _check(net, image)
    net.index(task)
    return len(starts(image.shape[0], net.patch)) * len(starts(image.shape[1], net.patch))


def enhance(
    model: nn.Module, image: NDArray[np.uint8], task: int | str | None = None, *, blend: str = "original"
) -> NDArray[np.uint8]:
    """What `model` makes of an image.

    Args:
        model: an `inpaintrt.models.ipt.IPT`, accelerated or not, on any device, in eval mode.
        image: (H, W, 3) RGB, uint8, both sides at least a patch.
        task: name or place, as `IPT.index` takes it; may be left out where the network has one.
        blend: "original" or "smooth", as in `IPT.tiled`.

    Returns:
        (s · H, s · W, 3) uint8, rounded to the nearest value, where s is the task's scale.

    Raises:
        TypeError: the model is no such model.
        ValueError: shapes, dtypes, tasks and blends other than these; training mode.
        InpaintRTError: the network returned NaN or Inf.
    """
    patches(model, image, task)
    net: Any = model
    weight = next(net.parameters())
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(weight.device, weight.dtype)
    with torch.no_grad():
        made = net.tiled(x, task, blend=blend)[0].permute(1, 2, 0).float()
    if count := int((~made.isfinite()).sum()):
        raise InpaintRTError(f"the network returned {count} values that are NaN or Inf")
    result: NDArray[np.uint8] = made.round().clamp(0, 255).byte().cpu().numpy()
    return result


def _check(net: Any, image: NDArray[Any]) -> None:
    if lacking := [name for name in ("tiled", "index", "patch") if not hasattr(net, name)]:
        raise TypeError(
            f"the model, {type(net).__name__}, has no {', '.join(lacking)}; accepted: inpaintrt.load('ipt', …)"
        )
    if net.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.shape} {image.dtype}; accepted: (H, W, 3) uint8")
    if min(image.shape[:2]) < net.patch:
        raise ValueError(
            f"image has {image.shape[0]} rows and {image.shape[1]} columns; accepted: at least {net.patch} of both, one patch"
        )

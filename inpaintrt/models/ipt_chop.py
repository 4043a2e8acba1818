"""Images of overlapping patches by the rule of IPT's public code: patches lie a quarter apart, each gives its middle.

A patch of P pixels is P/4 pixels from the next one. Away from the border a pixel is the mean of all patches whose middle
P/2 × P/2 pixels hold it, up to four. The border has no such middle: there the outermost patches give all that they have,
and patches that end at the bottom and the right edge replace what the grid, which need not fit, leaves out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor], Tensor]
"""Patches (n, 3, P, P) to patches (n, 3, s · P, s · P)."""


def check_image(x: Tensor, patch: int) -> None:
    """Raises: `ValueError` for what is no batch of images of at least one patch."""
    if x.dim() != 4 or x.shape[0] < 1 or x.shape[1] != 3 or min(x.shape[2:]) < patch:
        raise ValueError(
            f"x is {tuple(x.shape)}; accepted: (B, 3, H, W), at least one image, H and W at least {patch}, one patch"
        )


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """Raises: `ValueError` for what a network with this weight cannot take; autocast takes any floating dtype."""
    fits = x.device == weight.device
    if fits and x.dtype != weight.dtype:
        fits = x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
    if not fits:
        raise ValueError(
            f"x is {x.dtype} on {x.device}; accepted: {weight.dtype} on {weight.device}, as the weights, RGB in [0, 255]"
        )


def chopped(network: Network, x: Tensor, patch: int, scale: int, batch: int) -> Tensor:
    """The public order of work, strip by strip; x (1, 3, H, W).

    The whole grid, both upper and both lower strips and the last corner are computed one after the other, so patches that
    belong to two of them are computed twice. `batch` patches at once.
    """
    height, width = x.shape[2:]
    step = patch // 4
    spare_h, spare_w = (height - patch) % step, (width - patch) % step

    def grid(part: Tensor, rows: bool, columns: bool) -> Tensor:
        return _grid(network, part, patch, scale, batch, rows=rows, columns=columns)

    corner = network(x[..., -patch:, -patch:])
    bottom, right = grid(x[..., -patch:, :], False, True), grid(x[..., -patch:], True, False)
    top, left = grid(x[..., :patch, :], False, True), grid(x[..., :patch], True, False)
    y = grid(x, True, True)
    edge = step * scale
    y[..., :edge, :] = top[..., :edge, :]
    y[..., :edge] = left[..., :edge]
    # The left strip comes after the top one and is as wide as a patch; the interior then replaces all but its border.
    y[..., :edge, : patch * scale] = left[..., :edge, :]
    y = _below(y, bottom, patch, spare_h, scale)
    right = _below(right, corner, patch, spare_h, scale)
    return _below(y.mT, right.mT, patch, spare_w, scale).mT.contiguous()


def _grid(network: Network, x: Tensor, patch: int, scale: int, batch: int, *, rows: bool, columns: bool) -> Tensor:
    """Patches at multiples of the step, as far as they fit: means of their middles along `rows` and `columns`.

    Along an axis that is averaged, the first and the last step are left as sums of all patches there; both are replaced
    by the caller, or there is only one.
    """
    step, edge = patch // 4, patch // 4 * scale
    unfolded = F.unfold(x, patch, stride=step)[0].t()
    patches = torch.cat([network(part.reshape(-1, 3, patch, patch)) for part in unfolded.split(batch)])
    extent = [((n - patch) // step * step + patch) * scale for n in x.shape[2:]]
    y = _fold(patches, extent, edge)
    inside = tuple(slice(edge, -edge) if averaged else slice(None) for averaged in (rows, columns))
    middles = patches[(..., *inside)]
    size = [n - 2 * edge if averaged else n for n, averaged in zip(extent, (rows, columns), strict=True)]
    y[(..., *inside)] = _fold(middles, size, edge) / _fold(torch.ones_like(middles), size, edge)
    return y


def _fold(patches: Tensor, size: list[int], step: int) -> Tensor:
    """Sums of overlapping patches (n, 3, h, w), `step` apart: (1, 3, *size)."""
    return F.fold(patches.flatten(1).t()[None], tuple(size), patches.shape[2:], stride=step)


def _below(upper: Tensor, lower: Tensor, patch: int, spare: int, scale: int) -> Tensor:
    """`upper`, which lacks `spare` rows of the image, continued by `lower`, the last `patch` rows: cut half-way."""
    cut = (patch - spare) * scale
    return torch.cat([upper[..., : upper.shape[2] - cut // 2, :], lower[..., cut - cut // 2 :, :]], dim=2)

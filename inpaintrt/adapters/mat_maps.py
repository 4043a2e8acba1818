"""A map of features of which only tiles were computed, and to which other maps may still have to be added.

Between the two convolutions of a decoder's level, a network adds its encoder's features. At the largest level that is a pass
over three maps of the whole image for a sum of which the second convolution reads a few tiles. So the first one returns a
`TiledMap`: it keeps the pixels that were computed, notes what is added to it, and gives the tiles that the second one asks
for. To everybody else it is the tensor that it stands for: any other operation computes all of it first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from inpaintrt.models.mat_sparse import Convolution, Tiles, read_pixels


class TiledMap(Tensor):
    """Made by `convolved_lazily`; (1, C, H, W), 0 where no tile was computed, and without a gradient."""

    _rows: Tensor
    """(n + 1, C): computed pixels, and zeros."""
    _where: Tensor
    """int64 (H · W): which of them each pixel is."""
    _added: list[tuple[Tensor, int]]
    """Maps to be added, and their versions when that was asked."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def read(self, pixels: Tensor) -> Tensor:
        """(len(pixels), C), of pixels counted row by row."""
        result = self._rows.index_select(0, self._where.index_select(0, pixels))
        for other, version in self._added:
            if _version(other) != version:
                raise RuntimeError("a map was changed in place after it was added to one of which tiles are computed")
            result += read_pixels(other, pixels)
        return result

    def values(self) -> Tensor:
        """All of it, channels-last."""
        _, channels, height, width = self.shape
        every = torch.arange(height * width, device=self._where.device)
        return self.read(every).view(1, height, width, channels).permute(0, 3, 1, 2)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and not kwargs:
            first, second = args
            own, other = (first, second) if isinstance(first, TiledMap) else (second, first)
            if _fits(own, other) and (func is torch.ops.aten.add.Tensor or own is first):
                added = [*own._added, (other, _version(other))]
                if func is torch.ops.aten.add.Tensor:
                    return _made(own._rows, own._where, added, own.shape)
                own._added = added
                return own
        args, kwargs = tree_map_only(TiledMap, TiledMap.values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.values())


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _fits(own: TiledMap, other: Any) -> bool:
    return (
        isinstance(other, Tensor)
        and not isinstance(other, TiledMap)
        and (other.shape, other.dtype, other.device) == (own.shape, own.dtype, own.device)
    )


def _made(rows: Tensor, where: Tensor, added: list[tuple[Tensor, int]], shape: torch.Size) -> TiledMap:
    _, channels, height, width = shape
    made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        TiledMap, shape, strides=(channels * height * width, 1, width * channels, channels), dtype=rows.dtype,
        device=rows.device, requires_grad=False,
    )  # fmt: skip
    made._rows, made._where, made._added = rows, where, added
    return made  # type: ignore[no-any-return]


def convolved_lazily(
    tiles: Tiles, conv: Convolution, x: Tensor, noise: Tensor | None, channels: int, *, up: int
) -> Tensor:
    """`Tiles.convolved`, as a `TiledMap` where that can be: without gradients, and where anything is left out."""
    if torch.is_grad_enabled() or tiles.covers_all or not tiles.count:
        return tiles.convolved(conv, x, noise, channels, up=up)
    height, width = (n * up for n in x.shape[2:])
    kept, pixels = tiles.computed(conv, x, noise, up=up)
    rows = kept.new_zeros(len(kept) + 1, channels)
    rows[:-1] = kept
    where = pixels.new_full((height * width,), len(kept))
    where[pixels] = torch.arange(len(kept), device=pixels.device)
    return _made(rows, where, [], torch.Size((1, channels, height, width)))

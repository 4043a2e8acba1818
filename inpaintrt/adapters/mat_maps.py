"""A map of features of which only tiles were computed, and to which other maps may still have to be added.

Between the two convolutions of a decoder's level, a network adds its encoder's features, and makes RGB of what the second one
returns. At the largest level those would be passes over maps of the whole image, of which tiles are needed. So both return a
`TiledMap`: it keeps the pixels that were computed, notes what is added to it, and gives the tiles that a convolution asks
for. To everybody else it is the tensor that it stands for: but for a pointwise convolution, any other operation computes all
of it first, and one that writes to it, or makes a view of it, does so for good.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from inpaintrt.models.mat_sparse import Convolution, Tiles, read_pixels, rows_of


class TiledMap(Tensor):
    """Made by `convolved_lazily`; (1, C, H, W), 0 where no tile was computed, and without a gradient."""

    _rows: Tensor
    """(n, C): computed pixels, with the margins of tiles."""
    _where: Tensor
    """int64 (H · W): which of them each pixel is; −1: 0."""
    _added: list[tuple[Tensor, int]]
    """Maps to be added, and their versions when that was asked."""
    _dense: Tensor | None
    """All of it, once somebody wrote to it or has a view of it; nothing else is looked at then."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def read(self, pixels: Tensor) -> Tensor:
        """(len(pixels), C), of pixels counted row by row."""
        if self._dense is not None:
            return read_pixels(self._dense, pixels)
        result = _picked(self._rows, self._where.index_select(0, pixels))
        for other, version in self._added:
            if _version(other) != version:
                raise RuntimeError("a map was changed in place after it was added to one of which tiles are computed")
            result += read_pixels(other, pixels)
        return result

    def values(self) -> Tensor:
        """All of it, channels-last."""
        if self._dense is not None:
            return self._dense
        return self._spread(self.read(torch.arange(len(self._where), device=self._where.device)))

    def settled(self) -> Tensor:
        """`values`, which the map consists of from now on."""
        self._dense = self.values()
        return self._dense

    def pointwise(self, weight: Tensor) -> Tensor:
        """Its convolution with weight (Cout, C, 1, 1), channels-last. Nothing was added to it."""
        return self._spread(_picked(self._rows @ weight[:, :, 0, 0].t(), self._where))

    def _spread(self, pixels: Tensor) -> Tensor:
        return pixels.view(1, *self.shape[2:], pixels.shape[1]).permute(0, 3, 1, 2)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and not kwargs:
            first, second = args
            own, other = (first, second) if isinstance(first, TiledMap) else (second, first)
            if own._dense is None and _fits(own, other) and (func is torch.ops.aten.add.Tensor or own is first):
                added = [*own._added, (other, _version(other))]
                if func is torch.ops.aten.add.Tensor:
                    return _made(own._rows, own._where, added, own.shape)
                own._added = added
                return own
        if func in _CONVOLUTIONS and not kwargs and _is_pointwise(*args):
            return args[0].pointwise(args[1])
        if not any(argument.alias_info for argument in func._schema.arguments):
            args, kwargs = tree_map_only(TiledMap, TiledMap.values, (args, kwargs or {}))
            return func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise RuntimeError(f"{func} changes the shape of a map of which tiles are computed; accepted: a new tensor")
        maps = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, TiledMap)]
        args, kwargs = tree_map_only(TiledMap, TiledMap.settled, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: next((own for own in maps if own._dense is t), t), result)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.values())


_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)
"""The first is asked for in all modes but inference."""


def _is_pointwise(x: Any, weight: Any, bias: Any = None, *options: Any) -> bool:
    """Whether a convolution is of a map to which nothing is added, and mixes the channels of each pixel only."""
    if (
        not isinstance(x, TiledMap)
        or x._dense is not None
        or x._added
        or bias is not None
        or isinstance(weight, TiledMap)
    ):
        return False
    plain = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1) if len(options) > 4 else ([1, 1], [0, 0], [1, 1], 1)
    return tuple(weight.shape[1:]) == (x.shape[1], 1, 1) and tuple(options) == plain[: len(options)]


def _picked(rows: Tensor, where: Tensor) -> Tensor:
    """Rows (n, C) with these numbers; 0 for negative ones."""
    missing = (where < 0).nonzero().flatten()
    if not len(missing):
        return rows_of(rows, where)
    return rows_of(rows, where.clamp(min=0)).index_fill_(0, missing, 0)


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
    made._rows, made._where, made._added, made._dense = rows, where, added, None
    return made  # type: ignore[no-any-return]


def convolved_lazily(
    tiles: Tiles, conv: Convolution, x: Tensor, noise: Tensor | None, channels: int, *, up: int
) -> Tensor:
    """`Tiles.convolved`, as a `TiledMap` where that can be: without gradients, and where anything is left out."""
    if torch.is_grad_enabled() or tiles.covers_all or not tiles.count:
        return tiles.convolved(conv, x, noise, channels, up=up)
    rows, where = tiles.computed(conv, x, noise, up=up)
    return _made(rows, where, [], torch.Size((1, channels, *tiles.extent)))

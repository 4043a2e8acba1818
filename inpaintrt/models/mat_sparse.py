"""Hole-sparse decoding of MAT: tiles of the decoders that no hole pixel depends on are not computed.

Both decoders end with the known pixels pasted back, and all in them is local: 3×3 convolutions, filters, doublings of the
size, RGB. So what has to be computed is the hole at the largest level, and below it what each layer reads to make what the
next one needs. The result is the dense decoder's at every hole pixel, up to the order of sums; elsewhere it is not defined
and must be replaced, not multiplied by 0.

`decoder_plan` says which pixels; `decode_tiles` runs the decoder's own modules on tiles that hold them, stacked into one tall
image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt.ops._shared import empty_output

from .mat import Encoded, FirstStage, StyleBlock, Synthesis
from .mat_layers import Size, StyleConv

Convolution = Callable[[Tensor, Tensor | None], Tensor]
"""A style-modulated convolution in one style: features and noise (None: none) to features."""

TILE = 32
"""Side of a tile of a regular grid, in pixels of its level."""
HEIGHTS, WIDTHS = (8, 16, 32), (10, 18, 26, 34, 42, 50, 58, 66, 98, 130)
"""Sides of tiles that are placed where they are needed. Smaller ones fit the hole better, larger ones have smaller margins.
With their margins, Winograd's tiles of 4 pixels fit these widths without remainder, at both sizes of a doubling convolution.
"""
WORTH = 0.8
"""Share of a map's pixels, margins counted, up to which tiles are computed instead of all of it: they are gathered first."""
MARGIN, MARGIN_UP = 1, 2
"""Pixels of a result that the border of a stacked tile spoils: of a 3×3 convolution, and of a doubling one, where one pixel
of margin below is two above, of which its filter spoils both."""


@dataclass(frozen=True)
class LevelPlan:
    """What of one level is needed, (B, 1, H, W) of its pixels, True = needed.

    Attributes:
        conv0: results of the first, doubling convolution, with noise, activation and skip.
        conv1: results of the second, and with them the inputs of RGB.
        rgb: the RGB image.
    """

    conv0: Tensor
    conv1: Tensor
    rgb: Tensor


def decoder_plan(hole: Tensor, levels: int) -> tuple[LevelPlan, ...]:
    """What a decoder of `levels` doublings must compute for the hole's pixels, lowest level first.

    Args:
        hole: bool (B, 1, H, W), **True = hole** (mask below 1); H and W divisible by 2 to the power of `levels`.
        levels: of blocks that double the size.

    Raises: `ValueError` for other shapes.
    """
    if hole.dtype != torch.bool or hole.dim() != 4 or hole.shape[1] != 1:
        raise ValueError(f"hole is {hole.dtype} {tuple(hole.shape)}; accepted: torch.bool (B, 1, H, W)")
    if levels < 1 or any(side % (1 << levels) for side in hole.shape[2:]):
        raise ValueError(f"hole is {tuple(hole.shape)} with {levels} levels; accepted: sides divisible by 2 per level")
    plans: list[LevelPlan] = []
    rgb = conv1 = hole
    for _ in range(levels):
        conv0 = _reads(conv1, 3, 1)
        plans.append(LevelPlan(conv0, conv1, rgb))
        # Pixels 2i and 2i + 1 of features are made of i - 1 to i + 1 below, by the transposed convolution and its filter;
        # those of RGB of i - 1 and i, and of i and i + 1. So features are needed wherever RGB is, which is made of them.
        conv1, rgb = _reads(conv0, 6, 2), _reads(rgb, 4, 2)
    return tuple(reversed(plans))


def _reads(needed: Tensor, window: int, stride: int) -> Tensor:
    """Pixels with any needed one in the window of pixels that read them."""
    return F.max_pool2d(needed.float(), window, stride, (window - stride) // 2) > 0


def needed_tiles(needed: Tensor, tile: int) -> Tensor:
    """bool (B, H / tile, W / tile): tiles with a needed pixel, of a map whose sides are multiples of a tile's."""
    return _reads(needed, tile, tile)[:, 0]


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a decoder's convolutions: all of them, and those of the tiles that are needed, without margins."""

    dense: int
    sparse: int

    @property
    def skipped(self) -> float:
        """Share of the dense work that is not done, 0 to 1."""
        return 1 - self.sparse / self.dense


def decoder_work(blocks: Sequence[StyleBlock], plan: Sequence[LevelPlan], tile: int = TILE) -> Work:
    """What `plan` saves in these blocks, lowest level first, for all samples of the batch together."""
    dense = sparse = 0
    for block, level in zip(blocks, plan, strict=True):
        side = min(tile, *level.rgb.shape[2:])
        steps = (block.conv0.conv, level.conv0), (block.conv1.conv, level.conv1), (block.toRGB.conv, level.rgb)
        for conv, needed in steps:
            cost = conv.weight.numel() // conv.up**2  # per pixel of the result; filters are not counted
            dense += cost * needed.numel()
            sparse += cost * side * side * int(needed_tiles(needed, side).sum())
    return Work(dense, sparse)


# ---- running the decoder's modules on tiles -------------------------------------------------------------------------


def decode_first_stage(stage: FirstStage, encoded: Encoded, hole: Tensor, tile: int = TILE) -> Tensor:
    """`FirstStage.decode` where hole (B, 1, H, W) is True; finite elsewhere."""
    blocks: list[Any] = [*stage.dec_conv]
    styles = [(encoded.style,) * 3] * len(blocks)
    return decode_tiles(blocks, encoded.x, None, encoded.skips, styles, (), decoder_plan(hole, len(blocks)), tile)


def decode_second_stage(
    synthesis: Synthesis, encoded: Encoded, ws: Tensor, noise: tuple[Tensor, ...], hole: Tensor, tile: int = TILE
) -> Tensor:
    """`Synthesis.decode` where hole (B, 1, H, W) is True; finite elsewhere. The lowest level is dense."""
    blocks: list[Any] = [*synthesis.dec.values()][1:]
    x, rgb = synthesis.lowest(encoded, ws, noise)
    plan, styles = decoder_plan(hole, len(blocks)), synthesis.styles(encoded, ws)
    return decode_tiles(blocks, x, rgb, encoded.skips[1:], styles, noise[1:], plan, tile)


def decode_tiles(
    blocks: Sequence[StyleBlock],
    x: Tensor,
    rgb: Tensor | None,
    skips: Sequence[Tensor],
    styles: Sequence[tuple[Tensor, ...]],
    noise: Sequence[Tensor],
    plan: Sequence[LevelPlan],
    tile: int = TILE,
    *,
    unused: float = 0.0,
) -> Tensor:
    """RGB (B, 3, H, W) of the highest level, right wherever the plan needs it.

    Args:
        blocks: levels that double the size, lowest first.
        x, rgb: what enters the first of them.
        skips, styles: of each block, as `StyleBlock.forward` takes them.
        noise: of each block's two convolutions in turn; empty for none.
        plan: of `decoder_plan`.
        tile: side of tiles; even, and the sides of all levels are its multiples or below it.
        unused: what stands in for results that are not computed. Nothing that the plan needs reads it.

    Raises: `ValueError` for other tiles.
    """
    samples = []
    for b in range(len(x)):
        own = slice(b, b + 1)
        features, image = x[own], None if rgb is None else rgb[own]
        for i, (block, level) in enumerate(zip(blocks, plan, strict=True)):
            first, second = (n if len(n) == 1 else n[own] for n in noise[2 * i : 2 * i + 2]) if noise else (None, None)
            skip = skips[i][own]
            of_conv0, of_conv1, of_rgb = (style[own] for style in styles[i])
            width = len(block.conv0.bias)
            tiles = Tiles.of(level.conv0[own], tile, MARGIN_UP)
            features = tiles.convolved(_in_style(block.conv0, of_conv0), features, first, width, up=2, unused=unused)
            tiles = Tiles.of(level.conv1[own], tile, MARGIN)
            features = tiles.convolved(
                _in_style(block.conv1, of_conv1), features + skip, second, width, up=1, unused=unused
            )
            image = block.toRGB(features, of_rgb, image)  # everywhere: three channels are not worth tiles
        assert image is not None
        samples.append(image)
    return torch.cat(samples)


def _in_style(conv: StyleConv, style: Tensor) -> Convolution:
    return lambda x, noise: conv(x, style, noise)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Tiles:
    """Tiles of one sample's map that hold all its needed pixels, each to be computed with a margin.

    Attributes:
        corners: int64 (n, 2), row and column of the first pixel of each; even. Tiles may overlap, and then agree.
        sides: rows and columns of each; even.
        margin: pixels around a tile that are computed with it and dropped, since the border of a stacked tile spoils them.
        extent: rows and columns of the map, that none crosses.
    """

    corners: Tensor
    sides: Size
    margin: int
    extent: Size

    @staticmethod
    def of(needed: Tensor, tile: int, margin: int) -> Tiles:
        """Squares of a regular grid; needed: bool (1, 1, H, W), of pixels.

        Raises: `ValueError` for tiles that do not divide the map.
        """
        rows, columns = needed.shape[2:]
        tile = min(tile, rows, columns)
        if tile < 2 or tile % 2 or rows % tile or columns % tile:
            raise ValueError(f"tile is {tile} at a level of {rows}×{columns}; accepted: even divisors of both")
        return Tiles(needed_tiles(needed, tile)[0].nonzero() * tile, (tile, tile), margin, (rows, columns))

    @staticmethod
    def cheapest(needed: Tensor, margin: int) -> Tiles:
        """Of tiles with the sides in `HEIGHTS` and `WIDTHS` those with the least to compute; the whole map if none saves much.

        A band of rows is cut where no pixel is needed, and each piece has tiles from its first needed column on.
        """
        extent = rows, columns = needed.shape[2], needed.shape[3]
        least, best = WORTH * needed.numel(), None
        widths = [n for n in WIDTHS if n <= columns]
        for height in (n for n in HEIGHTS if rows % n == 0):
            pieces = _pieces(needed, height)
            counts = _ceil(pieces[2][:, None], torch.tensor(widths, device=needed.device)).sum(0)
            for width, count in zip(widths, counts.tolist(), strict=True):
                cost = count * (height + 2 * margin) * (width + 2 * margin)
                if cost < least:
                    least, best = cost, (pieces, height, width)
        if best is None:
            return Tiles(needed.new_zeros(1, 2, dtype=torch.int64), extent, margin, extent)
        pieces, height, width = best
        return Tiles(_corners(*pieces, height, width, columns), (height, width), margin, extent)

    @property
    def count(self) -> int:
        return len(self.corners)

    @property
    def pixels(self) -> int:
        """Of the result, that are computed, margins included."""
        return self.count * (self.sides[0] + 2 * self.margin) * (self.sides[1] + 2 * self.margin)

    @property
    def covers_all(self) -> bool:
        """Whether the whole map is computed at no more cost."""
        return self.pixels >= self.extent[0] * self.extent[1]

    def convolved(
        self,
        conv: Convolution,
        x: Tensor,
        noise: Tensor | None,
        channels: int,
        *,
        up: int,
        unused: float = 0.0,
    ) -> Tensor:
        """conv(x, noise) on these tiles, `unused` elsewhere, channels-last; all of it where that is no more work.

        Args:
            conv: of maps of any size, up times as large as x and like noise; called once.
            x: (1, C, H / up, W / up).
            noise: (1, 1, H, W) or None.
            channels: of conv's result.
        """
        if self.covers_all:
            return conv(x, noise)
        if not self.count:
            return x.new_full((1, channels, *self.extent), unused).contiguous(memory_format=torch.channels_last)
        rows, where = self.computed(conv, x, noise, up=up)
        pixels = (where >= 0).nonzero().flatten()
        result = rows.new_full((len(where), channels), unused)
        result.index_copy_(0, pixels, rows.index_select(0, where.index_select(0, pixels)))
        return result.view(1, *self.extent, channels).permute(0, 3, 1, 2)

    def computed(self, conv: Convolution, x: Tensor, noise: Tensor | None, *, up: int) -> tuple[Tensor, Tensor]:
        """conv's result on these tiles, of which there is one at least, pixel by pixel, and where the map's pixels are in it.

        Arguments as of `convolved`. Returns: (n, C), with the margins; int64 (H · W), rows of that, or −1 where no tile is.
        """
        over = None if noise is None else self._stacked(noise, 1)
        rows = conv(self._stacked(x, up), over).permute(0, 2, 3, 1).flatten(0, 2)
        height, width = (n + 2 * self.margin for n in self.sides)
        numbers = torch.arange(self.count * height * width, device=self.corners.device).view(self.count, height, width)
        inside = numbers[:, self.margin : height - self.margin, self.margin : width - self.margin]
        pixels, _ = self._pixels(1, 0)
        return rows, pixels.new_full((math.prod(self.extent),), -1).index_copy_(0, pixels, inside.flatten())

    def _stacked(self, x: Tensor, up: int) -> Tensor:
        """(1, C, tiles · height, width), channels-last: tiles with their margins one below the other, zeros outside the map."""
        pixels, outside = self._pixels(up, self.margin // up)
        stack = read_pixels(x, pixels)
        if len(outside):
            stack.index_fill_(0, outside, 0)
        width = (self.sides[1] + 2 * self.margin) // up
        return stack.view(1, -1, width, x.shape[1]).permute(0, 3, 1, 2)

    def _pixels(self, up: int, margin: int) -> tuple[Tensor, Tensor]:
        """Numbers of all pixels of all tiles in a map of 1/up the size, read row by row, and which of them are outside it.

        margin: of that map's pixels.
        """
        height, width = (n // up for n in self.extent)
        down, across = (
            corner[:, None] // up + torch.arange(-margin, side // up + margin, device=corner.device)
            for corner, side in zip(self.corners.unbind(1), self.sides, strict=True)
        )
        outside = ((down < 0) | (down >= height))[:, :, None] | ((across < 0) | (across >= width))[:, None, :]
        pixels = down.clamp(0, height - 1)[:, :, None] * width + across.clamp(0, width - 1)[:, None, :]
        return pixels.flatten(), outside.flatten().nonzero().flatten() if margin else pixels.new_empty(0)


def _pieces(needed: Tensor, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each band of `height` rows the runs of columns with a needed pixel: number of the band, first column, length.

    Columns are looked at in pairs, so that all is even. needed: bool (1, 1, H, W), W even, H a multiple of `height`.
    """
    bands = needed.reshape(-1, height, needed.shape[3] // 2, 2).any(3).any(1)
    edges = F.pad(bands.char(), (1, 1)).diff(dim=1)
    (band, start), end = (edges == 1).nonzero().unbind(1), (edges == -1).nonzero()[:, 1]
    return band, 2 * start, 2 * (end - start)


def _corners(band: Tensor, start: Tensor, length: Tensor, height: int, width: int, columns: int) -> Tensor:
    """Corners of the tiles of all pieces, moved to the left where they would cross the map's border."""
    count = _ceil(length, width)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    number = torch.arange(len(first), device=first.device) - first  # in its piece
    left = (start.repeat_interleave(count) + number * width).clamp(max=columns - width)
    return torch.stack([band.repeat_interleave(count) * height, left], 1)


def _ceil(length: Tensor, width: int | Tensor) -> Tensor:
    return (length + width - 1).div(width, rounding_mode="floor")


def read_pixels(x: Tensor, pixels: Tensor) -> Tensor:
    """(len(pixels), C), of pixels of a map (1, C, H, W) counted row by row, read where they are.

    Maps that are neither contiguous nor channels-last are copied.
    """
    if hasattr(x, "read"):  # a map of tiles, which knows best
        return x.read(pixels)  # type: ignore[no-any-return]
    if x.is_contiguous() and x.shape[1] > 1:
        planes = _selected(x.flatten(2)[0], 1, pixels).t()
        return planes.contiguous() if torch.is_grad_enabled() else empty_output(planes.shape, x).copy_(planes)
    return rows_of(x.permute(0, 2, 3, 1).flatten(0, 2), pixels)


def rows_of(x: Tensor, numbers: Tensor) -> Tensor:
    """x[numbers], (n, C)."""
    return _selected(x, 0, numbers)


def _selected(x: Tensor, dim: int, numbers: Tensor) -> Tensor:
    """In memory that was used before, if no gradient is wanted: new pages cost five times the copy."""
    if torch.is_grad_enabled():
        return x.index_select(dim, numbers)
    shape = [*x.shape]
    shape[dim] = len(numbers)
    return torch.index_select(x, dim, numbers, out=empty_output(shape, x))

"""Hole-sparse decoding of MAT: tiles of the decoders that no hole pixel depends on are not computed.

Both decoders end with the known pixels pasted back, and all in them is local: 3×3 convolutions, filters, doublings of the
size, RGB. So what has to be computed is the hole at the largest level, and below it what each layer reads to make what the
next one needs. The result is the dense decoder's at every hole pixel, up to the order of sums; elsewhere it is not defined
and must be replaced, not multiplied by 0.

`decoder_plan` says which tiles; `decode_tiles` runs the decoder's own modules on these tiles, stacked into one tall image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mat import Encoded, FirstStage, StyleBlock, Synthesis
from .mat_layers import StyleConv

Convolution = Callable[[Tensor, Tensor | None], Tensor]
"""A style-modulated convolution in one style: features and noise (None: none) to features."""

TILES = (8, 16, 32)
TILE = TILES[-1]
"""Side of a tile, in pixels of its level. Smaller ones fit the hole better, larger ones have smaller margins."""
WORTH = 0.4
"""Share of a map's pixels up to which tiles are computed instead of all of it: they are gathered and put back, which on a CPU
costs about as much as computing them."""
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
    """The needed tiles of one sample's map, each to be computed with a margin.

    Attributes:
        needed: bool (rows, columns) of tiles.
        tile: side of one.
        margin: pixels around a tile that are computed with it and dropped, since the border of a stacked tile spoils them.
    """

    needed: Tensor
    tile: int
    margin: int

    @staticmethod
    def of(needed: Tensor, tile: int, margin: int) -> Tiles:
        """needed: bool (1, 1, H, W), of pixels. Raises: `ValueError` for tiles that do not divide the map."""
        sides = needed.shape[2:]
        tile = min(tile, *sides)
        if tile < 2 or tile % 2 or any(side % tile for side in sides):
            raise ValueError(f"tile is {tile} at a level of {sides[0]}×{sides[1]}; accepted: even divisors of both")
        return Tiles(needed_tiles(needed, tile)[0], tile, margin)

    @staticmethod
    def cheapest(needed: Tensor, margin: int) -> Tiles:
        """Of the sides in `TILES` that divide the map, the one with the least to compute; the whole map if none saves much."""
        sides = needed.shape[2:]
        whole = Tiles(needed.new_ones(1, 1), max(sides), margin)  # of which `covers_all`
        fitting = [Tiles.of(needed, t, margin) for t in TILES if not any(side % t for side in sides)]
        return min((t for t in fitting if t.pixels < WORTH * needed.numel()), key=lambda t: t.pixels, default=whole)

    @functools.cached_property
    def count(self) -> int:
        """Waits for the device."""
        return int(self.needed.sum())

    @property
    def pixels(self) -> int:
        """Of the result, that are computed, margins included."""
        return self.count * (self.tile + 2 * self.margin) ** 2

    @property
    def covers_all(self) -> bool:
        """Whether the whole map is computed at no more cost."""
        return self.pixels >= self.needed.numel() * self.tile**2

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
        height, width = (n * self.tile for n in self.needed.shape)
        if not self.count:
            return x.new_full((1, channels, height, width), unused).contiguous(memory_format=torch.channels_last)
        kept, pixels = self.computed(conv, x, noise, up=up)
        result = kept.new_full((height * width, channels), unused).index_copy_(0, pixels, kept)
        return result.view(1, height, width, channels).permute(0, 3, 1, 2)

    def computed(self, conv: Convolution, x: Tensor, noise: Tensor | None, *, up: int) -> tuple[Tensor, Tensor]:
        """conv's result on these tiles, of which there is one at least, pixel by pixel, and which pixels these are.

        Arguments as of `convolved`. Returns: (n, C); int64 (n,), counted row by row.
        """
        height, width = (n * self.tile for n in self.needed.shape)
        over = None if noise is None else self._stacked(noise, 1)
        stacked = conv(self._stacked(x, up), over)
        side, inside = self.tile + 2 * self.margin, slice(self.margin, self.margin + self.tile)
        kept = stacked.permute(0, 2, 3, 1).reshape(self.count, side, side, -1)[:, inside, inside]
        pixels, _ = self._pixels(height, width, self.tile, 0)
        return kept.reshape(len(pixels), -1), pixels

    def _stacked(self, x: Tensor, up: int) -> Tensor:
        """(1, C, tiles · side, side), channels-last: tiles with their margins one below the other, zeros outside the map."""
        channels, height, width = x.shape[1:]
        tile, margin = self.tile // up, self.margin // up
        pixels, outside = self._pixels(height, width, tile, margin)
        stack = read_pixels(x, pixels)
        if len(outside):
            stack.index_fill_(0, outside, 0)
        return stack.view(1, -1, tile + 2 * margin, channels).permute(0, 3, 1, 2)

    def _pixels(self, height: int, width: int, tile: int, margin: int) -> tuple[Tensor, Tensor]:
        """Numbers of all pixels of all tiles in a map read row by row, and which of them are outside the map."""
        steps = torch.arange(-margin, tile + margin, device=self.needed.device)
        down, across = ((n[:, None] * tile + steps) for n in self.needed.nonzero().unbind(1))
        outside = ((down < 0) | (down >= height))[:, :, None] | ((across < 0) | (across >= width))[:, None, :]
        pixels = down.clamp(0, height - 1)[:, :, None] * width + across.clamp(0, width - 1)[:, None, :]
        return pixels.flatten(), outside.flatten().nonzero().flatten() if margin else pixels.new_empty(0)


def read_pixels(x: Tensor, pixels: Tensor) -> Tensor:
    """(len(pixels), C), of pixels of a map (1, C, H, W) counted row by row, read where they are.

    Maps that are neither contiguous nor channels-last are copied.
    """
    if hasattr(x, "read"):  # a map of tiles, which knows best
        return x.read(pixels)  # type: ignore[no-any-return]
    if x.is_contiguous() and x.shape[1] > 1:
        return x.flatten(2)[0].index_select(1, pixels).t().contiguous()
    return x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, pixels)

"""Hole-sparse decoding of MAT: tiles of the decoders that no hole pixel depends on are not computed.

Both decoders end with the known pixels pasted back, and all in them is local: 3×3 convolutions, filters, doublings of the
size, RGB. So what has to be computed is the hole at the largest level, and below it what each layer reads to make what the
next one needs. The result is the dense decoder's at every hole pixel, up to the order of sums; elsewhere it is not defined
and must be replaced, not multiplied by 0.

`decoder_plan` says which tiles; `decode_tiles` runs the decoder's own modules on these tiles, stacked into one tall image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mat import Encoded, FirstStage, StyleBlock, Synthesis
from .mat_layers import StyleConv

TILE = 32
"""Side of a tile, in pixels of its level. Smaller ones fit the hole better, larger ones have smaller margins."""


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
            tiles = _Tiles.of(level.conv0[own], tile)
            # One pixel of margin below is two above, of which the borders of the stack spoil both.
            features = tiles.convolved(block.conv0, features, of_conv0, first, margin=2, up=2, unused=unused) + skip
            tiles = _Tiles.of(level.conv1[own], tile)
            features = tiles.convolved(block.conv1, features, of_conv1, second, margin=1, up=1, unused=unused)
            image = block.toRGB(features, of_rgb, image)  # everywhere: three channels are not worth tiles
        assert image is not None
        samples.append(image)
    return torch.cat(samples)


@dataclass(frozen=True)
class _Tiles:
    """The needed tiles of one sample's map: bool (rows, columns) of tiles."""

    needed: Tensor
    tile: int

    @staticmethod
    def of(needed: Tensor, tile: int) -> _Tiles:
        sides = needed.shape[2:]
        tile = min(tile, *sides)
        if tile < 2 or tile % 2 or any(side % tile for side in sides):
            raise ValueError(f"tile is {tile} at a level of {sides[0]}×{sides[1]}; accepted: even divisors of both")
        return _Tiles(needed_tiles(needed, tile)[0], tile)

    def convolved(
        self,
        conv: StyleConv,
        x: Tensor,
        style: Tensor,
        noise: Tensor | None,
        *,
        margin: int,
        up: int,
        unused: float,
    ) -> Tensor:
        """conv's result on these tiles, `unused` elsewhere; all of it where the tiles' margins make that cheaper.

        margin: pixels of the result that the border of a stacked tile may spoil, a multiple of `up`.
        """
        count, whole = int(self.needed.sum()), self.needed.numel()
        if count * (self.tile + 2 * margin) ** 2 >= whole * self.tile**2:
            return conv(x, style, noise)  # type: ignore[no-any-return]
        rows, columns = (n * self.tile for n in self.needed.shape)
        result = x.new_full((1, len(conv.bias), rows, columns), unused)
        if count:
            below = self._stacked(x, margin // up, self.tile // up)
            over = None if noise is None else self._stacked(noise, margin, self.tile)
            stacked = conv(below, style, over).unflatten(2, (count, -1))
            inside = slice(margin, margin + self.tile)
            self._cut(result)[:, :, self.needed] = stacked[:, :, :, inside, inside]
        return result

    def _stacked(self, x: Tensor, margin: int, tile: int) -> Tensor:
        """(1, C, tiles · side, side): needed tiles with their margins, zeros outside the map, one below the other."""
        side = tile + 2 * margin
        padded = F.pad(x, (margin,) * 4)
        windows = padded.unfold(2, side, tile).unfold(3, side, tile)
        return windows[:, :, self.needed].flatten(2, 3)

    def _cut(self, x: Tensor) -> Tensor:
        """A view (1, C, rows, columns, tile, tile) of a map."""
        return x.unflatten(3, (-1, self.tile)).unflatten(2, (-1, self.tile)).transpose(3, 4)

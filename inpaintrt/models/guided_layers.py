"""Blocks of guided-diffusion's networks (ADM): residual blocks that a timestep modulates, attention, changes of size.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021; Nichol and Dhariwal, "Improved Denoising
Diffusion Probabilistic Models", ICML 2021. Computed step by step as the public code does, so that it is the eager baseline:
group norms and softmax in float32, attention as two products with a softmax between them. Names of parameters are those of
the public checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
"""Of every group norm."""


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """(B,) → (B, dim) float32: [cos | sin] of t · 10000^(−i / (dim // 2)); a last column of zeros where dim is odd."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def single(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32 (float64 for float64), returned in the dtype of its input."""

    def __init__(self, channels: int) -> None:
        if channels % GROUPS:
            raise ValueError(f"a group norm of {channels} channels; accepted: multiples of {GROUPS}")
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = single(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.group_norm(wide, self.num_groups, weight, bias, self.eps).to(x.dtype)


class Downsample(nn.Module):
    """Half the size: means of 2×2 pixels, or with `conv` a 3×3 convolution of stride 2."""

    def __init__(self, channels: int, conv: bool, outputs: int | None = None) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, outputs or channels, 3, 2, 1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, with `conv` followed by a 3×3 convolution."""

    def __init__(self, channels: int, conv: bool, outputs: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs or channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return doubled if self.conv is None else self.conv(doubled)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), the second norm modulated by the timestep's embedding.

    Args:
        channels, outputs: in and out; where they differ a convolution is on the way past.
        emb_channels: of the embedding.
        dropout: share of features dropped before the last convolution, in training.
        scale_shift: norm · (1 + scale) + shift with both from the embedding; otherwise the embedding is added before the norm.
        resample: "up" or "down": the size is doubled or halved between the first SiLU and its convolution, and on the way past.
        skip_kernel: of the convolution on the way past.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        emb_channels: int,
        *,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: str = "",
        skip_kernel: int = 1,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        resize: nn.Module = nn.Identity()
        if resample:
            resize = Upsample(channels, conv=False) if resample == "up" else Downsample(channels, conv=False)
        self.in_layers = nn.Sequential(GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, outputs, 3, padding=1))
        self.resize = resize
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, outputs * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm32(outputs), nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        )
        past: nn.Module = nn.Identity()
        if channels != outputs:
            past = nn.Conv2d(channels, outputs, skip_kernel, padding=skip_kernel // 2)
        self.skip_connection = past

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, channels, H, W), emb (B, emb_channels) → (B, outputs, H', W')."""
        norm, act, conv = self.in_layers
        h = conv(self.resize(act(norm(x))))
        modulation = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + modulation)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resize(x)) + h  # type: ignore[no-any-return]


def attention(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Softmax attention of queries, keys and values in one tensor.

    Args:
        qkv: (B, 3·C, T). Legacy order: heads, in each its queries, keys and values. New order: all heads' queries, then
            all keys, then all values.

    Returns: (B, C, T), head by head.
    """
    b, width, length = qkv.shape
    channels = width // (3 * heads)
    if new_order:
        q, k, v = (part.reshape(b * heads, channels, length) for part in qkv.chunk(3, dim=1))
    else:
        q, k, v = qkv.reshape(b * heads, 3 * channels, length).split(channels, dim=1)
    scale = channels**-0.25  # on both sides, so that half precision does not overflow
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(single(weight), dim=-1).to(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, length)


class AttentionBlock(nn.Module):
    """x + projection(attention(norm(x))) over all pixels.

    Args:
        heads: number of them; divides channels.
        new_order: see `attention`. Nothing in the weights tells.
    """

    def __init__(self, channels: int, heads: int, new_order: bool = False) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same."""
        flat = x.reshape(*x.shape[:2], -1)
        h = attention(self.qkv(self.norm(flat)), self.heads, self.new_order)
        return (flat + self.proj_out(h)).reshape(x.shape)  # type: ignore[no-any-return]


class AttentionPool2d(nn.Module):
    """CLIP's pooling: the attention of the mean over all pixels to the pixels and itself, in the new order.

    Args:
        side: height and width of the map, which positions are stored for.
        outputs: channels of the result.
    """

    def __init__(self, side: int, channels: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.side, self.heads = side, heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, side * side + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, side, side) → (B, outputs)."""
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        return self.c_proj(attention(self.qkv_proj(tokens), self.heads, new_order=True))[:, :, 0]  # type: ignore[no-any-return]


class EmbeddedSequential(nn.Sequential):
    """Layers in a row, of which residual blocks are given the embedding, too."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def zeroed(layer: Any) -> Any:
    """A layer whose output is zero before training: a residual branch begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer

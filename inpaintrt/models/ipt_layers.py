"""Layers of IPT under the public names: convolutions before and after the transformer, and the transformer itself.

Chen et al., "Pre-Trained Image Processing Transformer", CVPR 2021, section 3.1. The plain form of everything: attention with
all of its weights, as the public code has it. `adapters.ipt` holds the same in fewer passes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELL = 3
"""Rows and columns of a token: the transformer sees 3×3 pixels of features as one."""
MEAN = (0.4488, 0.4371, 0.4040)
"""RGB of DIV2K, as a share of the largest value."""


def mean_shift(sign: int, largest: float = 255.0) -> nn.Conv2d:
    """A 1×1 convolution that adds (`sign` 1) or takes away (−1) the mean colour. Public files hold its weights."""
    conv = nn.Conv2d(3, 3, 1)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(torch.eye(3)[..., None, None])
        conv.bias.copy_(sign * largest * torch.tensor(MEAN))
    return conv.requires_grad_(False)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), 5×5, with neither norm nor activation at its end."""

    def __init__(self, features: int) -> None:
        super().__init__()
        first, last = (nn.Conv2d(features, features, 5, padding=2) for _ in range(2))
        self.body = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x  # type: ignore[no-any-return]


def head(features: int) -> nn.Sequential:
    """RGB to features."""
    return nn.Sequential(nn.Conv2d(3, features, 3, padding=1), ResidualBlock(features), ResidualBlock(features))


def tail(features: int, scale: int) -> nn.Sequential:
    """Features to RGB at `scale` times the size: 1, 2, 3 or 4. 4 doubles twice."""
    steps: list[nn.Module] = []
    for factor in {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[scale]:
        steps += [nn.Conv2d(features, factor**2 * features, 3, padding=1), nn.PixelShuffle(factor)]
    return nn.Sequential(nn.Sequential(*steps), nn.Conv2d(features, 3, 3, padding=1))


class EncoderLayer(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x)). Tokens are (L, B, d): the sequence comes first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, bias=False)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y, y, y)[0]
        return x + self.linear2(F.relu(self.linear1(self.norm2(x))))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """As `EncoderLayer`, with attention to the encoder's result in between.

    The task is added to queries, and to the keys of self-attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, bias=False)
        self.multihead_attn = nn.MultiheadAttention(width, heads, bias=False)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor, task: Tensor) -> Tensor:
        """x, memory: (L, B, d). task: (L, 1, d). The memory gets neither norm nor position."""
        y = self.norm1(x)
        x = x + self.self_attn(y + task, y + task, y)[0]
        x = x + self.multihead_attn(self.norm2(x) + task, memory, memory)[0]
        return x + self.linear2(F.relu(self.linear1(self.norm3(x))))  # type: ignore[no-any-return]


class Positions(nn.Module):
    """One learned vector per token."""

    position_ids: Tensor

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.pe = nn.Embedding(tokens, width)
        self.register_buffer("position_ids", torch.arange(tokens).expand(1, -1).contiguous())

    def forward(self) -> Tensor:
        """(L, 1, d)."""
        return self.pe(self.position_ids).transpose(0, 1)  # type: ignore[no-any-return]


class Body(nn.Module):
    """The transformer: features of a patch in, features of the same shape out.

    Args:
        patch: rows and columns of a patch of features.
        features: channels.
        heads: of each attention.
        layers: of the encoder, and of the decoder.
        queries: tasks, each of which has an embedding of one vector per token.
    """

    def __init__(self, patch: int, features: int, heads: int, layers: int, queries: int) -> None:
        super().__init__()
        width, tokens = CELL**2 * features, (patch // CELL) ** 2
        self.patch = patch
        self.linear_encoding = nn.Linear(width, width)
        # The place between the two is a dropout's in the public code, which keys of the second one count.
        self.mlp_head = nn.Sequential(
            nn.Linear(width, 4 * width), nn.Identity(), nn.ReLU(), nn.Linear(4 * width, width)
        )
        self.query_embed = nn.Embedding(queries, tokens * width)
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.decoder.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.position_encoding = Positions(tokens, width)

    def forward(self, x: Tensor, query_idx: int) -> Tensor:
        """x (B, features, patch, patch) with the embedding of task `query_idx`."""
        tokens = F.unfold(x, CELL, stride=CELL).permute(2, 0, 1)
        tokens = self.linear_encoding(tokens) + tokens
        task = self.query_embed.weight[query_idx].view(len(tokens), 1, -1)
        encoder: Any = self.encoder
        decoder: Any = self.decoder
        memory = tokens + self.position_encoding()
        for layer in encoder.layers:
            memory = layer(memory)
        y = memory
        for layer in decoder.layers:
            y = layer(y, memory, task)
        y = self.mlp_head(y) + y
        return F.fold(y.permute(1, 2, 0), (self.patch, self.patch), CELL, stride=CELL)

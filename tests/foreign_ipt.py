"""A transformer with IPT's children under other class names, whose code has switches that its structure does not show."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads, *, crossed, order="pre", bias=False):
        super().__init__()
        self.order, self.drop = order, nn.Dropout(0.1)
        self.self_attn = nn.MultiheadAttention(width, heads, bias=bias)
        if crossed:
            self.multihead_attn = nn.MultiheadAttention(width, heads, bias=bias)
            self.norm3 = nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, memory=None, task=0.0):
        y = self.norm1(x) if self.order == "pre" else x
        x = x + self.drop(self.self_attn(y + task, y + task, y)[0])
        last = self.norm2
        if memory is not None:
            x = x + self.multihead_attn(self.norm2(x) + task, memory, memory)[0]
            last = self.norm3
        return x + self.linear2(self.drop(F.relu(self.linear1(last(x)))))


class Trunk(nn.Module):
    """A body for patches of 12×12 with 4 channels."""

    def __init__(self, *, order="pre", bias=False, memory="whole", layers=2):
        super().__init__()
        width, tokens = 36, 16
        self.memory = memory
        self.linear_encoding = nn.Linear(width, width)
        self.mlp_head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Dropout(0.1), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.query_embed = nn.Embedding(3, tokens * width)
        self.encoder, self.decoder, self.position_encoding = nn.Module(), nn.Module(), nn.Module()
        self.encoder.layers = nn.ModuleList(
            Block(width, 3, crossed=False, order=order, bias=bias) for _ in range(layers)
        )
        self.decoder.layers = nn.ModuleList(
            Block(width, 3, crossed=True, order=order, bias=bias) for _ in range(layers)
        )
        self.position_encoding.pe = nn.Embedding(tokens, width)

    def forward(self, x, query_idx, con=False):
        y = F.unfold(x, 3, stride=3).transpose(1, 2).transpose(0, 1)
        y = self.linear_encoding(y) + y
        task = self.query_embed.weight[query_idx].view(16, 1, 36)
        y = y + self.position_encoding.pe.weight[:, None]
        for layer in self.encoder.layers:
            y = layer(y)
        memory = y / 2 if self.memory == "halved" else y
        for layer in self.decoder.layers:
            y = layer(y, memory, task)
        y = (self.mlp_head(y) + y).transpose(0, 1).transpose(1, 2)
        out = F.fold(y, 12, 3, stride=3)
        return (out, y) if con else out

"""A transformer with IPT's children under other class names, whose code has switches that its structure does not show."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import parallel

from inpaintrt.models.ipt_chop import chopped


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


class Network(nn.Module):
    """Heads and tails around a body, for patches of 12×12 pixels."""

    def __init__(self, scales=(2, 1)):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in scales)
        self.body = Trunk()
        self.tails = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4 * s * s, 3, padding=1), nn.PixelShuffle(s), nn.Conv2d(4, 3, 3, padding=1))
            for s in scales
        )
        self.at, self.calls = 0, 0

    def set_scale(self, at):
        self.at = at

    def forward(self, x):
        self.calls += len(x)
        y = self.heads[self.at](x)
        return self.tails[self.at](self.body(y, self.at) + y)


class Wrapper(nn.Module):
    """Images by patches; `rule` "public": the public order of work; "gpu": the same, for networks on a GPU whatever the image's
    place, as the public code has it; "plain": patches side by side."""

    def __init__(self, scales=(2, 1), rule="public", self_ensemble=False):
        super().__init__()
        self.model, self.scale, self.patch_size = Network(scales), list(scales), 12
        self.idx_scale, self.rule, self.self_ensemble = 0, rule, self_ensemble

    def forward(self, x, idx_scale):
        self.idx_scale = idx_scale
        self.model.set_scale(idx_scale)
        if self.rule == "public":
            y = chopped(self.model, x, 12, self.scale[idx_scale], 64)
            if self.self_ensemble:
                y = (y + chopped(self.model, x.flip(3), 12, self.scale[idx_scale], 64).flip(3)) / 2
            return y
        if self.rule == "gpu":
            return chopped(self._sent, x, 12, self.scale[idx_scale], 64).cuda()
        rows = [torch.cat([self.model(part) for part in row.split(12, 3)], 3) for row in x.split(12, 2)]
        return torch.cat(rows, 2)

    def _sent(self, patches):
        """One patch by a call, several over as many GPUs as there are; joined on the host."""
        if len(patches) == 1:
            return self.model.forward(patches.cuda()).cpu()
        return parallel.data_parallel(self.model, patches.cuda(), range(1)).cpu()

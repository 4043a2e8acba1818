"""Attention as PUT's public modules have it, under other class names, with switches that their structure does not show."""

from __future__ import annotations

import torch
from torch import nn


class Separate(nn.Module):
    """A matrix each for queries, keys and values; (B, L, C)."""

    def __init__(self, width=24, heads=3, *, mode="plain", returns="both"):
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.attn_drop, self.resid_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.n_head, self.mode, self.returns = heads, mode, returns

    def forward(self, x, mask=None):
        b, length, width = x.shape
        q, k, v = (f(x).view(b, length, self.n_head, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.mT * (width if self.mode == "scaled" else width // self.n_head) ** -0.5
        if self.mode == "causal":
            scores = scores.masked_fill(torch.ones(length, length).tril() == 0, -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask.view(b, 1, 1, length), -torch.inf)
        weights = self.attn_drop(scores.softmax(-1))
        y = (weights @ v).transpose(1, 2).reshape(b, length, width)
        y = self.resid_drop(self.proj(y))
        return y if self.returns == "one" else (y, weights.mean(1))


class Joint(nn.Module):
    """One matrix for queries, keys and values, without a bias of keys; (B, H, W, C)."""

    def __init__(self, width=24, heads=3, *, bias=True, window_size=None):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.num_heads, self.window_size = heads, window_size

    def forward(self, x, mask=None):
        b, rows, columns, width = x.shape
        y = x @ self.qkv.weight.mT
        if self.q_bias is not None:
            y = y + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = y.view(b, rows * columns, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * (width // self.num_heads) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.view(b, 1, 1, -1), -torch.inf)
        weights = scores.softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(x.shape)
        return self.proj(y), weights.mean(1).view(b, rows, columns, rows, columns)


class Act(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * torch.sigmoid(self.factor * x)


class Hidden(nn.Module):
    def __init__(self, width, factor):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), Act(factor), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Block(nn.Module):
    """Norms, attention and a hidden layer, under the names of either publication."""

    def __init__(self, kind=Separate, width=24, factor=1.702, **options):
        super().__init__()
        self.attn = kind(width, **options)
        names = ("ln1", "ln2") if kind is Separate else ("norm1", "norm2")
        for name in names:
            self.add_module(name, nn.LayerNorm(width))
        if kind is Separate:
            rest = nn.Dropout(0.1)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), Act(factor), nn.Linear(4 * width, width), rest)
        else:
            self.mlp, self.drop_path = Hidden(width, factor), nn.Identity()
        self.names = names

    def forward(self, x, mask=None):
        first, second = (self._modules[name] for name in self.names)
        y, weights = self.attn(first(x), mask=mask)
        x = x + y
        return x + self.mlp(second(x)), weights


class Model(nn.Module):
    """Some layers of it, as PUT's blocks call them."""

    def __init__(self, kind=Separate, layers=2, width=24, **options):
        super().__init__()
        self.layers = nn.ModuleList(kind(width, **options) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, x, mask=None):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y, weights = layer(norm(x), mask=mask)
            x = x + y
        return x, weights


class Quantiser(nn.Module):
    """Features to codes, those from `split` on for tokens that are not known. `table`: the codes are trained, not averaged."""

    def __init__(
        self, codes=40, width=12, split=24, *, table=False, distance="euclidean", returns="all", learned=False
    ):
        super().__init__()
        self.masked_embed_start = codes if split is None else split
        self.distance, self.returns, self.beta = distance, returns, 0.25
        start = torch.randn(codes, width, generator=torch.Generator().manual_seed(5))
        if table:
            self.embedding = nn.Embedding(codes, width)
        else:
            self.register_buffer("embedding", start)
            self.register_buffer("cluster_size", torch.zeros(codes))
        if learned:
            self.scores = nn.Linear(width, codes)

    def forward(self, z, token_type=None, topk=1):
        table = isinstance(self.embedding, nn.Embedding)
        codes, x = self.embedding.weight if table else self.embedding, z.permute(0, 2, 3, 1)
        gaps = (x.unsqueeze(-2) - codes).square().sum(-1)
        if self.distance == "cosine":
            gaps = -(nn.functional.normalize(x, dim=-1) @ codes.t())
        later = torch.arange(len(codes), device=z.device) >= self.masked_embed_start
        if token_type is not None and later.any():
            known = token_type.permute(0, 2, 3, 1) == 1
            gaps = gaps.masked_fill(known == later, torch.inf)
        index = gaps.topk(topk, dim=-1, largest=False).indices[..., -1]
        found = codes[index]
        loss = (found.detach() - x).square().mean()
        if table:
            loss = loss + self.beta * (found - x.detach()).square().mean()
        seen, none = index.unique(), torch.zeros_like(loss)
        result = {
            "quantize": (x + (found - x).detach()).permute(0, 3, 1, 2).contiguous(),
            "used_unmasked_quantize_embed": none + (seen < self.masked_embed_start).sum(),
            "used_masked_quantize_embed": none + (seen >= self.masked_embed_start).sum(),
            "quantize_loss": loss,
            "index": index,
        }
        if token_type is not None:
            result["unmasked_num_token"] = (token_type == 1).sum()
            result["masked_num_token"] = (token_type != 1).sum()
        return result if self.returns == "all" else (result["quantize"], loss, index)

"""The transformer of PUT: full attention over all tokens, known or not, in the layouts of both publications.

Attention is torch's `scaled_dot_product_attention`. The last block is computed for wanted tokens only: its keys and values
are of all tokens, everything after its queries is of one token alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    """x (B, L, …) at `rows` (B, R); x itself for None."""
    if rows is None:
        return x
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of q (B, R, C) over k, v (B, L, C); heads are groups of neighbouring channels."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GELU2(nn.Module):
    """x · σ(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"GELU2": GELU2, "GELU": nn.GELU}


class SeparateAttention(nn.Module):
    """Attention with a matrix and bias for each of queries, keys and values (CVPR 2022)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        q, k, v = self.query(rows_of(x, rows)), self.key(x), self.value(x)
        return self.proj(attend(q, k, v, self.heads))  # type: ignore[no-any-return]


class JointAttention(nn.Module):
    """Attention with one matrix for queries, keys and values; keys have no bias (TPAMI 2024)."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        width, bias = x.shape[2], None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if rows is None:
            q, k, v = F.linear(x, self.qkv.weight, bias).split(width, 2)
        else:
            q = F.linear(rows_of(x, rows), self.qkv.weight[:width], self.q_bias)
            k, v = F.linear(x, self.qkv.weight[width:], None if bias is None else bias[width:]).split(width, 2)
        return self.proj(attend(q, k, v, self.heads))  # type: ignore[no-any-return]


class BlockCVPR(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), under the names of the CVPR 2022 code."""

    def __init__(self, width: int, heads: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SeparateAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), ACTIVATIONS[activation](), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        x = rows_of(x, rows) + self.attn(self.ln1(x), rows)
        return x + self.mlp(self.ln2(x))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class BlockTPAMI(nn.Module):
    """The same, under the names of the TPAMI 2024 code."""

    def __init__(self, width: int, heads: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = JointAttention(width, heads, bias)
        self.mlp = Mlp(width, activation)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        x = rows_of(x, rows) + self.attn(self.norm1(x), rows)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


BLOCKS: dict[str, type[nn.Module]] = {"cvpr": BlockCVPR, "tpami": BlockTPAMI}

"""IPT: the transformer between its heads and tails, in fewer passes.

- Tokens stay (B, L, d), and heads are views, so attention is torch's `scaled_dot_product_attention` without a copy. The
  matrices of weights, which the public code makes, averages over heads and drops, are never there.
- Patches go through all layers some at a time, `_TOKENS` of their tokens, because they know nothing of each other.
- What a task adds to queries and keys is the same for all patches: W·(y + t) = W·y + W·t, where W·t is (L, 2d), once for each
  layer and piece. So self-attention of the decoder has one product for queries, keys and values.
- Keys and values of the decoder's second attentions all come from the encoder's result: one product for as many layers as
  `_MEMORY` holds.
- Residuals are added by the products themselves, and what is as wide as the hidden layer is made of some rows at a time.

What a copy of the transformer computes beyond its parts (positions in every layer, another order of norms) its structure
does not tell. So a copy of one layer of each kind is tried when it is recognised.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.testing.recipe import image

from .ffc import refuses_tensor
from .trial import Twin, Verdicts, bare_copy, same, settings_of

_MEMORY = 1 << 25
"""Bytes of keys and values of the encoder's result at once. A single layer's may be more."""
_ROWS = 1024
"""Tokens for which the hidden layer is made at once."""
_TOKENS = 2048
"""Tokens that go through all layers together: enough for the products' speed, and what layers hold is in proportion."""

# ---- the fused form -------------------------------------------------------------------------------------------------


def transformed(body: Any, x: Tensor, task: int) -> Tensor:
    """The body's result, (B, C, P, P), for one that was recognised; some patches at a time, which know nothing of others."""
    parts = -(-len(x) * body.position_encoding.pe.num_embeddings // _TOKENS)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or min(parts, len(x)) < 2:
        return _transformed(body, x, task)
    pieces = x.tensor_split(min(parts, len(x)))
    made = _transformed(body, pieces[0], task)
    out = made.new_empty(x.shape)
    out[: len(made)] = made
    for piece, place in zip(pieces[1:], out[len(made) :].tensor_split(len(pieces) - 1), strict=True):
        place.copy_(_transformed(body, piece, task))
    return out


def _transformed(body: Any, x: Tensor, task: int) -> Tensor:
    encoders, decoders = body.encoder.layers, body.decoder.layers
    y, cell = _tokens(body, x)
    y = _added(y, y, body.linear_encoding.weight, body.linear_encoding.bias)
    y = y + body.position_encoding.pe.weight.to(y.dtype)
    length, width = y.shape[1:]
    for layer in encoders:
        qkv = F.linear(layer.norm1(y), layer.self_attn.in_proj_weight)
        y = _attended(y, layer.self_attn, *qkv.split(width, -1))
        y = _hidden(y, layer.norm2(y), layer.linear1, layer.linear2)
    asked = body.query_embed.weight[task].view(length, width)
    memory, known = y, _keys_and_values(decoders, y)
    # `memory` is read again for later layers, so the decoder must not add to it in place.
    y = memory.clone()
    for layer in decoders:
        first, second = layer.self_attn, layer.multihead_attn
        qkv = F.linear(layer.norm1(y), first.in_proj_weight)
        qkv[..., : 2 * width] += F.linear(asked, first.in_proj_weight[: 2 * width])
        y = _attended(y, first, *qkv.split(width, -1))
        query = second.in_proj_weight[:width]
        y = _attended(y, second, F.linear(layer.norm2(y), query) + F.linear(asked, query), *next(known))
        y = _hidden(y, layer.norm3(y), layer.linear1, layer.linear2)
    y = _hidden(y, y.clone(), body.mlp_head[0], body.mlp_head[-1])
    count, channels, height, columns = x.shape
    y = y.view(count, height // cell, columns // cell, channels, cell, cell)
    return y.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def _tokens(body: Any, x: Tensor) -> tuple[Tensor, int]:
    """(B, L, d), features of a token in the order of `torch.nn.Unfold`; and its rows."""
    count, channels, height, width = x.shape
    cell = _cell(body, channels)
    y = x.reshape(count, channels, height // cell, cell, width // cell, cell).permute(0, 2, 4, 1, 3, 5)
    return y.reshape(count, -1, channels * cell**2), cell


def _keys_and_values(decoders: Sequence[Any], memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each layer's second attention, in order."""
    width = memory.shape[-1]
    group = max(1, _MEMORY // (2 * memory.nbytes))
    for first in range(0, len(decoders), group):
        layers = decoders[first : first + group]
        weight = torch.cat([layer.multihead_attn.in_proj_weight[width:] for layer in layers])
        parts = F.linear(memory, weight).split(width, -1)
        del weight
        for i in range(len(layers)):
            yield parts[2 * i], parts[2 * i + 1]


def _attended(x: Tensor, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """x + attention, in place where that is allowed; q, k, v (B, L, d)."""
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return _added(x, out, attention.out_proj.weight)


def _hidden(x: Tensor, y: Tensor, first: Any, second: Any) -> Tensor:
    """x + second(relu(first(y))), in place where that is allowed; y is not x."""
    if torch.is_grad_enabled() or x.shape[0] * x.shape[1] <= _ROWS:
        return _added(x, F.linear(y, first.weight, first.bias).relu_(), second.weight, second.bias)
    rows = max(1, _ROWS // x.shape[1])
    for a, b in zip(x.split(rows), y.split(rows), strict=True):
        _added(a, F.linear(b, first.weight, first.bias).relu_(), second.weight, second.bias)
    return x


def _added(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + y · weightᵀ + bias; x's own memory, if it may be written to, or a new tensor."""
    if torch.is_grad_enabled():
        return x + F.linear(y, weight, bias)
    if y is x or x.dtype != y.dtype or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x.add_(F.linear(y, weight, bias))
    if bias is not None:
        x += bias
    x.view(-1, x.shape[-1]).addmm_(y.reshape(-1, y.shape[-1]), weight.t())
    return x


# ---- recognising ----------------------------------------------------------------------------------------------------


def _cell(body: Any, channels: int) -> int:
    return round((body.linear_encoding.in_features / channels) ** 0.5)


def _why_not(body: Any) -> str:
    """What keeps a module with the children of a body from having the fused form; empty: nothing."""
    positions = getattr(body.position_encoding, "pe", None)
    parts: list[tuple[Any, tuple[str, ...], tuple[str, ...]]]
    parts = [(layer, ("self_attn",), ("norm1", "norm2")) for layer in body.encoder.layers]
    parts += [(layer, ("self_attn", "multihead_attn"), ("norm1", "norm2", "norm3")) for layer in body.decoder.layers]
    width = body.linear_encoding.in_features
    if not isinstance(positions, nn.Embedding) or positions.embedding_dim != width:
        return "it has no table of positions"
    if not len(body.encoder.layers) or not len(body.decoder.layers):
        return "it lacks an encoder or a decoder"
    for layer, attentions, norms in parts:
        for attention in (getattr(layer, name, None) for name in attentions):
            if type(attention) is not nn.MultiheadAttention or attention.in_proj_weight is None:
                return "an attention is not torch's, or has queries and keys of other widths"
            if attention.in_proj_bias is not None or attention.out_proj.bias is not None or attention.batch_first:
                return "an attention has biases, or takes the batch first"
            if attention.bias_k is not None or attention.add_zero_attn or attention.embed_dim != width:
                return "an attention has keys of its own, or another width"
        if any(type(getattr(layer, name, None)) is not nn.LayerNorm for name in norms):
            return "a norm is missing, or of another kind"
        if any(not isinstance(getattr(layer, name, None), nn.Linear) for name in ("linear1", "linear2")):
            return "a layer has no two linear maps after its attentions"
    if not all(isinstance(part, nn.Linear) for part in (body.mlp_head[0], body.mlp_head[-1])):
        return "its last layers are no linear maps"
    return ""


def _side(body: Any) -> int | None:
    """Rows of its patches, from the square that its positions make; None: they make none."""
    tokens = body.position_encoding.pe.num_embeddings
    across = round(tokens**0.5)
    return across if across * across == tokens else None


def _fits(body: Any, shape: Sequence[int], across: int | None) -> bool:
    """Whether features (B, C, P, P) make as many tokens, as wide, as the body takes."""
    channels, height, width = shape[1:]
    if across is None or height != width or height % across or not channels:
        return False
    return channels * (height // across) ** 2 == body.linear_encoding.in_features  # type: ignore[no-any-return]


def _judge(body: Any) -> str:
    """One layer of each kind, with recipe weights in float64: the public forward and the fused one."""
    across = _side(body)
    if across is None:
        return "its tokens make no square"
    short = {id(part.layers): nn.ModuleList([copy.deepcopy(part.layers[0])]) for part in (body.encoder, body.decoder)}
    twin = Twin(bare_copy(body, short))  # type: ignore[arg-type]
    for cell in (3, 1, 2, 4):
        channels, left = divmod(body.linear_encoding.in_features, cell**2)
        if left:
            continue
        x = image("ipt", 2, channels, cell * across, cell * across).double().to(twin.device)
        for task in range(min(2, body.query_embed.num_embeddings)):
            try:
                exact = twin.run(x, task)
            except Exception:  # somebody else's code, for other patches
                break
            with torch.no_grad():
                if not same(transformed(twin.copy(torch.float64), x, task), exact):
                    return "its layers are joined in another way than IPT's"
        else:
            return ""
    return "its code takes no patches of the size of its positions"


_verdicts: Verdicts[None] = Verdicts(_judge)  # type: ignore[arg-type]


class BodyAdapter:
    """The encoder and decoder between linear maps, called with features of patches and the number of a task."""

    name = "ipt.body"
    ops: tuple[str, ...] = ()
    algorithm = "one product for keys and values of several layers, attention without its weights, in pieces"
    deep = True
    named = True

    def match(self, module: nn.Module) -> str | None:
        children = ("linear_encoding", "mlp_head", "query_embed", "encoder", "decoder", "position_encoding")
        body: Any = module
        if any(module._modules.get(name) is None for name in children):
            return ""
        kinds: tuple[tuple[Any, Any], ...] = (
            (body.linear_encoding, nn.Linear), (body.mlp_head, nn.Sequential), (body.query_embed, nn.Embedding),
            (getattr(body.encoder, "layers", None), nn.ModuleList), (getattr(body.decoder, "layers", None), nn.ModuleList),
        )  # fmt: skip
        if not all(isinstance(part, kind) for part, kind in kinds):
            return ""
        return _why_not(body) or _verdict(body) or None

    def forward(self, module: Any, x: Tensor, query_idx: int, *rest: Any) -> Tensor:
        return transformed(module, x, query_idx)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        if why_not := _why_not(module) or _verdict(module):
            yield why_not
            return
        if len(args) < 2 or not isinstance(args[1], int) or isinstance(args[1], bool) or any(args[2:]):
            yield "not called with features and the number of a task alone"
            return
        x, across = args[0], _side(module)
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.shape[0] or not _fits(module, x.shape, across):
            yield "its features are no patches of the size of its positions"
        else:
            yield from refuses_tensor(x, module.linear_encoding.weight, x.shape[1])

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: a copy of one layer of each kind was compared in `match`; all of them would take seconds."""
        return iter(())


def _verdict(body: Any) -> str:
    """What the trial found. Layers other than the first may not differ from it in class or attributes."""
    for part in (body.encoder, body.decoder):
        first = settings_of(part.layers[0])
        if any(settings_of(layer) != first for layer in part.layers):
            return "its layers are not all of one kind"
    key = (
        settings_of(body), settings_of(body.encoder), settings_of(body.decoder), settings_of(body.encoder.layers[0]),
        settings_of(body.decoder.layers[0]), settings_of(body.position_encoding), tuple(map(type, body.mlp_head)),
        body.linear_encoding.in_features, body.encoder.layers[0].self_attn.num_heads, body.position_encoding.pe.num_embeddings,
    )  # fmt: skip
    found = _verdicts.of(body, key)
    return found or ""


ADAPTERS = (BodyAdapter(),)

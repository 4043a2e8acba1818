"""PUT's transformer, of both publications, in fewer passes over memory.

The public attention returns, beside its output, its weights averaged over heads, (B, L, L), which nothing in the public code
reads. Here they are a `Deferred`, and attention is torch's `scaled_dot_product_attention`. The activation x · σ(1.702 x) is
silu(1.702 x) / 1.702, whose factors the matrix products take, so that one pass over the hidden layer is left of four. The public
quantiser makes a matrix of all distances, and another of ones and zeros to look codes up; here it is `ops.nearest_code`.

What a module's structure does not say is asked of itself, in a trial: whether attention masks, what it scales by, how its heads
lie in its channels, what it returns, whether its second argument chooses rows, what the activation is, which distance is least.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.models.put_transformer import rows_of
from inpaintrt.ops.nearest_code import nearest_code
from inpaintrt.testing.recipe import image

from .deferred import deferred
from .ffc import refuses_tensor
from .trial import Twin, Verdicts, same, settings_of

_FACTOR = 1.702

# ---- the fused forms ------------------------------------------------------------------------------------------------


def attended(module: Any, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output, of the shape of x: (B, L, C), or (B, H, W, C); of rows (B, R) of (B, L, C) alone, if they are given.

    And the weights averaged over heads, (B, L, L) or (B, H, W, H, W), which are made when somebody reads them.
    """
    tokens = x.flatten(1, -2)
    asking = rows_of(tokens, rows)
    if _joint(module):
        width, weight = module.proj.in_features, module.qkv.weight
        bias = None
        if module.q_bias is not None:
            bias = torch.cat((module.q_bias, torch.zeros_like(module.v_bias), module.v_bias))
        if rows is None:
            parts = F.linear(tokens, weight, bias).chunk(3, -1)
        else:
            others = F.linear(tokens, weight[width:], None if bias is None else bias[width:])
            parts = F.linear(asking, weight[:width], module.q_bias), *others.chunk(2, -1)
    else:
        parts = module.query(asking), module.key(tokens), module.value(tokens)
    q, k, v = (t.unflatten(-1, (_heads(module), -1)).transpose(1, 2) for t in parts)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape if rows is None else asking.shape)

    places = (len(x), *x.shape[1:-1], *x.shape[1:-1])

    def average() -> Tensor:
        return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1).mean(1).view(places)

    return module.proj(y), deferred(torch.empty(places, dtype=y.dtype, device="meta"), x.device, average)


def hidden(first: Any, second: Any, x: Tensor) -> Tensor:
    """second(h · σ(1.702 h)) of h = first(x), along the last dimension of x."""
    rows = x.reshape(-1, x.shape[-1])
    h = torch.addmm(first.bias, rows, first.weight.t(), beta=_FACTOR, alpha=_FACTOR)
    h = F.silu(h, inplace=not torch.is_grad_enabled())
    return torch.addmm(second.bias, h, second.weight.t(), alpha=1 / _FACTOR).view(x.shape)


def transformed(module: Any, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A block's output and its attention's averaged weights."""
    norm1, norm2 = _norms(module)
    y, average = attended(module.attn, norm1(x), rows)
    y = rows_of(x, rows) + y
    first, second = _linears(module.mlp)
    return y + hidden(first, second, norm2(y)), average


def quantised(module: Any, z: Tensor, kinds: Tensor | None = None) -> dict[str, Tensor]:
    """What the quantiser returns in eval mode, of features z (B, C, h, w) and kinds of tokens (B, 1, h, w), 1 = known.

    The codes in use are counted without `unique`, which waits for a GPU.
    """
    codes, split = _codes(module), module.masked_embed_start
    x = z.permute(0, 2, 3, 1).contiguous()
    dual = {} if kinds is None or split == len(codes) else {"split": split, "known": kinds.reshape(-1) == 1}
    index = nearest_code(x.detach().flatten(0, 2), codes.detach(), **dual)
    found = F.embedding(index, codes).view(x.shape)
    loss = (found.detach() - x).square().mean()
    if "embedding" in module._modules:
        loss = loss + module.beta * (found - x.detach()).square().mean()
    used = torch.zeros(len(codes), dtype=torch.bool, device=z.device).index_fill_(0, index, True)
    result = {
        "quantize": (x + (found - x).detach()).permute(0, 3, 1, 2).contiguous(),
        "used_unmasked_quantize_embed": torch.zeros_like(loss) + used[:split].sum(),
        "used_masked_quantize_embed": torch.zeros_like(loss) + used[split:].sum(),
        "quantize_loss": loss,
        "index": index.view(x.shape[:3]),
    }
    if kinds is not None:
        result |= {"unmasked_num_token": (kinds == 1).sum(), "masked_num_token": (kinds != 1).sum()}
    return result


# ---- recognising ----------------------------------------------------------------------------------------------------


def _joint(module: Any) -> bool:
    return "qkv" in module._modules


def _heads(module: Any) -> int:
    """Of an attention; 0 where it does not say."""
    found = (getattr(module, name, None) for name in ("num_heads", "n_head", "heads"))
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), 0)


def _norms(block: Any) -> tuple[Any, Any]:
    pairs = (("norm1", "norm2"), ("ln1", "ln2"))
    return next((block._modules[a], block._modules[b]) for a, b in pairs if {a, b} <= block._modules.keys())


def _linears(mlp: Any) -> tuple[Any, ...]:
    """The linear layers of the part after the attention."""
    return tuple(part for part in mlp.children() if isinstance(part, nn.Linear))


def _attention(module: Any) -> str | None:
    """What keeps a module from having the fused form of attention; empty: nothing; None: it is no such module at all."""
    names = {name for name, child in module._modules.items() if not isinstance(child, (nn.Dropout, nn.Identity))}
    if names not in ({"qkv", "proj"}, {"query", "key", "value", "proj"}) or not (heads := _heads(module)):
        return None
    if any(not isinstance(module._modules[name], nn.Linear) for name in names):
        return None
    width = module.proj.in_features
    if "qkv" in names:
        if not hasattr(module, "q_bias") or not hasattr(module, "v_bias"):
            return None  # any vision transformer
        if (module.q_bias is None) is not (module.v_bias is None) or module.qkv.bias is not None:
            return "queries, keys and values have biases of another kind"
        if getattr(module, "window_size", None) is not None:
            return "it attends in windows"
        wide = module.qkv.out_features == 3 * width
    else:
        wide = all(getattr(module, name).out_features == width for name in ("query", "key", "value"))
    return "" if wide and heads > 0 and width % heads == 0 else "its matrices and heads are of other sizes"


def _block(module: Any) -> str | None:
    """As `_attention`, of a block."""
    parts = module._modules
    normed = any(isinstance(parts.get(a), nn.LayerNorm) and isinstance(parts.get(b), nn.LayerNorm)
                 for a, b in (("norm1", "norm2"), ("ln1", "ln2")))  # fmt: skip
    attention, mlp = parts.get("attn"), parts.get("mlp")
    if not normed or attention is None or mlp is None or (why_not := _attention(attention)) is None:
        return None
    linears = _linears(mlp)
    if len(linears) != 2 or any(part.bias is None for part in linears):
        return "what follows its attention is no pair of linear layers with biases"
    return why_not


def _codes(module: Any) -> Any:
    """The codebook (K, C) of a quantiser."""
    embedding = getattr(module, "embedding", None)
    return embedding.weight if type(embedding) is nn.Embedding else embedding


def _quantiser(module: Any) -> str | None:
    """As `_attention`, of a quantiser."""
    codes, split = _codes(module), getattr(module, "masked_embed_start", None)
    if not isinstance(codes, Tensor) or codes.dim() != 2 or not isinstance(split, int):
        return None
    if set(module._modules) - {"embedding"}:
        return "it has layers beside its codes"
    if not 0 < split <= len(codes):
        return "the codes of known patches are none, or more than there are"
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return "its counts of tokens are sums over processes"
    return ""


_RETURNS = ("pair", "rows", "one")
"""What a module returns: its output and the averaged weights; the output, of the rows that its second argument names; the
output alone."""


def _judged(module: Any, attention: Any, fused: Any) -> str:
    """A copy with recipe weights, in float64, against the fused form: one of `_RETURNS`, or a sentence."""
    twin = Twin(module)
    copied, width = twin.copy(torch.float64), attention.proj.in_features
    rows = torch.tensor([[4, 0, 3], [1, 5, 2]], device=twin.device)
    why = "its code takes no tokens"
    for shape in ((2, 6), (2, 2, 3)):
        x = (image("put.attention", *shape, width) * 4 - 2).double().to(twin.device)
        try:
            exact = twin.run(x)
        except Exception as error:  # somebody else's code
            why = f"its code takes no tokens alone ({type(error).__name__})"
            continue
        with torch.no_grad():
            ours = fused(copied, x)
            if isinstance(exact, tuple) and len(exact) == 2 and all(map(same, ours, exact)):
                return "pair"
            if not same(ours[0], exact):
                other = isinstance(exact, Tensor) or (isinstance(exact, tuple) and len(exact) == 2)
                return (
                    "its attention or activation is of another kind: masked, scaled or arranged otherwise"
                    if other
                    else "it does not return its output, or its output and averaged weights"
                )
            try:
                return "rows" if len(shape) == 2 and same(fused(copied, x, rows)[0], twin.run(x, rows)) else "one"
            except Exception:  # its second argument is something else
                return "one"
    return why


def _judged_codes(module: Any) -> str:
    """As `_judged`, of a quantiser: "", or a sentence. Half of the features lie near codes."""
    twin = Twin(module)
    copied = twin.copy(torch.float64)
    codes = _codes(copied).detach()
    z = (image("put.quantiser", 2, codes.shape[1], 2, 3) * 4 - 2).double().to(codes.device)
    near = codes[torch.arange(6, device=codes.device) * (len(codes) - 1) // 5]
    z[1] = near.t().reshape(z.shape[1:]) + z[1] * codes.std(correction=0) / 16
    kinds = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0] * 2, device=codes.device).view(2, 1, 2, 3)
    for given in ((z,), (z, kinds)):
        try:
            exact = twin.run(*given)
        except Exception as error:  # somebody else's code
            return f"its code takes no features and kinds of tokens alone ({type(error).__name__})"
        with torch.no_grad():
            ours = quantised(copied, *given)
        if not isinstance(exact, dict) or exact.keys() != ours.keys():
            return "it returns something else than PUT's"
        if not all(same(ours[key], exact[key]) and ours[key].dtype == exact[key].dtype for key in ours):
            return "its distance is of another kind, or it chooses otherwise than PUT's"
    return ""


_quantisers: Verdicts[str] = Verdicts(_judged_codes)
_attentions: Verdicts[str] = Verdicts(lambda module: _judged(module, module, attended))
_blocks: Verdicts[str] = Verdicts(lambda module: _judged(module, module.attn, transformed))


def _key(module: Any, attention: Any) -> tuple[Any, ...]:
    plain = (nn.Linear, nn.LayerNorm)
    parts = tuple(settings_of(part) for part in module.modules() if not isinstance(part, plain))
    norms = tuple((norm.eps, norm.weight is None) for norm in module.modules() if isinstance(norm, nn.LayerNorm))
    return parts, norms, attention.proj.in_features, getattr(attention, "q_bias", None) is not None


class AttentionAdapter:
    """Attention called as (tokens), (tokens, None) or, where its second argument names rows, (tokens, rows)."""

    name = "put.attention"
    ops: tuple[str, ...] = ()
    algorithm = "attention without its weights; their average is computed when it is read"
    deep = False
    named = True

    def why_not(self, module: Any) -> str | None:
        return _attention(module)

    def returns(self, module: Any) -> str:
        """One of `_RETURNS`, or why there is no fused form."""
        return _attentions.of(module, _key(module, module))

    def attention(self, module: Any) -> Any:
        return module

    def fused(self, module: Any, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return attended(module, x, rows)

    def match(self, module: nn.Module) -> str | None:
        why_not = self.why_not(module)
        if why_not is None:
            return ""
        if why_not or (why_not := self.returns(module)) not in _RETURNS:
            return why_not
        return None

    def forward(self, module: Any, x: Tensor, rows: Tensor | None = None) -> Any:
        y, average = self.fused(module, x, rows)
        return (y, average) if self.returns(module) == "pair" else y

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        why_not = self.why_not(module)
        returned = self.returns(module) if why_not == "" else ""
        if returned not in _RETURNS:
            yield why_not or returned or "it is no part of PUT any more"
            return
        x, *rest = args or (None,)
        attention = self.attention(module)
        weight = attention.proj.weight
        if not isinstance(x, Tensor) or x.dim() not in (3, 4) or not x.numel() or x.shape[-1] != weight.shape[1]:
            yield f"called with something else than tokens of {weight.shape[1]} channels"
        elif len(rest) > 1 or (returned != "rows" and any(part is not None for part in rest)):
            yield "a mask of tokens, or more, is given"
        elif x.device != weight.device:
            yield f"the input is on {x.device}, the weights are on {weight.device}"
        elif returned == "pair" and (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None):
            yield "a compiled graph cannot defer its second output"
        elif returned == "pair" and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *module.parameters())):
            yield "gradients may be asked of the averaged weights (use torch.no_grad or inference_mode)"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: a copy was compared in `match`."""
        return iter(())


class BlockAdapter(AttentionAdapter):
    """A block: norm and attention, norm and a hidden layer with the activation x · σ(1.702 x), each added."""

    name = "put.block"
    algorithm = "attention without its weights, activation in one pass with its factors in the products"

    def why_not(self, module: Any) -> str | None:
        return _block(module)

    def returns(self, module: Any) -> str:
        return _blocks.of(module, _key(module, module.attn))

    def attention(self, module: Any) -> Any:
        return module.attn

    def fused(self, module: Any, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return transformed(module, x, rows)


class QuantiserAdapter:
    """A quantiser with one codebook or two, called as (features) or (features, kinds of tokens)."""

    name = "put.quantiser"
    ops: tuple[str, ...] = ("nearest_code",)
    algorithm = "nearest codes without a matrix of distances, looked up in place of a product with ones and zeros"
    deep = False
    named = True

    def match(self, module: nn.Module) -> str | None:
        why_not = _quantiser(module)
        if why_not is None:
            return ""
        return why_not or self.verdict(module) or None

    def verdict(self, module: Any) -> str:
        return _quantisers.of(module, (settings_of(module), "embedding" in module._modules, *_codes(module).shape))

    def forward(self, module: Any, z: Tensor, kinds: Tensor | None = None) -> dict[str, Tensor]:
        return quantised(module, z, kinds)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        why_not = _quantiser(module)
        if why_not is None or why_not or (why_not := self.verdict(module)):
            yield why_not or "it is no quantiser of PUT any more"
            return
        z, kinds, *rest = (*args, None, None)[: max(2, len(args))]
        if rest:
            yield "called with more than features and kinds of tokens"
            return
        yield from refuses_tensor(z, _codes(module), _codes(module).shape[1])
        if kinds is not None and (not isinstance(kinds, Tensor) or kinds.device != z.device):
            yield "the kinds of tokens are no tensor, or lie elsewhere"
        elif kinds is not None and kinds.numel() != z.numel() // z.shape[1]:
            yield f"there are {kinds.numel()} kinds of tokens; accepted: one for each of {z.numel() // z.shape[1]}"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: a copy was compared in `match`."""
        return iter(())


ADAPTERS = (BlockAdapter(), AttentionAdapter(), QuantiserAdapter())

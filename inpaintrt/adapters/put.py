"""PUT's attention, of both publications, without the matrices of its weights.

The public modules return, beside their output, the weights averaged over heads, (B, L, L), which nothing in the public code
reads. Here they are a `Deferred`, and attention is torch's `scaled_dot_product_attention`. Everything else about a module
is asked of itself, in a trial: whether it masks, what it scales by, how its heads lie in its channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.testing.recipe import image

from .deferred import deferred
from .trial import Twin, Verdicts, same, settings_of

# ---- the fused form -------------------------------------------------------------------------------------------------


def attended(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, of the shape of x: (B, L, C), or (B, H, W, C) of a module with one matrix for queries, keys and values.

    And the weights averaged over heads, (B, L, L) or (B, H, W, H, W), which are made when somebody reads them.
    """
    if _joint(module):
        bias = None
        if module.q_bias is not None:
            bias = torch.cat((module.q_bias, torch.zeros_like(module.v_bias), module.v_bias))
        parts = F.linear(x.flatten(1, -2), module.qkv.weight, bias).chunk(3, -1)
    else:
        parts = module.query(x), module.key(x), module.value(x)
    q, k, v = (t.unflatten(-1, (_heads(module), -1)).transpose(1, 2) for t in parts)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)

    places = (len(x), *x.shape[1:-1], *x.shape[1:-1])

    def average() -> Tensor:
        return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1).mean(1).view(places)

    return module.proj(y), deferred(torch.empty(places, dtype=y.dtype, device="meta"), x.device, average)


def _joint(module: Any) -> bool:
    return "qkv" in module._modules


def _heads(module: Any) -> int:
    heads: int = module.num_heads if _joint(module) else module.n_head
    return heads


# ---- recognising ----------------------------------------------------------------------------------------------------


def _why_not(module: Any) -> str | None:
    """What keeps a module from having the fused form; None: it is no such module at all."""
    names = {name for name, child in module._modules.items() if not isinstance(child, (nn.Dropout, nn.Identity))}
    heads = getattr(module, "num_heads" if "qkv" in names else "n_head", None)
    if names not in ({"qkv", "proj"}, {"query", "key", "value", "proj"}) or not isinstance(heads, int):
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


def _judge(module: Any) -> str:
    """A copy with recipe weights, in float64, against the fused form."""
    twin = Twin(module)
    shape = (2, 2, 3) if _joint(module) else (2, 6)
    width = module.qkv.in_features if _joint(module) else module.query.in_features
    x = (image("put.attention", *shape, width) * 4 - 2).double().to(twin.device)
    try:
        exact = twin.run(x)
    except Exception as error:  # somebody else's code
        return f"its code takes no tokens alone ({type(error).__name__})"
    if not isinstance(exact, tuple) or len(exact) != 2:
        return "it does not return its output and averaged weights"
    with torch.no_grad():
        ours = attended(twin.copy(torch.float64), x)
    if all(map(same, ours, exact)):
        return ""
    return "its attention is of another kind: masked, scaled or arranged otherwise"


_verdicts: Verdicts[None] = Verdicts(_judge)  # type: ignore[arg-type]


class AttentionAdapter:
    """Attention called as (tokens) or (tokens, None) that returns its output and its weights averaged over heads."""

    name = "put.attention"
    ops: tuple[str, ...] = ()
    algorithm = "attention without its weights; their average is computed when it is read"
    deep = False
    named = True

    def match(self, module: nn.Module) -> str | None:
        why_not = _why_not(module)
        if why_not is None:
            return ""
        return why_not or _verdict(module) or None

    def forward(self, module: Any, x: Tensor, mask: None = None) -> tuple[Tensor, Tensor]:
        return attended(module, x)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        why_not = _why_not(module)
        if why_not is None or why_not or (why_not := _verdict(module)):
            yield why_not or "it is no attention of PUT any more"
            return
        x, *rest = args or (None,)
        weight, dims = module.proj.weight, 4 if _joint(module) else 3
        if any(part is not None for part in rest):
            yield "a mask of tokens is given"
        elif not isinstance(x, Tensor) or x.dim() != dims or not x.numel():
            yield f"called with something else than tokens of {dims} dimensions"
        elif x.device != weight.device:
            yield f"the input is on {x.device}, the weights are on {weight.device}"
        elif torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            yield "a compiled graph cannot defer its second output"
        elif torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
            yield "gradients may be asked of the averaged weights (use torch.no_grad or inference_mode)"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        weight = module.qkv.weight if _joint(module) else module.query.weight
        shape = (1, 3, 4) if _joint(module) else (1, 12)
        yield ((image("put.attention", *shape, weight.shape[1]) * 4 - 2).to(weight),)


def _verdict(module: Any) -> str:
    parts = [settings_of(child) for child in module.children() if not isinstance(child, nn.Linear)]
    sizes = tuple(module._modules[name].weight.shape for name in ("qkv", "query") if name in module._modules)
    biased = getattr(module, "q_bias", None) is not None
    found = _verdicts.of(module, (settings_of(module), tuple(parts), sizes, biased))
    return found or ""


ADAPTERS = (AttentionAdapter(),)

"""PUT's loop, a few tokens a pass: the public order of work in eager, and ours.

In the public code (TPAMI 2024) attention is written out, and its weights are averaged over heads; logits, filter, softmax and
choice are made for all tokens in every pass, and the chosen ones are picked out of them. `public_sample` does that on the
modules of our network. On a GPU "compile" is the same loop with its transformer by torch.compile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import inpaintrt
from inpaintrt import models
from inpaintrt.runtime.spec import Cost
from inpaintrt.testing import recipe


def attention(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, L, C), and the weights averaged over heads (B, L, L)."""
    count, length, width = x.shape
    bias = torch.cat((module.q_bias, torch.zeros_like(module.v_bias), module.v_bias))
    qkv = F.linear(x, module.qkv.weight, bias).reshape(count, length, 3, module.heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    weights = ((q @ k.transpose(-2, -1)) * (width // module.heads) ** -0.5).softmax(-1)
    y = (weights @ v).permute(0, 2, 1, 3).contiguous().view(x.shape)
    return module.proj(y), weights.mean(1)


def logits(network: Any, x: Tensor) -> Tensor:
    """(B, L, classes) of embeddings (B, L, C)."""
    for block in network.blocks:
        y, _ = attention(block.attn, block.norm1(x))
        x = x + y
        x = x + block.mlp(block.norm2(x))
    return network.to_logits(network.norm(x))  # type: ignore[no-any-return]


def public_sample(
    network: Any,
    image: Tensor,
    mask: Tensor,
    *,
    tokens_per_step: int,
    top_k: int,
    draws: Sequence[Tensor],
    transformer: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Tokens int64 (B, L); image (B, 3, H, W), 0 to 255; mask (B, 1, H, W), 1 = known.

    `draws`: for each pass numbers of the distribution Exp(1), (B, L, classes): what `torch.multinomial` would draw.
    `transformer`: what computes `logits` of the network, if not that.
    """
    codec = network.content_codec
    share = codec.known_share(mask)
    z = codec.encode(image * mask.to(image.dtype))
    known = share == 1
    tokens, x = codec.quantize(z, known).flatten(1), network.embed(z, share)
    known = known.flatten(1)
    left = int((~known).sum(1).max())
    for step, exponentials in enumerate(draws):
        scores = logits(network, x) if transformer is None else transformer(x)
        best, classes = scores.topk(top_k, dim=-1)
        filtered = torch.full_like(scores, -torch.inf).scatter_(-1, classes, best)
        picked = (filtered.softmax(-1) / exponentials).argmax(-1)
        most = filtered.amax(-1).masked_fill_(known, -torch.inf)
        place = most.topk(min(tokens_per_step, left - step * tokens_per_step), dim=1).indices
        new = torch.zeros_like(most).scatter_(1, place, 1.0).bool() & ~known
        tokens = tokens * ~new + picked * new
        known = known | new
        feature = network.emb_proj(F.embedding(picked, codec.quantize.embedding)) + network.pos_emb
        x = x * ~new.unsqueeze(-1) + feature * new.unsqueeze(-1)
    return tokens  # type: ignore[no-any-return]


@torch.no_grad()
def test_put(versus, device):
    """The second generation's width with 6 layers, 55 % of 1,024 tokens unknown, 20 a pass, of the best 200 classes.

    Both loops get the same random numbers, made beforehand, and choose the same tokens; "own draws" and bf16 draw their own.
    torch.compile's rounding may choose others.
    """
    codec = {"codes": 9216, "split": 8192, "decoder_blocks": 2, "blocks_per_scale": 2}
    small = {"codec": codec | {"codes": 96, "split": 64}, "grid": (6, 6), "layers": 1, "width": 64, "heads": 2}
    original = recipe.fill(models.create("put", **(small if versus.smoke else {"layers": 6})))
    recipe.fill(original.content_codec.quantize)
    original.content_codec.quantize.embedding.copy_(
        recipe.tensor_for("codes", original.content_codec.quantize.embedding.shape)
    )
    original.pos_emb.mul_(64)
    original.to_logits.weight.mul_(2)  # so that tokens differ, and their logits
    original.requires_grad_(False).to(device)
    rows, columns = original.grid
    image = recipe.image("photo", 1, 3, *original.only_size).to(device) * 255
    mask = torch.ones(1, 1, *original.only_size, dtype=torch.bool, device=device)
    mask.view(-1)[: round(0.55 * rows) * original.only_size[1] * original.content_codec.patch] = False
    unknown = round(0.55 * rows) * columns
    each, keep = (4, 20) if versus.smoke else (20, 200)
    generator = torch.Generator(device).manual_seed(0)
    drawn = [
        torch.empty(1, rows * columns, original.to_logits.out_features, device=device).exponential_(generator=generator)
        for _ in range(-(-unknown // each))
    ]
    in_float32 = inpaintrt.accelerate(copy.deepcopy(original))
    in_bf16 = inpaintrt.accelerate(copy.deepcopy(original), precision="bf16")

    def sampled(network, **random) -> Tensor:
        return network.sample(image, mask, tokens_per_step=each, top_k=keep, **random)[0].flatten(1).float()

    def autocast(call):
        with torch.autocast(device.type, torch.bfloat16):
            return call()

    def given(step, samples, count, classes):
        return drawn[step]

    candidates = {
        "eager": lambda: public_sample(original, image, mask, tokens_per_step=each, top_k=keep, draws=drawn).float(),
        "inpaintrt": lambda: sampled(in_float32, draws=given),
        "inpaintrt, own draws": lambda: sampled(in_float32, seeds=[1]),
        "inpaintrt bf16": lambda: autocast(lambda: sampled(in_bf16, seeds=[1])),
    }
    others = {}
    if device.type == "cuda" and not versus.smoke:  # the loop reads masks, so a graph holds its transformer only
        fast = versus.compiled_form(lambda x: logits(original, x), torch.zeros_like(original.pos_emb))
        others["compile"] = lambda: public_sample(
            original, image, mask, tokens_per_step=each, top_k=keep, draws=drawn, transformer=fast
        ).float()
    with FlopCounterMode(display=False) as counter:
        sampled(original, seeds=[1])
    versus(
        candidates | others,
        tolerances={"inpaintrt": 0.0} | dict.fromkeys(("inpaintrt, own draws", "inpaintrt bf16", *others), math.inf),
        cost=Cost(counter.get_total_flops(), len(drawn) * sum(p.nbytes for p in original.parameters())), rounds=1,
        device=device, shape=image.shape, model="put, 6 layers", group="put fp32",
        means={name: [name] for name in ("eager", *others)},
    )  # fmt: skip

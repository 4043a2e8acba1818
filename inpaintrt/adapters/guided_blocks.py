"""guided-diffusion's residual and attention blocks as strangers write them: read into their parts, found by trials, fused.

Children are looked up under the names that the public state dicts fix (`in_layers`, `emb_layers`, …). Whether a block doubles
or halves the size, whether its embedding scales norms, how many heads there are and in which order their queries, keys and
values lie is in code or in layers without weights, so blocks are run on small inputs (see `trial`).

What is done: a norm, its modulation and SiLU are one op, which reads a decoder's features and skip connection where they
are; so does the convolution on the way past, whose output is what the last convolution adds; doubled images are never made
for a convolution; attention is torch's fused one over tokens, which channels-last images are already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt import ops
from inpaintrt.testing.recipe import image

from .engine import Parts, convolved
from .ffc import refuses_tensor
from .folding import memory_format_of
from .gated import Geometry
from .trial import Twin, Verdicts, same, settings_of

POINTWISE = Geometry((1, 1), (1, 1), (0, 0), (1, 1), "zeros")

# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual:
    """A residual block by its parts; skip is None where the input itself is added.

    way: what it does with the size, a key of `WAYS`; empty where it was not asked.
    """

    module: Any
    norm1: Any
    conv1: Any
    linear: Any
    norm2: Any
    conv2: Any
    skip: Any
    way: str = ""

    @property
    def scales(self) -> bool:
        """Whether the embedding scales and shifts the second norm, or is added before it."""
        return self.linear.out_features == 2 * self.conv2.out_channels  # type: ignore[no-any-return]

    @property
    def widths(self) -> tuple[int, int]:
        return self.conv1.in_channels, self.conv2.out_channels


@dataclass(frozen=True)
class Attention:
    """An attention block by its parts; qkv and projection are 1×1 convolutions over pixels in a row.

    heads, new_order: as `heads_of` found them; 0 where it was not asked.
    """

    module: Any
    norm: Any
    qkv: Any
    projection: Any
    heads: int = 0
    new_order: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        return self.qkv.in_channels, self.projection.out_channels


@dataclass(frozen=True)
class Resize:
    """A layer that doubles or halves the size, with its convolution or None; way as in `Residual`."""

    module: Any
    conv: Any
    channels: int
    way: str = ""

    @property
    def widths(self) -> tuple[int, int]:
        return self.channels, self.channels if self.conv is None else self.conv.out_channels


Block = Residual | Attention | Resize


def residual_of(module: Any) -> Residual | None:
    """None for what is no residual block of this kind."""
    parts = module._modules
    rows = [parts.get(name) for name in ("in_layers", "emb_layers", "out_layers")]
    if not all(isinstance(row, nn.Sequential) for row in rows) or "skip_connection" not in parts:
        return None
    before, emb, after = (list(row.children()) for row in rows)  # type: ignore[union-attr]
    skip = parts["skip_connection"]
    if len(before) != 3 or len(emb) != 2 or not after:
        return None
    if isinstance(after[0], nn.Sequential):  # some copies keep norm and the rest apart
        return None
    norm1, conv1, linear, norm2, conv2 = before[0], before[-1], emb[-1], after[0], after[-1]
    if not (isinstance(norm1, nn.GroupNorm) and isinstance(norm2, nn.GroupNorm) and isinstance(linear, nn.Linear)):
        return None
    if not (is_conv2d(conv1) and is_conv2d(conv2)):
        return None
    if isinstance(skip, nn.Identity):
        skip = None
    elif not is_conv2d(skip):
        return None
    width, outputs = conv1.in_channels, conv2.out_channels
    fits = (
        norm1.num_channels == width
        and conv1.out_channels == norm2.num_channels == conv2.in_channels == outputs
        and linear.out_features in (outputs, 2 * outputs)
        and (width == outputs if skip is None else (skip.in_channels, skip.out_channels) == (width, outputs))
    )
    return Residual(module, norm1, conv1, linear, norm2, conv2, skip) if fits else None


def attention_of(module: Any) -> Attention | None:
    """None for what is no attention block of this kind."""
    parts = module._modules
    if not {"norm", "qkv", "proj_out"} <= parts.keys() or parts.keys() - {"norm", "qkv", "proj_out", "attention"}:
        return None
    norm, qkv, projection = parts["norm"], parts["qkv"], parts["proj_out"]
    if not isinstance(norm, nn.GroupNorm) or not (_is_pointwise(qkv) and _is_pointwise(projection)):
        return None
    width = norm.num_channels
    fits = (qkv.in_channels, qkv.out_channels) == (width, 3 * width)
    fits = fits and (projection.in_channels, projection.out_channels) == (width, width)
    return Attention(module, norm, qkv, projection) if fits else None


def resize_of(module: Any, channels: int) -> Resize | None:
    """None for what cannot be a layer that changes the size of images with so many channels."""
    parts = [part for part in module.modules() if part is not module]
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    if any(p.numel() for part in parts if not isinstance(part, nn.Conv2d) for p in part.parameters(recurse=False)):
        return None
    if len(convs) > 1 or any(True for _ in module.parameters(recurse=False)):
        return None
    conv = convs[0] if convs else None
    if conv is not None and (not is_conv2d(conv) or conv.in_channels != channels):
        return None
    return Resize(module, conv, channels)


def is_conv2d(conv: Any) -> bool:
    """A convolution as all in these networks are: zeros around it, or nothing."""
    if not isinstance(conv, nn.Conv2d):
        return False
    square = all(len({*pair}) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding) if isinstance(pair, tuple))
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return square and plain and isinstance(conv.padding, tuple)


def _is_pointwise(conv: Any) -> bool:
    return isinstance(conv, nn.Conv1d) and conv.kernel_size == conv.stride == (1,) and conv.groups == 1


# ---- the fused forms ------------------------------------------------------------------------------------------------


def normed(norm: Any, x: Parts, **modulation: Any) -> Tensor:
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, **modulation)


def residual(block: Residual, way: str, x: Parts, modulation: Tensor | None) -> Tensor:
    """The block's result.

    Args:
        way: "up", "down" or "": what the block does with the size.
        x: one image, or two that are read side by side.
        modulation: what the block's linear layer makes of the embedding; None for a block that takes none.
    """
    h = normed(block.norm1, x)
    if way:
        x = x if isinstance(x, Tensor) else torch.cat(list(x), dim=1)
    if way == "down":
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # type: ignore[arg-type]
    h = convolved(block.conv1, h, block.conv1.weight, block.conv1.bias, upsample=2 if way == "up" else 1)
    if modulation is None:
        h = normed(block.norm2, h)
    elif block.scales:
        scale, shift = modulation.chunk(2, dim=1)
        h = normed(block.norm2, h, scale=scale, shift=shift)
    else:
        h = normed(block.norm2, h + modulation.to(h.dtype)[:, :, None, None])
    if way == "up":
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # type: ignore[arg-type]
    if block.skip is not None:
        x = convolved(block.skip, x, block.skip.weight, block.skip.bias)
    elif not isinstance(x, Tensor):
        x = torch.cat(list(x), dim=1)
    return convolved(block.conv2, h, block.conv2.weight, block.conv2.bias, after=x)  # type: ignore[arg-type]


def modulated(linear: Any, activated: Tensor) -> Tensor:
    """What a block's linear layer makes of SiLU(embedding)."""
    return F.linear(activated, linear.weight, linear.bias)


def attended(block: Attention, heads: int, new_order: bool, x: Tensor) -> Tensor:
    """The block's result for an image (B, C, H, W)."""
    b, c, h, w = x.shape
    y = normed(block.norm, x, activation="none")
    tokens = convolved(POINTWISE, y, block.qkv.weight[..., None], block.qkv.bias).flatten(2)
    if new_order:
        q, k, v = tokens.unflatten(1, (3, heads, c // heads)).unbind(1)
    else:
        q, k, v = tokens.unflatten(1, (heads, 3, c // heads)).unbind(2)
    y = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
    y = y.transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2)  # as it lies in memory: channels-last
    return convolved(POINTWISE, y, block.projection.weight[..., None], block.projection.bias, after=x)


def resized(block: Resize, way: str, x: Tensor) -> Tensor:
    """The layer's result; its convolution reads the doubled image, or makes the halved one."""
    if block.conv is not None:
        return convolved(block.conv, x, block.conv.weight, block.conv.bias, upsample=2 if way == "up" else 1)
    return F.avg_pool2d(x, 2) if way == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


# ---- trials ---------------------------------------------------------------------------------------------------------


def _made(name: str, *shape: int) -> Tensor:
    return (image(f"probe/guided/{name}", *shape) * 4 - 2).double()


def _judge_residual(module: Any) -> str:
    """How a block changes the size, "same" where it does not; else a sentence."""
    twin = Twin(module)
    block = residual_of(twin.copy(torch.float64))
    assert block is not None
    x, emb = _made("x", 2, block.widths[0], 2, 4), _made("emb", 2, block.linear.in_features)
    x, emb = x.to(twin.device), emb.to(twin.device)
    try:
        exact = twin.run(x, emb)
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    rows = exact.shape[2] if isinstance(exact, Tensor) and exact.dim() == 4 else 0
    way = {1: "down", 2: "", 4: "up"}.get(rows)
    if way is None:
        return "it has the parts of a residual block of guided-diffusion, but changes the size in another way"
    with torch.no_grad():
        got = residual(block, way, x, modulated(block.linear, F.silu(emb)))
    return way or "same" if same(got, exact) else "it has the parts of a residual block, but computes something else"


def _judge_attention(module: Any) -> tuple[int, bool] | str:
    twin = Twin(module)
    block = attention_of(twin.copy(torch.float64))
    assert block is not None
    width = block.widths[0]
    x = _made("x", 2, width, 2, 3).to(twin.device)
    try:
        exact = twin.run(x)
    except Exception as error:
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    likely = [n for n in (getattr(module, "num_heads", 0), width // 64) if isinstance(n, int) and n and width % n == 0]
    for heads in dict.fromkeys((*likely, *(n for n in range(1, width + 1) if width % n == 0))):
        for new_order in (False, True):
            with torch.no_grad():
                got = attended(block, heads, new_order, x)
            if same(got, exact):
                return heads, new_order
    return "it has the parts of an attention block, but computes something else"


def _judge_resize(module: Any) -> str:
    """ "up" or "down", else a sentence."""
    twin = Twin(module)
    conv = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    channels = 3 if conv is None else conv.in_channels
    block = resize_of(twin.copy(torch.float64), channels)
    assert block is not None
    x = _made("x", 2, channels, 4, 6).to(twin.device)
    try:
        exact = twin.run(x)
    except Exception as error:
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    for way in ("up", "down"):
        with torch.no_grad():
            if same(resized(block, way, x), exact):
                return way
    return "it neither doubles the size by nearest neighbour nor halves it"


_residuals: Verdicts[str] = Verdicts(_judge_residual)
_attentions: Verdicts[tuple[int, bool]] = Verdicts(_judge_attention)
_resizes: Verdicts[str] = Verdicts(_judge_resize)
WAYS = {"same": "", "up": "up", "down": "down"}


def way_of(block: Residual | Resize) -> str:
    """A key of `WAYS`, or a sentence that says why the block has no fused form.

    Blocks that differ in widths alone are tried once: plain attributes that are one of their widths go by its name.
    """
    if isinstance(block, Resize):
        kind = None if block.conv is None else (type(block.conv), geometry(block.conv), block.conv.bias is None)
        return _resizes.of(block.module, (_settings(block.module, {block.channels: "channels"}), kind))
    width, outputs = block.widths
    names = {outputs: "outputs", width: "width"} | {block.linear.in_features: "embedding"}
    convs = [(type(c), geometry(c), c.bias is None) for c in (block.conv1, block.conv2, block.skip) if c is not None]
    norms = tuple((type(norm), norm.eps, norm.weight is None) for norm in (block.norm1, block.norm2))
    key = (_settings(block.module, names), tuple(convs), norms, block.scales, width == outputs)
    return _residuals.of(block.module, key)


def heads_of(block: Attention) -> tuple[int, bool] | str:
    """Number of heads and whether their order is the new one; or why the block has no fused form."""
    norm = (type(block.norm), block.norm.eps, block.norm.num_groups, block.norm.weight is None)
    bias = block.qkv.bias is None, block.projection.bias is None
    return _attentions.of(block.module, (_settings(block.module, {}), block.widths, norm, bias))


def geometry(conv: Any) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding


def _settings(module: Any, names: dict[int, str]) -> tuple[Any, ...]:
    """Plain attributes of a block and of its parts, but for layers of which all is known."""
    known = (nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.Linear)
    parts = (part for part in module.modules() if not isinstance(part, known))
    return tuple(tuple(names.get(v, v) if type(v) is int else v for v in settings_of(part)) for part in parts)


# ---- what a call cannot have ----------------------------------------------------------------------------------------


def refuses_gradient(*tensors: Tensor) -> Iterator[str]:
    """Fused ops differentiate their definitions, that is, run the original's layers once more."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        yield "a gradient with respect to its input is asked for, which the original gives faster"


# ---- adapters -------------------------------------------------------------------------------------------------------


class ResidualAdapter:
    """A residual block: (image, embedding) → image."""

    name = "guided.residual"
    ops: tuple[str, ...] = ("group_norm_silu", "fused_conv2d")
    algorithm = "norm, modulation and SiLU in one pass, sums in convolutions, 3×3 by Winograd F(4×4) on CPU"
    deep = False
    named = True

    def match(self, module: nn.Module) -> str | None:
        block = residual_of(module)
        if block is None:
            return ""
        way = way_of(block)
        return None if way in WAYS else way

    def forward(self, module: Any, x: Tensor, emb: Tensor) -> Tensor:
        block = residual_of(module)
        assert block is not None
        return residual(block, WAYS[way_of(block)], x, modulated(block.linear, F.silu(emb)))

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        block = residual_of(module)
        if block is None or way_of(block) not in WAYS:
            yield "it is no residual block any more" if block is None else way_of(block)
            return
        if len(args) != 2 or not isinstance(args[1], Tensor) or args[1].dim() != 2:
            yield "called with other arguments than an image and an embedding"
            return
        x, emb = args
        yield from refuses_tensor(x, block.conv1.weight, block.widths[0])
        if emb.shape != (len(x), block.linear.in_features) or emb.dtype != block.linear.weight.dtype:
            yield f"the embedding is {tuple(emb.shape)} {emb.dtype}"
        if way_of(block) == "down" and any(n % 2 for n in x.shape[2:]):
            yield f"the size {tuple(x.shape[2:])} cannot be halved"
        yield from refuses_gradient(x, emb)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        block = residual_of(module)
        assert block is not None
        for rows, columns in ((2, 4), (6, 2)):
            x = image("probe/guided/x", 2, block.widths[0], rows, columns) * 4 - 2
            yield x, image("probe/guided/emb", 2, block.linear.in_features) * 4 - 2


class AttentionAdapter:
    """An attention block: image → image."""

    name = "guided.attention"
    ops: tuple[str, ...] = ("group_norm_silu", "fused_conv2d")
    algorithm = "torch's fused attention over tokens, the sum in the projection"
    deep = False

    def match(self, module: nn.Module) -> str | None:
        block = attention_of(module)
        if block is None:
            return ""
        form = heads_of(block)
        return form if isinstance(form, str) else None

    def forward(self, module: Any, x: Tensor) -> Tensor:
        block = attention_of(module)
        form = "" if block is None else heads_of(block)
        assert block is not None
        assert not isinstance(form, str)
        return attended(block, *form, x).contiguous(memory_format=memory_format_of(x))

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        block = attention_of(module)
        form = "it is no attention block any more" if block is None else heads_of(block)
        if block is None or isinstance(form, str):
            yield form  # type: ignore[misc]
            return
        if len(args) != 1:
            yield "called with other arguments than one image"
            return
        yield from refuses_tensor(args[0], block.qkv.weight, block.widths[0])
        if isinstance(args[0], Tensor):
            yield from refuses_gradient(args[0])

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        block = attention_of(module)
        assert block is not None
        for rows, columns in ((2, 3), (5, 4)):
            yield (image("probe/guided/x", 2, block.widths[0], rows, columns) * 4 - 2,)


def blocks_in(row: Any, channels: int) -> list[Block] | str:
    """The blocks that a Sequential runs in order on images with so many channels, their forms found; or what it has else."""
    found: list[Block] = []
    for part in row.children():
        block = residual_of(part) or attention_of(part) or resize_of(part, channels)
        if block is None or block.widths[0] != channels:
            return f"a {type(part).__name__} of {channels} channels"
        form = heads_of(block) if isinstance(block, Attention) else way_of(block)
        if isinstance(block, Attention):
            if isinstance(form, str):
                return form
            block = dataclasses.replace(block, heads=form[0], new_order=form[1])
        elif form in WAYS:
            block = dataclasses.replace(block, way=form)
        else:
            return str(form)
        found.append(block)
        channels = block.widths[1]
    return found


def applied(block: Block, x: Parts, modulation: Tensor | None) -> Tensor:
    """The result of a block whose form was found; modulation is given to residual blocks."""
    if isinstance(block, Residual):
        assert modulation is not None
        return residual(block, WAYS[block.way], x, modulation)
    joined = x if isinstance(x, Tensor) else torch.cat(list(x), dim=1)
    if isinstance(block, Resize):
        return resized(block, block.way, joined)
    return attended(block, block.heads, block.new_order, joined)


def size_after(block: Block, size: Sequence[int]) -> tuple[int, ...]:
    way = "" if isinstance(block, Attention) else WAYS[block.way]
    return tuple({"up": 2 * n, "down": n // 2}.get(way, n) for n in size)


ADAPTERS = (ResidualAdapter(), AttentionAdapter())

"""Partial convolutions by themselves, in blocks with a norm and an activation, and in whole U-Nets of such blocks.

The layer, its forms and its op are in `partial`. What containers add, all of it exact algebra: norms fold into the
convolution (into its outputs where those are fewer than its filters), features are kept multiplied by their mask, all masks
are single planes, the two of a concatenation become one plane of counts (`_joined`), and activations run channels-last.

Everything is compared in `match`, on copies: a probe on the module itself would be remembered by layers that keep what they
derive from masks, and would give recipe weights to filters of ones that are parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.ops._shared import activate, empty_output
from inpaintrt.testing.recipe import image

from .ffc import Rule, first_broken, refuses_tensor
from .folding import batch_norm_affine, is_plain_batch_norm, memory_format_of
from .gated import named
from .partial import (
    Copies,
    Form,
    Layer,
    Pair,
    Weighed,
    agree,
    alone,
    call,
    convolved,
    core_of,
    form_of,
    is_crisp,
    key_of,
    layer_of,
    parts_of,
    promoted,
    refuses_call,
    refuses_mask,
    result_of,
    takes_mask,
    traits,
    trial_inputs,
    weigh,
)
from .thin import Thinly, ThinTwin
from .trial import Verdicts, same

T = TypeVar("T")


# ---- reading: blocks and U-Nets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A partial convolution, and what its block does to the features afterwards; absent parts as None."""

    module: Any
    layer: Layer
    norm: Any
    act: Any


def block_of(module: Any) -> Block | None:
    """None for what is no block of one partial convolution, at most one norm and at most one other layer."""
    if not isinstance(module, nn.Module) or layer_of(module) is not None or not takes_mask(type(module)):
        return None
    children = list(module.children())
    inner = [core_of(child) for child in children]
    layers = [child for child in inner if layer_of(child) is not None]
    norms = [child for child in children if isinstance(child, nn.modules.batchnorm._NormBase)]
    rest = [child for child, core in zip(children, inner, strict=True) if core not in layers and child not in norms]
    if len(layers) != 1 or len(children) < 2 or len(norms) > 1 or len(rest) > 1 or any(_has_weights(m) for m in rest):
        return None
    layer = layer_of(layers[0])
    assert layer is not None
    act = next((m for m in rest if not isinstance(m, nn.Identity)), None)
    return Block(layers[0], layer, next(iter(norms), None), act)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


@dataclass(frozen=True)
class Plan:
    """A U-Net's blocks from the image's size down."""

    encoder: list[Block]
    decoder: list[Block]

    @property
    def blocks(self) -> list[Block]:
        return [*self.encoder, *self.decoder]

    @property
    def unit(self) -> int:
        return 1 << len(self.encoder)


def plan_of(module: Any) -> Plan | None:
    """The blocks called enc1, dec1, … or enc_1, dec_1, …, in the module itself or in its encoder and decoder."""
    if not isinstance(module, nn.Module) or not takes_mask(type(module)):
        return None
    holders = [module, *(child for name, child in module.named_children() if name in ("encoder", "decoder"))]
    found: dict[tuple[str, int], Block] = {}
    for holder in holders:
        for name, child in holder.named_children():
            if match := re.fullmatch(r"(enc|dec)_?(\d+)", name):
                block = block_of(child) or _bare(child)
                if block is None:
                    return None
                found[match[1], int(match[2])] = block
    levels = range(1, len(found) // 2 + 1)
    if not levels or set(found) != {(part, level) for part in ("enc", "dec") for level in levels}:
        return None
    return Plan(*([found[part, level] for level in levels] for part in ("enc", "dec")))


def _bare(module: Any) -> Block | None:
    inner = core_of(module)
    layer = layer_of(inner)
    return None if layer is None else Block(inner, layer, None, None)


# ---- rules ----------------------------------------------------------------------------------------------------------


def _activation(block: Block) -> tuple[str, float | None]:
    return named(block.act) or ("none", None)


BLOCK_RULES: tuple[Rule, ...] = (
    (
        lambda b: b.norm is None or is_plain_batch_norm(b.norm, b.layer.conv.out_channels),
        "its norm is not a batch norm with running statistics",
    ),
    (lambda b: b.act is None or named(b.act) is not None, "its activation has no fused form"),
)


def _first_wrong(plan: Plan) -> str | None:
    """The sentence about blocks that make no U-Net of the known kind; None where they do."""
    first = plan.encoder[0].layer.conv.in_channels
    widths = [first, *(b.layer.conv.out_channels for b in plan.encoder)]
    for level, (down, up) in enumerate(zip(plan.encoder, plan.decoder, strict=True)):
        beneath = plan.decoder[level + 1] if level + 1 < len(plan.decoder) else plan.encoder[level]
        inputs = beneath.layer.conv.out_channels + widths[level]
        if down.layer.conv.in_channels != widths[level] or up.layer.conv.in_channels != inputs:
            return f"the channels of level {level + 1} are not those of a U-Net"
        if (down.layer.conv.stride, up.layer.conv.stride) != ((2, 2), (1, 1)):
            return f"level {level + 1} does not halve and double the size"
        for block in (down, up):
            conv = block.layer.conv
            reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            if list(conv.padding) != [r // 2 for r in reach] or any(r % 2 for r in reach):
                return f"a convolution of level {level + 1} changes the size by more than its stride"
    if plan.decoder[0].norm is not None or _activation(plan.decoder[0])[0] != "none":
        return "its last layer has a norm or an activation"
    return next((why for block in plan.blocks if (why := first_broken(BLOCK_RULES, block))), None)


def _parts_key(blocks: Sequence[Block]) -> tuple[Any, ...]:
    return tuple((key_of(b.module, b.layer), type(b.norm), _activation(b), b.layer.conv.stride) for b in blocks)


# ---- the fused forms ------------------------------------------------------------------------------------------------

_KEEP_ZERO = ("none", "relu", "leaky_relu", "elu", "silu", "tanh")


def _scaled(block: Block) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(scale, bias, shift) of a convolution with its norm: act(u · (ratio · scale · conv + bias) + shift)."""
    bias: Tensor | None = block.layer.conv.bias
    if block.norm is None:
        return None, bias, None
    scale, shift = batch_norm_affine(block.norm)
    return scale, None if bias is None else bias * scale, shift


def _finished(block: Block, y: Tensor, shift: Tensor | None) -> Tensor:
    """Shift and activation, in place: y belongs to nobody else."""
    if shift is not None:
        y = y.add_(shift.view(-1, 1, 1))
    name, alpha = _activation(block)
    if name == "relu":
        return y.relu_()
    return F.leaky_relu_(y, alpha) if name == "leaky_relu" and alpha is not None else activate(y, name, alpha)


def _block(block: Block, form: Form, x: Tensor, mask: Tensor) -> Pair:
    """Features as the block itself gives them, and the updated mask (1|B, 1, H', W')."""
    scale, bias, shift = _scaled(block)
    y, updated = alone(block.layer, form, x, mask, scale, bias)
    return _finished(block, y, shift), updated


@dataclass(frozen=True)
class Level:
    """What a block leaves to the next: features as it gives them, the same times their mask, and that as a plane."""

    features: Tensor
    masked: Tensor
    mask: Tensor


def _masked(block: Block, form: Form, x: Tensor, weighed: Weighed) -> Level:
    """Where the updated mask is 0 or 1, and the activation of 0 is 0, a shift that is masked with the rest does all of it."""
    scale, bias, shift = _scaled(block)
    if weighed.crisp and _activation(block)[0] in _KEEP_ZERO:
        both = shift if bias is None else bias if shift is None else bias + shift
        y, updated = convolved(block.layer.conv, form, x, weighed, scale, both)
        y = _finished(block, y, None)
        return Level(y, y, updated)
    y, updated = convolved(block.layer.conv, form, x, weighed, scale, bias)
    y = _finished(block, y, shift)
    return Level(y, y * updated, updated)


def _joined(form: Form, below: Level, beside: Level, crisp: bool) -> tuple[Tensor, Weighed]:
    """[below doubled | beside] and its mask as one plane, for features that are 0 where their own mask is.

    The plane counts how many channels are valid at a pixel, so that its sum over a window is the sum of all masks there.
    The op multiplies features by it, which is undone here beforehand.
    """
    features = _doubled_beside(below.masked, beside.masked)
    mask = F.interpolate(below.mask, scale_factor=2.0, mode="nearest")
    width, other = beside.masked.shape[1], beside.mask
    counts = mask * below.masked.shape[1] + (other * width if other.shape[1] == 1 else other.sum(1, keepdim=True))
    whole = features.shape[1] if form.scale == "window" else 1
    inverse = torch.where(counts > 0, whole / counts, torch.zeros_like(counts))
    weighed = weigh(form, counts, 1, crisp)
    return features.mul_(inverse.to(features.dtype)), weighed


def _doubled_beside(below: Tensor, beside: Tensor) -> Tensor:
    """[nearest-neighbour doubling of below | beside], in dtype and format of below, without the doubled map in between."""
    b, channels, h, w = below.shape
    features = empty_output((b, channels + beside.shape[1], 2 * h, 2 * w), below)
    features[:, :channels].unflatten(3, (w, 2)).unflatten(2, (h, 2)).copy_(below[:, :, :, None, :, None])
    features[:, channels:].copy_(beside)
    return features


def _unet(plan: Plan, forms: Sequence[Form], x: Tensor, mask: Tensor) -> Pair:
    """Image and updated mask (1|B, 1, H, W)."""
    encoder, decoder = forms[: len(plan.encoder)], forms[len(plan.encoder) :]
    crisp = is_crisp(mask)  # and so are all that follow from it
    if mask.shape[1] > 1 and mask.stride(1) == 0:
        mask = mask[:, :1]
    x = x.contiguous(memory_format=torch.channels_last)
    kept = [Level(x, x * mask, mask)]
    for block, form in zip(plan.encoder, encoder, strict=True):
        weighed = weigh(form, kept[-1].mask, block.layer.conv.in_channels, crisp)
        kept.append(_masked(block, form, kept[-1].features, weighed))
    below = kept.pop()
    for block, form in zip(reversed(plan.decoder), reversed(decoder), strict=True):
        features, weighed = _joined(form, below, kept.pop(), crisp)
        below = _masked(block, form, features, weighed)
    return promoted(plan.decoder[0].layer.conv, below.features), below.mask[: len(mask)].to(mask.dtype)


# ---- forms, found by trials -----------------------------------------------------------------------------------------


def _judge_block(module: Any) -> Form | str:
    block = block_of(module)
    assert block is not None
    form = form_of(block.module, block.layer)
    assert isinstance(form, Form)
    twin = Copies(module)
    twin.gain(lambda layer: form.scale)
    x, mask = (t.double().to(twin.device) for t in trial_inputs(block.layer.conv))
    if form.takes == "one":
        mask = mask[:, :1]
    try:
        exact = parts_of(twin.run(x, mask))
    except Exception as error:
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    with torch.no_grad():
        y, updated = _block(block_of(twin.copy(torch.float64)), form, x, mask)  # type: ignore[arg-type]
    got = parts_of(result_of(form, y, updated))
    if not agree(got, exact):
        return "it is not its partial convolution, then its norm, then its activation"
    return form


_block_verdicts: Verdicts[Form] = Verdicts(_judge_block)


def block_form(module: Any, block: Block | None) -> Form | str:
    """As `form_of`, of a block."""
    if block is None:
        return ""
    form = form_of(block.module, block.layer)
    if isinstance(form, str):
        return form
    if form.gives is None or hasattr(block.module, "last_size"):
        return ""  # the layer inside is swapped: what it keeps of masks is its own business
    return first_broken(BLOCK_RULES, block) or _block_verdicts.of(module, (*traits(module), *_parts_key([block])))


@dataclass(frozen=True)
class Net:
    """What a U-Net's forward takes and gives."""

    forms: tuple[Form, ...]
    takes_plane: bool
    """Masks of one channel, too."""
    gives: int
    """Channels of the mask it returns."""


def _forms_of(plan: Plan) -> tuple[Form, ...] | str:
    forms = [form_of(block.module, block.layer) for block in plan.blocks]
    for form in forms:
        if isinstance(form, str):
            return form
        if form.takes == "one" or form.gives is None:
            return "its layers take masks of one channel, or return none"
    return tuple(form for form in forms if isinstance(form, Form))


def _thin(module: Any, plan: Plan, forms: Sequence[Form]) -> ThinTwin:
    """As `Copies`: ones for the masks; where nothing is multiplied by the window, filters are larger by that."""
    ones = [block.layer.ones for block in plan.blocks if block.layer.ones is not None]
    weights = [block.layer.conv.weight for block in plan.blocks]
    windows = (w[0].numel() if form.scale == "one" else 1 for w, form in zip(weights, forms, strict=True))
    return ThinTwin(module, ones, dict(zip(weights, windows, strict=True)))


def _judge_net(module: Any) -> Net | str:
    plan = plan_of(module)
    assert plan is not None
    forms = _forms_of(plan)
    if isinstance(forms, str):
        return forms
    twin = _thin(module, plan, forms)
    channels, unit = plan.encoder[0].layer.conv.in_channels, plan.unit
    rows = unit if unit > 32 else 2 * unit  # the released networks' single level needs most of a second
    x = image("probe/image", 1, channels, rows, unit).double().to(twin.device) * 2 - 1
    soft = image("probe/holes", 1, channels, rows, unit).to(x)
    mask = torch.where(soft < 0.1, 0.0, torch.where(soft > 0.2, 1.0, soft))
    mask[..., rows // 8 : rows - rows // 4, unit // 4 :] = 0
    mask[..., rows - rows // 2 :, unit // 2 :] *= 0.01  # sums stay below 1, at several levels
    try:
        exact = parts_of(twin.run(x, mask))
    except Exception as error:
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    if exact is None or exact[1] is None:
        return "it does not return an image and a mask"
    gives = exact[1].shape[1]
    fused = twin.copy(torch.float64)
    own = plan_of(fused)
    assert own is not None
    with torch.no_grad(), Thinly():
        got, left = _unet(own, forms, x, mask)
        if not (same(got, exact[0]) and same(left.expand(-1, gives, -1, -1), exact[1])):
            return "it is not the U-Net that its parts suggest"
        plane = mask[:, :1]
        try:
            exact = parts_of(twin.run(x, plane))
        except Exception:  # it takes masks of all channels only
            return Net(forms, False, gives)
        got, left = _unet(own, forms, x, plane)
    takes_plane = exact is not None and exact[1] is not None and same(got, exact[0]) and exact[1].shape[1] == gives
    return Net(forms, takes_plane and same(left.expand(-1, gives, -1, -1), exact[1]), gives)  # type: ignore[index]


_net_verdicts: Verdicts[Net] = Verdicts(_judge_net)


def net_of(module: Any, plan: Plan | None) -> Net | str:
    """As `form_of`, of a U-Net."""
    if plan is None:
        return ""
    inside = {id(p) for block in plan.blocks for part in (block.module, block.norm) if part for p in part.parameters()}
    if any(id(p) not in inside for p in module.parameters()):
        return "it has weights beside its blocks"
    if any(hasattr(block.module, "last_size") for block in plan.blocks):
        return ""  # its layers are swapped one by one: what they keep of masks is their own business
    if why := _first_wrong(plan):
        return why
    forms = _forms_of(plan)
    if isinstance(forms, str):
        return forms
    return _net_verdicts.of(module, (*traits(module), len(plan.encoder), *_parts_key(plan.blocks)))


# ---- adapters -------------------------------------------------------------------------------------------------------


def _read(part: T | None, form: Any) -> T:
    """What `match` accepted."""
    if part is None or isinstance(form, str):
        raise RuntimeError(f"the module was changed after it was accelerated: {form or 'another structure'}")
    return part


class _Compared:
    """Compared in `match`; see the head of this file."""

    ops: tuple[str, ...] = ("partial_conv2d",)

    def probe_inputs(self, module: nn.Module) -> Iterator[tuple[Any, ...]]:
        yield from ()


class UNetAdapter(_Compared):
    """A whole U-Net of partial convolutions, called with an image and its mask."""

    name = "partialconv.unet"
    algorithm = "masks as planes, norms folded, channels-last"
    deep = True

    def match(self, module: nn.Module) -> str | None:
        net = net_of(module, plan_of(module))
        return net if isinstance(net, str) else None

    def forward(self, module: Any, x: Tensor, mask: Tensor) -> Pair:
        plan = plan_of(module)
        net = net_of(module, plan)
        plan = _read(plan, net)
        y, updated = _unet(plan, net.forms, x, mask)  # type: ignore[union-attr]
        left = updated.expand(-1, net.gives, -1, -1).contiguous()  # type: ignore[union-attr]
        return y.contiguous(memory_format=memory_format_of(x)), left

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        plan = plan_of(module)
        net = net_of(module, plan)
        if plan is None or isinstance(net, str):
            yield (plan and str(net)) or "it is no U-Net of partial convolutions any more"
            return
        if len(args) != 2:
            yield "called with other arguments than an image and a mask"
            return
        x, conv = args[0], plan.encoder[0].layer.conv
        if why := next(refuses_tensor(x, conv.weight, conv.in_channels), ""):
            yield why
            return
        yield from refuses_mask(x, args[1], *((1,) if net.takes_plane else ()), conv.in_channels)
        if len(args[1]) != len(x) and not all(form.shared for form in net.forms):
            yield "one mask for several samples, which its layers do not keep one"
        if any(n % plan.unit or n < 1 for n in x.shape[2:]):
            yield f"the size {tuple(x.shape[2:])} is not a multiple of {plan.unit}"


class BlockAdapter(_Compared):
    """A partial convolution with its norm and activation."""

    name = "partialconv.block"
    algorithm = "mask as one plane, norm folded"
    deep = False

    def match(self, module: nn.Module) -> str | None:
        form = block_form(module, block_of(module))
        return form if isinstance(form, str) else None

    def forward(self, module: Any, x: Tensor, mask: Tensor) -> Any:
        block = block_of(module)
        form = block_form(module, block)
        block = _read(block, form)
        return result_of(form, *_block(block, form, x, mask))  # type: ignore[arg-type]

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        block = block_of(module)
        form = block_form(module, block)
        if block is None or isinstance(form, str):
            yield str(form) or "it is no block of a partial convolution any more"
        else:
            yield from refuses_call(form, block.layer.conv, args)


class LayerAdapter(_Compared):
    """A partial convolution."""

    name = "partialconv.layer"
    algorithm = "mask as one plane"
    deep = False

    def match(self, module: nn.Module) -> str | None:
        form = form_of(module, layer_of(module))
        return form if isinstance(form, str) else None

    def forward(self, module: Any, x: Tensor, mask: Tensor) -> Any:
        layer = layer_of(module)
        form = form_of(module, layer)
        return call(module, _read(layer, form), form, x, mask)  # type: ignore[arg-type]

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        layer = layer_of(module)
        form = form_of(module, layer)
        if layer is None or isinstance(form, str):
            yield str(form) or "it is no partial convolution any more"
        else:
            yield from refuses_call(form, layer.conv, args)


ADAPTERS = (UNetAdapter(), BlockAdapter(), LayerAdapter())

"""Convolutions in models that nobody has seen: a kernel for those that have one, with what surrounds them where that is plain.

Three kinds of module, containers first, after the adapters of all families:

- a Sequential of nothing but plain layers (padding, convolutions, norms, activations, pooling): each run of padding,
  convolution, batch norm and activation in it becomes one call;
- a module that holds one convolution, perhaps its padding layer, a batch norm and an activation, under whatever names
  (`ConvModule`, `BasicConv`, `Conv2dBnAct`, …). In which order it calls them is in its code only, and found by trials
  (see `trial`);
- a convolution by itself.

Which convolutions these are is the op's decision: `ops.fused_conv2d` must have a kernel for the geometry (asked once, on an
image large enough) and for each call. Each call must also be one at which the engine is the faster one (`why_slower`): tiny
images, and few channels in channels-last, are the original's.

What is left alone: classes with a forward of their own, grouped and uneven convolutions, circular padding, and weights that
are not parameters (weight norm, spectral norm and pruning make them in a hook that a fused form would bypass).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.ops._shared import PADDING_MODES
from inpaintrt.runtime import registry
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.swap import is_insistent
from inpaintrt.testing.recipe import image

from .engine import convolved
from .ffc import Rule, first_broken, refuses_padding, refuses_tensor
from .folding import BATCH_NORMS, batch_norm_affine, fold_bias, fold_weight, is_plain_batch_norm
from .gated import Geometry, named
from .trial import Twin, Verdicts, same, settings_of

# ---- reading: one convolution ---------------------------------------------------------------------------------------

_AMPLE = 64
"""The side of an image on which a kernel that exists is offered."""


def class_of(module: nn.Module) -> type:
    """The class that a module was made of, swapped or not."""
    return getattr(type(module), "__inpaintrt_original__", type(module))


def is_convolution(module: Any) -> bool:
    """A Conv2d that computes what Conv2d does: of the class, or of one that changes nothing."""
    if not isinstance(module, nn.Conv2d):
        return False
    kind: Any = class_of(module)
    plain = (kind.forward, kind._conv_forward) == (nn.Conv2d.forward, nn.Conv2d._conv_forward)
    return plain and not isinstance(module, nn.modules.lazy.LazyModuleMixin)


def _sides(conv: Any) -> tuple[int, int] | None:
    """The padding (vertical, horizontal) of a convolution; None where a name stands for sides that differ."""
    if isinstance(conv.padding, tuple):
        return conv.padding  # type: ignore[no-any-return]
    if conv.padding == "valid":
        return 0, 0
    both = [rate * (kernel - 1) for rate, kernel in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(n % 2 for n in both) else (both[0] // 2, both[1] // 2)


def _is_square(conv: Any) -> bool:
    pairs = (conv.kernel_size, conv.stride, conv.dilation, _sides(conv) or (0, 1))
    return all(len({*pair}) == 1 for pair in pairs)


RULES: tuple[Rule, ...] = (
    (
        lambda conv: "weight" in conv._parameters and not hasattr(conv, "parametrizations"),
        "its weight is no parameter: a hook or a parametrization makes it (weight norm, spectral norm, pruning)",
    ),
    (lambda conv: conv.groups == 1, "it is grouped"),
    (_is_square, "its kernel, stride, padding or dilation is not square"),
    (lambda conv: conv.padding_mode in PADDING_MODES, "it pads circularly"),
)


def geometry_of(conv: Any, pad: Any = None) -> Geometry:
    """What `convolved` reads of a convolution (and of the padding layer before it)."""
    sides, mode = _sides(conv) or (0, 0), conv.padding_mode
    if pad is not None:
        sides, mode = (sides[0] + pad.padding[0],) * 2, _PADS[type(pad)]
    return Geometry(conv.kernel_size, conv.stride, sides, conv.dilation, mode if any(sides) else "zeros")


def _may_win(conv: Any) -> bool:
    return conv.stride == (1, 1) and conv.kernel_size in ((3, 3), (5, 5))


def is_winner(conv: Any) -> bool:
    """A float32 3×3 or 5×5 convolution of stride 1, by the rules, for which some backend of its device has a kernel."""
    if not _may_win(conv) or first_broken(RULES, conv):
        return False
    if conv.weight.is_meta or conv.weight.dtype != torch.float32:
        return False
    if bool((conv.weight == 1).all()):  # it counts pixels, and somebody will ask whether there are exactly none
        return False
    # A view of one number: kernels look at sizes here, and nobody reads the image.
    x = conv.weight.detach().new_empty(1).expand(1, conv.in_channels, _AMPLE, _AMPLE)
    geometry = geometry_of(conv)
    return geometry.padding[0] < _AMPLE and not why_no_kernel(geometry, x, conv.weight)


# Where the engine's convolution was not faster than torch's on one core with AVX-512; whoever makes it so removes the line.
_PIXELS = 16
"""Outputs per channel, below which most lanes are empty."""
_WORK = 2.5e5
"""Pixels times inputs times outputs, below which a call's fixed costs outweigh the rest."""
_INPUTS = 16
"""Channels, below which most lanes are empty, and torch's channels-last form has no layout to change."""


def why_slower(conv: Any, x: Tensor) -> str:
    """Why torch is expected to be faster at this call on a CPU; empty where it is not, and for what is to be compared."""
    if x.device.type != "cpu" or not _may_win(conv) or is_insistent():
        return ""  # what surrounds others in a sequence was found to pay for them
    reaches = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    sides = (max(n + 2 * p - r, 0) for n, p, r in zip(x.shape[2:], _sides(conv) or (0, 0), reaches, strict=True))
    pixels = len(x) * math.prod(sides)
    if pixels < _PIXELS or pixels * conv.in_channels * conv.out_channels < _WORK:
        return f"torch is faster at {conv.in_channels} to {conv.out_channels} channels on so small an input, {tuple(x.shape)}"
    if conv.in_channels < _INPUTS and result_format(x, conv.weight) is torch.channels_last:
        return f"torch is faster at {conv.in_channels} to {conv.out_channels} channels in channels-last"
    return ""


def why_no_kernel(geometry: Any, x: Tensor, weight: Tensor) -> str:
    """Every backend's first reason against computing this convolution; empty where one has a kernel."""
    args = registry.get("fused_conv2d").bind(
        x=x, weight=weight, stride=geometry.stride[0], padding=[*geometry.padding] * 2, dilation=geometry.dilation[0],
        padding_mode=geometry.padding_mode,
    )  # fmt: skip
    reasons = dispatchers["fused_conv2d"].reasons(args, x)
    if any(not sentences for sentences in reasons.values()):
        return ""
    return "; ".join(f"{backend}: {sentences[0]}" for backend, sentences in reasons.items()) or "there is no backend"


# ---- reading: runs of layers ----------------------------------------------------------------------------------------

_PADS = {nn.ZeroPad2d: "zeros", nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "replicate"}
_PLAIN: tuple[type, ...] = (
    *_PADS, nn.Conv2d, nn.ConvTranspose2d, *BATCH_NORMS, nn.InstanceNorm2d, nn.GroupNorm, nn.MaxPool2d, nn.AvgPool2d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.PReLU, nn.GELU, nn.ReLU6, nn.SELU, nn.Softplus,
    nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
)  # fmt: skip
"""Layers that may stand in a sequence: of torch, without children, from images to images."""


@dataclass(frozen=True)
class Run:
    """Layers that follow each other; with a convolution they are one call, without one they are called as they are."""

    layers: tuple[Any, ...]
    pad: Any = None
    conv: Any = None
    norm: Any = None
    act: tuple[str, float | None] = ("none", None)


def runs_of(layers: Sequence[Any]) -> list[Run]:
    """Layers in the order in which they are called, as runs: [padding] convolution [batch norm] [activation]."""
    rest, found = list(layers), []
    while rest:
        taken = [rest.pop(0)]
        pad = taken[0] if rest and _pads(taken[0], rest[0]) else None
        if pad is not None:
            taken.append(rest.pop(0))
        conv, norm, act = taken[-1], None, None
        if not is_convolution(conv) or first_broken(RULES, conv):
            found.append(Run(tuple(taken)))
            continue
        if rest and isinstance(rest[0], BATCH_NORMS) and is_plain_batch_norm(rest[0], conv.out_channels):
            norm = rest.pop(0)
            taken.append(norm)
        if rest and isinstance(rest[0], nn.Module) and (act := named(rest[0])) is not None:
            taken.append(rest.pop(0))
        found.append(Run(tuple(taken), pad, conv, norm, act or ("none", None)))
    return found


def _pads(pad: Any, conv: Any) -> bool:
    """Whether `pad` is a layer that pads evenly what `conv` can be told to pad."""
    if class_of(pad) not in _PADS or not is_convolution(conv) or first_broken(RULES, conv):
        return False
    sides = pad.padding if isinstance(pad.padding, tuple) else (pad.padding,)
    return len({*sides}) == 1 and sides[0] >= 0 and (isinstance(pad, nn.ZeroPad2d) or not any(_sides(conv) or ()))


def sequence_of(module: Any) -> list[Any] | None:
    """The layers of a Sequential of nothing but plain layers; None for what is none."""
    if not isinstance(module, nn.Sequential) or class_of(module).forward is not nn.Sequential.forward:  # type: ignore[attr-defined]
        return None
    layers = list(module)
    known = all(is_convolution(layer) or class_of(layer) in _PLAIN for layer in layers)
    return layers if known and any(map(is_convolution, layers)) else None


def has_winner(runs: Sequence[Run]) -> bool:
    return any(run.conv is not None and is_winner(run.conv) for run in runs)


def why_not_sequence(layers: Sequence[Any] | None) -> str | None:
    """As of all adapters: None for what the fused form covers, "" for what is none, else what is in the way."""
    if layers is None:
        return ""
    made = [layer for layer in layers if is_convolution(layer) and first_broken(RULES[:1], layer)]
    if not has_winner(runs_of([layer for layer in layers if layer not in made])):
        return ""
    return f"layer {layers.index(made[0])}: {RULES[0][1]}" if made else None


# ---- the fused form -------------------------------------------------------------------------------------------------


def like_channels_last(t: Tensor) -> bool:
    """Whether torch's convolution takes a 4-D tensor for channels-last: by strides, also of views and of single pixels."""
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = t.shape[dim], t.stride(dim)
        if size == 0 or stride < least or (dim == 1 and stride == 0) or (dim == 0 and least == t.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def result_format(x: Tensor, *weights: Tensor) -> torch.memory_format:
    """The memory format of torch's convolution of x, or of a chain of convolutions."""
    last = any(map(like_channels_last, (x, *weights)))
    return torch.channels_last if last else torch.contiguous_format


def fused(run: Run, x: Tensor) -> Tensor:
    """A run with a convolution as one call."""
    affine = None if run.norm is None else batch_norm_affine(run.norm)
    conv, layout = run.conv, result_format(x, run.conv.weight)
    weight, bias = fold_weight(conv.weight, affine), fold_bias(conv.bias, affine)
    y = convolved(geometry_of(conv, run.pad), x.contiguous(memory_format=layout), weight, bias, run.act)
    return y.contiguous(memory_format=layout)


def called(run: Run, x: Tensor) -> Tensor:
    """A run, fused where a kernel takes the call, else layer by layer; in float64, for the probe, always fused."""
    if run.conv is not None and (x.dtype == torch.float64 or not why_not_call(run, x)):
        return fused(run, x)
    for layer in run.layers:
        x = layer(x)
    return x


def why_not_call(run: Run, x: Tensor) -> str:
    """Why the convolution of a run is better computed by torch for this x."""
    geometry, size = geometry_of(run.conv, run.pad), x.shape[2:]
    if why := next(refuses_padding(geometry, size), ""):
        return why
    reach = geometry.dilation[0] * (geometry.kernel_size[0] - 1) + 1
    if min(size) < 1 or min(size) + 2 * geometry.padding[0] < reach:
        return f"the input of {tuple(size)} is smaller than the kernel"
    if torch.compiler.is_compiling():  # a program decides where it runs, inside the op
        return "" if x.dtype == torch.float32 else "another dtype than float32"
    if torch.is_autocast_enabled(x.device.type):
        return "under autocast, which has its own"
    if why := why_slower(run.conv, x):
        return why
    return why_no_kernel(geometry, x, run.conv.weight)


# ---- a block, whose order is found by trials ------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A module of one convolution by its parts, absent ones as None."""

    pad: Any
    conv: Any
    norm: Any
    act: Any


def block_of(module: Any) -> Block | None:
    """None for what is no block: it has other parts, or none beside its convolution."""
    if isinstance(module, (nn.Sequential, nn.Conv2d)) or not module._modules:
        return None
    parts: dict[str, Any] = {}
    for child in module.children():
        kind = class_of(child)
        role = (
            "conv" if is_convolution(child)
            else "pad" if kind in _PADS
            else "norm" if kind in BATCH_NORMS
            else "act" if named(child) is not None
            else "nothing" if kind in (nn.Identity, nn.Dropout, nn.Dropout2d)
            else ""
        )  # fmt: skip
        if not role or (role != "nothing" and role in parts):
            return None
        parts[role] = child
    if parts.get("conv") is None or any(True for _ in module.parameters(recurse=False)):
        return None
    return Block(*(parts.get(role) for role in ("pad", "conv", "norm", "act")))


CONVOLUTION, NORM, ACTIVATION = "convolution", "norm", "activation"
_UNTOLD: tuple[nn.Module, ...] = (nn.ReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(0.01), nn.ELU(), nn.SiLU())


@dataclass(frozen=True)
class Form:
    """In which order a block calls its parts, and the activation that only its code names."""

    order: tuple[str, ...]
    untold: int | None = None

    def layers(self, block: Block) -> list[Any]:
        act = block.act if self.untold is None else _UNTOLD[self.untold]
        parts = {CONVOLUTION: [block.pad, block.conv], NORM: [block.norm], ACTIVATION: [act]}
        return [layer for step in self.order for layer in parts[step] if layer is not None]


def _forms(block: Block) -> Iterator[Form]:
    """All orders of all parts, then of fewer; with a norm only where it has the channels for it."""
    conv, norm = block.conv, block.norm
    steps = (CONVOLUTION, *((NORM,) if norm is not None else ()), ACTIVATION)
    for count in range(len(steps), 0, -1):
        for order in itertools.permutations(steps, count):
            if CONVOLUTION not in order:
                continue
            if NORM in order:
                before = order.index(NORM) < order.index(CONVOLUTION)
                if not is_plain_batch_norm(norm, conv.in_channels if before else conv.out_channels):
                    continue
            if ACTIVATION in order and block.act is None:
                yield from (Form(order, n) for n in range(len(_UNTOLD)))
            else:
                yield Form(order)


def _judge(module: Any) -> Form | str:
    twin = Twin(module)
    conv = block_of(module).conv  # type: ignore[union-attr]
    x = _probe_image(conv.in_channels, 2 * conv.dilation[0] + 6).to(twin.device)
    try:
        exact = twin.run(x.double())
    except Exception:  # somebody else's code, which may want other arguments than its structure suggests
        return "it is not called with one image"
    for form in _forms(block_of(module)):  # type: ignore[arg-type]
        y = x.double()
        with torch.no_grad():
            for layer in form.layers(block_of(twin.copy(torch.float64))):  # type: ignore[arg-type]
                y = layer(y)
        if same(y, exact):
            return form
    return "it has the parts of a convolution with its norm and activation, but computes something else"


_verdicts: Verdicts[Form] = Verdicts(_judge)


def form_of(module: Any, block: Block) -> Form | str:
    """The form of a block, or why it has none."""
    conv, norm = block.conv, block.norm
    fits = norm is not None and (norm.num_features == conv.in_channels, norm.num_features == conv.out_channels)
    shape = (conv.padding, conv.padding_mode, conv.dilation, None if block.pad is None else block.pad.padding)
    act = None if block.act is None else named(block.act)
    parts = tuple(type(part) for part in (block.pad, norm, block.act))
    return _verdicts.of(module, (*settings_of(module), parts, shape, act, fits))


# ---- adapters -------------------------------------------------------------------------------------------------------


_LEAST = 15
"""The side of an image on which a kernel pays, without padding too."""
_BUDGET = 1e8
"""Flops of a probe of one convolution. A larger one is swapped without: nothing but the class of torch is in question."""


def _probe_image(channels: int, side: int) -> Tensor:
    return image("probe/convolution", 1, channels, side, side + 1) * 4 - 2


class _Layers:
    """What containers share: their layers, in the order in which they are called, or why there is no such order."""

    ops: tuple[str, ...] = ("fused_conv2d",)
    deep = False

    def layers(self, module: Any) -> list[Any] | str:
        raise NotImplementedError

    def forward(self, module: Any, x: Tensor) -> Tensor:
        layers = self.layers(module)
        if isinstance(layers, str):
            raise RuntimeError(f"the module was changed after it was accelerated: {layers}")
        for run in runs_of(layers):
            x = called(run, x)
        return x

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        layers = self.layers(module)
        if isinstance(layers, str):
            yield layers
            return
        conv = next(layer for layer in layers if is_convolution(layer))
        yield from refuses_tensor(args[0] if len(args) == 1 else None, conv.weight, _channels(layers))

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        layers = self.layers(module)
        assert not isinstance(layers, str)
        reach = max(layer.dilation[0] for layer in layers if is_convolution(layer))
        smaller = math.prod(_stride(layer) for layer in layers)
        yield (_probe_image(_channels(layers), max(_LEAST, 2 * smaller, 2 * reach + 2)),)


def _channels(layers: Sequence[Any]) -> int:
    """How many channels the first layer takes that asks for a number of them."""
    names = ("in_channels", "num_features", "num_channels")
    return next(int(getattr(layer, name)) for layer in layers for name in names if hasattr(layer, name))


def _stride(layer: Any) -> int:
    """By what a layer divides the size, as far as strides tell."""
    if isinstance(layer, nn.ConvTranspose2d) or not hasattr(layer, "stride"):
        return 1
    return layer.stride if isinstance(layer.stride, int) else max(layer.stride)


class SequenceAdapter(_Layers):
    """A Sequential of plain layers, among them a convolution that has a kernel."""

    name = "convolution.sequence"
    algorithm = "norms folded, padding and activation in the convolution"

    def match(self, module: nn.Module) -> str | None:
        return why_not_sequence(sequence_of(module))

    def layers(self, module: Any) -> list[Any] | str:
        layers = sequence_of(module)
        if layers is None:
            return "it is no sequence of plain layers any more"
        broken = (RULES[0][1] for layer in layers if is_convolution(layer) and first_broken(RULES[:1], layer))
        return next(broken, layers)


class BlockAdapter(_Layers):
    """A module of one convolution that has a kernel, with its norm and activation."""

    name = "convolution.block"
    algorithm = SequenceAdapter.algorithm

    def match(self, module: nn.Module) -> str | None:
        block = block_of(module)
        if block is None or not is_winner(block.conv):
            return ""  # what is in its way is said of the convolution itself
        return "" if isinstance(form_of(module, block), str) else None

    def layers(self, module: Any) -> list[Any] | str:
        block = block_of(module)
        if block is None:
            return "it is no convolution with its norm and activation any more"
        form = first_broken(RULES, block.conv) or form_of(module, block)
        return form if isinstance(form, str) else form.layers(block)


class ConvolutionAdapter:
    """A convolution by itself."""

    name = "convolution"
    ops: tuple[str, ...] = ("fused_conv2d",)
    algorithm = "Winograd convolution"
    deep = False

    def match(self, module: Any) -> str | None:
        if not is_convolution(module) or not _may_win(module):
            return ""
        return first_broken(RULES, module) or (None if is_winner(module) else "")

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return fused(Run((module,), conv=module), x)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        if not is_convolution(module) or (why := first_broken(RULES, module)):
            yield why or "it is no plain convolution any more"
            return
        x = args[0] if len(args) == 1 else None
        yield from refuses_tensor(x, module.weight, module.in_channels)
        if why := why_not_call(Run((module,), conv=module), x):  # type: ignore[arg-type]
            yield why

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        side = max(_LEAST, 2 * module.dilation[0] + 2)
        if 18 * module.in_channels * module.out_channels * side * side <= _BUDGET:
            yield (_probe_image(module.in_channels, side),)


ADAPTERS = (SequenceAdapter(), BlockAdapter(), ConvolutionAdapter())
GENERIC = frozenset(adapter.name for adapter in ADAPTERS)
"""Names of the adapters that are no family's: what they find inside a family's module says nothing of that module."""

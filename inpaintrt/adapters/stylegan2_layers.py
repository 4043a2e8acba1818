"""Layers of StyleGAN 2 as strangers write them: equalised convolutions, modulated ones, and those that make the picture.

$$ \\mathrm{clamp}\\big(g \\cdot \\mathrm{act}(d_o \\, \\mathrm{conv}(x \\cdot s, W) + \\nu n + b)\\big) $$

with s an affine map of a style vector, or 1, and with doubling or halving by a FIR filter in the same layer. Co-ModGAN, MAT
and FcF are built of them; names are NVIDIA's (`affine`, `resample_filter`, `noise_strength`), those of the ports that
nest small modules (`conv.modulation`, `noise.weight`, `activate.bias`), or MAT's mixture.

A module is read into its roles. Attributes rarely tell all that its code does: whether a bias that it holds is added (FcF's
is not), whether doubling convolves or correlates, whether weights are normalised first, where noise comes from. That is
found by trials (see `stylegan2_forms`). What is done is one op, `ops.modulated_conv2d`, with the module's own weight; no
filter is made for an image, and nothing between the convolution and the clamp is a pass of its own.

precision="bf16" leaves these layers in float32: Winograd's form is as fast, and rounding each image and weight costs a
third of the time of a network.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt import ops
from inpaintrt.ops.modulated_conv2d import LARGEST_FILTER, default_gain
from inpaintrt.runtime import registry
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.swap import is_insistent

from .convolution import class_of
from .ffc import refuses_tensor
from .folding import memory_format_of

# ---- reading: modules by role ---------------------------------------------------------------------------------------

_AFFINE = ("affine", "modulation")
_LARGEST_KERNEL = 7
PICTURE = 4
"""Channels of a picture: at most, where a layer makes one."""


@dataclass(frozen=True)
class Layer:
    """A layer by its parts, absent ones as None.

    weight: (Cout, Cin, k, k). taps: the filter around a change of size. affine: the map from styles to Cin factors.
    skip_taps: the filter by which a smaller picture would be doubled.
    """

    weight: Tensor
    bias: Tensor | None
    taps: Tensor | None
    affine: Any
    noise_strength: Tensor | None
    noise_const: Tensor | None
    skip_taps: Tensor | None
    takes: Parameters

    @property
    def weight_gain(self) -> float:
        """1/√fan_in, by which training equalises the learning rates of layers."""
        return 1 / math.sqrt(self.weight[0].numel())


class Noisy(Protocol):
    """What is asked of a layer, also of another family's, when its noise is found and its kernel looked for."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def taps(self) -> Tensor | None: ...
    @property
    def noise_const(self) -> Tensor | None: ...
    @property
    def takes(self) -> Parameters: ...


class Parameters(NamedTuple):
    """What a forward is called with: all names in their order, and the defaults of the optional ones."""

    names: tuple[str, ...]
    defaults: tuple[Any, ...]

    def given(self, args: Sequence[Any]) -> dict[str, Any]:
        """The arguments of a call by name, where they are not at their defaults."""
        required = len(self.names) - len(self.defaults)
        by_name = dict(zip(self.names, args, strict=False))
        usual = dict(zip(self.names[required:], self.defaults, strict=True))
        return {name: value for name, value in by_name.items() if name not in usual or value is not usual[name]}


_parameters: dict[type, Parameters | None] = {}


def parameters_of(module: nn.Module) -> Parameters | None:
    """None where a forward takes any number of arguments."""
    cls: Any = class_of(module)
    if cls not in _parameters:
        found = list(inspect.signature(cls.forward).parameters.values())[1:]
        plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)
        defaults = tuple(p.default for p in found if p.default is not p.empty)
        _parameters[cls] = Parameters(tuple(p.name for p in found), defaults) if plain else None
    return _parameters[cls]


def layer_of(module: Any) -> Layer | None:
    """None for what is no layer of this family."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return None
    parts = dict(module._modules)
    if isinstance(module, nn.Sequential):
        parts = _roles(list(module))
    conv: Any = module if "weight" in module._parameters else parts.get("conv")
    weight = None if conv is None or isinstance(conv, nn.modules.conv._ConvNd) else conv._parameters.get("weight")
    if weight is None or hasattr(conv, "parametrizations"):
        return None
    if weight.dim() == 5 and len(weight) == 1:
        weight = weight[0]
    if (
        weight.dim() != 4
        or weight.shape[2] != weight.shape[3]
        or weight.shape[2] not in range(1, _LARGEST_KERNEL + 1, 2)
    ):
        return None
    takes = parameters_of(module)
    affine = next((conv._modules[name] for name in _AFFINE if conv._modules.get(name) is not None), None)
    matrix = getattr(affine, "weight", None)
    if affine is None and conv is not module and not isinstance(module, nn.Sequential):
        return None
    if takes is None or (affine is not None and (not isinstance(matrix, Tensor) or matrix.dim() != 2)):
        return None
    if len(takes.names) - len(takes.defaults) != (1 if affine is None else 2):
        return None
    noise, activate, blur = parts.get("noise"), parts.get("activate"), parts.get("blur", conv._modules.get("blur"))
    bias = _own(module, "bias") if activate is None else _own(activate, "bias")
    layer = Layer(
        weight=weight,
        bias=None if bias is None or bias.numel() != len(weight) else bias.view(-1),
        taps=_own(conv, "resample_filter") if blur is None else _own(blur, "kernel"),
        affine=affine,
        noise_strength=_own(module, "noise_strength") if noise is None else _own(noise, "weight"),
        noise_const=_own(module, "noise_const"),
        skip_taps=_own(module, "resample_filter") if "upsample" not in parts else _own(parts["upsample"], "kernel"),
        takes=takes,
    )
    return layer if affine is not None or _speaks_of_equalising(module, layer) else None


def _roles(layers: list[Any]) -> dict[str, Any]:
    """A sequence of a filter, a convolution and its activation, as ports have it."""
    roles = {}
    for layer in layers:
        own = layer._parameters
        role = (
            "blur" if "kernel" in layer._buffers else "conv" if "weight" in own else "activate" if "bias" in own else ""
        )
        if not role or role in roles:
            return {}
        roles[role] = layer
    return roles if "activate" in roles else {}


def _own(module: Any, name: str) -> Tensor | None:
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found  # type: ignore[no-any-return]


_MARKS = frozenset(("weight_gain", "conv_clamp", "clamp", "act_gain"))


def _speaks_of_equalising(module: Any, layer: Layer) -> bool:
    """Without a style, a weight of four dimensions is too little to go by."""
    return isinstance(module, nn.Sequential) or layer.taps is not None or not _MARKS.isdisjoint(vars(module))


# ---- forms ----------------------------------------------------------------------------------------------------------

NOTHING, GIVEN, STORED, DRAWN = "nothing", "given", "stored", "drawn"
"""Where a layer's noise comes from."""
TENSOR = "a tensor"
HALF, SAME = "half", "same"
"""Sizes of the picture that a layer adds its own to."""


@dataclass(frozen=True)
class Form:
    """What a layer does that its tensors do not tell.

    flip: convolves (public doubling layers), else correlates. eps: of the demodulation; 0 where weights and styles are
    normalised before, from which it follows. activation: as ops have it; gain follows from it. clamp: the attribute that
    holds the bound, or the bound. taps_gain: what makes the filter's sum 1. noise: for each way to ask for noise (a value of
    `noise_mode`, None, a tensor) where it comes from. skips: sizes of the picture that it adds.
    """

    up: int = 1
    down: int = 1
    flip: bool = False
    demodulate: bool = False
    eps: float = 1e-8
    biased: bool = False
    activation: str = "none"
    clamp: str | float | None = None
    taps_gain: float = 1.0
    noise: tuple[tuple[str | None, str], ...] = ()
    skips: frozenset[str] = frozenset()
    scaled: bool = False
    """`gain` scales the result and the clamp."""


def bound_of(module: Any, form: Form) -> float | None:
    bound = getattr(module, form.clamp) if isinstance(form.clamp, str) else form.clamp
    return None if bound is None or bound < 0 else float(bound)


def kind_of_noise(given: dict[str, Any], layer: Noisy) -> str | None:
    """How a call asks for noise."""
    if "noise_mode" in layer.takes.names:
        at = layer.takes.names.index("noise_mode") - len(layer.takes.names)
        return given.get("noise_mode", layer.takes.defaults[at])  # type: ignore[no-any-return]
    return None if given.get("noise") is None else TENSOR


# ---- the fused form -------------------------------------------------------------------------------------------------


def styled(module: Any, layer: Layer, form: Form, args: Sequence[Any]) -> Tensor:
    """The layer's result for a call that was not refused."""
    given = layer.takes.given(args)
    x, gain = args[0], float(given.get("gain", 1.0))
    style = x.new_ones(len(x), x.shape[1]) if layer.affine is None else style_of(layer, args[1])
    if makes_picture(layer, form):
        bound = bound_of(module, form)
        y = _picture(layer, form, x, style, None if bound is None else bound * gain, gain)
    else:
        y = with_noise(module, layer, form, style, gain, x, noise_of(layer, form, x, given))
    below = _below(layer, given)
    if below is None:
        return y
    if below.shape != y.shape:
        below = ops.upfirdn2d(below, layer.skip_taps, up=2, padding=(2, 1, 2, 1), gain=4 * form.taps_gain)
    return y + below


def with_noise(
    module: Any, layer: Layer, form: Form, style: Tensor, gain: float, x: Tensor, noise: Tensor | None
) -> Tensor:
    """The layer of x (B, Cin, H, W) in styles (B, Cin), with this noise (1|B, 1, H', W') or none, nothing added to it."""
    bound = bound_of(module, form)
    return convolved(
        x, layer.weight, style, demodulate=form.demodulate, eps=form.eps, weight_gain=layer.weight_gain, up=form.up,
        down=form.down, flip_weight=form.flip, resample_filter=scaled(layer.taps, form.taps_gain), noise=noise,
        noise_strength=layer.noise_strength, bias=layer.bias if form.biased else None, activation=form.activation,
        gain=gain * default_gain(form.activation), clamp=None if bound is None else bound * gain,
    )  # fmt: skip


def makes_picture(layer: Layer, form: Form) -> bool:
    """A pointwise convolution with so few outputs that torch is the faster one, with nothing around it to fuse."""
    small = layer.affine is not None and layer.weight.shape[0] <= PICTURE and layer.weight.shape[2] == 1
    plain = not form.demodulate and form.activation == "none" and form.up == form.down == 1
    return small and plain and not any(source in (GIVEN, STORED, DRAWN) for _, source in form.noise)


def _picture(layer: Layer, form: Form, x: Tensor, style: Tensor, bound: float | None, gain: float) -> Tensor:
    filters = layer.weight.flatten(1) * (gain * layer.weight_gain * style)[:, None]
    if len(x) == 1 and memory_format_of(x) == torch.channels_last:  # a convolution, to which a `TiledMap` has an answer
        y = F.conv2d(x, filters[0, :, :, None, None])
    else:  # of others torch's convolution takes a copy in blocks of channels, and one image after the other
        y = torch.bmm(filters, x.flatten(2)).unflatten(2, x.shape[2:]).contiguous(memory_format=memory_format_of(x))
    if form.biased and layer.bias is not None:
        y = y + gain * layer.bias.view(-1, 1, 1)
    return y if bound is None else y.clamp(-bound, bound)


def convolved(x: Tensor, weight: Tensor, style: Tensor, *, noise: Tensor | None, **options: Any) -> Tensor:
    """`ops.modulated_conv2d`, noise and its strength together or not at all."""
    if noise is None:
        options["noise_strength"] = None
    return ops.modulated_conv2d(x, weight, style, noise=noise, **options)


def scaled(taps: Tensor | None, gain: float) -> Tensor | None:
    return taps if taps is None or gain == 1 else taps * gain


def style_of(layer: Layer, vector: Tensor) -> Tensor:
    with torch.autocast(vector.device.type, enabled=False):  # one rounded factor would be wrong in the whole channel
        return layer.affine(vector)  # type: ignore[no-any-return]


def noise_of(layer: Noisy, form: Form, x: Tensor, given: dict[str, Any]) -> Tensor | None:
    """The plane that a call adds, from where its form has it."""
    source = dict(form.noise)[kind_of_noise(given, layer)]
    if source == GIVEN:
        return given["noise"]  # type: ignore[no-any-return]
    if source == STORED:
        return None if layer.noise_const is None else layer.noise_const.view(1, 1, *layer.noise_const.shape[-2:])
    if source == DRAWN:
        return torch.randn(len(x), 1, *outputs(form, x), dtype=x.dtype, device=x.device)
    return None


def outputs(form: Form, x: Tensor) -> list[int]:
    """Rows and columns of the result."""
    return [n * form.up // form.down for n in x.shape[2:]]


BELOW = ("skip", "below")


def _below(layer: Layer, given: dict[str, Any]) -> Tensor | None:
    return next((given[name] for name in BELOW if given.get(name) is not None), None)


# ---- what is refused ------------------------------------------------------------------------------------------------

_KNOWN = frozenset(("noise_mode", "noise", "fused_modconv", "gain", *BELOW))
"""Parameters of forwards, besides the image and the style, of which it is known what they mean."""


def refuses(module: Any, layer: Layer, form: Form, args: Sequence[Any]) -> Iterator[str]:
    """Sentences against a call."""
    if why := against_call(layer, args, 1 if layer.affine is None else 2, _KNOWN):
        yield why
        return
    x, given = args[0], layer.takes.given(args)
    if layer.affine is not None and (why := _against_style(layer, x, args[1])):
        yield why
    if "gain" in given and not (form.scaled and isinstance(given["gain"], (int, float)) and given["gain"] > 0):
        yield f"called with gain {given['gain']!r}"
    yield from refuses_noise(layer, form, x, given)
    yield from _refuses_below(layer, form, x, given)
    if not makes_picture(layer, form):
        yield from refuses_kernel(layer, form, x)


def against_call(layer: Noisy, args: Sequence[Any], required: int, known: Collection[str]) -> str:
    """The sentence against the number of arguments, the image that comes first, autocast, or options that are not known."""
    names = layer.takes.names
    if not required <= len(args) <= len(names):
        return f"called with {len(args)} arguments"
    if why := next(refuses_tensor(args[0], layer.weight, layer.weight.shape[1]), ""):
        return why
    if torch.is_autocast_enabled(args[0].device.type):
        return "under autocast, which has its own"
    unknown = sorted(set(layer.takes.given(args)).difference(known, names[:required]))
    return f"called with {unknown[0]}" if unknown else ""


def _against_style(layer: Layer, x: Tensor, style: Any) -> str:
    width = layer.affine.weight.shape[1]
    if isinstance(style, Tensor) and (style.dtype, style.device, tuple(style.shape)) == (
        x.dtype,
        x.device,
        (len(x), width),
    ):
        return ""
    what = f"{tuple(style.shape)} {style.dtype}" if isinstance(style, Tensor) else type(style).__name__
    return f"its style is {what}, not ({len(x)}, {width}) in {x.dtype}"


def refuses_noise(layer: Noisy, form: Form, x: Tensor, given: dict[str, Any]) -> Iterator[str]:
    kind = kind_of_noise(given, layer)
    source = dict(form.noise).get(kind)
    size = outputs(form, x)
    if source is None:
        yield f"asked for noise by {kind!r}, for which no form is known"
    elif source == GIVEN:
        noise = given["noise"]
        accepted = [(n, 1, *size) for n in (1, len(x))]
        if not isinstance(noise, Tensor) or noise.dtype != x.dtype or tuple(noise.shape) not in accepted:
            yield f"its noise is not {accepted[-1]} in {x.dtype}"
    elif source == STORED and layer.noise_const is not None and list(layer.noise_const.shape[-2:]) != size:
        yield f"its noise is {tuple(layer.noise_const.shape)}, the result {tuple(size)}"
    elif source == DRAWN and x.dtype != torch.get_default_dtype():
        yield "its noise is drawn in another dtype than the image's"


def _refuses_below(layer: Layer, form: Form, x: Tensor, given: dict[str, Any]) -> Iterator[str]:
    below = _below(layer, given)
    if below is None:
        return
    whole = [len(x), len(layer.weight), *outputs(form, x)]
    shapes = {SAME: whole, HALF: [*whole[:2], *(n // 2 for n in whole[2:])]}
    if (
        not isinstance(below, Tensor)
        or below.dtype != x.dtype
        or list(below.shape) not in [shapes[k] for k in form.skips]
    ):
        yield "the picture that it is to add its own to has another shape or dtype than is known to be added"


def refuses_kernel(layer: Noisy, form: Form, x: Tensor) -> Iterator[str]:
    """Against a call for which no backend has a kernel, or torch is faster."""
    if torch.compiler.is_compiling():  # a program decides where it runs, inside the op
        return
    if min(x.shape[2:]) < form.down:
        yield f"the input of {tuple(x.shape[2:])} is too small to be halved"
        return
    if layer.taps is not None and max(layer.taps.shape) > LARGEST_FILTER:
        yield f"its filter has more than {LARGEST_FILTER} taps"
    reasons = dispatchers["modulated_conv2d"].reasons(_any_call(), x)
    if all(sentences for sentences in reasons.values()):
        yield "; ".join(f"{name}: {sentences[0]}" for name, sentences in reasons.items()) or "there is no backend"
    if why := why_slower(layer, form, x):
        yield why


@functools.cache
def _any_call() -> Any:
    """Arguments of the op that every kernel takes, so that device and dtype are what is asked about."""
    one = torch.ones(1, 1, 1, 1)
    return registry.get("modulated_conv2d").bind(x=one, weight=one, style=one[0, 0], padding=0)


# Where the op was not faster than the originals on one core with AVX-512; whoever makes it so removes the line.
_WORK = 2e6
"""Products, below which a call's fixed costs outweigh the rest."""


def why_slower(layer: Noisy, form: Form, x: Tensor) -> str:
    """Why the original is expected to be faster at this call on a CPU; empty where it is not, and for comparisons."""
    pixels = len(x) * math.prod(n // form.down for n in x.shape[2:])
    return _too_little(pixels, layer.weight, x)


def why_tiny(module: Any, args: Sequence[Any]) -> str:
    """`why_slower` of calls so small that nothing need be known of the layer but its weight: asked before all else, since
    finding out what a layer is takes longer than such a call does."""
    x = args[0] if args else None
    conv = module if "weight" in module._parameters else module._modules.get("conv")
    weight = None if conv is None else conv._parameters.get("weight")
    if not isinstance(x, Tensor) or x.dim() != 4 or weight is None or weight.dim() not in (4, 5):
        return ""
    if weight.shape[-4] <= PICTURE or torch.compiler.is_compiling():
        return ""
    return _too_little(len(x) * x.shape[2] * x.shape[3], weight, x)


def _too_little(pixels: int, weight: Tensor, x: Tensor) -> str:
    if pixels * weight.numel() >= _WORK or x.device.type != "cpu" or is_insistent():
        return ""
    return f"torch is faster at {(weight.shape[-3], weight.shape[-4])} channels on so small an input, {tuple(x.shape)}"

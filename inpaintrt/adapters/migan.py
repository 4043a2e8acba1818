"""MI-GAN: separable convolutions with StyleGAN 2's filters, noise and activation, and the generator that they make up.

A layer is: depthwise 3×3 with bias, activation, [filter and halve], 1×1, [double and filter], [noise], activation. All from
the 1×1 on, with the change of size, is one op, `ops.modulated_conv2d` without styles; the depthwise convolution is torch's,
its activation in place. Filters of the changes of size are weights of depthwise convolutions: that all channels have the
same one is looked at on each call.

torch's depthwise convolution is two to three times as fast in channels-last, and nothing else here minds. So the generator
is swapped, too, and does one thing: it runs its own code, in which the layers are fused, on a channels-last image, and
returns its result in the format that was asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.swap import disabled
from inpaintrt.testing.compare import close_to_truth
from inpaintrt.testing.recipe import image

from .convolution import class_of, is_convolution
from .ffc import refuses_tensor
from .folding import memory_format_of
from .stylegan2_layers import (
    GIVEN,
    NOTHING,
    STORED,
    TENSOR,
    Form,
    Parameters,
    against_call,
    bound_of,
    convolved,
    noise_of,
    parameters_of,
    refuses_kernel,
    refuses_noise,
)
from .trial import Twin, Verdicts, bare_copy, same, settings_of

_SIDE = 8
_STRONG = 2.0**12
_GAIN, _SLOPE = 2**0.5, 0.2
_CLAMP = 256.0

# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A separable convolution by its parts, absent ones as None.

    weight: (Cout, Cin, 1, 1), of the pointwise convolution. filter: the depthwise convolution that halves or follows zeros.
    kept: what the doubled image is multiplied by, 1 in even rows and columns, else 0.
    """

    depthwise: Any
    pointwise: Any
    filter: Any
    kept: Tensor | None
    noise_strength: Tensor | None
    noise_const: Tensor | None
    takes: Parameters

    @property
    def weight(self) -> Tensor:
        return self.pointwise.weight  # type: ignore[no-any-return]

    @property
    def taps(self) -> Tensor | None:
        """The filter as `ops.modulated_conv2d` takes it: it convolves, and doubles with a gain of 4."""
        if self.filter is None:
            return None
        return self.filter.weight[0, 0].flip([0, 1]) * (1.0 if self.kept is None else 0.25)


def layer_of(module: Any) -> Layer | None:
    """None for what is no separable convolution of this kind."""
    parts, takes = module._modules, parameters_of(module)
    first, second = parts.get("conv1"), parts.get("conv2")
    if takes is None or len(takes.names) - len(takes.defaults) != 1:
        return None
    if not (is_convolution(first) and is_convolution(second)):
        return None
    if not _is_depthwise(first, 3, 1, 1) or first.bias is None:
        return None
    if (second.kernel_size, second.stride, second.padding, second.groups) != ((1, 1), (1, 1), (0, 0), 1):
        return None
    halving, doubling = (getattr(parts.get(name), "filter", None) for name in ("downsample", "upsample"))
    if halving is not None and (
        doubling is not None or not _is_depthwise(halving, 4, 2, 1) or halving.bias is not None
    ):
        return None
    kept = None
    if doubling is not None:
        kept = parts["upsample"]._buffers.get("filter_const")
        if kept is None or kept.dim() != 4 or not _is_depthwise(doubling, 4, 1, 0) or doubling.bias is not None:
            return None
    return Layer(
        first, second, halving if doubling is None else doubling, kept, module._parameters.get("noise_strength"),
        module._buffers.get("noise_const"), takes,
    )  # fmt: skip


def _is_depthwise(conv: Any, kernel: int, stride: int, padding: int) -> bool:
    if not is_convolution(conv) or not conv.groups == conv.in_channels == conv.out_channels:
        return False
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    return geometry == ((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), "zeros")


# ---- the fused form -------------------------------------------------------------------------------------------------


def separated(module: Any, layer: Layer, form: Form, args: Sequence[Any]) -> Tensor:
    """The layer's result for a call that was not refused."""
    x, first, bound = args[0], layer.depthwise, bound_of(module, form)
    # A leaky ReLU passes positive factors on: its gain is in the convolution before it.
    y = F.conv2d(x, first.weight * _GAIN, first.bias * _GAIN, 1, 1, 1, x.shape[1])
    if y.requires_grad:
        y = F.leaky_relu(y, _SLOPE)
        y = y if bound is None else y.clamp(-bound, bound)
    else:
        F.leaky_relu_(y, _SLOPE)
        y = y if bound is None else y.clamp_(-bound, bound)
    gain = _GAIN if form.activation == "leaky_relu" else 1.0
    return convolved(
        y, layer.weight, y.new_ones(len(y), y.shape[1]), demodulate=False, up=form.up, down=form.down,
        resample_filter=layer.taps, noise=noise_of(layer, form, x, layer.takes.given(args)),
        noise_strength=layer.noise_strength, bias=layer.pointwise.bias, activation=form.activation, gain=gain, clamp=bound,
    )  # fmt: skip


def why_uneven(layer: Layer) -> str:
    """What of the values of a layer's filter stands against one filter for all channels, or an empty string."""
    if layer.filter is not None and not bool((layer.filter.weight == layer.filter.weight[:1]).all()):
        return "the filter of its change of size differs from channel to channel"
    if layer.kept is not None:
        even = layer.kept[..., ::2, ::2]
        if not bool((even == 1).all()) or int(layer.kept.count_nonzero()) != even.numel():
            return "its doubled image is kept in other places than even rows and columns"
    return ""


# ---- trials ---------------------------------------------------------------------------------------------------------


class _SmallTwin(Twin):
    """A `Twin` for images of `_SIDE` pixels, with one filter for all channels that no reflection leaves as it is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        layer = layer_of(self._single)
        if layer.noise_const is not None:  # type: ignore[union-attr]
            self._single._buffers["noise_const"] = _made("stored", _SIDE, _SIDE).to(self.device)
        if layer.kept is not None:  # type: ignore[union-attr]
            upsample: Any = self._single._modules["upsample"]
            upsample._buffers["filter_const"] = layer.kept[..., :_SIDE, :_SIDE].clone()  # type: ignore[union-attr, index]
        if layer.filter is not None:  # type: ignore[union-attr]
            with torch.no_grad():
                layer.filter.weight.copy_(_made("filter", 1, 1, 4, 4))  # type: ignore[union-attr]

    def ours(self, form: Form, *args: Any) -> Tensor:
        twin = self.copy(args[0].dtype)
        with torch.no_grad():
            return separated(twin, layer_of(twin), form, args)  # type: ignore[arg-type]


def _made(name: str, *shape: int) -> Tensor:
    return image(f"probe/migan/{name}", *shape) * 2 - 1


def _judge(module: Any) -> Form | str:
    twin = _SmallTwin(module)
    layer = layer_of(twin.copy(torch.float64))
    assert layer is not None
    if why := why_uneven(layer):
        return why
    up, down = 2 if layer.kept is not None else 1, 2 if layer.filter is not None and layer.kept is None else 1
    side = _SIDE * down // up
    x = _made("x", 2, layer.weight.shape[1], side, side).to(twin.device).double()
    noise = _made("noise", 2, 1, side * up // down, side * up // down).to(x)
    try:
        exact, clamped = twin.run(x), twin.run(x * _STRONG)
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    for source, clamp, activation in itertools.product((STORED, NOTHING), _clamps(module), ("leaky_relu", "none")):
        form = Form(up, down, activation=activation, clamp=clamp, noise=((None, source),))
        if source == STORED and layer.noise_const is None:
            continue
        if not same(twin.ours(form, x), exact) or not same(twin.ours(form, x * _STRONG), clamped):
            continue
        base = twin.run(x.float())
        with launches() as heard:
            got = twin.ours(form, x.float())
        verdict = close_to_truth(got, exact, base, numerics=numerics_of(heard))
        if not verdict.ok or got.stride() != base.stride():
            return f"in float32: {verdict.message}" if not verdict.ok else f"its result has strides {base.stride()}"
        given = Form(up, down, activation=activation, clamp=clamp, noise=(*form.noise, (TENSOR, GIVEN)))
        if layer.takes.names[1:2] == ("noise",) and same(twin.ours(given, x, noise), twin.run(x, noise)):
            return given
        return form
    return "it has the parts of MI-GAN's separable convolution, but computes something else"


def _clamps(module: Any) -> tuple[str | float | None, ...]:
    return ("clamp",) if isinstance(vars(module).get("clamp"), (int, float)) else (_CLAMP, None)


_verdicts: Verdicts[Form] = Verdicts(_judge)


def form_of(module: Any, layer: Layer | None) -> Form | str:
    """The form of a layer; "" for what is none, else a sentence says why there is no form."""
    if layer is None:
        return ""
    widths = {*layer.weight.shape[:2], *(() if layer.noise_const is None else layer.noise_const.shape)}

    def nameless(value: Any) -> Any:
        return "width" if type(value) is int and value > _SIDE and value in widths else value

    others = (part for part in module.modules() if not isinstance(part, nn.Conv2d))  # of those the geometry is known
    settings = tuple(tuple(map(nameless, settings_of(part))) for part in others)
    held = (layer.filter, layer.kept, layer.noise_strength, layer.noise_const, layer.pointwise.bias)
    return _verdicts.of(module, (settings, tuple(part is None for part in held)))


# ---- adapters -------------------------------------------------------------------------------------------------------


class SeparableAdapter:
    """A separable convolution, x → x."""

    name = "migan.separable"
    ops: tuple[str, ...] = ("modulated_conv2d",)
    algorithm = "the change of size, noise, activation and clamp in the pointwise convolution"
    deep = False
    named = True

    def match(self, module: nn.Module) -> str | None:
        layer = layer_of(module)
        form = form_of(module, layer)
        if layer is None or isinstance(form, str):
            return form  # type: ignore[return-value]
        return why_uneven(layer) or None

    def forward(self, module: Any, *args: Any) -> Tensor:
        layer = layer_of(module)
        form = form_of(module, layer)
        if layer is None or isinstance(form, str):
            raise RuntimeError(f"the module was changed after it was accelerated: {form or 'another structure'}")
        with torch.autocast(args[0].device.type, enabled=False):
            return separated(module, layer, form, args)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        layer = layer_of(module)
        form = form_of(module, layer)
        if layer is None or isinstance(form, str):
            yield form or "it is no separable convolution any more"  # type: ignore[misc]
            return
        if why := against_call(layer, args, 1, ("noise",)):
            yield why
            return
        if torch.compiler.is_compiling():
            yield "what it computes depends on the values of a filter, which a program cannot look at"
            return
        if why := why_uneven(layer):
            yield why
        x = args[0]
        if layer.kept is not None and [2 * n for n in x.shape[2:]] != list(layer.kept.shape[2:]):
            yield f"it doubles to {tuple(layer.kept.shape[2:])} only"
        yield from refuses_noise(layer, form, x, layer.takes.given(args))
        yield from refuses_kernel(layer, form, x)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: a layer is made for one size of images, so that a copy was compared in `match`, on smaller ones."""
        return iter(())


class GeneratorAdapter:
    """A generator of separable convolutions, of which nothing but the memory format of what it works on is changed."""

    name = "migan.generator"
    ops: tuple[str, ...] = ()
    algorithm = "channels-last inside"
    deep = True
    named = True
    holds = True

    def match(self, module: nn.Module) -> str | None:
        if module._modules.get("encoder") is None or module._modules.get("synthesis") is None:
            return ""
        first = _first_of(module)
        if first is None:
            return ""
        return None if self._runs(module, first) else "its code takes no channels-last images"

    def _runs(self, module: Any, first: Any) -> bool:
        """Whether its code, of which views are the question, runs on a channels-last image. Nothing is computed."""
        side = _side_of(module)
        if side is None or any(t.is_meta for t in module.parameters()):
            return False
        twin = bare_copy(module).to("meta")
        x = torch.empty(2, first.in_channels, side, side, device="meta", dtype=first.weight.dtype)
        try:
            with torch.no_grad(), disabled():
                plain, last = twin(x), twin(x.contiguous(memory_format=torch.channels_last))
        except Exception:  # somebody else's code
            return False
        return isinstance(plain, Tensor) and plain.dim() == 4 and last.shape == plain.shape and plain.is_contiguous()

    def forward(self, module: Any, x: Tensor, *args: Any) -> Tensor:
        kind: Any = class_of(module)
        with torch.autocast(x.device.type, enabled=False):  # also with precision="bf16", as in its layers
            return kind.forward(module, x.contiguous(memory_format=torch.channels_last), *args).contiguous()  # type: ignore[no-any-return]

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        first = _first_of(module)
        x = args[0] if args else None
        if first is None:
            yield "it is no generator of separable convolutions any more"
            return
        yield from refuses_tensor(x, first.weight, x.shape[1] if isinstance(x, Tensor) and x.dim() == 4 else 0)
        if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
            yield "under autocast, which has its own"
        if isinstance(x, Tensor) and x.dim() == 4 and memory_format_of(x) is torch.channels_last:
            yield "the image is in channels-last already"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: it has one size, the published one."""
        return iter(())


def _first_of(module: Any) -> Any:
    """The convolution that takes the image, in a generator whose encoder and synthesis hold separable convolutions."""
    blocks = [*module.encoder.children()], [*module.synthesis.children()]
    if not all(any(layer_of(part) is not None for block in half for part in block.children()) for half in blocks):
        return None
    found = (part for block in blocks[0] for name, part in block.named_children() if name == "fromrgb")
    first = next(found, None)
    return first if isinstance(first, nn.Conv2d) else None


def _side_of(module: Any) -> int | None:
    """The size of its images: that of the largest plane of noise."""
    planes = [t.shape[-1] for name, t in module.named_buffers() if name.endswith("noise_const")]
    return max(planes) if planes else None


ADAPTERS = (GeneratorAdapter(), SeparableAdapter())

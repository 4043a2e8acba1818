"""Gated convolutions as strangers write them: one convolution whose outputs are features and gates, or two convolutions.

$$ \\mathrm{act}(f) \\cdot \\sigma(g), \\qquad \\mathrm{norm}(\\mathrm{act}(f) \\cdot \\sigma(g)), \\qquad
   \\mathrm{act}(\\mathrm{norm}(f \\cdot \\sigma(g))) $$

A module is read into its roles: the convolution of the features, that of the gates (none where one convolution makes
both), a padding layer, an activation, a norm. Which of the three it computes, whether it calls the norm that it holds, and
whether a convolution without padding is padded as TensorFlow does, is in its code only, and found by trials (see `trial`).

What is done: one convolution with both sets of filters side by side, made on each call from the module's own weights; one
pass for activation, gate and product; norms and what comes after them as they are.

Spectral norm: where a wrapper of the convolution makes one power iteration in each forward and keeps its vectors, so does
the fused form; a torch parametrization is asked for its weight. The older `torch.nn.utils.spectral_norm` works by a hook,
which a fused form would bypass: refused. Layers that double the size by nearest neighbour hold a gated convolution, which
is what is swapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.ops._shared import activate, pad_sides
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.testing.compare import close_to_truth
from inpaintrt.testing.recipe import image

from .engine import convolved, gate_convolved
from .ffc import Rule, first_broken, refuses_padding, refuses_tensor
from .folding import joined_biases
from .trial import Twin, Verdicts, same, settings_of

# ---- reading: modules by role ---------------------------------------------------------------------------------------

_PADS = {
    nn.ZeroPad2d: "zeros",
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
    nn.CircularPad2d: "circular",
}
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_ALONE = frozenset(("", "conv", "conv2d"))
"""What state dicts call the one convolution; "" where the module is it."""
_ACTIVATIONS = ("activation", "act", "feat_act", "feature_activation")


@dataclass(frozen=True)
class Layer:
    """A gated convolution by its parts, absent ones as None."""

    features: Any
    gates: Any
    """None: one convolution makes both, or there are no gates."""
    pad: Any
    act: Any
    """A module, a function or None; `...` where no attribute tells."""
    norm: Any
    wrapped: bool
    """Its convolutions are inside wrappers that make their weights (spectral norm)."""
    plain: bool
    """It has no gates: a convolution and its activation."""

    @property
    def convolutions(self) -> list[Any]:
        return [self.features] if self.gates is None else [self.features, self.gates]

    @property
    def outputs(self) -> int:
        return sum(conv.out_channels for conv in self.convolutions)


def _inside(module: Any) -> tuple[Any, Any, bool] | None:
    """(convolution, padding layer, wrapped) of what is a convolution, or no more than one in a shell; else None."""
    if isinstance(module, nn.Conv2d):
        return module, None, False
    conv = getattr(module, "module", None)
    if isinstance(conv, nn.Conv2d) and hasattr(conv, "weight_bar"):
        return conv, None, True
    conv, pad = getattr(module, "conv", None), getattr(module, "padding_layer", None)
    if isinstance(conv, nn.Conv2d) and all(m in (conv, pad) or isinstance(m, nn.Identity) for m in module.children()):
        return conv, pad, False
    return None


def layer_of(module: Any) -> Layer | None:
    """None for what is no gated convolution."""
    children = {} if isinstance(module, nn.Conv2d) else dict(module.named_children())
    found = {"": (module, None, False)} if isinstance(module, nn.Conv2d) else {}
    for name, child in children.items():
        inside = _inside(child)
        if inside is not None:
            found[name] = inside
    gates = [name for name in found if "mask" in name or "gate" in name] if len(found) == 2 else []
    if len(found) != 1 + len(gates) or (not gates and not _ALONE.issuperset(found)):
        return None
    (features,) = [name for name in found if name not in gates]
    conv, pad, wrapped = found[features]
    norm, act = None, ...
    for child in children.values():
        pad = child if isinstance(child, tuple(_PADS)) else pad
        norm = child if isinstance(child, _NORMS) else norm
    for name in reversed(_ACTIVATIONS):
        act = getattr(module, name, act)
    plain = not _speaks_of_gates(module, gates)
    if plain and not _is_activated(children, conv, pad, act):
        return None
    return Layer(
        features=conv,
        gates=found[gates[0]][0] if gates else None,
        pad=pad,
        act=None if isinstance(act, nn.Identity) else act,
        norm=norm,
        wrapped=wrapped,
        plain=plain,
    )


def _speaks_of_gates(module: Any, gates: Sequence[str]) -> bool:
    """Beside its convolutions: a sigmoid, as a child or in its forward, and where one convolution makes both, two halves."""
    original = getattr(type(module), "__inpaintrt_original__", type(module))
    names = getattr(getattr(original.forward, "__code__", None), "co_names", ())
    sigmoid = "sigmoid" in names or any(isinstance(child, nn.Sigmoid) for child in module.children())
    return sigmoid and (len(gates) > 0 or "split" in names or "chunk" in names)


def _is_activated(children: dict[str, nn.Module], conv: Any, pad: Any, act: Any) -> bool:
    """No more than a convolution, its padding and its activation."""
    alone = all(child in (conv, pad, act) or isinstance(child, nn.Identity) for child in children.values())
    return alone and conv in children.values() and act is not ... and (named(act) or ("none",))[0] != "none"


def named(act: Any) -> tuple[str, float | None] | None:
    """An activation's name and parameter as ops have them; None for one that they have not."""
    if act is None:
        return "none", None
    if isinstance(act, nn.ELU):
        return "elu", float(act.alpha)
    if isinstance(act, nn.LeakyReLU):
        return "leaky_relu", float(act.negative_slope)
    for kind, name in ((nn.ReLU, "relu"), (nn.SiLU, "silu"), (nn.Sigmoid, "sigmoid"), (nn.Tanh, "tanh")):
        if isinstance(act, kind):
            return name, None
    return _FUNCTIONS.get(act) if callable(act) and not isinstance(act, nn.Module) else None


_FUNCTIONS: dict[Any, tuple[str, float | None]] = {
    F.elu: ("elu", 1.0), F.leaky_relu: ("leaky_relu", 0.01), F.silu: ("silu", None), F.relu: ("relu", None),
    torch.relu: ("relu", None), F.tanh: ("tanh", None), torch.tanh: ("tanh", None), F.sigmoid: ("sigmoid", None),
    torch.sigmoid: ("sigmoid", None),
}  # fmt: skip


# ---- rules ----------------------------------------------------------------------------------------------------------

_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "in_channels", "out_channels")


def _is_plain(conv: Any) -> bool:
    square = all(
        isinstance(v, tuple) and len({*v}) == 1 for v in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    )
    return conv.groups == 1 and square


def _pads_plainly(layer: Layer) -> bool:
    if layer.pad is None:
        return True
    sides = layer.pad.padding
    return isinstance(layer.pad, tuple(_PADS)) and len({*sides}) == 1 and layer.features.padding == (0, 0)


RULES: tuple[Rule, ...] = (
    (lambda f: all(map(_is_plain, f.convolutions)), "its convolutions are grouped, not square, or padded by a name"),
    (
        lambda f: f.gates is None or all(getattr(f.gates, n) == getattr(f.features, n) for n in _GEOMETRY),
        "its convolutions of features and gates differ in geometry",
    ),
    (
        lambda f: not any(hasattr(conv, "weight_orig") for conv in f.convolutions),
        "its weights are made by a hook (torch.nn.utils.spectral_norm; the parametrization of that name has none)",
    ),
    (_pads_plainly, "its padding differs from side to side, or adds to that of its convolution"),
    (lambda f: f.act is ... or named(f.act) is not None, "its activation has no fused form"),
)  # fmt: skip


# ---- the form, found by trials --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What a module computes of its convolution's outputs."""

    order: str
    act: tuple[str, float | None]
    like_tensorflow: bool


PLAIN, GATED, THEN_NORM, GATE_FIRST = "act(f)", "act(f)·σ(g)", "norm(act(f)·σ(g))", "act(norm(f·σ(g)))"
_UNTOLD: tuple[tuple[str, float | None], ...] = (("elu", 1.0), ("relu", None), ("leaky_relu", 0.2), ("none", None))


def _judge(module: Any) -> Form | str:
    twin = Twin(module)
    x = next(probe_inputs(module)).to(twin.device)
    try:
        exact, base = twin.run(x.double()), twin.run(x)
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    fresh = twin.copy(torch.float64)
    for form in _forms(layer_of(fresh)):
        with torch.no_grad():
            fresh = twin.copy(torch.float64)
            if not same(gated(layer_of(fresh), form, x.double()), exact):
                continue
            with launches() as heard:
                got = gated(layer_of(twin.copy(torch.float32)), form, x)
        verdict = close_to_truth(got, exact, base, numerics=numerics_of(heard))
        return form if verdict.ok else f"in float32: {verdict.message}"
    tried = (PLAIN,) if layer_of(fresh).plain else (GATED, THEN_NORM, GATE_FIRST)  # type: ignore[union-attr]
    return f"it has the parts of a {'' if len(tried) == 1 else 'gated '}convolution, but computes none of {', '.join(tried)}"


def _forms(layer: Any) -> Iterator[Form]:
    conv = layer.features
    bare = conv.padding == (0, 0) and layer.pad is None and conv.kernel_size[0] > 1
    acts = _UNTOLD if layer.act is ... else (named(layer.act) or ("none", None),)
    gates = not layer.plain and (layer.gates is not None or conv.out_channels % 2 == 0)
    orders = (*((GATED, THEN_NORM, GATE_FIRST) if layer.norm is not None else (GATED, GATE_FIRST)),) if gates else ()
    for padding in (True, False) if bare else (False,):
        for act in acts:
            for order in (*orders, *((PLAIN,) if layer.gates is None else ())):
                yield Form(order, act, padding)
        if (
            not gates and not layer.plain and ("none", None) not in acts
        ):  # the layer that makes the picture may leave its activation out
            yield Form(PLAIN, ("none", None), padding)


_verdicts: Verdicts[Form] = Verdicts(_judge)


def form_of(module: Any, layer: Layer | None) -> Form | str:
    """The form of a gated convolution; "" for what is none, else a sentence says why there is no form."""
    if layer is None:
        return ""
    if why := first_broken(RULES, layer):
        return why
    conv = layer.features
    parts = tuple(type(part) for part in (conv, layer.gates, layer.pad, layer.act, layer.norm))
    shape = (conv.kernel_size, conv.stride, conv.dilation, conv.padding, conv.padding_mode, layer.outputs % 2)
    act = None if layer.act is ... else named(layer.act)
    return _verdicts.of(
        module, (*settings_of(module), parts, shape, act, layer.wrapped, layer.gates is None, layer.plain)
    )


# ---- the fused form -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """What `convolved` reads of a convolution."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    padding_mode: str


def geometry_of(layer: Layer, form: Form) -> Geometry:
    """The convolution with its padding layer; TensorFlow's padding, where it is the same on all sides, is its own."""
    conv, padding, mode = layer.features, layer.features.padding, layer.features.padding_mode
    if layer.pad is not None:
        padding, mode = layer.pad.padding[:2], next(m for kind, m in _PADS.items() if isinstance(layer.pad, kind))
    elif form.like_tensorflow and conv.stride == (1, 1) and conv.kernel_size[0] % 2:
        padding = (conv.dilation[0] * (conv.kernel_size[0] - 1) // 2,) * 2
    return Geometry(conv.kernel_size, conv.stride, tuple(padding), conv.dilation, mode)


def gated(layer: Any, form: Form, x: Tensor) -> Tensor:
    """The layer's output by its parts, x (B, C, H, W)."""
    geometry = geometry_of(layer, form)
    if form.like_tensorflow and geometry.padding == (0, 0):
        conv = layer.features
        top, left, bottom, right = pad_sides("tf_same", x.shape[2:], conv.kernel_size, conv.stride[0], conv.dilation[0])
        x = F.pad(x, (left, right, top, bottom))
    weights = [_weight(conv, layer.wrapped) for conv in layer.convolutions]
    biases = [conv.bias for conv in layer.convolutions]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = biases[0] if len(biases) == 1 else joined_biases(biases, [len(w) for w in weights])
    name, alpha = form.act
    if form.order == PLAIN:
        return convolved(geometry, x, weight, bias, form.act)
    y = gate_convolved(geometry, x, weight, bias, ("none", None) if form.order == GATE_FIRST else form.act)
    if form.order == GATE_FIRST:
        return activate(y if layer.norm is None else layer.norm(y), name, alpha)
    return layer.norm(y) if form.order == THEN_NORM else y  # type: ignore[no-any-return]


def _weight(conv: Any, wrapped: bool) -> Tensor:
    return spectral_weight(conv) if wrapped else conv.weight


def spectral_weight(conv: Any) -> Tensor:
    """The weight of a convolution over its largest singular value, estimated by one power iteration, whose vectors it keeps."""
    bar, u, v = conv.weight_bar, conv.weight_u, conv.weight_v
    matrix = bar.flatten(1)
    with torch.no_grad():
        v.copy_(_unit(matrix.T.mv(u)))
        u.copy_(_unit(matrix.mv(v)))
    return bar / u.detach().dot(matrix.mv(v.detach()))  # type: ignore[no-any-return]


def _unit(t: Tensor) -> Tensor:
    return t / (t.norm() + 1e-12)


def probe_inputs(module: Any) -> Iterator[Tensor]:
    """One input on which every tap of the kernel is seen, large enough for the padding and for a 3×3 kernel's tiles."""
    layer = layer_of(module)
    assert layer is not None
    conv = layer.features
    pad = max(conv.padding[0], *(layer.pad.padding if layer.pad is not None else (0,)), conv.dilation[0])
    height = max(13, pad + 2)
    yield image("probe/gated", 1, conv.in_channels, height, height + 1) * 4 - 2


# ---- adapter --------------------------------------------------------------------------------------------------------


class GatedAdapter:
    """A gated convolution, in one or two convolutions."""

    name = "deepfill.gated"
    ops: tuple[str, ...] = ("gated_conv2d", "gated_activation", "fused_conv2d")
    algorithm = "one convolution, activation and gate in its epilogue"
    deep = False
    plain = False

    def match(self, module: nn.Module) -> str | None:
        layer = layer_of(module)
        if layer is None or layer.plain != self.plain:
            return ""
        form = form_of(module, layer)
        return form if isinstance(form, str) else None

    def forward(self, module: Any, x: Tensor) -> Tensor:
        layer = layer_of(module)
        form = form_of(module, layer)
        if layer is None or isinstance(form, str):
            raise RuntimeError(f"the module was changed after it was accelerated: {form or 'another structure'}")
        return gated(layer, form, x)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        layer = layer_of(module)
        form = form_of(module, layer)
        if layer is None or isinstance(form, str):
            yield form or "it is no gated convolution any more"  # type: ignore[misc]
            return
        x, conv = args[0] if len(args) == 1 else None, layer.features
        yield from refuses_tensor(x, conv.weight_bar if layer.wrapped else conv.weight, conv.in_channels)
        yield from _refuses_size(geometry_of(layer, form), x.shape[2:], form)  # type: ignore[union-attr]
        if layer.wrapped and torch.compiler.is_compiling():
            yield "its spectral norm changes its vectors in each forward, which is left to the original's graph"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        layer = layer_of(module)
        if (
            layer is not None and not layer.wrapped
        ):  # one that changes in each forward was compared in `match`, on copies
            for x in probe_inputs(module):
                yield (x,)


def _refuses_size(geometry: Geometry, size: Sequence[int], form: Form) -> Iterator[str]:
    yield from refuses_padding(geometry, size)
    reach = geometry.dilation[0] * (geometry.kernel_size[0] - 1) + 1
    if min(size) < 1 or (not form.like_tensorflow and min(size) + 2 * geometry.padding[0] < reach):
        yield f"the input of {tuple(size)} is smaller than the kernel"


class ConvolutionAdapter(GatedAdapter):
    """A convolution and its activation, without gates: DeepFill v1's layers."""

    name = "deepfill.convolution"
    ops: tuple[str, ...] = ("fused_conv2d",)
    algorithm = "activation in the convolution's epilogue"
    plain = True


ADAPTERS = (GatedAdapter(), ConvolutionAdapter())

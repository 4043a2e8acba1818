"""GLCIC's completion network as strangers write it: a chain of seventeen convolutions, swapped as a whole.

The two public layouts are read by the names that their state dicts fix: all layers in one module by the paper's numbers
(`conv1` … `conv17`, `deconv13`, `deconv15`, `bn1` …), or encoder, neck of dilated layers and decoder (`encoder.enc1.conv`,
…). Whether a norm comes before or after its activation and what becomes of the last layer's output is in the code only, and
found by trials (see `trial`).

What is done, channels-last from end to end, converted once at each border:

- norm, then activation (mmagic): the norm folds into the convolution before it;
- activation, then norm (otenim): a batch norm multiplies by s and adds t. Under the next layer's zero padding t cannot be
  folded forward: zeros are padded after the norm, and stay zeros. But an activation with f(a·x) = a·f(x) for a ≥ 0 lets
  |s| pass, so |s| folds into the convolution before it; the sign of s, which is exact, goes into the weights of the next
  one; and what is left, ±t added to the activation's output, is a residual that the convolution adds in passing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.models.glcic import PLACES
from inpaintrt.runtime.swap import disabled
from inpaintrt.testing.recipe import image

from .convolution import class_of, result_format
from .engine import activated, convolved
from .ffc import Rule, first_broken, refuses_tensor
from .folding import Affine, batch_norm_affines, fold_bias, is_plain_batch_norm
from .gated import named
from .trial import Twin, Verdicts, same, settings_of

# ---- reading --------------------------------------------------------------------------------------------------------

Activation = tuple[str, float | None]
_RELU: Activation = ("relu", None)
_IN_PLACE = nn.ReLU()
"""The same, as a module: `activated` writes it over its input."""
_DIVISOR = 4


@dataclass(frozen=True)
class Stage:
    """A layer by its parts; the norm is None where it has none."""

    conv: Any
    norm: Any
    act: Activation | None
    """None where no attribute tells, or where it has no fused form."""
    told: bool
    """Whether it has an activation among its attributes."""


def stages_of(module: Any) -> list[Stage] | None:
    """The layers in order; None for what is no such network."""
    for port, places in PLACES.items():
        found = []
        for number, place in sorted(places().items()):
            conv = _at(module, place.conv)
            norm = _at(module, place.norm) if place.norm else None
            if not isinstance(conv, nn.ConvTranspose2d if number in (13, 15) else nn.Conv2d):
                break
            shell, _, _ = place.conv.rpartition(".")
            act = _at(module, f"{shell}.activate" if port == "mma" else f"act{number}")
            act = None if isinstance(act, nn.Identity) else act
            found.append(Stage(conv, norm, None if act is None else named(act), act is not None))
        if len(found) == 17:
            return found
    return None


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        children = getattr(module, "_modules", {})
        module = children.get(name)
    return module


def _is_square(conv: Any) -> bool:
    pairs = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return all(isinstance(pair, tuple) and len({*pair}) == 1 for pair in pairs)


_STAGE_RULES: tuple[Rule, ...] = (
    (lambda s: s.conv.groups == 1 and _is_square(s.conv), "is grouped, not square, or padded by a name"),
    (lambda s: s.conv.padding_mode == "zeros", "does not pad with zeros"),
    (
        lambda s: "weight" in s.conv._parameters and not hasattr(s.conv, "parametrizations"),
        "has a weight that is no parameter: a hook or a parametrization makes it",
    ),
    (
        lambda s: class_of(s.conv).forward in (nn.Conv2d.forward, nn.ConvTranspose2d.forward),  # type: ignore[attr-defined]
        "has a forward of its own",
    ),
    (
        lambda s: s.norm is None or is_plain_batch_norm(s.norm, s.conv.out_channels),
        "has another norm than a batch norm with running statistics",
    ),
    (lambda s: not s.told or s.act is not None, "has an activation without a fused form"),
)


def _why_not(stages: list[Stage]) -> str | None:
    for number, stage in enumerate(stages, 1):
        if why := first_broken(_STAGE_RULES, stage):
            return f"layer {number} {why}"
    if any(stage.norm is None for stage in stages[:-1]) != all(stage.norm is None for stage in stages[:-1]):
        return "some of its layers have a norm and some have none"
    if stages[-1].norm is not None:
        return "its last layer has a norm"
    return None


# ---- the form, found by trials --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What is in a network's code only."""

    norm_first: bool
    end: str
    """Of the last layer: an activation by name, or the range to which it is clipped."""


_CLIPPED = {"clipped to [-1, 1]": -1.0, "clipped to [0, 1]": 0.0}
_ENDS = ("sigmoid", *_CLIPPED, "tanh", "none")


def _judge(module: Any) -> Form | str:
    twin = Twin(module)
    stages = stages_of(module)
    assert stages is not None
    x = _probe_input(stages).to(twin.device)
    try:
        exact, (ramp, bounded) = twin.run(x.double()), _run_on_a_ramp(twin.copy(torch.float32), x)
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    double = stages_of(twin.copy(torch.float64))
    assert double is not None
    for end in (end for end in _ENDS if same(ended(end, ramp), bounded)):
        for norm_first in (False, True):
            with torch.no_grad():
                logits = chain(double, norm_first, x.double())
            if same(ended(end, logits), exact):
                return Form(norm_first, end)
    return "it has the layers of a GLCIC network, but computes something else"


def _run_on_a_ramp(network: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Values from -3 to 3 in place of the last layer's output, and what the network makes of them.

    Trial weights may well give no value that is clipped.
    """
    stages = stages_of(network)
    assert stages is not None
    ramp = torch.linspace(-3, 3, 3 * x.shape[2] * x.shape[3], device=x.device).view(1, 3, *x.shape[2:])
    stages[-1].conv.register_forward_hook(lambda *_: ramp.clone())
    with torch.no_grad(), disabled(), torch.random.fork_rng(devices=[]):
        return ramp, network.forward(x)


def _probe_input(stages: list[Stage]) -> Tensor:
    """Sixteen pixels: four at the bottleneck, so that the first dilated layer sees beyond its centre."""
    x = image("probe/image", 1, stages[0].conv.in_channels, 16, 16)
    x[:, -1] = (x[:, -1] > 0.5).float()
    return x


_verdicts: Verdicts[Form] = Verdicts(_judge)


def form_of(module: Any, stages: list[Stage] | None) -> Form | str:
    """The form of such a network; "" for what is none, else a sentence says why there is no form."""
    if stages is None:
        return ""
    if why := _why_not(stages):
        return why
    own = (part for part in module.modules() if not class_of(part).__module__.startswith("torch.nn"))
    shapes = tuple((s.conv.stride, s.conv.padding, s.conv.dilation, s.norm is None, s.act) for s in stages)
    return _verdicts.of(module, (*(settings_of(part) for part in own), shapes))


# ---- the fused form -------------------------------------------------------------------------------------------------


def chain(stages: list[Stage], norm_first: bool, x: Tensor) -> Tensor:
    """The last layer's output before its activation, channels-last."""
    norms = [stage.norm for stage in stages if stage.norm is not None]
    affines = dict(zip(norms, batch_norm_affines(norms), strict=True))
    y, signs = x.contiguous(memory_format=torch.channels_last), None
    for stage in stages[:-1]:
        affine, act = affines.get(stage.norm), _RELU if stage.act is None else stage.act
        if norm_first or affine is None:
            y, signs = _convolved(stage, y, affine, act), None
        elif act[0] in ("relu", "leaky_relu", "none") and not torch.is_grad_enabled():  # |s| has no gradient at 0
            scale, shift = affine
            after = torch.where(scale < 0, -1.0, 1.0)
            y = _convolved(stage, y, (scale.abs(), torch.zeros_like(scale)), act, signs, shift * after)
            signs = after
        else:
            y, signs = _affine(_convolved(stage, y, None, act, signs), affine), None
    return _convolved(stages[-1], y, None, None, signs)


def ended(end: str, logits: Tensor) -> Tensor:
    low = _CLIPPED.get(end)
    return activated((end, None), logits) if low is None else logits.clamp(low, 1.0)


def _convolved(
    stage: Stage,
    x: Tensor,
    affine: Affine | None,
    act: Activation | None,
    signs: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """act(affine(conv(signs · x))) + after, x channels-last, all vectors per channel."""
    conv, weight = stage.conv, stage.conv.weight
    outputs, inputs = ((1, -1, 1, 1), (-1, 1, 1, 1)) if conv.transposed else ((-1, 1, 1, 1), (1, -1, 1, 1))
    if affine is not None:
        weight = weight * affine[0].view(outputs)
    if signs is not None:
        weight = weight * signs.view(inputs)
    if after is not None:
        size = [_length(conv, n) for n in x.shape[2:]]
        after = after.to(_computed_in(x)).view(-1, 1, 1).expand(len(x), conv.out_channels, *size)
    how = _IN_PLACE if act == _RELU else act
    return convolved(conv, x, weight, fold_bias(conv.bias, affine), how, after=after)


def _length(conv: Any, n: int) -> int:
    """The height or width of a convolution's output, of n."""
    reach, stride, both = conv.dilation[0] * (conv.kernel_size[0] - 1), conv.stride[0], 2 * conv.padding[0]
    if conv.transposed:
        return (n - 1) * stride - both + reach + conv.output_padding[0] + 1  # type: ignore[no-any-return]
    return (n + both - reach - 1) // stride + 1  # type: ignore[no-any-return]


def _computed_in(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _affine(y: Tensor, affine: Affine) -> Tensor:
    """scale · y + shift, in y's memory where no gradient needs what it was; a compiler finds that out by itself."""
    scale, shift = (vector.to(y.dtype).view(-1, 1, 1) for vector in affine)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.addcmul(shift, y, scale)
    return torch.addcmul(shift, y, scale, out=y)


# ---- adapter --------------------------------------------------------------------------------------------------------


class GeneratorAdapter:
    """A whole completion network."""

    name = "glcic.generator"
    ops: tuple[str, ...] = ("fused_conv2d",)
    algorithm = "norms folded as far as their order allows, channels-last inside"
    deep = True

    def match(self, module: nn.Module) -> str | None:
        form = form_of(module, stages_of(module))
        return form if isinstance(form, str) else None

    def forward(self, module: Any, x: Tensor) -> Tensor:
        stages = stages_of(module)
        form = form_of(module, stages)
        if stages is None or isinstance(form, str):
            raise RuntimeError(f"the module was changed after it was accelerated: {form or 'another structure'}")
        layout = result_format(x, *(stage.conv.weight for stage in stages))
        return ended(form.end, chain(stages, form.norm_first, x)).contiguous(memory_format=layout)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        stages = stages_of(module)
        form = form_of(module, stages)
        if stages is None or isinstance(form, str):
            yield form or "it is no GLCIC network any more"  # type: ignore[misc]
            return
        x, first = args[0] if len(args) == 1 else None, stages[0].conv
        yield from refuses_tensor(x, first.weight, first.in_channels)
        height, width = x.shape[2:]  # type: ignore[union-attr]
        if height % _DIVISOR or width % _DIVISOR or min(height, width) < 1:
            yield f"the size {(height, width)} is not a multiple of {_DIVISOR}"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        stages = stages_of(module)
        assert stages is not None
        yield (_probe_input(stages),)


ADAPTERS = (GeneratorAdapter(),)

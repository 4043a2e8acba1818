"""A partial convolution as strangers write it: what it is, what it computes, and how that is done in one op.

$$ u \\left( \\frac{N}{s + \\epsilon} \\, u \\, \\mathrm{conv}(x \\cdot m) + b \\right), \\qquad
   s = \\sum_{\\mathrm{window}} m $$

A layer is a convolution whose forward takes features and a mask: a subclass of Conv2d (NVIDIA, mmagic), or two
convolutions of which one sums the mask (naoto0804). Whether N is the window or 1, whether u is clamp(s, 0, 1) or 1 where s
is not 0, whether masks have one channel or one per feature and whether u is returned is in the code, and found by trials (see
`trial`), on a mask with binary, soft, tiny and no values. Without a bias originals multiply by u once.

Filters of ones that sum masks are checked to be ones, and not used: of a mask that is equal in all channels one plane is
enough. It is returned as a view of that plane with as many channels as the original returns, which can be read as ever, but
not written to in place.

NVIDIA's layer keeps what it derived from a mask for a later call without one. The fused form leaves the same behind, and calls
without a mask run the original.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from inpaintrt import ops
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.swap import disabled
from inpaintrt.testing.compare import close_to_truth
from inpaintrt.testing.recipe import image

from .ffc import Rule, first_broken, refuses_tensor
from .trial import Twin, Verdicts, _names, same, settings_of

Pair = tuple[Tensor, Tensor]


# ---- reading: modules by role ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A partial convolution: the convolution of features, and what sums masks."""

    conv: Any
    summing: Any
    """A second convolution; None where the layer is one convolution."""
    ones: Tensor | None
    """The filters that sum masks; None where there are none to see."""


_second_is_mask: dict[Any, bool] = {}


def _class_of(module: Any) -> Any:
    """The class that a module was made of, swapped or not."""
    return getattr(type(module), "__inpaintrt_original__", type(module))


def takes_mask(cls: Any) -> bool:
    """Whether forward's second argument is a mask."""
    original = getattr(cls, "__inpaintrt_original__", cls)
    if issubclass(original, torch.jit.ScriptModule):
        return False  # it has attributes that it imitates only
    known = _second_is_mask.get(original)
    if known is None:
        names = list(inspect.signature(original.forward).parameters)
        known = _second_is_mask[original] = len(names) > 2 and "mask" in names[2]
    return known


def layer_of(module: Any) -> Layer | None:
    """None for what is no partial convolution."""
    if not isinstance(module, nn.Module) or not takes_mask(type(module)):
        return None
    if isinstance(module, nn.Conv2d):
        return Layer(module, None, _filters(module))
    children = dict(module.named_children())
    summing = [child for name, child in children.items() if "mask" in name]
    convs = [child for child in children.values() if child not in summing]
    if len(convs) != 1 or len(summing) != 1 or any(_class_of(child) is not nn.Conv2d for child in children.values()):
        return None
    counter: Any = summing[0]
    return Layer(convs[0], counter, counter.weight)


def _filters(conv: nn.Conv2d) -> Tensor | None:
    """A tensor of a convolution, wherever it is kept, whose name speaks of the weight for masks."""
    for kept in (vars(conv), conv._buffers, conv._parameters):
        for name, value in kept.items():
            if isinstance(value, Tensor) and "mask" in name.lower() and "weight" in name.lower():
                return value
    return None


def core_of(module: Any) -> Any:
    """The layer itself, where modules are no more than further names for it."""
    while layer_of(module) is None and takes_mask(type(module)) and len(children := list(module.children())) == 1:
        module = children[0]
    return module


# ---- rules ----------------------------------------------------------------------------------------------------------

_known_ones: Any = WeakTensorKeyDictionary()

_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "groups", "in_channels")


def _is_ones(filters: Tensor | None) -> bool:
    """Looked at once per version of a tensor; a compiled graph trusts what accelerate saw."""
    if filters is None or filters.is_meta or torch.compiler.is_compiling():
        return True
    state = (-1 if filters.is_inference() else filters._version, filters.data_ptr())
    known = _known_ones.get(filters)
    if known is None or known[0] != state:
        known = _known_ones[filters] = (state, bool((filters == 1).all()))
    return known[1]  # type: ignore[no-any-return]


def _is_plain(conv: Any) -> bool:
    return (
        conv.groups == 1
        and isinstance(conv.padding, tuple)
        and (conv.padding_mode == "zeros" or not any(conv.padding))
        and all(len({*pair}) == 1 for pair in (conv.stride, conv.dilation))
    )


def _sums_alike(layer: Layer) -> bool:
    conv, summing = layer.conv, layer.summing
    if summing is None:
        return True
    alike = all(getattr(summing, name) == getattr(conv, name) for name in _GEOMETRY)
    return alike and summing.bias is None and summing.out_channels in (1, conv.out_channels)


def _knows_its_window(layer: Layer) -> bool:
    window = layer.conv.weight[0, 0].numel()
    sizes = [getattr(layer.conv, name, window) for name in ("slide_winsize", "mask_kernel_numel")]
    return all(size in (window, window * layer.conv.in_channels) for size in sizes)


RULES: tuple[Rule, ...] = (
    (lambda f: _is_plain(f.conv), "its convolution is grouped, strided or dilated unevenly, or padded with other than zeros"),
    (_sums_alike, "its convolutions of features and mask differ in geometry, or that of the mask has a bias"),
    (_knows_its_window, "its window is not that of its kernel"),
    (lambda f: _is_ones(f.ones), "the filters that sum its masks are not all ones"),
    (lambda f: not hasattr(f.conv, "weight_orig"), "its weights are made by a hook"),
)  # fmt: skip


# ---- forms, found by trials -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What a layer computes.

    Attributes:
        scale, eps: of `ops.partial_conv2d`.
        binary: the updated mask is 1 where s ≠ 0, else clamp(s, 0, 1).
        takes: channels of the masks it takes: "one", "each" (as many as features) or "any" of both.
        gives: channels of the mask that it returns: "one" or "each"; None where it returns features alone.
        shared: of one mask for several samples it returns one, else as many as there are samples.
    """

    scale: str
    binary: bool
    eps: float
    takes: str
    gives: str | None
    shared: bool


class Copies(Twin):
    """Recipe weights, but ones for the masks; where nothing is multiplied by the window, filters are larger by that."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.gain(lambda layer: None)

    def gain(self, scale_of: Callable[[Layer], str | None]) -> None:
        with torch.no_grad():
            for layer in filter(None, map(layer_of, self._single.modules())):
                if layer.ones is not None:
                    layer.ones.fill_(1)
                if scale_of(layer) == "one":
                    layer.conv.weight.mul_(layer.conv.weight[0].numel())


_OF_GEOMETRY = frozenset((*_GEOMETRY, "out_channels", "output_padding", "_reversed_padding_repeated_twice",
                          "slide_winsize", "mask_kernel_numel", "last_size", "_is_torch_compile"))  # fmt: skip


def traits(module: nn.Module) -> tuple[Any, ...]:
    """Class and plain attributes, but for the geometry (which decides no form) and what a forward leaves behind."""
    cls, *values = settings_of(module)
    named_values = zip(_names.get(cls, ()), values, strict=True)
    return (
        cls,
        *((n, v) for n, v in named_values if n not in _OF_GEOMETRY and v is not None and not isinstance(v, Tensor)),
    )


def key_of(module: Any, layer: Layer) -> tuple[Any, ...]:
    conv, ones = layer.conv, layer.ones
    wide = ones is not None and bool(ones.shape[1] > 1)  # a tensor where torch.jit traces sizes
    several = conv.in_channels > 1, conv.out_channels > 1
    return (*traits(module), conv.bias is None, wide, several, layer.summing is not None, _class_of(conv))


def trial_inputs(conv: Any) -> tuple[Tensor, Tensor]:
    """x (2, Cin, H, W) and a mask of its shape in three bands, each higher than the kernel: a mix of 0, 1 and numbers
    between, differing between channels; nothing valid; tiny values, whose sum over a window stays below 1."""
    reach, c = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)], conv.in_channels
    band, width = reach[0] + 2, reach[1] + 6
    x = image("probe/partial", 2, c, 3 * band, width) * 2 - 1
    soft = image("probe/mask", 2, c, 3 * band, width)
    mask = torch.where(soft < 0.4, 0.0, torch.where(soft > 0.6, 1.0, soft))
    mask[:, :, band : 2 * band] = 0
    mask[:, :, 2 * band :] = soft[:, :, 2 * band :] * 0.25 / (c * conv.weight[0, 0].numel())
    return x, mask


def parts_of(result: Any) -> Pair | tuple[Tensor, None] | None:
    """(features, mask or None) of what a layer returned; None for anything else."""
    if isinstance(result, Tensor):
        return result, None
    if isinstance(result, (tuple, list)) and len(result) == 2 and all(isinstance(t, Tensor) for t in result):
        return result[0], result[1]
    return None


def agree(got: Any, exact: Any) -> bool:
    """Whether two results as `parts_of` has them are the same, in float64."""
    if got is None or exact is None:
        return got is exact
    return all(a is b is None or same(a, b) for a, b in zip(got, exact, strict=True))


def _judge(module: Any) -> Form | str:
    twin = Copies(module)
    conv = layer_of(module).conv  # type: ignore[union-attr]
    x, wide = (t.to(twin.device) for t in trial_inputs(conv))
    accepted: dict[str, tuple[Tensor, Any, Any]] = {}
    refused = ""
    for takes, mask in (("each", wide), ("one", wide[:, :1])):
        try:
            exact, base = parts_of(twin.run(x.double(), mask.double())), parts_of(twin.run(x, mask))
        except Exception as error:  # somebody else's code: it takes masks of the other kind
            refused = refused or f"{type(error).__name__}: {error}"
            continue
        if exact is None or base is None:
            return "it returns neither features nor features and a mask"
        accepted[takes] = (mask, exact, base)
    if not accepted:
        return f"the original cannot run on the probe's input: {refused}"
    takes = "any" if len(accepted) == 2 and conv.in_channels > 1 else next(iter(accepted))
    returned = next(iter(accepted.values()))[1][1]
    if returned is None:
        gives = None
    elif returned.shape[1] in (1, conv.out_channels):
        gives = "one" if returned.shape[1] == 1 and conv.out_channels > 1 else "each"
    else:
        return f"the mask it returns has {returned.shape[1]} channels"
    for form in _forms(conv, takes, gives, _is_shared(twin, x, next(iter(accepted.values()))[0])):
        if why := _differs(twin, form, x, accepted):
            if why != _ANOTHER:
                return why
            continue
        return form if _leaves_alike(twin, form, x, *accepted) else "what it keeps of a mask for later calls is unknown"
    return "it takes features and a mask, but computes no partial convolution that is known"


def _is_shared(twin: Twin, x: Tensor, mask: Tensor) -> bool:
    """Whether one mask for all samples comes back as one."""
    try:
        result = parts_of(twin.run(x, mask[:1]))
    except Exception:  # it takes a mask for each sample only, and will say so
        return False
    return result is not None and (result[1] is None or len(result[1]) == 1)


def _forms(conv: Any, takes: str, gives: str | None, shared: bool) -> Iterator[Form]:
    told = getattr(conv, "eps", None)
    for scale in ("window", "one"):
        yield Form(scale, True, 0.0, takes, gives, shared)
        for eps in ((told,) if isinstance(told, float) else ()) + (1e-8, 1e-6):
            yield Form(scale, False, eps, takes, gives, shared)


_ANOTHER = "another function"


def _differs(twin: Twin, form: Form, x: Tensor, accepted: dict[str, tuple[Tensor, Any, Any]]) -> str:
    for mask, exact, base in accepted.values():
        with torch.no_grad():
            layer = twin.copy(torch.float64)
            wide = parts_of(call(layer, layer_of(layer), form, x.double(), mask.double()))
            if not agree(wide, exact):
                return _ANOTHER
            layer = twin.copy(torch.float32)
            with launches() as heard:
                got = parts_of(call(layer, layer_of(layer), form, x, mask))
        for a, b, c in zip(got or (), exact, base, strict=True):
            if a is not None and not (verdict := close_to_truth(a, b, c, numerics=numerics_of(heard))).ok:
                return f"in float32: {verdict.message}"
    return ""


def _leaves_alike(twin: Twin, form: Form, x: Tensor, takes: str, *others: str) -> bool:
    """Whether a call without a mask, after one with a mask, gives the same after the original and after the fused form."""
    channels = x.shape[1] if takes == "each" else 1
    x = x.double()
    mask = (image("probe/mask", len(x), channels, *x.shape[2:]) > 0.5).to(x)
    results = []
    for fused in (False, True):
        layer = twin.copy(torch.float64)
        with torch.no_grad(), disabled():
            try:
                call(layer, layer_of(layer), form, x, mask) if fused else layer(x, mask)
                results.append(parts_of(layer(x)))
            except Exception:  # it is not called without a mask
                results.append(None)
    return agree(*results)


_verdicts: Verdicts[Form] = Verdicts(_judge)


def form_of(module: Any, layer: Layer | None) -> Form | str:
    """The form of a partial convolution; "" for what is none, else a sentence says why there is no form."""
    if layer is None:
        return ""
    return first_broken(RULES, layer) or _verdicts.of(module, key_of(module, layer))


# ---- the fused form -------------------------------------------------------------------------------------------------

_LARGE = 2.0**24

_FEW = 4


@dataclass(frozen=True)
class Weighed:
    """A mask as the op takes it.

    Attributes:
        mask: (1|B, 1|Cin, H, W).
        gain: what the op's results are to be multiplied by.
        eps: of the op.
        crisp: updated masks are known to be 0 or 1.
    """

    mask: Tensor
    gain: float
    eps: float
    crisp: bool


def weigh(form: Form, mask: Tensor, stands_for: int, crisp: bool) -> Weighed:
    """One plane that stands for many channels counts for as many; so do the channels of an expanded plane.

    Where anything valid counts as 1, masks are made so large that no sum of theirs is between 0 and 1. The quotient is the
    same for masks of any size.
    """
    if mask.shape[1] == 1 or mask.stride(1) == 0:
        stands_for *= mask.shape[1]
        mask = mask[:, :1]
    else:
        stands_for = 1
    large = _LARGE if form.binary else 1.0
    gain = 1 / stands_for if form.scale == "one" else 1.0
    weighed = mask * (large * stands_for) if large * stands_for != 1 else mask
    # Without any eps an empty window would be 0/0, whose gradient stays after the 0 that the op makes of it.
    return Weighed(weighed, gain, max(form.eps * large, 1e-8), crisp or form.binary)


def is_crisp(mask: Tensor) -> bool:
    """Whether a mask is of zeros and ones, where that is asked of one plane on the CPU: elsewhere looking costs too much."""
    if torch.compiler.is_compiling() or mask.device.type != "cpu":
        return False
    plane = mask[:, :1] if mask.stride(1) == 0 else mask
    return plane.shape[1] <= _FEW and bool(((plane == 0) | (plane == 1)).all())


def convolved(
    conv: Any, form: Form, x: Tensor, weighed: Weighed, scale: Tensor | None = None, bias: Tensor | None = None
) -> Pair:
    """u · (ratio · scale · conv(x · mask) + bias) and u; scale and bias (Cout,).

    The scale goes into the filters, or into the outputs where those are fewer: at the bottom of a U-Net a copy of the
    filters would cost more than the convolution.
    """
    weight: Tensor = conv.weight
    if scale is None and weighed.gain == 1:
        return _op(conv, form, x, weighed, weight, bias)
    gain = weighed.gain if scale is None else scale.view(-1, 1, 1, 1) * weighed.gain
    cheap = weight[0].numel() * conv.stride[0] ** 2 <= x.shape[0] * x.shape[2] * x.shape[3]
    if cheap or not weighed.crisp:  # a soft u is a factor twice where there is a bias, else once: the op knows
        return _op(conv, form, x, weighed, weight * gain, bias)
    y, updated = _op(conv, form, x, weighed, weight, None)
    y = y.mul_(gain if scale is None else gain.view(-1, 1, 1))  # type: ignore[union-attr]
    return (y if bias is None else y.addcmul_(updated, bias.to(y.dtype).view(-1, 1, 1))), updated


def _op(conv: Any, form: Form, x: Tensor, weighed: Weighed, weight: Tensor, bias: Tensor | None) -> Pair:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return ops.partial_conv2d(
        x.to(dtype), weighed.mask, weight.to(dtype), None if bias is None else bias.to(dtype), stride=conv.stride[0],
        padding=conv.padding, dilation=conv.dilation[0], scale=form.scale, eps=weighed.eps,
    )  # fmt: skip


def _sums(conv: Any, plane: Tensor) -> Tensor:
    """The sum of a plane over each window, whatever autocast would make of it."""
    with torch.autocast(plane.device.type, enabled=False):
        ones = plane.new_ones(1, 1, *conv.kernel_size)
        return F.conv2d(plane, ones, None, conv.stride, conv.padding, conv.dilation)


def alone(layer: Layer, form: Form, x: Tensor, mask: Tensor, scale: Tensor | None, bias: Tensor | None) -> Pair:
    """As `convolved`, in the original's dtypes and with the updated mask (1|B, 1, H', W')."""
    y, updated = convolved(layer.conv, form, x, weigh(form, mask, 1, is_crisp(mask)), scale, bias)
    return promoted(layer.conv, y), (updated[: len(mask)] if form.shared else updated).to(mask.dtype)


def promoted(conv: Any, y: Tensor) -> Tensor:
    """Under autocast originals add a bias outside of the convolution, which makes their results float32."""
    return y if conv.bias is None else y.to(torch.promote_types(y.dtype, conv.bias.dtype))


def call(module: Any, layer: Any, form: Form, x: Tensor, mask: Tensor) -> Any:
    """What the layer returns; it is left as the original leaves it."""
    y, updated = alone(layer, form, x, mask, None, layer.conv.bias)
    if hasattr(module, "last_size"):
        _remember(module, layer.conv, form, x, mask, updated)
    return result_of(form, y, updated)


@torch.no_grad()
def _remember(module: Any, conv: Any, form: Form, x: Tensor, mask: Tensor, updated: Tensor) -> None:
    """What NVIDIA's layer keeps for calls without a mask: the size, of which older copies keep two numbers; mask and ratio."""
    window = mask.shape[1] * conv.weight[0, 0].numel()
    module.last_size = tuple(x.shape)[-len(module.last_size) :]
    module.update_mask = updated.expand(-1, conv.out_channels, -1, -1) if form.takes == "each" else updated
    module.mask_ratio = window / (_sums(conv, mask.sum(1, keepdim=True)) + form.eps) * updated


def result_of(form: Form, y: Tensor, updated: Tensor) -> Any:
    if form.gives is None:
        return y
    return y, updated.expand(-1, y.shape[1], -1, -1) if form.gives == "each" else updated


# ---- what both layers and what holds them refuse --------------------------------------------------------------------


def refuses_mask(x: Tensor, mask: Any, *channels: int) -> Iterator[str]:
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.device != x.device:
        yield f"its mask is no tensor of numbers with a point on {x.device}"
    elif tuple(mask.shape) not in [(b, c, *x.shape[2:]) for b in (1, len(x)) for c in channels]:
        yield f"its mask is {tuple(mask.shape)} for features of {tuple(x.shape)}"
    elif mask.requires_grad and torch.is_grad_enabled():
        yield "a gradient is asked of its mask, from which originals leave the renormalisation out"
    elif mask.dtype != x.dtype and x.dtype == torch.float64:
        yield f"its mask is {mask.dtype} for features of {x.dtype}"


def refuses_call(form: Form, conv: Any, args: tuple[Any, ...]) -> Iterator[str]:
    if len(args) != 2 or args[1] is None:
        yield "called without a mask, or with more: what an earlier call left may count"
        return
    x, mask = args
    if why := next(refuses_tensor(x, conv.weight, conv.in_channels), ""):
        yield why
        return
    channels = {"one": (1,), "each": (conv.in_channels,), "any": (1, conv.in_channels)}[form.takes]
    yield from refuses_mask(x, mask, *channels)
    for size, kernel, dilation, padding in zip(x.shape[2:], conv.kernel_size, conv.dilation, conv.padding, strict=True):
        if size < 1 or size + 2 * padding < dilation * (kernel - 1) + 1:
            yield f"the input of {tuple(x.shape[2:])} is smaller than the kernel"

"""Fast Fourier convolutions (FFC) and their parts, in whatever copy: LaMa, FcF, ZITS, and what is built from them.

What is recognised are children, shapes and attributes, under the names that the public state dicts fix (`convl2l`,
`convg2g`, `bn_l`, …); class names differ between copies and are ignored. A module is first read into its roles (`Layer`,
`Spectral`), absent ones as None, and then held against a list of rules, each with the sentence that names the option in
the way. Biases, batch norms, activations, paddings, dilation, stride 2 and the local Fourier unit may differ as they like.

What is done, all of it exact algebra:

- local-to-local and global-to-local are one convolution over the input channels of both;
- every batch norm in eval mode folds into the convolution before it;
- multiplications by a gate of 1 and additions of 0 are dropped;
- the two streams are read as one, without a copy that joins them;
- what the spectral part ends in, a 1×1 convolution, is summed with local-to-global's products;
- the spectral part is one op, `ops.fourier_unit`, with the sums around it as its residual.

Under bf16 autocast convolutions run in bfloat16; `fourier_unit` computes in float32 and is not touched by autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt import ops

from .engine import activated, adds_pointwise, convolved
from .folding import (
    BATCH_NORMS,
    Affine,
    batch_norm_affine,
    batch_norm_affines,
    fold_bias,
    fold_weight,
    is_plain_batch_norm,
    scale_of,
    total,
)

# ---- reading: modules by role ---------------------------------------------------------------------------------------


def child(module: Any, name: str) -> Any:
    """A child that does something: None where it is missing or an Identity holds its place."""
    found = getattr(module, name, None)
    return None if isinstance(found, nn.Identity) else found


@dataclass(frozen=True)
class Spectral:
    """A spectral transform: before, conv1, norm, after; then x + unit(x) + local_unit(quarters of x); then conv2."""

    before: Any
    conv1: Any
    norm: Any
    after: tuple[Any, ...]
    unit: Any
    local_unit: Any
    conv2: Any

    @property
    def norms(self) -> list[Any]:
        units = (child(unit, "bn") for unit in (self.unit, self.local_unit))
        return [norm for norm in (self.norm, *units) if norm is not None]


@dataclass(frozen=True)
class Layer:
    """An FFC, and what its shell does to each stream afterwards."""

    local: Any
    to_local: Any
    to_wide: Any
    wide: Any
    spectral: Spectral | None
    norm_l: Any
    norm_g: Any
    act_l: Any
    act_g: Any
    gated: bool

    @property
    def spatial(self) -> list[Any]:
        return [conv for conv in (self.local, self.to_local, self.to_wide) if conv is not None]

    @property
    def norms(self) -> list[Any]:
        inside = [] if self.spectral is None else self.spectral.norms
        return [norm for norm in (self.norm_l, self.norm_g) if norm is not None] + inside


def is_fourier_unit(module: Any) -> bool:
    conv = getattr(module, "conv_layer", None)
    return isinstance(conv, nn.Conv2d) and conv.in_channels % 2 == 0 and conv.out_channels % 2 == 0


def spectral_of(module: Any) -> Spectral | None:
    """None for what is no spectral transform."""
    first, unit, conv2 = (getattr(module, name, None) for name in ("conv1", "fu", "conv2"))
    if not (isinstance(first, nn.Sequential) and isinstance(conv2, nn.Conv2d) and is_fourier_unit(unit)):
        return None
    layers: list[Any] = [layer for layer in first if not isinstance(layer, nn.Identity)]
    conv1 = layers.pop(0) if layers else None
    norm = layers.pop(0) if layers and isinstance(layers[0], BATCH_NORMS) else None
    return Spectral(
        before=child(module, "downsample"),
        conv1=conv1,
        norm=norm,
        after=tuple(layers),
        unit=unit,
        local_unit=child(module, "lfu") if getattr(module, "enable_lfu", True) else None,
        conv2=conv2,
    )


def layer_of(module: Any) -> Layer | None:
    """None for what is no FFC with a local stream in and out, bare or in its shell of norms and activations."""
    paths = getattr(module, "ffc", module)
    if not isinstance(getattr(paths, "convl2l", None), nn.Conv2d):
        return None
    wide = child(paths, "convg2g")
    return Layer(
        local=paths.convl2l,
        to_local=child(paths, "convg2l"),
        to_wide=child(paths, "convl2g"),
        wide=wide,
        spectral=spectral_of(wide),
        norm_l=child(module, "bn_l"),
        norm_g=child(module, "bn_g"),
        act_l=child(module, "act_l"),
        act_g=child(module, "act_g"),
        gated=bool(getattr(paths, "gated", child(paths, "gate") is not None)),
    )


def block_of(module: Any) -> tuple[Layer, Layer] | None:
    """The two FFCs of a residual block; None for what is none."""
    first, second = (layer_of(getattr(module, name, None)) for name in ("conv1", "conv2"))
    return None if first is None or second is None else (first, second)


# ---- rules: what the fused forms cover ------------------------------------------------------------------------------

Rule = tuple[Callable[[Any], bool], str]


def first_broken(rules: Sequence[Rule], part: Any) -> str | None:
    """The sentence of the first rule that `part` breaks; None where it keeps all."""
    return next((sentence for holds, sentence in rules if not holds(part)), None)


def _is_plain(conv: Any) -> bool:
    """A convolution in one group, square in all it does."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.groups == 1
        and isinstance(conv.padding, tuple)
        and all(len({*pair}) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
    )


def _is_pointwise(conv: Any) -> bool:
    return _is_plain(conv) and (conv.kernel_size[0], conv.stride[0], conv.padding[0]) == (1, 1, 0)


def _folds(norm: Any, conv: Any) -> bool:
    return norm is None or (conv is not None and is_plain_batch_norm(norm, conv.out_channels))


def _is_halving(module: Any) -> bool:
    """Means of 2×2 pixels."""
    return (
        isinstance(module, nn.AvgPool2d)
        and module.kernel_size in (2, (2, 2))
        and module.stride in (2, (2, 2))
        and module.padding in (0, (0, 0))
    )


def _takes_quarters(s: Spectral) -> bool:
    width = s.conv1.out_channels
    conv = s.local_unit.conv_layer if is_fourier_unit(s.local_unit) else None
    return width % 4 == 0 and conv is not None and conv.in_channels == conv.out_channels == 2 * width


def _same_geometry(f: Layer) -> bool:
    names = ("kernel_size", "stride", "padding", "padding_mode", "dilation")
    return all(getattr(conv, name) == getattr(f.local, name) for conv in f.spatial for name in names)


def _same_sizes(f: Layer) -> bool:
    """The convolutions change the size by their stride only, and the spectral path does likewise."""
    conv, halves = f.local, f.spectral is not None and f.spectral.before is not None
    same = 2 * conv.padding[0] == conv.dilation[0] * (conv.kernel_size[0] - 1)
    return same and conv.stride[0] == (2 if halves else 1)


def _lacks(option: str) -> Rule:
    return lambda unit: not getattr(unit, option, None), f"its Fourier unit uses {option}"


FOURIER_UNIT_RULES: tuple[Rule, ...] = (
    (lambda u: _is_pointwise(u.conv_layer), "its Fourier unit's convolution is not a plain 1×1"),
    (lambda u: _folds(child(u, "bn"), u.conv_layer), "its Fourier unit's norm is not a batch norm with running statistics"),
    (lambda u: isinstance(getattr(u, "relu", None), (nn.ReLU, type(None))), "its Fourier unit's activation is not ReLU"),
    *map(_lacks, ("spatial_scale_factor", "spectral_pos_encoding", "use_se", "ffc3d")),
    (lambda u: getattr(u, "fft_norm", "ortho") == "ortho", "its Fourier unit is not orthonormal"),
)  # fmt: skip

SPECTRAL_RULES: tuple[Rule, ...] = (
    (
        lambda s: _is_pointwise(s.conv1) and _is_pointwise(s.conv2),
        "its spectral transform does not begin and end in a plain 1×1 convolution",
    ),
    (lambda s: _folds(s.norm, s.conv1), "its spectral transform's norm is not a batch norm with running statistics"),
    (lambda s: s.before is None or _is_halving(s.before), "its spectral transform resizes other than by 2×2 means"),
    (
        lambda s: (
            s.unit.conv_layer.in_channels == s.unit.conv_layer.out_channels == 2 * s.conv1.out_channels
            and s.conv1.out_channels == s.conv2.in_channels
        ),
        "its spectral transform changes its width inside",
    ),
    (
        lambda s: s.local_unit is None or _takes_quarters(s),
        "its local Fourier unit (LFU) does not take the four quarters of the first quarter of the channels",
    ),
)

STREAM_RULES: tuple[Rule, ...] = (
    (lambda f: not f.gated, "its streams are gated"),
    (lambda f: all(map(_is_plain, f.spatial)), "its convolutions are grouped, not square, or padded by a name"),
    (_same_geometry, "its convolutions differ in geometry"),
    (lambda f: _folds(f.norm_l, f.local), "its local stream's norm is not a batch norm with running statistics"),
    (lambda f: _folds(f.norm_g, f.to_wide), "its global stream's norm is not a batch norm with running statistics"),
)

FFC_RULES: tuple[Rule, ...] = (
    *STREAM_RULES,
    (lambda f: f.spectral is not None, "its global path is not a spectral transform"),
)
SIZE_RULES: tuple[Rule, ...] = (
    (_same_sizes, "its convolutions and its spectral transform change the size differently"),
)


def why_not_fourier_unit(unit: Any) -> str | None:
    """As all of these: None for what the fused form covers, "" for what is none at all, else the option in the way."""
    return first_broken(FOURIER_UNIT_RULES, unit) if is_fourier_unit(unit) else ""


def why_not_spectral(spectral: Spectral | None) -> str | None:
    if spectral is None:
        return ""
    if why := first_broken(SPECTRAL_RULES, spectral):
        return why
    units = (spectral.unit, spectral.local_unit)
    return next((why for unit in units if unit is not None and (why := why_not_fourier_unit(unit))), None)


def why_not_ffc(layer: Layer | None) -> str | None:
    """An FFC of two streams, in and out."""
    if layer is None or layer.to_local is None or layer.to_wide is None or layer.wide is None:
        return ""
    return first_broken(FFC_RULES, layer) or why_not_spectral(layer.spectral) or first_broken(SIZE_RULES, layer)


def why_not_block(block: tuple[Layer, Layer] | None) -> str | None:
    if block is None:
        return ""
    for layer in block:
        if (why := why_not_ffc(layer)) is not None:
            return why or "its FFCs lack a stream"
    first, second = block
    if first.local.stride != (1, 1) or second.local.stride != (1, 1):
        return "it is strided"
    if (first.local.in_channels, first.to_local.in_channels) != (
        second.local.out_channels,
        second.to_wide.out_channels,
    ):
        return "its second FFC does not return the streams of its first"
    return None


# ---- the fused forms ------------------------------------------------------------------------------------------------


Affines = Mapping[nn.Module, Affine]
Streams = tuple[Tensor, Tensor]


def affines_of(*parts: Layer | Spectral) -> Affines:
    """What the batch norms of these parts apply."""
    norms = list(dict.fromkeys(norm for part in parts for norm in part.norms))
    return dict(zip(norms, batch_norm_affines(norms), strict=True))


def exact(x: Tensor) -> Tensor:
    """In the dtype of spectra: float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def fourier_unit(unit: Any, x: Tensor, residual: Tensor | None = None, affines: Affines | None = None) -> Tensor:
    """A Fourier unit and the sum after it: x (B, C, h, w) → (B, Co, h, w), dtype of x."""
    conv, norm = unit.conv_layer, child(unit, "bn")
    affine = None if norm is None else batch_norm_affine(norm) if affines is None else affines[norm]
    return ops.fourier_unit(x, fold_weight(conv.weight, affine), fold_bias(conv.bias, affine), residual)


def quarters(x: Tensor) -> Tensor:
    """(B, C, h, w) → (B, C, h/2, w/2): the quadrants of the first C/4 channels, those on the left first."""
    b, c, h, w = x.shape
    parts = x[:, : c // 4].reshape(b, c // 4, 2, h // 2, 2, w // 2)
    return parts.permute(0, 4, 2, 1, 3, 5).reshape(b, c, h // 2, w // 2)


def transformed(spectral: Spectral, x: Tensor, affines: Affines) -> Tensor:
    """A spectral transform up to its last convolution."""
    if spectral.before is not None:
        x = spectral.before(x)
    conv, affine = spectral.conv1, affines.get(spectral.norm)
    before, *rest = spectral.after or (None,)
    hidden = convolved(conv, x, conv.weight, fold_bias(conv.bias, affine), before, scale=scale_of(affine))
    for module in rest:
        hidden = activated(module, hidden)
    if hidden.device.type != "cpu" or spectral.local_unit is not None:  # else it is widened as it is read
        hidden = exact(hidden)
    residual = hidden
    if spectral.local_unit is not None:
        residual = fourier_unit(spectral.local_unit, quarters(hidden), None, affines).repeat(1, 1, 2, 2).add_(hidden)
    return fourier_unit(spectral.unit, hidden, residual, affines)


def ffc(layer: Layer, streams: Streams, affines: Affines, residual: Streams | None = None) -> Streams:
    """One FFC with norms and activations on (local, global), each (B, C, h, w), in the first one's memory format.

    `residual`, likewise, is added at the end and gives the sums their dtype.
    """
    assert layer.spectral is not None
    (local, wide), conv, conv2 = streams, layer.local, layer.spectral.conv2
    after_l, after_g = (None, None) if residual is None else residual
    affine_l, affine_g = affines.get(layer.norm_l), affines.get(layer.norm_g)
    mixed, scale = transformed(layer.spectral, wide, affines), scale_of(affine_g)
    bias, weight = fold_bias(total(layer.to_wide.bias, conv2.bias), affine_g), layer.to_wide.weight
    if adds_pointwise(conv, local):
        both = (weight, conv2.weight)
        new_wide = convolved(conv, (local, mixed), both, bias, layer.act_g, None, after_g, scale)
    else:
        spectral = convolved(conv2, mixed, conv2.weight, None, scale=scale)
        new_wide = convolved(conv, local, weight, bias, layer.act_g, spectral, after_g, scale)

    weights = (conv.weight, layer.to_local.weight)
    bias = fold_bias(total(conv.bias, layer.to_local.bias), affine_l)
    return convolved(conv, (local, wide), weights, bias, layer.act_l, None, after_l, scale_of(affine_l)), new_wide


def residual_block(block: tuple[Layer, Layer], streams: Streams, affines: Affines) -> Streams:
    """Two FFCs and the residual; the sums have the dtype of `streams`."""
    return ffc(block[1], ffc(block[0], streams, affines), affines, streams)


# ---- what a call cannot have ----------------------------------------------------------------------------------------


def refuses_tensor(x: Any, weight: Tensor, channels: int) -> Iterator[str]:
    if not isinstance(x, Tensor) or x.dim() != 4:
        yield "the input is not one 4-D tensor"
    elif x.device != weight.device:
        yield f"the input is on {x.device}, the weights are on {weight.device}"
    elif not _computes(x, weight):
        yield f"input {x.dtype} with weights {weight.dtype}; both must be float32 or float64 (for bf16: precision='bf16')"
    elif x.shape[1] != channels:
        yield f"the input has {x.shape[1]} channels, the weights take {channels}"


def _computes(x: Tensor, weight: Tensor) -> bool:
    if x.dtype == torch.bfloat16 and weight.dtype == torch.float32:  # what an earlier layer leaves under autocast
        return torch.is_autocast_enabled(x.device.type)
    return x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)


def refuses_padding(conv: Any, size: Sequence[int]) -> Iterator[str]:
    """Against sizes on which the padding of `conv` is undefined."""
    least = {"reflect": conv.padding[0] + 1, "circular": conv.padding[0]}.get(conv.padding_mode, 1)
    if min(size) < least:
        yield f"the input of {tuple(size)} is smaller than {conv.padding_mode} padding allows ({least})"


def refuses_spectrum(spectral: Spectral, size: Sequence[int]) -> Iterator[str]:
    h, w = size
    if spectral.before is not None:
        if h % 2 or w % 2:
            yield f"the size {(h, w)} is not a multiple of the stride, 2"
        h, w = h // 2, w // 2
    if min(h, w) < 1:
        yield f"the input of {tuple(size)} has no pixel to transform"
    # Copies cut rows and columns into pieces of h/2, or columns into pieces of w/2: on squares both mean the same.
    if spectral.local_unit is not None and (h != w or h % 2):
        yield f"the local Fourier unit (LFU) quarters squares of even size, not {(h, w)}"


def refuses_size(layer: Layer, size: Sequence[int]) -> Iterator[str]:
    yield from refuses_padding(layer.local, size)
    if layer.spectral is not None:
        yield from refuses_spectrum(layer.spectral, size)


def refuses_streams(layer: Layer, streams: Any) -> Iterator[str]:
    if not isinstance(streams, tuple) or len(streams) != 2 or not all(isinstance(t, Tensor) for t in streams):
        yield "the input is not a (local, global) pair of tensors"
        return
    local, wide = streams
    yield from refuses_tensor(local, layer.local.weight, layer.local.in_channels)
    yield from refuses_tensor(wide, layer.local.weight, layer.to_local.in_channels)
    if (local.shape[0], *local.shape[2:], local.dtype) != (wide.shape[0], *wide.shape[2:], wide.dtype):
        yield f"the streams differ: {tuple(local.shape)} {local.dtype} and {tuple(wide.shape)} {wide.dtype}"
    yield from refuses_size(layer, local.shape[2:])

"""LaMa and its relatives as modules to swap: Fourier units, spectral transforms, FFCs, residual blocks, whole generators.

The reading, the rules and the algebra of FFCs are in `ffc`; here is what a whole generator adds, and the adapters.
Inside a generator everything is channels-last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from inpaintrt.runtime.swap import disabled

from .engine import activated, convolved
from .ffc import (
    STREAM_RULES,
    Affines,
    Layer,
    Spectral,
    Streams,
    affines_of,
    block_of,
    exact,
    ffc,
    first_broken,
    fourier_unit,
    layer_of,
    refuses_size,
    refuses_spectrum,
    refuses_streams,
    refuses_tensor,
    residual_block,
    spectral_of,
    transformed,
    why_not_block,
    why_not_ffc,
    why_not_fourier_unit,
    why_not_spectral,
)
from .folding import (
    BATCH_NORMS,
    batch_norm_affines,
    fold_bias,
    fold_weight,
    is_plain_batch_norm,
    joined_biases,
    memory_format_of,
    scale_of,
)

T = TypeVar("T")
ALGORITHM = "norms folded, l2l+g2l merged, streams never joined"

# ---- a whole generator ----------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """The layers of a generator by role. Layers of the tail come in groups that run as one; one alone runs as it is."""

    stem: list[Any] = field(default_factory=list)
    head: list[Layer] = field(default_factory=list)
    blocks: list[tuple[Layer, Layer]] = field(default_factory=list)
    tail: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def stride(self) -> int:
        product = 1
        for layer in self.head:
            product *= layer.local.stride[0]
        return product

    @property
    def layers(self) -> list[Layer]:
        return [*self.head, *(layer for block in self.blocks for layer in block)]

    def affines(self) -> Affines:
        """What all batch norms that fold apply."""
        ups = [group[1] for group in self.tail if len(group) == 3 and group[1] is not None]
        norms = list(dict.fromkeys([norm for layer in self.layers for norm in layer.norms] + ups))
        return dict(zip(norms, batch_norm_affines(norms), strict=True))


def plan_of(sequence: nn.Sequential) -> Plan | str:
    """Read the layers in order; a sentence says where they are none of a generator's."""
    plan, layers = Plan(), list(sequence)
    while layers and not hasattr(layers[0], "ffc"):
        plan.stem.append(layers.pop(0))
    while layers and hasattr(layers[0], "ffc"):
        layer = layer_of(layers.pop(0))
        if layer is None:
            return f"layer {len(plan.head) + 1}: it has no local stream"
        plan.head.append(layer)
    joined = len(layers) > 0 and block_of(layers[0]) is None and _pop_join(layers)
    while layers and (block := block_of(layers[0])) is not None:
        plan.blocks.append(block)
        layers.pop(0)
    if not plan.head or not plan.blocks:
        return "it has no residual blocks of FFCs after its strided convolutions"
    if not joined and not _pop_join(layers):
        return "the streams are not joined after the residual blocks"
    while layers:
        plan.tail.append(_pop_group(layers))
    return plan


def why_not_generator(plan: Plan) -> str | None:
    if any(_has_weights(layer) for layer in plan.stem):
        return "a layer with weights comes before its first FFC"
    for i, layer in enumerate(plan.head):
        if why := _why_not_head(layer):
            return f"layer {i + 1}: {why}"
    if plan.head[-1].to_wide is None:
        return "its residual blocks have no global stream to begin with"
    for i, block in enumerate(plan.blocks):
        if (why := why_not_block(block)) is not None:
            return f"residual block {i}: {why or 'its FFCs lack a stream'}"
    if any(hasattr(part, "convl2l") for group in plan.tail for layer in group if layer for part in layer.modules()):
        return "it has an FFC after its residual blocks"
    return None


def _has_weights(layer: Any) -> bool:
    return any(True for _ in layer.parameters())


def _why_not_head(layer: Layer) -> str | None:
    """A layer of the head takes one or both streams; without a global one it is a convolution."""
    if layer.to_local is None:
        return first_broken(STREAM_RULES, layer)
    why = why_not_ffc(layer)
    return "one of its streams ends in it" if why == "" else why


def _pop_join(layers: list[Any]) -> bool:
    """Drop the concatenation: the only thing that a layer without parameters can do with a pair (the probe checks it)."""
    if not layers or _has_weights(layers[0]) or isinstance(layers[0], nn.Identity):
        return False
    layers.pop(0)
    return True


def _pop_group(layers: list[Any]) -> tuple[Any, ...]:
    first = layers.pop(0)
    if isinstance(first, nn.ConvTranspose2d) and first.groups == 1:
        norm = act = None
        if layers and isinstance(layers[0], BATCH_NORMS) and is_plain_batch_norm(layers[0], first.out_channels):
            norm = layers.pop(0)
        if layers and isinstance(layers[0], nn.ReLU):
            act = layers.pop(0)
        return first, norm, act
    if isinstance(first, nn.ReflectionPad2d) and layers and _is_same_conv(layers[0], first.padding):
        return first, layers.pop(0)
    return (first,)


def _is_same_conv(conv: Any, pad: tuple[int, ...]) -> bool:
    """A convolution that takes back what `pad` adds."""
    return (
        isinstance(conv, nn.Conv2d)
        and len({*pad}) == 1
        and conv.kernel_size == (2 * pad[0] + 1,) * 2
        and (conv.stride, conv.padding, conv.dilation, conv.groups) == ((1, 1), (0, 0), (1, 1), 1)
    )


def head_layer(layer: Layer, x: Tensor | Streams, affines: Affines) -> Tensor | Streams:
    """An FFC of a head, which has one or two streams in, and one or two out."""
    if layer.to_local is not None:
        return ffc(layer, cast(Streams, x), affines)
    image, affine = cast(Tensor, x), affines.get(layer.norm_l)
    if layer.to_wide is None:
        bias = fold_bias(layer.local.bias, affine)
        return convolved(layer.local, image, layer.local.weight, bias, layer.act_l, scale=scale_of(affine))
    weight, bias = fold_weight(layer.local.weight, affine), fold_bias(layer.local.bias, affine)
    affine = affines.get(layer.norm_g)
    other, other_bias = fold_weight(layer.to_wide.weight, affine), fold_bias(layer.to_wide.bias, affine)
    widths = [layer.local.out_channels, layer.to_wide.out_channels]
    alike = isinstance(layer.act_l, nn.ReLU) and isinstance(layer.act_g, nn.ReLU)
    biases = joined_biases([bias, other_bias], widths)
    y = convolved(layer.local, image, torch.cat([weight, other]), biases, layer.act_l if alike else None)
    local, wide = y.split(widths, dim=1)
    return (local, wide) if alike else (activated(layer.act_l, local), activated(layer.act_g, wide))


def tail_group(group: tuple[Any, ...], y: Tensor, affines: Affines) -> Tensor:
    """A transposed convolution with its norm and ReLU, a padded convolution, or a layer as it is."""
    first = group[0]
    if isinstance(first, nn.ConvTranspose2d):
        norm, act = group[1:]
        affine = affines.get(norm)
        return convolved(first, y, first.weight, fold_bias(first.bias, affine), act, scale=scale_of(affine))
    if len(group) == 2:
        conv = group[1]
        return convolved(Reflected(conv, first.padding[:2]), y, conv.weight, conv.bias)
    return first(y)  # type: ignore[no-any-return]


class Reflected:
    """The geometry of a convolution without padding after a layer that reflects."""

    padding_mode = "reflect"

    def __init__(self, conv: nn.Conv2d, padding: tuple[int, ...]) -> None:
        self.stride, self.dilation, self.padding = conv.stride, conv.dilation, padding


# ---- adapters -------------------------------------------------------------------------------------------------------
# Each reads its module again on every call and holds it against the rules: a child that was replaced since counts.


class GeneratorAdapter:
    """A whole generator, as the Sequential that most copies of LaMa keep its layers in."""

    name = "lama.generator"
    ops: tuple[str, ...] = ("fourier_unit", "fused_conv2d")
    algorithm = ALGORITHM + "; channels-last inside"
    deep = True

    def match(self, module: nn.Module) -> str | None:
        if not isinstance(module, nn.Sequential):
            return ""
        if not any(hasattr(layer, "ffc") for layer in module) or not any(block_of(layer) for layer in module):
            return ""
        plan = plan_of(module)
        return plan if isinstance(plan, str) else why_not_generator(plan)

    def forward(self, module: Any, x: Tensor) -> Tensor:
        plan, layout = _read(plan_of(module)), memory_format_of(x)
        y, affines = x, plan.affines()
        for layer in plan.stem:
            y = layer(y)
        streams: Any = y.contiguous(memory_format=torch.channels_last)
        for part in plan.head:
            streams = head_layer(part, streams, affines)
        for block in plan.blocks:
            streams = residual_block(block, streams, affines)
        y = torch.cat(streams, dim=1)
        for group in plan.tail:
            y = tail_group(group, y, affines)
        return y.contiguous(memory_format=layout)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        plan = plan_of(module)
        if isinstance(plan, str) or (why := why_not_generator(plan)):
            yield plan if isinstance(plan, str) else why or ""
            return
        if len(args) != 1:
            yield "called with other arguments than one tensor"
            return
        first = plan.head[0].local
        yield from refuses_tensor(args[0], first.weight, first.in_channels)
        size = tuple(args[0].shape[2:])
        if any(n % plan.stride for n in size):
            yield f"the size {size} is not a multiple of {plan.stride}"
        for layer in plan.layers:
            yield from refuses_size(layer, size)
            size = tuple(n // layer.local.stride[0] for n in size)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        from inpaintrt.testing.recipe import image

        plan = _read(plan_of(module))
        # Two pixels at the bottleneck are the least that reflection by one allows; dilated blocks reflect further.
        side = plan.stride * max(2, *(2 * layer.local.padding[0] for layer in plan.layers[len(plan.head) :]))
        x = image("probe/image", 1, plan.head[0].local.in_channels, side, side)
        x[:, -1] = (x[:, -1] > 0.5).float()
        yield (x,)


class BlockAdapter:
    """A residual block of two FFCs, on a (local, global) pair or, "inline", on one tensor [local | global]."""

    name = "lama.block"
    ops: tuple[str, ...] = ("fourier_unit", "fused_conv2d")
    algorithm = ALGORITHM
    deep = False

    def match(self, module: nn.Module) -> str | None:
        return why_not_block(block_of(module))

    def forward(self, module: Any, x: Tensor | Streams) -> Tensor | Streams:
        block = _read(block_of(module))
        affines = affines_of(*block)
        if isinstance(x, Tensor):
            n = block[0].local.in_channels
            y = torch.cat(residual_block(block, (x[:, :n], x[:, n:]), affines), dim=1)
            return y.contiguous(memory_format=memory_format_of(x))
        return _in_formats(residual_block(block, x, affines), x)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        block = block_of(module)
        if block is None or (why := why_not_block(block)) is not None:
            yield (block and why) or "it is no residual block of FFCs any more"
            return
        x, first = args[0] if len(args) == 1 else None, block[0]
        # Copies without the option take one of the two: the caller knows which.
        if getattr(module, "inline", isinstance(x, Tensor)):
            yield from refuses_tensor(x, first.local.weight, first.local.in_channels + first.to_local.in_channels)
            size = x.shape[2:]  # type: ignore[union-attr]
        else:
            yield from refuses_streams(first, x)
            size = x[0].shape[2:]  # type: ignore[index]
        for layer in block:
            yield from refuses_size(layer, size)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        for streams in _probe_streams(_read(block_of(module))[0]):
            yield (torch.cat(streams, dim=1) if _takes_one_tensor(module, streams) else streams,)


def _takes_one_tensor(block: Any, streams: Streams) -> bool:
    """Whether a residual block is "inline"; a copy without that option is asked."""
    if hasattr(block, "inline"):
        return bool(block.inline)
    weight = block_of(block)[0].local.weight  # type: ignore[index]
    try:
        with disabled(), torch.no_grad():
            block(tuple(stream.to(weight) for stream in streams))
    except (TypeError, AttributeError, IndexError, RuntimeError):
        return True
    return False


class FfcAdapter:
    """An FFC of two streams as a (local, global) pair; with the norms and activations of its shell, or bare."""

    name = "lama.ffc"
    ops: tuple[str, ...] = ("fourier_unit", "fused_conv2d")
    algorithm = ALGORITHM
    deep = False

    def match(self, module: nn.Module) -> str | None:
        return why_not_ffc(layer_of(module))

    def forward(self, module: Any, x: Streams) -> Streams:
        layer = _read(layer_of(module))
        return _in_formats(ffc(layer, x, affines_of(layer)), x)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        layer = layer_of(module)
        if layer is None or (why := why_not_ffc(layer)) is not None:
            yield (layer and why) or "it is no FFC of two streams any more"
        else:
            yield from refuses_streams(layer, args[0] if len(args) == 1 else None)
            yield from refuses_size(layer, args[0][0].shape[2:])

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        for streams in _probe_streams(_read(layer_of(module))):
            yield (streams,)


class SpectralAdapter:
    """A spectral transform, where the FFC around it is not recognised."""

    name = "lama.spectral"
    ops: tuple[str, ...] = ("fourier_unit", "fused_conv2d")
    algorithm = "norms folded"
    deep = False

    def match(self, module: nn.Module) -> str | None:
        return why_not_spectral(spectral_of(module))

    def forward(self, module: Any, x: Tensor) -> Tensor:
        spectral = _read(spectral_of(module))
        conv2 = spectral.conv2
        y = convolved(conv2, transformed(spectral, x, affines_of(spectral)), conv2.weight, conv2.bias)
        return y.contiguous(memory_format=memory_format_of(x))

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        spectral = spectral_of(module)
        if spectral is None or (why := why_not_spectral(spectral)) is not None:
            yield (spectral and why) or "it is no spectral transform any more"
        else:
            x = args[0] if len(args) == 1 else None
            yield from refuses_tensor(x, spectral.conv1.weight, spectral.conv1.in_channels)
            yield from refuses_spectrum(spectral, x.shape[2:])  # type: ignore[union-attr]

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        spectral = _read(spectral_of(module))
        for size in _probe_sizes(spectral):
            yield (_probe_tensor("global", spectral.conv1.in_channels, size),)


class FourierUnitAdapter:
    """A Fourier unit, where the spectral transform around it is not recognised."""

    name = "lama.fourier_unit"
    ops: tuple[str, ...] = ("fourier_unit",)
    algorithm = "norm folded, one op"
    deep = False

    def match(self, module: nn.Module) -> str | None:
        return why_not_fourier_unit(module) if _speaks_of_spectra(module) else ""

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return fourier_unit(module, exact(x)).contiguous()

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        if (why := why_not_fourier_unit(module)) is not None:
            yield why or "it is no Fourier unit any more"
        else:
            x, conv = args[0] if len(args) == 1 else None, module.conv_layer
            yield from refuses_tensor(x, conv.weight, conv.in_channels // 2)
            if 0 in x.shape[1:]:  # type: ignore[union-attr]
                yield f"the input of {tuple(x.shape)} has no pixel to transform"  # type: ignore[union-attr]

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        for size in ((5, 7), (8, 4)):
            yield (_probe_tensor("unit", module.conv_layer.in_channels // 2, size),)


def _speaks_of_spectra(module: nn.Module) -> bool:
    """A child called conv_layer is little evidence: there must be an option of Fourier units, too, or a call of an FFT."""
    options = ("fft_norm", "ffc3d", "spectral_pos_encoding", "spatial_scale_factor")
    original = getattr(type(module), "__inpaintrt_original__", type(module))
    names = getattr(getattr(original.forward, "__code__", None), "co_names", ())
    return any(hasattr(module, option) for option in options) or any("fft" in name for name in names)


# ---- parts of adapters ----------------------------------------------------------------------------------------------


def _read(found: T | str | None) -> T:
    """What `match` accepted."""
    if found is None or isinstance(found, str):
        raise RuntimeError(f"the module was changed after it was accelerated: {found or 'another structure'}")
    return found


def _in_formats(streams: Streams, like: Streams) -> Streams:
    """Each stream in the memory format of its counterpart."""
    local, wide = (t.contiguous(memory_format=memory_format_of(other)) for t, other in zip(streams, like, strict=True))
    return local, wide


def _probe_tensor(name: str, channels: int, size: tuple[int, int]) -> Tensor:
    from inpaintrt.testing.recipe import image

    return image(f"probe/{name}", 2, channels, *size) - 0.25


def _probe_sizes(spectral: Spectral, padding: int = 0) -> list[tuple[int, int]]:
    """Small sizes that padding and spectrum allow, odd and narrow ones where they may be."""
    scale, more = 1 if spectral.before is None else 2, 2 * max(0, padding - 1)
    sizes = [(5, 7), (8, 4)] if spectral.local_unit is None else [(4, 4), (6, 6)]
    return [(scale * (h + more), scale * (w + more)) for h, w in sizes]


def _probe_streams(layer: Layer) -> Iterator[Streams]:
    assert layer.spectral is not None
    for size in _probe_sizes(layer.spectral, layer.local.padding[0]):
        local = _probe_tensor("local", layer.local.in_channels, size)
        yield local, _probe_tensor("global", layer.to_local.in_channels, size)


ADAPTERS = (GeneratorAdapter(), BlockAdapter(), FfcAdapter(), SpectralAdapter(), FourierUnitAdapter())

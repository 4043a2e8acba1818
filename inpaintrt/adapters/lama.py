"""LaMa and whatever copies its modules: fast Fourier convolutions, their residual blocks, whole generators.

What is recognised are children, shapes and attributes, under the names that the public state dicts fix (`convl2l`,
`convg2g`, `bn_l`, …); class names differ between copies and are ignored. What is done, all of it exact algebra:

- local-to-local and global-to-local are one convolution over concatenated input channels;
- every batch norm in eval mode folds into the convolution before it;
- multiplications by a gate of 1 and additions of 0 are dropped;
- the two streams stay one tensor, padded once.

Convolutions and FFTs are torch's own. Full-resolution layers run channels-last, which is twice as fast there. The blocks
stay contiguous: oneDNN's channels-last convolution sums all of K in one chain, and at K = 4608 its rounding error is three
times that of the blocked one, which the tolerance rule does not allow; at 1/8 resolution both are equally fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .folding import (
    batch_norm_affine,
    conv2d_few_outputs,
    conv2d_reflect,
    is_plain_batch_norm,
    memory_format_of,
    scale_outputs,
)

# ---- recognition ----------------------------------------------------------------------------------------------------


def _is_conv(module: Any, kernel: int | None = None) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.bias is None
        and module.dilation == (1, 1)
        and (kernel is None or module.kernel_size == (kernel, kernel))
    )


def _why_not_fourier_unit(fu: nn.Module) -> str | None:
    """None when `fu` is a Fourier unit that the fused form covers; "" when it is none at all; else the option in the way."""
    conv, bn = getattr(fu, "conv_layer", None), getattr(fu, "bn", None)
    if not isinstance(conv, nn.Conv2d) or bn is None:
        return ""
    if not (_is_conv(conv, 1) and is_plain_batch_norm(bn, conv.out_channels)):
        return "its Fourier unit's convolution is not a plain 1×1 with batch norm"
    for option in ("spatial_scale_factor", "spectral_pos_encoding", "use_se", "ffc3d"):
        if getattr(fu, option, None):
            return f"its Fourier unit uses {option}"
    if getattr(fu, "fft_norm", "ortho") != "ortho":
        return "its Fourier unit is not orthonormal"
    return None


def _why_not_spectral(spectral: nn.Module, inputs: int, outputs: int) -> str | None:
    first, conv2, fu = (getattr(spectral, name, None) for name in ("conv1", "conv2", "fu"))
    if not (isinstance(first, nn.Sequential) and isinstance(conv2, nn.Conv2d) and isinstance(fu, nn.Module)):
        return ""
    if getattr(spectral, "enable_lfu", False) and isinstance(getattr(spectral, "lfu", None), nn.Module):
        return "its spectral transform has the local Fourier unit (LFU)"
    if not isinstance(getattr(spectral, "downsample", nn.Identity()), nn.Identity):
        return "its spectral transform downsamples"
    layers: list[Any] = list(first)
    if not (
        len(layers) == 3
        and _is_conv(layers[0], 1)
        and layers[0].in_channels == inputs
        and is_plain_batch_norm(layers[1], layers[0].out_channels)
        and isinstance(layers[2], nn.ReLU)
        and _is_conv(conv2, 1)
        and conv2.in_channels == layers[0].out_channels
        and conv2.out_channels == outputs
    ):
        return "its spectral transform is not 1×1, batch norm, ReLU, Fourier unit, 1×1"
    return _why_not_fourier_unit(fu)


def _why_not_ffc(module: Any, *, streams: bool) -> str | None:
    """FFC + batch norms + ReLUs. With `streams`, all four paths; otherwise any layer that a generator's head uses."""
    ffc = getattr(module, "ffc", None)
    local = getattr(ffc, "convl2l", None)
    if not isinstance(local, nn.Conv2d) or not hasattr(module, "bn_l"):
        return ""
    if getattr(ffc, "gated", False):
        return "its streams are gated"
    if not (_is_conv(local) and local.padding_mode == "reflect" and local.kernel_size[0] == local.kernel_size[1]):
        return "its convolutions are not plain, reflected and square"
    to_wide, from_wide, spectral = (getattr(ffc, name, None) for name in ("convl2g", "convg2l", "convg2g"))
    if not (is_plain_batch_norm(module.bn_l, local.out_channels) and isinstance(module.act_l, nn.ReLU)):
        return "its local stream does not end in batch norm and ReLU"
    same = {"kernel_size", "stride", "padding", "padding_mode", "dilation"}
    for conv in (to_wide, from_wide):
        if isinstance(conv, nn.Conv2d) and not (
            _is_conv(conv) and all(getattr(conv, a) == getattr(local, a) for a in same)
        ):
            return "its convolutions differ in geometry"
    if isinstance(to_wide, nn.Conv2d) and not (
        is_plain_batch_norm(module.bn_g, to_wide.out_channels) and isinstance(module.act_g, nn.ReLU)
    ):
        return "its global stream does not end in batch norm and ReLU"
    if not streams:
        return "it has a global input" if isinstance(from_wide, nn.Conv2d) else None
    if not (isinstance(to_wide, nn.Conv2d) and isinstance(from_wide, nn.Conv2d) and isinstance(spectral, nn.Module)):
        return ""  # a layer of a generator's head, which only the generator's form covers
    if local.stride != (1, 1) or local.padding != (local.kernel_size[0] // 2,) * 2:
        return "it is strided or changes the size"
    return _why_not_spectral(spectral, from_wide.in_channels, to_wide.out_channels)


def _why_not_block(module: Any) -> str | None:
    conv1, conv2 = getattr(module, "conv1", None), getattr(module, "conv2", None)
    if not (
        isinstance(conv1, nn.Module)
        and isinstance(conv2, nn.Module)
        and hasattr(conv1, "ffc")
        and hasattr(conv2, "ffc")
    ):
        return ""
    if getattr(module, "inline", False):
        return "its streams arrive as one tensor (inline)"
    for conv in (conv1, conv2):
        if (why := _why_not_ffc(conv, streams=True)) is not None:
            return why or "its two convolutions are not FFCs"
    return None


# ---- the fused forms ------------------------------------------------------------------------------------------------


def fourier_unit(fu: Any, x: Tensor) -> Tensor:
    """x (B, C, h, w), any layout → contiguous (B, Cout, h, w); batch norm folded, spectra in float32 at least."""
    b, _, h, w = x.shape
    half = w // 2 + 1
    scale, shift = batch_norm_affine(fu.bn)
    spectrum = torch.view_as_real(torch.fft.rfft2(x if x.dtype == torch.float64 else x.float(), norm="ortho"))
    y = spectrum.permute(0, 1, 4, 2, 3).reshape(b, -1, h, half)
    with torch.autocast(x.device.type, enabled=False):  # the spectral mix stays in float32 under bf16, too
        y = F.conv2d(y, scale_outputs(fu.conv_layer.weight, scale), shift).relu_()
    y = y.view(b, -1, 2, h, half).permute(0, 1, 3, 4, 2).contiguous()
    # Two one-dimensional inverses: a two-dimensional one assumes a symmetry that the ReLU has broken (see models.lama).
    return torch.fft.irfft(torch.fft.ifft(torch.view_as_complex(y), dim=-2, norm="ortho"), n=w, dim=-1, norm="ortho")


def ffc(module: Any, x: Tensor, n_local: int, residual: Tensor | None) -> Tensor:
    """One FFC with norms and ReLUs on x = [local | global] (B, C, h, w) contiguous; `residual` is added at the end."""
    paths, spectral = module.ffc, module.ffc.convg2g
    scale_l, shift_l = batch_norm_affine(module.bn_l)
    scale_g, shift_g = batch_norm_affine(module.bn_g)
    pad = paths.convl2l.padding[0]
    padded = F.pad(x, (pad, pad, pad, pad), mode="reflect")

    weight = torch.cat([paths.convl2l.weight, paths.convg2l.weight], dim=1)
    local = F.conv2d(padded, scale_outputs(weight, scale_l), shift_l).relu_()

    scale, shift = batch_norm_affine(spectral.conv1[1])
    hidden = F.conv2d(x[:, n_local:], scale_outputs(spectral.conv1[0].weight, scale), shift).relu_()
    mixed = fourier_unit(spectral.fu, hidden).add_(hidden).to(hidden.dtype)
    wide = F.conv2d(padded[:, :n_local], scale_outputs(paths.convl2g.weight, scale_g), shift_g)
    wide = wide.add_(F.conv2d(mixed, scale_outputs(spectral.conv2.weight, scale_g))).relu_()
    joined = torch.cat([local, wide], dim=1)
    return joined if residual is None else joined.add_(residual)


def residual_block(block: Any, x: Tensor) -> Tensor:
    """Two FFCs and the residual, on one contiguous tensor [local | global]."""
    n_local = block.conv1.ffc.convl2l.in_channels
    return ffc(block.conv2, ffc(block.conv1, x, n_local, None), n_local, x)


_LONG_SUM = 1000


def _layout(conv: nn.Conv2d) -> torch.memory_format:
    """The layout in which torch computes this convolution fast and with the accuracy of the default one (see above)."""
    long = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1] > _LONG_SUM
    return torch.contiguous_format if long else torch.channels_last


def head_layer(module: Any, x: Tensor) -> Tensor:
    """A layer without global input: conv, norm and ReLU; both outputs, where there are two, from one convolution."""
    local, to_wide = module.ffc.convl2l, getattr(module.ffc, "convl2g", None)
    scale, shift = batch_norm_affine(module.bn_l)
    weight = scale_outputs(local.weight, scale)
    if isinstance(to_wide, nn.Conv2d):
        scale_g, shift_g = batch_norm_affine(module.bn_g)
        weight = torch.cat([weight, scale_outputs(to_wide.weight, scale_g)])
        shift = torch.cat([shift, shift_g])
    return conv2d_reflect(x, weight, shift, stride=local.stride[0], padding=local.padding[0]).relu_()


def up_layer(conv: Any, bn: Any, x: Tensor) -> Tensor:
    """Transposed convolution, norm and ReLU."""
    scale, shift = batch_norm_affine(bn)
    bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)
    weight = conv.weight * scale.view(1, -1, 1, 1)
    return F.conv_transpose2d(x, weight, bias, conv.stride, conv.padding, conv.output_padding).relu_()


# ---- adapters -------------------------------------------------------------------------------------------------------

ALGORITHM = "batch norms folded, l2l+g2l merged, torch convolutions"


def _refuses_tensor(x: Any, weight: Tensor, least: int) -> Iterator[str]:
    if not isinstance(x, Tensor) or x.dim() != 4:
        yield "the input is not one 4-D tensor"
    elif x.device != weight.device:
        yield f"the input is on {x.device}, the weights are on {weight.device}"
    elif x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64):
        yield f"input {x.dtype} with weights {weight.dtype}; both must be float32 or float64 (for bf16: precision='bf16')"
    elif min(x.shape[-2:]) < least:
        yield f"the input of {tuple(x.shape[-2:])} is smaller than reflection allows ({least})"


def _streams_like(shape: tuple[int, int], n_local: int, n_wide: int) -> tuple[Tensor, Tensor]:
    from inpaintrt.testing.recipe import image

    local, wide = image("probe/local", 2, n_local, *shape), image("probe/global", 2, n_wide, *shape)
    return local - 0.25, wide - 0.25


class FfcAdapter:
    """FFC + norms + ReLUs with both streams in and out, as (local, global) tuples."""

    name = "lama.ffc"
    ops: tuple[str, ...] = ()
    algorithm = ALGORITHM
    deep = False

    def match(self, module: nn.Module) -> str | None:
        return _why_not_ffc(module, streams=True)

    def forward(self, module: Any, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _on_streams(
            lambda joined: ffc(module, joined, module.ffc.convl2l.in_channels, None), x, module.ffc.convl2l.out_channels
        )

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        yield from _refuses_streams(args, module.ffc.convl2l)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        ffc = module.ffc
        yield (_streams_like((5, 7), ffc.convl2l.in_channels, ffc.convg2l.in_channels),)
        yield (_streams_like((8, 4), ffc.convl2l.in_channels, ffc.convg2l.in_channels),)


class BlockAdapter:
    """Residual block of two FFCs on (local, global) tuples."""

    name = "lama.block"
    ops: tuple[str, ...] = ()
    algorithm = ALGORITHM
    deep = False

    def match(self, module: nn.Module) -> str | None:
        return _why_not_block(module)

    def forward(self, module: Any, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _on_streams(lambda joined: residual_block(module, joined), x, module.conv1.ffc.convl2l.in_channels)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        yield from _refuses_streams(args, module.conv1.ffc.convl2l)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        yield from FfcAdapter().probe_inputs(module.conv1)


def _refuses_streams(args: tuple[Any, ...], conv: Any) -> Iterator[str]:
    if (
        len(args) != 1
        or not isinstance(args[0], tuple)
        or len(args[0]) != 2
        or not all(isinstance(t, Tensor) for t in args[0])
    ):
        yield "the input is not a (local, global) pair of tensors"
        return
    for stream in args[0]:
        yield from _refuses_tensor(stream, conv.weight, conv.padding[0] + 1)


def _on_streams(fused: Any, x: tuple[Tensor, Tensor], n_local: int) -> tuple[Tensor, Tensor]:
    formats = [memory_format_of(t) for t in x]
    y = fused(torch.cat([t.contiguous() for t in x], dim=1))
    local, wide = y[:, :n_local], y[:, n_local:]
    return local.contiguous(memory_format=formats[0]), wide.contiguous(memory_format=formats[1])


class GeneratorAdapter:
    """A whole generator, as the Sequential that every copy of LaMa keeps its layers in."""

    name = "lama.generator"
    ops: tuple[str, ...] = ()
    algorithm = ALGORITHM + "; channels-last at full resolution; 7×7 output two by two pixels"
    deep = True

    def match(self, module: nn.Module) -> str | None:
        if not isinstance(module, nn.Sequential) or len(module) < 8:
            return ""
        if not any(hasattr(layer, "ffc") for layer in module):
            return ""
        try:
            _plan(module)
        except ValueError as why:
            return str(why)
        return None

    def forward(self, module: Any, x: Tensor) -> Tensor:
        plan = _plan(module)
        layout = memory_format_of(x)
        y = plan.stem_pad(x)
        for layer in plan.head:
            y = head_layer(layer, y.contiguous(memory_format=_layout(layer.ffc.convl2l)))
        y = y.contiguous()
        for block in plan.blocks:
            y = residual_block(block, y)
        y = y.contiguous(memory_format=torch.channels_last)
        for conv, bn in plan.ups:
            y = up_layer(conv, bn, y)
        pad, last = plan.out_pad.padding[0], plan.out_conv
        y = conv2d_reflect(y, last.weight, last.bias, stride=1, padding=pad, conv=conv2d_few_outputs)
        for layer in plan.after:
            y = layer(y)
        return y.contiguous(memory_format=layout)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        if len(args) != 1:
            yield "called with other arguments than one tensor"
            return
        plan = _plan(module)
        down = 2 ** len(plan.ups)
        yield from _refuses_tensor(args[0], plan.out_conv.weight, 2 * down)
        if any(size % down for size in args[0].shape[-2:]):
            yield f"the size {tuple(args[0].shape[-2:])} is not a multiple of {down}"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        from inpaintrt.testing.recipe import image

        plan = _plan(module)
        side = 2 * 2 ** len(plan.ups)  # two pixels at the bottleneck, the least that reflection allows
        channels = plan.head[0].ffc.convl2l.in_channels
        x = image("probe/image", 1, channels, side, side)
        x[:, -1] = (x[:, -1] > 0.5).float()
        yield (x,)


class _Plan:
    """The layers of a generator by role."""

    def __init__(self) -> None:
        self.stem_pad: Any = None
        self.head: list[Any] = []
        self.blocks: list[Any] = []
        self.ups: list[tuple[Any, Any]] = []
        self.out_pad: Any = None
        self.out_conv: Any = None
        self.after: list[Any] = []


def _plan(sequence: nn.Sequential) -> _Plan:
    """Read the layers in order; `ValueError` names the first that does not belong."""
    plan, layers = _Plan(), list(sequence)
    if not isinstance(layers[0], nn.ReflectionPad2d):
        raise ValueError("it does not begin with a reflection pad")
    plan.stem_pad = layers.pop(0)
    while layers and hasattr(layers[0], "ffc"):
        if (why := _why_not_ffc(layers[0], streams=False)) is not None:
            raise ValueError(f"layer {len(plan.head) + 1}: {why or 'not an FFC'}")
        plan.head.append(layers.pop(0))
    while layers and hasattr(layers[0], "conv1"):
        if (why := _why_not_block(layers[0])) is not None:
            raise ValueError(f"residual block {len(plan.blocks)}: {why or 'not two FFCs'}")
        plan.blocks.append(layers.pop(0))
    if not plan.head or not plan.blocks:
        raise ValueError("it has no residual blocks of FFCs after its strided convolutions")
    if not layers or any(True for _ in layers[0].parameters()) or isinstance(layers[0], nn.Identity):
        raise ValueError("the streams are not joined after the residual blocks")
    layers.pop(0)  # concatenation: the only thing a layer without parameters can do with a pair (the probe checks it)
    while len(layers) >= 3 and isinstance(layers[0], nn.ConvTranspose2d):
        conv, bn, relu = layers[:3]
        if not (
            is_plain_batch_norm(bn, conv.out_channels)
            and isinstance(relu, nn.ReLU)
            and (conv.stride, conv.groups, conv.dilation) == ((2, 2), 1, (1, 1))
        ):
            raise ValueError("an upsampling layer is not transposed convolution, batch norm, ReLU")
        plan.ups.append((conv, bn))
        del layers[:3]
    if not (len(layers) >= 2 and isinstance(layers[0], nn.ReflectionPad2d) and isinstance(layers[1], nn.Conv2d)):
        raise ValueError("it does not end in a reflection pad and a convolution")
    plan.out_pad, plan.out_conv, plan.after = layers[0], layers[1], layers[2:]
    pad, kernel = plan.out_pad.padding, plan.out_conv.kernel_size
    if not (
        len(set(pad)) == 1 and kernel == (2 * pad[0] + 1,) * 2 and plan.out_conv.stride == (1, 1) and plan.ups
        and plan.out_conv.padding == (0, 0) and plan.out_conv.groups == 1 and plan.out_conv.dilation == (1, 1)
    ):  # fmt: skip
        raise ValueError("its output convolution is not a plain same convolution")
    if any(any(True for _ in layer.parameters()) for layer in plan.after):
        raise ValueError("it has weights after its output convolution")
    return plan


ADAPTERS = (GeneratorAdapter(), BlockAdapter(), FfcAdapter())

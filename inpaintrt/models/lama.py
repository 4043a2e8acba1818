"""LaMa: resolution-robust large-mask inpainting with Fourier convolutions, as a plain PyTorch reference network.

Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions", WACV 2022. State-dict keys are those
of the public checkpoints (`model.1.ffc.convl2l.weight`, …), so that their weights load unchanged; module attributes have
the public names too, because adapters recognise a network by them.

The network is a stem (7×7), strided 3×3 convolutions, residual blocks of fast Fourier convolutions (FFC) at 1/8 of the
resolution, and transposed convolutions back. An FFC carries two streams, local and global; the global-to-global path
mixes channels in the frequency domain and so sees the whole image. A stream without channels is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .making import only_known

Streams = tuple[Tensor | None, Tensor | None]
PaddingMode = Literal["reflect", "zeros", "replicate", "circular"]


@dataclass(frozen=True, kw_only=True)
class FFCOptions:
    """What differs between public copies of the FFC. The defaults are those of the released LaMa models.

    Attributes:
        batch_norm: after every convolution; False in FcF, whose FFCs have none.
        bias: of the spatial convolutions (the 1×1 convolutions of the spectral path never have one).
        gated: scale the two crossing paths, local to global and back, by sigmoids of a 1×1 convolution of the input.
        enable_lfu: add the local Fourier unit, which transforms the four quadrants of a map; on in FcF.
        padding_mode: of the spatial convolutions.
        activation: after each FFC's batch norms.
    """

    batch_norm: bool = True
    bias: bool = False
    gated: bool = False
    enable_lfu: bool = False
    padding_mode: PaddingMode = "reflect"
    activation: Literal["relu", "none"] = "relu"


RELEASED = FFCOptions()


class FourierUnit(nn.Module):
    """rfft2 (orthonormal) → 1×1 convolution over interleaved real and imaginary channels → batch norm → ReLU → inverse.

    Channel 2c is the real, 2c + 1 the imaginary part of channel c. The rectified spectrum is not Hermitian, and the
    inverse follows the numpy rule whatever the device: complex inverse over rows, then real inverse over columns, which
    ignores the imaginary part of the bins kx = 0 and (even width) kx = w/2. cuFFT's 2-D inverse assumes symmetry instead
    and gives other numbers, hence the two one-dimensional calls.
    """

    def __init__(self, in_channels: int, out_channels: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.conv_layer = nn.Conv2d(2 * in_channels, 2 * out_channels, kernel_size=1, bias=False)
        self.bn = _norm(2 * out_channels, batch_norm)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) → (B, Cout, h, w), any h and w from 1."""
        b, _, h, w = x.shape
        spectrum = torch.view_as_real(torch.fft.rfft2(x, norm="ortho"))  # (B, C, h, w//2 + 1, 2)
        y = spectrum.permute(0, 1, 4, 2, 3).reshape(b, -1, h, w // 2 + 1)
        y = self.relu(self.bn(self.conv_layer(y)))
        y = y.view(b, -1, 2, h, w // 2 + 1).permute(0, 1, 3, 4, 2).contiguous()
        rows = torch.fft.ifft(torch.view_as_complex(y), dim=-2, norm="ortho")
        return torch.fft.irfft(rows, n=w, dim=-1, norm="ortho")


class SpectralTransform(nn.Module):
    """1×1 convolution, batch norm, ReLU; then x + FourierUnit(x) [+ local Fourier unit]; then 1×1 convolution.

    With stride 2 the input is averaged over 2×2 pixels first.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, options: FFCOptions = RELEASED) -> None:
        super().__init__()
        hidden = out_channels // 2
        if options.enable_lfu and hidden % 4:
            raise ValueError(f"a local Fourier unit needs 8·n global channels, got {out_channels}")
        self.enable_lfu = options.enable_lfu
        self.stride = stride
        self.downsample = nn.AvgPool2d(2, 2) if stride == 2 else nn.Identity()
        norm = [_norm(hidden, True)] if options.batch_norm else []
        self.conv1 = nn.Sequential(nn.Conv2d(in_channels, hidden, 1, bias=False), *norm, nn.ReLU(inplace=True))
        self.fu = FourierUnit(hidden, hidden, options.batch_norm)
        if options.enable_lfu:
            self.lfu = FourierUnit(hidden, hidden, options.batch_norm)
        self.conv2 = nn.Conv2d(hidden, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.downsample(x))
        mixed = x + self.fu(x)
        if self.enable_lfu:
            mixed = mixed + self.lfu(_quadrants(x)).repeat(1, 1, 2, 2)
        return self.conv2(mixed)


def _quadrants(x: Tensor) -> Tensor:
    """The quadrants of the first quarter of the channels, as channels: (B, C, h, h) → (B, C, h/2, h/2).

    In the order top left, bottom left, top right, bottom right. The public code cuts columns, too, every h/2 pixels (the
    height's half), so that only square maps of even size have a meaning; others are refused here.
    """
    channels, h, w = x.shape[1:]
    if h != w or h % 2:
        raise ValueError(f"the local Fourier unit (LFU) is defined on square maps of even size, not on {h}×{w}")
    rows = torch.cat(x[:, : channels // 4].split(h // 2, dim=-2), dim=1)
    return torch.cat(rows.split(h // 2, dim=-1), dim=1)


class FFC(nn.Module):
    """Fast Fourier convolution of a local and a global stream; a path from or to an empty stream is absent (Identity).

    ratio_in and ratio_out are the global shares of the channels, rounded down. Stride is 1 or 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        ratio_in: float,
        ratio_out: float,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        options: FFCOptions = RELEASED,
    ) -> None:
        super().__init__()
        in_global, out_global = int(in_channels * ratio_in), int(out_channels * ratio_out)
        in_local, out_local = in_channels - in_global, out_channels - out_global
        if stride not in (1, 2):
            raise ValueError(f"stride is {stride}; accepted: 1 or 2")
        if options.gated and not (in_local and in_global and out_local):
            raise ValueError("a gated FFC needs a local and a global input and a local output")

        def path(inputs: int, outputs: int) -> nn.Module:
            if inputs == 0 or outputs == 0:
                return nn.Identity()
            return nn.Conv2d(
                inputs, outputs, kernel_size, stride, padding, dilation,
                bias=options.bias, padding_mode=options.padding_mode,
            )  # fmt: skip

        self.convl2l = path(in_local, out_local)
        self.convl2g = path(in_local, out_global)
        self.convg2l = path(in_global, out_local)
        self.convg2g: nn.Module = nn.Identity()
        if in_global and out_global:
            self.convg2g = SpectralTransform(in_global, out_global, stride, options)
        self.gated = options.gated
        self.gate: nn.Module = nn.Conv2d(in_channels, 2, kernel_size=1) if options.gated else nn.Identity()
        self.stride = stride
        self.ratio_gin, self.ratio_gout = ratio_in, ratio_out
        self.global_in_num = in_global

    def forward(self, x: Tensor | Streams) -> Streams:
        local, wide = x if isinstance(x, tuple) else (x, None)
        l2l, l2g = _through(self.convl2l, local), _through(self.convl2g, local)
        g2l, g2g = _through(self.convg2l, wide), _through(self.convg2g, wide)
        if self.gated and local is not None and wide is not None:
            into_local, into_wide = torch.sigmoid(self.gate(torch.cat([local, wide], dim=1))).chunk(2, dim=1)
            g2l = None if g2l is None else g2l * into_local
            l2g = None if l2g is None else l2g * into_wide
        return _sum(l2l, g2l), _sum(l2g, g2g)


def _through(path: nn.Module, stream: Tensor | None) -> Tensor | None:
    """A path's output; None for an absent path."""
    if isinstance(path, nn.Identity):
        return None
    if stream is None:
        raise ValueError("a stream is missing: this FFC takes a (local, global) pair")
    return path(stream)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    """A batch norm, or nothing where it is off or there is nothing to normalise."""
    return nn.BatchNorm2d(channels) if batch_norm and channels else nn.Identity()


def _activation(channels: int, kind: str) -> nn.Module:
    if kind not in ("relu", "none"):
        raise ValueError(f"activation is {kind!r}; accepted: 'relu', 'none'")
    return nn.ReLU(inplace=True) if kind == "relu" and channels else nn.Identity()


class FFC_BN_ACT(nn.Module):
    """FFC, then batch norm and activation on each stream."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        ratio_in: float,
        ratio_out: float,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        options: FFCOptions = RELEASED,
    ) -> None:
        super().__init__()
        self.ffc = FFC(in_channels, out_channels, kernel_size, ratio_in, ratio_out, stride, padding, dilation, options)
        out_global = int(out_channels * ratio_out)
        self.bn_l = _norm(out_channels - out_global, options.batch_norm)
        self.bn_g = _norm(out_global, options.batch_norm)
        self.act_l = _activation(out_channels - out_global, options.activation)
        self.act_g = _activation(out_global, options.activation)

    def forward(self, x: Tensor | Streams) -> Streams:
        local, wide = self.ffc(x)
        return (
            None if local is None else self.act_l(self.bn_l(local)),
            None if wide is None else self.act_g(self.bn_g(wide)),
        )


class FFCResnetBlock(nn.Module):
    """Two 3×3 FFCs with their activations, and the input added to each stream; nothing after the addition.

    With `inline` the streams come and go as one tensor, local channels first.
    """

    def __init__(
        self, channels: int, ratio: float, dilation: int = 1, inline: bool = False, options: FFCOptions = RELEASED
    ) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            FFC_BN_ACT(channels, channels, 3, ratio, ratio, 1, dilation, dilation, options) for _ in range(2)
        )
        self.inline = inline

    def forward(self, x: Any) -> Any:
        """x (local, global) → the same; with `inline`, x (B, C, h, w) → (B, C, h, w)."""
        if self.inline:
            x = x.tensor_split([x.shape[1] - self.conv1.ffc.global_in_num], dim=1)
        local, wide = self.conv2(self.conv1(tuple(x)))
        out = _sum(x[0], local), _sum(x[1], wide)
        return torch.cat(out, dim=1) if self.inline else out  # type: ignore[arg-type]


class ConcatTupleLayer(nn.Module):
    """The two streams as one tensor, local channels first."""

    def forward(self, x: Streams) -> Tensor:
        return torch.cat([stream for stream in x if stream is not None], dim=1)


OUTPUT_ACTIVATIONS: dict[str, type[nn.Module] | None] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "none": None}


class LaMa(nn.Module):
    """The LaMa generator. Defaults are big-lama's (51.0 M parameters).

    Args:
        n_blocks: residual blocks; 18 in big-lama, 9 in lama-fourier, 6 in the shipped lama_mini.
        base_width: channels after the stem; doubled by each of the `n_downsampling` strided convolutions.
        ratio: share of the global stream in the residual blocks.
        max_width: bound of the doubling.
        in_channels: of the input; 4 are an RGB image and its mask.
        out_channels: of the output.
        output_activation: "sigmoid", "tanh" or "none".
        down_padding_mode: padding mode of the strided convolutions; None for that of the residual blocks.
        ffc: options of `FFCOptions`. `gated`, `enable_lfu` concern the residual blocks; an LFU takes square images only.
    """

    size_multiple = 8
    min_size = 16

    def __init__(
        self,
        n_blocks: int = 18,
        base_width: int = 64,
        n_downsampling: int = 3,
        ratio: float = 0.75,
        max_width: int = 1024,
        *,
        in_channels: int = 4,
        out_channels: int = 3,
        output_activation: str = "sigmoid",
        down_padding_mode: PaddingMode | None = None,
        **ffc: Any,
    ) -> None:
        super().__init__()
        if n_downsampling < 1:
            raise ValueError(f"n_downsampling is {n_downsampling}; accepted: 1 or more")
        if output_activation not in OUTPUT_ACTIVATIONS:
            accepted = ", ".join(map(repr, OUTPUT_ACTIVATIONS))
            raise ValueError(f"output_activation is {output_activation!r}; accepted: {accepted}")
        only_known(type(self), ffc, FFCOptions)
        options = FFCOptions(**ffc)
        self.config = {
            "n_blocks": n_blocks, "base_width": base_width, "n_downsampling": n_downsampling, "ratio": ratio,
            "max_width": max_width, "in_channels": in_channels, "out_channels": out_channels,
            "output_activation": output_activation, "down_padding_mode": down_padding_mode, **asdict(options),
        }  # fmt: skip
        self.size_multiple = 1 << (n_downsampling + options.enable_lfu)  # an LFU halves the bottleneck once more
        self.min_size = 2 << n_downsampling  # reflection by one pixel needs two at the bottleneck

        def width(level: int) -> int:
            return min(max_width, base_width << level)

        head = replace(options, gated=False, padding_mode=down_padding_mode or options.padding_mode)
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), FFC_BN_ACT(in_channels, base_width, 7, 0, 0, options=head)]
        for level in range(n_downsampling):
            share = ratio if level == n_downsampling - 1 else 0
            layers.append(FFC_BN_ACT(width(level), width(level + 1), 3, 0, share, stride=2, padding=1, options=head))
        layers += [FFCResnetBlock(width(n_downsampling), ratio, options=options) for _ in range(n_blocks)]
        layers.append(ConcatTupleLayer())
        for level in range(n_downsampling, 0, -1):
            layers += [
                nn.ConvTranspose2d(width(level), width(level - 1), 3, stride=2, padding=1, output_padding=1),
                _norm(width(level - 1), options.batch_norm),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(base_width, out_channels, 7)]
        if (last := OUTPUT_ACTIVATIONS[output_activation]) is not None:
            layers.append(last())
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 4, H, W): RGB in [0, 1] with the hole set to 0, then the mask (1 = hole) → (B, 3, H, W) in [0, 1].

        H and W must be multiples of `size_multiple` and at least `min_size` (pad first; see `inpaintrt.pipeline`). The
        output's range is that of `output_activation`.
        """
        return self.model(x)

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1]; values under the hole are ignored.
            mask: (B, 1, H, W), 1 = hole, 0 = known; any dtype.

        Returns:
            (B, 3, H, W); known pixels as given, the hole from the network.
        """
        return torch.where(mask != 0, self(self.network_input(image, mask)), image)

    def network_input(self, image: Tensor, mask: Tensor) -> Tensor:
        """What `forward` takes, of what `inpaint` does."""
        known = torch.where(mask != 0, torch.zeros((), dtype=image.dtype, device=image.device), image)
        return torch.cat([known, mask.to(image.dtype)], dim=1)


# ---- what weights say about their network ---------------------------------------------------------------------------

ANCHOR = "1.ffc.convl2l.weight"
"""The stem's weight, by its name below the container of layers; no other network has a layer of that name."""

ANCHORS = (ANCHOR,)
NAMES = r"\d"
PREFIX = "model."

FOREIGN = (
    (r"(^|\.)(rel_pos_emb|direct_emb)\.", "a LaMa with masked positional encoding (lama_mpe), which ours lacks"),
)
"""Patterns of names, anywhere in a file, that mean another network, with what to say."""


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `LaMa`, read off the keys and shapes of a state dict with keys `model.…`.

    What leaves no trace in them (padding modes, activations) is not in the result.

    Raises: `KeyError` with the first key that a LaMa generator has and this state dict lacks.
    """
    layers: dict[int, set[str]] = {}
    for key in state:
        if match := re.match(r"model\.(\d+)\.(.+)", key):
            layers.setdefault(int(match[1]), set()).add(match[2])

    def count(first: int, part: str) -> int:
        n = 0
        while any(name.startswith(part) for name in layers.get(first + n, ())):
            n += 1
        return n

    def outputs(layer: int) -> tuple[int, int]:
        """Local and global channels of a layer without global input."""
        local, wide = (state.get(f"model.{layer}.ffc.conv{path}.weight") for path in ("l2l", "l2g"))
        if local is None and wide is None:
            raise KeyError(f"model.{layer}.ffc.convl2l.weight")
        return (0 if local is None else local.shape[0]), (0 if wide is None else wide.shape[0])

    stem = state["model.1.ffc.convl2l.weight"]
    n_downsampling = count(2, "ffc.")
    n_blocks = count(2 + n_downsampling, "conv1.")
    if n_downsampling == 0:
        raise KeyError("model.2.ffc.convl2l.weight")
    local, wide = outputs(1 + n_downsampling)
    inner = [name for i in range(n_blocks) for name in layers[2 + n_downsampling + i]]
    return {
        "n_blocks": n_blocks,
        "base_width": stem.shape[0],
        "n_downsampling": n_downsampling,
        "ratio": _ratio(wide, local + wide),
        "max_width": max(sum(outputs(2 + i)) for i in range(n_downsampling)),
        "in_channels": stem.shape[1],
        "out_channels": state[f"model.{4 + 4 * n_downsampling + n_blocks}.weight"].shape[0],
        "batch_norm": "bn_l.weight" in layers[1],
        "bias": "ffc.convl2l.bias" in layers[1],
        "gated": any(".ffc.gate." in name for name in inner),
        "enable_lfu": any(".lfu." in name for name in inner),
    }


def _ratio(part: int, whole: int) -> float:
    """The share that `FFC` rounds back to `part` of `whole`: their quotient, or the next number where that falls short."""
    ratio = part / whole
    return ratio if int(whole * ratio) == part else math.nextafter(ratio, 1.0)


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments that leave no trace in shapes, from notes on the modules with names `model.…`.

    Notes are those of `models.weights_file`. What they do not tell is not in the result; a last layer that is no known
    activation is given by its class, for `LaMa` to refuse.
    """
    layers = [int(match[1]) for name in modules if (match := re.fullmatch(r"model\.(\d+)", name))]
    if not layers:
        return {}
    kinds = {nn.Sigmoid.__name__: "sigmoid", nn.Tanh.__name__: "tanh", "Conv2d": "none", "Identity": "none"}
    last = modules[f"model.{max(layers)}"].kind
    config: dict[str, Any] = {"output_activation": kinds.get(last, last)}
    first = min((n for n in layers if f"model.{n}.conv1" in modules), default=None)
    if first is not None:
        down, block = (f"model.{name}.ffc.conv" for name in (first - 1, f"{first}.conv1"))
        for option, paths in (("padding_mode", block), ("down_padding_mode", down)):
            notes = [modules[paths + path] for path in ("l2l", "l2g") if paths + path in modules]
            if modes := [mode for note in notes if (mode := _padding_mode(note))]:
                config[option] = modes[0]
    return config


def _padding_mode(convolution: Any) -> str | None:
    """The padding mode of a convolution, from its attribute or from TorchScript code; None where neither tells."""
    if isinstance(mode := convolution.attributes.get("padding_mode"), str):
        return mode
    for sign, mode in (("reflect", "reflect"), ("replicat", "replicate"), ("circular", "circular")):
        if sign in convolution.code:
            return mode
    # conv(input, weight, bias, stride, padding, …): padding of its own means zeros; none may follow a pad elsewhere
    padding = re.search(r"conv\w*\([^\[\]]*\[\d+, \d+\], \[(\d+), (\d+)\]", convolution.code)
    return "zeros" if padding and padding.groups() != ("0", "0") else None

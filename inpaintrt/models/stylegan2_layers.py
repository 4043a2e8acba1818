"""Layers of StyleGAN 2 that inpainting networks are built of, in plain torch.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020. All weights are stored at about unit
variance and scaled where they are used (equalised learning rate). Two sets of names are in use: NVIDIA's (`weight`,
`affine`, `noise_strength`) and the one of the ports that build a layer of small modules (`conv.modulation`, `noise.weight`,
`activate.bias`); classes of the second kind have "Port" in their names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.ops._resampling import resample
from inpaintrt.ops.modulated_conv2d import convolve_resampled, modulated

EPS = 1e-8
FIR = (1.0, 3.0, 3.0, 1.0)


def fir(gain: float = 1.0) -> Tensor:
    """The 4×4 filter of sum `gain` by which images are doubled and halved."""
    taps = torch.tensor(FIR)
    return gain * torch.outer(taps, taps) / taps.sum() ** 2


def act(x: Tensor, clamp: float | None = None, gain: float = 2**0.5) -> Tensor:
    """Leaky ReLU of slope 0.2, times √2, clamped to ±`clamp`."""
    y = F.leaky_relu(x, 0.2) * gain
    return y if clamp is None else y.clamp(-clamp, clamp)


def wide(x: Tensor) -> Tensor:
    """x in float32 where it is in half precision; else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def normalised(z: Tensor, dim: int | tuple[int, ...] | None = 1, eps: float = EPS) -> Tensor:
    """z with a mean square of 1 along `dim`; None: over everything. Rounded to z's dtype once: eps is 0 in float16."""
    x = wide(z)
    square = x.square().mean() if dim is None else x.square().mean(dim, keepdim=True)
    return (x * (square + eps).rsqrt()).to(z.dtype)


def check_planes(noise: Sequence[Tensor], shapes: Sequence[tuple[int, int, int, int]]) -> None:
    """Raises: `ValueError` for planes of noise of other shapes than these (B, 1, H, W), or (1, 1, H, W)."""
    if isinstance(noise, str):
        raise ValueError(f"noise is {noise!r}; accepted: {len(shapes)} planes")
    if len(noise) != len(shapes):
        raise ValueError(f"there are {len(noise)} planes of noise; accepted: {len(shapes)} planes")
    for plane, (batch, *shape) in zip(noise, shapes, strict=True):
        if tuple(plane.shape) not in ((batch, *shape), (1, *shape)):
            raise ValueError(f"a plane of noise is {tuple(plane.shape)}; accepted: {(batch, *shape)} or {(1, *shape)}")


def doubled(image: Tensor, f: Tensor) -> Tensor:
    """A picture at twice the size. `f` has a sum of 4: two samples of three quarters and one quarter meet on each axis."""
    return resample(image, f.to(image.dtype), up=(2, 2), padding=(2, 1, 2, 1))


class FullyConnected(nn.Module):
    """weight · x + bias, with `multiplier` as the learning rate of both; activated where `activation` says so."""

    def __init__(
        self, inputs: int, outputs: int, *, activation: bool = False, multiplier: float = 1.0, bias: float = 0.0
    ) -> None:
        super().__init__()
        self.activation, self.multiplier = activation, multiplier
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias / multiplier))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * (self.multiplier / math.sqrt(self.weight.shape[1]))
        y = F.linear(x, weight, self.bias * self.multiplier)
        return act(y) if self.activation else y


class Convolution(nn.Module):
    """A convolution that keeps the size, or with `down` filters and halves; bias and activation follow. NVIDIA's names."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, down: bool = False, clamp: float | None = None):
        super().__init__()
        self.down, self.clamp = down, clamp
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if down:
            self.register_buffer("resample_filter", fir())

    def forward(self, x: Tensor) -> Tensor:
        f = self.resample_filter if self.down else None
        return act(equalised(x, self.weight, f) + self.bias.view(-1, 1, 1), self.clamp)


def equalised(x: Tensor, weight: Tensor, f: Tensor | None = None) -> Tensor:
    """x convolved with the weight scaled by 1/√fan_in; filtered by f and halved where it is given."""
    pad = weight.shape[3] // 2
    scaled = weight / math.sqrt(weight[0].numel())
    if f is None:
        return F.conv2d(x, scaled, padding=pad)
    return F.conv2d(resample(x, f.to(x.dtype), padding=(pad + 1,) * 4), scaled, stride=2)


class Blur(nn.Module):
    """Holds a filter under the name that some ports give it; the layer around it applies it."""

    kernel: Tensor

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("kernel", fir(gain))


class Weight(nn.Module):
    """Holds a weight."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


class Bias(nn.Module):
    """Holds a bias."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))


class PortConvolution(nn.Sequential):
    """`Convolution` as a sequence of a filter, where it halves, a weight and a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, down: bool = False) -> None:
        super().__init__(*([Blur()] if down else []), Weight(outputs, inputs, kernel, kernel), Bias(outputs))

    def forward(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        *blur, conv, activate = layers
        f = blur[0].kernel if blur else None
        return act(equalised(x, conv.weight, f) + activate.bias.view(-1, 1, 1))


class ModulatedConvolution(nn.Module):
    """What the layers with a style have in common.

    Attributes:
        up: whether the size is doubled. Doubling layers convolve, the others correlate.
        demodulate: whether filters are brought to norm 1 for each image.
        normalise: whether filters, and the styles of the whole batch together, are brought to a mean square of 1 before.
            It cancels in the demodulation but for its eps, and makes an image's result depend on the batch a little.
    """

    up: bool
    demodulate: bool = True
    normalise: bool = False

    def convolve(self, x: Tensor, weight: Tensor, style: Tensor, f: Tensor | None, gain: float) -> Tensor:
        """x (B, Cin, H, W) by weight (Cout, Cin, kh, kw) in the styles (B, Cin); f has a sum of 1, and gives 4."""
        if self.demodulate and self.normalise:
            weight, style = normalised(weight, (1, 2, 3), 0.0), normalised(style, None, 0.0)
        flipped = weight.flip([2, 3]) if self.up else weight
        filters = modulated(flipped, style, self.demodulate, EPS, gain)
        taps = x.new_ones(1, 1) if f is None else f.to(x.dtype)
        return convolve_resampled(x, filters, 2 if self.up else 1, 1, weight.shape[3] // 2, taps)


class StyledConvolution(ModulatedConvolution):
    """Modulated convolution, noise, bias, activation. NVIDIA's names.

    Args:
        size: height and width of the output, which `noise_const` has; None: no noise.
        keeps_filter: whether there is a `resample_filter` in the state dict although nothing is doubled.
    """

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: int,
        *,
        size: int | None,
        up: bool = False,
        keeps_filter: bool = False,
        normalise: bool = False,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.up, self.normalise, self.clamp = up, normalise, clamp
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if size is not None:
            self.noise_strength = nn.Parameter(torch.zeros(()))
        if up or keeps_filter:
            self.register_buffer("resample_filter", fir())
        if size is not None:
            self.register_buffer("noise_const", torch.randn(size, size))
        self.affine = FullyConnected(style, inputs, bias=1.0)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        """x (B, Cin, H, W) in style (B, style); noise (1|B, 1, H', W') or None."""
        gain = 1.0 if self.normalise else 1 / math.sqrt(self.weight[0].numel())
        y = self.convolve(x, self.weight, self.affine(style), self.resample_filter if self.up else None, gain)
        if noise is not None:
            y = y + noise.to(y.dtype) * self.noise_strength
        return act(y + self.bias.view(-1, 1, 1), self.clamp)


class ToRGB(ModulatedConvolution):
    """A picture of features: a 1×1 convolution in a style, without demodulation, and a bias. NVIDIA's names."""

    up = False
    demodulate = False

    def __init__(self, inputs: int, style: int, *, clamp: float | None = None) -> None:
        super().__init__()
        self.clamp = clamp
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.affine = FullyConnected(style, inputs, bias=1.0)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        y = self.convolve(x, self.weight, self.affine(style), None, 1 / math.sqrt(self.weight.shape[1]))
        y = y + self.bias.view(-1, 1, 1)
        return y if self.clamp is None else y.clamp(-self.clamp, self.clamp)


class PortModulation(nn.Module):
    """Holds what the ports keep under `conv`: a weight with a leading 1, a filter of sum 4 where it doubles, the affine map."""

    def __init__(self, inputs: int, outputs: int, kernel: int, style: int, *, up: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel, kernel))
        if up:
            self.blur = Blur(4.0)
        self.modulation = FullyConnected(style, inputs, bias=1.0)


class PortStyledConvolution(ModulatedConvolution):
    """`StyledConvolution` under the ports' names; noise has a weight and no plane of its own."""

    def __init__(self, inputs: int, outputs: int, style: int, *, up: bool = False) -> None:
        super().__init__()
        self.up = up
        self.conv = PortModulation(inputs, outputs, 3, style, up=up)
        self.noise = Weight(1)
        self.activate = Bias(outputs)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        weight = self.conv.weight[0]
        f = self.conv.blur.kernel / 4 if self.up else None
        y = self.convolve(x, weight, self.conv.modulation(style), f, 1 / math.sqrt(weight[0].numel()))
        if noise is not None:
            y = y + noise.to(y.dtype) * self.noise.weight
        return act(y + self.activate.bias.view(-1, 1, 1))


class PortToRGB(ModulatedConvolution):
    """`ToRGB` under the ports' names, with the filter for the smaller picture."""

    up = False
    demodulate = False

    def __init__(self, inputs: int, style: int, *, filters: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if filters:
            self.upsample = Blur(4.0)
        self.conv = PortModulation(inputs, 3, 1, style)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        weight = self.conv.weight[0]
        y = self.convolve(x, weight, self.conv.modulation(style), None, 1 / math.sqrt(weight.shape[1]))
        return y + self.bias

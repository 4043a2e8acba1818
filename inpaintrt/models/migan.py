"""MI-GAN: inpainting on mobile devices, in plain torch.

Sargsyan et al., "MI-GAN: A Simple Baseline for Image Inpainting on Mobile Devices", ICCV 2023. An encoder and a decoder of
depthwise and pointwise convolutions with StyleGAN 2's filters, noise and activation, and no style. 5.9 M parameters. These
are the networks as they are shipped, after re-parameterisation; noise is stored with the weights, for one size of images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stylegan2_layers import act, check_planes, fir

CLAMP = 256.0


class Filter(nn.Module):
    """A depthwise 4×4 convolution whose weight, a parameter, is StyleGAN's filter."""

    def __init__(self, channels: int, gain: float, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.filter = nn.Conv2d(channels, channels, 4, stride, padding, groups=channels, bias=False)
        with torch.no_grad():
            self.filter.weight.copy_(fir(gain))


class Downsample(Filter):
    """Half the size."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1.0, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(x)  # type: ignore[no-any-return]


class Upsample(Filter):
    """Twice the size, `size`: the nearest pixel times `filter_const`, which is 1 in even rows and columns, else 0."""

    filter_const: Tensor

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, 4.0)
        even = (torch.arange(size) % 2 == 0).float()
        self.register_buffer("filter_const", torch.outer(even, even)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") * self.filter_const
        return self.filter(F.pad(x, (2, 1, 2, 1)))  # type: ignore[no-any-return]


class SeparableConvolution(nn.Module):
    """Depthwise 3×3, activation, pointwise, activation; halved between the two, or doubled, with noise, before the last.

    Args:
        size: height and width of the output, where it is doubled or has noise.
        noise: whether a stored plane is added.
    """

    noise_const: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        size: int | None = None,
        down: bool = False,
        up: bool = False,
        noise: bool = False,
    ) -> None:
        super().__init__()
        self.down, self.up, self.noise = down, up, noise
        if (up or noise) and size is None:
            raise ValueError("size is None; accepted: a number where a layer doubles or has noise")
        if noise:
            self.noise_strength = nn.Parameter(torch.zeros(()))
            self.register_buffer("noise_const", torch.randn(size, size))  # type: ignore[arg-type]
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
        self.conv2 = nn.Conv2d(inputs, outputs, 1, bias=False)
        if down:
            self.downsample = Downsample(inputs)
        if up:
            self.upsample = Upsample(outputs, size)  # type: ignore[arg-type]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x (B, inputs, H, W); noise (1|B, 1, H', W') instead of the stored plane."""
        y = act(self.conv1(x), CLAMP)
        y = self.conv2(self.downsample(y) if self.down else y)
        if self.up:
            y = self.upsample(y)
        if self.noise:
            y = y + (self.noise_const if noise is None else noise.to(y.dtype)) * self.noise_strength
        return act(y, CLAMP)


class MIGAN(nn.Module):
    """The MI-GAN generator.

    Args:
        size: height and width of images: 256 and 512 are published; a power of two, 8 or more.
        channels: width of the features of one pixel; at size r there are min(channels/r, most_channels).

    Attributes:
        size_multiple, min_size: `size`, the only one there is.
        only_size: (size, size).
        config: the arguments that make this network.

    Raises: `ValueError` for values that no network can be made of.
    """

    def __init__(self, *, size: int = 512, channels: int = 32768, most_channels: int = 512) -> None:
        super().__init__()
        if size < 8 or size & (size - 1):
            raise ValueError(f"size is {size}; accepted: a power of two, 8 or more")
        if min(channels // size, most_channels) < 1:
            raise ValueError(
                f"channels are {channels} at size {size}, most_channels {most_channels}; accepted: 1 or more, channels at "
                "least the size"
            )
        self.config = {"size": size, "channels": channels, "most_channels": most_channels}
        self.size = self.size_multiple = self.min_size = size
        self.only_size = (size, size)
        self.sizes = [4 << i for i in range(int(math.log2(size)) - 1)]
        width = {r: min(channels // r, most_channels) for r in self.sizes}
        self.synthesis, self.encoder = nn.Module(), nn.Module()
        for r in self.sizes:
            block = nn.Module()
            block.conv1 = SeparableConvolution(width[max(4, r // 2)], width[r], size=r, up=r > 4, noise=r > 4)
            block.conv2 = SeparableConvolution(width[r], width[r], size=r, noise=r > 4)
            block.torgb = nn.Conv2d(width[r], 3, 1)
            if r > 4:
                block.upsample = Upsample(3, r)
            self.synthesis.add_module(f"b{r}", block)
        for r in reversed(self.sizes):
            block = nn.Module()
            if r == size:
                block.fromrgb = nn.Conv2d(4, width[r], 1)
            block.conv1 = SeparableConvolution(width[r], width[r])
            block.conv2 = SeparableConvolution(width[r], width[max(4, r // 2)], down=r > 4)
            self.encoder.add_module(f"b{r}", block)

    def noise_shapes(self, batch: int = 1) -> list[tuple[int, int, int, int]]:
        """Shapes of the planes of noise, in the order of the layers: two at each size from 8 on."""
        return [(batch, 1, r, r) for r in self.sizes[1:] for _ in range(2)]

    def forward(self, x: Tensor, mask: Tensor | None = None, *, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The whole image as the network sees it, with nothing pasted back.

        Args:
            x: (B, 3, H, W) RGB in [-1, 1] with **0 under the hole**; or (B, 4, H, W): 0.5 where it is known and −0.5 in the
                hole, then RGB.
            mask: (B, 1, H, W), **1 = hole**, 0 = known. Left out where x holds it.
            noise: planes of the shapes that `noise_shapes` lists, with a batch of 1 or B, instead of the stored ones.

        Returns:
            (B, 3, H, W), about [-1, 1]. Composite: `output · mask + image · (1 − mask)`.

        Raises: `ValueError` for shapes that do not fit and for sizes other than `size`.
        """
        wanted = (4 if mask is None else 3, self.size, self.size)
        if x.dim() != 4 or tuple(x.shape[1:]) != wanted or not len(x):
            raise ValueError(
                f"x is {tuple(x.shape)} and mask {'missing' if mask is None else 'given'}; accepted: (B, {wanted[0]}, "
                f"{self.size}, {self.size}), the only size of this network. Resize first, or call "
                "inpaintrt.pipeline.fill"
            )
        if mask is not None:
            if tuple(mask.shape) != (len(x), 1, self.size, self.size):
                raise ValueError(f"mask is {tuple(mask.shape)}; accepted: {(len(x), 1, self.size, self.size)}")
            x = torch.cat([0.5 - mask.to(x.dtype), x], dim=1)
        shapes = self.noise_shapes(len(x))
        if noise is not None:
            check_planes(noise, shapes)
        planes: Sequence[Tensor | None] = noise if noise is not None else [None] * len(shapes)

        features = {}
        for r in reversed(self.sizes):
            block: Any = self.encoder.get_submodule(f"b{r}")
            features[r] = block.conv1(act(block.fromrgb(x), CLAMP) if r == self.size else x)
            x = block.conv2(features[r])
        block = self.synthesis.get_submodule("b4")
        x = block.conv2(block.conv1(x) + features[4])
        image = block.torgb(x)
        for i, r in enumerate(self.sizes[1:]):
            block = self.synthesis.get_submodule(f"b{r}")
            x = block.conv2(block.conv1(x, planes[2 * i]) + features[r], planes[2 * i + 1])
            image = block.upsample(image) + block.torgb(x)
        return image  # type: ignore[no-any-return]

    def inpaint(self, image: Tensor, mask: Tensor, *, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1]; values under the hole are ignored.
            mask: (B, 1, H, W), **1 = hole**, 0 = known; any dtype.
            noise: as in `forward`.

        Returns:
            (B, 3, H, W) in [0, 1]; known pixels as given, the hole from the network.

        Raises: as `forward`.
        """
        out = self(self.network_input(image, mask), noise=noise)
        return torch.where(mask != 0, ((out + 1) / 2).clamp(0, 1), image)

    def network_input(self, image: Tensor, mask: Tensor) -> Tensor:
        """What `forward` takes, of what `inpaint` does: all channels, the mask as ±0.5."""
        hole = mask != 0
        return torch.cat([0.5 - hole.to(image.dtype), torch.where(hole, 0.0, image * 2 - 1)], dim=1)


# ---- what weights say about their network ---------------------------------------------------------------------------

ANCHORS = ("synthesis.b4.conv1.conv1.weight",)
NAMES = r"(encoder|synthesis)\."
PREFIX = ""
FOREIGN = ()


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `MIGAN`, read off the keys and shapes of a state dict.

    Raises: `KeyError` with the key that such a generator has and this state dict lacks.
    """
    sizes = [int(match[1]) for key in state if (match := re.match(r"synthesis\.b(\d+)\.torgb\.weight$", key))]
    if not sizes:
        raise KeyError("synthesis.b4.torgb.weight")
    widths = {r: state[f"synthesis.b{r}.torgb.weight"].shape[1] for r in sizes}
    return {"size": max(sizes), "channels": max(sizes) * widths[max(sizes)], "most_channels": max(widths.values())}


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Modules say no more than the weights do."""
    return {}

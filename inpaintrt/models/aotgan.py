"""AOT-GAN: inpainting with aggregated contextual transformations, as a plain PyTorch network.

Zeng et al., "Aggregated Contextual Transformations for High-Resolution Image Inpainting", TVCG 2022. 15.2 M parameters.
An encoder reduces the image to a quarter; blocks of four convolutions with different dilations, whose result a gate mixes
with what came in, fill the hole; a decoder doubles the size twice. The gates are normalised over the whole image, so the
network cannot be run tile by tile. State-dict keys are those of the public checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deepfill_layers import ConvLayer, activation_named

EPS = 1e-9
PATHS = {
    "aot": ("encoder", "middle", "decoder"),
    "mma": ("encoder.encoder", "dilation_neck.model", "decoder.decoder"),
}
"""Where each port keeps its three stages."""


class UpConv(nn.Module):
    """Twice the size by bilinear interpolation, corners on corners, then a 3×3 convolution."""

    def __init__(self, inputs: int, outputs: int, activation: str = "none") -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.activation = activation_named(activation)

    def forward(self, x: Tensor) -> Tensor:
        doubled = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
        return self.activation(self.conv(doubled))  # type: ignore[no-any-return]


class AOTBlock(nn.Module):
    """Convolutions with several dilations beside each other, fused, and mixed with the input by a gate.

    Args:
        width: channels in and out, divisible by the number of rates.
        rates: dilation of each branch; 2 or more of them.
        port: whose names the layers have.
    """

    def __init__(self, width: int, rates: Sequence[int], port: str) -> None:
        super().__init__()
        self.rates = tuple(rates)

        def reflected(outputs: int, rate: int, activation: str) -> nn.Sequential:
            pad, conv = nn.ReflectionPad2d(rate), nn.Conv2d(width, outputs, 3, dilation=rate)
            if port == "mma":
                return nn.Sequential(pad, ConvLayer(conv, activation))
            return nn.Sequential(pad, conv, *([nn.ReLU()] if activation == "relu" else []))

        branches = [reflected(width // len(self.rates), rate, "relu") for rate in self.rates]
        if port == "mma":
            self.blocks = nn.ModuleList(branches)
        else:
            for i, branch in enumerate(branches):
                self.add_module(f"block{i:02d}", branch)
        self.fuse = reflected(width, 1, "none")
        self.gate = reflected(width, 1, "none")

    def branches(self) -> list[nn.Module]:
        if hasattr(self, "blocks"):
            return list(self.blocks)
        return [self.get_submodule(f"block{i:02d}") for i in range(len(self.rates))]

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fuse(torch.cat([branch(x) for branch in self.branches()], dim=1))
        gate = torch.sigmoid(spread(self.gate(x)))
        return x * (1 - gate) + fused * gate


def spread(x: Tensor) -> Tensor:
    """x (B, C, H, W) with mean −5 and deviation 10 over the pixels of each sample and channel."""
    deviation = x.std((2, 3), keepdim=True) + EPS
    return 5 * (2 * (x - x.mean((2, 3), keepdim=True)) / deviation - 1)


class AOTGAN(nn.Module):
    """The AOT-GAN generator.

    Args:
        port: whose weights it takes: "aot", researchmm/AOT-GAN-for-Inpainting, the original; or "mma", open-mmlab/mmagic.
            Both compute the same.
        width: channels after the first layer; blocks have four times as many.
        block_num: blocks between encoder and decoder.
        rates: dilations of the branches of each block; they leave no trace in the shapes of the weights.

    Attributes:
        size_multiple, min_size: what height and width must be.
        config: the arguments that make this network.

    Raises: `ValueError` for values that no network can be made of.
    """

    def __init__(
        self, port: str = "aot", *, width: int = 64, block_num: int = 8, rates: Sequence[int] = (1, 2, 4, 8)
    ) -> None:
        super().__init__()
        if port not in PATHS:
            raise ValueError(f"port is {port!r}; accepted: {', '.join(PATHS)}")
        rates = tuple(rates)
        if len(rates) < 2 or min(rates) < 1:
            raise ValueError(f"rates are {rates}; accepted: 2 or more, each 1 or more")
        if width < 1 or 4 * width % len(rates):
            raise ValueError(f"width is {width} with {len(rates)} rates; accepted: 4 · width divisible by their number")
        if block_num < 1:
            raise ValueError(f"block_num is {block_num}; accepted: 1 or more")
        self.config = {"port": port, "width": width, "block_num": block_num, "rates": rates}
        self.size_multiple = 4
        self.min_size = 4 * (max(rates) + 1)  # reflection by r pixels needs r + 1 at a quarter of the resolution
        shells = port == "mma"

        def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)
            return [ConvLayer(conv, "relu")] if shells else [conv, nn.ReLU()]

        def doubled(inputs: int, outputs: int) -> list[nn.Module]:
            return [UpConv(inputs, outputs, "relu")] if shells else [UpConv(inputs, outputs), nn.ReLU()]

        encoder: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            *convolution(4, width, 7),
            *convolution(width, 2 * width, 4, 2, 1),
            *convolution(2 * width, 4 * width, 4, 2, 1),
        ]
        blocks: list[nn.Module] = [AOTBlock(4 * width, rates, port) for _ in range(block_num)]
        last = nn.Conv2d(width, 3, 3, padding=1)
        decoder = [
            *doubled(4 * width, 2 * width),
            *doubled(2 * width, width),
            ConvLayer(last, "none") if shells else last,
        ]
        for path, layers in zip(PATHS[port], (encoder, blocks, decoder), strict=True):
            first, *rest = path.split(".")
            stage: nn.Module = nn.Sequential(*layers)
            for name in rest:
                shell = nn.Module()
                shell.add_module(name, stage)
                stage = shell
            self.add_module(first, stage)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The whole image as the network sees it, with nothing pasted back.

        Args:
            x: (B, 3, H, W) RGB in [-1, 1] with **1 (white) under the hole**; or (B, 4, H, W): that and the mask.
            mask: (B, 1, H, W), **1 = hole**, 0 = known. May be left out where x holds it.

        Returns:
            (B, 3, H, W) in [-1, 1]. Composite: `output · mask + image · (1 − mask)`.

        Raises: `ValueError` for other shapes and for heights or widths that are no multiples of 4 or below `min_size` (pad
            first; see `inpaintrt.pipeline`).
        """
        y = self._input(x, mask)
        for path in PATHS[self.config["port"]]:  # type: ignore[index]
            y = self.get_submodule(path)(y)
        return torch.tanh(y)

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1]; values under the hole are ignored.
            mask: (B, 1, H, W), **1 = hole**, 0 = known; any dtype.

        Returns:
            (B, 3, H, W) in [0, 1]; known pixels as given, the hole from the network.

        Raises: as `forward`.
        """
        return torch.where(mask != 0, (self(self.network_input(image, mask)) + 1) / 2, image)

    def network_input(self, image: Tensor, mask: Tensor) -> Tensor:
        """What `forward` takes, of what `inpaint` does: all channels, the mask as 0 and 1."""
        hole = mask != 0
        return torch.cat([torch.where(hole, 1.0, image * 2 - 1), hole.to(image.dtype)], dim=1)

    def _input(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.dim() != 4 or x.shape[1] != (3 if mask is not None else 4):
            raise ValueError(
                f"x is {tuple(x.shape)} and mask {'missing' if mask is None else 'given'}; accepted: (B, 3, H, W) with a mask, "
                "or (B, 4, H, W), image and mask"
            )
        height, width = x.shape[2:]
        if height % self.size_multiple or width % self.size_multiple or min(height, width) < self.min_size:
            raise ValueError(
                f"image is {height}×{width}; accepted: height and width divisible by {self.size_multiple}, at least "
                f"{self.min_size}. Pad image and mask and crop the result, or call inpaintrt.pipeline.fill"
            )
        if mask is None:
            return x
        if mask.dim() != 4 or mask.shape != (len(x), 1, height, width):
            raise ValueError(f"mask is {tuple(mask.shape)}; accepted: {(len(x), 1, height, width)}")
        return torch.cat([x, mask.to(x.dtype)], dim=1)


# ---- what weights say about their network ---------------------------------------------------------------------------

_ANCHORS = {"aot": "middle.0.block00.1.weight", "mma": "dilation_neck.model.0.blocks.0.1.conv.weight"}
_FIRST = {"aot": "encoder.1.weight", "mma": "encoder.encoder.1.conv.weight"}
_BRANCH = {
    "aot": r"middle\.(\d+)\.block(\d+)\.1",
    "mma": r"dilation_neck\.model\.(\d+)\.blocks\.(\d+)\.1\.conv",
}
ANCHORS = tuple(_ANCHORS.values())
NAMES = r"(encoder|middle|dilation_neck|decoder)\."
PREFIX = ""
FOREIGN = ()


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `AOTGAN`, read off the keys and shapes of a state dict, but for the rates.

    Raises: `KeyError` with the key that such a generator has and this state dict lacks.
    """
    port = next(name for name, anchor in _ANCHORS.items() if anchor in state)
    blocks = [int(match[1]) for key in state if (match := re.fullmatch(rf"{_BRANCH[port]}\.weight", key))]
    return {"port": port, "width": state[_FIRST[port]].shape[0], "block_num": 1 + max(blocks)}


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    """The rates, where notes on modules (`models.weights_file`) tell all of the first block's."""
    rates: dict[int, int] = {}
    for name, note in modules.items():
        for pattern in _BRANCH.values():
            if (match := re.fullmatch(pattern, name)) and match[1] == "0" and (rate := _dilation(note)):
                rates[int(match[2])] = rate
    return {"rates": tuple(rates[i] for i in range(len(rates)))} if rates and max(rates) + 1 == len(rates) else {}


def _dilation(convolution: Any) -> int | None:
    """The dilation of a convolution, from its attribute or from TorchScript code; None where neither tells."""
    dilation = convolution.attributes.get("dilation")
    if isinstance(dilation, (tuple, list)) and dilation and isinstance(dilation[0], int):
        return dilation[0]
    # conv(input, weight, bias, stride, padding, dilation, …)
    pairs = re.search(r"conv\w*\([^\[\]]*\[\d+, \d+\], \[\d+, \d+\], \[(\d+), \d+\]", convolution.code)
    return int(pairs[1]) if pairs else None

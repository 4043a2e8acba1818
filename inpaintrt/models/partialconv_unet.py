"""PConv-UNet: inpainting of irregular holes with partial convolutions, as a plain PyTorch network.

Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", ECCV 2018. 25.8 M parameters at seven levels
and width 64. NVIDIA published the layer without an inpainting network; the ports with weights differ in the names of layers, in
the factor of the renormalisation and in the range of images, which are options here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .making import only_known
from .partialconv_layers import SCALES, PartialBlock, PartialConv2d, Shell

Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class PConvUNetOptions:
    """What differs between public ports. A port is a preset of these.

    Attributes:
        layout: of the state dict, "nao" or "mma".
        levels: of encoder and decoder; heights and widths are multiples of 2^levels.
        width: channels of the first level, doubled by each further one up to eightfold.
        scale, binary, eps: of `PartialConv2d`.
        first_bias: the first convolution has a bias; the last one always has, the others never.
        mean, std: the network works on (image − mean) / std, image in [0, 1].
    """

    layout: Literal["nao", "mma"]
    levels: int = 7
    width: int = 64
    scale: str = "window"
    binary: bool = False
    eps: float = 1e-8
    first_bias: bool = False
    mean: Colour = (0.5, 0.5, 0.5)
    std: Colour = (0.5, 0.5, 0.5)

    def channels(self, level: int) -> int:
        """Of what the encoder's level gives; level 0 is the image."""
        return 3 if level == 0 else self.width << min(level - 1, 3)


PORTS = {
    "nao": PConvUNetOptions(
        layout="nao", scale="one", binary=True, eps=0.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    "mma": PConvUNetOptions(layout="mma", first_bias=True),
}


class PConvUNet(nn.Module):
    """The U-Net of partial convolutions.

    Args:
        port: whose weights it takes and whose numbers it gives:

            - "nao": naoto0804/pytorch-inpainting-with-partial-conv (1/s, ImageNet's mean and deviation);
            - "mma": open-mmlab/mmagic (window/s, images in [-1, 1]).
        options: of `PConvUNetOptions`, in place of the port's.

    Public checkpoints hold, beside each weight, as many ones (`mask_conv.weight`, `weight_mask_updater`), by which the ports
    sum masks. They are accepted, checked to be ones, and not kept.

    Attributes:
        size_multiple, min_size: what height and width must be.
        config: the arguments that make this network.
    """

    def __init__(self, port: str = "nao", **options: Any) -> None:
        super().__init__()
        if port not in PORTS:
            raise ValueError(f"port is {port!r}; accepted: {', '.join(PORTS)}")
        only_known(type(self), options, PConvUNetOptions)
        self.options = _checked(replace(PORTS[port], **options))
        self.config = {"port": port, **asdict(self.options)}
        self.size_multiple = self.min_size = 1 << self.options.levels
        for path, block in _blocks(self.options):
            parent: nn.Module = self
            *outer, last = path.split(".")
            for part in outer:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, block)
        self.register_load_state_dict_pre_hook(_drop_constants)

    def block(self, part: str, level: int) -> nn.Module:
        """The block of "enc" or "dec" at a level, counted from the image's size."""
        return self.get_submodule(_path(self.options, part, level))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The network's image, with nothing pasted back, and the mask that partial convolutions leave of `mask`.

        Args:
            x: (B, 3, H, W) RGB, (image − mean) / std of the port; finite, and otherwise ignored, in holes.
            mask: (1|B, 1|3, H, W), **1 = valid**, 0 = hole, x's dtype.

        Returns:
            (B, 3, H, W) in the range of x, unbounded; (1|B, 1, H, W). In a hole that no level could close both are 0.

        Raises: `ValueError` for other shapes and for heights or widths that are no multiples of `size_multiple` (pad first;
            see `inpaintrt.pipeline`).
        """
        self._check(x, mask)
        kept = [(x, mask)]
        for level in range(1, self.options.levels + 1):
            y, valid = kept[-1]
            kept.append(self.block("enc", level)(y, _each(valid, y)))
        y, valid = kept.pop()
        for level in range(self.options.levels, 0, -1):
            beside, beside_valid = kept.pop()
            y, valid = (F.interpolate(t, scale_factor=2.0, mode="nearest") for t in (y, valid))
            masks = torch.cat([_each(valid, y), _each(beside_valid, beside)], 1)
            y, valid = self.block("dec", level)(torch.cat([y, beside], 1), masks)
        return y, valid

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], whatever the port's range; values under the hole are ignored.
            mask: (B, 1, H, W), **1 = hole**, 0 = known; any dtype. The opposite of `forward`'s.

        Returns:
            (B, 3, H, W) in [0, 1]; known pixels as given, the hole from the network.

        Raises: as `forward`.
        """
        mean, std = self._mean_and_std(image)
        filled = self(*self.network_input(image, mask))[0] * std + mean
        return torch.where(mask != 0, filled.clamp(0, 1), image)

    def network_input(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of `forward`, from an image (B, 3, H, W) in [0, 1] and a mask (B, 1, H, W), **1 = hole**."""
        mean, std = self._mean_and_std(image)
        hole = mask != 0
        return torch.where(hole, 0.0, (image - mean) / std), (~hole).to(image.dtype)

    def _mean_and_std(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (self.options.mean, self.options.std))
        return mean, std

    def _check(self, x: Tensor, mask: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"x is {tuple(x.shape)}; accepted: (B, 3, H, W)")
        height, width = x.shape[2:]
        if height % self.size_multiple or width % self.size_multiple or min(height, width) < self.min_size:
            raise ValueError(
                f"image is {height}×{width}; accepted: height and width divisible by {self.size_multiple}. Pad image and "
                "mask and crop the result, or call inpaintrt.pipeline.fill"
            )
        accepted = [(b, c, height, width) for b in dict.fromkeys((1, len(x))) for c in (1, 3)]
        if tuple(mask.shape) not in accepted:
            raise ValueError(f"mask is {tuple(mask.shape)}; accepted: {' or '.join(map(str, accepted))}")


def _each(mask: Tensor, features: Tensor) -> Tensor:
    """The mask as every channel's: where nothing is multiplied by the window, it counts how many they are."""
    return mask.expand(-1, features.shape[1], -1, -1)


def _path(options: PConvUNetOptions, part: str, level: int) -> str:
    return f"{part}_{level}" if options.layout == "nao" else f"{part}oder.{part}{level}"


def _blocks(options: PConvUNetOptions) -> list[tuple[str, PartialBlock]]:
    """All blocks by path, in the order of the port's state dict."""
    levels = range(1, options.levels + 1)
    # One port makes its deeper levels, of which there may be any number, before the others.
    decoder = [*levels[4:], *reversed(levels[:4])] if options.layout == "nao" else [*reversed(levels)]
    order = [("enc", level) for level in levels] + [("dec", level) for level in decoder]
    return [(_path(options, part, level), _block(options, part, level)) for part, level in order]


def _block(options: PConvUNetOptions, part: str, level: int) -> PartialBlock:
    encodes, last = part == "enc", (part, level) == ("dec", 1)
    below, here = options.channels(level - 1), options.channels(level)
    kernel = {1: 7, 2: 5, 3: 5}.get(level, 3) if encodes else 3
    conv = PartialConv2d(
        below if encodes else here + below,
        here if encodes else below,
        kernel,
        stride=2 if encodes else 1,
        padding=kernel // 2,
        bias=last or (options.first_bias and level == 1),
        scale=options.scale,
        binary=options.binary,
        eps=options.eps,
    )
    norm = nn.BatchNorm2d(conv.out_channels) if level > 1 else None
    activation = None if last else nn.ReLU() if encodes else nn.LeakyReLU(0.2)
    return PartialBlock(Shell(conv) if options.layout == "nao" else conv, norm, activation)


def _checked(options: PConvUNetOptions) -> PConvUNetOptions:
    """The options themselves. Raises: `ValueError` for what no network can be made of."""
    for name, accepted in (("layout", ("nao", "mma")), ("scale", SCALES)):
        if (value := getattr(options, name)) not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    if options.levels < 1 or options.width < 1:
        raise ValueError(f"levels is {options.levels}, width {options.width}; accepted: 1 or more")
    return options


# ---- what weights say about their network ---------------------------------------------------------------------------

_FIRST = {"nao": "enc_1.conv.input_conv.weight", "mma": "encoder.enc1.conv.weight"}
ANCHORS = ("enc_1.conv.input_conv.weight", "encoder.enc7.bn.weight")
NAMES = r"(enc_|dec_)\d+\.|encoder\.enc\d+\.|decoder\.dec\d+\."
PREFIX = ""
FOREIGN = ()
_CONSTANT = re.compile(r"(^|\.)(mask_conv\.weight|weight_mask_updater)$")


def essential(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the constants by which ports sum masks.

    Raises: `ValueError` where one is not all ones, so that masks would count in another way.
    """
    for key, tensor in state.items():
        if _CONSTANT.search(key) and not bool((tensor == 1).all()):
            raise ValueError(f"{key} is not all ones, so its masks are weighted, which is no partial convolution")
    return {key: tensor for key, tensor in state.items() if not _CONSTANT.search(key)}


def _drop_constants(network: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Before `load_state_dict`; `state` is its own copy."""
    own = {key: tensor for key, tensor in state.items() if key.startswith(prefix)}
    for key in own.keys() - essential(own).keys():
        del state[key]


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `PConvUNet`, read off the keys and shapes of an essential state dict.

    Raises: `KeyError` with the first key that such a network has and this state dict lacks.
    """
    port = next((port for port, key in _FIRST.items() if key in state), "mma")
    first = _FIRST[port]
    levels = {int(match[1]) for key in state if (match := re.match(r"(?:enc_|encoder\.enc)(\d+)\.", key))}
    return {
        "port": port,
        "levels": max(levels),
        "width": state[first].shape[0],
        "first_bias": first.replace("weight", "bias") in state,
    }


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    return {}

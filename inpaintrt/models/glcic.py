"""GLCIC's completion network (globally and locally consistent image completion) as a plain PyTorch network.

Iizuka et al., "Globally and Locally Consistent Image Completion", SIGGRAPH 2017. Seventeen convolutions in one chain: down to
a quarter of the resolution, four dilated ones in the middle, two transposed ones back up; 6.1 M parameters. The layers have
the paper's numbers here; where a port keeps layer n in its tree of modules is in `_ote` and `_mma`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Layer(NamedTuple):
    """A convolution of the paper, with its number (1 … 17)."""

    number: int
    inputs: int
    outputs: int

    @property
    def kernel(self) -> int:
        return 5 if self.number == 1 else 4 if self.transposed else 3

    @property
    def stride(self) -> int:
        return 2 if self.number in (2, 4) or self.transposed else 1

    @property
    def dilation(self) -> int:
        return 1 << self.number - 6 if 7 <= self.number <= 10 else 1

    @property
    def padding(self) -> int:
        return 1 if self.transposed else self.dilation * (self.kernel - 1) // 2

    @property
    def transposed(self) -> bool:
        return self.number in (13, 15)

    @property
    def gives_image(self) -> bool:
        return self.number == 17

    def convolution(self, *, bias: bool) -> nn.Conv2d | nn.ConvTranspose2d:
        kind = nn.ConvTranspose2d if self.transposed else nn.Conv2d
        return kind(
            self.inputs, self.outputs, self.kernel, self.stride, self.padding, dilation=self.dilation, bias=bias
        )


def layers(width: int) -> Iterator[Layer]:
    """All layers of a network whose first one has `width` outputs."""
    inputs = 4
    widths = [width, *[2 * width] * 2, *[4 * width] * 9, *[2 * width] * 2, width, width // 2, 3]
    for number, outputs in enumerate(widths, 1):
        yield Layer(number, inputs, outputs)
        inputs = outputs


class Place(NamedTuple):
    """Paths of a layer's convolution and of its batch norm; the last layer has none ("")."""

    conv: str
    norm: str


def _ote() -> dict[int, Place]:
    """All in one module, by the paper's numbers."""
    return {
        layer.number: Place(
            f"{'de' if layer.transposed else ''}conv{layer.number}",
            "" if layer.gives_image else f"bn{layer.number}",
        )
        for layer in layers(2)
    }


def _mma() -> dict[int, Place]:
    """Encoder, decoder and the dilated layers between them, registered in this order."""
    shells = {n: f"encoder.enc{n}" for n in range(1, 7)}
    shells |= {n: f"decoder.dec{n - 10}" for n in range(11, 18)}
    shells |= {n: f"dilation_neck.dilation_convs.{n - 7}" for n in range(7, 11)}
    return {n: Place(f"{shell}.conv", "" if n == 17 else f"{shell}.bn") for n, shell in shells.items()}


PLACES = {"ote": _ote, "mma": _mma}


class GLCIC(nn.Module):
    """The completion network.

    Args:
        port: whose weights it takes and whose numbers it gives:

            - "ote": otenim/GLCIC-PyTorch. Each batch norm comes after the ReLU; images in [0, 1], sigmoid at the end; under
              the hole is the mean pixel of the training images.
            - "mma": open-mmlab/mmagic. Convolutions without bias, batch norm, then ReLU; images in [-1, 1], clipped at the
              end; under the hole is 0.
        width: outputs of the first layer; the others follow.
        mpv: the mean pixel (red, green, blue), in [0, 1] for both ports, that `inpaint` puts under the hole. It is no part of
            a state dict: "ote" keeps it in the `config.json` beside its weights. The default, grey, is "mma"'s 0.
    """

    size_multiple = 4
    min_size = 4

    def __init__(self, port: str = "ote", *, width: int = 64, mpv: Sequence[float] = (0.5, 0.5, 0.5)) -> None:
        super().__init__()
        if port not in PLACES:
            raise ValueError(f"port is {port!r}; accepted: {', '.join(PLACES)}")
        if width < 2 or width % 2:
            raise ValueError(f"width is {width}; accepted: even, 2 or more")
        if len(mpv) != 3 or not all(0 <= value <= 1 for value in mpv):
            raise ValueError(f"mpv is {tuple(mpv)}; accepted: three numbers in [0, 1]")
        self.config = {"port": port, "width": width, "mpv": tuple(map(float, mpv))}
        self.port = port
        self.mpv = tuple(map(float, mpv))
        self._places = PLACES[port]()
        by_number = {layer.number: layer for layer in layers(width)}
        for number, place in self._places.items():
            layer = by_number[number]
            self._attach(place.conv, layer.convolution(bias=port == "ote" or layer.gives_image))
            if place.norm:
                self._attach(place.norm, nn.BatchNorm2d(layer.outputs))

    def _attach(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *outer, last = path.split(".")
        for part in outer:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)

    def forward(self, x: Tensor) -> Tensor:
        """The whole image, with nothing pasted back.

        Args:
            x: (B, 4, H, W): RGB in the port's range with its value under the hole, then the mask, **1 = hole**.

        Returns:
            (B, 3, H, W) in the port's range.

        Raises: `ValueError` for other shapes and for heights or widths that are no multiples of `size_multiple` (pad first;
            see `inpaintrt.pipeline`).
        """
        if x.dim() != 4 or x.shape[1] != 4:
            raise ValueError(f"x is {tuple(x.shape)}; accepted: (B, 4, H, W), an image and its mask")
        height, width = x.shape[2:]
        if height % self.size_multiple or width % self.size_multiple or min(height, width) < self.min_size:
            raise ValueError(
                f"image is {height}×{width}; accepted: height and width divisible by {self.size_multiple}. Pad image and "
                "mask and crop the result, or call inpaintrt.pipeline.fill"
            )
        for number in range(1, 17):
            x = self._layer(self._places[number], x)
        x = self.get_submodule(self._places[17].conv)(x)
        return torch.sigmoid(x) if self.port == "ote" else x.clamp(-1.0, 1.0)

    def _layer(self, place: Place, x: Tensor) -> Tensor:
        conv, norm = self.get_submodule(place.conv), self.get_submodule(place.norm)
        return norm(torch.relu(conv(x))) if self.port == "ote" else torch.relu(norm(conv(x)))

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], whatever the port's range; values under the hole are ignored.
            mask: (B, 1, H, W), **1 = hole**, 0 = known; any dtype.

        Returns:
            (B, 3, H, W) in [0, 1]; known pixels as given.

        Raises: as `forward`.
        """
        filled = self(self.network_input(image, mask))
        if self.port == "mma":
            filled = (filled + 1) / 2
        return torch.where(mask != 0, filled, image)

    def network_input(self, image: Tensor, mask: Tensor) -> Tensor:
        """What `forward` takes, of what `inpaint` does: the mean pixel under the hole, the mask as 0 and 1."""
        hole = mask != 0
        known = torch.where(hole, image.new_tensor(self.mpv).view(1, 3, 1, 1), image)
        if self.port == "mma":
            known = known * 2 - 1
        return torch.cat([known, hole.to(image.dtype)], dim=1)


_BY_PORT = {"ote": "deconv13.weight", "mma": "dilation_neck.dilation_convs.0.bn.weight"}
ANCHORS = tuple(_BY_PORT.values())
NAMES = r"((de)?conv|bn)\d+\.|(encoder|dilation_neck|decoder)(\.|$)"
PREFIX = ""
FOREIGN = ()


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `GLCIC`, read off the keys and shapes of a state dict; the mean pixel is not in it.

    Raises:
        KeyError: with the key that such a network has and this state dict lacks.
    """
    port = next(port for port, anchor in _BY_PORT.items() if anchor in state)
    return {"port": port, "width": state[f"{PLACES[port]()[1].conv}.weight"].shape[0]}


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: names and shapes tell all that a file can tell."""
    return {}

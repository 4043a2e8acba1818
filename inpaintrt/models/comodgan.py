"""Co-ModGAN: image completion by a StyleGAN 2 whose styles the image co-modulates, in plain torch.

Zhao et al., "Large Scale Image Completion via Co-Modulated Generative Adversarial Networks", ICLR 2021. An encoder takes the
image and its mask down to 4×4 and to one vector; that vector beside a mapped random one is the style of every layer of the
decoder, which takes the encoder's features in at each size. 79 M parameters at 256 and 512 pixels. The encoder ends in
a fully connected layer, so that a network has one size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .stylegan2_layers import (
    Convolution,
    FullyConnected,
    PortConvolution,
    PortStyledConvolution,
    PortToRGB,
    StyledConvolution,
    ToRGB,
    check_planes,
    doubled,
    fir,
    normalised,
)

RGB, MASK = 3, 1
MAPPING_RATE = 0.01
CLAMP = 256.0


class Names(NamedTuple):
    """Paths of the layers in a port's tree of modules; {0} is the size of the features."""

    mapping: str
    from_rgb: str
    encoder: tuple[str, str]
    last: str
    to_vector: str
    from_vector: str
    first: str
    decoder: tuple[str, str]
    to_rgb: str


_TF = Names(
    mapping="G_mapping.G_mapping.Dense{0}",
    from_rgb="G_synthesis.E.{0}x{0}_0.FromRGB",
    encoder=("G_synthesis.E.{0}x{0}.Conv0", "G_synthesis.E.{0}x{0}.Conv1_down"),
    last="G_synthesis.E.4x4.Conv",
    to_vector="G_synthesis.E.4x4.Dense0",
    from_vector="G_synthesis.G_4x4.Dense",
    first="G_synthesis.G_4x4.Conv",
    decoder=("G_synthesis.G_{0}x{0}.Conv0_up", "G_synthesis.G_{0}x{0}.Conv1"),
    to_rgb="G_synthesis.G_{0}x{0}.ToRGB",
)
_NVIDIA = Names(
    mapping="mapping.fc{0}",
    from_rgb="encoder.b{0}.fromrgb",
    encoder=("encoder.b{0}.conv0", "encoder.b{0}.conv1"),
    last="encoder.b4.conv",
    to_vector="encoder.b4.fc",
    from_vector="synthesis.b4.fc",
    first="synthesis.b4.conv",
    decoder=("synthesis.b{0}.conv0", "synthesis.b{0}.conv1"),
    to_rgb="synthesis.b{0}.torgb",
)
PORTS = {"official": _TF, "zyu": _TF, "migan": _NVIDIA}


class CoModGAN(nn.Module):
    """The Co-ModGAN generator.

    Args:
        port: whose behaviour it has:

            - "official": zsyzzsoft/co-mod-gan, the authors' TensorFlow code: half of the image's vector is dropped at random,
              at inference too, noise is drawn anew, and the smallest features of the encoder are added like all others. Its
              layers have TensorFlow's names, as in zengxianyu's port.
            - "zyu": zengxianyu/co-mod-gan-pytorch: the smallest features are not added, nothing is dropped, noise is drawn.
            - "migan": Picsart-AI-Research/MI-GAN: NVIDIA's names and stored noise, nothing is dropped, features are clamped to
              ±256, and the styles of a batch are normalised together.
        size: height and width of images; a power of two, 8 or more.
        channels: width of the features of one pixel; at size r there are min(channels/r, most_channels).
        z, w: lengths of the random vector and of what it is mapped to.
        hidden: width of the mapping.
        vector: length of the image's vector.

    Attributes:
        size_multiple, min_size: `size`, the only one there is.
        only_size: (size, size).
        config: the arguments that make this network.

    Raises: `ValueError` for values that no network can be made of.
    """

    def __init__(
        self,
        port: str = "official",
        *,
        size: int = 512,
        channels: int = 32768,
        most_channels: int = 512,
        z: int = 512,
        w: int = 512,
        hidden: int = 512,
        vector: int = 1024,
    ) -> None:
        super().__init__()
        if port not in PORTS:
            raise ValueError(f"port is {port!r}; accepted: {', '.join(PORTS)}")
        if size < 8 or size & (size - 1):
            raise ValueError(f"size is {size}; accepted: a power of two, 8 or more")
        if min(channels // size, most_channels, z, w, hidden, vector) < 1:
            raise ValueError(
                f"channels are {channels} at size {size}, most_channels {most_channels}, z {z}, w {w}, hidden {hidden}, "
                f"vector {vector}; accepted: 1 or more each, channels at least the size"
            )
        self.config = {
            "port": port, "size": size, "channels": channels, "most_channels": most_channels, "z": z, "w": w,
            "hidden": hidden, "vector": vector,
        }  # fmt: skip
        self.port, self.size = port, size
        self.size_multiple = self.min_size = size
        self.only_size = (size, size)
        self.sizes = [4 << i for i in range(int(math.log2(size)) - 1)]
        self._names = names = PORTS[port]
        self._nvidia = names is _NVIDIA
        width = {r: min(channels // r, most_channels) for r in self.sizes}
        self.z_length, style, corner = z, w + vector, 16 * width[4]

        if self._nvidia:
            mapping = nn.Module()
            mapping.register_buffer("w_avg", torch.zeros(w))
            self.add_module("mapping", mapping)
        widths = [z, *[hidden] * 7, w]
        for i in range(8):
            layer = FullyConnected(widths[i], widths[i + 1], activation=True, multiplier=MAPPING_RATE)
            self._attach(names.mapping.format(i), layer)
        if self._nvidia:
            conv: Callable[..., nn.Module] = lambda *a, **k: Convolution(*a, **k, clamp=CLAMP)  # noqa: E731
        else:
            conv = PortConvolution

        def styled(inputs: int, outputs: int, r: int, up: bool = False) -> nn.Module:
            if not self._nvidia:
                return PortStyledConvolution(inputs, outputs, style, up=up)
            return StyledConvolution(
                inputs, outputs, style, size=r, up=up, keeps_filter=r == 4, normalise=True, clamp=CLAMP
            )

        self._attach(names.from_rgb.format(size), conv(RGB + MASK, width[size], 1))
        for r in self.sizes[:0:-1]:
            self._attach(names.encoder[0].format(r), conv(width[r], width[r]))
            self._attach(names.encoder[1].format(r), conv(width[r], width[r // 2], down=True))
        self._attach(names.last, conv(width[4], width[4]))
        self._attach(names.to_vector, FullyConnected(corner, vector, activation=True))
        self._attach(names.from_vector, FullyConnected(vector, corner, activation=True))
        self._attach(names.first, styled(width[4], width[4], 4))
        for r in self.sizes:
            if r > 4:
                self._attach(names.decoder[0].format(r), styled(width[r // 2], width[r], r, up=True))
                self._attach(names.decoder[1].format(r), styled(width[r], width[r], r))
                for side in ("encoder", "synthesis") if self._nvidia else ():
                    self.get_submodule(f"{side}.b{r}").register_buffer("resample_filter", fir())
            rgb = ToRGB(width[r], style, clamp=CLAMP) if self._nvidia else PortToRGB(width[r], style, filters=r > 4)
            self._attach(names.to_rgb.format(r), rgb)

    def _attach(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *outer, last = path.split(".")
        for part in outer:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)

    def _layer(self, path: str, *size: int) -> nn.Module:
        return self.get_submodule(path.format(*size))

    def noise_shapes(self, batch: int = 1) -> list[tuple[int, int, int, int]]:
        """Shapes of the planes of noise, in the order of the layers: one at 4×4, two at each larger size."""
        return [(batch, 1, r, r) for r in self.sizes for _ in range(1 if r == 4 else 2)]

    def map(self, z: Tensor, truncation: float = 1.0, mean: Tensor | None = None) -> Tensor:
        """What the random vectors z (B, z) are mapped to, (B, w).

        truncation moves it towards its mean over all z: 1 leaves it, 0 is the mean. "migan" holds that mean in its weights;
        elsewhere `mean` (1|B, w) gives it.

        Raises: `ValueError` for a truncation where there is no mean, and a mean of another shape.
        """
        w = normalised(z)
        for i in range(8):
            w = self._layer(self._names.mapping, i)(w)
        if truncation == 1:
            return w
        if mean is None:
            if not self._nvidia:
                raise ValueError(f"truncation is {truncation} without a mean; {self.port!r} has none in its weights")
            mean = self.get_buffer("mapping.w_avg")[None]
        _check_row("mean", mean, *w.shape)
        return torch.lerp(mean.to(w), w, truncation)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        z: Tensor | None = None,
        noise: str | Sequence[Tensor] | None = None,
        dropout: Tensor | None = None,
        truncation: float = 1.0,
        mean: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The whole image as the network sees it, with nothing pasted back.

        Args:
            x: (B, 3, H, W) RGB in [-1, 1] with **0 under the hole**; or (B, 4, H, W): 0.5 where it is known and −0.5 in the
                hole, then RGB.
            mask: (B, 1, H, W), **1 = hole**, 0 = known. Left out where x holds it.
            z: (B, z) normal random numbers; drawn if left out.
            noise: planes of the shapes that `noise_shapes` lists, with a batch of 1 or B; or "random", drawn; "const",
                those of the weights ("migan" only); "none". None: what the port does.
            dropout: (1|B, vector), what the image's vector is multiplied by: 0 or 2 in the official code, drawn if left out;
                1 elsewhere.
            truncation, mean: as in `map`.
            generator: where random numbers come from; None: torch's global one.

        Returns:
            (B, 3, H, W), about [-1, 1]. Composite: `output · mask + image · (1 − mask)`.

        Raises: `ValueError` for shapes that do not fit and for sizes other than `size`.
        """
        x = self._input(x, mask)
        batch, names = len(x), self._names

        def draw(*shape: int) -> Tensor:
            device = generator.device if generator else x.device
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(x)

        if z is None:
            z = draw(batch, self.z_length)
        elif tuple(z.shape) != (batch, self.z_length):
            raise ValueError(f"z is {tuple(z.shape)}; accepted: {(batch, self.z_length)}")
        planes = self._noise(noise, batch, draw)
        w = self.map(z.to(x.dtype), truncation, mean)

        features = {}
        y = self._layer(names.from_rgb, self.size)(x)
        for r in self.sizes[:0:-1]:
            features[r] = self._layer(names.encoder[0], r)(y)
            y = self._layer(names.encoder[1], r)(features[r])
        last = self._layer(names.last)(y)
        vector = self._layer(names.to_vector)(last.flatten(1))
        if dropout is None and self.port == "official":
            dropout = 2.0 * (draw(batch, vector.shape[1]) > 0)
        if dropout is not None:
            _check_row("dropout", dropout, *vector.shape)
            vector = vector * dropout.to(vector)
        style = torch.cat([w, vector], dim=1)

        y = self._layer(names.from_vector)(vector).view_as(last)
        if self.port != "zyu":
            y = y + last
        y = self._layer(names.first)(y, style, planes[0])
        rgb = self._layer(names.to_rgb, 4)(y, style)
        for i, r in enumerate(self.sizes[1:]):
            y = self._layer(names.decoder[0], r)(y, style, planes[2 * i + 1]) + features[r]
            y = self._layer(names.decoder[1], r)(y, style, planes[2 * i + 2])
            rgb = doubled(rgb, self._filter(r)) + self._layer(names.to_rgb, r)(y, style)
        return rgb  # type: ignore[no-any-return]

    def _filter(self, size: int) -> Tensor:
        """The filter of sum 4 by which a picture is doubled to `size`."""
        if self._nvidia:
            return 4 * self.get_buffer(f"synthesis.b{size}.resample_filter")
        return self.get_buffer(f"{self._names.to_rgb.format(size)}.upsample.kernel")

    def _noise(
        self, noise: str | Sequence[Tensor] | None, batch: int, draw: Callable[..., Tensor]
    ) -> Sequence[Tensor | None]:
        shapes = self.noise_shapes(batch)
        if noise is None:
            noise = "const" if self._nvidia else "random"
        if noise == "none":
            return [None] * len(shapes)
        if noise == "random":
            return [draw(*shape) for shape in shapes]
        if noise == "const" and self._nvidia:
            layers = [self._names.first, *(path.format(r) for r in self.sizes[1:] for path in self._names.decoder)]
            return [self.get_buffer(f"{path}.noise_const")[None, None] for path in layers]
        if isinstance(noise, str):
            const = '"const", ' if self._nvidia else ""
            raise ValueError(f'noise is {noise!r}; accepted: {const}"random", "none" or {len(shapes)} planes')
        check_planes(noise, shapes)
        return noise

    def inpaint(
        self,
        image: Tensor,
        mask: Tensor,
        *,
        z: Tensor | None = None,
        noise: str | Sequence[Tensor] | None = None,
        dropout: Tensor | None = None,
        truncation: float = 1.0,
        mean: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1]; values under the hole are ignored.
            mask: (B, 1, H, W), **1 = hole**, 0 = known; any dtype.
            z, noise, dropout, truncation, mean: as in `forward`.
            seed: of what is drawn, on the CPU: the same seed gives the same picture; another seed, another one.

        Returns:
            (B, 3, H, W) in [0, 1]; known pixels as given, the hole from the network.

        Raises: as `forward`.
        """
        out = self(
            self.network_input(image, mask), z=z, noise=noise, dropout=dropout, truncation=truncation, mean=mean,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return torch.where(mask != 0, ((out + 1) / 2).clamp(0, 1), image)

    def network_input(self, image: Tensor, mask: Tensor) -> Tensor:
        """What `forward` takes, of what `inpaint` does: all channels, the mask as ±0.5."""
        hole = mask != 0
        return torch.cat([0.5 - hole.to(image.dtype), torch.where(hole, 0.0, image * 2 - 1)], dim=1)

    def _input(self, x: Tensor, mask: Tensor | None) -> Tensor:
        wanted = (RGB + MASK if mask is None else RGB, self.size, self.size)
        if x.dim() != 4 or tuple(x.shape[1:]) != wanted or not len(x):
            raise ValueError(
                f"x is {tuple(x.shape)} and mask {'missing' if mask is None else 'given'}; accepted: (B, {wanted[0]}, "
                f"{self.size}, {self.size}), the only size of this network. Resize first, or call "
                "inpaintrt.pipeline.fill"
            )
        if mask is None:
            return x
        if tuple(mask.shape) != (len(x), 1, self.size, self.size):
            raise ValueError(f"mask is {tuple(mask.shape)}; accepted: {(len(x), 1, self.size, self.size)}")
        return torch.cat([0.5 - mask.to(x.dtype), x], dim=1)


def _check_row(name: str, given: Tensor, batch: int, width: int) -> None:
    if tuple(given.shape) not in ((batch, width), (1, width)):
        raise ValueError(f"{name} is {tuple(given.shape)}; accepted: {(batch, width)} or {(1, width)}")


# ---- what weights say about their network ---------------------------------------------------------------------------

ANCHORS = ("G_synthesis.E.4x4.Dense0.weight", "synthesis.b4.conv.affine.weight")
NAMES = r"(G_mapping\.G_mapping|G_synthesis|mapping|encoder|synthesis)\."
PREFIX = ""
FOREIGN = ((r"(^|\.)synthesis\.b\d+\.ffc_skip\.", "an FcF generator, which is built of other blocks"),)


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `CoModGAN`, read off the keys and shapes of a state dict.

    Names tell "migan" from the others. "official" and "zyu" have the same weights, of which zengxianyu's files are the
    official ones converted: "official" is taken for granted, and "zyu" is an option of `load`.

    Raises: `KeyError` with the key that such a generator has and this state dict lacks.
    """
    port = "migan" if ANCHORS[1] in state else "official"
    names = PORTS[port]
    pattern = re.escape(names.to_rgb).replace(r"\{0\}", r"(\d+)").replace(r"x(\d+)", r"x\d+") + r"\."
    size = max(int(match[1]) for key in state if (match := re.match(pattern, key)))
    biases = ".1.bias" if port != "migan" else ".bias"

    def width(r: int) -> int:
        path = names.last if r == 4 else names.encoder[0].format(r)
        return state[path + biases].shape[0]

    sizes = [4 << i for i in range(int(math.log2(size)) - 1)]
    return {
        "port": port,
        "size": size,
        "channels": size * width(size),
        "most_channels": max(map(width, sizes)),
        "z": state[names.mapping.format(0) + ".weight"].shape[1],
        "w": state[names.mapping.format(7) + ".weight"].shape[0],
        "hidden": state[names.mapping.format(0) + ".weight"].shape[0],
        "vector": state[names.to_vector + ".weight"].shape[0],
    }


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Modules say no more than the weights do."""
    return {}

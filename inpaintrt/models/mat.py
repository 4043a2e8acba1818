"""MAT: mask-aware transformer for large hole image inpainting, as a plain PyTorch network.

Li et al., "MAT: Mask-Aware Transformer for Large Hole Image Inpainting", CVPR 2022. 61.6 M parameters for 512 px. A first
stage fills the hole coarsely: partial convolutions down to 64 × 64 tokens, five groups of window attention that know which
tokens are valid, a style-modulated decoder. A second, convolutional stage refines that. Both end with the known pixels
pasted back. State-dict keys are those of the public checkpoints, but for the attention masks of shifted windows, which
follow from sizes.

The network draws random numbers in every call, in eval mode too: see `Draws`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as MappingOf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mat_layers import (
    BasicLayer,
    Conv2dLayer,
    FullyConnected,
    Mapping,
    PartialConv,
    Resample,
    Size,
    StyleConv,
    ToRGB,
    to_features,
    to_tokens,
)
from .mat_masks import BLOCKS, RESOLUTIONS, SIDES, WINDOWS, mask_plan
from .stylegan2_layers import check_planes, wide

HEADS = 6
SQUARE = 16
"""Side of the map in which styles are injected, at a network's own resolution."""
NOISE_MODES = ("const", "random", "none")


class Draws(NamedTuple):
    """What a call of MAT draws at random; `MAT.draw` makes it.

    Attributes:
        tokens: (B, N, dim) of 0 and 1, which elements of the first stage's smallest map a style replaces (0).
        features: (B, C, h, w) of 0 and 1, the same for the second stage.
        noise: (B|1, 1, H, W) for each modulated 3×3 convolution of the second decoder, from the smallest map on;
            layers multiply it by their strength. Empty: no noise.
    """

    tokens: Tensor
    features: Tensor
    noise: tuple[Tensor, ...]


def added(x: Tensor, skip: Tensor) -> Tensor:
    """x + skip; in place, where no gradient needs x and it has the sum's dtype: the largest maps take 180 MiB each at 512 px."""
    fresh = x.requires_grad or skip.requires_grad or x.dtype != torch.result_type(x, skip)
    return x + skip if fresh else x.add_(skip)


class StyleBlock(nn.Module):
    """A level of a decoder: twice the size, the encoder's features of that size added, a convolution, and RGB.

    Args:
        resolution: of the output, for stored noise; None without noise.
    """

    def __init__(self, inputs: int, outputs: int, style_width: int, resolution: int | None) -> None:
        super().__init__()
        self.conv0 = StyleConv(inputs, outputs, style_width, resolution=resolution, up=2)
        self.conv1 = StyleConv(outputs, outputs, style_width, resolution=resolution)
        self.toRGB = ToRGB(outputs, style_width)

    def forward(
        self,
        x: Tensor,
        skip: Tensor,
        rgb: Tensor | None,
        styles: tuple[Tensor, Tensor, Tensor],
        noise: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor]:
        """x, skip and rgb: features below, features to add, RGB below → features and RGB of this level."""
        x = self.conv1(added(self.conv0(x, styles[0], noise[0]), skip), styles[1], noise[1])
        return x, self.toRGB(x, styles[2], rgb)


class FirstBlock(nn.Module):
    """The lowest level of the second decoder: as `StyleBlock`, but of one size and with an unmodulated convolution."""

    def __init__(self, inputs: int, outputs: int, style_width: int, resolution: int | None) -> None:
        super().__init__()
        self.conv0 = Conv2dLayer(inputs, outputs, 3)
        self.conv1 = StyleConv(outputs, outputs, style_width, resolution=resolution)
        self.toRGB = ToRGB(outputs, style_width)

    def forward(
        self, x: Tensor, skip: Tensor, styles: tuple[Tensor, Tensor], noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.conv1(added(self.conv0(x), skip), styles[0], noise)
        return x, self.toRGB(x, styles[1])


class Encoded(NamedTuple):
    """What a decoder starts from.

    Attributes:
        x: (B, C, h, w), the smallest map.
        style: (B, S): all of the first stage's style, or the part of the second's that is the same for all layers.
        skips: the encoder's features, smallest first: what each level of the decoder adds.
    """

    x: Tensor
    style: Tensor
    skips: tuple[Tensor, ...]


class FirstStage(nn.Module):
    """The transformer: image and mask to a coarsely filled image.

    Args:
        resolution: side of the images that it was designed for, a power of two.
        dim: channels everywhere, divisible by 6.
        w_dim: width of a style.
    """

    def __init__(self, resolution: int, dim: int, w_dim: int) -> None:
        super().__init__()
        levels = resolution.bit_length() - 7  # from `resolution` to 64
        self.conv_first = PartialConv(4, dim)
        self.enc_conv = nn.ModuleList([PartialConv(dim, dim, down=2) for _ in range(levels)])
        changes = (None, *(Resample(dim, dim, down=2) for _ in range(2)), *(Resample(dim, dim, up=2) for _ in range(2)))
        self.tran = nn.ModuleList(
            [BasicLayer(dim, HEADS, *of_group) for of_group in zip(BLOCKS, WINDOWS, SIDES, changes, strict=True)]
        )
        self.down_conv = nn.Sequential(*(Conv2dLayer(dim, dim, 3, down=2) for _ in range(4)))
        self.to_style = FullyConnected(dim, 2 * dim, "lrelu")
        self.ws_style = FullyConnected(w_dim, dim, "lrelu")
        self.to_square = FullyConnected(dim, SQUARE * SQUARE, "lrelu")
        self.dec_conv = nn.ModuleList([StyleBlock(dim, dim, 3 * dim, None) for _ in range(levels)])

    def forward(self, images_in: Tensor, masks_in: Tensor, ws: Tensor, tokens: Tensor) -> Tensor:
        """The image with its hole filled.

        Args:
            images_in: (B, 3, H, W) in [-1, 1]; values under the hole are ignored.
            masks_in: (B, 1, H, W), **1 = known**.
            ws: (B, n, w_dim) styles, of which the last counts.
            tokens: as in `Draws`.

        Returns:
            (B, 3, H, W), float32 at least.
        """
        rgb = self.decode(self.encode(images_in, masks_in, ws, tokens))
        return composite(rgb, images_in, masks_in)

    def encode(self, images_in: Tensor, masks_in: Tensor, ws: Tensor, tokens: Tensor) -> Encoded:
        """Everything before the decoder; arguments as of `forward`."""
        masks = wide(masks_in)
        plan = mask_plan(masks, SIDES[0] << len(self.enc_conv))
        known = torch.cat([masks - 0.5, wide(images_in) * masks], dim=1)
        x, _ = self.conv_first(known.to(self.conv_first.conv.weight.dtype), plan.partial("conv_first"))
        skips = []
        for i, conv in enumerate(self.enc_conv):
            skips.append(x)
            x, _ = conv(x, plan.partial(f"enc_conv.{i}"))
        size: Size = (x.shape[2], x.shape[3])
        x, size, _ = self.tran[0](to_tokens(x), size, plan.below("tran.0"))
        finest = x
        x, size, _ = self.tran[1](x, size, plan.below("tran.1"))
        finer = x
        x, size, _ = self.tran[2](x, size)  # from here on the mask is not looked at
        w = self.ws_style(wide(ws[:, -1]))
        square = F.interpolate(self.to_square(w)[:, None], size=x.shape[1], mode="linear")
        x = injected(x, square.transpose(1, 2), tokens)
        whole = self.to_style(wide(self.down_conv(to_features(x, size))).mean((2, 3)))
        x, size, _ = self.tran[3](x, size)
        x, size, _ = self.tran[4](x + finer, size)
        return Encoded(to_features(x + finest, size), torch.cat([whole, w], dim=1), tuple(reversed(skips)))

    def decode(self, encoded: Encoded) -> Tensor:
        """(B, 3, H, W) before the known pixels are pasted back, float32 at least."""
        x, style, skips = encoded.x, encoded.style, [*reversed(encoded.skips)]
        del encoded  # so that a level's features go with it
        rgb = None
        for block in self.dec_conv:
            x, rgb = block(x, skips.pop(), rgb, (style, style, style))
        assert rgb is not None
        return rgb


class EncoderBlock(nn.Module):
    """A level of the second encoder: half the size, or at the first level a 1×1 convolution, then 3×3."""

    def __init__(self, inputs: int, outputs: int, *, first: bool) -> None:
        super().__init__()
        self.conv0 = Conv2dLayer(inputs, outputs, 1) if first else Conv2dLayer(inputs, outputs, 3, down=2)
        self.conv1 = Conv2dLayer(outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv0(x))  # type: ignore[no-any-return]


class ToStyle(nn.Module):
    """Features to one vector: three convolutions of stride 2, the mean, a fully connected layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(Conv2dLayer(channels, channels, 3, down=2) for _ in range(3)))
        self.fc = FullyConnected(channels, 2 * channels, "lrelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(wide(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Synthesis(nn.Module):
    """Both stages. Children and their keys are those of the public code."""

    def __init__(self, resolution: int, dim: int, w_dim: int, channel_max: int, noise: bool) -> None:
        super().__init__()

        def width(side: int) -> int:
            return min(channel_max, 64 * channel_max // side)

        self.first_stage = FirstStage(resolution, dim, w_dim)
        sides = [resolution >> i for i in range(resolution.bit_length() - SQUARE.bit_length() + 1)]
        self.enc = nn.ModuleDict(
            {
                f"EncConv_Block_{side}x{side}": EncoderBlock(
                    7 if side == resolution else width(2 * side), width(side), first=side == resolution
                )
                for side in sides
            }
        )
        lowest = width(SQUARE)
        self.to_square = FullyConnected(w_dim, SQUARE * SQUARE, "lrelu")
        self.to_style = ToStyle(lowest)
        style_width = w_dim + 2 * lowest
        levels: dict[str, nn.Module] = {}
        for side in reversed(sides):
            kind = FirstBlock if side == SQUARE else StyleBlock
            below = lowest if side == SQUARE else width(side // 2)
            levels[f"Dec_{side}x{side}"] = kind(below, width(side), style_width, side if noise else None)
        self.dec = nn.ModuleDict(levels)

    def encode(self, images_in: Tensor, masks_in: Tensor, coarse: Tensor, ws: Tensor, features: Tensor) -> Encoded:
        """The second stage before its decoder; coarse is the first stage's image, features as in `Draws`."""
        masks, images = wide(masks_in), wide(images_in)
        known = images * masks
        x = torch.cat([masks - 0.5, known + coarse * (1 - masks), known], dim=1).to(self.to_style.fc.weight.dtype)
        skips = []
        for block in self.enc.values():
            x = block(x)
            skips.append(x)
        square = self.to_square(wide(ws[:, 0])).view(-1, 1, SQUARE, SQUARE)
        square = F.interpolate(square, size=x.shape[2:], mode="bilinear", align_corners=False)
        x = injected(x, square, features)
        skips[-1] = x
        return Encoded(x, self.to_style(x), tuple(reversed(skips)))

    def decode(self, encoded: Encoded, ws: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        """(B, 3, H, W) before the known pixels are pasted back, float32 at least."""
        x, rgb = self.lowest(encoded, ws, noise)
        others = [*self.dec.values()][1:]
        for i, (block, skip, styles) in enumerate(
            zip(others, encoded.skips[1:], self.styles(encoded, ws), strict=True)
        ):
            maps = noise[2 * i + 1 : 2 * i + 3] or (None, None)
            x, rgb = block(x, skip, rgb, styles, maps)
        return rgb

    def lowest(self, encoded: Encoded, ws: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Features and RGB of the decoder's lowest level, which doubles nothing."""
        first, second = (torch.cat([w, encoded.style], dim=1) for w in wide(ws[:, :2]).unbind(1))
        lowest = next(iter(self.dec.values()))
        return lowest(encoded.x, encoded.skips[0], (first, second), noise[0] if noise else None)  # type: ignore[no-any-return]

    def styles(self, encoded: Encoded, ws: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of the convolutions and of RGB at each level above the lowest; RGB's is the next level's first, too."""
        all_styles = [torch.cat([w, encoded.style], dim=1) for w in wide(ws).unbind(1)]
        return [(all_styles[i], all_styles[i + 1], all_styles[i + 2]) for i in range(1, len(all_styles) - 2, 2)]


def injected(x: Tensor, style: Tensor, kept: Tensor) -> Tensor:
    """x where `kept` is 1, the style where it is 0; the style has one channel, for all."""
    return (wide(x) * kept + style * (1 - kept)).to(x.dtype)


def composite(rgb: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """rgb under the hole, the image elsewhere; mask **1 = known**. Float32 at least."""
    mask = wide(mask)
    return wide(rgb) * (1 - mask) + wide(image) * mask


class MAT(nn.Module):
    """The MAT generator. Defaults are those of the public 512 px networks.

    Args:
        resolution: side of the images that it was trained on: 512, 256 or 128.
        noise: whether the second decoder's layers have noise. The official checkpoints do, the plain state dict that
            most applications use (`Places_512_FullData_G.pth`) does not.
        dim: channels of the first stage, divisible by 6.
        z_dim, w_dim: width of the latent and of styles.
        channel_max: channels of the second stage up to 64 × 64; from there each doubling of the size halves them.

    Attributes:
        size_multiple, min_size: what height and width must be: windows must fit the smallest map.
        config: the arguments that make this network.

    Raises: `ValueError` for values that no network can be made of.
    """

    def __init__(
        self,
        resolution: int = 512,
        *,
        noise: bool = True,
        dim: int = 180,
        z_dim: int = 512,
        w_dim: int = 512,
        channel_max: int = 512,
    ) -> None:
        super().__init__()
        if resolution not in RESOLUTIONS:
            raise ValueError(f"resolution is {resolution}; accepted: {', '.join(map(str, RESOLUTIONS))}")
        if dim < HEADS or dim % HEADS:
            raise ValueError(f"dim is {dim}; accepted: multiples of {HEADS}, the number of heads")
        if min(z_dim, w_dim) < 1:
            raise ValueError(f"z_dim is {z_dim}, w_dim {w_dim}; accepted: 1 or more")
        if 64 * channel_max < resolution:
            raise ValueError(f"channel_max is {channel_max}; accepted: at least {resolution // 64} at {resolution} px")
        self.config = {
            "resolution": resolution, "noise": noise, "dim": dim, "z_dim": z_dim, "w_dim": w_dim,
            "channel_max": channel_max,
        }  # fmt: skip
        self.resolution, self.noise, self.z_dim = resolution, noise, z_dim
        self.size_multiple = self.min_size = resolution
        self.synthesis = Synthesis(resolution, dim, w_dim, channel_max, noise)
        self.mapping = Mapping(z_dim, w_dim, 2 * (resolution.bit_length() - 1) - 6)
        self.register_load_state_dict_pre_hook(_drop_attention_masks)

    def forward(
        self,
        images_in: Tensor,
        masks_in: Tensor,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str | None = None,
        *,
        draws: Draws | None = None,
        return_stg1: bool = False,
    ) -> Any:
        """The official call.

        Args:
            images_in: (B, 3, H, W) RGB in [-1, 1]; values under the hole are multiplied by 0 (so must be finite).
            masks_in: (B, 1, H, W), **1 = known**, 0 = hole, the opposite of `inpaint`; fractions are taken as they are.
                Any dtype, bool too.
            z: (B|1, z_dim) latent, from a normal distribution.
            c: no labels: None or (B|1, 0).
            truncation_psi, truncation_cutoff: as for `mat_layers.Mapping`.
            noise_mode: "const", "random" or "none"; None for the first that this network has at this size. Ignored where
                `draws` are given.
            draws: all that is random. None: drawn from torch's generator, in the original's order.
            return_stg1: whether to return the first stage's image, too.

        Returns:
            (B, 3, H, W) in images_in's dtype, not clipped; known pixels as given. With `return_stg1` a pair, second the
            first stage's.

        Raises: `ValueError` for other shapes, also of draws; images that are not floating point; heights or widths that
            are no multiples of `size_multiple` (pad first; see `inpaintrt.pipeline`); noise that the network does not have,
            or not at this size; a float16 network on the CPU.
        """
        self._check(images_in, masks_in)
        batch, _, height, width = images_in.shape
        if not masks_in.is_floating_point():
            masks_in = masks_in.to(images_in.dtype)
        if z.dim() != 2 or z.shape[1] != self.z_dim or len(z) not in (1, batch):
            raise ValueError(f"z is {tuple(z.shape)}; accepted: {(batch, self.z_dim)} or {(1, self.z_dim)}")
        if c is not None and c.numel():
            raise ValueError(f"c is {tuple(c.shape)}; accepted: None or no labels, {(batch, 0)}")
        if draws is None:
            draws = self.draw(batch, (height, width), noise_mode)
        else:
            self._check_draws(draws, batch, (height, width))
        ws = self.mapping(z, truncation_psi, truncation_cutoff).expand(batch, -1, -1)
        synthesis = self.synthesis
        coarse = synthesis.first_stage(images_in, masks_in, ws, draws.tokens)
        encoded = synthesis.encode(images_in, masks_in, coarse, ws, draws.features)
        out = composite(synthesis.decode(encoded, ws, draws.noise), images_in, masks_in).to(images_in.dtype)
        return (out, coarse.to(images_in.dtype)) if return_stg1 else out

    def draw(
        self, batch: int, size: Size, noise_mode: str | None = None, generator: torch.Generator | None = None
    ) -> Draws:
        """All that a call draws at random, on the network's device.

        Without a generator, torch's own gives the numbers that the original would take from it, call by call. With one,
        they are drawn on its device, so a CPU generator gives the same everywhere.

        Args:
            batch, size: number of images, their height and width.
            noise_mode: as for `forward`.

        Raises: `ValueError` for a mode that this network does not have at this size.
        """
        mode = self._noise_mode(size, noise_mode)
        like = wide(self.mapping.w_avg)
        at = like.device if generator is None else generator.device
        (of_tokens, of_features), of_noise = self._shapes(batch, size)

        def halves(shape: tuple[int, ...]) -> Tensor:
            if generator is None:
                return F.dropout(like.new_full(shape, 0.5), 0.5, training=True)
            return torch.empty(shape, dtype=like.dtype, device=at).bernoulli_(0.5, generator=generator).to(like.device)

        tokens, features = halves(of_tokens), halves(of_features)
        noise: list[Tensor] = []
        if mode == "const":
            noise = [layer.noise_const[None, None] for layer in self._noisy()]
        elif mode == "random":
            drawn = (torch.randn(shape, dtype=like.dtype, device=at, generator=generator) for shape in of_noise)
            noise = [plane.to(like.device) for plane in drawn]
        return Draws(tokens, features, tuple(noise))

    def inpaint(
        self, image: Tensor, mask: Tensor, *, seed: int = 0, noise_mode: str | None = None, truncation_psi: float = 1.0
    ) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1]; values under the hole are ignored.
            mask: (B, 1, H, W), **1 = hole**, 0 = known; any dtype, all that is not 0 is hole.
            seed: of latent, replaced elements and noise: each gives another fill, the same on every device.
            noise_mode, truncation_psi: as for `forward`.

        Returns:
            (B, 3, H, W) in [0, 1]; known pixels as given, the hole from the network.

        Raises: as `forward`.
        """
        x, known = self.network_input(image, mask)
        self._check(x, known)
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(len(image), self.z_dim, generator=generator).to(image.device)
        draws = self.draw(len(image), (image.shape[2], image.shape[3]), noise_mode, generator)
        filled = self(x, known, z, truncation_psi=truncation_psi, draws=draws)
        return torch.where(mask != 0, (filled.clamp(-1, 1) + 1) / 2, image)

    def network_input(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The first two arguments of `forward`, of the two of `inpaint`."""
        hole = mask != 0
        return torch.where(hole, 0.0, image * 2 - 1), (~hole).to(image.dtype)

    def _noisy(self) -> list[StyleConv]:
        """The layers of the second decoder that take noise, from the smallest map on."""
        return [m for m in self.synthesis.dec.modules() if isinstance(m, StyleConv)] if self.noise else []

    def _shapes(self, batch: int, size: Size) -> tuple[tuple[tuple[int, ...], ...], list[tuple[int, int, int, int]]]:
        """Of what a call draws: tokens and features; planes of noise."""
        height, width = (side * SQUARE // self.resolution for side in size)
        dim, lowest = self.synthesis.first_stage.to_style.weight.shape[1], self.synthesis.to_style.fc.weight.shape[1]
        own = [len(layer.noise_const) for layer in self._noisy()]
        noise = [(batch, 1, size[0] * side // self.resolution, size[1] * side // self.resolution) for side in own]
        return ((batch, height * width, dim), (batch, lowest, height, width)), noise

    def _check_draws(self, draws: Draws, batch: int, size: Size) -> None:
        halves, noise = self._shapes(batch, size)
        for name, given, shape in zip(draws._fields, (draws.tokens, draws.features), halves, strict=False):
            if tuple(given.shape) != shape:
                raise ValueError(f"draws.{name} is {tuple(given.shape)}; accepted: {shape}")
        if draws.noise and not self.noise:
            raise ValueError(f"draws.noise has {len(draws.noise)} planes; accepted: none (the network has noise=False)")
        if draws.noise:
            check_planes(draws.noise, noise)

    def _noise_mode(self, size: Size, mode: str | None) -> str:
        own = size == (self.resolution, self.resolution)
        if mode is None:
            return "none" if not self.noise else "const" if own else "random"
        if mode not in NOISE_MODES:
            raise ValueError(f"noise_mode is {mode!r}; accepted: {', '.join(NOISE_MODES)}")
        if mode != "none" and not self.noise:
            raise ValueError(f"noise_mode is {mode!r}, but this network has no noise (noise=False); accepted: 'none'")
        if mode == "const" and not own:
            raise ValueError(
                f"noise_mode is 'const', but the stored noise is for {self.resolution}×{self.resolution} images, this one "
                f"is {size[0]}×{size[1]}; accepted: 'random', 'none'"
            )
        return mode

    def _check(self, images: Tensor, masks: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"image is {tuple(images.shape)}; accepted: (B, 3, H, W), B at least 1")
        if not images.is_floating_point():
            raise ValueError(f"image is {images.dtype}; accepted: floating point")
        batch, _, height, width = images.shape
        if height % self.size_multiple or width % self.size_multiple or not height * width:
            raise ValueError(
                f"image is {height}×{width}; accepted: height and width divisible by {self.size_multiple}. Pad image and "
                "mask and crop the result, or call inpaintrt.pipeline.fill"
            )
        if masks.shape != (batch, 1, height, width):
            raise ValueError(f"mask is {tuple(masks.shape)}; accepted: {(batch, 1, height, width)}")
        weight = self.mapping.w_avg
        if weight.dtype == torch.float16 and weight.device.type == "cpu":
            raise ValueError(
                "the network is float16 on the CPU, where convolutions of that type are slower than float32 and its range "
                "ends at 65504, which modulated features can exceed; accepted: float32, bfloat16, float64"
            )


# ---- what weights say about their network ---------------------------------------------------------------------------

_FIRST = "synthesis.first_stage.conv_first.conv.weight"
ANCHORS = (_FIRST,)
NAMES = r"(mapping|synthesis)\."
PREFIX = ""
FOREIGN = ()
_ATTENTION_MASK = re.compile(r"\.attn_mask$")


def essential(state: MappingOf[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the masks of shifted windows, which follow from sizes; the public code does not use them."""
    return {key: tensor for key, tensor in state.items() if not _ATTENTION_MASK.search(key)}


def _drop_attention_masks(network: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Before `load_state_dict`; `state` is its own copy."""
    for key in [key for key in state if key.startswith(prefix) and _ATTENTION_MASK.search(key)]:
        del state[key]


def config_from_state_dict(state: MappingOf[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `MAT`, read off the keys and shapes of an essential state dict.

    Raises: `KeyError` with the key that such a network has and this state dict lacks.
    """
    sides = [int(m[1]) for key in state if (m := re.match(r"synthesis\.enc\.EncConv_Block_(\d+)x\1\.", key))]
    if not sides:
        raise KeyError("synthesis.enc.EncConv_Block_512x512.conv0.weight")
    return {
        "resolution": max(sides),
        "noise": any(key.endswith(".noise_const") for key in state),
        "dim": state[_FIRST].shape[0],
        "z_dim": state["mapping.fc0.weight"].shape[1],
        "w_dim": state["mapping.w_avg"].shape[0],
        "channel_max": state["synthesis.to_style.fc.weight"].shape[1],
    }


def config_from_modules(modules: MappingOf[str, Any]) -> dict[str, Any]:
    """Nothing: names and shapes tell all that a file can tell."""
    return {}

"""P-VQVAE of PUT: patches to features, features to codes, codes and the known pixels to an image.

The public code's residual blocks start with a ReLU that writes in place, on the tensor that is added at their end: a block
is relu(x) + f(relu(x)), not x + f(x), and weights were trained that way. For the same reason, features that the
reference branch has stored are rectified where such a block follows.

Masks are (B, 1, H, W) with **1 = known**, 0 = hole. Images are 0 to 255. Source: Liu et al., "Reduce Information Loss in
Transformers for Pluralistic Image Inpainting", CVPR 2022, section 3.1; the later variant is of "Transformer based
Pluralistic Image Completion with Reduced Information Loss", TPAMI 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.ops.nearest_code import nearest_code


class LinearResBlock(nn.Module):
    """relu(x) + W₂ relu(W₁ relu(x)), of vectors."""

    def __init__(self, channels: int, bottleneck: int = 2) -> None:
        super().__init__()
        inner = channels // bottleneck
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.layers(x)


class ConvResBlock(nn.Module):
    """relu(x) + W₂ relu(W₁ relu(x)), of images: a 3×3 and a 1×1 convolution."""

    def __init__(self, channels: int, bottleneck: int = 2) -> None:
        super().__init__()
        inner = channels // bottleneck
        self.conv = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.conv(x)


class UpSample(nn.Module):
    """Twice the size: relu, then a transposed 4×4 convolution, or nearest neighbours and a 3×3 convolution."""

    def __init__(self, inputs: int, outputs: int, transposed: bool) -> None:
        super().__init__()
        if transposed:
            self.deconv = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
        else:
            self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        if self.transposed:
            return self.deconv(x)  # type: ignore[no-any-return]
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class DownSample(nn.Module):
    """Half the size: relu, then a 4×4 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x))  # type: ignore[no-any-return]


class PatchEncoder(nn.Module):
    """A feature for each patch, of its own pixels only: no pixel of a hole is mixed into a known patch."""

    def __init__(self, channels: int, outputs: int, blocks: int, patch: int) -> None:
        super().__init__()
        self.pre_layers = nn.Sequential(nn.Linear(3 * patch * patch, channels))
        self.res_layers = nn.Sequential(*(LinearResBlock(channels) for _ in range(blocks)))
        self.post_layers = nn.Sequential(nn.ReLU(), nn.Linear(channels, outputs), nn.ReLU())
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, outputs, H/patch, W/patch)."""
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        y = self.post_layers(self.res_layers(self.pre_layers(patches)))
        return y.transpose(1, 2).unflatten(2, (rows, columns))  # type: ignore[no-any-return]


class ReferenceEncoder(nn.Module):
    """Features of the known pixels at every scale of the decoder, finest first."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for inputs, outputs in pairwise(widths):
            layers += [ConvResBlock(inputs) for _ in range(blocks)]
            layers.append(DownSample(inputs, outputs) if blocks else nn.Conv2d(inputs, outputs, 4, 2, 1))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        stored: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if isinstance(layer, ConvResBlock):
                if not isinstance(self.layers[i - 1], ConvResBlock):
                    stored[-1] = F.relu(stored[-1])  # the block rectifies what was stored
                x = layer(x)
            else:
                x = layer(F.relu(x) if i and isinstance(layer, nn.Conv2d) else x)
                stored.append(x)
        return stored


class Decoder(nn.Module):
    """Codes' features and the known pixels to an image.

    Before every doubling, and at the end, features of known places are replaced by those of the reference branch.
    """

    def __init__(self, inputs: int, channels: int, blocks: int, patch: int, blocks_per_scale: int) -> None:
        super().__init__()
        ups = [512, 256, 128, 64] if patch == 16 else [256, 128, 64]
        self.pre_layers = nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1))
        self.res_layers = nn.Sequential(*(ConvResBlock(channels) for _ in range(blocks)))
        layers: list[nn.Module] = []
        for narrow, wide in zip([channels, *ups], ups, strict=False):
            layers.append(UpSample(narrow, wide, transposed=blocks_per_scale == 0))
            layers += [ConvResBlock(wide) for _ in range(blocks_per_scale)]
        self.up_layers = nn.ModuleList(layers)
        self.post_layers = nn.Sequential(nn.ReLU(), nn.Conv2d(ups[-1], 3, 3, padding=1))
        self.encoder = ReferenceEncoder([*reversed(ups), channels], blocks_per_scale)

    def forward(self, x: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """x (B, inputs, h, w), image (B, 3, H, W) normalised with its hole black, mask (B, 1, H, W), 1 = known."""
        references = self.encoder(image)
        x = self.res_layers(self.pre_layers(x))
        for layer in self.up_layers:
            if isinstance(layer, UpSample):
                x = _merge(x, references.pop(), mask)
            x = layer(x)
        return self.post_layers(_merge(x, references.pop(), mask))  # type: ignore[no-any-return]


def _merge(x: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    known = F.interpolate(mask, x.shape[2:], mode="nearest")
    return x * (1 - known) + reference * known


class Quantiser(nn.Module):
    """A dual codebook: the first `split` codes are for known patches, the others for patches with a hole in them."""

    embedding: Tensor
    cluster_size: Tensor
    embedding_avg: Tensor

    def __init__(self, codes: int, width: int, split: int) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.randn(codes, width))
        self.register_buffer("cluster_size", torch.zeros(codes))  # of training, as the next
        self.register_buffer("embedding_avg", torch.zeros(codes, width))
        self.split = split

    def forward(self, z: Tensor, known: Tensor) -> Tensor:
        """Tokens int64 (B, h, w) of features z (B, C, h, w), whose patches are wholly `known` (B, h, w), or not."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        if self.split == len(self.embedding):
            return nearest_code(flat, self.embedding).view(known.shape)
        return nearest_code(flat, self.embedding, split=self.split, known=known.flatten()).view(known.shape)


class PixelRange(NamedTuple):
    """What pixels 0 to 255 become: (x/scale − mean)/std for each of red, green, blue."""

    scale: tuple[float, ...] = (127.5, 127.5, 127.5)
    mean: tuple[float, ...] = (1.0, 1.0, 1.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Rounded to float32 before all else, as the public code has them; filled there: a copy would wait for the device.
        def made(values: tuple[float, ...]) -> Tensor:
            each = [torch.full((1, 1, 1), value, dtype=torch.float32, device=x.device) for value in values]
            return torch.stack(each, 1).to(x.dtype)

        scale, mean, std = map(made, self)
        return scale, mean, std

    def normalise(self, x: Tensor) -> Tensor:
        scale, mean, std = self._like(x)
        return (x / scale - mean) / std

    def pixels(self, x: Tensor) -> Tensor:
        scale, mean, std = self._like(x)
        return ((x * std + mean) * scale).clamp(0, 255)


IMAGENET = PixelRange((255.0,) * 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class PVQVAE(nn.Module):
    """The codec of PUT.

    Args:
        codes, split: size of the codebook, and how many of its entries are for known patches.
        width: of codes and features.
        patch: side of a patch, 8 or 16.
        channels, outputs, blocks: of the patch encoder.
        decoder_channels, decoder_blocks: at the tokens' scale.
        blocks_per_scale: 0: transposed convolutions without blocks between them (CVPR 2022); n: nearest neighbours and n
            blocks after each change of size, in both branches (TPAMI 2024).
        pixels: what pixels are normalised to: None for -1 to 1, "imagenet", or another range.
        composite: keep the known pixels in the decoded image.

    Raises: `ValueError` for another patch, another name of a range, a split above the codes, or numbers that no network can
        be made of.
    """

    def __init__(
        self,
        *,
        codes: int = 1024,
        split: int = 512,
        width: int = 256,
        patch: int = 8,
        channels: int = 256,
        outputs: int = 256,
        blocks: int = 8,
        decoder_channels: int = 256,
        decoder_blocks: int = 8,
        blocks_per_scale: int = 0,
        pixels: PixelRange | str | None = None,
        composite: bool = False,
    ) -> None:
        super().__init__()
        if patch not in (8, 16):
            raise ValueError(f"patch is {patch}; accepted: 8, 16")
        if not 0 < split <= codes:
            raise ValueError(
                f"split is {split}; accepted: 1 to {codes}, the codes; as many as these: a single codebook"
            )
        if min(width, channels, outputs, decoder_channels) < 1 or min(blocks, decoder_blocks, blocks_per_scale) < 0:
            raise ValueError(
                f"width is {width}, channels {channels}, outputs {outputs}, blocks {blocks}, decoder_channels "
                f"{decoder_channels}, decoder_blocks {decoder_blocks}, blocks_per_scale {blocks_per_scale}; accepted: 1 or "
                "more each, blocks 0 or more"
            )
        if isinstance(pixels, str):
            if pixels != "imagenet":
                raise ValueError(f"pixels are {pixels!r}; accepted: 'imagenet', a PixelRange, None")
            pixels = IMAGENET
        self.encoder = PatchEncoder(channels, outputs, blocks, patch)
        self.decoder = Decoder(width, decoder_channels, decoder_blocks, patch, blocks_per_scale)
        self.quantize = Quantiser(codes, width, split)
        self.quant_conv = nn.Conv2d(outputs, width, 1)
        self.post_quant_conv = nn.Conv2d(width, width, 1)
        self.patch, self.composite = patch, composite
        self.pixels = PixelRange() if pixels is None else pixels

    def known_share(self, mask: Tensor) -> Tensor:
        """(B, h, w): how much of each patch is known, 0 to 1."""
        return F.avg_pool2d(mask.float(), self.patch)[:, 0]

    def encode(self, image: Tensor) -> Tensor:
        """Features (B, width, h, w) of an image (B, 3, H, W) of 0 to 255; a hole is 0, black."""
        return self.quant_conv(self.encoder(self.pixels.normalise(image)))  # type: ignore[no-any-return]

    def decode(self, tokens: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """The image (B, 3, H, W), 0 to 255, of tokens (B, h, w), with the known pixels of `image` as reference.

        mask: (B, 1, H, W), 1 = known, 0 = hole, whose pixels are not read.
        """
        known = torch.where(mask != 0, image, 0.0)
        mask = mask.to(image.dtype)
        raw = self.decoder(self.features(tokens), self.pixels.normalise(known), mask)
        out = self.pixels.pixels(raw)
        return out * (1 - mask) + known if self.composite else out

    def features(self, tokens: Tensor) -> Tensor:
        """What the decoder reads of tokens (B, h, w). The codes pass the 1×1 convolution, not the tokens: it is the same."""
        matrix = self.post_quant_conv.weight[:, :, 0, 0]
        table = F.linear(self.quantize.embedding, matrix, self.post_quant_conv.bias)
        return F.embedding(tokens, table).permute(0, 3, 1, 2)


def codec_config(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Arguments of `PVQVAE` but `split`, `pixels` and `composite`, read off the keys and shapes of a state dict.

    Raises: `KeyError` with the key that a codec has and this state dict lacks.
    """

    def shape(name: str) -> torch.Size:
        return state[prefix + name].shape

    def count(pattern: str) -> int:
        found = 0
        while prefix + pattern.format(found) in state:
            found += 1
        return found

    codes, width = shape("quantize.embedding")
    channels, inputs = shape("encoder.pre_layers.0.weight")
    return {
        "codes": codes,
        "width": width,
        "patch": math.isqrt(inputs // 3),
        "channels": channels,
        "outputs": shape("encoder.post_layers.1.weight")[0],
        "blocks": count("encoder.res_layers.{}.layers.1.weight"),
        "decoder_channels": shape("decoder.pre_layers.0.weight")[0],
        "decoder_blocks": count("decoder.res_layers.{}.conv.1.weight"),
        "blocks_per_scale": _blocks_per_scale(state, prefix),
    }


def _blocks_per_scale(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many residual blocks follow the first layer that doubles the size."""
    found = 0
    while f"{prefix}decoder.up_layers.{found + 1}.conv.1.weight" in state:
        found += 1
    return found

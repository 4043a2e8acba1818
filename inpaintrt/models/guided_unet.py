"""guided-diffusion's UNet (ADM): what RePaint and its relatives call thousands of times for one image.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021. 553 M parameters and 1120 GMAC a call for
256 pixels. From a noisy image and its timestep it predicts the noise and, in further channels, how its variance is to be
interpolated. The layers are in `guided_layers`, the classifier that can guide it is `guided_classifier`. State-dict keys are
those of the public checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .guided_layers import (
    AttentionBlock,
    Downsample,
    EmbeddedSequential,
    GroupNorm32,
    ResBlock,
    Upsample,
    timestep_embedding,
    zeroed,
)

HEAD_CHANNELS = 64
"""Of each attention head where nothing else is said, as in most released networks."""


class Encoder(nn.Module):
    """The way down and the middle, which the UNet and the classifier share: `time_embed`, `input_blocks`, `middle_block`.

    Args: see `GuidedUNet`.

    Attributes:
        size_multiple: what height and width of images must be multiples of.
        widths: channels after each of `input_blocks`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[float],
        dropout: float,
        conv_resample: bool,
        num_heads: int | None,
        num_head_channels: int | None,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        use_new_attention_order: bool,
    ) -> None:
        super().__init__()
        if min(in_channels, model_channels, num_res_blocks, len(channel_mult)) < 1:
            raise ValueError(
                f"in_channels is {in_channels}, model_channels {model_channels}, num_res_blocks {num_res_blocks}, channel_mult "
                f"{tuple(channel_mult)}; accepted: 1 or more, and one factor or more"
            )
        self.in_channels, self.model_channels = in_channels, model_channels
        self.attention_resolutions = tuple(attention_resolutions)
        self.size_multiple = self.min_size = 2 ** (len(channel_mult) - 1)
        self.emb_channels = 4 * model_channels
        self._heads = num_heads, num_head_channels, use_new_attention_order
        self._resampling = resblock_updown, conv_resample
        self._block = {"dropout": dropout, "scale_shift": use_scale_shift_norm}
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, self.emb_channels), nn.SiLU(), nn.Linear(self.emb_channels, self.emb_channels)
        )
        self.levels = [int(factor * model_channels) for factor in channel_mult]
        width = self.levels[0]
        self.input_blocks = nn.ModuleList([EmbeddedSequential(nn.Conv2d(in_channels, width, 3, padding=1))])
        self.widths = [width]
        for level, outputs in enumerate(self.levels):
            for _ in range(num_res_blocks):
                self.input_blocks.append(EmbeddedSequential(*self._layers(width, outputs, level)))
                width = outputs
                self.widths.append(width)
            if level < len(self.levels) - 1:
                self.input_blocks.append(EmbeddedSequential(self._resampled(width, "down")))
                self.widths.append(width)
        self.middle_block = EmbeddedSequential(self._res(width, width), self._attention(width), self._res(width, width))

    def embed(self, timesteps: Tensor) -> Tensor:
        """(B,) timesteps, whole or not → (B, emb_channels)."""
        sinusoid = timestep_embedding(timesteps, self.model_channels)
        first: Any = self.time_embed[0]
        return self.time_embed(sinusoid.to(first.weight.dtype))  # type: ignore[no-any-return]

    def torso_dtype(self) -> torch.dtype:
        """What blocks compute in: the dtype of their convolutions' weights."""
        first: Any = self.input_blocks[0]
        return first[0].weight.dtype  # type: ignore[no-any-return]

    def convert_torso(self, dtype: torch.dtype) -> None:
        """Half precision as the public code has it: convolutions in the blocks, attention's projections among them, in `dtype`.

        Embeddings, the linear layers that they go through, affine parameters of group norms and the output layers stay
        float32; norms and softmax are computed in float32. The result has the dtype of the image.
        """
        for blocks in (self.input_blocks, self.middle_block, getattr(self, "output_blocks", nn.ModuleList())):
            for module in blocks.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)

    def check_image(self, x: Tensor, timesteps: Tensor) -> None:
        """Raises: `ValueError` for what `forward` cannot take."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x is {tuple(x.shape)}; accepted: (B, {self.in_channels}, H, W)")
        height, width = x.shape[2:]
        if min(height, width) < 1 or height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"image is {height}×{width}; accepted: height and width divisible by {self.size_multiple}. Pad it and crop the "
                "result"
            )
        if timesteps.shape != (len(x),):
            raise ValueError(f"timesteps is {tuple(timesteps.shape)}; accepted: {(len(x),)}, one for each image")

    def _res(self, width: int, outputs: int, resample: str = "") -> ResBlock:
        return ResBlock(width, outputs, self.emb_channels, resample=resample, **self._block)  # type: ignore[arg-type]

    def _attention(self, width: int) -> AttentionBlock:
        heads = heads_of(width, *self._heads[:2])
        return AttentionBlock(width, heads, self._heads[2])

    def _layers(self, width: int, outputs: int, level: int) -> list[nn.Module]:
        """A residual block, and attention where this level has it."""
        attends = 2**level in self.attention_resolutions
        return [self._res(width, outputs), *([self._attention(outputs)] if attends else [])]

    def _resampled(self, width: int, way: str) -> nn.Module:
        blocks, conv = self._resampling
        if blocks:
            return self._res(width, width, resample=way)
        return (Upsample if way == "up" else Downsample)(width, conv)


def heads_of(channels: int, num_heads: int | None, num_head_channels: int | None) -> int:
    """The number of attention heads of a block, by the channels of each (which win) or by their number."""
    given = num_head_channels not in (None, -1)
    width = num_head_channels if given else HEAD_CHANNELS if num_heads is None else None
    heads = channels // width if width else num_heads  # type: ignore[operator]
    if heads is None or heads < 1 or channels % heads or (width and heads * width != channels):
        by = f"num_head_channels {width}" if width else f"num_heads {num_heads}"
        raise ValueError(f"attention over {channels} channels with {by}; accepted: a divisor. Weights do not tell it")
    return heads


class GuidedUNet(Encoder):
    """The UNet.

    Arguments have the public code's names. Those that leave no trace in the weights are marked with *.

    Args:
        in_channels: of the image; 6 in the upsamplers, which are given the small image, enlarged, beside the noisy one.
        model_channels: width of the first layer at factor 1, a multiple of 32; embeddings are four times as wide.
        out_channels: 6 with learned variances (`learn_sigma`), else 3.
        num_res_blocks: of each resolution on the way down; on the way up there is one more.
        attention_resolutions: by how much the size is reduced where there is attention, such as 8, 16, 32 for the 32, 16 and
            8 pixels of a 256-pixel network (whose command line names those instead).
        channel_mult: width of each resolution as a multiple of model_channels.
        dropout*: in residual blocks, in training.
        conv_resample: convolutions after doubling and for halving, where resblock_updown is False.
        num_heads*, num_head_channels*: heads of each attention, or the width of one, which wins where both are given (−1 counts
            as not given). With neither, heads are 64 wide.
        num_classes: for labels; None without.
        use_scale_shift_norm: embeddings scale and shift norms; otherwise they are added.
        resblock_updown: residual blocks change the size.
        use_new_attention_order*: see `guided_layers.attention`.

    Attributes:
        size_multiple, min_size: what height and width must be: multiples of 2^(resolutions − 1).
        config: the arguments that make this network.

    Raises: `ValueError` for values that no network can be made of.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        model_channels: int = 256,
        out_channels: int = 6,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (8, 16, 32),
        channel_mult: Sequence[float] = (1, 1, 2, 2, 4, 4),
        dropout: float = 0.0,
        conv_resample: bool = True,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        num_classes: int | None = None,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = False,
    ) -> None:
        shared: dict[str, Any] = {
            "in_channels": in_channels, "model_channels": model_channels, "num_res_blocks": num_res_blocks,
            "attention_resolutions": tuple(attention_resolutions), "channel_mult": tuple(channel_mult), "dropout": dropout,
            "conv_resample": conv_resample, "num_heads": num_heads, "num_head_channels": num_head_channels,
            "use_scale_shift_norm": use_scale_shift_norm, "resblock_updown": resblock_updown,
            "use_new_attention_order": use_new_attention_order,
        }  # fmt: skip
        super().__init__(**shared)
        self.config = {**shared, "out_channels": out_channels, "num_classes": num_classes}
        self.num_classes = num_classes
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self.emb_channels)
        width, skips = self.levels[-1], list(self.widths)
        self.output_blocks = nn.ModuleList()
        for level, outputs in reversed(list(enumerate(self.levels))):
            for i in range(num_res_blocks + 1):
                layers = self._layers(width + skips.pop(), outputs, level)
                width = outputs
                if level and i == num_res_blocks:
                    layers.append(self._resampled(width, "up"))
                self.output_blocks.append(EmbeddedSequential(*layers))
        self.out = nn.Sequential(GroupNorm32(width), nn.SiLU(), zeroed(nn.Conv2d(width, out_channels, 3, padding=1)))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """What the network makes of noisy images.

        Args:
            x: (B, in_channels, H, W), an image in [-1, 1] and noise as the timestep has it.
            timesteps: (B,), whole or not, of the schedule that the network was trained with: 0 to 999.
            y: (B,) labels from 0 to num_classes − 1, for networks that have classes, and only for those.

        Returns:
            (B, out_channels, H, W) in the dtype of x: the noise; then, with learned variances, as many channels that
            interpolate between the smallest (−1) and the largest (1) logarithm of the variance, not bounded.

        Raises: `ValueError` for other shapes, heights or widths that are no multiples of `size_multiple`, and labels that are
            missing or superfluous.
        """
        self.check_image(x, timesteps)
        if (y is None) != (self.num_classes is None) or (y is not None and y.shape != (len(x),)):
            wanted = (
                "None" if self.num_classes is None else f"{(len(x),)}, a label from 0 to {self.num_classes - 1} each"
            )
            raise ValueError(f"y is {None if y is None else tuple(y.shape)}; accepted: {wanted}")
        emb = self.embed(timesteps)
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x.to(self.torso_dtype()), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))  # type: ignore[no-any-return]


# ---- what weights say about their network ---------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {
        "model_channels": 192, "num_res_blocks": 3, "channel_mult": (1, 2, 3, 4), "attention_resolutions": (2, 4, 8),
        "num_classes": 1000, "dropout": 0.1, "use_new_attention_order": True,
    },
    "128x128_diffusion": {
        "channel_mult": (1, 1, 2, 3, 4), "attention_resolutions": (4, 8, 16), "num_classes": 1000, "num_heads": 4,
    },
    "256x256_diffusion": {"num_classes": 1000},
    "256x256_diffusion_uncond": {},
    "512x512_diffusion": {
        "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_resolutions": (16, 32, 64), "num_classes": 1000,
    },
    "64_256_upsampler": {"in_channels": 6, "model_channels": 192, "num_classes": 1000, "num_heads": 4},
    "128_512_upsampler": {
        "in_channels": 6, "model_channels": 192, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_resolutions": (16, 32),
        "num_classes": 1000,
    },
}  # fmt: skip
"""Arguments of the released networks, by the names of their files; LSUN's, and RePaint's for CelebA and Places, are
`256x256_diffusion_uncond`."""
_HIDDEN = ("dropout", "num_heads", "num_head_channels", "use_new_attention_order")
ANCHORS = ("output_blocks.0.0.in_layers.0.weight",)
NAMES = r"(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\."
PREFIX = ""
FOREIGN = ()


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `GuidedUNet`, read off the keys and shapes of a state dict.

    Heads, their order and dropout leave no trace. Where all else is that of a released network they are taken to be its
    own; otherwise heads are 64 wide, in the legacy order.

    Raises: `KeyError` with the key that such a network has and this state dict lacks.
    """
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("output_blocks."))
    growing = [key for key in state if re.match(r"output_blocks\.\d+\.([12]\.in_layers\.0|\d\.conv)\.weight", key)]
    config = encoder_config(state, _first_halving(state, growing, blocks))
    if blocks % (config["num_res_blocks"] + 1):
        raise ValueError(f"{blocks} output blocks, of which the first {config['num_res_blocks'] + 1} belong together")
    config["out_channels"] = state["out.2.weight"].shape[0]
    config["num_classes"] = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None
    return config | hidden_options(config, PUBLISHED, GuidedUNet)


def _first_halving(state: Mapping[str, Tensor], growing: Sequence[str], blocks: int) -> int:
    """The index of the first of `input_blocks` that halves the size, or of the first that is not there.

    On the way up there is one block more at each resolution than on the way down; the last has a layer that doubles. Where
    neither way has a parameter in it, the indices have gaps.
    """
    if growing:
        return 1 + min(int(key.split(".")[1]) for key in growing)
    there = {int(key.split(".")[1]) for key in state if key.startswith("input_blocks.")}
    return min(set(range(blocks + 1)) - there)


def encoder_config(state: Mapping[str, Tensor], halving: int) -> dict[str, Any]:
    """Arguments of `Encoder`, but for the hidden ones; `halving` is the index of the first block that halves the size.

    Raises: `KeyError` with the key that is missing.
    """
    repeats = halving - 1
    model_channels = state["time_embed.0.weight"].shape[1]
    last = max(int(key.split(".")[1]) for key in state if key.startswith("input_blocks."))
    firsts = [f"input_blocks.{i}" for i in range(1, last + 1, halving)]
    widths = [state[f"{first}.0.in_layers.2.weight"].shape[0] for first in firsts]
    modulated = state[f"{firsts[0]}.0.emb_layers.1.weight"].shape[0]
    halves = f"input_blocks.{halving}.0"
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "model_channels": model_channels,
        "num_res_blocks": repeats,
        "attention_resolutions": tuple(2**i for i, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state),
        "channel_mult": tuple(n // model_channels if n % model_channels == 0 else n / model_channels for n in widths),
        "conv_resample": f"{halves}.op.weight" in state or f"{halves}.in_layers.2.weight" in state or len(firsts) == 1,
        "use_scale_shift_norm": modulated == 2 * widths[0],
        "resblock_updown": f"{halves}.in_layers.2.weight" in state,
    }


def hidden_options(config: Mapping[str, Any], published: Mapping[str, Mapping[str, Any]], made: Any) -> dict[str, Any]:
    """What weights do not tell, from the released network that has all the rest."""
    defaults = made.__init__.__kwdefaults__
    for options in published.values():
        if all(options.get(name, defaults[name]) == value for name, value in config.items()):
            return {name: options[name] for name in _HIDDEN if name in options}
    return {}


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and their order, where notes on modules (`models.weights_file`) tell: those of pickled attention blocks."""
    found: dict[str, Any] = {}
    blocks = [
        note.attributes for name, note in modules.items() if re.match(r"(in|out)put_blocks\.|middle_block\.", name)
    ]
    known = [(b["channels"], b["num_heads"]) for b in blocks if {"channels", "num_heads"} <= b.keys()]
    widths = {channels // heads for channels, heads in known if heads}
    numbers = {heads for _, heads in known}
    if len(widths) == 1:
        found["num_head_channels"] = widths.pop()
    elif len(numbers) == 1:
        found["num_heads"] = numbers.pop()
    kinds = {note.kind.rpartition(".")[2] for name, note in modules.items() if name.endswith(".attention")}
    if len(kinds) == 1:
        found["use_new_attention_order"] = not kinds.pop().endswith("Legacy")
    return found

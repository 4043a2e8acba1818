"""guided-diffusion's classifier of noisy images: the UNet's way down, and attention that pools what comes out.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021, section 4. The gradient of a label's
log-probability with respect to the image guides the diffusion, so a sampler differentiates through it in every step. 54 M
parameters for 256 pixels. State-dict keys are those of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .guided_layers import AttentionPool2d, GroupNorm32
from .guided_unet import HEAD_CHANNELS, Encoder, config_from_modules, encoder_config, heads_of, hidden_options

__all__ = ["ANCHORS", "FOREIGN", "NAMES", "PREFIX", "GuidedClassifier", "config_from_modules", "config_from_state_dict"]


class GuidedClassifier(Encoder):
    """The classifier, with attention as its pool.

    Arguments have the public code's names; those not told here are `GuidedUNet`'s.

    Args:
        image_size: height and width of images, the only one there is: the pool stores positions.
        out_channels: number of labels.
        num_head_channels*: of the pool's heads, too; 64 where it is not given.

    Attributes:
        size_multiple, min_size: `image_size`.
        config: the arguments that make this network.

    Raises: `ValueError` for values that no network can be made of.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        in_channels: int = 3,
        model_channels: int = 128,
        out_channels: int = 1000,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (8, 16, 32),
        channel_mult: Sequence[float] = (1, 1, 2, 2, 4, 4),
        dropout: float = 0.0,
        conv_resample: bool = True,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
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
        if image_size < self.size_multiple or image_size % self.size_multiple:
            raise ValueError(f"image_size is {image_size}; accepted: a multiple of {self.size_multiple}")
        self.config = {**shared, "image_size": image_size, "out_channels": out_channels}
        side, width = image_size // self.size_multiple, self.levels[-1]
        heads = heads_of(width, None, num_head_channels or HEAD_CHANNELS)
        self.out = nn.Sequential(GroupNorm32(width), nn.SiLU(), AttentionPool2d(side, width, heads, out_channels))
        self.size_multiple = self.min_size = image_size

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits of labels.

        Args:
            x: (B, in_channels, image_size, image_size), an image in [-1, 1] and noise as the timestep has it.
            timesteps: (B,), whole or not.

        Returns:
            (B, out_channels) in the dtype of x.

        Raises: `ValueError` for other shapes.
        """
        side = self.size_multiple
        if x.dim() == 4 and x.shape[2:] != (side, side):
            raise ValueError(
                f"image is {x.shape[2]}×{x.shape[3]}; accepted: {side}×{side}, for which the pool stores positions"
            )
        self.check_image(x, timesteps)
        emb, h = self.embed(timesteps), x.to(self.torso_dtype())
        for block in self.input_blocks:
            h = block(h, emb)
        return self.out(self.middle_block(h, emb).to(x.dtype))  # type: ignore[no-any-return]


# ---- what weights say about their network ---------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_classifier": {
        "image_size": 64, "num_res_blocks": 4, "channel_mult": (1, 2, 3, 4), "attention_resolutions": (2, 4, 8),
    },
    "128x128_classifier": {
        "image_size": 128, "channel_mult": (1, 1, 2, 3, 4), "attention_resolutions": (4, 8, 16),
    },
    "256x256_classifier": {},
    "512x512_classifier": {
        "image_size": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_resolutions": (16, 32, 64),
    },
}  # fmt: skip
"""Arguments of the released networks, by the names of their files."""
ANCHORS = ("out.2.positional_embedding",)
NAMES = r"(time_embed|input_blocks|middle_block|out)\."
PREFIX = ""
FOREIGN = ()


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `GuidedClassifier`, read off the keys and shapes of a state dict, but for the hidden ones.

    Raises:
        KeyError: with the key that such a network has and this state dict lacks.
        ValueError: where blocks cannot be told from those that halve the size.
    """
    config = encoder_config(state, _period(state))
    side = round((state["out.2.positional_embedding"].shape[1] - 1) ** 0.5)
    config["image_size"] = side * 2 ** (len(config["channel_mult"]) - 1)
    config["out_channels"] = state["out.2.c_proj.weight"].shape[0]
    return config | hidden_options(config, PUBLISHED, GuidedClassifier)


def _period(state: Mapping[str, Tensor]) -> int:
    """After how many of `input_blocks` the size is halved; residual blocks that do so have the names of others.

    All blocks of a resolution have the same width and either all attend or none; one that halves the size does not attend.
    """
    there = {int(key.split(".")[1]) for key in state if key.startswith("input_blocks.")}
    count = 1 + max(there)
    if missing := set(range(count)) - there:
        return min(missing)
    convs = [i for i in there if f"input_blocks.{i}.0.op.weight" in state]
    if convs:
        return min(convs)
    kinds = [
        (state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0], f"input_blocks.{i}.1.qkv.weight" in state)
        for i in range(1, count)
    ]
    found = [n for n in range(2, count + 1) if count % n == 0 and _fits(kinds, n)]
    if len(found) != 1:
        raise ValueError(f"its {count} input blocks do not tell which of them halve the size (every {found or 'none'})")
    return found[0]


def _fits(kinds: Sequence[tuple[int, bool]], period: int) -> bool:
    """Whether blocks 1, 2, … of these widths, attending or not, are those of a network that halves every so many blocks."""
    for start in range(0, len(kinds), period):
        level, halving = kinds[start : start + period - 1], kinds[start + period - 1 : start + period]
        if len(set(level)) != 1 or any(attends or width != level[0][0] for width, attends in halving):
            return False
    return True

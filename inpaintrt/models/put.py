"""PUT: inpainting by tokens, chosen a few at a time by a transformer that reads unquantised features of what is known.

Both publications: CVPR 2022 ("cvpr") and TPAMI 2024 ("tpami"; partially known patches are mixed with a mask embedding).
State dicts have the layout of the public checkpoints.

The loop differs from the public one in what it leaves out, not in what it computes: attention is not averaged over heads,
the last block, the logits and their filter are computed for unknown tokens only, a chosen token's embedding is a row of a
table, samples that are finished are computed no further, and after one look at the masks the host waits for nothing.

Sources: Liu et al., "Reduce Information Loss in Transformers for Pluralistic Image Inpainting", CVPR 2022; Liu et al.,
"Transformer based Pluralistic Image Completion with Reduced Information Loss", TPAMI 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .put_codec import PVQVAE, PixelRange, codec_config
from .put_sampling import (
    Draws,
    Tokens,
    check_drawn,
    check_temperature,
    choose,
    kept_classes,
    passes,
    seed_numbers,
    seeded,
)
from .put_transformer import BLOCKS

Progress = Callable[[int, int], None]


class PUT(nn.Module):
    """A codec and a transformer over its tokens.

    Args:
        codec: the P-VQVAE, or its arguments; None for the generation's published one for 256 pixels.
        generation: "cvpr" or "tpami".
        grid: rows and columns of tokens.
        layers, width, heads: of the transformer; None for those published for faces (cvpr) or all images (tpami).
        classes: tokens the transformer chooses from, the first ones of the codebook; None for all codes of known patches.
        activation: "GELU2" (x · σ(1.702 x)) or "GELU".
        qkv_bias: queries and values have a bias (tpami only; cvpr always has).
        pixels, composite: of a codec that is not given as a module, as in `PVQVAE`.

    Attributes:
        only_size: rows and columns of its images.
        size_multiple, min_size: the larger of them.

    Raises: `ValueError` for another generation or activation, a width that heads do not divide, more classes than the codec
        has codes, or numbers below 1.
    """

    def __init__(
        self,
        codec: PVQVAE | Mapping[str, Any] | None = None,
        *,
        generation: str = "tpami",
        grid: tuple[int, int] = (32, 32),
        layers: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        classes: int | None = None,
        activation: str = "GELU2",
        qkv_bias: bool = True,
        pixels: PixelRange | str | None = None,
        composite: bool = False,
    ) -> None:
        super().__init__()
        if generation not in BLOCKS:
            raise ValueError(f"generation is {generation!r}; accepted: {', '.join(BLOCKS)}")
        later = generation == "tpami"
        if codec is None:
            codec = {"codes": 9216, "split": 8192, "decoder_blocks": 2, "blocks_per_scale": 2} if later else {}
        if not isinstance(codec, PVQVAE):
            codec = PVQVAE(**{"pixels": pixels, "composite": composite, **codec})
        layers, width, heads = (
            default if given is None else given
            for given, default in zip((layers, width, heads), (12, 768, 12) if later else (30, 512, 8), strict=True)
        )
        if min(layers, width, heads) < 1 or width % heads or activation not in ("GELU2", "GELU"):
            raise ValueError(
                f"layers are {layers}, width is {width}, heads {heads}, activation {activation!r}; accepted: 1 or more, a "
                "width that heads divide, GELU2 or GELU"
            )
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid is {grid!r}; accepted: rows and columns of tokens, 1 or more each")
        codes = len(codec.quantize.embedding)
        classes = codec.quantize.split if classes is None else classes
        if not 0 < classes <= codes:
            raise ValueError(f"classes are {classes}; accepted: 1 to {codes}, the codes of the codec")
        self.pos_emb = nn.Parameter(torch.zeros(1, grid[0] * grid[1], width))
        if later:
            self.mask_emb = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.content_codec = codec
        self.emb_proj = nn.Linear(codec.quantize.embedding.shape[1], width)
        self.blocks = nn.Sequential(*(BLOCKS[generation](width, heads, activation, qkv_bias) for _ in range(layers)))
        if later:
            self.norm = nn.LayerNorm(width)
        else:
            self.layer_norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, classes)
        self.generation, self.grid = generation, grid
        self.only_size = (grid[0] * codec.patch, grid[1] * codec.patch)
        self.size_multiple = self.min_size = max(self.only_size)

    # ---- the transformer --------------------------------------------------------------------------------------------

    def logits(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (B, R, classes) of tokens `rows` (B, R), of all for None; x (B, L, width) are all tokens' embeddings."""
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        norm = self.norm if self.generation == "tpami" else self.layer_norm
        return self.to_logits(norm(last(x, rows)))  # type: ignore[no-any-return]

    def embed(self, z: Tensor, known_share: Tensor) -> Tensor:
        """Embeddings (B, L, width) of unquantised features z (B, C, h, w), of patches known to `known_share` (B, h, w)."""
        f = self.emb_proj(z.flatten(2).transpose(1, 2))
        if self.generation == "tpami":
            share = known_share.flatten(1).unsqueeze(-1).to(f.dtype)
            f = f * share + self.mask_emb[:, :, 0, 0] * (1 - share)
        return f + self.pos_emb  # type: ignore[no-any-return]

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor, mask: Tensor, seed: int = 0) -> Tensor:
        """`complete` with 20 tokens a pass and the seeds seed, seed + 1, …"""
        return self.complete(image, mask, seeds=[seed + i for i in range(len(image))])

    def inpaint(
        self,
        image: Tensor,
        mask: Tensor,
        *,
        seed: int = 0,
        tokens_per_step: int | str | None = 20,
        raster_order: bool = False,
        top_k: float | None = None,
        temperature: float = 1.0,
        progress: Progress | None = None,
    ) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], floating, H × W `only_size`; values under the hole are ignored.
            mask: (B, 1, H, W), **1 = hole**, 0 = known; any dtype, all that is not 0 is hole.
            seed: of the first image; the next have the next. Each gives another fill.
            tokens_per_step, raster_order, top_k, temperature, progress: as in `complete`.

        Returns:
            (B, 3, H, W) in [0, 1]; known pixels as given, the hole from the network.

        Raises: `ValueError`, see `sample`.
        """
        pixels, known = self.network_input(image, mask)
        made = self.complete(
            pixels, known, seeds=[seed + i for i in range(len(image))], tokens_per_step=tokens_per_step,
            raster_order=raster_order, top_k=top_k, temperature=temperature, progress=progress,
        )  # fmt: skip
        return torch.where(known, image, made / 255)

    def network_input(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of `forward`, of those of `inpaint`. Raises: `ValueError` for an image that is not floating."""
        if not image.is_floating_point():
            raise ValueError(
                f"image is {tuple(image.shape)} {image.dtype}; accepted: (B, 3, H, W), floating in [0, 1] (of uint8: / 255)"
            )
        known = mask == 0
        return torch.where(known, image * 255, 0.0), known

    @torch.no_grad()
    def complete(
        self,
        image: Tensor,
        mask: Tensor,
        *,
        tokens_per_step: int | str | None = 20,
        raster_order: bool = False,
        top_k: float | None = None,
        temperature: float = 1.0,
        results: int = 1,
        seeds: int | Sequence[int] | Tensor | None = None,
        draws: Draws | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Images with their holes filled.

        Args:
            image: (B, 3, H, W), 0 to 255, H × W the size of the network's grid of patches, in the weights' dtype; values
                under the hole are ignored.
            mask: (B, 1, H, W), **1 = known**, 0 = hole, and nothing between; any dtype. A patch with a hole in it is chosen
                anew. Images without holes may be among others; images without a known patch are made up.
            tokens_per_step, raster_order, top_k, temperature, seeds, draws, progress: as in `sample`.
            results: how many results of each image; their batch is the images' times this, results of one image side by
                side.

        Returns:
            (B · results, 3, H, W), 0 to 255, dtype of image. Known pixels are the decoder's, unless the codec composites.

        Raises: `ValueError`, see `sample`.
        """
        if not isinstance(results, int) or results < 1:
            raise ValueError(f"results is {results!r}; accepted: 1 or more, a whole number")
        image, mask = image.repeat_interleave(results, 0), mask.repeat_interleave(results, 0)
        tokens, _ = self.sample(
            image, mask, tokens_per_step=tokens_per_step, raster_order=raster_order, top_k=top_k,
            temperature=temperature, seeds=seeds, draws=draws, progress=progress,
        )  # fmt: skip
        return self.content_codec.decode(tokens, image, mask)

    @torch.no_grad()
    def sample(
        self,
        image: Tensor,
        mask: Tensor,
        *,
        tokens_per_step: int | str | None = 20,
        raster_order: bool = False,
        top_k: float | None = None,
        temperature: float = 1.0,
        seeds: int | Sequence[int] | Tensor | None = None,
        draws: Draws | None = None,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of images: a known patch's own, the others chosen, in each pass those with the largest logits first.

        Args:
            image, mask: as in `complete`.
            tokens_per_step: chosen per pass of the transformer; 0: all in one; None: the published default, length/500; or
                how many passes with which profile, such as "cosine_8" (`put_sampling.passes`).
            raster_order: choose row by row, in place of those with the largest logits first.
            top_k: classes to choose from: a number, or, from 0 to 1, the share of classes left out (1 keeps one). None: the
                published 50 (cvpr) or 200 (tpami), or all where there are fewer.
            temperature: factor on logits (more is greedier).
            seeds: of each sample, integers of 64 bits, or int64 (n,); without, torch's default generator chooses them. What
                a sample becomes depends on its own.
            draws: the random numbers themselves, in place of seeds. A row is the rank among a pass's tokens; for
                generation "tpami", or with one pass, it is the token's position.
            progress: called with (passes done, passes) after each.

        Returns:
            Tokens int64 (B, h, w), and the pass (from 1; 0 = known) in which each was chosen, int64 (B, h, w).

        Raises: `ValueError` naming the argument, for sizes other than the network's, an image of another dtype or device
            than the weights, masks with other values than 0 and 1, a top_k above the number of classes, a temperature that
            is not above 0, seeds and draws together or of another number or shape.
        """
        self._check(image, mask)
        numbers = None if seeds is None else seed_numbers(seeds, len(image), alone=draws is None)
        classes, length = self.to_logits.out_features, self.grid[0] * self.grid[1]
        published = 200 if self.generation == "tpami" else 50
        keep = min(published, classes) if top_k is None else kept_classes(top_k, classes)
        check_temperature(temperature)
        state = self._begin(image, mask)
        unknown = (~state.known).sum(1)
        *left, wrong = torch.cat((unknown, _neither(mask).sum()[None])).tolist()  # the one look at the masks
        if wrong:
            raise _wrong_mask(mask, wrong)
        steps, each = passes(tokens_per_step, max(left, default=0), length)
        by_position = False
        if draws is None:
            if numbers is None:
                numbers = torch.randint(2**62, (len(image),)).tolist()
            draws = seeded(numbers, each, image.device)
        else:
            by_position = self.generation == "tpami" or each == length
        active, samples, done = [*range(len(left))], None, 0
        for i, many in enumerate(steps):
            if many and (unfinished := [b for b in active if left[b] > done]):
                if len(unfinished) < len(active):  # on the device, too, by a sort: the host need not copy what it knows
                    active = unfinished
                    samples = (unknown <= done).to(torch.uint8).argsort(stable=True)[: len(active)]
                self.step(
                    state, draws(i, active, length if by_position else many, classes), number=i + 1, many=many,
                    unknown=max(left[b] for b in active) - done, keep=keep, temperature=temperature,
                    raster_order=raster_order, by_position=by_position, samples=samples,
                )  # fmt: skip
                done += many
            if progress is not None:
                progress(i + 1, len(steps))
        return state.codes.unflatten(1, self.grid), state.order.unflatten(1, self.grid)

    @torch.no_grad()
    def begin(self, image: Tensor, mask: Tensor) -> Tokens:
        """Samples before the first pass. image, mask: as in `complete`.

        The host looks at a mask that is not bool. Raises: `ValueError`, as `sample`.
        """
        self._check(image, mask)
        if mask.dtype != torch.bool and (wrong := int(_neither(mask).sum())):
            raise _wrong_mask(mask, wrong)
        return self._begin(image, mask)

    def _begin(self, image: Tensor, mask: Tensor) -> Tokens:
        codec, classes = self.content_codec, self.to_logits.out_features
        share = codec.known_share(mask)
        known = share == 1
        with torch.autocast(image.device.type, enabled=False):  # the tokens of known patches are a matter of small gaps
            z = codec.encode(torch.where(mask != 0, image, 0.0))
            codes = codec.quantize(z, known).flatten(1)
            x = self.embed(z, share)
            table = F.linear(codec.quantize.embedding[:classes], self.emb_proj.weight, self.emb_proj.bias)
        return Tokens(x, codes, torch.zeros_like(codes), known.flatten(1), table)

    @torch.no_grad()
    def step(
        self,
        state: Tokens,
        drawn: Tensor,
        *,
        number: int,
        many: int,
        unknown: int,
        keep: int,
        temperature: float = 1.0,
        raster_order: bool = False,
        by_position: bool = False,
        samples: Tensor | None = None,
    ) -> None:
        """One pass: chooses tokens in place.

        The host reads no tensor, and all shapes follow from the numbers given. So a pass can be captured in a CUDA graph
        and replayed for other samples, whose `begin` and draws are copied to the tensors that were given here.

        Args:
            state: of B samples.
            drawn: numbers of Exp(1): (n, many, classes), by rank among the chosen, or by_position: (n, L, classes).
            number: of the pass, from 1: what `order` becomes.
            many: tokens to choose of each sample. A sample that has fewer left gets these.
            unknown: at least as many as any of the samples has left, for the logits of as many are computed.
            keep, temperature, raster_order: as in `sample`; keep is a number of classes.
            samples: int64 (n,), those to choose tokens of. None: all.

        Raises: `ValueError` for draws of another shape.
        """
        x, known = state.embedded, state.known
        rows_drawn = x.shape[1] if by_position else many
        check_drawn(drawn, (len(x) if samples is None else len(samples), rows_drawn, len(state.table)), x.device)
        at = torch.arange(len(known), device=known.device) if samples is None else samples
        open_ = ~known if samples is None else ~known[samples]
        first = open_.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # unknown ones come first
        rows = first[:, : many if raster_order else unknown]
        logits = self.logits(x if samples is None else x[samples], rows).float()
        score = logits.amax(-1).masked_fill(~open_.gather(1, rows), -torch.inf)
        if not raster_order:
            score, rank = score.topk(many, dim=1)
            rows, logits = rows.gather(1, rank), logits.gather(1, rank.unsqueeze(-1).expand(-1, -1, logits.shape[2]))
        if by_position:
            drawn = drawn.gather(1, rows.unsqueeze(-1).expand(-1, -1, drawn.shape[2]))
        picked = choose(logits, keep, temperature, drawn)
        new = score > -torch.inf  # a sample with less than `many` left has known tokens among its best
        at = at.unsqueeze(1)
        embedded = F.embedding(picked, state.table) + self.pos_emb[0, rows]
        x[at, rows] = torch.where(new.unsqueeze(-1), embedded, x[at, rows])
        state.codes[at, rows] = torch.where(new, picked, state.codes[at, rows])
        state.order[at, rows] = torch.where(new, number, state.order[at, rows])
        known[at, rows] = torch.ones_like(new)  # a number would be copied from the host

    def _check(self, image: Tensor, mask: Tensor) -> None:
        size, weight = self.only_size, self.content_codec.quant_conv.weight
        shaped = image.dim() == 4 and image.shape[1] == 3 and tuple(image.shape[2:]) == size
        if not shaped or (image.dtype, image.device) != (weight.dtype, weight.device):
            raise ValueError(
                f"image is {tuple(image.shape)} {image.dtype} on {image.device}; accepted: (B, 3, {size[0]}, {size[1]}) "
                f"{weight.dtype} on {weight.device}, as the weights"
            )
        if mask.shape != (len(image), 1, *size) or mask.device != image.device:
            raise ValueError(
                f"mask is {tuple(mask.shape)} on {mask.device}; accepted: ({len(image)}, 1, {size[0]}, {size[1]}) on "
                f"{image.device}, 1 = known"
            )


def _neither(mask: Tensor) -> Tensor:
    """Where a mask is neither 0 nor 1."""
    return (mask != 0) & (mask != 1)


def _wrong_mask(mask: Tensor, wrong: int) -> ValueError:
    value = mask[_neither(mask)][0].item()
    return ValueError(
        f"mask has {wrong} values such as {value}; accepted: bool, or 1 = known and 0 = hole, nothing else"
    )


# ---- what weights say about their network ---------------------------------------------------------------------------

ANCHORS = ("content_codec.quantize.embedding",)
NAMES = r"(pos_emb|mask_emb|(content_codec|emb_proj|blocks|norm|layer_norm|to_logits)\.)"
PREFIX = ""
FOREIGN = ((r"(^|\.)mlp\.conv1\.weight$", "a PUT with convolutions between its attentions"),)


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `PUT`, read off the keys and shapes of a state dict.

    Shapes say neither the number of heads (taken: 8 of the first generation, of the second one for 64 channels; give
    `heads=`), nor rows and columns of tokens (taken: as many of both; give `grid=`), nor the range of pixels (taken: -1 to 1;
    give `pixels="imagenet"` for the ImageNet files of the second generation), nor whether decoding keeps the known pixels
    (`composite=True`: the files for faces of the second generation).

    Raises: `KeyError` with the key that such a network has and this state dict lacks; `ValueError` for more logits than
        codes.
    """
    later = "blocks.0.attn.qkv.weight" in state
    width, layers = state["emb_proj.weight"].shape[0], 0
    while f"blocks.{layers}.attn.proj.weight" in state:
        layers += 1
    if not layers:
        raise KeyError("blocks.0.attn.proj.weight")
    classes, length = state["to_logits.weight"].shape[0], state["pos_emb"].shape[1]
    codec = codec_config(state, "content_codec.")
    if classes > codec["codes"]:
        raise ValueError(f"{classes} logits for {codec['codes']} codes; accepted: one for each code, or fewer")
    return {
        "codec": codec | {"split": classes},
        "generation": "tpami" if later else "cvpr",
        "grid": (math.isqrt(length), length // max(1, math.isqrt(length))),
        "layers": layers,
        "width": width,
        "heads": max(1, width // 64) if later else 8,
        "classes": classes,
        "qkv_bias": not later or "blocks.0.attn.q_bias" in state,
    }


def config_from_modules(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: the public files hold tensors only."""
    return {}

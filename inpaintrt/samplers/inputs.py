"""What the samplers are given, checked and brought to the ops' conventions: [−1, 1], 1 = keep, one problem per sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.ops import philox_normal


@dataclass(frozen=True, eq=False)
class Inputs:
    """n samples of problems, each an image with a hole. Of a single problem `known` and `keep` are stored once.

    Sample i belongs to problem i div (n / problems). Exactly one of `seeds` and `noises` is there.
    """

    image: Tensor
    """(1|n, C, H, W), in [0, 1], as given."""
    hole: Tensor
    """(1|n, 1|C, H, W), float32, 1 = hole."""
    known: Tensor
    """(1|n, C, H, W), float32, in [−1, 1]."""
    keep: Tensor
    """1 − hole: the ops' polarity."""
    shape: tuple[int, int, int, int]
    """(n, C, H, W) of the samples."""
    seeds: Tensor | None
    """int64 (n,)."""
    noises: Tensor | None
    """(draws, n, C, H, W), float32, in the order in which they are used."""
    arguments: dict[str, Any]
    """Of the model, besides x and t; y = labels is among them where labels were given."""

    def normal(self, call: int) -> Tensor:
        """Noise that a chain starts from."""
        assert self.seeds is not None
        return philox_normal(self.seeds, self.shape, call=call)

    def result(self, x: Tensor, paste: bool) -> Tensor:
        """x (n, C, H, W) in [−1, 1] as an image in [0, 1], in the image's dtype; with `paste` known pixels are the image's."""
        filled = ((x + 1) / 2).clamp(0, 1)
        if paste:
            image, hole = self.image.float(), self.hole
            mixed = torch.where(hole == 1, filled, hole * filled + (1 - hole) * image)
            filled = torch.where(hole == 0, image, mixed)
        return filled.to(self.image.dtype)

    def copies(self) -> Tensor:
        """The images as they are, once for each sample."""
        return self.image.expand(self.shape).clone()


def prepare(
    image: Tensor,
    mask: Tensor | None,
    *,
    seeds: int | Sequence[int] | Tensor | None,
    noises: Tensor | None,
    labels: int | Sequence[int] | Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    read_hole: bool = False,
) -> Inputs:
    """Checks of everything, with one wait for the device. `read_hole`: the image counts under the hole too."""
    if image.dim() != 4 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(
            f"image is {tuple(image.shape)} {image.dtype}; accepted: (B, 3, H, W), floating point in [0, 1] (of uint8: / 255)"
        )
    problems, channels, height, width = image.shape
    if mask is None:
        mask = image.new_ones(1, 1, 1, 1).expand(1, 1, height, width)
    shapes = [(b, c, height, width) for b in dict.fromkeys((problems, 1)) for c in dict.fromkeys((1, channels))]
    if tuple(mask.shape) not in shapes or mask.device != image.device:
        raise ValueError(
            f"mask is {tuple(mask.shape)} on {mask.device}; accepted for an image of {tuple(image.shape)}: "
            f"{' or '.join(map(str, shapes))} on {image.device}, 1 = hole"
        )
    hole = mask.to(torch.float32)
    _check_values(image, hole, read_hole)
    pixels = image.to(torch.float32) * 2 - 1
    known = pixels if read_hole else torch.where(hole == 1, 0.0, pixels)

    drawn = _seeds(seeds, noises, image)
    samples = drawn.shape[0] if noises is None else drawn.shape[1]

    def each(t: Tensor) -> Tensor:
        return t if t.shape[0] == 1 else t.repeat_interleave(samples // t.shape[0], 0)

    return Inputs(
        image=each(image), hole=each(hole), known=each(known).contiguous(), keep=each(1 - hole).contiguous(),
        shape=(samples, channels, height, width),
        seeds=drawn if noises is None else None, noises=None if noises is None else drawn,
        arguments=_arguments(labels, model_kwargs, problems, samples, image.device),
    )  # fmt: skip


def is_whole(inputs: Inputs) -> bool:
    """Whether there is nothing to fill. Warns where there is nothing to go by."""
    known, hole = torch.stack(((inputs.hole != 1).any(), (inputs.hole != 0).any())).tolist()
    if not known:
        warnings.warn("mask has no known pixel (1 = hole): what comes out does not depend on the image", stacklevel=3)
    return not hole


def check_model(model: Callable[..., Any]) -> None:
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode; call model.eval() first")


def check_labels(model: Any, inputs: Inputs) -> None:
    """That a model which embeds labels as guided-diffusion's do has them: a GPU tells of others by nothing but an assertion."""
    labels, table = inputs.arguments.get("y"), getattr(model, "label_emb", None)
    if isinstance(labels, Tensor) and isinstance(table, nn.Embedding):
        for label in labels.tolist():
            if not 0 <= label < table.num_embeddings:
                raise ValueError(
                    f"labels holds {label}; accepted: 0 to {table.num_embeddings - 1}, the model's classes"
                )


def _check_values(image: Tensor, hole: Tensor, read_hole: bool) -> None:
    wrong_mask = ~((hole >= 0) & (hole <= 1))
    wrong_image = ~((image >= 0) & (image <= 1))
    if not read_hole:
        wrong_image = wrong_image & (hole != 1)
    masks, pixels = torch.stack((wrong_mask.sum(), wrong_image.sum())).tolist()
    if masks:
        raise ValueError(
            f"mask has {masks} values outside [0, 1], such as {hole[wrong_mask][0].item()}; 1 = hole, 0 = known"
        )
    if pixels:
        where = ", ".join(map(str, wrong_image.nonzero()[0].tolist()))
        value = image[wrong_image][0].item()
        read = "" if read_hole else "known "
        raise ValueError(f"image has {pixels} {read}values outside [0, 1]; the first, {value:g}, is at [{where}]")


def _seeds(seeds: int | Sequence[int] | Tensor | None, noises: Tensor | None, image: Tensor) -> Tensor:
    """int64 (n,), or the noises (draws, n, C, H, W); n is a multiple of the images' number."""
    if (seeds is None) == (noises is None):
        given = "None" if seeds is None else "given"
        raise ValueError(f"seeds and noises are both {given}; accepted: exactly one of them")
    problems = image.shape[0]
    if noises is not None:
        shape = (noises.shape[1], *image.shape[1:]) if noises.dim() == 5 else ()
        if noises.shape[1:] != shape or shape[0] % problems or not shape[0] or noises.dtype != torch.float32:
            raise ValueError(
                f"noises is {tuple(noises.shape)} {noises.dtype}; accepted: (draws, {problems}·k, "
                f"{', '.join(map(str, image.shape[1:]))}), float32"
            )
        return noises.to(image.device)
    if isinstance(seeds, Tensor):
        if seeds.dim() != 1 or seeds.dtype != torch.int64:
            raise ValueError(
                f"seeds is {tuple(seeds.shape)} {seeds.dtype}; accepted: int64 (n,), or a sequence of integers"
            )
        own = seeds
    else:
        numbers: list[Any] = list(seeds) if isinstance(seeds, Iterable) else [seeds]
        for number in numbers:
            if not isinstance(number, Integral) or not -(2**63) <= int(number) < 2**64:
                raise ValueError(f"seeds holds {number!r}; accepted: integers of 64 bits")
        own = torch.tensor([n - 2**64 if n >= 2**63 else n for n in map(int, numbers)], dtype=torch.int64)
    if not len(own) or len(own) % problems:
        raise ValueError(
            f"seeds has {len(own)} entries for {problems} images; accepted: {problems}, or a multiple of it for several "
            "samples of each image"
        )
    return own.to(image.device)


def _arguments(
    labels: int | Sequence[int] | Tensor | None,
    model_kwargs: Mapping[str, Any] | None,
    problems: int,
    samples: int,
    device: torch.device,
) -> dict[str, Any]:
    arguments = dict(model_kwargs or {})
    if labels is None:
        return arguments
    if "y" in arguments:
        raise ValueError("labels and model_kwargs['y'] are both given; accepted: one of them")
    own = torch.as_tensor(labels)
    own = own[None] if own.dim() == 0 else own
    whole = not own.is_floating_point() and own.dtype != torch.bool
    if own.dim() != 1 or not whole or len(own) not in (1, problems, samples):
        raise ValueError(
            f"labels is {tuple(own.shape)} {own.dtype}; accepted: int64, 1, {problems} (images) or {samples} (samples) entries"
        )
    arguments["y"] = own.to(device, torch.int64).repeat_interleave(samples // len(own))
    return arguments

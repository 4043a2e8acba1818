"""How many tokens PUT chooses in each pass of its transformer, among how many codes, and by which random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Draws = Callable[[int, Sequence[int], int, int], Tensor]
"""(pass, samples, rows of each, classes) → numbers > 0 of the distribution Exp(1), (samples, rows, classes)."""


def kept_classes(top_k: float, classes: int) -> int:
    """How many classes a filter keeps: of 0 to 1, the share that is left out (at least one stays); above, a number.

    Raises: `ValueError` for a negative number or more than there are.
    """
    if not 0 <= top_k <= classes:
        raise ValueError(f"top_k is {top_k}; accepted: 0 to 1 (share of classes left out), or 2 to {classes} classes")
    return max(int((1 - top_k) * classes), 1) if top_k <= 1 else int(top_k)


def per_step(tokens_per_step: int | None, length: int) -> int:
    """How many tokens each pass chooses (the last one what is left).

    Args:
        tokens_per_step: a number; 0 or less for all in one pass; None for length/500, at least one.
        length: tokens of an image.

    Raises: `ValueError` for anything else.
    """
    if tokens_per_step is None:
        return max(1, length // 500)
    if not isinstance(tokens_per_step, int):
        raise ValueError(f"tokens_per_step is {tokens_per_step!r}; accepted: a number, or None")
    return min(tokens_per_step, length) if tokens_per_step > 0 else length


def seeded(seeds: Sequence[int], each: int, device: torch.device) -> Draws:
    """Draws, `each` rows a pass, that depend on a sample's own seed only: not on its place, nor on the other samples."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(step: int, samples: Sequence[int], rows: int, classes: int) -> Tensor:
        drawn = torch.empty(len(samples), each, classes, device=device)
        for at, sample in enumerate(samples):
            drawn[at].exponential_(generator=generators[sample])
        return drawn[:, :rows]

    return draw


def choose(logits: Tensor, keep: int, temperature: float, exponentials: Tensor) -> Tensor:
    """A class for each row of logits (…, C), drawn from softmax(temperature · logits) of the `keep` largest.

    The class with the largest p/q, q ~ Exp(1), is a draw from p: what `torch.multinomial` does for one sample.
    """
    best, classes = logits.topk(keep, dim=-1)
    share = torch.softmax(best * temperature, -1) / exponentials.gather(-1, classes)
    return classes.gather(-1, share.argmax(-1, keepdim=True)).squeeze(-1)


def check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; accepted: more than 0 (logits are multiplied by it)")

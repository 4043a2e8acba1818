"""How many tokens PUT chooses in each pass of its transformer, among how many codes, and by which random numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Draws = Callable[[int, Sequence[int], int, int], Tensor]
"""(pass, samples, rows of each, classes) → numbers > 0 of the distribution Exp(1), (samples, rows, classes)."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of B samples while they are chosen. A pass (`PUT.step`) changes all but `table` in place.

    Attributes:
        embedded: (B, L, width), what the transformer reads.
        codes: int64 (B, L), of no meaning where a token is neither known nor chosen yet.
        order: int64 (B, L), the pass (from 1) that chose a token; 0: none did.
        known: bool (B, L), known or chosen.
        table: (classes, width), embeddings of codes, without their positions.
    """

    embedded: Tensor
    codes: Tensor
    order: Tensor
    known: Tensor
    table: Tensor


def kept_classes(top_k: float, classes: int) -> int:
    """How many classes a filter keeps: of 0 to 1, the share that is left out (at least one stays); above, a number.

    Raises: `ValueError` for a negative number, more than there are, and a fraction above 1.
    """
    number = isinstance(top_k, (int, float)) and not isinstance(top_k, bool)
    if not number or not 0 <= top_k <= classes or (top_k > 1 and top_k != int(top_k)):
        raise ValueError(f"top_k is {top_k!r}; accepted: 0 to 1 (share of classes left out), or 2 to {classes} classes")
    return max(int((1 - top_k) * classes), 1) if top_k <= 1 else int(top_k)


def passes(tokens_per_step: int | str | None, unknown: int, length: int) -> tuple[list[int], int]:
    """How many tokens each pass chooses; and the most that one may, which for a number is not a matter of `unknown`.

    Args:
        tokens_per_step: a number (the last pass chooses what is left); 0 or less for all in one pass; None for length/500,
            at least one; or a profile and a number of passes: "cosine_8" (many first, by 1 + cos(π i/8)), "linear_8" (by
            8, 7, …), "cosine-1_8" and "linear-1_8" (the same, few first), "average_8".
        unknown: tokens to choose.
        length: tokens of an image.

    Raises: `ValueError` for anything else.
    """
    if isinstance(tokens_per_step, str):
        name, _, number = tokens_per_step.partition("_")
        if name not in _PROFILES or not number.isdecimal() or not int(number):
            raise ValueError(_wrong(tokens_per_step))
        counts = _spread(_PROFILES[name], int(number), unknown)[:: -1 if name.endswith("-1") else 1] if unknown else []
        return counts, max(counts, default=0)
    if tokens_per_step is None:
        tokens_per_step = max(1, length // 500)
    if not isinstance(tokens_per_step, int) or isinstance(tokens_per_step, bool):
        raise ValueError(_wrong(tokens_per_step))
    each = min(tokens_per_step, length) if tokens_per_step > 0 else length
    return [min(each, unknown - done) for done in range(0, unknown, each)], each


_PROFILES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda i, n: math.cos(math.pi * i / n) + 1,
    "linear": lambda i, n: n - i,
    "average": lambda i, n: 1,
}
_PROFILES |= {f"{name}-1": _PROFILES[name] for name in ("cosine", "linear")}


def _spread(profile: Callable[[int, int], float], number: int, unknown: int) -> list[int]:
    """`unknown` tokens over `number` passes by a profile: rounded, and what is missing then in turns, from the second on."""
    shares = [profile(i, number) for i in range(number)]
    factor = unknown / sum(shares)
    counts = [round(share * factor) for share in shares]
    at = 0
    while (over := sum(counts) - unknown) != 0:
        at = (at + 1) % number
        if over < 0 or counts[at]:  # none falls below 0
            counts[at] += 1 if over < 0 else -1
    return counts


def _wrong(tokens_per_step: object) -> str:
    names = ", ".join(f"{name}_K" for name in _PROFILES)
    return f"tokens_per_step is {tokens_per_step!r}; accepted: a number, {names} with a number K of passes, or None"


def seed_numbers(seeds: int | Sequence[int] | Tensor, samples: int, *, alone: bool = True) -> list[int]:
    """The seeds of so many samples; `alone`: without draws beside them.

    Raises: `ValueError` for another number of them, and for what are no integers of 64 bits.
    """
    if isinstance(seeds, Tensor) and (seeds.dim() != 1 or seeds.dtype != torch.int64):
        raise ValueError(
            f"seeds are {tuple(seeds.shape)} {seeds.dtype}; accepted: int64 (n,), or a sequence of integers"
        )
    numbers = seeds.tolist() if isinstance(seeds, Tensor) else [seeds] if isinstance(seeds, int) else [*seeds]
    if not alone or len(numbers) != samples:
        raise ValueError(
            f"seeds are {len(numbers)}{'' if alone else ' together with draws'}; accepted: {samples}, one for each "
            "sample, and no draws"
        )
    if wrong := [n for n in numbers if not isinstance(n, int) or not -(2**63) <= n < 2**64]:
        raise ValueError(f"seeds hold {wrong[0]!r}; accepted: integers of 64 bits")
    return numbers


def check_drawn(drawn: Tensor, shape: tuple[int, int, int], device: torch.device) -> None:
    """Raises: `ValueError` for random numbers of another shape or place."""
    if tuple(drawn.shape) != shape or not drawn.is_floating_point() or drawn.device != device:
        raise ValueError(
            f"draws are {tuple(drawn.shape)} {drawn.dtype} on {drawn.device}; accepted: {shape} (samples, rows, classes), "
            f"floating on {device}"
        )


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
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature!r}; accepted: more than 0 (logits are multiplied by it)")

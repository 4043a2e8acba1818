"""What a diffusion process is made of: its betas, the steps that are kept of them, and the tables that follow from both.

Everything is float64 on the host. Sources: Ho et al. 2020 (linear betas, posterior), Nichol and Dhariwal 2021 (cosine betas,
respacing, learned variances between `posterior_log_variance_clipped` and `log_betas`), with the public conventions of
guided-diffusion, so that its checkpoints get the tables they were trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tables:
    """A diffusion process of n steps, index 0 the least noisy.

    Args:
        betas: (n,) float64, each in (0, 1): the variance that step k adds.
        timesteps: (n,), increasing: what the model is told at step k, its own step number. Integers, kept as int64, or
            fractions, kept as float32. Default 0 … n − 1.

    Raises:
        ValueError: shapes, betas outside (0, 1), timesteps that do not increase from 0 or more.
    """

    betas: Array
    timesteps: NDArray[Any]

    def __init__(self, betas: Any, timesteps: Any = None) -> None:
        own = np.array(betas, np.float64)
        numbers = np.arange(own.size) if timesteps is None else np.array(timesteps)
        if own.ndim != 1 or not own.size:
            raise ValueError(f"betas has shape {own.shape}; accepted: (n,), at least one")
        wrong = np.flatnonzero(~((own > 0) & (own < 1)))
        if wrong.size:
            raise ValueError(f"betas[{wrong[0]}] is {own[wrong[0]]}; accepted: more than 0, less than 1")
        kind = np.int64 if np.issubdtype(numbers.dtype, np.integer) else np.float32
        if numbers.shape != own.shape or numbers.dtype.kind not in "iuf":
            raise ValueError(f"timesteps has shape {numbers.shape}, {numbers.dtype}; accepted: {own.shape}, numbers")
        numbers = numbers.astype(kind)
        if not numbers[0] >= 0 or not (np.diff(numbers) > 0).all():
            raise ValueError(f"timesteps is {_short(numbers)}; accepted: increasing, from 0 or more")
        for name, array in (("betas", own), ("timesteps", numbers)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def linear(cls, steps: int = 1000) -> Tables:
        """Betas from 1e-4 to 2e-2 in equal steps, times 1000/steps (which needs more than 20 steps)."""
        _check_steps(steps, 21)
        return cls(np.linspace(1e-4 * (1000 / steps), 2e-2 * (1000 / steps), steps, dtype=np.float64))

    @classmethod
    def cosine(cls, steps: int = 1000) -> Tables:
        """abar(u) = cos²((u + 0.008)/1.008 · π/2), betas at most 0.999."""
        _check_steps(steps, 1)

        def remaining(u: float) -> float:
            return float(np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2)

        return cls([min(1 - remaining((i + 1) / steps) / remaining(i / steps), 0.999) for i in range(steps)])

    def respaced(self, counts: int | str | Sequence[int]) -> Tables:
        """The process that visits only some of these steps, with the same noise at those it keeps.

        Args:
            counts: how many, spread evenly, first and last included; or several numbers ("10,15,20"), one for each of as
                many equal sections; or "ddimN": N steps a constant whole stride apart, from 0.

        Raises:
            ValueError: more steps than there are; no stride that gives N.
        """
        kept = kept_steps(len(self), counts)
        remaining = self.alphas_cumprod[kept]
        return Tables(1 - remaining / np.append(1.0, remaining[:-1]), self.timesteps[kept])

    def rescaled(self, steps: int = 1000) -> Tables:
        """The process told to the model in fractions: step k as k · steps/n, `steps` being how many the model was trained with.

        A process of more, smaller steps than the model's own is `Tables.linear(n).rescaled()`: the same noise at the same
        fraction of the way. guided-diffusion's `rescale_timesteps`.
        """
        return Tables(self.betas, self.timesteps * (steps / len(self)))

    def __len__(self) -> int:
        return self.betas.size

    @cached_property
    def alphas_cumprod(self) -> Array:
        """abar: the share of the image's variance that is left after step k."""
        return np.asarray(np.cumprod(1.0 - self.betas), np.float64)

    @cached_property
    def alphas_cumprod_prev(self) -> Array:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def sqrt_alphas_cumprod(self) -> Array:
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Array:
        return np.sqrt(1.0 - self.alphas_cumprod)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Array:
        return np.sqrt(1.0 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Array:
        return np.sqrt(1.0 / self.alphas_cumprod - 1)

    @cached_property
    def log_betas(self) -> Array:
        """The upper end of a learned log variance."""
        return np.log(self.betas)

    @cached_property
    def posterior_variance(self) -> Array:
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Array:
        """The lower end of a learned log variance. The first variance is 0, so the second stands for it."""
        return np.log(np.append(self._second_variance, self.posterior_variance[1:]))

    @cached_property
    def fixed_large_variance(self) -> Array:
        """Betas as variances, the first as `posterior_log_variance_clipped` has it."""
        return np.append(self._second_variance, self.betas[1:])

    @cached_property
    def posterior_mean_coef1(self) -> Array:
        """The factor of x0 in the posterior's mean."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Array:
        """The factor of x in the posterior's mean."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @property
    def _second_variance(self) -> float:
        """With one step there is no second; any finite number does, because the last step adds no noise."""
        return float(self.posterior_variance[1] if len(self) > 1 else self.betas[0])


def default_tables(steps: int) -> Tables:
    """A linear process of so many steps for a model that was trained with 1000."""
    return Tables.linear().respaced(steps) if steps <= 1000 else Tables.linear(steps).rescaled()


def kept_steps(steps: int, counts: int | str | Sequence[int]) -> list[int]:
    """The steps of `steps` that `Tables.respaced(counts)` keeps."""
    if isinstance(counts, str) and counts.startswith("ddim"):
        wanted = _number(counts.removeprefix("ddim"), counts)
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == wanted:
                return list(range(0, steps, stride))
        raise ValueError(f"counts is {counts!r}; no whole stride takes {wanted} of {steps} steps")
    sections = [_number(n, counts) for n in (counts.split(",") if isinstance(counts, str) else _sequence(counts))]
    size, extra = divmod(steps, max(1, len(sections)))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(sections):
        length = size + int(section < extra)
        if not 1 <= count <= length:
            raise ValueError(
                f"counts is {counts!r}: {count} of the {length} steps in section {section}; accepted: 1 … {length}"
            )
        distance = (length - 1) / (count - 1) if count > 1 else 1.0
        at = 0.0  # a running sum, and half to even: the public rule, which decides some ties
        for _ in range(count):
            kept.append(start + round(at))
            at += distance
        start += length
    if not kept:
        raise ValueError(f"counts is {counts!r}; accepted: at least one section")
    return kept


def _sequence(counts: int | Sequence[int]) -> Sequence[int]:
    return [counts] if isinstance(counts, int) else counts


def _number(text: str | int, counts: object) -> int:
    try:
        return int(text)
    except (TypeError, ValueError):
        raise ValueError(f'counts is {counts!r}; accepted: 250, "250", "10,15,20", [10, 15, 20], "ddim50"') from None


def _check_steps(steps: int, least: int) -> None:
    if steps < least:
        raise ValueError(f"steps is {steps}; accepted: at least {least}")


def _short(numbers: NDArray[Any]) -> str:
    return np.array2string(numbers, threshold=8, edgeitems=3, separator=", ")

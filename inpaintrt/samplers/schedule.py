"""In which order a chain visits a process's steps: down to 0, with jumps back up that let known and unknown parts agree.

Lugmayr et al. 2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", section 4.2 and appendix; the
order in which kinds of jumps are tried is that of the public code.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .tables import Tables

LONGEST = 1_000_000
"""Entries of a schedule; more is a mistake in its numbers (a day of calls at 0.1 s each)."""


class Call(NamedTuple):
    """One call of the model at a step, and how many undo steps (which add noise again) follow it."""

    step: int
    undo: int

    @property
    def target(self) -> int:
        """The step at which the next call is: −1 after the last."""
        return self.step - 1 + self.undo


@dataclass(frozen=True)
class Schedule:
    """The steps that a chain visits, in order: from its first, `steps` − 1, one up or down at a time, to 0 and then −1.

    From a to b < a the model is called at a; from a to b > a noise of one step is added.

    Args:
        times: the steps, −1 last.

    Raises:
        ValueError: a list that does not end in 0, −1, moves by more than one, or climbs above its first step.
    """

    times: tuple[int, ...]

    def __init__(self, times: Sequence[int]) -> None:
        object.__setattr__(self, "times", tuple(int(t) for t in times))
        _check_times(self.times)

    @classmethod
    def repaint(
        cls,
        steps: int = 250,
        *,
        jump_length: int = 10,
        resampling: int = 10,
        jump2_length: int = 1,
        jump2_resampling: int = 1,
        jump3_length: int = 1,
        jump3_resampling: int = 1,
        step_resampling: int = 1,
        start_resampling: int | None = None,
    ) -> Schedule:
        """RePaint's schedule.

        Args:
            steps: steps of the process (the public code's t_T); the tables must have as many.
            jump_length: steps of a jump back up; every `jump_length`-th step is jumped from.
            resampling: how often each stretch is walked, the first time included (jump_n_sample); 1: no jumps.
            jump2_length, jump2_resampling: the same for shorter jumps, which each longer one makes possible again.
            jump3_length, jump3_resampling: and again.
            step_resampling: how often each single step is walked (n_sample); 1: once.
            start_resampling: no jump climbs above this step; None: no bound.

        Raises:
            ValueError: a number below 1, or a schedule of more than `LONGEST` entries.
        """
        counts = {
            "steps": steps, "jump_length": jump_length, "resampling": resampling, "jump2_length": jump2_length,
            "jump2_resampling": jump2_resampling, "jump3_length": jump3_length, "jump3_resampling": jump3_resampling,
            "step_resampling": step_resampling,
        }  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; accepted: at least 1")
        jumps = [(jump_length, resampling), (jump2_length, jump2_resampling), (jump3_length, jump3_resampling)]
        for length, count in jumps:
            if count > 1 and length >= steps:
                warnings.warn(
                    f"no jump of {length} steps fits among {steps}: walking a stretch {count} times has no effect",
                    stacklevel=2,
                )
        times = list(itertools.islice(_repaint(steps, jumps, step_resampling, start_resampling), LONGEST + 1))
        if len(times) > LONGEST:
            raise ValueError(f"a schedule of {counts} has more than {LONGEST:,} entries")
        return cls(times)

    @classmethod
    def plain(cls, steps: int) -> Schedule:
        """Each step once."""
        if steps < 1:
            raise ValueError(f"steps is {steps}; accepted: at least 1")
        return cls(range(steps - 1, -2, -1))

    def slowed(self) -> Schedule:
        """As many calls of the model without jumps: the paper's comparison, which spends the same time on smaller steps.

        It needs tables with that many steps, as the default ones have: of more than the model's 1000 steps,
        `Tables.linear(n).rescaled()`.
        """
        return Schedule.plain(len(self.calls))

    @property
    def steps(self) -> int:
        return self.times[0] + 1

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The calls of the model."""
        found: list[Call] = []
        for a, b in itertools.pairwise(self.times):
            if b < a:
                found.append(Call(a, 0))
            else:
                found[-1] = Call(found[-1].step, found[-1].undo + 1)
        return tuple(found)

    def check(self, tables: Tables) -> None:
        """That a process has this schedule's steps.

        Raises:
            ValueError: the schedule begins beyond the tables' last step.

        Warns where it begins below it: what the chain starts from then is not noise only.
        """
        if self.steps > len(tables):
            raise ValueError(
                f"the schedule begins at step {self.steps - 1}, the tables have {len(tables)} steps; "
                f"accepted: as many, such as Schedule.repaint({len(tables)}), Tables.respaced({self.steps}) of a longer one, or "
                f"Tables.linear({self.steps}).rescaled()"
            )
        if self.steps < len(tables):
            remaining = tables.alphas_cumprod
            warnings.warn(
                f"the schedule begins at step {self.steps - 1} of tables with {len(tables)} steps: there the image's share of "
                f"the variance is {remaining[self.steps - 1]:.3g}, not {remaining[-1]:.3g}, but a chain starts from noise only. "
                f"To take fewer steps, respace: Tables.respaced({self.steps})",
                stacklevel=3,
            )


def _repaint(
    steps: int, jumps: Sequence[tuple[int, int]], step_resampling: int, start_resampling: int | None
) -> Iterator[int]:
    """The entries. `jumps` holds (length, count), the longest first; a shorter one is tried before a longer one."""
    bound = float("inf") if start_resampling is None else start_resampling

    def full(length: int, count: int) -> dict[int, int]:
        return dict.fromkeys(range(0, steps - length, length), count - 1)

    left = [full(*jump) for jump in jumps]
    t = steps
    while t >= 1:
        t -= 1
        yield t
        if t + 1 < steps - 1 and t <= bound:
            for _ in range(step_resampling - 1):
                yield t + 1
                yield t
        for kind in reversed(range(len(jumps))):
            length = jumps[kind][0]
            if left[kind].get(t, 0) > 0 and t <= bound - length:
                left[kind][t] -= 1
                for _ in range(length):
                    t += 1
                    yield t
                left[kind + 1 :] = [full(*jump) for jump in jumps[kind + 1 :]]
    yield -1


def _check_times(times: tuple[int, ...]) -> None:
    if len(times) < 2 or times[-2:] != (0, -1):
        shown = ", ".join(map(str, times[-3:]))
        raise ValueError(f"times ends in {shown or 'nothing'}; accepted: a list that ends in 0, -1")
    first = times[0]
    if first != 0 and times[1] != first - 1:
        raise ValueError(
            f"times begins with {first}, {times[1]}; accepted: a call of the model first, {first}, {first - 1}"
        )
    for i, (a, b) in enumerate(itertools.pairwise(times)):
        if abs(a - b) != 1:
            raise ValueError(f"times[{i + 1}] is {b} after {a}; accepted: one more or one less")
        if b > first:
            raise ValueError(f"times[{i + 1}] is {b}, above the first, {first}; accepted: jumps up to step {first}")
        if b < 0 and i + 2 != len(times):
            raise ValueError(f"times[{i + 1}] is {b}; accepted: -1 at the end only")

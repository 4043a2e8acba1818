"""Timing that survives a noisy machine: candidates interleaved in one process, judged by their ratio.

An absolute time on a shared machine drifts by tens of percent with clocks and neighbours. Two candidates measured
within the same second see the same machine, so their ratio is what is worth reporting; the order A B B A cancels what
drifts linearly meanwhile, and a bootstrap over the rounds says how far the ratio can be trusted.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

MIN_SAMPLE = 100e-6
"""Seconds that one timed sample lasts at least, so that the clock's own cost (50 ns) is nothing."""


@dataclass(frozen=True)
class Ratio:
    """How many times faster the candidate is than the baseline, with a 95 % interval, from so many rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Summary:
    """Percentiles of one candidate's times, in the unit given (seconds here); p99 only from 100 samples."""

    p50: float
    p95: float
    p99: float | None
    mean: float
    n: int


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
    min_sample: float = MIN_SAMPLE,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each candidate: two samples a round, in the order in which they were taken.

    A round calls the candidates forwards and then backwards (A B C C B A), so that they share one mean moment: a linear
    drift adds the same to each. The starting candidate rotates from round to round, so that none always runs first or
    always follows itself with a warm cache.

    Args:
        candidates: by name; each is called with nothing, its result is dropped (its deallocation is timed, as in use).
        rounds: palindromes; every list gets 2 · rounds entries.
        warmup: untimed calls of each candidate before anything is timed.
        device: a CUDA device is synchronised before and after each sample; None or a CPU device needs nothing.
        min_sample: seconds; calls shorter than this are batched, and the entry is the batch's time per call.
        clock: seconds; tests pass their own.

    Garbage collection is off while a sample runs and happens between the rounds.
    """
    if not candidates or rounds < 1:
        raise ValueError(f"{len(candidates)} candidates and {rounds} rounds; accepted: at least one of each")
    synchronize = synchronizer(device)

    def sample(name: str, calls: int) -> float:
        call = candidates[name]
        repeats = range(calls)
        synchronize()
        start = clock()
        for _ in repeats:
            call()
        synchronize()
        return (clock() - start) / calls

    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        calls = {}
        for name in names:
            for _ in range(warmup):
                candidates[name]()
            calls[name] = _batch(lambda n, name=name: sample(name, n), min_sample)  # type: ignore[misc]
        for r in range(rounds):
            gc.collect(1)
            start = r % len(names)
            order = names[start:] + names[:start]
            for name in order + order[::-1]:
                times[name].append(sample(name, calls[name]))
    return times


def compare(baseline: Sequence[float], candidate: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """baseline / candidate, from two lists that `interleave` returned: above 1, the candidate is faster.

    Each round gives one ratio, of its two baseline samples over its two candidate samples; the result is their median,
    which one disturbed round does not move. The interval is a bootstrap over rounds, the same for the same input.
    """
    if len(baseline) != len(candidate) or len(baseline) % 2 or not baseline:
        raise ValueError(f"{len(baseline)} and {len(candidate)} times; accepted: equally many, two per round")
    ratios = _per_round(baseline) / _per_round(candidate)
    return Ratio(*median_interval(ratios, resamples=resamples, seed=seed), rounds=len(ratios))


def median_interval(
    values: Sequence[float] | Array, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The median with a 95 % percentile-bootstrap interval around it: (median, low, high)."""
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.percentile(np.median(data[picks], axis=1), (2.5, 97.5))
    return float(np.median(data)), float(low), float(high)


def summary(times: Sequence[float]) -> Summary:
    """Percentiles (linear between neighbours), mean and count."""
    data = np.asarray(times, dtype=np.float64)
    p50, p95, p99 = (float(v) for v in np.percentile(data, (50, 95, 99)))
    return Summary(p50=p50, p95=p95, p99=p99 if len(data) >= 100 else None, mean=float(data.mean()), n=len(data))


def _per_round(times: Sequence[float]) -> Array:
    both: Array = np.asarray(times, dtype=np.float64).reshape(-1, 2)
    return both[:, 0] + both[:, 1]


def _batch(sample: Callable[[int], float], min_sample: float) -> int:
    """How many calls make a sample of `min_sample` seconds; the estimate is repeated on the batch it proposes."""
    calls = 1
    while True:
        seconds = sample(calls)
        if seconds * calls >= min_sample:
            return calls
        # A quarter more than estimated, at least twice as many, and no more than ten times: first calls are slow.
        needed = math.ceil(1.25 * min_sample / seconds) if seconds > 0 else 10 * calls
        calls = min(10 * calls, max(2 * calls, needed))


def synchronizer(device: torch.device | None) -> Callable[[], object]:
    """What to call so that everything launched on `device` has finished."""
    if device is not None and device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

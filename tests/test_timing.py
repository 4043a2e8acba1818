"""inpaintrt.testing's measuring tools, on clocks and loads whose true answer is known."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from inpaintrt.runtime.spec import Cost
from inpaintrt.testing import machine, memory
from inpaintrt.testing.timing import Ratio, compare, interleave, median_interval, summary


class Machine:
    """A clock that only calls advance: each by its cost, times how slow the machine is by then, times some noise."""

    def __init__(self, slowness: Callable[[float], float] = lambda now: 1.0, noise: float = 0.0, seed: int = 7) -> None:
        self.now = 0.0
        self.slowness = slowness
        self.random = np.random.default_rng(seed)
        self.noise = noise
        self.order: list[float] = []

    def clock(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.order.append(seconds)
            self.now += seconds * self.slowness(self.now) * float(np.exp(self.noise * self.random.standard_normal()))

        return call


ROUNDS = 30
# 30 rounds of a palindrome over 1.0 s and 1.1 s last about 126 s: the drifts below move by 30 % over that span.
DRIFTS = {
    "none": lambda now: 1.0,
    "slower": lambda now: 1 + 0.3 * now / 126,
    "faster": lambda now: 1 / (1 + 0.3 * now / 126),
    "quadratic": lambda now: 1 + 0.3 * (now / 126) ** 2,
    "step": lambda now: 1.0 if now < 50 else 1.3,
    "burst": lambda now: 3.0 if 40 < now < 50 else 1.0,
}


def measured(machine: Machine, baseline: float, candidate: float) -> Ratio:
    times = interleave(
        {"baseline": machine.work(baseline), "candidate": machine.work(candidate)}, rounds=ROUNDS, clock=machine.clock
    )
    return compare(times["baseline"], times["candidate"])


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("true", [1.0, 1.1, 1 / 1.1])
def test_drift_does_not_move_the_ratio(drift: str, true: float) -> None:
    ratio = measured(Machine(DRIFTS[drift]), 1.0, 1.0 / true)
    assert ratio.median == pytest.approx(true, rel=0.005)
    assert ratio.rounds == ROUNDS


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_tenth_is_found_under_drift_and_noise(drift: str) -> None:
    ratio = measured(Machine(DRIFTS[drift], noise=0.05), 1.1, 1.0)
    assert 1 < ratio.low <= ratio.median <= ratio.high
    assert ratio.median == pytest.approx(1.1, rel=0.03)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """No difference is called one in 5 % of the runs, by the interval's definition, and not much more often."""
    ratios = [measured(Machine(DRIFTS["slower"], noise=0.05, seed=seed), 1.0, 1.0) for seed in range(30)]
    assert sum(ratio.low <= 1 <= ratio.high for ratio in ratios) >= 26, "28 of 30 expected"


def test_one_after_the_other_would_have_been_fooled() -> None:
    """The planted drift is large enough to matter: without interleaving it fakes a difference of a tenth."""
    machine = Machine(DRIFTS["slower"])
    first = interleave({"a": machine.work(1.0)}, rounds=ROUNDS, clock=machine.clock)["a"]
    second = interleave({"b": machine.work(1.0)}, rounds=ROUNDS, clock=machine.clock)["b"]
    assert compare(second, first).median > 1.1


def test_order_is_a_palindrome_that_rotates() -> None:
    machine = Machine()
    calls = {name: machine.work(cost) for name, cost in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    times = interleave(calls, rounds=3, warmup=0, clock=machine.clock)
    timed = "".join("?abc"[int(cost)] for cost in machine.order[3:])  # the first three size the batches
    assert timed == "abccba" + "bcaacb" + "cabbac"
    assert times == {"a": [1.0] * 6, "b": [2.0] * 6, "c": [3.0] * 6}


def test_short_calls_are_batched_into_one_sample() -> None:
    machine = Machine()
    times = interleave({"short": machine.work(1e-6), "long": machine.work(1e-2)}, rounds=2, clock=machine.clock)
    assert times["short"] == pytest.approx([1e-6] * 4)
    assert times["long"] == pytest.approx([1e-2] * 4)
    timed_long = machine.order[-(2 * 2 + 2 * 100) :].count(1e-2)
    assert timed_long <= 4, "calls longer than a sample are not batched"
    assert machine.order.count(1e-6) >= 4 * 100, "a sample of a 1 µs call holds at least 100 of them"


def test_warmup_is_not_timed_and_garbage_collection_is_off_then_restored() -> None:
    seen = []
    machine = Machine()
    call = machine.work(1.0)

    def watched() -> None:
        seen.append(gc.isenabled())
        call()

    assert gc.isenabled()
    times = interleave({"a": watched}, rounds=2, warmup=3, clock=machine.clock)
    assert len(times["a"]) == 4
    assert len(seen) == 3 + 1 + 4  # warm-up, sizing, samples
    assert not any(seen)
    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        interleave({"a": lambda: exec("raise RuntimeError")}, rounds=1)
    assert gc.isenabled()


@pytest.mark.parametrize(("candidates", "rounds"), [({}, 1), ({"a": lambda: None}, 0)])
def test_nothing_to_measure_is_an_error(candidates: dict[str, Callable[[], None]], rounds: int) -> None:
    with pytest.raises(ValueError, match="accepted: at least one of each"):
        interleave(candidates, rounds=rounds)


def test_real_clock() -> None:
    x = torch.ones(1000)
    times = interleave({"one": lambda: x.sum(), "ten": lambda: [x.sum() for _ in range(10)]}, rounds=10)
    assert 4 < compare(times["ten"], times["one"]).median < 25
    assert 1e-7 < summary(times["one"]).p50 < 1e-3


def test_compare_wants_pairs() -> None:
    for baseline, candidate in (([1.0, 1.0], [1.0]), ([1.0], [1.0]), ([], [])):
        with pytest.raises(ValueError, match="two per round"):
            compare(baseline, candidate)


def test_compare_is_the_same_twice_and_ordered() -> None:
    random = np.random.default_rng(0)
    a, b = (1 + 0.1 * random.random(40)).tolist(), (1 + 0.1 * random.random(40)).tolist()
    assert compare(a, b) == compare(a, b)
    there, back = compare(a, b), compare(b, a)
    assert there.low <= there.median <= there.high
    assert there.median == pytest.approx(1 / back.median, rel=0.01)
    assert str(Ratio(1.3, 1.25, 1.375, 9)) == "1.30x [1.25, 1.38]"


def test_interval_covers_the_truth() -> None:
    """Of 100 intervals around a known median, nearly all hold it (95 expected), and more data makes them narrower."""
    random = np.random.default_rng(3)
    covered, widths = 0, {20: [], 200: []}
    for n in widths:
        for _ in range(100):
            _, low, high = median_interval(random.lognormal(0, 0.1, n), resamples=400)
            widths[n].append(high - low)
            covered += low <= 1 <= high
    assert 180 <= covered <= 200
    assert np.mean(widths[200]) < 0.5 * np.mean(widths[20])


def test_summary_has_p99_only_from_a_hundred_samples() -> None:
    few, many = summary([float(i) for i in range(99)]), summary([float(i) for i in range(101)])
    assert (few.p50, few.p99, few.n) == (49.0, None, 99)
    assert (many.p50, many.p95, many.p99, many.mean, many.n) == (50.0, 95.0, 99.0, 50.0, 101)


def test_floor_is_the_slower_of_bytes_and_flops() -> None:
    rates = machine.Floors(copy_bytes_per_s=1e9, gemm_flops_per_s=1e12)
    assert rates.seconds(Cost(flops=1e12, bytes=1e6)) == 1.0
    assert rates.seconds(Cost(flops=1e6, bytes=5e9)) == 5.0


def test_floors_are_plausible_and_measured_once() -> None:
    rates = machine.floors()
    assert 1e9 < rates.copy_bytes_per_s < 1e13
    assert 1e9 < rates.gemm_flops_per_s < 1e14
    assert machine.floors() == rates
    x = torch.ones(1 << 24)
    y = torch.empty_like(x).copy_(x)
    copy = summary(interleave({"copy": lambda: y.copy_(x)}, rounds=3)["copy"]).p50
    assert copy > 0.5 * rates.seconds(Cost(flops=0, bytes=2 * x.nbytes)), "a copy cannot be far below its own floor"


def test_identity_is_data_without_names_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("LD_PRELOAD", "/some/where/libfast.so:/else/libother.so")
    found = machine.identity()
    text = json.dumps(found)
    assert platform.node() not in re.sub(r'"(os|machine|cpu)": "[^"]*"', "", text)
    assert not re.search(r'"/|:/', text), "an absolute path"
    assert found["environment"]["OMP_NUM_THREADS"] == "2"
    assert found["environment"]["LD_PRELOAD"] == "libfast.so:libother.so"
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["usable_cores"] >= 1
    assert found["memory_bytes"] > 1 << 28


def test_machine_id_names_a_folder() -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", machine.machine_id())
    assert machine.machine_id().count(f"-{machine.usable_cores()}c") == 1


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("AMD EPYC", "amd-epyc-f26m2-"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763-f26m2-"),
        ("Intel(R) Xeon(R) Platinum 8358 CPU @ 2.60GHz", "intel-xeon-platinum-8358-f26m2-"),
    ],
)
def test_machine_id_drops_marketing(monkeypatch: pytest.MonkeyPatch, model: str, expected: str) -> None:
    values = {"model name": model, "cpu family": "26", "model": "2"}
    monkeypatch.setattr(machine, "_cpuinfo", lambda key: values[key])
    assert machine.machine_id.__wrapped__().startswith(expected)


def test_one_openmp_runtime() -> None:
    torch.ones(4).sum()
    found = machine.openmp_runtimes()
    assert len(found) == 1, f"one pool of threads, not {found}"


def load_and_use(megabytes: int, warm: bool):
    import torch

    kept = torch.ones(50 << 18)  # 50 MiB that are there before the call and must not count
    if warm:
        torch.ones(megabytes << 18)

    def run():
        temporary = torch.ones(megabytes << 18)
        return temporary[:1] + kept[:1]

    return run


@pytest.mark.skipif(bool(memory.missing()), reason=memory.missing())
@pytest.mark.parametrize("warm", [False, True])
def test_peak_memory_of_a_temporary(warm: bool) -> None:
    found = memory.measure_in_subprocess(load_and_use, 96, warm)
    assert found.extra == pytest.approx(96 << 20, rel=0.05)
    assert found.after - found.before < 10 << 20, "the temporary is gone"
    assert found.before > 50 << 20
    assert found.seconds > 0


def uses_its_module():
    return lambda: json.dumps({})


def fails():
    raise ValueError("planted")


def test_what_a_fresh_process_lacks_is_named() -> None:
    captured = 3
    with pytest.raises(ValueError, match="uses json from outside"):
        memory.measure_in_subprocess(uses_its_module)
    with pytest.raises(ValueError, match="uses captured from outside"):
        memory.measure_in_subprocess(lambda: captured)
    with pytest.raises(RuntimeError, match="planted"):
        memory.in_fresh_process(fails)

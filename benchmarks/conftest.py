"""The front door of the benchmarks: pytest-benchmark's options, files and comparisons, interleaved measurements behind.

`versus` is the fixture every benchmark uses. It proves first that the candidates compute the same thing, then times
them interleaved, hands the subject's times to pytest-benchmark and the rest (ratios, floors, backends) to `extra_info`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.runtime import dispatch
from inpaintrt.runtime.spec import Cost, as_outputs
from inpaintrt.testing import close_to_truth, machine
from inpaintrt.testing.compare import Numerics
from inpaintrt.testing.timing import compare, interleave, summary

Candidate = Callable[[], Any]
HERE = Path(__file__).parent
SUBJECT = "inpaintrt"

BUDGET = 4.0  # seconds of one case's timed calls, between the two bounds on its rounds
MIN_ROUNDS, MAX_ROUNDS = 5, 50  # 50 rounds are 100 samples, from which p99 is reported

SAME_THING = 16.0
"""Factor of the tolerance rule for baselines: they must compute the same thing; their rounding is not ours to judge."""
END_TO_END = 2e-5
"""Relative RMS between two float32 networks, where no float64 truth is affordable."""

_rows = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("inpaintrt")
    group.addoption("--irt-save", action="store_true", help="write benchmarks/results/<machine>/<date>-<commit>.json")
    group.addoption("--irt-device", default="cpu", help="device of ops and models: cpu (default), cuda, cuda:1, ...")
    group.addoption(
        "--irt-peers",
        default="all",
        help="other engines to run models with: all (default), none, or names such as openvino,torchscript,compile",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    if config.getoption("irt_save"):
        if config.getoption("benchmark_json"):
            raise pytest.UsageError("--irt-save and --benchmark-json both name the result file; give one of them")
        path = result_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = path


def result_path() -> Path:
    """Where --irt-save writes: a folder per machine, since absolute times compare only within one."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short=8", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    commit = done.stdout.strip() if done.returncode == 0 else "uncommitted"
    now = datetime.datetime.now(datetime.UTC)
    return HERE / "results" / machine.machine_id() / f"{now:%Y-%m-%d-%H%M}-{commit}.json"


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """In place of the plugin's own, which names the host."""
    found = {name: _version(name) for name in ("onnxruntime", "openvino")}
    return machine.identity() | {"peers": {name: version for name, version in found.items() if version}}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    cpu = machine.floors()
    output_json["floors"] = {"cpu_float32": dataclasses.asdict(cpu)}
    output_json["commit_info"].pop("project", None)  # the name of the checkout's folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash[_rows]
    if rows:
        report = _sibling("report")
        terminalreporter.section("inpaintrt")
        terminalreporter.write_line(str(report.table(rows, report.title(machine.identity()))))
        if means := report.means(rows):
            terminalreporter.write_line(f"\n{means}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where ops and models run (--irt-device)."""
    found = torch.device(request.config.getoption("irt_device"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("not run: torch finds no CUDA device")
    return found


@pytest.fixture(scope="session")
def baselines() -> ModuleType:
    """Layers as public networks write them: `baselines.py`."""
    return _sibling("baselines")


@pytest.fixture(scope="session")
def peers() -> ModuleType:
    """Other engines: `peers.py`."""
    return _sibling("peers")


@pytest.fixture(scope="session")
def wanted_peers(request: pytest.FixtureRequest, peers: ModuleType) -> Callable[[str], bool]:
    """Whether --irt-peers asks for a peer."""
    names = request.config.getoption("irt_peers").split(",")
    known = ["compile", *peers.PEERS, *peers.PEERS_BF16]
    if names not in (["all"], ["none"]) and (unknown := set(names) - set(known)):
        raise pytest.UsageError(
            f"--irt-peers has {', '.join(sorted(unknown))}; accepted: all, none, {', '.join(known)}"
        )
    return lambda name: names == ["all"] or name in names


@pytest.fixture(scope="session")
def ported() -> dict[str, Callable[..., Any]]:
    """By op name: how public networks compute what our reference networks call an op of ours for (see `peers.py`)."""
    return {"contextual_attention": _sibling("bench_contextual_attention").ported}


@pytest.fixture
def replay(request: pytest.FixtureRequest) -> list[float]:
    """Times for pytest-benchmark to take as its own: its clock reads 0 before and the next of them after each call."""
    times: list[float] = []
    ticks = (tick for seconds in times for tick in (0.0, seconds))

    def interleaved() -> float:
        return next(ticks)

    request.applymarker(pytest.mark.benchmark(timer=interleaved))
    return times


@pytest.fixture
def versus(replay: list[float], benchmark: Any, request: pytest.FixtureRequest) -> Versus:
    """See `Versus`. (`replay` stands first: the clock must be set before `benchmark` exists.)"""
    return Versus(replay, benchmark, request.config.stash[_rows])


class Versus:
    """Measures candidates against each other and reports one of them, the subject, through pytest-benchmark."""

    def __init__(self, replay: list[float], benchmark: Any, rows: list[dict[str, Any]]) -> None:
        self._replay = replay
        self._benchmark = benchmark
        self._rows = rows
        self.setup_seconds: dict[str, float] = {}
        """Seconds that a candidate took to get ready, by name."""
        self.smoke: bool = benchmark.disabled
        """--benchmark-disable: everything runs once, nothing is timed or compiled."""

    def __call__(
        self,
        candidates: Mapping[str, Candidate],
        *,
        baseline: str = "eager",
        subject: str = SUBJECT,
        cost: Cost | None = None,
        truth: Candidate | None = None,
        check: bool = True,
        tolerances: Mapping[str, float] | None = None,
        rounds: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        shape: Sequence[int] = (),
        **info: Any,
    ) -> None:
        """Check, then time `candidates` interleaved; the ratio of each to the subject is kept.

        Args:
            candidates: by name; every one does the same work.
            baseline: the candidate that the table compares with, and the reference of the check.
            subject: the candidate whose times are the benchmark's.
            cost: of one call, for % of floor.
            truth: the result in float64. Without it candidates are compared with the baseline's float32 result.
            check: False where results mean nothing (cost of an empty call).
            tolerances: relative RMS by candidate, where there is no truth and it is not END_TO_END.
            rounds: of four calls per pair of candidates; None = what BUDGET allows.
            device, dtype, shape, info: of the case, for the table and the result file.
        """
        results, ours = {}, {}
        for name, call in candidates.items():
            with dispatch.launches() as heard:
                results[name] = call()
            ours[name] = dispatch.numerics_of(heard)
            if name == subject:
                ran = _counts(heard)
        if check:
            self._check(results, ours, baseline, subject, truth, tolerances or {})
        del results
        if self.smoke:
            self.skip_timing()
            return
        found = interleave(candidates, rounds=rounds or _affordable(candidates, device), device=device)
        floor = None if cost is None else machine.floors(dtype, device or torch.device("cpu")).seconds(cost)
        self.record(
            found, baseline=baseline, subject=subject, floor=floor, ran=ran, shape=shape,
            device=str(device or "cpu"), dtype=str(dtype).removeprefix("torch."), **info,
        )  # fmt: skip

    def record(
        self,
        times: Mapping[str, list[float]],
        *,
        baseline: str = "",
        subject: str = SUBJECT,
        floor: float | None = None,
        ran: Mapping[str, Mapping[str, int]] | None = None,
        shape: Sequence[int] = (),
        notes: Sequence[str] = (),
        **info: Any,
    ) -> None:
        """Hand over times that were measured elsewhere, two samples per round where there is a baseline."""
        extra = self._benchmark.extra_info
        p50 = summary(times[subject]).p50
        extra.update(
            subject=subject,
            baseline=baseline,
            shape=list(shape),
            threads=torch.get_num_threads(),
            ran=ran or {},
            times={name: dataclasses.asdict(summary(values)) for name, values in times.items()},
            ratios={
                name: dataclasses.asdict(compare(values, times[subject]))
                for name, values in times.items()
                if baseline and name != subject
            },
            floor_seconds=floor,
            of_floor=None if floor is None else floor / p50,
            compile_seconds=self.setup_seconds,
            notes=list(notes),
            **info,
        )
        self._replay.extend(times[subject])
        self._benchmark.pedantic(lambda: None, rounds=len(times[subject]))
        self._rows.append({"name": self._benchmark.name, "extra_info": extra})

    def skip_timing(self) -> None:
        """What a smoke run ends with in place of `record` (else the plugin warns that its fixture was not used)."""
        self._benchmark.pedantic(lambda: None)

    def compiled(
        self, function: Callable[..., Any], *args: Any, freezing: bool = False, name: str = "compile"
    ) -> Candidate:
        """`function(*args)` through torch.compile, compiled here; the seconds that took are kept.

        One shape, one graph, no graph breaks: nothing is left on the table. `freezing` folds weights (CPU, no grad).
        """
        fast = self.compiled_form(function, *args, freezing=freezing, name=name)
        return lambda: fast(*args)

    def compiled_form(
        self, function: Callable[..., Any], *args: Any, freezing: bool = False, name: str = "compile"
    ) -> Callable[..., Any]:
        """As `compiled`, a function of such arguments: for a loop around it."""
        import torch._inductor.config as inductor

        torch._dynamo.reset()  # else the recompilation limit would quietly turn a later case back into eager
        on_gpu = any(isinstance(a, Tensor) and a.is_cuda for a in args)
        fast = torch.compile(function, fullgraph=True, dynamic=False, mode="max-autotune" if on_gpu else None)
        start = time.perf_counter()
        with inductor.patch(freezing=freezing):
            fast(*args)
        self.setup_seconds[name] = time.perf_counter() - start
        return fast

    def _check(
        self,
        results: Mapping[str, Any],
        ours: Mapping[str, Numerics],
        baseline: str,
        subject: str,
        truth: Candidate | None,
        tolerances: Mapping[str, float],
    ) -> None:
        expected = as_outputs(results[baseline])
        exact = None if truth is None else as_outputs(truth())
        for name, result in results.items():
            if name == baseline:
                continue
            for i, actual in enumerate(as_outputs(result)):
                if exact is None:
                    error = _relative_rms(actual, expected[i])
                    assert error <= tolerances.get(name, END_TO_END), (
                        f"{name} differs from {baseline} by {error:.2g} (relative RMS)"
                    )
                else:
                    numerics = ours[name] if name.startswith(subject) else Numerics(SAME_THING, SAME_THING)
                    verdict = close_to_truth(actual, exact[i], expected[i], numerics=numerics)
                    assert verdict.ok, f"{name}: {verdict.message}"


def _affordable(candidates: Mapping[str, Candidate], device: torch.device | None) -> int:
    once = interleave(candidates, rounds=1, warmup=0, device=device)
    return max(MIN_ROUNDS, min(MAX_ROUNDS, math.floor(BUDGET / sum(map(sum, once.values())))))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _counts(heard: Sequence[dispatch.Launch]) -> dict[str, dict[str, int]]:
    """How many times each backend ran each op: {op: {backend: launches}}."""
    counts: dict[str, dict[str, int]] = {}
    for launch in heard:
        of_op = counts.setdefault(launch.op, {})
        of_op[launch.backend] = of_op.get(launch.backend, 0) + 1
    return counts


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    a, b = actual.detach().double(), expected.detach().double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@functools.cache
def _sibling(name: str) -> ModuleType:
    """A module of this folder, which is no package and not on the import path."""
    spec = importlib.util.spec_from_file_location(f"inpaintrt_benchmarks_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module

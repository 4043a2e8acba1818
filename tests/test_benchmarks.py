"""The benchmarks' front door: they cannot rot, they reject wrong results, and what they write is complete."""

from __future__ import annotations

import configparser
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from inpaintrt import ops
from inpaintrt.runtime import dispatch
from inpaintrt.testing import machine, recipe

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

TINY = '''
import time

import torch

from inpaintrt import ops
from inpaintrt.ops.gated_activation import SPEC
from inpaintrt.runtime.spec import Cost


def setup(error=0.0):
    y = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    eager = lambda: SPEC.run_reference(*SPEC.bind(y))
    return y, {"eager": eager, "inpaintrt": lambda: ops.gated_activation(y) + error}


def test_right(versus):
    y, candidates = setup()
    versus(
        candidates, truth=lambda: SPEC.reference(y.double()), cost=SPEC.cost(*SPEC.bind(y)), rounds=60,
        shape=y.shape, op="gated_activation",
    )


def test_sleepers(versus):
    """Known times: one candidate sleeps twice as long as the other, and both long beside what a busy machine adds."""
    versus({"eager": lambda: time.sleep(0.8), "inpaintrt": lambda: time.sleep(0.4)}, rounds=2, check=False)


def test_without_truth(versus):
    versus(setup()[1], rounds=2)


def test_within_its_tolerance(versus):
    versus(setup(error=1e-4)[1], tolerances={"inpaintrt": 1e-2}, rounds=2)


def test_wrong_result(versus):
    y, candidates = setup(error=1e-4)
    versus(candidates, truth=lambda: SPEC.reference(y.double()), rounds=2)


def test_wrong_network(versus):
    versus(setup(error=1e-4)[1], rounds=2)


def test_wrong_baseline(versus):
    y, candidates = setup()
    candidates["other"] = lambda: ops.gated_activation(y, activation="silu")
    versus(candidates, truth=lambda: SPEC.reference(y.double()), rounds=2)
'''


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # By itself, also where this process is one of several: there pytest-benchmark measures nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=env)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A timed run of the tiny benchmarks under the real conftest, and the file that --irt-save wrote."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in ("conftest.py", "report.py", "pytest.ini"):
        shutil.copy(BENCHMARKS / name, folder)
    (folder / "bench_tiny.py").write_text(TINY)
    done = pytest_in(folder.parent, folder.name, "--irt-save")
    files = list((folder / "results" / machine.machine_id()).glob("*.json"))
    assert len(files) == 1, done.stdout + done.stderr
    return done, files[0]


@pytest.fixture(scope="module")
def results(run: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Any]:
    return json.loads(run[1].read_text())


def benchmark(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(b for b in results["benchmarks"] if b["name"] == name)


def test_wrong_candidates_are_not_timed(
    run: tuple[subprocess.CompletedProcess[str], Path], results: dict[str, Any]
) -> None:
    output = run[0].stdout
    assert "3 failed, 4 passed" in output
    for message in (
        "inpaintrt: max error",
        r"inpaintrt differs from eager by [\d.e-]+ \(relative RMS\)",
        "other: max error",
    ):
        assert re.search(message, output)
    timed = ["test_right", "test_sleepers", "test_without_truth", "test_within_its_tolerance"]
    assert [b["name"] for b in results["benchmarks"]] == timed


def test_the_schema_is_complete(results: dict[str, Any]) -> None:
    info = benchmark(results, "test_right")["extra_info"]
    assert info["ran"] in ({"gated_activation": {"cpu": 1}}, {"gated_activation": {"reference": 1}})
    assert (info["subject"], info["baseline"], info["op"]) == ("inpaintrt", "eager", "gated_activation")
    assert (info["shape"], info["dtype"], info["device"]) == ([1, 4, 8, 8], "float32", "cpu")
    assert info["threads"] >= 1
    assert set(info["times"]) == {"eager", "inpaintrt"}
    for times in info["times"].values():
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
        assert times["n"] == 120
    ratio = info["ratios"]["eager"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert ratio["rounds"] == 60
    assert info["of_floor"] == pytest.approx(info["floor_seconds"] / info["times"]["inpaintrt"]["p50"])
    assert benchmark(results, "test_sleepers")["extra_info"]["times"]["eager"]["p99"] is None


def test_known_times_come_out(results: dict[str, Any]) -> None:
    found = benchmark(results, "test_sleepers")
    assert found["extra_info"]["ratios"]["eager"]["median"] == pytest.approx(2, rel=0.25)
    # pytest-benchmark's own statistics are the subject's times, so that its compare and storage work.
    assert found["stats"]["rounds"] == 4
    assert found["stats"]["median"] == pytest.approx(found["extra_info"]["times"]["inpaintrt"]["p50"])
    assert found["stats"]["median"] == pytest.approx(0.4, rel=0.5)


def test_the_machine_is_named_and_the_host_is_not(results: dict[str, Any]) -> None:
    assert results["machine_info"]["machine"] == machine.machine_id()
    assert "node" not in results["machine_info"]
    assert results["floors"]["cpu_float32"]["gemm_flops_per_s"] > 1e9


def test_the_table_is_printed_and_reported(
    run: tuple[subprocess.CompletedProcess[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    row = r"sleepers\W+\d+\.?\d*\W+\d+\.?\d*\W+eager\W+\d{3,4}\W+[12]\.\d\dx \[\d\.\d\d, \d\.\d\d\]"
    assert re.search(row, run[0].stdout)
    load("report").main([str(run[1])])
    printed = capsys.readouterr().out
    assert re.search(row, printed)
    assert "| case |" in printed
    assert results_date(run[1]) in printed


def results_date(path: Path) -> str:
    return path.name[:10]


@functools.cache
def load(name: str) -> Any:
    """A module of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_further_baselines_get_rows_of_their_own() -> None:
    times = {"p50": 0.001, "p95": 0.002}
    ratio = {"median": 1.5, "low": 1.4, "high": 1.6}
    info = {
        "subject": "ours",
        "baseline": "a",
        "times": {"ours": times, "a": times, "b": times},
        "ratios": {"a": ratio, "b": ratio},
        "compile_seconds": {"b": 12.34},
        "ran": {"x": {"cpu": 3}, "y": {"reference": 1}},
        "shape": [1, 2],
        "of_floor": 0.5,
        "notes": ["remark"],
    }
    cases = [{"name": name, "extra_info": info} for name in ("test_case", "test_other")]
    report = load("report").table(cases, "title")
    first, second = report.rows[:2]
    assert (first["case"], first["against"], first["ran on"], first["% of floor"]) == (
        "case",
        "a",
        "cpu, reference",
        "50",
    )
    assert (second["case"], second["against"], second["setup s"]) == ("", "b", "12.3")
    assert report.notes == ("case, other: remark",), "cases with the same remark share it"


def test_geometric_means() -> None:
    """Of the fastest of their forms over the fastest of ours; cases outside any group do not count."""

    def case(name: str, ratios: dict[str, float], **more: Any) -> dict[str, Any]:
        info = {"subject": "ours", "ratios": {other: {"median": r} for other, r in ratios.items()}, **more}
        return {"name": f"test_{name}", "extra_info": info}

    group: dict[str, Any] = {"group": "layers", "means": {"eager": ["nchw", "nhwc"], "absent": ["x"]}}
    cases = [
        case("a", {"nchw": 4.0, "nhwc": 2.0}, **group),
        case("b", {"nchw": 4.0, "nhwc": 6.0, "ours too": 0.5}, ours=["ours", "ours too"], **group),
        case("c", {"nchw": 100.0}),
    ]
    (row,) = load("report").means(cases).rows
    assert row == {"group": "layers", "against": "eager", "cases": 2, "geometric mean": "4.00x", "least": "2.00x (a)"}
    assert load("report").means(cases[2:]) is None


# ---- peers -------------------------------------------------------------------------------------------------------------


class Attends(torch.nn.Module):
    """Two outputs, of which one takes an op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x).relu()
        return y, ops.contextual_attention(y, y, mask, norm="sum_eps")


@pytest.fixture
def attends() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 4:10, 4:12] = 1
    return recipe.fill(Attends()).eval(), (recipe.image("photo", 1, 3, 16, 24), mask)


def prepared(builders: dict[str, Any], network: Any, inputs: Any, **options: Any) -> Any:
    ported = {"contextual_attention": load("bench_contextual_attention").ported}
    with torch.no_grad():
        return load("peers").prepare(builders, network, inputs, network(*inputs), ported=ported, **options)


@pytest.mark.parametrize("name", ["channels-last", "torchscript", "onnxruntime", "openvino"])
def test_peers_compute_the_network(name: str, attends: Any) -> None:
    """Including one that calls an op of ours, which they get as the public networks write it."""
    for package in {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}.get(name, ()):
        pytest.importorskip(package)
    network, inputs = attends
    with dispatch.launches() as heard:
        found = prepared({name: load("peers").PEERS[name]}, network, inputs, tolerance=1e-5)
    assert found.refused == {}
    assert found.seconds[name] > 0
    assert [launch.backend for launch in heard if launch.op != "contextual_attention"] == []
    with dispatch.launches() as heard, torch.no_grad():
        results = found.candidates[name]()
    assert not heard, "a peer runs ops of ours"
    assert load("peers").difference(results, network(*inputs)) < 1e-5


def test_peers_that_cannot_are_reported(attends: Any) -> None:
    def fails(network: Any, inputs: Any) -> Any:
        raise RuntimeError(
            "\nCheck 'false' failed at some/file.cpp:1:\n\x1b[96mno operator fft in /a/b/model.onnx\nmore"
        )

    def missing(network: Any, inputs: Any) -> Any:
        return load("peers")._package("no_such_engine")

    def wrong(network: Any, inputs: Any) -> Any:
        return lambda: [1.01 * y for y in network(*inputs)]

    def another_shape(network: Any, inputs: Any) -> Any:
        return lambda: network(*inputs)[:1]

    builders = {"fails": fails, "missing": missing, "wrong": wrong, "another shape": another_shape}
    found = prepared(builders, *attends)
    assert found.candidates == {}
    assert found.notes == [
        "fails: cannot run, RuntimeError: no operator fft in model.onnx",
        "missing: not run, no package no_such_engine (pip install 'inpaintrt[peers]')",
        "wrong: not timed, its result differs by 0.01 (relative RMS)",
        "another shape: not timed, its result differs by inf (relative RMS)",
    ]


def test_a_network_that_keeps_an_op_of_ours_is_reported() -> None:
    class Gates(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.gated_activation(x)

    with dispatch.launches() as heard:
        found = prepared({"torchscript": load("peers").PEERS["torchscript"]}, Gates(), (torch.ones(1, 4, 8, 8),))
        found.candidates["torchscript"]()
    (why,) = found.notes
    assert "calls gated_activation, for which no form in torch's own operations is known" in why
    assert {launch.backend for launch in heard[1:]} == {"reference"}, "a peer was given a kernel of ours"


def test_measuring_is_the_default_only_where_asked_for() -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--benchmark-disable" in root["addopts"]
    own = configparser.ConfigParser()
    own.read(BENCHMARKS / "pytest.ini")
    assert "--benchmark-disable" not in own["pytest"]["addopts"]


def test_smoke_run() -> None:
    """The options of CI's smoke stage, on three cases: checked once, nothing timed."""
    done = pytest_in(ROOT, "benchmarks", "-k", "gated_activation and (64-fp32 or training)", "--benchmark-disable")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
    assert "against" not in done.stdout, "a table without measurements"


def test_options_that_contradict_each_other() -> None:
    done = pytest_in(ROOT, "benchmarks", "--irt-save", "--benchmark-json=x.json", "--collect-only")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "give one of them" in done.stderr

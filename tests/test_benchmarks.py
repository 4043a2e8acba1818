"""The benchmarks' front door: they cannot rot, they reject wrong results, and what they write is complete."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from inpaintrt.testing import machine

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
    """Known times: one candidate sleeps twice as long as the other."""
    versus({"eager": lambda: time.sleep(0.1), "inpaintrt": lambda: time.sleep(0.05)}, rounds=2, check=False)


def test_without_truth(versus):
    versus(setup()[1], rounds=2)


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
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


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
    assert "3 failed, 3 passed" in output
    for message in (
        "inpaintrt: max error",
        r"inpaintrt differs from eager by [\d.e-]+ \(relative RMS\)",
        "other: max error",
    ):
        assert re.search(message, output)
    assert [b["name"] for b in results["benchmarks"]] == ["test_right", "test_sleepers", "test_without_truth"]


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
    assert found["stats"]["median"] == pytest.approx(0.05, rel=0.5)


def test_the_machine_is_named_and_the_host_is_not(results: dict[str, Any]) -> None:
    assert results["machine_info"]["machine"] == machine.machine_id()
    assert "node" not in results["machine_info"]
    assert results["floors"]["cpu_float32"]["gemm_flops_per_s"] > 1e9


def test_the_table_is_printed_and_reported(
    run: tuple[subprocess.CompletedProcess[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    row = r"sleepers\W+\d+\.?\d*\W+\d+\.?\d*\W+eager\W+1\d\d\W+[12]\.\d\dx \[\d\.\d\d, \d\.\d\d\]"
    assert re.search(row, run[0].stdout)
    load_report().main([str(run[1])])
    printed = capsys.readouterr().out
    assert re.search(row, printed)
    assert "| case |" in printed
    assert results_date(run[1]) in printed


def results_date(path: Path) -> str:
    return path.name[:10]


def load_report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_report", BENCHMARKS / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
    report = load_report().table([{"name": "test_case", "extra_info": info}], "title")
    first, second = report.rows
    assert (first["case"], first["against"], first["ran on"], first["% of floor"]) == (
        "case",
        "a",
        "cpu, reference",
        "50",
    )
    assert (second["case"], second["against"], second["setup s"]) == ("", "b", "12.3")
    assert report.notes == ("case: remark",)


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

"""Preferences among the CPU engine's algorithms: what they change and what not, the file they are kept in, `tune`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inpaintrt as irt
from inpaintrt import cli, explanation, ops, tuner
from inpaintrt.runtime import dispatch, native, policy, registry, tuning

F43, F23 = "winograd F(4×4,3×3)", "winograd F(2×2,3×3)"
ROWS = "winograd F(2,7) along rows"
PHASES = "winograd F(4×4,2×2) by phases"


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own; the preferences of the process as they were."""
    monkeypatch.setattr(tuning, "settings", dataclasses.replace(tuning.settings, cache=str(tmp_path / "cache")))
    before = native.preferences()
    native.prefer({})
    yield tuning.path()
    native.prefer(before)


def version() -> str:
    return str(native.library().build_info()["version"])


@pytest.fixture
def layer() -> tuple[Any, ...]:
    """Arguments of a gated 3×3 convolution that Winograd wins by any model of costs."""
    x, weight = torch.randn(1, 32, 24, 24), torch.randn(64, 32, 3, 3) / 17
    return registry.get("gated_conv2d").bind(x, weight, padding=[1, 1, 1, 1])


def run(args: tuple[Any, ...]) -> torch.Tensor:
    with irt.use_backend("cpu"):
        return ops.gated_conv2d(args[0], args[1], padding=1)


def choice(args: tuple[Any, ...]) -> native.Choice:
    found = native.choice("gated_conv2d", args, registry.get("gated_conv2d").out(*args))
    assert found is not None
    return found


# ---- preferences ----------------------------------------------------------------------------------------------------


def test_a_preference_changes_the_algorithm_and_not_the_result(layer):
    usual = choice(layer)
    assert (usual.algorithm, set(usual.algorithms)) == (F43, {"direct", "columns", F43, F23})
    results = {F43: run(layer)}
    for name in ("direct", "columns", F23):
        native.prefer({usual.key: name})
        assert choice(layer).algorithm == name
        assert dispatch.algorithm("gated_conv2d", "cpu", layer) == name
        results[name] = run(layer)
    exact = registry.get("gated_conv2d").run_reference(
        *(a.double() if isinstance(a, torch.Tensor) else a for a in layer)
    )
    for name, result in results.items():
        assert torch.allclose(result.double(), exact, rtol=1e-4, atol=1e-5), name
    errors = {name: float((result - exact).abs().max()) for name, result in results.items()}
    assert len(set(errors.values())) == 4, f"each algorithm rounds in its own way: {errors}"


def test_a_preference_is_for_one_form_of_call(layer):
    key = choice(layer).key
    native.prefer({key: "direct"})
    _, weight, *rest = layer
    for other in (torch.randn(1, 32, 24, 28), torch.randn(2, 32, 24, 24)):
        assert choice((other, weight, *rest)).algorithm == F43
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert choice(layer).key != key
    assert choice(layer).algorithm == F43


def test_ieee_is_stronger_than_a_preference(layer, caplog):
    caplog.set_level(logging.INFO, "inpaintrt")
    with policy.use_ieee():
        usual, result = choice(layer), run(layer)
        assert usual.algorithm == F23
        assert F43 not in usual.algorithms
        native.prefer({usual.key: F43})
        for _ in range(2):
            assert choice(layer).algorithm == F23
        assert torch.equal(run(layer), result)
        native.prefer({usual.key: "direct"})
        assert choice(layer).algorithm == "direct"
    assert choice(layer).algorithm == F43, "precision is part of a call's form"
    (line,) = caplog.messages
    assert F43 in line
    assert "does not compute this" in line


def test_masks_take_part_in_the_choice():
    """Where few pixels of most windows are valid, Winograd's larger forms are ruled out, and that is what is said."""
    x, weight = torch.randn(1, 32, 48, 48), torch.randn(64, 32, 3, 3) / 17
    hole, points = torch.ones(1, 1, 48, 48), torch.ones(1, 1, 48, 48)
    hole[..., 24:, 24:] = 0
    hole[..., 36, 36] = 1  # nine windows of one pixel, which are computed by themselves
    points[..., 24:, :] = 0
    points[..., 26::3, 1::3] = 1
    found = {}
    for name, mask in (("whole", torch.ones(1, 1, 48, 48)), ("hole", hole), ("points", points)):
        args = registry.get("partial_conv2d").bind(x, mask, weight, padding=[1, 1, 1, 1])
        outs = tuple(torch.full_like(out, 7.0) for out in registry.get("partial_conv2d").out(*args))
        found[name] = native.choice("partial_conv2d", args, outs)
        assert all((out == 7).all() for out in outs), "nothing is written"
    assert found["whole"].algorithm == F43
    assert not found["whole"].ieee
    assert found["hole"] == found["whole"]
    assert found["points"].algorithm == F23
    assert found["points"].ieee
    assert found["points"].key != found["whole"].key


@pytest.mark.parametrize("wrong", ["", "no such", "pointwise"])
def test_what_cannot_be_followed_is_left_aside(layer, wrong, caplog):
    caplog.set_level(logging.INFO, "inpaintrt")
    usual, result = choice(layer), run(layer)
    native.prefer({usual.key: wrong})
    assert choice(layer) == usual
    assert torch.equal(run(layer), result)
    assert len(caplog.messages) == 1


def test_ops_without_a_choice():
    y = torch.randn(1, 4, 3, 3)
    args = registry.get("gated_activation").bind(y)
    assert native.choice("gated_activation", args, registry.get("gated_activation").out(*args)) is None
    assert dispatch.algorithm("gated_activation", "cpu", args) == ""
    empty = registry.get("gated_conv2d").bind(torch.randn(0, 3, 4, 4), torch.randn(4, 3, 3, 3))
    assert dispatch.algorithm("gated_conv2d", "cpu", empty) == "", "nothing is computed"
    for op, backend in (("gated_conv2d", "reference"), ("gated_conv2d_backward", "cpu")):
        assert dispatch.algorithm(op, backend, ()) == ""


# ---- the file -------------------------------------------------------------------------------------------------------


def process(cache: Path, program: str) -> str:
    env = {**os.environ, "INPAINTRT_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, "-P", "-c", program], env=env, check=True, capture_output=True, text=True
    ).stdout


def test_a_file_is_read_where_the_library_is_used(file, layer):
    wanted = {choice(layer).key: "direct"}
    file.parent.mkdir()
    file.write_bytes(tuning.content(wanted, version()))
    assert tuning.read(version()) == wanted
    program = "from inpaintrt.runtime import native; print(native.preferences())"
    assert process(file.parent, program) == f"{wanted}\n"
    assert process(file.parent / "none", program) == "{}\n"


def test_info_names_the_file_and_what_is_known(file, layer):
    def told() -> str:
        (row,) = [row for row in irt.info().rows if row["item"] == "preferences"]
        return str(row["value"])

    assert told() == f"none ({file}, which inpaintrt tune writes, is not there)"
    native.prefer({choice(layer).key: "direct"})
    file.parent.mkdir()
    file.write_bytes(tuning.content(native.preferences(), version()))
    assert told() == f"1 form of calls ({file}, which inpaintrt tune writes)"


def test_use_writes_nothing(tmp_path):
    cache = tmp_path / "untouched"
    process(
        cache,
        "import torch; from inpaintrt import ops; ops.fused_conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3))",
    )
    assert not cache.exists()


DAMAGED: dict[str, Callable[[str], bytes]] = {
    "empty": lambda version: b"",
    "cut": lambda version: tuning.content({"a": "b"}, version)[:-5],
    "no text": lambda version: b"\xff\xfe\x00",
    "deep": lambda version: b"[" * 200_000,
    "list": lambda version: b"[]",
    "other schema": lambda version: json.dumps({"schema": 2, "version": version, "preferences": {}}).encode(),
    "other version": lambda version: tuning.content({"a": "b"}, version + ".old"),
    "no preferences": lambda version: json.dumps({"schema": 1, "version": version}).encode(),
    "numbers": lambda version: json.dumps({"schema": 1, "version": version, "preferences": {"a": 1}}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_cannot_be_used_is_left_aside(file, damage, caplog):
    caplog.set_level(logging.INFO, "inpaintrt")
    file.parent.mkdir()
    file.write_bytes(DAMAGED[damage](version()))
    assert tuning.read(version()) == {}
    (line,) = caplog.messages
    assert str(file.parent) in line


@pytest.mark.parametrize("pair", [("a", "x" * 100), ("a", "\ud800")], ids=["long", "surrogate"])
def test_names_that_cannot_be_taken_do_no_harm(file, pair):
    file.parent.mkdir()
    file.write_text(json.dumps({"schema": 1, "version": version(), "preferences": dict([pair])}))
    program = "from inpaintrt.runtime import native; print(native.missing(), native.preferences())"
    assert process(file.parent, program) == " {}\n"


def test_no_file_is_no_news(file, caplog):
    caplog.set_level(logging.INFO, "inpaintrt")
    assert tuning.read(version()) == {}
    file.parent.mkdir()
    assert tuning.read(version()) == {}
    assert not caplog.messages


def test_where_the_file_is(monkeypatch, tmp_path):
    assert tuning.path().parent == tmp_path / "cache"
    monkeypatch.setattr(tuning, "settings", dataclasses.replace(tuning.settings, cache="auto"))
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tuning.folder() == Path("/home/someone/.cache/inpaintrt")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification tells programs to ignore
    assert tuning.folder() == Path("/home/someone/.cache/inpaintrt")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert tuning.folder() == Path("/elsewhere/inpaintrt")
    monkeypatch.setattr(tuning, "settings", dataclasses.replace(tuning.settings, cache="~/kept"))
    assert tuning.folder() == Path("/home/someone/kept")


# ---- tune -----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two gated layers alike, one of another size, one that is masked: three forms of call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32, 3, 3) / 17)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ops.gated_conv2d(ops.gated_conv2d(x, self.weight, padding=1), self.weight, padding=1)
        y = ops.gated_conv2d(y[:, :, ::2], self.weight, padding=1)
        mask = torch.ones(1, 1, 1, 1).expand(1, 1, *y.shape[2:])
        return ops.partial_conv2d(y, mask, self.weight, padding=1)[0]


def timed(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float]) -> list[str]:
    """Let `tune` find these times; the algorithms that ran, in order."""
    ran: list[str] = []

    def interleave(candidates: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, list[float]]:
        for name, call in candidates.items():
            call()
            (preferred,) = native.preferences().values()
            assert preferred == name
            ran.append(name)
        return {name: [1e-3 * milliseconds[name]] * (2 * rounds) for name in candidates}

    monkeypatch.setattr(tuner, "interleave", interleave)
    return ran


def test_round_trip(file, monkeypatch):
    ran = timed(monkeypatch, {"direct": 1.0, "columns": 4.0, F43: 3.0, F23: 2.0})
    model, x = Model(), torch.randn(1, 32, 48, 48)
    told: list[str] = []
    report = irt.tune(model, x, rounds=2, progress=told.append)
    assert report.ok
    assert report.columns == tuner.COLUMNS
    assert [row["times"] for row in report.rows] == [2, 1, 1]
    assert [(row["chosen"], row["best"], row["ratio"], row["kept"]) for row in report.rows] == [
        (F43, "direct", 3, True)
    ] * 3
    assert ran == ["direct", "columns", F43, F23] * 3
    assert len(told) == 3
    assert "12" in report.notes[0], "four calls of 3 ms"
    assert str(file) in report.notes[1]
    wanted = {row["call"]: "direct" for row in report.rows}
    assert native.preferences() == tuning.read(version()) == wanted
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    # Measured anew, the usual choice wins for these calls: they are forgotten, and nothing else is.
    file.write_bytes(tuning.content({**wanted, "other": "direct"}, version()))
    timed(monkeypatch, {"direct": 3.0, "columns": 4.0, F43: 1.0, F23: 2.0})
    assert not any(row["kept"] for row in irt.tune(model, x).rows)
    assert native.preferences() == {}
    assert tuning.read(version()) == {"other": "direct"}
    assert "Nothing new" in irt.tune(model, x).notes[1]


def test_small_gains_are_noise(file, monkeypatch):
    timed(monkeypatch, {"direct": 0.96, "columns": 4.0, F43: 1.0, F23: 2.0})
    report = irt.tune(Model(), torch.randn(1, 32, 48, 48))
    assert [(row["best"], row["kept"]) for row in report.rows] == [("direct", False)] * 3
    assert not file.exists()


def test_without_saving_nothing_changes(file, monkeypatch):
    timed(monkeypatch, {"direct": 1.0, "columns": 4.0, F43: 3.0, F23: 2.0})
    native.prefer({"some": "direct"})
    assert all(row["kept"] for row in irt.tune(Model(), torch.randn(1, 32, 48, 48), save=False).rows)
    assert native.preferences() == {"some": "direct"}
    assert not file.exists()


def test_real_times(file):
    with policy.use_ieee():
        report = irt.tune(Model(), torch.randn(1, 32, 12, 12), rounds=1)
    assert report.ok
    for row in report.rows:
        assert row["call"].startswith("convolution float32 32>")
        assert " ieee " in row["call"]
        assert row["chosen"] == F23
        assert row["best"] in (F23, "direct", "columns")
        assert 0 < row["best ms"] <= row["chosen ms"]


def test_a_model_that_fails_leaves_the_preferences(file):
    native.prefer({"some": "direct"})
    with pytest.raises(ValueError, match="channels"):
        irt.tune(Model(), torch.randn(1, 31, 8, 8))
    assert native.preferences() == {"some": "direct"}
    assert not dispatch.observers
    with pytest.raises(ValueError, match="example"):
        irt.tune(Model())


def test_nothing_to_tune(file):
    report = irt.tune(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4))
    assert not report.ok
    assert "No convolution ran on the CPU's engine" in report.notes[0]
    assert "GPU" in report.notes[0]
    assert not file.exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(1, 1, 1, 1).expand(2, 1, 3, 4),
        torch.zeros(2, 6, 8)[:, ::2, 1::3],
        torch.zeros(0, 3, 4),
        torch.zeros(5, dtype=torch.bfloat16),
    ],
    ids=["channels_last", "expanded", "strided", "empty", "bfloat16"],
)
def test_tensors_are_made_again_as_they_were_heard(tensor):
    made = tuner._filled(tuner._form(tensor))
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert (made == 1).all()


# ---- explain and the command line -----------------------------------------------------------------------------------


def test_explain_names_the_algorithms():
    assert explanation._counted(["a", "", "b", "a"]) == "a ×2, b"
    model, x = irt.load("lama_mini"), torch.rand(1, 4, 64, 80)
    irt.accelerate(model, backend="cpu")
    (static,) = (row["algorithm"] for row in irt.explain(model).rows)
    (text,) = (row["algorithm"] for row in irt.explain(model, x).rows)
    assert text.startswith(f"{static}; ")
    names = text.removeprefix(f"{static}; ")
    assert "winograd F(" in names
    assert "pointwise ×" in names
    known = {"pointwise", "direct", "planar", "columns", F43, F23, PHASES, ROWS}
    assert {one.split(" ×")[0] for one in names.split(", ")} <= known, names


def test_the_command(file, capsys):
    assert cli.main(["tune", "lama_mini", "--size", "32x48", "--rounds", "1", "--dry-run"]) == 0
    out = capsys.readouterr()
    assert "convolution float32" in out.out
    assert "inpaintrt: [1/" in out.err
    assert not file.exists()
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    assert "GPU kernels are not tuned yet" in " ".join(capsys.readouterr().out.split())

"""What takes long to make is made once for all processes of a run (`pytest -n`)."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from .cuda import simulation


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` that `make` filled, in this process or another, for which this one then waited."""
    base = factory.getbasetemp()
    if base.name.startswith("popen-"):  # a process of pytest-xdist: its siblings' folders lie beside
        base = base.parent
    folder, finished = base / name, base / f"{name}.finished"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)  # where another process failed to make it
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


def simulator(factory: pytest.TempPathFactory, op: str, entries: Iterable[str]) -> simulation.Simulator:
    """`simulation.build`, once."""
    folder = made_once(factory, f"simulation_{op}", lambda folder: simulation.build(folder, op, entries))
    return simulation.Simulator(folder / f"{op}.so")

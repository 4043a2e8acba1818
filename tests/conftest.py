"""Shared fixtures: devices, levels, and a session summary of which op ran on which backend."""

from __future__ import annotations

import collections
import os
import shutil
import tempfile

import pytest
import torch

CACHE = os.environ["INPAINTRT_CACHE"] = tempfile.mkdtemp(prefix="inpaintrt-")  # not what a developer tuned

from inpaintrt.runtime import policy

ran: collections.Counter[tuple[str, str, str]] = collections.Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the whole test matrix instead of the smoke subset")
    parser.addoption("--part", default="1/1", metavar="K/N", help="every Nth test, from the Kth on")


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = part_of(items, config.getoption("--part"))
    chosen = set(kept)
    if left := [item for item in items if item not in chosen]:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def part_of(items: list, part: str) -> list:
    first, _, each = part.partition("/")
    if not first.isdecimal() or not each.isdecimal() or not 1 <= int(first) <= int(each):
        raise pytest.UsageError(f"--part is {part!r}; accepted: K/N with 1 <= K <= N")
    return items[int(first) - 1 :: int(each)]


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_sessionfinish(session) -> None:
    """Of several processes (`pytest -n`), each tells the one that reports what it ran."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ran"] = list(ran.items())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    for key, count in getattr(node, "workeroutput", {}).get("ran", ()):
        ran[tuple(key)] += count


def pytest_terminal_summary(terminalreporter) -> None:
    if ran:
        terminalreporter.section("op × backend: cases run / refused with a reason")
        for op, backend in sorted({key[:2] for key in ran}):
            terminalreporter.write_line(f"{op} · {backend}: {ran[op, backend, 'ran']} / {ran[op, backend, 'refused']}")


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    before = policy.policy.get()
    yield
    torch.set_num_threads(threads)
    assert policy.policy.get() is before, "a test left a backend policy behind"


@pytest.fixture
def full(request) -> bool:
    return bool(request.config.getoption("--full"))

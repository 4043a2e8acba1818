"""Result files as tables: `python benchmarks/report.py benchmarks/results/<machine>/<date>-<commit>.json [...]`.

Prints Markdown for `docs/performance.md`; `pytest benchmarks/` prints the same rows as plain text when it ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inpaintrt.report import Report

COLUMNS = (
    "case",
    "shape",
    "ran on",
    "ours ms",
    "p95 ms",
    "% of floor",
    "against",
    "theirs ms",
    "ratio [95 %]",
    "setup s",
)


def table(benchmarks: Iterable[Mapping[str, Any]], title: str) -> Report:
    """A row per benchmark and baseline, from the entries of a result file (each with `name` and `extra_info`)."""
    rows: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    for benchmark in benchmarks:
        name, info = benchmark["name"].removeprefix("test_"), benchmark["extra_info"]
        rows += _rows(name, info)
        for note in info["notes"]:
            notes.setdefault(note, []).append(name)
    used = tuple(c for c in COLUMNS if any(row.get(c) not in (None, "") for row in rows))
    return Report(title, used, tuple(rows), notes=tuple(f"{', '.join(names)}: {note}" for note, names in notes.items()))


def means(benchmarks: Iterable[Mapping[str, Any]]) -> Report | None:
    """Geometric means of the ratios over the cases of a group; None where no case belongs to one.

    A case says so by `group`, the group's name; `means`: {what ours is compared with: the candidates that are forms of it},
    of which the fastest counts; and, where it has more than the subject, `ours`: the forms of ours, of which the fastest
    counts too.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for benchmark in benchmarks:
        name, info = benchmark["name"].removeprefix("test_"), benchmark["extra_info"]
        ratios = {info["subject"]: 1.0} | {other: ratio["median"] for other, ratio in info["ratios"].items()}
        ours = min(ratios[form] for form in info.get("ours", [info["subject"]]))
        for against, forms in info.get("means", {}).items():
            if present := [ratios[form] for form in forms if form in ratios]:
                found.setdefault((info["group"], against), {})[name] = min(present) / ours
    rows = [
        {
            "group": group,
            "against": against,
            "cases": len(of_case),
            "geometric mean": f"{statistics.geometric_mean(of_case.values()):.2f}x",
            "least": f"{min(of_case.values()):.2f}x ({min(of_case, key=of_case.__getitem__)})",
        }
        for (group, against), of_case in found.items()
    ]
    return Report("Geometric means", tuple(rows[0]), tuple(rows)) if rows else None


def title(machine: Mapping[str, Any], *more: str) -> str:
    """The line above a table: on what it was measured."""
    gpus = [gpu["name"] for gpu in machine["gpus"][:1]]
    parts = [f"{machine['cpu']} ({machine['machine']}, {machine['isa']})", f"{machine['threads']} threads", *gpus]
    return ", ".join(filter(None, [*parts, f"torch {machine['torch']}", *more]))


def _rows(name: str, info: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The case with its first baseline; further baselines on rows of their own, where the case is left blank."""
    times, subject = info["times"], info["subject"]
    ours = times[subject]
    row: dict[str, Any] = {
        "case": name,
        "shape": "×".join(map(str, info["shape"])),
        "ran on": ", ".join(sorted({backend for found in info["ran"].values() for backend in found})),
        "ours ms": _milliseconds(ours["p50"]),
        "p95 ms": _milliseconds(ours["p95"]),
        "% of floor": "" if info["of_floor"] is None else f"{100 * info['of_floor']:.0f}",
    }
    for other, ratio in info["ratios"].items():
        seconds = info["compile_seconds"].get(other)
        yield dict.fromkeys(COLUMNS, "") | row | {
            "against": other,
            "theirs ms": _milliseconds(times[other]["p50"]),
            "ratio [95 %]": f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]",
            "setup s": "" if seconds is None else f"{seconds:.1f}",
        }  # fmt: skip
        row = {}
    if row:
        yield dict.fromkeys(COLUMNS, "") | row


def _milliseconds(seconds: float) -> str:
    """Three significant digits, which is more than a shared machine gives."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print result files of `pytest benchmarks/` as Markdown tables.")
    parser.add_argument("files", nargs="+", type=Path, help="JSON written by --irt-save or --benchmark-json")
    for path in parser.parse_args(arguments).files:
        found = json.loads(path.read_text())
        commit = found["commit_info"]
        made = f"commit {commit['id'][:8]}{' with changes' if commit['dirty'] else ''}, {found['datetime'][:10]}"
        print(table(found["benchmarks"], title(found["machine_info"], made)).to_markdown(), end="\n\n")
        if summary := means(found["benchmarks"]):
            print(summary.to_markdown(), end="\n\n")


if __name__ == "__main__":
    main()

"""Reports: rows of plain data with one way to print them as a table, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """What `explain`, `verify` and `info` return.

    rows: one mapping per line of the table, all with the keys `columns` (values of any JSON type).
    ok: False when the report says that something is wrong.
    notes: sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    ok: bool = True
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        cells = [list(self.columns)] + [[_text(row.get(c)) for c in self.columns] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]
        right = [all(isinstance(row.get(c), (int, float)) for row in self.rows) for c in self.columns]

        def line(values: Sequence[str]) -> str:
            padded = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)]
            return "  ".join(padded).rstrip()

        ruler = "  ".join("─" * w for w in widths)
        return "\n".join(
            [self.title, "", line(cells[0]), ruler, *map(line, cells[1:]), *([""] if self.notes else []), *self.notes]
        )

    def to_markdown(self) -> str:
        """A GitHub-flavoured table under a bold title."""

        def line(values: Sequence[str]) -> str:
            return "| " + " | ".join(v.replace("|", "\\|") for v in values) + " |"

        rows = [line([_text(row.get(c)) for c in self.columns]) for row in self.rows]
        head = [line(self.columns), line(["---"] * len(self.columns))]
        return "\n".join([f"**{self.title}**", "", *head, *rows, *(f"\n{note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "ok": self.ok, "rows": [dict(row) for row in self.rows], "notes": list(self.notes)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_text, value))
    return str(value)

"""Timings for a person at a terminal: a model or an op against its reference, interleaved in one process.

`benchmarks/` measures more (peers, memory, floors of every layer) and keeps a history; this answers "is it faster
here?".
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inpaintrt as irt

from .report import Report
from .runtime import registry
from .runtime.spec import OpSpec, Sample

COLUMNS = ("case", "reference ms", "accelerated ms", "ratio", "low", "high", "rounds")


def op_names() -> tuple[str, ...]:
    """Ops that `op` can time."""
    from . import ops  # noqa: F401 (registers them)

    return registry.names()


def model(net: nn.Module, *example: Tensor, name: str, backend: str, rounds: int) -> Report:
    """Accelerate `net` in place and time its forward on `example` against the untouched forwards."""
    irt.accelerate(net, backend=backend)

    def accelerated() -> object:
        return net(*example)

    def reference() -> object:
        with irt.disabled():
            return net(*example)

    with torch.no_grad():
        shape = "x".join(map(str, example[0].shape))
        row = _row(f"{name} {shape}", reference, accelerated, rounds)
    return _report(f"{name}: forward", [row])


def op(name: str, *, backend: str, rounds: int) -> Report:
    """Time an op on the layer shapes that its specification names, in float32, against its reference."""
    op_names()
    spec = registry.get(name)
    with torch.no_grad(), irt.use_backend(backend, op=name):
        rows = [_op_row(spec, sample, rounds) for sample in spec.samples("bench")]
    return _report(f"{name}: backend {backend}", rows)


def write_json(path: Path, report: Report) -> None:
    """The report's rows with the machine's identity; an existing file is replaced."""
    from .images import replacing
    from .testing.machine import identity

    data = {"schema": 1, "machine": identity(), **report.to_dict()}
    with replacing(path, overwrite=True) as file:
        file.write(json.dumps(data, indent=2, default=str).encode() + b"\n")


def _op_row(spec: OpSpec, sample: Sample, rounds: int) -> dict[str, Any]:
    from . import ops

    tensors = sample.tensors(torch.Generator().manual_seed(0))
    args = spec.bind(**tensors, **sample.kwargs)
    function = getattr(ops, spec.name)
    return _row(sample.id, lambda: spec.run_reference(*args), lambda: function(**tensors, **sample.kwargs), rounds)


def _row(case: str, reference: Callable[[], object], accelerated: Callable[[], object], rounds: int) -> dict[str, Any]:
    from .testing.timing import compare, interleave

    times = interleave({"reference": reference, "accelerated": accelerated}, rounds=rounds)
    ratio = compare(times["reference"], times["accelerated"])
    medians = (1e3 * statistics.median(times[name]) for name in ("reference", "accelerated"))
    return dict(zip(COLUMNS, (case, *medians, ratio.median, ratio.low, ratio.high, rounds), strict=True))


def _report(title: str, rows: list[dict[str, Any]]) -> Report:
    note = f"ratio above 1: faster than the reference; low to high: 95 % interval; {torch.get_num_threads()} threads"
    return Report(title, COLUMNS, tuple(rows), notes=(note,))

"""`tune`: what is fastest on this machine for each convolution that a model runs, and a file that remembers it.

Kernels choose among their algorithms by a model of costs. This measures where that model is wrong: every algorithm is
timed through the very preferences that the file will hold, on tensors of the sizes and strides that the model used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .report import Report
from .runtime import dispatch, native, registry, tuning
from .runtime.errors import UnsupportedError
from .testing.timing import compare, interleave

COLUMNS = ("call", "times", "chosen", "chosen ms", "best", "best ms", "ratio", "kept")
WORTH = 1.05
"""A preference is kept where it is this many times faster than the model's choice."""


def tune(
    model: Any, *example: Any, rounds: int = 5, save: bool = True, progress: Callable[[str], None] | None = None
) -> Report:
    """Time the algorithms of the CPU's convolutions on a model's own calls, and remember where the usual choice loses.

    The model runs once, under no_grad; each form of call that the engine has several algorithms for is then timed alone,
    algorithms interleaved. Where another than the usual choice is faster by 5 % or more, beyond the noise, it is taken
    from now on: in this process, and with `save` in later ones, by a file in the user's cache folder. A call that is
    measured anew replaces what was known of it. Launch configurations of GPU kernels are not tuned.

    Args:
        model: an accelerated module, or anything callable that runs one on the CPU.
        example: what `model` is called with; sizes and threads other than these stay untuned.
        rounds: of timing, two samples of each algorithm in each.
        save: False measures and changes nothing.
        progress: is told of each call before it is timed.

    Returns: a `Report`, one row per form of call: the usual choice and the best, with their median times; ratio is how
        many times faster the best is. `ok` is False where no call was heard.

    Raises:
        ValueError: there is no example.
        UnsupportedError: this installation has no native library.
    """
    if not example:
        raise ValueError("tune(model, *example) needs an example to run the model on")
    if reason := native.missing():
        raise UnsupportedError("tune", {"cpu": [reason]})
    before = native.preferences()
    native.prefer({})  # what is asked for is the usual choice
    try:
        calls = _heard(model, example)
        rows = []
        for number, call in enumerate(calls, 1):
            if progress:
                progress(f"[{number}/{len(calls)}] {call.choice.key}")
            rows.append(_timed(call, rounds))
    finally:
        native.prefer(before)
    notes = [_note(rows, rounds)]
    if save and rows:
        notes.append(_keep(rows))
    title = f"{type(model).__name__}: convolutions on the CPU"
    return Report(title, COLUMNS, tuple(rows), ok=bool(rows), notes=tuple(notes))


@dataclass(frozen=True)
class _Call:
    op: str
    args: tuple[Any, ...]  # tensors without memory ("meta"), of the sizes, strides and dtypes that were heard
    choice: native.Choice
    times: int  # that the model makes it


def _heard(model: Any, example: tuple[Any, ...]) -> list[_Call]:
    """The calls with several algorithms that the model makes on the CPU, one of each form, in order."""
    found: dict[str, _Call] = {}

    def listen(op: str, backend: str, args: tuple[Any, ...]) -> None:
        if backend != "cpu" or op not in registry.names():
            return
        choice = native.choice(op, args, registry.get(op).out(*args))
        if choice is None or len(choice.algorithms) < 2:
            return
        if known := found.get(choice.key):
            found[choice.key] = replace(known, times=known.times + 1)
            return
        forms = tuple(_form(value) if isinstance(value, Tensor) else value for value in args)
        found[choice.key] = _Call(op, forms, choice, times=1)

    dispatch.observers.append(listen)
    try:
        with torch.no_grad():
            model(*example)
    finally:
        dispatch.observers.remove(listen)
    return list(found.values())


def _form(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _filled(form: Tensor) -> Tensor:
    """A tensor of this form that holds ones: a mask of ones leaves every algorithm a choice. Strides may be 0."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(form.shape, form.stride(), strict=True))
    return torch.ones(max(reach, 0), dtype=form.dtype).as_strided(form.shape, form.stride())


def _timed(call: _Call, rounds: int) -> dict[str, Any]:
    spec, kernel = registry.get(call.op), native.library().cpu_kernel(call.op)
    args = tuple(_filled(value) if isinstance(value, Tensor) else value for value in call.args)
    outs, threads = spec.out(*args), torch.get_num_threads()

    def by(algorithm: str) -> Callable[[], None]:
        def run() -> None:
            native.prefer({call.choice.key: algorithm})
            kernel(args, outs, threads, call.choice.ieee)

        return run

    times = interleave({name: by(name) for name in call.choice.algorithms}, rounds=rounds)
    chosen = call.choice.algorithm
    best = min(times, key=lambda name: median(times[name]))
    ratio = compare(times[chosen], times[best])
    kept = best != chosen and ratio.median >= WORTH and ratio.low > 1
    medians = {name: 1e3 * median(times[name]) for name in (chosen, best)}
    values = (call.choice.key, call.times, chosen, medians[chosen], best, medians[best], ratio.median, kept)
    return dict(zip(COLUMNS, values, strict=True))


def _note(rows: list[dict[str, Any]], rounds: int) -> str:
    if not rows:
        return (
            "No convolution ran on the CPU's engine: accelerate the model, and put it on the CPU. GPU kernels have no "
            "launch configurations to tune yet."
        )
    kept = [row for row in rows if row["kept"]]
    before, after = (sum(row["times"] * row[name] for row in kept) for name in ("chosen ms", "best ms"))
    gain = f"{len(kept)} kept, which take {after:.3g} ms instead of {before:.3g} ms of the model's time"
    return f"Medians of {2 * rounds} samples, interleaved: {gain}."


def _keep(rows: list[dict[str, Any]]) -> str:
    """Prefer what won, in this process and in the file; forget what was preferred for the same calls."""
    version = native.library().build_info()["version"]
    measured = {row["call"] for row in rows}
    won = {row["call"]: row["best"] for row in rows if row["kept"]}

    def merged(known: dict[str, str]) -> dict[str, str]:
        return {key: name for key, name in known.items() if key not in measured} | won

    native.prefer(merged(native.preferences()))
    known, path = tuning.read(version), tuning.path()
    if merged(known) == known:
        return f"Nothing new to remember in {path}."
    from .images import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as file:
        file.write(tuning.content(merged(known), version))
    return f"Remembered in {path}; delete it to undo this."

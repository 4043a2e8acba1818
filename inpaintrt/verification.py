"""`verify`: accelerated against original, part by part and as a whole, on an example of the user's."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import adapters
from .report import Report
from .runtime.dispatch import launches, numerics_of
from .runtime.draws import noted, replayed, seeded
from .runtime.inverse import inverse_note, numpy_inverse
from .runtime.probe import in_double
from .runtime.swap import Adapter, Record, arranged, disabled, policy_of, record_of
from .runtime.wide import Widened
from .testing.compare import Numerics, close_to_truth, flat_tensors

END_TO_END_RMS = 2e-5
END_TO_END_AGREEMENT = 0.9999
COLUMNS = ("part", "adapter", "max error", "rms error", "own rms error", "of limit", "uint8 within 1", "ok")


def verify(model: nn.Module, *example: Any) -> Report:
    """Compare accelerated and original output on `example`: part by part, and the whole model.

    Parts are the swapped modules and, inside deep containers, the layers they are made of; each gets the inputs that the
    original model gives it, and is judged by the library's rule: the error against the original in float64 may be at
    most twice the original's own error plus a rounding band, as maximum and as RMS (12 and 8 times where a part ran a
    Winograd convolution, whose products cancel more). Depth amplifies rounding by chance,
    so deep containers and the whole model may instead meet the end-to-end criterion: relative RMS error up to 2e-5, and
    at least 99.99 % of uint8 values (outputs times 255) within one level of the original's.

    Where a part fails and its original makes two-dimensional inverse FFTs, it is judged once more against the original
    computed by the numpy rule, since this device may follow another one for spectra that are not Hermitian (cuFFT
    does). A part that passes only so is ok, and a note says what the original's own output misses.
    Needs memory for a float64 copy of the model.

    Args:
        model: a torch module; of an application's object, the module that it holds.
        example: the model's positional arguments.

    Returns: a `Report` whose `ok` is False if any row is beyond its limit.

    Raises: `ValueError` without an example, `TypeError` for what is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"verify was given a {type(model).__name__}; accepted: a torch module (of an application's object, the module "
            "that it holds, with that module's arguments)"
        )
    if not example:
        raise ValueError("verify needs an example: the model's positional arguments")
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            judged = list(_judge_parts(model, example))
    finally:
        for module, mode in modes.items():
            module.training = mode
    rows = tuple(row for row, _ in judged)
    notes = [
        "Errors are relative to the largest value of the float64 original; 1 in 'of limit' is what the rule allows."
    ]
    notes += [f"{row['part']}: {note}." for row, note in judged if note]
    if not any(record_of(m) is not None for m in model.modules()):
        notes.append("Nothing is accelerated in this model, so this compares it with itself.")
    title = f"{type(model).__name__}: accelerated against original"
    return Report(title, COLUMNS, rows, all(row["ok"] for row in rows), tuple(notes))


@dataclass(frozen=True)
class _Part:
    path: str
    adapter: str
    deep: bool
    fused: Any
    original: nn.Module


def _parts(model: nn.Module) -> Iterator[_Part]:
    """The pieces of swapped deep containers and other swapped modules, then the containers."""
    containers = []
    for path, module in model.named_modules():
        record = record_of(module)
        if record is None:
            continue
        if record.adapter.deep:
            containers.append(_Part(path, record.adapter.name, True, module, module))
            if getattr(record.adapter, "holds", False):
                continue  # what it contains is swapped by itself
            yield from {id(piece.original): piece for piece in _pieces(path, module, record)}.values()
        else:
            yield _Part(path, record.adapter.name, False, module, module)
    yield from containers


def _run_piece(record: Record, adapter: Adapter, piece: nn.Module, *args: Any) -> Any:
    with policy_of(record):
        return adapter.forward(piece, *args)


def _pieces(path: str, container: nn.Module, record: Record) -> list[_Part]:
    """The layers of a container: the largest modules with a fused form of their own that hold no two such modules.

    A family's layer counts as one, although it holds plain convolutions that have a fused form, too.
    """
    found = []
    for name, child in container.named_children():
        at = f"{path}.{name}" if path else name
        inner = _pieces(at, child, record)
        adapter = next((a for a in adapters.ADAPTERS if not a.deep and a.match(child) is None), None)
        if adapter is not None and adapter.name not in adapters.convolution.GENERIC:
            inner = [piece for piece in inner if piece.adapter not in adapters.convolution.GENERIC]
        if adapter is not None and len(inner) < 2:
            inner = [_Part(at, adapter.name, False, functools.partial(_run_piece, record, adapter, child), child)]
        found += inner
    return found


def _judge_parts(model: nn.Module, example: tuple[Any, ...]) -> Iterator[tuple[dict[str, Any], str]]:
    parts = [part for part in _parts(model) if part.original is not model]
    captured: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured[module] = _clone(arranged(module, args, kwargs)[0])

    handles = [part.original.register_forward_pre_hook(keep, with_kwargs=True) for part in parts]
    try:
        with disabled(), seeded(model, example):
            model(*_clone(example))
    finally:
        for handle in handles:
            handle.remove()
    captured[model] = example
    for part in [*parts, _Part("(model)", _adapter_name(model), True, model, model)]:
        if part.original in captured:  # else not reached by this example
            yield _judge(part, captured[part.original])


def _judge(part: _Part, args: tuple[Any, ...]) -> tuple[dict[str, Any], str]:
    """The row of one part, and a note where it passes only by the numpy rule."""
    with launches() as heard, _kept(part.original), seeded(part.original, args):
        actual = flat_tensors(part.fused(*_clone(args)))
    numerics = numerics_of(heard)
    expected, truth = _original(part.original, args)
    row = _compare(part, actual, truth, expected, numerics)
    if row["ok"]:
        return row, ""
    with numpy_inverse() as inverse:
        by_rule, exact = _original(part.original, args)
    if not inverse.calls or not (judged := _compare(part, actual, exact, by_rule, numerics))["ok"]:
        return row, ""
    return judged, inverse_note(truth, exact)


def _original(module: nn.Module, args: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The original's outputs in its own dtype and in float64, from the same random numbers."""
    with disabled(), _kept(module):
        wide = copy.deepcopy(module).double()
        with seeded(module, args), noted() as random:
            expected = flat_tensors(module(*_clone(args)))
        with _default_double(), seeded(module, args), replayed(random.draws), Widened():
            truth = flat_tensors(wide(*in_double(_clone(args))))
    return expected, truth


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Put back what a forward writes (the vectors of a spectral norm): all runs of a part start from the same state."""
    before = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers()) if not t.requires_grad]
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.data.copy_(value)


@contextlib.contextmanager
def _default_double() -> Iterator[None]:
    """Modules that make constants in their forward run in float64 only so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _compare(
    part: _Part, actual: list[Tensor], truth: list[Tensor], expected: list[Tensor], numerics: Numerics
) -> dict[str, Any]:
    # Indices are numbers that differ by 1 or not at all.
    actual, expected = ([t if t.is_floating_point() else t.float() for t in some] for some in (actual, expected))
    truth = [t.double() for t in truth]
    verdicts = [close_to_truth(a, t, e, numerics=numerics) for a, t, e in zip(actual, truth, expected, strict=True)]
    worst = max(verdicts, key=lambda v: v.share)
    largest = max([t.abs().max().item() for t in truth if t.numel()], default=1.0) or 1.0
    own = max(close_to_truth(e, t, e).rms_error for e, t in zip(expected, truth, strict=True))
    gaps = [((a.double() - e.double()).cpu() * 255).abs() <= 1 for a, e in zip(actual, expected, strict=True)]
    agree = sum(int(g.sum()) for g in gaps) / max(1, sum(g.numel() for g in gaps))
    rms = max(v.rms_error for v in verdicts) / largest
    end_to_end = part.deep and rms <= END_TO_END_RMS and agree >= END_TO_END_AGREEMENT
    return {
        "part": part.path or "(model)",
        "adapter": part.adapter or None,
        "max error": worst.max_error / largest,
        "rms error": rms,
        "own rms error": own / largest,
        "of limit": worst.share,
        "uint8 within 1": agree if part.deep else None,
        "ok": all(v.ok for v in verdicts) or end_to_end,
    }


def _adapter_name(module: nn.Module) -> str:
    record = record_of(module)
    return record.adapter.name if record else ""


def _clone(args: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, args)

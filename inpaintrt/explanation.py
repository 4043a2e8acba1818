"""`explain`: what is accelerated in a model, what is not, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from . import adapters, holders
from .recognition import recognise, refusal
from .report import Report
from .runtime import dispatch
from .runtime.swap import arranged, record_of, why_original

_Launch = tuple[str, str, str]  # op, backend, algorithm
_Call = tuple[tuple[Any, ...], dict[str, Any]]  # what `why_original` takes
COLUMNS = ("module", "class", "adapter", "op", "backend", "algorithm", "why not")


def explain(model: Any, *example: Any) -> Report:
    """What is accelerated and what is not, with reasons.

    With an `example` (the positional arguments of `model`) it runs once under no_grad and adds, per accelerated module,
    the ops that ran with their backends and algorithms, or why this call took the original forward.

    Args:
        model: a torch module, or an application's object that holds one in an attribute.
        example: what `model` is called with.

    Returns: a `Report`; columns module, class, adapter, op, backend, algorithm, "why not".
    """
    modules = list(holders.named_modules(model))
    calls: dict[nn.Module, _Call] = {}
    launched: dict[nn.Module, list[_Launch]] = {}
    if example:
        _run_traced(model, modules, example, calls, launched)
    rows = []
    for path, module in modules:
        record, refused = record_of(module), refusal(module)
        if record is not None:
            why = "the model is in training mode" if module.training else ""
            if example:
                why = why_original(module, *calls[module]) if module in calls else "not called with this example"
            ran = launched.get(module, [])
            ops = [op for op, _, _ in ran] or list(record.adapter.ops)
            backends = [backend for _, backend, _ in ran] or ["torch"]
            algorithm = "; ".join(filter(None, [record.adapter.algorithm, _counted(one for _, _, one in ran)]))
            rows.append(_row(path, module, record.adapter.name, ops, backends, algorithm, why))
        elif refused is not None:
            rows.append(_row(path, module, refused[0], [], ["torch"], "original", refused[1]))
        elif isinstance(module, torch.jit.ScriptModule):
            why = "accelerate was not called, or passed it over; where it can, it makes another model of it"
            rows.append(_row(path, module, adapters.torchscript.NAME, [], ["torch"], "original", why))
    if not rows:
        for path, module in modules:
            if item := recognise(path, module):
                why = item.why_not or "accelerate was not called"
                rows.append(_row(path, module, item.adapter.name, [], ["torch"], "original", why))
    return Report(type(model).__name__, COLUMNS, tuple(rows), notes=tuple(_notes(modules, bool(rows))))


def _notes(modules: list[tuple[str, nn.Module]], recognised: bool) -> list[str]:
    records = {module: record for _, module in modules if (record := record_of(module)) is not None}
    whole = [module for module, record in records.items() if not getattr(record.adapter, "holds", False)]
    covered = {id(p) for module in whole for p in module.parameters()}
    own = [p for _, module in modules for p in module.parameters(recurse=_is_script(module))]
    parameters = {id(p): p.numel() for p in own if not nn.parameter.is_lazy(p)}
    total = sum(parameters.values())
    share = sum(size for key, size in parameters.items() if key in covered) / total if total else 0.0
    fast = len(records)
    notes = [f"{fast} module{'' if fast == 1 else 's'} accelerated, with {share:.1%} of the parameters."]
    if lazy := len({id(p) for p in own} - parameters.keys()):
        notes.append(
            f"{lazy} parameter{'' if lazy == 1 else 's'} of lazy modules have no size yet, and are not counted."
        )
    forced = {record.backend for record in records.values() if record.backend != "auto" and not record.adapter.ops}
    notes += [
        f"backend={name!r} chooses among kernels of ops; these modules use torch's own only." for name in sorted(forced)
    ]
    for path, module in modules:
        if origin := module.__dict__.get("rebuilt_from"):
            given = "is not the object that was given, but rebuilt from its weights"
            notes.append(f"{path or '(model)'} {given}: {origin}.")
        if (record := record_of(module)) is not None and record.note:
            notes.append(f"{path or '(model)'}: {record.note}.")
    if not recognised:
        notes.append(
            f"No module was recognised. Families known: {', '.join(sorted({a.name for a in adapters.ADAPTERS}))}."
        )
    return notes


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)  # whose children are not listed


def _counted(algorithms: Iterable[str]) -> str:
    """Such as "winograd F(4×4,3×3) ×2, pointwise"; ops without a choice of algorithms are left out."""
    counts = Counter(filter(None, algorithms))
    return ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in counts.items())


def _row(
    path: str, module: nn.Module, adapter: str, op: list[str], backend: list[str], algorithm: str, why: str
) -> dict[str, Any]:
    return {
        "module": path or "(model)",
        "class": type(module).__name__,
        "adapter": adapter,
        "op": list(dict.fromkeys(op)) or ["–"],
        "backend": list(dict.fromkeys(backend)),
        "algorithm": algorithm,
        "why not": why or None,
    }


def _run_traced(
    model: Any,
    modules: list[tuple[str, nn.Module]],
    example: tuple[Any, ...],
    calls: dict[nn.Module, _Call],
    launched: dict[nn.Module, list[_Launch]],
) -> None:
    """Run once; note the arguments of swapped modules and the ops launched inside each."""
    active: list[nn.Module] = []

    def listen(op: str, backend: str, args: tuple[Any, ...]) -> None:
        if active:
            launched.setdefault(active[-1], []).append((op, backend, dispatch.algorithm(op, backend, args)))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = arranged(module, args, kwargs)
        active.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        active.pop()

    handles = []
    for _, module in modules:
        if record_of(module) is not None:
            enters = module.register_forward_pre_hook(enter, with_kwargs=True)
            handles += [enters, module.register_forward_hook(leave)]
    dispatch.observers.append(listen)
    try:
        with torch.no_grad():
            model(*example)
    finally:
        dispatch.observers.remove(listen)
        for handle in handles:
            handle.remove()

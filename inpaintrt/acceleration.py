"""Model-level calls: accelerate, restore, explain, verify, refresh."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapters import ADAPTERS
from .report import Report
from .runtime import dispatch
from .runtime.errors import UnsupportedError
from .runtime.library import dispatchers
from .runtime.policy import use_backend
from .runtime.probe import probe as run_probe
from .runtime.swap import Record, disabled, obstacles, record_of, restore_module, swap, why_original
from .testing.compare import close_to_truth, flat_tensors

log = logging.getLogger("inpaintrt")
M = TypeVar("M", bound=nn.Module)
END_TO_END_RMS = 2e-5
END_TO_END_AGREEMENT = 0.9999
PRECISIONS = ("fp32", "ieee", "bf16", "fp16")
_REFUSED = "_inpaintrt_refused"


@dataclass(frozen=True)
class _Found:
    path: str
    module: nn.Module
    adapter: Any
    why_not: str

    @property
    def name(self) -> str:
        return self.path or type(self.module).__name__


def accelerate(
    model: M,
    *,
    backend: str = "auto",
    precision: str = "fp32",
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    probe: bool = True,
    strict: bool = False,
    composited: bool = False,
) -> M:
    """Swap the modules of `model` that have a fused form, in place, and return the same object.

    Nothing that a caller can see changes: parameters, state-dict keys, dtypes, memory layouts and outputs (within the
    tolerance rule of `inpaintrt.testing.compare`) stay. Calling it again re-applies the options. In training mode, or
    while a hook sits on a bypassed child, a swapped module runs its original forward; `explain` says so.

    Args:
        model: any module; containers are swapped where recognised, else what they contain.
        backend: "auto", or a backend that every op inside must use (`UnsupportedError` on the call where it cannot).
        precision: "fp32" (torch's own switches decide about TF32), "ieee" (no TF32: where torch's switches allow it, the
            original forward runs; no Winograd beyond F(2×2)), "bf16"
            (convolutions in bfloat16, spectra in float32), "fp16" where a model survives it (LaMa does not: its spectra
            overflow, so it is refused).
        only, skip: module paths or adapter names, with shell wildcards ("model.*", "lama.*").
        probe: compare original and fused forward on small inputs before keeping a swap.
        strict: raise `UnsupportedError` when a recognised module cannot be swapped.
        composited: a promise that the caller composites the output with the mask; adapters may then skip work that
            cannot reach the hole.

    Raises:
        ValueError: unknown option value, or a pattern that fits no module and no adapter.
        UnsupportedError: with `strict`, or for fp16 on a model that does not survive it.
    """
    with use_backend(backend):
        pass  # the name is checked where all names are
    if precision not in PRECISIONS:
        near = difflib.get_close_matches(precision, PRECISIONS, n=1)
        raise ValueError(
            f"precision is {precision!r}{f'; did you mean {near[0]!r}?' if near else ''} "
            f"Accepted: {', '.join(PRECISIONS)}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model is a TorchScript module, which cannot be changed in place; load its weights into "
            "inpaintrt.models and accelerate that"
        )
    chosen, skipped = _patterns(only), _patterns(skip) or ()
    for pattern in (*(chosen or ()), *skipped):
        _check_pattern(pattern, model)
    recognised = swapped = 0
    inside: set[nn.Module] = set()  # what swapped containers hold; shared modules are visited once by named_modules
    for path, module in model.named_modules():
        item = None if module in inside else _recognise(path, module)
        if item is None or (chosen is not None and not _fits(item, chosen)) or _fits(item, skipped):
            continue
        recognised += 1
        why_not = item.why_not
        if not why_not and precision == "fp16":
            raise UnsupportedError(item.name, {"fp16": ["it overflows in the spectra (use bf16)"]})
        if not why_not:
            swap(module, Record(item.adapter, backend, precision, composited))
            why_not = run_probe(module) if probe else ""
        if why_not:
            restore_module(module)
            module.__dict__[_REFUSED] = (item.adapter.name, why_not)
            if strict:
                restore(model)
                raise UnsupportedError(item.name, {item.adapter.name: [why_not]})
            continue
        module.__dict__.pop(_REFUSED, None)
        inside.update(module.modules())
        swapped += 1
    log.info("%d of %d recognised modules accelerated (see inpaintrt.explain)", swapped, recognised)
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: original classes, nothing left behind. Returns the same object."""
    for module in model.modules():
        restore_module(module)
        module.__dict__.pop(_REFUSED, None)
    return model


def refresh(model: M) -> M:
    """Forget everything derived from the weights of `model` that is kept between calls; returns the same object.

    Needed only after writes that torch cannot see (through `.data` or a numpy view). Folded weights are recomputed on
    each call and need no refresh; backends are looked up again.
    """
    for dispatcher in dispatchers.values():
        dispatcher.clear()
    return model


def explain(model: nn.Module, *example: Any) -> Report:
    """What is accelerated and what is not, with reasons.

    With an `example` (the model's positional arguments) it runs once under no_grad and adds, per accelerated module, the
    ops that ran with their backends, or why this call took the original forward.

    Returns: a `Report`; columns module, adapter, op, backend, algorithm, "why not".
    """
    calls: dict[nn.Module, tuple[Any, ...]] = {}
    launched: dict[nn.Module, list[str]] = {}
    if example:
        _run_traced(model, example, calls, launched)
    rows = []
    for path, module in model.named_modules():
        record = record_of(module)
        refused = module.__dict__.get(_REFUSED)
        if record is not None:
            why = "the model is in training mode" if module.training else ""
            if example:
                why = why_original(module, calls[module], {}) if module in calls else "not called with this example"
            ran = launched.get(module, [])
            rows.append(
                _row(
                    path,
                    module,
                    record.adapter.name,
                    [r.split(":")[0] for r in ran] or list(record.adapter.ops),
                    [r.split(":")[1] for r in ran] or ["torch"],
                    record.adapter.algorithm,
                    why,
                )
            )
        elif refused is not None:
            rows.append(_row(path, module, refused[0], [], ["torch"], "original", refused[1]))
    if not any(record_of(m) for m in model.modules()) and not rows:
        for path, module in model.named_modules():
            if item := _recognise(path, module):
                why = item.why_not or "accelerate was not called"
                rows.append(_row(path, module, item.adapter.name, [], ["torch"], "original", why))
    fast = sum(record_of(m) is not None for m in model.modules())
    covered = {id(p) for m in model.modules() if record_of(m) for p in m.parameters()}
    total = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p in model.parameters() if id(p) in covered) / total if total else 0.0
    notes = [f"{fast} module{'' if fast == 1 else 's'} accelerated, with {share:.1%} of the parameters."]
    forced = {r.backend for m in model.modules() if (r := record_of(m)) and r.backend != "auto" and not r.adapter.ops}
    notes += [
        f"backend={name!r} chooses among kernels of ops; these modules use torch's own only." for name in sorted(forced)
    ]
    if not rows:
        notes.append(f"No module was recognised. Families known: {', '.join(sorted({a.name for a in ADAPTERS}))}.")
    return Report(
        f"{type(model).__name__}",
        ("module", "class", "adapter", "op", "backend", "algorithm", "why not"),
        tuple(rows),
        notes=tuple(notes),
    )


def verify(model: nn.Module, *example: Any) -> Report:
    """Compare accelerated and original output on `example`: part by part, and the whole model.

    Parts are the swapped modules and, inside deep containers, the pieces they are made of; each gets the inputs that the
    original model gives it, and is judged by the library's rule: the error against the original in float64 may be at
    most twice the original's own error plus a rounding band, as maximum and as RMS. Depth amplifies rounding by chance,
    so deep containers and the whole model may instead meet the end-to-end criterion: relative RMS error up to 2e-5, and
    at least 99.99 % of uint8 values (outputs times 255) within one level of the original's.
    Needs memory for a float64 copy of the model.

    Returns: a `Report` whose `ok` is False if any row is beyond its limit.

    Raises: `ValueError` without an example.
    """
    if not example:
        raise ValueError("verify needs an example: the model's positional arguments")
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            rows = list(_verify_rows(model, example))
    finally:
        for module, mode in modes.items():
            module.training = mode
    fast = sum(record_of(m) is not None for m in model.modules())
    notes = [
        "Errors are relative to the largest value of the float64 original; 1 in 'of limit' is what the rule allows."
    ]
    if not fast:
        notes.append("Nothing is accelerated in this model, so this compares it with itself.")
    columns = ("part", "adapter", "max error", "rms error", "own rms error", "of limit", "uint8 within 1", "ok")
    title = f"{type(model).__name__}: accelerated against original"
    return Report(title, columns, tuple(rows), all(row["ok"] for row in rows), tuple(notes))


# ---- parts ----------------------------------------------------------------------------------------------------------


def _recognise(path: str, module: nn.Module) -> _Found | None:
    for adapter in ADAPTERS:
        why_not = adapter.match(module)
        if why_not != "":
            return _Found(path, module, adapter, why_not or next(obstacles(module), ""))
    return None


def _patterns(value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    return None if value is None else (value,) if isinstance(value, str) else tuple(value)


def _fits(item: _Found, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns for name in (item.path, item.adapter.name))


def _check_pattern(pattern: str, model: nn.Module) -> None:
    known = [path for path, _ in model.named_modules()] + [a.name for a in ADAPTERS]
    if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
        near = difflib.get_close_matches(pattern, known, n=1)
        raise ValueError(f"{pattern!r} fits no module and no adapter{f'; did you mean {near[0]!r}?' if near else ''}")


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
    model: nn.Module,
    example: tuple[Any, ...],
    calls: dict[nn.Module, tuple[Any, ...]],
    launched: dict[nn.Module, list[str]],
) -> None:
    """Run once; note the arguments of swapped modules and the ops launched inside each."""
    active: list[nn.Module] = []

    def listen(op: str, backend: str, args: tuple[Any, ...]) -> None:
        if active:
            launched.setdefault(active[-1], []).append(f"{op}:{backend}")

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] = args
        active.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        active.pop()

    handles = []
    for module in model.modules():
        if record_of(module) is not None:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    dispatch.observers.append(listen)
    try:
        with torch.no_grad():
            model(*example)
    finally:
        dispatch.observers.remove(listen)
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Part:
    path: str
    adapter: str
    deep: bool
    fused: Any
    original: nn.Module


def _parts(model: nn.Module) -> Iterator[_Part]:
    """The innermost recognised pieces of every swapped module, then swapped containers."""
    containers = []
    for path, module in model.named_modules():
        record = record_of(module)
        if record is None:
            continue
        if record.adapter.deep:
            containers.append(_Part(path, record.adapter.name, True, module, module))
            for inner, piece in module.named_modules():
                found = [a for a in ADAPTERS if piece is not module and not a.deep and a.match(piece) is None]
                if found and not any(a.match(p) is None for a in ADAPTERS for p in piece.children()):
                    at = f"{path}.{inner}" if path else inner
                    yield _Part(at, found[0].name, False, functools.partial(found[0].forward, piece), piece)
        else:
            yield _Part(path, record.adapter.name, False, module, module)
    yield from containers


def _verify_rows(model: nn.Module, example: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    parts = [part for part in _parts(model) if part.original is not model]
    captured: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        captured[module] = _clone(args)

    handles = [part.original.register_forward_pre_hook(keep) for part in parts]
    try:
        with disabled():
            model(*_clone(example))
    finally:
        for handle in handles:
            handle.remove()
    captured[model] = example
    for part in [*parts, _Part("(model)", _adapter_name(model), True, model, model)]:
        if part.original not in captured:
            continue  # not reached by this example
        args = captured[part.original]
        actual = flat_tensors(part.fused(*_clone(args)))
        with disabled():
            expected = flat_tensors(part.original(*_clone(args)))
            truth = flat_tensors(copy.deepcopy(part.original).double()(*_double(_clone(args))))
        yield _compare(part, actual, truth, expected)


def _compare(part: _Part, actual: list[Tensor], truth: list[Tensor], expected: list[Tensor]) -> dict[str, Any]:
    verdicts = [close_to_truth(a, t, e) for a, t, e in zip(actual, truth, expected, strict=True)]
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
    return tuple(_clone(a) if isinstance(a, tuple) else a.clone() if isinstance(a, Tensor) else a for a in args)


def _double(args: Any) -> Any:
    def one(a: Any) -> Any:
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(_double(a) if isinstance(a, tuple) else one(a) for a in args)

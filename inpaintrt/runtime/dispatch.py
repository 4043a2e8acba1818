"""From a call to a kernel: the life of every op, eager or compiled.

Outputs are allocated (and arguments checked) by the spec; the candidates are the spec's lanes that can run this op on
this device and dtype, computed once; the first whose refusals yield nothing runs. Whatever a kernel then raises
propagates: nothing is retried on another backend.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inpaintrt.testing.compare import DIRECT, Numerics

from . import native, registry
from .errors import KernelError, UnsupportedError
from .policy import Policy, ieee, policy, requested
from .settings import settings
from .spec import Args, Lane, Outputs, as_outputs

log = logging.getLogger("inpaintrt")

Observer = Callable[[str, str, Args], None]
observers: list[Observer] = []
"""Called with (op, backend, arguments) for each launch; `explain` and tests listen. Empty in normal use."""


def algorithm(op: str, backend: str, args: Args) -> str:
    """By which of several algorithms a launch computes what an observer heard of; "" where there are no several."""
    if backend != "cpu" or op not in registry.names():
        return ""
    choice = native.choice(op, args, registry.get(op).out(*args))
    return choice.algorithm if choice else ""


@dataclass(frozen=True)
class Launch:
    op: str
    backend: str
    numerics: Numerics


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """What is launched within this context, in order."""
    heard: list[Launch] = []

    def listen(op: str, backend: str, args: Args) -> None:
        lane = registry.get(op).lanes.get(backend) if op in registry.names() else None
        heard.append(Launch(op, backend, DIRECT if lane is None else lane.numerics(*args)))

    observers.append(listen)
    try:
        yield heard
    finally:
        observers.remove(listen)


def numerics_of(heard: Iterable[Launch]) -> Numerics:
    """What may be asked of a result that these launches made: the widest of their bounds."""
    found = [launch.numerics for launch in heard] or [DIRECT]
    return Numerics(max(n.rms for n in found), max(n.max for n in found))


@dataclass(frozen=True)
class Candidate:
    backend: str
    refuses: Callable[..., Iterator[str]] | None
    numerics: Callable[..., Numerics]
    launch: Callable[[Args, Outputs], None]


class Dispatcher:
    """Runs one op (or its gradient): `name` with `lanes`, or `reference` where no lane fits."""

    def __init__(
        self,
        name: str,
        base: str,
        lanes: Mapping[str, Lane],
        reference: Callable[..., Any],
        out: Callable[..., Outputs],
    ) -> None:
        self.name = name
        self.base = base  # the op whose policy applies: a gradient follows its op
        self.lanes = lanes
        self.reference = reference
        self.out = out
        self._cache: dict[tuple[str, torch.dtype, torch.device], tuple[Candidate, ...]] = {}
        self._absences: dict[tuple[str, torch.dtype, torch.device], tuple[str, ...]] = {}
        self._told: set[tuple[str, ...]] = set()

    def __call__(self, args: Args, key: Tensor, outs: Outputs | None = None) -> Outputs:
        """`args` in schema order; `key` is the tensor whose device and dtype decide (the first tensor argument).

        `outs`: checked tensors to write into, or None to allocate them.
        """
        if outs is None:
            outs = self.out(*args)
        chosen = requested(policy.get(), self.base)
        lookup = (chosen, key.dtype, key.device)
        candidates = self._cache.get(lookup)
        if candidates is None:
            candidates = self._cache[lookup] = tuple(self._candidates(*lookup))
        for candidate in candidates:
            if next(_refusals(candidate, args), None) is None:
                if observers:
                    self._observe(candidate.backend, args)
                try:
                    candidate.launch(args, outs)
                except (MemoryError, torch.OutOfMemoryError) as error:  # callers catch these by type
                    error.add_note(f"in {self.name} on {candidate.backend}, for {describe(args)}")
                    raise
                except Exception as error:
                    call = f"{self.name} on {candidate.backend} failed for {describe(args)}"
                    raise KernelError(f"{call}: {error}") from error
                return outs
        return self._fall_back(chosen, args, key, outs)

    def reasons(self, args: Args, key: Tensor) -> dict[str, list[str]]:
        """Every backend with the sentences that speak against it for this call; an empty list means that it can run."""
        result = {}
        for backend, lane in self.lanes.items():
            lookup = (backend, key.dtype, key.device)
            static = self._absences.get(lookup)
            if static is None:
                static = self._absences[lookup] = tuple(self._static(backend, lane, key.dtype, key.device))
            result[backend] = list(static or _refusals(lane, args))
        return result

    def clear(self) -> None:
        """Forget which backends are present (tests, and after an installation changed under a running process)."""
        self._cache.clear()
        self._absences.clear()
        self._told.clear()

    def _candidates(self, chosen: str, dtype: torch.dtype, device: torch.device) -> Iterator[Candidate]:
        for backend, lane in self.lanes.items():
            if chosen in ("auto", backend) and not self._static(backend, lane, dtype, device):
                yield Candidate(backend, lane.refuses, lane.numerics, _backend(backend).launcher(self.name))

    def _static(self, backend: str, lane: Lane, dtype: torch.dtype, device: torch.device) -> list[str]:
        sentences = []
        if dtype not in lane.dtypes:
            accepted = ", ".join(sorted(str(d).removeprefix("torch.") for d in lane.dtypes))
            sentences.append(f"dtype {str(dtype).removeprefix('torch.')} is not among {accepted}")
        if reason := _backend(backend).missing(self.name, device):
            sentences.append(reason)
        return sentences

    def _fall_back(self, chosen: str, args: Args, key: Tensor, outs: Outputs) -> Outputs:
        if chosen not in ("auto", "reference") and (chosen in self.lanes or self.name == self.base):
            why = self.reasons(args, key).get(chosen, [f"{self.name} has no {chosen} backend"])
            raise UnsupportedError(self.name, {chosen: why})
        if chosen == "auto":
            reasons = self.reasons(args, key)
            if settings.strict:
                raise UnsupportedError(self.name, reasons)
            summary = tuple(f"{backend}: {'; '.join(sentences)}" for backend, sentences in reasons.items())
            if summary not in self._told:
                self._told.add(summary)
                log.info(
                    "%s runs its reference: %s", self.name, " | ".join(summary) or "no backend has a kernel for it"
                )
        if observers:
            self._observe("reference", args)
        # The outputs' strides are a promise (the fake kernel made it), so the reference's result is copied into them.
        for out, value in zip(outs, as_outputs(self.reference(*args)), strict=True):
            out.copy_(value)
        return outs

    def _observe(self, backend: str, args: Args) -> None:
        for observer in tuple(observers):
            observer(self.name, backend, args)


def _refusals(lane: Lane | Candidate, args: Args) -> Iterator[str]:
    if lane.refuses is not None:
        yield from lane.refuses(*args)
    if ieee.get() and lane.numerics(*args) != DIRECT:
        yield "its rounding error is larger than the direct form's, which precision='ieee' does not allow"


def describe(args: Args) -> str:
    """Arguments as text for messages: tensors by shape, dtype, strides and device."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            kind = str(value.dtype).removeprefix("torch.")
            return f"{tuple(value.shape)} {kind} strides {value.stride()} on {value.device}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(one, value)) + "]"
        return repr(value)

    return ", ".join(map(one, args))


def _backend(name: str) -> Any:
    return importlib.import_module(f"inpaintrt.backends.{name}")


__all__ = ["Candidate", "Dispatcher", "Policy", "algorithm", "describe", "launches", "log", "observers"]

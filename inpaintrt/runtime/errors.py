"""Exceptions of the library. Wrong arguments raise `ValueError` or `TypeError`; these cover what is particular to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class InpaintRTError(RuntimeError):
    """Base of the library's own errors."""


class UnsupportedError(InpaintRTError):
    """A backend was asked for by name and cannot run this call.

    `reasons` maps backend names to the sentences that say why not.
    """

    def __init__(self, op: str, reasons: Mapping[str, Sequence[str]]) -> None:
        self.op = op
        self.reasons = {backend: list(sentences) for backend, sentences in reasons.items()}
        lines = [f"{op}: {backend}: {'; '.join(sentences)}" for backend, sentences in self.reasons.items()]
        super().__init__("\n".join(lines) or f"{op}: no backend")

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, dict[str, list[str]]]]:
        return UnsupportedError, (self.op, self.reasons)


class KernelError(InpaintRTError):
    """A kernel failed after its backend had accepted the call. The original exception is the cause."""


class WeightsError(InpaintRTError):
    """A weights file is missing, damaged, or holds another network than the one asked for."""


class ImageError(InpaintRTError):
    """An image or mask file cannot be read, or cannot be filled without changing known pixels."""


class CheckpointError(InpaintRTError):
    """A sampler's checkpoint cannot be written, is damaged, or belongs to another run."""


class Cancelled(InpaintRTError):
    """A sampler was asked to stop, and did so between two calls of the model: after `done` of `calls`."""

    def __init__(self, done: int, calls: int) -> None:
        self.done, self.calls = done, calls
        super().__init__(f"cancelled after {done} of {calls} calls of the model")

    def __reduce__(self) -> tuple[type[Cancelled], tuple[int, int]]:
        return Cancelled, (self.done, self.calls)

"""Which backend the caller asked for: a context, safe across threads and async tasks."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from .settings import BACKENDS, settings

_ALL = ""  # the key that stands for every op
Policy = Mapping[str, str]

ieee: ContextVar[bool] = ContextVar("inpaintrt_ieee", default=False)
"""precision="ieee": kernels whose rounding error has a bound of its own (Winograd) do not take part."""

policy: ContextVar[Policy] = ContextVar("inpaintrt_policy", default={_ALL: settings.backend})  # noqa: B039 (never mutated)


def requested(chosen: Policy, op: str) -> str:
    """The backend asked for: "auto" or a name."""
    return chosen.get(op) or chosen.get(_ALL, "auto")


@contextlib.contextmanager
def use_ieee() -> Iterator[None]:
    """Within this context ops use no kernel that trades rounding error for speed."""
    token = ieee.set(True)
    try:
        yield
    finally:
        ieee.reset(token)


@contextlib.contextmanager
def use_backend(backend: str, *, op: str | None = None) -> Iterator[None]:
    """Run every op, or only `op`, on `backend` ("cpu", "cuda", "cupy", "triton", "reference" or "auto").

    A named backend that cannot run a call raises `UnsupportedError` with all reasons; "auto" takes the first that can.
    Contexts nest; the innermost that names an op decides for it.

    Raises: `ValueError` for an unknown backend or op.
    """
    from .registry import names

    if backend not in BACKENDS:
        raise ValueError(_unknown("backend", backend, BACKENDS))
    if op is not None and op not in names():
        raise ValueError(_unknown("op", op, names()))
    if op is None:
        changed = {_ALL: backend}
    else:
        # The gradient of an op follows the op where it has a kernel there.
        changed = {**policy.get(), op: backend}
    token = policy.set(changed)
    try:
        yield
    finally:
        policy.reset(token)


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}{hint} Accepted: {', '.join(known)}"

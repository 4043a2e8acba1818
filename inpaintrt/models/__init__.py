"""Reference networks in plain PyTorch, with the state-dict layout of the public checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import create, load

__all__ = ["create", "load"]


def __getattr__(name: str) -> Any:
    """Resolved at first use (PEP 562): an adapter that knows one network's layers must not load all networks."""
    if name not in __all__:
        raise AttributeError(f"module 'inpaintrt.models' has no attribute {name!r}")
    from . import loading

    return getattr(loading, name)

"""Reference networks in plain PyTorch, with the state-dict layout of the public checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import create, load

__all__ = ["create", "load"]


def __getattr__(name: str) -> Any:
    """Resolved at first use (PEP 562): an adapter that knows one network's layers must not load all networks."""
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.loading"), name)
    path = f"{__name__}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise AttributeError(f"module 'inpaintrt.models' has no attribute {name!r}") from None

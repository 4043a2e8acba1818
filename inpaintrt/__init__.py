"""inpaintrt: existing PyTorch inpainting models, made fast without changing what they compute.

import inpaintrt as irt
irt.accelerate(model)            # in place; restore(model) undoes it
print(irt.explain(model, x))     # what was swapped, and why the rest was not
print(irt.verify(model, x))      # error against the untouched model
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import models, ops, samplers
    from .acceleration import accelerate, explain, refresh, restore, verify
    from .diagnostics import info
    from .models import load
    from .report import Report
    from .runtime.errors import InpaintRTError, UnsupportedError, WeightsError
    from .runtime.native import empty_cache
    from .runtime.policy import use_backend
    from .runtime.swap import disabled
    from .tuner import tune

# Modules have other names than what they export: importing a submodule sets it as an attribute of the package.
_HOME = {
    "accelerate": "acceleration", "explain": "acceleration", "refresh": "acceleration", "restore": "acceleration",
    "verify": "acceleration", "info": "diagnostics", "load": "models", "Report": "report", "empty_cache": "runtime.native",
    "use_backend": "runtime.policy", "disabled": "runtime.swap", "InpaintRTError": "runtime.errors",
    "UnsupportedError": "runtime.errors", "WeightsError": "runtime.errors", "tune": "tuner",
}  # fmt: skip
_SUBMODULES = ("adapters", "models", "ops", "samplers", "testing", "viz")

__all__ = [
    "InpaintRTError", "Report", "UnsupportedError", "WeightsError", "__version__", "accelerate",
    "disabled", "empty_cache", "explain", "info", "load", "models", "ops", "refresh", "restore", "samplers", "tune",
    "use_backend", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names are resolved at first use (PEP 562), so that importing the package costs almost nothing."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"inpaintrt.{_HOME[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"inpaintrt.{name}")
    else:
        raise AttributeError(f"module 'inpaintrt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Adapters: one file per model family. Containers come before what they contain."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from inpaintrt.runtime.swap import Adapter

if TYPE_CHECKING:
    from . import convolution, deepfill, mat, torchscript

    ADAPTERS: tuple[Adapter, ...]

__all__ = ["ADAPTERS", "convolution", "deepfill", "mat", "torchscript"]

_FAMILIES = (
    "lama", "ipt_image", "ipt", "put", "aotgan", "glcic", "partialconv", "guided", "diffusers_blocks", "mat_attention",
    "contextual_attention", "gated", "migan", "stylegan2", "convolution",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Families are loaded when a model is looked at, not when the library is imported (PEP 562)."""
    if name == "ADAPTERS":
        files = (importlib.import_module(f"{__name__}.{family}") for family in _FAMILIES)
        globals()[name] = tuple(adapter for file in files for adapter in file.ADAPTERS)
        return globals()[name]
    if name in (*_FAMILIES, *__all__):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'inpaintrt.adapters' has no attribute {name!r}")

"""The native library: loaded at first use, and a sentence instead of an exception where it is absent."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ABI = 3


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        from inpaintrt import _C  # torch is imported above: its OpenMP runtime is mapped before ours looks for one
    except ImportError as error:
        if "_C" in str(error):
            return (
                None,
                "the native library is not in this installation (pure-Python build); install with a C++17 compiler",
            )
        return None, f"the native library does not load: {error}"
    found = _C.build_info()["abi"]
    if found != ABI:
        return None, f"the native library has ABI {found}, this package needs {ABI}: reinstall inpaintrt"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None, f"torch {torch.__version__} has no DLPack exchange table; torch 2.11 or newer is needed"
    try:
        _C.cpu_isa()
        _C.bind_tensor_type(torch.Tensor)
    except (ValueError, RuntimeError) as error:
        return None, str(error)
    return _C, ""


def library() -> Any:
    """The extension module; `RuntimeError` with the reason where there is none."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def missing() -> str:
    """Why there is no native library, or an empty string."""
    return _load()[1]


@functools.cache
def cuda_missing() -> str:
    """Why the nvcc-built kernels cannot be used, or an empty string. Loads them at the first call; starts no CUDA."""
    module, reason = _load()
    if module is None:
        return reason
    path = Path(module.__file__ or "").with_name("libinpaintrt_cuda.so")
    if not path.exists():
        return "built without CUDA (INPAINTRT_CUDA=ON with nvcc builds it; the cuda12/cuda13 extras need no nvcc)"
    try:
        module.load_cuda(os.fspath(path))
    except RuntimeError as error:
        return f"{path.name} does not load: {error}"
    return ""


def source_folder() -> Path:
    """Where the installed `.cuh` files are, for compilation at run time."""
    return Path(library().__file__ or "").with_name("csrc")


def empty_cache() -> None:
    """Give the memory that CPU workspaces keep for reuse back to the system."""
    module, _ = _load()
    if module is not None:
        module.empty_cache()

"""The native library: loaded at first use, and a sentence instead of an exception where it is absent."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .policy import ieee

log = logging.getLogger("inpaintrt")
ABI = 4
_preferences: dict[str, str] = {}


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
    if found := tuning.read(_C.build_info()["version"]):
        try:
            _prefer(_C, found)
        except (ValueError, TypeError) as error:
            log.info("preferences are left aside: %s: %s", tuning.path(), error)
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


@dataclass(frozen=True)
class Choice:
    """By which of its algorithms a CPU kernel computes a call."""

    key: str
    """The form of the call: dtype, sizes, threads, instruction set, precision. Preferences go by it."""
    algorithm: str
    algorithms: tuple[str, ...]
    """All that compute it, under the precision asked for."""
    ieee: bool
    """Whether that is "ieee", or the data make it so (masks that leave few valid pixels in a window)."""


def choice(op: str, args: tuple[Any, ...], outs: tuple[Tensor, ...]) -> Choice | None:
    """The choice for a call as `backends.cpu` would launch it now; None where there is one way to compute it, or nothing.

    `outs` are neither read nor written, so they may be empty tensors of the op's `out`.
    """
    kernel = library().cpu_kernel(op)
    found = None if kernel is None else kernel.choice(args, outs, torch.get_num_threads(), ieee.get())
    if found is None:
        return None
    key, algorithms, chosen, as_ieee, refused = found
    if refused:
        _tell_refused(key, preferences().get(key, ""), algorithms[chosen])
    return Choice(key, algorithms[chosen], algorithms, as_ieee)


def preferences() -> dict[str, str]:
    """The algorithms preferred in this process, by key: those of the user's file, unless `prefer` replaced them."""
    library()
    return dict(_preferences)


def prefer(preferences: Mapping[str, str]) -> None:
    """Replace the preferences of this process. One that a call cannot follow is left aside."""
    _prefer(library(), preferences)


def _prefer(module: Any, preferences: Mapping[str, str]) -> None:
    global _preferences
    module.prefer(dict(preferences))
    _preferences = dict(preferences)


@functools.cache
def _tell_refused(key: str, preferred: str, taken: str) -> None:
    log.info("%s: %r does not compute this; %s is taken", key, preferred, taken)


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

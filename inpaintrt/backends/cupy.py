"""The CUDA C++ kernels (csrc/cuda/<op>.cuh) compiled at run time by NVRTC through CuPy, for installations without nvcc.

Geometry, parameters and the instances' C++ names come from the op's launch plan in the native library, the same that the
nvcc-built kernels use. Instances are compiled at their first launch on a device, in about a second; CuPy keeps what it
compiled on disk.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
from typing import Any

import numpy as np
import torch

from inpaintrt.runtime import native
from inpaintrt.runtime.spec import Args, Outputs

from . import Launcher
from .cuda import whole_products, workspace

_CUDA = 2  # DLPack's device type
_OLDEST = (8, 0)
_PLAIN_SHARED = 48 * 1024  # bytes of dynamic shared memory that any kernel may use
_Three = tuple[int, int, int]


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(name)


def missing(op: str, device: torch.device) -> str:
    if device.type != "cuda":
        return f"tensors are on {device}, this backend needs cuda"
    if importlib.util.find_spec("cupy") is None:
        return "the cupy package is not installed (extras cuda12, cuda13)"
    if reason := native.missing():
        return reason
    if native.library().planner(op) is None:
        return f"the native library has no launch plan {op!r}: reinstall inpaintrt"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return f"compute capability {torch.cuda.get_device_capability(device)} is below {_OLDEST[0]}.{_OLDEST[1]}"
    return _compiler_missing()


def launcher(op: str) -> Launcher:
    planner = native.library().planner(op)
    kernels: dict[tuple[str, int], _Kernel] = {}

    def launch(args: Args, outs: Outputs) -> None:
        launches, workspace_bytes = planner(args, outs, _CUDA, whole_products(outs[0].dtype))
        if not launches:
            return
        device = outs[0].get_device()
        with _module("cupy").cuda.Device(device), _stream(_current_stream(device)):
            absent = tuple(dict.fromkeys(entry for entry, *_ in launches if (entry, device) not in kernels))
            if absent:  # all of them, before anything is launched
                kernels.update(((entry, device), kernel) for entry, kernel in _compile(op, absent).items())
            memory = workspace(outs[0], workspace_bytes) if workspace_bytes else None
            pointer = () if memory is None else (np.uintp(memory.data_ptr()),)
            for entry, grid, block, shared_bytes, params, round in launches:
                # A NumPy array of one element is passed by value: the plan's parameter struct, as opaque bytes.
                value = np.frombuffer(params, dtype=np.dtype((np.void, len(params))))
                further = pointer if round is None else (*pointer, np.int32(round))
                kernels[entry, device](grid, block, (value, *further), shared_bytes)

    return launch


class _Kernel:
    """A compiled instance on one device, allowed as much dynamic shared memory as a launch has asked for."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._allowed = _PLAIN_SHARED

    def __call__(self, grid: _Three, block: _Three, args: tuple[Any, ...], shared_bytes: int) -> None:
        if shared_bytes > self._allowed:
            self._function.max_dynamic_shared_size_bytes = shared_bytes
            self._allowed = shared_bytes
        self._function(grid, block, args, shared_mem=shared_bytes)


def source(op: str) -> str:
    """What NVRTC compiles for `op`, with a digest of all headers: CuPy's disk cache is keyed by this text alone."""
    folder = native.source_folder()
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("cuda/*.cuh"), *folder.glob("plan/*.h"))):
        digest.update(path.read_bytes())
    stem = op  # "x_backward" and other variants of x are in x's file
    while stem and not (folder / "cuda" / f"{stem}.cuh").exists():
        stem = stem.rpartition("_")[0]
    return f'// {digest.hexdigest()}\n#include "cuda/{stem}.cuh"\n'


def options() -> tuple[str, ...]:
    """NVRTC options besides the architecture and CUDA's own headers, which CuPy adds."""
    return ("-std=c++17", f"-I{native.source_folder()}")


def _compile(op: str, entries: tuple[str, ...]) -> dict[str, _Kernel]:
    if torch.cuda.is_current_stream_capturing():
        names = ", ".join(entries)
        raise RuntimeError(f"not compiled yet: {names}; a CUDA graph is being captured: call the op once before")
    module = _module("cupy").RawModule(code=source(op), options=options(), name_expressions=entries)
    return {entry: _Kernel(module.get_function(entry)) for entry in entries}


@functools.cache
def _compiler_missing() -> str:
    """Why CuPy cannot compile kernels here, or an empty string: it installs without the compiler and CUDA's headers."""
    try:
        _module("cupy.cuda").nvrtc.getVersion()
        headers = cuda_headers()
    except Exception as error:  # several kinds, for a library that is absent or does not load
        return f"CuPy has no working NVRTC ({error}); the extras cuda12 and cuda13 install it"
    if not headers:
        return "CuPy finds no CUDA headers (cuda_fp16.h); the extras cuda12 and cuda13 install them"
    return ""


def cuda_headers() -> str | None:
    """The folder CuPy takes CUDA's own headers from."""
    return _module("cuda.pathfinder").find_nvidia_header_directory("cudart")  # type: ignore[no-any-return]


class _Foreign:
    """A stream of torch's, in the form that CuPy accepts (the CUDA stream protocol)."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@functools.lru_cache(maxsize=256)
def _stream(pointer: int) -> Any:
    return _module("cupy").cuda.Stream.from_external(_Foreign(pointer))

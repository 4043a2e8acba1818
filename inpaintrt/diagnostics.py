"""What this installation can do, as a report: versions, devices, backends with reasons. Never raises."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .report import Report


def info() -> Report:
    """Versions, CPU and GPU, native library, OpenMP runtimes, settings, and each op's backends with reasons against them."""
    rows: list[dict[str, Any]] = []
    for section in (_versions, _machine, _native, _settings, _backends):
        rows += _guarded(section)
    pools = [row for row in rows if row["item"] == "OpenMP runtime mapped"]
    notes = () if len(pools) <= 1 else ("More than one OpenMP runtime is mapped: their threads compete.",)
    return Report("inpaintrt", ("area", "item", "value"), tuple(rows), ok=not notes, notes=notes)


def mapped_openmp() -> list[str]:
    """Files of OpenMP runtimes in this process's memory map (Linux; empty elsewhere)."""
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}
    except OSError:
        return []
    return sorted(f for f in files if os.path.basename(f).startswith(("libgomp", "libiomp", "libomp")))


def _guarded(section: Callable[[], Iterator[tuple[str, str, Any]]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        rows.extend({"area": area, "item": item, "value": value} for area, item, value in section())
    except Exception as error:  # a report on a broken installation must still come out
        rows.append({"area": section.__name__.strip("_"), "item": "error", "value": f"{type(error).__name__}: {error}"})
    return rows


def _versions() -> Iterator[tuple[str, str, Any]]:
    from . import __version__

    yield "versions", "inpaintrt", __version__
    yield "versions", "python", platform.python_version()
    for name in ("torch", "triton", "numpy", "cupy-cuda12x", "cupy-cuda13x", "pillow"):
        try:
            yield "versions", name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield "versions", name, None


def _machine() -> Iterator[tuple[str, str, Any]]:
    import torch

    yield "machine", "CPU", _cpu_model()
    yield "machine", "cores", os.cpu_count()
    yield "machine", "threads", torch.get_num_threads()
    for runtime in mapped_openmp():
        yield "machine", "OpenMP runtime mapped", runtime
    if not torch.cuda.is_available():
        yield "machine", "GPU", None
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield "machine", f"GPU {index}", f"{properties.name}, sm_{properties.major}{properties.minor}"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _native() -> Iterator[tuple[str, str, Any]]:
    from .runtime import native

    if reason := native.missing():
        yield "native", "library", reason
        return
    library = native.library()
    build = library.build_info()
    yield "native", "library", f"ABI {build['abi']}, {build['compiler']}"
    yield "native", "ISA", f"{library.cpu_isa()} (built for {build['isas']})"
    yield "native", "OpenMP bound", library.openmp_runtime() or "none: serial"
    yield "native", "workspace bytes held", library.arena_bytes()
    yield "native", "CUDA library", native.cuda_missing() or library.cuda_info()
    yield "native", "preferences", _preferences(native.preferences())


def _preferences(known: Mapping[str, str]) -> str:
    from .runtime import tuning

    count = f"{len(known)} form{'' if len(known) == 1 else 's'} of calls" if known else "none"
    return f"{count} ({tuning.path()}, which inpaintrt tune writes{'' if tuning.path().exists() else ', is not there'})"


def _settings() -> Iterator[tuple[str, str, Any]]:
    from dataclasses import asdict

    from .runtime.settings import PREFIX, settings

    for name, value in asdict(settings).items():
        yield "settings", PREFIX + name.upper(), value


def _backends() -> Iterator[tuple[str, str, Any]]:
    import torch

    from . import ops  # noqa: F401 (registers)
    from .runtime import registry

    for name in registry.names():
        spec = registry.get(name)
        for backend in spec.lanes:
            reason = _why_not(name, backend, "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu")
            yield "backends", f"{name} · {backend}", reason or "available"


def _why_not(op: str, backend: str, device: str) -> str:
    import importlib

    import torch

    module = importlib.import_module(f"inpaintrt.backends.{backend}")
    return module.missing(op, torch.device(device))  # type: ignore[no-any-return]

"""Which machine a number was measured on, and what that machine can do at best.

`identity` goes into every result file and names no person, host or path. `floors` are measured, not looked up: the copy
rate and the arithmetic rate that good code reaches here, against which benchmarks report "% of floor".
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inpaintrt._version import __version__
from inpaintrt.runtime import native
from inpaintrt.runtime.spec import Cost

from .timing import synchronizer

_CPU = torch.device("cpu")

# What changes a measurement from outside the program.
_VARIABLES = re.compile(
    r"^((INPAINTRT|OMP|GOMP|KMP|MKL|ONEDNN|DNNL|MALLOC|GLIBC)_\w+|THP_MEM_ALLOC_ENABLE|LD_PRELOAD"
    r"|CUDA_(VISIBLE_DEVICES|LAUNCH_BLOCKING|MODULE_LOADING)|NVIDIA_TF32_OVERRIDE)$"
)


@dataclass(frozen=True)
class Floors:
    """Best rates measured on this machine: bytes per second of a copy (read + written), flops per second of a GEMM."""

    copy_bytes_per_s: float
    gemm_flops_per_s: float

    def seconds(self, cost: Cost) -> float:
        """No code that has to move `cost.bytes` through memory and do `cost.flops` is faster than this.

        Two things can beat it: data that stays in cache, and an algorithm that needs fewer operations than stated.
        """
        return max(cost.bytes / self.copy_bytes_per_s, cost.flops / self.gemm_flops_per_s)


def identity() -> dict[str, Any]:
    """The machine and the software as JSON-ready data; absent things are None."""
    return {
        "machine": machine_id(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "isa": None if native.missing() else native.library().cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "huge_pages": _choice("/sys/kernel/mm/transparent_hugepage/enabled"),
        "governor": _line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "gpus": _gpus(),
        "gpu_driver": _driver(),
        "fp32_on_gpu": {
            "matmul": torch.backends.cuda.matmul.fp32_precision,
            "conv": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        },
        "openmp": openmp_runtimes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "inpaintrt": __version__,
        "native": None if native.missing() else native.library().build_info(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "cupy": _version("cupy-cuda13x") or _version("cupy-cuda12x"),
        "environment": {
            name: _without_folders(os.environ[name]) for name in sorted(filter(_VARIABLES.match, os.environ))
        },
    }


@functools.cache
def machine_id() -> str:
    """A short name for this kind of machine, fit for a folder: CPU, its family and model, usable cores, GPU if any.

    Family and model tell generations apart that virtual machines report under one name ("AMD EPYC").
    """
    parts = [re.sub(r"\(.*?\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", cpu_model()), _generation(), f"{usable_cores()}c"]
    parts += [gpu["name"].removeprefix("NVIDIA ") for gpu in _gpus()[:1]]
    return "-".join(filter(None, (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)))


def cpu_model() -> str:
    """The processor's own name for itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def openmp_runtimes() -> list[str]:
    """OpenMP libraries mapped into this process, each by the last parts of its path. More than one is a fault."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    found = re.findall(r"(/\S*lib(?:g|i|)omp\d*[-.\w]*\.so\S*)", maps.read_text())
    return sorted({"/".join(Path(path).parts[-3:]) for path in found})


def floors(dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> Floors:
    """The machine's best rates for `dtype` on `device`, measured once per process and thread count (0.3 s on a CPU).

    float16 on a CPU has float32's: good code converts, where torch's own float16 product takes ten times as long.
    """
    if device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    threads = torch.get_num_threads()
    return Floors(_copy_rate(device, threads), _gemm_rate(dtype, device, threads))


@functools.cache
@torch.inference_mode()
def _copy_rate(device: torch.device, threads: int) -> float:
    # Kept buffers, since touching fresh memory is a cost of its own; far larger than a core's cache.
    size = 64 << 20
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, samples=50)


@functools.cache
@torch.inference_mode()
def _gemm_rate(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    # The better of a product and a convolution: on AMD, MKL's product reaches two thirds of oneDNN's convolution.
    n = 768 if device.type == "cpu" else 8192
    a, b = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
    product = 2 * n**3 / _best(lambda: torch.mm(a, b), device, samples=25)
    batch, channels, side = (1, 128, 64) if device.type == "cpu" else (32, 512, 64)
    x = torch.ones(batch, channels, side, side, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    weight = torch.ones(channels, channels, 3, 3, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    flops = 2 * 9 * batch * channels * channels * side * side  # padding counted: 3 % too much, in the floor's favour
    return max(product, flops / _best(lambda: torch.conv2d(x, weight, padding=1), device, samples=25))


def _best(call: Callable[[], object], device: torch.device, *, samples: int) -> float:
    """Seconds of the fastest call: a floor asks what the machine can do, not what it usually does."""
    synchronize = synchronizer(device)
    times = []
    for _ in range(samples + 2):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.+)$", path.read_text(), flags=re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else ""


def _generation() -> str:
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"f{family}m{model}" if family and model else ""


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "cc": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in found]


def _driver() -> str | None:
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _line("/proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _choice(path: str) -> str | None:
    found = re.search(r"\[(\w+)\]", _line(path) or "")
    return found[1] if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _without_folders(value: str) -> str:
    """Paths in a variable's value reduced to their last part."""
    return re.sub(r"(?:/[^/:\s]+)+/([^/:\s]*)", r"\1", value)

"""CUDA C++ kernels (csrc/cuda), compiled by nvcc when the package was built."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from inpaintrt.runtime import native
from inpaintrt.runtime.policy import ieee
from inpaintrt.runtime.spec import Args, Outputs

from . import Launcher


def missing(op: str, device: torch.device) -> str:
    if device.type != "cuda":
        return f"tensors are on {device}, this backend needs cuda"
    if reason := native.cuda_missing():
        return reason
    if native.library().cuda_kernel(op) is None:
        return f"the CUDA library has no kernel {op!r}: reinstall inpaintrt"
    info = json.loads(native.library().cuda_info())
    return _driver_too_old(info) or _foreign(info, torch.cuda.get_device_capability(device))


def _driver_too_old(info: dict[str, Any]) -> str:
    """Programs run on any driver of their CUDA's major version or a later one."""
    if info["driver"] // 1000 >= info["runtime"] // 1000:
        return ""
    major, minor = divmod(info["driver"] // 10, 100)
    found = f"the driver found supports CUDA {major}.{minor}" if major else "no driver was found"
    return (
        f"{found}: these kernels were built by nvcc {info['nvcc']} and need driver >= {info['oldest_driver']}; "
        "the extras cuda12 and cuda13 (CuPy) serve others"
    )


def _foreign(info: dict[str, Any], capability: tuple[int, int]) -> str:
    """Machine code runs on GPUs of its major version and at least its minor one; PTX on those and all later ones."""
    major, minor = capability
    native_code = any(arch // 10 == major and arch % 10 <= minor for arch in info["archs"])
    if native_code or info["ptx"] <= 10 * major + minor:
        return ""
    built = ", ".join(map(str, info["archs"]))
    return f"built for sm {built}, this GPU has sm {major}{minor}: rebuild with INPAINTRT_CUDA_ARCHS={major}{minor}"


def launcher(op: str) -> Launcher:
    kernel = native.library().cuda_kernel(op)

    def launch(args: Args, outs: Outputs) -> None:
        kernel(args, outs, workspace, whole_products(outs[0].dtype))

    return launch


def whole_products(dtype: torch.dtype) -> bool:
    """Whether convolutions of float32 may not round to TF32: torch's switch for them at this moment, or precision="ieee".

    Other dtypes have no choice.
    """
    cudnn: Any = torch.backends.cudnn  # its `conv` is made at run time
    return dtype == torch.float32 and (ieee.get() or cudnn.conv.fp32_precision != "tf32")


def workspace(like: Tensor, size: int) -> Tensor:
    """`size` bytes on `like`'s device for the launches of one call.

    The memory belongs to torch's current stream there: it may be dropped once they are on that stream, and while a CUDA
    graph is captured it comes from the graph's own pool.
    """
    return torch.empty(size, dtype=torch.uint8, device=like.device)

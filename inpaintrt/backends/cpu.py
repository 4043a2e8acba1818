"""SIMD kernels in C++ (csrc/cpu), at the best ISA of the machine."""

from __future__ import annotations

import torch

from inpaintrt.runtime import native
from inpaintrt.runtime.policy import ieee
from inpaintrt.runtime.spec import Args, Outputs

from . import Launcher


def missing(op: str, device: torch.device) -> str:
    if device.type != "cpu":
        return f"tensors are on {device}, this backend needs cpu"
    if reason := native.missing():
        return reason
    if native.library().cpu_kernel(op) is None:
        return f"the native library has no CPU kernel {op!r}: reinstall inpaintrt"
    return ""


def launcher(op: str) -> Launcher:
    kernel = native.library().cpu_kernel(op)
    threads, precise = torch.get_num_threads, ieee.get

    def launch(args: Args, outs: Outputs) -> None:
        kernel(args, outs, threads(), precise())

    return launch

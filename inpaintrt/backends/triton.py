"""Triton kernels (kernels/<op>.py): on CUDA, or on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from typing import Any

import torch

from inpaintrt.runtime.policy import ieee
from inpaintrt.runtime.spec import Args, Outputs

from . import Launcher


def interpreting() -> bool:
    """True where `TRITON_INTERPRET=1` makes kernels run in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _module(op: str) -> Any:
    return importlib.import_module(f"inpaintrt.kernels.{op.removesuffix('_backward')}")


def missing(op: str, device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if interpreting():
        return (
            ""
            if device.type == "cpu"
            else "Triton is in interpreter mode (TRITON_INTERPRET=1), which takes CPU tensors"
        )
    if device.type != "cuda":
        return f"tensors are on {device}, this backend needs cuda (or TRITON_INTERPRET=1)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(device)} is below 8.0"
    return ""


def launcher(op: str) -> Launcher:
    module = _module(op)
    launch = module.launch_backward if op.endswith("_backward") else module.launch
    if "precision" not in inspect.signature(launch).parameters:
        return launch  # type: ignore[no-any-return]

    def precise(args: Args, outs: Outputs) -> None:
        """Under precision="ieee" without TF32; else what the kernel finds: torch's switch."""
        launch(args, outs, "ieee" if ieee.get() else None)

    return precise

"""Backends: how a call reaches a kernel. Each is generic over ops; none knows what an op computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from inpaintrt.runtime.spec import Args, Outputs

Launcher = Callable[[Args, Outputs], None]


class Backend(Protocol):
    """A backend module: `cpu`, `cuda`, `cupy` or `triton` in this package."""

    def missing(self, op: str, device: torch.device) -> str:
        """Why no call of `op` on `device` can run here, or an empty string. Asked once per op and device."""

    def launcher(self, op: str) -> Launcher:
        """A function that runs `op`: arguments in schema order, then the allocated outputs it fills."""


NAMES = ("cpu", "cuda", "cupy", "triton")

"""Calls of a chain in CUDA graphs: the first of a kind runs, the second is recorded, and from then on replayed.

A graph holds launches with the addresses they were made with. What differs between calls of one kind is read from tables,
at a number that lies on the device; the samples keep their place. What the host has to do for a call, some hundred launches
of a network, becomes two: setting the number, and the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inpaintrt.runtime.errors import InpaintRTError

from .inputs import Inputs


class Recorded:
    """A step, called with numbers as it would be without graphs.

    Args:
        step: called as step(call, kind), `call` being a number where kind is None, else int64 () on the device.
        device: a GPU.
    """

    def __init__(self, step: Callable[[int | Tensor, str | None], None], device: torch.device) -> None:
        self._step, self._device = step, device
        self._at = torch.zeros((), dtype=torch.int64, device=device)
        self._graphs: dict[str, torch.cuda.CUDAGraph | None] = {}
        # One stream, so that what libraries make for it is there when it is recorded, and one pool of memory: graphs follow
        # each other, and nothing that one makes in it is read by another.
        self._side, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, call: int, kind: str | None) -> None:
        if kind is None:
            self._step(call, None)
            return
        self._at.fill_(call)
        with torch.cuda.device(self._device):
            if kind not in self._graphs:
                self._first(kind)
            else:
                graph = self._graphs[kind] = self._graphs[kind] or self._record(kind)
                graph.replay()

    def _first(self, kind: str) -> None:
        """Whatever a first call makes (kernels compiled, packed weights, libraries' workspaces) must be no part of a graph."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                self._step(self._at, kind)
        finally:
            current.wait_stream(self._side)
        self._graphs[kind] = None

    def _record(self, kind: str) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # What other threads of a server do meanwhile is not recorded and need not stop.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
        )  # fmt: skip
        try:
            # torch.cuda.graph leaves its stream current where recording fails; the context around it does not.
            with torch.cuda.stream(self._side), recording:
                self._step(self._at, kind)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InpaintRTError(
                f"a call of the model cannot be recorded as a CUDA graph: {error}; accepted: a model (and guidance) that "
                "neither reads from the GPU nor copies to it, or cuda_graph=False"
            ) from error
        return graph


def recordable(inputs: Inputs) -> None:
    """Raises: ValueError where no graphs can be recorded."""
    if inputs.image.device.type != "cuda":
        raise ValueError(
            f"cuda_graph is True and image is on {inputs.image.device}; accepted: an image on a CUDA device"
        )
    if inputs.noises is not None:
        raise ValueError("cuda_graph is True and noises is given; accepted: graphs with seeds")

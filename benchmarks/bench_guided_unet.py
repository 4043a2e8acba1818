"""A call of guided-diffusion's 256-pixel UNet, of which a picture takes hundreds: precisions, and calls recorded in a graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import inpaintrt
from inpaintrt import models
from inpaintrt.testing import recipe

REDUCED = 0.1
"""Relative RMS from float32 allowed to a call in bfloat16 or with TF32, whose products have 8 and 11 bits."""

Call = Callable[[], Tensor]


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Torch's switches for TF32, which matter on GPUs only."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


def with_tf32(call: Call) -> Call:
    def switched() -> Tensor:
        with tf32(True):
            return call()

    return switched


def recorded(call: Call) -> Call:
    """The call's launches in a CUDA graph, as `repaint(..., cuda_graph=True)` plays them."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result = call()

    def play() -> Tensor:
        graph.replay()
        return result

    return play


@tf32(False)
@torch.no_grad()
def test_call_256(versus, device):
    """Stock and accelerated, in float32, with TF32 and in bfloat16; on a GPU with and without a graph."""
    options = {"model_channels": 32, "num_head_channels": 16} if versus.smoke else {"num_head_channels": 64}
    side = 64 if versus.smoke else 256
    original = recipe.fill(models.create("guided_unet", **options)).eval().requires_grad_(False).to(device)
    in_float32 = inpaintrt.accelerate(copy.deepcopy(original))
    in_bf16 = inpaintrt.accelerate(copy.deepcopy(original), precision="bf16")
    x = recipe.image("photo", 1, 3, side, side).to(device) * 2 - 1
    t = torch.tensor([500], device=device)

    def eager() -> Tensor:
        with inpaintrt.use_backend("reference"):
            return original(x, t)

    def eager_bf16() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return eager().float()

    def ours() -> Tensor:
        return in_float32(x, t)

    def ours_bf16() -> Tensor:
        return in_bf16(x, t).float()

    candidates = {"eager": eager, "eager bf16": eager_bf16, "inpaintrt": ours, "inpaintrt bf16": ours_bf16}
    if device.type == "cuda":
        candidates |= {"eager tf32": with_tf32(eager), "inpaintrt tf32": with_tf32(ours)}
        candidates |= {f"{name}, graph": recorded(call) for name, call in [*candidates.items()]}
    reduced = [name for name in candidates if "bf16" in name or "tf32" in name]
    versus(
        candidates, tolerances=dict.fromkeys(reduced, REDUCED), rounds=1 if device.type == "cpu" else None, device=device,
        shape=x.shape, model="guided_unet 256", group="guided_unet_256", means={"eager": ["eager"]},
    )  # fmt: skip

"""Whole networks: the untouched model, torch.compile of it with its weights frozen, and the accelerated one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import inpaintrt
from inpaintrt import models
from inpaintrt.runtime.spec import Cost
from inpaintrt.testing import recipe
from inpaintrt.testing.compare import flat_tensors
from inpaintrt.testing.memory import in_fresh_process

SMOKE = (128, 128)


def lama_mini() -> nn.Module:
    return inpaintrt.load("lama_mini")


def big_lama() -> nn.Module:
    """big-lama's shape with recipe weights: its time does not depend on their values."""
    return recipe.fill(models.create("lama", n_blocks=18, base_width=64))


def deepfill_v1() -> nn.Module:
    return recipe.fill(models.create("deepfill_v1"))


def deepfill_v2() -> nn.Module:
    return recipe.fill(models.create("deepfill_v2"))


# name: (how to make it, height and width, rounds; None = as many as the time budget allows)
CASES = {
    "lama_mini": (lama_mini, (400, 600), None),
    "big_lama": (big_lama, (512, 512), 4),
    "big_lama_crop": (big_lama, (456, 560), 4),  # what an editor cuts around a hole: 57×70 at the bottleneck
    "deepfill_v1": (deepfill_v1, (512, 512), 4),
    "deepfill_v2": (deepfill_v2, (512, 512), 4),
}


def masked_photo(model: Any, height: int, width: int) -> Tensor:
    """What the model takes: an image with a rectangular hole, and the mask (1 = hole)."""
    image = recipe.image("photo", 1, 3, height, width)
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 4 : height // 2, width // 3 : 2 * width // 3] = 1
    return model.network_input(image, mask)


def cost(model: nn.Module, x: Tensor) -> Cost:
    """Flops of the convolutions as written (Winograd transforms need fewer); bytes of weights, input and output."""
    with FlopCounterMode(display=False) as counter:
        outputs = flat_tensors(model(x))
    moved = sum(t.nbytes for t in (*model.parameters(), x, *outputs))
    return Cost(counter.get_total_flops(), moved)


def plain(call: Callable[[], Any]) -> Any:
    """Without any kernel of ours: our DeepFill calls the attention op, whose reference is as fast as the ports' code."""
    with inpaintrt.use_backend("reference"):
        return call()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_model(versus, device, name):
    make, size, rounds = CASES[name]
    original = make().eval().to(device)
    accelerated = inpaintrt.accelerate(copy.deepcopy(original))
    x = masked_photo(original, *(SMOKE if versus.smoke else size)).to(device)
    candidates = {"eager": lambda: plain(lambda: original(x)), "inpaintrt": lambda: accelerated(x)}
    if not versus.smoke:
        compiled = versus.compiled(original, x, freezing=device.type == "cpu")
        candidates["compile"] = lambda: plain(compiled)
    versus(candidates, cost=cost(original, x), rounds=rounds, device=device, shape=x.shape, model=name)


def steady(name: str, accelerated: bool, height: int, width: int):
    """Seconds per call, after two calls, in a process that ran nothing else: what a program with one model sees."""
    import time

    import torch

    import inpaintrt
    from inpaintrt.testing import recipe

    torch.set_grad_enabled(False)
    if name == "lama_mini":
        model = inpaintrt.load("lama_mini")
    else:
        model = recipe.fill(inpaintrt.models.create("lama", n_blocks=18, base_width=64)).eval()
    if accelerated:
        inpaintrt.accelerate(model)
    x = recipe.image("photo", 1, 4, height, width)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return times[2:]


@pytest.mark.parametrize("name", ["lama_mini", "big_lama"])
def test_own_process(versus, name):
    """As above, but each candidate alone in fresh processes, in turn.

    In one process the candidates share the allocator's heap: what `accelerate`'s probe frees there spares the eager
    model the page faults of its large intermediates, which a program without inpaintrt pays on every call.
    """
    size = SMOKE if versus.smoke else CASES[name][1]
    if versus.smoke:
        in_fresh_process(steady, "lama_mini", True, *size)
        versus.skip_timing()
        return
    times: dict[str, list[float]] = {"eager": [], "inpaintrt": []}
    for pair in range(4):
        for candidate in ("eager", "inpaintrt") if pair % 2 == 0 else ("inpaintrt", "eager"):
            times[candidate] += in_fresh_process(steady, name, candidate == "inpaintrt", *size)[:4]
    versus.record(times, baseline="eager", shape=(1, 4, *size), model=name, notes=["each candidate in its own process"])

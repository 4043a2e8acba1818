"""Samplers whose calls are replayed from CUDA graphs give the images that calls one by one give; nothing waits in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import inpaintrt as irt
from inpaintrt.runtime.errors import InpaintRTError
from inpaintrt.samplers import Cancelled, Checkpoint, classifier_guidance, loop
from tests.test_samplers_recorded import HOLE, IMAGE, RUNS, WALK, unet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")


def toy(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """One operation for an element at a time: what calls of it give does not depend on which kernels a library chooses."""
    return torch.cat([(0.7 * x).tanh() + t[:, None, None, None] / 5000, x.sin()], 1)


def run(name: str, model: Any, device: str = "cuda", **changed: Any) -> Tensor:
    sampler, options, _ = RUNS[name]
    return sampler(model, IMAGE.to(device), HOLE.to(device), **options | changed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_recorded_calls_give_the_same_image(name: str, accelerated: bool) -> None:
    model = unet().cuda()
    if accelerated:
        irt.accelerate(model)
    torch.testing.assert_close(run(name, model, cuda_graph=True), run(name, model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_replays_of_elementwise_models_are_the_same_bits(name: str) -> None:
    assert torch.equal(run(name, toy, cuda_graph=True), run(name, toy))


def test_guidance_is_recorded() -> None:
    model, weights = irt.accelerate(unet(num_classes=4).cuda()), torch.randn(4, 3 * 64, device="cuda")
    guidance = classifier_guidance(lambda x, t: x.flatten(1) @ weights.mT + t[:, None] / 1000, scale=2.0)
    expected, got = (
        run("repaint", model, labels=[1, 2], guidance=guidance, cuda_graph=recorded) for recorded in (False, True)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("accelerated", [False, True])
def test_nothing_waits_between_the_first_call_and_the_end(
    name: str, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unet().cuda()
    if accelerated:
        irt.accelerate(model)
    expected, looked, check = run(name, model), [], loop._check_finite  # kernels are compiled, and memory is there

    def progress(p: loop.Progress) -> None:
        if p.done < p.calls:  # else the samples were looked at, and this tells so
            torch.cuda.set_sync_debug_mode("error")

    def look(*args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        looked.append(args[1])
        check(*args)

    monkeypatch.setattr(loop, "_check_finite", look)
    try:
        got = run(name, model, progress=progress)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(looked) == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_progress_is_what_the_gpu_has_finished() -> None:
    told: list[loop.Progress] = []

    def slow(x: Tensor, t: Tensor) -> Tensor:
        torch.cuda._sleep(20_000_000)  # cycles, some 10 ms
        return toy(x, t)

    run("repaint", slow, progress=told.append)
    done = [p.done for p in told]
    assert done == sorted(done)
    assert done[0] < 2 < done[-1] == len(WALK.calls)
    assert told[-1].seconds_left == 0


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_is_cancelled_and_resumed(name: str, tmp_path: Any) -> None:
    options = {"cuda_graph": True, "checkpoint": Checkpoint(tmp_path / "run.safetensors")}
    stop = iter([False] * 7 + [True])
    with pytest.raises(Cancelled):
        run(name, toy, cancel=lambda: next(stop), **options)
    assert torch.equal(run(name, toy, **options), run(name, toy))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["read", "copy"])
def test_a_model_that_cannot_be_recorded_leaves_the_stream_as_it_was(fault: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        more = x.mean().item() if fault == "read" else torch.zeros(1).to(x.device)
        return toy(x, t) + 0 * more

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        with pytest.raises(InpaintRTError, match="cannot be recorded as a CUDA graph"):
            run("repaint", model, cuda_graph=True)
        assert torch.cuda.current_stream() == stream
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.equal(run("repaint", toy, cuda_graph=True), run("repaint", toy)), "the next run is recorded"


def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        before = torch.cuda.current_device()
        assert torch.equal(run("repaint", toy, device, cuda_graph=True), run("repaint", toy, device))
        assert torch.cuda.current_device() == before

"""modulated_conv2d's and upfirdn2d's lanes on a GPU: numerics, precision, streams, graphs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.ops.modulated_conv2d import SPEC as MODULATED
from inpaintrt.ops.upfirdn2d import SPEC as RESAMPLED
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.policy import use_backend
from inpaintrt.testing import assert_close_to_truth

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = [MODULATED, RESAMPLED]
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(params=["cuda", "cupy", "triton"])
def lane(request: pytest.FixtureRequest) -> str:
    backend = importlib.import_module(f"inpaintrt.backends.{request.param}")
    if reason := backend.missing("modulated_conv2d", torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"{request.param}: {reason}: not run")
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def arguments(spec: Any, sample: Any, dtype: torch.dtype, memory: torch.memory_format) -> tuple[Any, ...]:
    tensors = sample.tensors(torch.Generator().manual_seed(0))
    filters = ("f", "resample_filter")  # float32 whatever images are
    on_gpu = {name: t.to("cuda", t.dtype if name in filters else dtype) for name, t in tensors.items()}
    on_gpu["x"] = on_gpu["x"].contiguous(memory_format=memory)
    return tuple(spec.bind(**on_gpu, **sample.kwargs))


def forced(lane: str, spec: Any, args: tuple[Any, ...]) -> Tensor:
    """The op on this lane and no other."""
    ran: list[str] = []
    observer = lambda op, backend, args: ran.append(backend)  # noqa: E731
    dispatch.observers.append(observer)
    try:
        with use_backend(lane):
            out: Tensor = getattr(torch.ops.inpaintrt, spec.name)(*args)
    finally:
        dispatch.observers.remove(observer)
    assert ran == [lane]
    return out


def check(spec: Any, out: Tensor, args: tuple[Any, ...]) -> None:
    truth = spec.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
    assert_close_to_truth(out, truth, spec.run_reference(*args))


@pytest.mark.parametrize("memory", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_numerics_of_samples(lane: str, spec: Any, dtype: torch.dtype, memory: torch.memory_format) -> None:
    for sample in (*spec.samples("full"), *spec.samples("bench")):
        args = arguments(spec, sample, dtype, memory)
        check(spec, forced(lane, spec, args), args)


def test_tf32_is_used_where_torch_allows_it(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays within its own rounding of operands, 2⁻¹¹ each."""
    sample = next(s for s in MODULATED.samples("bench") if not s.id.endswith("up"))
    args = arguments(MODULATED, sample, torch.float32, torch.channels_last)
    exact = forced(lane, MODULATED, args)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    rounded = forced(lane, MODULATED, args)
    assert not torch.equal(rounded, exact)
    assert bool((rounded - exact).abs().max() < 0.01 * exact.abs().max())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_results_are_repeatable(lane: str, spec: Any) -> None:
    args = arguments(spec, next(iter(spec.samples("bench"))), torch.float32, torch.contiguous_format)
    first = forced(lane, spec, args)
    assert all(torch.equal(first, forced(lane, spec, args)) for _ in range(20))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_current_stream_is_used_and_not_waited_for(lane: str, spec: Any) -> None:
    args = arguments(spec, next(iter(spec.samples("smoke"))), torch.float32, torch.contiguous_format)
    forced(lane, spec, args)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(400_000_000)
        done = torch.cuda.Event()
        done.record()
        out = forced(lane, spec, args)
        assert not done.query()
    torch.cuda.synchronize()
    check(spec, out, args)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_graph_capture_and_replay(lane: str, spec: Any) -> None:
    """Workspaces belong to the graph's pool."""
    for sample in spec.samples("smoke"):
        args = arguments(spec, sample, torch.float32, torch.contiguous_format)
        if not args[0].numel():
            continue
        forced(lane, spec, args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forced(lane, spec, args)
        for seed in (1, 2):
            args[0].copy_(torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            torch.cuda.synchronize()
            check(spec, out, args)

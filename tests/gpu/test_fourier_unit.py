"""fourier_unit's `cuda` and `cupy` lanes on a GPU: numerics, both forms of the columns, streams, graphs, large tensors.

The truth is computed on the CPU: cuFFT's inverse of spectra that are not Hermitian is what this op exists to avoid.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.fourier_unit import SPEC
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.policy import use_backend
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GIB = 2**30


@pytest.fixture(params=["cuda", "cupy"])
def lane(request: pytest.FixtureRequest) -> str:
    backend = importlib.import_module(f"inpaintrt.backends.{request.param}")
    if reason := backend.missing("fourier_unit", torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"{request.param}: {reason}: not run")
    return str(request.param)


def arguments(
    b: int, c: int, co: int, h: int, w: int, *, dtype: torch.dtype = torch.float32, device: str = "cuda", seed: int = 3
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, c, h, w), (2 * co, 2 * c), (2 * co,), (b, co, h, w))
    x, weight, bias, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    return tuple(t.to(device, dtype) for t in (x, weight / (2 * c) ** 0.5, bias, residual))


def forced(lane: str, args: tuple[Any, ...]) -> Tensor:
    """The op on this lane and no other."""
    ran: list[str] = []
    observer = lambda op, backend, args: ran.append(backend)  # noqa: E731
    dispatch.observers.append(observer)
    try:
        with use_backend(lane):
            out = ops.fourier_unit(*args)
    finally:
        dispatch.observers.remove(observer)
    assert ran == [lane]
    return out


def unfused(lane: str, args: tuple[Any, ...]) -> Tensor:
    """The op with its columns in three launches."""
    (out,) = SPEC.out(*args)
    importlib.import_module(f"inpaintrt.backends.{lane}").launcher("fourier_unit_unfused")(args, (out,))
    return out


def check(out: Tensor, args: tuple[Any, ...]) -> None:
    on_cpu = [None if t is None else t.cpu() for t in args]
    truth = SPEC.run_reference(*(None if t is None else t.double() for t in on_cpu))
    assert_close_to_truth(out.cpu(), truth, SPEC.run_reference(*on_cpu))


@pytest.mark.parametrize("run", [forced, unfused])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numerics_of_layouts(lane: str, layout: str, dtype: torch.dtype, run: Any) -> None:
    for shape in ((2, 7, 5, 21, 30), (2, 33, 40, 64, 35)):
        args = tuple(LAYOUTS[layout](t) for t in arguments(*shape, dtype=dtype))
        check(run(lane, args), args)


@pytest.mark.parametrize("run", [forced, unfused])
@pytest.mark.parametrize("sample", [*SPEC.samples("full"), *SPEC.samples("bench")], ids=lambda sample: sample.id)
def test_numerics_of_samples(lane: str, sample: Any, run: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in sample.shapes.items()}
    tensors["weight"] /= tensors["weight"].shape[1] ** 0.5
    args = SPEC.bind(**{name: t.cuda() for name, t in tensors.items()})
    check(run(lane, args), args)


@pytest.mark.parametrize("n", [*range(1, 65), 101, 257, 361, 625, 1021, 1024, 2187, 3125, 3833, 3840])
def test_numerics_of_lengths(lane: str, n: int) -> None:
    for shape in ((1, 3, 2, n, 5), (1, 2, 3, 5, n)):
        args = arguments(*shape)
        check(forced(lane, args), args)


def test_results_are_repeatable(lane: str) -> None:
    args = arguments(2, 48, 40, 57, 70)
    first = forced(lane, args)
    assert all(torch.equal(first, forced(lane, args)) for _ in range(20))


def test_current_stream_is_used_and_not_waited_for(lane: str) -> None:
    args = arguments(1, 16, 16, 64, 64)
    forced(lane, args)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(400_000_000)
        done = torch.cuda.Event()
        done.record()
        out = forced(lane, args)
        assert not done.query()
    torch.cuda.synchronize()
    check(out, args)


def test_calls_on_two_streams_do_not_share_a_workspace(lane: str) -> None:
    calls = [(arguments(1, 32, 32, 64, 64, seed=seed), torch.cuda.Stream()) for seed in (1, 2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for args, stream in calls:
            with torch.cuda.stream(stream):
                results.append((forced(lane, args), args))
    torch.cuda.synchronize()
    for out, args in results:
        check(out, args)


@pytest.mark.parametrize("run", [forced, unfused])
def test_graph_capture_and_replay(lane: str, run: Any) -> None:
    args = arguments(1, 32, 32, 40, 48)
    run(lane, args)
    torch.cuda.synchronize()
    if run is unfused and lane == "cupy":
        pytest.skip("a launcher of its own has compiled nothing, and compiles nothing during a capture: not run")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(lane, args)
    for seed in (1, 2):
        args[0].copy_(torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        check(out, args)


def test_more_than_2_to_the_31_elements(lane: str) -> None:
    if torch.cuda.mem_get_info()[0] < 48 * GIB:
        pytest.skip("less than 48 GiB of free device memory: not run")
    _, weight, bias, _ = arguments(1, 4, 4, 1, 1, dtype=torch.bfloat16)
    x = torch.empty(40, 4, 3840, 3840, dtype=torch.bfloat16, device="cuda").normal_()  # 2.4e9 elements, 4.7 GB
    out = forced(lane, (x, weight, bias, None))
    for b in (0, -1):
        check(out[b:][:1], (x[b:][:1], weight, bias, None))


def test_second_device(lane: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: not run")
    args = arguments(1, 8, 8, 16, 16, device="cuda:1")
    with torch.cuda.device(0):
        out = forced(lane, args)
        assert torch.cuda.current_device() == 0
    check(out, args)

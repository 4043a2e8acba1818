"""aot_gate's `cuda` and `cupy` lanes on a GPU: numerics, both ways of reading the gate, streams, graphs, large tensors."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.aot_gate import SPEC
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.policy import use_backend
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GIB = 2**30

Args = tuple[Tensor, Tensor, Tensor, float]


@pytest.fixture(params=["cuda", "cupy"])
def lane(request: pytest.FixtureRequest) -> str:
    backend = importlib.import_module(f"inpaintrt.backends.{request.param}")
    if reason := backend.missing("aot_gate", torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"{request.param}: {reason}: not run")
    return str(request.param)


def arguments(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda", seed: int = 3) -> Args:
    generator = torch.Generator().manual_seed(seed)
    x, fuse, gate = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return x, fuse, gate, 1e-9


def forced(lane: str, args: Args) -> Tensor:
    """The op on this lane and no other."""
    ran: list[str] = []
    observer = lambda op, backend, args: ran.append(backend)  # noqa: E731
    dispatch.observers.append(observer)
    try:
        with use_backend(lane):
            out = ops.aot_gate(*args[:3], eps=args[3])
    finally:
        dispatch.observers.remove(observer)
    assert ran == [lane]
    return out


def wide(lane: str, args: Args) -> Tensor:
    """The op with 64-bit offsets."""
    (out,) = SPEC.out(*args)
    importlib.import_module(f"inpaintrt.backends.{lane}").launcher("aot_gate_wide")(args, (out,))
    return out


def check(out: Tensor, args: Args) -> None:
    x, fuse, gate, eps = args
    truth = SPEC.run_reference(x.double(), fuse.double(), gate.double(), eps)
    assert_close_to_truth(out, truth, SPEC.run_reference(*args))


@pytest.mark.parametrize("run", [forced, wide])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numerics_of_layouts(lane: str, layout: str, dtype: torch.dtype, run: Any) -> None:
    for shape in ((2, 7, 21, 30), (2, 40, 64, 35)):
        x, fuse, gate, eps = arguments(*shape, dtype=dtype)
        args = (LAYOUTS[layout](x), LAYOUTS[layout](fuse), LAYOUTS[layout](gate), eps)
        check(run(lane, args), args)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sample", [*SPEC.samples("full"), *SPEC.samples("bench")], ids=lambda sample: sample.id)
def test_numerics_of_samples(lane: str, sample: Any, layout: str) -> None:
    x, fuse, gate, _ = arguments(*sample.shapes["x"])
    args = (LAYOUTS[layout](x), LAYOUTS[layout](fuse), LAYOUTS[layout](gate), sample.kwargs["eps"])
    check(forced(lane, args), args)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_do_not_cancel(lane: str, layout: str) -> None:
    """A mean that dwarfs the noise, an outlier, huge and tiny numbers, a constant, infinity, NaN: a channel each."""
    x, fuse, gate, eps = arguments(1, 8, 90, 131)
    gate[:, 0] = 1e4 + 0.01 * gate[:, 0]
    gate[:, 1, 0, 0] = 1e6
    gate[:, 2] *= 1e30
    gate[:, 3] *= 1e-11
    gate[:, 4] = 12345.678
    gate[:, 5, 3, 3] = torch.inf
    gate[:, 6, 3, 3] = torch.nan
    args = (x, fuse, LAYOUTS[layout](gate), eps)
    check(forced(lane, args), args)


def test_results_are_repeatable(lane: str) -> None:
    args = arguments(2, 48, 157, 170)
    first = forced(lane, args)
    assert all(torch.equal(first, forced(lane, args)) for _ in range(20))


def test_current_stream_is_used_and_not_waited_for(lane: str) -> None:
    args = arguments(1, 16, 64, 64)
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


def test_graph_capture_and_replay(lane: str) -> None:
    args = arguments(1, 32, 64, 64)
    forced(lane, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forced(lane, args)
    for seed in (1, 2):
        args[2].copy_(torch.randn(args[2].shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        check(out, args)


def test_more_than_2_to_the_31_elements(lane: str) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("less than 40 GiB of free device memory: not run")
    x, fuse, gate = (torch.empty(40, 4, 3840, 3840, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3))
    out = forced(lane, (x, fuse, gate, 1e-9))  # 2.4e9 elements, 4.7 GB each
    for b in (0, -1):
        args = (x[b:][:1, :1], fuse[b:][:1, :1], gate[b:][:1, :1], 1e-9)
        check(out[b:][:1, :1], args)


def test_second_device(lane: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: not run")
    args = arguments(1, 8, 16, 16, device="cuda:1")
    with torch.cuda.device(0):
        out = forced(lane, args)
        assert torch.cuda.current_device() == 0
    check(out, args)

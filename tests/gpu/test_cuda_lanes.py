"""The `cuda` and `cupy` lanes on a GPU: numerics, streams, graphs, wide offsets, a second device."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops._shared import ACTIVATIONS
from inpaintrt.ops.gated_activation import SPEC
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.policy import use_backend
from inpaintrt.testing import assert_close_to_truth

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")

OP = "gated_activation"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GIB = 2**30

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda y: y,
    "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "cropped": lambda y: y[:, :, 1:-1, 8:24],
    "every_second": lambda y: y[:, :, ::2, ::2],
    "transposed": lambda y: y.transpose(2, 3),
    "shifted": lambda y: y.flatten()[1 : 1 + y[:, :, 1:].numel()].view(y[:, :, 1:].shape),
    "broadcast": lambda y: y[:1].expand(3, -1, -1, -1),
}


@pytest.fixture(params=["cuda", "cupy"])
def lane(request: pytest.FixtureRequest) -> str:
    backend = importlib.import_module(f"inpaintrt.backends.{request.param}")
    if reason := backend.missing(OP, torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"{request.param}: {reason}: not run")
    return str(request.param)


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 4).to(device, dtype)


def forced(lane: str, y: Tensor, activation: str = "elu", alpha: float | None = None, gain: float = 1.0) -> Tensor:
    """The op on this lane and no other."""
    ran: list[str] = []
    observer = lambda op, backend, args: ran.append(backend)  # noqa: E731
    dispatch.observers.append(observer)
    try:
        with use_backend(lane):
            out = ops.gated_activation(y, activation=activation, alpha=alpha, gain=gain)
    finally:
        dispatch.observers.remove(observer)
    assert ran == [lane]
    return out


def check(out: Tensor, y: Tensor, activation: str = "elu", alpha: float | None = None, gain: float = 1.0) -> None:
    truth = SPEC.run_reference(y.double(), activation, alpha, gain)
    assert_close_to_truth(out, truth, SPEC.run_reference(y, activation, alpha, gain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numerics_of_layouts(lane: str, layout: str, dtype: torch.dtype) -> None:
    y = LAYOUTS[layout](noise(2, 32, 10, 32, dtype=dtype))
    check(forced(lane, y), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 16, 24, 40), (2, 6, 31, 37)], ids=["vector", "scalar"])
def test_numerics_of_activations(lane: str, activation: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    y = noise(*shape, dtype=dtype)
    check(forced(lane, y, activation, None, 1.5), y, activation, None, 1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["elu", "tanh", "silu"])
def test_numerics_over_the_whole_range(lane: str, activation: str, dtype: torch.dtype) -> None:
    """Every half-precision value (and as many floats) as feature, with open gates; then as gate."""
    if dtype is torch.float32:
        values = torch.cat(
            [torch.linspace(-110, 110, 2**15), torch.logspace(-30, 2, 2**14), -torch.logspace(-30, 2, 2**14)]
        )
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values.to("cuda").view(1, 1, 256, 256)
    for y in (
        torch.cat([values, torch.full_like(values, 2.0)], 1),
        torch.cat([torch.full_like(values, 0.7), values], 1),
    ):
        check(forced(lane, y, activation), y, activation)


def test_empty(lane: str) -> None:
    assert forced(lane, noise(0, 4, 3, 3)).shape == (0, 2, 3, 3)


def test_runs_on_the_current_stream(lane: str) -> None:
    """Input arrives late on a side stream; a launch on any other stream would read what was there before."""
    fresh, y = noise(1, 64, 128, 128), torch.zeros(1, 64, 128, 128, device="cuda")
    forced(lane, y)  # compiled and loaded
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y.copy_(fresh)
        out = forced(lane, y)
    stream.synchronize()
    check(out, fresh)


def test_does_not_wait_for_the_device(lane: str) -> None:
    y = noise(1, 64, 64, 64)
    forced(lane, y)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    done = torch.cuda.Event()
    done.record()
    out = forced(lane, y)
    assert not done.query()
    torch.cuda.synchronize()
    check(out, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_capture_and_replay(lane: str, dtype: torch.dtype) -> None:
    y = noise(2, 32, 32, 32, dtype=dtype)
    forced(lane, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forced(lane, y)
    for seed in (1, 2):
        y.copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        check(out, y)


def test_cupy_refuses_to_compile_while_capturing() -> None:
    from inpaintrt.backends import cupy

    if reason := cupy.missing(OP, torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"cupy: {reason}: not run")
    y, out = noise(1, 4, 8, 8), torch.empty(1, 2, 8, 8, device="cuda")
    launch = cupy.launcher(OP)  # a new one has compiled nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.zero_()
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured: call the op once before"):
            launch((y, "elu", None, 1.0), (out,))
    launch((y, "elu", None, 1.0), (out,))
    check(out, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets_give_the_same_bits(lane: str, layout: str, dtype: torch.dtype) -> None:
    y = LAYOUTS[layout](noise(2, 32, 10, 32, dtype=dtype))
    wide = torch.full_like(forced(lane, y), float("nan"))
    launch = importlib.import_module(f"inpaintrt.backends.{lane}").launcher(f"{OP}_wide")
    launch((y, "elu", None, 1.0), (wide,))
    assert torch.equal(wide, forced(lane, y))


def test_more_than_2_to_the_31_elements(lane: str) -> None:
    if torch.cuda.mem_get_info()[0] < 16 * GIB:
        pytest.skip("less than 16 GiB of free device memory: not run")
    y = torch.empty(1, 4, 33000, 33000, dtype=torch.bfloat16, device="cuda").normal_()  # 4.4e9 elements, 8.7 GB
    out = forced(lane, y)
    for rows in (slice(0, 8), slice(16000, 16008), slice(-8, None)):
        check(out[:, :, rows], y[:, :, rows])


def test_second_device(lane: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: not run")
    y = noise(2, 8, 16, 16, device="cuda:1")
    with torch.cuda.device(0):
        out = forced(lane, y)
        assert torch.cuda.current_device() == 0
    check(out, y)


def test_a_wrong_output_is_refused(lane: str) -> None:
    launch = importlib.import_module(f"inpaintrt.backends.{lane}").launcher(OP)
    with pytest.raises(ValueError, match="y must be"):
        launch((noise(1, 4, 2, 2), "elu", None, 1.0), (torch.empty(1, 3, 2, 2, device="cuda"),))

"""window_attention's and window_mask_update's lanes on a GPU: numerics, layouts, streams, graphs, far-apart tensors."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.window_attention import SPEC
from inpaintrt.ops.window_mask_update import SPEC as UPDATE
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.policy import use_backend
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GIB = 2**30


@pytest.fixture(params=["cuda", "cupy", "triton"])
def lane(request: pytest.FixtureRequest) -> str:
    backend = importlib.import_module(f"inpaintrt.backends.{request.param}")
    if reason := backend.missing("window_attention", torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"{request.param}: {reason}: not run")
    return str(request.param)


def noise(*shape: int, seed: int = 0, device: str = "cuda") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


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


def check(out: Tensor, args: tuple[Any, ...], spec: Any = SPEC) -> None:
    """The truth comes from the CPU, where no switch makes products TF32."""
    on_cpu = tuple(t.cpu() if isinstance(t, Tensor) else t for t in args)
    truth = spec.run_reference(*(t.double() if isinstance(t, Tensor) else t for t in on_cpu))
    assert_close_to_truth(out.cpu(), truth, spec.run_reference(*on_cpu))


@pytest.mark.parametrize("spec", [SPEC, UPDATE], ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics_of_samples(lane: str, spec: Any, dtype: torch.dtype) -> None:
    for sample in (*spec.samples("full"), *spec.samples("bench")):
        tensors = sample.tensors(torch.Generator().manual_seed(0))
        args = spec.bind(**{n: t.to("cuda", dtype) for n, t in tensors.items()}, **sample.kwargs)
        check(forced(lane, spec, args), args, spec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numerics_of_layouts(lane: str, layout: str, dtype: torch.dtype) -> None:
    for channels, heads in ((64, 2), (180, 6), (9, 3)):
        q, k, v = (LAYOUTS[layout](noise(2, 32, 16, channels, seed=i).to(dtype)) for i in range(3))
        mask = LAYOUTS[layout]((noise(2, 32, 16, 1, seed=4) > 0).to(dtype))
        for bias in (None, noise(heads, 64, 64, seed=5)):
            args = SPEC.bind(q, k, v, window_size=8, num_heads=heads, shift=3, mask=mask, bias=bias)
            check(forced(lane, SPEC, args), args)


@pytest.mark.parametrize("size", range(1, 17))
def test_numerics_of_window_sizes(lane: str, size: int) -> None:
    for dtype in DTYPES:
        q, k, v = (noise(1, 2 * size, 3 * size, 60, seed=i).to(dtype) for i in range(3))
        mask = (noise(1, 2 * size, 3 * size, 1, seed=6) > -0.5).to(dtype)
        args = SPEC.bind(q, k, v, window_size=size, num_heads=2, shift=size // 3, mask=mask)
        check(forced(lane, SPEC, args), args)


def test_switches_for_tf32_change_nothing(lane: str) -> None:
    q, k, v = (noise(1, 16, 16, 180, seed=i) for i in range(3))
    args = SPEC.bind(q, k, v, window_size=8, num_heads=6)
    before = forced(lane, SPEC, args)
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        after = forced(lane, SPEC, args)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
    assert torch.equal(after, before)
    check(before, args)


def test_values_count_where_weights_are_tiny(lane: str) -> None:
    """The device's own exponential flushes what is smaller than 10⁻³⁸."""
    for size in (4, 12):
        q, k, v = (noise(1, size, size, 8, seed=i) * 0.01 for i in range(3))
        mask = torch.ones(1, size, size, 1, device="cuda")
        mask[0, size - 1, 2] = 0
        values = torch.zeros_like(v)
        values[0, size - 1, 2] = 1e37
        args = SPEC.bind(q, k, values, window_size=size, num_heads=1, mask=mask)
        check(forced(lane, SPEC, args), args)


def test_results_are_repeatable(lane: str) -> None:
    q, k, v = (noise(1, 64, 64, 180, seed=i) for i in range(3))
    args = SPEC.bind(q, k, v, window_size=16, num_heads=6, shift=8)
    first = forced(lane, SPEC, args)
    assert all(torch.equal(first, forced(lane, SPEC, args)) for _ in range(20))


def test_current_stream_is_used_and_not_waited_for(lane: str) -> None:
    q, k, v = (noise(1, 16, 16, 60, seed=i) for i in range(3))
    args = SPEC.bind(q, k, v, window_size=8, num_heads=2)
    forced(lane, SPEC, args)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(400_000_000)
        done = torch.cuda.Event()
        done.record()
        out = forced(lane, SPEC, args)
        assert not done.query()
    torch.cuda.synchronize()
    check(out, args)


def test_graph_capture_and_replay(lane: str) -> None:
    q, k, v = (noise(1, 32, 32, 180, seed=i) for i in range(3))
    mask = (noise(1, 32, 32, 1, seed=3) > 0).float()
    args = SPEC.bind(q, k, v, window_size=8, num_heads=6, shift=4, mask=mask)
    forced(lane, SPEC, args)
    ops.window_mask_update(mask, window_size=8, shift=4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forced(lane, SPEC, args)
        updated = ops.window_mask_update(mask, window_size=8, shift=4)
    for seed in (4, 5):
        mask.copy_((noise(1, 32, 32, 1, seed=seed) > 2).float())
        graph.replay()
        torch.cuda.synchronize()
        check(out, args)
        check(updated, (mask, 8, 4), UPDATE)


def test_images_more_than_2_to_the_31_elements_apart(lane: str) -> None:
    if torch.cuda.mem_get_info()[0] < 20 * GIB:
        pytest.skip("less than 20 GiB of free device memory: not run")
    far = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    q, k, v = (far[i * 2**16 :].as_strided((2, 16, 16, 64), (2**31, 1024, 64, 1)) for i in range(3))
    for i, t in enumerate((q, k, v)):
        t.copy_(noise(2, 16, 16, 64, seed=i))
    args = SPEC.bind(q, k, v, window_size=8, num_heads=2, shift=4)
    check(forced(lane, SPEC, args), args)


def test_second_device(lane: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: not run")
    q, k, v = (noise(1, 8, 8, 60, seed=i, device="cuda:1") for i in range(3))
    args = SPEC.bind(q, k, v, window_size=8, num_heads=2)
    with torch.cuda.device(0):
        out = forced(lane, SPEC, args)
        assert torch.cuda.current_device() == 0
    check(out, args)

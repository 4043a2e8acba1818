"""The convolution ops' `cuda` and `cupy` lanes on a GPU: numerics in each precision, streams, graphs, large tensors.

IEEE float32 and 16-bit results are judged against a float64 truth computed on the GPU; TF32's baseline is cuDNN's TF32.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.runtime import dispatch, registry
from inpaintrt.runtime.policy import use_backend, use_ieee
from inpaintrt.runtime.spec import as_outputs
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")

OPS = ("fused_conv2d", "gated_conv2d", "partial_conv2d")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GIB = 2**30

Args = tuple[Any, ...]


@pytest.fixture(params=["cuda", "cupy"])
def lane(request: pytest.FixtureRequest) -> str:
    backend = importlib.import_module(f"inpaintrt.backends.{request.param}")
    for op in OPS:
        if reason := backend.missing(op, torch.device("cuda", torch.cuda.current_device())):
            pytest.skip(f"{request.param}: {reason}: not run")
    return str(request.param)


@pytest.fixture(autouse=True)
def whole_products() -> Iterator[None]:
    """Kernels and baselines in float32, unless a test says otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(
    op: str, b: int, c: int, co: int, h: int, w: int, *, dtype: torch.dtype = torch.float32, device: str = "cuda"
) -> Args:
    """A 3×3 convolution with every tensor that the op takes."""
    x, weight, bias = noise(b, c, h, w), noise(2 * co, c, 3, 3, seed=1) / (3 * c**0.5), noise(2 * co, seed=2)
    sides, mask = [1, 1, 1, 1], (noise(b, 1, h, w, seed=3) > -0.5).float()
    if op == "gated_conv2d":
        args = registry.get(op).bind(x, weight, bias, padding=sides, gain=1.5)
    elif op == "partial_conv2d":
        args = registry.get(op).bind(x, mask, weight[:co], bias[:co], padding=sides)
    else:
        vectors = {"bias": bias[:co], "scale": bias[co:], "shift": bias[:co] - 1}
        residual = noise(b, co, h, w, seed=4)
        args = registry.get(op).bind(
            x, weight[:co], **vectors, padding=sides, mask=mask, residual=residual, activation="elu"
        )
    return tuple(a.to(device, dtype) if isinstance(a, Tensor) else a for a in args)


def forced(lane: str, op: str, args: Args) -> tuple[Tensor, ...]:
    """The op on this lane and no other."""
    ran: list[str] = []
    observer = lambda op, backend, args: ran.append(backend)  # noqa: E731
    dispatch.observers.append(observer)
    try:
        with use_backend(lane):
            outs = as_outputs(getattr(torch.ops.inpaintrt, op)(*args))
    finally:
        dispatch.observers.remove(observer)
    assert ran == [lane]
    return outs


def check(op: str, outs: tuple[Tensor, ...], args: Args) -> None:
    spec = registry.get(op)
    truths = as_outputs(spec.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args)))
    for out, truth, baseline in zip(outs, truths, as_outputs(spec.run_reference(*args)), strict=True):
        assert_close_to_truth(out, truth, baseline, context=op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_numerics_of_layouts(lane: str, op: str, layout: str, dtype: torch.dtype) -> None:
    for shape in ((2, 7, 5, 21, 30), (2, 48, 40, 64, 35)):
        args = arguments(op, *shape, dtype=dtype)
        args = tuple(LAYOUTS[layout](a) if isinstance(a, Tensor) else a for a in args)
        check(op, forced(lane, op, args), args)


@pytest.mark.parametrize("allow_tf32", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, sample, id=f"{op}-{sample.id}")
        for op in OPS
        for level in ("full", "bench")
        for sample in registry.get(op).samples(level)
    ],
)
def test_numerics_of_samples(lane: str, op: str, sample: Any, dtype: torch.dtype, allow_tf32: bool) -> None:
    if allow_tf32 and dtype != torch.float32:
        pytest.skip("16-bit products have no switch")
    torch.backends.cudnn.allow_tf32 = allow_tf32
    tensors = sample.tensors(torch.Generator().manual_seed(5))
    tensors["weight"] /= max(1, tensors["weight"][0].numel()) ** 0.5
    args = registry.get(op).bind(**{name: t.to("cuda", dtype) for name, t in tensors.items()}, **sample.kwargs)
    check(op, forced(lane, op, args), args)


@pytest.mark.parametrize("op", OPS)
def test_tf32_is_torchs_switch_unless_ieee_forbids_it(lane: str, op: str) -> None:
    args = arguments(op, 1, 64, 64, 64, 64)
    (whole, *_) = forced(lane, op, args)
    torch.backends.cudnn.allow_tf32 = True
    (rounded, *_) = forced(lane, op, args)
    with use_ieee():
        (ieee, *_) = forced(lane, op, args)
    assert torch.equal(ieee, whole)
    assert not torch.equal(rounded, whole)


@pytest.mark.parametrize("op", OPS)
def test_holes_of_a_wide_layer_are_zero(lane: str, op: str) -> None:
    if op != "partial_conv2d":
        pytest.skip("has no holes")
    x, mask, *rest = arguments(op, 1, 64, 128, 96, 96)
    mask[..., 20:60, 30:80], x[..., 25:55, 35:75] = 0, torch.nan
    out, updated = forced(lane, op, (x, mask, *rest))
    assert bool((out.movedim(1, -1)[updated[:, 0] == 0] == 0).all())
    assert not bool(updated[..., 21:59, 31:79].any())


@pytest.mark.parametrize("op", OPS)
def test_results_are_repeatable(lane: str, op: str) -> None:
    args = arguments(op, 2, 48, 136, 57, 70)
    first = forced(lane, op, args)
    assert all(all(map(torch.equal, first, forced(lane, op, args))) for _ in range(20))


@pytest.mark.parametrize("op", OPS)
def test_current_stream_is_used_and_not_waited_for(lane: str, op: str) -> None:
    args = arguments(op, 1, 16, 16, 64, 64)
    forced(lane, op, args)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(400_000_000)
        done = torch.cuda.Event()
        done.record()
        outs = forced(lane, op, args)
        assert not done.query()
    torch.cuda.synchronize()
    check(op, outs, args)


@pytest.mark.parametrize("op", OPS)
def test_calls_on_two_streams_do_not_share_a_workspace(lane: str, op: str) -> None:
    calls = [(arguments(op, 1, 32, co, 64, 64), torch.cuda.Stream()) for co in (24, 40)]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for args, stream in calls:
            with torch.cuda.stream(stream):
                results.append((forced(lane, op, args), args))
    torch.cuda.synchronize()
    for outs, args in results:
        check(op, outs, args)


@pytest.mark.parametrize("op", OPS)
def test_graph_capture_and_replay(lane: str, op: str) -> None:
    args = arguments(op, 1, 32, 32, 40, 48)
    forced(lane, op, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = forced(lane, op, args)
    for seed in (1, 2):
        args[0].copy_(noise(*args[0].shape, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        check(op, outs, args)


@pytest.mark.parametrize("op", OPS)
def test_more_than_2_to_the_31_elements(lane: str, op: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * GIB:
        pytest.skip("less than 24 GiB of free device memory: not run")
    x = torch.empty(40, 4, 3840, 3840, dtype=torch.bfloat16, device="cuda").normal_()  # 2.4e9 elements, 4.7 GB
    values = dict(zip(registry.get(op).signature.parameters, arguments(op, 1, 4, 4, 1, 1, dtype=x.dtype), strict=True))
    del values["x"]
    if "residual" in values:
        values["residual"] = None
    if "mask" in values:
        values["mask"] = (x[:1, :1] > 0).to(x.dtype)
    outs = forced(lane, op, (x, *values.values()))
    for b in (0, -1):
        check(op, tuple(out[b:][:1] for out in outs), (x[b:][:1], *values.values()))


@pytest.mark.parametrize("op", OPS)
def test_second_device(lane: str, op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: not run")
    args = arguments(op, 1, 8, 8, 16, 16, device="cuda:1")
    with torch.cuda.device(0):
        outs = forced(lane, op, args)
        assert torch.cuda.current_device() == 0
    check(op, outs, args)

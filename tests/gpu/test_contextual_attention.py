"""contextual_attention's `cuda` and `cupy` lanes on a GPU: numerics, tiles and rounds, memory, streams, graphs.

The truth of large calls is computed on the GPU, in float64 and without TF32.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.contextual_attention import SPEC
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.policy import use_backend
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAMPLES = [sample for sample in SPEC.samples("full") if sample.kwargs.get("rate", 2) == 2]
SOFT = {"softmax_scale": 0.25}
GIB = 2**30


@pytest.fixture(params=["cuda", "cupy"])
def lane(request: pytest.FixtureRequest) -> str:
    backend = importlib.import_module(f"inpaintrt.backends.{request.param}")
    if reason := backend.missing("contextual_attention", torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"{request.param}: {reason}: not run")
    return str(request.param)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """The baseline must be float32, as the kernels always are."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def arguments(
    b: int,
    c: int,
    h: int,
    w: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    seed: int = 3,
    **options: Any,
) -> tuple[Any, ...]:
    """A call with a hole in the middle of each sample, not the same in all."""
    generator = torch.Generator().manual_seed(seed)
    foreground, background = (torch.randn(b, c, h, w, generator=generator).to(device, dtype) for _ in range(2))
    mask = torch.zeros(b, 1, h // 2, w // 2, dtype=torch.bool, device=device)
    for sample in range(b):
        mask[sample, :, h // 6 : h // 4 + sample, w // 8 : w // 5 + 1] = True
    return SPEC.bind(foreground, background, mask, **{**SOFT, **options})


def forced(lane: str, args: tuple[Any, ...]) -> Tensor:
    """The op on this lane and no other."""
    ran: list[str] = []
    observer = lambda op, backend, args: ran.append(backend)  # noqa: E731
    dispatch.observers.append(observer)
    names = ("foreground", "background", "mask", "patch_size", "stride", "rate", "fuse_size", "softmax_scale", "sampling",
             "norm", "eps", "mask_mode", "divisor", "queries")  # fmt: skip
    try:
        with use_backend(lane):
            out = ops.contextual_attention(**dict(zip(names, args, strict=True)))
    finally:
        dispatch.observers.remove(observer)
    assert ran == [lane]
    return out


def small(lane: str, args: tuple[Any, ...]) -> Tensor:
    """The op with a sixth of the workspace: many tiles and rounds."""
    (out,) = SPEC.out(*args)
    importlib.import_module(f"inpaintrt.backends.{lane}").launcher("contextual_attention_small")(args, (out,))
    return out


def check(out: Tensor, args: tuple[Any, ...]) -> None:
    truth = SPEC.run_reference(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args))
    assert_close_to_truth(out, truth, SPEC.run_reference(*args))


both = pytest.mark.parametrize("run", [forced, small])


@both
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_numerics_of_samples(lane: str, sample: Any, run: Any) -> None:
    tensors = sample.tensors(torch.Generator().manual_seed(5), 2.0)
    args = SPEC.bind(**{name: t.cuda() for name, t in tensors.items()}, **sample.kwargs)
    check(run(lane, args), args)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numerics_of_layouts(lane: str, layout: str, dtype: torch.dtype, run: Any) -> None:
    for shape in ((2, 7, 20, 30), (2, 33, 64, 36)):
        foreground, background, *rest = arguments(*shape, dtype=dtype)
        args = (LAYOUTS[layout](foreground), LAYOUTS[layout](background), *rest)
        check(run(lane, args), args)


@both
@pytest.mark.parametrize("fuse_size", [0, 3])
def test_numerics_of_options(lane: str, fuse_size: int, run: Any) -> None:
    words = itertools.product(
        (1, 2), ("stride", "tf"), ("max", "sum_eps"), ("zero", "neginf"), ("const4", "overlap"), (False, True)
    )
    for stride, sampling, norm, mask_mode, divisor, some in words:
        args = arguments(
            2, 20, 34, 46, fuse_size=fuse_size, stride=stride, sampling=sampling, norm=norm, mask_mode=mask_mode,
            divisor=divisor,
        )  # fmt: skip
        if some:
            args = (*args[:-1], args[2].flip(3))
        check(run(lane, args), args)


@both
def test_numerics_of_small_grids(lane: str, run: Any) -> None:
    for height, width in itertools.product(range(1, 9), repeat=2):
        args = arguments(1, 3, 2 * height, 2 * width)
        check(run(lane, args), args)


@pytest.mark.parametrize(
    ("c", "h", "w"), [(96, 64, 64), (96, 128, 128), (192, 128, 128), (96, 134, 240), (64, 4, 2000)]
)
def test_numerics_of_images(lane: str, c: int, h: int, w: int) -> None:
    args = arguments(1, c, h, w, softmax_scale=0.02)
    check(forced(lane, args), args)


def test_numerics_of_features_as_networks_have_them(lane: str) -> None:
    """Not negative, smooth, at the default scale: logits of thousands, weights nearly 0 and 1."""
    foreground, background, *rest = arguments(1, 96, 64, 64, softmax_scale=10.0)
    smooth = [torch.nn.functional.avg_pool2d(t.relu(), 3, 1, 1) for t in (foreground, background)]
    check(forced(lane, (*smooth, *rest)), (*smooth, *rest))


@pytest.mark.parametrize("side", [256, 512])
def test_large_images_take_bounded_memory(lane: str, side: int) -> None:
    args = arguments(1, 96, side, side, softmax_scale=0.02)
    cells = (side // 2) ** 2
    forced(lane, args)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = forced(lane, args)
    taken = torch.cuda.max_memory_allocated() - before - out.numel() * 4
    assert taken <= 12 * 128 * cells * 4 + 9 * cells + 2**21
    assert bool(out.isfinite().all())
    if 3 * cells**2 * 8 < torch.cuda.mem_get_info()[0]:
        check(out, args)


def test_results_are_repeatable(lane: str) -> None:
    args = arguments(2, 48, 80, 60)
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


def test_calls_on_two_streams_do_not_share_a_workspace(lane: str) -> None:
    calls = [(arguments(1, 32, 64, 64, seed=seed), torch.cuda.Stream()) for seed in (1, 2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for args, stream in calls:
            with torch.cuda.stream(stream):
                results.append((forced(lane, args), args))
    torch.cuda.synchronize()
    for out, args in results:
        check(out, args)


def test_graph_capture_and_replay(lane: str) -> None:
    args = arguments(1, 32, 72, 80)  # several rounds
    forced(lane, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forced(lane, args)
    for seed in (1, 2):
        args[0].copy_(torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        check(out, args)


def test_more_than_2_to_the_31_elements(lane: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * GIB:
        pytest.skip("less than 24 GiB of free device memory: not run")
    x = torch.empty(40000, 256, 16, 16, dtype=torch.bfloat16, device="cuda").normal_()  # 2.6e9 elements, 5.2 GB
    args = SPEC.bind(x, x, **SOFT)
    out = forced(lane, args)
    for b in (0, -1):
        one = (x[b:][:1], x[b:][:1], *args[2:])
        check(out[b:][:1], one)


def test_second_device(lane: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: not run")
    args = arguments(1, 8, 16, 16, device="cuda:1")
    with torch.cuda.device(0):
        out = forced(lane, args)
        assert torch.cuda.current_device() == 0
    check(out, args)

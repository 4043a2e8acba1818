"""window_attention's and window_mask_update's CUDA lanes without a GPU: launch plans, the kernels in a simulation of
CUDA's threads, and the cupy backend on simulated kernels. That everything compiles for GPUs is tests/test_cuda_build.py."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.backends import cupy as cupy_backend
from inpaintrt.ops.window_attention import SPEC, from_windows, regions, windows
from inpaintrt.ops.window_mask_update import SPEC as UPDATE
from inpaintrt.runtime import native
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

from .cuda import simulation
from .cuda.simulation import CPU, Launch, SimulatedCupy, Simulator
from .once import simulator
from .test_cuda_build import DTYPES, update_entries, window_entries

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

ATTENTION, MASKS = "window_attention", "window_mask_update"
MOST_SHARED = 99 * 1024  # of a block on sm_86, 89 and 120, the smallest


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(*shape: int, scale: float = 1.0) -> list[Tensor]:
    return [noise(*shape, seed=i) * (scale if i < 2 else 1.0) for i in range(3)]


def plan(args: Any, out: Tensor | None = None) -> list[Launch]:
    found = simulation.plan(ATTENTION, args, SPEC.out(*args) if out is None else (out,))
    assert found.workspace_bytes == 0
    return found.launches


# ---- launch plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "size", "grid", "threads"),
    [
        (64, 8, 6 * 64, 128),  # MAT at 512 pixels: a block for the 64 queries of a window and head
        (64, 16, 6 * 16 * 4, 128),
        (32, 16, 6 * 4 * 8, 64),  # too few of 64 queries to occupy a GPU: blocks of 32
        (16, 16, 6 * 16, 32),
        (56, 7, 6 * 64, 128),
        (64, 4, 6 * 256, 32),  # 16 queries
        (60, 5, 6 * 144, 64),  # 25
    ],
)
def test_blocks_occupy_a_gpu(side: int, size: int, grid: int, threads: int) -> None:
    x = torch.empty(1, side, side, 180)
    (launch,) = plan(SPEC.bind(x, x, x, window_size=size, num_heads=6, shift=size // 2))
    assert (launch.entry, launch.grid, launch.block) == (
        "irt::window_attention<float, 32>",
        (grid, 1, 1),
        (threads, 1, 1),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", range(1, 65))
def test_every_width_fits_into_shared_memory(channels: int, dtype: torch.dtype) -> None:
    x = torch.empty(1, 1, 1, channels, dtype=dtype).expand(1, 256, 256, channels)
    (launch,) = plan(SPEC.bind(x, x, x, window_size=8, num_heads=1))
    width = 16 if channels <= 16 else 32 if channels <= 32 else 64
    assert launch.entry.endswith(f", {width}>")
    assert launch.shared_bytes <= MOST_SHARED
    assert launch.shared_bytes >= 3 * 64 * channels * dtype.itemsize


def test_an_empty_batch_needs_no_launch() -> None:
    x, mask = torch.empty(0, 4, 4, 6), torch.empty(0, 4, 4, 1)
    assert plan(SPEC.bind(x, x, x, window_size=2, num_heads=2)) == []
    assert simulation.plan(MASKS, (mask, 2, 0), (mask,)) == ([], 0)


def test_wrong_calls_are_refused() -> None:
    x, bias, mask = torch.empty(2, 4, 6, 8), torch.empty(2, 4, 4), torch.empty(1, 4, 6, 1)
    good = (x, x, x, 2, 2, 1, None, mask, bias, -100.0)
    assert len(plan(good, x)) == 1

    def but(**changes: Any) -> tuple[Any, ...]:
        names = ("q", "k", "v", "window_size", "num_heads", "shift", "scale", "mask", "bias", "mask_value")
        return tuple(changes.get(name, arg) for name, arg in zip(names, good, strict=True))

    wrong: list[tuple[Any, Tensor]] = [
        (good[:9], x),
        ((*good, None), x),
        (but(q=x[0]), x),
        (but(k=x[..., :4]), x),
        (but(v=x.half()), x),
        (but(window_size=3), x),
        (but(window_size=0), x),
        (but(window_size=2.0), x),
        (but(num_heads=3), x),
        (but(num_heads=0), x),
        (but(shift=2), x),
        (but(shift=-1), x),
        (but(scale="1"), x),
        (but(mask=x), x),
        (but(mask=mask.expand(3, -1, -1, -1)), x),
        (but(mask=mask.half()), x),
        (but(bias=bias[:1]), x),
        (but(bias=bias[:, :1]), x),
        (but(bias=mask), x),
        (but(mask_value="0"), x),
        (good, x[..., :4]),
        (good, x[:1]),
    ]
    for args, out in wrong:
        with pytest.raises(ValueError, match="expected"):
            plan(args, out)
    double = x.double()
    with pytest.raises(RuntimeError, match="dtype"):
        plan(SPEC.bind(double, double, double, window_size=2, num_heads=2), double)
    wide = torch.empty(1, 2, 2, 65)
    with pytest.raises(RuntimeError, match="at most 64 channels"):
        plan(SPEC.bind(wide, wide, wide, window_size=2, num_heads=1), wide)


def test_wrong_updates_are_refused() -> None:
    mask = torch.empty(2, 4, 6, 1)
    wrong: list[tuple[Any, Tensor]] = [
        ((mask, 2), mask),
        ((mask, 3, 0), mask),
        ((mask, 2, 2), mask),
        ((mask, 2, 0.0), mask),
        ((mask[..., 0], 2, 0), mask[..., 0]),
        ((mask.expand(-1, -1, -1, 2), 2, 0), mask.expand(-1, -1, -1, 2)),
        ((mask, 2, 0), mask[:1]),
        ((mask, 2, 0), mask.half()),
    ]
    for args, out in wrong:
        with pytest.raises(ValueError, match="expected"):
            simulation.plan(MASKS, args, (out,))
    with pytest.raises(RuntimeError, match="dtype"):
        simulation.plan(MASKS, (mask.double(), 2, 0), (mask.double(),))


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 4097, 4097), 4097, "at most 4096 rows"),
        ((1, 2**31, 1), 1, "more elements than one launch can cover"),
        ((2**31, 1, 1), 1, "more elements than one launch can cover"),
        ((1, 2**20, 2**20), 2, "more elements than one launch can cover"),
    ],
)
def test_what_a_launch_cannot_cover_is_refused(shape: tuple[int, ...], size: int, message: str) -> None:
    x = torch.empty(1).expand(*shape, 1)
    with pytest.raises(RuntimeError, match=message):
        plan(SPEC.bind(x, x, x, window_size=size, num_heads=1), x)
    with pytest.raises(RuntimeError, match=message):
        simulation.plan(MASKS, (x, size, 0), (x,))


def test_a_grid_is_counted_with_its_heads() -> None:
    x = torch.empty(1).expand(2**25, 1, 1, 64)
    (launch,) = plan(SPEC.bind(x, x, x, window_size=1, num_heads=32), x)
    assert launch.grid == (2**30, 1, 1)
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan(SPEC.bind(x, x, x, window_size=1, num_heads=64), x)


# ---- the kernels, simulated ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    return simulator(tmp_path_factory, ATTENTION, window_entries())


@pytest.fixture(scope="module")
def simulate_update(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    return simulator(tmp_path_factory, MASKS, update_entries())


def watched(like: Tensor) -> tuple[Tensor, Tensor]:
    """Memory with a margin on both sides, and the tensor in it."""
    memory = torch.full((like.numel() + 64,), 77.0, dtype=like.dtype)
    return memory, memory[32:-32].as_strided(like.shape, like.stride(), 32).fill_(torch.nan)


def compute(simulate: Simulator, spec: Any, args: Any, *, reverse: bool = False) -> Tensor:
    """The kernel's output, in memory that is watched on both sides."""
    memory, out = watched(spec.out(*args)[0])
    simulate(simulation.plan(spec.name, args, (out,)), reverse=reverse)
    assert bool((memory[:32] == 77).all())
    assert bool((memory[-32:] == 77).all())
    return out


def check(out: Tensor, args: Any, spec: Any = SPEC) -> None:
    truth = spec.run_reference(*(t.double() if isinstance(t, Tensor) else t for t in args))
    assert_close_to_truth(out, truth, spec.run_reference(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", list(SPEC.samples("full")), ids=lambda sample: sample.id)
def test_simulated_samples(simulate: Simulator, sample: Any, dtype: torch.dtype) -> None:
    tensors = sample.tensors(torch.Generator().manual_seed(0))
    args = SPEC.bind(**{n: t.to(dtype) for n, t in tensors.items()}, **sample.kwargs)
    check(compute(simulate, SPEC, args), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_simulated_layouts(simulate: Simulator, layout: str, dtype: torch.dtype) -> None:
    """Copies of 16, 8, 4 and 2 bytes, and single elements; queries, keys and values each with strides of their own."""
    for channels, heads in ((32, 2), (24, 2), (30, 1), (9, 3)):
        q, k, v = (t.to(dtype) for t in qkv(2, 8, 4, channels, scale=0.7))
        mask = (noise(2, 8, 4, 1, seed=4) > 0).to(dtype)
        options: dict[str, Any] = {"window_size": 4, "num_heads": heads, "shift": 1, "mask": LAYOUTS[layout](mask)}
        for tensors in ((LAYOUTS[layout](q), k, v), (q, LAYOUTS[layout](k), LAYOUTS[layout](v))):
            args = SPEC.bind(*tensors, **options)
            check(compute(simulate, SPEC, args), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_simulated_parts_of_one_projection(simulate: Simulator, dtype: torch.dtype) -> None:
    """As networks have them: queries, keys and values side by side, each from an address and of a stride of its own."""
    for channels in (60, 64, 34):
        q, k, v = noise(1, 8, 16, 3 * channels).to(dtype).split(channels, -1)
        args = SPEC.bind(q, k, v, window_size=8, num_heads=2, shift=4)
        check(compute(simulate, SPEC, args), args)


@pytest.mark.parametrize("size", range(1, 17))
def test_simulated_window_sizes(simulate: Simulator, size: int) -> None:
    for dtype in DTYPES:
        q, k, v = (t.to(dtype) for t in qkv(1, 2 * size, size, 18, scale=0.8))
        mask = (noise(1, 2 * size, size, 1, seed=6) > -0.5).to(dtype)
        args = SPEC.bind(q, k, v, window_size=size, num_heads=1, shift=size // 3, mask=mask)
        check(compute(simulate, SPEC, args), args)


@pytest.mark.parametrize("channels", [1, 7, 15, 16, 17, 30, 31, 32, 33, 48, 63, 64])
def test_simulated_widths(simulate: Simulator, channels: int) -> None:
    for dtype in DTYPES:
        q, k, v = (t.to(dtype) for t in qkv(1, 8, 4, 2 * channels, scale=0.7))
        mask, bias = (noise(1, 8, 4, 1, seed=7) > 0).to(dtype), noise(2, 16, 16, seed=8)
        args = SPEC.bind(q, k, v, window_size=4, num_heads=2, shift=2, mask=mask, bias=bias)
        check(compute(simulate, SPEC, args), args)


@pytest.mark.parametrize("shift", [0, 1, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simulated_masks_of_all_sorts(simulate: Simulator, shift: int, dtype: torch.dtype) -> None:
    """Valid, invalid and fractional windows, and regions of each, side by side; bias and mask in float32 beside halves."""
    q, k, v = (t.to(dtype) for t in qkv(2, 16, 24, 30, scale=0.6))
    mask = torch.rand(2, 16, 24, 1, generator=torch.Generator().manual_seed(5))
    mask[0] = (mask[0] > 0.5).float()
    mask[1, :8] = (mask[1, :8] * 5).floor() / 4
    mask[0, :, :5] = 0
    mask[1, 8:, 9:] = 1
    for bias in (None, noise(1, 64, 64, seed=9)):
        args = SPEC.bind(q, k, v, window_size=8, num_heads=1, shift=shift, mask=mask, bias=bias)
        check(compute(simulate, SPEC, args), args)


def test_simulated_ties_across_a_seam(simulate: Simulator) -> None:
    """A region without a valid key of its own: its invalid keys tie with the valid ones of the others."""
    q, k, v = qkv(1, 8, 8, 30, scale=0.5)
    label = windows(regions(8, 8, 8, 4), 8, 4)[0, 0, :, 0]
    valid = (label != label[0]) & (torch.arange(64) % 3 > 0)
    args = SPEC.bind(q, k, v, window_size=8, num_heads=1, shift=4,
                     mask=from_windows(valid.float().view(1, 1, 64, 1), 8, 8, 8, 4))  # fmt: skip
    out = windows(compute(simulate, SPEC, args), 8, 4)[0, 0]
    queries, keys, values = (windows(t.double(), 8, 4)[0, 0] for t in (q, k, v))
    own = label == label[0]
    usable = own | valid
    weights = torch.softmax((queries[own] @ keys[usable].T) * 30**-0.5, -1)
    torch.testing.assert_close(out[own].double(), weights @ values[usable], rtol=0, atol=2e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.4])
def test_simulated_uniform_masks_cancel(simulate: Simulator, value: float) -> None:
    q, k, v = qkv(1, 16, 8, 30, scale=0.7)
    options: dict[str, Any] = {"window_size": 8, "num_heads": 1, "shift": 3}
    out = compute(simulate, SPEC, SPEC.bind(q, k, v, mask=torch.full((1, 16, 8, 1), value), **options))
    exact = SPEC.run_reference(*SPEC.bind(q.double(), k.double(), v.double(), **options))
    assert bool((out - exact).abs().max() < (1e-6 if value else 2e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [4, 12])
def test_simulated_values_count_where_weights_are_tiny(simulate: Simulator, size: int, dtype: torch.dtype) -> None:
    """e⁻¹⁰⁰ of 10³⁷ is 4·10⁻⁷: a lot where all other values are 0. In a later round of keys, too."""
    q, k, v = (t.to(dtype) for t in qkv(1, size, size, 8, scale=0.01))
    mask = torch.ones(1, size, size, 1)
    mask[0, size - 1, 2] = 0
    for small, huge in ((1.0, 1e37), (0.0, 1e37), (1e-30, 1e8)):
        values = v * small
        values[0, size - 1, 2] = huge
        args = SPEC.bind(q, k, values, window_size=size, num_heads=1, mask=mask)
        check(compute(simulate, SPEC, args), args)


def test_simulated_largest_logit_comes_last(simulate: Simulator) -> None:
    """Sums are rescaled with each round of keys: first by a little, then by more than float32 can hold."""
    for dtype in DTYPES:
        q, k, v = (t.to(dtype) for t in qkv(1, 16, 16, 16, scale=0.3))
        q[..., 0] = 1
        k[0, ..., 0] = torch.tensor([0.0, 1.0, 3.0, 160.0], dtype=dtype).repeat_interleave(4)[:, None]
        args = SPEC.bind(q, k, v, window_size=16, num_heads=1, scale=1.0)
        check(compute(simulate, SPEC, args), args)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_simulated_what_is_not_finite(simulate: Simulator, operand: int, what: float) -> None:
    inputs = qkv(1, 8, 8, 12, scale=0.1)
    inputs[operand][0, 2, 1, 3] = what
    mask = torch.ones(1, 8, 8, 1)
    mask[0, 2, 1] = 0
    args = SPEC.bind(*inputs, window_size=4, num_heads=3, mask=mask)
    out, base = compute(simulate, SPEC, args), SPEC.run_reference(*args)
    assert bool((~out.isfinite()).any())
    torch.testing.assert_close(out, base, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, -3.5, 2.0, -0.0, 1e-3])
def test_simulated_mask_values_are_added(simulate: Simulator, special: float) -> None:
    q, k, v = qkv(1, 8, 8, 12)
    mask = torch.ones(1, 8, 8, 1)
    mask[0, 2, 1], mask[0, 0, 5] = special, 0
    args = SPEC.bind(q, k, v, window_size=4, num_heads=2, mask=mask, shift=1)
    out = compute(simulate, SPEC, args)
    torch.testing.assert_close(out, SPEC.run_reference(*args), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_does_not_matter(simulate: Simulator, dtype: torch.dtype) -> None:
    """Where a barrier is missing it would. Blocks of four warps, in one round of keys and in two; blocks of one warp."""
    for side, size, channels, threads in ((64, 8, 4, 128), (72, 9, 4, 128), (16, 16, 60, 32)):
        q, k, v = (t.to(dtype) for t in qkv(1, side, side, channels))
        mask = (noise(1, side, side, 1, seed=3) > 0).to(dtype)
        args = SPEC.bind(q, k, v, window_size=size, num_heads=2 if size == 8 else 1, shift=3, mask=mask)
        assert plan(args)[0].block == (threads, 1, 1)
        out = compute(simulate, SPEC, args)
        check(out, args)
        assert torch.equal(out, compute(simulate, SPEC, args, reverse=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", list(UPDATE.samples("full")), ids=lambda sample: sample.id)
def test_simulated_updates(simulate_update: Simulator, sample: Any, layout: str, dtype: torch.dtype) -> None:
    mask = sample.tensors(torch.Generator().manual_seed(0))["mask"].to(dtype)
    if mask.numel():
        mask.view(-1)[0] = torch.nan
    args = UPDATE.bind(LAYOUTS[layout](mask), **sample.kwargs)
    check(compute(simulate_update, UPDATE, args), args, UPDATE)


# ---- the cupy backend ----------------------------------------------------------------------------------------------


def test_cupy_launches_what_plans_say(
    simulate: Simulator, simulate_update: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cupy_backend, "_CUDA", CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cupy_backend, "_current_stream", lambda device: 0)
    monkeypatch.setattr(cupy_backend, "_stream", lambda pointer: contextlib.nullcontext())
    q, k, v = qkv(1, 8, 8, 128)  # 64 channels a head: more than 48 KB of shared memory
    mask = (noise(1, 8, 8, 1, seed=3) > 0).float()
    for spec, simulated, args, entry in (
        (SPEC, simulate, SPEC.bind(q, k, v, window_size=8, num_heads=2, mask=mask), "irt::window_attention<float, 64>"),
        (UPDATE, simulate_update, UPDATE.bind(mask, window_size=4, shift=1), "irt::window_mask_update<float>"),
    ):
        cupy = SimulatedCupy(simulated)
        monkeypatch.setattr(cupy_backend, "_module", lambda name, cupy=cupy: cupy)
        (out,) = spec.out(*args)
        cupy_backend.launcher(spec.name)(args, (out.fill_(torch.nan),))
        check(out, args, spec)
        assert cupy.launched == [entry]

"""fourier_unit's CUDA lanes without a GPU: its launch plans, its kernels in a simulation of CUDA's threads, and the cupy
backend on simulated kernels. That everything compiles for GPUs is tests/test_cuda_build.py."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.backends import cupy as cupy_backend
from inpaintrt.ops.fourier_unit import SPEC
from inpaintrt.runtime import native
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

from .cuda import simulation
from .cuda.simulation import CPU, Plan, SimulatedCupy, Simulator
from .once import simulator
from .test_cuda_build import DTYPES, fourier_entries

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

FUSED, UNFUSED = "fourier_unit", "fourier_unit_unfused"
MOST_SHARED = 99 * 1024  # of a block on sm_86, 89 and 120, the smallest
LONGEST = 3840

Args = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def arguments(
    b: int,
    c: int,
    co: int,
    h: int,
    w: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    residual: bool = True,
) -> Args:
    generator = torch.Generator().manual_seed(h * 4096 + w)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = noise(2 * co, 2 * c) / (2 * c) ** 0.5
    tensors = (noise(b, c, h, w), weight, noise(2 * co) if bias else None, noise(b, co, h, w) if residual else None)
    return tuple(None if t is None else t.to(dtype) for t in tensors)  # type: ignore[return-value]


def plan(args: Args, planner: str = FUSED, out: Tensor | None = None) -> Plan:
    return simulation.plan(planner, args, SPEC.out(*args) if out is None else (out,))


def kernels(plan: Plan) -> list[str]:
    return [launch.entry.removeprefix("irt::fourier_unit_") for launch in plan.launches]


# ---- launch plans --------------------------------------------------------------------------------------------------


def shaped(c: int, co: int, h: int, w: int) -> Args:
    """Arguments of a large call without their memory: plans read no data."""
    one = torch.empty(1)
    return one.expand(1, c, h, w), one.expand(2 * co, 2 * c), None, None


@pytest.mark.parametrize(
    ("c", "co", "h", "columns"),
    [
        (192, 192, 64, ["columns<2>"]),  # big-lama at 512 pixels: 100352 bytes
        (192, 192, 57, ["columns<2>"]),
        (192, 192, 32, ["columns<1>"]),
        (192, 192, 65, ["transform<false>", "mix<2>", "transform<true>"]),
        (22, 22, 512, ["columns<2>"]),  # the highest column that a block's warps cover
        (1, 1, 513, ["transform<false>", "mix<2>", "transform<true>"]),
        (400, 400, 16, ["columns<1>"]),
        (800, 8, 16, ["transform<false>", "mix<1>", "transform<true>"]),
    ],
)
def test_columns_are_fused_where_they_fit(c: int, co: int, h: int, columns: list[str]) -> None:
    args = shaped(c, co, h, 8)
    found = plan(args, out=args[0][:, :1].expand(1, co, h, 8))
    assert kernels(found) == ["rows<float>", *columns, "inverse_rows<float>"]


@pytest.mark.parametrize("planner", [FUSED, UNFUSED])
def test_every_length_fits_into_shared_memory(planner: str) -> None:
    for n in range(1, LONGEST + 1):
        for h, w in ((n, 1), (1, n)):
            args = shaped(1, 1, h, w)
            launches = plan(args, planner, args[0]).launches
            assert max(launch.shared_bytes for launch in launches) <= MOST_SHARED, (h, w)
            assert all(launch.block == (256, 1, 1) for launch in launches)


@pytest.mark.parametrize(("h", "w"), [(LONGEST + 1, 1), (1, LONGEST + 1), (3**13, 1)])
def test_longer_ones_are_refused(h: int, w: int) -> None:
    args = shaped(1, 1, h, w)
    with pytest.raises(RuntimeError, match="at most 3840"):
        plan(args, out=args[0])


def test_an_empty_batch_needs_no_launch() -> None:
    assert plan(arguments(0, 2, 2, 3, 3)) == ([], 0)


def test_columns_too_large_for_their_indices_are_refused() -> None:
    args = shaped(2**20, 1, 2048, 1)
    with pytest.raises(RuntimeError, match=r"fewer than 2\^31"):
        plan(args, out=args[0][:, :1])


@pytest.mark.parametrize(("b", "w"), [(2**40, 1), (2**30, 6), (2**20, 3840), (2**55, 16)])
def test_more_than_a_launch_can_cover_is_refused(b: int, w: int) -> None:
    x = torch.empty(1).expand(b, 1, 400, w) if b < 2**50 else torch.empty(1).expand(b, 1, 1, w)
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan((x, torch.empty(2, 2), None, None), out=x)


def test_wrong_calls_are_refused() -> None:
    good = arguments(1, 2, 3, 4, 5)
    x, weight, bias, residual = good
    out = SPEC.out(*good)[0]
    assert bias is not None
    assert residual is not None
    wrong: list[tuple[Any, Tensor]] = [
        ((x, weight, bias), out),
        ((*good, None), out),
        ((x, None, bias, residual), out),
        ((x, weight, 1.0, residual), out),
        ((x[0], weight, bias, residual), out),
        ((x, weight[:, :2], bias, residual), out),
        ((x, weight[:, :, None], bias, residual), out),
        ((x, weight[:, :, None, None].expand(-1, -1, 1, 2), bias, residual), out),
        ((x, weight, bias[:5], residual), out),
        ((x, weight, bias, residual[..., :4]), out),
        ((x.half(), weight, bias, residual), out),
        ((x, weight, bias.double(), residual), out),
        (good, out[:, :2]),
        (good, out[..., 0]),
        ((x[:, :0], weight[:, :0], bias, residual), out),
    ]
    for args, target in wrong:
        with pytest.raises(ValueError, match="expected"):
            plan(args, out=target)
    doubles = tuple(t.double() for t in (x, weight, bias, residual))
    with pytest.raises(RuntimeError, match="dtype"):
        plan(doubles, out=out.double())


# ---- the kernels, simulated ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    return simulator(tmp_path_factory, "fourier_unit", fourier_entries())


def compute(simulate: Simulator, args: Args, planner: str = FUSED, *, reverse: bool = False) -> Tensor:
    """The kernels' output, in memory that is watched on both sides."""
    like = SPEC.out(*args)[0]
    memory = torch.full((like.numel() + 64,), 77.0, dtype=like.dtype)
    out = memory[32:-32].as_strided(like.shape, like.stride(), 32).fill_(torch.nan)
    simulate(plan(args, planner, out), reverse=reverse)
    assert bool((memory[:32] == 77).all())
    assert bool((memory[-32:] == 77).all())
    return out


def check(out: Tensor, args: Args) -> None:
    truth = SPEC.run_reference(*(None if t is None else t.double() for t in args))
    assert_close_to_truth(out, truth, SPEC.run_reference(*args))


@pytest.mark.parametrize("planner", [FUSED, UNFUSED])
@pytest.mark.parametrize("sample", list(SPEC.samples("full")), ids=lambda sample: sample.id)
def test_simulated_samples(simulate: Simulator, sample: Any, planner: str) -> None:
    tensors = {name: torch.randn(shape) for name, shape in sample.shapes.items()}
    tensors["weight"] /= tensors["weight"].shape[1] ** 0.5
    args = SPEC.bind(**tensors)
    check(compute(simulate, args, planner), args)


@pytest.mark.parametrize("n", [*range(1, 37), 62, 67, 101, 251, 257, 343, 361, 625, 1024, 2187, 3125, 3833, LONGEST])
def test_simulated_lengths(simulate: Simulator, n: int) -> None:
    """Every radix, alone and in company, to the longest prime and beyond a block's width; as rows and as columns."""
    for shape in ((1, 1, 2, n, 3), (1, 2, 1, 2, n)):
        args = arguments(*shape)
        check(compute(simulate, args), args)


@pytest.mark.parametrize("planner", [FUSED, UNFUSED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("h", [5, 36])  # one place a lane in the mix, and two
def test_simulated_layouts(simulate: Simulator, h: int, layout: str, dtype: torch.dtype, planner: str) -> None:
    args = arguments(2, 3, 5, h, 6, dtype=dtype)
    args = tuple(None if t is None else LAYOUTS[layout](t) for t in args)  # type: ignore[assignment]
    check(compute(simulate, args, planner), args)


@pytest.mark.parametrize(("c", "co", "h", "w"), [(192, 192, 64, 2), (100, 96, 128, 2), (3, 70, 9, 3), (70, 3, 9, 3)])
def test_simulated_channels(simulate: Simulator, c: int, co: int, h: int, w: int) -> None:
    """The largest fused column, one that is too large, several slices of the output, several tiles of the input."""
    args = arguments(1, c, co, h, w, bias=False)
    check(compute(simulate, args), args)


@pytest.mark.parametrize("planner", [FUSED, UNFUSED])
@pytest.mark.parametrize("shape", [(1, 5, 6, 13, 11), (2, 3, 9, 36, 70), (1, 40, 2, 77, 6)])
def test_the_order_of_threads_does_not_matter(simulate: Simulator, shape: tuple[int, ...], planner: str) -> None:
    """Where a barrier is missing it would."""
    for layout in ("contiguous", "channels_last"):
        args = arguments(*shape)
        args = (LAYOUTS[layout](args[0]), *args[1:])
        assert torch.equal(compute(simulate, args, planner), compute(simulate, args, planner, reverse=True))


@pytest.mark.parametrize("planner", [FUSED, UNFUSED])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_channel_and_sample(simulate: Simulator, layout: str, planner: str) -> None:
    x, weight, bias, residual = arguments(2, 3, 5, 7, 6)
    assert bias is not None
    bias[2:4] = torch.nan  # of output channel 1
    weight[6:8, 1] = torch.nan  # of output channel 3
    x[1, 0, 2, 3] = torch.nan
    args = (LAYOUTS[layout](x), weight, bias, residual)
    out = compute(simulate, args, planner)
    expected = torch.zeros(2, 5, dtype=torch.bool)
    expected[1] = expected[:, 1] = expected[:, 3] = True
    assert torch.equal(out.isnan().flatten(2).any(2), expected)
    check(out, args)


# ---- the cupy backend ----------------------------------------------------------------------------------------------


def test_cupy_launches_in_order_with_a_workspace(simulate: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = SimulatedCupy(simulate)
    monkeypatch.setattr(cupy_backend, "_module", lambda name: cupy)
    monkeypatch.setattr(cupy_backend, "_CUDA", CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cupy_backend, "_current_stream", lambda device: 0)
    monkeypatch.setattr(cupy_backend, "_stream", lambda pointer: contextlib.nullcontext())
    launch = cupy_backend.launcher(FUSED)
    for shape in ((1, 2, 3, 4, 5), (1, 186, 3, 64, 2), (1, 2, 3, 520, 3), (2, 3, 2, 7, 7)):  # the second: above 48 KB
        args = arguments(*shape)
        (out,) = SPEC.out(*args)
        before = len(cupy.launched)
        launch(args, (out.fill_(torch.nan),))
        check(out, args)
        assert cupy.launched[before:] == [launched.entry for launched in plan(args).launches]
    rows, columns = (
        {"irt::fourier_unit_rows<float>", "irt::fourier_unit_inverse_rows<float>"},
        "irt::fourier_unit_columns",
    )
    mix = {"irt::fourier_unit_transform<false>", "irt::fourier_unit_mix<2>", "irt::fourier_unit_transform<true>"}
    assert list(map(set, cupy.compiled)) == [rows | {f"{columns}<1>"}, {f"{columns}<2>"}, mix]  # each once
    launch(arguments(0, 2, 3, 4, 5), (torch.empty(0, 3, 4, 5),))
    assert len(cupy.launched) == 3 + 3 + 5 + 3

"""aot_gate's CUDA lanes without a GPU: its launch plans, its kernels in a simulation of CUDA's threads, and the cupy
backend on simulated kernels. That everything compiles for GPUs is tests/test_cuda_build.py."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inpaintrt.backends import cupy as cupy_backend
from inpaintrt.ops.aot_gate import SPEC
from inpaintrt.runtime import native
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

from .cuda import simulation
from .cuda.simulation import CPU, Plan, SimulatedCupy, Simulator
from .once import simulator
from .test_cuda_build import DTYPES, aot_entries, sparse

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

PLANNERS = ("aot_gate", "aot_gate_wide")
PART = LINE = 12  # bytes

Args = tuple[Tensor, Tensor, Tensor, float]


def arguments(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Args:
    generator = torch.Generator().manual_seed(shape[-1])
    x, fuse, gate = (LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype)) for _ in range(3))
    return x, fuse, gate, 1e-9


def plan(args: Args, planner: str = PLANNERS[0], out: Tensor | None = None) -> Plan:
    return simulation.plan(planner, args, SPEC.out(*args) if out is None else (out,))


# ---- launch plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "shape", "entries", "tiles", "blocks"),
    [
        ("contiguous", (2, 3, 64, 64), ("<float, 1>", "<1>", "<float, 4, false, int>"), 1, 6),
        ("contiguous", (1, 2, 64, 65), ("<float, 1>", "<1>", "<float, 4, false, int>"), 2, 4),
        ("contiguous", (1, 2, 5, 7), ("<float, 1>", "<1>", "<float, 1, false, int>"), 1, 2),
        ("channels_last", (2, 36, 9, 15), ("<float, 32>", "<32>", "<float, 4, true, int>"), 2, 8),
        ("channels_last", (1, 35, 5, 7), ("<float, 32>", "<32>", "<float, 1, false, int>"), 1, 2),
        ("offset", (1, 2, 8, 8), ("<float, 1>", "<1>", "<float, 1, false, int>"), 1, 2),
        ("sliced", (1, 2, 8, 8), ("<float, 1>", "<1>", "<float, 1, false, int>"), 1, 2),
    ],
)
def test_what_is_launched(
    layout: str, shape: tuple[int, ...], entries: tuple[str, ...], tiles: int, blocks: int
) -> None:
    found = plan(arguments(*shape, layout=layout))
    kernels = [launch.entry.removeprefix("irt::") for launch in found.launches]
    names = ("plane_moments", "aot_gate_lines", "aot_gate_blend")
    assert kernels == [name + entry for name, entry in zip(names, entries, strict=True)]
    planes = shape[0] * shape[1]
    assert found.workspace_bytes == planes * LINE + planes * tiles * PART
    moments, lines, blend = found.launches
    assert (moments.grid, lines.grid) == ((blocks, 1, 1), (planes, 1, 1))
    packs = planes * shape[2] * shape[3] // int(entries[2].split(", ")[1])
    assert blend.grid == (-(-packs // 256), 1, 1)


@pytest.mark.parametrize(("last", "offsets"), [(2**31 - 1, "int"), (2**31, "long long")])
@pytest.mark.parametrize("far", range(4))
def test_offsets_are_wide_exactly_when_needed(tmp_path: Path, far: int, last: int, offsets: str) -> None:
    tensors = [torch.empty(2, 1, 1, 1, dtype=torch.float16) for _ in range(4)]
    tensors[far] = sparse(tmp_path, last + 1).as_strided((2, 1, 1, 1), (last, 1, 1, 1))
    *inputs, out = tensors
    found = plan((*inputs, 1e-9), out=out)  # type: ignore[arg-type]
    assert found.launches[-1].entry.endswith(f", {offsets}>")


def test_an_empty_tensor_needs_no_launch() -> None:
    for shape in ((0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3)):
        assert plan(arguments(*shape)) == ([], 0)


@pytest.mark.parametrize("shape", [(1, 1, 2**16, 2**15), (2**20, 2**12, 1, 1), (2**31, 1, 1, 1), (2**50, 1, 32, 32)])
def test_more_than_a_launch_can_cover_is_refused(shape: tuple[int, ...]) -> None:
    x = torch.empty(1).expand(shape)
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan((x, x, x, 1e-9), out=x)


def test_wrong_calls_are_refused() -> None:
    x = torch.empty(1, 2, 3, 4)
    for args, out in (
        ((x, x, x), x),
        ((x, x, x, "1e-9"), x),
        ((x, None, x, 1e-9), x),
        ((x[0], x, x, 1e-9), x),
        ((x, x[..., 1:], x, 1e-9), x),
        ((x, x, x.half(), 1e-9), x),
        ((x, x, x, 1e-9), x[:, :1]),
    ):
        with pytest.raises(ValueError, match="expected"):
            plan(args, out=out)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="dtype"):
        plan((x.double(), x.double(), x.double(), 1e-9), out=x.double())


# ---- the kernels, simulated ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    return simulator(tmp_path_factory, "aot_gate", aot_entries())


def compute(simulate: Simulator, args: Args, planner: str = PLANNERS[0], *, reverse: bool = False) -> Tensor:
    """The kernels' output, in memory that is watched on both sides."""
    like = SPEC.out(*args)[0]
    memory = torch.full((like.numel() + 64,), 77.0, dtype=like.dtype)
    out = memory[32:-32].as_strided(like.shape, like.stride(), 32).fill_(torch.nan)
    simulate(plan(args, planner, out), reverse=reverse)
    assert bool((memory[:32] == 77).all())
    assert bool((memory[-32:] == 77).all())
    return out


def check(out: Tensor, args: Args) -> None:
    x, fuse, gate, eps = args
    truth = SPEC.run_reference(x.double(), fuse.double(), gate.double(), eps)
    assert_close_to_truth(out, truth, SPEC.run_reference(*args))


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 16, 8, 40), (1, 40, 13, 16), (1, 1, 66, 65)])
def test_simulated_layouts(
    simulate: Simulator, shape: tuple[int, ...], layout: str, dtype: torch.dtype, planner: str
) -> None:
    args = arguments(*shape, dtype=dtype, layout=layout)
    check(compute(simulate, args, planner), args)


@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last", "transposed")])
def test_simulated_mixtures_of_layouts(simulate: Simulator, layouts: tuple[str, str]) -> None:
    x, fuse, gate, eps = arguments(2, 6, 7, 5)
    args = (LAYOUTS[layouts[0]](x), fuse, LAYOUTS[layouts[1]](gate), eps)
    check(compute(simulate, args), args)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_simulated_statistics_of_many_tiles(simulate: Simulator, layout: str) -> None:
    """More tiles than a block of the second launch has threads, on a slope, so that their means differ."""
    x, fuse, gate, eps = arguments(1, 2, 97, 96 if layout == "channels_last" else 2750, layout=layout)
    gate += torch.linspace(1e4, 1e4 + 3, gate.shape[2])[:, None]
    check(compute(simulate, (x, fuse, gate, eps)), (x, fuse, gate, eps))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_simulated_traps(simulate: Simulator, layout: str) -> None:
    """A mean that dwarfs the noise, an outlier, huge and tiny numbers, a constant, infinity, NaN: a channel each."""
    x, fuse, gate, eps = arguments(1, 8, 9, 131, layout=layout)
    gate[:, 0] = 1e4 + 0.01 * gate[:, 0]
    gate[:, 1, 0, 0] = 1e6
    gate[:, 2] *= 1e30
    gate[:, 3] *= 1e-11
    gate[:, 4] = 12345.678
    gate[:, 5, 3, 3] = torch.inf
    gate[:, 6, 3, 3] = torch.nan
    out = compute(simulate, (x, fuse, gate, eps))
    check(out, (x, fuse, gate, eps))
    assert torch.equal(out.isnan().all(3).all(2), torch.tensor([[False] * 5 + [True, True, False]]))
    check(compute(simulate, (x, fuse, gate, 0.0)), (x, fuse, gate, 0.0))


def test_simulated_single_pixels(simulate: Simulator) -> None:
    assert bool(compute(simulate, arguments(2, 3, 1, 1)).isnan().all())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_order_of_threads_does_not_matter(simulate: Simulator, layout: str) -> None:
    """Where a barrier is missing it would."""
    args = arguments(2, 33, 17, 23, layout=layout)
    assert torch.equal(compute(simulate, args), compute(simulate, args, reverse=True))


# ---- the cupy backend ----------------------------------------------------------------------------------------------


def test_cupy_launches_in_order_with_a_workspace(simulate: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = SimulatedCupy(simulate)
    monkeypatch.setattr(cupy_backend, "_module", lambda name: cupy)
    monkeypatch.setattr(cupy_backend, "_CUDA", CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cupy_backend, "_current_stream", lambda device: 0)
    monkeypatch.setattr(cupy_backend, "_stream", lambda pointer: contextlib.nullcontext())
    launch = cupy_backend.launcher("aot_gate")
    for args in (arguments(2, 3, 5, 7), arguments(1, 8, 4, 4, layout="channels_last")):
        (out,) = SPEC.out(*args)
        before = len(cupy.launched)
        launch(args, (out.fill_(torch.nan),))
        check(out, args)
        assert cupy.launched[before:] == [launched.entry for launched in plan(args).launches]

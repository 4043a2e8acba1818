"""group_norm_silu's CUDA lanes without a GPU: its launch plans, and its kernels in a simulation of CUDA's threads. That
everything compiles for GPUs is tests/test_cuda_build.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.ops.group_norm_silu import SPEC
from inpaintrt.runtime import native
from inpaintrt.runtime.spec import Sample
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

from .cuda import simulation
from .cuda.simulation import Plan, Simulator
from .once import simulator
from .test_cuda_build import DTYPES, group_norm_entries, sparse

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

PLANNERS = ("group_norm_silu", "group_norm_silu_wide")
PART = LINE = 12  # bytes
FILM = ("weight", "bias", "scale", "shift")

Args = tuple[Any, ...]


def arguments(
    *shape: int, groups: int = 1, dtype: torch.dtype = torch.float32, layout: str = "contiguous", second: int = 0,
    vectors: tuple[str, ...] = (), vector_dtype: torch.dtype | None = None, **options: Any,
) -> Args:  # fmt: skip
    """A call on an image of this shape, of which the last `second` channels are a tensor of their own."""
    generator = torch.Generator().manual_seed(shape[-1])
    b, c, *size = shape

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    parts = [LAYOUTS[layout](made(b, n, *size)) for n in (c - second, second)]
    given = {name: made(b, c) if name in FILM[2:] else made(c) for name in vectors}
    given = {name: v.to(vector_dtype or dtype) for name, v in given.items()}
    return SPEC.bind(parts[0], groups, **given, **options, second=parts[1] if second else None)


def plan(args: Args, planner: str = PLANNERS[0], out: Tensor | None = None) -> Plan:
    return simulation.plan(planner, args, SPEC.out(*args) if out is None else (out,))


# ---- launch plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "shape", "entries", "tiles"),
    [
        ("contiguous", (2, 4, 64, 64), ("<float, 1>", "<float, 1>", "<float, 4, false, int>"), 1),
        ("contiguous", (1, 2, 64, 65), ("<float, 1>", "<float, 1>", "<float, 4, false, int>"), 2),
        ("contiguous", (1, 2, 5, 7), ("<float, 1>", "<float, 1>", "<float, 1, false, int>"), 1),
        ("channels_last", (2, 36, 9, 15), ("<float, 32>", "<float, 32>", "<float, 4, true, int>"), 2),
        ("channels_last", (1, 34, 5, 7), ("<float, 32>", "<float, 32>", "<float, 1, false, int>"), 1),
        ("offset", (1, 2, 8, 8), ("<float, 1>", "<float, 1>", "<float, 1, false, int>"), 1),
    ],
)
def test_what_is_launched(layout: str, shape: tuple[int, ...], entries: tuple[str, ...], tiles: int) -> None:
    found = plan(arguments(*shape, groups=2, layout=layout))
    names = ("plane_moments", "group_norm_silu_lines", "group_norm_silu_apply")
    expected = [f"irt::{name}{entry}" for name, entry in zip(names, entries, strict=True)]
    assert [launch.entry for launch in found.launches] == expected
    planes = shape[0] * shape[1]
    assert found.workspace_bytes == planes * LINE + planes * tiles * PART
    assert found.launches[1].grid == (2 * shape[0], 1, 1)


def test_two_tensors_have_two_launches_more() -> None:
    found = plan(arguments(1, 12, 8, 8, groups=3, second=5))
    kinds = [launch.entry.split("<")[0].removeprefix("irt::") for launch in found.launches]
    assert kinds == ["plane_moments"] * 2 + ["group_norm_silu_lines"] + ["group_norm_silu_apply"] * 2
    empty = arguments(1, 12, 8, 8, groups=3)[:-1]
    assert len(plan((*empty, torch.empty(1, 0, 8, 8))).launches) == 3


@pytest.mark.parametrize(("last", "offsets"), [(2**31 - 1, "int"), (2**31, "long long")])
@pytest.mark.parametrize("far", range(2))
def test_offsets_are_wide_exactly_when_needed(tmp_path: Path, far: int, last: int, offsets: str) -> None:
    tensors = [torch.empty(2, 1, 1, 1, dtype=torch.float16) for _ in range(2)]
    tensors[far] = sparse(tmp_path, last + 1).as_strided((2, 1, 1, 1), (last, 1, 1, 1))
    x, out = tensors
    assert plan(SPEC.bind(x, 1), out=out).launches[-1].entry.endswith(f", {offsets}>")


def test_an_empty_tensor_needs_no_launch() -> None:
    for shape in ((0, 2, 3, 3), (1, 2, 0, 3)):
        assert plan(arguments(*shape)) == ([], 0)


@pytest.mark.parametrize("shape", [(1, 1, 2**16, 2**15), (2**31, 1, 1, 1), (2**50, 1, 32, 32)])
def test_more_than_a_launch_can_cover_is_refused(shape: tuple[int, ...]) -> None:
    x = torch.empty(1).expand(shape)
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan(SPEC.bind(x, 1), out=x)


def test_wrong_calls_are_refused() -> None:
    x = torch.empty(1, 4, 3, 4)
    good = list(SPEC.bind(x, 2))
    for place, value in ((0, x[0]), (0, x.half()), (1, 3), (1, 0), (2, x[0, :3, 0, 0]), (4, x), (7, "relu"), (8, x)):
        args = [value if i == place else a for i, a in enumerate(good)]
        with pytest.raises(ValueError, match="expected"):
            plan(tuple(args), out=torch.empty(1, 4, 3, 4))
    with pytest.raises(RuntimeError, match="dtype"):
        plan(SPEC.bind(x.double(), 2), out=x.double())


# ---- the kernels, simulated ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    return simulator(tmp_path_factory, "group_norm_silu", group_norm_entries())


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
    truth = SPEC.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
    assert_close_to_truth(out, truth, SPEC.run_reference(*args))


@pytest.mark.parametrize("sample", list(SPEC.samples("full")), ids=lambda sample: sample.id)
def test_simulated_samples(simulate: Simulator, sample: Sample) -> None:
    args = SPEC.bind(**sample.tensors(torch.Generator().manual_seed(1)), **sample.kwargs)
    check(compute(simulate, args), args)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((2, 4, 5, 7), 2), ((2, 16, 8, 40), 4), ((1, 40, 13, 16), 5)])
def test_simulated_layouts(
    simulate: Simulator, shape: tuple[int, ...], groups: int, layout: str, dtype: torch.dtype, planner: str
) -> None:
    args = arguments(*shape, groups=groups, dtype=dtype, layout=layout, vectors=FILM)
    check(compute(simulate, args, planner), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_simulated_parts(simulate: Simulator, layout: str, dtype: torch.dtype) -> None:
    """Groups of both tensors, which may lie in memory in two ways; vectors of float32."""
    args = arguments(
        2, 24, 9, 8, groups=4, dtype=dtype, layout=layout, second=9, vectors=FILM, vector_dtype=torch.float32
    )
    check(compute(simulate, args), args)
    mixed = (LAYOUTS["channels_last"](args[0]), *args[1:-1], LAYOUTS["transposed"](args[-1]))
    check(compute(simulate, mixed), mixed)


@pytest.mark.parametrize("vectors", [(), ("scale",), ("bias", "shift"), ("weight", "scale")])
def test_simulated_options(simulate: Simulator, vectors: tuple[str, ...]) -> None:
    args = arguments(2, 6, 5, 3, groups=3, vectors=vectors, activation="none", eps=0.25)
    check(compute(simulate, args), args)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_simulated_traps(simulate: Simulator, layout: str) -> None:
    """A mean that dwarfs the noise, an outlier, huge and tiny numbers, a constant, infinity, NaN: a group each."""
    args = arguments(1, 16, 9, 131, groups=8, layout=layout, vectors=("weight", "bias"), activation="none")
    x = args[0]
    x[:, 0:2] = 1e4 + 0.01 * x[:, 0:2]
    x[:, 2, 0, 0] = 1e6
    x[:, 4:6] *= 1e30
    x[:, 6:8] *= 1e-11
    x[:, 8:10] = 12345.678
    x[:, 10, 3, 3] = torch.inf
    x[:, 12, 3, 3] = torch.nan
    out = compute(simulate, args)
    check(out, args)
    bad = out.isnan().all(3).all(2)[0]
    assert bad.tolist() == [False] * 10 + [True] * 4 + [False] * 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_order_of_threads_does_not_matter(simulate: Simulator, layout: str) -> None:
    """Where a barrier is missing it would."""
    args = arguments(2, 34, 17, 23, groups=2, layout=layout, vectors=FILM)
    assert torch.equal(compute(simulate, args), compute(simulate, args, reverse=True))

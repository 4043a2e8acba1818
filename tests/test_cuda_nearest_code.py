"""nearest_code's CUDA lanes without a GPU: its launch plans, and its kernels in a simulation of CUDA's threads. That
everything compiles for GPUs is tests/test_cuda_build.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.ops.nearest_code import SPEC
from inpaintrt.runtime import native
from inpaintrt.runtime.spec import Sample

from .cuda import simulation
from .cuda.simulation import Plan, Simulator
from .once import simulator
from .test_cuda_build import DTYPES, code_entries, sparse
from .test_nearest_code import traps

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

FOUND = 8  # bytes
UNITS = 16.0
"""Roundings of float32, of the terms of |x|² + |e|² − 2x·e, by which distances may differ that are taken for equal."""

Args = tuple[Any, ...]


def arguments(
    n: int, k: int, d: int, split: int | None = None, dtype: torch.dtype = torch.float32, known: Any = torch.bool
) -> Args:
    generator = torch.Generator().manual_seed(n + k)
    x, codes = (torch.randn(rows, d, generator=generator).to(dtype) for rows in (n, k))
    half = None if split is None else (torch.rand(n, generator=generator) < 0.5).to(known)
    return x, codes, split, half


def plan(args: Args, out: Tensor | None = None) -> Plan:
    return simulation.plan("nearest_code", args, SPEC.out(*args) if out is None else (out,))


# ---- launch plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "chunks"),
    [(1, 1, 1), (64, 64, 1), (64, 65, 2), (1024, 8192, 32), (1 << 15, 8192, 1), (65, 1 << 20, 256)],
)
def test_chunks_fill_a_gpu(n: int, k: int, chunks: int) -> None:
    x, codes = torch.empty(1, 8).expand(n, 8), torch.empty(1, 8).expand(k, 8)
    search, first = plan((x, codes, None, None)).launches
    assert search.entry == "irt::nearest_code_search<float>"
    assert search.grid == (-(-n // 64) * chunks, 1, 1)
    assert first.entry == "irt::nearest_code_first<128>"
    assert first.grid == (-(-n // 128), 1, 1)
    assert plan((x, codes, None, None)).workspace_bytes == n * chunks * FOUND


def test_no_vectors_need_no_launch() -> None:
    assert plan((torch.empty(0, 3), torch.empty(4, 3), None, None)) == ([], 0)


def test_more_than_a_launch_can_cover_is_refused(tmp_path: Path) -> None:
    x, out = torch.empty(1, 1).expand(2**31, 1), sparse(tmp_path, 2**33).view(torch.int64)
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan((x, x[:1], None, None), out)


def test_wrong_calls_are_refused() -> None:
    good = arguments(4, 6, 3, split=2)
    out = SPEC.out(*good)[0]
    wrong = {
        0: (good[0][:, :2], good[0][0], good[0].half()),
        1: (good[1][:0], good[1][0]),
        2: (0, 6, None),
        3: (None, good[3][:3]),
    }
    for place, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match="expected"):
                plan(tuple(value if i == place else a for i, a in enumerate(good)), out)
    with pytest.raises(ValueError, match="expected"):
        plan(good, out.int())
    with pytest.raises(RuntimeError, match="dtype"):
        plan((good[0].double(), good[1].double(), None, None), out)


# ---- the kernels, simulated ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    return simulator(tmp_path_factory, "nearest_code", code_entries())


def compute(simulate: Simulator, args: Args, *, reverse: bool = False) -> Tensor:
    """The kernels' output, in memory that is watched on both sides."""
    n = len(args[0])
    memory = torch.full((n + 8,), -7, dtype=torch.int64)
    out = memory[4 : n + 4]
    simulate(plan(args, out), reverse=reverse)
    assert bool((memory[:4] == -7).all())
    assert bool((memory[n + 4 :] == -7).all())
    return out


def check(found: Tensor, args: Args) -> None:
    """Every code is of the right half, and as near as float32 can tell; of those the first."""
    x, codes, split, known = args
    wide, book = x.double(), codes.double()
    distances = torch.cdist(wide, book).square()
    slack = (
        UNITS * 2.0**-24 * (wide.square().sum(1, keepdim=True) + book.square().sum(1) + 2 * wide.abs() @ book.abs().t())
    )
    if split is not None:
        of_first = torch.arange(len(codes)) < split
        distances = distances.masked_fill(of_first != (known != 0)[:, None], torch.inf)
    if not len(x):
        return
    least = distances.gather(1, found[:, None])
    assert bool(least.isfinite().all())
    margin = slack + slack.gather(1, found[:, None])
    assert bool((least <= distances + margin).all())
    earlier = torch.arange(len(codes)) < found[:, None]
    assert bool((~earlier | (distances > least - margin)).all())


@pytest.mark.parametrize("sample", list(SPEC.samples("full")), ids=lambda sample: sample.id)
def test_simulated_samples(simulate: Simulator, sample: Sample) -> None:
    args = SPEC.bind(**sample.tensors(torch.Generator().manual_seed(1)), **sample.kwargs)
    check(compute(simulate, args), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("known", ["bool", "own"])
def test_simulated_dtypes_and_strides(simulate: Simulator, dtype: torch.dtype, known: str) -> None:
    x, codes, split, half = arguments(150, 203, 37, 77, dtype, torch.bool if known == "bool" else dtype)
    args = (x.t().contiguous().t(), torch.cat([codes, codes], 1)[:, ::2], split, half.repeat_interleave(3)[::3])
    check(compute(simulate, args), args)
    plain = (args[0], args[1].contiguous(), split, half)
    assert torch.equal(compute(simulate, args), compute(simulate, plain, reverse=True))


def test_simulated_halves_that_nobody_wants_are_left_out(simulate: Simulator) -> None:
    x, codes, split, half = arguments(70, 400, 9, 200)
    for kind in (torch.zeros_like(half), torch.ones_like(half)):
        args = (x, codes, split, kind)
        check(compute(simulate, args), args)


@pytest.mark.parametrize("codes", [1, 5, 64, 70, 700])
def test_simulated_traps(simulate: Simulator, codes: int) -> None:
    """NaN comes first, infinities last; of equal codes the first wins."""
    x, cases = traps(codes)
    known = torch.tensor([True, False, True, False, True])
    for case in cases:
        args = SPEC.bind(x, case)
        assert torch.equal(compute(simulate, args), SPEC.run_reference(*args))
        if codes > 1:
            args = SPEC.bind(x, case, split=codes // 2, known=known)
            assert torch.equal(compute(simulate, args), SPEC.run_reference(*args))


def test_the_order_of_threads_does_not_matter(simulate: Simulator) -> None:
    """Where a barrier is missing it would."""
    args = arguments(130, 300, 50, 120)
    assert torch.equal(compute(simulate, args), compute(simulate, args, reverse=True))

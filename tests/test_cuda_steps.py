"""The CUDA lanes of sampler_step and linear_step without a GPU: launch plans, and kernels in a simulation of CUDA's threads.

That everything compiles for GPUs is tests/test_cuda_build.py.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.ops._philox import STEP, normal
from inpaintrt.ops.sampler_step import example_row
from inpaintrt.runtime import native, registry
from inpaintrt.runtime.spec import Sample, as_outputs
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

from .cuda import simulation
from .cuda.simulation import Plan, Simulator
from .once import simulator
from .test_cuda_build import DTYPES, sparse, step_entries

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

OPS = ("sampler_step", "linear_step")
SAMPLES = [
    pytest.param(op, sample, id=f"{op}-{sample.id}") for op in OPS for sample in registry.get(op).samples("smoke")
]


def arguments(
    op: str, sample: Sample, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[Any, ...]:
    """A sample's call. `dtype`: of linear_step's images, of the model's output in sampler_step, which is float32 else."""
    generator = torch.Generator().manual_seed(1)
    given = {name: t if name in sample.values else LAYOUTS[layout](t) for name, t in sample.tensors(generator).items()}
    for name in given.keys() - sample.values.keys() - {"coefficients"}:
        if op == "linear_step" or name == "model_output":
            given[name] = given[name].to(dtype)
    return registry.get(op).bind(**given, **sample.kwargs)


def plan(op: str, args: tuple[Any, ...], outs: tuple[Tensor, ...] | None = None) -> Plan:
    return simulation.plan(op, args, registry.get(op.removesuffix("_wide")).out(*args) if outs is None else outs)


def odd(op: str) -> Sample:
    """A sample with a known region and seeds."""
    return next(s for s in registry.get(op).samples("smoke") if {"known", "seeds"} <= s.shapes.keys())


# ---- launch plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_one_launch_of_a_thread_for_four_elements(op: str, sample: Sample) -> None:
    args = arguments(op, sample)
    image = registry.get(op).out(*args)[0]
    found = plan(op, args)
    threads = image.shape[0] * -(-image[:1].numel() // 4) if image.numel() else 0
    assert [launch.grid for launch in found.launches] == ([(-(-threads // 256), 1, 1)] if threads else [])
    assert found.workspace_bytes == 0
    assert all(launch.entry == f"irt::{op}<float, int>" for launch in found.launches)


@pytest.mark.parametrize(("last", "offsets"), [(2**31 - 1, "int"), (2**31, "long long")])
@pytest.mark.parametrize("far", ["x", "known", "mask", "seeds", "next"])
def test_offsets_are_wide_exactly_when_needed(tmp_path: Path, far: str, last: int, offsets: str) -> None:
    dtype = torch.int64 if far == "seeds" else torch.float32
    strided = sparse(tmp_path, (last + 1) * dtype.itemsize // 2).view(dtype)
    image = strided.as_strided((2, 1, 1, 1), (last, 1, 1, 1)) if far != "seeds" else strided.as_strided((2,), (last,))
    given = {name: torch.zeros(2, 1, 1, 1) for name in ("x", "known", "mask", "next")}
    given |= {"seeds": torch.zeros(2, dtype=torch.int64), far: image}
    out = given.pop("next")
    args = registry.get("linear_step").bind([given.pop("x")], torch.ones(4), **given)
    (launch,) = plan("linear_step", args, (out,)).launches
    assert launch.entry == f"irt::linear_step<float, {offsets}>"


@pytest.mark.parametrize("shape", [(1, 1, 2**17, 2**25), (2**50, 1, 32, 32)])
def test_more_than_a_launch_can_cover_is_refused(shape: tuple[int, ...]) -> None:
    x = torch.empty(1).expand(shape)
    args = registry.get("linear_step").bind([x], torch.ones(4), noise=x[None])
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan("linear_step", args, (x,))


def test_wrong_calls_are_refused() -> None:
    good = list(arguments("sampler_step", odd("sampler_step")))
    outs = registry.get("sampler_step").out(*good)
    names = list(registry.get("sampler_step").signature.parameters)
    wrong = {"x": good[0][0], "row": good[2][:-1], "mask": None, "seeds": None, "call": -1, "prediction": "noise"}
    for name, value in wrong.items():
        args = [value if n == name else a for n, a in zip(names, good, strict=True)]
        with pytest.raises(ValueError, match=r"expected|does not fit"):
            plan("sampler_step", tuple(args), outs)
    with pytest.raises(RuntimeError, match="model_output must be"):
        plan("sampler_step", (good[0], good[1].double(), *good[2:]), outs)


# ---- the kernels, simulated ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Simulator]:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    return {op: simulator(tmp_path_factory, op, step_entries(op)) for op in OPS}


def compute(simulate: dict[str, Simulator], planner: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The kernel's outputs, in memory that is watched on both sides."""
    op = planner.removesuffix("_wide")
    outs, memories = [], []
    for like in registry.get(op).out(*args):
        memory = torch.full((like.numel() + 64,), 77.0, dtype=like.dtype)
        outs.append(memory[32:-32].as_strided(like.shape, like.stride(), 32).fill_(torch.nan))
        memories.append(memory)
    simulate[op](plan(planner, args, tuple(outs)))
    for memory in memories:
        assert bool((memory[:32] == 77).all())
        assert bool((memory[-32:] == 77).all())
    return tuple(outs)


def check(op: str, outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> None:
    spec = registry.get(op)

    def double(a: Any) -> Any:
        if isinstance(a, list):
            return [double(b) for b in a]
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    truths = as_outputs(spec.run_reference(*map(double, args)))
    for out, truth, reference in zip(outs, truths, as_outputs(spec.run_reference(*args)), strict=True):
        assert_close_to_truth(out, truth, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_simulated(simulate: dict[str, Simulator], op: str, sample: Sample, layout: str, dtype: torch.dtype) -> None:
    args = arguments(op, sample, dtype, layout)
    check(op, compute(simulate, op, args), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_simulated_with_wide_offsets(
    simulate: dict[str, Simulator], op: str, sample: Sample, dtype: torch.dtype
) -> None:
    args = arguments(op, sample, dtype, "transposed")
    check(op, compute(simulate, op + "_wide", args), args)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_simulated_number_of_the_call_on_the_device(
    simulate: dict[str, Simulator], op: str, dtype: torch.dtype
) -> None:
    sample = odd(op)
    names = list(registry.get(op).signature.parameters)
    number = sample.kwargs.get("call", 0)
    args = dict(zip(names, arguments(op, sample), strict=True))
    counted = args | {"call": 0, "counter": torch.tensor(number, dtype=dtype)}
    expected = compute(simulate, op, tuple(args.values()))
    assert all(map(torch.equal, compute(simulate, op, tuple(counted.values())), expected))


def test_simulated_noise_is_the_librarys(simulate: dict[str, Simulator]) -> None:
    """Noise alone, of odd sizes, seeds of all 64 bits and calls of all 32."""
    for seed, call in itertools.product((0, 42, -1, -(1 << 63), (1 << 40) + 3), (0, 2**32 - 1)):
        seeds, zero = torch.tensor([seed]), torch.zeros(1, 3, 7, 9)
        args = registry.get("linear_step").bind([zero], torch.tensor([0.0, 1.0, 0.0, 0.0]), seeds=seeds, call=call)
        (z,) = compute(simulate, "linear_step", args)
        truth = normal(seeds, zero.shape, STEP, call, torch.float64)
        bound = 2**-22 * truth.abs().clamp(min=8.0)  # 8: more than any radius, which reaches 6.8
        assert bool(((z.double() - truth).abs() <= bound).all())


def test_simulated_masks_of_ones_and_zeros_take_one_noise(simulate: dict[str, Simulator]) -> None:
    x = torch.randn(1, 2, 4, 8)
    mask = torch.zeros(1, 1, 4, 8)
    mask[..., 3:6] = 1.0
    row = example_row()
    args = registry.get("sampler_step").bind(
        x, torch.zeros(1, 4, 4, 8), row, known=x, mask=mask, seeds=torch.tensor([5]), call=9
    )
    check("sampler_step", compute(simulate, "sampler_step", args), args)
    mask[0, 0, 0, 0] = torch.nan
    outs = compute(simulate, "sampler_step", args)
    assert torch.equal(outs[0].isnan(), mask.isnan().expand(1, 2, 4, 8))

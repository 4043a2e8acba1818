"""The CUDA C++ and CuPy lanes as far as a machine without a GPU can prove them.

Launch plans are checked on CPU tensors; kernels run in a simulation of CUDA's threads on the host; nvcc and NVRTC
compile every instance that a plan can name. For all architectures instead of one:
`INPAINTRT_CUDA_ARCHS="80;86;89;90;100;120" pytest tests/test_cuda_build.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from inpaintrt.backends import cuda as cuda_backend
from inpaintrt.backends import cupy as cupy_backend
from inpaintrt.ops._shared import ACTIVATIONS
from inpaintrt.ops.contextual_attention import SPEC as CONTEXTUAL
from inpaintrt.ops.gated_activation import SPEC
from inpaintrt.runtime import native, registry
from inpaintrt.testing import assert_close_to_truth

from .cuda import simulation
from .cuda.simulation import Launch, Simulator
from .once import made_once, simulator

ROOT = Path(__file__).resolve().parents[1]
THREADS = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL_ARCHS = (80, 86, 89, 90, 100, 120)
ARCHS = tuple(int(a) for a in os.environ.get("INPAINTRT_CUDA_ARCHS", "90").replace(",", ";").split(";"))
# Registers a thread may use (in blocks of 256), by the beginning of the kernel's name. gated_activation: as many threads
# as an SM can run, 2048 or 1536. fourier_unit: two blocks where shared memory allows no more, else four.
# contextual_attention: two blocks for products, which keep 64 sums a thread; else four. Moments of planes: three, which
# keep 16 pixels a thread; what follows them as gated_activation (lines have few blocks anyway). Convolutions: two, for 64
# sums a thread. window_attention: blocks are of 128; four, with a bias two. window_mask_update: of 128 too, all that an SM
# can run of them. Steps: four with offsets of 32 bits; two where they have 64, whose divisions take the room. nearest_code:
# two, which keep 32 sums a thread. Resampling and factors of styles: four.
REGISTERS = {
    "gated_activation": {80: 32, 90: 32, 100: 32, 86: 40, 89: 40, 120: 40},
    "fourier_unit_columns": dict.fromkeys(ALL_ARCHS, 128),
    "fourier_unit_mix": dict.fromkeys(ALL_ARCHS, 128),
    "fourier_unit": dict.fromkeys(ALL_ARCHS, 64),
    "contextual_attention_gram": dict.fromkeys(ALL_ARCHS, 128),
    "contextual_attention_paste": dict.fromkeys(ALL_ARCHS, 128),
    "contextual_attention": dict.fromkeys(ALL_ARCHS, 64),
    "plane_moments": dict.fromkeys(ALL_ARCHS, 80),
    "aot_gate_lines": dict.fromkeys(ALL_ARCHS, 80),
    "aot_gate_blend": {80: 32, 90: 32, 100: 32, 86: 40, 89: 40, 120: 40},
    "group_norm_silu_lines": dict.fromkeys(ALL_ARCHS, 80),
    "group_norm_silu_apply": {80: 32, 90: 32, 100: 32, 86: 40, 89: 40, 120: 40},
    "window_attention_biased": dict.fromkeys(ALL_ARCHS, 255),
    "window_attention": dict.fromkeys(ALL_ARCHS, 128),
    "window_mask_update": dict.fromkeys(ALL_ARCHS, 64),
    "sampler_step": dict.fromkeys(ALL_ARCHS, 96),
    "linear_step": dict.fromkeys(ALL_ARCHS, 80),
    "nearest_code_search": dict.fromkeys(ALL_ARCHS, 128),
    "nearest_code_first": dict.fromkeys(ALL_ARCHS, 32),
    "conv2d_pack": dict.fromkeys(ALL_ARCHS, 64),
    "upfirdn2d": dict.fromkeys(ALL_ARCHS, 64),
    "modulated_conv2d_filter": dict.fromkeys(ALL_ARCHS, 64),
    "modulated_conv2d_style": dict.fromkeys(ALL_ARCHS, 64),
    "partial_conv2d_plane": dict.fromkeys(ALL_ARCHS, 64),
    "partial_conv2d_sums": dict.fromkeys(ALL_ARCHS, 64),
    "conv2d": dict.fromkeys(ALL_ARCHS, 128),
}

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")
PLANNERS = ("gated_activation", "gated_activation_wide")


class Gated(Launch):
    """The launch of a gated activation."""

    @property
    def pack(self) -> int:
        return int(self.entry.split(", ")[1])

    @property
    def offsets(self) -> str:
        return self.entry.split(", ")[2]


def plan(y: Tensor, out: Tensor | None = None, activation: str = "elu", planner: str = PLANNERS[0]) -> Gated:
    if out is None:
        out = SPEC.out(y, activation, None, 1.0)[0]
    found = simulation.plan(planner, (y, activation, None, 1.0), (out,))
    (launch,) = found.launches
    assert found.workspace_bytes == 0
    return Gated(*launch)


# Layouts of y, all over an owner filled with NaN outside of y: what is read by mistake shows.


def _owner(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "contiguous": lambda dtype: _owner((2, 16, 4, 6), dtype),
    "one_sample": lambda dtype: _owner((1, 6, 33, 17), dtype),
    "odd": lambda dtype: _owner((2, 6, 5, 7), dtype),
    "channels_last": lambda dtype: _owner((2, 32, 5, 3), dtype).contiguous(memory_format=torch.channels_last),
    "channels_last_odd": lambda dtype: _owner((2, 10, 5, 3), dtype).contiguous(memory_format=torch.channels_last),
    "cropped": lambda dtype: _owner((2, 4, 9, 32), dtype)[:, :, 1:-1, 8:24],
    "cropped_odd": lambda dtype: _owner((2, 4, 9, 31), dtype)[:, :, 1:-1, 3:24],
    "every_second": lambda dtype: _owner((2, 8, 8, 16), dtype)[:, ::2, :, ::2],
    "transposed": lambda dtype: _owner((3, 4, 8, 16), dtype).transpose(2, 3),
    "shifted": lambda dtype: _owner((1 + 2 * 4 * 8 * 8,), dtype)[1:].view(2, 4, 8, 8),
    "broadcast": lambda dtype: _owner((1, 8, 4, 8), dtype).expand(3, -1, -1, -1),
    "large": lambda dtype: _owner((2, 4, 40, 72), dtype),
}


# ---- launch plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_covers_every_pack_once(layout: str, dtype: torch.dtype) -> None:
    y = LAYOUTS[layout](dtype)
    p = plan(y)
    packs, rest = divmod(y.numel() // 2, p.pack)
    assert rest == 0
    assert p.block == (THREADS, 1, 1)
    assert p.grid == (-(-packs // THREADS), 1, 1)
    assert p.shared_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_only_where_addresses_allow(dtype: torch.dtype) -> None:
    width = 16 // dtype.itemsize
    packs = {layout: plan(make(dtype)).pack for layout, make in LAYOUTS.items()}
    vectors = {"contiguous", "channels_last", "cropped", "broadcast", "large"}
    assert packs == {layout: width if layout in vectors else 1 for layout in LAYOUTS}


def test_vectors_need_every_pointer_aligned() -> None:
    y = torch.empty(1, 4, 4, 4)
    assert plan(y).pack == 4
    assert plan(y, torch.empty(1 + 32)[1:].view(1, 2, 4, 4)).pack == 1  # the output is not
    flat = torch.empty(4 * 18).as_strided((1, 2, 4, 4), (36, 18, 4, 1))
    assert plan(flat).pack == 1  # y is, its gates, 18 elements further, are not


def test_contiguous_samples_merge_to_one_dimension() -> None:
    def rank(p: Gated) -> int:
        return int.from_bytes(p.params[28:32], sys.byteorder)  # three pointers, the count, then the nest's rank

    assert rank(plan(torch.empty(1, 8, 4, 4))) == 1
    assert rank(plan(torch.empty(2, 8, 4, 4))) == 2
    assert rank(plan(torch.empty(2, 8, 4, 4).contiguous(memory_format=torch.channels_last))) == 2
    assert rank(plan(torch.empty(2, 8, 8, 8)[:, ::2, ::2, ::2])) == 4


def sparse(folder: Path, elements: int) -> Tensor:
    """Halves over a file that is all hole: addresses without memory, never touched."""
    return torch.from_file(str(folder / f"{elements}"), shared=True, size=elements, dtype=torch.float16)


@pytest.mark.parametrize(("last", "offsets"), [(2**31 - 1, "int"), (2**31, "long long")])
def test_offsets_are_wide_exactly_when_needed(tmp_path: Path, last: int, offsets: str) -> None:
    y = sparse(tmp_path, last + 2).as_strided((2, 2, 1, 1), (last, 1, 1, 1))
    assert plan(y, torch.empty(2, 1, 1, 1, dtype=torch.float16)).offsets == offsets
    # The other way round: the output is the one that reaches far.
    out = sparse(tmp_path, last + 1).as_strided((2, 1, 1, 1), (last, 1, 1, 1))
    assert plan(torch.empty(2, 2, 1, 1, dtype=torch.float16), out).offsets == offsets


def test_indices_of_idle_threads_fit_too(tmp_path: Path) -> None:
    n = 2**31 - THREADS // 2  # every offset fits into 31 bits, the last thread's index does not
    y = sparse(tmp_path, 2 * n + 1)[1:].view(1, 2, 1, n)
    out = sparse(tmp_path, n).view(1, 1, 1, n)
    p = plan(y, out)
    assert (p.pack, p.offsets) == (1, "long long")


def test_grid_has_an_end() -> None:
    y = torch.empty(1, 2, 1, 1, dtype=torch.float16).expand(1, 2, 2**20, 2**20)
    out = torch.empty(1, 1, 1, 1, dtype=torch.float16).expand(1, 1, 2**20, 2**20)
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan(y, out)


def test_the_wide_plan_differs_in_offsets_only() -> None:
    y = torch.empty(2, 8, 6, 4, dtype=torch.bfloat16)
    narrow, wide = (plan(y, planner=name) for name in PLANNERS)
    assert wide.entry == narrow.entry.replace("int", "long long")
    assert wide[1:4] == narrow[1:4]


def test_an_empty_tensor_needs_no_launch() -> None:
    y, out = torch.empty(0, 4, 3, 3), torch.empty(0, 2, 3, 3)
    assert simulation.plan(PLANNERS[0], (y, "elu", None, 1.0), (out,)) == ([], 0)


def test_wrong_calls_are_refused() -> None:
    y = torch.empty(1, 4, 2, 2)
    with pytest.raises(ValueError, match="y must be"):
        plan(y, torch.empty(1, 3, 2, 2))
    with pytest.raises(ValueError, match="expected"):
        plan(y, activation="gelu", out=torch.empty(1, 2, 2, 2))
    with pytest.raises(RuntimeError, match="dtype"):
        plan(y.double(), torch.empty(1, 2, 2, 2, dtype=torch.float64))


@functools.cache
def gated_entries() -> frozenset[str]:
    found = set()
    shapes = ((1, 16, 2, 2), (1, 2, 1, 3))  # one for vectors, one not
    for dtype, activation, planner, shape in itertools.product(DTYPES, ACTIVATIONS, PLANNERS, shapes):
        found.add(plan(torch.empty(shape, dtype=dtype), activation=activation, planner=planner).entry)
    assert len(found) == len(DTYPES) * len(ACTIVATIONS) * 4
    return frozenset(found)


@functools.cache
def fourier_entries() -> frozenset[str]:
    found = set()
    for dtype, planner, h in itertools.product(DTYPES, ("fourier_unit", "fourier_unit_unfused"), (32, 33)):
        x, weight = torch.empty(1, 2, h, 2, dtype=dtype), torch.empty(4, 4, dtype=dtype)
        found |= {launch.entry for launch in simulation.plan(planner, (x, weight, None, None), (x,)).launches}
    assert (
        len(found) == 2 * len(DTYPES) + 2 * 2 + 2
    )  # rows both ways, columns or the mix alone, columns alone both ways
    return frozenset(found)


@functools.cache
def contextual_entries() -> frozenset[str]:
    found = set()
    choices = itertools.product(DTYPES, (32, 64), ((0, "max"), (3, "sum_eps")))
    for dtype, channels, (fuse_size, norm) in choices:
        x = torch.empty(1, channels, 4, 4, dtype=dtype)
        args = CONTEXTUAL.bind(x, x, fuse_size=fuse_size, norm=norm)
        found |= {launch.entry for launch in simulation.plan("contextual_attention", args, (x,)).launches}
    assert len(found) == 5 * len(DTYPES) + 2 * 2  # squares, gram, finish, paste for two widths; keys, weights
    return frozenset(found)


@functools.cache
def aot_entries() -> frozenset[str]:
    found = set()
    formats = (torch.contiguous_format, torch.channels_last)
    for dtype, planner, size, memory in itertools.product(DTYPES, ("aot_gate", "aot_gate_wide"), (8, 3), formats):
        x = torch.empty(1, size, size, size, dtype=dtype).to(memory_format=memory)
        found |= {launch.entry for launch in simulation.plan(planner, (x, x, x, 1e-9), (x,)).launches}
    assert len(found) == len(DTYPES) * (2 + 3 * 2) + 2  # moments and blends of either format, lines
    return frozenset(found)


@functools.cache
def group_norm_entries() -> frozenset[str]:
    found = set()
    formats = (torch.contiguous_format, torch.channels_last)
    planners = ("group_norm_silu", "group_norm_silu_wide")
    for dtype, planner, size, memory in itertools.product(DTYPES, planners, (8, 3), formats):
        x = torch.empty(1, size, size, size, dtype=dtype).to(memory_format=memory)
        args = registry.get("group_norm_silu").bind(x, 1)
        found |= {launch.entry for launch in simulation.plan(planner, args, (x,)).launches}
    assert len(found) == len(DTYPES) * (2 + 2 + 3 * 2)  # moments and lines of either format, what is applied
    return frozenset(found)


@functools.cache
def convolution_entries(op: str) -> frozenset[str]:
    found = set()
    for dtype, ieee, outputs, planes in itertools.product(DTYPES, (True, False), (16, 64, 128), (1, 8)):
        x = torch.empty(1, dtype=dtype).expand(1, 8, 256, 256)  # enough pixels for wide tiles
        weight, out = x[:, :, :1, :1].expand(outputs, -1, -1, -1), x[:, :1].expand(-1, outputs, -1, -1)
        spec, outs = registry.get(op), (out,)
        if op == "gated_conv2d":
            args, outs = spec.bind(x, weight), (out[:, : outputs // 2],)
        elif op == "partial_conv2d":
            args, outs = spec.bind(x, x[:, :planes], weight), (out, torch.empty(1, 1, 256, 256, dtype=dtype))
        else:
            args = spec.bind(x, weight)
        found |= {launch.entry for launch in simulation.plan(op, args, outs, ieee=ieee).launches}
    of_mask = 2 * len(DTYPES) if op == "partial_conv2d" else 0
    assert len(found) == 2 + 3 * len(DTYPES) + len(DTYPES) + of_mask  # IEEE, tensor cores, packed weights
    return frozenset(found)


@functools.cache
def resampling_entries() -> frozenset[str]:
    found = set()
    for dtype, size, memory in itertools.product(DTYPES, (8, 3), (torch.contiguous_format, torch.channels_last)):
        x = torch.empty(1, size, size, size, dtype=dtype).to(memory_format=memory)
        args = registry.get("upfirdn2d").bind(x, torch.ones(1, 1))
        found |= {launch.entry for launch in simulation.plan("upfirdn2d", args, (x,)).launches}
    assert len(found) == 2 * len(DTYPES)
    return frozenset(found)


@functools.cache
def modulated_entries() -> frozenset[str]:
    found, spec = set(), registry.get("modulated_conv2d")
    for dtype, ieee, outputs, up in itertools.product(DTYPES, (True, False), (16, 64, 128), (1, 2)):
        x = torch.empty(1, dtype=dtype).expand(1, 8, 256, 256)  # enough pixels for wide tiles
        weight, style = x[:, :, :1, :1].expand(outputs, -1, -1, -1), x[:, :, 0, 0]
        outs = spec.out(*spec.bind(x, weight, style, up=up))
        found |= {launch.entry for launch in simulation.plan("modulated_conv2d", spec.bind(x, weight, style, up=up), outs,
                                                             ieee=ieee).launches}  # fmt: skip
        vectors = torch.empty(1, 8, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
        args = spec.bind(vectors, vectors[:1, :, :1, :1], vectors[:, :, 0, 0], down=2)
        found |= {launch.entry for launch in simulation.plan("modulated_conv2d", args, spec.out(*args)).launches}
    # IEEE, tensor cores; packed weights, factors of styles, filters of either kind
    assert len(found) == 2 + 3 * len(DTYPES) + 4 * len(DTYPES)
    return frozenset(found)


@functools.cache
def window_entries() -> frozenset[str]:
    found = set()
    for dtype, channels, biased in itertools.product(DTYPES, (15, 30, 64), (False, True)):
        x, bias = torch.empty(1, 4, 4, channels, dtype=dtype), torch.empty(1, 16, 16) if biased else None
        args = registry.get("window_attention").bind(x, x, x, window_size=4, num_heads=1, bias=bias)
        found |= {launch.entry for launch in simulation.plan("window_attention", args, (x,)).launches}
    assert len(found) == 3 * 2 * len(DTYPES)
    return frozenset(found)


@functools.cache
def update_entries() -> frozenset[str]:
    found = set()
    for dtype in DTYPES:
        x = torch.empty(1, 4, 4, 1, dtype=dtype)
        found |= {launch.entry for launch in simulation.plan("window_mask_update", (x, 2, 0), (x,)).launches}
    return frozenset(found)


@functools.cache
def step_entries(op: str) -> frozenset[str]:
    found = set()
    for dtype, wide in itertools.product(DTYPES, ("", "_wide")):
        x, seeds = torch.empty(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
        images, model = [x.to(dtype)], torch.empty(1, 2, 2, 2, dtype=dtype)
        first, outs = ((images, torch.ones(4)), images) if op == "linear_step" else ((x, model, torch.ones(16)), (x, x))
        args = registry.get(op).bind(*first, seeds=seeds)
        found |= {launch.entry for launch in simulation.plan(op + wide, args, tuple(outs)).launches}
    assert len(found) == 2 * len(DTYPES)
    return frozenset(found)


@functools.cache
def code_entries() -> frozenset[str]:
    found = set()
    for dtype in DTYPES:
        x, out = torch.empty(2, 3, dtype=dtype), torch.empty(2, dtype=torch.int64)
        found |= {launch.entry for launch in simulation.plan("nearest_code", (x, x, None, None), (out,)).launches}
    assert len(found) == len(DTYPES) + 1
    return frozenset(found)


# Every instance that plans of an op can name.
ENTRIES = {
    "gated_activation": gated_entries,
    "fourier_unit": fourier_entries,
    "contextual_attention": contextual_entries,
    "aot_gate": aot_entries,
    "group_norm_silu": group_norm_entries,
    "window_attention": window_entries,
    "window_mask_update": update_entries,
    "nearest_code": code_entries,
    "modulated_conv2d": modulated_entries,
    "upfirdn2d": resampling_entries,
    **{op: functools.partial(step_entries, op) for op in ("sampler_step", "linear_step")},
    **{op: functools.partial(convolution_entries, op) for op in ("fused_conv2d", "gated_conv2d", "partial_conv2d")},
}


def all_entries() -> frozenset[str]:
    return frozenset().union(*(entries() for entries in ENTRIES.values()))


# ---- the kernel, simulated -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    return simulator(tmp_path_factory, "gated_activation", gated_entries())


def run(command: list[str], **options: Any) -> str:
    """The command's output; fails the test with it where the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}"
    return done.stdout


def compute(simulate: Simulator, y: Tensor, activation: str, alpha: float | None, gain: float, planner: str) -> Tensor:
    """The kernel's output, in memory that is watched on both sides."""
    shape_like = SPEC.out(y, activation, alpha, gain)[0]
    margin, n = 32, shape_like.numel()
    memory = torch.full((n + 2 * margin,), 77.0, dtype=y.dtype)
    out = memory[margin : margin + n].as_strided(shape_like.shape, shape_like.stride(), margin).fill_(float("nan"))
    simulate(simulation.plan(planner, (y, activation, alpha, gain), (out,)))
    assert bool((memory[:margin] == 77).all())
    assert bool((memory[margin + n :] == 77).all())
    return out


def check(y: Tensor, out: Tensor, activation: str, alpha: float | None, gain: float) -> None:
    truth = SPEC.run_reference(y.double(), activation, alpha, gain)
    assert_close_to_truth(out, truth, SPEC.run_reference(y, activation, alpha, gain))


def fill(y: Tensor) -> Tensor:
    values = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * 4
    if y.stride(0) == 0:
        y[0].copy_(values[0])
    else:
        y.copy_(values)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("planner", PLANNERS)
def test_simulated_layouts(simulate: Simulator, planner: str, layout: str, dtype: torch.dtype) -> None:
    y = fill(LAYOUTS[layout](dtype))
    check(y, compute(simulate, y, "elu", None, 1.0, planner), "elu", None, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 16, 4, 6), (2, 6, 5, 7)], ids=["vector", "scalar"])
def test_simulated_activations(
    simulate: Simulator, activation: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    y = fill(_owner(shape, dtype))
    check(y, compute(simulate, y, activation, None, 1.5, PLANNERS[0]), activation, None, 1.5)
    if activation in ("elu", "leaky_relu"):
        check(y, compute(simulate, y, activation, 0.3, 1.0, PLANNERS[0]), activation, 0.3, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_simulated_special_values(simulate: Simulator, activation: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor(
        [nan, inf, -inf, 0.0, -0.0, 6e-5, -6e-5, 0.06, -0.06, -0.07, 9.5, -9.5, 60.0, -60.0, -100.0, 3e4]
    )
    f, g = torch.meshgrid(values, values, indexing="ij")
    # A closed gate is 0 in half precision and tiny in ours; times infinity that is NaN and infinity.
    f = torch.where(f.isinf() & (g < -17) & g.isfinite(), 1.0, f)
    y = torch.stack([f, g])[None].to(dtype)
    out = compute(simulate, y, activation, None, 1.0, PLANNERS[0])
    check(y, out, activation, None, 1.0)


def test_division_by_multiplication(tmp_path: Path) -> None:
    """Exact for every divisor class and the numbers around its multiples, up to 2^31 - 1."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("g++ not found")
    source = tmp_path / "divide.cpp"
    source.write_text("""
#include "plan/nest.h"
int main() {
  const long long top = 2147483647;
  for (long long d = 1; d <= top; d = d < 70000 ? d + 1 : d + d / 5000 + 1) {
    const irt::Divisor<int> by = irt::Divisor<int>::of(static_cast<int>(d));
    const long long multiples[] = {0, d, 2 * d, 3 * d, top / 3 / d * d, top / 2 / d * d, top / d * d, top};
    for (long long m : multiples)
      for (long long n = m - 1; n <= m + 1; ++n)
        if (n >= 0 && n <= top && by.quotient(static_cast<int>(n)) != n / d) return 1;
  }
  return 0;
}
""")
    run([compiler, "-std=c++17", "-O2", "-fsanitize=undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}",
         str(source), "-o", str(tmp_path / "divide")])  # fmt: skip
    run([str(tmp_path / "divide")])


# ---- nvcc ----------------------------------------------------------------------------------------------------------


class Build(NamedTuple):
    library: Path
    log: str


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The CUDA library as CMake builds it, warnings as errors."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for tool in ("nvcc", "cmake"):
        if not shutil.which(tool, path=path):
            pytest.skip(f"{tool} not found")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    env = {**os.environ, "PATH": path, "INPAINTRT_CUDA_ARCHS": ";".join(map(str, ARCHS)), "INPAINTRT_CUDA": "ON"}
    options = ["-DSKBUILD_PROJECT_VERSION=0.0.0", "-DINPAINTRT_PYTHON=OFF", "-DINPAINTRT_WERROR=ON"]

    def make(folder: Path) -> None:
        run(["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *options], env=env)
        (folder / "log").write_text(run(["cmake", "--build", str(folder), "--target", "inpaintrt_cuda"], env=env))

    folder = made_once(tmp_path_factory, "cuda_library", make)
    return Build(folder / "libinpaintrt_cuda.so", (folder / "log").read_text())


def test_library_holds_exactly_what_plans_name(build: Build) -> None:
    names = re.findall(rb"irt::[a-z0-9_]+<[^>%]*>", build.library.read_bytes())
    assert {name.decode() for name in names} == all_entries()


def test_kernels_spill_nothing_and_keep_to_their_registers(build: Build) -> None:
    kernel = r"Compiling entry function '(\S+)' for 'sm_(\d+)'\n.*\n +(.*)\nptxas info +: Used (\d+) registers"
    found = re.findall(kernel, build.log)
    assert len({(name, arch) for name, arch, _, _ in found}) >= len(all_entries()) * len(ARCHS)
    for name, arch, frame, registers in found:
        budget = next(budget for kernel, budget in REGISTERS.items() if kernel in name)
        assert frame == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", (name, arch)
        assert int(registers) <= budget[int(arch)], (name, arch)


def test_library_loads_and_refuses_without_a_driver(build: Build, tmp_path: Path) -> None:
    program = tmp_path / "call"
    include = f"-I{ROOT / 'csrc' / 'include'}"
    run(["g++", "-std=c++17", include, str(ROOT / "tests/cuda/call.cpp"), "-o", str(program), "-ldl"])
    described, *statuses = run([str(program), str(build.library)]).splitlines()
    info = json.loads(described)
    assert info["archs"] == sorted(ARCHS)
    assert info["ptx"] == max(ARCHS)
    if info["driver"]:
        pytest.skip("a CUDA driver is present: nothing to refuse")
    *refused, nothing_to_do = statuses  # with the number of launches
    calls = ("gated_activation 1", "fourier_unit 3", "fourier_unit_unfused 5", "contextual_attention 6")
    for call, status in zip(calls, refused, strict=True):
        assert status.startswith(
            f"{call} 4 no CUDA driver, or one too old (CUDA error 35): these kernels were built by nvcc {info['nvcc']}"
        )
        assert f"need driver >= {info['oldest_driver']}; the extras cuda12 and cuda13" in status
    assert nothing_to_do == "gated_activation 0 0 "


def test_extension_finds_the_kernels(build: Build) -> None:
    extension = native.library()
    extension.load_cuda(str(build.library))
    assert all(extension.cuda_kernel(name) is not None for name in (*PLANNERS, *ENTRIES))
    assert extension.cuda_kernel("no_such_op") is None
    assert json.loads(extension.cuda_info())["archs"] == sorted(ARCHS)
    with pytest.raises(ValueError, match="another device"):
        extension.cuda_kernel("gated_activation")((torch.empty(1, 2, 1, 1), "elu", None, 1.0), (), None)


def test_library_needs_no_cuda_library(build: Build) -> None:
    if not shutil.which("readelf"):
        pytest.skip("readelf not found")
    needed = re.findall(r"NEEDED.*\[(.*)\]", run(["readelf", "-d", str(build.library)]))
    assert not [name for name in needed if "cuda" in name or "torch" in name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"INPAINTRT_CUDA": "maybe"}, "INPAINTRT_CUDA is MAYBE; accepted: AUTO, ON, OFF"),
        ({"INPAINTRT_CUDA_ARCHS": "7.5"}, "INPAINTRT_CUDA_ARCHS names 7.5; accepted"),
        ({"INPAINTRT_CUDA": "off", "INPAINTRT_CUDA_ARCHS": "90"}, "Without CUDA kernels: INPAINTRT_CUDA=OFF"),
    ],
)
def test_build_settings_come_from_the_environment(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not shutil.which("cmake", path=path):
        pytest.skip("cmake not found")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DSKBUILD_PROJECT_VERSION=0", "-DINPAINTRT_PYTHON=OFF"]
    env = {**os.environ, "PATH": path, **settings}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert message in done.stdout + done.stderr


# ---- NVRTC ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ALL_ARCHS)
@pytest.mark.parametrize("op", ENTRIES)
def test_nvrtc_compiles_every_instance(op: str, arch: int) -> None:
    """With the cupy backend's own source and options, to machine code, as CuPy does."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy not found")
    if reason := cupy_backend._compiler_missing():
        pytest.skip(reason)
    from cupy.cuda import nvrtc

    entries = ENTRIES[op]()
    program = nvrtc.createProgram(cupy_backend.source(op), "kernels.cu", (), ())
    try:
        for entry in sorted(entries):
            nvrtc.addNameExpression(program, entry)
        options = (*cupy_backend.options(), f"-I{cupy_backend.cuda_headers()}", f"-arch=sm_{arch}")
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            pytest.fail(nvrtc.getProgramLog(program))
        lowered = {nvrtc.getLoweredName(program, entry) for entry in entries}
        code = nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)
    assert len(lowered) == len(entries)
    assert all(name.encode() in code for name in lowered)


def test_variants_of_an_op_share_its_source() -> None:
    assert cupy_backend.source("gated_activation_wide") == cupy_backend.source("gated_activation")
    assert cupy_backend.source("fourier_unit_unfused") == cupy_backend.source("fourier_unit")
    assert '#include "cuda/gated_activation.cuh"' in cupy_backend.source("gated_activation_backward")


def test_installed_sources_are_these() -> None:
    installed = native.source_folder()
    for path in (*ROOT.glob("csrc/cuda/*.cuh"), *ROOT.glob("csrc/plan/*.h")):
        assert (installed / path.relative_to(ROOT / "csrc")).read_bytes() == path.read_bytes(), "reinstall the package"


# ---- reasons -------------------------------------------------------------------------------------------------------


def test_an_old_driver_is_a_reason() -> None:
    info = {"nvcc": "13.0.88", "runtime": 13000, "oldest_driver": 580}
    assert cuda_backend._driver_too_old({**info, "driver": 13010}) == ""
    assert cuda_backend._driver_too_old({**info, "driver": 14000}) == ""
    text = cuda_backend._driver_too_old({**info, "driver": 12080})
    assert text.startswith(
        "the driver found supports CUDA 12.8: these kernels were built by nvcc 13.0.88 and need driver >= 580"
    )
    assert cuda_backend._driver_too_old({**info, "driver": 0}).startswith("no driver was found")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ([80], (8, 0), True),
        ([80], (8, 9), True),  # machine code of an earlier minor version
        ([80], (9, 0), True),  # through PTX
        ([86], (8, 0), False),
        ([90], (8, 9), False),
        ([80, 120], (10, 0), False),  # neither machine code nor old enough PTX
        ([80, 90, 100], (10, 3), True),
        ([80, 90, 100], (12, 0), True),
    ],
)
def test_a_foreign_gpu_is_a_reason(archs: list[int], capability: tuple[int, int], runs: bool) -> None:
    reason = cuda_backend._foreign({"archs": archs, "ptx": max(archs)}, capability)
    assert (reason == "") == runs
    if not runs:
        assert f"this GPU has sm {capability[0]}{capability[1]}" in reason


# ---- the stages of a GPU machine -----------------------------------------------------------------------------------


def test_gpu_stages_say_that_they_did_not_run(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present: the stages would run")
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    run([str(ROOT / ".ci" / "gpu"), "test", "bench"], env=env)
    for stage in ("test", "bench"):
        result = json.loads((tmp_path / f"{stage}.json").read_text())
        assert (result["stage"], result["status"], result["device"]) == (stage, "not run", None)
        assert result["reason"].startswith("no device")
    wrong = subprocess.run([str(ROOT / ".ci" / "gpu"), "tset"], env=env, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "stages: build test sanitize bench" in wrong.stderr

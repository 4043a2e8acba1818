"""contextual_attention's CUDA lanes without a GPU: its launch plans, its kernels in a simulation of CUDA's threads, and the
cupy backend on simulated kernels. That everything compiles for GPUs is tests/test_cuda_build.py.

The second planner has a sixth of the workspace and therefore cuts small grids into many tiles and rounds.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.backends import cupy as cupy_backend
from inpaintrt.ops.contextual_attention import SPEC, grid_mask, source_index
from inpaintrt.runtime import native
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

from .cuda import simulation
from .cuda.simulation import CPU, Plan, SimulatedCupy, Simulator
from .once import simulator
from .test_contextual_attention import PORTS, RUNS, _call, _case
from .test_cuda_build import DTYPES, contextual_entries

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

WHOLE, SMALL = "contextual_attention", "contextual_attention_small"
on_planners = pytest.mark.parametrize("planner", [WHOLE, SMALL])
SOFT = {"softmax_scale": 0.25}
SAMPLES = [sample for sample in SPEC.samples("full") if sample.kwargs.get("rate", 2) == 2]
MOST_BYTES = 12 * 128 * 4  # of workspace per key, tables not counted

Args = tuple[Any, ...]


def arguments(
    b: int, c: int, h: int, w: int, *, mask: int = 0, some: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Args:
    """A call with masks for so many samples: a hole in two corners of the grid, queries in the other two."""
    generator = torch.Generator().manual_seed(h * 4096 + w)
    tensors = {n: torch.randn(b, c, h, w, generator=generator).to(dtype) for n in ("foreground", "background")}
    for name, samples in (("mask", mask), ("queries", some)):
        if samples:
            corner = torch.zeros(samples, 1, h // 2, w // 2, dtype=torch.bool)
            corner[..., : h // 5 + 1, : w // 6 + 1] = True
            tensors[name] = corner | corner.flip(2, 3) if name == "mask" else corner.flip(2) | corner.flip(3)
    return SPEC.bind(**tensors, **{**SOFT, **options})


def changed(args: Args, **tensors: Tensor | None) -> Args:
    names = {"foreground": 0, "background": 1, "mask": 2, "queries": 13}
    values = list(args)
    for name, tensor in tensors.items():
        values[names[name]] = tensor
    return tuple(values)


def shaped(b: int, c: int, h: int, w: int, **options: Any) -> Args:
    """Arguments of a large call without their memory: plans read no data."""
    x = torch.empty(1).expand(b, c, h, w)
    return SPEC.bind(x, x, **options)


def plan(args: Args, planner: str = WHOLE, out: Tensor | None = None) -> Plan:
    if out is None:
        out = args[0] if args[0].stride(-1) == 0 else SPEC.out(*args)[0]
    return simulation.plan(planner, args, (out,))


def kernels(plan: Plan) -> list[str]:
    return [launch.entry.removeprefix("irt::contextual_attention_") for launch in plan.launches]


def rounds(plan: Plan) -> int:
    return 1 + (plan.launches[-1].round or 0)


# ---- launch plans --------------------------------------------------------------------------------------------------


def test_launches() -> None:
    found = plan(shaped(1, 96, 128, 128, norm="sum_eps"))
    repeated = ["gram<float>", "weights<true>", "paste<float, 32>", "finish<float>"]  # 96: three blocks of 32 channels
    assert kernels(found) == ["squares<float>", "keys<true>", *repeated * rounds(found)]
    assert [launch.round for launch in found.launches] == [None, None, *(i // 4 for i in range(4 * rounds(found)))]
    assert {(launch.entry, launch.params) for launch in found.launches[2:6]} == {
        (launch.entry, launch.params) for launch in found.launches[2:]
    }
    assert max(launch.shared_bytes for launch in found.launches) <= 48 * 1024
    found = plan(shaped(1, 128, 16, 16, fuse_size=0))
    assert kernels(found) == [
        "squares<float>", "keys<false>", "gram<float>", "weights<false>", "paste<float, 64>", "finish<float>",
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [16, 96, 192])
def test_workspace_is_bounded_whatever_the_size(channels: int, batch: int) -> None:
    sides = (*range(2, 70, 2), 128, 256, 270, 480, 512, 1024, 2046)
    grids = [*((n, n) for n in sides), *itertools.product((2, 4, 40), (64, 400, 6000)), (6000, 2), (6000, 40)]
    for h, w in grids:
        cells = h // 2 * (w // 2)
        tables = 9 * batch * cells + 16  # a norm, another and a byte for each cell
        few = 8 * 8 * channels * 4  # the outputs of eight queries, twice
        assert plan(shaped(batch, channels, h, w)).workspace_bytes <= MOST_BYTES * cells + tables + few, (h, w)


def test_workspace_of_images() -> None:
    assert plan(shaped(1, 96, 256, 256)).workspace_bytes < 110e6  # 1024 pixels
    assert plan(shaped(1, 96, 512, 512)).workspace_bytes < 430e6  # 2048 pixels


def test_rounds_take_many_queries() -> None:
    """Some hundred queries a round, or few samples at a time: else a GPU has nothing to do."""
    assert rounds(plan(shaped(1, 96, 64, 64))) == 2
    assert rounds(plan(shaped(1, 96, 128, 128))) == 8
    assert rounds(plan(shaped(1, 96, 256, 256))) == 32
    assert rounds(plan(shaped(1, 96, 270, 480))) == 60
    assert rounds(plan(shaped(10, 96, 32, 32))) == 5
    assert rounds(plan(shaped(1, 96, 64, 64), SMALL)) == 24


def test_an_empty_batch_needs_no_launch() -> None:
    assert plan(arguments(0, 2, 4, 4)) == ([], 0)


def test_wrong_calls_are_refused() -> None:
    good = arguments(2, 3, 8, 6, mask=2, some=1)
    x, _, mask, *_ = good
    out = SPEC.out(*good)[0]
    wrong: list[tuple[Args, Tensor]] = [
        (good[:-1], out),
        ((*good, None), out),
        (changed(good, foreground=None), out),
        (changed(good, background=x[:1]), out),
        (changed(good, background=x.half()), out),
        (changed(good, foreground=x[0]), out),
        (changed(good, mask=mask[:, :, :2]), out),
        (changed(good, mask=mask[0]), out),
        (changed(good, queries=mask.expand(2, 3, 4, 3)), out),
        (changed(good, foreground=x[..., :5], background=x[..., :5]), out[..., :5]),
        (changed(good, foreground=x[:, :0], background=x[:, :0]), out[:, :0]),
        ((*good[:4], 0, *good[5:]), out),
        ((*good[:8], "bilinear", *good[9:]), out),
        ((*good[:12], 4, *good[13:]), out),
        (good, out[:1]),
        (good, out.half()),
    ]
    for args, target in wrong:
        with pytest.raises(ValueError):
            plan(args, out=target)
    for index, value in ((3, 5), (5, 4), (6, 5)):  # patch_size, rate, fuse_size
        with pytest.raises(RuntimeError, match="patch_size must be 3, rate 2 and fuse_size 0, 1 or 3"):
            plan((*good[:index], value, *good[index + 1 :]), out=out)
    doubles = changed(good, foreground=x.double(), background=x.double())
    with pytest.raises(RuntimeError, match="dtype"):
        plan(doubles, out=out.double())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 2**13, 2**11 + 2), r"h · w must be at most 2\^24"),
        ((1, 2**18 + 1, 2, 2), r"at most 2\^18 channels"),
        ((2**31, 1, 2, 2), "more elements than one launch can cover"),
    ],
)
def test_too_large_calls_are_refused(shape: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        plan(shaped(*shape))


def test_the_largest_calls_are_not() -> None:
    for shape in ((1, 1, 2**12, 2**12), (1, 2**18, 16, 16), (2**20, 1, 2, 2), (1, 1, 2, 2**23)):
        found = plan(shaped(*shape))
        assert found.launches
        assert found.workspace_bytes > 0


# ---- the kernels, simulated ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    return simulator(tmp_path_factory, "contextual_attention", contextual_entries())


def compute(simulate: Simulator, args: Args, planner: str = WHOLE, *, reverse: bool = False) -> Tensor:
    """The kernels' output, in memory that is watched on both sides."""
    like = SPEC.out(*args)[0]
    memory = torch.full((like.numel() + 64,), 77.0, dtype=like.dtype)
    out = memory[32:-32].as_strided(like.shape, like.stride(), 32).fill_(torch.nan)
    simulate(plan(args, planner, out), reverse=reverse)
    assert bool((memory[:32] == 77).all())
    assert bool((memory[-32:] == 77).all())
    return out


def exact(args: Args) -> Tensor:
    return SPEC.run_reference(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args))


def check(out: Tensor, args: Args) -> None:
    assert_close_to_truth(out, exact(args), SPEC.run_reference(*args))


@on_planners
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_simulated_samples(simulate: Simulator, sample: Any, planner: str) -> None:
    args = SPEC.bind(**sample.tensors(torch.Generator().manual_seed(1), 2.0), **sample.kwargs)
    check(compute(simulate, args, planner), args)


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_simulated_golden_runs(simulate: Simulator, name: str, run: str) -> None:
    """The same calls as the public ports' modules computed, against their numbers."""
    case, tensors = _case(name)
    (foreground, background, mask), options = _call(case, run, tensors)
    cells = grid_mask(
        mask, foreground.shape[-2:], 2, options.pop("mask_sampling"), options.pop("mask_batch")
    )  # fmt: skip
    args = SPEC.bind(foreground, background, cells, **options)
    baseline = tensors.get(f"{run}.out")
    for planner in (WHOLE, SMALL):
        out = compute(simulate, args, planner)
        assert_close_to_truth(out, exact(args), SPEC.run_reference(*args) if baseline is None else baseline)


def test_golden_runs_are_there() -> None:
    assert {param.values[0] for param in RUNS} == set(PORTS)


@on_planners
def test_simulated_small_grids(simulate: Simulator, planner: str) -> None:
    """Where all wraps of both orders meet: lines of one, two and three cells, and the transitions to more."""
    for height, width in itertools.product(range(1, 6), repeat=2):
        args = arguments(1, 3, 2 * height, 2 * width, mask=1)
        check(compute(simulate, args, planner), args)


@pytest.mark.parametrize(
    "grid",
    [(1, 400), (2, 170), (3, 150), (150, 3), (400, 1), (9, 61), (61, 9), (13, 31), (24, 24), (27, 28), (40, 23)],
)
def test_simulated_tiles(simulate: Simulator, grid: tuple[int, int]) -> None:
    """Tiles as wide as the grid and narrower ones, at all borders, with remainders."""
    args = arguments(1, 2, 2 * grid[0], 2 * grid[1], mask=1)
    assert rounds(plan(args, SMALL)) > 1
    outs = [compute(simulate, args, planner) for planner in (WHOLE, SMALL)]
    for out in outs:
        check(out, args)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("fuse_size", [0, 3])
@pytest.mark.parametrize("mask", [0, 1, 2])
def test_simulated_options(simulate: Simulator, mask: int, fuse_size: int, stride: int) -> None:
    words = itertools.product(("stride", "tf"), ("max", "sum_eps"), ("zero", "neginf"), ("const4", "overlap"))
    for i, (sampling, norm, mask_mode, divisor) in enumerate(words):
        options = {
            "sampling": sampling,
            "norm": norm,
            "mask_mode": mask_mode,
            "divisor": divisor,
            "eps": 10.0 ** (1 - i),
        }
        args = arguments(2, 3, 18, 22, mask=mask, some=i % 3, fuse_size=fuse_size, stride=stride, **options)
        check(compute(simulate, args, (WHOLE, SMALL)[i % 2]), args)


@pytest.mark.parametrize("axis", [2, 3])
def test_sampled_pixels_are_the_reference_s(simulate: Simulator, axis: int) -> None:
    """Of odd grids the middle pixel is a tie, which the rounding of each step in float32 decides."""
    for count in (1, 2, *range(3, 2048, 2)):
        numbers = torch.arange(2 * count).float()
        x = torch.zeros(1, 1, *((2 * count, 2) if axis == 2 else (2, 2 * count)))
        x += numbers.view(-1, 1) if axis == 2 else numbers
        found = plan(SPEC.bind(x, x, sampling="tf"))
        memory = torch.empty(found.workspace_bytes // 4 + 128)
        begin = -memory.data_ptr() % 256 // 4
        simulate.launch(found.launches[0], memory[begin:].data_ptr())  # squares of the pixels, from the beginning on
        assert memory[begin:][:count].sqrt().tolist() == list(source_index(2 * count, 2, "tf"))


def test_propagation_over_one_cell_is_none(simulate: Simulator) -> None:
    outs = [compute(simulate, arguments(1, 3, 12, 14, mask=1, fuse_size=size)) for size in (0, 1)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [7, 33])
def test_simulated_layouts(simulate: Simulator, channels: int, layout: str, dtype: torch.dtype) -> None:
    args = arguments(2, channels, 10, 14, mask=2, some=2, dtype=dtype)
    foreground, background, mask, queries = (
        LAYOUTS[layout](t.to(dtype)) for t in (args[0], args[1], args[2], args[13])
    )
    for planner, given in ((WHOLE, background), (SMALL, args[1])):  # both in this layout; each in its own
        layouts = changed(args, foreground=foreground, background=given, mask=mask, queries=queries)
        check(compute(simulate, layouts, planner), layouts)
    inverse = changed(args, background=background)
    check(compute(simulate, inverse), inverse)


def test_simulated_outputs_of_any_strides(simulate: Simulator) -> None:
    args = arguments(2, 5, 12, 10, mask=1)
    expected = compute(simulate, args)
    for out in (torch.empty(2, 12, 5, 20).transpose(1, 2)[..., ::2], torch.empty(10, 5, 12, 2).permute(3, 1, 2, 0)):
        simulate(plan(args, SMALL, out))
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "dtype",
    [*DTYPES, torch.float64, torch.bool, torch.uint8, torch.int32, torch.int64],
    ids=str,
)
def test_simulated_masks_of_any_dtype(simulate: Simulator, dtype: torch.dtype) -> None:
    """Any value but 0 counts: −0 does not, the smallest number and NaN do."""
    args = arguments(2, 3, 12, 14, mask=2, some=2)
    expected = compute(simulate, args)
    values = torch.ones(7)
    zeros = torch.zeros(7)
    if dtype.is_floating_point:
        values = torch.tensor([1.0, -1.0, torch.nan, torch.inf, 0.5, -0.0078125, 1e-4])
        zeros = torch.tensor([0.0, -0.0] * 3 + [0.0])
    masks = [torch.where(args[i], values, zeros).to(dtype) for i in (2, 13)]
    if dtype.is_floating_point:
        masks[0][masks[0] == 0.5] = torch.finfo(dtype).smallest_normal * 2**-3  # subnormal
    elif dtype not in (torch.bool, torch.uint8):
        masks[0] *= torch.iinfo(dtype).min  # nothing but the highest bit
    assert torch.equal(compute(simulate, changed(args, mask=masks[0], queries=masks[1])), expected)


@on_planners
def test_unwanted_queries_are_zero_and_others_as_ever(simulate: Simulator, planner: str) -> None:
    args = arguments(2, 4, 44, 52, mask=1)
    everything = compute(simulate, args, planner)
    generator = torch.Generator().manual_seed(9)
    for share in (0.0, 0.003, 0.1, 1.0):
        queries = torch.rand(2, 1, 22, 26, generator=generator) < share
        out = compute(simulate, changed(args, queries=queries), planner)
        wanted = queries.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.equal(out, torch.where(wanted, everything, 0.0))


def test_unwanted_tiles_are_not_computed(simulate: Simulator) -> None:
    """Nothing is, where no query is wanted; else the weights of cells that a wanted query touches."""
    args = arguments(1, 3, 40, 40)
    queries = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    queries[0, 0, 0, 0] = True
    full, single, none = (
        computed_floats(simulate, changed(args, queries=q)) for q in (None, queries, queries.logical_not() & False)
    )
    lines = 400  # one tile, one line of 400 keys for each cell
    assert full == (lines + lines) * 400
    assert single == (lines + 2 * 4) * 400  # weights of four neighbours in two rows
    assert none == 0


def computed_floats(simulate: Simulator, args: Args) -> int:
    """How many floats of the workspace the first two kernels of the first round write."""
    found = plan(args, WHOLE)
    memory = torch.full((found.workspace_bytes // 4 + 128,), torch.nan)
    begin = -memory.data_ptr() % 256 // 4
    for launch in found.launches[:2]:
        simulate.launch(launch, memory[begin:].data_ptr())
    before = int(memory.isfinite().sum())
    for launch in found.launches[2:4]:
        simulate.launch(launch, memory[begin:].data_ptr())
    return int(memory.isfinite().sum()) - before


@on_planners
def test_samples_with_different_masks(simulate: Simulator, planner: str) -> None:
    """No hole, some, all: where no key is usable the output is 0, or NaN with neginf, and others know nothing of it."""
    mask = torch.zeros(3, 1, 9, 11, dtype=torch.bool)
    mask[1, 0, 2:5, 3:7] = True
    mask[2] = True
    for mode, expected in (("zero", 0.0), ("neginf", torch.nan)):
        args = changed(arguments(3, 3, 18, 22, mask_mode=mode), mask=mask)
        out = compute(simulate, args, planner)
        torch.testing.assert_close(out[2], torch.full_like(out[2], expected), rtol=0, atol=0, equal_nan=True)
        check(out, args)
        for b in range(3):
            alone = changed(args, foreground=args[0][b:][:1], background=args[1][b:][:1], mask=mask[b:][:1])
            torch.testing.assert_close(compute(simulate, alone, planner), out[b:][:1], equal_nan=True)


def test_masked_keys_are_one_virtual_key(simulate: Simulator) -> None:
    """Logits so small that they all weigh the same: usable keys get one part in L, whatever the mask."""
    args = arguments(1, 3, 12, 12, mask=1, softmax_scale=1e-30)
    out = compute(simulate, changed(args, background=torch.ones_like(args[1])))
    usable = 36 - int(torch.nn.functional.max_pool2d(args[2].float(), 3, 1, 1).sum())
    inner = out[..., 2:-2, 2:-2]  # where no value's patch reaches beyond the border of the image
    assert 0 < usable < 36
    bound = usable / 36
    assert bool((inner <= bound * (1 + 1e-6)).all())
    assert inner.max().item() == pytest.approx(bound, rel=0.5)
    check(out, changed(args, background=torch.ones_like(args[1])))


def test_logits_of_thousands(simulate: Simulator) -> None:
    """Scores grow with the features; the softmax then picks one key, and must not overflow."""
    for scale in (10.0, -10.0, 300.0):
        args = arguments(1, 18, 24, 20, mask=1, softmax_scale=scale)
        out = compute(simulate, args, SMALL)
        assert bool(out.isfinite().all())
        check(out, args)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_equal_keys_share_the_weight(simulate: Simulator, constant: float) -> None:
    """All patches alike, or all zero: flat weights over thousands of keys, whose sum must not drift."""
    foreground = torch.full((1, 1, 128, 128), constant)
    background = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(2))
    queries = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    queries[..., 30, 20:24] = True  # a few, or the simulation takes long
    args = SPEC.bind(foreground, background if constant == 0 else foreground, queries=queries, fuse_size=0)
    check(compute(simulate, args), args)


def test_nan_stays_in_its_sample(simulate: Simulator) -> None:
    for tensor in (0, 1):
        args = arguments(2, 3, 12, 14)
        args[tensor][1, 0, 4, 6] = torch.nan
        out = compute(simulate, args, SMALL)
        assert bool(out[0].isfinite().all())
        assert bool(out[1].isnan().any())
        check(out, args)


@on_planners
def test_the_order_of_threads_does_not_matter(simulate: Simulator, planner: str) -> None:
    """Where a barrier is missing it would."""
    for layout, c, h, w in (("contiguous", 20, 18, 22), ("channels_last", 70, 8, 12), ("contiguous", 3, 2, 300)):
        args = arguments(2, c, h, w, mask=2, some=2)
        args = changed(args, foreground=LAYOUTS[layout](args[0]), background=LAYOUTS[layout](args[1]))
        assert torch.equal(compute(simulate, args, planner), compute(simulate, args, planner, reverse=True))


# ---- the cupy backend ----------------------------------------------------------------------------------------------


def test_cupy_launches_every_round(simulate: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = SimulatedCupy(simulate)
    monkeypatch.setattr(cupy_backend, "_module", lambda name: cupy)
    monkeypatch.setattr(cupy_backend, "_CUDA", CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cupy_backend, "_current_stream", lambda device: 0)
    monkeypatch.setattr(cupy_backend, "_stream", lambda pointer: contextlib.nullcontext())
    launch = cupy_backend.launcher(SMALL)
    for args in (arguments(1, 2, 6, 8), arguments(2, 3, 36, 50, mask=1), arguments(0, 2, 6, 8)):
        (out,) = SPEC.out(*args)
        before = len(cupy.launched)
        launch(args, (out.fill_(torch.nan),))
        check(out, args)
        assert cupy.launched[before:] == [launched.entry for launched in plan(args, SMALL).launches]
    assert len(cupy.compiled) == 1  # all six kernels at once, and no second time
    assert len(cupy.compiled[0]) == 6

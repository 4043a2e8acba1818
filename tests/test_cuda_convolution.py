"""The convolution ops' CUDA lanes without a GPU: launch plans, kernels in a simulation of CUDA's threads (and of what a
warp's tensor cores do with fragments that lie as PTX says), and the backends' switch for TF32. That everything compiles
for GPUs is tests/test_cuda_build.py."""

from __future__ import annotations

import contextlib
import math
import mmap
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.backends import cuda as cuda_backend
from inpaintrt.backends import cupy as cupy_backend
from inpaintrt.ops import _shared
from inpaintrt.runtime import native, registry
from inpaintrt.runtime.policy import use_ieee
from inpaintrt.runtime.spec import as_outputs
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

from .cuda import simulation
from .cuda.simulation import CPU, Plan, SimulatedCupy, Simulator
from .once import simulator
from .test_cuda_build import DTYPES, convolution_entries

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

OPS = ("fused_conv2d", "gated_conv2d", "partial_conv2d")
PIXELS = 128  # of a block
ROW = 64  # bytes of a filter in a slab
KINDS = ((torch.float32, True), (torch.float32, False), (torch.bfloat16, False), (torch.float16, False))
"""Dtypes, and whether without TF32."""

Args = Sequence[Any]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fused(x: Tensor, weight: Tensor, **options: Any) -> list[Any]:
    sides = options.pop("padding", 0)
    sides = [sides] * 4 if isinstance(sides, int) else sides
    return list(registry.get("fused_conv2d").bind(x, weight, **options, padding=sides))


def arguments(op: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Any]:
    """Arguments with every tensor that the op takes."""
    x, weight, bias = numbers(batch, 6, 5, 7), numbers(10, 6, 3, 3, seed=1), numbers(10, seed=2)
    mask = (numbers(batch, 6, 5, 7, seed=3) > 0).float()
    if op == "gated_conv2d":
        args = registry.get(op).bind(x, weight, bias, padding=[1, 1, 1, 1], gain=1.5)
    elif op == "partial_conv2d":
        args = registry.get(op).bind(x, mask, weight, bias, padding=[1, 1, 1, 1])
    else:
        residual = numbers(batch, 10, 5, 7, seed=4)
        args = fused(x, weight, bias=bias, padding=1, mask=mask, scale=bias + 1, shift=bias - 1, residual=residual)
    return [a.to(dtype) if isinstance(a, Tensor) else a for a in args]


def plan(op: str, args: Args, outs: Sequence[Tensor] | None = None, *, ieee: bool = True) -> Plan:
    return simulation.plan(op, args, registry.get(op).out(*args) if outs is None else outs, ieee=ieee)


def kernels(found: Plan) -> list[str]:
    return [launch.entry.removeprefix("irt::") for launch in found.launches]


# ---- launch plans --------------------------------------------------------------------------------------------------


def large(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of this shape whose elements are one: plans read no data."""
    return torch.empty(1, dtype=dtype).expand(shape)


@pytest.mark.parametrize(
    ("outputs", "side", "kernel"),
    [
        (128, 512, "<__half, irt::Products::half, 128>"),
        (192, 512, "<__half, irt::Products::half, 64>"),
        (64, 512, "<__half, irt::Products::half, 64>"),
        (3, 512, "<__half, irt::Products::half, 16>"),
        (512, 8, "<__half, irt::Products::half, 16>"),  # more blocks
    ],
)
def test_tiles_fit_the_outputs_and_fill_the_processors(outputs: int, side: int, kernel: str) -> None:
    x, weight = large(torch.float16, 1, 64, side, side), large(torch.float16, outputs, 64, 3, 3)
    out = large(torch.float16, 1, outputs, side, side)
    found = plan("fused_conv2d", fused(x, weight, padding=1), (out,))
    assert kernels(found) == ["conv2d_pack<__half>", f"fused_conv2d{kernel}"]
    pack, convolution = found.launches
    width = int(kernel.rpartition(" ")[2][:-1])
    tiles, slabs = -(-outputs // width), 9 * 64 * 2 // ROW
    assert pack.grid == (tiles * slabs, 1, 1)
    assert convolution.grid == (-(-side * side // PIXELS) * tiles, 1, 1)
    assert found.workspace_bytes == tiles * slabs * width * ROW
    assert convolution.shared_bytes <= 48 * 1024


@pytest.mark.parametrize(
    ("options", "shape", "parts", "packs", "blocks"),
    [
        ({}, (1, 5, 8, 16), 1, 9 * 2, 1),  # five channels are two packs of four
        ({"upsample": 2}, (1, 5, 8, 16), 4, 4 * 2, 4),  # four phases of 2 × 2 taps
        ({"upsample": 2, "dilation": 2}, (1, 5, 9, 17), 1, 9 * 2, 4),  # indices halved instead
        ({"transposed": True, "stride": 2}, (1, 8, 8, 16), 4, 4 * 2, 4),  # at most 2 × 2 of 3 × 3 taps
        ({"groups": 2}, (1, 8, 8, 16), 2, 9, 2),
    ],
    ids=str,
)
def test_what_is_summed(options: dict[str, Any], shape: tuple[int, ...], parts: int, packs: int, blocks: int) -> None:
    channels = shape[1] // options.get("groups", 1)
    weight = numbers(8, 8, 3, 3) if "transposed" in options else numbers(8, channels, 3, 3)
    args = fused(numbers(*shape), weight, padding=1, **options)
    found = plan("fused_conv2d", args)
    assert found.workspace_bytes == parts * -(-packs // 4) * 16 * ROW
    assert found.launches[-1].grid[0] == blocks


def test_masks_of_several_channels_are_summed_first() -> None:
    x, weight = numbers(2, 3, 6, 8), numbers(4, 3, 3, 3)
    for channels, names in ((1, ["sums"]), (3, ["plane", "sums"])):
        args = registry.get("partial_conv2d").bind(x, torch.ones(1, channels, 6, 8), weight, padding=[1] * 4)
        found = plan("partial_conv2d", args)
        assert kernels(found)[1:-1] == [f"partial_conv2d_{name}<float>" for name in names]


@pytest.mark.parametrize("op", OPS)
def test_products_follow_dtype_and_switch(op: str) -> None:
    for dtype, ieee, expected in (
        (torch.float32, True, "<float, irt::Products::ieee, 16>"),
        (torch.float32, False, "<float, irt::Products::tf32, 16>"),
        (torch.bfloat16, True, "<__nv_bfloat16, irt::Products::half, 16>"),
        (torch.float16, False, "<__half, irt::Products::half, 16>"),
    ):
        assert kernels(plan(op, arguments(op, dtype), ieee=ieee))[-1] == f"{op}{expected}"


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_needs_no_launch(op: str) -> None:
    assert plan(op, arguments(op, batch=0)) == ([], 0)


@pytest.mark.parametrize("op", OPS)
def test_wrong_calls_are_refused(op: str) -> None:
    spec, args = registry.get(op), arguments(op)
    outs, names = spec.out(*args), list(spec.signature.parameters)

    def changed(**values: Any) -> list[Any]:
        return [values.get(name, value) for name, value in zip(names, args, strict=True)]

    wrong: list[dict[str, Any]] = [
        {"x": args[0][0]},
        {"x": args[0].half()},
        {"x": args[0][:, 1:]},
        {"weight": args[names.index("weight")][..., :0]},
        {"bias": numbers(9)},
        {"stride": 0},
        {"dilation": 0},
        {"padding": [1, 1, 1]},
        {"padding": [1, 1, 1, -1]},
        {"padding": [1, 1, 2, 1]},
    ]
    wrong += {
        "fused_conv2d": [
            {"groups": 3},
            {"groups": 0},
            {"upsample": 3},
            {"output_padding": 1},
            {"transposed": True, "padding_mode": "reflect"},
            {"padding_mode": "circular"},
            {"mask": numbers(2, 5, 5, 7)},
            {"scale": numbers(3)},
            {"residual": numbers(2, 10, 5, 6)},
            {"residual_mode": "between"},
            {"second": numbers(2, 1, 5, 7)},
            {"second": numbers(2, 1, 5, 6)},
            {"activation": "gelu"},
        ],
        "gated_conv2d": [{"gain": "1"}, {"padding_mode": "circular"}, {"activation": "gelu"}],
        "partial_conv2d": [{"mask": None}, {"mask": numbers(3, 1, 5, 7)}, {"scale": "two"}, {"eps": "0"}],
    }[op]
    for values in wrong:
        with pytest.raises(ValueError):
            plan(op, changed(**values), outs)
    with pytest.raises(ValueError, match="expected"):
        plan(op, args[:-1], outs)
    with pytest.raises(ValueError):
        plan(op, args, tuple(out[..., 1:] for out in outs))
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    with pytest.raises(RuntimeError, match="dtype must be"):
        plan(op, wide, tuple(out.double() for out in outs))


def test_more_than_a_launch_can_cover_is_refused() -> None:
    x, weight = large(torch.float32, 1, 1, 2**17, 2**17), large(torch.float32, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan("fused_conv2d", fused(x, weight), (x,))
    x, weight = large(torch.float32, 1, 2**22, 1, 1), large(torch.float32, 2**22, 2**22, 1, 1)
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan("fused_conv2d", fused(x, weight), (x,))


# ---- the kernels, simulated ----------------------------------------------------------------------------------------

Simulators = Callable[[str], Simulator]


@pytest.fixture(scope="module")
def simulators(tmp_path_factory: pytest.TempPathFactory) -> Simulators:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    built: dict[str, Simulator] = {}

    def of(op: str) -> Simulator:
        if op not in built:
            built[op] = simulator(tmp_path_factory, op, convolution_entries(op))
        return built[op]

    return of


def compute(
    simulators: Simulators, op: str, args: Args, *, ieee: bool = True, reverse: bool = False
) -> tuple[Tensor, ...]:
    """The kernels' outputs, in memory that is watched on both sides."""
    held = []
    for like in registry.get(op).out(*args):
        memory = torch.full((like.numel() + 64,), 77.0, dtype=like.dtype)
        out = memory[32 : 32 + like.numel()].as_strided(like.shape, like.stride(), 32).fill_(math.nan)
        held.append((out, memory))
    outs = tuple(out for out, _ in held)
    simulators(op)(plan(op, args, outs, ieee=ieee), reverse=reverse)
    assert all(bool((memory[:32] == 77).all() and (memory[-32:] == 77).all()) for _, memory in held)
    return outs


def check(simulators: Simulators, op: str, args: Args, *, ieee: bool = True) -> None:
    judge(op, args, compute(simulators, op, args, ieee=ieee), ieee=ieee)


def judge(op: str, args: Args, outs: Sequence[Tensor], *, ieee: bool = True) -> None:
    """By the tolerance rule. Where TF32 is allowed, the baseline is the reference of operands that are rounded to it."""
    spec = registry.get(op)
    truths = as_outputs(spec.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args)))
    rounded = [a if ieee or not isinstance(a, Tensor) or a.dim() < 4 else tf32(a) for a in args]
    for out, truth, baseline in zip(outs, truths, as_outputs(spec.run_reference(*rounded)), strict=True):
        assert_close_to_truth(out, truth, baseline, context=op)


def tf32(x: Tensor) -> Tensor:
    """float32 x rounded to TF32's 10 bits, to nearest; other dtypes as they are."""
    if x.dtype != torch.float32:
        return x
    x = x.contiguous()
    return torch.where(x.isfinite(), ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32), x)


@pytest.mark.parametrize(("dtype", "ieee"), KINDS, ids=str)
@pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(op, sample, id=f"{op}-{sample.id}") for op in OPS for sample in registry.get(op).samples("full")],
)
def test_simulated_samples(simulators: Simulators, op: str, sample: Any, dtype: torch.dtype, ieee: bool) -> None:
    tensors = sample.tensors(torch.Generator().manual_seed(5))
    tensors["weight"] /= max(1, tensors["weight"][0].numel()) ** 0.5
    args = registry.get(op).bind(**{name: t.to(dtype) for name, t in tensors.items()}, **sample.kwargs)
    check(simulators, op, args, ieee=ieee)


@pytest.mark.parametrize(("dtype", "ieee"), KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_simulated_layouts(simulators: Simulators, op: str, layout: str, dtype: torch.dtype, ieee: bool) -> None:
    """Every tensor that the op takes, with six channels, which are no whole packs."""
    args = [LAYOUTS[layout](a) if isinstance(a, Tensor) else a for a in arguments(op, dtype)]
    check(simulators, op, args, ieee=ieee)


@pytest.mark.parametrize(("dtype", "ieee"), KINDS, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "offset"])
def test_simulated_packs(simulators: Simulators, layout: str, dtype: torch.dtype, ieee: bool) -> None:
    """Channels read 16 bytes at a time, or not, on either side of the border between two inputs."""
    for first, second in ((16, 8), (16, 3), (8, 0)):
        x, more = numbers(2, first, 9, 15).to(dtype), numbers(2, second, 9, 15, seed=1).to(dtype)
        weight = (numbers(20, first + second, 3, 3, seed=2) / 15).to(dtype)
        args = fused(LAYOUTS[layout](x), weight, padding=1, second=LAYOUTS[layout](more) if second else None)
        check(simulators, "fused_conv2d", args, ieee=ieee)


@pytest.mark.parametrize(("dtype", "ieee"), KINDS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_simulated_wide_tiles(simulators: Simulators, op: str, dtype: torch.dtype, ieee: bool) -> None:
    """Tiles of each width, several of them, the last not full."""
    widths = set()
    for filters, h, w, channels, kernel in ((70, 65, 65, 3, 3), (250, 64, 128, 3, 3), (250, 64, 128, 20, 1)):
        x, weight = numbers(1, channels, h, w).to(dtype), (numbers(filters, channels, kernel, kernel, seed=1) / 4)
        more = {"mask": (numbers(1, 1, h, w, seed=2) > 0).to(dtype)} if op == "partial_conv2d" else {}
        args = registry.get(op).bind(x=x, weight=weight.to(dtype), padding=[kernel // 2] * 4, **more)
        widths.add(kernels(plan(op, args, ieee=ieee))[-1].rpartition(" ")[2])
        check(simulators, op, args, ieee=ieee)
    assert widths == ({"64>"} if ieee else {"64>", "128>"})


@pytest.mark.parametrize("mode", _shared.PADDING_MODES)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"),
    [
        ((1, 1), 1, 1, 0),
        ((3, 3), 2, 1, [0, 1, 1, 2]),
        ((2, 5), 3, 1, [1, 2, 0, 3]),
        ((3, 3), 1, 3, 3),
        ((3, 2), 2, 2, [2, 0, 1, 3]),
    ],
    ids=str,
)
def test_simulated_borders(
    simulators: Simulators, kernel: tuple[int, int], stride: int, dilation: int, padding: Any, mode: str
) -> None:
    options = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode}
    check(simulators, "fused_conv2d", fused(numbers(2, 3, 6, 9), numbers(5, 3, *kernel, seed=1), **options))


@pytest.mark.parametrize("kernel", [(3, 4), (1, 2)], ids=str)
@pytest.mark.parametrize(
    ("stride", "dilation", "padding", "output_padding"),
    [(1, 1, 1, 0), (2, 1, 0, 1), (2, 1, 1, 0), (3, 1, 0, 2), (2, 2, 0, 1), (2, 3, 1, 1), (4, 2, 0, 1), (6, 4, 0, 3)],
)
def test_simulated_transposed(
    simulators: Simulators, kernel: tuple[int, int], stride: int, dilation: int, padding: int, output_padding: int
) -> None:
    """Phases with many taps, with one, with none; strides and dilations with and without a common factor."""
    options = {"stride": stride, "dilation": dilation, "padding": 0 if 1 in kernel else padding}
    x, weight = numbers(2, 3, 4, 5), numbers(3, 4, *kernel, seed=1)
    args = fused(x, weight, **options, output_padding=output_padding, transposed=True, bias=numbers(4))
    check(simulators, "fused_conv2d", args)


@pytest.mark.parametrize("mode", _shared.PADDING_MODES)
@pytest.mark.parametrize("padding", [0, 1, 2, [0, 3, 2, 1]], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 2), (5, 4)], ids=str)
def test_simulated_doubled(simulators: Simulators, kernel: tuple[int, int], padding: Any, mode: str) -> None:
    x, weight = numbers(2, 3, 5, 4), numbers(4, 3, *kernel, seed=1)
    check(simulators, "fused_conv2d", fused(x, weight, upsample=2, padding=padding, padding_mode=mode))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_simulated_16_bit_sums_of_weights(simulators: Simulators, dtype: torch.dtype) -> None:
    x, weight = numbers(1, 40, 6, 7).to(dtype), (numbers(16, 40, 3, 3, seed=1) / 19).to(dtype)
    check(simulators, "fused_conv2d", fused(x, weight, padding=1, upsample=2))


@pytest.mark.parametrize("mode", _shared.PADDING_MODES)
@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2), (2, 3)])
def test_simulated_doubled_by_index(simulators: Simulators, stride: int, dilation: int, mode: str) -> None:
    options = {"upsample": 2, "stride": stride, "dilation": dilation, "padding": [2, 1, 3, 2], "padding_mode": mode}
    check(simulators, "fused_conv2d", fused(numbers(2, 3, 5, 4), numbers(4, 3, 3, 3, seed=1), **options))


@pytest.mark.parametrize("groups", [2, 4, 12])
def test_simulated_groups(simulators: Simulators, groups: int) -> None:
    x, weight, mask = numbers(2, 12, 4, 5), numbers(48, 12 // groups, 3, 3, seed=1), numbers(1, 12, 4, 5, seed=2)
    vectors = {"bias": numbers(48, seed=3), "scale": numbers(48, seed=4), "shift": numbers(48, seed=5)}
    for layout in (torch.contiguous_format, torch.channels_last):
        args = fused(x.contiguous(memory_format=layout), weight, groups=groups, padding=1, mask=mask, **vectors)
        check(simulators, "fused_conv2d", args)


@pytest.mark.parametrize("first", [1, 4, 18])
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2}, {"groups": 4}, {"upsample": 2}, {"transposed": True, "stride": 2, "groups": 2}],
    ids=str,
)
def test_simulated_two_inputs_side_by_side(simulators: Simulators, options: dict[str, Any], first: int) -> None:
    """The border between them inside a group and at its end."""
    groups, x = options.get("groups", 1), numbers(2, 20, 4, 3)
    weight = numbers(20, 6, 3, 3, seed=1) if "transposed" in options else numbers(12, 20 // groups, 3, 3, seed=1)
    parts = x[:, :first].contiguous(memory_format=torch.channels_last), x[:, first:]
    for mask in (None, numbers(2, 20, 4, 3, seed=2), numbers(1, 1, 4, 3, seed=2)):
        args = fused(parts[0], weight, second=parts[1], mask=mask, padding=1, **options)
        check(simulators, "fused_conv2d", args)


@pytest.mark.parametrize("mode", ["before", "after"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", _shared.ACTIVATIONS)
def test_simulated_activations(simulators: Simulators, activation: str, dtype: torch.dtype, mode: str) -> None:
    x, weight, residual = numbers(1, 4, 4, 4).to(dtype), numbers(6, 4, 1, 1, seed=1).to(dtype), numbers(1, 6, 4, 4)
    alpha = 0.3 if activation in _shared.DEFAULT_ALPHA else None
    options = {"activation": activation, "alpha": alpha}
    args = fused(x, weight, **options, residual=residual.to(dtype), residual_mode=mode)
    check(simulators, "fused_conv2d", args)
    if mode == "after":
        args = registry.get("gated_conv2d").bind(x, weight, **options, gain=0.7, padding=[0] * 4)
        check(simulators, "gated_conv2d", args)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simulated_holes_are_exactly_zero(simulators: Simulators, dtype: torch.dtype, eps: float) -> None:
    """A window without a valid pixel gives 0 and not the bias, whatever the input holds there; also negative sums."""
    x, mask = numbers(2, 3, 7, 8).to(dtype), torch.ones(2, 1, 7, 8, dtype=dtype)
    mask[0, :, 2:, :6], mask[1] = 0, -0.25
    x[0, :, 4:, :3] = math.nan
    args = registry.get("partial_conv2d").bind(
        x, mask, numbers(4, 3, 3, 3).to(dtype), numbers(4).to(dtype), padding=[1] * 4, eps=eps
    )
    out, updated = compute(simulators, "partial_conv2d", args)
    holes = updated[:, 0] == 0
    assert bool(holes[0, 3:, :5].all() and holes[1].all() and not holes[0, :2].any())
    assert bool((out.movedim(1, -1)[holes] == 0).all())
    judge("partial_conv2d", args, (out, updated))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [1, 20])
@pytest.mark.parametrize("nhwc", [False, True])
def test_simulated_sums_of_soft_masks(simulators: Simulators, nhwc: bool, channels: int, batch: int) -> None:
    """Masks between 0 and 1, shared by the batch or not, of one plane or several."""
    x, mask = numbers(3, 20, 6, 5), 0.3 * numbers(batch, channels, 6, 5, seed=1).sigmoid()
    mask = mask.contiguous(memory_format=torch.channels_last) if nhwc else mask
    for bias, options in (
        (None, {"padding": [1] * 4}),
        (numbers(4), {"padding": [2, 0, 1, 2], "stride": 2, "dilation": 2, "scale": "one"}),
    ):
        args = registry.get("partial_conv2d").bind(x, mask, numbers(4, 20, 3, 3), bias, **options)
        check(simulators, "partial_conv2d", args)


@pytest.mark.parametrize("ieee", [True, False])
def test_simulated_non_finite_values_reach_their_windows_only(simulators: Simulators, ieee: bool) -> None:
    x = numbers(1, 3, 9, 9)
    x[0, 0, 2, 3], x[0, 1, 6, 6], x[0, 2, 0, 8] = math.nan, math.inf, -math.inf
    for mode in _shared.PADDING_MODES:
        args = fused(x, numbers(4, 3, 3, 3, seed=1), padding=1, padding_mode=mode, activation="relu")
        check(simulators, "fused_conv2d", args, ieee=ieee)
    args = registry.get("gated_conv2d").bind(x, numbers(4, 3, 3, 3, seed=1), padding=[1] * 4)
    check(simulators, "gated_conv2d", args, ieee=ieee)


def test_simulated_long_sums(simulators: Simulators) -> None:
    """As in LaMa's blocks: thousands of terms of one sign, which one chain of additions would get wrong."""
    x, weight = numbers(1, 512, 4, 4).relu(), numbers(16, 512, 3, 3, seed=1).abs()
    check(simulators, "fused_conv2d", fused(x, weight, padding=1))


def test_simulated_operands_are_rounded_to_nearest(simulators: Simulators) -> None:
    """Tensor cores cut off what does not fit into TF32: twice the error, and all of it on one side."""
    x, weight = numbers(1, 20, 6, 7), numbers(9, 20, 3, 3, seed=1)
    (out,) = compute(simulators, "fused_conv2d", fused(x, weight, padding=1), ieee=False)
    (rounded,) = compute(simulators, "fused_conv2d", fused(tf32(x), tf32(weight), padding=1), ieee=False)
    assert torch.equal(out, rounded)
    judge("fused_conv2d", fused(tf32(x), tf32(weight), padding=1), (rounded,))  # as exact as float32 then
    (exact,) = compute(simulators, "fused_conv2d", fused(x, weight, padding=1), ieee=True)
    assert not torch.equal(out, exact)


@pytest.mark.parametrize("far_dimension", range(4))
@pytest.mark.parametrize("op", OPS)
def test_simulated_offsets_beyond_32_bits(simulators: Simulators, op: str, far_dimension: int) -> None:
    """Elements 2³⁰ apart, in memory that is reserved but, except for a few pages, not there."""
    far, shape, strides = 2**30, [2, 4, 4, 4], [64, 16, 4, 1]
    shape[far_dimension], strides[far_dimension] = 4, far
    reserved = mmap.mmap(-1, 8 * far, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    memory = torch.frombuffer(reserved, dtype=torch.float16)
    x, out, mask = (memory.as_strided(shape, strides, first) for first in (0, 256, 512))
    x.copy_(torch.randn(shape)), mask.copy_(torch.randn(shape) > 0)
    weight = numbers(8 if op == "gated_conv2d" else 4, 4, 3, 3).half()
    outs: tuple[Tensor, ...] = (out,)
    if op == "gated_conv2d":
        args: Args = registry.get(op).bind(x, weight, padding=[1] * 4)
    elif op == "partial_conv2d":
        args = registry.get(op).bind(x, mask, weight, padding=[1] * 4)
        outs = (out, torch.empty(shape[0], 1, *shape[2:]).half())
    else:
        args = fused(x, weight, padding=1, mask=mask, residual=x)
    simulators(op)(plan(op, args, outs))
    judge(op, args, outs)


@pytest.mark.parametrize(("dtype", "ieee"), KINDS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_order_of_threads_does_not_matter(simulators: Simulators, op: str, dtype: torch.dtype, ieee: bool) -> None:
    """Where a barrier is missing it would."""
    args = arguments(op, dtype)
    first, second = (compute(simulators, op, args, ieee=ieee, reverse=reverse) for reverse in (False, True))
    assert all(map(torch.equal, first, second))


# ---- the backends --------------------------------------------------------------------------------------------------


def test_tf32_is_torchs_switch_unless_ieee_forbids_it() -> None:
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    try:
        for value, whole in (("tf32", False), ("ieee", True), ("tf32", False)):
            switch.fp32_precision = value
            assert cuda_backend.whole_products(torch.float32) is whole
            assert not cuda_backend.whole_products(torch.bfloat16), "16-bit products are exact"
            with use_ieee():
                assert cuda_backend.whole_products(torch.float32)
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize("op", OPS)
def test_cupy_launches_in_order_with_a_workspace(
    simulators: Simulators, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy = SimulatedCupy(simulators(op))
    monkeypatch.setattr(cupy_backend, "_module", lambda name: cupy)
    monkeypatch.setattr(cupy_backend, "_CUDA", CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cupy_backend, "_current_stream", lambda device: 0)
    monkeypatch.setattr(cupy_backend, "_stream", lambda pointer: contextlib.nullcontext())
    launch = cupy_backend.launcher(op)
    args = tuple(arguments(op))
    outs = registry.get(op).out(*args)
    with use_ieee():
        launch(args, outs)
    judge(op, args, outs)
    assert cupy.launched == [launched.entry for launched in plan(op, args).launches]
    assert "irt::Products::ieee" in cupy.launched[-1]

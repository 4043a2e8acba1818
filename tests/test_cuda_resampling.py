"""The CUDA lanes of modulated_conv2d and upfirdn2d without a GPU: launch plans, kernels in a simulation of CUDA's threads,
and the cupy backend on simulated kernels. That everything compiles for GPUs is tests/test_cuda_build.py."""

from __future__ import annotations

import contextlib
import mmap
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt.backends import cupy as cupy_backend
from inpaintrt.runtime import native, registry
from inpaintrt.runtime.policy import use_ieee
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

from .cuda.simulation import CPU, SimulatedCupy, Simulator
from .once import simulator
from .test_cuda_build import ENTRIES
from .test_cuda_convolution import KINDS, Args, Simulators, kernels, numbers, plan, tf32
from .test_cuda_convolution import compute as computed

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

OPS = ("modulated_conv2d", "upfirdn2d")
FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def modulated(x: Tensor, weight: Tensor, style: Tensor, f: Tensor | None = None, **options: Any) -> list[Any]:
    spec = registry.get("modulated_conv2d")
    args = spec.bind(x, weight, style.to(x.dtype), resample_filter=f, **options)
    return list(args)


def arguments(op: str, dtype: torch.dtype = torch.float32, batch: int = 2, **options: Any) -> list[Any]:
    """Arguments with every tensor that the op takes; six channels are no whole packs."""
    x = numbers(batch, 6, 5, 7).to(dtype)
    if op == "upfirdn2d":
        return list(registry.get(op).bind(x, FILTER, up=[2, 2], padding=[2, 1, 2, 1], gain=4.0, **options))
    up, down = options.get("up", 1), options.get("down", 1)
    size = [n * up // down for n in x.shape[2:]]
    more = {
        "noise": numbers(batch, 1, *size, seed=3),
        "noise_strength": numbers(1, seed=4),
        "bias": numbers(10, seed=5),
    }
    more = {name: t.to(dtype) for name, t in more.items()}
    ends = {"activation": "leaky_relu", "gain": 2**0.5, "clamp": 2.0, "padding": 1}
    weight, style = (numbers(10, 6, 3, 3, seed=1) / 7).to(dtype), numbers(batch, 6, seed=2)
    return modulated(x, weight, style, FILTER if up != down else None, **more, **ends, **options)


# ---- launch plans --------------------------------------------------------------------------------------------------


def test_what_is_launched() -> None:
    """Doubling is filtered last, halving first; channels that are neighbours are filtered 16 bytes at a time."""

    def launched(channels: int = 8, *, inner: bool = True, **options: Any) -> list[str]:
        x = numbers(2, channels, 6, 8)
        x = x.contiguous(memory_format=torch.channels_last) if inner else x
        args = modulated(x, numbers(12, channels, 3, 3), numbers(2, channels), FILTER, padding=1, **options)
        return [name.removeprefix("modulated_conv2d") for name in kernels(plan("modulated_conv2d", args))]

    first = ["conv2d_pack<float>", "_style<float>"]
    convolution = "<float, irt::Products::ieee, 16>"
    assert launched() == [*first, convolution]
    assert launched(up=2) == [*first, convolution, "_filter<float, 4>"]
    assert launched(down=2) == [*first, "_filter<float, 4>", convolution]
    assert launched(5, down=2) == [*first, "_filter<float, 1>", convolution]
    assert launched(up=2, inner=False) == [*first, convolution, "_filter<float, 1>"]


def test_the_workspace_holds_weights_factors_and_the_image_between() -> None:
    for up, down, between in ((1, 1, 0), (2, 1, 2 * 10 * 11 * 15), (1, 2, 2 * 6 * 5 * 7)):
        args = arguments("modulated_conv2d", torch.float16, up=up, down=down)
        found = plan("modulated_conv2d", args)
        weights = (4 if up == 2 else 1) * -(-(4 if up == 2 else 9) // 4) * 16 * 64
        expected = weights + 256 + (256 + 2 * between if between else 2 * 10 * 4)
        assert found.workspace_bytes == expected


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_needs_no_launch(op: str) -> None:
    assert plan(op, arguments(op, batch=0)) == ([], 0)


@pytest.mark.parametrize("op", OPS)
def test_wrong_calls_are_refused(op: str) -> None:
    spec, args = registry.get(op), arguments(op)
    outs, names = spec.out(*args), list(spec.signature.parameters)
    wrong: list[dict[str, Any]] = [
        {"x": args[0][0]},
        {"x": args[0].half()},
        {"x": args[0][:, 1:]},
        {"padding": [1, 1, 1]},
        {"up": 3},
    ]
    if op == "upfirdn2d":
        wrong += [{"f": FILTER[0]}, {"f": FILTER.half()}, {"f": None}, {"up": [0, 1]}, {"gain": "1"}]
    else:
        wrong += [
            {"weight": args[1][:, 1:]},
            {"style": args[2][:, 1:]},
            {"style": args[2].half()},
            {"noise": numbers(3, 1, 5, 7)},
            {"noise_strength": numbers(2)},
            {"bias": numbers(9)},
            {"resample_filter": numbers(9, 1)},
            {"activation": "gelu"},
            {"clamp": "1"},
        ]
    for values in wrong:
        changed = [values.get(name, value) for name, value in zip(names, args, strict=True)]
        with pytest.raises(ValueError):
            plan(op, changed, outs)
    with pytest.raises(ValueError, match="expected"):
        plan(op, args[:-1], outs)
    with pytest.raises(ValueError):
        plan(op, args, tuple(out[..., 1:] for out in outs))
    wide = [a.double() if isinstance(a, Tensor) and a is not FILTER else a for a in args]
    with pytest.raises(RuntimeError, match="dtype must be"):
        plan(op, wide, tuple(out.double() for out in outs))


@pytest.mark.parametrize("op", OPS)
def test_more_than_a_launch_can_cover_is_refused(op: str) -> None:
    x = torch.empty(1).expand(1, 1, 2**16, 2**16)
    args = registry.get(op).bind(x, *((FILTER[:1, :1],) if op == "upfirdn2d" else (x[:, :, :1, :1], x[:, :, 0, 0])))
    with pytest.raises(RuntimeError, match="more elements than one launch can cover"):
        plan(op, args, (x,))


# ---- the kernels, simulated ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulators(tmp_path_factory: pytest.TempPathFactory) -> Simulators:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found")
    built: dict[str, Simulator] = {}

    def of(op: str) -> Simulator:
        if op not in built:
            built[op] = simulator(tmp_path_factory, op, ENTRIES[op]())
        return built[op]

    return of


def compute(simulators: Simulators, op: str, args: Args, **options: bool) -> Tensor:
    (out,) = computed(simulators, op, args, **options)
    return out


def check(simulators: Simulators, op: str, args: Args, *, ieee: bool = True) -> None:
    judge(op, args, compute(simulators, op, args, ieee=ieee), ieee=ieee)


def judge(op: str, args: Args, out: Tensor, *, ieee: bool = True) -> None:
    """By the tolerance rule. Where TF32 is allowed, the baseline is the reference of operands that are rounded to it: the
    weight, and the image times the style."""
    spec = registry.get(op)
    truth = spec.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
    rounded = list(args)
    if not ieee and op == "modulated_conv2d":
        x, weight, style = args[:3]
        rounded[:2] = tf32(x * style[:, :, None, None]) / style[:, :, None, None], tf32(weight)
    assert_close_to_truth(out, truth, spec.run_reference(*rounded), context=op)


@pytest.mark.parametrize(("dtype", "ieee"), KINDS, ids=str)
@pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(op, sample, id=f"{op}-{sample.id}") for op in OPS for sample in registry.get(op).samples("full")],
)
def test_simulated_samples(simulators: Simulators, op: str, sample: Any, dtype: torch.dtype, ieee: bool) -> None:
    if sample.id == "one" and op == "modulated_conv2d" and dtype == torch.float32 and not ieee:
        pytest.skip("a single product: the baseline divides its weight, and the rounding of it, out again")
    tensors = sample.tensors(torch.Generator().manual_seed(5))
    whole = {name: t if name in ("f", "resample_filter") else t.to(dtype) for name, t in tensors.items()}
    if "weight" in whole:
        whole["weight"] /= max(1, whole["weight"][0].numel()) ** 0.5
    check(simulators, op, registry.get(op).bind(**whole, **sample.kwargs), ieee=ieee)


@pytest.mark.parametrize(("dtype", "ieee"), KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "options"), [
    ("upfirdn2d", {}), ("modulated_conv2d", {}), ("modulated_conv2d", {"up": 2}), ("modulated_conv2d", {"down": 2}),
], ids=str)  # fmt: skip
def test_simulated_layouts(
    simulators: Simulators, op: str, options: dict[str, int], layout: str, dtype: torch.dtype, ieee: bool
) -> None:
    """Every tensor that the op takes, with six channels, which are no whole packs."""
    args = [
        LAYOUTS[layout](a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments(op, dtype, **options)
    ]
    check(simulators, op, args, ieee=ieee)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "offset"])
@pytest.mark.parametrize(
    "options", [{"up": 2}, {"down": 2}, {"up": 2, "flip_weight": True}, {"flip_weight": True}], ids=str
)
def test_simulated_packs(simulators: Simulators, options: dict[str, Any], layout: str, dtype: torch.dtype) -> None:
    """Channels that are filtered 16 bytes at a time, or not; without a filter too."""
    x, weight = LAYOUTS[layout](numbers(2, 16, 6, 9).to(dtype)), (numbers(24, 16, 3, 3, seed=2) / 12).to(dtype)
    for f in (FILTER, None):
        args = modulated(x, weight, numbers(2, 16, seed=3), f, padding=1, weight_gain=-0.5, **options)
        check(simulators, "modulated_conv2d", args)


@pytest.mark.parametrize(("dtype", "ieee"), KINDS, ids=str)
def test_simulated_wide_tiles(simulators: Simulators, dtype: torch.dtype, ieee: bool) -> None:
    """Tiles of each width, several of them, the last not full."""
    widths = set()
    for filters, h, w, channels, kernel in ((70, 65, 65, 3, 3), (250, 64, 128, 20, 1)):
        x, weight = numbers(1, channels, h, w).to(dtype), (numbers(filters, channels, kernel, kernel, seed=1) / 4)
        args = modulated(x, weight.to(dtype), numbers(1, channels, seed=2), padding=kernel // 2)
        widths.add(kernels(plan("modulated_conv2d", args, ieee=ieee))[-1].rpartition(" ")[2])
        check(simulators, "modulated_conv2d", args, ieee=ieee)
    assert widths == ({"64>"} if ieee else {"64>", "128>"})


@pytest.mark.parametrize("size", [1e-6, 3e4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_simulated_styles_out_of_range(simulators: Simulators, dtype: torch.dtype, size: float) -> None:
    """Products of 16 bits would overflow or vanish without the power of two that is taken out of the style."""
    x, weight = numbers(1, 40, 6, 6).to(dtype) * 50, numbers(8, 40, 3, 3, seed=1).to(dtype)
    style = (numbers(1, 40, seed=2) * size).to(dtype)
    args = modulated(x, weight, style, padding=1, eps=1e-8)
    out = compute(simulators, "modulated_conv2d", args)
    assert bool(out.isfinite().all())
    judge("modulated_conv2d", args, out)


@pytest.mark.parametrize("op", OPS)
def test_the_order_of_threads_does_not_matter(simulators: Simulators, op: str) -> None:
    """Where a barrier is missing it would."""
    for options in ({}, {"up": 2}, {"down": 2}) if op == "modulated_conv2d" else ({},):
        args = arguments(op, **options)
        assert torch.equal(*(compute(simulators, op, args, reverse=reverse) for reverse in (False, True)))


@pytest.mark.parametrize("far_dimension", range(4))
@pytest.mark.parametrize("op", OPS)
def test_simulated_strides_beyond_32_bits(simulators: Simulators, op: str, far_dimension: int) -> None:
    """Plans of elements 2³⁰ apart give what plans of neighbours give, in memory that is not there."""
    far, shape, strides = 2**30, [2, 4, 4, 4], [64, 16, 4, 1]
    shape[far_dimension], strides[far_dimension] = 4, far
    reserved = mmap.mmap(-1, 8 * far, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    memory = torch.frombuffer(reserved, dtype=torch.float16)
    x, out = (memory.as_strided(shape, strides, first) for first in (0, 256))
    x.copy_(torch.randn(shape))
    if op == "upfirdn2d":
        args = list(registry.get(op).bind(x, FILTER, padding=[2, 1, 2, 1]))
    else:
        args = modulated(x, numbers(4, 4, 3, 3).half(), numbers(shape[0], 4), padding=1)
    simulators(op)(plan(op, args, (out,)))
    judge(op, args, out)


# ---- the cupy backend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "options"), [("upfirdn2d", {}), ("modulated_conv2d", {"up": 2})], ids=str)
def test_cupy_launches_in_order_with_a_workspace(
    simulators: Simulators, op: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy = SimulatedCupy(simulators(op))
    monkeypatch.setattr(cupy_backend, "_module", lambda name: cupy)
    monkeypatch.setattr(cupy_backend, "_CUDA", CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cupy_backend, "_current_stream", lambda device: 0)
    monkeypatch.setattr(cupy_backend, "_stream", lambda pointer: contextlib.nullcontext())
    launch = cupy_backend.launcher(op)
    args = tuple(arguments(op, **options))
    outs = registry.get(op).out(*args)
    with use_ieee():
        launch(args, outs)
    judge(op, args, outs[0])
    assert cupy.launched == [launched.entry for launched in plan(op, args).launches]

"""The convolution ops' Triton kernels in the interpreter: forms, borders, memory, precision; beyond test_ops.py's matrix.

Maps are small: the interpreter takes milliseconds per step of a program.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
    pytest.skip("set TRITON_INTERPRET=1: the interpreter stage of CI runs these", allow_module_level=True)
pytest.importorskip("triton")

from inpaintrt.kernels import _conv2d, _lib, fused_conv2d, gated_conv2d, partial_conv2d

from inpaintrt import ops
from inpaintrt.ops import _shared
from inpaintrt.runtime import registry
from inpaintrt.runtime.policy import use_backend, use_ieee
from inpaintrt.runtime.spec import as_outputs
from inpaintrt.testing import assert_close_to_truth, close_to_truth, recipe
from inpaintrt.testing.layouts import LAYOUTS

# numpy, which computes for the interpreter, reports the overflows and NaN that these tests provoke.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GOLDEN = pathlib.Path(__file__).parent / "golden"
KERNELS = {"fused_conv2d": fused_conv2d, "gated_conv2d": gated_conv2d, "partial_conv2d": partial_conv2d}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest blocks, so that small maps have several of every kind, with edges."""
    sizes = {"PIXELS": 32, "OUTPUTS": 16, "CHANNELS": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(_conv2d, "config", lambda *_: sizes)
    monkeypatch.setattr(_conv2d, "_BLOCK", 128)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compute(op: str, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The kernels' outputs, in memory that was NaN."""
    outs = registry.get(op).out(*args)
    KERNELS[op].launch(args, tuple(out.fill_(math.nan) for out in outs))
    return outs


def check(op: str, args: Sequence[Any], outs: Sequence[Tensor] | None = None) -> None:
    """The kernels by the tolerance rule."""
    spec = registry.get(op)
    truths = as_outputs(spec.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args)))
    baselines = as_outputs(spec.run_reference(*args))
    for out, truth, baseline in zip(outs or compute(op, args), truths, baselines, strict=True):
        assert_close_to_truth(out, truth, baseline, context=op)


def fused(x: Tensor, weight: Tensor, **options: Any) -> list[Any]:
    sides = options.pop("padding", 0)
    return list(
        registry.get("fused_conv2d").bind(
            x, weight, **options, padding=[sides] * 4 if isinstance(sides, int) else sides
        )
    )


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


# ---- forms and borders ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", _shared.PADDING_MODES)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"),
    [
        ((1, 1), 1, 1, 0),
        ((3, 3), 1, 1, 1),
        ((3, 3), 2, 1, [0, 1, 1, 2]),
        ((2, 5), 3, 1, [1, 2, 0, 3]),
        ((3, 3), 1, 3, 3),
        ((3, 2), 2, 2, [2, 0, 1, 3]),
    ],
    ids=str,
)
def test_borders(kernel: tuple[int, int], stride: int, dilation: int, padding: Any, mode: str) -> None:
    options = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode}
    check("fused_conv2d", fused(numbers(2, 3, 6, 9), numbers(5, 3, *kernel, seed=1), **options))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kernel", [(3, 4), (1, 2)], ids=str)
@pytest.mark.parametrize(
    ("stride", "dilation", "padding", "output_padding"),
    [
        (1, 1, 1, 0),
        (2, 1, 0, 1),
        (2, 1, 1, 0),
        (3, 1, 0, 2),
        (2, 2, 0, 1),
        (2, 3, 1, 1),
        (4, 2, 0, 1),
        (3, 2, 1, 0),
        (6, 4, 0, 3),
    ],
)
def test_transposed(kernel: tuple[int, int], stride: int, dilation: int, padding: int, output_padding: int) -> None:
    """Phases with many taps, with one, with none; strides and dilations with and without a common factor."""
    if padding and 1 in kernel:
        padding = 0
    options = {"stride": stride, "dilation": dilation, "padding": padding, "output_padding": output_padding}
    x, weight = numbers(1, 4, 3, 2), numbers(4, 3, *kernel, seed=1)
    check("fused_conv2d", fused(x, weight, transposed=True, **options, bias=numbers(3)))
    check("fused_conv2d", fused(x, weight[:, :1], transposed=True, **options, groups=2))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", _shared.PADDING_MODES)
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("padding", [1, 2, [1, 0, 0, 1], [0, 3, 2, 1]], ids=str)
def test_doubled(kernel: tuple[int, int], padding: Any, mode: str) -> None:
    x, weight = numbers(1, 3, 4, 5), numbers(4, 3, *kernel, seed=1)
    args = fused(x, weight, upsample=2, padding=padding, padding_mode=mode)
    check("fused_conv2d", args)
    constants = fused_conv2d.forward(args, registry.get("fused_conv2d").out(*args))[-1].constants
    by_index = mode == "reflect" and (padding == 2 or padding == [0, 3, 2, 1])
    assert (constants["FORM"], constants["HALVED"]) == (("plain", True) if by_index else ("doubled", False))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", _shared.PADDING_MODES)
@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2), (2, 3)])
def test_doubled_by_index(stride: int, dilation: int, mode: str) -> None:
    options = {"upsample": 2, "stride": stride, "dilation": dilation, "padding": [2, 1, 3, 2], "padding_mode": mode}
    check("fused_conv2d", fused(numbers(2, 3, 5, 4), numbers(4, 3, 3, 3, seed=1), **options))


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_sums_of_weights(dtype: torch.dtype, upsample: int) -> None:
    x, weight = numbers(1, 40, 6, 7).to(dtype), (numbers(16, 40, 3, 3, seed=1) / 19).to(dtype)
    check("fused_conv2d", fused(x, weight, padding=1, upsample=upsample))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("groups", [1, 2, 4, 12])
def test_groups(groups: int) -> None:
    """Several blocks of outputs in a group, and groups smaller than any block."""
    x, weight, mask = numbers(2, 12, 4, 5), numbers(24, 12 // groups, 3, 3, seed=1), numbers(1, 12, 4, 5, seed=2)
    vectors = {"bias": numbers(24, seed=3), "scale": numbers(24, seed=4), "shift": numbers(24, seed=5)}
    for layout in (torch.contiguous_format, torch.channels_last):
        args = fused(x.contiguous(memory_format=layout), weight, groups=groups, padding=1, mask=mask, **vectors)
        check("fused_conv2d", args)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("first", [1, 4, 18])
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2}, {"groups": 4}, {"upsample": 2}, {"transposed": True, "stride": 2, "groups": 2}],
    ids=str,
)
def test_two_inputs_side_by_side(options: dict[str, Any], first: int) -> None:
    """The border between them inside a group, at its end, and steps of channels that do not end there."""
    groups, x = options.get("groups", 1), numbers(2, 20, 4, 3)
    weight = numbers(20, 6, 3, 3, seed=1) if "transposed" in options else numbers(12, 20 // groups, 3, 3, seed=1)
    parts = x[:, :first].contiguous(memory_format=torch.channels_last), x[:, first:]
    for mask in (None, numbers(2, 20, 4, 3, seed=2), numbers(1, 1, 4, 3, seed=2)):
        args = fused(parts[0], weight, second=parts[1], mask=mask, padding=1, **options)
        (out,) = compute("fused_conv2d", args)
        check("fused_conv2d", args, (out,))


@pytest.mark.parametrize("op", KERNELS)
def test_empty_batches_launch_no_convolution(op: str) -> None:
    args = arguments(op, batch=2)
    args = [a[:0] if isinstance(a, Tensor) and a.dim() == 4 and a.shape[0] == 2 else a for a in args]
    outs = compute(op, args)
    assert all(out.numel() == 0 for out in outs)
    assert KERNELS[op].forward(args, outs) == []


# ---- what follows the sum -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["before", "after"])
@pytest.mark.parametrize("activation", _shared.ACTIVATIONS)
def test_activations(activation: str, mode: str) -> None:
    x, weight = numbers(1, 4, 4, 4), numbers(6, 4, 1, 1, seed=1)
    alpha = 0.3 if activation in _shared.DEFAULT_ALPHA else None
    options = {"activation": activation, "alpha": alpha}
    check("fused_conv2d", fused(x, weight, **options, residual=numbers(1, 6, 4, 4, seed=2), residual_mode=mode))
    check("gated_conv2d", registry.get("gated_conv2d").bind(x, weight, **options, gain=0.7, padding=[0] * 4))


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_holes_are_exactly_zero(dtype: torch.dtype, eps: float) -> None:
    """A window without a valid pixel gives 0 and not the bias, whatever the input holds there; also −0 and negative sums."""
    x, mask = numbers(2, 3, 7, 8).to(dtype), torch.ones(2, 1, 7, 8, dtype=dtype)
    mask[0, :, 2:, :6], mask[1] = 0, -0.25
    x[0, :, 4:, :3] = math.nan
    args = registry.get("partial_conv2d").bind(
        x, mask, numbers(4, 3, 3, 3).to(dtype), numbers(4).to(dtype), padding=[1] * 4, eps=eps
    )
    out, updated = compute("partial_conv2d", args)
    holes = updated[:, 0] == 0
    assert bool(holes[0, 3:, :5].all() and holes[1].all() and not holes[0, :2].any())
    assert bool((out.movedim(1, -1)[holes] == 0).all())
    check("partial_conv2d", args, (out, updated))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [1, 20])
@pytest.mark.parametrize("nhwc", [False, True])
def test_sums_of_soft_masks(nhwc: bool, channels: int, batch: int) -> None:
    """Masks between 0 and 1, shared by the batch or not, of one plane or several."""
    x, mask = numbers(3, 20, 6, 5), 0.3 * numbers(batch, channels, 6, 5, seed=1).sigmoid()
    mask = mask.contiguous(memory_format=torch.channels_last) if nhwc else mask
    for bias, options in (
        (None, {"padding": [1] * 4}),
        (numbers(4), {"padding": [2, 0, 1, 2], "stride": 2, "dilation": 2, "scale": "one"}),
    ):
        check("partial_conv2d", registry.get("partial_conv2d").bind(x, mask, numbers(4, 20, 3, 3), bias, **options))


def test_non_finite_values_reach_their_windows_only() -> None:
    x = numbers(1, 3, 9, 9)
    x[0, 0, 2, 3], x[0, 1, 6, 6], x[0, 2, 0, 8] = math.nan, math.inf, -math.inf
    for mode in _shared.PADDING_MODES:
        args = fused(x, numbers(4, 3, 3, 3, seed=1), padding=1, padding_mode=mode, activation="relu")
        check("fused_conv2d", args)
    args = registry.get("gated_conv2d").bind(x, numbers(4, 3, 3, 3, seed=1), padding=[1] * 4)
    check("gated_conv2d", args)


# ---- public layers --------------------------------------------------------------------------------------------------


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


@pytest.mark.parametrize(
    ("case", "run"), [("gconv_jy", "v2.k5"), ("gconv_mma", "k5"), ("gconv_nip", "k5"), ("gconv_csq", "k5")]
)
def test_gated_golden(case: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, tensors = golden(case)
    key = {"gconv_jy": "v2.k5.conv", "gconv_mma": "k5.conv.conv", "gconv_nip": "k5.conv", "gconv_csq": "k5"}[case]
    parts = [".conv2d", ".mask_conv2d"] if case == "gconv_csq" else [""]
    weight, bias = (
        torch.cat([recipe.tensor_for(name, tuple(spec["state_dict"][name]["shape"])) for name in names])
        for names in ([f"{key}{part}.{kind}" for part in parts] for kind in ("weight", "bias"))
    )
    x = recipe.image(spec["runs"][run]["x"]["name"], *spec["runs"][run]["x"]["shape"]) * 4 - 2
    mode = "reflect" if case == "gconv_mma" else "zeros"
    (out,) = compute(
        "gated_conv2d", registry.get("gated_conv2d").bind(x, weight, bias, padding=[2] * 4, padding_mode=mode)
    )
    assert_close_to_truth(out, tensors[f"{run}.out64"], tensors[f"{run}.out"])


def _partial_runs() -> list[Any]:
    """Calls of the layer itself, without groups, which the op has not."""
    found = []
    for case, kind in (("partialconv_nvidia", "PartialConv2d"), ("partialconv_naoto", "PartialConv")):
        spec, _ = golden(case)
        for run, given in spec["runs"].items():
            module = spec["modules"][given["module"]]
            plain = (
                module["class"] == kind and isinstance(module["state_dict"], list) and "groups" not in module["args"]
            )
            if plain and set(given["inputs"]) == {"x", "mask"}:
                found.append(pytest.param(case, run, id=f"{case}-{run}"))
    assert len(found) > 20
    return found


@pytest.mark.parametrize(("case", "run"), _partial_runs())
def test_partial_golden(case: str, run: str) -> None:
    spec, tensors = golden(case)
    given, module = spec["runs"][run]["inputs"], spec["modules"][spec["runs"][run]["module"]]
    scales = {key: 2.0**e for step in module["after_fill"] if step["op"] == "pow2" for key, e in step["keys"].items()}
    state = {
        key: recipe.tensor_for(key, tuple(shape)) * scales.get(key, 1.0) for key, shape, *_ in module["state_dict"]
    }
    prefix = "input_conv." if case == "partialconv_naoto" else ""
    x = recipe.image(given["x"]["name"], *given["x"]["shape"]) * given["x"]["scale"] + given["x"]["shift"]
    mask = tensors.get(f"{run}.mask")
    if mask is None:
        shape, constant = given["mask"]["shape"], given["mask"]["kind"] == "const"
        mask = torch.full(shape, given["mask"]["value"]) if constant else recipe.image(given["mask"]["name"], *shape)
    options = {name: module["args"][name] for name in ("stride", "dilation") if name in module["args"]}
    options |= {"padding": [module["args"].get("padding", 0)] * 4, "scale": "one" if prefix else "window"}
    args = registry.get("partial_conv2d").bind(x, mask, state[f"{prefix}weight"], state.get(f"{prefix}bias"), **options)
    out, updated = compute("partial_conv2d", args)
    assert_close_to_truth(out, tensors[f"{run}.out64"], tensors[f"{run}.out"])
    assert torch.equal(updated, tensors[f"{run}.mask_out"][:, :1].expand_as(updated))


# ---- memory ---------------------------------------------------------------------------------------------------------


def poison(shape: tuple[int, ...], dtype: torch.dtype, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A dense tensor full of NaN (dimensions in memory in `order`) inside a larger buffer of NaN: (tensor, buffer)."""
    buffer = torch.full((math.prod(shape) + 128,), math.nan, dtype=dtype)
    return buffer[64:-64].view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))]), buffer


def margins_untouched(buffer: Tensor) -> bool:
    return bool(buffer[:64].isnan().all() and buffer[-64:].isnan().all())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", KERNELS)
def test_any_strides_of_every_tensor(op: str, dtype: torch.dtype, layout: str) -> None:
    args = [LAYOUTS[layout](a) if isinstance(a, Tensor) else a for a in arguments(op, dtype)]
    order = {"channels_last": (0, 2, 3, 1), "every_other": (3, 0, 2, 1)}.get(layout, (0, 1, 2, 3))
    fakes = registry.get(op).out(*args)
    held = [poison(tuple(fake.shape), dtype, order if i == 0 else (0, 1, 2, 3)) for i, fake in enumerate(fakes)]
    outs = tuple(out for out, _ in held)
    KERNELS[op].launch(args, outs)
    check(op, args, outs)
    assert all(margins_untouched(buffer) for _, buffer in held)


@pytest.mark.parametrize("op", KERNELS)
def test_workspaces_are_written_before_read_and_only_inside(op: str) -> None:
    args = arguments(op)
    if op == "fused_conv2d":  # with sums of weights, too
        args = fused(args[0], args[1], padding=1, upsample=2)
    expected = compute(op, args)
    outs = registry.get(op).out(*args)
    launches = KERNELS[op].forward(args, outs)
    own = {t.untyped_storage().data_ptr() for t in (*args, *outs) if isinstance(t, Tensor)}
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def poisoned(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() in own:
            return value
        inside, _ = buffers.setdefault(value.data_ptr(), poison((value.numel(),), value.dtype, (0,)))
        return inside.view(value.shape)

    _lib.run([dataclasses.replace(k, args=tuple(map(poisoned, k.args))) for k in launches], outs)
    assert all(map(torch.equal, outs, expected))
    assert len(buffers) == {"fused_conv2d": 1, "gated_conv2d": 1, "partial_conv2d": 3}[op]
    assert all(margins_untouched(buffer) for _, buffer in buffers.values())


@pytest.mark.parametrize("op", KERNELS)
def test_weights_with_channels_innermost_are_read_in_place(op: str) -> None:
    args = arguments(op)
    at = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.shape == (10, 6, 3, 3))
    outs = registry.get(op).out(*args)
    kernels = [launch.kernel for launch in KERNELS[op].forward(args, outs)]
    assert kernels[-2:] == [_conv2d._pack, _conv2d._convolve]
    expected = compute(op, args)
    args[at] = args[at].contiguous(memory_format=torch.channels_last)
    assert [launch.kernel for launch in KERNELS[op].forward(args, outs)] == [*kernels[:-2], _conv2d._convolve]
    assert all(map(torch.equal, compute(op, args), expected))
    one = fused(numbers(1, 6, 3, 3), numbers(4, 6, 1, 1))
    assert len(fused_conv2d.forward(one, registry.get("fused_conv2d").out(*one))) == 1


@pytest.mark.parametrize("op", KERNELS)
def test_wide_offsets_change_nothing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(op)
    narrow = compute(op, args)
    monkeypatch.setattr(_conv2d, "needs_wide", lambda *tensors: True)
    assert all(launch.constants["WIDE"] for launch in KERNELS[op].forward(args, narrow))
    assert all(map(torch.equal, compute(op, args), narrow))
    doubled = fused(args[0], numbers(10, 6, 3, 3), upsample=2, padding=1)
    check("fused_conv2d", doubled)


@pytest.mark.parametrize("far_dimension", range(4))
@pytest.mark.parametrize("op", KERNELS)
def test_offsets_beyond_32_bits(op: str, far_dimension: int) -> None:
    """Elements 2³⁰ apart, in memory that is reserved but, except for a few pages, not there."""
    far, shape, strides = 2**30, [2, 4, 4, 4], [64, 16, 4, 1]
    shape[far_dimension], strides[far_dimension] = 4, far
    reserved = mmap.mmap(-1, 8 * far, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    memory = torch.frombuffer(reserved, dtype=torch.float16)
    x, out, mask = (memory.as_strided(shape, strides, first) for first in (0, 256, 512))
    x.copy_(torch.randn(shape)), mask.copy_(torch.randn(shape) > 0)
    weight = numbers(8 if op == "gated_conv2d" else 4, 4, 3, 3).half()
    if op == "gated_conv2d":
        args, outs = registry.get(op).bind(x, weight, padding=[1] * 4), (out,)
    elif op == "partial_conv2d":
        args, outs = (
            registry.get(op).bind(x, mask, weight, padding=[1] * 4),
            (out, torch.empty(shape[0], 1, *shape[2:]).half()),
        )
    else:
        args, outs = fused(x, weight, padding=1, mask=mask, residual=x), (out,)
    assert KERNELS[op].forward(args, outs)[-1].constants["WIDE"]
    KERNELS[op].launch(args, outs)
    check(op, args, outs)


# ---- precision ------------------------------------------------------------------------------------------------------


def test_float32_follows_torchs_switch_for_convolutions_at_the_time_of_the_call() -> None:
    def kinds(dtype: torch.dtype) -> set[str]:
        found = set()
        for op, module in KERNELS.items():
            args = arguments(op, dtype)
            found.add(module.forward(args, registry.get(op).out(*args))[-1].constants["PRECISION"])
        return found

    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    try:
        for value, expected in (("tf32", "tf32"), ("ieee", "ieee"), ("tf32", "tf32")):
            switch.fp32_precision = value
            assert kinds(torch.float32) == {expected}
            assert kinds(torch.bfloat16) == {"ieee"}, "16-bit products are exact"
    finally:
        switch.fp32_precision = before


def test_precision_can_be_given() -> None:
    for op, module in KERNELS.items():
        args = arguments(op)
        for precision in ("ieee", "tf32"):
            assert module.forward(args, registry.get(op).out(*args), precision)[-1].constants["PRECISION"] == precision


@pytest.mark.parametrize("op", KERNELS)
def test_ieee_overrides_torchs_switch(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of direct calls too, which no swapped module keeps from a kernel while the switch allows TF32."""
    seen: list[str] = []
    run: Callable[..., None] = _lib.run

    def observed(launches: list[_lib.Launch], outs: Sequence[Tensor]) -> None:
        seen.append(launches[-1].constants["PRECISION"])
        run(launches, outs)

    monkeypatch.setattr(KERNELS[op], "run", observed)
    switch, call, args = torch.backends.cudnn.conv, getattr(torch.ops.inpaintrt, op), arguments(op)
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "tf32"
        with use_backend("triton", op=op):
            call(*args)
            with use_ieee():
                call(*args)
    finally:
        switch.fp32_precision = before
    assert seen == ["tf32", "ieee"]


def test_long_sums_in_a_gpus_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's dot is one chain of fused multiply-adds from its accumulator on; numpy's product here is kinder."""
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        total = acc.data
        for k in range(a.data.shape[1]):
            total = (total + a.data[:, k, None].astype("f8") * b.data[None, k].astype("f8")).astype("f4")
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(_conv2d, "switched", lambda dtype: "ieee")
    x, weight = numbers(1, 512, 4, 4).relu(), numbers(16, 512, 3, 3, seed=1).abs()  # as in LaMa; sums that grow
    args = fused(x, weight, padding=1)

    def share() -> float:
        exact = registry.get("fused_conv2d").run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
        return close_to_truth(
            *compute("fused_conv2d", args), exact, registry.get("fused_conv2d").run_reference(*args)
        ).share

    chunks = share()
    monkeypatch.setattr(_conv2d, "dot_chunk", _lib.dot)
    assert chunks < 1
    assert share() > 1.5 * chunks, "a plain dot would do: this test proves nothing"


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]
)
def test_configurations_are_powers_of_two_that_tensor_cores_take(
    dtype: torch.dtype, precision: str, heavy: bool, gated: bool
) -> None:
    for pixels in (1, 64, 4096, 2**20):
        for outputs in (1, 3, 24, 96, 1024):
            for channels in (1, 5, 24, 4096):
                sizes = _conv2d.config(pixels, outputs, channels, dtype, precision, gated, heavy)
                for name in ("PIXELS", "OUTPUTS", "CHANNELS"):
                    assert sizes[name] in (16, 32, 64, 128), (name, sizes)


def test_public_function_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = numbers(1, 3, 6, 6), numbers(8, 3, 3, 3)
    seen: list[Any] = []
    launch: Callable[..., None] = _lib.run
    monkeypatch.setattr(gated_conv2d, "run", lambda launches, outs: (seen.append(launches), launch(launches, outs)))
    with use_backend("triton", op="gated_conv2d"):
        ops.gated_conv2d(x, weight, padding=1)
    assert len(seen) == 1

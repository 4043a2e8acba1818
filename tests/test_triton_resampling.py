"""modulated_conv2d's and upfirdn2d's Triton kernels in the interpreter: styles, resampling, memory; beyond test_ops.py's matrix
and the public numbers in test_modulated_conv2d.py and test_upfirdn2d.py, which run here, too."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
    pytest.skip("set TRITON_INTERPRET=1: the interpreter stage of CI runs these", allow_module_level=True)
pytest.importorskip("triton")

from inpaintrt.kernels import _conv2d, _fir, _lib, modulated_conv2d, upfirdn2d

from inpaintrt.ops import _shared
from inpaintrt.ops.modulated_conv2d import SPEC as MODULATED
from inpaintrt.ops.upfirdn2d import SPEC as RESAMPLED
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

# numpy, which computes for the interpreter, reports the overflows and NaN that these tests provoke.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KERNELS = {"modulated_conv2d": modulated_conv2d, "upfirdn2d": upfirdn2d}
SPECS = {"modulated_conv2d": MODULATED, "upfirdn2d": RESAMPLED}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS: dict[str, dict[str, Any]] = {"plain": {}, "up": {"up": 2}, "down": {"down": 2}}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest blocks, so that small maps have several of every kind, with edges."""
    sizes = {"PIXELS": 32, "OUTPUTS": 16, "CHANNELS": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(_conv2d, "config", lambda *_: sizes)
    monkeypatch.setattr(_conv2d, "_BLOCK", 128)
    monkeypatch.setattr(modulated_conv2d, "_CHANNELS", 4)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compute(op: str, args: Sequence[Any]) -> Tensor:
    """The kernels' output, in memory that was NaN."""
    (out,) = SPECS[op].out(*args)
    KERNELS[op].launch(args, (out.fill_(math.nan),))
    return out


def check(op: str, args: Sequence[Any], out: Tensor | None = None) -> None:
    """The kernels by the tolerance rule."""
    truth = SPECS[op].run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
    assert_close_to_truth(compute(op, args) if out is None else out, truth, SPECS[op].run_reference(*args), context=op)


def arguments(op: str, dtype: torch.dtype = torch.float32, form: str = "up", **options: Any) -> list[Any]:
    """Arguments with every tensor that the op takes, for images of three styles."""
    x = numbers(3, 6, 5, 7).to(dtype)
    if op == "upfirdn2d":
        return list(RESAMPLED.bind(x, numbers(3, 4), up=[2, 1], down=[1, 2], padding=[2, 1, 1, 2], gain=2.0))
    size = {"plain": (5, 7), "up": (10, 14), "down": (2, 3)}[form]
    tensors = {
        "noise": numbers(3, 1, *size, seed=3),
        "noise_strength": numbers(1, seed=4),
        "bias": numbers(10, seed=5),
    }
    given = {**FORMS[form], **{name: t.to(dtype) for name, t in tensors.items()}, **options}
    if form != "plain":
        given["resample_filter"] = numbers(4, 4, seed=6) / 4
    weight, style = numbers(10, 6, 3, 3, seed=1).to(dtype), numbers(3, 6, seed=2).to(dtype)
    return list(MODULATED.bind(x, weight, style, **{"padding": 1, "activation": "leaky_relu", "gain": 2**0.5} | given))


# ---- resampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", [[1, 1], [2, 3], [5, 1]], ids=str)
@pytest.mark.parametrize("down", [[1, 1], [2, 2], [1, 4]], ids=str)
@pytest.mark.parametrize("padding", [[0, 0, 0, 0], [7, 2, 9, 4], [-3, 4, 5, -2]], ids=str)
def test_factors_borders_and_crops(up: list[int], down: list[int], padding: list[int]) -> None:
    """Outputs far outside of the image, too, where nothing meets the filter."""
    for flip in (False, True):
        args = (numbers(2, 3, 6, 9), numbers(3, 5, seed=1), up, down, padding, flip, 1.5)
        check("upfirdn2d", args)


def test_filters_longer_than_the_image() -> None:
    check("upfirdn2d", RESAMPLED.bind(numbers(1, 2, 3, 2), numbers(11, 1, seed=1), padding=[0, 0, 9, 9]))
    check("upfirdn2d", RESAMPLED.bind(numbers(1, 2, 3, 2), numbers(1, 21, seed=1), up=[8, 1], padding=[20, 9, 0, 0]))


# ---- styles ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_each_image_has_its_style(form: str, flip: bool, demodulate: bool) -> None:
    """Several images in one block of pixels, several blocks of outputs and of channels."""
    args = arguments("modulated_conv2d", form=form, flip_weight=flip, demodulate=demodulate, weight_gain=-0.3)
    check("modulated_conv2d", args)
    args[0] = args[0].contiguous(memory_format=torch.channels_last)
    check("modulated_conv2d", args)


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 3e4, 1e30])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_styles_of_any_size(size: float, eps: float) -> None:
    style = numbers(2, 8, seed=2) * torch.tensor([[size], [1.0]])
    args = MODULATED.bind(numbers(2, 8, 5, 5), numbers(4, 8, 3, 3, seed=1), style, padding=1, eps=eps)
    if eps == 0.0 and size == 1e-30:  # the reference's squares vanish
        exact = MODULATED.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
        torch.testing.assert_close(compute("modulated_conv2d", args), exact.float(), rtol=1e-4, atol=1e-5)
    elif size < 1e30:
        check("modulated_conv2d", args)
    else:  # nor does float32 hold its squares
        exact = MODULATED.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
        got = compute("modulated_conv2d", args)
        torch.testing.assert_close(got[1:], exact[1:].float(), rtol=1e-4, atol=1e-5)
        assert bool(got.isfinite().all())


@pytest.mark.parametrize("size", [300.0, 1e-4])
def test_float16_stays_in_range(size: float) -> None:
    """x times style is 6·10⁶ at most, far beyond float16; what the products are made of is not."""
    x = (numbers(1, 8, 6, 6) * 5000).half()
    weight, style = torch.full((4, 8, 3, 3), size).half(), (numbers(1, 8, seed=1) * 300).half()
    out = compute("modulated_conv2d", MODULATED.bind(x, weight, style, padding=1))
    exact = MODULATED.run_reference(*MODULATED.bind(x.double(), weight.double(), style.double(), padding=1))
    assert bool(out.isfinite().all())
    assert bool((out - exact).abs().max() < 0.01 * exact.abs().max())


def test_a_style_of_zeros_gives_noise_and_bias() -> None:
    args = arguments("modulated_conv2d", form="plain", activation="none", gain=1.0)
    args[2] = torch.zeros_like(args[2])
    noise, strength, bias = args[11:14]
    torch.testing.assert_close(compute("modulated_conv2d", args), strength * noise + bias[:, None, None])


# ---- what follows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", _shared.ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_activations_gains_and_bounds(form: str, activation: str) -> None:
    alpha = 0.3 if activation in _shared.DEFAULT_ALPHA else None
    for clamp in (None, 0.5, 0.0):
        args = arguments("modulated_conv2d", form=form, activation=activation, alpha=alpha, gain=-1.5, clamp=clamp)
        check("modulated_conv2d", args)


@pytest.mark.parametrize("form", FORMS)
def test_noise_of_one_image_serves_all(form: str) -> None:
    args = arguments("modulated_conv2d", form=form)
    args[11] = args[11][:1]
    shared = compute("modulated_conv2d", args)
    args[11] = args[11].expand(3, -1, -1, -1)
    assert torch.equal(compute("modulated_conv2d", args), shared)
    args[12] = None  # strength 1
    check("modulated_conv2d", args)


def test_nan_stays_in_its_image() -> None:
    for form in FORMS:
        args = arguments("modulated_conv2d", form=form)
        args[2][1, 3] = math.nan
        out = compute("modulated_conv2d", args)
        assert out.isnan().flatten(1).any(1).tolist() == [False, True, False]
        assert bool(out[1].isnan().all())


# ---- memory ---------------------------------------------------------------------------------------------------------


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A contiguous tensor full of NaN inside a larger buffer of NaN: (tensor, buffer)."""
    buffer = torch.full((math.prod(shape) + 128,), math.nan, dtype=dtype)
    return buffer[64:-64].view(shape), buffer


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [*FORMS, "upfirdn2d"])
def test_any_strides_of_every_tensor(form: str, dtype: torch.dtype, layout: str) -> None:
    op = "upfirdn2d" if form == "upfirdn2d" else "modulated_conv2d"
    args = [LAYOUTS[layout](a) if isinstance(a, Tensor) else a for a in arguments(op, dtype, form)]
    out, buffer = poison(tuple(SPECS[op].out(*args)[0].shape), dtype)
    KERNELS[op].launch(args, (out,))
    check(op, args, out)
    assert bool(buffer[:64].isnan().all() and buffer[-64:].isnan().all())


@pytest.mark.parametrize("form", FORMS)
def test_workspaces_are_written_before_read_and_only_inside(form: str) -> None:
    args = arguments("modulated_conv2d", form=form)
    expected = compute("modulated_conv2d", args)
    outs = MODULATED.out(*args)
    launches = modulated_conv2d.forward(args, outs)
    own = {t.untyped_storage().data_ptr() for t in (*args, *outs) if isinstance(t, Tensor)}
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def poisoned(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() in own:
            return value
        inside, _ = buffers.setdefault(value.data_ptr(), poison((value.numel(),), value.dtype))
        return inside.view(value.shape)

    _lib.run([dataclasses.replace(k, args=tuple(map(poisoned, k.args))) for k in launches], outs)
    assert torch.equal(outs[0], expected)
    assert len(buffers) == (3 if form == "plain" else 4)  # factors on the input and the sums, weights; what is filtered
    assert all(bool(b[:64].isnan().all() and b[-64:].isnan().all()) for _, b in buffers.values())


@pytest.mark.parametrize("form", [*FORMS, "upfirdn2d"])
def test_wide_offsets_change_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = "upfirdn2d" if form == "upfirdn2d" else "modulated_conv2d"
    args = arguments(op, form=form)
    narrow = compute(op, args)
    for module in (_conv2d, _fir, modulated_conv2d):
        monkeypatch.setattr(module, "needs_wide", lambda *tensors: True)
    launches = KERNELS[op].forward(args, (narrow,))
    assert all(launch.constants["WIDE"] for launch in ([launches] if op == "upfirdn2d" else launches))
    assert torch.equal(compute(op, args), narrow)


@pytest.mark.parametrize("far_dimension", range(4))
@pytest.mark.parametrize("op", KERNELS)
def test_offsets_beyond_32_bits(op: str, far_dimension: int) -> None:
    """Elements 2³⁰ apart, in memory that is reserved but, except for a few pages, not there."""
    far, shape, strides = 2**30, [2, 4, 4, 4], [64, 16, 4, 1]
    shape[far_dimension], strides[far_dimension] = 4, far
    reserved = mmap.mmap(-1, 8 * far, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    memory = torch.frombuffer(reserved, dtype=torch.float16)
    x, out = (memory.as_strided(shape, strides, first) for first in (0, 256))
    x.copy_(torch.randn(shape))
    if op == "upfirdn2d":
        args = RESAMPLED.bind(x, numbers(3, 3, seed=1), padding=[1] * 4)
    else:
        weight, style = numbers(4, 4, 3, 3).half(), numbers(shape[0], 4, seed=1).half()
        args = MODULATED.bind(x, weight, style, padding=1, bias=numbers(4).half())
    launches = KERNELS[op].forward(args, (out,))
    assert (launches if op == "upfirdn2d" else launches[-1]).constants["WIDE"]
    KERNELS[op].launch(args, (out,))
    check(op, args, out)


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", KERNELS)
def test_empty_batches_launch_nothing(op: str) -> None:
    args = [a[:0] if isinstance(a, Tensor) and a.shape[0] == 3 and a.dim() != 2 else a for a in arguments(op)]
    if op == "modulated_conv2d":
        args[2] = args[2][:0]
    (out,) = SPECS[op].out(*args)
    assert out.numel() == 0
    assert not KERNELS[op].forward(args, (out,))


def test_launches_of_each_form() -> None:
    kernels = {
        form: [launch.kernel for launch in modulated_conv2d.forward(args, MODULATED.out(*args))]
        for form in FORMS
        for args in [arguments("modulated_conv2d", form=form)]
    }
    modulate, pack, convolve, fir = modulated_conv2d._modulate, _conv2d._pack, _conv2d._convolve, _fir._resample
    assert kernels == {
        "plain": [modulate, pack, convolve],
        "up": [modulate, pack, convolve, fir],
        "down": [modulate, fir, pack, convolve],
    }


def test_precision_follows_the_switch_and_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("modulated_conv2d", form="plain")
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(_conv2d, "switched", lambda dtype, precision=precision: precision)
        for given in (None, "ieee", "tf32"):
            last = modulated_conv2d.forward(args, MODULATED.out(*args), given)[-1]
            assert last.constants["PRECISION"] == (given or precision)

"""The Triton kernels in Triton's interpreter: what is particular to them, beyond the generated matrix of test_ops.py.

Grids stay small: the interpreter takes milliseconds per program.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
    pytest.skip("set TRITON_INTERPRET=1: the interpreter stage of CI runs these", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from inpaintrt.kernels import _lib, fourier_unit, gated_activation  # noqa: E402

from inpaintrt.ops import _shared  # noqa: E402
from inpaintrt.ops.fourier_unit import SPEC as FOURIER  # noqa: E402
from inpaintrt.ops.gated_activation import SPEC  # noqa: E402
from inpaintrt.testing import close_to_truth  # noqa: E402

# numpy, which computes for the interpreter, reports the overflows that these tests provoke.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda y: y,
    "nhwc": lambda y: y.contiguous(memory_format=torch.channels_last),
    "transposed": lambda y: y.transpose(2, 3),
    "all_reversed": lambda y: y.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "odd_rows": lambda y: torch.nn.functional.pad(y, (0, 1), value=math.nan)[..., :-1],  # whole vectors at odd strides
    "expanded_batch": lambda y: y[:1].expand(3, -1, -1, -1),
    "expanded_pixels": lambda y: y[:, :, :1, :1].expand(-1, -1, 4, 3),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def poison(shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Tensor, Tensor]:
    """A dense tensor full of NaN (dimensions in memory in `order`) inside a larger buffer of NaN: (tensor, buffer)."""
    margin, n = 64, math.prod(shape)
    buffer = torch.full((n + 2 * margin,), math.nan, dtype=dtype)
    inside = buffer[margin : margin + n].view([shape[d] for d in order]).permute([order.index(d) for d in range(4)])
    return inside, buffer


def margins_untouched(buffer: Tensor) -> bool:
    return bool(buffer[:64].isnan().all() and buffer[-64:].isnan().all())


def out_of_nan(y: Tensor, offset: int) -> Tensor:
    """The values of y, strided, at `offset` in a buffer that is NaN everywhere else."""
    b, c, h, w = y.shape
    buffer = torch.full((b, c + 2, h + 3, 2 * w + 9), math.nan, dtype=y.dtype)
    inside = buffer[:, 1:-1, 2:-1, offset : offset + 2 * w : 2]
    inside.copy_(y)
    return inside


def forward(y: Tensor, activation: str = "elu", alpha: float | None = None, gain: float = 1.0) -> Tensor:
    (out,) = SPEC.out(y, activation, alpha, gain)
    gated_activation.launch((y, activation, alpha, gain), (out.fill_(math.nan),))
    return out


def backward(grad: Tensor, y: Tensor, activation: str = "elu", alpha: float | None = None, gain: float = 1.0) -> Tensor:
    dy = torch.full_like(y, math.nan)
    gated_activation.launch_backward(([grad], y, activation, alpha, gain, [True]), (dy,))
    return dy


def reference_gradient(grad: Tensor, y: Tensor, *rest: Any) -> Tensor:
    leaf = y.detach().clone().requires_grad_()
    return torch.autograd.grad(SPEC.run_reference(leaf, *rest), leaf, grad)[0]


def assert_as_good(actual: Tensor, truth: Tensor, baseline: Tensor) -> None:
    """Error against the float64 truth at most twice the same-dtype reference's, plus one rounding of the largest."""
    error, allowed = (actual - truth).abs().max(), 2 * (baseline - truth).abs().max()
    band = EPSILON[actual.dtype] * truth.abs().max()
    assert error <= allowed + band, f"error {error:.3e}, allowed {allowed:.3e} + {band:.3e}"


# ---- gated_activation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
def test_every_layout_against_float64(dtype: torch.dtype, layout: str) -> None:
    y = LAYOUTS[layout](3 * torch.randn(2, 8, 5, 6)).to(dtype)
    rest = ("elu", 0.7, 1.3)
    out = forward(y, *rest)
    assert_as_good(out, SPEC.run_reference(y.double(), *rest), SPEC.run_reference(y, *rest))
    for grad in (torch.randn(out.shape).to(dtype), torch.randn(()).to(dtype).expand(out.shape)):
        truth = reference_gradient(grad.double(), y.double(), *rest)
        assert_as_good(backward(grad, y, *rest), truth, reference_gradient(grad, y, *rest))


@pytest.mark.parametrize("activation", _shared.ACTIVATIONS)
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
def test_every_activation_against_float64(dtype: torch.dtype, activation: str) -> None:
    y = (4 * torch.randn(1, 2, 16, 64)).to(dtype)
    rest = (activation, None, 1.0)
    assert_as_good(forward(y, *rest), SPEC.run_reference(y.double(), *rest), SPEC.run_reference(y, *rest))
    grad = torch.randn(1, 1, 16, 64).to(dtype)
    truth = reference_gradient(grad.double(), y.double(), *rest)
    assert_as_good(backward(grad, y, *rest), truth, reference_gradient(grad, y, *rest))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("width", [1, 3, 4, 63, 64, 65, 160])  # blocks of 64 elements, below; channels make it 4 × that
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_and_writes_stay_inside(
    dtype: torch.dtype, width: int, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_activation, "default_config", lambda elements, vec: {"BLOCK": 64, "num_warps": 2})
    y = torch.randn(1, 8, 1, width).to(dtype)
    expected, grad = forward(y), torch.randn(1, 4, 1, width).to(dtype)
    expected_dy = backward(grad, y)
    dense, _ = poison((1, 8, 1, width), dtype, order)
    dense.copy_(y)
    for source in (dense, out_of_nan(y, offset=0), out_of_nan(y, offset=5)):
        out, buffer = poison((1, 4, 1, width), dtype, order)
        gated_activation.launch((source, "elu", None, 1.0), (out,))
        assert torch.equal(out, expected)
        assert margins_untouched(buffer)
        dy, buffer = poison((1, 8, 1, width), dtype, order)
        gated_activation.launch_backward(([out_of_nan(grad, offset=3)], source, "elu", None, 1.0, [True]), (dy,))
        assert torch.equal(dy, expected_dy)
        assert margins_untouched(buffer)


def test_poison_catches_a_write_outside() -> None:
    out, buffer = poison((1, 4, 1, 8), torch.float32)
    out.copy_(torch.zeros(()))
    assert margins_untouched(buffer)
    torch.as_strided(out, (33,), (1,), out.storage_offset())[32] = 0
    assert not margins_untouched(buffer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets_change_nothing(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y = LAYOUTS[layout](torch.randn(2, 6, 5, 4))
    narrow = forward(y)
    grad = torch.randn(narrow.shape)
    narrow_dy = backward(grad, y)
    monkeypatch.setattr(gated_activation, "needs_wide", lambda *tensors: True)
    launch = gated_activation.forward((y, "elu", None, 1.0), (narrow,))
    assert launch is not None
    assert launch.constants["WIDE"]
    assert torch.equal(forward(y), narrow)
    assert torch.equal(backward(grad, y), narrow_dy)


def test_needs_wide_from_the_first_offset_that_32_bits_cannot_hold() -> None:
    def reaching(offset: int) -> Tensor:
        return torch.empty_strided((2, 2, 1, 1), (offset - 1, 1, 1, 1), device="meta")

    assert not _lib.needs_wide(reaching(2**31 - 1))
    assert _lib.needs_wide(reaching(2**31))
    assert _lib.needs_wide(torch.empty(1), reaching(2**31))
    assert not _lib.needs_wide(torch.empty(1, 1, 1, 1).expand(2**16, 2**16, 1, 1))
    assert not _lib.needs_wide(torch.empty_strided((2, 0), (2**40, 1), device="meta"))


def test_empty_tensors_launch_nothing() -> None:
    for shape in ((0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)):
        y = torch.empty(shape)
        outs = SPEC.out(y, "elu", None, 1.0)
        assert gated_activation.forward((y, "elu", None, 1.0), outs) is None
        assert gated_activation.backward(([outs[0]], y, "elu", None, 1.0, [True]), (torch.empty_like(y),)) is None
        gated_activation.launch((y, "elu", None, 1.0), outs)


@pytest.mark.parametrize("activation", _shared.ACTIVATIONS)
def test_nan_and_infinity_as_in_the_reference(activation: str) -> None:
    special = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-39, 1e30, -1e30, 88.6, -88.6, 95.0, -95.0, 1.0, -1.0)
    f, g = (torch.tensor(values) for values in zip(*itertools.product(special, special), strict=True))
    y = torch.stack([f, g]).view(1, 2, 15, 15)
    rest = (activation, None, 1.5)

    def same(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-37, equal_nan=True)

    same(forward(y, *rest), SPEC.run_reference(y, *rest))
    grad = torch.full((1, 1, 15, 15), 0.5)
    same(backward(grad, y, *rest), reference_gradient(grad, y, *rest))


def test_half_precision_rounds_once() -> None:
    y = torch.randn(1, 2, 20, 40)
    for dtype in (torch.bfloat16, torch.float16):
        exact = SPEC.run_reference(y.to(dtype).double(), "elu", None, 1.0)
        error = (forward(y.to(dtype)) - exact).abs() / exact.abs()
        assert error.max() < 0.501 * EPSILON[dtype]


def test_small_elu_keeps_its_digits() -> None:
    f = -torch.logspace(-12, 0, 256)
    y = torch.stack([f, torch.full_like(f, 100.0)]).view(1, 2, 1, 256)  # sigmoid(100) is 1 in float32
    exact = torch.expm1(f.double()).view(1, 1, 1, 256)
    assert ((forward(y) - exact) / exact).abs().max() < 3e-7
    assert ((f.exp() - 1 - exact) / exact).abs().max() > 0.9, "the naive formula would pass: this test proves nothing"


def test_default_alpha_is_the_ops() -> None:
    for activation in _shared.ACTIVATIONS:
        for alpha in (None, 0.3):
            expected = _shared.DEFAULT_ALPHA.get(activation, 1.0) if alpha is None else alpha
            assert _lib.resolve_alpha(activation, alpha) == expected


# ---- fourier_unit ---------------------------------------------------------------------------------------------------


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that small tensors have many, with edges of every kind."""
    monkeypatch.setattr(fourier_unit, "transform_config", lambda n, wide: {"POINTS": 4, "LINES": 16, "STEP": 4})
    monkeypatch.setattr(fourier_unit, "mix_config", lambda wide: {"BINS": 16, "PARTS": 4, "STEP": 4})


def fourier_args(b: int, c: int, co: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(b, c, h, w), torch.randn(2 * co, 2 * c, 1, 1), torch.randn(2 * co), torch.randn(b, co, h, w)


def fourier(args: Sequence[Tensor | None]) -> Tensor:
    (out,) = FOURIER.out(*args)
    fourier_unit.launch(args, (out.fill_(math.nan),))
    return out


def share_of_tolerance(out: Tensor, args: Sequence[Tensor | None]) -> float:
    """The error as a share of what the tolerance rule allows."""
    exact = FOURIER.run_reference(*(None if a is None else a.double() for a in args))
    return close_to_truth(out, exact, FOURIER.run_reference(*args)).share


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 18])
def test_any_size_in_many_tiles(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    for h, w in ((n, 3), (2, n)):
        args = fourier_args(1, 2, 3, h, w)
        assert share_of_tolerance(fourier(args), args) <= 1


@pytest.mark.parametrize("layout", [*LAYOUTS, "out_of_nan"])
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
def test_any_strides_of_every_tensor(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    move = LAYOUTS.get(layout, lambda t: out_of_nan(t, offset=3))
    x, weight, bias, residual = (t.to(dtype) for t in fourier_args(1, 3, 2, 4, 5))
    weight = weight.flatten(1).t().contiguous().t()  # two-dimensional, rows adjacent
    bias = torch.stack([bias, torch.full_like(bias, math.nan)], 1)[:, 0]
    args = (move(x), weight, bias, move(residual))
    out, buffer = poison(tuple(args[3].shape), dtype, (3, 0, 2, 1))
    fourier_unit.launch(args, (out,))
    assert share_of_tolerance(out, args) <= 1
    assert margins_untouched(buffer)


@pytest.mark.parametrize(
    "shape", [(2, 3, 2, 8, 8), (1, 1, 5, 7, 9), (2, 5, 1, 1, 16), (1, 2, 2, 17, 1), (3, 4, 4, 4, 2)]
)
def test_workspaces_are_written_before_read_and_only_inside(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch)
    args = fourier_args(*shape)
    expected = fourier(args)
    out, buffer = poison(tuple(expected.shape), torch.float32)
    launches = fourier_unit.forward(args, (out,))
    own = {t.data_ptr() for t in (*args, out)}
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def poisoned(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.data_ptr() in own or value.dim() == 2:  # tables have two dimensions
            return value
        return buffers.setdefault(value.data_ptr(), poison((1, 1, 1, value.numel()), torch.float32))[0]

    _lib.run([dataclasses.replace(k, args=tuple(map(poisoned, k.args))) for k in launches], (out,))
    assert torch.equal(out, expected)
    assert len(buffers) == 2
    assert margins_untouched(buffer)
    assert all(margins_untouched(b) for _, b in buffers.values())


def test_wide_offsets_change_nothing_in_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    args = fourier_args(2, 3, 2, 6, 7)
    narrow = fourier(args)
    monkeypatch.setattr(fourier_unit, "needs_wide", lambda *tensors: True)
    assert all(launch.constants["WIDE"] for launch in fourier_unit.forward(args, (narrow,)))
    assert torch.equal(fourier(args), narrow)


@pytest.mark.parametrize("far_dimension", range(4))
def test_offsets_beyond_32_bits(far_dimension: int) -> None:
    """Elements 2³⁰ apart, in memory that is reserved but, except for a few pages, not there."""
    far, shape, strides = 2**30, [2, 2, 2, 2], [8, 4, 2, 1]
    shape[far_dimension], strides[far_dimension] = 3, far
    reserved = mmap.mmap(-1, 8 * far, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    memory = torch.frombuffer(reserved, dtype=torch.float16)
    x, out = memory.as_strided(shape, strides), memory.as_strided(shape, strides, 64)
    args = (x.copy_(torch.randn(shape)), torch.randn(2 * shape[1], 2 * shape[1]).half(), None, x)
    assert fourier_unit.forward(args, (out,))[0].constants["WIDE"]
    fourier_unit.launch(args, (out,))
    assert share_of_tolerance(out, args) <= 1


@pytest.mark.parametrize("shape", [(1, 2, 2, 2, 1023), (1, 2, 2, 1024, 2)])
def test_long_sums_in_a_gpus_order(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's dot is one chain of fused multiply-adds from its accumulator on; numpy's product here is kinder."""
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        total = acc.data
        for k in range(a.data.shape[1]):
            total = (total + a.data[:, k, None].astype("f8") * b.data[None, k].astype("f8")).astype("f4")
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    # Few programs, which the interpreter likes; the length of a chunk is the one in use.
    step = fourier_unit.transform_config(1023, False)["STEP"]
    transform = {n: {"POINTS": 512 if n > 2 else 2, "LINES": 64, "STEP": step} for n in (2, 1023, 1024)}
    monkeypatch.setattr(fourier_unit, "transform_config", lambda n, wide: transform[n])
    monkeypatch.setattr(fourier_unit, "mix_config", lambda wide: {"BINS": 512, "PARTS": 8, "STEP": 8})
    x, weight, bias, _ = fourier_args(*shape)
    args = ((2 * x).relu() + 1, weight, bias, None)  # as in LaMa: not negative, so that running sums grow
    chunks = share_of_tolerance(fourier(args), args)
    monkeypatch.setattr(fourier_unit, "dot_chunk", _lib.dot)
    chain = share_of_tolerance(fourier(args), args)
    assert chunks < 0.5
    assert chain > 2 * chunks, "a plain dot would do: this test proves nothing"


def test_a_table_is_not_made_during_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"transforms of 6 points is not on cuda:0 yet.*before the capture"):
        fourier_unit._table(6, torch.device("cuda:0"))
    table = fourier_unit._table(6, torch.device("cpu"))
    angle = torch.arange(6, dtype=torch.float64) * (math.pi / 3)
    assert torch.equal(table, torch.stack([angle.cos(), angle.sin()], 1).float())


# ---- the shared pieces ----------------------------------------------------------------------------------------------


def test_collapse_merges_what_is_contiguous() -> None:
    def nest(y: Tensor) -> _lib.Nest:
        (out,) = SPEC.out(y, "elu", None, 1.0)
        return _lib.collapse(
            tuple(out.shape), (out.stride(), y.stride()), (out.shape[1] * y.stride(1),), y.element_size()
        )

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def nhwc(y: Tensor) -> Tensor:
        return y.to(memory_format=torch.channels_last)

    assert [nest(empty(1, 96, 256, 256)).ndim, nest(empty(4, 96, 256, 256)).ndim] == [1, 2]
    assert [nest(nhwc(empty(4, 48, 64, 64))).ndim, nest(nhwc(empty(4, 48, 64, 64))).vec] == [2, 4]
    assert nest(nhwc(empty(1, 48, 9, 9, dtype=torch.bfloat16))).vec == 8  # 24 channels are no multiple of 16
    assert nest(nhwc(empty(1, 12, 9, 9, dtype=torch.bfloat16))).vec == 2  # 6 channels
    assert nest(empty(1, 6, 5, 7)).vec == 1  # the gates start at 105 elements
    assert nest(empty(2, 8, 16, 16)[:, :, :, ::2]).vec == 1
    assert nest(empty(2, 8, 16, 24)[:, :, :, :12]).vec == 4
    assert [nest(empty(2, 8, 16, 16)[:, :, 1:]).ndim, nest(empty(2, 8, 16, 16).transpose(2, 3)[:, :, 1:]).ndim] == [
        3,
        4,
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_collapse_visits_every_element_once(layout: str) -> None:
    y = LAYOUTS[layout](torch.empty(2, 8, 6, 4))
    (out,) = SPEC.out(y, "elu", None, 1.0)
    nest = _lib.collapse(tuple(out.shape), (out.stride(), y.stride()), (), 4)
    found = []
    for index in itertools.product(*map(range, nest.sizes)):
        at = [sum(i * s for i, s in zip(index, strides, strict=True)) * nest.vec for strides in nest.strides]
        found += [(at[0] + v, at[1] + v) for v in range(nest.vec)]
    everywhere = itertools.product(*map(range, out.shape))
    expected = [tuple(sum(i * s for i, s in zip(at, t.stride(), strict=True)) for t in (out, y)) for at in everywhere]
    assert len(found) == nest.total * nest.vec
    assert sorted(found) == sorted(expected)


@triton.jit
def _apply(x, out, NAME: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    if NAME == "exp":
        value = _lib.exp(value, True)
    elif NAME == "expm1":
        value = _lib.expm1(value)
    elif NAME == "sigmoid":
        value = _lib.sigmoid(value, True)
    elif NAME == "tanh":
        value = _lib.tanh(value)
    elif NAME == "from_float32":
        value = _lib.from_float32(value, out.dtype.element_ty)
    else:
        tl.static_assert(NAME == "to_float32")
        value = _lib.to_float32(value)
    tl.store(out + i, value)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("exp", -86, 88), ("expm1", -80, 88), ("sigmoid", -85, 85), ("tanh", -20, 20)]
)
def test_elementary_functions_to_a_few_ulp(name: str, low: float, high: float) -> None:
    x = torch.cat([torch.linspace(low, high, 8192), torch.logspace(-30, 0, 4096), -torch.logspace(-30, 0, 4096)])
    out = torch.empty_like(x)
    _apply[(1,)](x, out, name, 16384)
    exact = getattr(torch, name)(x.double())
    assert ((out - exact) / exact).abs().max() < 4 * 2.0**-23


def test_elementary_functions_at_their_limits() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 88.72, 88.73, 89.5, -87.5, 0.0])
    out = torch.empty_like(x)
    _apply[(1,)](x, out, "exp", 8)
    torch.testing.assert_close(out[:3], torch.tensor([math.nan, math.inf, 0.0]), equal_nan=True)
    torch.testing.assert_close(out[3:], torch.tensor([3.4e38, math.inf, math.inf, 0.0, 1.0]), rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_are_torchs(dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    out = torch.empty(65536)
    _apply[(1,)](every, out, "to_float32", 65536)
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)
    x = (
        torch.randint(-(2**31), 2**31 - 1, (65536,)).to(torch.int32).view(torch.float32)
    )  # any bits: NaN, subnormal, overflow
    x[:32768] = torch.randn(32768)
    x[32768:40960] = every[:32768:4].float() * (1 + 2.0**-8)  # half-way cases
    out = torch.empty(65536, dtype=dtype)
    _apply[(1,)](x, out, "from_float32", 65536)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _matmul(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    acc = tl.load(c + m * N + n)
    a, b = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    acc = _lib.dot_chunk(a, b, acc) if CHUNK else _lib.dot(a, b, acc)
    tl.store(c + m * N + n, acc)


@pytest.mark.parametrize("chunk", [False, True], ids=["dot", "dot_chunk"])
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
def test_dot_is_right_in_the_interpreter(dtype: torch.dtype, chunk: bool) -> None:
    a, b, c = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype), torch.randn(16, 32)
    expected = c.double() + a.double() @ b.double()
    _matmul[(1,)](a, b, c, 16, 32, 64, chunk)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)

"""What only fused_conv2d has: words for padding, several inputs, the numerics of Winograd and who refuses it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inpaintrt import ops, use_backend
from inpaintrt.ops.fused_conv2d import SPEC
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.errors import UnsupportedError
from inpaintrt.runtime.policy import use_ieee
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.compare import DIRECT, WINOGRAD, Numerics, close_to_truth
from inpaintrt.testing.layouts import LAYOUTS


def _layer(c, outputs, h, w, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, c, h, w, generator=generator).relu_()
    weight = torch.randn(outputs, c, 3, 3, generator=generator) / (9 * c) ** 0.5
    return x, weight, torch.randn(outputs, generator=generator)


def test_same_is_torchs():
    x, weight, bias = _layer(3, 4, 7, 10)
    even = torch.randn(4, 3, 4, 2)
    for w, b in ((weight, bias), (even, None)):
        torch.testing.assert_close(ops.fused_conv2d(x, w, b, padding="same"), F.conv2d(x, w, b, padding="same"))


@pytest.mark.parametrize(
    ("size", "stride", "kernel"), [((7, 10), 2, 3), ((8, 9), 2, 4), ((5, 6), 3, 5), ((6, 6), 1, 3)]
)
def test_tf_same_puts_the_smaller_half_first(size, stride, kernel):
    x, weight = torch.randn(1, 2, *size), torch.randn(3, 2, kernel, kernel)
    got = ops.fused_conv2d(x, weight, stride=stride, padding="tf_same")
    assert got.shape[2:] == tuple(-(-n // stride) for n in size)
    sides = []
    for n in reversed(size):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        sides += [total // 2, total - total // 2]
    torch.testing.assert_close(got, F.conv2d(F.pad(x, sides), weight, stride=stride))


def test_several_inputs_are_their_concatenation():
    x, weight, bias = _layer(9, 5, 16, 17)
    parts = x.split([2, 4, 3], dim=1)
    whole = ops.fused_conv2d(x, weight, bias, padding=1)
    assert torch.equal(ops.fused_conv2d(parts, weight, bias, padding=1), whole)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [0, 1, 2, (1, 2), (2, 0, 1, 1)])
def test_winograd_equals_the_direct_form(mode, padding):
    """Every padding mode, side by side with torch's own pad and convolution in float64."""
    x, weight, bias = _layer(21, 37, 18, 23)
    sides = [padding] * 4 if isinstance(padding, int) else list(padding) * (4 // len(padding))
    top, left, bottom, right = sides
    around = (left, right, top, bottom)
    residual = torch.randn(1, 37, 16 + top + bottom, 21 + left + right)

    def direct(dtype):
        padded = F.pad(x.to(dtype), around, "constant" if mode == "zeros" else mode)
        return F.elu(F.conv2d(padded, weight.to(dtype), bias.to(dtype))) + residual.to(dtype)

    with use_backend("cpu", op="fused_conv2d"):
        got = ops.fused_conv2d(x, weight, bias, padding=padding, padding_mode=mode, activation="elu", residual=residual)
    assert_close_to_truth(got, direct(torch.float64), direct(torch.float32), numerics=WINOGRAD)


@pytest.mark.parametrize(
    ("c", "outputs", "h", "w"), [(512, 128, 32, 28), (128, 384, 57, 70), (64, 64, 64, 64), (192, 128, 36, 36)]
)
def test_winograd_error_at_real_layers(c, outputs, h, w):
    """Chains of 64 channels keep F(4×4, 3×3) near half of its bound, where one long chain used all of it."""
    x, weight, bias = _layer(c, outputs, h, w)
    with use_backend("cpu", op="fused_conv2d"):
        got = ops.fused_conv2d(x, weight, bias, padding=1)
    truth, own = F.conv2d(x.double(), weight.double(), bias.double(), padding=1), F.conv2d(x, weight, bias, padding=1)
    assert close_to_truth(got, truth, own, numerics=Numerics(rms=5.0, max=8.0)).ok
    assert float((got - truth).square().mean().sqrt() / truth.square().mean().sqrt()) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("c", "outputs", "h", "w"), [(1, 1, 1, 1), (9, 12, 5, 19), (64, 33, 8, 16), (385, 40, 3, 21)])
def test_one_by_one(c, outputs, h, w, dtype, layout):
    """Channels that fill vectors of pairs, end in half a pair, or are a single one; in any memory."""
    shapes = {"x": (2, c, h, w), "weight": (outputs, c, 1, 1), "bias": (outputs,), "residual": (2, outputs, h, w)}
    generator = torch.Generator().manual_seed(1)
    tensors = {n: LAYOUTS[layout](torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}
    for mode in ("before", "after"):
        args = SPEC.bind(**tensors, activation="elu", residual_mode=mode)
        with use_backend("cpu", op="fused_conv2d"):
            got = ops.fused_conv2d(**tensors, activation="elu", residual_mode=mode)
        truth = SPEC.run_reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        assert_close_to_truth(got, truth, SPEC.run_reference(*args))


def test_bfloat16_is_never_winograds():
    x, weight, bias = (t.bfloat16() for t in _layer(8, 8, 32, 32))
    with dispatch.launches() as heard:
        ops.fused_conv2d(x, weight, bias, padding=1)
        ops.fused_conv2d(x, weight[..., :1, :1], bias)
    assert [(launch.backend, launch.numerics) for launch in heard] == [("reference", DIRECT), ("cpu", DIRECT)]
    with use_backend("cpu", op="fused_conv2d"), pytest.raises(UnsupportedError, match="Winograd"):
        ops.fused_conv2d(x, weight, bias, padding=1)


def test_small_maps_and_other_shapes_run_as_torchs_convolution():
    x, weight, bias = _layer(4, 4, 8, 8)
    for case in ({"padding": 1}, {"padding": 3}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}):
        with use_backend("cpu", op="fused_conv2d"), pytest.raises(UnsupportedError):
            ops.fused_conv2d(x, weight, bias, **case)
        seen = []
        dispatch.observers.append(lambda *call: seen.append(call[:2]))  # noqa: B023
        try:
            got = ops.fused_conv2d(x, weight, bias, **case)
        finally:
            dispatch.observers.clear()
        assert seen == [("fused_conv2d", "reference")]
        torch.testing.assert_close(got, F.conv2d(x, weight, bias, **case))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": -1}, "padding"),
        ({"padding": "valid"}, "padding"),
        ({"padding": "same", "stride": 2}, "padding"),
        ({"padding": 8, "padding_mode": "reflect"}, "reflection"),
        ({"padding_mode": "circular"}, "padding_mode"),
        ({"residual_mode": "during"}, "residual_mode"),
        ({"upsample": 3}, "upsample"),
        ({"output_padding": 1}, "output_padding"),
        ({"transposed": True, "padding_mode": "reflect"}, "transposed"),
        ({"groups": 2}, "channels"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"residual": torch.zeros(1, 4, 8, 8)}, "residual"),
        ({"mask": torch.zeros(1, 2, 8, 8)}, "mask"),
        ({"weight": torch.zeros(4, 4, 3, 3, dtype=torch.bfloat16)}, "weight"),
        ({"activation": "gelu"}, "activation"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    x, weight, bias = _layer(4, 4, 8, 8)
    with pytest.raises(ValueError, match=message):
        ops.fused_conv2d(**{"x": x, "weight": weight, "bias": bias, **change})


def test_lanes_state_their_numerics():
    x, weight, _ = _layer(4, 4, 8, 8)
    numerics = SPEC.lanes["cpu"].numerics
    assert numerics(*SPEC.bind(x, weight, padding=[1, 1, 1, 1])) == WINOGRAD
    assert numerics(*SPEC.bind(x, weight[..., :1, :1])) == DIRECT == Numerics(2.0, 2.0)


def test_ieee_takes_the_direct_form():
    x, weight, bias = _layer(8, 8, 32, 32)
    with use_ieee():
        with dispatch.launches() as heard:
            got = ops.fused_conv2d(x, weight, bias, padding=1)
            ops.fused_conv2d(x, weight[..., :1, :1], bias)
        with use_backend("cpu", op="fused_conv2d"), pytest.raises(UnsupportedError, match="ieee"):
            ops.fused_conv2d(x, weight, bias, padding=1)
    assert [launch.backend for launch in heard] == ["reference", "cpu"]
    torch.testing.assert_close(got, F.conv2d(x, weight, bias, padding=1), rtol=0, atol=0)

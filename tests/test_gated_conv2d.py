"""What only gated_conv2d has: halves and their order, padding words, the public ports' layers, gradients, refusals."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from inpaintrt import ops, use_backend
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.errors import UnsupportedError
from inpaintrt.testing import assert_close_to_truth, recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"


def _gated(x, weight, bias, **geometry):
    features, gates = F.conv2d(x, weight, bias, **geometry).chunk(2, dim=1)
    return F.elu(features) * torch.sigmoid(gates)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "geometry"),
    [
        (5, 24, 5, {"padding": 2}),
        (24, 48, 3, {"padding": 1, "stride": 2}),
        (96, 96, 3, {"padding": 1}),
        (96, 96, 3, {"padding": 16, "dilation": 16}),
        (40, 3, 3, {"padding": 1}),
        (33, 17, 1, {}),
    ],
)
def test_layers_of_deepfill(inputs, outputs, kernel, geometry, layout):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, inputs, 36, 44, generator=generator)
    weight = torch.randn(2 * outputs, inputs, kernel, kernel, generator=generator) / (inputs * kernel**2) ** 0.5
    bias = torch.randn(2 * outputs, generator=generator)
    with use_backend("cpu", op="gated_conv2d"), dispatch.launches() as heard:
        got = ops.gated_conv2d(x.to(memory_format=layout), weight, bias, **geometry)
    assert got.is_contiguous(memory_format=layout)
    truth = _gated(x.double(), weight.double(), bias.double(), **geometry)
    assert_close_to_truth(got, truth, _gated(x, weight, bias, **geometry), numerics=dispatch.numerics_of(heard))


@pytest.mark.parametrize("run", ["v2.k5", "v2.s2", "v2.s2_odd", "v2.rate4", "v2.relu"])
def test_the_originals_layers(run):
    """TensorFlow's padding, strides and dilations: the original's numbers."""
    case = json.loads((GOLDEN / "gconv_jy" / "case.json").read_text())
    found, shapes = case["runs"][run], case["state_dict"]
    rate, stride = (int(found["call"].split(f"{word}=")[1].split(",")[0]) for word in ("rate", "stride"))
    weight, bias = (
        recipe.tensor_for(f"{found['key']}.{n}", shapes[f"{found['key']}.{n}"]["shape"]) for n in ("weight", "bias")
    )
    x = recipe.image(found["x"]["name"], *found["x"]["shape"]) * 4 - 2
    options = {
        "activation": "relu" if "relu" in run else "elu",
        "stride": stride,
        "dilation": rate,
        "padding": "tf_same",
    }
    expected = load_file(GOLDEN / "gconv_jy" / "tensors.safetensors")[f"{run}.out"]
    with use_backend("reference"):
        truth = ops.gated_conv2d(x.double(), weight.double(), bias.double(), **options)
    assert (truth - expected).abs().max().item() == pytest.approx(
        case["checks"][run]["out_fp32_vs_fp64_max_abs"], rel=0.005
    )
    with dispatch.launches() as heard:
        got = ops.gated_conv2d(x, weight, bias, **options)
    assert heard[0].backend == "cpu"
    assert_close_to_truth(got, truth, expected, numerics=heard[0].numerics)


def test_two_convolutions_are_one():
    x, wf, wg = torch.randn(1, 6, 20, 20), torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    expected = 1.5 * F.leaky_relu(F.conv2d(x, wf, padding=1), 0.2) * torch.sigmoid(F.conv2d(x, wg, padding=1))
    got = ops.gated_conv2d(x, torch.cat([wf, wg]), padding="same", activation="leaky_relu", gain=1.5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_references():
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(2, 5, 9, 9), torch.randn(6, 5, 3, 3), torch.randn(6)))
    grads = torch.autograd.grad(ops.gated_conv2d(x, weight, bias, padding=1).sum(), (x, weight, bias))
    for got, expected in zip(
        grads, torch.autograd.grad(_gated(x, weight, bias, padding=1).sum(), (x, weight, bias)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 4, 3, 3)}, "2C"),
        ({"weight": torch.zeros(6, 3, 3, 3)}, "channels"),
        ({"weight": torch.zeros(6, 4, 3, 3).double()}, "weight"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"x": torch.zeros(4, 8, 8)}, "4-D"),
        ({"x": torch.zeros(1, 4, 8, 8, dtype=torch.uint8)}, "floating"),
        ({"x": torch.zeros(1, 4, 2, 2)}, "smaller"),
        ({"activation": "gelu"}, "activation"),
        ({"activation": "relu", "alpha": 0.1}, "alpha"),
        ({"padding_mode": "circular"}, "padding_mode"),
        ({"padding": -1}, "padding"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    call = {"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(6, 4, 3, 3), "bias": torch.zeros(6)}
    with pytest.raises(ValueError, match=message):
        ops.gated_conv2d(**{**call, **change})


def test_float16_is_refused_with_a_reason():
    x, weight = torch.zeros(1, 4, 8, 8).half(), torch.zeros(6, 4, 3, 3).half()
    with use_backend("cpu", op="gated_conv2d"), pytest.raises(UnsupportedError, match="float16"):
        ops.gated_conv2d(x, weight)

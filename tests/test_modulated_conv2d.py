"""What only modulated_conv2d has: the public implementations' numbers, the algebra it rests on, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from inpaintrt import ops
from inpaintrt.ops.modulated_conv2d import SPEC
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.compare import DIRECT

from . import golden_style as golden

BACKENDS = golden.backends(SPEC)
FIR = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def _check(out, truth, base, call, backend):
    """`call` is the op's arguments: the CPU's algorithm decides how close its result must be."""
    numerics = SPEC.lanes[backend].numerics(*call) if backend != "reference" else DIRECT
    assert_close_to_truth(out, truth, base, numerics=numerics)


def _run(backend, x, weight, style, **given):
    """The result in float32 by `backend`, and the reference's in float64; `style` may be given in float64."""
    with golden.backend(backend, "modulated_conv2d"):
        out = ops.modulated_conv2d(x, weight, style.float(), **given)
    wide = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    return out, ops.modulated_conv2d(x.double(), weight.double(), style.double(), **wide)


def _call(x, weight, style, padding, up=1, down=1):
    return SPEC.bind(x, weight, style, padding=padding, up=up, down=down)


def _runs(case, prefix=""):
    return [run for run, spec in golden.case(case)["runs"].items() if spec["module"].startswith(prefix)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", [r for r in _runs("modulated_conv") if r != "convlayer_down"])
def test_golden(run, backend):
    """The layers of a Co-ModGAN port, each image in its own style; doubling layers convolve."""
    spec = golden.case("modulated_conv")["runs"][run]
    made = golden.case("modulated_conv")["modules"][spec["module"]]
    state = {key: recipe.tensor_for(key, tuple(shape)) for key, shape, *_ in made["state_dict"]}
    for step in made["after_fill"]:
        for key, exponent in step["keys"].items():
            state[key] *= 2.0**exponent
    pictures, tensors = golden.pictures(spec), golden.tensors("modulated_conv")
    inner = "" if "weight" in state else "conv."
    weight, affine = state[f"{inner}weight"][0], state[f"{inner}modulation.weight"]
    x = pictures["x"]

    scaled = affine.double() / math.sqrt(affine.shape[1])
    style = F.linear(pictures["style"].double(), scaled, state[f"{inner}modulation.bias"].double())

    up, down = 2 if "up" in run else 1, 2 if "down" in run else 1
    given = {
        "demodulate": made["args"].get("demodulate", True) and run != "torgb",
        "weight_gain": 1 / math.sqrt(weight[0].numel()),
        "up": up,
        "down": down,
        "flip_weight": up > 1,
        "resample_filter": FIR,
    }
    if run.startswith("styled"):
        size = [up * n for n in x.shape[2:]]
        noise = 2 * recipe.image(f"modulated_conv/{run}/noise/noise", len(x), 1, *size) - 1
        given |= {"noise": noise, "noise_strength": state["noise.weight"], "bias": state["activate.bias"]}
        given["activation"] = "leaky_relu"
    if run == "torgb":
        given["bias"] = state["bias"].view(-1)
    out, truth = _run(backend, x, weight, style, **given)
    if run == "torgb":
        skip = pictures["skip"]
        out = out + ops.upfirdn2d(skip, FIR, up=2, padding=(2, 1, 2, 1), gain=4.0)
        truth = truth + ops.upfirdn2d(skip.double(), FIR, up=2, padding=(2, 1, 2, 1), gain=4.0)
    torch.testing.assert_close(truth, tensors[f"{run}.out64"], rtol=0, atol=1e-13)
    call = _call(x, weight, style, weight.shape[3] // 2, up, down)
    _check(out, tensors[f"{run}.out64"], tensors[f"{run}.out"], call, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", _runs("nvidia_ops", "modulated_conv2d"))
def test_golden_of_a_function(run, backend):
    """MI-GAN's copy of NVIDIA's function, which normalises filters and styles before it demodulates."""
    spec = golden.case("nvidia_ops")["runs"][run]
    args = golden.case("nvidia_ops")["modules"][spec["module"]]["args"]
    pictures, tensors = golden.pictures(spec), golden.tensors("nvidia_ops")
    x, weight, style = pictures["x"], pictures["w"].double(), pictures["styles"].double()
    if args.get("demodulate", True):
        weight = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
        style = style * style.square().mean().rsqrt()
    up = args.get("up", 1)
    given = {
        "demodulate": args.get("demodulate", True),
        "up": up,
        "padding": args.get("padding", 0),
        "flip_weight": not args.get("flip_weight", True),
        "resample_filter": FIR,
        "noise": pictures["noise"],
    }
    wide = given | {"noise": pictures["noise"].double()}
    torch.testing.assert_close(
        ops.modulated_conv2d(x.double(), weight, style, **wide), tensors[f"{run}.out64"], rtol=0, atol=1e-13
    )
    out, _ = _run(backend, x, weight.float(), style.float(), **given)
    call = _call(x, weight.float(), style.float(), given["padding"], up)
    _check(out, tensors[f"{run}.out64"], tensors[f"{run}.out"], call, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flip", [False, True])
def test_doubling_is_zeros_filter_and_convolution(backend, flip):
    """In this order, too: the filter first, on the border as well, then the plain convolution of what it gives."""
    x, weight, style = torch.randn(2, 6, 7, 9), torch.randn(5, 6, 3, 3), torch.randn(2, 6)
    filtered = ops.upfirdn2d(x.double() * style[:, :, None, None], FIR, up=2, padding=(3, 2, 3, 2), gain=4.0)
    expected = F.conv2d(filtered, (weight.flip([2, 3]) if flip else weight).double())
    given = {"demodulate": False, "up": 2, "flip_weight": flip, "resample_filter": FIR}
    out, truth = _run(backend, x, weight, style, **given)
    torch.testing.assert_close(truth, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=5e-5)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="not run: no native library")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "padding"),
    [
        ((1, 3, 150, 480), 64, 3, 1),
        ((2, 5, 100, 700), 66, 3, 0),
        ((1, 3, 150, 480), 64, 3, 4),
        ((1, 2, 200, 510), 48, 5, 7),
        ((1, 2, 150, 510), 66, 1, 5),
        ((9, 2, 40, 41), 512, 3, 1),
    ],
)
def test_large_images_are_doubled_in_bands(shape, outputs, kernel, padding, layout):
    """The image between convolution and filter would take more than 64 MiB: some rows, or some images, at a time."""
    images, inputs, *size = shape
    assert images * 4 * size[0] * size[1] * outputs * 4 > 64 << 20, "one band"
    x = (2 * recipe.image("x", *shape) - 1).contiguous(memory_format=layout)
    weight, style = recipe.image("w", outputs, inputs, kernel, kernel) - 0.5, recipe.image("s", images, inputs) + 0.5
    doubled = [2 * (n + padding - kernel // 2) for n in size]
    given = {
        "up": 2, "padding": padding, "flip_weight": padding > 1, "resample_filter": FIR,
        "noise": recipe.image("n", images, 1, *doubled) - 0.5, "noise_strength": torch.tensor(0.7),
        "bias": recipe.image("b", outputs) - 0.5, "activation": "leaky_relu", "clamp": 1.5,
    }  # fmt: skip
    out = {}
    for backend in ("cpu", "reference"):
        with golden.backend(backend, "modulated_conv2d"):
            out[backend] = ops.modulated_conv2d(x, weight, style, **given)
    torch.testing.assert_close(out["cpu"], out["reference"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_filters_of_any_rank(backend):
    """A filter that is no outer product, of odd and even length, halving and doubling."""
    x, weight, style = torch.randn(1, 6, 12, 10), torch.randn(5, 6, 3, 3), torch.randn(1, 6)
    for f in (torch.randn(4, 3), torch.randn(5, 8)):
        for given in ({"up": 2}, {"down": 2}):
            out, truth = _run(backend, x, weight, style, resample_filter=f, **given)
            assert out.shape[2:] == ((24, 20) if "up" in given else (6, 5))
            torch.testing.assert_close(out, truth.float(), rtol=1e-4, atol=1e-4)


def test_demodulated_outputs_have_unit_variance():
    """Whatever the scale of weights and styles: of white noise, each image and channel (Karras et al., section 2.2)."""
    x, weight, style = torch.randn(2, 32, 48, 48), torch.randn(8, 32, 3, 3), torch.randn(2, 32)
    deviation = ops.modulated_conv2d(x, 7.0 * weight, 0.3 * style).std((2, 3))
    torch.testing.assert_close(deviation, torch.ones(2, 8), rtol=0.1, atol=0)
    torch.testing.assert_close(
        ops.modulated_conv2d(x, 7.0 * weight, 0.3 * style, eps=0.0),
        ops.modulated_conv2d(x, weight, style, eps=0.0),
        rtol=1e-4,
        atol=1e-4,
    )


def test_gains_are_the_public_ones():
    """√2 where an activation halves the variance, 1 elsewhere; the clamp comes last."""
    x, weight, style = torch.randn(1, 4, 6, 6), torch.randn(3, 4, 1, 1), torch.ones(1, 4)
    plain = ops.modulated_conv2d(x, weight, style)
    for activation, function in (("relu", F.relu), ("silu", F.silu)):
        out = ops.modulated_conv2d(x, weight, style, activation=activation)
        torch.testing.assert_close(out, math.sqrt(2) * function(plain))
    for activation, function in (("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("elu", F.elu)):
        torch.testing.assert_close(ops.modulated_conv2d(x, weight, style, activation=activation), function(plain))
    clamped = ops.modulated_conv2d(x, weight, style, activation="leaky_relu", alpha=0.5, gain=3.0, clamp=0.4)
    torch.testing.assert_close(clamped, (3 * F.leaky_relu(plain, 0.5)).clamp(-0.4, 0.4))


def test_float16_neither_overflows_nor_loses_eps():
    """Filters of 300 times 300 and of 1e-4 times 1e-4, both demodulated: half precision has no such squares."""
    x = torch.randn(1, 8, 6, 6, dtype=torch.float16)
    for size in (300.0, 1e-4):
        weight = torch.full((4, 8, 3, 3), size, dtype=torch.float16)
        style = torch.full((1, 8), size, dtype=torch.float16)
        out = ops.modulated_conv2d(x, weight, style)
        truth = ops.modulated_conv2d(x.double(), weight.double(), style.double())
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), truth, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": torch.ones(2, 5)}, r"style has shape \(2, 5\); accepted: \(2, 4\)"),
        ({"style": torch.ones(1, 4)}, r"style has shape \(1, 4\)"),
        ({"weight": torch.ones(3, 5, 3, 3)}, "weight is"),
        ({"noise_strength": torch.ones(1)}, "noise_strength is given and noise is not"),
        ({"noise": torch.ones(2, 1, 6, 8)}, r"noise has shape .* accepted: \(2, 1, 12, 16\) or \(1, 1, 12, 16\)"),
        ({"noise": torch.ones(2, 3, 12, 16)}, "noise has shape"),
        ({"noise": torch.ones(2, 1, 12, 16), "noise_strength": torch.ones(3)}, r"accepted: \(\) or \(1,\)"),
        ({"bias": torch.ones(4)}, "bias has shape"),
        ({"down": 2}, "not both 2"),
        ({"up": 3}, "accepted: 1 or 2"),
        ({"clamp": -1.0}, "clamp -1.0"),
        ({"eps": -1.0}, "eps -1.0"),
        ({"resample_filter": torch.ones(2, 2, 2)}, "resample_filter is"),
        ({"resample_filter": [1.0, 3.0]}, "resample_filter is a list; accepted: a tensor"),
        ({"style": torch.ones(2, 4, dtype=torch.bfloat16)}, "style is torch.bfloat16"),
        ({"activation": "gelu"}, "activation is"),
        ({"alpha": 0.1}, "alpha is"),
    ],
)
def test_refusals(change, message):
    given = {
        "x": torch.ones(2, 4, 6, 8),
        "weight": torch.ones(3, 4, 3, 3),
        "style": torch.ones(2, 4),
        "up": 2,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ops.modulated_conv2d(**given)

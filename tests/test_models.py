"""Reference networks against the public implementations' numbers. Loading weights has its own file."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re

import pytest
import torch
from safetensors.torch import load_file

import inpaintrt
from inpaintrt import models, ops
from inpaintrt.models import lama
from inpaintrt.runtime import dispatch
from inpaintrt.testing import assert_close_to_truth, close_to_truth, recipe
from inpaintrt.verification import END_TO_END_RMS

GOLDEN = pathlib.Path(__file__).parent / "golden"


# ---- golden cases: inputs, weights and outputs as case.json describes them ------------------------------------------


def _case(name):
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


def _runs(*names):
    return [pytest.param(name, run, id=f"{name}-{run}") for name in names for run in _case(name)[0]["runs"]]


def _input(spec):
    return recipe.image(spec["name"], *spec["shape"]) * spec.get("scale", 1.0) + spec.get("shift", 0.0)


def _stored_part(case, name, tensor):
    """The part of a whole output that the case stores: `full[:, :, ::2, ::3]`."""
    if (what := case["tensors"][name].get("slice")) is None:
        return tensor
    parts = re.search(r"full\[(.*)\]", what)[1].split(",")
    return tensor[tuple(slice(*(int(n) if n.strip() else None for n in part.split(":"))) for part in parts)]


def _options(args):
    activation = args.get("activation_layer", "torch.nn.ReLU")
    return lama.FFCOptions(
        bias=args.get("bias", False),
        gated=args.get("gated", False),
        enable_lfu=args["enable_lfu"],
        activation={"torch.nn.ReLU": "relu", "torch.nn.Identity": "none"}[activation],
    )


def _module(case, run):
    """Our module for the public one of a run, with the recipe's weights; its state dict must be the public one's."""
    spec = case["modules"][case["runs"][run]["module"]]
    args = spec["args"]
    if spec["class"] == "FourierUnit":
        module = lama.FourierUnit(**args)
    elif spec["class"] == "FFC_BN_ACT":
        module = lama.FFC_BN_ACT(
            args["in_channels"], args["out_channels"], args["kernel_size"], args["ratio_gin"], args["ratio_gout"],
            args.get("stride", 1), args["padding"], args.get("dilation", 1), _options(args),
        )  # fmt: skip
    elif spec["class"] == "FFCResnetBlock":
        module = lama.FFCResnetBlock(
            args["dim"], args["ratio_gin"], inline=args.get("inline", False), options=_options(args)
        )
    else:
        assert spec["class"] == "FFCResNetGenerator"
        module = lama.LaMa(n_blocks=args["n_blocks"], base_width=args["ngf"])
    listed = spec["state_dict"]
    if isinstance(listed, str):
        listed = case["modules"][re.fullmatch(r"the same entries as module (\w+)", listed)[1]]["state_dict"]
    listed = [(key, tuple(shape)) for key, shape, *_ in listed]
    assert [(k, tuple(v.shape)) for k, v in module.state_dict().items()] == listed, "the public state-dict layout"
    state = recipe.fill(module).state_dict(keep_vars=True)
    for step in spec["after_fill"]:
        assert step["op"] == "pow2"
        for key, power in step["keys"].items():
            state[key].data.mul_(2.0**power)
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].detach().numpy().tobytes())
    assert digest.hexdigest() == spec["weights_sha256"]
    return module.eval()


def _outputs(module, spec, dtype):
    """The outputs of a run by name; a stream that is absent is not in them."""
    inputs = {name: _input(given).to(dtype) for name, given in spec["inputs"].items()}
    if "x_g" in inputs:
        given = (inputs.get("x_l"), inputs["x_g"])
    else:
        given = inputs["x_l"] if "x_l" in inputs else inputs["x"]
    with torch.no_grad():
        out = module(given)
    named = zip(("out_l", "out_g"), out, strict=True) if isinstance(out, tuple) else [("out", out)]
    return {name: tensor for name, tensor in named if tensor is not None}


def _assert_same_double(actual, truth):
    """Two float64 computations of one thing, in different orders."""
    torch.testing.assert_close(actual, truth, rtol=0, atol=1e-13 * max(1.0, truth.abs().max().item()))


@pytest.mark.parametrize(("name", "run"), _runs("fourier_unit", "ffc_odd", "ffc_variants"))
def test_parts_golden(name, run):
    case, tensors = _case(name)
    spec = case["runs"][run]
    module = _module(case, run)
    out = _outputs(module, spec, torch.float32)
    exact = _outputs(module.double(), spec, torch.float64)
    assert {f"{run}.{part}" for part in out} == set(spec["outputs"])
    for part in out:
        key = f"{run}.{part}"
        actual, double = (_stored_part(case, key, t) for t in (out[part], exact[part]))
        _assert_same_double(double, tensors[key + "64"])
        assert_close_to_truth(actual, tensors[key + "64"], tensors[key], context=key)


@pytest.mark.parametrize(("name", "run"), _runs("fourier_unit"))
def test_fourier_unit_op_golden(name, run):
    """The op with the module's batch norm folded. Spectra are not Hermitian, so this tests the rule of the inverse."""
    case, tensors = _case(name)
    spec = case["runs"][run]
    unit = _module(case, run)
    with torch.no_grad():
        scale = unit.bn.weight / (unit.bn.running_var + unit.bn.eps).sqrt()
        weight = unit.conv_layer.weight * scale.view(-1, 1, 1, 1)
        out = ops.fourier_unit(_input(spec["inputs"]["x"]), weight, unit.bn.bias - unit.bn.running_mean * scale)
    key = f"{run}.out"
    assert_close_to_truth(_stored_part(case, key, out), tensors[key + "64"], tensors[key], context=key)


@pytest.mark.parametrize("run", [*_case("ffc_variants")[0]["runs"], "s13x10"])
def test_parts_golden_accelerated(run):
    case, tensors = _case("ffc_odd" if run == "s13x10" else "ffc_variants")
    spec = case["runs"][run]
    module = inpaintrt.accelerate(_module(case, run))
    if run in ("s13x10", "resblock"):
        assert "accelerated" in repr(module)
    with dispatch.launches() as heard:
        outputs = _outputs(module, spec, torch.float32)
    for part, tensor in outputs.items():
        key = f"{run}.{part}"
        numerics = dispatch.numerics_of(heard)
        assert_close_to_truth(tensor, tensors[key + "64"], tensors[key], numerics=numerics, context=key)


def _assert_deep(actual, truth, baseline, numerics):
    """By the rule, or by `verify`'s criterion for whole networks: their rounding scatters with torch's thread count."""
    verdict = close_to_truth(actual, truth, baseline, numerics=numerics)
    relative = verdict.rms_error / truth.square().mean().sqrt().item()
    assert verdict.ok or relative <= END_TO_END_RMS, verdict.message


@pytest.mark.parametrize("accelerated", [False, True], ids=["reference", "accelerated"])
@pytest.mark.parametrize(("name", "run"), _runs("lama_small", "lama_big"))
def test_lama_golden(name, run, accelerated):
    case, tensors = _case(name)
    spec = case["runs"][run]
    network = _module(case, run)
    image, mask = _input(spec["inputs"]["image"]), tensors[f"{run}.mask"]
    x = torch.cat([image * (1 - mask), mask], dim=1)
    logits = tensors.get(f"{run}.tap.logits64")
    truth = tensors[f"{run}.out64"] if logits is None else logits.sigmoid()  # stored before a sigmoid that saturates
    if accelerated:
        inpaintrt.accelerate(network)
        assert "accelerated" in repr(network)
    with torch.no_grad():
        with dispatch.launches() as heard:
            out = network(x)
        numerics, filled = dispatch.numerics_of(heard), network.inpaint(image, mask)
        _assert_deep(out, truth, tensors[f"{run}.out"], numerics)
        assert torch.equal(filled, torch.where(mask != 0, out, image))
        if accelerated:
            return
        blend = mask.double() * truth + (1 - mask.double()) * image.double()
        actual, blend = (_stored_part(case, f"{run}.inpainted", t) for t in (filled, blend))
        _assert_deep(actual, blend, tensors[f"{run}.inpainted"], numerics)
        if logits is None:
            _assert_same_double(network.double()(x.double()), truth)
        else:
            body = network.model[:-1]
            _assert_deep(body(x), logits, tensors[f"{run}.tap.logits"], numerics)
            _assert_same_double(body.double()(x.double()), logits)


# ---- options --------------------------------------------------------------------------------------------------------

VARIANTS = [
    {"n_downsampling": 1, "ratio": 0.5},
    {"n_downsampling": 2, "in_channels": 2, "out_channels": 1, "max_width": 8},
    {"batch_norm": False},
    {"bias": True, "padding_mode": "zeros", "output_activation": "tanh"},
    {"gated": True, "output_activation": "none"},
    {"enable_lfu": True, "base_width": 8},
    {"enable_lfu": True, "batch_norm": False, "ratio": 1, "base_width": 4},
    {"ratio": 0, "activation": "none", "down_padding_mode": "zeros"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_run_and_are_inferred(options):
    """Each option makes a network that runs; what its weights show is inferred from them again."""
    network = recipe.fill(models.create("lama", **{"n_blocks": 2, "base_width": 4, **options})).eval()
    config = network.config
    side = network.min_size
    x = recipe.image("variant", 1, config["in_channels"], side, side)
    with torch.no_grad():
        out = network(x)
    assert out.shape == (1, config["out_channels"], side, side)
    assert out.isfinite().all()
    inferred = lama.config_from_state_dict(network.state_dict())
    shown = {k: config[k] for k in inferred if k != "max_width"}  # a bound that nothing reaches leaves no trace
    assert {k: v for k, v in inferred.items() if k != "max_width"} == shown
    again = models.create("lama", **{**config, **inferred})
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), out)


def test_options_change_the_result():
    x = recipe.image("options", 1, 4, 16, 16)
    results = []
    for options in ({}, {"padding_mode": "zeros"}, {"down_padding_mode": "zeros"}, {"output_activation": "tanh"},
                    {"activation": "none"}, {"gated": True}, {"enable_lfu": True}, {"batch_norm": False}):  # fmt: skip
        with torch.no_grad():
            results.append(recipe.fill(models.create("lama", n_blocks=1, base_width=16, ratio=0.5, **options))(x))
    for i, one in enumerate(results):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in results[:i])


def test_spectral_transform_without_norms_has_fcf_keys():
    block = lama.FFCResnetBlock(32, 0.75, options=lama.FFCOptions(batch_norm=False, enable_lfu=True))
    spectral = ("conv1.0", "fu.conv_layer", "lfu.conv_layer", "conv2")
    paths = ["convl2l", "convl2g", "convg2l", *(f"convg2g.{name}" for name in spectral)]
    assert list(block.state_dict()) == [f"{conv}.ffc.{path}.weight" for conv in ("conv1", "conv2") for path in paths]


@pytest.mark.parametrize("size", [(8, 6), (6, 8), (5, 5), (8, 16), (1, 1)])
def test_lfu_refuses_what_it_is_not_defined_on(size):
    layer = lama.SpectralTransform(8, 8, options=lama.FFCOptions(enable_lfu=True)).eval()
    with pytest.raises(ValueError, match=f"square maps of even size, not on {size[0]}×{size[1]}"):
        layer(torch.rand(1, 8, *size))


def test_lfu_adds_its_spectrum_to_the_even_bins():
    """Tiling 2×2 in space is, in frequency, twice the small spectrum at the even bins: an independent derivation."""
    unit = recipe.fill(lama.FourierUnit(4, 4)).eval().double()
    x = recipe.image("lfu", 1, 4, 6, 6).double()
    with torch.no_grad():
        small = unit(lama._quadrants(x))
        spectrum = torch.zeros(1, 4, 6, 6, dtype=torch.complex128)
        spectrum[..., ::2, ::2] = 2 * torch.fft.fft2(small, norm="ortho")
        torch.testing.assert_close(small.repeat(1, 1, 2, 2), torch.fft.ifft2(spectrum, norm="ortho").real)
    quarters = lama._quadrants(torch.arange(4 * 16).view(1, 4, 4, 4))
    assert quarters[0, :, 0, 0].tolist() == [0, 8, 2, 10], "top left, bottom left, top right, bottom right"


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="n_downsampling"):
        lama.LaMa(n_downsampling=0)
    with pytest.raises(ValueError, match="output_activation is 'softmax'; accepted: 'sigmoid', 'tanh', 'none'"):
        lama.LaMa(output_activation="softmax")
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        lama.LaMa(n_blocks=1, activation="gelu")
    with pytest.raises(TypeError, match="blocks"):
        lama.LaMa(blocks=3)
    with pytest.raises(ValueError, match="stride is 3"):
        lama.FFC(8, 8, 3, 0.5, 0.5, stride=3)
    with pytest.raises(ValueError, match="gated"):
        lama.LaMa(n_blocks=1, ratio=1, gated=True)
    with pytest.raises(ValueError, match="a stream is missing"):
        lama.FFC(8, 8, 3, 0.5, 0.5, padding=1)(torch.rand(1, 4, 5, 5))
    with pytest.raises(ValueError, match="8·n global channels, got 12"):
        lama.FFCResnetBlock(16, 0.75, options=lama.FFCOptions(enable_lfu=True))


def test_ratio_is_recovered_exactly():
    """The share is stored as a count of channels; a quotient that rounds down must not lose one."""
    for whole in range(1, 300):
        for part in range(whole + 1):
            assert int(whole * lama._ratio(part, whole)) == part


def test_sizes():
    network = models.create("lama", n_blocks=1, base_width=4)
    assert (network.size_multiple, network.min_size) == (8, 16)
    with torch.no_grad():
        assert network(torch.rand(1, 4, 16, 24)).shape == (1, 3, 16, 24)
    with_lfu = models.create("lama", n_blocks=1, base_width=4, enable_lfu=True, ratio=0.5)
    assert (with_lfu.size_multiple, with_lfu.min_size) == (16, 16)


def test_values_under_the_hole_do_not_matter():
    network = recipe.fill(models.create("lama", n_blocks=1, base_width=4)).eval()
    image, mask = torch.rand(1, 3, 16, 16), (torch.rand(1, 1, 16, 16) > 0.5).float()
    poisoned = torch.where(mask != 0, torch.nan, image)
    with torch.no_grad():
        assert torch.equal(network.inpaint(poisoned, mask), network.inpaint(image, mask))

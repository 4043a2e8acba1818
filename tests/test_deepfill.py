"""DeepFill v1 and v2 against the public ports' numbers, and the loading of their weights."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import inpaintrt
from inpaintrt import cli, models, pipeline
from inpaintrt.models import deepfill_v1, deepfill_v2, loading
from inpaintrt.models.deepfill import ATTENTION, LAYOUTS
from inpaintrt.models.deepfill_layers import (
    ConvLayer,
    GatedConv,
    SpectralNorm,
    SplitGatedConv,
    Upsampled,
    convolution,
    upsample,
)
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import assert_close_to_truth, recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = {"deepfill_v1": deepfill_v1, "deepfill_v2": deepfill_v2}
LOADABLE = [
    ("deepfill_v1", "daa"),
    ("deepfill_v1", "mma"),
    ("deepfill_v2", "nip"),
    ("deepfill_v2", "nip_tf"),
    ("deepfill_v2", "mma"),
    ("deepfill_v2", "csq"),
]
PORTS = [(family, port) for family, module in FAMILIES.items() for port in module.PORTS]


def _case(name):
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


def _runs(*names):
    return [pytest.param(name, run, id=f"{name}-{run}") for name in names for run in _case(name)[0]["runs"]]


def _in_double(module, *args):
    """The result in float64 of a copy, because spectral norms write to their parameters."""
    with torch.no_grad():
        return copy.deepcopy(module).double()(*(a.double() for a in args))


def _assert_golden(actual, double, tensors, key, recorded):
    """By the tolerance rule against the port's own float64 result.

    That is stored for some runs. For the others ours takes its place, after the port's float32 result turned out to be
    as far from it as from the port's own: to the three digits that are recorded.
    """
    truth = tensors.get(f"{key}64")
    if truth is not None:
        torch.testing.assert_close(double, truth, rtol=0, atol=2e-11)  # 1e-4 is a float32 in one port, hence not 1e-14
    else:
        distance = (tensors[key].double() - double).abs().max().item()
        assert distance == pytest.approx(recorded, rel=0.005)
        truth = double
    assert_close_to_truth(actual, truth, tensors[key], context=key)


# ---- layers ---------------------------------------------------------------------------------------------------------


class Zhao(SplitGatedConv):
    """The layer of a port without attention: the activation comes after the product, and a norm before it."""

    def __init__(self, first, second, norm, last):
        super().__init__(first, second, "none")
        self.after = nn.Sequential(norm, last)

    def forward(self, x):
        return self.after(super().forward(x))


def _zhao(name):
    inputs, outputs, kernel, stride, padding, dilation = {
        "k7": (4, 8, 7, 1, 3, 1), "s2": (8, 12, 4, 2, 1, 1), "rate4": (8, 8, 3, 1, 4, 4), "up": (12, 6, 3, 1, 1, 1),
        "rgb": (6, 3, 7, 1, 3, 1),
    }[name]  # fmt: skip
    two = [nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation) for _ in range(2)]
    if name == "up":
        two = [SpectralNorm(conv) for conv in two]
    norm = nn.Identity() if name in ("k7", "rgb") else nn.InstanceNorm2d(outputs)
    layer = Zhao(*two, norm, nn.Tanh() if name == "rgb" else nn.LeakyReLU(0.2))
    return Upsampled("gated_conv2d", layer) if name == "up" else layer


SHAPES = {
    "k5": (5, 8, 5), "s2": (8, 12, 3, 2), "rate4": (8, 8, 3, 1, 4), "relu": (8, 8, 3), "rgb": (6, 3, 3), "up": (12, 6, 3),
    "up_nosn": (12, 6, 3), "lrelu_reflect": (8, 8, 3), "replicate": (8, 8, 3, 1, 2), "plain": (8, 8, 3),
}  # fmt: skip


class Doubled(nn.Module):
    """What the decoder of a port does before the layer, without a name in the state dict."""

    def __init__(self, layer):
        super().__init__()
        self.conv = layer.conv
        self.layer = [layer]

    def forward(self, x):
        return self.layer[0](upsample(x))


def _layer(port, name):
    """Our layer for one of a `gconv_` case."""
    if port == "zhao":
        return _zhao(name)
    version, _, kind = name.rpartition(".")
    inputs, outputs, *rest = SHAPES[kind]
    padding = {"lrelu_reflect": "reflect", "replicate": "replicate"}.get(kind, "zeros")
    if port in ("jy", "nip_tf"):
        padding = "tf"
    if port == "mma" and kind != "relu":
        padding = "reflect"
    activation = {"relu": "relu", "lrelu_reflect": "leaky_relu", "rgb": "none"}.get(kind, "elu")

    def conv(n):
        return convolution(inputs, n, *rest, padding=padding)

    if port == "csq":
        two = [conv(outputs), conv(outputs)]
        layer = SplitGatedConv(*([SpectralNorm(c) for c in two] if kind == "up" else two), activation)
        return Upsampled("gated_conv2d", layer) if kind in ("up", "up_nosn") else layer
    if version == "v1" or kind == "plain" or (kind == "rgb" and port != "mma"):
        layer = ConvLayer(conv(outputs), activation)
    elif port == "mma":
        layer = GatedConv(ConvLayer(conv(2 * outputs), "none"), activation)
    else:
        layer = GatedConv(conv(2 * outputs), activation)
    if kind != "up":
        return layer
    return Upsampled("conv", layer) if port.startswith("nip") else Doubled(layer)


@pytest.mark.parametrize(("name", "run"), _runs(*(f"gconv_{port}" for port in ("jy", "nip", "nip_tf", "mma", "csq", "zhao"))))  # fmt: skip # noqa: E501
def test_layers_golden(name, run):
    case, tensors = _case(name)
    spec = case["runs"][run]
    key = spec.get("layer") or spec["key"].removesuffix(".conv")
    layer = _layer(name.removeprefix("gconv_"), key)
    listed = {k.removeprefix(f"{key}."): v["shape"] for k, v in case["state_dict"].items() if k.startswith(f"{key}.")}
    assert {k: list(v.shape) for k, v in layer.state_dict().items()} == listed, "the public state-dict layout"
    with torch.no_grad():
        for short, parameter in layer.named_parameters():
            parameter.copy_(recipe.tensor_for(f"{key}.{short}", tuple(parameter.shape)))
    x = recipe.image(spec["x"]["name"], *spec["x"]["shape"]) * 4 - 2
    double = _in_double(layer, x)
    with torch.no_grad():
        out = layer(x)
    _assert_golden(out, double, tensors, f"{run}.out", case["checks"][run]["out_fp32_vs_fp64_max_abs"])


def test_spectral_norm_is_the_largest_singular_value_in_the_end():
    conv = nn.Conv2d(3, 5, 3)
    weight = conv.weight.detach().clone()
    norm = SpectralNorm(conv)
    x = torch.rand(1, 3, 6, 6)
    first = norm(x)
    for _ in range(200):
        norm(x)
    scaled = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
    torch.testing.assert_close(norm(x), torch.nn.functional.conv2d(x, scaled, conv.bias))
    assert not torch.equal(first, norm(x)), "each forward takes a step, in eval mode too"
    norm.module.weight_bar.grad = None
    (norm(x).sum() + norm(x).square().sum()).backward()
    assert norm.module.weight_bar.grad.isfinite().all()
    assert norm.module.weight_u.grad is None


# ---- networks -------------------------------------------------------------------------------------------------------


def _golden_network(case, run):
    """Our network with the weights of a run; its state dict must be the public one's, in the same order."""
    version, _, port = case["case"].partition("_")
    options = {"width": 24} if port == "csq" else {}
    network = models.create(f"deepfill_{version}", port=port, **options)
    listed = [(key, spec["shape"]) for key, spec in case["state_dict"].items()]
    assert [(k, list(v.shape)) for k, v in network.state_dict().items()] == listed, "the public state-dict layout"
    assert sum(p.numel() for p in network.parameters()) == case["parameters"]
    recipe.fill(network)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(case["runs"][run]["weight_gain"])
    return network


def _golden_input(case, tensors, run):
    """x and mask as the port's forward takes them."""
    spec = case["runs"][run]["inputs"]["img"]
    image, mask = recipe.image(spec["name"], *spec["shape"]), tensors[f"{run}.mask"].float()
    if case["case"] == "v2_csq":
        return image, mask
    masked = (image * 2 - 1) * (1 - mask)
    if case["case"] in ("v2_jy", "v1_daa"):
        return masked, mask
    x = torch.cat([masked, torch.ones_like(mask), mask], dim=1)
    return (x,) if case["case"] == "v2_mma" else (x, mask)


@pytest.mark.parametrize(("name", "run"), _runs("v1_daa", "v2_nip", "v2_nip_tf", "v2_jy", "v2_mma", "v2_csq"))
def test_networks_golden(name, run):
    case, tensors = _case(name)
    network, args = _golden_network(case, run), _golden_input(case, tensors, run)
    double = _in_double(network, *args)
    seen = {}

    def tap(module, inputs, output):
        seen.update(ca_in=inputs[0], ca_out=output)

    network.layer(ATTENTION).register_forward_hook(tap)
    with torch.no_grad():
        images = network(*args)
    for stage, actual, exact in zip(("stage1", "stage2"), images, double, strict=True):
        if f"{run}.{stage}" in tensors:
            recorded = case["checks"][run][f"{stage}_fp32_vs_fp64_max_abs"]
            _assert_golden(actual, exact, tensors, f"{run}.{stage}", recorded)
    for tapped, actual in seen.items():
        if f"{run}.{tapped}" in tensors:
            torch.testing.assert_close(actual, tensors[f"{run}.{tapped}"], rtol=1e-5, atol=1e-5)
    if f"{run}.offsets" in tensors:
        with torch.no_grad():
            *same, offsets = network.forward_with_offsets(*args)
        assert torch.equal(offsets, tensors[f"{run}.offsets"])
        torch.testing.assert_close(same[1], images[1], rtol=0, atol=1e-5)


def small(family, port, **options):
    width = {"width": 4, "decoder_width": 6} if port == "mma" else {"width": 4}
    network = recipe.fill(models.create(family, port=port, **{**width, **options}))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() >= 2:  # gates would let biases decide otherwise
                parameter.mul_(1.25 if family == "deepfill_v1" else 2.0)
    return network


def softened(network):
    """The same network with scores so small that many patches have a weight, not one alone."""
    with torch.no_grad():
        for name, factor in (("pmconv6", 0.05), ("pmconv9", 20.0)):
            for parameter in network.layer(name).parameters():
                parameter.mul_(factor)
    return network


def photo(network, batch=1, rows=None, columns=None):
    rows, columns = rows or max(48, network.min_size), columns or max(48, network.min_size) + network.size_multiple
    image = recipe.image("photo", batch, 3, rows, columns)
    mask = torch.zeros(batch, 1, rows, columns)
    for n in range(batch):
        mask[n, :, rows // 3 : rows // 2, 2 + n * columns // 2 : columns // 3 + n * columns // 2] = 1
    return image, mask


@pytest.mark.parametrize(("family", "port"), PORTS)
def test_forms_of_the_input_agree(family, port):
    """Three channels and a mask, all channels and a mask, all channels alone, and what `inpaint` makes of them."""
    network = small(family, port, spectral_norm=False)
    low, high = network.options.known_range
    image, mask = photo(network)
    known = torch.where(mask != 0, network.options.hole_value, image * (high - low) + low)
    ones = [torch.ones_like(mask)] * network.options.ones
    x = torch.cat([known, *ones, mask], dim=1)
    with torch.no_grad():
        coarse, fine = network(x)
        for other in (network(known, mask), network(x, mask), network(known, mask.bool())):
            assert torch.equal(other[0], coarse)
            assert torch.equal(other[1], fine)
        assert torch.equal(network.network_input(image, mask), x)
        poisoned = torch.where(mask != 0, torch.nan, image)
        filled = network.inpaint(poisoned, mask * 0.3)
    assert max(coarse.abs().max(), fine.abs().max()) <= 1
    expected = torch.where(mask != 0, ((fine - low) / (high - low)).clamp(0, 1), image)
    assert torch.equal(filled, expected)
    assert not torch.equal(coarse, fine)


def test_the_network_fills_the_hole_only_where_the_port_does():
    network = small("deepfill_v2", "csq", spectral_norm=False)
    image, mask = photo(network)
    with torch.no_grad():
        assert torch.equal(network(image, mask)[1], network(image * (1 - mask), mask)[1])
        jy = small("deepfill_v2", "jy")
        assert not torch.equal(jy(image, mask)[1], jy(image * (1 - mask), mask)[1]), "its caller masks"


@pytest.mark.parametrize(("family", "port"), PORTS)
def test_masks_of_a_batch(family, port):
    """The ports' forward matches all samples under the first mask, mmagic's under their own, and so does `inpaint`."""
    network = softened(small(family, port, spectral_norm=False))
    image, mask = photo(network, batch=2)
    with torch.no_grad():
        x = network.network_input(image, mask)
        both = network(x)[1]
        alone = torch.cat([network(x[n : n + 1])[1] for n in range(2)])
        torch.testing.assert_close(both[:1], alone[:1])
        own = (both[1] - alone[1]).abs().max() < 1e-4
        assert own == (network.options.mask_batch == "each")
        torch.testing.assert_close(
            network.inpaint(image, mask), torch.cat([network.inpaint(image[n : n + 1], mask[n : n + 1]) for n in range(2)])
        )  # fmt: skip
        one = network(network.network_input(image, mask[:1].expand(2, -1, -1, -1)))[1]
        shared = network(network.network_input(image, mask[:1].expand(2, -1, -1, -1)), mask[:1])[1]
    assert torch.equal(one, shared), "a mask of one sample counts for all"


def test_ports_differ():
    """The same weights, taken as another port's, give other numbers: each setting has its effect."""
    for family, port, other in (("deepfill_v2", "nip_tf", "jy"), ("deepfill_v1", "daa", "jy")):
        one, two = small(family, port), small(family, other)
        image, mask = photo(one, rows=32, columns=48)
        with torch.no_grad():
            assert not torch.allclose(one.inpaint(image, mask), two.inpaint(image, mask), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "unit"),
    [({"stride": 2}, 8), ({"rate": 4}, 16), ({"rate": 1}, 4), ({"fuse_size": 0}, 8), ({"sampling": "tf"}, 8),
     ({"norm": "sum_eps"}, 8), ({"divisor": "overlap"}, 8), ({"mask_mode": "neginf"}, 8), ({"padding": "reflect"}, 8),
     ({"gated_rgb": True}, 8), ({"bounded": "clip"}, 8), ({"match_activation": "elu"}, 8), ({"rate": 3, "mask_hops": 2}, 12)],
    ids=str,
)  # fmt: skip
def test_options(options, unit):
    """Each one makes a network that runs, computes something else, and is remembered."""
    plain, network = (softened(small("deepfill_v2", "nip", **changed)) for changed in ({}, options))
    assert network.size_multiple == unit
    assert network.min_size % unit == 0
    image, mask = photo(network, rows=96, columns=96)
    with torch.no_grad():
        out = network.inpaint(image, mask)
        assert out.isfinite().all()
        assert not torch.equal(out, plain.inpaint(image, mask))
        again = models.create("deepfill_v2", **network.config)
        again.load_state_dict(network.state_dict())
        assert torch.equal(again.inpaint(image, mask), out)


@pytest.mark.parametrize(("family", "port"), PORTS)
def test_smallest_size(family, port):
    network = small(family, port)
    assert (network.size_multiple, network.min_size) == (8, 72 if port == "mma" else 8)
    image = recipe.image("least", 1, 3, network.min_size, network.min_size)
    mask = torch.zeros(1, 1, *image.shape[2:])
    mask[..., 3, 5] = 1
    with torch.no_grad():
        assert network.inpaint(image, mask).isfinite().all()
        everything = network.inpaint(image, torch.ones_like(mask))
    assert everything.isnan().any() == (network.options.mask_mode == "neginf"), "no key to match, in mmagic"


@pytest.mark.parametrize("size", [(20, 16), (16, 17), (4, 8)])
def test_sizes_are_refused(size):
    network = small("deepfill_v2", "nip")
    image, mask = torch.rand(1, 3, *size), torch.ones(1, 1, *size)
    expected = (
        rf"image is {size[0]}×{size[1]}; accepted: height and width divisible by 8, at least 8\. Pad image and mask"
    )
    for call in (network, network.inpaint, network.forward_with_offsets):
        with pytest.raises(ValueError, match=expected):
            call(image, mask)
    with pytest.raises(ValueError, match=r"image is 64×64; .* divisible by 8, at least 72"):
        small("deepfill_v2", "mma")(torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64))
    with pytest.raises(ValueError, match="divisible by 16"):
        small("deepfill_v2", "nip", rate=4)(torch.rand(1, 3, 24, 16), torch.ones(1, 1, 24, 16))


def test_shapes_are_refused():
    network = small("deepfill_v2", "nip")
    image, mask = torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16)
    with pytest.raises(
        ValueError, match=r"mask missing; accepted: \(B, 3, H, W\) with a mask, or \(B, 5, H, W\), image, ones"
    ):
        network(image)
    with pytest.raises(ValueError, match=r"x is \(2, 4, 16, 16\) and mask given"):
        network(torch.rand(2, 4, 16, 16), mask)
    with pytest.raises(ValueError, match=r"x is \(3, 16, 16\)"):
        network(image[0], mask)
    for wrong in (mask[:, :, :8], mask.expand(-1, 3, -1, -1), mask[0], torch.ones(3, 1, 16, 16)):
        with pytest.raises(ValueError, match=r"accepted: \(1 or 2, 1, 16, 16\)"):
            network(image, wrong)
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\), image, mask"):
        small("deepfill_v2", "csq")(torch.rand(1, 5, 16, 16))


def test_wrong_options_are_named():
    for options, message in (
        ({"port": "tf"}, "port is 'tf'; accepted: nip, nip_tf, jy, mma, csq"),
        ({"layout": "x"}, "layout is 'x'; accepted: nip, nip_tf, mma, csq, daa"),
        ({"gate": "three"}, "gate is 'three'; accepted: none, one, two"),
        ({"padding": "circular"}, "padding is 'circular'; accepted: zeros"),
        ({"width": 3}, "width is 3; accepted: even"),
        ({"stride": 0}, "rate is 2, stride 0"),
        ({"mask_hops": 3}, "mask_hops is 3; accepted: 1, 2"),
        ({"bounded": "sigmoid"}, "bounded is 'sigmoid'"),
        ({"match_activation": "gelu"}, "match_activation is 'gelu'"),
        ({"spectral_norm": True}, "spectral_norm is on with gate 'one'"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create("deepfill_v2", **options)
    with pytest.raises(TypeError, match="DeepFillV1 has no option 'colour', 'ratio'"):
        models.create("deepfill_v1", colour=1, ratio=2)
    with pytest.raises(ValueError, match="port is 'nip'; accepted: daa, jy, mma"):
        models.create("deepfill_v1", port="nip")


def test_gradients_reach_every_weight():
    network = small("deepfill_v2", "nip").train()
    image, mask = photo(network, rows=32, columns=32)
    network(network.network_input(image, mask))[1].sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_copies_are_independent():
    network = small("deepfill_v1", "daa")
    image, mask = photo(network)
    with torch.no_grad():
        out = network.inpaint(image, mask)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(other.inpaint(image, mask), out)
            other.layer("conv1").conv.weight.zero_()
            assert torch.equal(network.inpaint(image, mask), out)


# ---- loading --------------------------------------------------------------------------------------------------------


def same(loaded, network):
    ours, theirs = loaded.state_dict(), network.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not loaded.training
    assert loaded.config == network.config
    return True


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(("family", "port"), LOADABLE)
@pytest.mark.parametrize("prefix", ["", "netG.", "generator.", "module."])
def test_files_are_recognised(tmp_path, family, port, prefix):
    """Port, widths and options from the names and shapes, whatever is around them."""
    network = small(family, port)
    state = prefixed(network.state_dict(), prefix)
    others = {"discriminator.conv1.weight": torch.zeros(2), "localD.dis_conv_module.conv1.conv.weight": torch.zeros(3)}
    torch.save({"G": state, "D": {"conv1.conv.weight": torch.zeros(1)}, "iteration": 5}, tmp_path / "states.pth")
    torch.save({**state, **others}, tmp_path / "flat.pth")
    torch.save({"state_dict": {**state, **others}, "meta": {"epoch": 1}}, tmp_path / "mm.pth")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("states.pth", "flat.pth", "mm.pth", "weights.safetensors"):
        assert same(inpaintrt.load(family, tmp_path / name), network), name


def test_released_widths_are_the_defaults():
    counts = {("deepfill_v1", "daa"): 3_601_542, ("deepfill_v2", "nip"): 4_052_478, ("deepfill_v2", "mma"): 4_414_908}
    for (family, port), count in counts.items():
        with torch.device("meta"):
            network = models.create(family, port=port)
        assert sum(p.numel() for p in network.parameters()) == count
        assert models.create(family).config["port"] == {"deepfill_v1": "daa", "deepfill_v2": "nip"}[family]


def test_options_override_what_is_inferred(tmp_path):
    """The original's settings on its converted weights, and the savings for large images."""
    network = small("deepfill_v2", "nip_tf")
    torch.save(network.state_dict(), tmp_path / "states_tf.pth")
    assert inpaintrt.load("deepfill_v2", tmp_path / "states_tf.pth").config["port"] == "nip_tf"
    original = inpaintrt.load("deepfill_v2", tmp_path / "states_tf.pth", port="jy", stride=2)
    assert (original.config["port"], original.options.fuse_size, original.options.mask_hops) == ("jy", 3, 2)
    assert original.layer(ATTENTION).options["mask_sampling"] == (("tf", 4), ("tf", 2))
    assert original.layer(ATTENTION).options["stride"] == 2
    with pytest.raises(ValueError, match="port is 'daa'"):
        inpaintrt.load("deepfill_v2", tmp_path / "states_tf.pth", port="daa")
    with pytest.raises(TypeError, match="no option 'color'"):
        inpaintrt.load("deepfill_v2", tmp_path / "states_tf.pth", color=1)
    with pytest.raises(WeightsError, match=r"the key 'stage1\.conv1.*' and 84 more is missing"):
        inpaintrt.load("deepfill_v2", tmp_path / "states_tf.pth", port="nip")


def test_spectral_norm_is_inferred(tmp_path):
    for on in (True, False):
        network = small("deepfill_v2", "csq", spectral_norm=on)
        save_file(network.state_dict(), tmp_path / "w.safetensors")
        loaded = inpaintrt.load("deepfill_v2", tmp_path / "w.safetensors")
        assert same(loaded, network)
        frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
        assert {name.rpartition(".")[2] for name in frozen} == ({"weight_u", "weight_v"} if on else set())


@pytest.mark.parametrize("fuse", [True, False])
def test_a_pickled_attention_says_whether_it_propagates(tmp_path, monkeypatch, fuse):
    module = types.ModuleType("foreign_port")

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.fuse = fuse

    Attention.__module__, Attention.__qualname__ = module.__name__, "Attention"
    module.Attention = Attention
    monkeypatch.setitem(sys.modules, module.__name__, module)
    network = small("deepfill_v2", "nip_tf")
    network.contextual_attention = Attention()
    torch.save({"G": network}, tmp_path / "module.pt")
    monkeypatch.setitem(sys.modules, module.__name__, None)
    assert inpaintrt.load("deepfill_v2", tmp_path / "module.pt").options.fuse_size == (3 if fuse else 0)


def refusal(family, path, **options):
    with pytest.raises(WeightsError) as raised:
        inpaintrt.load(family, path, **options)
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_other_networks_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    kinds = {
        "deepfill_v1": small("deepfill_v1", "daa").state_dict(),
        "deepfill_v2": small("deepfill_v2", "mma").state_dict(),
        "lama": models.create("lama", n_blocks=1, base_width=4).state_dict(),
    }
    for found, state in kinds.items():
        save_file(state, path)
        for wanted in set(kinds) - {found}:
            message = refusal(wanted, path)
            assert f"a {found} generator (load it under that name), not a {wanted} generator" in message
    save_file({"conv1.weight": torch.zeros(2), "conv13_upsample_conv.weight": torch.zeros(2)}, path)
    message = refusal("deepfill_v2", path)
    assert "a CR-Fill generator, not a deepfill_v2 generator; expected a deepfill_v2 generator" in message
    assert "'stage1.conv1.conv.weight' or 'xconv1.conv.weight' or " in message
    save_file({"layer.weight": torch.zeros(2)}, path)
    assert "none of its 1 keys ends in 'coarse_generator.conv1.conv.weight' or" in refusal("deepfill_v1", path)


def test_weights_that_do_not_fit(tmp_path):
    state = small("deepfill_v2", "nip").state_dict()

    def message(drop=(), **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        save_file({**{k: v for k, v in state.items() if k not in drop}, **changes}, tmp_path / "w.safetensors")
        return refusal("deepfill_v2", tmp_path / "w.safetensors")

    assert "the key 'stage2.ca_conv_bn4.conv.bias' is missing" in message(drop=["stage2.ca_conv_bn4.conv.bias"])
    assert "the key 'stage1.conv1.conv.bias' is missing" in message(drop=["stage1.conv1.conv.bias"])
    assert "expected (8,)" in message(stage1__conv1__conv__bias=torch.zeros(6))
    assert "stage1.conv1.conv.weight is (8, 6, 5, 5), expected (8, 5, 5, 5)" in message(
        stage1__conv1__conv__weight=torch.zeros(8, 6, 5, 5)
    )
    assert "1 tensors that ours does not have, first 'stage2.extra.weight' (2,)" in message(
        stage2__extra__weight=torch.zeros(2)
    )
    assert "NaN or infinity, first stage1.conv1.conv.bias" in message(
        stage1__conv1__conv__bias=torch.full((8,), torch.nan)
    )
    assert "fuse_weight is not the 3×3 identity, so scores are propagated in another way" in message(
        stage2__contextual_attention__fuse_weight=torch.ones(1, 1, 3, 3)
    )
    assert "width is 3; accepted: even" in message(stage1__conv1__conv__weight=torch.zeros(6, 5, 5, 5))
    with pytest.raises(WeightsError, match=r"the key 'stage2\.contextual_attention\.fuse_weight' is missing"):
        loading.build("deepfill_v2", {k: v for k, v in state.items() if "fuse" not in k})


def test_several_generators():
    state = small("deepfill_v2", "mma").state_dict()
    both = {**prefixed(state, "generator_ema."), **prefixed(state, "generator.")}
    both["generator_ema.stage1.encoder.enc1.conv.conv.bias"] = torch.full((8,), 3.0)
    assert loading.build("deepfill_v2", both).layer("conv1").conv.conv.bias[0] != 3
    assert loading.build("deepfill_v2", both, prefix="generator_ema").layer("conv1").conv.conv.bias[0] == 3
    with pytest.raises(WeightsError, match="2 deepfill_v2 generators, 'a', 'b'; choose one with prefix"):
        loading.build("deepfill_v2", {**prefixed(state, "a."), **prefixed(state, "b.")})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_name_each_layer_once(layout):
    paths = LAYOUTS[layout].paths()
    assert len(paths) == len(set(paths.values())) == 43
    assert set(paths) == set(LAYOUTS["nip_tf"].paths())


# ---- photos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "port"), [("deepfill_v1", "daa"), ("deepfill_v2", "mma"), ("deepfill_v2", "csq")])
def test_photos_of_any_size_are_filled(family, port):
    network = small(family, port)
    image = (recipe.image("any", 1, 3, 45, 91)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    mask = np.zeros((45, 91), bool)
    mask[20:30, 50:70] = True
    filled = pipeline.fill(network, image, mask)
    assert np.array_equal(filled[~mask], image[~mask])
    assert (filled[mask] != image[mask]).mean() > 0.9


def test_from_the_command_line(tmp_path, capsys):
    network = small("deepfill_v2", "nip")
    torch.save({"G": network.state_dict()}, tmp_path / "states.pth")
    image = (recipe.image("cli", 1, 3, 30, 40)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    mask = np.zeros((30, 40), bool)
    mask[10:20, 10:30] = True
    Image.fromarray(image).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    model = ["--model", "deepfill_v2", "--weights", str(tmp_path / "states.pth")]
    out = tmp_path / "out.png"
    assert cli.main(["fill", str(tmp_path / "photo.png"), str(tmp_path / "mask.png"), "-o", str(out), *model, "--no-accelerate"]) == 0  # fmt: skip # noqa: E501
    assert np.array_equal(np.asarray(Image.open(out)), pipeline.fill(network, image, mask))
    assert cli.main(["explain", *model, "--size", "32x48"]) == 0
    assert cli.main(["fill", str(tmp_path / "photo.png"), str(tmp_path / "mask.png"), "-o", str(tmp_path / "b.png"), "--model", str(tmp_path / "states.pth")]) != 0  # fmt: skip # noqa: E501
    assert "a deepfill_v2 generator (load it under that name), not a lama generator" in capsys.readouterr().err

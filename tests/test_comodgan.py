"""Co-ModGAN and its layers against the public implementations' numbers, and the loading of its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from inpaintrt import models
from inpaintrt.models import comodgan, stylegan2_layers
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import recipe

from . import golden_style as golden

SMALL = {"size": 16, "channels": 128, "most_channels": 8, "z": 12, "w": 10, "hidden": 14, "vector": 16}
PORTS = tuple(comodgan.PORTS)


def _twice(module, *args, **kwargs):
    """The result in float32 and in float64."""

    def wide(value):
        if isinstance(value, torch.Tensor):
            return value.double()
        return [wide(v) for v in value] if isinstance(value, (list, tuple)) else value

    with torch.no_grad():
        out = module(*args, **kwargs)
        return out, copy.deepcopy(module).double()(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["styled", "styled_up", "torgb", "convlayer_down"])
def test_layers_of_the_ports(run):
    spec = golden.case("modulated_conv")["runs"][run]
    inputs = golden.pictures(spec)
    if run.startswith("styled"):
        layer = stylegan2_layers.PortStyledConvolution(6, 8, 10, up=run == "styled_up")
        size = [2 * n if layer.up else n for n in inputs["x"].shape[2:]]
        noise = 2 * recipe.image(f"modulated_conv/{run}/noise/noise", len(inputs["x"]), 1, *size) - 1
        args = inputs["x"], inputs["style"], noise
    elif run == "torgb":
        layer, args = stylegan2_layers.PortToRGB(6, 10, filters=True), (inputs["x"], inputs["style"])
    else:
        layer, args = stylegan2_layers.PortConvolution(6, 8, down=True), (inputs["x"],)
    golden.fill(layer, golden.case("modulated_conv")["modules"][spec["module"]])
    out, wide = _twice(layer, *args)
    if run == "torgb":
        out = stylegan2_layers.doubled(inputs["skip"], layer.upsample.kernel) + out
        wide = stylegan2_layers.doubled(inputs["skip"].double(), layer.upsample.kernel) + wide
    golden.assert_golden("modulated_conv", f"{run}.out", out, wide)


def _planes(name, network, batch):
    names = network._names
    paths = [names.first, *(path.format(r) for r in network.sizes[1:] for path in names.decoder)]
    shapes = network.noise_shapes(batch)
    return [2 * recipe.image(f"{name}/noise/{p}.noise", *s) - 1 for p, s in zip(paths, shapes, strict=True)]


@pytest.mark.parametrize(("name", "run"), [("comodgan_small", run) for run in "abc"] + [("comodgan_full", "a")])
def test_golden(name, run):
    """zengxianyu's port: without the smallest features, with noise and without, truncated and not."""
    spec = golden.case(name)["runs"][run]
    made = golden.case(name)["modules"][spec["module"]]
    opt = made["args"]["opt"]
    network = models.create(
        "comodgan", port="zyu", size=opt["crop_size"], channels=2 * opt["fmap_base"], most_channels=opt["fmap_max"],
        w=opt["dlatent_size"], vector=64 if name == "comodgan_small" else 1024,
    )  # fmt: skip
    golden.fill(network, made)
    inputs = golden.pictures(spec)
    image, mask = inputs["image"], inputs["mask"]
    given = {"z": inputs["z"], "noise": _planes(name, network, len(image)) if opt["noise_injection"] else "none"}
    if "w_mean" in inputs:
        given |= {"truncation": 0.6, "mean": inputs["w_mean"]}
    if name == "comodgan_full":  # the small one says the same in float64, quickly
        with torch.no_grad():
            raw, raw64 = network(image * (1 - mask), mask, **given), None
    else:
        raw, raw64 = _twice(network, image * (1 - mask), mask, **given)
    golden.assert_golden(name, f"{run}.raw", raw, raw64)
    golden.assert_golden(name, f"{run}.out", raw * mask + image * (1 - mask))


@pytest.mark.parametrize("run", golden.case("comodgan_migan_small")["runs"])
def test_golden_of_migan_s_port(run):
    """Stored noise, none, truncation; a batch whose styles are normalised together, and one image."""
    case = golden.case("comodgan_migan_small")
    spec, made = case["runs"][run], case["modules"]["g"]
    network = models.create(
        "comodgan", port="migan", size=32, channels=512, most_channels=32, z=40, w=48, hidden=48, vector=64
    )
    golden.fill(network, made)
    inputs = golden.pictures(spec)
    known = inputs["mask"]
    given = {"noise": "none"} if run == "none" else {"truncation": 0.5} if run == "trunc" else {}
    out, wide = _twice(network, inputs["image"] * known, 1 - known, z=inputs["z"], **given)
    golden.assert_golden("comodgan_migan_small", f"{run}.out", out, wide)


# ---- behaviour ------------------------------------------------------------------------------------------------------


def _small(port="official", **options):
    network = recipe.fill(models.create("comodgan", port=port, **{**SMALL, **options}))
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "mapping" in name.lower():
                p.mul_(100)  # its learning rate is 0.01
    return network


def _photo(network, batch=1):
    image, mask = (
        recipe.image("photo", batch, 3, network.size, network.size),
        torch.zeros(batch, 1, *[network.size] * 2),
    )
    mask[:, :, 3:9, 4:12] = 1
    return image, mask


def _given(network, batch=1):
    z = recipe.image("z", batch, network.z_length) * 2 - 1
    return {"z": z, "noise": [recipe.image(f"n{i}", *s) - 0.5 for i, s in enumerate(network.noise_shapes(batch))]}


def test_official_adds_the_smallest_features_and_drops_at_random():
    """With nothing dropped, the official network differs from zengxianyu's port by the 4×4 features alone."""
    official, zyu = _small(), _small("zyu")
    x = official.network_input(*_photo(official, 2))
    given, ones = _given(official, 2), torch.ones(1, SMALL["vector"])
    with torch.no_grad():
        whole, without = official(x, **given, dropout=ones), zyu(x, **given)
        assert (whole - without).abs().max() > 1e-4
        for network in (official, zyu):
            last = network.get_submodule(network._names.last)
            last.register_forward_hook(lambda m, i, out: torch.zeros_like(out))
        torch.testing.assert_close(official(x, **given, dropout=ones), zyu(x, **given))
    dropped = [_small()(x, **given, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2]), "the official code drops at inference, too"


@pytest.mark.parametrize("port", PORTS)
def test_seeds_make_pictures_repeatable(port):
    network = _small(port)
    image, mask = _photo(network, 2)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again, other = (network.inpaint(image, mask, seed=s) for s in (3, 3, 4))
        hidden = network.inpaint(torch.where(mask != 0, torch.nan, image), mask * 0.3, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(first, again)
    assert torch.equal(first, hidden)
    assert not torch.equal(first, other)
    assert torch.equal(first[:, :, -1], image[:, :, -1])
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize("port", PORTS)
def test_forms_of_the_input_agree(port):
    network = _small(port)
    image, mask = _photo(network)
    x, given = network.network_input(image, mask), _given(network)
    with torch.no_grad():
        out = network(x, **given, dropout=torch.ones(1, SMALL["vector"]))
        split = network((image * 2 - 1) * (1 - mask), mask, **given, dropout=torch.ones(1, SMALL["vector"]))
    assert torch.equal(out, split)
    assert out.shape == image.shape


@pytest.mark.parametrize("port", PORTS)
def test_a_noise_of_each_kind(port):
    network = _small(port)
    x = network.network_input(*_photo(network))
    z, ones = _given(network)["z"], torch.ones(1, SMALL["vector"])
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "noise" in name:
                p.fill_(0.3)
        kinds = {k: network(x, z=z, noise=k, dropout=ones) for k in ("none", "random")}
        zero = network(x, z=z, noise=[torch.zeros(s) for s in network.noise_shapes()], dropout=ones)
        assert torch.equal(kinds["none"], zero)
        assert not torch.equal(kinds["none"], kinds["random"])
        if port == "migan":
            assert torch.equal(network(x, z=z), network(x, z=z, noise="const"))
            return
        with pytest.raises(ValueError, match="noise is 'const'"):
            network(x, z=z, noise="const")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 32, 32)}, "the only size of this network"),
        ({"x": torch.zeros(1, 3, 16, 16)}, "mask missing"),
        ({"mask": torch.zeros(1, 1, 16, 16)}, "mask given"),
        ({"z": torch.zeros(1, 5)}, r"z is \(1, 5\); accepted: \(1, 12\)"),
        ({"noise": [torch.zeros(1, 1, 4, 4)]}, "1 planes of noise; accepted: 5"),
        ({"noise": [torch.zeros(2, 1, 4, 4)] * 5}, "a plane of noise is"),
        ({"truncation": 0.5}, "without a mean"),
        ({"truncation": 0.5, "mean": torch.zeros(1, 1)}, r"mean is \(1, 1\); accepted: \(1, 10\)"),
        ({"truncation": 0.5, "mean": torch.zeros(10)}, r"mean is \(10,\)"),
        ({"dropout": torch.ones(1, 1)}, r"dropout is \(1, 1\); accepted: \(1, 16\)"),
        ({"dropout": torch.ones(2, 16)}, r"dropout is \(2, 16\)"),
        ({"x": torch.zeros(0, 4, 16, 16)}, r"x is \(0, 4, 16, 16\)"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        _small()(**{"x": torch.zeros(1, 4, 16, 16), **change})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("port", PORTS)
def test_half_precision_is_finite(port, dtype):
    network = _small(port)
    x, given, ones = network.network_input(*_photo(network)), _given(network), torch.ones(1, SMALL["vector"])
    faint = {**given, "z": given["z"] * 2.0**-14}  # whose squares are 0 in float16, as its eps is
    with torch.no_grad():
        for given_ in (given, faint, {**given, "z": given["z"] * 0}):
            wide = network(x, **given_, dropout=ones)
            got = copy.deepcopy(network).to(dtype)(x.to(dtype), **given_, dropout=ones)
            assert got.dtype == dtype
            assert (got - wide).square().mean().sqrt() < 0.05 * wide.square().mean().sqrt()


@pytest.mark.parametrize(
    ("options", "message"), [({"port": "x"}, "port is"), ({"size": 24}, "size is"), ({"channels": 8}, "channels are")]
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        models.create("comodgan", **{**SMALL, **options})


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("options", [{}, {"channels": 64, "size": 32, "w": 3}])
def test_weights_tell_what_they_are_of(port, options, tmp_path):
    network = _small(port, **options)
    path = tmp_path / "weights.safetensors"
    state = {f"netG.{key}": t for key, t in network.state_dict().items()}
    save_file({**state, "netD.b4.conv.weight": torch.zeros(1)}, path)
    loaded = models.load("comodgan", path, **({"port": port} if port == "zyu" else {}))
    assert loaded.config == network.config
    for key, t in loaded.state_dict().items():
        assert torch.equal(t, network.state_dict()[key])


def test_weights_of_others_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(recipe.fill(models.create("migan", size=16, channels=64, most_channels=8)).state_dict(), path)
    with pytest.raises(WeightsError, match="a migan generator"):
        models.load("comodgan", path)
    state = _small("migan").state_dict()
    save_file({k: v for k, v in state.items() if "fc3" not in k}, path)
    with pytest.raises(WeightsError, match=r"'mapping\.fc3\.weight' and 1 more is missing"):
        models.load("comodgan", path)

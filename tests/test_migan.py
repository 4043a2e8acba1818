"""MI-GAN and its blocks against the public implementation's numbers, and the loading of its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from inpaintrt import models
from inpaintrt.models import migan, stylegan2_layers
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import recipe

from . import golden_style as golden

SMALL = {"size": 16, "channels": 64, "most_channels": 8}


def _block(name):
    if name == "downsample":
        return migan.Downsample(5)
    if name == "upsample":
        return migan.Upsample(5, 12)
    size = 8 if name == "noise" else 12
    return migan.SeparableConvolution(6, 10, size=size, down=name == "down", up="up" in name, noise="noise" in name)


@pytest.mark.parametrize("run", [r for r in golden.case("migan_blocks")["runs"] if r != "clamp"])
def test_blocks(run):
    spec = golden.case("migan_blocks")["runs"][run]
    block = golden.fill(_block(run), golden.case("migan_blocks")["modules"][spec["module"]])
    x = golden.pictures(spec)["x"]
    with torch.no_grad():
        out, wide = block(x), copy.deepcopy(block).double()(x.double())
    golden.assert_golden("migan_blocks", f"{run}.out", out, wide)


def test_activation_reaches_its_clamp():
    x = golden.pictures(golden.case("migan_blocks")["runs"]["clamp"])["x"]
    out = stylegan2_layers.act(x, migan.CLAMP)
    golden.assert_golden("migan_blocks", "clamp.out", out, stylegan2_layers.act(x.double(), migan.CLAMP))
    assert out.min() == -256
    assert out.max() == 256


@pytest.mark.parametrize("name", ["migan_small", "migan_256"])
def test_golden(name):
    spec, made = golden.case(name)["runs"]["a"], golden.case(name)["modules"]["g"]
    options = {"channels": 512, "most_channels": 32} if name == "migan_small" else {}
    network = golden.fill(models.create("migan", size=made["args"]["resolution"], **options), made)
    inputs = golden.pictures(spec)
    image, known = inputs["image"], inputs["mask"]
    with torch.no_grad():
        out = network(image * known, 1 - known)
        wide = None
        if name == "migan_small":  # the larger one says the same, slowly
            wide = copy.deepcopy(network).double()(torch.cat([known - 0.5, image * known], 1).double())
    golden.assert_golden(name, "a.out", out, wide)
    golden.assert_golden(name, "a.comp", image * known + out * (1 - known))


def _small(**options):
    return recipe.fill(models.create("migan", **{**SMALL, **options}))


def _photo(network, batch=1):
    image, mask = (
        recipe.image("photo", batch, 3, network.size, network.size),
        torch.zeros(batch, 1, *[network.size] * 2),
    )
    mask[:, :, 3:9, 4:12] = 1
    return image, mask


def test_inpaint_fills_the_hole_alone():
    network = _small()
    image, mask = _photo(network, 2)
    with torch.no_grad():
        out = network(network.network_input(image, mask))
        filled = network.inpaint(torch.where(mask != 0, torch.nan, image), mask * 0.3)
    assert torch.equal(filled, torch.where(mask != 0, ((out + 1) / 2).clamp(0, 1), image))


def test_noise_can_be_given():
    network = _small()
    image, mask = _photo(network)
    x = network.network_input(image, mask)
    stored = [
        network.get_submodule(f"synthesis.b{r}.{conv}").noise_const[None, None]
        for r in network.sizes[1:]
        for conv in ("conv1", "conv2")
    ]
    with torch.no_grad():
        assert torch.equal(network(x, noise=stored), network(x))
        assert not torch.equal(network(x, noise=[2 * t for t in stored]), network(x))
        with pytest.raises(ValueError, match="4 planes"):
            network(x, noise=stored[1:])


def test_refusals():
    network = _small()
    with pytest.raises(ValueError, match="the only size of this network"):
        network(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"mask is \(1, 16, 16\)"):
        network(torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match=r"x is \(0, 4, 16, 16\)"):
        network(torch.zeros(0, 4, 16, 16))
    with pytest.raises(ValueError, match="noise is 'random'; accepted: 4 planes"):
        network(torch.zeros(1, 4, 16, 16), noise="random")
    planes = [torch.zeros(3, *shape[1:]) for shape in network.noise_shapes()]
    with pytest.raises(ValueError, match=r"a plane of noise is \(3, 1, 8, 8\); accepted: \(1, 1, 8, 8\)"):
        network(torch.zeros(1, 4, 16, 16), noise=planes)
    with pytest.raises(ValueError, match="size is 20"):
        models.create("migan", size=20)
    with pytest.raises(ValueError, match="channels are 8"):
        models.create("migan", size=16, channels=8)


def test_weights_tell_what_they_are_of(tmp_path):
    path = tmp_path / "weights.safetensors"
    for options in ({}, {"size": 32, "channels": 96}, {"most_channels": 3}):
        network = _small(**options)
        save_file(network.state_dict(), path)
        loaded = models.load("migan", path)
        x = network.network_input(*_photo(network))
        with torch.no_grad():
            assert torch.equal(loaded(x), network(x))
    with pytest.raises(WeightsError, match="not a comodgan generator"):
        models.load("comodgan", path)
    assert models.create("migan", size=256).config == {"size": 256, "channels": 32768, "most_channels": 512}

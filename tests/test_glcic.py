"""GLCIC against a public port's numbers, and the loading of its weights."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import inpaintrt as irt
from inpaintrt import models, pipeline
from inpaintrt.models import loading
from inpaintrt.models.glcic import PLACES
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import assert_close_to_truth, recipe

from . import foreign_glcic as foreign

GOLDEN = pathlib.Path(__file__).parent / "golden" / "glcic"
CASE = json.loads((GOLDEN / "case.json").read_text())
TENSORS = load_file(GOLDEN / "tensors.safetensors")
MPV = (0.50, 0.45, 0.40)


def small(port="ote", **options):
    return recipe.fill(models.create("glcic", port=port, width=8, **options))


def photo(batch=1, rows=32, columns=44):
    image = recipe.image("photo", batch, 3, rows, columns)
    mask = torch.zeros(batch, 1, rows, columns)
    for n in range(batch):
        mask[n, :, rows // 4 : rows // 2, 3 + 4 * n : columns // 2 + 4 * n] = 1
    return image, mask


# ---- the port's numbers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    """The network with the case's weights, once in each dtype."""
    network = models.create("glcic", mpv=MPV)
    listed = [(key, shape) for key, shape, *_ in CASE["modules"]["g"]["state_dict"]]
    assert [(k, list(v.shape)) for k, v in network.state_dict().items()] == listed, "the public state-dict layout"
    assert sum(p.numel() for p in network.parameters()) == CASE["modules"]["g"]["parameters"]
    recipe.fill(network)
    state = network.state_dict()
    for step in CASE["modules"]["g"]["after_fill"]:
        for key, exponent in step["keys"].items():
            state[key].mul_(2.0**exponent)
    double = models.create("glcic", mpv=MPV).double()
    double.load_state_dict(state)
    return network, double


def golden_photo(run):
    inputs = CASE["runs"][run]["inputs"]
    return recipe.image(inputs["image"]["name"], *inputs["image"]["shape"]), TENSORS[f"{run}.mask"]


@pytest.mark.parametrize("run", CASE["runs"])
def test_golden(golden, run):
    network, double = golden
    image, mask = golden_photo(run)
    x = network.network_input(image, mask)
    mean = torch.tensor(MPV).view(1, 3, 1, 1)
    assert torch.equal(x, torch.cat([image - image * mask + mean * mask, mask], 1)), "the port's own input"
    heard = {}
    hooks = [
        network.get_submodule("conv17" if name == "logits" else name).register_forward_hook(
            lambda _, args, out, name=name: heard.update({name: out})
        )
        for name in (key.removeprefix(f"{run}.tap.") for key in CASE["runs"][run]["taps"])
    ]
    with torch.no_grad():
        out, truth = network(x), double(x.double())
        filled = network.inpaint(image, mask)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(truth, TENSORS[f"{run}.out64"], rtol=0, atol=1e-12)
    assert_close_to_truth(out, TENSORS[f"{run}.out64"], TENSORS[f"{run}.out"], context=run)
    assert torch.equal(filled, torch.where(mask != 0, out, image))
    for key in CASE["runs"][run]["taps"]:
        stored, got = TENSORS[key], heard[key.removeprefix(f"{run}.tap.")]
        got = got[: len(stored), : stored.shape[1]]
        if stored.shape[2:] != got.shape[2:]:
            got = got[..., 4:20, 8:32]
        torch.testing.assert_close(got, stored, rtol=1e-5, atol=2e-6 * stored.abs().max().item())
    assert len(heard) == len(CASE["runs"][run]["taps"])


@pytest.mark.parametrize(("port", "build"), [("ote", foreign.Completion), ("mma", foreign.EncoderDecoder)])
def test_copies_of_the_ports(port, build):
    """Networks of the ports' structure, written from their descriptions, have our keys and our numbers."""
    network, other = small(port), build(8).eval()
    assert list(other.state_dict()) == list(network.state_dict())
    other.load_state_dict(network.state_dict())
    x = network.network_input(*photo(2))
    with torch.no_grad():
        assert torch.equal(network(x), other(x))


def test_ports_differ():
    with torch.no_grad():
        ote, mma = small("ote"), small("mma")
        image, mask = photo()
        assert not torch.allclose(ote.inpaint(image, mask), mma.inpaint(image, mask), atol=1e-3)
        assert ote(ote.network_input(image, mask)).min() >= 0
        mma.get_submodule("decoder.dec7.conv").bias.fill_(-3.0)
        assert mma(mma.network_input(image, mask)).min() == -1


# ---- use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", PLACES)
def test_inpaint(port):
    """Known pixels as given, nothing read under the hole, any dtype of mask, the mean pixel in its place."""
    network = small(port, mpv=(0.1, 0.2, 0.9))
    image, mask = photo(2)
    with torch.no_grad():
        filled = network.inpaint(image, mask)
        assert torch.equal(filled, network.inpaint(torch.where(mask != 0, torch.nan, image), mask.bool()))
        assert torch.equal(filled, network.inpaint(image, mask * 0.3))
        grey = small(port).inpaint(image, mask)
    hole = (mask != 0).expand_as(image)
    assert torch.equal(filled[~hole], image[~hole])
    assert not torch.equal(filled[hole], image[hole])
    assert not torch.equal(filled[hole], grey[hole])
    assert 0 <= filled.min() <= filled.max() <= 1
    low, high = (-1, 1) if port == "mma" else (0, 1)
    x = network.network_input(image, mask)
    torch.testing.assert_close(x[0, :3, 9, 6], torch.tensor([0.1, 0.2, 0.9]) * (high - low) + low)
    assert torch.equal(x[:, 3:], mask)


def test_any_size_through_the_pipeline():
    network = small()
    image, mask = (recipe.image("any", 21, 30, 3) * 255).byte().numpy(), np.zeros((21, 30), bool)
    mask[5:12, 7:20] = True
    filled = pipeline.fill(network, image, mask)
    assert filled.shape == image.shape
    assert (filled[~mask] == image[~mask]).all()
    assert (filled[mask] != image[mask]).any()


@pytest.mark.parametrize("size", [(20, 18), (6, 8), (2, 4), (0, 4)], ids=str)
def test_sizes_are_refused(size):
    network = small()
    with pytest.raises(ValueError, match=rf"image is {size[0]}×{size[1]}; accepted: height and width divisible by 4"):
        network.inpaint(torch.rand(1, 3, *size), torch.ones(1, 1, *size))
    with torch.no_grad():
        assert network.inpaint(torch.rand(1, 3, 4, 4), torch.ones(1, 1, 4, 4)).isfinite().all()


def test_wrong_options_and_shapes_are_named():
    for options, message in (
        ({"port": "iiz"}, "port is 'iiz'; accepted: ote, mma"),
        ({"width": 5}, "width is 5; accepted: even"),
        ({"mpv": (0.5, 0.5)}, "accepted: three numbers"),
        ({"mpv": (0.5, 0.5, 128)}, "accepted: three numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create("glcic", **options)
    with pytest.raises(ValueError, match=r"x is \(1, 3, 8, 8\); accepted: \(B, 4, H, W\)"):
        small()(torch.rand(1, 3, 8, 8))


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", PLACES)
@pytest.mark.parametrize("form", ["bare", "nested", "safetensors", "half"])
def test_weights_in_any_form(tmp_path, port, form):
    network, path = small(port), tmp_path / "weights"
    state = network.state_dict()
    if form == "safetensors":
        save_file(state, path)
    elif form == "nested":
        rest = {"disc.conv.weight": torch.rand(4, 3, 5, 5), "step_counter": torch.zeros(1)}
        named = {f"generator.{key}": tensor for key, tensor in state.items()}
        torch.save({"meta": {"epoch": 3}, "state_dict": {**named, **rest}}, path)
    else:
        torch.save({k: t.half() if form == "half" and t.is_floating_point() else t for k, t in state.items()}, path)
    loaded = irt.load("glcic", path, mpv=MPV)
    assert loaded.config == {"port": port, "width": 8, "mpv": MPV}
    assert not loaded.training
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key].half().to(tensor) if form == "half" else state[key]), key
    again = models.create("glcic", **loaded.config)
    again.load_state_dict(loaded.state_dict())


def test_what_is_no_glcic_is_refused():
    state = dict(small("mma").state_dict())
    for family in ("deepfill_v1", "deepfill_v2"):
        options = {"width": 8, "decoder_width": 8} if family == "deepfill_v1" else {"width": 8}
        other = models.create(family, port="mma", **options)
        with pytest.raises(WeightsError, match=f"a {family} generator .load it under that name., not a glcic"):
            loading.build("glcic", other.state_dict())
    with pytest.raises(WeightsError, match=r"a glcic generator .load it under that name., not a deepfill_v1"):
        loading.build("deepfill_v1", small("ote").state_dict())
    missing = {key: tensor for key, tensor in state.items() if not key.startswith("decoder.dec4.bn")}
    with pytest.raises(
        WeightsError, match=r"not a whole glcic generator, the key 'decoder\.dec4\.bn\.weight' and 3 more"
    ):
        loading.build("glcic", missing)
    with pytest.raises(WeightsError, match=r"the key .encoder\.enc1\.conv\.weight. is missing"):
        loading.build("glcic", {key: t for key, t in state.items() if key != "encoder.enc1.conv.weight"})
    with pytest.raises(WeightsError, match=r"ours does not have, first 'encoder\.enc9\.conv\.weight' \(2, 2\)"):
        loading.build("glcic", {**state, "encoder.enc9.conv.weight": torch.zeros(2, 2)})
    with pytest.raises(WeightsError, match="accepted: even"):
        loading.build("glcic", {**state, "encoder.enc1.conv.weight": torch.zeros(5, 4, 5, 5)})

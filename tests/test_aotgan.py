"""AOT-GAN against the public implementation's numbers, and the loading of its weights."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import inpaintrt
from inpaintrt import models, pipeline
from inpaintrt.models import aotgan, loading
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import assert_close_to_truth, recipe

from . import foreign_aotgan as foreign

GOLDEN = pathlib.Path(__file__).parent / "golden"
PORTS = tuple(aotgan.PATHS)


def _case(name):
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


def _runs(*names):
    return [pytest.param(name, run, id=f"{name}-{run}") for name in names for run in _case(name)[0]["runs"]]


def _picture(spec):
    return recipe.image(spec["name"], *spec["shape"]) * spec.get("scale", 1.0) + spec.get("shift", 0.0)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "run"), _runs("aot_block", "aotgan_small", "aotgan_full"))
def test_golden(name, run):
    case, tensors = _case(name)
    spec = case["runs"][run]
    made = case["modules"][spec["module"]]
    if name == "aot_block":
        network = aotgan.AOTBlock(made["args"]["dim"], made["args"]["rates"], "aot")
        args = (_picture(spec["inputs"]["x"]),)
    else:
        network = models.create("aotgan", **made["args"]["args"])
        image, mask = _picture(spec["inputs"]["image"]), tensors[f"{run}.mask"]
        args = (image * (1 - mask) + mask, mask)
    recipe.fill(network)
    listed = [(key, shape) for key, shape, *_ in made["state_dict"]]
    assert [(k, list(v.shape)) for k, v in network.state_dict().items()] == listed, "the public state-dict layout"
    assert sum(p.numel() for p in network.parameters()) == made["parameters"]
    taps = {}
    for key in spec["taps"]:
        path = case["tensors"][key]["what"].split("'")[1]
        network.get_submodule(path).register_forward_hook(lambda m, i, out, key=key: taps.update({key: out}))
    with torch.no_grad():
        out = network(*args)
        single = dict(taps)
        truth = copy.deepcopy(network).double()(*(a.double() for a in args))
    torch.testing.assert_close(truth, tensors[f"{run}.out64"], rtol=0, atol=1e-13)
    assert_close_to_truth(out, tensors[f"{run}.out64"], tensors[f"{run}.out"])
    for key, full in single.items():
        stored = full[tuple(map(slice, tensors[key].shape))]
        torch.testing.assert_close(stored, tensors[key], rtol=1e-4, atol=1e-5)
    assert set(single) == set(spec["taps"])
    if f"{run}.comp" in tensors:
        filled = network.inpaint((image + 1) / 2, mask) * 2 - 1
        torch.testing.assert_close(filled, tensors[f"{run}.comp"], rtol=0, atol=1e-5)


def _small(port="aot", **options):
    return recipe.fill(models.create("aotgan", **{"port": port, "width": 8, "block_num": 2, **options}))


def _photo(network, batch=1, rows=None, columns=None):
    rows, columns = rows or network.min_size, columns or network.min_size + 4
    image, mask = recipe.image("photo", batch, 3, rows, columns), torch.zeros(batch, 1, rows, columns)
    for n in range(batch):
        mask[n, :, rows // 3 : rows // 2, 5 + 8 * n : 15 + 8 * n] = 1
    return image, mask


_TO_MMA = (
    (r"^encoder\.(\d)\.", lambda m: f"encoder.encoder.{(int(m[1]) + 1) // 2}.conv."),
    (r"^middle\.(\d+)\.block0(\d)\.1\.", r"dilation_neck.model.\1.blocks.\2.1.conv."),
    (r"^middle\.(\d+)\.(fuse|gate)\.1\.", r"dilation_neck.model.\1.\2.1.conv."),
    (r"^decoder\.(\d)\.(conv\.)?", lambda m: f"decoder.decoder.{int(m[1]) // 2}.conv."),
)


def _in_mma(state):
    """A state dict under mmagic's names."""
    for pattern, name in _TO_MMA:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    return state


def test_both_ports_compute_the_same():
    """mmagic's code has the original's maths under other names; strangers' code of both kinds says so, too."""
    one, two = _small("aot"), _small("mma")
    two.load_state_dict(_in_mma(one.state_dict()))
    image, mask = _photo(one, batch=2)
    x = one.network_input(image, mask)
    theirs = foreign.Plain(8), foreign.Staged(8)
    theirs[0].load_state_dict(one.state_dict())
    theirs[1].load_state_dict(two.state_dict())
    with torch.no_grad():
        expected = one(x)
        for other in (two(x), theirs[0].eval()(x[:, :3], x[:, 3:]), theirs[1].eval()(x)):
            torch.testing.assert_close(other, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("port", PORTS)
def test_forms_of_the_input_agree(port):
    network = _small(port)
    image, mask = _photo(network, batch=2)
    white = torch.where(mask != 0, 1.0, image * 2 - 1)
    x = torch.cat([white, mask], 1)
    with torch.no_grad():
        out = network(x)
        assert torch.equal(network(white, mask), out)
        assert torch.equal(network(white, mask.bool()), out)
        assert torch.equal(network.network_input(image, mask), x)
        filled = network.inpaint(torch.where(mask != 0, torch.nan, image), mask * 0.3)
    assert out.abs().max() <= 1
    assert torch.equal(filled, torch.where(mask != 0, (out + 1) / 2, image))
    assert torch.equal(filled[:, :, -1], image[:, :, -1])


def test_samples_of_a_batch_do_not_meet():
    network = _small()
    image, mask = _photo(network, batch=2)
    with torch.no_grad():
        both = network.inpaint(image, mask)
        alone = torch.cat([network.inpaint(image[n : n + 1], mask[n : n + 1]) for n in range(2)])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-6)


def test_gates_see_the_whole_image():
    """A change in one corner reaches the other by way of the gates' statistics: tiles would not give the same."""
    network = _small(block_num=1, rates=(1, 1, 1, 1))
    image, mask = _photo(network, rows=96, columns=96)
    other = image.clone()
    other[:, :, -8:, -8:] = 1 - other[:, :, -8:, -8:]
    with torch.no_grad():
        assert not torch.equal(
            network(network.network_input(image, mask))[..., :40, :40],
            network(network.network_input(other, mask))[..., :40, :40],
        )


def test_a_constant_gate_passes_the_input():
    block = aotgan.AOTBlock(4, (1, 2), "aot")
    recipe.fill(block)
    with torch.no_grad():
        for p in block.gate.parameters():
            p.zero_()
        x = recipe.image("x", 1, 4, 6, 7)
        shut = torch.sigmoid(torch.tensor(-5.0))
        fused = block.fuse(torch.cat([branch(x) for branch in block.branches()], 1))
        torch.testing.assert_close(block(x), x * (1 - shut) + fused * shut)


@pytest.mark.parametrize(
    ("options", "least"),
    [({}, 36), ({"rates": (2, 4, 8, 16)}, 68), ({"rates": (1, 3)}, 16), ({"block_num": 3}, 36), ({"width": 12}, 36)],
    ids=str,
)
@pytest.mark.parametrize("port", PORTS)
def test_options(port, options, least):
    network = _small(port, **options)
    assert (network.size_multiple, network.min_size) == (4, least)
    image, mask = _photo(network)
    with torch.no_grad():
        out = network.inpaint(image, mask)
        assert out.isfinite().all()
        assert not torch.equal(out, image)
        again = models.create("aotgan", **network.config)
        again.load_state_dict(network.state_dict())
        assert torch.equal(again.inpaint(image, mask), out)
        with pytest.raises(ValueError, match=rf"image is {least - 4}×{least}; .* divisible by 4, at least {least}"):
            network.inpaint(image[:, :, : least - 4, :least], mask[:, :, : least - 4, :least])


def test_shapes_are_refused():
    network = _small()
    image, mask = torch.rand(2, 3, 40, 44), torch.ones(2, 1, 40, 44)
    with pytest.raises(ValueError, match=r"mask missing; accepted: \(B, 3, H, W\) with a mask, or \(B, 4, H, W\)"):
        network(image)
    with pytest.raises(ValueError, match=r"x is \(2, 4, 40, 44\) and mask given"):
        network(torch.rand(2, 4, 40, 44), mask)
    with pytest.raises(ValueError, match=r"image is 40×42; .* Pad image and mask"):
        network(image[..., :42], mask[..., :42])
    for wrong in (mask[:1], mask.expand(-1, 3, -1, -1), mask[:, :, :36], mask[0]):
        with pytest.raises(ValueError, match=r"mask is .*; accepted: \(2, 1, 40, 44\)"):
            network(image, wrong)


def test_wrong_options_are_named():
    for options, message in (
        ({"port": "nip"}, "port is 'nip'; accepted: aot, mma"),
        ({"rates": (1,)}, r"rates are \(1,\); accepted: 2 or more"),
        ({"rates": (1, 0)}, "each 1 or more"),
        ({"rates": (1, 2, 3)}, "width is 64 with 3 rates"),
        ({"width": 0}, "width is 0"),
        ({"block_num": 0}, "block_num is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create("aotgan", **options)
    with pytest.raises(TypeError, match="colour"):
        models.create("aotgan", colour=1)


def test_gradients_reach_every_weight():
    network = _small().train()
    image, mask = _photo(network)
    network(network.network_input(image, mask)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_copies_are_independent():
    network = _small()
    image, mask = _photo(network)
    with torch.no_grad():
        out = network.inpaint(image, mask)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(other.inpaint(image, mask), out)
            other.encoder[1].weight.zero_()
            assert torch.equal(network.inpaint(image, mask), out)


# ---- loading --------------------------------------------------------------------------------------------------------


def _same(loaded, network):
    ours, theirs = loaded.state_dict(), network.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not loaded.training
    assert loaded.config == network.config
    return True


def _prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("prefix", ["", "netG.", "generator."])
def test_files_are_recognised(tmp_path, port, prefix):
    """Port, width and number of blocks from names and shapes, whatever is around them."""
    network = _small(port, block_num=3)
    state = _prefixed(network.state_dict(), prefix)
    others = {"disc.conv.0.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "G0000000.pt")
    torch.save({"state_dict": {**state, **others}, "meta": {"epoch": 1}}, tmp_path / "mm.pth")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("G0000000.pt", "mm.pth", "weights.safetensors"):
        assert _same(inpaintrt.load("aotgan", tmp_path / name), network), name


def test_the_released_size_is_the_default():
    for port in PORTS:
        with torch.device("meta"):
            network = models.create("aotgan", port=port)
        assert sum(p.numel() for p in network.parameters()) == 15_200_835


def test_rates_are_the_callers_where_a_state_dict_holds_the_weights(tmp_path):
    network = _small(rates=(2, 4, 8, 16))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    assert inpaintrt.load("aotgan", tmp_path / "w.safetensors").config["rates"] == (1, 2, 4, 8)
    assert _same(inpaintrt.load("aotgan", tmp_path / "w.safetensors", rates=(2, 4, 8, 16)), network)
    three = _small(width=6, rates=(1, 2, 3))
    assert _same(loading.build("aotgan", three.state_dict(), rates=(1, 2, 3)), three)
    with pytest.raises(WeightsError, match=r"the key 'middle\.0\.block03\.1\.weight' and 3 more is missing"):
        loading.build("aotgan", three.state_dict())


@pytest.mark.parametrize("kind", [foreign.Plain, foreign.Staged])
def test_rates_are_read_from_modules(tmp_path, monkeypatch, kind):
    """A pickled module has its convolutions' dilations in their attributes, a TorchScript archive in its code."""
    rates = (1, 3, 5, 7)
    theirs = recipe.fill(kind(8, rates)).eval()
    module = types.ModuleType("foreign_aot")
    for part in {type(m) for m in theirs.modules() if type(m).__module__ == foreign.__name__}:
        monkeypatch.setattr(part, "__module__", module.__name__)
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(theirs, tmp_path / "module.pt")
    monkeypatch.setitem(sys.modules, module.__name__, None)
    x = torch.rand(1, 4, 36, 40)
    example = (x[:, :3], x[:, 3:]) if kind is foreign.Plain else x
    torch.jit.trace(theirs, example).save(str(tmp_path / "traced.pt"))
    for name in ("module.pt", "traced.pt"):
        network = inpaintrt.load("aotgan", tmp_path / name)
        assert network.config["rates"] == rates, name
        with torch.no_grad():
            expected = theirs(*(example if isinstance(example, tuple) else (example,)))
            torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-6)


def _refusal(family, path, **options):
    with pytest.raises(WeightsError) as raised:
        inpaintrt.load(family, path, **options)
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_other_networks_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(_small().state_dict(), path)
    assert "a aotgan generator (load it under that name), not a lama generator" in _refusal("lama", path)
    save_file(models.create("lama", n_blocks=1, base_width=4).state_dict(), path)
    assert "a lama generator (load it under that name), not a aotgan generator" in _refusal("aotgan", path)
    save_file({"layer.weight": torch.zeros(2)}, path)
    assert "'middle.0.block00.1.weight' or 'dilation_neck.model.0.blocks.0.1.conv.weight'" in _refusal("aotgan", path)


def test_the_manga_variant_is_refused_by_name(tmp_path):
    """Its head and tail are gated convolutions with standardised weights; its blocks alone are these."""
    state = {f"head.0.{conv}.{name}": torch.zeros(1) for conv in ("conv", "conv_gate") for name in ("weight", "gain")}
    state["body_conv.0.block00.1.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    message = _refusal("aotgan", tmp_path / "w.safetensors")
    assert "manga-image-translator's AOT network of gated, standardised convolutions, not a aotgan generator" in message


def test_weights_that_do_not_fit(tmp_path):
    state = _small().state_dict()

    def message(drop=(), **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        save_file({**{k: v for k, v in state.items() if k not in drop}, **changes}, tmp_path / "w.safetensors")
        return _refusal("aotgan", tmp_path / "w.safetensors")

    assert "the key 'middle.1.gate.1.bias' is missing" in message(drop=["middle.1.gate.1.bias"])
    assert "the key 'encoder.1.weight' is missing" in message(drop=["encoder.1.weight"])
    assert "decoder.4.weight is (4, 8, 3, 3), expected (3, 8, 3, 3)" in message(
        decoder__4__weight=torch.zeros(4, 8, 3, 3)
    )
    assert "1 tensors that ours does not have, first 'middle.1.extra' (2,)" in message(middle__1__extra=torch.zeros(2))
    assert "NaN or infinity, first encoder.1.bias" in message(encoder__1__bias=torch.full((8,), torch.nan))


def test_several_generators():
    state = _small().state_dict()
    both = {**_prefixed(state, "a."), **_prefixed(state, "b.")}
    with pytest.raises(WeightsError, match="2 aotgan generators, 'a', 'b'; choose one with prefix"):
        loading.build("aotgan", both)
    both["b.encoder.1.bias"] = torch.full((8,), 3.0)
    assert loading.build("aotgan", both, prefix="b").encoder[1].bias[0] == 3


# ---- photos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(45, 91), (7, 9)], ids=str)
def test_photos_of_any_size_are_filled(size):
    image = (recipe.image("any", 1, 3, *size)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    mask = np.zeros(size, bool)
    mask[3:6, 2:7] = True
    filled = pipeline.fill(_small(), image, mask)
    assert np.array_equal(filled[~mask], image[~mask])
    assert (filled[mask] != image[mask]).mean() > 0.9

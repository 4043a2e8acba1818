"""MAT against the public implementation's numbers, its randomness, half precision, and the loading of its weights."""

from __future__ import annotations

import copy
import json
import math
import pathlib
import pickle
import re
import sys
import types
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import inpaintrt
from inpaintrt import models, pipeline
from inpaintrt.models import loading, mat, mat_layers
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import assert_close_to_truth, close_to_truth, recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"


def _case(name):
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


def _filled(module, weights):
    """Recipe weights with the changes of a golden case."""
    state = recipe.fill(module.eval()).state_dict()
    assert not weights["set_after_fill"]
    with torch.no_grad():
        for key in weights["buffers_filled"]:
            state[key].copy_(recipe.tensor_for(key, tuple(state[key].shape)))
        for key, factor in weights["scale_after_fill"].items():
            state[key].mul_(factor)
    return module


def _stored(case, key, whole):
    """The part of a whole result that the case stores as `key`."""
    steps = re.findall(r":(?:(\d+))?", case["tensors"][key].get("slice", ":").replace("::", ":").replace(" ", ""))
    return whole[tuple(slice(None, None, int(step or 1)) for step in steps)]


def _agrees(case, tensors, key, actual):
    truth = tensors[key.replace("out", "out64", 1)]
    ours, theirs = _stored(case, key, actual), tensors[key]
    if truth.shape != ours.shape:  # the float64 result is on a coarser grid
        ours, theirs = (_stored(case, key.replace("out", "out64", 1), actual), _on(case, key, theirs))
    assert_close_to_truth(ours, truth, theirs, context=key)


def _on(case, key, theirs):
    """The stored float32 result on the grid of the stored float64 one, a multiple of its own."""
    fine = re.findall(r"::(\d+)", case["tensors"][key].get("slice", "")) or ["1", "1"]
    coarse = re.findall(r"::(\d+)", case["tensors"][key.replace("out", "out64", 1)]["slice"])
    step = int(coarse[-1]) // int(fine[-1])
    return theirs[:, :, ::step, ::step]


def _mask(kind, height, width, name=""):
    """The token masks of the golden cases, (1, H, W), 1 = valid."""
    mask = torch.ones(1, height, width)
    if kind == "hole_corner":
        mask[:, height // 3 :, width // 4 :] = 0
    elif kind == "fractional":
        mask = (recipe.image(name, 1, height, width) * 5).floor() / 4
        mask[:, : height // 2, : width // 2] = 0
    else:
        raise ValueError(kind)
    return mask


def _tokens(x):
    return x.flatten(2).transpose(1, 2)


# ---- layers against the public implementation -----------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in _case("mat_partial_conv")[0]["tensors"] if key.startswith("out_")])
def test_partial_convolutions(key):
    case, tensors = _case("mat_partial_conv")
    name, kind = re.fullmatch(r"out_(\w+)_(\w+)", key).groups()
    args = case["args"][name]
    if tokens := name in ("merge", "up"):
        module = mat_layers.Resample(
            args["in_channels"], args["out_channels"], up=args.get("up", 1), down=args.get("down", 1)
        )
    else:
        module = mat_layers.PartialConv(
            args["in"], args["out"], args["kernel_size"], args["activation"], down=args.get("down", 1)
        )
    _filled(module, case["weights"][name])
    x = recipe.image("mat_pc/x", 2, 8, 20, 28) * 2 - 1
    holes = torch.stack([_mask(m, 20, 28, f"mat_pc/mask_{i}") for i, m in enumerate(("hole_corner", "fractional"))])
    mask = {"hole": holes, "ones": torch.ones_like(holes), "none": None}[kind]
    with torch.no_grad():
        if tokens:
            y, size, valid = module(_tokens(x), (20, 28), None if mask is None else _tokens(mask))
            assert list(size) == args["x_size_out"]
        else:
            y, valid = module(x, mask)
    _agrees(case, tensors, key, y)
    if mask is None:
        assert valid is None
    else:
        assert torch.equal(valid, tensors[f"mask_{key}"])


@pytest.mark.parametrize("which", ["plain", "valid", "shift", "both"])
@pytest.mark.parametrize("name", ["ws8", "ws16"])
def test_window_attention(name, which):
    case, tensors = _case("mat_window_attention")
    args = case["args"][name]
    window = args["window_size"][0]
    module = _filled(mat_layers.WindowAttention(args["dim"], args["num_heads"]), case["weights"])
    x = (recipe.image(f"mat_wa/x_{name}", 6, window * window, 60) * 2 - 1) * 2
    windows = mat_layers.Windows(args["H"], args["W"], window, args["shift"])
    strangers = windows.strangers(x.device)
    mask = tensors[f"mask_in_{name}"][..., None]
    if name == "ws8":
        assert torch.equal(strangers[-2:].to(torch.int8), tensors["shift_mask_ws8"])
    with torch.no_grad():
        out = module(x, mask if which in ("valid", "both") else None, strangers if which in ("shift", "both") else None)
    _agrees(case, tensors, f"out_{name}_{which}", out)
    valid = mat_layers.window_validity(mask)
    assert torch.equal(valid[:, 0, 0], tensors[f"mask_out_{name}"])
    assert torch.equal(valid, valid[:, :1].expand_as(valid))


@pytest.mark.parametrize("name", _case("mat_swin_block")[0]["args"])
def test_swin_block(name):
    case, tensors = _case("mat_swin_block")
    args, given = case["args"][name], case["inputs"][name]
    block = mat_layers.SwinBlock(180, args["num_heads"], args["effective_window_size"], args["effective_shift_size"])
    _filled(block, case["weights"])
    assert list(block.state_dict()) == [key for key in case["state_dict"] if key != "attn_mask"]
    height, width = given["x_size"]
    mask = tensors.get(f"mask_in_{name}")
    x = recipe.image(f"mat_blk/x_{name}", 1 if mask is None else len(mask), height * width, 180) * 2 - 1
    if "multiplied by (mask > 0)" in given["x"]:
        x = x * (mask > 0)[..., None]
    with torch.no_grad():
        y, valid = block(x, (height, width), None if mask is None else mask[..., None])
    _agrees(case, tensors, f"out_{name}", y)
    if mask is None:
        assert valid is None
    else:
        assert torch.equal(valid[..., 0], tensors[f"mask_out_{name}"])


def test_what_a_layer_shifts():
    """A window that covers the map that the network was designed for is not shifted, on larger maps neither."""
    pattern = {
        (8, 64): [(8, 0), (8, 4)],
        (16, 32): [(16, 0), (16, 8)],
        (16, 16): [(16, 0), (16, 0)],
        (16, 8): [(8, 0)] * 2,
    }
    for (window, side), expected in pattern.items():
        layer = mat_layers.BasicLayer(6, 1, 2, window, side)
        assert [(block.window, block.shift) for block in layer.blocks] == expected


@pytest.mark.parametrize("masked", [True, False])
def test_basic_layer(masked):
    case, tensors = _case("mat_basic_layer")
    layer = mat_layers.BasicLayer(60, 2, 3, 8, 16, mat_layers.Resample(60, 60, down=2))
    _filled(layer, case["weights"])
    assert list(layer.state_dict()) == [key for key in case["state_dict"] if not key.endswith("attn_mask")]
    mask = tensors["mask_in"][..., None]
    x = (recipe.image("mat_bl/x", 2, 1536, 60) * 2 - 1) * (mask > 0)
    chain = []
    for part in (layer.downsample, *layer.blocks):
        part.register_forward_hook(lambda module, args, out: chain.append(out[-1]))
    with torch.no_grad():
        y, size, valid = layer(x, (32, 48), mask if masked else None)
    assert size == (16, 24)
    _agrees(case, tensors, "out_masked" if masked else "out_unmasked", y)
    if masked:
        assert torch.equal(valid[..., 0], tensors["mask_out"])
        for i, step in enumerate(chain):
            assert torch.equal(step[..., 0], tensors[f"mask_chain_{i}"]), i
    else:
        assert valid is None


def _modulated(name, args):
    style, inputs, outputs = args.get("style_dim"), args["in_channels"], args["out_channels"]
    if name.startswith("mod"):
        demodulate, up = args.get("demodulate", True), args.get("up", 1)
        return mat_layers.ModulatedConv2d(inputs, outputs, args["kernel_size"], style, demodulate=demodulate, up=up)
    if name.startswith("style"):
        side = args["resolution"] if args["use_noise"] else None
        return mat_layers.StyleConv(inputs, outputs, style, resolution=side, up=args.get("up", 1))
    if name.startswith("rgb"):
        return mat_layers.ToRGB(inputs, style)
    up, down = args.get("up", 1), args.get("down", 1)
    return mat_layers.Conv2dLayer(inputs, outputs, args["kernel_size"], args["activation"], up=up, down=down)


MODULATED = [
    name for name in _case("mat_modulated_conv")[0]["args"] if name != "conv_gain_clamp"
]  # no layer of MAT clamps


@pytest.mark.parametrize("name", MODULATED)
def test_modulated_convolutions(name):
    case, tensors = _case("mat_modulated_conv")
    module = _filled(_modulated(name, case["args"][name]), case["weights"][name])
    keys = [key.removeprefix(f"{name}:") for key in case["state_dict"] if key.startswith(f"{name}:")]
    assert list(module.state_dict()) == keys
    sizes = {"x": (2, 10, 12, 18), "x_square": (2, 10, 16, 16), "x_half": (2, 10, 8, 8)}
    x = {key: recipe.image(f"mat_mod/{key}", *shape) * 2 - 1 for key, shape in sizes.items()}
    style = recipe.image("mat_mod/style", 2, 20) * 4 - 2
    skip = recipe.image("mat_mod/skip", 2, 3, 6, 9) * 2 - 1
    skip_eq = recipe.image("mat_mod/skip_eq", 2, 3, 12, 18) * 2 - 1
    with torch.no_grad():
        if name.startswith("style") and name != "style_nonoise":
            out = module(x["x_square" if name == "style_const" else "x_half"], style, module.noise_const[None, None])
        elif name.startswith("rgb"):
            out = module(x["x"], style, {"rgb": None, "rgb_skip": skip, "rgb_skip_eq": skip_eq}[name])
        else:
            out = module(x["x"], *([] if name.startswith("conv") else [style]))
    _agrees(case, tensors, f"out_{name}", out)


# ---- the network against the public implementation ------------------------------------------------------------------


def _taps(module, paths):
    """Outputs of submodules by path, filled in when the module is called."""
    seen = {}
    for key, path in paths.items():
        module.get_submodule(path).register_forward_hook(lambda m, args, out, key=key: seen.update({key: out}))
    return seen


def _bits(packed, *shape):
    return torch.from_numpy(np.unpackbits(packed.numpy())[: math.prod(shape)].reshape(shape)).float()


def test_first_stage():
    case, tensors = _case("mat_first_stage_d60")
    stage = _filled(mat.FirstStage(128, 60, 32), case["weights"])
    assert list(stage.state_dict()) == [key for key in case["state_dict"] if not key.endswith("attn_mask")]
    paths = {f"tran{i}": f"tran.{i}" for i in range(5)}
    seen = _taps(stage, paths | {"gs": "to_style", "wstyle": "ws_style", "square": "to_square"})
    image, mask = recipe.image("mat_fs/image_0", 1, 3, 128, 128) * 2 - 1, tensors["mask_in"][None].float()
    with torch.no_grad():
        out = stage(image, mask, recipe.image("mat_fs/ws", 1, 4, 32) * 4 - 2, _bits(tensors["drop1"], 1, 256, 60))
    _agrees(case, tensors, "out", out)
    for key, value in seen.items():
        whole = value[0] if isinstance(value, tuple) else value
        torch.testing.assert_close(_stored(case, f"mid_{key}", whole), tensors[f"mid_{key}"], rtol=1e-4, atol=1e-4)
    for i in range(2):
        assert torch.equal(seen[f"tran{i}"][2][..., 0], tensors[f"mid_mask{i}"].float())


def _generator(side):
    """Network, image, mask, latent and draws of a golden case of the whole generator."""
    case, tensors = _case(f"mat_generator_{side}")
    network = _filled(models.create("mat", resolution=side), case["weights"])
    listed = {key: entry["shape"] for key, entry in case["state_dict"].items() if not key.endswith("attn_mask")}
    assert [(k, list(v.shape)) for k, v in network.state_dict().items()] == list(listed.items()), "the public layout"
    name = f"mat_g{side}"
    image, z = recipe.image(f"{name}/image", 1, 3, side, side) * 2 - 1, recipe.image(f"{name}/z", 1, 512) * 2 - 1
    mask = tensors["mask_in"]
    mask = _bits(mask, 1, 1, side, side) if mask.dim() == 1 else mask[None, None].float()
    draws = network.draw(1, (side, side))._replace(
        tokens=(recipe.image(f"{name}/drop1", 1, 256, 180) < 0.5).float(),
        features=(recipe.image(f"{name}/drop2", 1, 512, 16, 16) < 0.5).float(),
    )
    return case, tensors, network, image, mask, z, draws


def test_generator():
    """At 128 px, with everything the original was seen to compute on the way."""
    case, tensors, network, image, mask, z, draws = _generator(128)
    paths = {f"tran{i}": f"synthesis.first_stage.tran.{i}" for i in range(5)}
    paths |= {"gs1": "synthesis.first_stage.to_style", "gs2": "synthesis.to_style", "square2": "synthesis.to_square"}
    paths |= {f"rgb{side}": f"synthesis.dec.Dec_{side}x{side}" for side in (16, 32)}
    seen = _taps(network, paths)
    with torch.no_grad():
        out, coarse = network(image, mask, z, None, draws=draws, return_stg1=True)
        styles = network.mapping(z)
        truncated = network.mapping(z, 0.5, 3)
    _agrees(case, tensors, "out", out)
    _agrees(case, tensors, "out_stg1", coarse)
    assert torch.equal(out[mask.expand_as(out) == 1], image[mask.expand_as(out) == 1]), "known pixels, bit for bit"
    for key, value in seen.items():
        whole = value[1 if key.startswith("rgb") else 0] if isinstance(value, tuple) else value
        torch.testing.assert_close(_stored(case, f"mid_{key}", whole), tensors[f"mid_{key}"], rtol=1e-4, atol=1e-4)
    for i in range(2):
        assert torch.equal(seen[f"tran{i}"][2][..., 0], tensors[f"mid_mask{i}"].float())
    exact = copy.deepcopy(network.mapping).double()(z.double())
    assert_close_to_truth(styles[:, [0, 4, -1]], exact[:, [0, 4, -1]], tensors["mid_ws"])
    assert_close_to_truth(truncated[:, [0, 2, 3, -1]], tensors["out64_ws_truncated"], tensors["out_ws_truncated"])
    assert torch.equal(truncated[:, 3:], styles[:, 3:])


@pytest.mark.parametrize("side", [256, 512])
def test_generator_at_released_sizes(side, full):
    if not full:
        pytest.skip("not run: some 150 and 300 GMAC; --full runs them")
    case, tensors, network, image, mask, z, draws = _generator(side)
    with torch.no_grad():
        results = network(image, mask, z, draws=draws, return_stg1=True)
    for key, result in zip(("out", "out_stg1"), results, strict=True):
        stored = key.replace("out", "out64")
        truth, theirs = tensors[stored], case["upstream_fp32_vs_fp64"][key]
        error = (_stored(case, stored, result).double() - truth).abs()
        band = 2 * torch.finfo(torch.float32).eps * float(truth.abs().max())
        assert error.max() <= 2 * theirs["max_abs"] + band
        assert error.square().mean().sqrt() <= 2 * theirs["rms"] + band


@pytest.mark.parametrize(("side", "parameters"), [(512, 61_563_263), (256, 59_780_000)])
def test_layout_at_released_sizes(side, parameters):
    """Keys and shapes of the official checkpoints, whose numbers of parameters are 61.56 and 59.78 million."""
    case, _ = _case(f"mat_generator_{side}")
    with torch.device("meta"):
        network = models.create("mat", resolution=side)
        bare = models.create("mat", resolution=side, noise=False)
    listed = {key: entry["shape"] for key, entry in case["state_dict"].items()}
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    dropped = [f"synthesis.first_stage.tran.{i}.blocks.1.attn_mask" for i in (0, 1, 3, 4)]
    assert [*listed] == sorted([*ours, *dropped], key=[*listed].index)
    assert {key: listed[key] for key in ours} == ours
    assert round(sum(p.numel() for p in network.parameters()) / 1e4) == round(parameters / 1e4)
    assert {*ours} - {*bare.state_dict()} == {key for key in ours if key.endswith(("noise_const", "noise_strength"))}


# ---- what a call draws ----------------------------------------------------------------------------------------------


def _small(resolution=128, **options):
    made = {"resolution": resolution, "dim": 12, "z_dim": 8, "w_dim": 10, "channel_max": 16, **options}
    network = recipe.fill(models.create("mat", **made))
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if key.endswith("noise_const"):
                value.copy_(recipe.tensor_for(key, tuple(value.shape)) * 10)
            elif key.endswith("noise_strength"):
                value.fill_(0.3)
            elif key.endswith("w_avg"):
                value.copy_(recipe.tensor_for(key, tuple(value.shape)))
            elif key.startswith("mapping.") and key.endswith("weight"):
                value.mul_(100)
            elif key.endswith((".weight", ".affine.weight")):
                value.mul_(math.sqrt(value[0].numel()) if value.dim() < 5 else math.sqrt(value[0, 0].numel()))
    return network


def _photo(network, batch=1, height=None, width=None):
    height, width = height or network.resolution, width or network.resolution
    image, mask = recipe.image("photo", batch, 3, height, width), torch.zeros(batch, 1, height, width)
    for n in range(batch):
        mask[n, :, height // 4 : height // 2, 20 + 8 * n : 60 + 8 * n] = 1
    return image, mask


def _inputs(network, batch=1, **size):
    return *network.network_input(*_photo(network, batch, **size)), recipe.image("z", batch, network.z_dim) * 2 - 1


def _double(draws):
    return mat.Draws(draws.tokens.double(), draws.features.double(), tuple(n.double() for n in draws.noise))


def test_draws_are_those_of_the_original():
    """Two dropouts of one half, then noise layer by layer, from torch's generator."""
    network = _small()
    sides = [16, *(side for side in (32, 64, 128) for _ in range(2))]
    torch.manual_seed(5)
    draws = network.draw(2, (128, 128), "random")
    torch.manual_seed(5)
    assert torch.equal(draws.tokens, F.dropout(torch.full((2, 256, 12), 0.5), 0.5, training=True))
    assert torch.equal(draws.features, F.dropout(torch.full((2, 16, 16, 16), 0.5), 0.5, training=True))
    for side, noise in zip(sides, draws.noise, strict=True):
        assert torch.equal(noise, torch.randn(2, 1, side, side))
    assert set(draws.tokens.unique().tolist()) == set(draws.features.unique().tolist()) == {0.0, 1.0}
    assert network.draw(2, (128, 128), "none").noise == ()
    stored = [m.noise_const for m in network.modules() if hasattr(m, "noise_const")]
    for own, noise in zip(stored, network.draw(2, (128, 128), "const").noise, strict=True):
        assert torch.equal(own, noise[0, 0])


def test_a_call_draws_unless_it_is_given_draws():
    network = _small()
    args = _inputs(network)
    with torch.no_grad():
        torch.manual_seed(1)
        one = network(*args)
        again = network(*args)
        torch.manual_seed(1)
        draws = network.draw(1, (128, 128))
        assert torch.equal(network(*args, draws=draws), one)
        assert torch.equal(network(*args, draws=draws), one)
    assert not torch.equal(one, again), "eval mode does not make MAT deterministic"


def test_each_draw_has_an_effect():
    network = _small()
    args = _inputs(network)
    draws = network.draw(1, (128, 128), generator=torch.Generator().manual_seed(0))
    changed = {
        "tokens": draws._replace(tokens=1 - draws.tokens),
        "features": draws._replace(features=1 - draws.features),
        "no noise": draws._replace(noise=()),
        "last noise": draws._replace(noise=(*draws.noise[:-1], -draws.noise[-1])),
        "first noise": draws._replace(noise=(-draws.noise[0], *draws.noise[1:])),
    }
    with torch.no_grad():
        before, coarse = network(*args, draws=draws, return_stg1=True)
        for what, other in changed.items():
            after, coarse_after = network(*args, draws=other, return_stg1=True)
            assert not torch.equal(after, before), what
            assert torch.equal(coarse_after, coarse) == (what != "tokens"), what


def test_noise_modes():
    network, bare = _small(), _small(noise=False)
    args = _inputs(network)
    draws = network.draw(1, (128, 128), "none")
    bare.load_state_dict({k: v for k, v in network.state_dict().items() if k in bare.state_dict()})
    with torch.no_grad():
        quiet = network(*args, draws=draws)
        assert torch.equal(bare(*args, draws=draws), quiet), "noise off is the network without noise"
        constant = network(*args, draws=draws._replace(noise=network.draw(1, (128, 128), "const").noise))
        torch.manual_seed(0)
        by_name = network(*args, noise_mode="const")
        torch.manual_seed(0)
        assert torch.equal(network(*args), by_name), "stored noise is the default at a network's own size"
    assert not torch.equal(constant, quiet)
    assert bare.draw(1, (128, 128)).noise == ()
    wide = (128, 256)
    assert [tuple(n.shape) for n in network.draw(1, wide).noise[:2]] == [(1, 1, 16, 32), (1, 1, 32, 64)]
    for other, size, mode, message in (
        (
            network,
            wide,
            "const",
            "the stored noise is for 128×128 images, this one is 128×256; accepted: 'random', 'none'",
        ),
        (bare, wide, "random", r"this network has no noise \(noise=False\); accepted: 'none'"),
        (bare, (128, 128), "const", "has no noise"),
        (network, wide, "fixed", "noise_mode is 'fixed'; accepted: const, random, none"),
    ):
        with pytest.raises(ValueError, match=message):
            other.draw(1, size, mode)


def test_seeds_name_fills():
    network = _small()
    image, mask = _photo(network)
    with torch.no_grad():
        torch.manual_seed(1)
        one, other = network.inpaint(image, mask), network.inpaint(image, mask, seed=1)
        torch.manual_seed(2)
        assert torch.equal(network.inpaint(image, mask, seed=0), one), "torch's own generator has no part in it"
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(2)), "and is left alone"
        assert not torch.equal(other, one)
        mean = network.inpaint(image, mask, truncation_psi=0.0)
        assert not torch.equal(mean, one)


# ---- images and masks -----------------------------------------------------------------------------------------------


def test_inpaint_takes_any_mask_and_ignores_the_hole():
    network = _small()
    image, mask = _photo(network, batch=2)
    hole = (mask != 0).expand_as(image)
    with torch.no_grad():
        filled = network.inpaint(image, mask)
        for other in (mask.bool(), mask * 0.3, mask.to(torch.uint8) * 255):
            assert torch.equal(network.inpaint(torch.where(hole, torch.nan, image), other), filled)
    assert torch.equal(filled[~hole], image[~hole])
    assert filled.min() >= 0
    assert filled.max() <= 1
    assert not torch.equal(filled[hole], image[hole])


def test_forward_takes_masks_of_any_dtype():
    network = _small()
    images, masks, z = _inputs(network)
    masks = masks.round()
    draws = network.draw(1, (128, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images, masks, z, draws=draws)
        for mask in (masks.bool(), masks.to(torch.uint8), masks.double()):
            out = network(images, mask, z, draws=draws)
            assert out.dtype == images.dtype
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", ["all valid", "all hole", "one pixel valid", "one pixel hole", "fractional"])
def test_masks_of_every_kind(kind):
    network = _small()
    image, _ = _photo(network)
    mask = {
        "all valid": torch.ones(1, 1, 128, 128),
        "all hole": torch.zeros(1, 1, 128, 128),
        "one pixel valid": torch.zeros(1, 1, 128, 128).index_put_(
            (*map(torch.tensor, (0, 0, 37, 101)),), torch.ones(())
        ),
        "one pixel hole": torch.ones(1, 1, 128, 128).index_put_(
            (*map(torch.tensor, (0, 0, 37, 101)),), torch.zeros(())
        ),
        "fractional": recipe.image("fractions", 1, 1, 128, 128),
    }[kind]
    z = recipe.image("z", 1, 8) * 2 - 1
    draws = network.draw(1, (128, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = network(image, mask, z, draws=draws)
        truth = copy.deepcopy(network).double()(image.double(), mask.double(), z.double(), draws=_double(draws))
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))
    known = (mask == 1).expand_as(image)
    assert torch.equal(out[known], image[known])


def test_samples_of_a_batch_do_not_meet():
    network = _small()
    images, masks, z = _inputs(network, batch=2)
    draws = network.draw(2, (128, 128), "random")
    with torch.no_grad():
        both = network(images, masks, z, draws=draws)
        for n in range(2):
            own = mat.Draws(
                draws.tokens[n : n + 1], draws.features[n : n + 1], tuple(m[n : n + 1] for m in draws.noise)
            )
            alone = network(images[n : n + 1], masks[n : n + 1], z[n : n + 1], draws=own)
            torch.testing.assert_close(both[n : n + 1], alone, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            network(images, masks, z[:1], draws=draws), network(images, masks, z[:1].expand(2, -1), draws=draws)
        )


def test_oblong_images():
    network = _small()
    image, mask = _photo(network, height=128, width=256)
    with torch.no_grad():
        filled = network.inpaint(image, mask)
    assert filled.shape == image.shape
    assert filled.isfinite().all()
    padded = pipeline.fill(network, image[0, :, :100, :140].permute(1, 2, 0).numpy(), mask[0, 0, :100, :140].numpy())
    assert padded.shape == (100, 140, 3)


def test_a_region_without_valid_keys_attends_to_all_that_is_masked_once():
    """−100, not −∞: own hole tokens and valid tokens of other regions tie, invalid ones of other regions lose."""
    module = mat_layers.WindowAttention(4, 1)
    recipe.fill(module)
    with torch.no_grad():
        for part in (module.q, module.k):
            part.weight.zero_(), part.bias.zero_()
        for part in (module.v, module.proj):
            part.weight.copy_(torch.eye(4) * 2)
            part.bias.zero_()
        x = recipe.image("x", 1, 4, 4)
        strangers = torch.tensor([[[0, 0, -100, -100]] * 2 + [[-100, -100, 0, 0]] * 2]).float()
        mask = torch.tensor([0, 0, 1, 0]).float().view(1, 4, 1)
        out = module(x, mask, strangers)
    torch.testing.assert_close(out[0, 0], x[0, [0, 1, 2]].mean(0))
    torch.testing.assert_close(out[0, 2], x[0, 2])


def test_truncation():
    mapping = recipe.fill(mat_layers.Mapping(8, 6, 4))
    with torch.no_grad():
        mapping.w_avg.copy_(recipe.image("w", 6))
        z = recipe.image("z", 2, 8)
        plain, half, none = mapping(z), mapping(z, 0.5), mapping(z, 0.0)
        torch.testing.assert_close(half, (plain + mapping.w_avg) / 2)
        torch.testing.assert_close(none, mapping.w_avg.expand(2, 4, 6))
        torch.testing.assert_close(mapping(z * 3), plain)
        assert torch.equal(mapping(z, 0.5, 2)[:, 2:], plain[:, 2:])
        assert mapping(z.double()).dtype == torch.float32


# ---- half precision -------------------------------------------------------------------------------------------------


def _stores_bfloat16(network):
    """A float32 network that rounds the features and tokens between its layers to bfloat16, and nothing else."""
    kinds = (
        mat_layers.PartialConv, mat_layers.Conv2dLayer, mat_layers.ModulatedConv2d, mat_layers.StyleConv,
        mat_layers.FullyConnected, mat_layers.WindowAttention, mat_layers.BasicLayer,
    )  # fmt: skip

    def rounded(module, args, out):
        return (out[0].bfloat16().float(), *out[1:]) if isinstance(out, tuple) else out.bfloat16().float()

    for path, module in network.named_modules():
        if isinstance(module, kinds) and not re.search(
            r"mapping|affine|to_style\.fc|first_stage\.to_|square|ws_", path
        ):
            module.register_forward_hook(rounded)
    return network


@pytest.mark.parametrize("kind", ["hole", "all hole", "all valid"])
def test_bfloat16(kind):
    """Finite, and as near to the truth as a float32 network that stores its features in bfloat16."""
    network = _small()
    rounded = copy.deepcopy(network).bfloat16()
    images, masks, z = _inputs(network)
    masks = {"hole": masks, "all hole": masks * 0, "all valid": torch.ones_like(masks)}[kind]
    draws = rounded.draw(1, (128, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(rounded).double()
        truth = exact(images.double(), masks.double(), z.double(), draws=_double(draws))
        ours = rounded(images, masks, z, draws=draws)
        baseline = _stores_bfloat16(copy.deepcopy(rounded).float())(images, masks, z, draws=draws)
        assert rounded(images.bfloat16(), masks.bfloat16(), z.bfloat16()).dtype == torch.bfloat16
    assert ours.dtype == torch.float32
    verdict = close_to_truth(ours, truth, baseline)  # which of two deep networks has the worst pixel is chance
    assert ours.isfinite().all()
    assert verdict.rms_error <= verdict.rms_allowed, verdict.message
    known = (masks == 1).expand_as(ours)
    assert torch.equal(ours[known], images[known])
    if kind != "all valid":
        spread = truth[~known].std()
        assert (ours.double() - truth).square().mean().sqrt() < 0.05 * spread


def test_layers_in_float16_keep_float32_where_it_counts():
    """What turns the public code's results into NaN: ratios in holes, norms of zero tokens, demodulation of small weights.

    Attention is compared where every key is masked: −100 and the logits together would have four bits left for these.
    """
    x, nothing = recipe.image("x", 1, 6, 8, 8) * 2 - 1, torch.zeros(1, 1, 8, 8)
    tokens, style = _tokens(x), recipe.image("style", 1, 5) * 2 - 1
    attention = recipe.fill(mat_layers.WindowAttention(6, 2))
    modulated = recipe.fill(mat_layers.StyleConv(6, 4, 5))
    partial = recipe.fill(mat_layers.PartialConv(6, 4))
    with torch.no_grad():
        for layer in (attention.q, attention.k):
            layer.weight.mul_(30)
        modulated.conv.weight.mul_(1e-3)
        for module, args in (
            (attention, (tokens, _tokens(nothing))),
            (attention, (tokens * 0, None)),
            (modulated, (x, style)),
            (modulated, (x, style * 1000)),
            (partial, (x, nothing)),
            (partial, (x, (recipe.image("mask", 1, 1, 8, 8) < 0.2).float())),
        ):
            single = copy.deepcopy(module).half().float()(*args)
            half = copy.deepcopy(module).half()(args[0].half(), *args[1:])
            for ours, exact in zip(
                *((out if isinstance(out, tuple) else (out,)) for out in (half, single)), strict=True
            ):
                bound = 3e-3 * max(1.0, float(exact.abs().max()))
                torch.testing.assert_close(ours.float(), exact, rtol=0, atol=bound)


def test_float16_is_refused_on_the_cpu():
    network = _small().half()
    image, mask = _photo(network)
    with pytest.raises(ValueError, match=r"float16 on the CPU.*accepted: float32, bfloat16, float64"):
        network.inpaint(image, mask)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    network = _small()
    images, masks, z = _inputs(network, batch=2)
    for args, message in (
        ((images[..., :96], masks[..., :96], z), r"image is 128×96; accepted: .* divisible by 128\. Pad image"),
        ((images[:, :2], masks, z), r"image is \(2, 2, 128, 128\); accepted: \(B, 3, H, W\)"),
        ((images, masks[:1], z), r"mask is \(1, 1, 128, 128\); accepted: \(2, 1, 128, 128\)"),
        ((images, masks.expand(-1, 3, -1, -1), z), r"mask is \(2, 3, 128, 128\)"),
        ((images, masks, z[:, :5]), r"z is \(2, 5\); accepted: \(2, 8\) or \(1, 8\)"),
        ((images[:1], masks[:1], z), r"z is \(2, 8\); accepted: \(1, 8\)"),
        ((images, masks, z, torch.ones(2, 3)), r"c is \(2, 3\); accepted: None or no labels"),
        ((images[:0], masks[:0], z[:1]), r"image is \(0, 3, 128, 128\); accepted: .* B at least 1"),
        ((images.to(torch.uint8), masks, z), r"image is torch\.uint8; accepted: floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            network(*args)
    assert network(images, masks, z, torch.zeros(2, 0)).shape == images.shape


def test_wrong_draws_are_named():
    network = _small()
    args, draws = _inputs(network), network.draw(1, (128, 128), "random")
    noise = draws.noise
    for change, message in (
        ({"tokens": draws.tokens[..., :1]}, r"draws\.tokens is \(1, 256, 1\); accepted: \(1, 256, 12\)"),
        ({"features": draws.features[:, :, :8]}, r"draws\.features is .*; accepted: \(1, 16, 16, 16\)"),
        *(({"noise": noise[:n]}, f"there are {n} planes of noise; accepted: 7 planes") for n in (1, 2, 4, 6)),
        ({"noise": (*noise, noise[-1])}, "there are 8 planes of noise; accepted: 7 planes"),
        ({"noise": (torch.ones(1, 1, 1, 1),) * 7}, r"a plane of noise is \(1, 1, 1, 1\); accepted: \(1, 1, 16, 16\)"),
        ({"noise": tuple(n.expand(3, -1, -1, -1) for n in noise)}, r"a plane of noise is \(3, 1, 16, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            network(*args, draws=draws._replace(**change))
    with pytest.raises(ValueError, match=r"draws\.noise has 7 planes; accepted: none \(the network has noise=False\)"):
        _small(noise=False)(*args, draws=draws)


def test_wrong_options_are_named():
    for options, message in (
        ({"resolution": 1024}, "resolution is 1024; accepted: 128, 256, 512"),
        ({"dim": 100}, "dim is 100; accepted: multiples of 6"),
        ({"z_dim": 0}, "z_dim is 0, w_dim 512"),
        ({"channel_max": 4}, "channel_max is 4; accepted: at least 8 at 512 px"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create("mat", **options)


def test_gradients_reach_every_weight():
    network = _small().train()
    network(*_inputs(network)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_features_are_added_in_place_where_no_gradient_needs_them():
    x, skip = torch.ones(2, 3), torch.full((2, 3), 2.0)
    for given in ((x.clone().requires_grad_() * 1, skip), (x, skip.clone().requires_grad_())):
        total = mat.added(*given)
        assert total.requires_grad
        assert torch.equal(total, torch.full((2, 3), 3.0))
    assert torch.equal(x, torch.ones(2, 3))
    assert mat.added(x, skip) is x
    assert torch.equal(x, torch.full((2, 3), 3.0))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="not run: before Python 3.11 a call holds its arguments")
def test_features_go_with_their_level():
    """What the encoder made for a level of the first decoder does not outlive it; at 512 px that is 56 MiB."""
    first, alive, seen = _small(256).synthesis.first_stage, [], []

    def encoded():
        dim = first.to_style.weight.shape[1]
        skips = tuple(torch.zeros(1, dim, side, side) for side in (128, 256))
        alive.extend(map(weakref.ref, skips))
        return mat.Encoded(torch.zeros(1, dim, 64, 64), torch.zeros(1, 3 * dim), skips)

    for block in first.dec_conv:
        block.register_forward_pre_hook(lambda *_: seen.append([skip() is not None for skip in alive]))
    with torch.no_grad():
        first.decode(encoded())
    assert seen == [[True, True], [False, True]]


def test_copies_are_independent():
    network = _small()
    image, mask = _photo(network)
    with torch.no_grad():
        out = network.inpaint(image, mask)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(other.inpaint(image, mask), out)
            other.mapping.fc0.weight.zero_()
            assert torch.equal(network.inpaint(image, mask), out)


# ---- loading --------------------------------------------------------------------------------------------------------


def _official(network):
    """The network's state dict as the public code writes it: with the masks of shifted windows."""
    state = dict(network.state_dict())
    for i, shape in ((0, (64, 64, 64)), (1, (4, 256, 256)), (3, (4, 256, 256)), (4, (64, 64, 64))):
        state[f"synthesis.first_stage.tran.{i}.blocks.1.attn_mask"] = torch.zeros(shape)
    return state


def _same(loaded, network):
    ours, theirs = loaded.state_dict(), network.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not loaded.training
    assert loaded.config == network.config
    return True


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.", "G_ema."])
def test_files_are_recognised(tmp_path, noise, prefix):
    """Sizes and noise from names and shapes, whatever is around them; masks of windows are left out."""
    network = _small(256, noise=noise)
    state = {prefix + key: value for key, value in _official(network).items()}
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": {**state, "D.b512.fromrgb.weight": torch.zeros(2)}}, tmp_path / "nested.pt")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("plain.pth", "nested.pt", "weights.safetensors"):
        loaded = inpaintrt.load("mat", tmp_path / name)
        assert _same(loaded, network), name
        assert loaded.config["noise"] == noise


def _persistent(module):
    """A module as StyleGAN2's code pickles it: a call of a function of its own with all that makes it again."""
    parts = {name: _Persistent(child) for name, child in module.named_children()}
    own = {
        "_parameters": dict(module._parameters),
        "_buffers": dict(module._buffers),
        "_modules": parts,
        "training": False,
    }
    return {
        "type": "class",
        "version": 6,
        "module_src": "raise SystemExit",
        "class_name": type(module).__name__,
        "state": own,
    }


class _Persistent:
    def __init__(self, module):
        self.module = module

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (_persistent(self.module),)


def test_official_pickles(tmp_path, monkeypatch):
    """The networks of a training run in a plain pickle, of classes that are not installed: read as data, G_ema wins."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise SystemExit", module.__dict__)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    network, other = _small(), _small()
    with torch.no_grad():
        other.mapping.fc0.weight.zero_()
    block = network.synthesis.first_stage.tran[0].blocks[1]
    block.register_buffer("attn_mask", torch.zeros(64, 64, 64))
    content = {"training_set_kwargs": {"path": None}, "G": _Persistent(other), "G_ema": _Persistent(network), "D": None}
    path = tmp_path / "CelebA-HQ_256.pkl"
    path.write_bytes(pickle.dumps(content))
    del block.attn_mask
    monkeypatch.setitem(sys.modules, module.__name__, None)
    assert _same(inpaintrt.load("mat", path), network)
    assert _same(inpaintrt.load("mat", path, prefix="G"), other)
    whole = path.read_bytes()
    for size in (len(whole) // 3, len(whole) - 10):
        path.write_bytes(whole[:size])
        assert "damaged" in _refusal("mat", path)


def test_load_state_dict_takes_the_public_keys():
    network = _small()
    other = models.create("mat", **network.config)
    other.load_state_dict(_official(network))
    assert _same(other, network)


def test_half_precision_files(tmp_path):
    network = _small(noise=False).half()
    save_file(network.state_dict(), tmp_path / "half.safetensors")
    assert _same(inpaintrt.load("mat", tmp_path / "half.safetensors"), network.float())


def _refusal(family, path):
    with pytest.raises(WeightsError) as raised:
        inpaintrt.load(family, path)
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_other_networks_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(_small().state_dict(), path)
    assert "a mat generator (load it under that name), not a lama generator" in _refusal("lama", path)
    save_file(models.create("lama", n_blocks=1, base_width=4).state_dict(), path)
    assert "a lama generator (load it under that name), not a mat generator" in _refusal("mat", path)


def test_weights_that_do_not_fit(tmp_path):
    state = _small().state_dict()
    strength = "synthesis.dec.Dec_16x16.conv1.noise_strength"

    def message(drop=(), **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        save_file({**{k: v for k, v in state.items() if k not in drop}, **changes}, tmp_path / "w.safetensors")
        return _refusal("mat", tmp_path / "w.safetensors")

    assert f"the key {strength!r} is missing" in message(drop=[strength])
    assert "the key 'mapping.fc0.weight' is missing" in message(drop=["mapping.fc0.weight"])
    assert "1 tensors that ours does not have, first 'mapping.embed.weight'" in message(
        mapping__embed__weight=torch.ones(2)
    )
    assert "mapping.fc1.weight is (2, 2), expected (10, 10)" in message(mapping__fc1__weight=torch.ones(2, 2))
    assert "NaN or infinity, first mapping.w_avg" in message(mapping__w_avg=torch.full((10,), torch.nan))
    first = "synthesis.first_stage.conv_first.conv.weight"
    assert "dim is 13; accepted: multiples of 6" in message(**{first.replace(".", "__"): torch.ones(13, 4, 3, 3)})


def test_a_state_dict_in_memory():
    network = _small()
    assert _same(loading.build("mat", _official(network)), network)

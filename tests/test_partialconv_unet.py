"""PConv-UNet and partial convolutions against public implementations' numbers, and the loading of their weights."""

from __future__ import annotations

import copy
import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

import inpaintrt
from inpaintrt import models, ops, pipeline
from inpaintrt.models import loading, partialconv_unet
from inpaintrt.models.partialconv_layers import PartialBlock, PartialConv2d, Shell
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.compare import DIRECT

from . import foreign_partialconv as foreign

GOLDEN = pathlib.Path(__file__).parent / "golden"
NETWORK, NAOTO, NVIDIA = "pconv_unet", "partialconv_naoto", "partialconv_nvidia"
FAMILY = "partialconv_unet"


def _case(name):
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


CASES = {name: _case(name) for name in (NETWORK, NAOTO, NVIDIA)}


def _runs(name, *hows):
    """Runs of a case, each with every way to compute it that there is."""
    case = CASES[name][0]
    for run, spec in case["runs"].items():
        args = case["modules"][spec["module"]]["args"]
        lacking = {"op"} if "groups" in args or "mask" not in spec["inputs"] or "out_ch" in args else set()
        lacking |= {"op", "ours"} if "x2" in spec["inputs"] else set()  # only NVIDIA's keeps what an earlier call had
        for how in hows:
            if how not in lacking:
                yield pytest.param(run, how, id=f"{run}-{how}")


def _input(spec):
    if spec["kind"] == "image":
        return recipe.image(spec["name"], *spec["shape"]) * spec.get("scale", 1.0) + spec.get("shift", 0.0)
    if spec["kind"] == "threshold":
        return (recipe.image(spec["name"], *spec["shape"]) < spec["lt"]).float()
    if spec["kind"] == "const":
        return torch.full(spec["shape"], spec["value"])
    mask = torch.full(spec["shape"], float(spec["base"]))
    for batch, channel, top, bottom, left, right, value in spec["rects"]:
        at = [slice(None) if n == "all" else slice(n, n + 1) for n in (batch, channel)]
        mask[at[0], at[1], top:bottom, left:right] = value
    return mask


def _filled(module, spec):
    """Weights as the case has them; ours has no filters for masks."""
    recipe.fill(module)
    state = module.state_dict()
    for step in spec["after_fill"]:
        for key, exponent in step["keys"].items() if step["op"] == "pow2" else ():
            state[key].mul_(2.0**exponent)
        for key in step["keys"] if step["op"] == "ones" else ():
            if key in state:
                state[key].fill_(1)
    return module.eval()


def _cut(t, info):
    """The part of a result that is stored."""
    if "slice" not in info:
        return t
    return eval(info["slice"].split("(")[0].replace("stored =", "").replace("full", "t"), {"t": t})  # our own files


def _assert_golden(name, key, actual, numerics=DIRECT, double=None):
    """`double`, our result in float64, takes the place of the port's where that is not stored."""
    case, tensors = CASES[name]
    actual = _cut(actual, case["tensors"][key])
    truth = tensors.get(f"{key}64", double)
    assert_close_to_truth(actual, truth, tensors[key], numerics=numerics, context=key)


# ---- layers ---------------------------------------------------------------------------------------------------------


def _op(conv, **options):
    return lambda x, mask: ops.partial_conv2d(
        x,
        mask,
        conv.weight,
        conv.bias,
        stride=conv.stride[0],
        padding=conv.padding,
        dilation=conv.dilation[0],
        **options,
    )


@pytest.mark.parametrize(("run", "how"), [*_runs(NVIDIA, "ours", "theirs", "op")])
def test_nvidia_layers_golden(run, how):
    case, tensors = CASES[NVIDIA]
    spec = case["runs"][run]
    module = case["modules"][spec["module"]]
    options = {k: v for k, v in module["args"].items() if k not in ("multi_channel", "return_mask")}
    ours, theirs = _filled(PartialConv2d(**options), module), _filled(foreign.Caching(**module["args"]), module)
    inputs = {key: _input(value) for key, value in spec["inputs"].items()}
    call = {"ours": ours, "theirs": theirs, "op": _op(ours)}[how]

    def results(call, dtype=torch.float32):
        x, mask, x2 = (None if t is None else t.to(dtype) for t in (inputs["x"], inputs.get("mask"), inputs.get("x2")))
        with torch.no_grad():
            got = call(x) if mask is None else call(x, mask)
            found = list(got if isinstance(got, tuple) else (got,))
            return found if x2 is None else [found[0], *call(x2)]

    with launches() as heard:
        found = results(call)
    exact = results(copy.deepcopy(theirs).double(), torch.float64)
    assert len(found) >= len(spec["outputs"])
    for key, actual, double in zip(spec["outputs"], found, exact, strict=False):
        if key.endswith("mask_out"):
            assert torch.equal(actual[: len(tensors[key]), :1], tensors[key][:, :1])
        else:
            _assert_golden(NVIDIA, key, actual, numerics_of(heard), double)


def _naoto(spec):
    args = spec["args"]
    if spec["class"] == "PartialConv":
        layer = Shell(PartialConv2d(**args, scale="one", binary=True, eps=0.0))
        conv = layer.input_conv
        names = {"in_channels": "inputs", "out_channels": "outputs", "kernel_size": "kernel"}
        theirs = foreign.TwoConvolutions(**{names.get(k, k): v for k, v in args.items()})
    else:
        kernel, stride, padding = foreign.GEOMETRY[args.get("sample", "none-3").replace("none-3", "none")]
        conv = PartialConv2d(
            args["in_ch"], args["out_ch"], kernel, stride, padding, bias=False, scale="one", binary=True, eps=0.0
        )
        norm = torch.nn.BatchNorm2d(args["out_ch"]) if args.get("bn", True) else None
        act = torch.nn.LeakyReLU(0.2) if args.get("activ") == "leaky" else torch.nn.ReLU()
        layer = PartialBlock(Shell(conv), norm, act)
        names = {"in_ch": "inputs", "out_ch": "outputs"}
        theirs = foreign.Activated(**{names.get(k, k): v for k, v in args.items()})
    listed = [[key, shape] for key, shape, *_ in spec["state_dict"]]
    assert [[k, list(v.shape)] for k, v in theirs.state_dict().items()] == listed
    assert [[k, list(v.shape)] for k, v in layer.state_dict().items()] == [
        row for row in listed if "mask_conv" not in row[0]
    ]
    return {"ours": _filled(layer, spec), "theirs": _filled(theirs, spec), "op": _op(conv, scale="one", eps=0.0)}


@pytest.mark.parametrize(("run", "how"), [*_runs(NAOTO, "ours", "theirs", "op")])
def test_naoto_layers_golden(run, how):
    case, tensors = CASES[NAOTO]
    spec = case["runs"][run]
    found = _naoto(case["modules"][spec["module"]])
    x, mask = (_input(spec["inputs"][key]) for key in ("x", "mask"))
    with torch.no_grad(), launches() as heard:
        out, left = found[how](x, mask)
    assert torch.equal(left[:, :1], tensors[f"{run}.mask_out"][:, :1])
    _assert_golden(NAOTO, f"{run}.out", out, numerics_of(heard))


def test_a_layer_without_a_bias_multiplies_by_a_fraction_once():
    """Where a window holds less than one valid pixel: u once, with a bias twice."""
    x, mask = recipe.image("x", 1, 2, 5, 5), torch.full((1, 1, 5, 5), 0.02)
    layer = recipe.fill(PartialConv2d(2, 3, 3))
    with torch.no_grad():
        out, updated = layer(x, mask)
        layer.bias = None
        plain, _ = layer(x, mask)
        bias = recipe.fill(PartialConv2d(2, 3, 3)).bias.view(-1, 1, 1)
    torch.testing.assert_close(updated, torch.full_like(updated, 0.18))
    torch.testing.assert_close(out, (plain + bias) * updated)
    torch.testing.assert_close(plain, torch.nn.functional.conv2d(x, layer.weight) * 0.18)


# ---- network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", CASES[NETWORK][0]["runs"])
def test_network_golden(run):
    case, tensors = CASES[NETWORK]
    spec = case["runs"][run]
    module = case["modules"][spec["module"]]
    network = models.create(FAMILY, port="nao", levels=module["args"]["layer_size"])
    listed = [[key, shape] for key, shape, *_ in module["state_dict"] if "mask_conv" not in key]
    assert [[k, list(v.shape)] for k, v in network.state_dict().items()] == listed, "the public state-dict layout"
    _filled(network, module)
    image, mask = (_input(spec["inputs"][key]) for key in ("image", "mask"))
    seen = {}
    taps = [key.rpartition(".tap.")[2] for key in spec["taps"]]
    handles = [
        network.block(tap[:3], int(tap[3:])).register_forward_hook(
            lambda m, i, out, tap=tap: seen.update({tap: out[0]})
        )
        for tap in taps
    ]
    with torch.no_grad():
        out, left = network(image * mask, mask)
    for handle in handles:
        handle.remove()
    _assert_golden(NETWORK, f"{run}.out", out)
    assert torch.equal(_cut(left.expand(-1, 3, -1, -1), case["tensors"][f"{run}.mask_out"]), tensors[f"{run}.mask_out"])
    for tap in taps:
        actual = _cut(seen[tap], case["tensors"][f"{run}.tap.{tap}"])
        torch.testing.assert_close(actual, tensors[f"{run}.tap.{tap}"], rtol=1e-4, atol=1e-5)


def small(port="nao", **options):
    """A network whose image depends on all of its layers: without a window as factor, filters are larger by that."""
    network = recipe.fill(models.create(FAMILY, port=port, **{"levels": 3, "width": 6, **options}))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, PartialConv2d) and module.scale == "one":
                module.weight.mul_(module.weight[0].numel())
    return network


def photo(rows=40, columns=48, batch=2):
    image = recipe.image("photo", batch, 3, rows, columns)
    mask = torch.zeros(batch, 1, rows, columns)
    for n in range(batch):
        mask[n, :, 9 + 4 * n : rows - 8, 6 : columns - 20 + 6 * n] = 1
    return image, mask


@pytest.mark.parametrize("port", partialconv_unet.PORTS)
def test_inpaint(port):
    network = small(port)
    image, mask = photo()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (network.options.mean, network.options.std))
    with torch.no_grad():
        filled = network.inpaint(torch.where(mask != 0, torch.nan, image), mask * 0.3)
        x = torch.where(mask != 0, 0.0, (image - mean) / std)
        expected, left = network(x, 1 - mask)
        assert torch.equal(network(x, (1 - mask).expand(-1, 3, -1, -1))[0], expected)
        one = network.inpaint(image[1:], mask[1:])
    assert torch.equal(filled, torch.where(mask != 0, (expected * std + mean).clamp(0, 1), image))
    torch.testing.assert_close(filled[1:], one)
    assert left.shape == mask.shape
    assert bool((left == 1).all())
    hole = filled[mask.expand_as(filled) != 0]
    assert hole.std() > 0.02
    assert ((hole > 0) & (hole < 1)).float().mean() > 0.5


def test_pixels_under_the_hole_are_ignored():
    network = small()
    image, mask = photo()
    with torch.no_grad():
        valid = (1 - mask).expand(-1, 3, -1, -1)
        assert torch.equal(network(image * valid, valid)[0], network(image * valid + 7 * (1 - valid), valid)[0])


@pytest.mark.parametrize(
    "options",
    [{"binary": False}, {"eps": 0.1}, {"first_bias": True}, {"levels": 2}, {"width": 8}, {"mean": (0.5,) * 3}],
    ids=str,
)  # fmt: skip
def test_options(options):
    """Each one makes a network that computes something else, and is remembered."""
    plain, network = small(), small(**options)
    assert network.config == {**plain.config, **options}
    image, mask = photo()
    mask = mask * 0.995  # what is not valid by halves, updated masks tell apart
    with torch.no_grad():
        x, valid = image - 0.5, (1 - mask) * 0.02
        valid[..., :20] = 0
        both = [n(x, valid)[0] if "mean" not in options else n.inpaint(image, mask) for n in (plain, network)]
    assert not torch.allclose(*both, rtol=1e-4, atol=1e-5)


def test_the_factor_of_the_window_is_one_of_the_filters():
    """As the ports' authors found: with filters larger by their window, 1/s gives what window/s gives."""
    one, window = small(), recipe.fill(models.create(FAMILY, levels=3, width=6, scale="window"))
    image, mask = photo()
    with torch.no_grad():
        torch.testing.assert_close(one.inpaint(image, mask), window.inpaint(image, mask), rtol=1e-4, atol=1e-5)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="port is 'xx'"):
        models.create(FAMILY, port="xx")
    with pytest.raises(TypeError, match="no option 'depth'"):
        models.create(FAMILY, depth=3)
    for options, message in (
        ({"layout": "x"}, "layout is"),
        ({"scale": "x"}, "scale is"),
        ({"levels": 0}, "levels is"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create(FAMILY, **options)
    with pytest.raises(ValueError, match="scale is 'x'"):
        PartialConv2d(1, 1, 1, scale="x")
    network = small()
    for x, mask, message in (
        (torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), "x is"),
        (torch.zeros(1, 4, 8, 8), torch.zeros(1, 1, 8, 8), "x is"),
        (torch.zeros(1, 3, 8, 12), torch.zeros(1, 1, 8, 12), "divisible by 8"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3, 1, 8, 8), "mask is"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8, 8), "mask is"),
    ):
        with pytest.raises(ValueError, match=message):
            network(x, mask)


def test_the_pipeline_pads():
    network = small()
    picture = (recipe.image("odd", 1, 3, 37, 45)[0].permute(1, 2, 0) * 255).byte().numpy()
    mask = torch.zeros(37, 45, dtype=torch.uint8)
    mask[10:30, 12:40] = 1
    filled = pipeline.fill(network, picture, mask.numpy())
    assert filled.shape == picture.shape
    assert (filled[:10] == picture[:10]).all()


# ---- weights --------------------------------------------------------------------------------------------------------


def _public(port, **options):
    """Weights as a port's checkpoint has them, with the ones for its masks, and our network of the same."""
    if port == "nao":
        model = recipe.fill(foreign.Unet(5, 4))
        state = {k: torch.ones_like(v) if "mask_conv" in k else v for k, v in model.state_dict().items()}
        return {"model": state, "n_iter": 7}, state
    model = recipe.fill(foreign.EncoderDecoder(7, 4))
    state = model.state_dict()
    return {"state_dict": {f"generator.{k}": v for k, v in state.items()}, "meta": {}}, state


@pytest.mark.parametrize("port", partialconv_unet.PORTS)
def test_public_checkpoints(port, tmp_path):
    checkpoint, state = _public(port)
    torch.save(checkpoint, tmp_path / "pconv.pth")
    network = inpaintrt.load(FAMILY, tmp_path / "pconv.pth")
    levels = 5 if port == "nao" else 7
    assert network.config == models.create(FAMILY, port=port, levels=levels, width=4).config
    assert not network.training
    assert not any("mask" in key for key in network.state_dict())
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    original = {"nao": foreign.Unet, "mma": foreign.EncoderDecoder}[port](levels, 4)
    original.load_state_dict(state)
    side = network.size_multiple
    x, mask = recipe.image("x", 1, 3, side, side) - 0.5, torch.ones(1, 3, side, side)
    mask[..., 3:20, 5:30] = 0
    with torch.no_grad():
        expected, left = original.eval()(x, mask)
        out, ours = network(x, mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours, left[:, :1])
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    again = inpaintrt.load(FAMILY, tmp_path / "own.safetensors")
    assert again.config == network.config
    assert torch.equal(again.inpaint(x + 0.5, 1 - mask[:, :1]), network.inpaint(x + 0.5, 1 - mask[:, :1]))


@pytest.mark.parametrize("port", partialconv_unet.PORTS)
def test_load_state_dict_takes_public_keys(port):
    _, state = _public(port)
    network = models.create(FAMILY, port=port, levels=5 if port == "nao" else 7, width=4)
    before = set(state)
    twin = copy.deepcopy(network)
    for target in (network, twin):
        assert not any(target.load_state_dict(state))
    assert set(state) == before
    nested = torch.nn.ModuleDict({"generator": network})
    assert not any(nested.load_state_dict({f"generator.{k}": v for k, v in state.items()}))
    name = next(k for k in state if "mask_conv" in k or "mask_updater" in k)
    with pytest.raises(ValueError, match="not all ones"):
        network.load_state_dict({**state, name: state[name] * 0.5})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network.load_state_dict({**state, name.rpartition(".")[0] + ".bias_of_masks": state[name]})


def test_what_is_refused():
    _, state = _public("nao")
    name = "enc_3.conv.mask_conv.weight"
    with pytest.raises(WeightsError, match=r"enc_3.conv.mask_conv.weight is not all ones"):
        loading.build(FAMILY, {**state, name: state[name] * 2})
    with pytest.raises(WeightsError, match="dec_2"):
        loading.build(FAMILY, {k: v for k, v in state.items() if not k.startswith("dec_2.bn")})
    with pytest.raises(WeightsError, match="tensors that ours does not have"):
        loading.build(FAMILY, {**state, "dec_2.conv.mask_conv.bias": torch.zeros(1)})
    with pytest.raises(WeightsError, match="a partialconv_unet generator"):
        loading.build("lama", state)
    with pytest.raises(WeightsError, match="a lama generator"):
        loading.build(FAMILY, inpaintrt.load("lama_mini").state_dict())
    assert loading.build(FAMILY, state, first_bias=False).options.levels == 5

"""StyleGAN 2's layers and MI-GAN's, ours and strangers': swapped against original, all that a call can ask for, refusals."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import inpaintrt as irt
from inpaintrt import models
from inpaintrt.adapters import stylegan2 as adapters
from inpaintrt.adapters import stylegan2_layers as stylegan2_adapters
from inpaintrt.models import mat_layers, migan, stylegan2_layers
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.swap import insistent, record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.compare import WINOGRAD

from . import foreign_stylegan2 as foreign
from . import golden_style as golden
from . import test_comodgan, test_mat, test_migan

W = 10
"""The width of style vectors."""


def _filled(module):
    """Recipe weights, but each filter of a change of size as it was made: it is one for all channels."""
    filters = {name: t.clone() for name, t in module.state_dict().items() if name.endswith("filter.weight")}
    recipe.fill(module).eval()
    module.load_state_dict(filters, strict=False)
    return module


def _x(channels, rows=12, columns=None, batch=2):
    return recipe.image("stylegan2", batch, channels, rows, columns or rows) * 2 - 1


def _style(batch=2):
    return recipe.image("stylegan2/style", batch, W) * 2 - 1


def _wide(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(_wide, value))
    return value.double() if isinstance(value, torch.Tensor) else value


def _run(module, *args, **kwargs):
    torch.manual_seed(3)  # for what draws noise
    with torch.no_grad():
        return module(*args, **kwargs)


def _flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for t in value if t is not None]


def _assert_fused(module, *args, random=False, by=("modulated_conv2d",), **kwargs):
    """The swapped module runs its fused form for this call, by these ops, and gives what the original gives.

    Images of tests are so small that the original would be the faster one.
    """
    with irt.disabled():
        base = _run(module, *args, **kwargs)
        truth = base if random else _run(copy.deepcopy(module).double(), *_wide(args), **_wide_items(kwargs))
    with launches() as heard, insistent():
        got = _run(module, *args, **kwargs)
    assert {(launch.op, launch.backend) for launch in heard} == {(op, "cpu") for op in by}
    for ours, exact, theirs in zip(_flat(got), _flat(truth), _flat(base), strict=True):
        assert ours.stride() == theirs.stride()
        assert ours.dtype == theirs.dtype
        if random:  # in float64 other numbers are drawn
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        else:
            assert_close_to_truth(ours, exact, theirs, numerics=numerics_of(heard))


def _wide_items(kwargs):
    return {name: _wide(value) for name, value in kwargs.items()}


def _why(module, args):
    """Why a call is the original's, other than that it is the faster one on so small an image."""
    with insistent():
        return why_original(module, args, {})


def _assert_original(module, why, *args):
    assert why in _why(module, args)
    with launches() as heard, insistent():
        got = _run(module, *args)
    assert not heard
    with irt.disabled():
        assert all(map(torch.equal, _flat(got), _flat(_run(module, *args))))


def _accelerated(module):
    irt.accelerate(module)
    assert record_of(module) is not None
    return module


# ---- layers with a style --------------------------------------------------------------------------------------------

NVIDIAS = {
    "plain": lambda: foreign.SynthesisLayer(9, 11, W, 12),
    "up": lambda: foreign.SynthesisLayer(9, 11, W, 24, up=2),
    "clamped": lambda: foreign.SynthesisLayer(9, 11, W, 12, conv_clamp=0.25),
    "linear": lambda: foreign.SynthesisLayer(9, 11, W, 12, activation="linear"),
    "fcf": lambda: foreign.BiaslessLayer(9, 11, W, 24, up=2, conv_clamp=256),
    "migan": lambda: foreign.NormalisingLayer(9, 11, W, 24, up=2, conv_clamp=256),
    "noiseless": lambda: foreign.SynthesisLayer(9, 11, W, 12, use_noise=False),
}


def _synthesis(name):
    layer = _filled(NVIDIAS[name]())
    if layer.activation == "linear":
        layer.act_gain = 1.0
    return _accelerated(layer), _x(9)


@pytest.mark.parametrize("mode", ["none", "const", "random"])
@pytest.mark.parametrize("name", NVIDIAS)
def test_nvidias_layers(name, mode):
    layer, x = _synthesis(name)
    _assert_fused(layer, x, _style(), noise_mode=mode, random=mode == "random")


@pytest.mark.parametrize("fused", [False, True])
def test_how_the_original_modulates_does_not_matter(fused):
    layer, x = _synthesis("up")
    _assert_fused(layer, x, _style(), noise_mode="const", fused_modconv=fused)


@pytest.mark.parametrize("gain", [0.5, 2**0.5])
@pytest.mark.parametrize("name", ["plain", "clamped"])
def test_gain_scales_the_clamp_too(name, gain):
    layer, x = _synthesis(name)
    _assert_fused(layer, x, _style(), noise_mode="const", gain=gain)
    assert record_of(layer).adapter.name == "stylegan2.styled"


def test_clamps_are_seen():
    layer, x = _synthesis("clamped")
    assert _run(layer, x, _style(), noise_mode="none").abs().max() == 0.25
    layer.conv_clamp = 0.125
    _assert_fused(layer, x, _style(), noise_mode="none")
    assert _run(layer, x, _style(), noise_mode="none").abs().max() == 0.125


@pytest.mark.parametrize("clamp", [None, 0.25])
def test_a_picture_that_is_added_elsewhere_is_left_to_torch(clamp):
    layer = _filled(foreign.ToRGBLayer(9, 3, W, conv_clamp=clamp))
    irt.accelerate(layer, strict=True)
    assert record_of(layer) is None


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("up", [1, 2])
def test_mats_layers(up, noise):
    layer = _accelerated(_filled(foreign.StyleConv(9, 11, W, 12, up=up, use_noise=noise)))
    x = _x(9, 12 // up)
    for mode in ("const", "random") if noise else ("const", "random", "none"):
        _assert_fused(layer, x, _style(), noise_mode=mode, random=mode == "random")
    _assert_fused(layer, x, _style(), noise_mode="const", gain=0.5)


def test_a_mode_in_which_the_original_fails_fails_as_it_does():
    layer = _accelerated(_filled(foreign.StyleConv(9, 11, W, 12, use_noise=True)))
    with pytest.raises(UnboundLocalError):
        layer(_x(9), _style(), noise_mode="none")


def test_stored_noise_of_another_size_is_the_originals_matter():
    layer = _accelerated(_filled(foreign.StyleConv(9, 11, W, 12, use_noise=True)))
    assert "its noise is" in _why(layer, (_x(9, 8), _style(), "const"))
    with pytest.raises(RuntimeError):
        layer(_x(9, 8), _style(), noise_mode="const")


@pytest.mark.parametrize("clamp", [None, 0.25])
@pytest.mark.parametrize("size", [None, 6, 12])
def test_mats_pictures_are_added_up(size, clamp):
    layer = _filled(foreign.ToRGB(9, 3, W))
    layer.conv_clamp = clamp
    _accelerated(layer)
    by = ("upfirdn2d",) if size == 6 else ()
    _assert_fused(layer, _x(9), _style(), None if size is None else _x(3, size), by=by)
    if size:
        _assert_fused(layer, _x(9), _style(), skip=_x(3, size), by=by)


def test_a_picture_of_another_size_is_the_originals_matter():
    layer = _accelerated(_filled(foreign.ToRGB(9, 3, W)))
    assert "another shape" in _why(layer, (_x(9), _style(), _x(3, 5)))
    with pytest.raises(RuntimeError):
        layer(_x(9), _style(), _x(3, 5))


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (mat_layers.StyleConv(9, 11, W), (_style(),)),
        (stylegan2_layers.StyledConvolution(9, 11, W, size=None), (_style(),)),
        (stylegan2_layers.PortStyledConvolution(9, 11, W), (_style(),)),
        (mat_layers.Conv2dLayer(9, 11, 3), ()),
        (mat_layers.PartialConv(9, 11), ()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_tiny_calls_ask_nothing_of_the_layer(layer, given, monkeypatch):
    """Finding out what it is takes longer than they do."""
    layer = _accelerated(_filled(layer))
    large = _x(9, 40)
    assert stylegan2_adapters._WORK < 2 * 40 * 40 * 9 * 11 * 9
    assert why_original(layer, (large, *given), {}) == ""
    for module in (adapters, adapters.stylegan2_partial):
        monkeypatch.setattr(module, "layer_of", None)
    assert "so small an input, (2, 9, 4, 4)" in why_original(layer, (_x(9, 4), *given), {})
    with pytest.raises(TypeError):
        why_original(layer, (large, *given), {})


@pytest.mark.parametrize("up", [False, True])
def test_ports_layers(up):
    layer = _accelerated(_filled(foreign.StyledConv(9, 11, 3, W, upsample=up)))
    x, side = _x(9, 6, 8), 2 if up else 1
    _assert_fused(layer, x, _style(), recipe.image("noise", 2, 1, 6 * side, 8 * side))
    _assert_fused(layer, x, _style(), noise=recipe.image("noise", 1, 1, 6 * side, 8 * side))
    _assert_fused(layer, x, _style(), random=True)


@pytest.mark.parametrize("skip", [False, True])
def test_ports_pictures(skip):
    layer = _accelerated(_filled(foreign.PortToRGB(9, W)))
    _assert_fused(layer, _x(9), _style(), *([_x(3, 6)] if skip else []), by=("upfirdn2d",) if skip else ())


def test_each_image_has_its_style():
    layer, x = _synthesis("up")
    both = _run(layer, x, _style(), noise_mode="const")
    for n in range(2):
        alone = _run(layer, x[n : n + 1], _style()[n : n + 1], noise_mode="const")
        torch.testing.assert_close(both[n : n + 1], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(both[0], _run(layer, x, _style().flip(0), noise_mode="const")[0])


@pytest.mark.parametrize("shape", [(2, W + 1), (1, W), (2, 1, W)])
def test_styles_of_another_shape_are_the_originals_matter(shape):
    layer, x = _synthesis("plain")
    assert "its style is" in _why(layer, (x, torch.zeros(shape)))


# ---- layers without a style -----------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": lambda: foreign.Conv2dLayer(9, 11),
    "pointwise": lambda: foreign.Conv2dLayer(9, 11, 1, conv_clamp=0.25),
    "down": lambda: foreign.Conv2dLayer(9, 11, down=2, conv_clamp=0.25),
    "up": lambda: foreign.Conv2dLayer(9, 11, up=2),
    "pointwise down": lambda: foreign.Conv2dLayer(9, 11, 1, bias=False, activation="linear", down=2),
    "pointwise up": lambda: foreign.Conv2dLayer(9, 11, 1, activation="relu", up=2),
    "port": lambda: foreign.ConvLayer(9, 11, 3),
    "port down": lambda: foreign.ConvLayer(9, 11, 3, downsample=True),
    "ours down": lambda: stylegan2_layers.Convolution(9, 11, down=True, clamp=0.25),
    "ours as a port, down": lambda: stylegan2_layers.PortConvolution(9, 11, down=True),
    "ours for MAT, down": lambda: mat_layers.Conv2dLayer(9, 11, 3, down=2),
}


@pytest.mark.parametrize("size", [(12, 16), (9, 7), (1, 2)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, size):
    layer = _accelerated(_filled(CONVOLUTIONS[name]()))
    x = _x(9, *size)
    assert record_of(layer).adapter.name == "stylegan2.convolution"
    if min(size) == 1 and "down" in name:
        assert "too small to be halved" in _why(layer, (x,))
    else:
        _assert_fused(layer, x)


def test_gain_of_a_convolution():
    layer = _accelerated(_filled(CONVOLUTIONS["down"]()))
    _assert_fused(layer, _x(9), gain=0.5)
    assert "gain" in _why(layer, (_x(9), 0))


@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("kind", [foreign.Conv2dLayerPartial, mat_layers.PartialConv])
def test_mats_partial_convolutions(kind, kernel, down):
    layer = _accelerated(_filled(kind(9, 11, kernel, down=down)))
    assert record_of(layer).adapter.name == "mat.partial"
    x, mask = _x(9, 12, 16), torch.ones(2, 1, 12, 16)
    for _ in range(2):
        _assert_fused(layer, x, mask)
        mask[0, :, 2:9, 3:14] = 0
        mask[1] = (recipe.image("mask", 1, 12, 16) * 5).floor() / 4
    _assert_fused(layer, x, mask=mask)
    _assert_fused(layer, x)
    with torch.no_grad():
        assert layer(x)[1] is None


@pytest.mark.parametrize("kind", [foreign.Conv2dLayerPartial, mat_layers.PartialConv])
def test_features_of_an_image_are_channels_last(kind):
    """As what MAT's decoder makes of tokens, to which they are added."""
    layer, x = _accelerated(_filled(kind(4, 11, 3))), _x(4, 12, 16)
    assert x.is_contiguous()
    with insistent(), torch.no_grad():
        y, _ = layer(x, torch.ones(2, 1, 12, 16))
        assert y.is_contiguous(memory_format=torch.channels_last)
        again = layer(x.contiguous(memory_format=torch.channels_last), torch.ones(2, 1, 12, 16))[0]
    assert torch.equal(y, again)


def test_a_partial_convolution_that_doubles_takes_no_mask():
    layer = _accelerated(_filled(mat_layers.PartialConv(9, 11, up=2)))
    _assert_fused(layer, _x(9))
    with insistent():
        assert "no form" in _why(layer, (_x(9), torch.ones(2, 1, 12, 12)))


# ---- what holds of all ----------------------------------------------------------------------------------------------


def test_weights_changed_in_place_count_at_once():
    layer, x = _synthesis("up")
    before = _run(layer, x, _style(), noise_mode="const")
    with torch.no_grad():
        layer.weight[3].mul_(-1)
        layer.noise_strength.add_(1)
        layer.resample_filter[0, 0] += 0.1
        layer.affine.bias.add_(0.5)
    assert not torch.equal(_run(layer, x, _style(), noise_mode="const"), before)
    _assert_fused(layer, x, _style(), noise_mode="const")


def test_restored_copied_and_pickled():
    layer, x = _synthesis("plain")
    got = _run(layer, x, _style(), noise_mode="const")
    twin = copy.deepcopy(layer)
    assert torch.equal(_run(twin, x, _style(), noise_mode="const"), got)
    assert type(pickle.loads(pickle.dumps(layer))) is foreign.SynthesisLayer
    assert type(irt.restore(layer)) is foreign.SynthesisLayer
    assert record_of(twin) is not None
    assert not any("inpaintrt" in name for name in vars(layer))


def test_gradients():
    layer, x = _synthesis("up")
    results = []
    for context in (irt.disabled(), torch.enable_grad()):
        with context:
            y = layer(x, _style(), noise_mode="const")
            results.append(torch.autograd.grad(y.square().sum(), [p for n, p in layer.named_parameters()]))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_hooks_and_training_leave_it_to_the_original():
    layer, x = _synthesis("plain")
    handle = layer.affine.register_forward_hook(lambda *_: None)
    _assert_original(layer, "a hook", x, _style(), "const")
    handle.remove()
    layer.train()
    _assert_original(layer, "training", x, _style(), "const")


def test_autocast_is_the_originals():
    layer, x = _synthesis("plain")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _assert_original(layer, "autocast", x, _style(), "const")


@pytest.mark.parametrize(
    ("build", "args"),
    [
        (NVIDIAS["up"], (_x(9), _style(), "const")),
        (lambda: foreign.Conv2dLayerPartial(9, 11), (_x(9), torch.ones(2, 1, 12, 12))),
        (lambda: foreign.SeparableConv2d(9, 11, down=2), (_x(9),)),
        (lambda: foreign.ToRGB(9, 3, W), (_x(9), _style(), _x(3, 6))),
    ],
)
def test_bf16_changes_nothing(build, args):
    layer = _accelerated(_filled(build()))
    with launches() as heard, insistent():
        expected = _run(layer, *args)
        irt.accelerate(layer, precision="bf16")
        got = _run(layer, *args)
    assert len(heard) == 2
    assert all(map(torch.equal, _flat(got), _flat(expected)))


class Squared(foreign.SynthesisLayer):
    """Of the right parts, and of another function."""

    def forward(self, x, w, noise_mode="random", fused_modconv=True, gain=1):
        return super().forward(x, w, noise_mode, fused_modconv, gain) ** 2


class Turned(foreign.SynthesisLayer):
    """Another option that nobody knows."""

    def forward(self, x, w, noise_mode="random", turn=False):
        y = super().forward(x, w, noise_mode)
        return y.flip(3) if turn else y


def test_another_function_is_refused():
    layer = _filled(Squared(9, 11, W, 12))
    irt.accelerate(layer)
    assert record_of(layer) is None
    with pytest.raises(irt.UnsupportedError, match="computes something else"):
        irt.accelerate(layer, strict=True)


def test_an_unknown_option_is_the_originals():
    layer = _accelerated(_filled(Turned(9, 11, W, 12)))
    _assert_fused(layer, _x(9), _style(), noise_mode="const")
    _assert_original(layer, "turn", _x(9), _style(), "const", True)


def test_a_class_is_tried_once_for_all_widths(monkeypatch):
    from inpaintrt.adapters import stylegan2_forms

    tried = []
    judge = stylegan2_forms._judge
    monkeypatch.setattr(stylegan2_forms._verdicts, "_judge", lambda module: tried.append(module) or judge(module))
    monkeypatch.setattr(stylegan2_forms._verdicts, "_known", {})
    for channels, side in ((16, 32), (32, 64), (20, 16)):
        _accelerated(_filled(foreign.SynthesisLayer(channels, channels, W + 5, side)))
    assert len(tried) == 1


class Block(nn.Module):
    """Calls its layers by keywords, as blocks of these networks do."""

    def __init__(self, noise_mode):
        super().__init__()
        self.conv0 = foreign.SynthesisLayer(9, 11, W, 64, up=2)
        self.conv1 = foreign.SynthesisLayer(11, 9, W, 64)
        self.noise_mode = noise_mode

    def forward(self, x, w):
        x = self.conv0(x, w, fused_modconv=True, noise_mode=self.noise_mode)
        return self.conv1(x, w=w, gain=0.5**0.5, noise_mode=self.noise_mode, fused_modconv=True)


@pytest.mark.parametrize("mode", ["const", "random"])
def test_calls_by_keywords_are_explained_and_verified(mode, monkeypatch):
    block = irt.accelerate(_filled(Block(mode)))
    example = _x(9, 32), _style()
    with insistent():
        rows = irt.explain(block, *example).rows
        report = irt.verify(block, *example)
        monkeypatch.setattr(adapters, "styled", lambda *args: 1.5 * stylegan2_adapters.styled(*args))
        wrong = irt.verify(block, *example)
    assert [(row["op"], row["backend"], row["why not"]) for row in rows] == [(["modulated_conv2d"], ["cpu"], None)] * 2
    assert report.ok, str(report)
    assert not wrong.ok


def test_compiled():
    block = irt.accelerate(_filled(Block("const")))
    with torch.no_grad():
        got = torch.compile(block, backend="eager", fullgraph=True)(_x(9, 32), _style())
        assert torch.equal(got, _fused(block))


def _fused(block):
    with insistent():
        return block(_x(9, 32), _style())


# ---- MI-GAN ---------------------------------------------------------------------------------------------------------

SEPARABLES = {
    "plain": lambda: foreign.SeparableConv2d(9, 11),
    "noise": lambda: foreign.SeparableConv2d(9, 11, 12, use_noise=True),
    "down": lambda: foreign.SeparableConv2d(9, 11, down=2),
    "up": lambda: foreign.SeparableConv2d(9, 11, 24, use_noise=True, up=2),
    "ours": lambda: migan.SeparableConvolution(9, 11, size=24, up=True, noise=True),
    "ours, down": lambda: migan.SeparableConvolution(9, 11, down=True),
}


@pytest.mark.parametrize("strong", [1.0, 1e4])
@pytest.mark.parametrize("name", SEPARABLES)
def test_separable_convolutions(name, strong):
    layer = _accelerated(_filled(SEPARABLES[name]()))
    assert record_of(layer).adapter.name == "migan.separable"
    _assert_fused(layer, _x(9) * strong)
    if name == "ours":
        _assert_fused(layer, _x(9), recipe.image("noise", 2, 1, 24, 24))


def test_filters_that_differ_are_the_originals():
    layer = _accelerated(_filled(SEPARABLES["up"]()))
    with torch.no_grad():
        layer.upsample.filter.weight[2, 0, 1, 1] += 0.1
    _assert_original(layer, "from channel to channel", _x(9))
    with torch.no_grad():
        layer.upsample.filter.weight[:] = torch.arange(16.0).view(4, 4) / 100
    _assert_fused(layer, _x(9))
    layer.upsample.filter_const[0, 0, 1, 1] = 1
    _assert_original(layer, "other places", _x(9))


def test_an_activation_changed_later_is_tried_again():
    layer = _accelerated(_filled(SEPARABLES["plain"]()))
    layer.activation.gain = 1.0
    _assert_original(layer, "something else", _x(9))


@pytest.mark.parametrize(
    "build", [foreign.MIGANGenerator, lambda: models.create("migan", size=16, channels=128, most_channels=12)]
)
def test_migans_generator(build):
    network = _filled(build())
    x = _x(4, 16)
    with torch.no_grad():
        expected = network(x)
        truth = copy.deepcopy(network).double()(x.double())
    _accelerated(network)
    assert record_of(network).adapter.name == "migan.generator"
    with launches() as heard, torch.no_grad(), insistent():
        got = network(x)
    layers = [m for m in network.modules() if record_of(m) and record_of(m).adapter.name == "migan.separable"]
    assert len(heard) == len(layers) > 8
    assert got.stride() == expected.stride()
    assert_close_to_truth(got, truth, expected, numerics=numerics_of(heard), context="migan")
    assert "channels-last already" in _why(network, (x.contiguous(memory_format=torch.channels_last),))
    with insistent():
        report = irt.verify(network, x)
    assert report.ok, str(report)
    assert len(report.rows) == len(layers) + 1
    assert "100.0%" not in irt.explain(network).notes[0]  # some are of torch's layers
    irt.restore(network)
    with torch.no_grad():
        assert torch.equal(network(x), expected)


class Viewed(foreign.MIGANGenerator):
    """Code that needs contiguous features."""

    def forward(self, x):
        return super().forward(x.view(len(x), -1).view(x.shape) * 1.0)


def test_a_generator_that_needs_contiguous_images_keeps_them():
    network = _filled(Viewed())
    irt.accelerate(network)
    assert record_of(network) is None
    assert sum(record_of(m) is not None for m in network.modules()) == 12
    with pytest.raises(irt.UnsupportedError, match="channels-last"):
        irt.accelerate(network, strict=True)


# ---- whole networks -------------------------------------------------------------------------------------------------

SMALL = {"size": 16, "channels": 128, "most_channels": 8, "z": 12, "w": 10, "hidden": 14, "vector": 16}


@pytest.mark.parametrize("truncation", [1.0, 0.5])
@pytest.mark.parametrize("noise", [None, "none", "random"])
@pytest.mark.parametrize("port", ["official", "zyu", "migan"])
def test_comodgans(port, noise, truncation):
    network = recipe.fill(models.create("comodgan", port=port, **SMALL)).eval()
    given = {"z": recipe.image("z", 2, 12) * 2 - 1, "noise": noise, "truncation": truncation, "mean": torch.ones(1, 10)}
    expected = _run(network, _x(4, 16), **given)
    irt.accelerate(network)
    with launches() as heard, insistent():
        got = _run(network, _x(4, 16), **given)
    assert len(heard) == 11
    assert got.stride() == expected.stride()
    assert (got - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("run", ["styled", "styled_up", "torgb", "convlayer_down"])
def test_golden_layers_of_the_ports(run):
    spec = golden.case("modulated_conv")["runs"][run]
    inputs = golden.pictures(spec)
    layer: nn.Module = {
        "styled": lambda: foreign.StyledConv(6, 8, 3, 10),
        "styled_up": lambda: foreign.StyledConv(6, 8, 3, 10, upsample=True),
        "torgb": lambda: foreign.PortToRGB(6, 10),
        "convlayer_down": lambda: foreign.ConvLayer(6, 8, 3, downsample=True),
    }[run]()
    args = [inputs["x"], *([] if run == "convlayer_down" else [inputs["style"]])]
    if run.startswith("styled"):
        size = [n * (2 if run == "styled_up" else 1) for n in inputs["x"].shape[2:]]
        args.append(2 * recipe.image(f"modulated_conv/{run}/noise/noise", len(args[0]), 1, *size) - 1)
    if run == "torgb":
        args.append(inputs["skip"])
    golden.fill(layer, golden.case("modulated_conv")["modules"][spec["module"]])
    _accelerated(layer)
    with launches() as heard, insistent():
        out = _run(layer, *args)
    assert heard
    with irt.disabled():
        wide = _run(copy.deepcopy(layer).double(), *_wide(args))
    golden.assert_golden("modulated_conv", f"{run}.out", out, wide)


GOLDEN = {
    "comodgan": lambda: test_comodgan.test_golden("comodgan_small", "a"),
    "comodgan, MI-GAN's port": lambda: test_comodgan.test_golden_of_migan_s_port("const"),
    "migan": lambda: test_migan.test_golden("migan_small"),
    "MAT's doubling layer": lambda: test_mat.test_modulated_convolutions("style_up_const"),
    "MAT's halving layer": lambda: test_mat.test_modulated_convolutions("conv_down"),
    "MAT's partial convolution": lambda: test_mat.test_partial_convolutions("out_k3_down_hole"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_cases_pass_accelerated(name, monkeypatch):
    """The tests of our networks and layers against the public implementations' numbers, with what they make accelerated."""
    create, filled = models.create, test_mat._filled

    def fast(module):
        irt.accelerate(module)
        heard.clear()  # of the trials: the case itself must call the op
        return module

    monkeypatch.setattr(models, "create", lambda *args, **kwargs: fast(create(*args, **kwargs)))
    monkeypatch.setattr(test_mat, "_filled", lambda *args: fast(filled(*args)))
    for module in (golden, test_mat):
        by_winograds_bound = functools.partial(assert_close_to_truth, numerics=WINOGRAD)
        monkeypatch.setattr(module, "assert_close_to_truth", by_winograds_bound)
    with launches() as heard, insistent():
        GOLDEN[name]()
    assert {(launch.op, launch.backend) for launch in heard} >= {("modulated_conv2d", "cpu")}

"""Strangers' gated convolutions are recognised, swapped or refused, and stay what they are."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import inpaintrt as irt
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.swap import record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.compare import WINOGRAD

from . import deepfill_swaps as swaps
from . import foreign_deepfill as foreign

# ---- gated convolutions ---------------------------------------------------------------------------------------------

LAYERS = {
    "halves": lambda: foreign.Halves(6, 4, 3),
    "halves, 5×5": lambda: foreign.Halves(6, 4, 5),
    "halves, ReLU": lambda: foreign.Halves(6, 4, 3, activation="relu"),
    "halves, no activation": lambda: foreign.Halves(6, 4, 3, activation=None),
    "halves, strided": lambda: foreign.Halves(6, 4, 3, 2),
    "halves, dilated": lambda: foreign.Halves(6, 4, 3, rate=2),
    "halves, reflect": lambda: foreign.Halves(6, 4, 3, padding_mode="reflect"),
    "halves, replicate, dilated": lambda: foreign.Halves(6, 4, 3, rate=2, padding_mode="replicate"),
    "halves, circular": lambda: foreign.Halves(6, 4, 3, padding_mode="circular"),
    "picture": lambda: foreign.Halves(6, 3, 3, gated=False),
    "TensorFlow": lambda: foreign.Unpadded(6, 4, 3),
    "TensorFlow, strided": lambda: foreign.Unpadded(6, 4, 3, 2),
    "TensorFlow, 5×5, dilated": lambda: foreign.Unpadded(6, 4, 5, rate=2, activation=F.relu),
    "TensorFlow, picture": lambda: foreign.Unpadded(6, 3, 3),
    "itself": lambda: foreign.Itself(6, 8, 3, activation=nn.ELU()),
    "itself, picture": lambda: foreign.Itself(6, 3, 3),
    "shell": lambda: foreign.Simple(6, 4, 3),
    "shell, strided, zeros": lambda: foreign.Simple(6, 4, 3, 2, padding_mode="zeros"),
    "shell, gated picture": lambda: foreign.Simple(6, 3, 3, activation=None),
    "two": lambda: foreign.Twofold(6, 4, 3, padding=1),
    "two, reflect": lambda: foreign.Twofold(6, 4, 3, padding=1, pad_type="reflect", activation="lrelu"),
    "two, replicate, dilated": lambda: foreign.Twofold(6, 4, 3, padding=2, dilation=2, pad_type="replicate"),
    "two, norm for show": lambda: foreign.Twofold(6, 4, 3, padding=1, norm="in"),
    "two, gate before norm": lambda: foreign.Twofold(6, 4, 4, 2, 1, activation="lrelu", norm="in", order="zhao"),
    "two, gate before tanh": lambda: foreign.Twofold(6, 3, 7, padding=3, activation="tanh", order="zhao"),
    "two, norm last": lambda: foreign.Twofold(6, 4, 3, padding=1, activation="lrelu", norm="bn", order="ava"),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request):
    return recipe.fill(LAYERS[request.param]()).eval()


@pytest.mark.parametrize("size", [(20, 24), (7, 9)], ids=str)
def test_gated_convolutions_of_strangers(layer, size):
    x = recipe.image("gated", 2, 6, *size) * 4 - 2
    irt.accelerate(layer, strict=True)
    assert swaps.swapped(layer) == {("", "deepfill.gated")}
    if any(isinstance(m, nn.Conv2d) and m.out_channels == 3 for m in layer.modules()) and not hasattr(
        layer, "gate_act"
    ):
        with dispatch.launches():  # a picture without gates may have no op of ours at this size
            _assert_close(layer, x)
    else:
        swaps.assert_equal_by_the_rule(layer, x)
        circular = any(getattr(m, "padding_mode", "") == "circular" for m in layer.modules())
        circular = circular or any(isinstance(m, nn.CircularPad2d) for m in layer.modules())
        assert ("gated_activation" if circular else "gated_conv2d") in irt.explain(layer, x).rows[0]["op"]
    report = irt.verify(layer, x)
    assert report.ok, str(report)


def _assert_close(layer, x):
    assert why_original(layer, (x,), {}) == ""
    torch.testing.assert_close(swaps.call(layer, x), swaps.original(layer, x), rtol=1e-4, atol=1e-5)


def test_gated_convolutions_keep_layouts(layer):
    x = recipe.image("gated", 2, 6, 20, 24).contiguous(memory_format=torch.channels_last)
    expected = swaps.call(layer, x)
    got = swaps.call(irt.accelerate(layer), x)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gated_convolutions_follow_their_weights(layer):
    x = recipe.image("gated", 1, 6, 20, 24)
    irt.accelerate(layer)
    with torch.no_grad():
        for p in layer.parameters():
            before = swaps.call(layer, x)
            p.data.numpy().__imul__(-1.5)
            _assert_close(layer, x)
            assert not torch.equal(before, swaps.call(layer, x))


def test_gated_convolutions_pass_gradients(layer):
    x = recipe.image("gated", 1, 6, 20, 24).requires_grad_()
    base = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    irt.accelerate(layer)
    for got, expected in zip(torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]), base, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item()))


def test_gated_convolutions_run_the_original_where_they_must(layer):
    x = recipe.image("gated", 1, 6, 20, 24)
    irt.accelerate(layer)
    child = next((m for m in layer.modules() if m is not layer), None)
    if child is not None:
        seen = []
        handle = child.register_forward_hook(lambda *args: seen.append(1))
        assert "hook" in why_original(layer, (x,), {})
        handle.remove()
    assert "float64" in why_original(layer, (x.double(),), {})
    assert "5 channels" in why_original(layer, (x[:, :5],), {})
    assert why_original(copy.deepcopy(layer).double(), (x.double(),), {}) == ""
    layer.train()
    assert "training" in why_original(layer, (x,), {})


def test_bf16():
    """Under autocast and with precision="bf16": near the original in float32, in the caller's dtype for the latter."""
    model, (x, mask) = swaps.generator(attention=foreign.WithFlow), swaps.image()
    expected = swaps.original(model, x, mask)
    irt.accelerate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = swaps.call(model, x, mask)
    single = swaps.call(irt.accelerate(model, precision="bf16"), x, mask)
    for out in (cast, single):
        for got, base in zip(out[:2], expected[:2], strict=True):
            assert 0 < (got.float() - base).abs().max() <= 0.1 * base.abs().max()
    assert all(t.dtype == torch.float32 for t in single)
    assert torch.equal(single[2] + 0, single[2].values())


@pytest.mark.parametrize("name", ["halves", "TensorFlow, strided", "two, gate before norm", "itself"])
def test_gated_convolutions_compile(name):
    layer = recipe.fill(LAYERS[name]()).eval()
    x = recipe.image("gated", 1, 6, 20, 24)
    irt.accelerate(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(swaps.call(compiled, x), swaps.call(layer, x))


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: foreign.Doubled(6, 4, 3, padding=1), "gated_conv2d"),
        (lambda: foreign.Doubled(6, 4, 3, padding=1, sn=True), "gated_conv2d"),
        (lambda: foreign.Enlarged(6, 4), "conv"),
    ],
)
def test_what_doubles_the_size_holds_what_is_swapped(build, path):
    module, x = recipe.fill(build()).eval(), recipe.image("gated", 1, 6, 10, 12)
    expected = swaps.original(module, x)
    irt.accelerate(module, strict=True)
    assert swaps.swapped(module) == {(path, "deepfill.gated")}
    torch.testing.assert_close(swaps.call(module, x), expected, rtol=1e-4, atol=1e-5)


def test_spectral_norm_keeps_iterating():
    """Each forward takes one step of the power iteration, in eval mode, too: outputs and vectors go the original's way."""
    module = recipe.fill(foreign.Twofold(6, 4, 3, padding=1, sn=True)).eval()
    twin, x = copy.deepcopy(module), recipe.image("gated", 1, 6, 20, 24)
    before = {name: p.clone() for name, p in module.named_parameters()}
    irt.accelerate(module, strict=True)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters()), "trials work on copies"
    outputs = []
    for _ in range(3):
        outputs.append(swaps.call(module, x))
        torch.testing.assert_close(outputs[-1], swaps.call(twin, x), rtol=1e-4, atol=1e-5)
        for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3)
    x.requires_grad_()
    module.load_state_dict(twin.state_dict())
    for name in ("mask_conv2d.module.weight_bar", "conv2d.module.bias"):
        fast, base = (_gradient(m, x, name) for m in (module, twin))
        torch.testing.assert_close(fast, base, rtol=1e-3, atol=1e-4 * base.abs().max().item())


def _gradient(module, x, name):
    state = copy.deepcopy(module.state_dict())
    grad = torch.autograd.grad(module(x).square().sum(), module.get_parameter(name))[0]
    module.load_state_dict(state)
    return grad


def test_torchs_own_spectral_norms():
    """A parametrization says what its weight is; the older one works by a hook that a fused form would bypass."""
    module, x = recipe.fill(foreign.Halves(6, 4, 3)).eval(), recipe.image("gated", 1, 6, 20, 24)
    nn.utils.parametrizations.spectral_norm(module.conv)
    module.eval()
    irt.accelerate(module, strict=True)
    swaps.assert_equal_by_the_rule(module, x)
    hooked = foreign.Halves(6, 4, 3)
    nn.utils.spectral_norm(hooked.conv)
    swaps.refused(hooked, "made by a hook")


@pytest.mark.parametrize("name", ["gconv_csq", "gconv_nip", "gconv_nip_tf", "gconv_mma", "gconv_zhao"])
def test_the_ports_own_gated_layers(name):
    case = json.loads((swaps.GOLDEN / name / "case.json").read_text())
    tensors = load_file(swaps.GOLDEN / name / "tensors.safetensors")
    layers = recipe.fill(nn.ModuleDict(_GOLDEN_LAYERS[name]())).eval()
    plain = copy.deepcopy(layers)
    irt.accelerate(layers, strict=True)
    assert {path.split(".")[0] for path, _ in swaps.swapped(layers)} == set(layers)
    runs = [run for run in case["runs"] if case["runs"][run]["layer"] in layers]
    assert len(runs) >= 5
    for run in runs:
        spec = case["runs"][run]
        x = recipe.image(spec["x"]["name"], *spec["x"]["shape"]) * 4 - 2
        if name == "gconv_mma" and run == "up":
            x = F.interpolate(x, scale_factor=2)
        module, original = copy.deepcopy(layers[spec["layer"]]), copy.deepcopy(plain[spec["layer"]])
        truth = copy.deepcopy(original).double()(x.double()).detach()
        if f"{run}.out64" in tensors:
            torch.testing.assert_close(truth, tensors[f"{run}.out64"], rtol=0, atol=1e-12)
        with dispatch.launches() as heard:
            out = swaps.call(module, x)
        # The float32 run of the machine that made the case is not this one's: both originals count.
        base = max((tensors[f"{run}.out"], swaps.call(original, x)), key=lambda t: (t - truth).abs().max())
        assert_close_to_truth(out, truth, base, numerics=dispatch.numerics_of(heard), context=run)


_GOLDEN_LAYERS = {
    "gconv_csq": lambda: {
        "k5": foreign.Twofold(5, 8, 5, padding=2),
        "s2": foreign.Twofold(8, 12, 3, 2, 1),
        "rate4": foreign.Twofold(8, 8, 3, 1, 4, 4),
        "relu": foreign.Twofold(8, 8, 3, 1, 1, activation="relu"),
        "rgb": foreign.Twofold(6, 3, 3, 1, 1, activation="none"),
        "up": foreign.Doubled(12, 6, 3, padding=1, sn=True),
        "lrelu_reflect": foreign.Twofold(8, 8, 3, 1, 1, pad_type="reflect", activation="lrelu"),
        "replicate": foreign.Twofold(8, 8, 3, 1, 2, 2, pad_type="replicate"),
        "up_nosn": foreign.Doubled(12, 6, 3, padding=1),
    },
    "gconv_nip": lambda: {
        "k5": foreign.Halves(5, 8, 5),
        "s2": foreign.Halves(8, 12, 3, 2),
        "rate4": foreign.Halves(8, 8, 3, rate=4),
        "relu": foreign.Halves(8, 8, 3, activation="relu"),
        "rgb": foreign.Halves(6, 3, 3, gated=False),
        "up": foreign.Enlarged(12, 6),
    },
    "gconv_nip_tf": lambda: {
        "k5": foreign.Unpadded(5, 8, 5),
        "s2": foreign.Unpadded(8, 12, 3, 2),
        "rate4": foreign.Unpadded(8, 8, 3, rate=4),
        "relu": foreign.Unpadded(8, 8, 3, activation=F.relu),
        "rgb": foreign.Unpadded(6, 3, 3),
        "up": foreign.Enlarged(12, 6),
    },
    "gconv_mma": lambda: {
        "k5": foreign.Simple(5, 8, 5),
        "s2": foreign.Simple(8, 12, 3, 2),
        "rate4": foreign.Simple(8, 8, 3, rate=4),
        "relu": foreign.Simple(8, 8, 3, activation="relu", padding_mode="zeros"),
        "rgb": foreign.Simple(6, 3, 3, activation=None),
        "up": foreign.Simple(12, 6, 3),
    },
    "gconv_zhao": lambda: {
        "k7": foreign.Twofold(4, 8, 7, padding=3, activation="lrelu", order="zhao"),
        "s2": foreign.Twofold(8, 12, 4, 2, 1, activation="lrelu", norm="in", order="zhao"),
        "rate4": foreign.Twofold(8, 8, 3, 1, 4, 4, activation="lrelu", norm="in", order="zhao"),
        "up": foreign.Doubled(12, 6, 3, padding=1, sn=True, activation="lrelu", norm="in", order="zhao"),
        "rgb": foreign.Twofold(6, 3, 7, padding=3, activation="tanh", order="zhao"),
    },
}


# ---- what gated convolutions are not swapped ------------------------------------------------------------------------


class _Swish(foreign.Halves):
    """Gates first."""

    def forward(self, x):
        gates, features = self.conv(x).chunk(2, 1)
        return self.activation(features) * torch.sigmoid(gates)


class _Scaled(foreign.Twofold):
    def forward(self, x):
        return 1.8 * super().forward(x)


class _Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def _with_standardised():
    layer = foreign.Halves(6, 4, 3)
    layer.conv = _Standardised(6, 8, 3, padding=1)
    return layer


@pytest.mark.parametrize(
    "build",
    [lambda: _Swish(6, 4, 3), lambda: _Scaled(6, 4, 3, padding=1), _with_standardised],
    ids=["swish", "scaled", "ws"],
)
def test_look_alikes_of_gated_convolutions_are_refused(build):
    swaps.refused(build(), "computes none of")


def _set(name, value):
    def build():
        layer = foreign.Twofold(6, 4, 3, padding=1)
        setattr(layer, name, value)
        return layer

    return build


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (_set("activation", nn.Hardswish()), "activation has no fused form"),
        (_set("mask_conv2d", nn.Conv2d(6, 4, 5)), "differ in geometry"),
        (_set("conv2d", nn.Conv2d(6, 4, 3, groups=2)), "grouped"),
        (_set("conv2d", nn.Conv2d(6, 4, 3, padding="same")), "padded by a name"),
        (_set("pad", nn.ZeroPad2d((1, 2, 1, 1))), "differs from side to side"),
    ],
)
def test_options_in_the_way_of_gated_convolutions_are_named(build, why):
    swaps.refused(build(), why)


class _Activated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.activation = nn.Conv2d(4, 8, 3), nn.ELU()

    def forward(self, x):
        return self.activation(self.conv(x))


def test_convolutions_without_gates_are_no_gated_convolutions():
    class Split(_Activated):
        def forward(self, x):
            a, b = self.conv(x).chunk(2, 1)
            return a + b

    class Squeezed(_Activated):
        def forward(self, x):
            return self.conv(x) * torch.sigmoid(self.conv(x).mean())

    for module in (Split(), Squeezed()):
        irt.accelerate(module.eval())
        assert record_of(module) is None
        assert "it has the parts of a convolution, but computes none of act(f)" in swaps.why_not(module)
    for module in (nn.Conv2d(4, 8, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid())):
        irt.accelerate(module.eval(), strict=True)
        assert "No module was recognised" in str(irt.explain(module))


@pytest.mark.parametrize(
    "activation", [nn.ELU(), nn.LeakyReLU(0.1), nn.ReLU(), nn.SiLU()], ids=lambda a: type(a).__name__
)
def test_a_convolution_and_its_activation_are_one_op(activation):
    module = recipe.fill(_Activated())
    module.activation = activation
    x = recipe.image("plain", 2, 4, 18, 21) * 4 - 2
    with torch.no_grad():
        exact, expected = copy.deepcopy(module).double()(x.double()), module(x)
        irt.accelerate(module.eval(), strict=True)
        assert record_of(module).adapter.name == "deepfill.convolution"
        with launches() as heard:
            got = module(x)
        assert_close_to_truth(got, exact, expected, numerics=numerics_of(heard))
        module.conv.weight.mul_(2.0)
        assert_close_to_truth(
            module(x), copy.deepcopy(irt.restore(module)).double()(x.double()), module(x), numerics=WINOGRAD
        )


@pytest.mark.parametrize(
    "geometry", [{"stride": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "replicate"}], ids=str
)
def test_a_convolution_of_any_geometry_and_its_activation(geometry):
    module = _Activated()
    module.conv = nn.Conv2d(4, 8, 3, **geometry)
    x = recipe.image("plain", 2, 4, 18, 21) * 4 - 2
    recipe.fill(module).eval()
    irt.accelerate(module, strict=True)
    assert swaps.swapped(module) == {("", "deepfill.convolution")}
    swaps.assert_equal_by_the_rule(module, x)


def test_sizes_that_padding_does_not_allow_are_the_originals_business():
    layer, x = foreign.Simple(6, 4, 3, rate=4).eval(), recipe.image("gated", 1, 6, 4, 9)
    expected = swaps.result(layer, x)
    irt.accelerate(layer, strict=True)
    assert "smaller than reflect padding" in why_original(layer, (x,), {})
    assert swaps.result(layer, x) == expected

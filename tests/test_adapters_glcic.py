"""Strangers' GLCIC: whole generators of both layouts are swapped, look-alikes and odd options are not."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import inpaintrt as irt
from inpaintrt.adapters.glcic import Form, form_of, stages_of
from inpaintrt.runtime import native
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.swap import record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.compare import WINOGRAD

from . import foreign_glcic as foreign

GOLDEN = pathlib.Path(__file__).parent / "golden" / "glcic"
UNIT = 4


class Leaky(foreign.Completion):
    """Negative values pass, and the picture is clipped."""

    def __init__(self, unit=64):
        super().__init__(unit)
        for n in range(1, 17):
            setattr(self, f"act{n}", nn.LeakyReLU(0.1))
        self.act17 = nn.Identity()

    def forward(self, x):
        return super().forward(x).clamp(0, 1)


class Exponential(foreign.Completion):
    """An activation that no factor passes: its norms are affine maps after it."""

    def __init__(self, unit=64):
        super().__init__(unit)
        for n in range(1, 17):
            setattr(self, f"act{n}", nn.ELU())
        self.act17 = nn.Tanh()


class Normless(foreign.EncoderDecoder):
    def __init__(self, unit=64):
        super().__init__(unit)
        for shell in self.modules():
            if isinstance(shell, foreign.Shell) and hasattr(shell, "bn"):
                del shell.bn


FORMS = {
    foreign.Completion: Form(False, "sigmoid"),
    foreign.NormFirst: Form(True, "sigmoid"),
    foreign.Logits: Form(False, "none"),
    Leaky: Form(False, "clipped to [0, 1]"),
    Exponential: Form(False, "tanh"),
    foreign.EncoderDecoder: Form(True, "clipped to [-1, 1]"),
    Normless: Form(False, "clipped to [-1, 1]"),
}


def _filled(build):
    """With signal: plain recipe weights lose it against the biases. Every third norm turns its sign, and one is zero."""
    model = recipe.fill(build(UNIT)).eval()
    with torch.no_grad():
        for stage in stages_of(model):
            stage.conv.weight.mul_(2.0)
            if stage.norm is not None:
                stage.norm.weight[::3].mul_(-1.0)
                stage.norm.weight[1] = 0.0
    return model


@pytest.fixture(params=FORMS, ids=lambda build: build.__name__)
def any_model(request):
    return _filled(request.param)


@pytest.fixture(params=(foreign.Completion, Exponential, foreign.EncoderDecoder), ids=lambda build: build.__name__)
def model(request):
    return _filled(request.param)


def _x(batch=1, rows=32, columns=44):
    x = recipe.image("glcic", batch, 4, rows, columns)
    x[:, 3] = (x[:, 3] > 0.6).float()
    return x


def _call(module, *args):
    with torch.no_grad():
        return module(*args)


def _original(module, x):
    with irt.disabled():
        return _call(copy.deepcopy(module), x)


def _assert_equal_by_the_rule(model, x):
    truth, base = _original(copy.deepcopy(model).double(), x.double()), _original(model, x)
    assert why_original(model, (x,), {}) == ""
    with launches() as heard:
        got = _call(model, x)
    assert got.stride() == base.stride()
    assert got.dtype == base.dtype
    assert_close_to_truth(got, truth, base, numerics=numerics_of(heard))


def _refused(module, why):
    irt.accelerate(module.eval())
    assert record_of(module) is None
    row = next(row for row in irt.explain(module).rows if row["module"] == "(model)")
    assert (row["adapter"], why in row["why not"]) == ("glcic.generator", True), row
    with pytest.raises(irt.UnsupportedError, match=re.escape(why)):
        irt.accelerate(module, strict=True)


# ---- what is swapped ------------------------------------------------------------------------------------------------


def test_generators_of_strangers(any_model):
    model = irt.accelerate(any_model, strict=True)
    assert [(path, record_of(m).adapter.name) for path, m in model.named_modules() if record_of(m)] == [
        ("", "glcic.generator")
    ]
    for x in (_x(), _x(2, 20, 28), _x(1, 4, 4), _x(0)):
        _assert_equal_by_the_rule(model, x)


@pytest.mark.parametrize("build", FORMS, ids=lambda build: build.__name__)
def test_the_form_is_found(build):
    model = build(UNIT).eval()
    assert form_of(model, stages_of(model)) == FORMS[build]


@pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")
def test_convolutions_with_a_kernel_run_it(model):
    irt.accelerate(model)
    with launches() as heard:
        _call(model, _x(1, 64, 64))
    assert len([launch for launch in heard if (launch.op, launch.backend) == ("fused_conv2d", "cpu")]) >= 8


def test_the_ports_own_numbers():
    """A module that has neither the port's class nor ours gives the port's numbers."""
    case, tensors = json.loads((GOLDEN / "case.json").read_text()), load_file(GOLDEN / "tensors.safetensors")
    model = recipe.fill(foreign.Completion()).eval()
    state = model.state_dict()
    for key, exponent in case["modules"]["g"]["after_fill"][0]["keys"].items():
        state[key].mul_(2.0**exponent)
    irt.accelerate(model, strict=True)
    for run, spec in case["runs"].items():
        picture = recipe.image(spec["inputs"]["image"]["name"], *spec["inputs"]["image"]["shape"])
        mask = tensors[f"{run}.mask"]
        mean = torch.tensor((0.50, 0.45, 0.40)).view(1, 3, 1, 1)
        x = torch.cat([picture - picture * mask + mean * mask, mask], 1)
        assert why_original(model, (x,), {}) == ""
        got = _call(model, x)
        assert_close_to_truth(got, tensors[f"{run}.out64"], tensors[f"{run}.out"], numerics=WINOGRAD, context=run)


@pytest.mark.parametrize("port", ["ote", "mma"])
def test_our_own_networks(port):
    model = recipe.fill(irt.models.create("glcic", port=port, width=UNIT))
    irt.accelerate(model, strict=True)
    _assert_equal_by_the_rule(model, _x())
    image, mask = _x(2).split((3, 1), dim=1)
    with irt.disabled():
        expected = _call(model.inpaint, image, mask)
    torch.testing.assert_close(_call(model.inpaint, image, mask), expected, rtol=1e-4, atol=1e-5)


def test_a_generator_inside_an_application():
    model = recipe.fill(foreign.Inpaintor(UNIT)).eval()
    image, mask = _x(1, 64, 64).split((3, 1), dim=1)
    expected = _call(model, image, mask)
    irt.accelerate(model)
    assert [path for path, m in model.named_modules() if record_of(m)] == ["generator"]
    torch.testing.assert_close(_call(model, image, mask), expected, rtol=1e-4, atol=1e-5)
    report = irt.verify(model, image, mask)
    assert report.ok, str(report)


# ---- what stays as it is --------------------------------------------------------------------------------------------


def test_layouts_at_the_border(model):
    x = _x(2)
    last, weights_last = x.contiguous(memory_format=torch.channels_last), copy.deepcopy(model)
    weights_last.to(memory_format=torch.channels_last)
    for m, t in ((model, x), (model, last), (weights_last, x), (weights_last, last), (model, x[:, :, ::2])):
        _assert_equal_by_the_rule(irt.accelerate(m), t)


def test_weights_are_never_stale(model):
    irt.accelerate(model)
    x = _x()
    before = _call(model, x)
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        tensor.data.numpy().__imul__(1.25)
    assert not torch.equal(_call(model, x), before)
    _assert_equal_by_the_rule(model, x)


def test_inputs_are_not_written_and_gradients_pass(model):
    irt.accelerate(model)
    x = _x(1, 16, 16)
    copied = x.clone()
    _call(model, x)
    assert torch.equal(x, copied)
    x.requires_grad_()

    def gradients():
        return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()], allow_unused=True)

    fast = gradients()
    with irt.disabled():
        base = gradients()
    for got, expected in zip(fast, base, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * max(1e-3, expected.abs().max().item()))


def test_where_the_original_runs(model):
    irt.accelerate(model)
    x = _x()
    for args, why in (
        ((x.double(),), "float64"),
        ((x[:, :3],), "3 channels"),
        ((x[:, :, :30],), "the size (30, 44) is not a multiple of 4"),
        ((x[0],), "not one 4-D tensor"),
        ((x, x), "not one 4-D tensor"),
    ):
        assert why in why_original(model, args, {})
    handle = stages_of(model)[3].conv.register_forward_hook(lambda *args: None)
    assert "hook" in why_original(model, (x,), {})
    handle.remove()
    assert why_original(model, (x,), {}) == ""
    model.train()
    assert "training" in why_original(model, (x,), {})


def test_copies_pickles_and_restoring(model):
    x, state = _x(1, 16, 20), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = _call(model, x)
    irt.accelerate(model)
    fast = _call(model, x)
    assert torch.equal(_call(copy.deepcopy(model), x), fast)
    assert torch.equal(_call(pickle.loads(pickle.dumps(model)), x), expected), "a pickle is the original"
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(_call(irt.restore(model), x), expected)


def test_bf16(model):
    x = _x(1, 32, 32)
    truth = _original(copy.deepcopy(model).double(), x.double())
    by_name = _call(irt.accelerate(model, precision="bf16"), x)
    irt.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        by_context, base = _call(model, x), _original(model, x)
    assert (by_name.dtype, by_context.dtype) == (torch.float32, base.dtype)
    own, errors = (base - truth).square().mean(), [(got - truth).square().mean() for got in (by_name, by_context)]
    assert all(0 < error <= 4 * own for error in errors), (own, errors)


@pytest.mark.parametrize("build", [foreign.Completion, Exponential])
def test_compiles(build):
    model = irt.accelerate(_filled(build))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in ((16, 20), (24, 28)):
        x = _x(1, *size)
        torch.testing.assert_close(_call(compiled, x), _call(model, x), rtol=1e-4, atol=1e-5)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_another_network_of_the_same_layers_is_refused():
    _refused(recipe.fill(foreign.Skipping(UNIT)), "it has the layers of a GLCIC network, but computes something else")


class _TwoInputs(foreign.Completion):
    def forward(self, image, mask):
        return super().forward(torch.cat([image, mask], 1))


def test_a_network_that_is_called_otherwise_is_refused():
    _refused(_TwoInputs(UNIT), "the original cannot run on the probe's input: TypeError")


def _with(path, module):
    model = foreign.Completion(UNIT)
    setattr(model, path, module)
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: _with("conv5", nn.Conv2d(16, 16, 3, padding=1, groups=4)), "layer 5 is grouped"),
        (lambda: _with("conv5", nn.Conv2d(16, 16, (3, 1), padding=(1, 0))), "layer 5 is grouped, not square"),
        (lambda: _with("conv7", nn.Conv2d(16, 16, 3, padding="same", dilation=2)), "layer 7 is grouped, not square, or"),
        (lambda: _with("conv3", nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), "does not pad with zeros"),
        (lambda: _with("bn9", nn.InstanceNorm2d(16)), "layer 9 has another norm than a batch norm"),
        (lambda: _with("bn9", nn.BatchNorm2d(16, track_running_stats=False)), "layer 9 has another norm"),
        (lambda: _with("act2", nn.GELU()), "layer 2 has an activation without a fused form"),
        (
            lambda: _with("conv6", torch.nn.utils.spectral_norm(nn.Conv2d(16, 16, 3, padding=1))),
            "layer 6 has a weight that is no parameter",
        ),
        (
            lambda: _with("conv6", torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, padding=1))),
            "layer 6 has a weight that is no parameter",
        ),
    ],
)  # fmt: skip
def test_options_in_the_way_are_named(build, why):
    _refused(build(), why)


def test_a_child_that_changes_later_counts():
    model, x = irt.accelerate(_filled(foreign.Completion)), _x()
    model.conv5 = nn.Conv2d(16, 16, 3, padding=1, groups=4).eval()
    assert "layer 5 is grouped" in why_original(model, (x,), {})
    _call(model, x)
    model.conv5 = nn.Conv2d(16, 16, 3, padding=1).eval()
    _assert_equal_by_the_rule(model, x)
    del model.conv16
    assert "no GLCIC network any more" in why_original(model, (x,), {})


def test_other_networks_with_such_names_are_none():
    for family in ("deepfill_v1", "deepfill_v2"):
        network = irt.models.create(family, port="mma")
        assert not any(stages_of(module) for module in network.modules())

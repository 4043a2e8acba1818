"""Convolutions in models that nobody has seen: which are swapped, that they compute the same, and what is left alone."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import inpaintrt as irt
from inpaintrt.adapters.convolution import block_of, form_of, like_channels_last, runs_of, sequence_of
from inpaintrt.runtime import native
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.swap import insistent, record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe

from .foreign_glcic import Shell

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")
SEQUENCE, BLOCK, SINGLE = "convolution.sequence", "convolution.block", "convolution"


@pytest.fixture(autouse=True)
def _whatever_is_faster():
    """These images are small: the original would be faster at most of them."""
    with insistent():
        yield


def _ready(module):
    """Recipe weights, and a norm that does something."""
    return recipe.fill(module).eval()


def _x(channels=6, rows=20, columns=23, batch=2, name="x"):
    return recipe.image(name, batch, channels, rows, columns) * 4 - 2


def _swapped(model):
    return {path: record_of(m).adapter.name for path, m in model.named_modules() if record_of(m)}


def _call(module, *args):
    with torch.no_grad():
        return module(*args)


def _original(module, *args):
    with irt.disabled():
        return _call(copy.deepcopy(module), *args)


def _assert_equal_by_the_rule(model, x, *, ops=None):
    """Against the original's error; `ops` is how many calls of a kernel it takes at least."""
    truth, base = _original(copy.deepcopy(model).double(), x.double()), _original(model, x)
    with launches() as heard:
        got = _call(model, x)
    assert ops is None or ({(n.op, n.backend) for n in heard} == {("fused_conv2d", "cpu")} and len(heard) >= ops)
    assert (got.dtype, got.stride()) == (base.dtype, base.stride())
    assert_close_to_truth(got, truth, base, numerics=numerics_of(heard))


def _conv(inputs=6, outputs=8, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": 1, **options})


# ---- a convolution by itself ----------------------------------------------------------------------------------------


class Plain(nn.Conv2d):
    """Another name, the same function."""


CONVOLUTIONS = {
    "zeros": _conv,
    "no padding": lambda: _conv(padding=0),
    "wide padding": lambda: _conv(padding=2),
    "same": lambda: _conv(padding="same"),
    "valid": lambda: _conv(padding="valid"),
    "reflect": lambda: _conv(padding_mode="reflect"),
    "replicate": lambda: _conv(padding_mode="replicate", bias=False),
    "no padding to reflect": lambda: _conv(padding=0, padding_mode="reflect"),
    "subclass": lambda: Plain(6, 8, 3, padding=1),
    "one output": lambda: _conv(6, 1),
    "one input": lambda: _conv(1, 5),
}


@pytest.fixture(params=CONVOLUTIONS, ids=str)
def conv(request):
    return _ready(CONVOLUTIONS[request.param]())


def test_convolutions(conv):
    irt.accelerate(conv, strict=True)
    assert _swapped(conv) == {"": SINGLE}
    for size in ((20, 23), (64, 17)):
        _assert_equal_by_the_rule(conv, _x(conv.in_channels, *size), ops=1)


@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize(
    "take",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, :, 3:],
        lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape),
    ],
)
def test_layouts(take, weights_last):
    """The output has the strides that torch's convolution gives it, for channels-last weights too."""
    model = _ready(nn.Sequential(_conv(), nn.Flatten(0, 0)))
    if weights_last:
        model.to(memory_format=torch.channels_last)
    irt.accelerate(model)
    assert _swapped(model) == {"0": SINGLE}
    x = take(_x(6, 40, 41))
    assert why_original(model[0], (x,), {}) == ""
    _assert_equal_by_the_rule(model[0], x, ops=1)


def test_what_torch_takes_for_channels_last():
    """Our reading of strides against torch's own result, single rows and channels among them."""
    conv, weights = nn.Conv2d(1, 4, 1), nn.Conv2d(3, 4, 1)
    for shape in ((2, 3, 5, 4), (1, 3, 1, 7), (1, 1, 6, 7), (2, 1, 6, 1), (1, 3, 1, 1), (2, 3, 1, 1)):
        for last in (False, True):
            for step in (1, 2):
                x = torch.rand(shape[0], shape[1], shape[2] * step, shape[3])
                x = x.contiguous(memory_format=torch.channels_last) if last else x
                x = x[:, :, ::step]
                y = (conv if shape[1] == 1 else weights)(x)
                if 1 in shape[2:]:
                    continue  # the strides of the result do not tell
                assert like_channels_last(x) == (y.stride(1) == 1), (shape, last, step)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((_x(6, 2, 40),), "smaller than"),
        ((_x(5),), "5 channels"),
        ((_x(6).double(),), "float64"),
        ((_x(6)[0],), "not one 4-D tensor"),
        ((_x(6).to(torch.bfloat16),), "bfloat16"),
        ((), "not one 4-D tensor"),
    ],
)
def test_odd_calls_are_the_originals_business(args, why):
    conv = _ready(_conv(padding_mode="reflect", padding=2))
    expected = _result(conv, *args)
    irt.accelerate(conv, strict=True)
    assert why in why_original(conv, args, {})
    got = _result(conv, *args)
    assert torch.equal(got, expected) if torch.is_tensor(expected) else got == expected


def _result(module, *args):
    try:
        return _call(module, *args)
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}".replace("fused", "")


def test_an_empty_batch():
    conv = irt.accelerate(_ready(_conv()))
    assert _call(conv, torch.zeros(0, 6, 20, 20)).shape == (0, 8, 20, 20)


def test_where_the_original_runs():
    model, x = irt.accelerate(_ready(nn.Sequential(_conv(), nn.Flatten(0, 0)))), _x()
    conv = model[0]
    assert why_original(conv, (x,), {}) == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in why_original(conv, (x,), {})
        assert torch.equal(_call(conv, x), _original(conv, x))
    with irt.use_backend("reference", op="fused_conv2d"):
        torch.testing.assert_close(_call(conv, x), _original(conv, x))
    conv.groups = 2
    assert "grouped" in why_original(conv, (x,), {})
    conv.groups = 1
    conv.train()
    assert "training" in why_original(conv, (x,), {})


def test_hooks_on_the_convolution_itself_run():
    conv, x, seen = irt.accelerate(_ready(_conv())), _x(), []
    conv.register_forward_pre_hook(lambda m, args: seen.append("before") or (args[0] * 2,))
    conv.register_forward_hook(lambda m, args, out: seen.append("after") or out + 1)
    with launches() as heard:
        got = _call(conv, x)
    assert seen == ["before", "after"]
    assert len(heard) == 1
    torch.testing.assert_close(got, F.conv2d(2 * x, conv.weight, conv.bias, padding=1) + 1, rtol=1e-4, atol=1e-4)


def test_weights_are_never_stale():
    conv, x = irt.accelerate(_ready(_conv())), _x()
    _call(conv, x)
    for change in (
        lambda: conv.weight.data.mul_(-1.5),
        lambda: conv.bias.data.numpy().__iadd__(1),
        lambda: conv.load_state_dict({key: t * 0.5 for key, t in conv.state_dict().items()}),
        lambda: setattr(conv, "weight", nn.Parameter(torch.rand(8, 6, 3, 3))),
        lambda: setattr(conv, "bias", None),
    ):
        before = _call(conv, x)
        change()
        _assert_equal_by_the_rule(conv, x, ops=1)
        assert not torch.equal(_call(conv, x), before)


def test_shared_weights_and_shared_modules():
    shared = _conv(6, 6)
    model = nn.ModuleDict({"a": shared, "b": _conv(6, 6), "c": shared})
    model["b"].weight = shared.weight
    irt.accelerate(model.eval())
    assert _swapped(model) == {"a": SINGLE, "b": SINGLE}, "a shared module is listed once"
    with torch.no_grad():
        shared.weight.mul_(2)
    for part in model.values():
        _assert_equal_by_the_rule(part, _x(), ops=1)


def test_gradients_copies_and_pickles(conv):
    x = _x(conv.in_channels).requires_grad_()
    base = torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()])
    expected, state = _call(conv, x), copy.deepcopy(conv.state_dict())
    irt.accelerate(conv)
    for got, grad in zip(torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()]), base, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())
    fast = _call(conv, x)
    assert isinstance(conv, nn.Conv2d)
    assert torch.equal(_call(copy.deepcopy(conv), x), fast)
    assert torch.equal(_call(pickle.loads(pickle.dumps(conv)), x), expected)
    assert all(torch.equal(tensor, state[key]) for key, tensor in conv.state_dict().items())
    assert torch.equal(_call(irt.restore(conv), x), expected)
    assert type(conv) in (nn.Conv2d, Plain)


def test_precisions():
    conv, x = _ready(_conv()), _x()
    expected = _call(conv, x)
    irt.accelerate(conv, precision="ieee")
    with launches() as heard:
        exact = _call(conv, x)
    torch.testing.assert_close(exact, expected)
    assert not any(launch.backend == "cpu" and launch.numerics.rms > 2 for launch in heard), "no Winograd"
    half = _call(irt.accelerate(conv, precision="bf16"), x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0.05)


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize(
    "build",
    [lambda: Own(6, 8, 3), lambda: Standardised(6, 8, 3), lambda: _conv(kernel=7),
     lambda: _conv(stride=2), lambda: _conv(kernel=1), lambda: _conv(kernel=(3, 1)), lambda: nn.ConvTranspose2d(6, 8, 3),
     lambda: nn.Conv3d(6, 8, 3), lambda: _conv().to("meta"), lambda: _conv().double(), lambda: _conv().bfloat16()],
)  # fmt: skip
def test_what_is_none_of_these(build):
    """Not a plain convolution, or none that a kernel is faster at: no word about it."""
    model = nn.ModuleDict({"conv": build()}).eval()
    irt.accelerate(model, strict=True)
    assert not _swapped(model)
    assert "No module was recognised" in str(irt.explain(model))


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: _conv(groups=2), "it is grouped"),
        (lambda: _conv(padding_mode="circular"), "it pads circularly"),
        (lambda: _conv(padding=(1, 2)), "its kernel, stride, padding or dilation is not square"),
        (lambda: torch.nn.utils.spectral_norm(_conv()), "its weight is no parameter"),
        (lambda: torch.nn.utils.weight_norm(_conv()), "its weight is no parameter"),
        (lambda: prune.l1_unstructured(_conv(), "weight", 0.5), "its weight is no parameter"),
        (lambda: torch.nn.utils.parametrizations.spectral_norm(_conv()), "its weight is no parameter"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_options_in_the_way_are_named(build, why):
    conv = build().eval()
    x = _x()
    before = _call(conv, x)
    irt.accelerate(conv)
    assert not _swapped(conv)
    (row,) = irt.explain(conv).rows
    assert (row["adapter"], row["why not"].startswith(why)) == (SINGLE, True), row
    assert torch.equal(_call(conv, x), before)
    with pytest.raises(irt.UnsupportedError, match=re.escape(why)):
        irt.accelerate(conv, strict=True)


# ---- sequences ------------------------------------------------------------------------------------------------------


class Named(nn.Sequential):
    """As torchvision builds its blocks: a Sequential that makes its own layers."""

    def __init__(self, inputs, outputs):
        super().__init__(_conv(inputs, outputs, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


SEQUENCES = {
    "conv, norm, relu": (lambda: Named(6, 8), [3], 1),
    "conv, relu, norm": (lambda: nn.Sequential(_conv(), nn.ReLU(), nn.BatchNorm2d(8)), [2, 1], 1),
    "pads": (
        lambda: nn.Sequential(nn.ReflectionPad2d(1), _conv(padding=0), nn.ELU(), nn.ZeroPad2d(1), _conv(8, 4), nn.Tanh()),
        [3, 3], 2,
    ),
    "uneven pad": (lambda: nn.Sequential(nn.ReflectionPad2d((1, 2, 1, 1)), _conv(padding=0)), [1, 1], 1),
    "two pads": (lambda: nn.Sequential(nn.ReplicationPad2d(1), _conv(), nn.SiLU()), [1, 2], 1),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), _conv(), nn.LeakyReLU(0.1)), [1, 1, 2], 1),
    "other norm": (lambda: nn.Sequential(_conv(), nn.InstanceNorm2d(8), nn.GELU(), nn.Dropout(0.5)), [1, 1, 1, 1], 1),
    "norm of a batch": (
        lambda: nn.Sequential(_conv(), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()), [1, 1, 1], 1,
    ),
    "down and up": (
        lambda: nn.Sequential(
            _conv(6, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), _conv(8, 8, groups=2), nn.Sigmoid(),
            _conv(8, 12, stride=2), nn.BatchNorm2d(12), nn.ReLU(), nn.ConvTranspose2d(12, 8, 4, 2, 1),
            nn.Upsample(scale_factor=2), nn.PReLU(), _conv(8, 3, 5, padding=2),
        ),
        [3, 1, 1, 1, 3, 1, 1, 1, 1], 1,
    ),
}  # fmt: skip


@pytest.fixture(params=SEQUENCES, ids=str)
def sequence(request):
    build, lengths, ops = SEQUENCES[request.param]
    return _ready(build()), lengths, ops


def test_sequences(sequence):
    model, lengths, ops = sequence
    assert [len(run.layers) for run in runs_of(sequence_of(model))] == lengths
    irt.accelerate(model, strict=True)
    assert _swapped(model) == {"": SEQUENCE}
    last = _x(6, 24, 28).contiguous(memory_format=torch.channels_last)
    for x in (_x(6, 24, 28), _x(6, 32, 36, 1), last):
        assert why_original(model, (x,), {}) == ""
        _assert_equal_by_the_rule(model, x, ops=ops)
    model.to(memory_format=torch.channels_last)
    _assert_equal_by_the_rule(model, _x(6, 24, 28), ops=ops)


def test_sequences_follow_what_they_hold(sequence):
    """Weights, statistics, and layers that take another's place."""
    model, _, ops = irt.accelerate(sequence[0]), sequence[1], sequence[2]
    x = _x(6, 24, 28)
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        tensor.data.numpy().__imul__(1.25)
    _assert_equal_by_the_rule(model, x, ops=ops)
    model[len(model) - 1] = nn.Softplus().eval()
    _assert_equal_by_the_rule(model, x)
    model.append(nn.Flatten().eval())
    assert "no sequence of plain layers any more" in why_original(model, (x,), {})
    _call(model, x)


def test_sequences_run_the_original_where_they_must(sequence):
    model, x = irt.accelerate(sequence[0]), _x(6, 24, 28)
    for args, why in (((x.double(),), "float64"), ((x[:, :5],), "5 channels"), ((), "not one 4-D tensor")):
        assert why in why_original(model, args, {})
    handle = model[0].register_forward_hook(lambda *args: None)
    assert "hook" in why_original(model, (x,), {})
    handle.remove()
    model.train()
    assert "training" in why_original(model, (x,), {})


def test_what_no_kernel_takes_runs_layer_by_layer(sequence, monkeypatch):
    """The op's reasons decide, per call."""
    model, x = irt.accelerate(sequence[0]), _x(6, 24, 28)
    conv = irt.accelerate(_ready(_conv()))
    dispatcher = dispatchers["fused_conv2d"]
    lane = dataclasses.replace(dispatcher.lanes["cpu"], refuses=lambda *args: iter(["not today"]))
    monkeypatch.setattr(dispatcher, "lanes", {"cpu": lane})
    with launches() as heard:
        got = _call(model, x)
        single = _call(conv, x)
    assert not heard
    assert torch.equal(got, _original(model, x))
    assert torch.equal(single, _original(conv, x))
    assert why_original(conv, (x,), {}) == "cpu: not today"


def test_gradients_through_a_sequence():
    model, x = _ready(Named(6, 8)), _x().requires_grad_()
    base = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    irt.accelerate(model)
    for got, grad in zip(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]), base, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


def test_inputs_are_not_written():
    model, x = irt.accelerate(_ready(Named(6, 8))), _x()
    copied = x.clone()
    _call(model, x)
    assert torch.equal(x, copied)


class Reversed(nn.Sequential):
    def forward(self, x):
        for layer in reversed(list(self)):
            x = layer(x)
        return x


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("build", "inside"),
    [
        (lambda: Reversed(nn.ReLU(), _conv()), {"1": SINGLE}),
        (lambda: nn.Sequential(_conv(), Doubled()), {"0": SINGLE}),
        (lambda: nn.Sequential(_conv(), nn.Sequential(_conv(8, 8), nn.ReLU())), {"0": SINGLE, "1": SEQUENCE}),
        (lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), {}),
        (lambda: nn.Sequential(_conv(kernel=1), nn.ReLU()), {}),
        (lambda: nn.Sequential(), {}),
    ],
)
def test_what_is_no_sequence(build, inside):
    model = irt.accelerate(_ready(build()), strict=True)
    assert _swapped(model) == inside
    _call(model, _x())


def test_a_layer_with_weights_of_a_hook_keeps_a_sequence_as_it_is():
    model = nn.Sequential(_conv(), nn.ReLU(), torch.nn.utils.spectral_norm(_conv(8, 4)), nn.ReLU()).eval()
    irt.accelerate(model)
    rows = {row["module"]: row for row in irt.explain(model).rows}
    assert rows["(model)"]["why not"].startswith("layer 2: its weight is no parameter")
    assert _swapped(model) == {"0": SINGLE}, "what it holds is still found"


# ---- blocks ---------------------------------------------------------------------------------------------------------


class Basic(nn.Module):
    """A block that says in its code only which activation it has."""

    def __init__(self, act=F.relu, **options):
        super().__init__()
        self.c, self.b, self.act_function = _conv(bias=False, **options), nn.BatchNorm2d(8), [act]

    def forward(self, x):
        return self.act_function[0](self.b(self.c(x)))


class Bare(Basic):
    """Holds a norm that it does not call."""

    def forward(self, x):
        return self.c(x)


class Residual(Basic):
    def forward(self, x):
        return x + F.relu(self.b(self.c(x)))[:, :6]


class Masked(Basic):
    def forward(self, x, mask):
        return self.b(self.c(x)) * mask


class Scaled(Basic):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))


BLOCKS = {
    "mmcv": (lambda: Shell(6, 8, 3, padding=1), "convolution, norm, activation"),
    "mmcv, can": (lambda: Shell(6, 8, 3, padding=1, order="can"), "convolution, activation, norm"),
    "mmcv, nac": (lambda: Shell(6, 8, 3, padding=1, order="nac"), "norm, activation, convolution"),
    "mmcv, acn": (lambda: Shell(6, 8, 3, padding=1, order="acn", act="silu"), "activation, convolution, norm"),
    "mmcv, reflect": (lambda: Shell(6, 8, 3, padding=1, pad="reflect", act="leaky"), "convolution, norm, activation"),
    "mmcv, no norm": (lambda: Shell(6, 8, 3, padding=1, norm=False, pad="replicate"), "convolution, activation"),
    "mmcv, no activation": (lambda: Shell(6, 8, 3, padding=1, act=None), "convolution, norm"),
    "function": (Basic, "convolution, norm, activation"),
    "function, leaky": (lambda: Basic(lambda x: F.leaky_relu(x, 0.2)), "convolution, norm, activation"),
    "function, silu": (lambda: Basic(F.silu), "convolution, norm, activation"),
    "norm not called": (Bare, "convolution"),
}


@pytest.fixture(params=BLOCKS, ids=str)
def block(request):
    build, order = BLOCKS[request.param]
    return _ready(build()), order


def test_blocks(block):
    model, order = block
    irt.accelerate(model, strict=True)
    if _swapped(model) != {"": BLOCK}:
        assert _swapped(model) == {"": "deepfill.convolution"}, "an older adapter knows it"
        return
    assert ", ".join(form_of(model, block_of(model)).order) == order
    for x in (_x(), _x().contiguous(memory_format=torch.channels_last)):
        copied = x.clone()
        assert why_original(model, (x,), {}) == ""
        with launches() as heard:
            _call(model, x.clone())
        assert [launch.backend for launch in heard] == ["cpu"]
        truth, base = _original(copy.deepcopy(model).double(), x.double()), _original(model, x.clone())
        got = _call(model, x.clone())
        assert got.stride() == base.stride()
        assert_close_to_truth(got, truth, base, numerics=numerics_of(heard))
        assert torch.equal(x, copied)


def test_blocks_follow_their_settings():
    """Another order is another form, asked again; keywords are the original's."""
    model, x = irt.accelerate(_ready(Shell(6, 8, 3, padding=1))), _x()
    _assert_equal_by_the_rule(model, x, ops=1)
    model.order = "can"
    _assert_equal_by_the_rule(model, x, ops=1)
    assert "keyword" in why_original(model, (x,), {"activate": False})
    assert "not one 4-D tensor" in why_original(model, (x, False), {})
    handle = model.bn.register_forward_hook(lambda *args: None)
    assert "hook" in why_original(model, (x,), {})
    handle.remove()


@pytest.mark.parametrize("build", [Residual, Masked, lambda: Basic(F.softplus), Scaled])
def test_what_is_no_block(build):
    """Not a word about it, and its convolution is swapped by itself."""
    model = irt.accelerate(_ready(build()), strict=True)
    assert _swapped(model) == {"c": SINGLE}


# ---- whole models ---------------------------------------------------------------------------------------------------


class Stranger(nn.Module):
    """A small U-Net as nobody has seen it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(4, 8, 7), nn.ReLU())
        self.down = Shell(8, 16, 3, stride=2, padding=1)
        self.body = nn.ModuleList([Named(16, 16), Basic(), Shell(16, 16, 3, padding=2, dilation=2)])
        self.body[1].c, self.body[1].b = _conv(16, 16, bias=False), nn.BatchNorm2d(16)
        self.mix = _conv(16, 16, kernel=1, padding=0)
        self.head = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x):
        first = self.stem(x)
        x = self.down(first)
        for layer in self.body:
            x = x + layer(x)
        return torch.sigmoid(self.head(torch.cat([F.interpolate(self.mix(x), scale_factor=2), first], 1)))


def test_a_model_that_nobody_has_seen():
    model, x = _ready(Stranger()), recipe.image("picture", 1, 4, 48, 56)
    before = _call(model, x)
    irt.accelerate(model, strict=True)
    swapped = _swapped(model)
    assert {path: name for path, name in swapped.items() if path != "body.2"} == {
        "body.0": SEQUENCE, "body.1": BLOCK, "head": SINGLE,
    }  # fmt: skip
    torch.testing.assert_close(_call(model, x), before, rtol=1e-4, atol=1e-5)
    assert all(row["why not"] is None for row in irt.explain(model, x).rows)
    report = irt.verify(model, x)
    assert report.ok, str(report)
    irt.accelerate(irt.restore(model), skip="convolution*")
    assert not _swapped(model)


def test_compiles():
    model, x = irt.accelerate(_ready(nn.ModuleList([_conv(), Named(6, 8), Basic()]))), _x()
    assert set(_swapped(model).values()) == {SINGLE, SEQUENCE, BLOCK}
    for part in model:
        torch._dynamo.reset()
        compiled = torch.compile(part, fullgraph=True, dynamic=True, backend="eager")
        for size in ((20, 23), (25, 32)):
            x = _x(6, *size)
            with launches() as heard:
                got = _call(compiled, x)
            assert [(launch.op, launch.backend) for launch in heard] == [("fused_conv2d", "cpu")]
            assert torch.equal(got, _call(part, x))


@pytest.mark.parametrize("build", [lambda: _conv(kernel=5, padding=2), lambda: _conv(kernel=5, padding_mode="reflect")])
def test_kernels_of_five(build):
    model = _ready(build())
    irt.accelerate(model, strict=True)
    assert _swapped(model) == {"": SINGLE}
    _assert_equal_by_the_rule(model, _x(), ops=1)

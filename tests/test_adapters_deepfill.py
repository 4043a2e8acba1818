"""Strangers' DeepFill: attention modules and gated convolutions are recognised, swapped or refused, and stay what they are."""

from __future__ import annotations

import copy
import itertools
import json
import pathlib
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import inpaintrt as irt
from inpaintrt.adapters import contextual_attention as attention
from inpaintrt.adapters import deepfill
from inpaintrt.adapters.deferred import Deferred
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.swap import record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.compare import WINOGRAD, flat_tensors

from . import foreign_deepfill as foreign

GOLDEN = pathlib.Path(__file__).parent / "golden"


def _swapped(model):
    return {(path, record_of(m).adapter.name) for path, m in model.named_modules() if record_of(m)}


def _call(module, *args):
    with torch.no_grad():
        return module(*args)


def _original(module, *args):
    """What the module computed before it was swapped, from a copy that the call cannot change."""
    with irt.disabled(), torch.no_grad():
        return copy.deepcopy(module)(*args)


def _truth(module, *args):
    """The original in float64; ports make constants in the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        return _original(copy.deepcopy(module).double(), *(t.double() if torch.is_tensor(t) else t for t in args))
    finally:
        torch.set_default_dtype(torch.float32)


def _assert_equal_by_the_rule(module, *args):
    """Fused output against the original's error; returns what the fused form returned."""
    truth, base = flat_tensors(_truth(module, *args)), flat_tensors(_original(module, *args))
    assert why_original(module, args, {}) == ""
    with dispatch.launches() as heard:
        result = _call(module, *args)
    got = flat_tensors(result)
    assert heard
    assert len(got) == len(base)
    for g, t, b in zip(got, truth, base, strict=True):
        assert g.stride() == b.stride()
        assert_close_to_truth(g, t, b, numerics=dispatch.numerics_of(heard))
    return result


def _why_not(model, path=""):
    rows = {row["module"]: row for row in irt.explain(model).rows}
    return rows[path or "(model)"]["why not"] or ""


def _refused(module, why):
    module = irt.accelerate(module.eval())
    assert record_of(module) is None
    assert why in _why_not(module), _why_not(module)
    with pytest.raises(irt.UnsupportedError, match=re.escape(why)):
        irt.accelerate(module, strict=True)


def _features(*shape, name="ca"):
    return (recipe.image(name, *shape) - 0.3) * 0.1


def _mask(*shape, name="holes", part=0.03):
    return (recipe.image(name, *shape) < part).float()


# ---- contextual attention -------------------------------------------------------------------------------------------

FORMS = {
    "csq": (foreign.Resized, 8),
    "csq, mask at features' size": (foreign.Resized, 2),
    "daa": (foreign.WithFlow, 8),
    "alone": (foreign.Attention, 8),
    "nip": (foreign.Maybe, 8),
    "nip, with flow": (lambda: foreign.Maybe(return_flow=True), 8),
    "nip, n_down=1": (lambda: foreign.Maybe(n_down=1), 4),
    "nip, soft": (lambda: foreign.Maybe(softmax_scale=3.0), 8),
    "nip, not fused": (lambda: foreign.Maybe(fuse=False), 8),
    "nip, fused over one": (lambda: foreign.Maybe(fuse_k=1), 8),
    "nip_tf": (lambda: foreign.Aligned(fuse=False), 8),
    "nip_tf, fused": (foreign.Aligned, 8),
    "yy": (foreign.Faithful, 8),
    "mma": (foreign.Normalised, 2),
    "mma, not fused": (lambda: foreign.Normalised(fuse_kernel_size=1), 2),
}


@pytest.fixture(params=FORMS, ids=str)
def form(request):
    """A swapped module and the pixels of its mask per cell."""
    build, pixels = FORMS[request.param]
    return irt.accelerate(build().eval(), strict=True), pixels


@pytest.mark.parametrize("size", [(16, 24), (18, 20), (2, 12)], ids=str)
def test_attention_of_strangers(form, size):
    module, pixels = form
    assert _swapped(module) == {("", "deepfill.attention")}
    f, b = _features(2, 9, *size), _features(2, 9, *size, name="background")
    mask = _mask(2, 1, size[0] // 2 * pixels, size[1] // 2 * pixels)
    for args in ((f, b, mask), (f, f, mask), (f, f, torch.zeros_like(mask)), (f, f, torch.ones_like(mask)), (f, f)):
        _assert_equal_by_the_rule(module, *args)


@pytest.mark.parametrize(
    ("port", "build", "pixels"),
    [
        ("ca_daa", foreign.WithFlow, 8),
        ("ca_nip", foreign.Maybe, 8),
        ("ca_nip_tf", foreign.Aligned, 8),
        ("ca_mma", foreign.Normalised, 2),
    ],
)
def test_the_ports_own_numbers(port, build, pixels):
    """Modules that have neither the ports' classes nor ours give the ports' numbers."""
    case = json.loads((GOLDEN / port / "case.json").read_text())
    tensors = load_file(GOLDEN / port / "tensors.safetensors")
    checked = 0
    for name in ("soft_batch", "zero_patch"):
        run = case["runs"][name]
        made = {"softmax_scale": run["SCALE"]}
        made |= {"fuse_kernel_size": 3 if run["FUSE"] else 1} if build is foreign.Normalised else {"fuse": run["FUSE"]}
        module = irt.accelerate(build(**made).eval(), strict=True)
        f = _golden_input(run["inputs"]["f"])
        mask = tensors[f"{name}.mask"].float()
        if pixels == 2:
            mask = F.interpolate(mask, size=f.shape[2:])
        out = _call(module, f, f, mask)
        out = out[0] if isinstance(out, tuple) else out
        assert why_original(module, (f, f, mask), {}) == ""
        assert_close_to_truth(out, tensors[f"{name}.out64"], tensors[f"{name}.out"], context=f"{port} {name}")
        checked += 1
    assert checked == 2


def _golden_input(spec):
    x = recipe.image(spec["name"], *spec["shape"])
    if spec["kind"] == "soft":
        return (x - 0.5) * 0.0625
    x = torch.clamp_min(x - 0.5, 0) * 0.125  # a patch of zeros among non-negative features
    x[:, :, 2:9, 3:14] = 0
    return x


def test_batches_share_a_mask_where_the_module_does():
    f, mask = _features(2, 6, 16, 16), torch.zeros(2, 1, 64, 64)
    mask[0, :, :32], mask[1, :, :, 40:] = 1, 1
    own = torch.cat([mask[1:], mask[1:]])
    for build, shares in ((foreign.Attention, True), (foreign.Faithful, False)):
        module = irt.accelerate(build().eval())
        both, second = _assert_equal_by_the_rule(module, f, f, mask), _assert_equal_by_the_rule(module, f, f, own)
        both, second = (t[0] if isinstance(t, tuple) else t for t in (both, second))
        assert torch.allclose(both[1], second[1]) != shares


def test_a_changed_attribute_is_another_form():
    """What a module computes is asked again when a number of it changes, and remembered per number."""
    module, f = irt.accelerate(foreign.Maybe().eval()), _features(1, 6, 12, 16)
    before = _assert_equal_by_the_rule(module, f, f)[0]
    module.fuse = False
    after = _assert_equal_by_the_rule(module, f, f)[0]
    assert not torch.allclose(before, after)
    module.fuse, module.softmax_scale = True, 2.0
    _assert_equal_by_the_rule(module, f, f)
    module.fuse_weight.mul_(2)
    assert "not the identity" in why_original(module, (f, f), {})


def test_modules_of_one_class_keep_their_own_numbers():
    f = _features(1, 6, 12, 16)
    for scale, fuse in itertools.product((1.0, 10.0), (True, False)):
        _assert_equal_by_the_rule(irt.accelerate(foreign.Attention(softmax_scale=scale, fuse=fuse).eval()), f, f)


# ---- second outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [foreign.WithFlow, lambda: foreign.Maybe(return_flow=True), foreign.Normalised])
def test_second_outputs_are_the_originals_when_somebody_reads_them(build, monkeypatch):
    module = irt.accelerate(build().eval())
    original, calls = type(module).__mro__[1], []
    plain = original.forward
    monkeypatch.setattr(original, "forward", lambda self, *args: (calls.append(1), plain(self, *args))[1])
    f = _features(2, 6, 16, 24)
    mask = _mask(2, 1, *(16, 24) if build is foreign.Normalised else (64, 96))
    expected = plain(module, f, f, mask)[1]
    with torch.no_grad():
        second = module(f, f, mask)[1]
    assert not calls, "nobody has read it"
    assert isinstance(second, Deferred)
    assert (second.shape, second.stride(), second.dtype, second.device) == (
        expected.shape, expected.stride(), expected.dtype, expected.device,
    )  # fmt: skip
    f.mul_(3)  # the inputs of that call were copied
    assert torch.equal(second.argmax(1), expected.argmax(1))
    assert calls == [1]
    assert torch.equal(second + 0, expected)
    assert type(second + 0) is torch.Tensor
    assert calls == [1], "made once"
    assert torch.equal(pickle.loads(pickle.dumps(second)), expected)
    assert torch.equal(torch.from_numpy(second.numpy()), expected)
    assert torch.equal(copy.deepcopy(second), expected)
    assert second.tolist() == expected.tolist()
    assert repr(second) == repr(expected)
    assert second.data_ptr() != 0
    assert second.sum().item() == expected.sum().item()


def test_all_weights_under_gradients_are_the_originals():
    module, f = irt.accelerate(foreign.Normalised().eval()), _features(1, 4, 8, 8).requires_grad_()
    assert "gradients" in why_original(module, (f, f), {})
    module(f, f)[1].square().sum().backward()
    assert f.grad.abs().sum() > 0
    flow = irt.accelerate(foreign.WithFlow().eval())
    assert why_original(flow, (f, f), {}) == "", "a picture has no gradients"
    flow(f, f)[0].sum().backward()


# ---- what attention is not swapped, and what calls run the original -------------------------------------------------


class _Clamped(foreign.Attention):
    """Weights have a floor, as in PEN-Net and CTSDG."""

    def blend(self, scores, usable):
        return super().blend(scores, usable).clamp_min(1e-4)


class _MaskedByANumber(foreign.Attention):
    """Masked keys have a low logit, so that a sample with nothing but a hole gets the mean of all patches."""

    def blend(self, scores, usable):
        return torch.softmax(torch.where(usable > 0, scores, -1000.0) * self.softmax_scale, 1)


class _Halved(foreign.Attention):
    def paste(self, weights, patches, shape):
        return super().paste(weights, patches, shape) / 2


class _TwoInputs(nn.Module):
    """Matches the second input with itself and has no mask: another module with the same attributes."""

    def __init__(self):
        super().__init__()
        self.kernel_size, self.stride, self.rate, self.softmax_scale = 3, 1, 2, 10.0

    def forward(self, background, foreground):
        return background * torch.sigmoid(foreground)


class _OneInput(_TwoInputs):
    def forward(self, x):
        return torch.softmax(x * self.softmax_scale, 1)


@pytest.mark.parametrize("build", [_Clamped, _MaskedByANumber, _Halved, _TwoInputs], ids=lambda b: b.__name__)
def test_look_alikes_of_attention_are_refused(build):
    _refused(build(), "none of the known forms")


def test_a_look_alike_that_is_called_otherwise_is_refused():
    _refused(_OneInput(), "cannot run as (features, features, mask)")


def test_modules_with_weights_or_without_evidence_are_no_attention():
    class Weighted(foreign.Attention):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(4, 4, 1)

    class Other(nn.Module):
        rate = 2

    for module in (Weighted(), Other(), nn.Softmax()):
        irt.accelerate(module.eval(), strict=True)
        assert "No module was recognised" in str(irt.explain(module))


def test_another_kernel_than_the_identity_is_refused():
    module = foreign.Maybe()
    module.fuse_weight[0, 0, 0, 2] = 0.5
    _refused(module, "not the identity")


def test_a_second_output_of_unknown_kind_is_refused():
    class Told(foreign.Attention):
        def forward(self, f, b, mask=None):
            out, weights = self.attend(f, b, mask)
            return out, weights.mean((2, 3), keepdim=True)

    class Worded(foreign.Attention):
        def forward(self, f, b, mask=None):
            return self.attend(f, b, mask)[0], "done"

    _refused(Told(), "neither a flow picture nor all weights")
    _refused(Worded(), "returns a str")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((_features(1, 4, 9, 8), _features(1, 4, 9, 8)), "multiples of 2"),
        ((_features(1, 4, 8, 8), _features(1, 4, 16, 8)), "features differ"),
        ((_features(2, 4, 8, 8), _features(2, 4, 8, 8), _mask(2, 1, 16, 16)), "4 pixels per cell"),
        ((_features(1, 4, 8, 8), _features(1, 4, 8, 8), _mask(1, 1, 30, 32)), "pixels per cell"),
        ((_features(1, 4, 8, 8), _features(1, 4, 8, 8), _mask(1, 3, 32, 32)), "not one tensor (B, 1, H, W)"),
        ((_features(1, 4, 8, 8).half(), _features(1, 4, 8, 8).half()), "float16"),
        ((_features(4, 8, 8), _features(4, 8, 8)), "other arguments"),
        ((_features(1, 4, 8, 8),), "other arguments"),
    ],
)
def test_odd_calls_of_attention_are_the_originals_business(args, why):
    module = foreign.Maybe().eval()
    expected = _result(module, *args)
    irt.accelerate(module, strict=True)
    assert why in why_original(module, args, {})
    got = _result(module, *args)
    assert str(got) == str(expected)
    if not isinstance(expected, str):
        assert all(torch.equal(a, b) for a, b in zip(flat_tensors(got), flat_tensors(expected), strict=True))


def _result(module, *args):
    try:
        return _call(module, *args)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def test_one_mask_for_several_samples_is_refused_where_each_has_its_own():
    f = _features(2, 4, 8, 8)
    assert "1 masks for 2 samples" in why_original(
        irt.accelerate(foreign.Normalised().eval()), (f, f, _mask(1, 1, 8, 8)), {}
    )
    _assert_equal_by_the_rule(irt.accelerate(foreign.Attention().eval()), f, f, _mask(1, 1, 32, 32))


def test_ties_that_linspace_rounds_otherwise_run_the_original():
    """54 rows of features are the first size at which torch.linspace and TensorFlow take other rows."""
    exact, rounded = (irt.accelerate(build().eval()) for build in (foreign.Faithful, foreign.Aligned))
    assert not attention.form_of(exact).rounds_like_linspace
    assert attention.form_of(rounded).rounds_like_linspace
    for rows, fine in ((52, True), (54, False), (58, False)):
        f = _features(1, 4, rows, 4)
        assert (why_original(rounded, (f, f), {}) == "") == fine
        _assert_equal_by_the_rule(exact, f, f)
    assert "ties" in why_original(rounded, (f, f), {})


def test_keywords_and_hooks_on_attention():
    module, f = irt.accelerate(foreign.Maybe().eval()), _features(1, 4, 8, 8)
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    with dispatch.launches() as heard:
        _call(module, f, f)
    assert seen == [f.shape]
    assert [launch.op for launch in heard] == ["contextual_attention"]
    handle.remove()
    with dispatch.launches() as heard, torch.no_grad():
        module(f, f, mask=_mask(1, 1, 32, 32))
    assert not heard, "keyword arguments are the original's"
    module.train()
    assert "training" in why_original(module, (f, f), {})


def test_attention_passes_gradients(form):
    module, pixels = form
    f, b = (_features(1, 4, 8, 12, name=n).requires_grad_() for n in "fb")
    mask = _mask(1, 1, 4 * pixels, 6 * pixels)

    def gradients():
        out = module(f, b, mask)
        return torch.autograd.grad((out[0] if isinstance(out, tuple) else out).square().sum(), (f, b))

    fast = gradients()
    with irt.disabled():
        base = gradients()
    for got, expected in zip(fast, base, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_attention_compiles():
    for build in (foreign.Maybe, foreign.Resized):
        module, mask = irt.accelerate(build().eval()), _mask(1, 1, 64, 64)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
        for rows in (16, 20):
            f = _features(1, 4, rows, 16)
            mask = _mask(1, 1, 4 * rows, 64)
            with dispatch.launches() as heard:
                got = flat_tensors(_call(compiled, f, f, mask))
            assert [launch.op for launch in heard] == ["contextual_attention"]
            assert torch.equal(got[0], flat_tensors(_call(module, f, f, mask))[0])


def test_trials_leave_no_trace():
    module = foreign.Maybe()
    calls = []
    module.register_forward_pre_hook(lambda *args: calls.append(1))
    before, rng = dict(vars(module)), torch.get_rng_state()
    irt.accelerate(module, strict=True)
    irt.restore(module)
    assert dict(vars(module)) == before
    assert module.training
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(rng, torch.get_rng_state())
    assert not calls


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
    assert _swapped(layer) == {("", "deepfill.gated")}
    if any(isinstance(m, nn.Conv2d) and m.out_channels == 3 for m in layer.modules()) and not hasattr(
        layer, "gate_act"
    ):
        with dispatch.launches():  # a picture without gates may have no op of ours at this size
            _assert_close(layer, x)
    else:
        _assert_equal_by_the_rule(layer, x)
        circular = any(getattr(m, "padding_mode", "") == "circular" for m in layer.modules())
        circular = circular or any(isinstance(m, nn.CircularPad2d) for m in layer.modules())
        assert ("gated_activation" if circular else "gated_conv2d") in irt.explain(layer, x).rows[0]["op"]
    report = irt.verify(layer, x)
    assert report.ok, str(report)


def _assert_close(layer, x):
    assert why_original(layer, (x,), {}) == ""
    torch.testing.assert_close(_call(layer, x), _original(layer, x), rtol=1e-4, atol=1e-5)


def test_gated_convolutions_keep_layouts(layer):
    x = recipe.image("gated", 2, 6, 20, 24).contiguous(memory_format=torch.channels_last)
    expected = _call(layer, x)
    got = _call(irt.accelerate(layer), x)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gated_convolutions_follow_their_weights(layer):
    x = recipe.image("gated", 1, 6, 20, 24)
    irt.accelerate(layer)
    with torch.no_grad():
        for p in layer.parameters():
            before = _call(layer, x)
            p.data.numpy().__imul__(-1.5)
            _assert_close(layer, x)
            assert not torch.equal(before, _call(layer, x))


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
    model, (x, mask) = _generator(attention=foreign.WithFlow), _image()
    expected = _original(model, x, mask)
    irt.accelerate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _call(model, x, mask)
    single = _call(irt.accelerate(model, precision="bf16"), x, mask)
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
    torch.testing.assert_close(_call(compiled, x), _call(layer, x))


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
    expected = _original(module, x)
    irt.accelerate(module, strict=True)
    assert _swapped(module) == {(path, "deepfill.gated")}
    torch.testing.assert_close(_call(module, x), expected, rtol=1e-4, atol=1e-5)


def test_spectral_norm_keeps_iterating():
    """Each forward takes one step of the power iteration, in eval mode, too: outputs and vectors go the original's way."""
    module = recipe.fill(foreign.Twofold(6, 4, 3, padding=1, sn=True)).eval()
    twin, x = copy.deepcopy(module), recipe.image("gated", 1, 6, 20, 24)
    before = {name: p.clone() for name, p in module.named_parameters()}
    irt.accelerate(module, strict=True)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters()), "trials work on copies"
    outputs = []
    for _ in range(3):
        outputs.append(_call(module, x))
        torch.testing.assert_close(outputs[-1], _call(twin, x), rtol=1e-4, atol=1e-5)
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
    _assert_equal_by_the_rule(module, x)
    hooked = foreign.Halves(6, 4, 3)
    nn.utils.spectral_norm(hooked.conv)
    _refused(hooked, "made by a hook")


@pytest.mark.parametrize("name", ["gconv_csq", "gconv_nip", "gconv_nip_tf", "gconv_mma", "gconv_zhao"])
def test_the_ports_own_gated_layers(name):
    case = json.loads((GOLDEN / name / "case.json").read_text())
    tensors = load_file(GOLDEN / name / "tensors.safetensors")
    layers = recipe.fill(nn.ModuleDict(_GOLDEN_LAYERS[name]())).eval()
    plain = copy.deepcopy(layers)
    irt.accelerate(layers, strict=True)
    assert {path.split(".")[0] for path, _ in _swapped(layers)} == set(layers)
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
            out = _call(module, x)
        # The float32 run of the machine that made the case is not this one's: both originals count.
        base = max((tensors[f"{run}.out"], _call(original, x)), key=lambda t: (t - truth).abs().max())
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
    _refused(build(), "computes none of")


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
    _refused(build(), why)


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
        assert "it has the parts of a convolution, but computes none of act(f)" in _why_not(module)
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
    assert _swapped(module) == {("", "deepfill.convolution")}
    _assert_equal_by_the_rule(module, x)


def test_sizes_that_padding_does_not_allow_are_the_originals_business():
    layer, x = foreign.Simple(6, 4, 3, rate=4).eval(), recipe.image("gated", 1, 6, 4, 9)
    expected = _result(layer, x)
    irt.accelerate(layer, strict=True)
    assert "smaller than reflect padding" in why_original(layer, (x,), {})
    assert _result(layer, x) == expected


# ---- composited -----------------------------------------------------------------------------------------------------


def _generator(**options):
    made = options.pop("attention", foreign.Maybe)()
    return recipe.fill(foreign.TwoStages(made, **options)).eval()


def _image(rows=96, columns=128, batch=1):
    picture = recipe.image("picture", batch, 3, rows, columns) * 2 - 1
    mask = torch.zeros(batch, 1, rows, columns)
    for i in range(batch):
        mask[i, :, 40 + 8 * i : 51, 60:71] = 1
    return torch.cat([picture * (1 - mask), torch.ones_like(mask), mask], 1), mask


def _queries(run):
    """The queries of each attention that `run()` starts."""
    found = []

    def listen(op, backend, args):
        if op == "contextual_attention":
            found.append(args[-1])

    dispatch.observers.append(listen)
    try:
        run()
    finally:
        dispatch.observers.remove(listen)
    return found


def test_a_strangers_generator():
    x, mask = _image(batch=2)
    for made in (foreign.Maybe, foreign.WithFlow, foreign.Resized, foreign.Normalised):
        model = _generator(attention=made, reduced=made is foreign.Normalised)
        expected = _original(model, x, mask)
        irt.accelerate(model, strict=True)
        kinds = [name for _, name in _swapped(model)]
        assert (kinds.count("deepfill.attention"), kinds.count("deepfill.gated")) == (1, 33)
        got = _call(model, x, mask)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a + 0, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "call"),
    [
        (foreign.Maybe, "image, ones and mask, mask"),
        (foreign.WithFlow, "image, mask"),
        (foreign.Faithful, "ones, in one tensor"),
    ],
)
def test_only_what_reaches_the_hole_is_computed(attention, call):
    model = _generator(attention=attention, call=call)
    x, mask = _image(batch=2)
    args = {"image, mask": (x[:, :3], mask), "ones, in one tensor": (x,)}.get(call, (x, mask))
    irt.accelerate(model)
    (everywhere,) = _queries(lambda: _call(model, *args))
    assert everywhere is None
    expected = _call(model, *args)[1]
    deepfill.restrict(model.modules())
    (some,) = _queries(lambda: _call(model, *args))
    assert 0 < some[0].sum() < 0.6 * some[0].numel()
    assert some[0].sum() > some[1].sum(), "each sample's own hole"
    got = _call(model, *args)[1]
    hole = mask.expand_as(got) != 0
    torch.testing.assert_close(got[hole], expected[hole], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, expected, rtol=1e-4, atol=1e-5), "elsewhere it is not what it was"
    assert any("23, 23, 23 and 23 pixels" in note for note in irt.explain(model).notes)
    irt.restore(model)
    assert not any("composited" in note for note in irt.explain(model).notes)


def test_reach_is_neither_too_short_nor_too_long():
    """NaN in the cells that are left out never shows in the composite; with one pixel less of reach it does."""
    model = _generator()
    x, _ = _image()
    irt.accelerate(model)
    deepfill.restrict(model.modules())
    reach = record_of(model.contextual_attention).adapter.reach
    assert reach == attention.Reach(8, 23, 23, 23, 23)
    shorter = attention.Reach(8, 22, 22, 22, 22)
    shows = {}
    for r, holes in ((reach, range(8)), (shorter, range(8))):
        shows[r] = False
        for offset in holes:  # a hole of one pixel at every place within a cell
            mask = torch.zeros(1, 1, 96, 128)
            mask[..., 40 + offset, 64 + offset] = 1
            left_out = ~r.queries(mask).repeat_interleave(2, 2).repeat_interleave(2, 3)

            def spoil(module, args, out, left_out=left_out):
                return out[0].masked_fill(left_out, torch.nan), out[1]

            handle = model.contextual_attention.register_forward_hook(spoil)
            with irt.disabled():
                out = _call(model, x, mask)[1]
            handle.remove()
            shows[r] |= bool((out * mask).masked_select(mask != 0).isnan().any())
    assert shows == {reach: False, shorter: True}


def test_masks_that_do_not_tell_each_hole_get_all_cells():
    model = _generator()
    irt.accelerate(model)
    deepfill.restrict(model.modules())
    x, mask = _image(batch=2)
    assert _queries(lambda: _call(model, x, mask[:1])) == [None]
    f = _features(1, 8, 12, 16)
    assert _queries(lambda: _call(model.contextual_attention, f, f)) == [None]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attention": foreign.Normalised, "reduced": True}, "not given the mask itself"),
        ({"beside": "norm"}, "depends on all of it"),
        ({"beside": "features"}, "no image"),
    ],
)
def test_composited_has_no_effect_where_reach_is_unknown(options, why):
    model = _generator(**options)
    irt.accelerate(model)
    deepfill.restrict(model.modules())
    (note,) = [note for note in irt.explain(model).notes if "composited" in note]
    assert note.startswith("contextual_attention: composited=True has no effect")
    assert why in note
    assert _queries(lambda: _call(model, *_image())) == [None]


def test_composited_needs_a_generator_and_one_attention():
    alone = irt.accelerate(foreign.Maybe().eval())
    deepfill.restrict(alone.modules())
    assert "has no effect" in record_of(alone).note
    pair = irt.accelerate(nn.ModuleList([_generator().contextual_attention, foreign.Attention()]).eval())
    deepfill.restrict(pair.modules())
    assert "2 attention modules" in record_of(pair[0]).note


def test_accelerate_passes_the_promise_on():
    model = _generator()
    irt.accelerate(model, composited=True)
    assert record_of(model.contextual_attention).adapter.reach == attention.Reach(8, 23, 23, 23, 23)
    irt.accelerate(model)
    assert _queries(lambda: _call(model, *_image())) == [None]
    assert not any("composited" in note for note in irt.explain(model).notes)


@pytest.mark.parametrize("attention", [foreign.WithFlow, foreign.Resized, foreign.Maybe, foreign.Normalised])
def test_verify_judges_strangers_generators(attention):
    model = irt.accelerate(_generator(attention=attention, reduced=attention is foreign.Normalised))
    report = irt.verify(model, *_image())
    assert report.ok, str(report)
    layer = irt.accelerate(recipe.fill(foreign.Doubled(6, 4, 3, padding=1, sn=True)).eval())
    report = irt.verify(layer, recipe.image("gated", 1, 6, 10, 12))
    assert report.ok, str(report)


def test_measuring_changes_nothing():
    model = _generator()
    irt.accelerate(model)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    deepfill.restrict(model.modules())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert modes == [m.training for m in model.modules()]


# ---- our own networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "port", "gates"),
    [("deepfill_v2", "nip", 40), ("deepfill_v2", "nip_tf", 40), ("deepfill_v2", "mma", 42), ("deepfill_v2", "csq", 42),
     ("deepfill_v1", "daa", 0)],
)  # fmt: skip
def test_reference_networks(family, port, gates):
    model = recipe.fill(irt.models.create(family, port=port, width=4)).eval()
    x, mask = recipe.image("picture", 1, 3, 96, 128), _image()[1]
    expected = _original(model, x, mask)
    irt.accelerate(model, strict=True)
    kinds = [name for _, name in _swapped(model)]
    assert (kinds.count("deepfill.attention"), kinds.count("deepfill.gated")) == (1, gates)
    whole = _call(copy.deepcopy(model), x, mask)
    for a, b in zip(whole, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    deepfill.restrict(model.modules())
    assert any("23, 23, 23 and 23 pixels" in note for note in irt.explain(model).notes)
    some, hole = _call(model, x, mask)[1], mask.expand_as(whole[1]) != 0
    torch.testing.assert_close(some[hole], whole[1][hole], rtol=1e-5, atol=1e-6)

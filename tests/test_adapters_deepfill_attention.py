"""Strangers' contextual attention is recognised, swapped or refused, and stays what it is."""

from __future__ import annotations

import copy
import itertools
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import inpaintrt as irt
from inpaintrt.adapters import contextual_attention as attention
from inpaintrt.adapters.deferred import Deferred
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.swap import why_original
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.compare import flat_tensors

from . import deepfill_swaps as swaps
from . import foreign_deepfill as foreign

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
    assert swaps.swapped(module) == {("", "deepfill.attention")}
    f, b = swaps.features(2, 9, *size), swaps.features(2, 9, *size, name="background")
    mask = swaps.mask(2, 1, size[0] // 2 * pixels, size[1] // 2 * pixels)
    for args in ((f, b, mask), (f, f, mask), (f, f, torch.zeros_like(mask)), (f, f, torch.ones_like(mask)), (f, f)):
        swaps.assert_equal_by_the_rule(module, *args)


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
    case = json.loads((swaps.GOLDEN / port / "case.json").read_text())
    tensors = load_file(swaps.GOLDEN / port / "tensors.safetensors")
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
        out = swaps.call(module, f, f, mask)
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
    f, mask = swaps.features(2, 6, 16, 16), torch.zeros(2, 1, 64, 64)
    mask[0, :, :32], mask[1, :, :, 40:] = 1, 1
    own = torch.cat([mask[1:], mask[1:]])
    for build, shares in ((foreign.Attention, True), (foreign.Faithful, False)):
        module = irt.accelerate(build().eval())
        both, second = (
            swaps.assert_equal_by_the_rule(module, f, f, mask),
            swaps.assert_equal_by_the_rule(module, f, f, own),
        )
        both, second = (t[0] if isinstance(t, tuple) else t for t in (both, second))
        assert torch.allclose(both[1], second[1]) != shares


def test_a_changed_attribute_is_another_form():
    """What a module computes is asked again when a number of it changes, and remembered per number."""
    module, f = irt.accelerate(foreign.Maybe().eval()), swaps.features(1, 6, 12, 16)
    before = swaps.assert_equal_by_the_rule(module, f, f)[0]
    module.fuse = False
    after = swaps.assert_equal_by_the_rule(module, f, f)[0]
    assert not torch.allclose(before, after)
    module.fuse, module.softmax_scale = True, 2.0
    swaps.assert_equal_by_the_rule(module, f, f)
    module.fuse_weight.mul_(2)
    assert "not the identity" in why_original(module, (f, f), {})


def test_modules_of_one_class_keep_their_own_numbers():
    f = swaps.features(1, 6, 12, 16)
    for scale, fuse in itertools.product((1.0, 10.0), (True, False)):
        swaps.assert_equal_by_the_rule(irt.accelerate(foreign.Attention(softmax_scale=scale, fuse=fuse).eval()), f, f)


# ---- second outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [foreign.WithFlow, lambda: foreign.Maybe(return_flow=True), foreign.Normalised])
def test_second_outputs_are_the_originals_when_somebody_reads_them(build, monkeypatch):
    module = irt.accelerate(build().eval())
    original, calls = type(module).__mro__[1], []
    plain = original.forward
    monkeypatch.setattr(original, "forward", lambda self, *args: (calls.append(1), plain(self, *args))[1])
    f = swaps.features(2, 6, 16, 24)
    mask = swaps.mask(2, 1, *(16, 24) if build is foreign.Normalised else (64, 96))
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
    module, f = irt.accelerate(foreign.Normalised().eval()), swaps.features(1, 4, 8, 8).requires_grad_()
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
    swaps.refused(build(), "none of the known forms")


def test_a_look_alike_that_is_called_otherwise_is_refused():
    swaps.refused(_OneInput(), "cannot run as (features, features, mask)")


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
    swaps.refused(module, "not the identity")


def test_a_second_output_of_unknown_kind_is_refused():
    class Told(foreign.Attention):
        def forward(self, f, b, mask=None):
            out, weights = self.attend(f, b, mask)
            return out, weights.mean((2, 3), keepdim=True)

    class Worded(foreign.Attention):
        def forward(self, f, b, mask=None):
            return self.attend(f, b, mask)[0], "done"

    swaps.refused(Told(), "neither a flow picture nor all weights")
    swaps.refused(Worded(), "returns a str")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((swaps.features(1, 4, 9, 8), swaps.features(1, 4, 9, 8)), "multiples of 2"),
        ((swaps.features(1, 4, 8, 8), swaps.features(1, 4, 16, 8)), "features differ"),
        ((swaps.features(2, 4, 8, 8), swaps.features(2, 4, 8, 8), swaps.mask(2, 1, 16, 16)), "4 pixels per cell"),
        ((swaps.features(1, 4, 8, 8), swaps.features(1, 4, 8, 8), swaps.mask(1, 1, 30, 32)), "pixels per cell"),
        (
            (swaps.features(1, 4, 8, 8), swaps.features(1, 4, 8, 8), swaps.mask(1, 3, 32, 32)),
            "not one tensor (B, 1, H, W)",
        ),
        ((swaps.features(1, 4, 8, 8).half(), swaps.features(1, 4, 8, 8).half()), "float16"),
        ((swaps.features(4, 8, 8), swaps.features(4, 8, 8)), "other arguments"),
        ((swaps.features(1, 4, 8, 8),), "other arguments"),
    ],
)
def test_odd_calls_of_attention_are_the_originals_business(args, why):
    module = foreign.Maybe().eval()
    expected = swaps.result(module, *args)
    irt.accelerate(module, strict=True)
    assert why in why_original(module, args, {})
    got = swaps.result(module, *args)
    assert str(got) == str(expected)
    if not isinstance(expected, str):
        assert all(torch.equal(a, b) for a, b in zip(flat_tensors(got), flat_tensors(expected), strict=True))


def test_one_mask_for_several_samples_is_refused_where_each_has_its_own():
    f = swaps.features(2, 4, 8, 8)
    assert "1 masks for 2 samples" in why_original(
        irt.accelerate(foreign.Normalised().eval()), (f, f, swaps.mask(1, 1, 8, 8)), {}
    )
    swaps.assert_equal_by_the_rule(irt.accelerate(foreign.Attention().eval()), f, f, swaps.mask(1, 1, 32, 32))


def test_ties_that_linspace_rounds_otherwise_run_the_original():
    """54 rows of features are the first size at which torch.linspace and TensorFlow take other rows."""
    exact, rounded = (irt.accelerate(build().eval()) for build in (foreign.Faithful, foreign.Aligned))
    assert not attention.form_of(exact).rounds_like_linspace
    assert attention.form_of(rounded).rounds_like_linspace
    for rows, fine in ((52, True), (54, False), (58, False)):
        f = swaps.features(1, 4, rows, 4)
        assert (why_original(rounded, (f, f), {}) == "") == fine
        swaps.assert_equal_by_the_rule(exact, f, f)
    assert "ties" in why_original(rounded, (f, f), {})


def test_keywords_and_hooks_on_attention():
    module, f = irt.accelerate(foreign.Maybe().eval()), swaps.features(1, 4, 8, 8)
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    with dispatch.launches() as heard:
        swaps.call(module, f, f)
    assert seen == [f.shape]
    assert [launch.op for launch in heard] == ["contextual_attention"]
    handle.remove()
    with dispatch.launches() as heard, torch.no_grad():
        module(f, f, mask=swaps.mask(1, 1, 32, 32))
    assert not heard, "keyword arguments are the original's"
    module.train()
    assert "training" in why_original(module, (f, f), {})


def test_attention_passes_gradients(form):
    module, pixels = form
    f, b = (swaps.features(1, 4, 8, 12, name=n).requires_grad_() for n in "fb")
    mask = swaps.mask(1, 1, 4 * pixels, 6 * pixels)

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
        module, mask = irt.accelerate(build().eval()), swaps.mask(1, 1, 64, 64)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
        for rows in (16, 20):
            f = swaps.features(1, 4, rows, 16)
            mask = swaps.mask(1, 1, 4 * rows, 64)
            with dispatch.launches() as heard:
                got = flat_tensors(swaps.call(compiled, f, f, mask))
            assert [launch.op for launch in heard] == ["contextual_attention"]
            assert torch.equal(got[0], flat_tensors(swaps.call(module, f, f, mask))[0])


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

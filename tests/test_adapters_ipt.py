"""IPT's transformer in its fused form: ours, and copies of other people's."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch.nn import parallel

import inpaintrt as irt
from inpaintrt import models
from inpaintrt.adapters import ipt_image
from inpaintrt.runtime.swap import record_of
from inpaintrt.testing import assert_close_to_truth, recipe

from . import foreign_ipt


def _trunk(**options):
    trunk = recipe.fill(foreign_ipt.Trunk(**options)).eval()
    with torch.no_grad():
        trunk.query_embed.weight *= 24  # so that the task matters
    return trunk


def _features(count=2):
    return recipe.image("features", count, 4, 12, 12) * 4 - 2


def _reason(model, *example):
    return next(row["why not"] for row in irt.explain(model, *example).rows if row["adapter"] == "ipt.body")


@pytest.mark.parametrize("count", [1, 2, 70])  # 70 patches: the hidden layer is made in parts
@torch.no_grad()
def test_a_copy_computes_the_same(count):
    trunk, x = _trunk(), _features(count)
    truth, base = copy.deepcopy(trunk).double()(x.double(), 2), trunk(x, 2)
    keys, before = list(trunk.state_dict()), x.clone()
    irt.accelerate(trunk)
    assert record_of(trunk).adapter.name == "ipt.body"
    out = trunk(x, query_idx=2)
    assert_close_to_truth(out, truth, base)
    assert out.stride() == base.stride()
    assert torch.equal(x, before)
    assert list(trunk.state_dict()) == keys
    assert not torch.allclose(trunk(x, 1), out, atol=1e-2)
    assert irt.verify(trunk, x, 2).ok
    assert torch.equal(irt.restore(trunk)(x, 2), base)


def test_memory_in_groups_and_gradients(monkeypatch):
    monkeypatch.setattr("inpaintrt.adapters.ipt._MEMORY", 1)
    trunk, x = _trunk(layers=3), _features()
    expected = trunk(x, 1)
    expected.square().sum().backward()
    wanted = [p.grad.clone() for p in trunk.parameters()]
    trunk.zero_grad()
    out = irt.accelerate(trunk)(x, 1)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for p, grad in zip(trunk.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(trunk(x, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bf16():
    trunk, x = _trunk(), _features()
    expected = trunk(x, 0)
    out = irt.accelerate(trunk, precision="bf16")(x, 0)
    assert out.dtype == torch.float32
    assert (out - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "none"}, "joined in another way"),
        ({"memory": "halved"}, "joined in another way"),
        ({"bias": True}, "has biases"),
        ({"layers": 0}, "lacks an encoder"),
    ],
)
def test_look_alikes_are_refused(options, message):
    trunk = irt.accelerate(_trunk(**options))
    assert record_of(trunk) is None
    assert message in _reason(trunk)


@torch.no_grad()
def test_calls_that_the_original_takes():
    trunk, x = _trunk(), _features()
    pair = trunk(x, 0, con=True)
    irt.accelerate(trunk)
    for got, expected in zip(trunk(x, 0, con=True), pair, strict=True):
        assert torch.equal(got, expected)
    assert "the number of a task alone" in _reason(trunk, x, 0, True)
    trunk.encoder.layers[1].order = "none"
    assert "not all of one kind" in _reason(trunk, x, 0)


@torch.no_grad()
def test_our_network():
    network = recipe.fill(models.create("ipt", tasks=("x2", "derain"), features=4, heads=2, layers=2, patch=24))
    x = recipe.image("photo", 1, 3, 31, 40) * 255
    truth, base = copy.deepcopy(network).double().forward_chop(x.double(), "x2"), network.forward_chop(x, "x2")
    irt.accelerate(network)
    assert record_of(network.body).adapter.name == "ipt.body"
    assert (network.tiled(x, "x2") - truth).abs().max() <= 4 * (base - truth).abs().max()
    assert irt.verify(network, x[..., :24, :24], "x2").ok


def _wrapper(**options):
    wrapper = recipe.fill(foreign_ipt.Wrapper(**options)).eval()
    with torch.no_grad():
        wrapper.model.body.query_embed.weight *= 24
    return wrapper


def _image_reason(model, *example):
    return next(row["why not"] for row in irt.explain(model, *example).rows if row["adapter"] == "ipt.image")


@pytest.mark.parametrize("at", [0, 1])
@torch.no_grad()
def test_a_wrapper_computes_every_patch_once(at):
    wrapper, x = _wrapper(), recipe.image("photo", 1, 3, 20, 31)
    truth, base = copy.deepcopy(wrapper).double()(x.double(), at), wrapper(x, at)
    irt.accelerate(wrapper)
    assert record_of(wrapper).adapter.name == "ipt.image"
    assert record_of(wrapper.model.body).adapter.name == "ipt.body"
    before = wrapper.model.calls
    out = wrapper(x, idx_scale=at)
    assert wrapper.model.calls - before == 4 * 8  # rows at 0, 3, 6, 8; columns at 0, 3, …, 18, 19
    assert wrapper.idx_scale == at
    assert (out - truth).abs().max() <= 4 * (base - truth).abs().max()
    assert irt.verify(wrapper, x, at).ok
    assert torch.equal(irt.restore(wrapper)(x, at), base)


@pytest.mark.parametrize("at", [0, 1])
@torch.no_grad()
def test_a_wrapper_that_asks_for_gpus_is_swapped_anywhere(at):
    """The public code names GPUs in its forward. Without one it cannot run, but what it computes is known."""
    wrapper, same, x = _wrapper(rule="gpu"), _wrapper(), recipe.image("photo", 1, 3, 20, 31)
    truth, base, before = copy.deepcopy(same).double()(x.double(), at), same(x, at), parallel.data_parallel
    irt.accelerate(wrapper)
    assert record_of(wrapper).adapter.name == "ipt.image"
    assert parallel.data_parallel is before
    assert (wrapper(x, at) - truth).abs().max() <= 4 * (base - truth).abs().max()


def test_only_the_trial_stays_where_the_weights_are(monkeypatch):
    def original(module, inputs, *rest):
        return "elsewhere"

    monkeypatch.setattr(parallel, "data_parallel", original)
    x, seen = torch.ones(2), []
    with ipt_image._on(x.device):
        assert x.cuda() is x
        assert torch.equal(parallel.data_parallel(torch.nn.Tanh(), x, range(2)), x.tanh())
        other = threading.Thread(target=lambda: seen.append(parallel.data_parallel(torch.nn.Tanh(), x, range(2))))
        other.start()
        other.join()
    assert seen == ["elsewhere"]
    assert parallel.data_parallel is original


@pytest.mark.parametrize("options", [{"rule": "plain"}, {"self_ensemble": True}])
@torch.no_grad()
def test_other_wrappers_keep_their_rule(options):
    wrapper, x = _wrapper(**options), recipe.image("photo", 1, 3, 24, 36)
    base = wrapper(x, 0)
    irt.accelerate(wrapper)
    assert record_of(wrapper) is None
    assert record_of(wrapper.model.body).adapter.name == "ipt.body"
    assert "another rule" in _image_reason(wrapper, x, 0) or "cannot run" in _image_reason(wrapper, x, 0)
    torch.testing.assert_close(wrapper(x, 0), base, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_calls_that_the_wrapper_takes_itself():
    wrapper, x = irt.accelerate(_wrapper()), recipe.image("photo", 1, 3, 20, 31)
    assert "place of a task" in _image_reason(wrapper, x, torch.tensor(0))
    wrapper.self_ensemble = True  # changed after it was accelerated
    assert "another rule" in _image_reason(wrapper, x, 0)

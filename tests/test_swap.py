"""The swapped module is the same module: everything that callers do with modules keeps working, and can be undone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import inpaintrt as irt
from inpaintrt.adapters import lama as adapter
from inpaintrt.runtime.swap import record_of
from inpaintrt.testing import recipe

from . import foreign_lama


@pytest.fixture
def model():
    return recipe.fill(irt.models.create("lama", n_blocks=1, base_width=4)).eval()


@pytest.fixture
def x():
    return torch.rand(1, 4, 24, 32)


@pytest.fixture
def fused(monkeypatch):
    """Counts fused forwards of generators."""
    calls = []
    original = adapter.GeneratorAdapter.forward
    monkeypatch.setattr(
        adapter.GeneratorAdapter, "forward", lambda self, m, x: (calls.append(m), original(self, m, x))[1]
    )
    return calls


def test_swap_and_restore_leave_no_trace(model, x):
    before = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    assert irt.accelerate(model) is model
    assert record_of(model.model) is not None
    assert list(model.state_dict()) == keys
    assert isinstance(model.model, nn.Sequential)
    assert type(model.model).__name__ == "Sequential"
    assert irt.restore(model) is model
    for name, m in model.named_modules():
        assert (type(m), dict(m.__dict__)) == before[name]


def test_accelerate_twice_is_once(model):
    irt.accelerate(model)
    cls = type(model.model)
    irt.accelerate(model)
    assert type(model.model) is cls
    irt.restore(model)
    assert type(model.model) is nn.Sequential


def test_disabled_and_restored_give_the_original_bits(model, x, fused):
    expected = model(x)
    irt.accelerate(model)
    fused.clear()
    with irt.disabled():
        assert torch.equal(model(x), expected)
    assert not fused
    model(x)
    assert len(fused) == 1
    irt.restore(model)
    assert torch.equal(model(x), expected)


def test_deepcopy_stays_fast_and_independent(model, x, fused):
    irt.accelerate(model)
    twin = copy.deepcopy(model)
    fused.clear()
    assert torch.equal(twin(x), model(x))
    assert len(fused) == 2
    assert fused[0] is twin.model
    with torch.no_grad():
        next(twin.parameters()).mul_(2)
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_saved_model_knows_nothing_of_us(model, x, how):
    expected = model(x)
    irt.accelerate(model.model)
    sequence = model.model
    if how == "pickle":
        data = pickle.dumps(sequence)
        loaded = pickle.loads(data)
    else:
        file = io.BytesIO()
        torch.save(sequence, file)
        data = file.getvalue()
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert type(loaded) is nn.Sequential
    assert record_of(loaded) is None
    assert b"_inpaintrt" not in data
    assert b"runtime.swap" not in data
    assert torch.equal(loaded(x), expected)
    assert record_of(sequence) is not None


def test_hooks_on_the_swapped_module_run(model, x, fused):
    irt.accelerate(model)
    seen = []
    model.model.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    fused.clear()
    model(x)
    assert seen == [(1, 3, 24, 32)]
    assert len(fused) == 1


def test_hooks_on_bypassed_children_bring_the_original_back(model, x, fused):
    expected = model(x)
    irt.accelerate(model)
    fused.clear()
    seen = []
    handle = model.model[5].conv1.register_forward_hook(lambda *a: seen.append(1))
    assert torch.equal(model(x), expected)
    assert seen == [1]
    assert not fused
    assert "hook" in irt.explain(model, x).rows[0]["why not"]
    handle.remove()
    model(x)
    assert len(fused) == 1


def test_global_hooks_bring_the_original_back(model, x, fused):
    irt.accelerate(model)
    fused.clear()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        model(x)
    finally:
        handle.remove()
    assert not fused


def test_training_mode_runs_the_original(model, x, fused):
    irt.accelerate(model)
    fused.clear()
    before = model.model[1].bn_l.running_mean.clone()
    model.train()(x)
    assert not fused
    assert not torch.equal(model.model[1].bn_l.running_mean, before), "batch norm learned"
    model.eval()
    model.model[1].bn_l.train()
    model(x)
    assert not fused, "one batch norm in training mode is enough"


def test_changed_weights_are_never_stale(model, x):
    irt.accelerate(model)
    model(x)
    for change in (
        lambda p: p.data.mul_(1.5),
        lambda p: p.data.copy_(torch.randn_like(p)),
        lambda p: p.detach().numpy().__imul__(0.5),
    ):
        for p in (model.model[5].conv1.ffc.convl2l.weight, model.model[5].conv1.bn_l.weight):
            change(p)
            fast = model(x)
            with irt.disabled():
                torch.testing.assert_close(fast, model(x), rtol=1e-4, atol=1e-5)
    state = {
        k: torch.randn_like(v) if v.is_floating_point() and "var" not in k else v for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    fast = model(x)
    with irt.disabled():
        torch.testing.assert_close(fast, model(x), rtol=1e-4, atol=1e-5)


def test_gradients_flow_to_original_parameters(model, x):
    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    base = gradients()
    irt.accelerate(model)
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, base[name], rtol=1e-3, atol=1e-4, msg=name)


def test_dtype_moves(model, x, fused):
    irt.accelerate(model)
    fused.clear()
    out = model.double()(x.double())
    assert out.dtype == torch.float64
    assert len(fused) == 1
    with pytest.raises(RuntimeError):
        model(x)  # the original's own error about mixed dtypes
    assert len(fused) == 1


def test_channels_last_input(model, x):
    expected = model(x)
    irt.accelerate(model)
    out = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_replicas_use_their_own_parameters(model, x):
    irt.accelerate(model)
    replica = model.model._replicate_for_data_parallel()
    assert record_of(replica) is not None
    assert type(replica) is type(model.model)


def test_trace_compile_and_export(model, x):
    irt.accelerate(model)
    expected = model(x)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((24, 32), (40, 16), (16, 48)):
        y = torch.rand(1, 4, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(y), model(y), rtol=1e-4, atol=1e-5)
    height, width = 8 * torch.export.Dim("height", min=2, max=64), 8 * torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({2: height, 3: width},), strict=False)
    y = torch.rand(1, 4, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(y), model(y), rtol=1e-4, atol=1e-5)


def test_bf16_autocast_and_precision(model, x):
    expected = model(x)
    irt.accelerate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cast = model(x)
    assert bool(cast.isfinite().all())
    irt.restore(model)
    irt.accelerate(model, precision="bf16")
    with torch.no_grad():
        out = model(x)
    assert out.dtype == torch.float32
    assert 0 < (out - expected).abs().max() < 0.1
    with pytest.raises(irt.UnsupportedError, match="overflow"):
        irt.accelerate(model, precision="fp16")


# ---- strangers ------------------------------------------------------------------------------------------------------


def test_foreign_copy_is_recognised(x, fused):
    model = recipe.fill(foreign_lama.Wrapper()).eval()
    image, mask = x[:, :3], (x[:, 3:] > 0.5).float()
    expected = model(image, mask)
    irt.accelerate(model, strict=True)
    fused.clear()
    torch.testing.assert_close(model(image, mask), expected, rtol=1e-4, atol=1e-5)
    assert len(fused) == 1
    report = irt.verify(model, image, mask)
    assert report.ok, str(report)


def test_blocks_and_single_layers_are_recognised_alone():
    for module in (foreign_lama.Residual(16, 0.5), foreign_lama.Layer(16, 16, 3, 0.75, 0.75, padding=1)):
        recipe.fill(module).eval()
        streams = (torch.randn(2, 8, 9, 6), torch.randn(2, 8, 9, 6))
        if isinstance(module, foreign_lama.Layer):
            streams = (torch.randn(2, 4, 9, 6), torch.randn(2, 12, 9, 6))
        expected = module(streams)
        irt.accelerate(module, strict=True)
        for got, base in zip(module(streams), expected, strict=True):
            torch.testing.assert_close(got, base, rtol=1e-4, atol=1e-5)
            assert got.stride() == base.stride()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gated": True}, "gated"),
        ({"lfu": True}, "LFU"),
        ({"padding_mode": "zeros"}, "reflected"),
        ({"fft_norm": "forward"}, "orthonormal"),
        ({"act": nn.ELU}, "ReLU"),
        ({"inline": True}, "inline"),
    ],
)
def test_options_without_a_fused_form_are_refused_with_the_reason(options, why):
    model = recipe.fill(foreign_lama.Wrapper(**options)).eval()
    irt.accelerate(model)
    assert not any(record_of(m) for m in model.modules() if isinstance(m, nn.Sequential))
    assert any(why in (row["why not"] or "") for row in irt.explain(model).rows), str(irt.explain(model))
    with pytest.raises(irt.UnsupportedError, match=why):
        irt.accelerate(model, strict=True)


def test_the_probe_catches_a_lookalike():
    """Same children and shapes, another function: structure alone would swap it."""

    class Lookalike(foreign_lama.Layer):
        def forward(self, x):
            local, wide = super().forward(x)
            return local, wide + 1e-3

    module = recipe.fill(Lookalike(16, 16, 3, 0.5, 0.5, padding=1)).eval()
    irt.accelerate(module)
    assert record_of(module) is None
    assert "another function" in irt.explain(module).rows[0]["why not"]
    irt.accelerate(module, probe=False)
    assert record_of(module) is not None


def test_the_probe_sees_what_zero_weights_hide():
    """With zeros in a norm, a model's own weights hide its path; recipe weights do not."""

    class Skips(foreign_lama.Layer):
        def forward(self, x):
            return self.act_l(self.bn_l(self.ffc(x)[0])), self.act_g(self.bn_g(self.ffc.convl2g(x[0])))

    module = recipe.fill(Skips(16, 16, 3, 0.5, 0.5, padding=1)).eval()
    nn.init.zeros_(module.ffc.convg2g.conv2.weight)
    irt.accelerate(module)
    assert record_of(module) is None


def test_the_probe_changes_nothing(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    model.train()
    irt.accelerate(model)
    assert model.training
    assert all(m.training for m in model.modules())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_instance_forwards_and_scripts_are_obstacles(model, x):
    model.model.forward = model.model.forward
    irt.accelerate(model)
    assert any("overridden on the instance" in (r["why not"] or "") for r in irt.explain(model).rows)
    scripted = torch.jit.trace(irt.models.create("lama", n_blocks=1, base_width=4), x)
    with pytest.raises(ValueError, match="TorchScript"):
        irt.accelerate(scripted)


def test_shared_modules_are_swapped_once(x):
    block = recipe.fill(foreign_lama.Residual(16, 0.5)).eval()
    pair = nn.Sequential(block, block)
    streams = (torch.randn(1, 8, 6, 6), torch.randn(1, 8, 6, 6))
    expected = pair(streams)
    irt.accelerate(pair)
    assert sum(record_of(m) is not None for m in pair.modules()) == 1
    for got, base in zip(pair(streams), expected, strict=True):
        torch.testing.assert_close(got, base, rtol=1e-4, atol=1e-4)

"""The swapped module is the same module: everything that callers do with modules keeps working, and can be undone."""

from __future__ import annotations

import copy
import io
import json
import pathlib
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import inpaintrt as irt
from inpaintrt.adapters import engine
from inpaintrt.adapters import lama as adapter
from inpaintrt.adapters.convolution import GENERIC
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.swap import record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe

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


def _pair(n_local, n_wide, *size):
    return torch.randn(2, n_local, *size), torch.randn(2, n_wide, *size)


def _call(module, *args):
    with torch.no_grad():
        out = module(*args)
    return out if isinstance(out, tuple) else (out,)


def _swapped(model):
    """What the family's adapters took; plain convolutions beside that are `test_adapters_convolution`'s."""
    found = {(path, m.__dict__["_inpaintrt"].adapter.name) for path, m in model.named_modules() if record_of(m)}
    return {(path, name) for path, name in found if name not in GENERIC}


def _assert_same(got, base):
    for a, b in zip(got, base, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.stride() == b.stride()


GENERATORS = {
    "released": {},
    "local Fourier unit": {"lfu": True, "width": 16},
    "no norms": {"norm": False},
    "no norms, local Fourier unit": {"norm": False, "lfu": True, "width": 16},
    "biased": {"bias": True},
    "zeros": {"padding_mode": "zeros"},
    "replicated": {"padding_mode": "replicate"},
    "circular": {"padding_mode": "circular"},
    "dilated": {"dilation": 2},
    "blocks of one tensor": {"joined_first": True},
    "tanh": {"end": (nn.Tanh,)},
    "no end": {"end": ()},
    "another activation": {"act": nn.ELU},
    "no activation": {"act": nn.Identity},
    "no gate": {"gated": None},
    "half": {"ratio": 0.5},
    "two levels": {"depth": 2},
    "one level, one block": {"depth": 1, "blocks": 1},
    "biased spectra": {"conv_bias": True},
}


@pytest.mark.parametrize("options", GENERATORS.values(), ids=GENERATORS)
def test_generators_of_strangers(options, fused):
    model = recipe.fill(foreign_lama.Wrapper(**options)).eval()
    image, mask = torch.rand(1, 3, 48, 48), torch.rand(1, 1, 48, 48).round()
    expected = _call(model, image, mask)
    irt.accelerate(model, strict=True)
    assert _swapped(model) == {("generator.model", "lama.generator")}
    fused.clear()
    _assert_same(_call(model, image, mask), expected)
    assert len(fused) == 1
    report = irt.verify(model, image, mask)
    assert report.ok, str(report)
    assert "fourier_unit" in irt.explain(model, image, mask).rows[0]["op"]


PARTS = {
    "ffc": (lambda: foreign_lama.Layer(16, 16, 3, 0.75, 0.75, padding=1), lambda: _pair(4, 12, 9, 6), "lama.ffc"),
    "ffc, bare": (lambda: foreign_lama.TwoStreams(16, 12, 3, 0.5, 0.25, padding=1), lambda: _pair(8, 8, 9, 6), "lama.ffc"),
    "ffc, strided": (
        lambda: foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1, stride=2), lambda: _pair(8, 8, 6, 10), "lama.ffc"
    ),
    "ffc, quarters": (
        lambda: foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1, lfu=True), lambda: _pair(8, 8, 6, 6), "lama.ffc"
    ),
    "ffc, quarters, strided": (
        lambda: foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1, lfu=True, stride=2), lambda: _pair(8, 8, 12, 12), "lama.ffc"
    ),
    "ffc, 1×1": (lambda: foreign_lama.Layer(16, 16, 1, 0.5, 0.5), lambda: _pair(8, 8, 1, 1), "lama.ffc"),
    "block": (lambda: foreign_lama.Residual(16, 0.5), lambda: _pair(8, 8, 9, 6), "lama.block"),
    "block, dilated": (lambda: foreign_lama.Residual(16, 0.5, dilation=3), lambda: _pair(8, 8, 9, 6), "lama.block"),
    "block, inline": (lambda: foreign_lama.Residual(16, 0.75, inline=True), lambda: torch.randn(2, 16, 9, 6), "lama.block"),
    "block, one tensor": (lambda: foreign_lama.OneTensor(16, 0.75, bias=True), lambda: torch.randn(2, 16, 9, 6), "lama.block"),
    "block, no norms": (lambda: foreign_lama.BareResidual(16, 0.5, bias=True), lambda: _pair(8, 8, 9, 6), "lama.block"),
    "spectral": (lambda: foreign_lama.Spectral(12, 8), lambda: torch.randn(2, 12, 5, 1), "lama.spectral"),
    "spectral, no norms": (lambda: foreign_lama.Spectral(8, 8, norm=False), lambda: torch.randn(2, 8, 7, 4), "lama.spectral"),
    "unit": (lambda: foreign_lama.Spectrum(6), lambda: torch.randn(2, 6, 7, 10), "lama.fourier_unit"),
    "unit, ours": (lambda: irt.models.lama.FourierUnit(6, 4), lambda: torch.randn(2, 6, 1, 1), "lama.fourier_unit"),
}  # fmt: skip


@pytest.fixture(params=PARTS, ids=str)
def part(request):
    build, inputs, adapter = PARTS[request.param]
    return recipe.fill(build()).eval(), inputs(), adapter


def test_parts_of_strangers(part):
    module, x, name = part
    expected = _call(module, x)
    irt.accelerate(module, strict=True)
    assert _swapped(module) == {("", name)}
    _assert_same(_call(module, x), expected)
    report = irt.verify(module, x)
    assert report.ok, str(report)
    (row,) = irt.explain(module, x).rows
    assert "fourier_unit" in row["op"]
    assert row["why not"] is None


def test_parts_keep_layouts(part):
    module, x, _ = part
    nhwc = tuple(t.contiguous(memory_format=torch.channels_last) for t in (x if isinstance(x, tuple) else (x,)))
    args = (nhwc if isinstance(x, tuple) else nhwc[0],)
    expected = _call(module, *args)
    _assert_same(_call(irt.accelerate(module), *args), expected)


def test_parts_follow_their_weights(part):
    """Whatever changes a weight in place, torch's counters seeing it or not."""
    module, x, _ = part
    irt.accelerate(module)
    changes = (lambda p: p.data.copy_(torch.rand_like(p)), lambda p: p.add_(0.25), lambda p: p.numpy().__imul__(0.5))
    with torch.no_grad():
        for change in changes:
            for p in (*module.parameters(), *(b for n, b in module.named_buffers() if "running" in n)):
                before = _call(module, x)
                change(p.detach())
                fast = _call(module, x)
                assert irt.explain(module, x).rows[0]["why not"] is None
                with irt.disabled():
                    base = _call(module, x)
                for a, b in zip(fast, base, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
                assert not all(torch.equal(a, b) for a, b in zip(fast, before, strict=True)) or _unused(base, before)


def _unused(base, before):
    """A weight that this input does not reach changes nothing in the original, either."""
    return all(torch.allclose(a, b) for a, b in zip(base, before, strict=True))


def test_parts_pass_gradients(part):
    module, x, _ = part
    flat = x if isinstance(x, tuple) else (x,)
    for t in flat:
        t.requires_grad_()

    def gradients():
        out = module(x)
        loss = sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))
        return torch.autograd.grad(loss, [*flat, *module.parameters()])

    base = gradients()
    irt.accelerate(module)
    for got, expected in zip(gradients(), base, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item()))


def test_parts_run_the_original_where_they_must(part):
    module, x, _ = part
    irt.accelerate(module)
    twin = copy.deepcopy(module)
    assert record_of(twin) is not None
    child = next(m for m in module.modules() if m is not module and isinstance(m, nn.Conv2d))
    seen = []
    handle = child.register_forward_hook(lambda *a: seen.append(1))
    _call(module, x)
    assert seen == [1]
    assert "hook" in irt.explain(module, x).rows[0]["why not"]
    handle.remove()
    _call(module, x)
    assert seen == [1, 1], "explain ran it once more"
    double = tuple(t.double() for t in x) if isinstance(x, tuple) else x.double()
    (row,) = irt.explain(twin.double(), double).rows
    assert "fourier_unit" in row["op"]
    assert row["why not"] is None
    module.train()
    assert "training" in irt.explain(module, x).rows[0]["why not"]


def test_parts_under_bf16(part):
    module, x, _ = part
    expected = _call(module, x)
    irt.accelerate(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _call(module, x)
    irt.accelerate(module, precision="bf16")
    for out, base in ((cast, expected), (_call(module, x), expected)):
        for a, b in zip(out, base, strict=True):
            assert (a.float() - b).abs().max() <= 0.05 * b.abs().max()
    assert all(a.dtype == b.dtype for a, b in zip(out, base, strict=True)), "precision='bf16' keeps the caller's dtype"
    with torch.autocast("cpu", dtype=torch.float16):
        assert "float16" in why_original(module, (x,), {})


@pytest.mark.parametrize("pays", [False, True])
def test_convolutions_under_bf16_go_where_they_are_faster(part, pays, monkeypatch):
    module, x, _ = part
    expected = _call(module, x)
    irt.accelerate(module)
    monkeypatch.setattr(engine, "_bf16_pays", lambda: pays)
    with torch.autocast("cpu", dtype=torch.bfloat16), dispatch.launches() as heard:
        out = _call(module, x)
    assert ("fused_conv2d" in {launch.op for launch in heard}) == (pays and _has_convolutions(module))
    for a, b in zip(out, expected, strict=True):
        assert (a.float() - b).abs().max() <= 0.05 * b.abs().max()


def _has_convolutions(module):
    """Fourier units alone have no other convolution."""
    return any(hasattr(m, "conv2") for m in module.modules())


def test_bf16_compiles_whole(model, x):
    irt.accelerate(model, precision="bf16")
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="eager")(x), model(x), rtol=0, atol=0.02
        )


def test_an_application_module_without_a_sequential():
    """Layers in a list or by name: the blocks are swapped, and what is added between them stays."""
    x, features = torch.rand(1, 4, 48, 48), torch.rand(1, 32, 12, 12)
    for model, args, paths in (
        (foreign_lama.Listed(), (x,), {"steps.5", "steps.6"}),
        (foreign_lama.Listed(lfu=True, width=16), (x,), {"steps.5", "steps.6"}),
        (foreign_lama.Wired(), (x,), {"middle.0", "middle.1"}),
        (foreign_lama.Wired(), (x, features), {"middle.0", "middle.1"}),
        (foreign_lama.Skip(), (torch.randn(1, 32, 8, 8),), {"block"}),
    ):
        recipe.fill(model).eval()
        expected = _call(model, *args)
        irt.accelerate(model, strict=True)
        assert _swapped(model) == {(path, "lama.block") for path in paths}
        _assert_same(_call(model, *args), expected)
        report = irt.verify(model, *args)
        assert report.ok, str(report)


# ---- the public implementation's numbers, from classes that are neither the public ones nor ours -------------------

GOLDEN = pathlib.Path(__file__).parent / "golden"
COVERED = {
    ("lama.ffc", ""): ("lfu16x16", "lfu12x12_r05", "stride2", "dilation2_bias", "identity_act", "m32"),
    ("lama.block", ""): ("resblock", "resblock_inline"),
    ("lama.spectral", "ffc.convg2g"): ("gated", "in1_out1"),
    ("", ""): ("in0_out075", "in075_out0", "local_only"),  # without a spectral path
}
ADAPTER = {tag: (path, adapter) for (adapter, path), tags in COVERED.items() for tag in tags}


def _foreign(spec):
    args, renamed = dict(spec["args"]), {}
    for theirs, mine in (
        ("ratio_gin", "r_in"),
        ("ratio_gout", "r_out"),
        ("enable_lfu", "lfu"),
        ("activation_layer", "act"),
    ):
        if theirs in args:
            renamed[mine] = args.pop(theirs)
    if "act" in renamed:
        renamed["act"] = getattr(nn, renamed["act"].rsplit(".", 1)[1])
    if spec["class"] == "FFCResnetBlock":
        return foreign_lama.Residual(args["dim"], renamed["r_in"], inline=args.get("inline", False), lfu=renamed["lfu"])
    args["c_in"], args["c_out"], args["k"] = (args.pop(n) for n in ("in_channels", "out_channels", "kernel_size"))
    return foreign_lama.Layer(**args, **renamed)


@pytest.mark.parametrize(
    ("name", "run"), [*(("ffc_variants", run) for run in ADAPTER if run != "m32"), ("ffc_odd", "s13x10")]
)
def test_golden_numbers_of_forks(name, run):
    case = json.loads((GOLDEN / name / "case.json").read_text())
    tensors, spec = load_file(GOLDEN / name / "tensors.safetensors"), case["runs"][run]
    module = recipe.fill(_foreign(case["modules"][spec["module"]])).eval()
    irt.accelerate(module)
    path, by = ADAPTER[spec["module"]]
    assert _swapped(module) == ({(path, by)} if by else set())
    x = {
        key: recipe.image(v["name"], *v["shape"]) * v.get("scale", 1.0) + v.get("shift", 0.0)
        for key, v in spec["inputs"].items()
    }
    given = (x.get("x_l", 0), x["x_g"]) if "x_g" in x else x["x_l"] if "x_l" in x else x["x"]
    with dispatch.launches() as heard:
        out = _call(module, given)
    numerics = dispatch.numerics_of(heard)
    named = zip(("out_l", "out_g"), out, strict=True) if len(out) == 2 else [("out", out[0])]
    checked = 0
    for end, tensor in named:
        if torch.is_tensor(tensor):
            key = f"{run}.{end}"
            assert_close_to_truth(tensor, tensors[f"{key}64"], tensors[key], numerics=numerics, context=key)
            checked += 1
    assert checked == len(spec["outputs"])
    if by:
        rows = [row for row in irt.explain(module, given).rows if "fourier_unit" in row["op"]]
        assert len(rows) == 1
        assert rows[0]["why not"] is None


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why", "inside"),
    [
        ({"gated": True}, "its streams are gated", "lama.spectral"),
        ({"fft_norm": "forward"}, "orthonormal", None),
        ({"fft_norm": None}, "orthonormal", None),
    ],
)
def test_options_without_a_fused_form_are_refused_with_the_reason(options, why, inside):
    model = recipe.fill(foreign_lama.Wrapper(**options)).eval()
    image, mask = torch.rand(1, 3, 32, 40), torch.rand(1, 1, 32, 40).round()
    expected = _call(model, image, mask)
    irt.accelerate(model)
    assert {name for _, name in _swapped(model)} == ({inside} if inside else set())
    _assert_same(_call(model, image, mask), expected)
    assert any(why in (row["why not"] or "") for row in irt.explain(model).rows), str(irt.explain(model))
    with pytest.raises(irt.UnsupportedError, match=why):
        irt.accelerate(model, strict=True)


def _set(path, value):
    def change(layer):
        *parents, name = path.split(".")
        setattr(layer.get_submodule(".".join(parents)), name, value)

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_set("bn_l", nn.GroupNorm(2, 8)), "local stream's norm"),
        (_set("bn_g", nn.BatchNorm2d(8, track_running_stats=False)), "global stream's norm"),
        (_set("ffc.convl2g", nn.Conv2d(8, 8, 3, padding="same", bias=False)), "padded by a name"),
        (_set("ffc.convl2g", nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)), "grouped"),
        (_set("ffc.convl2g", nn.Conv2d(8, 8, (3, 1), padding=(1, 0), bias=False)), "not square"),
        (_set("ffc.convg2l", nn.Conv2d(8, 8, 3, padding=1, bias=False)), "differ in geometry"),
        (_set("ffc.convg2g", nn.Conv2d(8, 8, 1)), "not a spectral transform"),
        (_set("ffc.convg2g.downsample", nn.MaxPool2d(1)), "resizes other than by 2×2 means"),
        (_set("ffc.convg2g.downsample", nn.AvgPool2d(2)), "change the size differently"),
        (_set("ffc.convg2g.conv2", nn.Conv2d(4, 8, 3, padding=1)), "plain 1×1"),
        (_set("ffc.convg2g.fu.relu", nn.GELU()), "activation is not ReLU"),
        (_set("ffc.convg2g.fu.bn", nn.InstanceNorm2d(8)), "Fourier unit's norm"),
        (_set("ffc.convg2g.fu.use_se", True), "use_se"),
        (_set("ffc.convg2g.fu.spatial_scale_factor", 0.5), "spatial_scale_factor"),
        (_set("ffc.convg2g.fu.spectral_pos_encoding", True), "spectral_pos_encoding"),
        (_set("ffc.convg2g.fu.ffc3d", True), "ffc3d"),
        (_set("ffc.convg2g.fu.conv_layer", nn.Conv2d(8, 8, 1, groups=2)), "plain 1×1"),
    ],
)
def test_options_in_the_way_are_named(change, why):
    """Before the swap, so that none is made; and after it, so that a call runs the original."""
    layer = recipe.fill(foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1)).eval()
    twin = irt.accelerate(copy.deepcopy(layer))
    x = _pair(8, 8, 6, 10)
    change(layer)
    layer.eval()
    assert any(why in (row["why not"] or "") for row in irt.explain(layer).rows), str(irt.explain(layer))
    irt.accelerate(layer)
    assert ("", "lama.ffc") not in _swapped(layer)

    change(twin)
    twin.eval()
    assert why in why_original(twin, (x,), {})
    with irt.disabled():
        expected = _result(twin, x)
    got = _result(twin, x)
    if isinstance(expected, str):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # its plain convolutions are fused, too


def _result(module, *args):
    try:
        return _call(module, *args)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("build", "x", "why"),
    [
        (lambda: foreign_lama.Residual(16, 0.5), _pair(8, 8, 1, 5), "smaller than reflect padding"),
        (lambda: foreign_lama.Residual(16, 0.5, dilation=4), _pair(8, 8, 4, 9), "smaller than reflect padding"),
        (lambda: foreign_lama.Residual(16, 0.5, padding_mode="zeros"), _pair(8, 8, 1, 1), None),
        (lambda: foreign_lama.Residual(16, 0.5, padding_mode="replicate"), _pair(8, 8, 1, 2), None),
        (lambda: foreign_lama.Residual(16, 0.5, padding_mode="circular", dilation=2), _pair(8, 8, 1, 2), "circular"),
        (lambda: foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1, lfu=True), _pair(8, 8, 6, 8), "quarters squares"),
        (lambda: foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1, lfu=True), _pair(8, 8, 5, 5), "quarters squares"),
        (
            lambda: foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1, lfu=True, columns_by_width=True),
            _pair(8, 8, 6, 8),
            "quarters squares",
        ),
        (lambda: foreign_lama.Spectral(8, 8, lfu=True), torch.randn(1, 8, 1, 1), "quarters squares"),
        (lambda: foreign_lama.Spectral(8, 8, stride=2), torch.randn(1, 8, 5, 4), "multiple of the stride"),
        (lambda: foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1), _pair(8, 7, 6, 6), "7 channels"),
        (lambda: foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1), torch.randn(1, 16, 6, 6), "pair"),
        (lambda: foreign_lama.Residual(16, 0.5), torch.randn(1, 16, 6, 6), "pair"),
        (lambda: foreign_lama.Residual(16, 0.5, inline=True), torch.randn(1, 15, 6, 6), "15 channels"),
        (lambda: foreign_lama.Spectrum(4), torch.randn(4, 5, 5), "4-D"),
        (lambda: foreign_lama.Spectrum(4), torch.randn(1, 4, 5, 5).double(), "float64"),
        (lambda: foreign_lama.Spectrum(4), torch.randn(1, 4, 0, 5), "no pixel"),
    ],
)
def test_odd_calls_are_the_originals_business(build, x, why):
    """Sizes that padding or quarters do not allow, other shapes and types: its result, or its own error message."""
    module = recipe.fill(build()).eval()
    expected = _result(module, x)
    irt.accelerate(module, strict=True)
    got = _result(module, x)
    if isinstance(expected, str):
        assert got == expected
        assert why is not None
    elif why is None:
        _assert_same(got, expected)
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    found = next(record_of(module).adapter.refuses(module, x), None)
    assert found is None if why is None else why in found


def test_a_convolution_called_conv_layer_is_no_fourier_unit():
    class Ordinary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_layer, self.bn, self.relu = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn(self.conv_layer(x)))

    model = irt.accelerate(nn.Sequential(Ordinary()).eval(), strict=True)
    assert "No module was recognised" in str(irt.explain(model))


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


def test_instance_forwards_are_obstacles(model, x):
    model.model.forward = model.model.forward
    irt.accelerate(model)
    assert any("overridden on the instance" in (r["why not"] or "") for r in irt.explain(model).rows)


def test_shared_modules_are_swapped_once(x):
    block = recipe.fill(foreign_lama.Residual(16, 0.5)).eval()
    pair = nn.Sequential(block, block)
    streams = (torch.randn(1, 8, 6, 6), torch.randn(1, 8, 6, 6))
    expected = pair(streams)
    irt.accelerate(pair)
    assert sum(record_of(m) is not None for m in pair.modules()) == 1
    for got, base in zip(pair(streams), expected, strict=True):
        torch.testing.assert_close(got, base, rtol=1e-4, atol=1e-4)


class _Keyworded(torch.nn.Module):
    """An FFC shell whose callers pass an option by name, as FcF's do."""

    def __init__(self, layer):
        super().__init__()
        self.ffc, self.bn_l, self.bn_g, self.act_l, self.act_g = (
            layer.ffc,
            layer.bn_l,
            layer.bn_g,
            layer.act_l,
            layer.act_g,
        )

    def forward(self, x, fname=None):
        assert fname is None
        local, wide = self.ffc(x)
        return self.act_l(self.bn_l(local)), self.act_g(self.bn_g(wide))


def _shell():
    from inpaintrt.models.lama import FFC_BN_ACT

    return _Keyworded(recipe.fill(FFC_BN_ACT(16, 16, 3, 0.5, 0.5, padding=1))).eval()


def test_a_keyword_that_repeats_the_default_says_nothing():
    shell = irt.accelerate(_shell())
    streams = (torch.rand(1, 8, 20, 20), torch.rand(1, 8, 20, 20))
    with dispatch.launches() as heard:
        fast = shell(streams, fname=None)
    assert "fourier_unit" in {launch.op for launch in heard}
    with irt.disabled():
        for a, b in zip(fast, shell(streams, fname=None), strict=True):
            torch.testing.assert_close(a, b)
    with dispatch.launches() as heard, pytest.raises(AssertionError):
        shell(streams, fname="dump")  # the original's business
    assert not heard


def test_a_slice_of_a_swapped_generator_runs_as_it_is():
    model = irt.accelerate(irt.load("lama_mini"))
    first = model.model[:3]
    x = torch.rand(1, 4, 32, 32)
    with torch.no_grad():
        out = first(x)[0] if isinstance(first(x), tuple) else first(x)
    assert bool(out.isfinite().all())
    assert "accelerated" not in repr(first).splitlines()[0]
    copy.deepcopy(first)


def test_a_look_alike_that_wants_more_arguments_is_left_alone():
    class Demanding(_Keyworded):
        def forward(self, x, scale):
            return super().forward(x)

    shell = _shell()
    shell.__class__ = Demanding
    irt.accelerate(shell)
    assert type(shell) is Demanding
    assert "cannot run" in str(irt.explain(shell)), "the reason is told"

"""Strangers' AOT-GAN: blocks and generators are recognised, swapped or refused, and stay what they are."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import inpaintrt as irt
from inpaintrt.adapters import aotgan
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.swap import record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe

from . import foreign_aotgan as foreign

GOLDEN = pathlib.Path(__file__).parent / "golden"


def _swapped(model):
    return {(path, record_of(m).adapter.name) for path, m in model.named_modules() if record_of(m)}


def _call(module, *args):
    with torch.no_grad():
        return module(*args)


def _original(module, *args):
    with irt.disabled():
        return _call(module, *args)


def _truth(module, *args):
    return _original(copy.deepcopy(module).double(), *(a.double() for a in args))


def _assert_equal_by_the_rule(module, *args):
    """Fused output against the original's error; returns the ops that ran."""
    assert why_original(module, args, {}) == ""
    with launches() as heard:
        got = _call(module, *args)
    expected = _original(module, *args)
    assert got.stride() == expected.stride()
    assert_close_to_truth(got, _truth(module, *args), expected, numerics=numerics_of(heard))
    return {launch.op for launch in heard}


def _why_not(model, path=""):
    rows = irt.explain(model).rows
    return next(row["why not"] for row in rows if row["module"] in (path, path or "(model)"))


def _refused(module, why, path=""):
    irt.accelerate(module.eval())
    assert record_of(module.get_submodule(path)) is None
    assert why in _why_not(module, path)


def _features(*shape):
    return recipe.image("aot", *shape) * 4 - 2


# ---- blocks ---------------------------------------------------------------------------------------------------------


class _Padded(foreign.Numbered):
    """Its convolutions reflect themselves."""

    def branch(self, dim, part, rate):
        conv = nn.Conv2d(dim, part, 3, padding=rate, dilation=rate, padding_mode="reflect")
        return nn.Sequential(conv, nn.ReLU())


class _Linear(foreign.Numbered):
    """Without ReLU."""

    def branch(self, dim, part, rate):
        return super().branch(dim, part, rate)[:2]


def _without_biases():
    block = foreign.Numbered()
    for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
        conv.bias = None
    return block


BLOCKS = {
    "numbered": foreign.Numbered,
    "listed": foreign.Listed,
    "rates 2 to 16": lambda: foreign.Numbered(rates=(2, 4, 8, 16)),
    "two branches": lambda: foreign.Numbered(rates=(1, 3)),
    "reflecting convolutions": _Padded,
    "without ReLU": _Linear,
    "without biases": _without_biases,
    "eps 1e-5": lambda: foreign.Numbered(eps=1e-5),
}


@pytest.fixture(params=BLOCKS, ids=str)
def block(request):
    return recipe.fill(BLOCKS[request.param]()).eval()


@pytest.mark.parametrize("size", [(17, 17), (33, 26)], ids=str)
def test_blocks_of_strangers(block, size):
    x = _features(2, 16, *size)
    irt.accelerate(block, strict=True)
    assert _swapped(block) == {("", "aotgan.block")}
    assert _assert_equal_by_the_rule(block, x) == {"fused_conv2d", "aot_gate"}
    assert "aot_gate" in irt.explain(block, x).rows[0]["op"]
    report = irt.verify(block, x)
    assert report.ok, str(report)


@pytest.mark.parametrize("run", json.loads((GOLDEN / "aot_block" / "case.json").read_text())["runs"])
def test_the_ports_own_block(run):
    case = json.loads((GOLDEN / "aot_block" / "case.json").read_text())
    tensors = load_file(GOLDEN / "aot_block" / "tensors.safetensors")
    spec = case["runs"][run]
    made, given = case["modules"][spec["module"]], spec["inputs"]["x"]
    module = recipe.fill(foreign.Numbered(made["args"]["dim"], made["args"]["rates"])).eval()
    assert [[k, list(v.shape)] for k, v in module.state_dict().items()] == [entry[:2] for entry in made["state_dict"]]
    x = recipe.image(given["name"], *given["shape"]) * given["scale"] + given["shift"]
    irt.accelerate(module, strict=True)
    with launches() as heard:
        out = _call(module, x)
    assert "aot_gate" in {launch.op for launch in heard}
    # The float32 run of the machine that made the case is not this one's: both originals count.
    truth = tensors[f"{run}.out64"]
    base = max((tensors[f"{run}.out"], _original(module, x)), key=lambda t: (t - truth).abs().max())
    assert_close_to_truth(out, truth, base, numerics=numerics_of(heard))


@pytest.mark.parametrize("eps", [1e-9, 1e-8, 1e-6, 1e-5, 1e-12, 0.0])
def test_what_is_added_to_the_deviation_is_found(eps):
    """Eps is in the code only; on an image with no contrast it decides."""
    module = recipe.fill(foreign.Numbered(eps=eps)).eval()
    assert aotgan.form_of(module, aotgan.block_of(module)) == eps
    irt.accelerate(module, strict=True)
    x = (_features(1, 16, 20, 24) * 1e-7).double()
    module.double()
    torch.testing.assert_close(_call(module, x), _original(module, x), rtol=0, atol=1e-8)


def test_blocks_keep_layouts(block):
    x = _features(2, 16, 20, 24).contiguous(memory_format=torch.channels_last)
    expected = _original(block, x)
    got = _call(irt.accelerate(block, strict=True), x)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_odd_inputs_of_blocks():
    """No samples; samples, rows and columns left out; a tile in a larger memory."""
    module, x = recipe.fill(foreign.Numbered()).eval(), _features(4, 16, 40, 48)
    irt.accelerate(module, strict=True)
    for part in (x[:0], x[::2], x[:, :, ::2, ::2], x[:1, :, 3:25, 5:31]):
        assert why_original(module, (part,), {}) == ""
        got, expected = _call(module, part), _original(module, part)
        assert (got.shape, got.stride()) == (expected.shape, expected.stride())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_blocks_follow_their_weights(block):
    x = _features(1, 16, 20, 24)
    irt.accelerate(block, strict=True)
    with torch.no_grad():
        for p in block.parameters():
            before = _call(block, x)
            p.data.numpy().__imul__(-1.5)
            torch.testing.assert_close(_call(block, x), _original(block, x), rtol=1e-3, atol=1e-4)
            if p.dim() > 1:  # the bias of the gate says nothing
                assert not torch.equal(before, _call(block, x))


def test_blocks_pass_gradients(block):
    x = _features(1, 16, 20, 24).requires_grad_()
    base = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    irt.accelerate(block, strict=True)
    with launches() as heard:
        out = block(x)
    assert "aot_gate" in {launch.op for launch in heard}
    for got, expected in zip(torch.autograd.grad(out.square().sum(), [x, *block.parameters()]), base, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item()))


def test_blocks_run_the_original_where_they_must(block):
    x = _features(1, 16, 20, 24)
    irt.accelerate(block, strict=True)
    handle = block.fuse.register_forward_hook(lambda *args: None)
    assert "hook" in why_original(block, (x,), {})
    handle.remove()
    assert "float64" in why_original(block, (x.double(),), {})
    assert "5 channels" in why_original(block, (x[:, :5],), {})
    assert "not one 4-D tensor" in why_original(block, (x[0],), {})
    assert "not one 4-D tensor" in why_original(block, (x, x), {})
    assert why_original(copy.deepcopy(block).double(), (x.double(),), {}) == ""
    small = x[:, :, :1, :1]
    assert "smaller than reflect padding allows" in why_original(block, (small,), {})
    with pytest.raises(RuntimeError, match=r"[Pp]adding size"):
        _call(block, small)
    block.train()
    assert "training" in why_original(block, (x,), {})


def test_a_block_that_was_changed_is_another_one():
    """The rates of a block are in its layers, which may be replaced; every call reads them."""
    module, x = recipe.fill(foreign.Numbered()).eval(), _features(1, 16, 20, 24)
    irt.accelerate(module, strict=True)
    module.block01[0], module.block01[1].dilation = nn.ReflectionPad2d(3).eval(), (3, 3)
    _assert_equal_by_the_rule(module, x)
    module.eps = 1e-5
    _assert_equal_by_the_rule(module, x * 1e-6)
    module.block01[2] = nn.Hardswish().eval()
    assert "Hardswish among its convolutions" in why_original(module, (x,), {})
    module.block01[2] = nn.Identity().eval()
    _assert_equal_by_the_rule(module, x)
    del module.gate
    assert "no AOT block any more" in why_original(module, (x,), {})


def test_constant_gates():
    """A deviation of 0: the gate is shut, as in the original, whatever the constant is."""
    module, x = recipe.fill(foreign.Numbered()).eval(), _features(2, 16, 20, 24)
    irt.accelerate(module, strict=True)
    with torch.no_grad():
        module.gate[1].weight[:5] = 0
        module.gate[1].bias[:5] = torch.tensor([0.0, 1.0, -0.25, 1024.0, 0.5])
        _assert_equal_by_the_rule(module, x)
        module.gate[1].bias[:5] = torch.tensor([0.1, 1 / 3, -0.7, 1e4, 1e-6])  # not the mean of so many of themselves
        out, truth = _call(module, x)[:, :5], _truth(module, x)[:, :5]
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5)


def test_a_block_under_bf16_keeps_its_dtype():
    module, x = recipe.fill(foreign.Numbered()).eval(), _features(1, 16, 20, 24)
    expected = _original(module, x)
    for made, dtype in (
        (irt.accelerate(module, precision="bf16"), torch.float32),
        (irt.accelerate(module), torch.bfloat16),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert why_original(made, (x.to(dtype),), {}) == ""
            got = _call(made, x.to(dtype))
            assert got.dtype == dtype == _original(made, x.to(dtype)).dtype
        assert 0 < (got.float() - expected).abs().max() <= 0.15 * expected.abs().max()


@pytest.mark.parametrize("name", ["numbered", "listed", "reflecting convolutions"])
def test_blocks_compile(name):
    block, x = recipe.fill(BLOCKS[name]()).eval(), _features(1, 16, 20, 24)
    irt.accelerate(block, strict=True)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(_call(compiled, x), _call(block, x))


def test_trials_leave_no_trace():
    module = foreign.Numbered(rates=(1, 2, 3, 5)).train()
    before, state, rng = dict(vars(module)), copy.deepcopy(module.state_dict()), torch.get_rng_state()
    irt.accelerate(module, strict=True)
    irt.restore(module)
    assert dict(vars(module)) == before
    assert all(torch.equal(a, b) for a, b in zip(state.values(), module.state_dict().values(), strict=True))
    assert module.training
    assert torch.equal(rng, torch.get_rng_state())


# ---- what blocks are not swapped ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [foreign.Biased, foreign.Exchanged, foreign.Ungated, foreign.GatedByTheResult, foreign.Backwards,
     lambda: foreign.Numbered(eps=1e-3)],
    ids=["biased", "exchanged", "ungated", "gated by the result", "backwards", "eps 1e-3"],
)  # fmt: skip
def test_look_alikes_of_blocks_are_refused(build):
    _refused(build(), "it has the parts of an AOT block, but does not compute")


class _TwoInputs(foreign.Numbered):
    def forward(self, x, mask):
        return super().forward(x) * mask


def test_a_look_alike_that_is_called_otherwise_is_refused():
    _refused(_TwoInputs(), "the original cannot run on the probe's input: TypeError")


def _with(path, layer):
    def build():
        module = foreign.Numbered()
        parent, _, name = path.rpartition(".")
        module.get_submodule(parent)[int(name)] = layer
        return module

    return build


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (_with("block00.1", nn.Conv2d(16, 4, 3, groups=4)), "grouped, not square"),
        (_with("block00.1", nn.Conv2d(16, 4, (3, 1))), "grouped, not square"),
        (_with("fuse.1", nn.Conv2d(16, 16, 3, padding=1)), "padded in more than one way"),
        (_with("block02.0", nn.ReflectionPad2d((4, 3, 4, 4))), "padded in more than one way"),
        (_with("block03.1", nn.Conv2d(16, 4, 3, dilation=4)), "change the size"),
        (_with("gate.1", nn.Conv2d(16, 8, 3)), "widths of its convolutions do not fit"),
        (_with("block01.1", nn.Conv2d(16, 6, 3, dilation=2)), "widths of its convolutions do not fit"),
        (_with("block01.0", nn.ReplicationPad2d(2)), "a ReplicationPad2d among its convolutions"),
        (_with("block01.2", nn.ELU()), "a ELU among its convolutions"),
        (_with("fuse.1", nn.ReflectionPad2d(2)), "a ReflectionPad2d among its convolutions"),
        (_with("block01.1", nn.Sequential(nn.Conv2d(16, 4, 3), nn.Conv2d(4, 4, 3))), "has 2 convolutions"),
    ],
)
def test_options_in_the_way_of_blocks_are_named(build, why):
    _refused(build(), why)


def test_other_modules_are_no_blocks():
    for module in (
        nn.ModuleDict({"fuse": nn.Conv2d(4, 4, 1), "gate": nn.Conv2d(4, 4, 1)}),
        nn.ModuleDict({"fuse": nn.Conv2d(4, 4, 1), "gate": nn.Conv2d(4, 4, 1), "other": nn.Conv2d(4, 4, 1)}),
        nn.ModuleDict({"block00": nn.Conv2d(4, 4, 1), "gate": nn.Conv2d(4, 4, 1)}),
        nn.ModuleDict({"encoder": nn.Conv2d(4, 4, 1), "middle": nn.Identity(), "decoder": nn.Conv2d(4, 4, 1)}),
    ):
        irt.accelerate(module.eval(), strict=True)
        assert not any("aotgan" in name for _, name in _swapped(module))
        assert not any("aotgan" in str(row["adapter"]) for row in irt.explain(module).rows)


# ---- generators -----------------------------------------------------------------------------------------------------

GENERATORS = {
    "three Sequentials": foreign.Plain,
    "three modules": foreign.Staged,
    "ours": lambda *args: irt.models.create("aotgan", width=args[0], block_num=2),
    "ours, mma": lambda *args: irt.models.create("aotgan", port="mma", width=args[0], block_num=2),
}


def _block_paths(model):
    return [path for path, m in model.named_modules() if aotgan.block_of(m) is not None]


@pytest.fixture(params=GENERATORS, ids=str)
def generator(request):
    return recipe.fill(GENERATORS[request.param](8)).eval()


def _image(rows=64, columns=72, batch=1):
    picture = recipe.image("picture", batch, 3, rows, columns) * 2 - 1
    mask = torch.zeros(batch, 1, rows, columns)
    for i in range(batch):
        mask[i, :, 20 + 4 * i : 31, 10:41] = 1
    return picture * (1 - mask) + mask, mask


def _args(generator, *size, **options):
    """An example, as this kind of generator is called."""
    x, mask = _image(*size, **options)
    return (torch.cat([x, mask], 1),) if isinstance(generator, foreign.Staged) else (x, mask)


def test_generators_of_strangers(generator):
    args = _args(generator, batch=2)
    expected = _original(generator, *args)
    irt.accelerate(generator, strict=True)
    assert _swapped(generator) == {("", "aotgan.generator")}
    assert why_original(generator, args, {}) == ""
    with launches() as heard:
        got = _call(generator, *args)
    assert {launch.op for launch in heard} == {"fused_conv2d", "aot_gate"}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.is_contiguous()
    report = irt.verify(generator, *args)
    assert report.ok, str(report)
    assert report.rows[-1]["adapter"] == "aotgan.generator"
    for path in _block_paths(generator):  # as a whole or by its parts
        assert any(row["part"].startswith(path) for row in report.rows)


@pytest.mark.parametrize("run", ["a", "b"])
def test_the_ports_own_generator(run):
    """The last block's error is a few times the reference's by chance; end to end, the criterion for whole models holds."""
    case = json.loads((GOLDEN / "aotgan_small" / "case.json").read_text())
    tensors = load_file(GOLDEN / "aotgan_small" / "tensors.safetensors")
    given, mask = case["runs"][run]["inputs"]["image"], tensors[f"{run}.mask"]
    image = recipe.image(given["name"], *given["shape"]) * 2 - 1
    module = recipe.fill(foreign.Plain()).eval()
    assert list(module.state_dict()) == [entry[0] for entry in case["modules"]["g"]["state_dict"]]
    irt.accelerate(module, strict=True)
    args = (image * (1 - mask) + mask, mask)
    assert why_original(module, args, {}) == ""
    truth = tensors[f"{run}.out64"]
    error = (_call(module, *args) - truth).square().mean().sqrt()
    assert error <= 2e-5 * truth.abs().max()
    assert error > 0
    report = irt.verify(module, *args)
    assert report.ok, str(report)


@pytest.mark.parametrize("where", ["input", "weights", "both"])
def test_generators_keep_layouts(generator, where):
    args = _args(generator, batch=2)
    if where != "weights":
        args = tuple(a.contiguous(memory_format=torch.channels_last) for a in args)
    if where != "input":
        generator.to(memory_format=torch.channels_last)
    expected = _original(generator, *args)
    irt.accelerate(generator, strict=True)
    assert why_original(generator, args, {}) == ""
    got = _call(generator, *args)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_state_dicts_copies_and_restoring(generator):
    args = _args(generator)
    keys, kind, before = list(generator.state_dict()), type(generator), dict(vars(generator))
    expected = _original(generator, *args)
    irt.accelerate(generator, strict=True)
    assert list(generator.state_dict()) == keys
    assert isinstance(generator, kind)
    for twin in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        torch.testing.assert_close(_call(twin, *args), expected, rtol=1e-4, atol=1e-5)
    irt.restore(generator)
    assert type(generator) is kind
    assert dict(vars(generator)) == before
    assert torch.equal(_call(generator, *args), expected)


def test_generators_follow_their_weights(generator):
    args = _args(generator)
    irt.accelerate(generator, strict=True)
    before = _call(generator, *args)
    with torch.no_grad():
        for p in generator.parameters():
            p.data.numpy().__imul__(-1.2)
    after = _call(generator, *args)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, _original(generator, *args), rtol=1e-3, atol=1e-4)


def test_generators_pass_gradients(generator):
    args = _args(generator, 36, 40)
    base = torch.autograd.grad(generator(*args).square().sum(), list(generator.parameters()))
    largest = max(expected.abs().max().item() for expected in base)
    irt.accelerate(generator, strict=True)
    for got, expected in zip(
        torch.autograd.grad(generator(*args).square().sum(), list(generator.parameters())), base, strict=True
    ):
        noise = 1e-6 * largest  # of what is 0 in exact numbers: a gate's bias shifts nothing
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item() + noise)


@pytest.mark.parametrize("kind", [foreign.Plain, foreign.Staged])
def test_generators_compile(kind):
    generator = recipe.fill(kind(8, block_num=1)).eval()
    args = _args(generator, 36, 40)
    irt.accelerate(generator, strict=True)
    torch.compiler.reset()
    compiled = torch.compile(generator, fullgraph=True, backend="eager")
    torch.testing.assert_close(_call(compiled, *args), _call(generator, *args))


def test_generators_under_bf16(generator):
    """Under autocast and with precision="bf16": near the original in float32, in the caller's dtype for the latter."""
    args = _args(generator)
    expected = _original(generator, *args)
    irt.accelerate(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _call(generator, *args)
    single = _call(irt.accelerate(generator, precision="bf16"), *args)
    assert (cast.dtype, single.dtype) == (torch.bfloat16, torch.float32)
    for got in (cast, single):
        assert 0 < (got.float() - expected).abs().max() <= 0.15 * expected.abs().max()


def test_calls_that_are_the_originals_business():
    module = recipe.fill(foreign.Plain(8)).eval()
    x, mask = _image(batch=2)
    irt.accelerate(module, strict=True)

    def why(*args, **kwargs):
        return why_original(module, args, kwargs)

    assert why(x, mask) == ""
    assert "other arguments" in why(torch.cat([x, mask], 1))
    assert "other arguments" in why(x, mask, mask)
    assert "keyword" in why(x, mask=mask)
    for wrong in (mask.bool(), mask.double(), mask[:1], mask[:, :, :8], mask.expand(-1, 2, -1, -1), None, 1.0):
        assert "other arguments" in why(x, wrong) or "the mask is not (B, 1, H, W)" in why(x, wrong)
    assert "2 channels, the weights take 3" in why(x[:, :2], mask)
    assert "not a multiple of 4" in why(x[..., :70], mask[..., :70])
    assert "smaller than reflect padding allows" in why(x[..., :32], mask[..., :32])
    assert "float64" in why(x.double(), mask.double())
    assert _call(module, x[..., :70], mask[..., :70]).shape == (2, 3, 64, 68), "the original's answer"
    assert torch.equal(_call(module, x, mask.bool()), _original(module, x, mask.bool()))
    handle = module.middle[0].fuse.register_forward_hook(lambda *args: None)
    assert "hook" in why(x, mask)
    handle.remove()
    module.middle[1].fuse[1] = nn.Conv2d(32, 32, 3, padding=1).eval()
    assert "block 1: its convolutions are grouped, not square, or padded in more than one way" in why(x, mask)
    module.middle = nn.Identity().eval()
    assert "no AOT-GAN generator any more" in why(x, mask)


def test_our_network_is_called_either_way():
    module = recipe.fill(irt.models.create("aotgan", width=8, block_num=1)).eval()
    x, mask = _image()
    irt.accelerate(module, strict=True)
    joined = torch.cat([x, mask], 1)
    with launches() as heard:
        assert torch.equal(_call(module, x, mask), _call(module, joined))
        assert torch.equal(_call(module, joined, None), _call(module, joined))
        image = (x + 1) / 2
        with torch.no_grad():
            filled = module.inpaint(image, mask)
    assert sum(launch.op == "aot_gate" for launch in heard) == 5
    with irt.disabled(), torch.no_grad():
        torch.testing.assert_close(module.inpaint(image, mask), filled, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="accepted: height and width divisible by 4, at least 36"):
        module(joined[..., :30])


class _Normed(foreign.Plain):
    def __init__(self, width):
        super().__init__(width)
        self.encoder[2] = nn.ELU()


class _Extended(foreign.Plain):
    def __init__(self, width):
        super().__init__(width)
        self.encoder[3] = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, groups=2)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: foreign.Plain(8, doubling=foreign.Nearest), "another function"),
        (lambda: foreign.Plain(8, doubling=foreign.Cornerless), "another function"),
        (lambda: foreign.MaskFirst(8), "another function"),
        (lambda: foreign.Clipped(8), "another function"),
        (lambda: _Normed(8), "its encoder: it has a ELU among its convolutions"),
        (lambda: _Extended(8), "its convolutions are grouped"),
    ],
    ids=["nearest", "no corners", "mask first", "clipped", "ELU", "grouped"],
)
def test_look_alikes_of_generators_keep_fast_blocks(build, why):
    module = recipe.fill(build()).eval()
    args = _image()
    expected = _original(module, *args)
    irt.accelerate(module)
    assert {pair for pair in _swapped(module) if "aotgan" in pair[1]} == {
        ("middle.0", "aotgan.block"),
        ("middle.1", "aotgan.block"),
    }
    assert why in _why_not(module)
    torch.testing.assert_close(_call(module, *args), expected, rtol=1e-4, atol=1e-5)


def test_a_generator_of_other_blocks_is_refused():
    _refused(foreign.Plain(8, block=foreign.Biased), "block 0: it has the parts of an AOT block, but does not compute")


def test_only_blocks():
    module = recipe.fill(foreign.Plain(8)).eval()
    args = _image()
    expected = _original(module, *args)
    irt.accelerate(module, only="aotgan.block")
    assert _swapped(module) == {("middle.0", "aotgan.block"), ("middle.1", "aotgan.block")}
    torch.testing.assert_close(_call(module, *args), expected, rtol=1e-4, atol=1e-5)

"""Strangers' partial convolutions: layers, blocks and U-Nets are recognised, swapped or refused, and stay what they are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import inpaintrt as irt
from inpaintrt.adapters import partial, partialconv
from inpaintrt.models.partialconv_layers import PartialConv2d
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.swap import record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.compare import flat_tensors

from . import foreign_partialconv as foreign

LAYERS = {
    "nvidia": (lambda: foreign.Caching(5, 7, 3, 1, 1, return_mask=True), 1),
    "nvidia, no bias": (lambda: foreign.Caching(5, 7, 3, 1, 1, return_mask=True, bias=False), 1),
    "nvidia, features alone": (lambda: foreign.Caching(5, 7, 5, 2, 2), 1),
    "nvidia, a mask per channel": (lambda: foreign.Caching(5, 7, 3, 2, 1, return_mask=True, multi_channel=True), 5),
    "nvidia, kernel not square": (lambda: foreign.Caching(5, 7, (3, 5), 1, (1, 2), return_mask=True), 1),
    "nvidia, dilated": (lambda: foreign.Caching(5, 7, 3, 1, 2, 2, return_mask=True, multi_channel=True), 5),
    "nvidia, older": (lambda: foreign.OlderCaching(5, 7, 3, 1, 1, multi_channel=True, bias=False), 5),
    "mmagic": (lambda: foreign.Buffered(5, 7, 5, 2, 2, multi_channel=True), 5),
    "mmagic, eps": (lambda: foreign.Buffered(5, 7, 3, 1, 1, multi_channel=True, bias=False, eps=1e-6), 5),
    "mmagic, one plane": (lambda: foreign.Buffered(5, 7, 3, padding=1), 1),
    "naoto": (lambda: foreign.TwoConvolutions(5, 7, 7, 2, 3), 5),
    "naoto, no bias": (lambda: foreign.TwoConvolutions(5, 7, 3, 1, 1, bias=False), 5),
    "naoto, one channel": (lambda: foreign.TwoConvolutions(1, 1, 3, 1, 1), 1),
    "ours": (lambda: PartialConv2d(5, 7, 3, padding=1), 5),
    "ours, one plane, 1/s": (lambda: PartialConv2d(5, 7, 3, padding=1, scale="one", binary=True, eps=0.0), 1),
}
BLOCKS = {
    "naoto, down": lambda: foreign.Activated(5, 7, sample="down-5"),
    "naoto, up": lambda: foreign.Activated(5, 7, activ="leaky"),
    "naoto, first": lambda: foreign.Activated(5, 7, bn=False, sample="down-7", bias=True),
    "mmagic": lambda: foreign.ConvModule(5, 7, 3, 1, 1, True, nn.LeakyReLU(0.2), False),
    "mmagic, bias and norm": lambda: foreign.ConvModule(5, 7, 3, 2, 1, True, nn.ReLU(), True),
}
NETS = {
    "naoto": (lambda: foreign.Unet(3, 6), 3),
    "naoto, other widths": (lambda: foreign.Unet(2, 5), 3),
    "mmagic": (lambda: foreign.EncoderDecoder(3, 6), 3),
    "ours, nao": (lambda: irt.models.create("partialconv_unet", levels=3, width=6), 3),
    "ours, mma, one plane": (lambda: irt.models.create("partialconv_unet", port="mma", levels=3, width=6), 1),
}


def _filled(module):
    """Recipe weights, ones for masks, and signals that survive where nothing is multiplied by the window."""
    recipe.fill(module.eval())
    with torch.no_grad():
        for part in module.modules():
            layer = partial.layer_of(part)
            if layer is not None and layer.ones is not None:
                layer.ones.fill_(1)
            if layer is not None and (layer.summing is not None or getattr(part, "scale", "") == "one"):
                layer.conv.weight.mul_(layer.conv.weight[0].numel())
    return module


def _x(channels, rows=17, columns=22, batch=2):
    return recipe.image("x", batch, channels, rows, columns) * 2 - 1


def _mask(kind, channels, rows=17, columns=22, batch=2):
    soft = recipe.image("mask", batch, channels, rows, columns)
    if kind == "random":
        return (soft < 0.3).float()
    if kind == "soft":
        return torch.where(soft < 0.8, 0.0, soft * 0.1)
    mask = (
        torch.zeros(batch, channels, rows, columns) if kind == "nothing" else torch.ones(batch, channels, rows, columns)
    )
    if kind == "hole":
        mask[0, :, 3:14, 4:15] = 0
        mask[-1, :, 6:, 2:] = 0
    return mask


def _call(module, *args):
    with torch.no_grad():
        return module(*args)


def _original(module, *args):
    """What the module computed before it was swapped, from a copy that the call cannot change."""
    with irt.disabled(), torch.no_grad():
        return copy.deepcopy(module)(*args)


def _assert_equal_by_the_rule(module, *args):
    truth = flat_tensors(_original(copy.deepcopy(module).double(), *(t.double() for t in args)))
    base = flat_tensors(_original(module, *args))
    assert why_original(module, args, {}) == ""
    with dispatch.launches() as heard:
        got = flat_tensors(_call(module, *args))
    assert {op for op, *_ in heard} == {"partial_conv2d"} if heard and isinstance(heard[0], tuple) else heard
    assert len(got) == len(base)
    for g, t, b in zip(got, truth, base, strict=True):
        assert (g.shape, g.dtype) == (b.shape, b.dtype)
        assert_close_to_truth(g, t, b, numerics=dispatch.numerics_of(heard))


def _swapped(model):
    return {path: record_of(m).adapter.name for path, m in model.named_modules() if record_of(m)}


def _why_not(model, path=""):
    rows = {row["module"]: row for row in irt.explain(model).rows}
    return rows[path or "(model)"]["why not"] or ""


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all", "hole", "random", "soft", "nothing"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, kind):
    build, channels = LAYERS[name]
    layer = irt.accelerate(_filled(build()), strict=True)
    assert _swapped(layer) == {"": "partialconv.layer"}
    inputs = partial.layer_of(layer).conv.in_channels
    _assert_equal_by_the_rule(layer, _x(inputs), _mask(kind, channels))
    _assert_equal_by_the_rule(layer, _x(inputs), _mask(kind, channels, batch=1))
    wide = _mask(kind, 1).expand(-1, channels, -1, -1)
    _assert_equal_by_the_rule(layer, _x(inputs), wide)


@pytest.mark.parametrize("name", LAYERS)
def test_memory_formats_stay(name):
    build, channels = LAYERS[name]
    layer = irt.accelerate(_filled(build()), strict=True)
    x = _x(partial.layer_of(layer).conv.in_channels)
    last = x.contiguous(memory_format=torch.channels_last)
    got, as_last = (flat_tensors(_call(layer, t, _mask("hole", channels)))[0] for t in (x, last))
    assert got.stride() == flat_tensors(_original(layer, x, _mask("hole", channels)))[0].stride()
    assert as_last.is_contiguous(memory_format=torch.channels_last)


def test_masks_of_many_channels_are_views_of_one_plane():
    layer = irt.accelerate(_filled(foreign.TwoConvolutions(4, 6, 3, 1, 1)))
    _, left = _call(layer, _x(4), _mask("hole", 4))
    assert left.shape == (2, 6, 17, 22)
    assert left.untyped_storage().nbytes() == 2 * 17 * 22 * 4
    expected = _original(layer, _x(4), _mask("hole", 4))[1]
    assert torch.equal(torch.cat([left, left], 1), torch.cat([expected, expected], 1))
    with pytest.raises(RuntimeError, match="single memory location"):
        left[:] = 1


def test_a_chain_of_layers_hands_planes_on():
    for several in (False, True):
        model = _filled(foreign.Chain(multi_channel=several))
        mask = _mask("hole", 3 if several else 1)
        expected = _original(model, _x(3), mask)
        irt.accelerate(model, strict=True)
        assert set(_swapped(model).values()) == {"partialconv.layer"}
        sizes = []
        dispatch.observers.append(lambda op, backend, args, sizes=sizes: sizes.append(tuple(args[1].shape)))
        try:
            got = _call(model, _x(3), mask)
        finally:
            dispatch.observers.pop()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert [size[1] for size in sizes] == [3 if several else 1, 1, 1]


@pytest.mark.parametrize("make", [foreign.Caching, foreign.OlderCaching])
@pytest.mark.parametrize("several", [False, True])
def test_calls_without_a_mask_find_what_the_original_left(make, several):
    options = {} if make is foreign.OlderCaching else {"return_mask": True}
    fused = irt.accelerate(_filled(make(4, 6, 3, 1, 1, multi_channel=several, **options)), strict=True)
    plain = irt.restore(copy.deepcopy(fused))
    assert fused.update_mask is None, "no probe has called it"
    channels = 4 if several else 1
    for args in (
        (_x(4), _mask("hole", channels)),
        (_x(4) + 1,),
        (_x(4, 9, 12),),
        (_x(4), _mask("random", channels)),
        (_x(4)[:1],),
        (_x(4),),
    ):
        assert (why_original(fused, args, {}) != "") == (len(args) == 1)
        got, expected = _call(fused, *args), _call(plain, *args)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
        assert fused.last_size == plain.last_size


def test_trials_remember_nothing_on_the_module_and_change_no_weight():
    for build in (
        lambda: foreign.Caching(4, 6, 3),
        lambda: foreign.TwoConvolutions(4, 6, 3),
        lambda: foreign.Unet(2, 4),
    ):
        module = build().eval()
        attributes, state = dict(vars(module)), copy.deepcopy(module.state_dict())
        irt.accelerate(module, strict=True)
        irt.restore(module)
        assert vars(module) == attributes
        assert all(torch.equal(a, b) for a, b in zip(state.values(), module.state_dict().values(), strict=True))


class Weighted(foreign.TwoConvolutions):
    def __init__(self):
        super().__init__(4, 6, 3)
        with torch.no_grad():
            self.mask_conv.weight[2, 1, 1, 1] = 2


class Squared(foreign.Buffered):
    def forward(self, x, mask):
        out, mask = super().forward(x, mask)
        return out.square(), mask


class Forgetful(foreign.Caching):
    """Keeps the mask under another name."""

    def forward(self, x, mask=None):
        self.last = getattr(self, "last", None) if mask is None else mask
        return super().forward(x, self.last)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Weighted, "not all ones"),
        (lambda: Squared(4, 6, 3), "no partial convolution that is known"),
        (lambda: Forgetful(4, 6, 3), "what it keeps"),
        (lambda: foreign.Caching(4, 6, 3, groups=2), "grouped"),
        (lambda: foreign.Caching(4, 6, 3, (1, 2)), "strided"),
        (lambda: foreign.Caching(4, 6, 3, padding=1, padding_mode="reflect"), "padded with other than zeros"),
    ],
)
def test_layers_that_are_refused(build, why):
    layer = irt.accelerate(build().eval())
    assert "partialconv.layer" not in _swapped(layer).values()
    assert why in _why_not(layer), _why_not(layer)
    with pytest.raises(irt.UnsupportedError):
        irt.accelerate(layer, strict=True)


def test_filters_that_stop_being_ones_are_noticed():
    layer = irt.accelerate(_filled(foreign.TwoConvolutions(4, 6, 3)), strict=True)
    args = _x(4), _mask("hole", 4)
    assert why_original(layer, args, {}) == ""
    with torch.no_grad():
        layer.mask_conv.weight.mul_(2)
    assert "not all ones" in why_original(layer, args, {})
    assert torch.equal(_call(layer, *args)[0], _original(layer, *args)[0])


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((_x(4),), "without a mask"),
        ((_x(4), None), "without a mask"),
        ((_x(4), _mask("hole", 1)), "its mask is"),
        ((_x(4), _mask("hole", 4) > 0), "no tensor of numbers"),
        ((_x(4).half(), _mask("hole", 4)), "float16"),
        ((_x(4), _mask("hole", 4).requires_grad_()), "a gradient is asked of its mask"),
        ((_x(3), _mask("hole", 3)), "3 channels"),
        ((_x(4, 2, 2), _mask("all", 4, 2, 2)), "smaller than the kernel"),
    ],
)
def test_calls_that_run_the_original(args, why):
    layer = irt.accelerate(foreign.Buffered(4, 6, 3, multi_channel=True).eval(), strict=True)
    assert why in why_original(layer, args, {})


# ---- blocks and networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hole", "soft"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, kind):
    block = irt.accelerate(_filled(BLOCKS[name]()), strict=True)
    assert _swapped(block) == {"": "partialconv.block"}
    _assert_equal_by_the_rule(block, _x(5), _mask(kind, 5))
    _assert_equal_by_the_rule(block, _x(5, 5, 4), _mask(kind, 5, 5, 4))  # filters larger than outputs


class NormFirst(foreign.Activated):
    def forward(self, x, mask):
        y, mask = self.conv(x, mask)
        return self.bn(self.activation(y)), mask


def test_blocks_in_another_order_have_their_layer_swapped():
    block = irt.accelerate(_filled(NormFirst(5, 7)))
    assert "not its partial convolution, then its norm" in _why_not(block)
    assert _swapped(block) == {"conv": "partialconv.layer"}
    expected = _original(block, _x(5), _mask("hole", 5))
    torch.testing.assert_close(_call(block, _x(5), _mask("hole", 5))[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hole", "random", "soft"])
@pytest.mark.parametrize("name", NETS)
def test_networks(name, kind):
    build, channels = NETS[name]
    model = _filled(build())
    x, mask = _x(3, 24, 40), _mask(kind, channels, 24, 40)
    expected, left = _original(model, x, mask)
    double, _ = _original(copy.deepcopy(model).double(), x.double(), mask.double())
    irt.accelerate(model, strict=True)
    assert _swapped(model) == {"": "partialconv.unet"}
    got, ours = _call(model, x, mask)
    assert (got.stride(), ours.stride(), ours.dtype) == (expected.stride(), left.stride(), left.dtype)
    torch.testing.assert_close(ours, left)
    scale = double.abs().max()
    assert (got - double).abs().max() / scale < 1e-5
    assert (got - double).square().mean().sqrt() / scale < 1e-6
    last = x.contiguous(memory_format=torch.channels_last)
    assert _call(model, last, mask)[0].is_contiguous(memory_format=torch.channels_last)
    refused = why_original(model, (x, mask[:1]), {})
    assert ("one mask for several samples" in refused) == name.startswith("naoto")
    if not refused:
        for ours, theirs in zip(_call(model, x, mask[:1]), _original(model, x, mask[:1]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * scale.item())
    assert "not a multiple" in why_original(model, (_x(3, 14, 14), _mask(kind, channels, 14, 14)), {})


@pytest.mark.parametrize("name", NETS)
def test_in_float64_networks_are_the_same_function(name):
    build, channels = NETS[name]
    model = _filled(build()).double()
    irt.accelerate(model, strict=True)
    for kind in ("hole", "soft", "nothing"):
        x, mask = _x(3, 24, 40).double(), _mask(kind, channels, 24, 40).double()
        for got, expected in zip(_call(model, x, mask), _original(model, x, mask), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-8)


class Swapped(foreign.Unet):
    """Concatenates the other way round."""

    def forward(self, x, mask):
        return super().forward(x.flip(1), mask)


class Extra(foreign.Unet):
    def __init__(self):
        super().__init__(2, 4)
        self.last = nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: Swapped(2, 4), "not the U-Net that its parts suggest"),
        (lambda: foreign.Unet(2, 4, upsampling_mode="bilinear"), "not the U-Net that its parts suggest"),
        (Extra, "weights beside its blocks"),
    ],
)
def test_other_networks_have_their_blocks_swapped(build, why):
    model = _filled(build())
    args = _x(3, 16, 24), _mask("hole", 3, 16, 24)
    expected, left = _original(model, *args)
    irt.accelerate(model)
    assert why in _why_not(model)
    assert set(_swapped(model).values()) == {"partialconv.block", "partialconv.layer"}
    got, ours = _call(model, *args)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(ours, left)


@pytest.mark.parametrize("name", NETS)
def test_verify(name):
    build, channels = NETS[name]
    model = irt.accelerate(_filled(build()))
    report = irt.verify(model, _x(3, 24, 40), _mask("hole", channels, 24, 40))
    assert report.ok, str(report)
    assert {"partialconv.unet", "partialconv.block"} <= {row["adapter"] for row in report.rows}
    row = irt.explain(model, _x(3, 24, 40), _mask("hole", channels, 24, 40)).rows[0]
    assert (row["adapter"], row["why not"]) == ("partialconv.unet", None)


@pytest.mark.parametrize("name", NETS)
def test_what_a_swap_leaves_alone(name):
    build, channels = NETS[name]
    model = _filled(build())
    keys, kind = list(model.state_dict()), type(model)
    args = _x(3, 24, 40), _mask("hole", channels, 24, 40)
    expected = _original(model, *args)[0]
    irt.accelerate(model, strict=True)
    assert list(model.state_dict()) == keys
    fused = _call(model, *args)[0]
    assert torch.equal(_call(copy.deepcopy(model), *args)[0], fused)
    if name != "ours, mma, one plane" and not name.startswith("ours"):
        assert type(pickle.loads(pickle.dumps(model))) is kind
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.mul_(1.5)
    assert not torch.allclose(_call(model, *args)[0], fused), "folded norms are never stale"
    torch.testing.assert_close(
        _call(model, *args)[0], _original(model, *args)[0], rtol=1e-3, atol=1e-4 * expected.abs().max().item()
    )
    model.train()
    assert "training mode" in why_original(model, args, {})
    assert type(irt.restore(model)) is kind


@pytest.mark.parametrize("name", [*NETS])
def test_gradients(name):
    build, channels = NETS[name]
    model = irt.accelerate(_filled(build()).double(), strict=True)
    mask = _mask("hole", channels, 8, 16).double()
    found = []
    for context in (irt.disabled, torch.enable_grad):
        x = _x(3, 8, 16).double().requires_grad_()
        model.zero_grad()
        with context():
            model(x, mask)[0].square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8 * expected.abs().max().item())


@pytest.mark.parametrize("name", NETS)
def test_bfloat16(name):
    build, channels = NETS[name]
    model = _filled(build())
    args = _x(3, 24, 40), _mask("hole", channels, 24, 40)
    exact = _original(model, *args)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = _original(model, *args)[0]
        irt.accelerate(model, strict=True)
        got = _call(model, *args)[0]
    assert got.dtype == base.dtype
    rms = [(t.float() - exact).square().mean().sqrt().item() for t in (got, base)]
    assert rms[0] <= 2 * rms[1]
    irt.accelerate(model, strict=True, precision="bf16")
    got = _call(model, *args)[0]
    assert got.dtype == torch.float32
    assert (got - exact).square().mean().sqrt() <= 2 * rms[1]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["naoto", "ours, mma, one plane"])
def test_exported(name):
    build, channels = NETS[name]
    model = irt.accelerate(_filled(build()), strict=True)
    args = _x(3, 24, 40), _mask("hole", channels, 24, 40)
    expected = _call(model, *args)[0]
    with torch.no_grad():
        program = torch.export.export(model, args, strict=False)
    assert any("inpaintrt.partial_conv2d" in str(node.target) for node in program.graph.nodes)
    limit = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(_call(program.module(), *args)[0], expected, **limit)
    torch.testing.assert_close(_call(torch.jit.trace(model, args, check_trace=False), *args)[0], expected, **limit)
    assert torch.equal(_call(model, *args)[0], expected), "exporting leaves nothing behind that asks for another trial"


def test_compiled():
    model = irt.accelerate(_filled(foreign.Unet(1, 4)), strict=True)
    args = _x(3, 8, 10), _mask("hole", 3, 8, 10)
    expected = _call(model, *args)[0]
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(_call(compiled, *args)[0], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    torch._dynamo.reset()


def test_the_adapters_are_listed():
    names = [adapter.name for adapter in irt.adapters.ADAPTERS]
    assert [adapter.name for adapter in partialconv.ADAPTERS] == [n for n in names if n.startswith("partialconv.")]


@pytest.mark.parametrize("make", [foreign.Unet, foreign.EncoderDecoder])
def test_recognising_the_released_width_costs_little(make):
    """Seven levels ask for 128×128 pixels, of which one pass of the original takes 10 GFLOP, 5 of them for its masks."""
    model = make().eval()
    with FlopCounterMode(display=False) as counted:
        irt.accelerate(model)
    assert _swapped(model) == {"": "partialconv.unet"}
    assert counted.get_total_flops() < 1e9

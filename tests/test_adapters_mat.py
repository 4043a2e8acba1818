"""MAT through `accelerate`: its transformer blocks, ours and strangers', and decoders that skip tiles."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inpaintrt as irt
from inpaintrt import models
from inpaintrt.adapters import mat as adapter
from inpaintrt.adapters.mat_attention import block_of, form_of
from inpaintrt.adapters.mat_maps import TiledMap
from inpaintrt.models import mat_layers, mat_sparse
from inpaintrt.models.mat_sparse import read_pixels
from inpaintrt.pipeline import fill
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.swap import record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe

from . import foreign_mat as foreign
from .test_mat import _agrees, _case, _filled, _generator

WIDTH, HEADS = 12, 2


def _ours(window=4, shift=2):
    return mat_layers.SwinBlock(WIDTH, HEADS, window, shift)


def _theirs(window=4, shift=2, kind=foreign.Block):
    return kind(WIDTH, [16 * window] * 2, HEADS, window, shift)


def _block(build=_ours, *args, **options):
    """With logits large enough that attention is not an average."""
    block = recipe.fill(build(*args, **options)).eval()
    with torch.no_grad():
        for layer in (block.attn.q, block.attn.k):
            layer.weight.mul_(8)
        if getattr(block, "attn_mask", None) is not None:
            block.attn_mask = block.strangers(block.input_resolution)
    return block


def _tokens(height, width, batch=1, name="tokens"):
    return recipe.image(name, batch, height * width, WIDTH) * 2 - 1


def _token_mask(kind, height, width, batch=1):
    mask = torch.zeros(batch, height, width)
    if kind == "all valid":
        mask += 1
    elif kind == "single token":
        mask[:, height // 2, width - 1] = 1
    elif kind == "box":
        mask += 1
        mask[:, height // 4 :, : width // 2] = 0
    elif kind == "fractional":
        mask = (recipe.image("mask", batch, height, width) * 5).floor().clamp(max=4) / 4
    elif kind != "all invalid":
        mask = (recipe.image("mask", batch, height, width) < 0.3).float()
    return mask.view(batch, -1, 1)


MASKS = ("all valid", "all invalid", "single token", "box", "fractional", "random")


def _call(module, *args):
    with torch.no_grad():
        return module(*args)


def _assert_equal_by_the_rule(module, x, size, mask):
    """Of a swapped block: tokens by the rule of tolerance, masks bit for bit, and that the fused form ran."""
    assert why_original(module, (x, size, mask), {}) == ""
    with launches() as heard:
        got, valid = _call(module, x, size, mask)
    with irt.disabled():
        base, expected = _call(module, x, size, mask)
        wide = copy.deepcopy(module).double()
        truth, _ = _call(wide, x.double(), size, None if mask is None else mask.double())
    assert got.stride() == base.stride()
    assert_close_to_truth(got, truth, base, numerics=numerics_of(heard))
    assert (valid is None) == (expected is None)
    if mask is not None:
        assert torch.equal(valid, expected)


# ---- transformer blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [_ours, _theirs])
@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize(("window", "shift"), [(4, 0), (4, 2), (5, 1)])
def test_blocks(build, kind, window, shift):
    block = irt.accelerate(_block(build, window, shift), strict=True)
    assert record_of(block).adapter.name == "mat.block"
    size = (2 * window, 3 * window)
    mask = None if kind is None else _token_mask(kind, *size, batch=2)
    x = _tokens(*size, batch=2)
    _assert_equal_by_the_rule(block, x, size, mask)
    if mask is not None:
        _assert_equal_by_the_rule(block, x * (mask > 0), size, mask)


@pytest.mark.parametrize("name", _case("mat_swin_block")[0]["args"])
def test_golden_blocks(name):
    case, tensors = _case("mat_swin_block")
    args, given = case["args"][name], case["inputs"][name]
    block = mat_layers.SwinBlock(180, args["num_heads"], args["effective_window_size"], args["effective_shift_size"])
    irt.accelerate(_filled(block, case["weights"]), strict=True)
    size, mask = tuple(given["x_size"]), tensors.get(f"mask_in_{name}")
    x = recipe.image(f"mat_blk/x_{name}", 1 if mask is None else len(mask), size[0] * size[1], 180) * 2 - 1
    if "multiplied by (mask > 0)" in given["x"]:
        x = x * (mask > 0)[..., None]
    y, valid = _call(block, x, size, None if mask is None else mask[..., None])
    _agrees(case, tensors, f"out_{name}", y)
    if mask is not None:
        assert torch.equal(valid[..., 0], tensors[f"mask_out_{name}"])


@pytest.mark.parametrize(("kind", "eps"), [(foreign.Block, "1e-12"), (foreign.PortedBlock, "finfo")])
def test_the_least_norm_is_found(kind, eps):
    """The two of the public copies differ for tokens fainter than float32's rounding unit."""
    block = _block(_theirs, kind=kind)
    assert form_of(block, block_of(block)) == eps
    irt.accelerate(block, strict=True)
    size = (8, 8)
    x = _tokens(*size)
    x[:, ::2] *= 1e-9
    _assert_equal_by_the_rule(block, x, size, _token_mask("box", *size))


def test_tokens_that_are_a_view_of_a_map():
    block, size = irt.accelerate(_block()), (8, 12)
    x = recipe.image("map", 2, WIDTH, *size).flatten(2).transpose(1, 2)
    got, _ = _call(block, x, size)
    expected, _ = _call(block, x.contiguous(), size)
    assert torch.equal(got, expected)


def test_look_alikes_are_refused():
    block = irt.accelerate(_block(_theirs, kind=foreign.OddBlock))
    assert record_of(block) is None
    (row,) = irt.explain(block).rows
    assert "computes something else" in row["why not"]
    with pytest.raises(irt.UnsupportedError, match="something else"):
        irt.accelerate(block, strict=True)
    for change, why in (
        (lambda b: setattr(b.fuse, "activation", "swish"), "neither linear nor lrelu"),
        (lambda b: setattr(b.attn.q, "bias", None), "has no bias"),
        (lambda b: setattr(b.attn.v, "activation", "lrelu"), "are activated"),
        (lambda b: setattr(b.mlp, "fc2", foreign.Dense(2 * WIDTH, 3)), "do not fit together"),
    ):
        block = _block(_theirs)
        change(block)
        irt.accelerate(block)
        assert why in irt.explain(block).rows[0]["why not"]
    plain = nn.Module()
    plain.attn, plain.fuse, plain.mlp = nn.Identity(), nn.Linear(4, 2), nn.Identity()
    assert block_of(plain) is None


def test_calls_that_the_fused_form_cannot_take():
    """They run the original, which raises where it cannot either."""
    block, size = irt.accelerate(_block()), (8, 8)
    x, mask = _tokens(*size), _token_mask("box", *size)
    for args, why in (
        ((x, (8, 7), mask), "64 tokens for a map of (8, 7)"),
        ((x[:, :48], (8, 6), mask[:, :48]), "windows of 4 do not divide a map of (8, 6)"),
        ((x, size, mask[:, :7]), "the mask is not (B, H·W, 1)"),
        ((x.double(), size, mask), "tokens torch.float64 with weights torch.float32"),
        ((x.half(), size, mask), "tokens torch.float16 with weights torch.float32"),
        ((x[..., :5], size, mask), "the weights take 12 channels"),
        ((x, size, mask, None), "called with other arguments"),
    ):
        assert why in why_original(block, args, {}), why
    with pytest.raises(RuntimeError):
        block(x[:, :48], (8, 6), mask[:, :48])
    half = irt.accelerate(_block().half())
    assert record_of(half) is None
    assert "weights torch.float16" in irt.explain(half).rows[0]["why not"]
    assert _call(half, x.half(), size, mask)[0].dtype == torch.float16


def test_a_stored_mask_that_is_used_is_not_bypassed():
    """A copy in which sizes are compared as they should be takes the mask from its buffer, whatever it holds."""
    block = irt.accelerate(_block(_theirs))
    block.input_resolution = (64, 64)
    x = _tokens(64, 64)
    assert "its stored mask" in why_original(block, (x, (64, 64), None), {})
    assert why_original(block, (x[:, :64], (8, 8), None), {}) == ""


def test_weights_that_change_in_place_count_at_once():
    block, size = irt.accelerate(_block()), (8, 8)
    x, mask = _tokens(*size), _token_mask("random", *size)
    before, _ = _call(block, x, size, mask)
    for layer in (block.attn.q, block.attn.proj, block.fuse, block.mlp.fc2):
        with torch.no_grad():
            layer.weight.mul_(1.5)
            layer.bias.add_(0.5)
        after, _ = _call(block, x, size, mask)
        assert not torch.allclose(before, after)
        _assert_equal_by_the_rule(block, x, size, mask)
        before = after
    block.mlp.fc1.weight.data.copy_(block.mlp.fc1.weight.data * 2)
    _assert_equal_by_the_rule(block, x, size, mask)


def test_copies_and_restoring():
    block, size = _block(), (8, 8)
    x, mask = _tokens(*size), _token_mask("random", *size)
    own, plain = type(block), _call(block, x, size, mask)
    irt.accelerate(block)
    fast = _call(block, x, size, mask)
    twin = copy.deepcopy(block)
    assert record_of(twin) is not None
    assert torch.equal(_call(twin, x, size, mask)[0], fast[0])
    assert type(pickle.loads(pickle.dumps(block))) is own
    with torch.no_grad():
        twin.mlp.fc2.weight.zero_()
    assert torch.equal(_call(block, x, size, mask)[0], fast[0])
    irt.restore(block)
    assert type(block) is own
    assert torch.equal(_call(block, x, size, mask)[0], plain[0])


def test_gradients():
    block, size = _block(), (8, 8)
    x, mask = _tokens(*size), _token_mask("box", *size)
    fast, results = irt.accelerate(copy.deepcopy(block)), []
    for module in (block, fast):
        given = x.clone().requires_grad_()
        module(given, size, mask)[0].square().sum().backward()
        results.append([given.grad, *(p.grad for p in module.parameters())])
    largest = max(float(t.abs().max()) for t in results[0])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6 * largest)


def test_bfloat16():
    block, size = _block(), (8, 8)
    x, mask = _tokens(*size), _token_mask("random", *size)
    plain, _ = _call(block, x, size, mask)
    got, valid = _call(irt.accelerate(block, precision="bf16"), x, size, mask)
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    assert valid.dtype == mask.dtype
    assert (got - plain).square().mean().sqrt() < 0.03 * plain.square().mean().sqrt()


@pytest.mark.parametrize("kind", [None, "box", "fractional"])
def test_modules_in_bfloat16(kind):
    """As accurate as the original in that type; float16 stays the original's, and so do copies that cannot run in it."""
    block, size = irt.accelerate(_block().bfloat16(), strict=True), (8, 12)
    mask = None if kind is None else _token_mask(kind, *size, batch=2)
    _assert_equal_by_the_rule(block, _tokens(*size, batch=2).bfloat16(), size, mask)


# ---- whole networks -------------------------------------------------------------------------------------------------

SMALL = {"dim": 12, "channel_max": 16, "z_dim": 8, "w_dim": 10}


def _network(noise=True, resolution=128):
    return _noisy(recipe.fill(models.create("mat", resolution=resolution, noise=noise, **SMALL))).eval()


def _stranger(noise=True, synthesis=foreign.Synthesis, resolution=128):
    """The public structure, with the weights of ours."""
    options = {name: value for name, value in SMALL.items() if name in ("dim", "channel_max")}
    network = foreign.Generator(8, 10, resolution, use_noise=noise, **options).eval()
    if synthesis is not foreign.Synthesis:
        network.synthesis = synthesis(10, resolution, use_noise=noise, **options).eval()
    network.load_state_dict(_network(noise, resolution).state_dict(), strict=False)
    return network


def _noisy(network):
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(0.5)
    return network


def _image(batch=1, height=128, width=128):
    return recipe.image("image", batch, 3, height, width) * 2 - 1


def _hole(kind, height=128, width=128):
    mask = torch.ones(1, 1, height, width)
    if kind == "all hole":
        mask *= 0
    elif kind == "fractional":
        mask[..., 20:50, 90:] = recipe.image("fractions", 30, width - 90)
    elif kind == "above one":
        mask[..., 40:60, 40:60] = 2
    elif kind == "one pixel":
        mask[..., 70, 33] = 0
    elif kind == "strokes":
        mask[..., 5:9, :] = 0
        mask[..., -2:, -30:] = 0
    elif kind == "box":
        mask[..., 40:80, 33:70] = 0
    else:
        assert kind == "no hole"
    return mask


HOLES = ("box", "strokes", "one pixel", "fractional", "above one", "all hole", "no hole")


def _seeded(network, *args, seed=0, **options):
    torch.manual_seed(seed)
    with torch.no_grad():
        return network(*args, **options)


def _latent(batch=1):
    return recipe.image("z", batch, 8) * 2 - 1


def _assert_close(got, expected, bound=2e-5):
    """Of whole networks, by the end-to-end criterion."""
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).square().mean().sqrt() <= bound * theirs.square().mean().sqrt()


def _skipped(network):
    """What `explain` tells of the last call."""
    (note,) = [note for note in irt.explain(network).notes if "skipped" in note]
    return int(re.search(r"skipped (\d+)%", note)[1]) / 100


@pytest.mark.parametrize("build", [_network, _stranger])
@pytest.mark.parametrize("kind", HOLES)
def test_networks(build, kind):
    """With equal seeds the same images at every pixel, the first stage's too."""
    network, mask = build(), _hole(kind)
    fast = irt.accelerate(copy.deepcopy(network), composited=True, strict=True)
    args = (_image(), mask, _latent(), None)
    options = {"noise_mode": "random", "return_stg1": True}
    expected = _seeded(network, *args, **options)
    got = _seeded(fast, *args, **options)
    _assert_close(got, expected)
    known = (mask == 1).expand_as(got[0])
    assert torch.equal(got[0][known], args[0][known])
    share = _skipped(fast)
    assert share == {"no hole": 1.0, "all hole": 0.0}.get(kind, share)
    assert share > 0.4 or kind == "all hole"


@pytest.mark.parametrize("build", [_network, _stranger])
@pytest.mark.parametrize(("noise", "mode"), [(False, "none"), (True, "const"), (True, "random")])
def test_noise(build, noise, mode):
    network, args = build(noise), (_image(), _hole("box"), _latent(), None)
    fast = irt.accelerate(copy.deepcopy(network), composited=True)
    expected, other = (_seeded(network, *args, noise_mode=mode, seed=seed) for seed in (0, 1))
    _assert_close([_seeded(fast, *args, noise_mode=mode)], [expected])
    assert _skipped(fast) > 0.4
    assert not torch.equal(expected, other)


def test_our_fill():
    """`inpaint` and its seeds, oblong images, and a batch of different holes and styles."""
    network = _network()
    fast = irt.accelerate(copy.deepcopy(network), composited=True)
    image = (_image(2, 128, 256) + 1) / 2
    mask = 1 - torch.cat([_hole("box", 128, 256), _hole("strokes", 128, 256)])
    with torch.no_grad():
        _assert_close([fast.inpaint(image, mask, seed=3)], [network.inpaint(image, mask, seed=3)])
        both, single = fast.inpaint(image, mask, seed=3), fast.inpaint(image[:1], mask[:1], seed=3)
    assert both.shape == (2, 3, 128, 256)
    assert single.isfinite().all()
    assert _skipped(fast) > 0.4
    photo, hole = image[0].permute(1, 2, 0).numpy()[:100, :250], mask[0, 0].bool().numpy()[:100, :250]
    filled, expected = (fill(model, photo, hole) for model in (fast, network))
    _assert_close([torch.tensor(filled)], [torch.tensor(expected)])
    assert (filled[~hole] == photo[~hole]).all()
    assert not (filled == photo).all()
    assert _skipped(fast) > 0.4


def test_batches_of_strangers():
    network = _stranger()
    fast = irt.accelerate(copy.deepcopy(network), composited=True)
    args = (_image(2), torch.cat([_hole("box"), _hole("fractional")]), _latent(2), None)
    _assert_close([_seeded(fast, *args, noise_mode="const")], [_seeded(network, *args, noise_mode="const")])


def test_larger_networks():
    network = _stranger(resolution=256)
    fast = irt.accelerate(copy.deepcopy(network), composited=True, strict=True)
    args = (_image(1, 256, 256), _hole("box", 256, 256), _latent(), None)
    _assert_close([_seeded(fast, *args, noise_mode="random")], [_seeded(network, *args, noise_mode="random")])
    assert _skipped(fast) > 0.7


def test_the_golden_generator(monkeypatch):
    monkeypatch.setattr(mat_sparse, "WORTH", 1.0)  # tiles also where they do not pay: its hole is large
    case, tensors, network, image, mask, z, draws = _generator(128)
    irt.accelerate(network, composited=True)
    with torch.no_grad():
        results = network(image, mask, z, draws=draws, return_stg1=True)
    assert _skipped(network) > 0.1
    known = (mask == 1).expand_as(image)
    assert torch.equal(results[0][known], image[known])
    for key, result in zip(("out", "out_stg1"), results, strict=True):
        _agrees(case, tensors, key, result)


def test_only_where_the_caller_promises():
    """Not by default, and no more once the promise is taken back; whatever was swapped before stays swapped."""
    network, args = _network(), (_image(), _hole("box"), _latent())

    def swapped(model):
        return {(path, record_of(m).adapter.name) for path, m in model.named_modules() if record_of(m)}

    irt.accelerate(network)
    before = swapped(network)
    assert not any(name in ("mat.generator", "mat.tiles") for _, name in before)
    for _ in range(2):
        irt.accelerate(network, composited=True)
        assert ("", "mat.generator") in swapped(network)
    got = _seeded(network, *args)
    irt.accelerate(network)
    assert swapped(network) == before
    _assert_close([got], [_seeded(network, *args)])
    irt.accelerate(network, composited=True, skip="mat.generator")
    assert swapped(network) == before
    irt.accelerate(network, composited=True)
    irt.restore(network)
    assert swapped(network) == set()
    assert type(network) is models.mat.MAT


@pytest.mark.parametrize("kind", [foreign.Reversed, foreign.UnpastedSynthesis, foreign.Averaged])
def test_networks_whose_known_pixels_count_are_refused(kind):
    network = irt.accelerate(_stranger(synthesis=kind), composited=True)
    assert record_of(network.synthesis) is None
    rows = {row["module"]: row["why not"] for row in irt.explain(network).rows}
    assert rows["synthesis"] == "what its decoders make outside the hole reaches its encoders or its output"
    with pytest.raises(irt.UnsupportedError, match="outside the hole"):
        irt.accelerate(network, composited=True, strict=True)


def test_levels_that_write_to_their_maps():
    network = _stranger()
    for module in network.modules():
        if isinstance(module, foreign.DecoderLevel):
            module.__class__ = foreign.InPlaceLevel
    fast = irt.accelerate(copy.deepcopy(network), composited=True, strict=True)
    args = (_image(), _hole("box"), _latent(), None)
    _assert_close([_seeded(fast, *args, noise_mode="random")], [_seeded(network, *args, noise_mode="random")])
    assert _skipped(fast) > 0.4


@pytest.mark.parametrize("skip", [None, "stylegan2*"])
@pytest.mark.parametrize("build", [_network, _stranger])
def test_bfloat16_skips_what_float32_does(build, skip):
    """These layers stay float32; a caller's own autocast is the caller's, and `explain` says so."""
    network, args = build(), (_image(), _hole("box"), _latent(), None)
    whole = irt.accelerate(copy.deepcopy(network), precision="bf16", skip=skip)
    single, fast = (
        irt.accelerate(copy.deepcopy(network), precision=precision, composited=True, skip=skip)
        for precision in ("fp32", "bf16")
    )
    expected = _seeded(whole, *args, noise_mode="random")
    _seeded(single, *args, noise_mode="random")
    _assert_close([_seeded(fast, *args, noise_mode="random")], [expected], 2e-2)
    assert _skipped(fast) == _skipped(single) > 0.4
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert "under autocast" in why_original(fast if build is _network else fast.synthesis, args[:3], {})


def test_other_layers_are_refused():
    class Doubled(foreign.Styled):
        def forward(self, x, style, noise_mode="random", gain=1):
            return super().forward(x, style, noise_mode, 2 * gain)

    network = _stranger()
    network.synthesis.dec.Dec_64x64.conv1.__class__ = Doubled
    irt.accelerate(network, composited=True)
    rows = {row["module"]: row["why not"] for row in irt.explain(network).rows}
    assert rows["synthesis"].startswith("a style-modulated convolution: ")


def test_calls_without_tiles():
    """What the network itself refuses is refused by the network; hooks and training run the original."""
    network = _network()
    fast = irt.accelerate(network, composited=True)
    image, mask, z = _image(), _hole("box"), _latent()
    with pytest.raises(ValueError, match=r"image is 128×96"):
        fast(image[..., :96], mask[..., :96], z)
    with pytest.raises(ValueError, match=r"mask is \(1, 3, 128, 128\)"):
        fast(image, mask.expand(-1, 3, -1, -1), z)
    with pytest.raises(ValueError, match=r"image is \(0, 3, 128, 128\)"):
        fast(image[:0], mask[:0], z)
    assert torch.equal(_seeded(fast, image, mask.bool(), z), _seeded(fast, image, mask, z))
    assert _skipped(fast) > 0.4
    stranger = irt.accelerate(_stranger(), composited=True)
    with pytest.raises(UnboundLocalError):  # as the original does
        stranger(image, mask, z, None, noise_mode="none")
    assert "training" in why_original(fast.train(), (image, mask, z), {})
    layer = fast.eval().synthesis.dec.Dec_32x32.conv0
    assert "not in a call of the network" in why_original(layer, (torch.ones(1, 16, 16, 16), z), {}) or (
        record_of(layer).adapter.inner is not None
    )


def test_weights_of_networks_that_change_in_place():
    network, args = _network(), (_image(), _hole("box"), _latent())
    fast = irt.accelerate(copy.deepcopy(network), composited=True)
    before = _seeded(fast, *args)
    for model in (network, fast):
        with torch.no_grad():
            model.synthesis.dec.Dec_128x128.conv1.conv.weight.mul_(-1.5)
            model.synthesis.dec.Dec_64x64.conv0.conv.affine.bias.add_(0.5)
    after = _seeded(fast, *args)
    assert not torch.allclose(before, after)
    _assert_close([after], [_seeded(network, *args)])


def test_copies_of_networks():
    network, args = irt.accelerate(_network(), composited=True), (_image(), _hole("box"), _latent())
    out = _seeded(network, *args)
    twin = copy.deepcopy(network)
    assert torch.equal(_seeded(twin, *args), out)
    assert _skipped(twin) > 0.4
    plain = pickle.loads(pickle.dumps(network))
    assert type(plain) is models.mat.MAT
    _assert_close([_seeded(plain, *args)], [out])


def test_what_is_not_needed_is_zero():
    """Not memory that nobody wrote: 0 · NaN would pass the paste of known pixels."""
    network = irt.accelerate(_network(), composited=True)
    layer = network.synthesis.first_stage.dec_conv[0].conv0
    x, style = recipe.image("x", 1, 12, 64, 64), recipe.image("style", 1, 36)
    hole = adapter.Hole.of(_hole("one pixel"), 3)
    token = adapter._hole.set(hole)
    try:
        got = _call(layer, x, style)
    finally:
        adapter._hole.reset(token)
    with irt.disabled():
        dense = _call(layer, x, style)
    needed = hole.levels[128, 128].conv0.expand_as(got)
    torch.testing.assert_close(got[needed], dense[needed], rtol=0, atol=1e-5 * float(dense.abs().max()))
    assert (got == 0).float().mean() > 0.9
    assert hole.done < 0.1 * hole.dense


def test_maps_of_tiles():
    """What the first convolution of a level returns is, to everybody but the second, the tensor that it stands for."""
    layer = irt.accelerate(_network(), composited=True).synthesis.first_stage.dec_conv[0].conv0
    x, style = recipe.image("x", 1, 12, 64, 64), recipe.image("style", 1, 36)
    other = recipe.image("other", 1, 12, 128, 128)
    token = adapter._hole.set(adapter.Hole.of(_hole("box"), 3))
    try:
        lazy, again = _call(layer, x, style), _call(layer, x, style)
        eager = layer(x.requires_grad_(), style)
    finally:
        adapter._hole.reset(token)
    assert isinstance(lazy, TiledMap)
    assert not isinstance(eager, TiledMap)
    eager.sum().backward()
    assert x.grad.abs().max() > 0
    plain = eager.detach()
    assert (lazy.shape, lazy.stride(), lazy.dtype) == (plain.shape, plain.stride(), plain.dtype)
    assert torch.equal(lazy * 1, plain)
    assert repr(lazy) == repr(plain)
    for total in (lazy + other, other + lazy):
        assert isinstance(total, TiledMap)
        assert torch.equal(total * 1, plain + other)
    assert torch.equal(torch.add(lazy, other, alpha=2), plain + 2 * other)
    assert torch.equal(lazy + 1, plain + 1)
    again += other
    assert isinstance(again, TiledMap)
    assert torch.equal(again.clone(), plain + other)
    _check_writes(lazy, plain, other)
    total = lazy + other
    other.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        total * 1


def _doubled_in_part(t):
    t[:, 1:3, 40:] *= 2


def _check_writes(lazy, plain, other):
    """What is written to a map, or to a view of it, is in it from then on, and in none that was made of it before."""
    for change in (
        lambda t: t.mul_(0.5),
        lambda t: t.clamp_(-0.1, 0.1),
        lambda t: t.zero_(),
        lambda t: F.relu_(t),
        lambda t: t.add_(other, alpha=2),
        lambda t: t.add_(other[:, :, :1]),
        lambda t: t.view(t.shape).transpose(2, 3).sub_(1),
        lambda t: t.__setitem__((0, 0), 5),
        lambda t: torch.add(t, other, out=t),
        _doubled_in_part,
    ):
        map_, expected = lazy + other, plain + other
        before, same = map_ + other, map_
        change(map_)
        change(expected)
        same += other
        assert same is map_
        assert torch.equal(map_ * 1, expected.add_(other))
        assert torch.equal(map_ + other, expected + other)
        assert torch.equal(read_pixels(map_, torch.tensor([0, 9000])), read_pixels(expected, torch.tensor([0, 9000])))
        assert torch.equal(F.conv2d(map_, other[:3, :, :1, :1]), F.conv2d(expected, other[:3, :, :1, :1]))
        assert torch.equal(before * 1, plain + other + other)
    with pytest.raises(RuntimeError, match="changes the shape"):
        lazy.squeeze_(0)
    assert torch.equal(lazy * 1, plain)


@pytest.mark.parametrize("inference", [False, True])
def test_pointwise_convolutions_of_maps_of_tiles(inference, monkeypatch):
    """RGB is made of the pixels that were computed; every other convolution, and of a sum, is the plain one."""
    layer = irt.accelerate(_network(), composited=True).synthesis.first_stage.dec_conv[0].conv1
    x, style = recipe.image("x", 1, 12, 128, 128), recipe.image("style", 1, 36)
    rgb, bias = recipe.image("rgb", 3, 12, 1, 1) - 0.5, torch.ones(3)
    token = adapter._hole.set(adapter.Hole.of(_hole("box"), 3))
    try:
        with torch.inference_mode(inference):
            lazy = _call(layer, x, style)
            plain = lazy.values()
            assert isinstance(lazy, TiledMap)
            for added, weight, options in (
                (None, rgb, {"bias": bias}),
                (None, rgb, {"stride": 2}),
                (None, rgb, {"padding": 1}),
                (None, rgb[:, :4], {"groups": 3}),
                (None, recipe.image("k3", 3, 12, 3, 3), {}),
                (x, rgb, {}),
            ):
                given, expected = (lazy, plain) if added is None else (lazy + added, plain + added)
                assert torch.equal(F.conv2d(given, weight, **options), F.conv2d(expected, weight, **options))
            with monkeypatch.context() as patch:
                patch.setattr(TiledMap, "values", lambda self: pytest.fail("all of it was computed"))
                got = F.conv2d(lazy, rgb)
    finally:
        adapter._hole.reset(token)
    assert type(got) is torch.Tensor
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, F.conv2d(plain, rgb), rtol=0, atol=1e-5)
    assert torch.equal(got == 0, (plain == 0).all(1, keepdim=True).expand_as(got))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_read_where_they_are(layout, grad):
    pixels = torch.tensor([0, 7, 34, 7])
    for channels in (1, 3):
        x = recipe.image("x", 1, channels, 5, 7).contiguous(memory_format=layout)
        with torch.set_grad_enabled(grad):
            assert torch.equal(read_pixels(x, pixels), x[0].flatten(1)[:, pixels].t())

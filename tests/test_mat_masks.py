"""MAT's masks from the input mask alone, against what the network computes layer by layer."""

from __future__ import annotations

import pytest
import torch

import inpaintrt as irt
from inpaintrt import models, ops
from inpaintrt.models import mat_layers, mat_masks
from inpaintrt.models.mat_layers import AttentionStep, PartialStep
from inpaintrt.ops.window_attention import windows
from inpaintrt.runtime.swap import insistent, record_of
from inpaintrt.testing import recipe

NONE_VALID, SOME_VALID, ALL_VALID = 0, 1, 2


def strokes(height, width):
    """Known but for two bands and a box that reaches the border."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    hole = ((x + 2 * y) % 97 < 12) | ((x - 40).abs() < 9) & (y > 30) | (y > height - 50) & (x > width - 60)
    return (~hole).float()


def masks_of(kind, height=128, width=128):
    one = torch.zeros(height, width)
    one[37, 101] = 1
    mask = {
        "random": (recipe.image("mask", height, width) < 0.02).float(),
        "strokes": strokes(height, width),
        "all valid": torch.ones(height, width),
        "all hole": torch.zeros(height, width),
        "one pixel valid": one,
        "one pixel hole": 1 - one,
        "half": (torch.arange(width) < width // 2).float().expand(height, width),
        "fractional": recipe.image("fractions", height, width) * (recipe.image("where", height, width) < 0.01),
    }[kind]
    return mask[None, None].clone()


KINDS = ("random", "strokes", "all valid", "all hole", "one pixel valid", "one pixel hole", "half", "fractional")


def _stage(resolution=128):
    network = models.create("mat", resolution=resolution, dim=6, z_dim=4, w_dim=4, channel_max=8, noise=False)
    return recipe.fill(network).synthesis.first_stage


def _run(stage, mask):
    """What every partial convolution and block was given, by path, in order; alone with a mask it gives the same."""
    seen = {}
    for path, module in stage.named_modules():
        if isinstance(module, (mat_layers.PartialConv, mat_layers.SwinBlock)):
            module.register_forward_hook(lambda m, args, out, path=path: seen.update({path: (m, args, out)}))
    height, width = mask.shape[2:]
    resolution = 64 << len(stage.enc_conv)
    tokens = torch.ones(len(mask), 256 * (height // resolution) * (width // resolution), 6)
    image = recipe.image("image", len(mask), 3, height, width) * 2 - 1
    with torch.no_grad():
        stage.encode(image, mask, torch.ones(len(mask), 2, 4), tokens)
        plan, before = mat_masks.mask_plan(mask, resolution), mask
        for path, (module, args, out) in seen.items():
            if out[1] is None:
                assert path not in plan.steps
                continue
            (x, *size, given), step = args, plan.steps[path]
            assert type(given) is type(step), "the network hands its layers their steps"
            assert torch.equal(given.valid, step.valid), path
            alone, valid = module.forward(x, *size, mat_layers.to_tokens(before) if size else before)
            assert torch.equal(alone, out[0]), path
            assert torch.equal(valid, out[1]), path
            assert torch.equal(valid.reshape(step.valid.shape), step.valid), path
            if size:
                assert torch.equal(step.mask, before.permute(0, 2, 3, 1)), path
                assert (step.window, step.shift) == (module.window, module.shift), path
            before = mat_layers.to_features(valid, size[0]) if size else valid
    assert [*plan.steps] == [path for path, (*_, out) in seen.items() if out[1] is not None]
    return plan


def _parts(plan, kind):
    return {path: step for path, step in plan.steps.items() if isinstance(step, kind)}


def _kinds(step):
    """Of each rolled window: every token 0, anything else, every token 1."""
    _, height, width, _ = step.mask.shape
    keys = mat_layers.Windows(height, width, step.window, step.shift).cut(step.mask)
    kinds = SOME_VALID + (keys == 1).all(1).int() - (keys == 0).all(1).int()
    return kinds.view(-1, height // step.window, width // step.window)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_what_the_network_computes(kind):
    plan = _run(_stage(), masks_of(kind))
    assert len(_parts(plan, PartialStep)) == 5
    assert len(_parts(plan, AttentionStep)) == 5


@pytest.mark.parametrize("resolution", [256, 512])
def test_larger_networks(resolution):
    plan = _run(_stage(resolution), masks_of("strokes", resolution, resolution))
    assert plan.steps["tran.0.blocks.0"].mask.shape == (1, 64, 64, 1)
    assert [*plan.steps][1] == "enc_conv.0"
    assert len(_parts(plan, PartialStep)) == resolution.bit_length() - 3


def test_batches_and_oblong_maps():
    mask = torch.cat([masks_of("one pixel valid", 128, 256), masks_of("strokes", 128, 256)])
    _run(_stage(), mask)


def test_kinds_of_windows():
    plan = mat_masks.mask_plan(masks_of("half"), 128)
    first, second = plan.steps["tran.0.blocks.0"], plan.steps["tran.0.blocks.1"]
    # 64 columns: validity ends at 33 after two 3×3 windows, in the fifth window of eight
    assert _kinds(first)[0, 0].tolist() == [ALL_VALID] * 4 + [SOME_VALID] + [NONE_VALID] * 3
    # and at 40 after that; shifted by 4, windows begin at 4, 12, …, 60, and the last wraps round to valid columns
    assert _kinds(second)[0, 0].tolist() == [ALL_VALID] * 4 + [SOME_VALID] + [NONE_VALID] * 2 + [SOME_VALID]
    for kind, whole in (("all valid", ALL_VALID), ("all hole", NONE_VALID)):
        steps = _parts(mat_masks.mask_plan(masks_of(kind), 128), AttentionStep).values()
        assert all((_kinds(step) == whole).all() for step in steps)
    plan = mat_masks.mask_plan(masks_of("fractional"), 128)
    assert (_kinds(plan.steps["tran.0.blocks.0"]) == SOME_VALID).any()


def test_windows_without_a_valid_token_hold_one_vector():
    """So a block need be run once on a single token for all of them; after the group's convolution they are 0 again."""
    stage, mask = _stage(), masks_of("half")
    outputs = {}
    for i in range(2):
        stage.tran[0].blocks[i].register_forward_hook(lambda m, args, out, i=i: outputs.update({i: (args[0], out[0])}))
    stage.tran[0].register_forward_hook(lambda m, args, out: outputs.update(group=out[0]))
    with torch.no_grad():
        stage.encode(recipe.image("i", 1, 3, 128, 128), mask, torch.ones(1, 2, 4), torch.ones(1, 256, 6))
        plan = mat_masks.mask_plan(mask, 128)
        for i in range(2):
            step, block = plan.steps[f"tran.0.blocks.{i}"], stage.tran[0].blocks[i]
            windows = mat_layers.Windows(64, 64, step.window, step.shift)
            inside = (_kinds(step) == NONE_VALID).flatten()
            before, after = (windows.cut(tokens)[inside].flatten(0, 1) for tokens in outputs[i])
            assert len(before)
            assert (before == before[0]).all()
            values = block.attn.proj(block.attn.v(before[:1]))
            alone = block.mlp(block.fuse(torch.cat([before[:1], values], -1)))
            torch.testing.assert_close(after, alone.expand_as(after), rtol=1e-5, atol=1e-6)
        nothing = plan.steps["tran.0.conv"].valid.flatten() == 0
        assert nothing.any()
        assert (outputs["group"][0, nothing] == 0).all()


@pytest.mark.parametrize("kind", ["half", "all hole"])
def test_fused_blocks_meet_one_value_in_them(kind, monkeypatch):
    """Bit for bit, which is what `window_attention` computes such windows in closed form by."""
    stage, mask = _stage(), masks_of(kind)
    steps = iter(_parts(mat_masks.mask_plan(mask, 128), AttentionStep).values())
    found = []

    def spied(q, k, v, **options):
        if options["mask"] is not None:
            step = next(steps)
            assert torch.equal(step.mask, options["mask"])
            values = windows(v, options["window_size"], options["shift"])[0][(_kinds(step) == NONE_VALID).flatten()]
            assert torch.equal(values, values[:1, :1].expand_as(values))
            found.append(len(values))
        return original(q, k, v, **options)

    irt.accelerate(stage)
    assert all(record_of(block).adapter.name == "mat.block" for group in stage.tran for block in group.blocks)
    original = ops.window_attention
    monkeypatch.setattr(ops, "window_attention", spied)
    with torch.no_grad(), insistent():
        stage.encode(recipe.image("image", 1, 3, 128, 128) * 2 - 1, mask, torch.ones(1, 2, 4), torch.ones(1, 256, 6))
    assert found == {"half": [24, 16, 0, 0, 0], "all hole": [64, 64, 4, 4, 4]}[kind]


def test_half_precision_masks_are_counted_in_float32():
    mask = masks_of("strokes")
    ours = mat_masks.mask_plan(mask.bfloat16(), 128)
    for path, step in _parts(mat_masks.mask_plan(mask, 128), PartialStep).items():
        assert ours.steps[path].ratio.dtype == torch.float32
        assert torch.equal(ours.steps[path].ratio, step.ratio)


def test_refusals():
    with pytest.raises(ValueError, match="resolution is 100; accepted: 128, 256, 512"):
        mat_masks.mask_plan(torch.ones(1, 1, 100, 100), 100)
    for shape in ((1, 3, 128, 128), (1, 128, 128), (1, 1, 128, 100), (1, 1, 120, 128)):
        with pytest.raises(ValueError, match=r"mask is .*; accepted: \(B, 1, H, W\), H and W divisible by 128"):
            mat_masks.mask_plan(torch.ones(shape), 128)

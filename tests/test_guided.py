"""guided-diffusion's UNet, classifier and blocks against the public implementation's numbers, and the loading of weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import save_file

from inpaintrt import models
from inpaintrt.models import guided_classifier, guided_layers, guided_unet
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import assert_close_to_truth, recipe

from . import golden_style as golden

SMALL = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "attention_resolutions": (2,)}
"""Attention over 64 channels is one head, as where nothing is said."""
BLOCKS = golden.case("guided_blocks")["cases"]


def stored(name, variant):
    """The stored tensors of a variant, by what they are."""
    start = f"{variant}/"
    return {key.removeprefix(start): t for key, t in golden.tensors(name).items() if key.startswith(start)}


def filled(name, variant, module):
    """Recipe weights; checks the public state-dict layout on the way."""
    own = {key: [list(t.shape), "float32"] for key, t in module.state_dict().items()}
    layouts = golden.case(name)["state_dict"]
    layout = layouts[variant]
    assert own == (layouts[layout.removeprefix("same as ")] if isinstance(layout, str) else layout)
    return recipe.fill(module).eval()


def res_block(channels, emb_channels, dropout, out_channels=None, use_scale_shift_norm=False, **rest):
    resample = next((way for way in ("up", "down") if rest.get(way)), "")
    kernel = 3 if rest.get("use_conv") else 1
    return guided_layers.ResBlock(
        channels, out_channels or channels, emb_channels, dropout=dropout, scale_shift=use_scale_shift_norm,
        resample=resample, skip_kernel=kernel,
    )  # fmt: skip


def attention_block(channels, num_heads=1, num_head_channels=-1, use_new_attention_order=False):
    heads = guided_unet.heads_of(channels, num_heads, num_head_channels)
    return guided_layers.AttentionBlock(channels, heads, use_new_attention_order)


@pytest.mark.parametrize("case", [name for name in BLOCKS if name.startswith(("res_", "att_"))])
def test_blocks(case):
    make = res_block if case.startswith("res_") else attention_block
    block, given = filled("guided_blocks", case, make(**BLOCKS[case]["arguments"])), stored("guided_blocks", case)
    args = [given[key] for key in ("x", "emb") if key in given]
    with torch.no_grad():
        out, wide = block(*args), block.double()(*(t.double() for t in args))
    assert_close_to_truth(out, given["out64"], given["out"])
    torch.testing.assert_close(wide, given["out64"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [name for name in BLOCKS if name.startswith("gn_")])
def test_group_norm(case):
    given = stored("guided_blocks", case)
    norm = guided_layers.GroupNorm32(BLOCKS[case]["channels"])
    recipe.fill(torch.nn.Sequential(norm))
    with torch.no_grad():
        out = norm(given["x"])
        wide = copy.deepcopy(norm).double()(given["x"].double())
    assert_close_to_truth(out, given["norm64"], given["norm"])
    torch.testing.assert_close(wide, given["norm64"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [name for name in BLOCKS if name.startswith("temb_")])
def test_timestep_embedding(case):
    given = stored("guided_blocks", case)
    made = guided_layers.timestep_embedding(given["t"], BLOCKS[case]["dim"])
    torch.testing.assert_close(made, given["out"], rtol=0, atol=1e-4)  # an ulp of a frequency, times 1000
    assert_close_to_truth(made, given["out64"], given["out"])


@pytest.mark.parametrize("case", ["qkv_h2", "qkv_h3"])
def test_orders_of_attention(case):
    given, heads = stored("guided_blocks", case), BLOCKS[case]["heads"]
    for name, new in (("legacy_out", False), ("new_out", True)):
        wide = guided_layers.attention(given["qkv"].double(), heads, new)
        torch.testing.assert_close(wide, given[f"{name}64"], rtol=1e-12, atol=1e-12)
        assert_close_to_truth(
            guided_layers.attention(given["qkv"], heads, new), given[f"{name}64"], given[name], context=name
        )


def test_changes_of_size():
    given = stored("guided_blocks", "resample")
    x = given["x"]
    assert torch.equal(guided_layers.Upsample(6, conv=False)(x), given["nearest"])
    torch.testing.assert_close(guided_layers.Downsample(6, conv=False)(x), given["avgpool"])
    for way, made in (("down", guided_layers.Downsample(6, True, 8)), ("up", guided_layers.Upsample(6, True, 8))):
        layer = recipe.fill(made)
        with torch.no_grad():
            assert_close_to_truth(layer(x), given[f"conv_{way}64"], given[f"conv_{way}"])


VARIANTS = golden.case("guided_unet")["variants"]


def small(variant):
    """The golden case's network, its inputs, and what should come out."""
    arguments = {key: value for key, value in VARIANTS[variant]["arguments"].items() if key != "image_size"}
    network = filled("guided_unet", variant, models.create("guided_unet", **{"use_scale_shift_norm": False,
        "resblock_updown": False, **arguments}))  # fmt: skip
    given = stored("guided_unet", variant)
    return network, [given[key] for key in ("x", "t", "y") if key in given], given


@pytest.mark.parametrize("variant", VARIANTS)
def test_unet(variant):
    network, args, given = small(variant)
    taps = {}
    for name in VARIANTS[variant]["taps"]:
        network.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: taps.update({name: out}))
    with torch.no_grad():
        out = network(*args)
    assert_close_to_truth(out, given["out64"], given["out"])
    for name, got in taps.items():
        if f"tap.{name}" in given:
            torch.testing.assert_close(got, given[f"tap.{name}"], rtol=1e-4, atol=1e-5)
    # The case took float64's cosine of float32's frequencies; ours is float32's in all dtypes: at t = 999 the last bit is 6e-5.
    sinusoid = guided_layers.timestep_embedding(args[1], network.model_channels)
    torch.testing.assert_close(sinusoid, given["sinusoid"], rtol=0, atol=1e-4)
    half = network.model_channels // 2
    angles = args[1].double()[:, None] * torch.exp(-math.log(10000) * torch.arange(half).float() / half).double()
    network.time_embed.register_forward_pre_hook(lambda module, args: torch.cat([angles.cos(), angles.sin()], 1))
    with torch.no_grad():
        wide = network.double()(args[0].double(), *args[1:])
    torch.testing.assert_close(wide, given["out64"], rtol=1e-12, atol=1e-12)


def test_half_precision_torso():
    network, args, given = small("legacy_updown_film")
    network.convert_torso(torch.float16)
    half = {name for name, p in network.named_parameters() if p.dtype == torch.float16}
    assert half == set(VARIANTS["legacy_updown_film"]["fp16torso"]["half_parameters"])
    with torch.no_grad():
        out = network(*args)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, given["out_fp16torso"], rtol=0, atol=5e-3)
    network.convert_torso(torch.float32)
    with torch.no_grad():
        assert network(*args).sub(given["out"]).abs().max() < 5e-3


@pytest.mark.parametrize("variant", golden.case("guided_classifier")["variants"])
def test_classifier_and_its_gradient(variant):
    arguments = dict(golden.case("guided_classifier")["variants"][variant]["arguments"])
    assert arguments.pop("pool") == "attention"
    network = filled("guided_classifier", variant, models.create("guided_classifier", **arguments))
    given = stored("guided_classifier", variant)

    def guidance(network, x):
        x = x.clone().requires_grad_()
        logits = network(x, given["t"])
        chosen = logits.log_softmax(dim=-1).gather(1, given["y"][:, None])
        return logits.detach(), torch.autograd.grad(chosen.sum(), x)[0]

    for key, out in zip(("logits", "grad"), guidance(network, given["x"]), strict=True):
        assert_close_to_truth(out, given[f"{key}64"], given[key], context=key)
    for key, wide in zip(("logits", "grad"), guidance(network.double(), given["x"].double()), strict=True):
        torch.testing.assert_close(wide, given[f"{key}64"], rtol=1e-6, atol=1e-7)


def test_released_networks_have_the_published_sizes():
    sizes = {}
    with torch.device("meta"):
        for family, definition in (("guided_unet", guided_unet), ("guided_classifier", guided_classifier)):
            for name, options in definition.PUBLISHED.items():
                network = models.create(family, **options)
                sizes[name] = sum(p.numel() for p in network.parameters()), len(network.state_dict())
                state = network.state_dict()
                told = definition.config_from_state_dict(state)
                made = models.create(family, **told)
                hidden = {"dropout"} if "dropout" not in options else set()
                assert {**made.config, **dict.fromkeys(hidden)} == {**network.config, **dict.fromkeys(hidden)}, name
    assert sizes["256x256_diffusion_uncond"] == (552_814_086, 566)
    assert sizes["256x256_diffusion"] == (553_838_086, 567)
    assert sizes["256x256_classifier"] == (54_096_360, 249)


def test_sizes_and_arguments_that_a_network_cannot_take():
    network = models.create("guided_unet", **SMALL)
    t = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="image is 16×15; accepted: height and width divisible by 2"):
        network(torch.zeros(1, 3, 16, 15), t)
    with pytest.raises(ValueError, match=r"x is \(1, 4, 16, 16\); accepted: \(B, 3, H, W\)"):
        network(torch.zeros(1, 4, 16, 16), t)
    with pytest.raises(ValueError, match=r"timesteps is \(1,\); accepted: \(2,\)"):
        network(torch.zeros(2, 3, 16, 16), t)
    with pytest.raises(ValueError, match="accepted: None"):
        network(torch.zeros(1, 3, 16, 16), t, t)
    labelled = models.create("guided_unet", **SMALL, num_classes=4)
    with pytest.raises(ValueError, match=r"y is None; accepted: \(1,\), a label from 0 to 3"):
        labelled(torch.zeros(1, 3, 16, 16), t)
    classifier = models.create("guided_classifier", image_size=16, num_head_channels=32, **SMALL)
    with pytest.raises(ValueError, match="image is 8×8; accepted: 16×16, for which the pool stores positions"):
        classifier(torch.zeros(1, 3, 8, 8), t)
    with pytest.raises(ValueError, match="attention over 96 channels with num_head_channels 64"):
        models.create("guided_unet", **{**SMALL, "channel_mult": (1, 3)})
    with pytest.raises(ValueError, match="a group norm of 48 channels; accepted: multiples of 32"):
        models.create("guided_unet", **{**SMALL, "model_channels": 48})
    with pytest.raises(ValueError, match="image_size is 15"):
        models.create("guided_classifier", image_size=15, **SMALL)


VISIBLE = (
    {},
    {"num_res_blocks": 2, "use_scale_shift_norm": False},
    {"channel_mult": (1, 2, 4), "attention_resolutions": (2, 4), "num_classes": 3},
    {"resblock_updown": False, "out_channels": 3},
    {"resblock_updown": False, "conv_resample": False, "in_channels": 6},
    {"channel_mult": (2,), "attention_resolutions": (1,)},
    {"channel_mult": (0.5, 1), "model_channels": 64},
)


@pytest.mark.parametrize("options", VISIBLE)
def test_weights_tell_what_they_are_of(options, tmp_path):
    network = recipe.fill(models.create("guided_unet", **{**SMALL, **options}))
    save_file({f"model.{key}": t for key, t in network.state_dict().items()}, tmp_path / "unet.safetensors")
    loaded = models.load("guided_unet", tmp_path / "unet.safetensors")
    silent = ("resblock_updown",) if len(network.config["channel_mult"]) == 1 else ()
    assert all(loaded.config[key] == value for key, value in network.config.items() if key not in silent)
    x = recipe.image("x", 1, network.config["in_channels"], 8, 12)
    y = None if network.num_classes is None else torch.tensor([2])
    with torch.no_grad():
        assert torch.equal(loaded(x, torch.tensor([7]), y), network(x, torch.tensor([7]), y))


@pytest.mark.parametrize(
    "options", [{}, *VISIBLE[1:2], *VISIBLE[3:6], {"channel_mult": (1, 2, 2), "num_res_blocks": 3}]
)
def test_weights_tell_what_classifier_they_are_of(options, tmp_path):
    options = {key: value for key, value in {**SMALL, **options}.items() if key != "out_channels"}
    network = recipe.fill(models.create("guided_classifier", image_size=16, out_channels=5, **options))
    save_file(network.state_dict(), tmp_path / "classifier.safetensors")
    loaded = models.load("guided_classifier", tmp_path / "classifier.safetensors")
    x = recipe.image("x", 1, network.config["in_channels"], 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x, torch.tensor([7])), network(x, torch.tensor([7])))


def test_what_weights_do_not_tell_is_asked_for(tmp_path):
    path = tmp_path / "unet.pt"
    network = recipe.fill(models.create("guided_unet", **{**SMALL, "channel_mult": (1, 3)}, num_heads=4))
    torch.save(network.state_dict(), path)
    with pytest.raises(
        WeightsError, match=r"attention over 96 channels with num_head_channels 64.* Weights do not tell it"
    ):
        models.load("guided_unet", path)
    x, t = recipe.image("x", 1, 3, 8, 8), torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(models.load("guided_unet", path, num_heads=4)(x, t), network(x, t))
        assert not torch.equal(models.load("guided_unet", path, num_head_channels=32)(x, t), network(x, t))
        other = models.load("guided_unet", path, num_heads=4, use_new_attention_order=True)
        assert not torch.equal(other(x, t), network(x, t))


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    network = recipe.fill(models.create("guided_classifier", image_size=16, **SMALL))
    save_file(network.state_dict(), path)
    with pytest.raises(WeightsError, match="a guided_classifier generator"):
        models.load("guided_unet", path)
    state = models.create("guided_unet", **SMALL).state_dict()
    save_file({key: t for key, t in state.items() if not key.startswith("time_embed.0")}, path)
    with pytest.raises(WeightsError, match=r"the key 'time_embed\.0\.weight' is missing"):
        models.load("guided_unet", path)

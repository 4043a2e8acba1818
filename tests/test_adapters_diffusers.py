"""The residual blocks of diffusers' UNets in their fused form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import inpaintrt as irt
from inpaintrt.runtime.swap import record_of
from inpaintrt.testing import assert_close_to_truth, recipe

resnet = pytest.importorskip("diffusers.models.resnet", reason="diffusers is not installed")

BLOCKS: dict[str, dict[str, Any]] = {
    "added": {},
    "scaled": {"time_embedding_norm": "scale_shift"},
    "wider": {"out_channels": 24, "conv_shortcut_bias": False},
    "doubled": {"up": True},
    "halved": {"down": True, "time_embedding_norm": "scale_shift", "out_channels": 8},
    "doubled by torch": {"up": True, "kernel": "sde_vp"},
    "without embedding": {"temb_channels": None, "output_scale_factor": 2.0, "eps": 1e-5, "groups_out": 8},
    "activated before": {"skip_time_act": True, "dropout": 0.3},
}


def _block(**options: Any) -> Any:
    given = {"in_channels": 16, "temb_channels": 12, "groups": 4} | options
    return recipe.fill(resnet.ResnetBlock2D(**given)).eval()


def _inputs(block: Any, count: int = 2) -> tuple[Tensor, Tensor | None]:
    x = recipe.image("features", count, 16, 12, 10) * 4 - 2
    return x, None if block.time_emb_proj is None else recipe.image("embedding", count, 12) * 4 - 2


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _reasons(model: Any, *example: Any) -> list[Any]:
    return [row["why not"] for row in irt.explain(model, *example).rows if row["adapter"] == "diffusers.residual"]


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_block_computes_the_same(name: str) -> None:
    block = _block(**BLOCKS[name])
    inputs = _inputs(block)
    truth, base = copy.deepcopy(block).double()(*map(_double, inputs)), block(*inputs)
    irt.accelerate(block)
    assert record_of(block).adapter.name == "diffusers.residual"
    assert not any(_reasons(block, *inputs))
    numerics = irt.verify(block, *inputs)
    assert numerics.ok, str(numerics)
    out = block(*inputs)
    assert (out - truth).abs().max() <= 1e-4 * truth.abs().max()
    assert out.shape == base.shape
    with irt.use_backend("reference"):
        assert_close_to_truth(block(input_tensor=inputs[0], temb=inputs[1]), truth, base)
    assert torch.equal(irt.restore(block)(*inputs), base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up": True, "kernel": "fir"}, "computes something else"),
        ({"non_linearity": "gelu"}, "computes something else"),
    ],
)
def test_other_blocks_are_left_alone(options: dict[str, Any], message: str) -> None:
    block = _block(**options)
    inputs = _inputs(block)
    with torch.no_grad():
        base = block(*inputs)
        irt.accelerate(block, skip="convolution")
        assert message in _reasons(block)[0]
        assert torch.equal(block(*inputs), base)


def test_calls_that_the_original_takes() -> None:
    block = _block()
    x, embedding = _inputs(block)
    assert embedding is not None
    with torch.no_grad():
        one = block(x, embedding[:1])
    irt.accelerate(block)
    with torch.no_grad():
        assert torch.equal(block(x, embedding[:1]), one)
    assert "accepted: (2, 12)" in _reasons(block, x, embedding[:1])[0]
    assert "gradient" in _reasons(block, x.requires_grad_(), embedding)[0]
    bare = _block(temb_channels=None)
    with torch.no_grad():
        added = bare(x, torch.ones(2, 16, 1, 1))  # which the original adds as it is
        irt.accelerate(bare)
        assert torch.equal(bare(x, torch.ones(2, 16, 1, 1)), added)


@pytest.mark.parametrize("norm", ["default", "scale_shift"])
@torch.no_grad()
def test_a_unet(norm: str) -> None:
    unet = pytest.importorskip("diffusers.models.unets.unet_2d").UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift=norm, downsample_type="resnet", upsample_type="resnet",
    )  # fmt: skip
    recipe.fill(unet.eval())
    x, t = recipe.image("noisy", 2, 3, 16, 16) * 2 - 1, torch.tensor([3, 500])
    truth, base = copy.deepcopy(unet).double()(x.double(), t).sample, unet(x, t).sample
    irt.accelerate(unet)
    blocks = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    assert len(blocks) == 9
    assert {record_of(block).adapter.name for block in blocks} == {"diffusers.residual"}
    out = unet(x, t).sample
    assert (out - truth).square().mean().sqrt() <= 2e-5 * truth.square().mean().sqrt()
    assert torch.equal(irt.restore(unet)(x, t).sample, base)

"""PUT's attention in its fused form: copies of other people's modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import inpaintrt as irt
from inpaintrt import models
from inpaintrt.adapters.deferred import Deferred
from inpaintrt.runtime.swap import record_of
from inpaintrt.testing import assert_close_to_truth, recipe

from . import foreign_put

KINDS: dict[str, dict[str, Any]] = {
    "separate": {},
    "joint": {"kind": foreign_put.Joint},
    "joint without biases": {"kind": foreign_put.Joint, "bias": False},
}


def _model(kind: str = "separate", **options: Any) -> Any:
    return recipe.fill(foreign_put.Model(**KINDS[kind] | options)).eval()


def _tokens(kind: str, count: int = 2) -> Tensor:
    shape = (count, 35, 24) if kind == "separate" else (count, 5, 7, 24)
    return recipe.image("tokens", *shape) * 4 - 2


def _reasons(model: Any, *example: Any) -> list[Any]:
    return [row["why not"] for row in irt.explain(model, *example).rows if row["adapter"] == "put.attention"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_copy_computes_the_same(kind: str) -> None:
    model, x = _model(kind), _tokens(kind)
    truth, base = copy.deepcopy(model).double()(x.double()), model(x)
    irt.accelerate(model)
    assert [record_of(layer).adapter.name for layer in model.layers] == ["put.attention"] * 2
    out, weights = model(x)
    assert_close_to_truth(out, truth[0], base[0])
    assert isinstance(weights, Deferred)
    assert weights.shape == base[1].shape
    assert weights.stride() == base[1].stride()
    kept = model.layers[1].proj.weight.clone()
    for p in model.parameters():
        p.zero_()  # the average belongs to the call that returned it, whatever comes after
    assert_close_to_truth(weights + 0, truth[1], base[1])
    model.layers[1].proj.weight.copy_(kept)
    assert torch.equal(pickle.loads(pickle.dumps(weights)), weights + 0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_verified_restored_and_in_bf16(kind: str) -> None:
    model, x = _model(kind), _tokens(kind)
    base = model(x)[0]
    irt.accelerate(model)
    assert irt.verify(model, x).ok
    assert len(_reasons(model, x)) == 2
    assert not any(_reasons(model, x))
    low = irt.accelerate(model, precision="bf16")(x)
    assert low[0].dtype == torch.float32
    assert (low[0] - base).square().mean().sqrt() < 0.05 * base.std()
    assert torch.equal(irt.restore(model)(x)[0], base)


@pytest.mark.parametrize("kind", [foreign_put.Separate, foreign_put.Joint])
@torch.no_grad()
def test_a_block_computes_the_same(kind: Any) -> None:
    block = recipe.fill(foreign_put.Block(kind)).eval()
    x = _tokens("separate" if kind is foreign_put.Separate else "joint")
    truth, base = copy.deepcopy(block).double()(x.double()), block(x)
    irt.accelerate(block)
    assert record_of(block).adapter.name == "put.block"
    assert record_of(block.attn) is None
    out = block(x)
    assert isinstance(out[1], Deferred)
    for got, exact, expected in zip(out, truth, base, strict=True):
        assert_close_to_truth(got + 0, exact, expected)
    low = irt.accelerate(block, precision="bf16")(x)[0]
    assert low.dtype == torch.float32
    assert (low - base[0]).square().mean().sqrt() < 0.05 * base[0].std()
    assert irt.verify(irt.accelerate(block, precision="fp32"), x).ok


@torch.no_grad()
def test_a_block_with_another_activation_keeps_its_attention() -> None:
    block, x = recipe.fill(foreign_put.Block(factor=1.5)).eval(), _tokens("separate")
    base = block(x)
    irt.accelerate(block)
    assert record_of(block) is None
    assert record_of(block.attn).adapter.name == "put.attention"
    torch.testing.assert_close(block(x)[0], base[0], rtol=1e-5, atol=1e-5)
    whole = [row["why not"] for row in irt.explain(block, x).rows if row["adapter"] == "put.block"]
    assert "attention or activation is of another kind" in whole[0]


@pytest.mark.parametrize("generation", ["cvpr", "tpami"])
def test_our_network(generation: str) -> None:
    codec = {"codes": 24, "split": 16, "width": 8, "channels": 8, "outputs": 8, "decoder_channels": 8}
    network = models.create("put", codec=codec, generation=generation, grid=(4, 6), layers=2, width=32, heads=2)
    recipe.fill(network)
    x, rows = recipe.image("tokens", 3, 24, 32) * 4 - 2, torch.tensor([[3, 20, 0], [7, 1, 2], [5, 6, 23]])
    with torch.no_grad():
        base, truth = network.logits(x, rows), copy.deepcopy(network).double().logits(x.double(), rows)
    wanted = torch.autograd.grad(network.logits(x, rows).sum(), network.blocks[0].mlp.parameters())
    irt.accelerate(network)
    assert [record_of(block).adapter.name for block in network.blocks] == ["put.block"] * 2
    with torch.no_grad():
        assert_close_to_truth(network.logits(x, rows), truth, base)
        assert network.logits(x).shape == (3, 24, 16)
    for got, expected in zip(
        torch.autograd.grad(network.logits(x, rows).sum(), network.blocks[0].mlp.parameters()), wanted, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "causal"}, "of another kind"),
        ({"mode": "scaled"}, "of another kind"),
    ],
)
def test_look_alikes_are_refused(options: dict[str, Any], message: str) -> None:
    layer = recipe.fill(foreign_put.Separate(**options)).eval()
    irt.accelerate(layer)
    assert record_of(layer) is None
    assert message in _reasons(layer)[0]


@torch.no_grad()
def test_attention_that_returns_its_output_alone() -> None:
    layer, x = recipe.fill(foreign_put.Separate(returns="one")).eval(), _tokens("separate")
    mask = torch.ones(2, 35, dtype=torch.bool)
    mask[:, ::3] = False
    truth, base, masked = copy.deepcopy(layer).double()(x.double()), layer(x), layer(x, mask)
    irt.accelerate(layer)
    assert_close_to_truth(layer(x), truth, base)
    assert torch.equal(layer(x, mask), masked)


def test_windows_are_refused() -> None:
    layer = recipe.fill(foreign_put.Joint(window_size=(4, 4))).eval()
    irt.accelerate(layer)
    assert record_of(layer) is None
    assert "in windows" in _reasons(layer)[0]


@torch.no_grad()
def test_calls_that_the_original_takes() -> None:
    model, x = _model(), _tokens("separate")
    mask = torch.ones(2, 35, dtype=torch.bool)
    mask[:, ::3] = False
    masked, plain = model(x, mask), model(x)
    irt.accelerate(model)
    for got, expected in zip(model(x, mask), masked, strict=True):
        assert torch.equal(got, expected)
    assert all("mask of tokens" in why for why in _reasons(model, x, mask))
    with torch.enable_grad():
        out, weights = model(x)
        assert torch.equal(out, plain[0])
        weights.sum().backward()
    assert model.layers[1].key.weight.grad is not None
    model.layers[0].mode = "causal"  # changed after it was accelerated
    assert "of another kind" in _reasons(model, x)[0]
    assert not torch.allclose(model(x)[0], plain[0], atol=1e-3)


# ---- the quantiser --------------------------------------------------------------------------------------------------


def _features(count: int = 2) -> tuple[Tensor, Tensor]:
    return recipe.image("features", count, 12, 5, 7) * 4 - 2, (recipe.image("kinds", count, 1, 5, 7) > 0.5).float()


def _quantiser(**options: Any) -> Any:
    return recipe.fill(foreign_put.Quantiser(**options)).eval()


def _why_not(model: Any, *example: Any) -> str:
    return next(row["why not"] for row in irt.explain(model, *example).rows if row["adapter"] == "put.quantiser")


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("split", [24, None])
@pytest.mark.parametrize("told", [False, True])
@torch.no_grad()
def test_a_quantiser_finds_the_same_codes(table: bool, split: int | None, told: bool) -> None:
    quantiser, (z, kinds) = _quantiser(table=table, split=split), _features()
    given = (z, kinds) if told else (z,)
    truth, base = copy.deepcopy(quantiser).double()(*(t.double() for t in given)), quantiser(*given)
    irt.accelerate(quantiser)
    assert record_of(quantiser).adapter.name == "put.quantiser"
    out = quantiser(z, token_type=kinds) if told else quantiser(z)
    assert list(out) == list(base)
    for key, made in out.items():
        assert (made.dtype, made.shape, made.stride()) == (base[key].dtype, base[key].shape, base[key].stride())
        if made.is_floating_point():
            assert_close_to_truth(made, truth[key], base[key])
        else:
            assert torch.equal(made, base[key])
    assert irt.verify(quantiser, *given).ok
    assert torch.equal(irt.restore(quantiser)(*given)["index"], base["index"])


def test_gradients_of_a_quantiser() -> None:
    quantiser, (z, kinds) = _quantiser(table=True), _features()

    def gradients() -> tuple[Tensor, ...]:
        x = z.clone().requires_grad_()
        out = quantiser(x, kinds)
        return torch.autograd.grad(
            out["quantize"].square().sum() + out["quantize_loss"], (x, quantiser.embedding.weight)
        )

    wanted = gradients()
    irt.accelerate(quantiser)
    for got, expected in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "cosine"}, "its distance is of another kind"),
        ({"returns": "three"}, "something else than PUT's"),
        ({"learned": True}, "layers beside its codes"),
        ({"split": 41}, "codes of known patches are none, or more"),
    ],
)
def test_other_quantisers_are_refused(options: dict[str, Any], message: str) -> None:
    quantiser = irt.accelerate(_quantiser(**options))
    assert record_of(quantiser) is None
    assert message in _why_not(quantiser)


@torch.no_grad()
def test_calls_that_the_quantiser_takes_itself() -> None:
    quantiser, (z, kinds) = _quantiser(), _features()
    second = quantiser(z, kinds, topk=2)["index"]
    irt.accelerate(quantiser)
    assert torch.equal(quantiser(z, kinds, topk=2)["index"], second)
    assert "more than features and kinds" in _why_not(quantiser, z, kinds, 2)
    assert "35 kinds of tokens; accepted: one for each of 70" in _why_not(quantiser, z, kinds[:1])
    assert "input torch.float16 with weights torch.float32" in _why_not(quantiser, z.half())
    quantiser.distance = "cosine"  # changed after it was accelerated
    assert "of another kind" in _why_not(quantiser, z, kinds)


def test_our_quantiser_calls_the_op_itself() -> None:
    codec = models.put.PVQVAE(codes=24, split=16, width=8, channels=8, outputs=8, decoder_channels=8)
    irt.accelerate(codec.eval())
    assert record_of(codec.quantize) is None

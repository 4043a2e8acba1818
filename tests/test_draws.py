"""Equal random numbers in runs of different dtypes, and what `verify` makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inpaintrt as irt
from inpaintrt import models
from inpaintrt.runtime.draws import noted, replayed, seeded
from inpaintrt.testing import recipe

WAYS = {
    "randn of the input's dtype": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "rand of the default dtype": lambda x: torch.rand(x.shape),
    "like": lambda x: torch.randn_like(x) + torch.rand_like(x),
    "in place": lambda x: x.new_empty(x.shape).normal_() + x.new_empty(x.shape).uniform_(-1, 1),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "native dropout": lambda x: torch.native_dropout(x, 0.25, True)[0],
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.3)),
    "integers": lambda x: x[torch.randperm(len(x))] + torch.randint(0, 9, x.shape),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0] + torch.randn(x.shape),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_draw_the_same(way):
    x = recipe.image("x", 6, 8)
    with torch.no_grad():
        with seeded(nn.Identity()), noted() as random:
            single = WAYS[way](x)
        with replayed(random.draws):
            double = WAYS[way](x.double())
    assert random.draws
    assert (double - single.double()).abs().max() < 1e-6
    assert "attention" not in way or double.dtype == torch.float64


def test_draws_of_other_shapes_are_left():
    with noted() as random:
        torch.randn(3)
    with seeded(nn.Identity()), replayed(random.draws):
        assert torch.randn(4).shape == (4,)
        more = torch.randn(4)  # nothing was noted for it
    assert more.isfinite().all()


def test_generators_are_where_they_were():
    before = torch.get_rng_state()
    with seeded(nn.Identity()):
        first = torch.randn(3)
    with seeded(nn.Identity()):
        assert torch.equal(torch.randn(3), first)
    assert torch.equal(torch.get_rng_state(), before)


class Noisy(nn.Module):
    """Draws as MAT does: in the dtype of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.randn(x.shape, dtype=self.conv.weight.dtype)
        return self.conv(F.dropout(x, 0.5, training=True))


def test_verify_draws_once():
    model = irt.accelerate(recipe.fill(Noisy()).eval())
    before = torch.get_rng_state()
    report = irt.verify(model, recipe.image("x", 1, 64, 40, 40))
    assert report.ok, str(report)
    assert {row["part"] for row in report.rows} == {"conv", "(model)"}
    assert all(row["own rms error"] < 1e-6 for row in report.rows)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("noise_mode", ["const", "random"])
def test_verify_of_mat(noise_mode):
    """Another draw of the elements that styles replace, or of noise, would differ by far more than rounding."""
    network = models.create("mat", resolution=128, dim=12, z_dim=8, w_dim=8, channel_max=32)
    network = recipe.fill(network).eval()
    image, mask = recipe.image("image", 1, 3, 128, 128) * 2 - 1, torch.ones(1, 1, 128, 128)
    mask[..., 30:90, 20:70] = 0
    z = recipe.image("z", 1, 8) * 2 - 1
    other = copy.deepcopy(network)
    report = irt.verify(irt.accelerate(network), image, mask, z, None, 1.0, None, noise_mode)
    assert report.ok, str(report)
    whole = report.rows[-1]
    assert whole["part"] == "(model)"
    with torch.no_grad():
        first, second = (other(image, mask, z, None, 1.0, None, noise_mode) for _ in range(2))
    spread = (first - second).square().mean().sqrt() / first.abs().max()
    assert spread > 100 * max(whole["rms error"], whole["own rms error"])  # what is drawn shows

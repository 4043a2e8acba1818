"""MAT with precision="bf16" on photographs: finite, and by the library's rule as accurate as its original in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inpaintrt as irt
from inpaintrt import models
from inpaintrt.adapters import engine
from inpaintrt.runtime.dispatch import launches
from inpaintrt.testing import assert_close_to_truth, recipe

from .test_mat import _generator

DATA = Path(__file__).parent / "data"
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def _photo(name, side):
    """Image in [-1, 1] and mask, 1 = known."""
    photo, hole = (Image.open(DATA / file) for file in (f"{name}.jpg", f"{name}-mask.png"))
    pixels = np.asarray(photo.convert("RGB").resize((side, side)), np.float32) / 127.5 - 1
    known = np.asarray(hole.convert("L").resize((side, side), Image.Resampling.NEAREST)) == 0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None], torch.from_numpy(known).float()[None, None]


def _reduced():
    """A narrow network whose stored weights have a mean square of 1, as equalised learning rates keep them in training."""
    network = recipe.fill(models.create("mat", resolution=128, dim=36, channel_max=64, z_dim=32, w_dim=32)).eval()
    with torch.no_grad():
        for path, module in network.named_modules():
            if isinstance(getattr(module, "weight", None), torch.Tensor):
                factor = 100 if path.startswith("mapping.") else 4 if path.endswith(("attn.q", "attn.k")) else 1
                module.weight.mul_(factor / module.weight.square().mean().sqrt())
    draws = network.draw(1, (128, 128), generator=torch.Generator().manual_seed(0))
    return network, recipe.image("z", 1, 32) * 2 - 1, draws


def _doubled(draws):
    return type(draws)(draws.tokens.double(), draws.features.double(), tuple(n.double() for n in draws.noise))


def _check(network, z, draws, side):
    wide, fast = copy.deepcopy(network).double(), irt.accelerate(copy.deepcopy(network), precision="bf16")
    for name in PHOTOS:
        image, mask = _photo(name, side)
        hole = (mask == 0).expand_as(image)
        with torch.no_grad():
            truth = wide(image.double(), mask.double(), z.double(), draws=_doubled(draws))
            with torch.autocast("cpu", torch.bfloat16):
                original = network(image, mask, z, draws=draws)
            with launches() as heard:
                got = fast(image, mask, z, draws=draws)
        assert truth[hole].std() > 0.1, "the network makes something of it"
        expected = {"window_attention"} | ({"fused_conv2d"} if engine._bf16_pays() else set())
        assert expected <= {launch.op for launch in heard}
        assert got.dtype == torch.float32
        assert bool(got.isfinite().all())
        assert torch.equal(got[~hole], image[~hole])
        assert (got - truth)[hole].abs().mean() > 1e-5, "it is bfloat16"
        assert_close_to_truth(got[hole], truth[hole], original[hole], context=name)


@pytest.mark.parametrize("pays", [True, False], ids=["ours", "torchs"])
def test_photos(monkeypatch, pays):
    """Whichever convolution is the faster one on this machine."""
    monkeypatch.setattr(engine, "_bf16_pays", lambda: pays)
    _check(*_reduced(), 128)


def test_photos_at_the_released_size(full):
    """With the golden case's weights, of about unit variance, too."""
    if not full:
        pytest.skip("not run: some 5 TFLOP; --full runs them")
    *_, network, _, _, z, draws = _generator(512)
    _check(network, z, draws, 512)

"""Images of patches that are computed once each, against the public order of work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from inpaintrt import models
from inpaintrt.models import ipt_chop, ipt_tiles
from inpaintrt.testing import recipe

PATCH = 24


class Fake:
    """A network whose result tells patches and places in them apart; counts what it is given."""

    def __init__(self, scale):
        self.scale, self.calls = scale, []
        self.where = recipe.image("where", 3, scale * PATCH, scale * PATCH).double()

    def __call__(self, patches):
        self.calls.append(len(patches))
        sums = patches.sum((1, 2, 3), keepdim=True)
        return F.interpolate(patches, scale_factor=self.scale) * (1 + self.where) + sums * self.where.flip(1)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(24, 24), (25, 40), (31, 24), (48, 48), (47, 53), (24, 90)])
def test_equals_the_public_order_of_work(scale, size):
    x = recipe.image("x", 1, 3, *size).double()
    fake = Fake(scale)
    expected = ipt_chop.chopped(fake, x, PATCH, scale, 64)
    before, fake.calls = sum(fake.calls), []
    out = ipt_tiles.tiled(fake, x, PATCH, scale, batch=5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13 * expected.abs().max().item())
    down, across = (-(-(n - PATCH) // 6) + 1 for n in size)
    assert sum(fake.calls) == down * across < before
    assert max(fake.calls) <= 5


@pytest.mark.parametrize("blend", ipt_tiles.BLENDS)
@pytest.mark.parametrize("size", [(24, 24), (29, 30), (60, 47)])
def test_patches_that_agree_come_out_as_they_are(blend, size):
    x = recipe.image("x", 2, 3, *size).double()
    out = ipt_tiles.tiled(lambda patches: F.interpolate(patches, scale_factor=2), x, PATCH, 2, blend=blend)
    torch.testing.assert_close(out, F.interpolate(x, scale_factor=2), rtol=0, atol=1e-14)


def test_smooth_leaves_no_seams():
    """The largest step between neighbouring pixels where every patch has another constant colour."""

    def steps(blend):
        def colours(patches):
            return torch.rand(len(patches), 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand_as(patches)

        out = ipt_tiles.tiled(colours, torch.zeros(1, 3, 60, 60), PATCH, 1, blend=blend)
        return max(out.diff(dim=d).abs().max().item() for d in (2, 3))

    assert steps("smooth") < 0.1 < 0.3 < steps("original")


class Copies(TorchFunctionMode):
    """Counts what moves tensors or changes their dtype."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.Tensor.to
        return func(*args, **(kwargs or {}))


def test_weights_are_copied_once():
    x, copies = recipe.image("x", 1, 3, 47, 53), Copies()
    with copies:
        ipt_tiles.tiled(lambda patches: F.interpolate(patches, scale_factor=2), x, PATCH, 2, batch=5)
    assert copies.calls == 2, "one for rows and one for columns, however many patches"


def test_no_graph_of_patches_is_kept():
    network = recipe.fill(models.create("ipt", tasks=("x2",), features=4, heads=2, layers=1, patch=PATCH))
    seen = []
    network.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    x = recipe.image("x", 1, 3, 30, 37) * 255
    assert not network.tiled(x).requires_grad
    assert not network.forward_chop(x).requires_grad
    assert not any(seen)
    assert network(x[..., :PATCH, :PATCH]).requires_grad


@torch.no_grad()
def test_ceiling_and_batches():
    network = recipe.fill(models.create("ipt", tasks=("x2",), features=4, heads=2, layers=1, patch=PATCH)).double()
    calls = []
    network.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    x = recipe.image("x", 2, 3, 30, 37).double() * 255
    expected = network.tiled(x)
    assert max(calls) == sum(calls) == 2 * 2 * 4
    calls.clear()
    torch.testing.assert_close(network.tiled(x, max_bytes=1), expected, rtol=1e-9, atol=1e-9)
    assert calls == [1] * 16
    torch.testing.assert_close(network.forward_chop(x), expected, rtol=1e-9, atol=1e-9)
    for options, message in (
        ({"blend": "linear"}, "blend is 'linear'; accepted: original, smooth"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"max_bytes": 1e9}, "max_bytes is 1000000000.0"),
        ({"task": "derain"}, "task is 'derain'"),
    ):
        with pytest.raises(ValueError, match=message):
            network.tiled(x, **options)
    with pytest.raises(ValueError, match="at least 24, one patch"):
        network.tiled(x[..., :23])

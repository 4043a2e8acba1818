"""Decoding of MAT near the hole only: which pixels are needed, and that the composite does not change."""

from __future__ import annotations

import pytest
import torch

from inpaintrt import models
from inpaintrt.models import mat, mat_sparse
from inpaintrt.testing import recipe

from .test_mat_masks import masks_of

HOLES = ("random", "strokes", "one pixel hole", "half", "all hole", "all valid", "fractional", "corner", "box")


def _mask(kind, height=128, width=128):
    mask = torch.ones(1, 1, height, width)
    if kind == "corner":
        mask[..., -3:, :2] = 0
    elif kind == "box":
        mask[..., 50:80, 33:64] = 0
    elif kind in ("random", "fractional"):
        mask[..., 10:60, 70:] = masks_of(kind)[..., 10:60, 70:128]
    else:
        mask = masks_of(kind, height, width)
    return mask


def _network(resolution=128, **options):
    made = {"resolution": resolution, "dim": 6, "z_dim": 4, "w_dim": 4, "channel_max": 16, **options}
    network = recipe.fill(models.create("mat", **made)).double()
    for name, p in network.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(0.5)
    return network


def _encoded(network, mask):
    """Both stages up to their decoders, and what the dense decoders make of that."""
    size, batch = tuple(mask.shape[2:]), len(mask)
    image = recipe.image("image", batch, 3, *size).double() * 2 - 1
    z = recipe.image("z", batch, network.z_dim).double()
    draws = network.draw(batch, size, "random", torch.Generator().manual_seed(0))
    synthesis, ws = network.synthesis, network.mapping(z)
    one = synthesis.first_stage.encode(image, mask, ws, draws.tokens)
    coarse = mat.composite(synthesis.first_stage.decode(one), image, mask)
    two = synthesis.encode(image, mask, coarse, ws, draws.features)
    final = mat.composite(synthesis.decode(two, ws, draws.noise), image, mask)
    return image, one, coarse, two, final, ws, draws


@pytest.mark.parametrize("tile", [8, 32])
@pytest.mark.parametrize("kind", HOLES)
def test_the_composite_is_the_dense_one(kind, tile):
    network, mask = _network(), _mask(kind).double()
    hole = mask < 1
    with torch.no_grad():
        image, one, coarse, two, final, ws, draws = _encoded(network, mask)
        first = mat_sparse.decode_first_stage(network.synthesis.first_stage, one, hole, tile)
        second = mat_sparse.decode_second_stage(network.synthesis, two, ws, draws.noise, hole, tile)
        quiet = mat_sparse.decode_second_stage(network.synthesis, two, ws, (), hole, tile)
        without = mat.composite(network.synthesis.decode(two, ws, ()), image, mask)
    for sparse, dense in ((first, coarse), (second, final), (quiet, without)):
        torch.testing.assert_close(
            mat.composite(sparse, image, mask), dense, rtol=0, atol=1e-11 * float(dense.abs().max())
        )
    assert torch.equal(mat.composite(second, image, mask)[~hole.expand_as(image)], image[~hole.expand_as(image)])


def test_larger_networks_batches_and_oblong_images():
    network = _network(256)
    mask = torch.cat([_mask("box", 256, 512), _mask("strokes", 256, 512)]).double()
    with torch.no_grad():
        image, one, coarse, two, final, ws, draws = _encoded(network, mask)
        first = mat_sparse.decode_first_stage(network.synthesis.first_stage, one, mask < 1)
        second = mat_sparse.decode_second_stage(network.synthesis, two, ws, draws.noise, mask < 1)
    for sparse, dense in ((first, coarse), (second, final)):
        torch.testing.assert_close(
            mat.composite(sparse, image, mask), dense, rtol=0, atol=1e-11 * float(dense.abs().max())
        )


@pytest.mark.parametrize("kind", ["one pixel hole", "corner", "box", "strokes"])
def test_nothing_that_is_needed_reads_what_is_not_computed(kind):
    """NaN in place of all that is left out does not reach the hole. Small tiles leave out most."""
    network, mask = _network(256), _mask(kind, 256, 256).double()
    with torch.no_grad():
        _, _, _, two, final, ws, draws = _encoded(network, mask)
        synthesis = network.synthesis
        x, rgb = synthesis.lowest(two, ws, draws.noise)
        blocks = [*synthesis.dec.values()][1:]
        plan, styles = mat_sparse.decoder_plan(mask < 1, len(blocks)), synthesis.styles(two, ws)
        out = mat_sparse.decode_tiles(blocks, x, rgb, two.skips[1:], styles, draws.noise[1:], plan, 4, unused=torch.nan)
    hole = (mask < 1).expand_as(out)
    torch.testing.assert_close(out[hole], final[hole], rtol=0, atol=1e-11 * float(final.abs().max()))
    assert out.isnan().any(), "something was left out"


@pytest.mark.parametrize("kind", ["one pixel hole", "corner", "box"])
def test_exactly_what_gradients_reach_is_needed(kind):
    """The plan against autograd: the pixels of each layer's result on which the hole depends, neither more nor fewer."""
    network, mask = _network(256), _mask(kind, 256, 256).double()
    with torch.no_grad():
        _, one, *_ = _encoded(network, mask)
    blocks, results = [*network.synthesis.first_stage.dec_conv], []
    for block in blocks:
        for layer in (block.conv0, block.conv1, block.toRGB):
            layer.register_forward_hook(lambda m, args, out: (out.retain_grad(), results.append(out))[0])
    out = network.synthesis.first_stage.decode(one)
    (out * recipe.image("weights", *out.shape) * (mask < 1)).sum().backward()
    plan = mat_sparse.decoder_plan(mask < 1, len(blocks))
    for i, level in enumerate(plan):
        for needed, result in zip((level.conv0, level.conv1, level.rgb), results[3 * i : 3 * i + 3], strict=True):
            assert torch.equal(result.grad.ne(0).any(1, keepdim=True), needed)


@pytest.mark.parametrize("margin", [mat_sparse.MARGIN, mat_sparse.MARGIN_UP])
@pytest.mark.parametrize("kind", [*HOLES, "nothing", "last column"])
def test_tiles_hold_what_is_needed(kind, margin, monkeypatch):
    monkeypatch.setattr(mat_sparse, "WORTH", 1.0)
    needed = _mask(kind if kind in HOLES else "all valid") < 1
    if kind == "last column":
        needed[..., 77, -1] = True
    tiles = mat_sparse.Tiles.cheapest(needed, margin)
    covered = torch.zeros_like(needed)
    for row, column in tiles.corners.tolist():
        assert 0 <= row <= 128 - tiles.sides[0]
        assert 0 <= column <= 128 - tiles.sides[1]
        assert row % 2 == column % 2 == 0
        covered[..., row : row + tiles.sides[0], column : column + tiles.sides[1]] = True
    assert not (needed & ~covered).any()
    assert tiles.covers_all == (tiles.sides == (128, 128))
    if tiles.covers_all:
        assert needed.float().mean() > 0.2
    assert (tiles.count == 0) == (not needed.any())


@pytest.mark.parametrize("margin", [mat_sparse.MARGIN, mat_sparse.MARGIN_UP])
def test_the_cheapest_tiles(margin):
    """By hand: rows 50 to 79, columns 33 to 63. Two bands of 16 rows, each with one tile that has all columns."""
    tiles = mat_sparse.Tiles.cheapest(_mask("box") < 1, margin)
    assert (tiles.corners.tolist(), tiles.sides) == ([[48, 32], [64, 32]], (16, 34))
    assert tiles.pixels == 2 * (16 + 2 * margin) * (34 + 2 * margin)
    whole = mat_sparse.Tiles.cheapest(_mask("all hole") < 1, margin)
    assert (whole.covers_all, whole.corners.tolist(), whole.sides) == (True, [[0, 0]], (128, 128))


def test_tiles_that_overlap():
    """At the right border, where the last tile of a piece moves to the left; each pixel's gradient counts once."""
    needed = torch.zeros(1, 1, 32, 64, dtype=torch.bool)
    needed[..., 8:15, 30:] = True
    tiles = mat_sparse.Tiles(torch.tensor([[8, 30], [8, 46], [8, 46]]), (8, 18), 1, (32, 64))
    x = recipe.image("x", 1, 3, 32, 64).double().requires_grad_()
    weight = recipe.image("w", 4, 3, 3, 3).double() - 0.5

    def conv(x, noise):
        return torch.nn.functional.conv2d(x, weight, padding=1)

    sparse, dense = tiles.convolved(conv, x, None, 4, up=1), conv(x, None)
    torch.testing.assert_close(sparse[..., 8:16, 30:], dense[..., 8:16, 30:], rtol=0, atol=1e-12)
    assert (sparse[..., :30] == 0).all()
    (found,) = torch.autograd.grad((sparse * needed).sum(), x)
    (expected,) = torch.autograd.grad((dense * needed).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_work():
    """Tiles by hand: a hole inside one tile, at three levels of a decoder with the public widths."""
    hole = torch.zeros(1, 1, 512, 512, dtype=torch.bool)
    hole[..., 42:50, 42:50] = True
    plan = mat_sparse.decoder_plan(hole, 3)
    assert [tuple(level.rgb.shape[2:]) for level in plan] == [(128, 128), (256, 256), (512, 512)]
    with torch.device("meta"):
        blocks = models.create("mat", noise=False).synthesis.first_stage.dec_conv
    work = mat_sparse.decoder_work(blocks, plan, 32)
    up, same, rgb = 180 * 180 * 9 // 4, 180 * 180 * 9, 180 * 3
    # Needed are, along each axis: conv1 and RGB 42 to 49, conv0 41 to 50; at 256 px conv1 19 to 26, RGB 20 to 25, conv0 18
    # to 27; at 128 px conv1 8 to 14, RGB 9 to 13, conv0 7 to 15: one tile of 32 pixels in every case.
    assert work.dense == (up + same + rgb) * (512**2 + 256**2 + 128**2)
    assert work.sparse == (up + same + rgb) * 3 * 32**2
    assert work.skipped == 1 - 3 * 32**2 / (512**2 + 256**2 + 128**2)
    # Of tiles of 8, two along each axis, but for conv1 and RGB at 128 px one.
    assert mat_sparse.decoder_work(blocks, plan, 8).sparse == 8**2 * (12 * up + 9 * same + 9 * rgb)
    everything = mat_sparse.decoder_work(blocks, mat_sparse.decoder_plan(hole | True, 3))
    nothing = mat_sparse.decoder_work(blocks, mat_sparse.decoder_plan(hole & False, 3))
    assert (everything.skipped, nothing.skipped) == (0.0, 1.0)
    both = torch.cat([hole, hole | True])
    assert mat_sparse.decoder_work(blocks, mat_sparse.decoder_plan(both, 3)).skipped == pytest.approx(work.skipped / 2)


def test_refusals():
    for hole, levels in ((torch.zeros(1, 1, 8, 8), 1), (torch.zeros(1, 8, 8, dtype=torch.bool), 1)):
        with pytest.raises(ValueError, match=r"hole is .*; accepted: torch.bool \(B, 1, H, W\)"):
            mat_sparse.decoder_plan(hole, levels)
    for size, levels in (((8, 12), 3), ((8, 8), 0)):
        with pytest.raises(ValueError, match=r"accepted: sides divisible by 2 per level"):
            mat_sparse.decoder_plan(torch.zeros(1, 1, *size, dtype=torch.bool), levels)
    network, mask = _network(), _mask("box").double()
    with torch.no_grad():
        _, one, *_ = _encoded(network, mask)
    for tile in (7, 24):
        with pytest.raises(ValueError, match=rf"tile is {tile} at a level of 128×128; accepted: even divisors"):
            mat_sparse.decode_first_stage(network.synthesis.first_stage, one, mask < 1, tile)

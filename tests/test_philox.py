"""Counter-based noise: the public known answers, the layout, rounding at the edges, and what the numbers look like."""

from __future__ import annotations

import math

import pytest
import torch

from inpaintrt.ops import _philox, philox_normal

from . import golden_style as golden

CASE, STORED = golden.case("philox"), golden.tensors("philox")
IMAGES = [name for name in CASE["cases"] if name.startswith("image")]


def seeds(name):
    """As int64, whose bits are the unsigned numbers'."""
    return torch.tensor([int(s) - (int(s) >> 63 << 64) for s in CASE["cases"][name]["seeds"]])


def test_public_known_answers():
    for rounds, counter, key, output in zip(
        *(STORED[f"random123/{n}"] for n in ("rounds", "counter", "key", "output")), strict=True
    ):
        if rounds == 10:
            assert torch.equal(_philox.philox4x32(counter.unbind(), key.unbind()), output)


def test_words_uniforms_and_normals_of_single_counters():
    key = (STORED["single/seed_lo"], STORED["single/seed_hi"])
    words = _philox.philox4x32(STORED["single/counter"].unbind(1), key)
    assert torch.equal(words, STORED["single/words"])
    assert torch.equal(_philox.uniform(words), STORED["single/u"])
    torch.testing.assert_close(
        _philox.box_muller(_philox.uniform(words)), STORED["single/normals64"], rtol=1e-13, atol=1e-14
    )


def test_edges_of_rounding():
    u = _philox.uniform(STORED["edge/words"])
    assert torch.equal(u, STORED["edge/u"])
    normals = _philox.box_muller(u)
    torch.testing.assert_close(normals, STORED["edge/normals64"], rtol=1e-13, atol=1e-14)
    assert torch.equal(normals[u[:, 0] == 1], torch.zeros_like(normals[u[:, 0] == 1])), "the radius of u = 1 is 0"
    assert bool((u[:, 0] == 1).any())


@pytest.mark.parametrize("name", IMAGES)
def test_layout_of_images(name):
    spec = CASE["cases"][name]
    shape = (len(spec["seeds"]), *spec["sample_shape_CHW"])
    got = philox_normal(seeds(name), shape, call=spec["call"], stream=spec["stream"], dtype=torch.float64)
    torch.testing.assert_close(got, STORED[f"{name}/normals64"], rtol=1e-13, atol=1e-14)
    rounded = philox_normal(seeds(name), shape, call=spec["call"], stream=spec["stream"])
    torch.testing.assert_close(rounded, STORED[f"{name}/normals"], rtol=2e-7, atol=0)
    on_device = torch.tensor(spec["call"], dtype=torch.int32)
    assert torch.equal(rounded, philox_normal(seeds(name), shape, call=on_device, stream=spec["stream"]))


def test_a_sample_does_not_depend_on_its_batch():
    many = torch.tensor([5, -3, 1 << 62])
    whole = philox_normal(many, (3, 3, 5, 7), call=9)
    for i in range(3):
        assert torch.equal(whole[i : i + 1], philox_normal(many[i : i + 1], (1, 3, 5, 7), call=9))


def test_moments_and_independence():
    """Four standard errors, of mean, variance, fourth moment, and correlation across seeds, streams, calls and neighbours."""
    shape = (2, 3, 64, 64)
    n = math.prod(shape[1:])
    draws = [
        philox_normal(torch.tensor([1, 2]), shape, call=call, stream=stream, dtype=torch.float64).flatten(1)
        for stream in (0, 1, 2)
        for call in (0, 1)
    ]
    rows = torch.cat(draws)
    for power, expected, spread in ((1, 0.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 96.0)):
        assert bool(((rows**power).mean(1) - expected).abs().max() < 4 * (spread / n) ** 0.5)
    correlation = rows @ rows.T / n
    correlation.fill_diagonal_(0)
    assert bool(correlation.abs().max() < 4.5 / n**0.5)
    for shift in (1, 2, 4, 64):
        assert bool((rows * rows.roll(shift, 1)).mean(1).abs().max() < 4.5 / n**0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": torch.tensor([1.0, 2.0])}, r"seeds is \(2,\) torch.float32 .* accepted: \(2,\) torch.int64"),
        ({"seeds": torch.tensor([1])}, r"seeds is \(1,\) .* accepted: \(2,\)"),
        ({"shape": ()}, r"shape is \(\)"),
        ({"call": -1}, r"call is -1; accepted: 0 to 2\*\*32 - 1"),
        ({"call": torch.tensor(1.0)}, r"call is \(\) torch.float32 .*; accepted: a number, or a 0-d tensor"),
        ({"stream": 1 << 32}, r"stream is 4294967296; accepted"),
        ({"dtype": torch.float16}, r"dtype is torch.float16; accepted"),
    ],
)
def test_refused(change, message):
    given = {"seeds": torch.tensor([1, 2]), "shape": (2, 3)} | change
    with pytest.raises(ValueError, match=message):
        philox_normal(given.pop("seeds"), given.pop("shape"), **given)

"""Whole DeepFill networks: attention restricted to what reaches the hole, and what of our own networks is swapped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import inpaintrt as irt
from inpaintrt.adapters import contextual_attention as attention
from inpaintrt.adapters import deepfill
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.swap import record_of
from inpaintrt.testing import recipe

from . import deepfill_swaps as swaps
from . import foreign_deepfill as foreign

# ---- composited -----------------------------------------------------------------------------------------------------


def _queries(run):
    """The queries of each attention that `run()` starts."""
    found = []

    def listen(op, backend, args):
        if op == "contextual_attention":
            found.append(args[-1])

    dispatch.observers.append(listen)
    try:
        run()
    finally:
        dispatch.observers.remove(listen)
    return found


def test_a_strangers_generator():
    x, mask = swaps.image(batch=2)
    for made in (foreign.Maybe, foreign.WithFlow, foreign.Resized, foreign.Normalised):
        model = swaps.generator(attention=made, reduced=made is foreign.Normalised)
        expected = swaps.original(model, x, mask)
        irt.accelerate(model, strict=True)
        kinds = [name for _, name in swaps.swapped(model)]
        assert (kinds.count("deepfill.attention"), kinds.count("deepfill.gated")) == (1, 33)
        got = swaps.call(model, x, mask)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a + 0, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "call"),
    [
        (foreign.Maybe, "image, ones and mask, mask"),
        (foreign.WithFlow, "image, mask"),
        (foreign.Faithful, "ones, in one tensor"),
    ],
)
def test_only_what_reaches_the_hole_is_computed(attention, call):
    model = swaps.generator(attention=attention, call=call)
    x, mask = swaps.image(batch=2)
    args = {"image, mask": (x[:, :3], mask), "ones, in one tensor": (x,)}.get(call, (x, mask))
    irt.accelerate(model)
    (everywhere,) = _queries(lambda: swaps.call(model, *args))
    assert everywhere is None
    expected = swaps.call(model, *args)[1]
    deepfill.restrict(model.modules())
    (some,) = _queries(lambda: swaps.call(model, *args))
    assert 0 < some[0].sum() < 0.6 * some[0].numel()
    assert some[0].sum() > some[1].sum(), "each sample's own hole"
    got = swaps.call(model, *args)[1]
    hole = mask.expand_as(got) != 0
    torch.testing.assert_close(got[hole], expected[hole], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, expected, rtol=1e-4, atol=1e-5), "elsewhere it is not what it was"
    assert any("23, 23, 23 and 23 pixels" in note for note in irt.explain(model).notes)
    irt.restore(model)
    assert not any("composited" in note for note in irt.explain(model).notes)


def test_reach_is_neither_too_short_nor_too_long():
    """NaN in the cells that are left out never shows in the composite; with one pixel less of reach it does."""
    model = swaps.generator()
    x, _ = swaps.image()
    irt.accelerate(model)
    deepfill.restrict(model.modules())
    reach = record_of(model.contextual_attention).adapter.reach
    assert reach == attention.Reach(8, 23, 23, 23, 23)
    shorter = attention.Reach(8, 22, 22, 22, 22)
    shows = {}
    for r, holes in ((reach, range(8)), (shorter, range(8))):
        shows[r] = False
        for offset in holes:  # a hole of one pixel at every place within a cell
            mask = torch.zeros(1, 1, 96, 128)
            mask[..., 40 + offset, 64 + offset] = 1
            left_out = ~r.queries(mask).repeat_interleave(2, 2).repeat_interleave(2, 3)

            def spoil(module, args, out, left_out=left_out):
                return out[0].masked_fill(left_out, torch.nan), out[1]

            handle = model.contextual_attention.register_forward_hook(spoil)
            with irt.disabled():
                out = swaps.call(model, x, mask)[1]
            handle.remove()
            shows[r] |= bool((out * mask).masked_select(mask != 0).isnan().any())
    assert shows == {reach: False, shorter: True}


def test_masks_that_do_not_tell_each_hole_get_all_cells():
    model = swaps.generator()
    irt.accelerate(model)
    deepfill.restrict(model.modules())
    x, mask = swaps.image(batch=2)
    assert _queries(lambda: swaps.call(model, x, mask[:1])) == [None]
    f = swaps.features(1, 8, 12, 16)
    assert _queries(lambda: swaps.call(model.contextual_attention, f, f)) == [None]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attention": foreign.Normalised, "reduced": True}, "not given the mask itself"),
        ({"beside": "norm"}, "depends on all of it"),
        ({"beside": "features"}, "no image"),
    ],
)
def test_composited_has_no_effect_where_reach_is_unknown(options, why):
    model = swaps.generator(**options)
    irt.accelerate(model)
    deepfill.restrict(model.modules())
    (note,) = [note for note in irt.explain(model).notes if "composited" in note]
    assert note.startswith("contextual_attention: composited=True has no effect")
    assert why in note
    assert _queries(lambda: swaps.call(model, *swaps.image())) == [None]


def test_composited_needs_a_generator_and_one_attention():
    alone = irt.accelerate(foreign.Maybe().eval())
    deepfill.restrict(alone.modules())
    assert "has no effect" in record_of(alone).note
    pair = irt.accelerate(nn.ModuleList([swaps.generator().contextual_attention, foreign.Attention()]).eval())
    deepfill.restrict(pair.modules())
    assert "2 attention modules" in record_of(pair[0]).note


def test_accelerate_passes_the_promise_on():
    model = swaps.generator()
    irt.accelerate(model, composited=True)
    assert record_of(model.contextual_attention).adapter.reach == attention.Reach(8, 23, 23, 23, 23)
    irt.accelerate(model)
    assert _queries(lambda: swaps.call(model, *swaps.image())) == [None]
    assert not any("composited" in note for note in irt.explain(model).notes)


@pytest.mark.parametrize("attention", [foreign.WithFlow, foreign.Resized, foreign.Maybe, foreign.Normalised])
def test_verify_judges_strangers_generators(attention):
    model = irt.accelerate(swaps.generator(attention=attention, reduced=attention is foreign.Normalised))
    report = irt.verify(model, *swaps.image())
    assert report.ok, str(report)
    layer = irt.accelerate(recipe.fill(foreign.Doubled(6, 4, 3, padding=1, sn=True)).eval())
    report = irt.verify(layer, recipe.image("gated", 1, 6, 10, 12))
    assert report.ok, str(report)


def test_measuring_changes_nothing():
    model = swaps.generator()
    irt.accelerate(model)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    deepfill.restrict(model.modules())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert modes == [m.training for m in model.modules()]


# ---- our own networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "port", "gates"),
    [("deepfill_v2", "nip", 40), ("deepfill_v2", "nip_tf", 40), ("deepfill_v2", "mma", 42), ("deepfill_v2", "csq", 42),
     ("deepfill_v1", "daa", 0)],
)  # fmt: skip
def test_reference_networks(family, port, gates):
    model = recipe.fill(irt.models.create(family, port=port, width=4)).eval()
    x, mask = recipe.image("picture", 1, 3, 96, 128), swaps.image()[1]
    expected = swaps.original(model, x, mask)
    irt.accelerate(model, strict=True)
    kinds = [name for _, name in swaps.swapped(model)]
    assert (kinds.count("deepfill.attention"), kinds.count("deepfill.gated")) == (1, gates)
    whole = swaps.call(copy.deepcopy(model), x, mask)
    for a, b in zip(whole, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    deepfill.restrict(model.modules())
    assert any("23, 23, 23 and 23 pixels" in note for note in irt.explain(model).notes)
    some, hole = swaps.call(model, x, mask)[1], mask.expand_as(whole[1]) != 0
    torch.testing.assert_close(some[hole], whole[1][hole], rtol=1e-5, atol=1e-6)

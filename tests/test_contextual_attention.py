"""Contextual attention against the public ports' numbers, and what must hold for any features and masks.

The reference and every native backend go through the same tests. A backend that cannot run a call is not skipped: it
must refuse with its reasons, also when forced.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from inpaintrt import ops, use_backend
from inpaintrt.ops.contextual_attention import attend, grid_mask, reduced, source_index
from inpaintrt.runtime import native
from inpaintrt.runtime.errors import UnsupportedError
from inpaintrt.runtime.library import dispatchers
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.memory import in_fresh_process

from .conftest import ran

GOLDEN = pathlib.Path(__file__).parent / "golden"
PORTS = ("ca_daa", "ca_jy", "ca_mma", "ca_nip", "ca_nip_tf")
OP, WITH_OFFSETS = "contextual_attention", "contextual_attention_with_offsets"
on_backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


def run(backend, foreground, background, mask=None, op=OP, **options):
    """The op on `backend`, or None where that refuses the call: then forcing it must raise with the same reasons."""
    function = getattr(ops, op)
    if reasons := refusals(backend, op, foreground, background, mask, options):
        ran[op, backend, "refused"] += 1
        with use_backend(backend, op=op), pytest.raises(UnsupportedError) as raised:
            function(foreground, background, mask, **options)
        assert raised.value.reasons == {backend: reasons}
        assert all(reasons), "a refusal without a reason"
        return None
    ran[op, backend, "ran"] += 1
    with use_backend(backend, op=op):
        return function(foreground, background, mask, **options)


def refusals(backend, op, foreground, background, mask, options):
    if backend == "reference":
        return []
    inner = dict(options)
    hops, batch = inner.pop("mask_sampling", None), inner.pop("mask_batch", "each")
    cells = grid_mask(mask, foreground.shape[-2:], inner.get("rate", 2), hops, batch)
    spec = ops_spec(op)
    return dispatchers[op].reasons(spec.bind(foreground, background, cells, **inner), foreground)[backend]


def ops_spec(op):
    from inpaintrt.runtime import registry

    return registry.get(op)


def features(*shape, name="contextual", dtype=torch.float32):
    """Distinct patches, non-negative as a ReLU leaves them."""
    return recipe.image(name, *shape).to(dtype)


def box_mask(*shape, top, left, height, width):
    mask = torch.zeros(shape)
    mask[..., top : top + height, left : left + width] = 1
    return mask


def assert_same_double(actual, truth):
    """Two float64 computations of one thing, in different orders."""
    torch.testing.assert_close(actual, truth, rtol=0, atol=1e-13 * max(1.0, truth.abs().max().item()))


# ---- golden cases: what the public ports computed -------------------------------------------------------------------


def _case(name):
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


RUNS = [pytest.param(name, run, id=f"{name}-{run}") for name in PORTS for run in _case(name)[0]["runs"]]


def _zero_patch(x):
    """ "multiplied by 0.125 in float32; rows 2..8, columns 3..13 of every channel set to 0" """
    x = x * 0.125
    x[:, :, 2:9, 3:14] = 0
    return x


def _weak_keys(x):
    """ "rows 2..8, columns 3..13 of every channel multiplied by 2**-17" """
    x[:, :, 2:9, 3:14] *= 2.0**-17
    return x


THEN = {"multiplied by 0.125": _zero_patch, "rows 2..8, columns 3..13 of every channel multiplied": _weak_keys}


def _features(given):
    """The input that case.json describes."""
    u = recipe.image(given["name"], *given["shape"])
    if given["kind"] == "soft":
        u = (u - 0.5) * 0.0625
    elif given["kind"] == "relu":
        u = torch.clamp_min(u - 0.5, 0)
    elif given["kind"] == "smooth":
        q = torch.floor(u * 16) / 16
        u = (q + q.roll(1, 2) + q.roll(1, 3) + q.roll((1, 1), (2, 3))) / 4
    else:
        assert given["kind"] == "u01"
    if (then := given.get("then")) is None:
        return u
    (change,) = (function for opening, function in THEN.items() if then.startswith(opening))
    return change(u)


def _mask(given, tensors):
    if given == "None":
        return None
    if given["tensor"] in tensors:
        return tensors[given["tensor"]]
    shapes = given["per_sample_shapes"]
    assert shapes in ([[]], [[{"box": [0, given["size"][0], 0, given["size"][1]]}]])
    return torch.full((len(shapes), 1, *given["size"]), float(bool(shapes[0])))


def _call(case, run, tensors):
    """(foreground, background, mask) and the options of a run."""
    given, switches = case["runs"][run], case["variant"]["switches"]
    inputs = given["inputs"]
    foreground = _features(inputs["f"])
    background = foreground if inputs["b"] == "same tensor as f" else _features(inputs["b"])
    options = {
        "fuse_size": 3 if given["FUSE"] else 0,
        "softmax_scale": given["SCALE"],
        "mask_sampling": [tuple(hop) for hop in switches["mask_hops"]],
        "eps": float(np.float32(switches["eps"])),  # as the ports hold it
        **{name: switches[name] for name in ("sampling", "mask_batch", "norm", "mask_mode", "divisor")},
    }
    return (foreground, background, _mask(inputs["mask_image"], tensors)), options


@on_backends
@pytest.mark.parametrize(("name", "run_name"), RUNS)
def test_golden(name, run_name, backend):
    case, tensors = _case(name)
    args, options = _call(case, run_name, tensors)
    for op in (OP, WITH_OFFSETS):
        if (result := run(backend, *args, op=op, **options)) is not None:
            out, offsets = result if op == WITH_OFFSETS else (result, None)
            _assert_golden(case, tensors, run_name, backend, args, options, out)
            if offsets is not None and f"{run_name}.offsets" in tensors:
                assert torch.equal(offsets, tensors[f"{run_name}.offsets"])


def _assert_golden(case, tensors, run_name, backend, args, options, out):
    if f"{run_name}.out" not in tensors:
        _assert_words_hold(case, run_name, out, backend)
        return
    stored = tensors[f"{run_name}.out"]
    if "every key masked" in case["runs"][run_name].get("expected", ""):
        assert not stored.any()
        assert torch.equal(out, stored)
    doubles = [t if t is None or i == 2 else t.double() for i, t in enumerate(args)]
    truth = run("reference", *doubles, **options)
    if (exact := tensors.get(f"{run_name}.out64")) is not None:
        assert_same_double(truth, exact)
    # No float64 run is stored for the others, but what it said about the stored numbers is, in three digits.
    error = (stored - truth).abs().max().item()
    assert error == pytest.approx(case["checks"][run_name]["out_fp32_vs_fp64_max_abs"], rel=5e-3)
    assert_close_to_truth(out, truth, stored, context=f"{case['case']} {run_name} on {backend}")


def _assert_words_hold(case, run_name, out, backend):
    """Expectations that are not stored as tensors."""
    expected = case["runs"][run_name]["expected"]
    if expected == "out equals run 'empty' bitwise; nothing stored":
        args, options = _call(case, "empty", {})
        assert torch.equal(out, run(backend, *args, **options))
    else:
        assert expected == "out is NaN everywhere (all keys masked); nothing stored"
        assert out.isnan().all()


def test_golden_cases_are_complete():
    """Every stored output and every array of offsets belongs to a run that is tested."""
    for name in PORTS:
        case, tensors = _case(name)
        stored = {key.split(".")[0] for key in tensors}
        worded = {run for run, given in case["runs"].items() if "expected" in given}
        assert stored | worded == set(case["runs"])
        assert sum(key.endswith(".offsets") for key in tensors) >= 7


# ---- what follows from the definition -------------------------------------------------------------------------------


@on_backends
def test_features_find_themselves(backend):
    """Without propagation a patch is its own best key (Cauchy and Schwarz), so the output is the input."""
    x = features(2, 24, 20, 28)
    both = run(backend, x, x, op=WITH_OFFSETS, fuse_size=0, softmax_scale=300.0, divisor="overlap")
    if both is not None:
        out, offsets = both
        assert not offsets.any()
        torch.testing.assert_close(out, x, rtol=1e-5, atol=0)


@on_backends
@pytest.mark.parametrize("fuse_size", [0, 3])
def test_moved_features_are_found_where_they_went(backend, fuse_size):
    x = features(1, 16, 24, 24)
    moved = x.roll((2 * 2, -3 * 2), (2, 3))  # 2 cells down, 3 cells to the left
    both = run(backend, x, moved, op=WITH_OFFSETS, fuse_size=fuse_size, softmax_scale=100.0)
    if both is not None:
        inner = (..., slice(2, 8), slice(5, 10))
        assert torch.equal(both[1][inner], torch.tensor([2, -3], dtype=torch.int32).view(1, 2, 1, 1).expand(1, 2, 6, 5))
        torch.testing.assert_close(both[0][..., 4:16, 10:20], x[..., 4:16, 10:20])


@on_backends
def test_keys_are_normalised_and_queries_are_not(backend):
    """Scaling by powers of two, which rounds nothing: the background's scale only scales the output; the foreground's
    acts as the softmax's."""
    f, b = (features(1, 7, 12, 16, name=name) for name in "fb")
    mask = box_mask(1, 1, 6, 8, top=2, left=3, height=2, width=3)
    out = run(backend, f, b, mask, softmax_scale=0.5)
    if out is not None:
        assert torch.equal(run(backend, f, 4 * b, mask, softmax_scale=0.5), 4 * out)
        assert torch.equal(run(backend, 4 * f, b, mask, softmax_scale=0.125), out)


@on_backends
def test_constant_divisor_darkens_the_border(backend):
    x = features(1, 6, 10, 12)
    dark, even = (run(backend, x, x, divisor=divisor) for divisor in ("const4", "overlap"))
    if dark is not None:
        share = torch.ones(1, 1, 10, 12)
        share[..., [0, -1], :] /= 2
        share[..., [0, -1]] /= 2
        torch.testing.assert_close(dark, even * share)


@on_backends
def test_strided_keys(backend):
    """stride=2: the softmax sees the keys of every other row and column."""
    x = features(1, 9, 20, 24)
    mask = box_mask(1, 1, 10, 12, top=3, left=3, height=4, width=5)
    both = run(backend, x, x, mask, op=WITH_OFFSETS, stride=2)
    if both is not None:
        rows, columns = torch.meshgrid(torch.arange(10), torch.arange(12), indexing="ij")
        found = both[1][0] + torch.stack([rows, columns])
        assert not (found % 2).any()
        assert found.flatten(1).unique(dim=1).shape[1] > 5


# ---- masks ----------------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("mask_mode", ["zero", "neginf"])
def test_one_is_hole_and_holes_are_not_pasted(backend, mask_mode):
    """Without propagation no score of a usable key depends on the hole, and nothing of the hole is pasted."""
    f, b = (features(1, 5, 16, 16, name=name) for name in "fb")
    mask = box_mask(1, 1, 8, 8, top=2, left=3, height=4, width=3)
    other = torch.where(mask.repeat_interleave(2, 2).repeat_interleave(2, 3) != 0, 0.75, b)
    options = {"fuse_size": 0, "softmax_scale": 0.5, "mask_mode": mask_mode}
    out = run(backend, f, b, mask, **options)
    if out is not None:
        assert torch.equal(run(backend, f, other, mask, **options), out)
        assert not torch.equal(run(backend, f, other, 1 - mask, **options), run(backend, f, b, 1 - mask, **options))
        assert not torch.equal(run(backend, f, b, **options), out)


@on_backends
def test_masked_weight_is_lost_or_not(backend):
    """A foreground of zeros weighs all keys alike: 1 in 36 of a grid of 6×6, or 1 in 27 of those that touch no hole."""
    f, b = torch.zeros(1, 3, 12, 12), features(1, 3, 12, 12)
    mask = box_mask(1, 1, 6, 6, top=2, left=2, height=1, width=1)  # 9 patches touch it
    lost, kept = (run(backend, f, b, mask, mask_mode=mode) for mode in ("zero", "neginf"))
    if lost is not None and kept is not None:
        torch.testing.assert_close(lost, kept * (27 / 36))


@on_backends
@pytest.mark.parametrize("fuse_size", [0, 3])
def test_all_keys_masked(backend, fuse_size):
    x = features(1, 5, 8, 12)
    hole = torch.ones(1, 1, 4, 6)
    zero = run(backend, x, x, hole, op=WITH_OFFSETS, fuse_size=fuse_size)
    if zero is not None:
        assert not zero[0].any()
        cells = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"))
        assert torch.equal(zero[1][0].long(), -cells), "the first key"
        assert run(backend, x, x, hole, mask_mode="neginf", fuse_size=fuse_size).isnan().all()


@on_backends
def test_one_sample_without_a_usable_key_leaves_the_others_alone(backend):
    x = features(3, 5, 8, 12)
    mask = torch.zeros(3, 1, 4, 6)
    mask[1] = 1
    out = run(backend, x, x, mask, mask_mode="neginf")
    if out is not None:
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


@on_backends
@pytest.mark.parametrize("mask_mode", ["zero", "neginf"])
def test_no_mask_is_an_empty_mask(backend, mask_mode):
    x = features(2, 6, 12, 10)
    out = run(backend, x, x, mask_mode=mask_mode)
    if out is not None:
        assert torch.equal(run(backend, x, x, torch.zeros(1, 1, 6, 5), mask_mode=mask_mode), out)
        assert torch.equal(run(backend, x, x, torch.zeros(2, 1, 48, 40, dtype=torch.bool), mask_mode=mask_mode), out)


@on_backends
@pytest.mark.parametrize("value", [0.3, -1.0, 255, True], ids=str)
def test_any_value_but_zero_is_hole(backend, value):
    x = features(1, 6, 12, 10)
    ones = box_mask(1, 1, 6, 5, top=1, left=1, height=2, width=3)
    out = run(backend, x, x, ones)
    if out is not None:
        dtypes = {
            float: (torch.float32, torch.float64, torch.float16),
            int: (torch.uint8, torch.int64),
            bool: (torch.bool,),
        }
        for dtype in dtypes[type(value)]:
            mask = torch.full(ones.shape, value, dtype=dtype) * (ones != 0)
            assert mask.dtype == dtype
            assert torch.equal(run(backend, x, x, mask), out)


@on_backends
def test_a_batch_with_different_masks_is_each_alone(backend):
    x = features(3, 6, 14, 12)
    mask = torch.cat([box_mask(1, 1, 7, 6, top=t, left=1, height=2, width=3) for t in (0, 2, 4)])
    out = run(backend, x, x, mask, softmax_scale=0.5)
    if out is None:
        return
    for i in range(3):
        alone = run("reference", *(x[i : i + 1].double(),) * 2, mask[i : i + 1], softmax_scale=0.5)
        base = run("reference", *(x[i : i + 1],) * 2, mask[i : i + 1], softmax_scale=0.5)
        assert_close_to_truth(out[i : i + 1], alone, base)
    first = run(backend, x, x, mask, mask_batch="first", softmax_scale=0.5)
    assert torch.equal(first, run(backend, x, x, mask[:1], softmax_scale=0.5)), "a mask for all"
    assert torch.equal(first[0], out[0])
    assert not torch.equal(first, out)


@on_backends
def test_order_of_the_batch_is_kept(backend):
    f, b = (features(4, 6, 10, 12, name=name) for name in "fb")
    mask = torch.cat([box_mask(1, 1, 5, 6, top=t, left=t, height=1, width=3) for t in range(4)])
    order = torch.tensor([2, 0, 3, 1])
    out = run(backend, f, b, mask)
    if out is not None:
        assert torch.equal(run(backend, f[order], b[order], mask[order]), out[order])


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_sampled_rows(factor):
    for size in range(factor, 300, factor):
        count = size // factor
        assert source_index(size, factor, "stride") == list(range(0, size, factor))
        aligned = source_index(size, factor, "tf")
        assert len(aligned) == count
        assert aligned[0] == 0
        assert count == 1 or aligned[-1] == size - 1
        if factor == 2 and count % 2 == 0:  # the form in closed terms; odd counts have a tie in the middle
            assert aligned == [2 * i + (i >= count // 2) for i in range(count)]
        for i, row in enumerate(aligned):  # ⌊i·(size − 1)/(count − 1) + ½⌋ but for ties
            assert count == 1 or abs(row * (count - 1) - i * (size - 1)) * 2 <= count - 1


@pytest.mark.parametrize("size", [54, 58, 94, 118])
def test_ties_follow_float32(size):
    """Where the rows of the original differ from a linspace in float32 of the same ends."""
    count = size // 2
    linspace = (torch.linspace(0, size - 1, count) + 0.5).floor().long().tolist()
    assert source_index(size, 2, "tf") != linspace
    step = np.float32(size - 1) / np.float32(count - 1)
    rows = np.floor(np.arange(count, dtype=np.float32) * step + np.float32(0.5))
    assert source_index(size, 2, "tf") == rows.astype(int).tolist()


HOPS = [
    None,
    [("stride", 8)],
    [("stride", 4), ("stride", 2)],
    [("tf", 8)],
    [("tf", 4), ("tf", 2)],
    [("stride", 2), ("tf", 4)],
]


@pytest.mark.parametrize("hops", HOPS, ids=str)
def test_hops_from_the_mask_to_the_grid(hops):
    mask = (recipe.image("mask", 2, 1, 64, 48) < 0.5).float()
    got = grid_mask(mask, (16, 12), 2, hops, "each")
    rows, columns = torch.arange(64), torch.arange(48)
    for name, factor in hops or [("stride", 8)]:
        rows, columns = (n[source_index(len(n), factor, name)] for n in (rows, columns))
    assert torch.equal(got, mask[:, :, rows][..., columns] != 0)
    assert torch.equal(grid_mask(mask, (16, 12), 2, hops, "first"), got[:1])


@on_backends
def test_hops_reach_the_op(backend):
    """A thread one pixel wide falls between the samples of one rule and is seen by another."""
    x = features(1, 6, 16, 16)
    for hops, row in (([("stride", 8)], 40), ([("tf", 8)], 45), ([("tf", 4), ("tf", 2)], 46)):
        mask = torch.zeros(1, 1, 64, 64)
        mask[:, :, row] = 1
        out = run(backend, x, x, mask, mask_sampling=hops)
        if out is None:
            return
        cells = torch.zeros(1, 1, 8, 8)
        cells[:, :, 5] = 1
        assert torch.equal(out, run(backend, x, x, cells)), hops
        others = [h for h in ([("stride", 8)], [("tf", 8)], [("tf", 4), ("tf", 2)]) if h != hops]
        assert all(torch.equal(run(backend, x, x, mask, mask_sampling=other), run(backend, x, x)) for other in others)


def test_reduction_reads_the_sampled_pixels():
    x = features(1, 2, 18, 12)
    for sampling in ("stride", "tf"):
        rows, columns = (source_index(n, 2, sampling) for n in (18, 12))
        assert torch.equal(reduced(x, 2, sampling), x[:, :, rows][..., columns])


# ---- cells that are asked for ---------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("shared", [True, False])
def test_queries_cut_the_output(backend, shared):
    x = features(2, 6, 14, 12)
    mask = box_mask(1, 1, 7, 6, top=2, left=2, height=2, width=2)
    asked = (recipe.image("queries", 1 if shared else 2, 1, 7, 6) < 0.4).to(torch.uint8)
    out = run(backend, x, x, mask, softmax_scale=0.5)
    some = run(backend, x, x, mask, softmax_scale=0.5, queries=asked)
    if out is not None and some is not None:
        pixels = asked.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(2, 6, 14, 12) != 0
        assert not some[~pixels].any()
        truth = run("reference", x.double(), x.double(), mask, softmax_scale=0.5, queries=asked)
        assert_close_to_truth(some, truth, run("reference", x, x, mask, softmax_scale=0.5, queries=asked))
        assert not run(backend, x, x, mask, queries=torch.zeros(1, 1, 7, 6)).any()


# ---- dtypes ---------------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(backend, dtype):
    """Logits reach thousands; rounded to half precision they would choose other patches."""
    x = features(1, 256, 20, 24).to(dtype)
    mask = box_mask(1, 1, 10, 12, top=3, left=3, height=4, width=5)
    both, wide = (run(backend, t, t, mask, op=WITH_OFFSETS) for t in (x, x.float()))
    if both is None or wide is None:
        return
    scores = (10.0 * torch.nn.functional.unfold(x.float()[..., ::2, ::2], 3, padding=1).norm(dim=1) * 9).max()
    assert scores > 2000
    assert both[0].dtype == dtype
    assert torch.equal(both[1], wide[1])
    truth = run("reference", x.double(), x.double(), mask)
    assert_close_to_truth(wide[0], truth, run("reference", x.float(), x.float(), mask))
    assert_close_to_truth(both[0], truth, wide[0].to(dtype))
    eps = torch.finfo(dtype).eps
    assert ((both[0].double() - wide[0].double()).abs() <= 0.5 * eps * wide[0].double().abs() * 1.01 + 1e-7).all()


@on_backends
def test_autocast_does_not_reach_the_scores(backend):
    x = features(1, 16, 12, 16)
    plain = run(backend, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(backend, x, x)
    if plain is not None:
        assert torch.equal(plain, inside)


# ---- strips ---------------------------------------------------------------------------------------------------------

MODES = [
    {},
    {"fuse_size": 0, "mask_mode": "neginf"},
    {"fuse_size": 5, "patch_size": 5, "divisor": "overlap"},
    {"rate": 3, "norm": "sum_eps"},
    {"stride": 2, "sampling": "tf", "divisor": "overlap", "mask_mode": "neginf"},
]


@pytest.fixture
def largest(monkeypatch):
    """Sets how many scores the reference holds at a time."""
    module = sys.modules["inpaintrt.ops.contextual_attention"]  # by attribute this is the function
    return lambda scores: monkeypatch.setattr(module, "LARGEST", scores)


def _whole_and_strips(options):
    """Features with an odd number of rows of cells, and the limits that give strips of 1, 2, 3, … rows."""
    rate = options.get("rate", 2)
    x = [features(2, 3, 7 * rate, 5 * rate, name=name, dtype=torch.float64) for name in "fb"]
    mask = box_mask(2, 1, 7, 5, top=2, left=1, height=2, width=2)
    queries = recipe.image("queries", 2, 1, 7, 5) < 0.7
    cells = 7 * 5
    return x, mask, queries, {rows: rows * 5 * cells for rows in (1, 2, 3, 4, 6)}


@pytest.mark.parametrize("options", MODES, ids=str)
def test_strips_of_the_reference_are_the_whole(largest, options):
    (f, b), mask, queries, limits = _whole_and_strips(options)
    options = {"softmax_scale": 0.25, "queries": queries, **options}
    out, offsets = ops.contextual_attention_with_offsets(f, b, mask, **options)
    for rows, limit in limits.items():
        largest(limit)
        part, found = ops.contextual_attention_with_offsets(f, b, mask, **options)
        assert_same_double(part, out)
        assert torch.equal(found, offsets), rows


@pytest.mark.parametrize("options", MODES, ids=str)
def test_gradient_in_strips_is_the_gradient(largest, options):
    (f, b), mask, queries, limits = _whole_and_strips(options)
    weight = recipe.image("weight", *f.shape).double()

    def gradient():
        leaves = [t.clone().requires_grad_() for t in (f, b)]
        out = ops.contextual_attention(*leaves, mask, softmax_scale=0.25, queries=queries, **options)
        return torch.autograd.grad((out * weight).sum(), leaves)

    whole = gradient()
    assert all(g.abs().max() > 1e-3 for g in whole)
    for limit in limits.values():
        largest(limit)
        for part, grad in zip(gradient(), whole, strict=True):
            assert_same_double(part, grad)


class Sizes(TorchDispatchMode):
    """Hears the number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.largest = max(self.largest, tensor.numel())
        return result


def _largest_tensor(x, gradient):
    """Of the reference's kernel, or of its gradient's, as the dispatcher calls them."""
    spec = ops_spec(OP)
    args = spec.bind(x, x)
    with Sizes() as heard:
        if gradient:
            dispatchers[OP + "_backward"](([torch.ones_like(x)], *args, [True, True, False, False]), x)
        else:
            with torch.no_grad():
                spec.run_reference(*args)
    return heard.largest


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_no_tensor_of_all_scores(largest, gradient):
    """Above the limit: strips with the neighbours that propagation needs, two rows of cells on each side, and one more
    cell for each of the places where lines wrap around."""
    rows, columns = 20, 6
    cells = rows * columns
    x = features(1, 2, 2 * rows, 2 * columns)
    assert _largest_tensor(x, gradient) >= cells**2, "below the limit there is one strip: the test can see its scores"
    for tall in (1, 2, 5):
        largest(tall * columns * cells)
        around = min(rows, tall + 4) * columns + 4
        assert _largest_tensor(x, gradient) <= around * cells + cells < cells**2


def test_the_gradient_keeps_nothing_between_strips(largest):
    """What autograd saves for its way back: matrices of scores below the limit; above it strips are computed again."""
    rows, columns = 16, 6
    cells = rows * columns
    x = features(1, 2, 2 * rows, 2 * columns)
    args = ops_spec(OP).bind(x, x)

    def kept():
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            dispatchers[OP + "_backward"](([torch.ones_like(x)], *args, [True, True, False, False]), x)
        return sum(tensor.untyped_storage().nbytes() // 4 for tensor in saved.values())

    assert kept() > 3 * cells**2
    largest(2 * columns * cells)
    assert kept() < cells**2


# ---- calls that make no sense ---------------------------------------------------------------------------------------

X = torch.rand(2, 3, 8, 12)
WRONG = [
    (
        "foreground is 3×7×12; accepted: sizes of 1 or more, height and width divisible by rate (2)",
        [X[:, :, :7]] * 2,
        {},
    ),
    ("foreground is 3×8×11; accepted: sizes of 1 or more, height", [X[..., :11]] * 2, {}),
    ("foreground is 3×8×12; accepted: sizes of 1 or more, height and width divisible by rate (5)", [X, X], {"rate": 5}),
    ("foreground is 0×8×12; accepted: sizes of 1 or more", [X[:, :0]] * 2, {}),
    ("foreground is (3, 8, 12) torch.float32; accepted: (B, C, h, w), floating point", [X[0], X[0]], {}),
    ("foreground is (2, 3, 8, 12) torch.int64; accepted: (B, C, h, w), floating point", [X.long()] * 2, {}),
    ("background is (2, 2, 8, 12) torch.float32 on cpu; accepted: what foreground is", [X, X[:, :2]], {}),
    ("background is (1, 3, 8, 12) torch.float32 on cpu; accepted", [X, X[:1]], {}),
    ("background is (2, 3, 8, 12) torch.float64 on cpu; accepted", [X, X.double()], {}),
    ("mask has shape (3, 1, 4, 6); accepted: (1 or 2, 1, 4, 6)", [X, X, torch.zeros(3, 1, 4, 6)], {}),
    ("mask has shape (2, 3, 32, 48); accepted: (1 or B, 1, n·4, n·6)", [X, X, torch.zeros(2, 3, 32, 48)], {}),
    ("mask has shape (8, 12); accepted: (1 or B, 1, n·4, n·6)", [X, X, torch.zeros(8, 12)], {}),
    ("mask is 30×48; accepted: ", [X, X, torch.zeros(1, 1, 30, 48)], {}),
    ("mask is 32×42; accepted: ", [X, X, torch.zeros(1, 1, 32, 42)], {}),
    ("mask is 3×6; accepted: ", [X, X, torch.zeros(1, 1, 3, 6)], {}),
    (
        "mask is 32×48; accepted: 4 times the grid of 4×6 cells",
        [X, X, torch.zeros(1, 1, 32, 48)],
        {"mask_sampling": [("tf", 4)]},
    ),
    (
        "mask_sampling has ('bilinear', 8); accepted: names stride, tf, factors from 1",
        [X, X, torch.zeros(1, 1, 32, 48)],
        {"mask_sampling": [("bilinear", 8)]},
    ),
    ("mask_sampling has ('tf', 0)", [X, X, torch.zeros(1, 1, 32, 48)], {"mask_sampling": [("tf", 0)]}),
    ("mask_batch is 'last'; accepted: each, first", [X, X, torch.zeros(2, 1, 4, 6)], {"mask_batch": "last"}),
    ("mask_batch is 'last'; accepted: each, first", [X, X], {"mask_batch": "last"}),
    ("sampling is 'linspace'; accepted: stride, tf", [X, X], {"sampling": "linspace"}),
    ("norm is 'l2'; accepted: max, sum_eps", [X, X], {"norm": "l2"}),
    ("mask_mode is 'inf'; accepted: zero, neginf", [X, X], {"mask_mode": "inf"}),
    ("divisor is 'count'; accepted: const4, overlap", [X, X], {"divisor": "count"}),
    ("patch_size is 4, stride 1, rate 2, fuse_size 3; accepted", [X, X], {"patch_size": 4}),
    ("patch_size is 3, stride 0, rate 2, fuse_size 3; accepted", [X, X], {"stride": 0}),
    ("patch_size is 3, stride 1, rate 0, fuse_size 3; accepted", [X, X], {"rate": 0}),
    ("patch_size is 3, stride 1, rate 2, fuse_size 2; accepted", [X, X], {"fuse_size": 2}),
    ("patch_size is 3, stride 1, rate 2, fuse_size -1; accepted", [X, X], {"fuse_size": -1}),
    ("foreground is 3×1×12; accepted: sizes of 1 or more, height", [X[:, :, :1]] * 2 + [torch.zeros(1, 1, 4, 6)], {}),
    ("foreground is (8, 12) torch.float32; accepted: (B, C, h, w)", [X[0, 0]] * 2 + [torch.zeros(1, 1, 4, 6)], {}),
    ("foreground is (12,) torch.float32; accepted: (B, C, h, w)", [X[0, 0, 0]] * 2 + [torch.zeros(1, 1, 4, 6)], {}),
    ("background is (8, 12) torch.float32 on cpu; accepted", [X, X[0, 0]], {}),
    ("eps is 0.0; accepted: positive", [X, X], {"eps": 0}),
    ("eps is nan; accepted: positive", [X, X], {"eps": float("nan")}),
    ("queries has shape (2, 1, 8, 12); accepted: (1 or 2, 1, 4, 6)", [X, X], {"queries": torch.ones(2, 1, 8, 12)}),
]


@pytest.mark.parametrize("op", [OP, WITH_OFFSETS])
@pytest.mark.parametrize(("message", "args", "options"), WRONG, ids=[message for message, *_ in WRONG])
def test_what_does_not_fit_is_named(message, args, options, op):
    with pytest.raises(ValueError) as raised:
        getattr(ops, op)(*args, **options)
    assert message in str(raised.value)


@on_backends
@pytest.mark.parametrize(("h", "w"), [(2, 2), (2, 4), (4, 2), (2, 26), (22, 2), (6, 4)])
@pytest.mark.parametrize("sampling", ["stride", "tf"])
def test_small_maps(backend, h, w, sampling):
    """One cell, one row, one column: every line is an end of a line."""
    f, b = (features(2, 3, h, w, name=name) for name in "fb")
    options = {"sampling": sampling, "softmax_scale": 0.25, "divisor": "overlap"}
    out = run(backend, f, b, **options)
    if out is not None:
        truth, base = (run("reference", f.to(d), b.to(d), **options) for d in (torch.float64, torch.float32))
        assert_close_to_truth(out, truth, base)
        if (h, w) == (2, 2):
            torch.testing.assert_close(out, b)  # one key, all of the weight


def test_every_word_has_a_meaning_of_its_own():
    """No two combinations of the words that the checks let through compute the same."""
    words = {"sampling": ("stride", "tf"), "norm": ("max", "sum_eps"), "mask_mode": ("zero", "neginf"),
             "divisor": ("const4", "overlap")}  # fmt: skip
    x = features(1, 3, 8, 12)
    mask = box_mask(1, 1, 4, 6, top=0, left=0, height=1, width=1)
    seen = [
        attend(x, x, mask, 3, 1, 2, 3, 0.25, *(v for v in combination[:2]), 0.5, *combination[2:], None, False)[0]
        for combination in itertools.product(*words.values())
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def _workspace(channels, side, threads):
    """Bytes that the CPU kernel's workspace ever had, in a process of its own."""
    import torch

    from inpaintrt import ops
    from inpaintrt.runtime import native

    torch.set_num_threads(threads)
    x = torch.rand(1, channels, side, side)
    hole = torch.zeros(1, 1, side // 2, side // 2)
    hole[..., side // 8 : side // 6, side // 8 : side // 6] = 1
    queries = hole.clone()  # the workspace is the same, the work is not
    result = ops.contextual_attention(x, x, hole, queries=queries)
    native.empty_cache()
    workspace = native.library().arena_peak_bytes() - native.library().arena_bytes()
    del result  # which is in the arena, too
    return workspace


@pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")
@pytest.mark.parametrize(("channels", "side", "threads"), [(96, 128, 1), (192, 128, 2), (96, 128, 7), (128, 256, 2)])
def test_workspace_stays_within_its_budget(channels, side, threads):
    """12·T·L floats with T = 128 cells, whatever the width and the number of threads; the arena rounds up to 2 MB."""
    cells = (side // 2) ** 2
    assert in_fresh_process(_workspace, channels, side, threads) <= 12 * 128 * cells * 4 + (2 << 20)

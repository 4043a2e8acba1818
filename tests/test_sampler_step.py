"""sampler_step: the numbers of the public RePaint, what folding undo steps means, seeds, masks, NaN, and refusals."""

from __future__ import annotations

import pytest
import torch

from inpaintrt import ops, use_backend
from inpaintrt.ops import philox_normal
from inpaintrt.ops.sampler_step import ROW, SPEC, example_row
from inpaintrt.testing import assert_close_to_truth

from . import golden_style as golden

CASE, STORED = golden.case("repaint_step"), golden.tensors("repaint_step")
BACKENDS = golden.backends(SPEC)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param, op=SPEC.name):
        yield request.param


def row(**entries):
    """A row of these entries, the rest as in a plain step."""
    plain = dict.fromkeys(ROW, 0.0) | {"nonzero": 1.0, "undo_scale": 1.0}
    columns = [torch.as_tensor(v, dtype=torch.float64) for v in (plain | entries).values()]
    return torch.stack(torch.broadcast_tensors(*columns), -1)


def tables():
    """The public schedule, linear of 1000 respaced to 250, in float64."""
    kept = torch.tensor([round(i * 999 / 249) for i in range(250)])
    abar = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)[kept]
    before = torch.cat((torch.ones(1, dtype=torch.float64), abar[:-1]))
    beta = 1 - abar / before
    variance = beta * (1 - before) / (1 - abar)
    variance[0] = variance[1]
    return {
        "sqrt_recip": (1 / abar).sqrt(),
        "sqrt_recipm1": (1 / abar - 1).sqrt(),
        "coef_x0": beta * before.sqrt() / (1 - abar),
        "coef_x": (1 - before) * (1 - beta).sqrt() / (1 - abar),
        "min_log": variance.log(),
        "max_log": beta.log(),
        "nonzero": (torch.arange(250) > 0).double(),
    }


TABLES = tables()


@pytest.mark.parametrize("run", CASE["cases"])
def test_public_steps(backend, run):
    """p_sample after its blend: given x_in, model output and z."""
    info = CASE["cases"][run]
    t = STORED[f"{run}/t"]
    made = row(**{name: table[t] for name, table in TABLES.items()})
    options = {"clip": 1.0 if info["clip_denoised"] else None}
    options["prediction"] = "x0" if info["predict_xstart"] else "epsilon"

    def step(wide, **more):
        x = STORED[f"{run}/x_in64" if wide else f"{run}/x_in"]
        given = {"noise": STORED[f"{run}/z"].unsqueeze(0), **more}
        if info["guided"]:
            given["guidance"] = STORED[f"{run}/grad"]
        given = {name: t.to(x.dtype) for name, t in given.items()}
        return ops.sampler_step(x, STORED[f"{run}/model_output"].to(x.dtype), made.to(x.dtype), **given, **options)

    with use_backend("reference", op=SPEC.name):
        exact, exact_x0 = step(True)
    torch.testing.assert_close(exact, STORED[f"{run}/sample64"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(exact_x0, STORED[f"{run}/pred_xstart64"], rtol=1e-9, atol=1e-10)
    got, x0 = step(False)
    # The public code's own error, or one unit of float32 where its intermediate sums were rounded luckily.
    assert_close_to_truth(got, STORED[f"{run}/sample64"], STORED[f"{run}/sample"], context=run)
    assert_close_to_truth(x0, STORED[f"{run}/pred_xstart64"], STORED[f"{run}/pred_xstart"], context=run)


@pytest.mark.parametrize("run", [n for n, c in CASE["cases"].items() if c["blended"]])
def test_public_blend(backend, run):
    """The public code blends before a call what this op blends after the one before it: m·(g·gt + s·k) + (1 − m)·x."""
    info, t = CASE["cases"][run], STORED[f"{run}/t"]
    x, gt, k = STORED[f"{run}/x"], STORED["gt"], STORED[f"{run}/z2"]
    abar = 1 / TABLES["sqrt_recip"][t] ** 2
    # coef_x = 1 and the rest 0: the step itself leaves x as it is.
    made = row(coef_x=1.0, nonzero=0.0, known_scale=abar.sqrt(), known_sigma=(1 - abar).sqrt(), blend=1.0)
    zero = torch.zeros_like(x)
    got, _ = ops.sampler_step(
        x, torch.zeros_like(x), made.float(), known=gt, mask=STORED[f"mask/{info['mask']}"], variance="fixed",
        noise=torch.stack((zero, zero, k)), prediction="x0",
    )  # fmt: skip
    torch.testing.assert_close(got, STORED[f"{run}/x_in64"].float(), rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("run", CASE["undo_cases"])
def test_public_undo(backend, run):
    beta = CASE["undo_cases"][run]["beta"]
    x, z = STORED[f"{run}/x"], STORED[f"{run}/z"]
    zero = torch.zeros_like(x)
    made = row(coef_x=1.0, nonzero=0.0, undo_scale=(1 - beta) ** 0.5, undo_var=beta).float()
    got, _ = ops.sampler_step(x, zero, made, noise=torch.stack((zero, z, zero)), variance="fixed", prediction="x0")
    torch.testing.assert_close(got, STORED[f"{run}/out64"].float(), rtol=1e-6, atol=4e-7)


def arguments(b=2, c=3, h=6, w=7, seed=0, **changed):
    generator = torch.Generator().manual_seed(seed)
    given = {
        "x": torch.randn(b, c, h, w, generator=generator),
        "model_output": torch.randn(b, 2 * c, h, w, generator=generator),
        "row": example_row(),
        "known": torch.randn(b, c, h, w, generator=generator),
        "mask": (torch.rand(b, 1, h, w, generator=generator) < 0.5).float(),
        "seeds": torch.arange(b) + 11,
    }
    return given | changed


def test_seeds_are_the_documented_noise(backend):
    """One Gaussian for step and undo steps, stream 1; stream 2 for the known region."""
    given = arguments(call=5)
    got, x0 = ops.sampler_step(**given)
    wide = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in given.items()}
    r = dict(zip(ROW, wide["row"].tolist(), strict=True))
    x, eps, v = wide["x"], *wide["model_output"].chunk(2, 1)
    z, k = (philox_normal(given["seeds"], x.shape, call=5, stream=s, dtype=torch.float64) for s in (1, 2))
    clean = (r["sqrt_recip"] * x - r["sqrt_recipm1"] * eps).clamp(-1, 1)
    variance = ((v + 1) / 2 * r["max_log"] + (1 - v) / 2 * r["min_log"]).exp()
    y = r["undo_scale"] * (r["coef_x0"] * clean + r["coef_x"] * x)
    y = y + (r["undo_scale"] ** 2 * variance + r["undo_var"]).sqrt() * z
    y = torch.where(wide["mask"] == 1, r["known_scale"] * wide["known"] + r["known_sigma"] * k, y)
    torch.testing.assert_close(got.double(), y, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(x0.double(), clean, rtol=2e-6, atol=2e-6)


def test_folded_undo_steps_have_the_distribution_of_single_ones(backend):
    """Mean and variance of the fused Gaussian against steps made one by one, exactly (both are linear in the noise)."""
    given = arguments(known=None, mask=None)
    r = dict(zip(ROW, given["row"].double().tolist(), strict=True))
    mean, _ = ops.sampler_step(**given | {"seeds": None, "noise": torch.zeros(3, *given["x"].shape)})
    fused, _ = ops.sampler_step(**given)
    z = philox_normal(given["seeds"], fused.shape, stream=1)
    one = torch.ones_like(z)
    step, _ = ops.sampler_step(**given | {"seeds": None, "noise": torch.stack((one, 0 * one, one))})
    undo, _ = ops.sampler_step(**given | {"seeds": None, "noise": torch.stack((0 * one, one, one))})
    spread = ((step - mean).double() ** 2 + (undo - mean).double() ** 2).sqrt()
    torch.testing.assert_close((fused - mean).double(), spread * z, rtol=1e-4, atol=1e-5)
    assert abs(float((undo - mean).square().mean()) - r["undo_var"]) < 1e-5


def test_calls_samples_and_streams_differ(backend):
    given = arguments()
    first, _ = ops.sampler_step(**given)
    again, _ = ops.sampler_step(**given, call=torch.tensor(0))
    later, _ = ops.sampler_step(**given, call=torch.tensor(1, dtype=torch.int32))
    assert torch.equal(first, again)
    assert torch.equal(later, ops.sampler_step(**given, call=1)[0])
    assert bool((first != later).all())
    same = {n: t[:1].expand_as(t) if torch.is_tensor(t) and t.dim() == 4 else t for n, t in given.items()}
    batch, _ = ops.sampler_step(**same)
    assert bool((batch[0] != batch[1]).all())
    alone = {n: t[1:] if torch.is_tensor(t) and (t.dim() == 4 or n == "seeds") else t for n, t in given.items()}
    assert torch.equal(ops.sampler_step(**alone)[0], first[1:])


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_broadcast_and_blend(backend, batch, channels, memory):
    given = arguments(seed=3)
    given["mask"] = torch.rand(batch, channels, 6, 7).round(decimals=1)
    given["known"] = given["known"][:batch]
    assert bool(((given["mask"] == 0) | (given["mask"] == 1)).any())
    got = ops.sampler_step(**{n: t.to(memory_format=memory) if t.dim() == 4 else t for n, t in given.items()})
    full = given | {"known": given["known"].expand(2, 3, 6, 7), "mask": given["mask"].expand(2, 3, 6, 7)}
    with use_backend("reference", op=SPEC.name):
        base = ops.sampler_step(**full)
    for a, b in zip(got, base, strict=True):
        assert a.is_contiguous(memory_format=memory)
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_model_output_may_be_half(backend, dtype):
    given = arguments()
    given["model_output"] = given["model_output"].to(dtype)
    got = ops.sampler_step(**given)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    with use_backend("reference", op=SPEC.name):
        truth = ops.sampler_step(**wide)
        base = ops.sampler_step(**given)
    for a, exact, b in zip(got, truth, base, strict=True):
        assert a.dtype == torch.float32
        assert_close_to_truth(a, exact, b)


@pytest.mark.parametrize("channel", [0, 4], ids=["prediction", "variance"])
@pytest.mark.parametrize("mode", ["seeds", "noise"])
def test_nan_of_the_model_is_not_hidden(backend, mode, channel):
    """Also where the pixel is known, or the prediction would be clamped."""
    given = arguments()
    given["mask"][:] = 1
    given["model_output"][1, channel, 2, 3] = torch.nan
    if mode == "noise":
        given |= {"seeds": None, "noise": torch.randn(3, 2, 3, 6, 7)}
    got, x0 = ops.sampler_step(**given)
    assert int(got.isnan().sum()) == 1
    assert bool(got[1, channel % 3, 2, 3].isnan())
    assert int(x0.isnan().sum()) == (channel == 0)


def test_out(backend):
    given = arguments()
    expected = [t.clone() for t in ops.sampler_step(**given)]
    canary = torch.full((4, 5, 8, 9), 7.0)
    strided = canary[1:-1, 1:-1, 1:-1, 1:-1]
    version = canary._version
    result = ops.sampler_step(**given, out=(strided, torch.empty_like(strided)))
    assert result[0] is strided
    assert canary._version > version
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    strided.fill_(7.0)
    assert bool((canary == 7.0).all()), "written outside"
    in_place = ops.sampler_step(**given, out=(given["x"], torch.empty_like(given["x"])))
    assert in_place[0] is given["x"]
    assert torch.equal(given["x"], expected[0])


def test_out_compiles():
    given = arguments()
    expected = ops.sampler_step(**given)

    def function(x):
        out = (torch.empty_like(x), torch.empty_like(x))
        ops.sampler_step(**given | {"x": x}, out=out)
        return out[0] + 1, out[1]

    with torch.no_grad():
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(given["x"])
    assert torch.equal(got[0], expected[0] + 1)
    assert torch.equal(got[1], expected[1])


REFUSED = {
    r"x is \(2, 3, 6, 7\) torch.int64; accepted: \(B, C, H, W\), floating point": {
        "x": torch.zeros(2, 3, 6, 7, dtype=torch.int64)
    },
    r"x is \(3, 6, 7\)": {"x": torch.zeros(3, 6, 7)},
    r"model_output is \(2, 3, 6, 7\) .* accepted with variance 'learned_range': \(2, 6, 6, 7\)": {
        "model_output": torch.zeros(2, 3, 6, 7)
    },
    r"model_output is \(2, 6, 6, 7\) .* accepted with variance 'fixed': \(2, 3, 6, 7\)": {"variance": "fixed"},
    r"mask is \(2, 2, 6, 7\) .* accepted: \(2, 3, 6, 7\) or \(2, 1, 6, 7\)": {"mask": torch.zeros(2, 2, 6, 7)},
    r"mask is \(2, 1, 6, 8\)": {"mask": torch.zeros(2, 1, 6, 8)},
    r"mask is \(2, 1, 6, 7\) torch.bool .* accepted: .*floating point": {"mask": torch.zeros(2, 1, 6, 7).bool()},
    r"known is \(2, 1, 6, 7\)": {"known": torch.zeros(2, 1, 6, 7)},
    r"known is given and mask is None; accepted: both": {"mask": None},
    r"mask is given and known is None": {"known": None},
    r"row is \(15,\) .* accepted: \(16,\) or \(2, 16\), float32 on cpu": {"row": torch.zeros(15)},
    r"row is \(3, 16\)": {"row": torch.zeros(3, 16)},
    r"row is \(16,\) torch.float32 on meta": {"row": torch.zeros(16, device="meta")},
    r"seeds is \(1,\) .* accepted: \(2,\) torch.int64 on cpu, one seed per sample": {"seeds": torch.tensor([1])},
    r"seeds is \(2,\) torch.int32": {"seeds": torch.tensor([1, 2], dtype=torch.int32)},
    r"noise and seeds are both None; accepted: exactly one": {"seeds": None},
    r"noise and seeds are both given": {"noise": torch.zeros(3, 2, 3, 6, 7)},
    r"noise is \(2, 2, 3, 6, 7\) .* accepted: \(3, 2, 3, 6, 7\) or \(1, 2, 3, 6, 7\)": {
        "seeds": None,
        "noise": torch.zeros(2, 2, 3, 6, 7),
    },
    r"known is given with one noise": {"seeds": None, "noise": torch.zeros(1, 2, 3, 6, 7)},
    r"guidance is \(2, 1, 6, 7\)": {"guidance": torch.zeros(2, 1, 6, 7)},
    r"prediction is 'eps'; accepted: epsilon, x0, v": {"prediction": "eps"},
    r"variance is 'small'; accepted: learned_range, learned, fixed": {"variance": "small"},
    r"clip is 0.0; accepted: None or a positive number": {"clip": 0.0},
    r"call is -1; accepted: 0 to 2\*\*32 - 1": {"call": -1},
    r"out\[0\] is \(2, 3, 6, 8\)": {"out": (torch.zeros(2, 3, 6, 8), torch.zeros(2, 3, 6, 7))},
    r"out\[1\] has strides \(0, 42, 7, 1\); accepted: such that no two": {
        "out": (torch.zeros(2, 3, 6, 7), torch.zeros(1, 3, 6, 7).expand(2, 3, 6, 7))
    },
    r"out has 1 tensors; accepted: 2": {"out": (torch.zeros(2, 3, 6, 7),)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        ops.sampler_step(**arguments(**REFUSED[message]))

"""linear_step: public samplers as rows of it, its noise, blend, NaN, `out`, and refusals.

Each sampler runs its whole trajectory twice: in float64 on the reference, which must give the public code's float64 numbers
(so the rows are right), and in float32 on every backend, whose error may be twice the public code's own.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from inpaintrt import ops, use_backend
from inpaintrt.ops import philox_normal
from inpaintrt.ops.linear_step import SPEC
from inpaintrt.testing import assert_close_to_truth

from . import golden_style as golden

BACKENDS = golden.backends(SPEC)


class Run:
    """The stored tensors of one run, in one dtype."""

    def __init__(self, case, name, dtype):
        self.case, self.name, self.dtype = golden.case(case), name, dtype
        self.stored = golden.tensors(case)
        info = self.case.get("runs", self.case.get("cases"))
        self.info = info[name]

    def __getattr__(self, name):
        stored = self.stored[f"{self.name}/{name}"]
        return stored.to(self.dtype) if stored.is_floating_point() else stored

    def row(self, *numbers):
        """Σ's coefficients, a_z, g, s."""
        return torch.tensor([float(n) for n in numbers], dtype=self.dtype)

    def step(self, terms, *numbers, **given):
        given = {n: t.to(self.dtype) if torch.is_tensor(t) else t for n, t in given.items()}
        row = self.row(*numbers, *[0.0] * (len(terms) + 3 - len(numbers)))
        return ops.linear_step([t.to(self.dtype) for t in terms], row, **given)


def trajectory(case, name, backend, follow):
    """What `follow` yields, step by step, in float64 and in float32 on `backend`."""
    with use_backend("reference", op=SPEC.name):
        exact = list(follow(Run(case, name, torch.float64)))
    with use_backend(backend, op=SPEC.name):
        got = list(follow(Run(case, name, torch.float32)))
    return exact, got


def check(exact, got, truth, public, tolerance=1e-11):
    for i, (wide, narrow) in enumerate(zip(exact, got, strict=True)):
        torch.testing.assert_close(wide, truth[i], rtol=tolerance, atol=tolerance)
        assert_close_to_truth(narrow, truth[i], public[i], context=f"step {i}")


DIFFUSERS = golden.case("diffusers_steps")["runs"]


def named(*names):
    return [run for run in DIFFUSERS if run.startswith(names)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def check_diffusers(name, backend, follow, tolerance=1e-11):
    stored = golden.tensors("diffusers_steps")
    samples, wide = stored[f"{name}/samples"], stored[f"{name}/samples64"]
    check(*trajectory("diffusers_steps", name, backend, follow), wide[1:], samples[1:], tolerance)


def clip_of(run, default):
    return 1.0 if run.info["config"].get("clip_sample", default) else None


@pytest.mark.parametrize("name", ["ddpm_default", "ddpm_sd_noclip"])
def test_ddpm(name, backend):
    def follow(run):
        x = run.samples[0]
        for i, (a, c) in enumerate(zip(run.coef_x0, run.coef_prev, strict=True)):
            x0 = run.step([x, run.model_outputs[i]], *a, clip=clip_of(run, True))
            x = run.step([x0, x], *c, noise=run.noises[i : i + 1])
            yield x

    check_diffusers(name, backend, follow)


@pytest.mark.parametrize("name", named("ddim"))
def test_ddim(name, backend):
    """Any eta; epsilon of the model, or again from the clamped x0."""

    def follow(run):
        x = run.samples[0]
        noises = run.noises if f"{name}/noises" in run.stored else torch.zeros(run.model_outputs.shape)
        for i, (a, c) in enumerate(zip(run.coef_x0, run.coef_prev, strict=True)):
            eps = run.model_outputs[i]
            x0 = run.step([x, eps], *a, clip=clip_of(run, True))
            abar = golden.tensors("diffusers_steps")[f"{name}/alphas_cumprod_t"][i]
            signal, sigma = abar**0.5, (1 - abar) ** 0.5
            if run.info["step_arguments"].get("use_clipped_model_output"):
                eps = run.step([x, x0], 1 / sigma.double(), -signal.double() / sigma.double())
            elif run.info["config"].get("prediction_type") == "v_prediction":
                eps = run.step([x, eps], sigma, signal)
            x = run.step([x0, eps], *c, noise=noises[i : i + 1])
            yield x

    again = name in ("ddim_clip_rederive", "ddim_v")  # their epsilon is of float32 scalars that are not stored
    check_diffusers(name, backend, follow, 2e-6 if again else 1e-11)


@pytest.mark.parametrize("name", named("euler"))
def test_euler(name, backend):
    def follow(run):
        x = run.samples[0]
        for i, c in enumerate(run.coef_direct):
            given = {"noise": run.noises[i : i + 1]} if f"{name}/noises" in run.stored else {}
            x = run.step([x, run.model_outputs[i]], *c, **given)
            yield x

    check_diffusers(name, backend, follow)


@pytest.mark.parametrize("name", named("dpmpp"))
def test_dpm_solver_plus_plus(name, backend):
    def follow(run):
        x, history = run.samples[0], [torch.zeros(run.samples[0].shape)] * 2
        for i, (a, c) in enumerate(zip(run.coef_x0, run.coef_prev, strict=True)):
            history = [run.step([x, run.model_outputs[i]], *a), *history[:2]]
            given = {"noise": run.noises[i : i + 1]} if f"{name}/noises" in run.stored else {}
            x = run.step([x, *history], *c, **given)
            yield x

    check_diffusers(name, backend, follow)


def test_unipc(backend):
    """Corrector, then predictor: four terms each, no small linear system is left for the loop."""

    def follow(run):
        x, history, corrected = run.samples[0], [torch.zeros(run.samples[0].shape)] * 2, None
        for i, (a, b, c) in enumerate(zip(run.coef_x0, run.coef_corrector, run.coef_prev, strict=True)):
            history = [run.step([x, run.model_outputs[i]], *a), *history[:2]]
            corrected = x if i == 0 else run.step([corrected, *history], *b)
            x = run.step([corrected, *history], *c)
            yield x

    check_diffusers("unipc_bh2", backend, follow)


@pytest.mark.parametrize("name", ["repaint_eta0", "repaint_eta1"])
def test_repaint_of_diffusers(name, backend):
    """One draw for step and known region; undo steps of several draws."""
    config = DIFFUSERS[name]["config"]
    beta = torch.linspace(config["beta_start"], config["beta_end"], config["num_train_timesteps"])

    def follow(run):
        x, noises, calls = run.samples[0], iter(run.noises), itertools.count()
        for op, t in zip(run.op.tolist(), run.op_timestep.tolist(), strict=True):
            if op == 1:
                i = next(calls)
                a, b = run.coef[i, :2], run.coef[i, 2:]
                x0 = run.step([x, run.model_outputs[i]], *a, clip=1.0)
                z = next(noises)
                given = {"known": run.original_image, "mask": run.mask, "noise": torch.stack((z, z))}
                x = run.step([x0, run.model_outputs[i]], *b, **given)
            else:
                for b in beta[t : t + DIFFUSERS[name]["draws_per_undo"]]:
                    x = run.step([x], (1 - b) ** 0.5, b**0.5, noise=next(noises)[None])
            yield x

    check_diffusers(name, backend, follow, 2e-6)  # the public code's float32 betas are not stored


@pytest.mark.parametrize("name", ["large_t", "small_t"])
def test_sdedit_steps(name, backend):
    """A row per sample."""

    def follow(run):
        c0, c1, c2 = run.coef.unbind(1)
        rows = torch.stack((c0, -c0 * c1, c2, 0 * c0, 0 * c0), 1)
        yield ops.linear_step([run.x, run.model_output], rows, noise=run.z[None])

    stored = golden.tensors("sdedit_step")
    exact, got = trajectory("sdedit_step", name, backend, follow)
    check(exact, got, [stored[f"{name}/sample64"]], [stored[f"{name}/sample"]])


@pytest.mark.parametrize("name", ["loop_large", "loop_small"])
def test_sdedit_loop(name, backend):
    """The known region is noised with one draw for all steps; only where the mask is exactly 1 is it kept."""
    info = golden.case("sdedit_step")["cases"][name]
    low, high = info["beta_start_end"]
    beta = torch.linspace(low, high, info["num_diffusion_timesteps"], dtype=torch.float64)
    abar = (1 - beta).cumprod(0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), abar[:-1]))
    posterior = beta * (1 - before) / (1 - abar)
    small = posterior.clamp_min(1e-20)
    variance = small if info["var_type"] == "fixedsmall" else torch.cat((posterior[1:2], beta[1:]))

    def follow(run):
        batch, keep = run.noises.shape[1], (run.mask == 1).to(run.dtype)[None]
        clean = (2 * run.image - 1).expand(batch, -1, -1, -1)
        noises, outputs = iter(run.noises), iter(run.model_outputs)
        for _ in range(info.get("sample_step", 1)):
            fixed = next(noises)
            x = run.step([clean], run.sqrt_ab[-1], run.sqrt_1mab[-1], noise=fixed[None])
            for i in range(info["t"] - 1, -1, -1):
                c0 = 1 / (1 - beta[i]) ** 0.5
                sigma = variance[i] ** 0.5 if i else 0.0
                x = run.step(
                    [x, next(outputs)], c0, -c0 * beta[i] / (1 - abar[i]) ** 0.5, sigma, run.sqrt_ab[i], run.sqrt_1mab[i],
                    noise=torch.stack((next(noises), fixed)), known=clean, mask=keep,
                )  # fmt: skip
            clean = run.step([x], 1.0, 0.0, 1.0, known=clean, mask=keep)
            yield x

    stored = golden.tensors("sdedit_step")
    exact, got = trajectory("sdedit_step", name, backend, follow)
    for wide, narrow, truth, public in zip(
        exact, got, stored[f"{name}/result64"], stored[f"{name}/result"], strict=True
    ):
        torch.testing.assert_close(wide, truth, rtol=1e-5, atol=2e-6)  # the public code's float32 coefficients
        torch.testing.assert_close(narrow, public, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", ["svd_eta085", "svd_eta0_six"])
def test_ddnm(name, backend):
    """x0 projected onto what is known, then a step towards it; time travel goes from the x0 that was not projected."""
    eta = golden.case("ddnm_step")["cases"][name]["eta"]

    def follow(run):
        x, noises, calls = run.init, iter(run.noises), itertools.count()
        times = run.times.tolist()
        for (i, j), pair in zip(itertools.pairwise(times), run.abar_pairs, strict=True):
            now, then = pair.double()
            if j < i:
                eps = run.model_outputs[next(calls)][:, :3]
                terms, a = [x, eps], (1 / now**0.5, -((1 / now - 1) ** 0.5))
                x0 = run.step(terms, *a)
                projected = run.step(terms, *a, 0.0, 1.0, known=run.y, mask=run.mask)
                sigma = (1 - then) ** 0.5
                x = run.step(
                    [projected, eps], then**0.5, sigma * (1 - eta**2) ** 0.5, sigma * eta, noise=next(noises)[None]
                )
            else:
                x = run.step([x0], then**0.5, (1 - then) ** 0.5, noise=next(noises)[None])
        yield x

    stored = golden.tensors("ddnm_step")
    (exact,), (got,) = trajectory("ddnm_step", name, backend, follow)
    # abar is stored rounded to float32, and x0 at the first steps is a difference of numbers a hundred times its size.
    torch.testing.assert_close(exact, stored[f"{name}/final64"], rtol=1e-4, atol=1e-4)
    assert_close_to_truth(got, exact, exact.float() + (stored[f"{name}/final"] - stored[f"{name}/final64"].float()))


@pytest.mark.parametrize("name", golden.case("sd_inpaint_blend")["runs"])
def test_blend_of_latent_inpainting(name, backend):
    """Its mask is 1 where it paints; its known latents are noised with the one draw of the start."""

    def follow(run):
        for before, (g, s) in zip(run.before_blend, run.coef_add_noise, strict=True):
            noise = torch.stack((torch.zeros_like(run.noise), run.noise))
            yield run.step([before], 1.0, 0.0, g, s, known=run.image_latents, mask=1 - run.mask, noise=noise)

    stored = golden.tensors("sd_inpaint_blend")
    exact, got = trajectory("sd_inpaint_blend", name, backend, follow)
    check(exact, got, stored[f"{name}/after_blend64"], stored[f"{name}/after_blend"])


# ---- what rows do not show ------------------------------------------------------------------------------------------


@functools.cache
def example(n=3, shape=(2, 3, 6, 7)):
    generator = torch.Generator().manual_seed(n)
    terms = [torch.randn(shape, generator=generator) for _ in range(n)]
    return terms, torch.randn(n + 3, generator=generator)


@pytest.fixture
def forced(backend):
    with use_backend(backend, op=SPEC.name):
        yield


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", range(1, 6))
def test_seeds_are_the_documented_noise(n, dtype):
    terms, row = example(n)
    terms = [t.to(dtype) for t in terms]
    seeds, mask = torch.tensor([3, -9]), (torch.rand(1, 3, 6, 7) < 0.5).to(dtype)
    got = ops.linear_step(terms, row, seeds=seeds, call=8, clip=1.25, known=terms[0], mask=mask)
    z, k = (philox_normal(seeds, got.shape, call=8, stream=s, dtype=torch.float64) for s in (1, 2))
    y = sum(a * t.double() for a, t in zip(row.double(), terms, strict=False)) + row[n].double() * z
    y = torch.where(mask == 1, row[n + 1].double() * terms[0].double() + row[n + 2].double() * k, y.clamp(-1.25, 1.25))
    assert got.dtype == dtype
    torch.testing.assert_close(got, y.to(dtype), rtol=2e-6 if dtype == torch.float32 else 2.0**-7, atol=4e-6)
    given = {"seeds": seeds, "clip": 1.25, "known": terms[0], "mask": mask}
    assert torch.equal(got, ops.linear_step(torch.stack(terms), row, call=torch.tensor(8), **given))


@pytest.mark.usefixtures("forced")
def test_nan_is_not_hidden():
    """By a clamp, a coefficient of 0, or a mask of 1."""
    terms, row = example()
    for i in range(3):
        for coefficients in (row, torch.zeros(6)):
            spoilt = [t.clone() for t in terms]
            spoilt[i][1, 2, 3, 4] = torch.nan
            got = ops.linear_step(spoilt, coefficients, clip=0.5, known=terms[0], mask=torch.ones(1, 1, 6, 7))
            assert int(got.isnan().sum()) == 1
            assert bool(got[1, 2, 3, 4].isnan())


@pytest.mark.usefixtures("forced")
def test_out():
    terms, row = (list(t) if isinstance(t, list) else t for t in example())
    expected = ops.linear_step(terms, row)
    canary = torch.full((4, 5, 8, 9), 7.0)
    strided = canary[1:-1, 1:-1, 1:-1, 1:-1]
    assert ops.linear_step(terms, row, out=strided) is strided
    assert torch.equal(strided, expected)
    strided.fill_(7.0)
    assert bool((canary == 7.0).all()), "written outside"
    own = terms[1].clone()
    assert torch.equal(ops.linear_step([terms[0], own, terms[2]], row, out=own), expected)
    assert torch.equal(own, expected)


def test_one_term_is_enough_for_a_layout(backend):
    terms, row = example()
    mixed = [t.to(memory_format=torch.channels_last) if i else t for i, t in enumerate(terms)]
    with use_backend(backend, op=SPEC.name):
        got = ops.linear_step(mixed, row)
        assert got.is_contiguous()
        torch.testing.assert_close(got, ops.linear_step(terms, row), rtol=0, atol=0)
        assert ops.linear_step(mixed[::-1], row).is_contiguous(memory_format=torch.channels_last)


X = torch.zeros(2, 3, 6, 7)
REFUSED = {
    r"terms has 0 tensors; accepted: 1 to 5": {"terms": []},
    r"terms has 6 tensors": {"terms": [X] * 6},
    r"terms\[0\] is \(2, 3, 6, 7\) torch.int32; accepted: \(B, C, H, W\), floating point": {"terms": [X.int(), X]},
    r"terms\[1\] is \(2, 3, 6, 8\)": {"terms": [X, torch.zeros(2, 3, 6, 8)]},
    r"terms\[1\] is \(2, 3, 6, 7\) torch.float16": {"terms": [X, X.half()]},
    r"coefficients is \(4,\) .* accepted: \(5,\) or \(2, 5\), float32 on cpu": {"coefficients": torch.zeros(4)},
    r"noise is \(3, 2, 3, 6, 7\) .* accepted: \(1, 2, 3, 6, 7\) or \(2, 2, 3, 6, 7\)": {"noise": torch.stack([X] * 3)},
    r"noise and seeds are both given": {"noise": X[None], "seeds": torch.tensor([1, 2])},
    r"seeds is \(3,\)": {"seeds": torch.tensor([1, 2, 3])},
    r"clip is -1.0; accepted": {"clip": -1.0},
    r"mask is given and known is None": {"mask": X},
    r"mask is \(2, 2, 6, 7\)": {"known": X, "mask": X[:, :2]},
    r"known is \(3, 3, 6, 7\)": {"known": torch.zeros(3, 3, 6, 7), "mask": X},
    r"call is 4294967296; accepted": {"call": 1 << 32},
    r"call is \(1,\) torch.int64": {"call": torch.tensor([1])},
    r"out is \(2, 3, 6, 7\) torch.float64": {"out": X.double()},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    given = {"terms": [X, X], "coefficients": torch.zeros(5)} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        ops.linear_step(given.pop("terms"), given.pop("coefficients"), **given)

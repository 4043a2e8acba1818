"""RePaint's chain: the public order of operations, the fused order's distribution, and every option."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from inpaintrt import samplers
from inpaintrt.runtime.errors import InpaintRTError
from inpaintrt.samplers import Schedule, Tables, ddnm_chain, inputs, loop, repaint_chain, sdedit_chain
from inpaintrt.testing import recipe

SMALL = Schedule.repaint(12, jump_length=3, resampling=2)


def tables_of(schedule):
    return Tables.linear().respaced(schedule.steps)


def problem(batch=1, size=8, mask_channels=1):
    image = recipe.image("samplers", batch, 3, size, size + 2)
    mask = torch.zeros(batch, mask_channels, size, size + 2)
    mask[..., 2:6, 3:8] = 1
    return image, mask


class Model(nn.Module):
    """A small network of x, t and a class, [prediction | variance]; its calls are noted."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.labels = nn.Embedding(10, 3)
        recipe.fill(self)
        self.channels, self.seen = channels, []
        self.eval()

    def forward(self, x, t, y=None, scale=1.0):
        self.seen.append((x.clone(), t.clone(), y))
        if y is not None:
            x = x + 0.3 * self.labels(y)[:, :, None, None]
        made = (
            scale * self.conv(x)
            + 0.5 * x.repeat(1, self.channels // 3, 1, 1)
            + (t.to(torch.float32) / 2000)[:, None, None, None]
        )
        return made.tanh()


class Labelled(Model):
    """Embeds classes by the name that guided-diffusion's networks have for it."""

    def __init__(self):
        super().__init__()
        self.label_emb = self.labels


# ---- the public order of operations ---------------------------------------------------------------------------------


def by_hand(model, gt, keep, schedule, tables, noises, gradient=None, variance="learned_range", clip=1.0):
    """The loop in float64 as the paper's code has it, without ours: blend before a call, step, undo one by one."""
    draws = iter(noises.double())
    abar, x = tables.alphas_cumprod, next(draws)
    for i, call in enumerate(schedule.calls):
        k, t = call.step, torch.full((gt.shape[0],), int(tables.timesteps[call.step]))
        z = next(draws)
        if i:
            x = keep * (math.sqrt(abar[k]) * gt + math.sqrt(1 - abar[k]) * next(draws)) + (1 - keep) * x
        out = model(x.float(), t).double()
        x0 = (x - math.sqrt(1 - abar[k]) * out[:, :3]) / math.sqrt(abar[k])
        x0 = x0.clamp(-clip, clip) if clip else x0
        before = abar[k - 1] if k else 1.0
        beta = 1 - abar[k] / before
        low, high = tables.posterior_log_variance_clipped[k], math.log(beta)
        share = (out[:, 3:] + 1) / 2 if variance == "learned_range" else torch.zeros(())
        log_variance = share * high + (1 - share) * low
        mean = (beta * math.sqrt(before) * x0 + (1 - before) * math.sqrt(1 - beta) * x) / (1 - abar[k])
        if gradient is not None:
            mean = mean + log_variance.exp() * gradient(x)
        x = mean + (k > 0) * (log_variance / 2).exp() * z
        for again in range(k, k + call.undo):
            x = math.sqrt(1 - tables.betas[again]) * x + math.sqrt(tables.betas[again]) * next(draws)
    assert next(draws, None) is None
    return x


@pytest.mark.parametrize("mask", ["binary", "channels", "fractions"])
@pytest.mark.parametrize("guided", [False, True])
def test_given_noises_are_used_in_the_public_order(mask, guided):
    image, hole = problem(batch=2, mask_channels=1 if mask == "binary" else 3)
    if mask == "channels":
        hole[:, 1] = hole[:, 1].roll(2, -1)
    if mask == "fractions":
        hole = (hole * recipe.image("mask", *hole.shape) * 1.5).clamp(0, 1)
        assert ((hole > 0) & (hole < 1)).any()
    schedule = Schedule.repaint(12, jump_length=4, resampling=2, jump2_length=2, jump2_resampling=2)
    noises = torch.randn(samplers.draws(schedule), *image.shape)
    target = recipe.image("target", *image.shape)

    def gradient(x, t=None):
        return 0.5 * (target.to(x.dtype) - x)

    result = samplers.repaint(
        Model(), image, hole, schedule=schedule, noises=noises, paste=False, guidance=gradient if guided else None
    )
    # Under a hole of 1 the image is not read.
    gt = (2 * image - 1).double()
    truth = by_hand(Model(), gt, 1 - hole.double(), schedule, tables_of(schedule), noises, gradient if guided else None)
    expected = ((truth + 1) / 2).clamp(0, 1)
    assert (result - expected).abs().max() < 2e-5  # float32, amplified by 157 at the first of 40 calls
    assert (result - expected).square().mean().sqrt() < 2e-6
    assert ((expected > 0.01) & (expected < 0.99)).double().mean() > 0.3, "most is clipped: the test sees little"


def test_the_models_arguments():
    """The original numbers of the steps as int64, float32 samples; labels and further arguments as given."""
    image, mask = problem(batch=2)
    model = Model()
    samplers.repaint(model, image, mask, seeds=[0, 1], schedule=SMALL, labels=[3, 7], model_kwargs={"scale": 0.5})
    steps = [tables_of(SMALL).timesteps[call.step] for call in SMALL.calls]
    assert [t.tolist() for _, t, _ in model.seen] == [[step, step] for step in steps]
    assert all(t.dtype == torch.int64 and t.is_contiguous() and x.dtype == torch.float32 for x, t, _ in model.seen)
    assert all(y.tolist() == [3, 7] for _, _, y in model.seen)


def test_the_first_call_sees_noise_and_later_ones_the_known_region():
    image, mask = problem(size=40)
    model = Model()
    samplers.repaint(model, image, mask, seeds=5, schedule=SMALL)
    assert torch.equal(model.seen[0][0], inputs.philox_normal(torch.tensor([5]), image.shape))
    tables, known = tables_of(SMALL), (mask == 0).expand_as(image)
    for call, (x, _, _) in itertools.islice(zip(SMALL.calls, model.seen, strict=True), 1, None):
        abar = tables.alphas_cumprod[call.step]
        noise = (x - math.sqrt(abar) * (2 * image - 1))[known] / math.sqrt(1 - abar)
        n = noise.numel()
        assert abs(noise.mean()) < 5 / math.sqrt(n)
        assert abs(noise.var() - 1) < 5 * math.sqrt(2 / n)


# ---- the fused order's distribution ---------------------------------------------------------------------------------


def test_fused_chain_has_the_unfused_chains_distribution_exactly():
    """With a linear model every pixel is Gaussian, with moments that follow step by step from the public order."""
    schedule, keep, known, slope = Schedule.repaint(10, jump_length=3, resampling=3), 0.4, 0.6, 0.3
    tables = tables_of(schedule)
    samples, side = 96, 16
    image = torch.full((1, 3, side, side), (known + 1) / 2)
    stored = {}

    def model(x, t):
        stored[len(stored)] = x.clone()
        return slope * x

    samplers.repaint(
        model, image, torch.full((1, 1, side, side), 1 - keep), seeds=list(range(samples)), schedule=schedule, clip=None,
        variance="fixed_small", paste=False,
    )  # fmt: skip
    mean, variance, abar = 0.0, 1.0, tables.alphas_cumprod
    n = samples * 3 * side * side
    for i, call in enumerate(schedule.calls):
        k = call.step
        if i:
            mean = keep * math.sqrt(abar[k]) * known + (1 - keep) * mean
            variance = keep**2 * (1 - abar[k]) + (1 - keep) ** 2 * variance
        found = stored[i].double()
        assert abs(found.mean() - mean) < 5 * math.sqrt(variance / n), i
        assert abs(found.var() - variance) < 5 * variance * math.sqrt(2 / n), i
        x0 = tables.sqrt_recip_alphas_cumprod[k] - tables.sqrt_recipm1_alphas_cumprod[k] * slope
        factor = tables.posterior_mean_coef1[k] * x0 + tables.posterior_mean_coef2[k]
        mean, variance = (
            factor * mean,
            factor**2 * variance + (k > 0) * math.exp(tables.posterior_log_variance_clipped[k]),
        )
        for beta in tables.betas[k : k + call.undo]:
            mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta


def test_fused_and_unfused_agree_with_clipping_and_learned_variances():
    """Two samples of the same distribution: moments within five standard errors of their difference."""
    schedule, samples = Schedule.repaint(8, jump_length=2, resampling=2), 160
    image, mask = problem(size=8)

    def model(x, t):  # each pixel by itself, so that pixels of a sample are independent given its place
        return torch.cat([(0.8 * x).tanh() + 0.1 * x, (x.square() - 1).tanh()], 1)

    fused = samplers.repaint(model, image, mask, seeds=list(range(samples)), schedule=schedule, paste=False)
    noises = torch.randn(
        samplers.draws(schedule), samples, *image.shape[1:], generator=torch.Generator().manual_seed(3)
    )
    unfused = samplers.repaint(model, image, mask, noises=noises, schedule=schedule, paste=False)
    hole = (mask == 1).expand_as(image)[0]
    a, b = (2 * r[:, hole].double().flatten() - 1 for r in (fused, unfused))
    assert 0.02 < (a.abs() > 0.999).double().mean() < 0.9, "some is clipped, and not all"
    for power in (1, 2, 3, 4):
        p, q = a**power, b**power
        error = math.sqrt(p.var() / p.numel() + q.var() / q.numel())
        assert abs(p.mean() - q.mean()) < 5 * error, power


# ---- samples, images, masks -----------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_its_batch():
    image, mask = problem(batch=2)
    mask[1] = mask[1].roll(3, -1)
    run = {"schedule": SMALL}
    together = samplers.repaint(Model(), image, mask, seeds=[11, 12, 13, 14], **run)
    assert together.shape == (4, 3, 8, 10)
    for i, seed in enumerate((11, 12, 13, 14)):
        one = slice(i // 2, i // 2 + 1)
        alone = samplers.repaint(Model(), image[one], mask[one], seeds=seed, **run)
        # The convolution of the model may round differently in another batch; noise may not differ.
        assert (alone[0] - together[i]).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 0.1

    def pointwise(x, t):
        return torch.cat([x.mul(0.5), x], 1)

    together = samplers.repaint(pointwise, image, mask, seeds=[11, 12, 13, 14], **run)
    alone = samplers.repaint(pointwise, image[1:], mask[1:], seeds=[14], **run)
    assert torch.equal(alone[0], together[3])


@pytest.mark.parametrize("seed", [2**64 - 1, -1])
def test_all_bits_of_a_seed_count(seed):
    image, mask = problem()
    run = {"schedule": SMALL}
    result = samplers.repaint(Model(), image, mask, seeds=seed, **run)
    assert torch.equal(result, samplers.repaint(Model(), image, mask, seeds=torch.tensor([-1]), **run))
    assert not torch.equal(result, samplers.repaint(Model(), image, mask, seeds=2**32 - 1, **run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_known_pixels_are_the_images_bit_for_bit(dtype):
    image, mask = problem()
    image = image.to(dtype)
    image[..., 0, 0] = 1e-6  # lost on the way to [−1, 1] and back
    result = samplers.repaint(Model(), image, mask, seeds=1, schedule=SMALL)
    known = (mask == 0).expand_as(image)
    assert result.dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(result[known], image[known])
    assert not torch.equal(result[~known], image[~known])
    left = samplers.repaint(Model(), image, mask, seeds=1, schedule=SMALL, paste=False)
    assert torch.equal(left[~known], result[~known])
    assert not torch.equal(left[known], image[known])


def test_what_is_under_the_hole_is_not_read():
    image, mask = problem()
    poisoned = torch.where(mask == 1, torch.nan, image)
    results = [samplers.repaint(Model(), i, mask, seeds=1, schedule=SMALL) for i in (image, poisoned)]
    assert torch.equal(*results)
    assert results[1].isfinite().all()


def test_fractions_of_the_mask_mix_the_image_in():
    image, mask = problem()
    mask = mask * 0.25
    result = samplers.repaint(Model(), image, mask, seeds=1, schedule=SMALL)
    left = samplers.repaint(Model(), image, mask, seeds=1, schedule=SMALL, paste=False)
    assert torch.allclose(result, mask * left + (1 - mask) * image, atol=1e-6)


def test_masks_of_three_channels():
    image, mask = problem()
    wide = mask.expand(1, 3, *mask.shape[2:])
    run = {"seeds": 1, "schedule": SMALL}
    assert torch.equal(samplers.repaint(Model(), image, mask, **run), samplers.repaint(Model(), image, wide, **run))
    one = wide.clone()
    one[:, 1:] = 0
    result = samplers.repaint(Model(), image, one, **run)
    assert torch.equal(result[:, 1:], image[:, 1:])
    assert not torch.equal(result[:, :1], image[:, :1])


def test_no_hole_gives_copies_and_does_not_run():
    image, mask = problem(batch=2)
    model = Model()
    result = samplers.repaint(model, image, torch.zeros_like(mask), seeds=[1, 2, 3, 4])
    assert not model.seen
    assert torch.equal(result, image.repeat_interleave(2, 0))
    assert result.data_ptr() != image.data_ptr()


def test_an_image_of_hole_only_is_told():
    """An inverted mask shows: a hole everywhere but in the object leaves pixels, one everywhere none."""
    image, mask = problem()
    with pytest.warns(UserWarning, match=r"mask has no known pixel \(1 = hole\)"):
        result = samplers.repaint(Model(), image, torch.ones_like(mask), seeds=1, schedule=SMALL)
    with pytest.warns(UserWarning, match="mask has no known pixel"):
        other = samplers.repaint(Model(), 1 - image, torch.ones_like(mask), seeds=1, schedule=SMALL)
    assert torch.equal(result, other)


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x0", "v", "epsilon"])
def test_predictions(prediction):
    """A model that knows the image says so in three ways, and the result is that image."""
    image, mask = problem()
    target = 2 * recipe.image("other", *image.shape) - 1
    tables = tables_of(SMALL)
    abar = dict(zip(tables.timesteps.tolist(), tables.alphas_cumprod.tolist(), strict=True))

    def model(x, t):
        kept = abar[t[0].item()]
        noise = (x - math.sqrt(kept) * target) / math.sqrt(1 - kept)
        v = math.sqrt(kept) * noise - math.sqrt(1 - kept) * target
        return {"x0": target, "v": v, "epsilon": noise}[prediction]

    result = samplers.repaint(
        model, image, mask, seeds=2, schedule=SMALL, prediction=prediction, variance="fixed_large", paste=False
    )
    assert (2 * result - 1 - target).abs().max() < 1e-4


def test_clip_bounds_the_result():
    image, mask = problem()
    run = {"seeds": 1, "schedule": SMALL, "paste": False}
    assert (2 * samplers.repaint(Model(), image, mask, clip=0.5, **run) - 1).abs().max() <= 0.5
    assert (2 * samplers.repaint(Model(), image, mask, **run) - 1).abs().max() > 0.5


def test_variances_differ():
    image, mask = problem()
    run = {"seeds": 1, "schedule": SMALL}
    results = [samplers.repaint(Model(3), image, mask, variance=v, **run) for v in ("fixed_small", "fixed_large")]
    results += [samplers.repaint(Model(6), image, mask, variance=v, **run) for v in ("learned_range", "learned")]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))


def test_classifier_guidance_is_the_gradient():
    weight = torch.randn(5, 3 * 8 * 10) / 10
    image, _ = problem(batch=2)
    t, y = torch.tensor([3, 4]), torch.tensor([1, 4])

    def classifier(x, t):
        return x.flatten(1).square() @ weight.T

    found = samplers.classifier_guidance(classifier, scale=2.5)(image, t, y=y, other="ignored")
    chance = classifier(image, t).softmax(1)
    difference = torch.nn.functional.one_hot(y, 5) - chance
    assert torch.allclose(found, 2.5 * 2 * image * (difference @ weight).view_as(image), atol=1e-5)
    assert not found.requires_grad
    with pytest.raises(ValueError, match="labels is None; classifier guidance needs the class"):
        samplers.classifier_guidance(classifier)(image, t)
    with pytest.raises(ValueError, match=r"the classifier is in training mode; call classifier.eval\(\) first"):
        samplers.classifier_guidance(nn.Linear(2, 2).train())(image, t, y=y)


def test_guidance_in_inference_mode():
    image, mask = problem(batch=2)
    options = {"seeds": [1, 2], "schedule": SMALL, "labels": [0, 1]}
    guidance = samplers.classifier_guidance(lambda x, t: x.square().flatten(2).mean(2) * t[:, None] / 500, scale=2.0)
    expected = samplers.repaint(Model(), image, mask, guidance=guidance, **options)
    with torch.inference_mode():
        got = samplers.repaint(Model(), image.clone(), mask.clone(), guidance=guidance, **options)
    assert torch.equal(got, expected)
    assert not torch.equal(got, samplers.repaint(Model(), image, mask, **options))


def test_a_schedule_of_more_steps_than_the_models_has_tables():
    image, mask = problem()
    told = []

    def model(x, t):
        told.append(t.item())
        return torch.cat([0.5 * x, x], 1)

    samplers.repaint(model, image, mask, seeds=1, schedule=Schedule.plain(1250))
    assert told == pytest.approx([k * 0.8 for k in reversed(range(1250))])


def test_guidance_moves_the_samples_to_the_class():
    """Class 1 is bright: with guidance the hole is brighter than without, the more so the larger the scale."""
    image, mask = problem()

    def classifier(x, t):
        bright = x.mean((1, 2, 3)) * 40
        return torch.stack([-bright, bright], 1)

    results = [
        samplers.repaint(
            Model(), image, mask, seeds=[1, 2, 3], schedule=SMALL, labels=1,
            model_kwargs={}, guidance=samplers.classifier_guidance(classifier, scale),
        )[..., 2:6, 3:8].mean().item()
        for scale in (0.0, 20.0, 100.0)
    ]  # fmt: skip
    assert results == sorted(results)
    assert results[2] - results[0] > 0.01


def test_labels_reach_the_model():
    image, mask = problem()
    run = {"seeds": [1, 1], "schedule": SMALL}
    a, b = samplers.repaint(Model(), image, mask, labels=[2, 9], **run)
    assert not torch.equal(a, b)
    assert torch.equal(a, samplers.repaint(Model(), image, mask, labels=2, **run)[1])


def test_16_bit_models():
    image, mask = problem()

    def model(dtype):
        return lambda x, t: Model()(x, t).to(dtype)

    exact = samplers.repaint(Model(), image, mask, seeds=1, schedule=SMALL)
    half = samplers.repaint(model(torch.bfloat16), image, mask, seeds=1, schedule=SMALL)
    assert 0 < (exact - half).abs().max() < 0.2


# ---- nothing waits --------------------------------------------------------------------------------------------------


def fake_inputs(samples=2, size=8):
    shape = (samples, 3, size, size)
    image, hole = torch.empty(shape), torch.empty(1, 1, size, size)
    seeds = torch.empty(samples, dtype=torch.int64)
    return inputs.Inputs(image, hole, image, hole, shape, seeds, None, {})


CHAINS = {
    "repaint": lambda i, s, t: repaint_chain.Fused(
        i, samplers.repaint_rows(s, t), s, t, "epsilon", "learned_range", 1.0
    ),
    "ddnm": lambda i, s, t: ddnm_chain._DDNM(i, s, t, 0.85, None),
    "sdedit": lambda i, s, t: sdedit_chain._SDEdit(i, t, 5, 2, "fixed_large"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_no_call_waits_for_the_device(name, monkeypatch):
    """On tensors without values whatever would have to know one raises. Only the look at the end needs one."""
    looks = []
    monkeypatch.setattr(loop, "_check_finite", lambda chain, done, finite: looks.append(done))
    with FakeTensorMode():
        chain = CHAINS[name](fake_inputs(), SMALL, tables_of(SMALL))
        result = loop.run(
            chain, lambda x, t: torch.cat([0.5 * x, x], 1), guidance=lambda x, t: -x, progress=lambda p: None
        )  # fmt: skip
        assert result.shape == (2, 3, 8, 8)
        with pytest.raises(DataDependentOutputException):
            result.sum().item()
    assert looks == [chain.calls]


VIEWS = {"transposed": lambda x, t: x.transpose(2, 3), "first channel": lambda x, t: x[:, :1].expand_as(x)}


@pytest.mark.parametrize("name", ["repaint", "ddnm", "sdedit"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_model_may_return_a_view_of_what_it_is_given(name, view):
    """The next samples are written where it lies."""
    image = recipe.image("samplers", 2, 3, 12, 12)
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., 3:9, 2:7] = 1
    options = {
        "repaint": {"schedule": SMALL, "variance": "fixed_small"},
        "ddnm": {"schedule": SMALL},
        "sdedit": {"start": 9},
    }[name]
    sampler, made = getattr(samplers, name), VIEWS[view]
    expected = sampler(lambda x, t: made(x, t).clone(), image, mask, seeds=[1, 2], **options)
    assert torch.equal(sampler(made, image, mask, seeds=[1, 2], **options), expected)
    if name == "repaint":
        guided = [
            sampler(lambda x, t: 0.5 * x, image, mask, seeds=[1, 2], guidance=g, **options)
            for g in (made, lambda x, t: made(x, t).clone())
        ]
        assert torch.equal(*guided)


def test_memory_is_used_again():
    image, mask = problem()
    seen = set()

    def model(x, t):
        seen.add(x.data_ptr())
        return torch.cat([0.5 * x, x], 1)

    samplers.repaint(model, image, mask, seeds=1, schedule=Schedule.repaint(20, jump_length=5, resampling=3))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_numbers_of_numpy_are_accepted(dtype):
    image, mask = problem(batch=2)
    run = {"schedule": SMALL, "model": Model(), "image": image, "mask": mask}
    expected = samplers.repaint(seeds=[0, 1], labels=[3, 4], **run)
    given = np.arange(2).astype(dtype), np.array([3, 4], dtype)
    assert torch.equal(samplers.repaint(seeds=given[0], labels=given[1], **run), expected)
    assert torch.equal(samplers.repaint(seeds=list(given[0]), labels=list(given[1]), **run), expected)
    one = run | {"image": image[:1], "mask": mask[:1]}
    assert torch.equal(samplers.repaint(seeds=given[0][1], labels=given[1][0], **one),
                       samplers.repaint(seeds=1, labels=3, **one))  # fmt: skip


# ---- what is refused ------------------------------------------------------------------------------------------------

IMAGE, MASK = problem(batch=2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": IMAGE[0]}, r"image is \(3, 8, 10\) torch.float32; accepted: \(B, 3, H, W\)"),
        ({"image": (IMAGE * 255).byte()}, r"torch.uint8; accepted: .* \(of uint8: / 255\)"),
        ({"image": IMAGE * 2 - 1}, r"image has \d+ known values outside \[0, 1\]; the first, .*, is at \[0, 0, "),
        ({"image": IMAGE + torch.nan}, r"image has \d+ known values outside \[0, 1\]; the first, nan, is at \[0, 0, 0, 0\]"),
        ({"mask": MASK.expand(2, 2, 8, 10)}, r"mask is \(2, 2, 8, 10\) on cpu; accepted for an image of \(2, 3, 8, 10\): \(2, 1"),
        ({"mask": MASK[..., :5]}, r"mask is \(2, 1, 8, 5\)"),
        ({"mask": MASK[:, 0]}, r"mask is \(2, 8, 10\)"),
        ({"mask": MASK * 255}, r"mask has 40 values outside \[0, 1\], such as 255.0; 1 = hole, 0 = known"),
        ({"mask": MASK * torch.nan}, r"mask has \d+ values outside \[0, 1\], such as nan"),
        ({"seeds": [1]}, "seeds has 1 entries for 2 images; accepted: 2, or a multiple of it"),
        ({"seeds": [1, 2, 3]}, "seeds has 3 entries for 2 images"),
        ({"seeds": []}, "seeds has 0 entries"),
        ({"seeds": [1, 2**64]}, "seeds holds 18446744073709551616; accepted: integers of 64 bits"),
        ({"seeds": [1, 0.5]}, "seeds holds 0.5"),
        ({"seeds": 1.5}, "seeds holds 1.5; accepted: integers of 64 bits"),
        ({"seeds": np.array([1.0, 2.0])}, r"seeds holds np.float64\(1.0\)"),
        ({"seeds": torch.zeros(2)}, r"seeds is \(2,\) torch.float32; accepted: int64 \(n,\)"),
        ({"seeds": None}, "seeds and noises are both None; accepted: exactly one"),
        ({"noises": torch.zeros(5, 2, 3, 8, 10)}, "seeds and noises are both given"),
        ({"seeds": None, "noises": torch.zeros(5, 2, 3, 8, 10)}, "noises holds 5 draws; accepted for this schedule: 51"),
        ({"seeds": None, "noises": torch.zeros(51, 3, 3, 8, 10)}, r"noises is \(51, 3, 3, 8, 10\) torch.float32; accepted"),
        ({"seeds": None, "noises": torch.zeros(51, 2, 3, 8, 9)}, r"accepted: \(draws, 2·k, 3, 8, 10\), float32"),
        ({"labels": [1, 2, 3]}, r"labels is \(3,\) torch.int64; accepted: int64, 1, 2 \(images\) or 2 \(samples\) entries"),
        ({"labels": [1, 10], "model": Labelled()}, "labels holds 10; accepted: 0 to 9, the model's classes"),
        ({"labels": -1, "model": Labelled()}, "labels holds -1; accepted: 0 to 9"),
        ({"model_kwargs": {"y": torch.tensor([1, 11])}, "model": Labelled()}, "labels holds 11; accepted: 0 to 9"),
        ({"labels": [0.5, 1.0]}, r"labels is \(2,\) torch.float32"),
        ({"labels": [1, 2], "model_kwargs": {"y": None}}, r"labels and model_kwargs\['y'\] are both given"),
        ({"variance": "fixed"}, "variance is 'fixed'; accepted: learned_range, learned, fixed_small, fixed_large"),
        ({"prediction": "noise"}, "prediction is 'noise'; accepted: epsilon, x0, v"),
        ({"clip": -1.0}, "clip is -1.0; accepted: None or a positive number"),
        ({"model": Model().train()}, "the model is in training mode"),
        ({"model": Model(3)}, r"returned \(2, 3, 8, 10\); accepted: \(2, 6, 8, 10\) .* variances: variance=\"fixed_small"),
        ({"model": Model(6), "variance": "fixed_large"}, r"accepted: \(2, 3, 8, 10\) with variance='fixed_l"),
        ({"model": lambda x, t: (x, x)}, "the model returned tuple; accepted: a tensor"),
        ({"tables": Tables.linear().respaced(10)}, "the schedule begins at step 11, the tables have 10 steps"),
    ],
)  # fmt: skip
def test_refused(changed, message):
    arguments = {"model": Model(), "image": IMAGE, "mask": MASK, "seeds": [1, 2], "schedule": SMALL} | changed
    with pytest.raises(ValueError, match=message):
        samplers.repaint(**arguments)


def test_a_schedule_that_starts_below_the_tables_warns():
    image, mask = problem()
    with pytest.warns(UserWarning, match="begins at step 11 of tables with 250 steps"):
        samplers.repaint(Model(), image, mask, seeds=1, schedule=SMALL, tables=Tables.linear().respaced(250))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("bad_call", [0, 7, 20])
def test_a_model_that_returns_nan(value, bad_call):
    image, mask = problem(batch=2)
    calls = itertools.count()

    def model(x, t):
        out = torch.cat([0.5 * x, x], 1)
        if next(calls) == bad_call:
            out[1, 1, 3, 4] = value
        return out

    def run():
        return samplers.repaint(model, image, mask, seeds=[1, 2], schedule=SMALL)

    if math.isinf(value):  # clipped
        assert run().isfinite().all()
        return
    assert len(SMALL.calls) == 21
    with pytest.raises(
        InpaintRTError, match=r"after call 21 of 21 .* sample 1 holds 1 values that are NaN or Inf; .* 0 to 20"
    ):
        run()


def test_warnings_are_not_given_without_reason():
    image, mask = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samplers.repaint(Model(), image, mask, seeds=1, schedule=SMALL)


@pytest.mark.parametrize("name", ["repaint", "ddnm", "sdedit"])
def test_documentation_names_every_option(name):
    function = getattr(samplers, name)
    arguments = (function.__doc__ or "").split("Args:")[1].split("Returns:")[0]
    assert not [
        p for p in inspect.signature(function).parameters if not re.search(rf"^        .*\b{p}\b.*:", arguments, re.M)
    ]

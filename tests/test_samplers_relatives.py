"""DDNM and SDEdit against whole loops of the public code, with its noises; and what is particular to them."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inpaintrt import samplers
from inpaintrt.ops import philox_normal
from inpaintrt.samplers import Schedule, Tables
from inpaintrt.testing import assert_close_to_truth, recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"


def case(name, run):
    stored = load_file(GOLDEN / name / "tensors.safetensors")
    spec = json.loads((GOLDEN / name / "case.json").read_text())["cases"][run]
    return spec, {key.removeprefix(f"{run}/"): t for key, t in stored.items() if key.startswith(f"{run}/")}


class Replay:
    """Returns stored outputs, one for each call, and notes what it was given."""

    def __init__(self, outputs):
        self.outputs, self.x, self.t = outputs, [], []

    def __call__(self, x, t):
        self.x.append(x.clone())
        self.t.append(t[0].item())
        return self.outputs[len(self.x) - 1]


def problem():
    image = recipe.image("relatives", 2, 3, 6, 8)
    mask = torch.zeros(2, 1, 6, 8)
    mask[..., 2:5, 3:7] = 1
    return image, mask


# ---- DDNM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["svd_eta085", "svd_eta0_six"])
def test_ddnm_is_the_public_loop(run):
    spec, stored = case("ddnm_step", run)
    schedule = Schedule.repaint(
        spec["T_sampling"], jump_length=spec["travel_length"], resampling=spec["travel_repeat"]
    )  # fmt: skip
    assert list(schedule.times) == stored["times"].tolist()
    model = Replay(stored["model_outputs"])
    result = samplers.ddnm(
        model, (stored["gt"] + 1) / 2, 1 - stored["mask"], schedule=schedule, eta=spec["eta"], paste=False,
        noises=torch.cat([stored["init"][None], stored["noises"]]),
    )  # fmt: skip
    assert model.t == stored["model_t"].tolist()
    exact = stored["final64"]
    assert_close_to_truth(result * 2 - 1, exact.clamp(-1, 1), stored["final"].clamp(-1, 1))
    assert (exact.abs() < 1).double().mean() > 0.4, "most is outside of what an image holds: the test sees little"
    error = spec["max_abs_difference_float32_vs_float64"]
    for ours, public in zip(model.x, stored["x_in"], strict=True):
        # Both are that far from float64, and its tables have float32 betas.
        assert (ours - public).abs().max() < 3 * error


def test_ddnm_keeps_known_pixels_by_itself():
    image, mask = problem()
    result = samplers.ddnm(lambda x, t: 0.5 * x, image, mask, seeds=[1, 2], schedule=Schedule.plain(8), paste=False)
    known = (mask == 0).expand_as(image)
    assert (result - image)[known].abs().max() < 2e-7


def test_ddnm_without_noise_depends_on_its_start_only():
    """With eta 0 nothing is drawn after the start; a chain is the closed form of DDIM."""
    image, _ = problem()
    tables, schedule = Tables.linear().respaced("ddim8"), Schedule.plain(8)
    x = philox_normal(torch.tensor([4, 5]), image.shape).double()
    abar = np.append(1.0, tables.alphas_cumprod)
    for k in reversed(range(8)):
        made = (x * 0.3).sin()
        x = (
            math.sqrt(abar[k]) * (x - math.sqrt(1 - abar[k + 1]) * made) / math.sqrt(abar[k + 1])
            + math.sqrt(1 - abar[k]) * made
        )
    with pytest.warns(UserWarning, match="no known pixel"):
        result = samplers.ddnm(
            lambda x, t: (x * 0.3).sin(), image, torch.ones(1, 1, 6, 8), seeds=[4, 5], schedule=schedule, eta=0.0
        )  # fmt: skip
    assert (result - ((x + 1) / 2).clamp(0, 1)).abs().max() < 2e-5


def test_travel_starts_from_the_prediction_before_it_was_projected():
    """Known pixels after a travelling step are the model's, not the image's."""
    image, mask = problem()
    schedule = Schedule.repaint(8, jump_length=2, resampling=2)
    seen = []

    def model(x, t):
        seen.append(x.clone())
        return torch.zeros_like(x)  # x0 = x / √abar

    noises = torch.zeros(len(schedule.times), *image.shape)
    noises[0] = 0.25
    samplers.ddnm(model, image, mask, schedule=schedule, noises=noises, eta=0.0)
    tables = Tables.linear().respaced("ddim8")
    travels = [i for i, call in enumerate(schedule.calls) if call.undo]
    assert len(travels) == 3
    for i in travels:
        call = schedule.calls[i]
        ratio = math.sqrt(tables.alphas_cumprod[call.target] / tables.alphas_cumprod[call.step])
        assert torch.allclose(seen[i + 1], ratio * seen[i], rtol=1e-5)


def test_ddnm_clips_where_asked():
    image, mask = problem()
    run = {"seeds": [1, 2], "schedule": Schedule.plain(4), "paste": False}
    hole = (mask == 1).expand_as(image)
    clipped = samplers.ddnm(lambda x, t: -x, image, mask, clip=0.25, **run)[hole] * 2 - 1
    assert clipped.abs().max() <= 0.25 + 1e-6
    assert (samplers.ddnm(lambda x, t: -x, image, mask, **run)[hole] * 2 - 1).abs().max() > 0.5


# ---- SDEdit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["loop_large", "loop_small"])
def test_sdedit_is_the_public_loop(run):
    spec, stored = case("sdedit_step", run)
    start, passes = spec["t"], spec["sample_step"]
    tables = Tables(np.linspace(*spec["beta_start_end"], spec["num_diffusion_timesteps"]))
    variance = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}[spec["var_type"]]
    for done in range(1, passes + 1):
        model = Replay(stored["model_outputs"])
        result = samplers.sdedit(
            model, stored["image"][None], 1 - stored["mask"][None], noises=stored["noises"][: done * (start + 1)],
            start=start, passes=done, tables=tables, variance=variance, paste=False,
        )  # fmt: skip
        assert model.t == stored["model_t"][: done * start].tolist()
        # The public run in float64 has coefficients made of float32 betas: each step's differ by a rounding from ours.
        allowed = 2 * spec["max_abs_difference_float32_vs_float64"] + done * start * 2.0**-24
        exact = stored["result64"][done - 1]
        assert (2 * result - 1 - exact.clamp(-1, 1)).abs().max() < allowed < 4e-6
        assert (exact.abs() < 1).double().mean() > 0.4
    for ours, public in zip(model.x, stored["x_in"], strict=True):
        assert (ours - public).abs().max() < 3 * spec["max_abs_difference_float32_vs_float64"]
    fractions = (stored["mask"] > 0) & (stored["mask"] < 1)
    assert fractions.any(), "the case has values that are neither keep nor edit"


def test_sdedit_reads_what_is_under_the_mask():
    image, mask = problem()
    run = {"seeds": [1, 2], "start": 20}
    other = torch.where(mask == 1, 1 - image, image)
    a, b = (samplers.sdedit(lambda x, t: 0.1 * x, i, mask, **run) for i in (image, other))
    assert torch.equal(a[mask.expand_as(a) == 0], image[mask.expand_as(a) == 0])
    hole = (mask == 1).expand_as(image)
    assert (a - b)[hole].abs().mean() > 0.1
    with pytest.raises(ValueError, match=r"image has \d+ values outside \[0, 1\]; the first, nan"):
        samplers.sdedit(lambda x, t: x, torch.where(mask == 1, torch.nan, image), mask, **run)


def test_sdedit_of_a_whole_image():
    """Without a mask; a model that returns the noise that is there gives the image back, in every pass."""
    image, _ = problem()
    tables, target = Tables.linear(), 2 * image - 1

    def model(x, t):
        abar = tables.alphas_cumprod[t[0]]
        return torch.cat([(x - math.sqrt(abar) * target) / math.sqrt(1 - abar), x], 1)

    result = samplers.sdedit(model, image, seeds=[1, 2], start=30, passes=2)
    assert (result - image).abs().max() < 1e-4
    assert not torch.equal(result, image)


def test_sdedit_draws_other_noise_in_each_pass():
    image, mask = problem()
    starts = []

    def model(x, t):
        if t[0] == 9:
            starts.append(x.clone())
        return torch.zeros_like(x)

    samplers.sdedit(model, image, mask, seeds=[1, 2], start=10, passes=2)
    known = (mask == 0).expand_as(image)
    abar = Tables.linear().alphas_cumprod[9]
    a, b = ((x - math.sqrt(abar) * (2 * image - 1))[known] / math.sqrt(1 - abar) for x in starts)
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(a.numel())
    assert 0.8 < a.std() < 1.2


def test_no_mask_to_edit_gives_copies():
    image, mask = problem()
    result = samplers.sdedit(lambda x, t: x / 0, image, 0 * mask, seeds=[1, 2])
    assert torch.equal(result, image)
    result = samplers.ddnm(lambda x, t: x / 0, image, 0 * mask, seeds=[1, 2])
    assert torch.equal(result, image)


IMAGE, MASK = problem()


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("ddnm", {"eta": 1.5}, "eta is 1.5; accepted: 0 to 1"),
        ("ddnm", {"eta": math.nan}, "eta is nan"),
        (
            "ddnm",
            {"schedule": Schedule.plain(300)},
            r"schedule has 300 steps, and tables is None; .* or tables=Tables.linear\(\).respaced\(300\)",
        ),
        ("ddnm", {"schedule": Schedule.plain(1300)}, r"tables=Tables.linear\(1300\).rescaled\(\)"),
        (
            "ddnm",
            {"schedule": Schedule.plain(9), "tables": Tables.linear().respaced(8)},
            "begins at step 8, the tables have 8",
        ),
        (
            "ddnm",
            {"seeds": None, "noises": torch.zeros(7, 2, 3, 6, 8)},
            "noises holds 7 draws; accepted for this schedule: 101",
        ),
        ("sdedit", {"start": 0}, "start is 0; accepted: 1 to 1000"),
        ("sdedit", {"start": 1001}, "start is 1001"),
        ("sdedit", {"passes": 0}, "passes is 0; accepted: at least 1"),
        ("sdedit", {"variance": "learned_range"}, "variance is 'learned_range'; accepted: fixed_large, fixed_small"),
        ("sdedit", {"seeds": None, "noises": torch.zeros(7, 2, 3, 6, 8)}, "noises holds 7 draws; accepted: 501"),
        (
            "sdedit",
            {"model": lambda x, t: x[:1]},
            r"returned \(1, 3, 6, 8\); accepted: \(2, 3, 6, 8\) or \(2, 6, 6, 8\)",
        ),
    ],
)
def test_refused(name, changed, message):
    arguments = {"model": lambda x, t: x, "image": IMAGE, "mask": MASK, "seeds": [1, 2]} | changed
    with pytest.raises(ValueError, match=message):
        getattr(samplers, name)(**arguments)

"""Schedules and tables against the public code's, bit for bit, and what is refused."""

from __future__ import annotations

import itertools
import json
import pathlib
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file

from inpaintrt.ops.sampler_step import ROW
from inpaintrt.samplers import Schedule, Tables, repaint_rows
from inpaintrt.samplers import schedule as schedule_module
from inpaintrt.samplers.tables import default_tables, kept_steps

GOLDEN = pathlib.Path(__file__).parent / "golden"
TABLES = json.loads((GOLDEN / "repaint_tables/case.json").read_text())
STORED = load_file(GOLDEN / "repaint_tables/tensors.safetensors")
SCHEDULES = json.loads((GOLDEN / "repaint_schedule/case.json").read_text())["settings"]
PUBLIC_NAMES = {
    "t_T": "steps", "n_sample": "step_resampling", "jump_length": "jump_length", "jump_n_sample": "resampling",
    "jump2_length": "jump2_length", "jump2_n_sample": "jump2_resampling", "jump3_length": "jump3_length",
    "jump3_n_sample": "jump3_resampling", "start_resampling": "start_resampling",
}  # fmt: skip


def public(arguments):
    """Our schedule for the public code's arguments."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no jump of")
        return Schedule.repaint(**{PUBLIC_NAMES[name]: value for name, value in arguments.items()})


# ---- tables ---------------------------------------------------------------------------------------------------------


def base(name, steps):
    return {"linear": Tables.linear, "cosine": Tables.cosine}[name](steps)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_betas(name):
    tables = base(name, 1000)
    assert np.array_equal(tables.betas, STORED[f"base_{name}_1000/betas"])
    assert np.array_equal(tables.alphas_cumprod, STORED[f"base_{name}_1000/alphas_cumprod"])
    assert tables.timesteps.tolist() == list(range(1000))


@pytest.mark.parametrize("setting", TABLES["settings"])
def test_respaced_tables(setting):
    spec = TABLES["settings"][setting]
    tables = base(spec["noise_schedule"], spec["steps"]).respaced(spec["timestep_respacing"])
    assert len(tables) == spec["kept"]
    assert tables.timesteps.tolist() == STORED[f"{setting}/timestep_map"].tolist()
    names = {key.split("/")[1] for key in STORED if key.startswith(f"{setting}/") and "/f32_" not in key}
    ours = {name for name in names if hasattr(tables, name)}
    assert names - ours == {"timestep_map", "log_one_minus_alphas_cumprod"}
    for name in sorted(ours):
        # Elementary functions of float64 may differ in the last bit between builds of numpy.
        stored = STORED[f"{setting}/{name}"]
        np.testing.assert_allclose(getattr(tables, name), stored, rtol=4 * 2.0**-52, err_msg=name)


def test_values_that_are_known():
    """Linear betas of 1000 steps, 250 of them kept: numbers computed once, by hand."""
    tables = Tables.linear().respaced(250)
    assert tables.betas[[0, 1, 249]] == pytest.approx([1e-4, 5.9906556e-4, 7.7519345e-2], rel=1e-7)
    assert tables.alphas_cumprod[[9, 200, 249]] == pytest.approx([0.98317181, 1.4594711e-3, 4.0358298e-5], rel=1e-7)
    assert (tables.posterior_mean_coef1[0], tables.posterior_mean_coef2[0]) == (1.0, 0.0)
    assert tables.posterior_log_variance_clipped[[0, 1, 249]] == pytest.approx([-9.36462816, -9.36462816, -2.55723115])


@pytest.mark.parametrize("case", TABLES["space_timesteps"])
def test_kept_steps(case):
    spec = TABLES["space_timesteps"][case]
    kept = kept_steps(spec["num_timesteps"], spec["section_counts"])
    assert kept == STORED[f"space/{case}"].tolist()
    assert len(kept) == spec["kept"]


def test_respacing_again_keeps_original_numbers():
    tables = Tables.linear().respaced("ddim50").respaced([3, 2])
    assert set(tables.timesteps) <= set(range(0, 1000, 20))
    assert np.allclose(tables.alphas_cumprod, Tables.linear().alphas_cumprod[tables.timesteps], rtol=1e-12)


def test_one_step_is_a_process():
    tables = Tables.linear().respaced(1)
    assert np.isfinite(tables.posterior_log_variance_clipped).all()
    assert tables.posterior_mean_coef1.tolist() == [1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tables([]), r"betas has shape \(0,\)"),
        (lambda: Tables([[0.1]]), r"betas has shape \(1, 1\)"),
        (lambda: Tables([0.1, 1.0]), r"betas\[1\] is 1.0; accepted: more than 0, less than 1"),
        (lambda: Tables([0.1, float("nan")]), r"betas\[1\] is nan"),
        (lambda: Tables([0.1, 0.2], [3, 3]), r"timesteps is \[3, 3\]; accepted: increasing"),
        (lambda: Tables([0.1, 0.2], [-1, 3]), r"from 0 or more"),
        (lambda: Tables([0.1, 0.2], ["0", "1"]), r"<U1; accepted: \(2,\), numbers"),
        (lambda: Tables([0.1, 0.2], [0.0, float("nan")]), r"timesteps is \[ ?0., nan\]; accepted: increasing"),
        (lambda: Tables.linear(20), "steps is 20; accepted: at least 21"),
        (lambda: Tables.cosine(0), "steps is 0"),
        (lambda: Tables.linear().respaced(1001), "1001 of the 1000 steps in section 0"),
        (lambda: Tables.linear().respaced("10,0"), "0 of the 500 steps in section 1"),
        (lambda: Tables.linear().respaced([]), r"counts is \[\]; accepted: at least one section"),
        (lambda: Tables.linear().respaced("fast27"), "counts is 'fast27'; accepted: 250"),
        (lambda: Tables.linear().respaced("ddim333"), "no whole stride takes 333 of 1000 steps"),
    ],
)
def test_tables_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tables_are_not_to_be_written():
    with pytest.raises(ValueError):
        Tables.linear().betas[0] = 0.5


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SCHEDULES)
def test_schedules_are_the_public_ones(setting):
    spec = SCHEDULES[setting]
    schedule = public(spec["arguments"])
    stored = load_file(GOLDEN / "repaint_schedule/tensors.safetensors")[f"{setting}/times"]
    assert list(schedule.times) == stored.tolist()
    assert len(schedule.calls) == spec["unet_calls"]
    assert sum(call.undo for call in schedule.calls) == spec["undo_steps"]
    assert sum(call.step == 0 for call in schedule.calls) == spec["calls_at_t0"]


@pytest.mark.parametrize(
    ("options", "calls", "undo"),
    [
        ({}, 2410, 2160),
        ({"resampling": 5}, 1210, 960),
        ({"resampling": 3}, 730, 480),
        ({"resampling": 1}, 250, 0),
        ({"start_resampling": 100}, 1150, 900),
        ({"step_resampling": 10, "resampling": 1}, 2482, 2232),
        ({"jump_length": 1}, 2491, 2241),
        ({"steps": 100}, 910, 810),
        ({"steps": 100, "resampling": 2}, 190, 90),
        ({"steps": 50}, 410, 360),
    ],
)
def test_counts(options, calls, undo):
    schedule = Schedule.repaint(**options)
    assert (len(schedule.calls), sum(call.undo for call in schedule.calls)) == (calls, undo)


def test_calls_chain():
    """The next call is where the undo steps end, and the last leads to -1."""
    calls = Schedule.repaint(60, jump_length=10, resampling=3, jump2_length=5, jump2_resampling=2).calls
    assert all(a.target == b.step for a, b in itertools.pairwise(calls))
    assert (calls[0].step, calls[-1], calls[-1].target) == (59, (0, 0), -1)


def test_slowed_has_the_calls_and_no_jumps():
    schedule = Schedule.repaint(50, resampling=3)
    slowed = schedule.slowed()
    assert len(slowed.calls) == len(schedule.calls) == slowed.steps == 130
    assert all(call.undo == 0 for call in slowed.calls)
    slowed.check(Tables.linear().respaced(slowed.steps))


def test_more_steps_than_the_model_knows_are_told_in_fractions():
    """guided-diffusion's rescale_timesteps; the noise at a fraction of the way is that of the model's own process."""
    slowed = Schedule.repaint().slowed()
    tables = default_tables(slowed.steps)
    assert slowed.steps == len(tables) == 2410
    assert tables.timesteps.dtype == np.float32
    assert np.allclose(tables.timesteps, np.arange(2410) * 1000 / 2410)
    own = Tables.linear()
    expected = np.interp(tables.timesteps, own.timesteps, np.log(own.alphas_cumprod))
    assert np.abs(np.log(tables.alphas_cumprod) - expected)[2:].max() < 0.06, "of 10"
    rows = repaint_rows(slowed, tables)
    assert np.array_equal(rows[:, ROW.index("timestep")], tables.timesteps[::-1])
    assert default_tables(250).timesteps.dtype == np.int64
    assert tables.respaced(10).timesteps[-1] == tables.timesteps[-1]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], r"times ends in nothing; accepted: a list that ends in 0, -1"),
        ([3, 2, 1, 0], "times ends in 2, 1, 0; accepted: a list that ends in 0, -1"),
        ([3, 2, 1], "ends in 3, 2, 1"),
        ([2, 3, 2, 1, 0, -1], "times begins with 2, 3; accepted: a call of the model first"),
        ([3, 2, 0, -1], r"times\[2\] is 0 after 2; accepted: one more or one less"),
        ([2, 1, 2, 3, 2, 1, 0, -1], r"times\[3\] is 3, above the first, 2; accepted: jumps up to step 2"),
        ([1, 0, -1, 0, -1], r"times\[2\] is -1; accepted: -1 at the end only"),
    ],
)
def test_schedules_refuse_lists(times, message):
    with pytest.raises(ValueError, match=message):
        Schedule(times)


@pytest.mark.parametrize("name", [n for n in PUBLIC_NAMES.values() if n != "start_resampling"])
def test_schedules_refuse_counts_below_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0; accepted: at least 1"):
        Schedule.repaint(**{name: 0})


def test_a_schedule_has_a_bounded_length(monkeypatch):
    monkeypatch.setattr(schedule_module, "LONGEST", 4570)
    with pytest.raises(ValueError, match="has more than 4,570 entries"):
        Schedule.repaint()
    monkeypatch.setattr(schedule_module, "LONGEST", 4571)
    assert len(Schedule.repaint().times) == 4571


def test_jumps_that_do_not_fit_warn():
    with pytest.warns(UserWarning, match="no jump of 10 steps fits among 10: walking a stretch 5 times has no effect"):
        Schedule.repaint(10, jump_length=10, resampling=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule.repaint(10, jump_length=10, resampling=1)


def test_a_schedule_beyond_the_tables():
    with pytest.raises(ValueError, match=r"begins at step 249, the tables have 100 steps; accepted: as many"):
        Schedule.repaint(250).check(Tables.linear().respaced(100))


def test_fewer_steps_without_respacing_is_told():
    """The known trap: a chain of 100 steps on tables of 250 begins where 20 % of the image's variance should be left."""
    tables = Tables.linear().respaced(250)
    with pytest.warns(UserWarning, match=r"step 99 of tables with 250 .* is 0\.198, not 4\.04e-05.*respaced\(100\)"):
        Schedule.repaint(100).check(tables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule.repaint(250).check(tables)

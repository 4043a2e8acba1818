"""The rows of coefficients of RePaint's steps, against the public tables and against undo steps one by one."""

from __future__ import annotations

import math
import pathlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from inpaintrt import samplers
from inpaintrt.ops.sampler_step import ROW
from inpaintrt.samplers import Schedule, Tables

GOLDEN = pathlib.Path(__file__).parent / "golden"


def tables_of(schedule):
    return Tables.linear().respaced(schedule.steps)


def columns(rows):
    return {name: rows[:, i].numpy() for i, name in enumerate(ROW)}


def test_rows_are_the_public_tables():
    """At 250 steps: what the public code extracts at a call and weighs the known region by at the next, to float32."""
    stored = {k.split("/")[1]: v for k, v in load_file(GOLDEN / "repaint_tables/tensors.safetensors").items()
              if k.startswith("linear_1000_250/")}  # fmt: skip
    schedule = Schedule.repaint()
    rows = samplers.repaint_rows(schedule, tables_of(schedule))
    assert (rows.shape, rows.dtype) == ((2410, 16), torch.float32)
    row = columns(rows)
    step = np.array([call.step for call in schedule.calls])
    for name, public in {
        "sqrt_recip": "sqrt_recip_alphas_cumprod", "sqrt_recipm1": "sqrt_recipm1_alphas_cumprod",
        "coef_x0": "posterior_mean_coef1", "coef_x": "posterior_mean_coef2",
        "min_log": "posterior_log_variance_clipped", "max_log": "log_betas", "timestep": "timestep_map",
    }.items():  # fmt: skip
        assert np.array_equal(row[name], stored[public][step].astype(np.float32)), name
    following = step[1:]
    np.testing.assert_allclose(row["known_scale"][:-1], stored["f32_gt_weight"][following], rtol=2e-7)
    np.testing.assert_allclose(row["known_sigma"][:-1], stored["f32_noise_weight"][following], rtol=1e-7, atol=1e-6)
    assert np.array_equal(row["nonzero"], (step > 0).astype(np.float32))
    assert (rows[:, 14:] == 0).all()


def test_rows_fold_the_undo_steps():
    """√A and 1 − A are what undo steps one by one amount to: a product of scales, and variances scaled and added."""
    schedule = Schedule.repaint(60, jump_length=10, resampling=3, jump2_length=5, jump2_resampling=2)
    tables = tables_of(schedule)
    row = columns(samplers.repaint_rows(schedule, tables))
    for i, call in enumerate(schedule.calls):
        scale, variance = 1.0, 0.0
        for beta in tables.betas[call.step : call.step + call.undo]:
            scale, variance = scale * math.sqrt(1 - beta), (1 - beta) * variance + beta
        assert row["undo_scale"][i] == pytest.approx(scale, rel=1e-6)
        assert row["undo_var"][i] == pytest.approx(variance, abs=1e-7)
        assert row["undo_steps"][i] == call.undo
    assert max(row["undo_steps"]) == 10


@pytest.mark.parametrize("paste", [False, True])
def test_the_last_row_pastes_or_leaves(paste):
    schedule = Schedule.repaint(12, jump_length=3, resampling=2)
    row = columns(samplers.repaint_rows(schedule, tables_of(schedule), paste=paste))
    assert [row[n][-1] for n in ("known_scale", "known_sigma", "blend")] == [1, 0, float(paste)]
    assert [row[n][-1] for n in ("nonzero", "undo_scale", "undo_var", "coef_x0", "coef_x")] == [0, 1, 0, 1, 0]
    assert (row["blend"][:-1] == 1).all()


def test_rows_of_fixed_variances():
    schedule = Schedule.plain(50)
    tables = tables_of(schedule)
    large = columns(samplers.repaint_rows(schedule, tables, variance="fixed_large"))["min_log"]
    small = columns(samplers.repaint_rows(schedule, tables, variance="fixed_small"))["min_log"]
    assert np.array_equal(large, np.log(tables.fixed_large_variance)[::-1].astype(np.float32))
    assert np.array_equal(small, tables.posterior_log_variance_clipped[::-1].astype(np.float32))
    with pytest.raises(ValueError, match="variance is 'fixed'; accepted: learned_range"):
        samplers.repaint_rows(schedule, tables, variance="fixed")

"""The coefficients of RePaint's steps, computed in float64 before the loop, so that inside it nothing is read or waited for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inpaintrt.ops.sampler_step import ROW

from .schedule import Schedule
from .tables import Array, Tables

VARIANCES = ("learned_range", "learned", "fixed_small", "fixed_large")
"""What a model says of a step's variance: a share between its bounds, its logarithm, or nothing, so that it is the smaller
(posterior) or the larger (beta) bound."""


def repaint_rows(schedule: Schedule, tables: Tables, *, variance: str = "learned_range", paste: bool = False) -> Tensor:
    """One row of `inpaintrt.ops.sampler_step` for each call of the model.

    Args:
        schedule: in which order the steps are visited.
        tables: the process; as many steps as the schedule.
        variance: one of `VARIANCES`; fixed ones stand in the column min_log (op: variance="fixed").
        paste: blend the known region, without noise, into the last result too.

    Returns:
        float32 (calls, 16) on the CPU, columns named by `inpaintrt.ops.sampler_step.ROW`. The undo steps after a call are
        part of its row, and what is blended is the known region at the step of the next call. The column timestep is what
        the model is told.

    Raises:
        ValueError: an unknown variance, or a schedule that begins beyond the tables' last step. One that begins below it
            warns: a chain of fewer steps needs tables respaced to as many.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; accepted: {', '.join(VARIANCES)}")
    schedule.check(tables)
    step = np.array([call.step for call in schedule.calls])
    target = np.array([call.target for call in schedule.calls])
    undo = np.array([call.undo for call in schedule.calls])
    # abar after a step and at the next call, which undo steps lower. With 1 in front, −1 (after the last call) is index 0.
    remaining = np.append(1.0, tables.alphas_cumprod)
    after, at_next = remaining[step], remaining[target + 1]
    kept = np.where(undo > 0, at_next / after, 1.0)
    last = target < 0
    columns: dict[str, Array] = {
        "sqrt_recip": tables.sqrt_recip_alphas_cumprod[step],
        "sqrt_recipm1": tables.sqrt_recipm1_alphas_cumprod[step],
        "coef_x0": tables.posterior_mean_coef1[step],
        "coef_x": tables.posterior_mean_coef2[step],
        "min_log": smaller_log_variance(tables, variance)[step],
        "max_log": tables.log_betas[step],
        "nonzero": np.where(step > 0, 1.0, 0.0),
        "undo_scale": np.sqrt(kept),
        "undo_var": 1.0 - kept,
        "known_scale": np.sqrt(at_next),
        "known_sigma": np.sqrt(1.0 - at_next),
        "blend": np.where(last, float(paste), 1.0),
        "timestep": tables.timesteps[step].astype(np.float64),
        "undo_steps": undo.astype(np.float64),
    }
    rows = np.zeros((len(step), len(ROW)))
    for name, column in columns.items():
        rows[:, ROW.index(name)] = column
    return torch.from_numpy(rows).to(torch.float32)


def smaller_log_variance(tables: Tables, variance: str) -> Array:
    """The lower bound of a learned variance, or the fixed one."""
    return np.log(tables.fixed_large_variance) if variance == "fixed_large" else tables.posterior_log_variance_clipped

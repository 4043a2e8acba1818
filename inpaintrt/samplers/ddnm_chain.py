"""DDNM for inpainting: the known pixels replace the predicted image's at every step (Wang, Yu and Zhang, ICLR 2023).

The prediction is projected onto images that agree with what is known, and the sample is made of that anew, as in DDIM (eta of
the noise drawn, the rest the model's). A "time travel" back up starts from the prediction before it was projected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inpaintrt.ops import linear_step

from .checkpoint import Checkpoint, digest
from .inputs import Inputs, check_model, is_whole, prepare
from .loop import Call, Chain, Progress, entry, run
from .schedule import Schedule
from .tables import Array, Tables


def ddnm(
    model: Callable[..., Tensor],
    image: Tensor,
    mask: Tensor,
    *,
    seeds: int | Sequence[int] | Tensor | None = None,
    schedule: Schedule | None = None,
    tables: Tables | None = None,
    eta: float = 0.85,
    labels: int | Sequence[int] | Tensor | None = None,
    clip: float | None = None,
    noises: Tensor | None = None,
    paste: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """The images with their holes filled by DDNM: ten to twenty times fewer calls of the model than RePaint, other results.

    Args:
        model: called as model(x, t, **model_kwargs), as by `repaint`; predicts noise. A variance that it returns besides,
            (n, 2C, H, W), is not used.
        image, mask, seeds, labels, paste, model_kwargs, progress, cancel, checkpoint, cuda_graph: as in `repaint`.
        schedule: default `Schedule.plain(100)`. Time travel is `Schedule.repaint(100, jump_length=…, resampling=…)`.
        tables: default `Tables.linear().respaced("ddimN")`, N the schedule's steps: the public code's spacing.
        eta: share of drawn noise, 0 (none, a deterministic chain without travel) to 1.
        clip: bound of the predicted image's values, in [−1, 1] units; None, the public code's: none.
        noises: instead of seeds, (draws, n, C, H, W) float32: the start, and one for each entry of the schedule after its
            first (down or up).

    Returns: as `repaint`.

    Raises: as `repaint`; ValueError too for eta outside [0, 1], and without tables for steps that no whole stride leaves.
    """
    check_model(model)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; accepted: 0 to 1")
    schedule = schedule or Schedule.plain(100)
    tables = tables or _spaced(schedule.steps)
    schedule.check(tables)
    inputs = prepare(image, mask, seeds=seeds, noises=noises, labels=labels, model_kwargs=model_kwargs)
    if is_whole(inputs) and paste:
        return inputs.copies()
    chain = _DDNM(inputs, schedule, tables, eta, clip)
    x = run(chain, model, progress=progress, cancel=cancel, checkpoint=checkpoint, cuda_graph=cuda_graph)
    return inputs.result(x, paste)


def _spaced(steps: int) -> Tables:
    """The public code's spacing."""
    try:
        return Tables.linear().respaced(f"ddim{steps}")
    except ValueError as error:
        other = f"Tables.linear().respaced({steps})" if steps <= 1000 else f"Tables.linear({steps}).rescaled()"
        raise ValueError(
            f"schedule has {steps} steps, and tables is None; accepted without tables: as many as a whole stride takes of 1000, "
            f"such as 100, 200, 250, 334, 500 and 1000, or tables={other}"
        ) from error


class _DDNM(Chain):
    name = "ddnm"

    def __init__(
        self, inputs: Inputs, schedule: Schedule, tables: Tables, eta: float, clip: float | None
    ) -> None:  # fmt: skip
        step = np.array([call.step for call in schedule.calls])
        channels = inputs.shape[1]
        super().__init__(inputs, torch.from_numpy(tables.timesteps[step]), (channels, 2 * channels))
        self._calls, self._clip = schedule.calls, clip
        if inputs.noises is not None and inputs.noises.shape[0] != len(schedule.times):
            raise ValueError(
                f"noises holds {inputs.noises.shape[0]} draws; accepted for this schedule: {len(schedule.times)}"
            )
        remaining = np.append(1.0, tables.alphas_cumprod)[np.array([call.target for call in schedule.calls]) + 1]
        image, noise = np.sqrt(remaining), np.sqrt(1 - remaining)
        zero, one = np.zeros_like(image), np.ones_like(image)

        def coefficients(*columns: Array) -> Tensor:
            return torch.from_numpy(np.stack(columns, axis=1)).to(self.device, torch.float32)

        # Of linear_step, for each call: factors of the terms, of noise, and scale and sigma of the known region.
        recip, recipm1 = tables.sqrt_recip_alphas_cumprod[step], tables.sqrt_recipm1_alphas_cumprod[step]
        self._predict = coefficients(recip, -recipm1, zero, one, zero)
        self._down = coefficients(image, noise * np.sqrt(1 - eta * eta), noise * eta, zero, zero)
        self._travel = coefficients(image, noise, zero, zero)

    def begin(self) -> None:
        noises = self.inputs.noises
        self.x, self._drawn = (self.inputs.normal(0) if noises is None else noises[0].clone()), 0
        self._x0 = torch.empty_like(self.x)

    def kind(self, call: int) -> str | None:
        return "travel" if self._calls[call].undo else "down"

    def advance(self, call: Call, kind: str | None, output: Tensor, gradient: Tensor | None) -> None:
        inputs, travels = self.inputs, kind == "travel"
        made = output[:, : self.x.shape[1]].to(torch.float32)
        known = {} if travels else {"known": inputs.known, "mask": inputs.keep}
        x0 = linear_step([self.x, made], entry(self._predict, call), clip=self._clip, out=self._x0, **known)
        drawn: dict[str, Any] = {"seeds": inputs.seeds, "call": call}
        if inputs.noises is not None:
            # Of several travelling steps only the last one's noise is left: each starts from the prediction.
            assert isinstance(call, int), "given noises are taken by number"
            self._drawn += 1 + self._calls[call].undo
            drawn = {"noise": inputs.noises[self._drawn : self._drawn + 1]}
        if travels:
            linear_step([x0], entry(self._travel, call), out=self.x, **drawn)
        else:
            linear_step([x0, made], entry(self._down, call), out=self.x, **drawn)

    def identity(self) -> dict[str, str]:
        tables = self.timesteps, self._predict, self._down, self._travel
        return {"schedule or tables": digest(*tables), "options": digest(self._clip)}

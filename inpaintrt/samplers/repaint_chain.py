"""RePaint: unconditional diffusion models fill holes (Lugmayr et al., CVPR 2022).

Between two calls of the model there is one pass over the samples: reverse step, all undo steps, and the known region,
noised to where the next call is (`inpaintrt.ops.sampler_step`). Noise that is given instead of drawn is used in the public
code's order, one operation after the other, for comparison with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inpaintrt.ops import linear_step, sampler_step

from .checkpoint import Checkpoint, digest
from .guidance import Guidance
from .inputs import Inputs, check_model, is_whole, prepare
from .loop import Call, Chain, Progress, entry, run
from .rows import repaint_rows
from .schedule import Schedule
from .tables import Tables, default_tables


def repaint(
    model: Callable[..., Tensor],
    image: Tensor,
    mask: Tensor,
    *,
    seeds: int | Sequence[int] | Tensor | None = None,
    schedule: Schedule | None = None,
    tables: Tables | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    guidance: Guidance | None = None,
    prediction: str = "epsilon",
    variance: str = "learned_range",
    clip: float | None = 1.0,
    noises: Tensor | None = None,
    paste: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """The images with their holes filled by a diffusion model that knows nothing of holes.

    Args:
        model: called as model(x, t, **model_kwargs), x (n, C, H, W) float32 about [−1, 1], t int64 (n,) the step's original
            number (of rescaled tables float32, a fraction); returns (n, 2C, H, W), prediction and variance, or with a fixed
            variance (n, C, H, W). In eval mode.
        image: (B, C, H, W), C usually 3 (RGB), floating point in [0, 1]. What lies where mask is 1 is not read.
        mask: (1|B, 1|C, H, W), **1 = hole**, 0 = known; fractions in between blend.
        seeds: one integer of 64 bits for each sample: B, or a multiple for several samples of each image, which come out
            one after the other. A sample depends on its own seed only, not on its batch.
        schedule: default `Schedule.repaint()`: 250 steps, 2410 calls. `schedule.slowed()` compares with as many calls
            without jumps.
        tables: the process; default `Tables.linear().respaced(schedule.steps)`, of more than 1000 steps
            `Tables.linear(schedule.steps).rescaled()`.
        labels: classes, int64: one, B or as many as seeds; the model gets them as y.
        guidance: called as guidance(x, t, **model_kwargs) at every step, returns (n, C, H, W), such as
            `classifier_guidance` makes: the mean grows by variance times it.
        prediction: what the model predicts: "epsilon", "x0", "v".
        variance: "learned_range" (guided-diffusion), "learned", "fixed_small", "fixed_large".
        clip: bound of the predicted image's values, in [−1, 1] units; None: none.
        noises: instead of seeds, (draws, n, C, H, W) float32: all noise in the public code's order (`draws` tells how many):
            the start; for each call the step's, then, but for the first, the known region's; one for each undo step.
        paste: known pixels of the result are the image's, bit for bit. Off: as the chain leaves them, which is close.
        model_kwargs: further arguments of the model, for all samples.
        progress: called with `Progress` after each call.
        cancel: asked before each call; True ends the run by `Cancelled`, with its state in the checkpoint if there is one.
        checkpoint: where the state is kept; the same call again goes on from it.
        cuda_graph: on a GPU, record a call of the model, what guidance adds and the step, and replay it for all others. The
            model must do the same at each call, in the same memory, without reading from the device.

    Returns:
        (n, C, H, W) in [0, 1], of image's dtype. With paste and no hole anywhere, copies of the images: the model does not
        run. With holes everywhere it warns, and gives what the model makes of nothing.

    Raises:
        ValueError: an argument of another shape, dtype or range; both or neither of seeds and noises; seeds that are no
            multiple of the images; a schedule that does not fit the tables; a model that returns another shape, trains, or
            lacks a label's class; cuda_graph with noises, or on another device than a GPU.
        InpaintRTError: the model returned NaN or, without clip, Inf, found at the end or at a checkpoint: it tells between which
            calls. Or its call cannot be recorded for cuda_graph.
        Cancelled, CheckpointError: as said above.
    """
    check_model(model)
    schedule = schedule or Schedule.repaint()
    tables = tables or default_tables(schedule.steps)
    rows = repaint_rows(schedule, tables, variance=variance)
    inputs = prepare(image, mask, seeds=seeds, noises=noises, labels=labels, model_kwargs=model_kwargs)
    if is_whole(inputs) and paste:
        return inputs.copies()
    made = Fused if noises is None else Reference
    chain = made(inputs, rows, schedule, tables, prediction, variance, clip)
    x = run(
        chain, model, guidance=guidance, progress=progress, cancel=cancel, checkpoint=checkpoint, cuda_graph=cuda_graph
    )  # fmt: skip
    return inputs.result(x, paste)


def draws(schedule: Schedule) -> int:
    """Noises of a run: how many `repaint(noises=…)` takes."""
    calls = schedule.calls
    return 2 * len(calls) + sum(call.undo for call in calls)


class Fused(Chain):
    """One pass between two calls, noise drawn in it."""

    name = "repaint"

    def __init__(
        self, inputs: Inputs, rows: Tensor, schedule: Schedule, tables: Tables, prediction: str, variance: str,
        clip: float | None,
    ) -> None:  # fmt: skip
        channels = inputs.shape[1]
        fixed = variance.startswith("fixed")
        hint = f" with variance={variance!r}" + ("" if fixed else '; a model without variances: variance="fixed_small"')
        timesteps = torch.from_numpy(tables.timesteps[[call.step for call in schedule.calls]])
        super().__init__(inputs, timesteps, (channels if fixed else 2 * channels,), hint)
        self.rows = rows.to(self.device)
        self.options: dict[str, Any] = {
            "prediction": prediction, "variance": "fixed" if fixed else variance, "clip": clip,
        }  # fmt: skip

    def begin(self) -> None:
        self.x = self.inputs.normal(0)
        self._x0 = torch.empty_like(self.x)

    def kind(self, call: int) -> str | None:
        return "step"

    def advance(self, call: Call, kind: str | None, output: Tensor, gradient: Tensor | None) -> None:
        inputs = self.inputs
        sampler_step(
            self.x, output, entry(self.rows, call), known=inputs.known, mask=inputs.keep, seeds=inputs.seeds, call=call,
            guidance=gradient, out=(self.x, self._x0), **self.options,
        )  # fmt: skip

    def identity(self) -> dict[str, str]:
        return {"schedule or tables": digest(self.timesteps, self.rows), "options": digest(self.options)}


class Reference(Fused):
    """Given noises, in the public code's order: step; each undo step; the known region before the next call."""

    def __init__(
        self, inputs: Inputs, rows: Tensor, schedule: Schedule, tables: Tables, prediction: str, variance: str,
        clip: float | None,
    ) -> None:  # fmt: skip
        super().__init__(inputs, rows, schedule, tables, prediction, variance, clip)
        assert inputs.noises is not None
        if inputs.noises.shape[0] != draws(schedule):
            raise ValueError(
                f"noises holds {inputs.noises.shape[0]} draws; accepted for this schedule: {draws(schedule)}"
            )
        self._noises = inputs.noises
        self._calls = schedule.calls

        def coefficients(*columns: Any) -> Tensor:
            table = np.stack(np.broadcast_arrays(*columns), axis=1)
            return torch.from_numpy(table).to(self.device, torch.float32)

        # Of linear_step, for each step: factor of the sample, of noise, and scale and sigma of the known region.
        self._undo = coefficients(np.sqrt(1 - tables.betas), np.sqrt(tables.betas), 0.0, 0.0)
        self._blend = coefficients(1.0, 0.0, tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod)

    def begin(self) -> None:
        self.x, self._drawn = self._noises[0].clone(), 1

    def kind(self, call: int) -> str | None:
        return None

    def advance(self, call: Call, kind: str | None, output: Tensor, gradient: Tensor | None) -> None:
        assert isinstance(call, int), "its calls are of no kind"
        inputs, (step, undo) = self.inputs, self._calls[call]
        z = self._noises[self._drawn : self._drawn + 1]
        self._drawn += 1 if call == 0 else 2  # the known region's was used before this call
        x, _ = sampler_step(self.x, output, self.rows[call], noise=z, guidance=gradient, **self.options)
        for beta in range(step, step + undo):
            u = self._noises[self._drawn : self._drawn + 1]
            self._drawn += 1
            x = linear_step([x], self._undo[beta], noise=u)
        if call + 1 < self.calls:
            z_and_k = self._noises[self._drawn : self._drawn + 2]
            at = self._blend[self._calls[call].target]
            x = linear_step([x], at, noise=z_and_k, known=inputs.known, mask=inputs.keep)
        self.x = x

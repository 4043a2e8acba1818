"""SDEdit: an image, or a sketch on it, made real by adding noise and taking it away again (Meng et al., ICLR 2022).

Outside the mask the image is put back at every step, with the noise that its step has; within a pass it is the same noise.
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
from .rows import smaller_log_variance
from .tables import Array, Tables


def sdedit(
    model: Callable[..., Tensor],
    image: Tensor,
    mask: Tensor | None = None,
    *,
    seeds: int | Sequence[int] | Tensor | None = None,
    start: int = 500,
    passes: int = 1,
    tables: Tables | None = None,
    variance: str = "fixed_large",
    labels: int | Sequence[int] | Tensor | None = None,
    noises: Tensor | None = None,
    paste: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """The images with what lies under the mask made anew from what is there, by a diffusion model.

    Args:
        model: called as model(x, t, **model_kwargs), as by `repaint`; predicts noise. A variance that it returns besides,
            (n, 2C, H, W), is not used.
        image: (B, C, H, W), floating point in [0, 1]. It is read under the mask too: strokes, or a first fill.
        mask: (1|B, 1|C, H, W), 0 = keep, **any other value = edit**; None: edit everything.
        start: steps of the process, from its least noisy, that are added and taken away; more change more.
        passes: how often; each goes on from the one before.
        tables: default `Tables.linear()`, 1000 steps.
        variance: "fixed_large" or "fixed_small".
        noises: instead of seeds, (draws, n, C, H, W) float32: for each pass its start, and one for each of its calls.
        seeds, labels, paste, model_kwargs, progress, cancel, checkpoint, cuda_graph: as in `repaint`.

    Returns: as `repaint`.

    Raises: as `repaint`; ValueError too for start or passes out of range.
    """
    check_model(model)
    tables = tables or Tables.linear()
    if not 1 <= start <= len(tables):
        raise ValueError(f"start is {start}; accepted: 1 to {len(tables)}, the steps of the tables")
    if passes < 1:
        raise ValueError(f"passes is {passes}; accepted: at least 1")
    if variance not in ("fixed_large", "fixed_small"):
        raise ValueError(f"variance is {variance!r}; accepted: fixed_large, fixed_small")
    if mask is not None:
        mask = torch.where(mask == 0, mask, torch.ones_like(mask))
    inputs = prepare(
        image, mask, seeds=seeds, noises=noises, labels=labels, model_kwargs=model_kwargs, read_hole=True
    )  # fmt: skip
    if mask is not None and is_whole(inputs) and paste:
        return inputs.copies()
    chain = _SDEdit(inputs, tables, start, passes, variance)
    x = run(chain, model, progress=progress, cancel=cancel, checkpoint=checkpoint, cuda_graph=cuda_graph)
    return inputs.result(x, paste)


class _SDEdit(Chain):
    name = "sdedit"

    def __init__(self, inputs: Inputs, tables: Tables, start: int, passes: int, variance: str) -> None:
        step = np.arange(start)[::-1]
        channels = inputs.shape[1]
        timesteps = torch.from_numpy(np.tile(tables.timesteps[step], passes))
        super().__init__(inputs, timesteps, (channels, 2 * channels))
        self._start = start
        draws = passes * (start + 1)
        if inputs.noises is not None and inputs.noises.shape[0] != draws:
            raise ValueError(f"noises holds {inputs.noises.shape[0]} draws; accepted: {draws}, start + 1 for each pass")

        def coefficients(*columns: Array) -> Tensor:
            return torch.from_numpy(np.stack(columns, axis=1)).to(self.device, torch.float32)

        # Of linear_step, for each call of a pass: factors of the terms, of noise, and scale and sigma of the known region.
        zero, one = np.zeros(start), np.ones(start)
        scale = 1 / np.sqrt(1 - tables.betas[step])
        made = -scale * tables.betas[step] / tables.sqrt_one_minus_alphas_cumprod[step]
        spread = np.exp(smaller_log_variance(tables, variance)[step] / 2) * (step > 0)
        self._reverse = coefficients(scale, made, spread, one, zero)
        image, noise = tables.sqrt_alphas_cumprod[step], tables.sqrt_one_minus_alphas_cumprod[step]
        self._noised = coefficients(image, noise, zero, zero, zero)

    def begin(self) -> None:
        self._guide = self.inputs.known.expand(self.inputs.shape).clone()
        self._known = torch.empty_like(self._guide)
        self._noise = self._fixed_noise(0).clone()
        self.x = linear_step([self._guide, self._noise], self._noised[0])

    def kind(self, call: int) -> str | None:
        return None if self._turns(call) else "step"

    def _turns(self, call: int) -> bool:
        """Whether another pass begins after this call."""
        return (call + 1) % self._start == 0 and call + 1 < self.calls

    def advance(self, call: Call, kind: str | None, output: Tensor, gradient: Tensor | None) -> None:
        inputs, at = self.inputs, call % self._start
        made = output[:, : self.x.shape[1]].to(torch.float32)
        linear_step([self._guide, self._noise], entry(self._noised, at), out=self._known)
        drawn: dict[str, Any] = {"seeds": inputs.seeds, "call": call}
        if inputs.noises is not None:
            assert isinstance(call, int), "given noises are taken by number"
            drawn = {"noise": inputs.noises[call + call // self._start + 1][None]}
        linear_step([self.x, made], entry(self._reverse, at), known=self._known, mask=inputs.keep, out=self.x, **drawn)
        if isinstance(call, int) and self._turns(call):
            self._guide.copy_(torch.where(inputs.keep == 1, self._guide, self.x))
            self._noise.copy_(self._fixed_noise((call + 1) // self._start))
            linear_step([self._guide, self._noise], self._noised[0], out=self.x)

    def _fixed_noise(self, turn: int) -> Tensor:
        noises = self.inputs.noises
        return self.inputs.normal(turn) if noises is None else noises[turn * (self._start + 1)]

    def state(self) -> dict[str, Tensor]:
        return {"x": self.x, "guide": self._guide}

    def restore(self, done: int, state: Mapping[str, Tensor]) -> None:
        super().restore(done, state)
        self._guide = state["guide"].to(self.device)
        self._noise = self._fixed_noise(done // self._start).clone()

    def identity(self) -> dict[str, str]:
        return {"start, passes or tables": digest(self.timesteps, self._reverse, self._noised)}

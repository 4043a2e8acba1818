"""Schedulers whose steps are given by abar, the share of the image's variance that is left: DDPM, DDIM, RePaint."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_repaint import RePaintSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from inpaintrt.ops import linear_step, sampler_step
from inpaintrt.ops.sampler_step import ROW
from inpaintrt.samplers.tables import Array

from .coefficients import Coefficients, suits

_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_MOST_NOISES = 4
"""Of undo steps in one pass: `linear_step` takes five terms."""


def _pair(scheduler: Any, before: list[int]) -> tuple[Array, Array]:
    """abar at each timestep and at the one `before` it in the process; where that is negative, what is left at the end."""
    abar = scheduler.alphas_cumprod.double().cpu().numpy()
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return abar[scheduler._values()], np.array([abar[t] if t >= 0 else final for t in before])


def _distance(scheduler: Any) -> int:
    """Training steps from one timestep to the next."""
    if scheduler.num_inference_steps is None:
        raise ValueError("Number of inference steps is 'None'; run 'set_timesteps' after creating the scheduler")
    return scheduler.config.num_train_timesteps // scheduler.num_inference_steps  # type: ignore[no-any-return]


def _variance(now: Array, then: Array) -> Array:
    return (1 - then) / (1 - now) * (1 - now / then)


def _clip(scheduler: Any) -> float | None:
    return float(scheduler.config.clip_sample_range) if scheduler.config.clip_sample else None


class DDPMScheduler(Coefficients, diffusers.DDPMScheduler):  # type: ignore[misc]
    """diffusers' DDPMScheduler in one pass, learned_range variances too. Samples of float32."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        learned = self.variance_type == "learned_range"
        step = self._step_of(timestep)
        shape = (sample.shape[0], sample.shape[1] * (1 + learned), *sample.shape[2:])
        if (
            step is None
            or not suits(sample)
            or sample.dtype != torch.float32
            or (tuple(model_output.shape), model_output.dtype) != (shape, torch.float32)
            or self.config.thresholding
            or self.config.prediction_type not in _PREDICTIONS
            or self.variance_type not in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
        ):
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise = (
            randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            if self._values()[step] > 0
            else torch.zeros_like(sample)
        )
        row = self._row("step", step, sample.device)
        x, x0 = sampler_step(
            sample, model_output, row, noise=noise[None], prediction=_PREDICTIONS[self.config.prediction_type],
            variance="learned_range" if learned else "fixed", clip=_clip(self),
        )  # fmt: skip
        return DDPMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    def _rows_of_step(self) -> Array:
        values = self._values()
        abar = self.alphas_cumprod.double().cpu().numpy()
        now, then = abar[values], np.array([abar[t] if t >= 0 else 1.0 for t in [*values[1:], -1]])
        beta = 1 - now / then
        small = np.log(np.maximum(_variance(now, then), 1e-20))
        columns = {
            "sqrt_recip": np.sqrt(1 / now),
            "sqrt_recipm1": np.sqrt(1 / now - 1),
            "coef_x0": np.sqrt(then) * beta / (1 - now),
            "coef_x": np.sqrt(1 - beta) * (1 - then) / (1 - now),
            "min_log": np.log(beta) if self.variance_type == "fixed_large" else small,
            "max_log": np.log(beta),
            "nonzero": np.array([float(t > 0) for t in values]),
        }
        rows = np.zeros((len(values), len(ROW)))
        for name, column in columns.items():
            rows[:, ROW.index(name)] = column
        return rows


class DDIMScheduler(Coefficients, diffusers.DDIMScheduler):  # type: ignore[misc]
    """diffusers' DDIMScheduler in two passes: the predicted image, which is clipped and returned, and the step."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        step = self._step_of(timestep)
        if (
            step is None
            or not suits(sample, model_output)
            or self.config.thresholding
            or self.config.prediction_type not in _PREDICTIONS
            or (generator is not None and variance_noise is not None)  # an error, which is diffusers' to tell
        ):
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        if eta > 0 and variance_noise is None:
            variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        noise = variance_noise[None] if eta > 0 and variance_noise is not None else None
        x0 = linear_step([sample, model_output], self._row("image", step, sample.device), clip=_clip(self))
        row = self._row("step", step, sample.device, eta, bool(use_clipped_model_output))
        x = linear_step([x0, sample, model_output], row, noise=noise)
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    def _abar(self) -> tuple[Array, Array]:
        return _pair(self, [t - _distance(self) for t in self._values()])

    def _rows_of_image(self) -> Array:
        now, _ = self._abar()
        zero, one = np.zeros_like(now), np.ones_like(now)
        sample, made = {
            "epsilon": (1 / np.sqrt(now), -np.sqrt(1 / now - 1)),
            "sample": (zero, one),
            "v_prediction": (np.sqrt(now), -np.sqrt(1 - now)),
        }[self.config.prediction_type]
        return np.stack([sample, made, zero, zero, zero], 1)

    def _rows_of_step(self, eta: float, clipped: bool) -> Array:
        """Factors of the predicted image, the sample and the model's output; the noise's direction is of the last two."""
        now, then = self._abar()
        zero, one = np.zeros_like(now), np.ones_like(now)
        spread = eta * np.sqrt(_variance(now, then))
        along = np.sqrt(1 - then - spread**2)
        kind = "sample" if clipped else self.config.prediction_type
        image, sample, made = {
            "epsilon": (zero, zero, one),
            "sample": (-np.sqrt(now / (1 - now)), 1 / np.sqrt(1 - now), zero),
            "v_prediction": (zero, np.sqrt(1 - now), np.sqrt(now)),
        }[kind]
        if kind == "sample" and not clipped:  # derived from the output before it is clipped
            made, image = image, zero
        return np.stack([np.sqrt(then) + along * image, along * sample, along * made, spread, zero, zero], 1)


class RePaintScheduler(Coefficients, diffusers.RePaintScheduler):  # type: ignore[misc]
    """diffusers' RePaintScheduler: a step in two passes, all noises of an undo step in one.

    It is another algorithm than the paper's, which `inpaintrt.samplers.repaint` is.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        step = self._step_of(timestep)
        b, c, h, w = sample.shape if sample.dim() == 4 else (0, 0, 0, 0)
        if (
            step is None
            or not suits(sample, model_output)
            or tuple(original_image.shape) not in ((b, c, h, w), (1, c, h, w))
            or tuple(mask.shape) not in [(n, k, h, w) for n in (b, 1) for k in (c, 1)]
            or {original_image.dtype, mask.dtype} != {sample.dtype}
        ):
            return super().step(model_output, timestep, sample, original_image, mask, generator, return_dict)
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        clip = 1.0 if self.config.clip_sample else None
        x0 = linear_step([sample, model_output], self._row("image", step, sample.device), clip=clip)
        x = linear_step(
            [x0, model_output], self._row("step", step, sample.device, self.eta), noise=noise.expand(2, *noise.shape),
            known=original_image, mask=mask,
        )  # fmt: skip
        return RePaintSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    def undo_step(self, sample: Tensor, timestep: int | Tensor, generator: Any = None) -> Tensor:
        step = self._step_of(timestep)
        if step is None or not suits(sample):
            return super().undo_step(sample, timestep, generator)
        for first in range(0, _distance(self), _MOST_NOISES):
            count = min(_MOST_NOISES, _distance(self) - first)
            noises = [
                randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
                for _ in range(count)
            ]
            sample = linear_step([sample, *noises], self._row("undo", step, sample.device, first, count))
        return sample

    def _abar(self) -> tuple[Array, Array]:
        return _pair(self, [t - _distance(self) for t in self._values()])

    def _rows_of_image(self) -> Array:
        now, _ = self._abar()
        zero = np.zeros_like(now)
        return np.stack([1 / np.sqrt(now), -np.sqrt(1 / now - 1), zero, zero, zero], 1)

    def _rows_of_step(self, eta: float) -> Array:
        now, then = self._abar()
        spread = eta * np.sqrt(_variance(now, then))
        drawn = np.where(np.array(self._values()) > 0, spread, 0.0)
        return np.stack([np.sqrt(then), np.sqrt(1 - then - spread**2), drawn, np.sqrt(then), np.sqrt(1 - then)], 1)

    def _rows_of_undo(self, first: int, count: int) -> Array:
        """Factors of the sample and of `count` noises, of the training steps `first` … after each timestep."""
        betas = self.betas.double().cpu().numpy()
        at = np.array(self._values())[:, None] + first + np.arange(count)
        beta = betas[np.minimum(at, len(betas) - 1)]  # a timestep at the end is never undone
        kept = np.cumprod(np.sqrt(1 - beta)[:, ::-1], axis=1)[:, ::-1]
        later = np.concatenate([kept[:, 1:], np.ones_like(kept[:, :1])], 1)
        return np.concatenate([kept[:, :1], np.sqrt(beta) * later, np.zeros((len(beta), 3))], 1)

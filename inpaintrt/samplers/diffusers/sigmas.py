"""Schedulers whose steps are given by sigma, noise over image: Euler, Euler ancestral, DPM-Solver++, UniPC.

Sources: Karras et al., NeurIPS 2022; Lu et al. 2022, "DPM-Solver++"; Zhao et al., NeurIPS 2023, "UniPC".
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from inpaintrt.ops import linear_step
from inpaintrt.samplers.tables import Array

from .coefficients import DTYPES, Coefficients, suits


def _sigmas(scheduler: Any) -> Array:
    return scheduler.sigmas.double().cpu().numpy()  # type: ignore[no-any-return]


# ---- Euler ----------------------------------------------------------------------------------------------------------


def _image(prediction: str, sigma: Array) -> tuple[Array, Array]:
    """Factors of sample and output in the predicted image."""
    one = np.ones_like(sigma)
    return {
        "epsilon": (one, -sigma),
        "sample": (0 * one, one),
        "original_sample": (0 * one, one),
        "v_prediction": (1 / (sigma**2 + 1), -sigma / np.sqrt(sigma**2 + 1)),
    }[prediction]


def _towards(prediction: str, sigma: Array, then: Array, noise: Array) -> Array:
    """Factors of sample, output and noise of a step along (sample − image)/sigma from sigma to `then`."""
    sample, made = _image(prediction, sigma)
    q = (then - sigma) / sigma
    zero = np.zeros_like(q)
    return np.stack([1 + q * (1 - sample), -q * made, noise, zero, zero], 1)


class _Euler(Coefficients):
    """What both Euler schedulers share: predicted image and step are passes over sample and output, in float32."""

    predictions: tuple[str, ...]
    config: Any
    sigmas: Tensor
    step_index: int | None

    def _fits(self, model_output: Tensor, timestep: Any, sample: Tensor) -> bool:
        return (
            not isinstance(timestep, (int, torch.IntTensor, torch.LongTensor))  # an error, which is diffusers' to tell
            and self.is_scale_input_called  # type: ignore[attr-defined]
            and self.config.prediction_type in self.predictions
            and sample.dim() == 4
            and (sample.shape, sample.device) == (model_output.shape, model_output.device)
            and {sample.dtype, model_output.dtype} <= set(DTYPES)
        )

    def _move(self, model_output: Tensor, timestep: Any, sample: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        assert self.step_index is not None
        terms = [sample.float(), model_output.float()]
        image = linear_step(terms, self._row("image", self.step_index, sample.device))
        drawn = None if noise is None else noise.float()[None]
        x = linear_step(terms, self._row("step", self.step_index, sample.device), noise=drawn)
        self._step_index = self.step_index + 1
        return x.to(model_output.dtype), image

    def _rows_of_image(self) -> Array:
        sigma = _sigmas(self)[:-1]
        zero = np.zeros_like(sigma)
        return np.stack([*_image(self.config.prediction_type, sigma), zero, zero, zero], 1)


class EulerDiscreteScheduler(_Euler, diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' EulerDiscreteScheduler; with churn, which adds noise first, its own step."""

    predictions = ("epsilon", "sample", "original_sample", "v_prediction")

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if s_churn > 0 or not self._fits(model_output, timestep, sample):
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict
            )  # fmt: skip
        x, image = self._move(model_output, timestep, sample, None)
        if self.config.prediction_type in ("sample", "original_sample"):
            image = model_output
        return EulerDiscreteSchedulerOutput(prev_sample=x, pred_original_sample=image) if return_dict else (x, image)

    def _rows_of_step(self) -> Array:
        sigmas = _sigmas(self)
        return _towards(self.config.prediction_type, sigmas[:-1], sigmas[1:], np.zeros(len(sigmas) - 1))


class EulerAncestralDiscreteScheduler(_Euler, diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """diffusers' EulerAncestralDiscreteScheduler."""

    predictions = ("epsilon", "v_prediction")

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if not self._fits(model_output, timestep, sample):
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise = randn_tensor(
            model_output.shape, dtype=model_output.dtype, device=model_output.device, generator=generator
        )
        x, image = self._move(model_output, timestep, sample, noise)
        if not return_dict:
            return x, image
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=x, pred_original_sample=image)

    def _rows_of_step(self) -> Array:
        sigmas = _sigmas(self)
        here, there = sigmas[:-1], sigmas[1:]
        up = np.sqrt(there**2 * (here**2 - there**2) / here**2)
        return _towards(self.config.prediction_type, here, np.sqrt(there**2 - up**2), up)


# ---- solvers of several steps ---------------------------------------------------------------------------------------


class _Solver(Coefficients):
    """What the multistep solvers share. Their `step` is diffusers' own; it calls what is replaced here."""

    config: Any
    step_index: int
    model_outputs: list[Any]

    def _path(self) -> tuple[Array, Array, Array]:
        """alpha, sigma and half the logarithm of the signal-to-noise ratio, at each step and at the end."""
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas.double().cpu())  # type: ignore[attr-defined]
        return alpha.numpy(), sigma.numpy(), (alpha.log() - sigma.log()).numpy()

    def _predicts_images(self) -> bool:
        raise NotImplementedError

    def convert_model_output(
        self, model_output: Tensor, *args: Any, sample: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        linear = self.config.prediction_type in ("epsilon", "v_prediction", "flow_prediction")
        if (
            args
            or kwargs
            or sample is None
            or not self._predicts_images()
            or not linear
            or self.config.thresholding
            or not suits(sample, model_output)
        ):
            return super().convert_model_output(model_output, *args, sample=sample, **kwargs)  # type: ignore[misc, no-any-return]
        return linear_step([sample, model_output], self._row("image", self.step_index, sample.device))

    def _rows_of_image(self) -> Array:
        alpha, sigma, _ = self._path()
        given = _sigmas(self)
        sample, made = {
            "epsilon": (1 / alpha, -sigma / alpha),
            "v_prediction": (alpha, -sigma),
            "flow_prediction": (np.ones_like(given), -given),
        }[self.config.prediction_type]
        zero = np.zeros_like(alpha)
        return np.stack([sample, made, zero, zero, zero], 1)


class DPMSolverMultistepScheduler(_Solver, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers' DPMSolverMultistepScheduler: "dpmsolver++" and "sde-dpmsolver++" of orders 1 and 2 fused."""

    def _predicts_images(self) -> bool:
        return self.config.algorithm_type in ("dpmsolver++", "sde-dpmsolver++")

    def dpm_solver_first_order_update(
        self, model_output: Tensor, *args: Any, sample: Tensor | None = None, noise: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if (
            args
            or kwargs
            or sample is None
            or not self._predicts_images()
            or not suits(sample, model_output.to(sample.dtype))
        ):
            return super().dpm_solver_first_order_update(  # type: ignore[no-any-return]
                model_output, *args, sample=sample, noise=noise, **kwargs
            )
        terms = [sample, model_output.to(sample.dtype)]
        drawn = None if noise is None else noise[None]
        return linear_step(terms, self._row("first", self.step_index, sample.device), noise=drawn)

    def multistep_dpm_solver_second_order_update(
        self,
        model_output_list: list[Tensor],
        *args: Any,
        sample: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        images = [] if sample is None else [m.to(sample.dtype) for m in (model_output_list[-1], model_output_list[-2])]
        if args or kwargs or sample is None or not self._predicts_images() or not suits(sample, *images):
            return super().multistep_dpm_solver_second_order_update(  # type: ignore[no-any-return]
                model_output_list, *args, sample=sample, noise=noise, **kwargs
            )
        drawn = None if noise is None else noise[None]
        return linear_step([sample, *images], self._row("second", self.step_index, sample.device), noise=drawn)

    def _exponentials(self) -> tuple[Array, Array, Array, Array]:
        """Of each step: its h; factors of the sample and of the image in a first-order step; and of noise."""
        alpha, sigma, half_log = self._path()
        h = np.diff(half_log)
        ratio = sigma[1:] / sigma[:-1]
        if self.config.algorithm_type == "dpmsolver++":
            return h, ratio, -alpha[1:] * np.expm1(-h), np.zeros_like(h)
        return h, ratio * np.exp(-h), -alpha[1:] * np.expm1(-2 * h), sigma[1:] * np.sqrt(-np.expm1(-2 * h))

    def _rows_of_first(self) -> Array:
        h, sample, image, noise = self._exponentials()
        zero = np.zeros_like(h)
        return np.stack([sample, image, noise, zero, zero], 1)

    def _rows_of_second(self) -> Array:
        """With D1 = (m0 − m1)/r0, r0 being the step before over this one."""
        h, sample, image, noise = self._exponentials()
        alpha = self._path()[0][1:]
        if self.config.solver_type == "midpoint":
            change = 0.5 * image
        else:
            double = 1 if self.config.algorithm_type == "dpmsolver++" else 2
            change = alpha * (np.expm1(-double * h) / (double * h) + 1)
        change = change * h / np.append(np.nan, h[:-1])
        zero = np.zeros_like(h)
        return np.stack([sample, image + change, -change, noise, zero, zero], 1)


class UniPCMultistepScheduler(_Solver, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """diffusers' UniPCMultistepScheduler with `predict_x0`, of orders 1 to 3; small systems are solved on the host, once."""

    def _predicts_images(self) -> bool:
        return bool(self.predict_x0)

    def multistep_uni_p_bh_update(
        self, model_output: Tensor, *args: Any, sample: Tensor | None = None, order: int | None = None, **kwargs: Any
    ) -> Tensor:
        images = [] if order is None else self.model_outputs[-1 : -order - 1 : -1]
        if not self._fused_update(args, kwargs, sample, order, images):
            return super().multistep_uni_p_bh_update(model_output, *args, sample=sample, order=order, **kwargs)  # type: ignore[no-any-return]
        assert sample is not None
        return linear_step([sample, *images], self._row("predictor", self.step_index, sample.device, order))

    def multistep_uni_c_bh_update(
        self,
        this_model_output: Tensor,
        *args: Any,
        last_sample: Tensor | None = None,
        this_sample: Tensor | None = None,
        order: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        images = [] if order is None else [*self.model_outputs[-1 : -order - 1 : -1], this_model_output]
        if not self._fused_update(args, kwargs, last_sample, order, images):
            return super().multistep_uni_c_bh_update(  # type: ignore[no-any-return]
                this_model_output, *args, last_sample=last_sample, this_sample=this_sample, order=order, **kwargs
            )
        assert last_sample is not None
        return linear_step(
            [last_sample, *images], self._row("corrector", self.step_index - 1, last_sample.device, order)
        )  # fmt: skip

    def _fused_update(
        self, args: Any, kwargs: Any, sample: Tensor | None, order: int | None, images: list[Tensor]
    ) -> bool:  # fmt: skip
        return (
            not (args or kwargs or self.solver_p)
            and sample is not None
            and order is not None
            and order <= 3
            and self._predicts_images()
            and self.config.solver_type in ("bh1", "bh2")
            and suits(sample, *images)
        )

    def _rows_of_predictor(self, order: int) -> Array:
        return self._rows_of_update(order, corrects=False)

    def _rows_of_corrector(self, order: int) -> Array:
        return self._rows_of_update(order, corrects=True)

    def _rows_of_update(self, order: int, corrects: bool) -> Array:
        """Factors of the sample at a step, of the images predicted there and at the steps before it, and, in a corrector, of
        the image predicted where the step leads to. Rows of steps that have too few before them hold NaN."""
        alpha, sigma, half_log = self._path()
        steps = len(half_log) - 1
        rows = np.full((steps, 1 + order + corrects + 3), np.nan)
        for step in range(order - 1, steps):
            h = half_log[step + 1] - half_log[step]
            before = (half_log[step - np.arange(1, order)] - half_log[step]) / h
            phi = math.expm1(-h)
            scale = -h if self.config.solver_type == "bh1" else phi
            if corrects:
                weights = np.array([0.5]) if order == 1 else self._weights(h, np.append(before, 1.0), scale)
            else:
                weights = np.full(order - 1, 0.5) if order <= 2 else self._weights(h, before, scale)
            past = weights[: order - 1] / before
            ahead = weights[order - 1 :] if corrects else np.empty(0)
            change = -alpha[step + 1] * scale
            image = -alpha[step + 1] * phi - (change * past).sum() - (change * ahead).sum()
            rows[step] = [sigma[step + 1] / sigma[step], image, *(change * past), *(change * ahead), 0, 0, 0]
        return rows

    @staticmethod
    def _weights(h: float, ratios: Array, scale: float) -> Array:
        """rho with Σ rho_j · ratio_j^(i−1) = i! · phi_(i+1)(−h) · (−h) / scale for each i."""
        if not np.isfinite(h):
            return np.full_like(ratios, np.nan)
        phi, factorial, sides = math.expm1(-h) / -h - 1, 1.0, []
        for i in range(1, len(ratios) + 1):
            sides.append(phi * factorial / scale)
            factorial *= i + 1
            phi = phi / -h - 1 / factorial
        powers = np.stack([ratios**i for i in range(len(ratios))])
        return np.linalg.solve(powers, np.array(sides))

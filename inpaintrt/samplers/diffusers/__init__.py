"""Schedulers of the diffusers library with fused steps (extra `diffusers`): the same names, options and results.

from inpaintrt.samplers.diffusers import DDIMScheduler
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

Each is a subclass of diffusers' own: config, timesteps, sigmas, history and noise are theirs. What lies between two calls of
the model is one pass over the sample, or two where the predicted image is clipped or returned, with coefficients of float64
that are on the sample's device before the second step. Where a step is not of that form (thresholding, churn, solvers of
other kinds, tensors of other than four dimensions or of float64) diffusers' own code runs.

Names are diffusers' too, so that what is saved with them loads without this package.
"""

from __future__ import annotations

try:
    import diffusers
except ImportError as error:
    raise ImportError("inpaintrt.samplers.diffusers needs diffusers: pip install 'inpaintrt[diffusers]'") from error

from .alphas import DDIMScheduler, DDPMScheduler, RePaintScheduler
from .sigmas import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

__all__ = [
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "RePaintScheduler", "UniPCMultistepScheduler",
]  # fmt: skip

del diffusers

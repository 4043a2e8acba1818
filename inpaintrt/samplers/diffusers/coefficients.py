"""Coefficients of a scheduler's steps: computed for all steps at once, found without asking the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Coefficients:
    """What the fused schedulers share, in front of diffusers' class.

    A method `_rows_of_NAME(*options)` returns the coefficients of all steps, (steps, n) float64.
    """

    timesteps: Tensor

    def _kept(self) -> dict[Any, Any]:
        """What was computed for these timesteps and sigmas. diffusers replaces them as a whole when it sets new ones."""
        own = (self.timesteps, getattr(self, "sigmas", None))
        made_for, kept = self.__dict__.get("_fused", ((None, None), {}))
        if made_for[0] is not own[0] or made_for[1] is not own[1]:
            kept = {}
            self.__dict__["_fused"] = own, kept
        return kept  # type: ignore[no-any-return]

    def _row(self, name: str, step: int, device: torch.device, *options: Any) -> Tensor:
        """Coefficients of `linear_step` or `sampler_step`, float32, on the device; the whole table is brought there once."""
        kept, key = self._kept(), (name, device, *options)
        if key not in kept:
            with np.errstate(all="ignore"):  # of the last step's noise of 0 a logarithm is taken, as diffusers does
                rows = getattr(self, f"_rows_of_{name}")(*options)
            kept[key] = torch.from_numpy(np.ascontiguousarray(rows)).to(torch.float32).to(device)
        return kept[key][step]  # type: ignore[no-any-return]

    def _values(self) -> list[int]:
        """The timesteps on the host."""
        kept = self._kept()
        if "timesteps" not in kept:
            kept["timesteps"] = self.timesteps.tolist()
        return kept["timesteps"]  # type: ignore[no-any-return]

    def _step_of(self, timestep: int | Tensor) -> int | None:
        """Which step a timestep is, None if none. An element of `timesteps` tells by where it lies, without its value."""
        if isinstance(timestep, Tensor) and timestep.dim() == 0:
            own = self.timesteps
            if (
                timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
                and timestep.dtype == own.dtype
            ):
                return (timestep.storage_offset() - own.storage_offset()) // own.stride(0)
        values = self._values()
        return values.index(int(timestep)) if int(timestep) in values else None


def suits(sample: Tensor, *others: Tensor) -> bool:
    """Whether the ops take these tensors: of one shape, dtype and device."""
    return (
        sample.dim() == 4
        and sample.dtype in DTYPES
        and all((t.shape, t.dtype, t.device) == (sample.shape, sample.dtype, sample.device) for t in others)
    )

"""window_mask_update at MAT's layers, against the way of the public code: cut, sum, clamp, repeat, paste."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.window_mask_update import SPEC

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}


def as_networks_write_it(mask: Tensor, window_size: int, shift: int) -> Tensor:
    b, h, w, _ = mask.shape
    rolled = torch.roll(mask, (-shift, -shift), (1, 2)) if shift else mask
    cut = rolled.view(b, h // window_size, window_size, w // window_size, window_size, 1).permute(0, 1, 3, 2, 4, 5)
    cut = cut.reshape(-1, window_size**2, 1)
    cut = torch.clamp(cut.sum(1, keepdim=True), 0, 1).repeat(1, window_size**2, 1)
    pasted = cut.view(b, h // window_size, w // window_size, window_size, window_size, 1).permute(0, 1, 3, 2, 4, 5)
    pasted = pasted.reshape(b, h, w, 1)
    return torch.roll(pasted, (shift, shift), (1, 2)) if shift else pasted


@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_window_mask_update(versus, device, sample):
    shapes, options = SAMPLES[sample].shapes, SAMPLES[sample].kwargs
    mask = (torch.rand(shapes["mask"], generator=torch.Generator().manual_seed(0)) < 0.02).float().to(device)
    candidates = {
        "eager": lambda: as_networks_write_it(mask, **options),
        "inpaintrt": lambda: ops.window_mask_update(mask, **options),
    }
    if not versus.smoke:
        candidates["compile"] = versus.compiled(as_networks_write_it, mask, *options.values())
    versus(
        candidates, truth=lambda: SPEC.reference(mask.double(), **options), cost=SPEC.cost(*SPEC.bind(mask, **options)),
        device=device, dtype=mask.dtype, shape=mask.shape, op=SPEC.name, direction="forward",
    )  # fmt: skip

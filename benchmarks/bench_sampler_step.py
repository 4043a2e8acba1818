"""sampler_step at RePaint's images, against the step as the public code makes it: separate passes, two draws of noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.sampler_step import ROW, SPEC, example_row

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}


def as_networks_write_it(
    x: Tensor,
    model_output: Tensor,
    row: Tensor,
    known: Tensor,
    mask: Tensor,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
) -> tuple[Tensor, Tensor]:
    """One reverse step and one blend, each with its noise; every coefficient is spread over the image first."""
    r = {name: row[i].expand(x.shape) for i, name in enumerate(ROW)}
    epsilon, v = torch.split(model_output, x.shape[1], dim=1)
    share = (v + 1) / 2
    log_variance = share * r["max_log"] + (1 - share) * r["min_log"]
    x0 = (r["sqrt_recip"] * x - r["sqrt_recipm1"] * epsilon).clamp(-1, 1)
    mean = r["coef_x0"] * x0 + r["coef_x"] * x
    sample = mean + r["nonzero"] * torch.exp(0.5 * log_variance) * draw(x)
    noised = r["known_scale"] * known + r["known_sigma"] * draw(x)
    return mask * noised + (1 - mask) * sample, x0


@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_sampler_step(versus, device, sample):
    sample = SAMPLES[sample]
    tensors = sample.tensors(torch.Generator().manual_seed(0)) | {"row": example_row(undo_scale=1.0, undo_var=0.0)}
    tensors["mask"] = 1 - tensors["mask"]  # the hole is a box of a third of each side
    tensors = {n: t.to(device) for n, t in tensors.items()}
    x, call = tensors["x"], sample.kwargs["call"]
    eager = tuple(tensors[name] for name in ("x", "model_output", "row", "known", "mask"))
    out = (torch.empty_like(x), torch.empty_like(x))
    same = iter([ops.philox_normal(tensors["seeds"], x.shape, call=call, stream=stream) for stream in (1, 2)])
    expected = as_networks_write_it(*eager, draw=lambda x: next(same))  # the public step, given our noise
    torch.testing.assert_close(ops.sampler_step(**tensors, call=call), expected, rtol=1e-5, atol=1e-5)
    candidates = {
        "eager": lambda: as_networks_write_it(*eager),
        "inpaintrt": lambda: ops.sampler_step(**tensors, call=call, out=out),
        "inpaintrt, new outputs": lambda: ops.sampler_step(**tensors, call=call),
    }
    if not versus.smoke:
        candidates["compile"] = versus.compiled(as_networks_write_it, *eager)
    versus(
        candidates, check=False, cost=SPEC.cost(*SPEC.bind(**tensors, call=call)), device=device, dtype=x.dtype,
        shape=x.shape, op=SPEC.name, direction="forward",
    )  # fmt: skip

"""linear_step at the steps of public samplers, against the sums and products that their schedulers make one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.linear_step import SPEC

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}


def as_schedulers_write_it(
    terms: Sequence[Tensor],
    coefficients: Tensor,
    draw: Callable[[Tensor], Tensor] | None,
    noise: Tensor | None,
    clip: float | None,
    known: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """One pass for every product, sum, draw and clamp."""
    n = len(terms)
    y = coefficients[0] * terms[0]
    for i in range(1, n):
        y = y + coefficients[i] * terms[i]
    if draw is not None:
        y = y + coefficients[n] * draw(terms[0])
    if noise is not None:
        y = y + coefficients[n] * noise[0]
    if clip is not None:
        y = y.clamp(-clip, clip)
    if known is None or noise is None or mask is None:
        return y
    return mask * (coefficients[n + 1] * known + coefficients[n + 2] * noise[1]) + (1 - mask) * y


@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_linear_step(versus, device, sample):
    sample = SAMPLES[sample]
    tensors = {n: t.to(device) for n, t in sample.tensors(torch.Generator().manual_seed(0)).items()}
    terms = list(tensors.pop("terms").unbind())
    coefficients, seeds = tensors.pop("coefficients"), tensors.get("seeds")
    given = {"terms": terms, "coefficients": coefficients, **tensors, **sample.kwargs}
    rest = (tensors.get("noise"), sample.kwargs.get("clip"), tensors.get("known"), tensors.get("mask"))
    draw, same = None, None
    if seeds is not None:
        z = ops.philox_normal(seeds, terms[0].shape, call=sample.kwargs["call"], stream=1)
        draw, same = torch.randn_like, lambda x: z
    out = torch.empty_like(terms[0])
    expected = as_schedulers_write_it(terms, coefficients, same, *rest)  # with our noise
    torch.testing.assert_close(ops.linear_step(**given), expected, rtol=1e-5, atol=1e-5)
    candidates = {
        "eager": lambda: as_schedulers_write_it(terms, coefficients, draw, *rest),
        "inpaintrt": lambda: ops.linear_step(**given, out=out),
        "inpaintrt, new output": lambda: ops.linear_step(**given),
    }
    if not versus.smoke:
        candidates["compile"] = versus.compiled(as_schedulers_write_it, terms, coefficients, draw, *rest)
    versus(
        candidates, check=False, cost=SPEC.cost(*SPEC.bind(**given)), device=device, dtype=out.dtype, shape=out.shape,
        op=SPEC.name, direction="forward",
    )  # fmt: skip

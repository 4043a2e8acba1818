"""nearest_code at PUT's codebooks, against the way of the public code: all distances, then argmin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.nearest_code import SPEC

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}


def as_networks_write_it(x: Tensor, codebook: Tensor, split: int | None = None, known: Tensor | None = None) -> Tensor:
    distances = torch.sum(x**2, 1, keepdim=True) + torch.sum(codebook**2, 1) - 2 * torch.matmul(x, codebook.t())
    if split is None or known is None:
        return distances.argmin(1)
    first, second = distances[:, :split].argmin(1), split + distances[:, split:].argmin(1)
    return torch.where(known, first, second)


@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_nearest_code(versus, device, sample):
    generator = torch.Generator().manual_seed(0)
    shapes, split = SAMPLES[sample].shapes, SAMPLES[sample].kwargs.get("split")
    x, codebook = (torch.randn(shapes[name], generator=generator).to(device) for name in ("x", "codebook"))
    known = None
    if split is not None:
        known = (torch.rand(shapes["known"], generator=generator) < 0.45).to(device)

    def chosen(codes: Tensor) -> Tensor:  # indices have no rounding error; the distances at which they are have
        return (x - codebook[codes]).square().sum(1)

    def ours() -> Tensor:
        return ops.nearest_code(x, codebook, split=split, known=known)

    def port() -> Tensor:
        return as_networks_write_it(x, codebook, split, known)

    assert (ours() == port()).float().mean() > 0.999  # only near ties may be decided otherwise
    torch.testing.assert_close(chosen(ours()), chosen(port()))
    candidates = {"eager": port, "inpaintrt": ours}
    if not versus.smoke:
        candidates["compile"] = versus.compiled(as_networks_write_it, x, codebook, split, known)
    versus(
        candidates, truth=None, cost=SPEC.cost(*SPEC.bind(x, codebook, split=split, known=known)),
        device=device, shape=codebook.shape, op=SPEC.name, direction="forward",
    )  # fmt: skip

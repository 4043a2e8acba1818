"""fused_conv2d at the stride-1 3×3 layers of real networks, against torch's convolution in both memory formats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inpaintrt import ops
from inpaintrt.ops.fused_conv2d import SPEC

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}


@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_fused_conv2d(versus, device, sample):
    """Convolution, bias and ReLU with zero padding, which torch needs no copy for: only the algebra differs."""
    generator = torch.Generator().manual_seed(0)
    shapes = SAMPLES[sample].shapes
    x = torch.randn(shapes["x"], generator=generator).relu_().to(device)
    weight = (torch.randn(shapes["weight"], generator=generator) / (9 * x.shape[1]) ** 0.5).to(device)
    bias = torch.randn(shapes["bias"], generator=generator).to(device)
    last, last_weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))

    def torch_conv(x=x, weight=weight, bias=bias):
        return F.relu_(F.conv2d(x, weight, bias, padding=1))

    candidates = {
        "eager": torch_conv,
        "eager channels-last": lambda: torch_conv(last, last_weight),
        "inpaintrt": lambda: ops.fused_conv2d(x, weight, bias, padding=1, activation="relu"),
    }
    if not versus.smoke:
        candidates["compile"] = versus.compiled(torch_conv)
    versus(
        candidates, truth=lambda: torch_conv(x.double(), weight.double(), bias.double()),
        cost=SPEC.cost(*SPEC.bind(x, weight, bias, padding=[1, 1, 1, 1], activation="relu")),
        device=device, shape=x.shape, op=SPEC.name, layout="nchw", direction="forward",
    )  # fmt: skip

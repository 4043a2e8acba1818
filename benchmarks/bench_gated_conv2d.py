"""gated_conv2d at DeepFill v2's layers: fp32 and bf16, NCHW and NHWC, forward and a training step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.gated_conv2d import SPEC
from inpaintrt.runtime.spec import Cost

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SMOKE = 32  # pixels of a side, in a smoke run


def make(sample, smoke, device, dtype=torch.float32, layout="nchw"):
    """Operands of a sample, and the options that differ from a convolution's defaults."""
    found = SAMPLES[sample]
    generator = torch.Generator().manual_seed(0)
    shapes = dict(found.shapes)
    if smoke:
        shapes["x"] = (*shapes["x"][:2], *(min(SMOKE, n) for n in shapes["x"][2:]))
    x = torch.randn(shapes["x"], generator=generator).relu_()
    weight = torch.randn(shapes["weight"], generator=generator)
    bias = torch.randn(shapes["bias"], generator=generator)
    tensors = (x, weight / weight[0].numel() ** 0.5, bias)
    return [
        t.to(device, dtype).to(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t.to(device, dtype) for t in tensors
    ]


def options(sample: str) -> dict[str, int]:
    """As keyword arguments of F.conv2d too: no bench sample has sides that differ."""
    found = SAMPLES[sample].kwargs
    assert len(set(found["padding"])) == 1
    return {"stride": found.get("stride", 1), "padding": found["padding"][0], "dilation": found.get("dilation", 1)}


def cost(x: Tensor, weight: Tensor, bias: Tensor, given: dict[str, int]) -> Cost:
    return SPEC.cost(*SPEC.bind(x, weight, bias, **{**given, "padding": [given["padding"]] * 4}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_gated_conv2d(versus, device, baselines, sample, dtype, layout):
    tensors, given = make(sample, versus.smoke, device, DTYPES[dtype], layout), options(sample)
    candidates = {
        "eager": lambda: baselines.gated(*tensors, **given),
        "eager in place": lambda: baselines.gated_in_place(*tensors, **given),
        "inpaintrt": lambda: ops.gated_conv2d(*tensors, **given),
    }
    if not versus.smoke:
        candidates["compile"] = versus.compiled(lambda *t: baselines.gated(*t, **given), *tensors)
    x = tensors[0]
    versus(
        candidates, truth=lambda: baselines.gated(*(t.double() for t in tensors), **given), cost=cost(*tensors, given),
        device=device, dtype=x.dtype, shape=x.shape, op=SPEC.name, layout=layout, direction="forward",
    )  # fmt: skip


def test_gated_conv2d_training(versus, device, baselines):
    """Forward and gradients of input, weights and bias together, as a training step pays for them."""
    tensors = [t.requires_grad_() for t in make("48to48x256", versus.smoke, device)]
    given = options("48to48x256")
    grad = torch.ones_like(baselines.gated(*tensors, **given))

    def step(function, tensors=tensors):
        return torch.autograd.grad(function(*tensors, **given), tensors, grad.to(tensors[0].dtype))

    forward = cost(*tensors, given)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    versus(
        {"eager": lambda: step(baselines.gated), "inpaintrt": lambda: step(ops.gated_conv2d)},
        truth=lambda: step(baselines.gated, doubles), cost=Cost(3 * forward.flops, 3 * forward.bytes),
        device=device, shape=tensors[0].shape, op=SPEC.name, layout="nchw", direction="forward and backward",
    )  # fmt: skip

"""gated_activation at DeepFill v2's layer shapes, against eager torch and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.gated_activation import SPEC
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.policy import use_backend
from inpaintrt.runtime.spec import Cost, Sample

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def as_networks_write_it(y: Tensor) -> Tensor:
    features, gates = y.chunk(2, dim=1)
    return F.elu(features) * torch.sigmoid(gates)


def with_one_temporary_less(y: Tensor) -> Tensor:
    """The fastest plain formulation, where no gradient is needed."""
    features, gates = y.chunk(2, dim=1)
    return F.elu(features).mul_(torch.sigmoid(gates))


def make(sample: Sample, dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    noise = torch.randn(sample.shapes["y"], generator=torch.Generator().manual_seed(0))
    return noise.to(device, dtype).to(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_gated_activation(versus, device, sample, dtype, layout):
    y = make(SAMPLES[sample], DTYPES[dtype], layout, device)
    candidates = {
        "eager": lambda: as_networks_write_it(y),
        "eager in place": lambda: with_one_temporary_less(y),
        "inpaintrt": lambda: ops.gated_activation(y),
    }
    args = SPEC.bind(y)
    able = [backend for backend, reasons in dispatchers[SPEC.name].reasons(args, y).items() if not reasons]
    for backend in able[1:]:  # the first is what the dispatcher takes; the others show whether it should
        candidates[f"inpaintrt on {backend}"] = lambda backend=backend: forced(backend, y)
    if not versus.smoke:
        candidates["compile"] = versus.compiled(as_networks_write_it, y)
    versus(
        candidates, truth=lambda: SPEC.reference(y.double()), cost=SPEC.cost(*args),
        device=device, dtype=y.dtype, shape=y.shape, op=SPEC.name, layout=layout, direction="forward",
    )  # fmt: skip


def test_gated_activation_training(versus, device):
    """Forward and gradient together, as a training step pays for them."""
    y = make(SAMPLES["96x256"], torch.float32, "nchw", device).requires_grad_()
    grad = torch.ones_like(as_networks_write_it(y))

    def step(function, y=y):
        return torch.autograd.grad(function(y), y, grad.to(y.dtype))[0]

    candidates = {"eager": lambda: step(as_networks_write_it), "inpaintrt": lambda: step(ops.gated_activation)}
    if not versus.smoke:
        fast = versus.compiled(as_networks_write_it, y)
        candidates["compile"] = lambda: torch.autograd.grad(fast(), y, grad)[0]
    forward = SPEC.cost(*SPEC.bind(y))
    # The gradient reads y and grad and writes grad of y: 2.5 sizes of y after the forward's 1.5.
    cost = Cost(flops=3 * forward.flops, bytes=forward.bytes * 4 / 1.5)
    versus(
        candidates, truth=lambda: step(SPEC.reference, y.detach().double().requires_grad_()), cost=cost,
        device=device, shape=y.shape, op=SPEC.name, layout="nchw", direction="forward and backward",
    )  # fmt: skip


def forced(backend: str, y: Tensor) -> Tensor:
    with use_backend(backend, op=SPEC.name):
        return ops.gated_activation(y)

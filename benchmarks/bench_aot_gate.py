"""aot_gate at the block shapes of AOT-GAN and MIT2, against eager torch and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.aot_gate import SPEC
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.policy import use_backend
from inpaintrt.runtime.spec import Sample

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def as_networks_write_it(x: Tensor, fuse: Tensor, gate: Tensor) -> Tensor:
    mean = gate.mean((2, 3), keepdim=True)
    std = gate.std((2, 3), keepdim=True) + 1e-9
    mask = torch.sigmoid(5 * (2 * (gate - mean) / std - 1))
    return x * (1 - mask) + fuse * mask


def with_fewer_passes(x: Tensor, fuse: Tensor, gate: Tensor) -> Tensor:
    """The fastest plain formulation, where no gradient is needed."""
    std, mean = torch.std_mean(gate, (2, 3), keepdim=True)
    slope = 10 / (std + 1e-9)
    return torch.lerp(x, fuse, torch.addcmul(-5 - mean * slope, gate, slope).sigmoid_())


def make(sample: Sample, dtype: torch.dtype, layout: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(shape, generator=generator) for shape in sample.shapes.values())
    return tuple(t.to(device, dtype).to(memory_format=LAYOUTS[layout]) for t in noise)  # type: ignore[return-value]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_aot_gate(versus, device, sample, dtype, layout):
    x, fuse, gate = make(SAMPLES[sample], DTYPES[dtype], layout, device)
    candidates = {
        "eager": lambda: as_networks_write_it(x, fuse, gate),
        "eager, fewer passes": lambda: with_fewer_passes(x, fuse, gate),
        "inpaintrt": lambda: ops.aot_gate(x, fuse, gate),
    }
    args = SPEC.bind(x, fuse, gate)
    able = [backend for backend, reasons in dispatchers[SPEC.name].reasons(args, x).items() if not reasons]
    for backend in able[1:]:  # the first is what the dispatcher takes; the others show whether it should
        candidates[f"inpaintrt on {backend}"] = lambda backend=backend: forced(backend, x, fuse, gate)
    if not versus.smoke:
        candidates["compile"] = versus.compiled(as_networks_write_it, x, fuse, gate)
    versus(
        candidates, truth=lambda: SPEC.reference(x.double(), fuse.double(), gate.double()), cost=SPEC.cost(*args),
        device=device, dtype=x.dtype, shape=x.shape, op=SPEC.name, layout=layout, direction="forward",
    )  # fmt: skip


def forced(backend: str, x: Tensor, fuse: Tensor, gate: Tensor) -> Tensor:
    with use_backend(backend, op=SPEC.name):
        return ops.aot_gate(x, fuse, gate)

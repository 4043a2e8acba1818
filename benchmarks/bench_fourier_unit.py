"""fourier_unit at LaMa's bottlenecks, against eager torch as LaMa writes it and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.fourier_unit import SPEC

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def as_networks_write_it(x: Tensor, weight: Tensor, norm: tuple[Tensor, ...]) -> Tensor:
    """The public FourierUnit in eval mode: stack, permute, 1×1, batch norm, ReLU, permute, complex, inverse."""
    b, _, h, w = x.shape
    spectrum = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
    y = torch.stack((spectrum.real, spectrum.imag), dim=-1).permute(0, 1, 4, 2, 3).contiguous()
    y = F.conv2d(y.view(b, -1, h, w // 2 + 1), weight)
    y = F.relu_(F.batch_norm(y, *norm, training=False))
    y = y.view(b, -1, 2, h, w // 2 + 1).permute(0, 1, 3, 4, 2).contiguous()
    return torch.fft.irfftn(torch.complex(y[..., 0], y[..., 1]), s=(h, w), dim=(-2, -1), norm="ortho")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_fourier_unit(versus, device, sample, layout):
    generator = torch.Generator().manual_seed(0)
    shapes = SAMPLES[sample].shapes
    x = torch.randn(shapes["x"], generator=generator).relu_().to(device).to(memory_format=LAYOUTS[layout])
    channels = shapes["weight"][0]
    weight = (torch.randn(shapes["weight"], generator=generator) / channels**0.5).to(device)
    mean, var, gain, bias = (torch.rand(channels, generator=generator).to(device) + 0.5 for _ in range(4))
    scale = gain * torch.rsqrt(var + 1e-5)
    folded, shift = weight * scale.view(-1, 1, 1, 1), bias - mean * scale
    norm = (mean, var, gain, bias)
    candidates = {
        "eager": lambda: as_networks_write_it(x, weight, norm),
        "inpaintrt": lambda: ops.fourier_unit(x, folded, shift),
    }
    if not versus.smoke:
        candidates["compile"] = versus.compiled(as_networks_write_it, x, weight, norm)
    doubles = tuple(t.double().cpu() for t in norm)
    versus(
        candidates, truth=lambda: as_networks_write_it(x.double().cpu(), weight.double().cpu(), doubles),
        check=device.type == "cpu",  # stock torch on a GPU computes something else (see the op's page)
        cost=SPEC.cost(x, folded, shift, None),
        device=device, dtype=x.dtype, shape=x.shape, op=SPEC.name, layout=layout, direction="forward",
    )  # fmt: skip

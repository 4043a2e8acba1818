"""modulated_conv2d at Co-ModGAN's decoder, in fp32 and bf16, NCHW and NHWC.

Against the form of the public code (filters of each image, grouped convolution) and against the one that scales inputs and
outputs around a shared convolution; both filter with a depthwise convolution after a doubling one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.modulated_conv2d import SPEC
from inpaintrt.runtime.spec import Sample

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SMOKE = 16  # pixels of a side, in a smoke run


def make(sample: Sample, smoke: bool) -> dict[str, Tensor]:
    """The op's tensors; the filter is StyleGAN's."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(sample.shapes)
    if smoke:
        shapes["x"] = (*shapes["x"][:2], *(min(SMOKE, n) for n in shapes["x"][2:]))
    up = sample.kwargs.get("up", 1)
    if "noise" in shapes:
        shapes["noise"] = (1, 1, *(up * n for n in shapes["x"][2:]))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "resample_filter" in tensors:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        tensors["resample_filter"] = torch.outer(taps, taps) / 64
    return tensors


def finish(y: Tensor, t: dict[str, Tensor], activation: str, gain: float, clamp: float | None) -> Tensor:
    """Noise, bias and activation, in place."""
    if "noise" in t:
        y.add_(t["noise"] * t["noise_strength"])
    y.add_(t["bias"].view(-1, 1, 1))
    if activation == "leaky_relu":
        y = F.leaky_relu_(y, 0.2).mul_(gain)
    return y if clamp is None else y.clamp_(-clamp, clamp)


def filtered(y: Tensor, f: Tensor) -> Tensor:
    """What follows a doubling transposed convolution. The filter is symmetric."""
    weight = (4 * f).to(y.dtype).expand(y.shape[1], 1, 4, 4)
    return F.conv2d(y, weight, padding=1, groups=y.shape[1])


def fused_weight(t: dict[str, Tensor], *, up: int = 1, demodulate: bool = True, padding: int = 1, **rest) -> Tensor:
    """Filters of each image, as many groups as images: the public code's form."""
    x, weight = t["x"], t["weight"]
    w = weight[None] * t["style"][:, None, :, None, None]
    if demodulate:
        w = w * (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    b, outputs, inputs, *kernel = w.shape
    if up > 1:
        w = w.transpose(1, 2).reshape(b * inputs, outputs, *kernel)
        y = F.conv_transpose2d(x.reshape(1, -1, *x.shape[2:]), w, stride=2, groups=b)
        y = filtered(y.reshape(b, outputs, *y.shape[2:]), t["resample_filter"])
    else:
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), w.reshape(-1, inputs, *kernel), padding=padding, groups=b)
        y = y.reshape(b, outputs, *y.shape[2:])
    return finish(y, t, rest.get("activation", "none"), rest.get("gain", 1.0), rest.get("clamp"))


def scaled(t: dict[str, Tensor], *, up: int = 1, demodulate: bool = True, padding: int = 1, **rest) -> Tensor:
    """x scaled, one convolution, outputs scaled."""
    x, weight, style = t["x"], t["weight"], t["style"]
    x = x * style[:, :, None, None]
    if up > 1:
        y = filtered(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), t["resample_filter"])
    else:
        y = F.conv2d(x, weight, padding=padding)
    if demodulate:
        y = y * (style.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()[:, :, None, None]
    return finish(y, t, rest.get("activation", "none"), rest.get("gain", 1.0), rest.get("clamp"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_modulated_conv2d(versus, device, sample, dtype, layout):
    found = SAMPLES[sample]
    tensors = {name: t.to(device, DTYPES[dtype]) for name, t in make(found, versus.smoke).items()}
    tensors["x"] = tensors["x"].to(memory_format=LAYOUTS[layout])
    # transposed convolutions of torch convolve, so that is what all are asked for
    given = {**found.kwargs, "flip_weight": found.kwargs.get("up", 1) > 1}
    args = SPEC.bind(**tensors, **given)
    candidates = {
        "public form": lambda: fused_weight(tensors, **found.kwargs),
        "scaled": lambda: scaled(tensors, **found.kwargs),
        "inpaintrt": lambda: ops.modulated_conv2d(**tensors, **given),
    }
    if not versus.smoke:
        candidates["compile"] = versus.compiled(lambda: scaled(tensors, **found.kwargs))
    versus(
        candidates,
        baseline="public form",
        truth=lambda: SPEC.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args)),
        cost=SPEC.cost(*args), device=device, dtype=DTYPES[dtype], shape=tensors["x"].shape, op=SPEC.name, layout=layout,
        sample=sample, direction="forward",
    )  # fmt: skip

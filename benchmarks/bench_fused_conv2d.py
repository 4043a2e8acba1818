"""fused_conv2d at layers of real networks, against plain PyTorch in both memory formats.

First the bare stride-1 3×3 layers, where only the algebra differs; then what networks put around a convolution.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inpaintrt import ops
from inpaintrt.ops.fused_conv2d import SPEC
from inpaintrt.runtime.spec import Cost

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
SMOKE = 32  # pixels of a side, in a smoke run


def layer(inputs, outputs, side, kernel, **options):
    """Channels in (several where they come in parts), channels out, side of the input, and the op's options."""
    return (inputs if isinstance(inputs, tuple) else (inputs,)), outputs, side, kernel, options


# At 512 pixels. Batch norms are folded into weights and bias, for all candidates.
WRAPPED = {
    "lama stem": layer(4, 64, 512, 7, padding=3, padding_mode="reflect", activation="relu"),
    "lama down": layer(64, 128, 512, 3, stride=2, padding=1, padding_mode="reflect", activation="relu"),
    "lama to local": layer((128, 384), 128, 64, 3, padding=1, padding_mode="reflect", activation="relu"),
    "lama spectral in": layer(384, 192, 64, 1, activation="relu"),
    "lama up": layer(512, 256, 64, 3, transposed=True, stride=2, padding=1, output_padding=1, activation="relu"),
    "lama last up": layer(128, 64, 256, 3, transposed=True, stride=2, padding=1, output_padding=1, activation="relu"),
    "lama out": layer(64, 3, 512, 7, padding=3, padding_mode="reflect", activation="sigmoid"),
    "deepfill up": layer(128, 64, 128, 3, padding=1, upsample=2, activation="elu"),
    "aotgan branch": layer(256, 64, 128, 3, padding=8, dilation=8, padding_mode="reflect", activation="relu"),
    "aotgan down": layer(64, 128, 512, 4, stride=2, padding=1, activation="relu"),
    "glcic up": layer(256, 128, 128, 4, transposed=True, stride=2, padding=1, activation="relu"),
}
ACTIVATIONS = {"relu": F.relu_, "elu": F.elu_, "sigmoid": torch.sigmoid_}


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


def as_networks_write_it(
    parts, weight, bias, *, activation, stride=1, padding=0, dilation=1, padding_mode="zeros", transposed=False,
    output_padding=0, upsample=1,
):  # fmt: skip
    """With activations in place, as the fastest of them do."""
    x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    if upsample > 1:
        x = F.interpolate(x, scale_factor=float(upsample), mode="nearest")
    if transposed:
        y = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    elif padding_mode == "zeros":
        y = F.conv2d(x, weight, bias, stride, padding, dilation)
    else:
        y = F.conv2d(F.pad(x, [padding] * 4, padding_mode), weight, bias, stride, 0, dilation)
    return ACTIVATIONS[activation](y)


@pytest.mark.parametrize("name", WRAPPED)
@torch.inference_mode()
def test_wrapped(versus, device, name):
    inputs, outputs, side, kernel, options = WRAPPED[name]
    side = min(SMOKE, side) if versus.smoke else side
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, c, side, side, generator=generator).relu_().to(device) for c in inputs]
    both = (sum(inputs), outputs) if options.get("transposed") else (outputs, sum(inputs))
    weight = torch.randn(*both, kernel, kernel, generator=generator).to(device) / (sum(inputs) * kernel**2) ** 0.5
    bias = torch.randn(outputs, generator=generator).to(device)
    last = [t.to(memory_format=torch.channels_last) for t in parts]
    last_weight = weight.to(memory_format=torch.channels_last)
    flops = 2.0 * weight.numel() * (side * options.get("upsample", 1)) ** 2
    flops /= 1 if options.get("transposed") else options.get("stride", 1) ** 2
    candidates = {
        "eager": lambda: as_networks_write_it(parts, weight, bias, **options),
        "eager channels-last": lambda: as_networks_write_it(last, last_weight, bias, **options),
        "inpaintrt": lambda: ops.fused_conv2d(parts, weight, bias, **options),
        "inpaintrt nhwc": lambda: ops.fused_conv2d(last, last_weight, bias, **options),
    }
    moved = sum(t.nbytes for t in (*parts, weight, candidates["inpaintrt"]()))
    if not versus.smoke:
        candidates["compile"] = versus.compiled(lambda *t: as_networks_write_it(t, weight, bias, **options), *parts)
    versus(
        candidates, cost=Cost(flops, moved), device=device, shape=(1, sum(inputs), side, side), op=SPEC.name,
        ours=["inpaintrt", "inpaintrt nhwc"], group="convolutions with what networks put around them",
        means={"eager, in its best memory format": ["eager", "eager channels-last"], "compile": ["compile"]},
    )  # fmt: skip

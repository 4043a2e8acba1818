"""partial_conv2d at PConv-UNet's layers, with masks of one and of all channels, in fp32 and bf16, NCHW and NHWC."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.partial_conv2d import SPEC
from inpaintrt.runtime.spec import Sample

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SMOKE = 32  # pixels of a side, in a smoke run


def make(sample: Sample, masks: str, smoke: bool) -> list[Tensor]:
    """x, a mask with a rectangular hole (the same in each of its channels), weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shape = sample.shapes["x"]
    if smoke:
        shape = (*shape[:2], *(min(SMOKE, n) for n in shape[2:]))
    x = torch.randn(shape, generator=generator).relu_()
    weight = torch.randn(sample.shapes["weight"], generator=generator)
    bias = torch.randn(sample.shapes["bias"], generator=generator)
    h, w = shape[2:]
    mask = torch.ones(1, 1, h, w)
    mask[..., h // 4 : h // 2, w // 3 : 2 * w // 3] = 0
    return [x, mask.repeat(1, shape[1] if masks == "multi" else 1, 1, 1), weight / weight[0].numel() ** 0.5, bias]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", ["single", "multi"])
@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_partial_conv2d(versus, device, baselines, sample, masks, dtype, layout):
    found = SAMPLES[sample]
    padding = found.kwargs["padding"]
    assert len(set(padding)) == 1, "torch's convolution, which the baselines call, pads all sides alike"
    given = {
        "stride": found.kwargs.get("stride", 1),
        "padding": padding[0],
        "dilation": found.kwargs.get("dilation", 1),
    }
    tensors = [t.to(device, DTYPES[dtype]) for t in make(found, masks, versus.smoke)]
    tensors = [t.to(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t for t in tensors]
    x, mask, weight, bias = tensors
    ones = baselines.mask_filters(weight, mask.shape[1])

    def eager(form, x=x, mask=mask, ones=ones, weight=weight, bias=bias):
        y, updated = form(x, mask, ones, weight, bias, **given)
        return y, updated[:, :1]

    def truth():
        return eager(baselines.partial, *(t.double() for t in (x, mask, ones, weight, bias)))

    candidates = {
        "eager": lambda: eager(baselines.partial),
        "eager in place": lambda: eager(baselines.partial_in_place),
        "inpaintrt": lambda: ops.partial_conv2d(*tensors, **given),
    }
    if not versus.smoke:
        candidates["compile"] = versus.compiled(
            lambda *t: eager(baselines.partial, *t), x, mask, ones, weight, bias
        )  # fmt: skip
    versus(
        candidates, truth=truth, cost=SPEC.cost(*SPEC.bind(*tensors, **{**given, "padding": padding})),
        device=device, dtype=x.dtype, shape=x.shape, op=SPEC.name, layout=layout, mask_channels=masks, direction="forward",
    )  # fmt: skip

"""upfirdn2d where style-modulated networks use it, in fp32 and bf16, NCHW and NHWC."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.upfirdn2d import SPEC

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SMOKE = 32  # pixels of a side, in a smoke run


def transposed(x: Tensor, f: Tensor, up: int, padding: list[int], gain: float) -> Tensor:
    """Doubling by a depthwise transposed convolution, which never writes the zeros."""
    weight = (gain * f).to(x.dtype).expand(x.shape[1], 1, *f.shape)
    y = F.conv_transpose2d(x, weight, stride=up, groups=x.shape[1])
    left, right, top, bottom = padding
    rows, columns = f.shape
    return F.pad(y, (left - columns + 1, right - columns + up, top - rows + 1, bottom - rows + up))


def depthwise(x: Tensor, f: Tensor, down: int, padding: list[int], gain: float) -> Tensor:
    """Filtering by a depthwise convolution. The filters are symmetric."""
    weight = (gain * f).to(x.dtype).expand(x.shape[1], 1, *f.shape)
    return F.conv2d(x, weight, stride=down, padding=(padding[2], padding[0]), groups=x.shape[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_upfirdn2d(versus, device, sample, dtype, layout):
    found = SAMPLES[sample]
    shape = found.shapes["x"]
    if versus.smoke:
        shape = (*shape[:2], *(min(SMOKE, n) for n in shape[2:]))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.to(device, DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device)
    f = torch.outer(taps, taps) / 64
    args = SPEC.bind(x, f, **found.kwargs)
    _, _, up, down, padding, _, gain = args
    doubled = up[0] > 1

    def eager(x=x, f=f):
        return transposed(x, f, up[0], padding, gain) if doubled else depthwise(x, f, down[0], padding, gain)

    candidates = {
        "zeros written": lambda: SPEC.run_reference(*args),
        "depthwise": eager,
        "inpaintrt": lambda: ops.upfirdn2d(x, f, **found.kwargs),
    }
    if not versus.smoke:
        candidates["compile"] = versus.compiled(eager, x, f)
    versus(
        candidates, baseline="zeros written", truth=lambda: SPEC.run_reference(x.double(), *args[1:]),
        cost=SPEC.cost(*args), device=device,
        dtype=x.dtype, shape=x.shape, op=SPEC.name, layout=layout, direction="forward",
    )  # fmt: skip

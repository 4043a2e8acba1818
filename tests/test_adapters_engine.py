"""The one place where adapters' convolutions are computed: engine or torch, and what surrounds the sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inpaintrt.adapters import engine
from inpaintrt.adapters.engine import convolved, gate_convolved
from inpaintrt.runtime import dispatch


def _close(got, expected):
    assert got.dtype == expected.dtype
    limit = 1e-12 if got.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got, expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["reflect", "zeros", "replicate", "circular"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (4, 2, 1, 1), (3, 1, 2, 2), (5, 1, 1, 1), (1, 1, 0, 1), (7, 1, 0, 1)],
)
@pytest.mark.parametrize("size", [(9, 8), (12, 7)])
@torch.no_grad()
def test_the_geometry_of_a_convolution(mode, kernel, stride, padding, dilation, size, dtype):
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation, padding_mode=mode).to(dtype)
    x = torch.randn(2, 3, *size, dtype=dtype)
    with dispatch.launches() as heard:
        got = convolved(conv, x, conv.weight, conv.bias)
        _close(convolved(conv, x, -conv.weight, None), conv.bias.view(-1, 1, 1) - conv(x))
    _close(got, conv(x))
    ours = dtype == torch.float32 and mode != "circular"
    assert [launch.backend for launch in heard] == ["cpu"] * (2 * ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_transposed(dtype):
    conv = nn.ConvTranspose2d(6, 4, 3, 2, 1, 1).to(dtype)
    x = torch.randn(2, 6, 5, 8, dtype=dtype)
    _close(convolved(conv, x, conv.weight, conv.bias, nn.ReLU()), conv(x).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("act", [None, nn.ReLU(), ("elu", 1.0), nn.GELU()], ids=str)
@pytest.mark.parametrize("after", [None, "same", "wider", "vector"])
@pytest.mark.parametrize("before", [False, True])
@torch.no_grad()
def test_what_is_added(act, before, after, dtype):
    """Before and after the activation; a vector for all pixels is an expanded view."""
    conv, x = nn.Conv2d(40, 6, 3, padding=1).to(dtype), torch.randn(2, 40, 9, 8, dtype=dtype)
    first = torch.randn(2, 6, 9, 8, dtype=dtype) if before else None
    last = None if after is None else torch.randn(2, 6, 9, 8, dtype=torch.float64 if after == "wider" else dtype)
    if after == "vector":
        last = torch.randn(6, dtype=dtype).view(1, -1, 1, 1).expand(2, 6, 9, 8)
    kept = None if first is None else first.clone()
    expected = conv(x) if first is None else conv(x) + first
    expected = F.elu(expected) if isinstance(act, tuple) else expected if act is None else act(expected)
    expected = expected if last is None else expected + last
    got = convolved(conv, x.split([32, 8], dim=1), conv.weight, conv.bias, act, before=first, after=last)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    assert first is None or torch.equal(first, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_gated(dtype):
    conv, x = nn.Conv2d(5, 8, 3, 2, 1).to(dtype), torch.randn(2, 5, 9, 8, dtype=dtype)
    features, gates = conv(x).chunk(2, dim=1)
    _close(gate_convolved(conv, x, conv.weight, conv.bias, ("elu", 1.0)), F.elu(features) * gates.sigmoid())


@torch.no_grad()
def test_autocast_decides_the_precision():
    conv, x = nn.Conv2d(6, 4, 3, padding=1), torch.randn(1, 6, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = convolved(conv, x, conv.weight, conv.bias, nn.ReLU(), after=torch.ones(1, 4, 16, 16))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, conv(x).relu() + 1, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not engine._bf16_pays(), reason="bfloat16 convolutions are torch's on this CPU")
@torch.no_grad()
def test_autocast_rounds_no_factors():
    """Scale and bias of float32 are used as they are: one rounding of the weights, and one at the end."""
    conv, x = nn.Conv2d(6, 4, 3, padding=1), torch.randn(1, 6, 16, 16).bfloat16()
    scale = torch.tensor([1.001, 3.003, -0.7007, 0.501])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = convolved(conv, x, conv.weight, conv.bias, scale=scale)
    assert got.dtype == torch.bfloat16
    exact = F.conv2d(x.double(), conv.weight.bfloat16().double(), padding=1) * scale.double().view(-1, 1, 1)
    exact += conv.bias.double().view(-1, 1, 1)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)

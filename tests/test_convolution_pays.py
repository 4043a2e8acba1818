"""Convolutions of models that nobody has seen: a swapped one runs the original where that was measured to be faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inpaintrt as irt
from inpaintrt.adapters.convolution import why_slower
from inpaintrt.runtime import native
from inpaintrt.runtime.dispatch import launches
from inpaintrt.runtime.swap import insistent, why_original

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("channels", "kernel", "side", "pays"),
    [
        # measured: how many times faster than torch, contiguous and channels-last
        ((512, 512), 3, 2, (False, False)),  # 3.5, 0.7
        ((512, 512), 3, 8, (True, True)),  # 1.6, 1.3
        ((512, 512), 3, 16, (True, True)),  # 1.5, 1.0
        ((3, 64), 3, 256, (True, False)),  # 6.5, 0.4
        ((4, 32), 3, 256, (True, False)),  # 0.9 to 1.0, 0.5
        ((16, 64), 3, 128, (True, True)),  # 2.2, 1.6
        ((32, 32), 3, 128, (True, True)),  # 2.2, 1.9
        ((64, 64), 3, 128, (True, True)),  # 2.9, 2.0
        ((64, 2), 3, 12, (False, False)),  # 0.8, 0.3
        ((64, 64), 5, 32, (True, True)),  # 2.1, 1.8
        ((128, 128), 5, 32, (True, True)),  # 2.3, 2.0
    ],
)
def test_calls_at_which_torch_is_faster_are_its(channels, kernel, side, pays, last):
    layout = torch.channels_last if last else torch.contiguous_format
    conv = nn.Conv2d(*channels, kernel, padding=kernel // 2).eval().to(memory_format=layout)
    x = torch.empty(1, channels[0], side, side).to(memory_format=layout)
    irt.accelerate(conv)
    assert (why_original(conv, (x,), {}) == "") == pays[last]
    assert ("torch is faster" in why_slower(conv, x)) != pays[last]
    with insistent():
        assert not why_original(conv, (x,), {})


def test_layers_of_a_sequence_are_weighed_one_by_one():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 3), nn.ReLU()).eval()
    irt.accelerate(model)
    x = torch.rand(1, 64, 16, 16)
    with torch.no_grad(), launches() as heard:
        got = model(x)
    assert len(heard) == 1
    with torch.no_grad(), irt.disabled():
        torch.testing.assert_close(got, model(x), rtol=1e-3, atol=1e-4)

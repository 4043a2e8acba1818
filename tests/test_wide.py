"""Float32 code that is run in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inpaintrt.runtime.wide import Widened


class Guarded(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.dtype = nn.GroupNorm(1, 2), nn.Linear(2, 2), torch.float32

    def forward(self, x, steps):
        h = self.norm(x.float()).type(x.dtype) + x.to(dtype=torch.float32).to(x)
        return h.type(self.dtype) + self.linear(steps.float())


def test_casts_to_smaller_types_leave_float64_alone():
    module, x, steps = Guarded().double(), torch.rand(3, 2, dtype=torch.float64), torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError):
        module(x, steps)
    with Widened():
        got = module(x, steps)
    assert torch.equal(got, module.norm(x) + x + module.linear(steps.double()))


def test_other_casts_are_done():
    x = torch.rand(3, dtype=torch.float64)
    with Widened():
        assert x.to(torch.int64).dtype == torch.int64
        assert torch.arange(2).float().dtype == torch.float32
        assert torch.rand(2).half().dtype == torch.float16

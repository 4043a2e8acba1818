"""Equal random numbers on a GPU, whose generator each run must start at the same place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inpaintrt.runtime.draws import noted, replayed, seeded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")


def drawn(x: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(x) + F.dropout(x, 0.5, training=True) + torch.rand(x.shape, device=x.device)


def test_runs_draw_the_same_and_leave_generators_alone():
    x = torch.linspace(-1, 1, 60, device="cuda").view(6, 10)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    with seeded(nn.Identity(), (x,)), noted() as random:
        single = drawn(x)
    with seeded(nn.Identity().cuda(), {"x": [x]}):
        assert torch.equal(drawn(x), single)
    with replayed(random.draws):
        double = drawn(x.double())
    assert double.dtype == torch.float64
    assert (double - single).abs().max() < 1e-6
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])

"""The tolerance rule must catch planted faults and pass honest rounding."""

from __future__ import annotations

import pytest
import torch

from inpaintrt.testing import assert_close_to_truth, close_to_truth
from inpaintrt.testing.compare import flat_tensors
from inpaintrt.testing.layouts import LAYOUTS


@pytest.fixture
def truth():
    return torch.randn(2, 8, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_passes_and_faults_fail(truth, dtype):
    baseline = truth.to(dtype)
    assert close_to_truth(truth.to(dtype), truth, baseline).ok
    eps = torch.finfo(dtype).eps
    faults = {
        "one element": lambda t: t.index_put(
            (torch.tensor(1), torch.tensor(3), torch.tensor(0), torch.tensor(5)), t.new_tensor(9.0)
        ),
        "one channel scaled": lambda t: torch.cat([t[:, :7], t[:, 7:] * (1 + 16 * eps)], 1),
        "shifted by a column": lambda t: t.roll(1, -1),
        "biased": lambda t: t + 12 * eps * t.abs().max(),
        "NaN": lambda t: t.masked_fill(t == t.max(), torch.nan),
        "infinite": lambda t: t.masked_fill(t == t.max(), torch.inf),
    }
    for name, plant in faults.items():
        verdict = close_to_truth(plant(truth).to(dtype), truth, baseline)
        assert not verdict.ok, name
        assert verdict.message
        with pytest.raises(AssertionError, match="case"):
            assert_close_to_truth(plant(truth).to(dtype), truth, baseline, context="case")


def test_a_small_error_everywhere_is_caught_by_rms(truth):
    baseline = truth.float()
    baseline.view(-1)[0] += 1e-3  # one bad baseline element makes the maximum lenient
    noisy = truth.float() + 1e-4
    verdict = close_to_truth(noisy, truth, baseline)
    assert verdict.max_error < verdict.max_allowed
    assert not verdict.ok


def test_non_finite_patterns():
    truth = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    base = truth.float()
    assert close_to_truth(base.clone(), truth, base).ok
    for i, value in ((1, 0.0), (2, -torch.inf), (3, torch.nan), (0, torch.inf)):
        wrong = base.clone()
        wrong[i] = value
        assert not close_to_truth(wrong, truth, base).ok


def test_misuse_raises(truth):
    with pytest.raises(ValueError, match="shapes differ"):
        close_to_truth(truth[0].float(), truth, truth.float())
    with pytest.raises(ValueError, match="float64"):
        close_to_truth(truth.float(), truth.float(), truth.float())
    with pytest.raises(ValueError, match="dtypes differ"):
        close_to_truth(truth.half(), truth, truth.float())
    assert close_to_truth(torch.empty(0), torch.empty(0).double(), torch.empty(0)).ok


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layouts_keep_values(name):
    x = torch.randn(2, 4, 5, 6)
    y = LAYOUTS[name](x)
    assert torch.equal(y, x[:1].expand_as(x) if name == "expanded" else x)
    assert y.shape == x.shape


def test_flat_tensors():
    a, b = torch.ones(1), torch.zeros(1)
    assert flat_tensors({"x": (a, [b, None])}) == [a, b]

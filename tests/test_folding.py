"""The algebra under the adapters, in float64 against the plain formulation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inpaintrt.adapters.folding import (
    batch_norm_affine,
    batch_norm_affines,
    fold_bias,
    fold_weight,
    is_plain_batch_norm,
    joined_biases,
    scale_outputs,
    total,
)


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_an_affine_map(affine):
    bn = nn.BatchNorm2d(6, affine=affine).double().eval()
    with torch.no_grad():
        for p in (*bn.parameters(), bn.running_mean):
            p.copy_(torch.randn(6))
        bn.running_var.copy_(torch.rand(6) + 0.1)
    scale, shift = batch_norm_affine(bn)
    x, weight = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    _close(F.conv2d(x, scale_outputs(weight, scale), shift), bn(F.conv2d(x, weight)))
    assert is_plain_batch_norm(bn, 6)
    assert not is_plain_batch_norm(bn, 5)
    assert not is_plain_batch_norm(nn.BatchNorm2d(6, track_running_stats=False), 6)
    assert not is_plain_batch_norm(nn.InstanceNorm2d(6), 6)
    assert is_plain_batch_norm(nn.SyncBatchNorm(6), 6)


def _norm(width, affine=True, eps=1e-5):
    bn = nn.BatchNorm2d(width, affine=affine, eps=eps).eval()
    with torch.no_grad():
        for p in (*bn.parameters(), bn.running_mean):
            p.copy_(torch.randn(width))
        bn.running_var.copy_(torch.rand(width) + 0.1)
    return bn


@pytest.mark.parametrize(
    "norms",
    [
        [_norm(3), _norm(5), _norm(1)],
        [_norm(3), _norm(5, eps=1e-2)],
        [_norm(3, affine=False), _norm(5)],
        [_norm(3, affine=False), _norm(5, affine=False)],
        [_norm(4), _norm(2).double()],
        [_norm(4)],
        [],
    ],
    ids=["alike", "other eps", "one not affine", "none affine", "two dtypes", "one", "none"],
)
def test_many_batch_norms_at_once(norms):
    for many, bn in zip(batch_norm_affines(norms), norms, strict=True):
        for got, one in zip(many, batch_norm_affine(bn), strict=True):
            torch.testing.assert_close(got, one)


def test_biases():
    affine, bias = (torch.tensor([2.0, 3.0]), torch.tensor([0.5, -1.0])), torch.tensor([1.0, 10.0])
    assert fold_bias(None, None) is None
    assert torch.equal(fold_bias(bias, None), bias)
    assert torch.equal(fold_bias(None, affine), affine[1])
    assert torch.equal(fold_bias(bias, affine), torch.tensor([2.5, 29.0]))
    weight = torch.ones(2, 1, 1, 1)
    assert fold_weight(weight, None) is weight
    assert torch.equal(fold_weight(weight, affine).flatten(), affine[0])
    assert total(None, None) is None
    assert torch.equal(total(None, bias), bias)
    assert torch.equal(total(bias, None, bias), 2 * bias)
    assert joined_biases([None, None], [2, 3]) is None
    assert torch.equal(joined_biases([None, bias], [1, 2]), torch.tensor([0.0, 1.0, 10.0]))

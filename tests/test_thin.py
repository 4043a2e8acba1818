"""Thin copies: filters read few channels, together all of them, and nothing but products with 0 is left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from inpaintrt import ops
from inpaintrt.adapters import thin
from inpaintrt.testing.recipe import image


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 3), (3, 67), (512, 1024), (40, 40), (7, 64), (1, 5)])
def test_filters_read_all_channels(outputs, inputs):
    read = thin.channels_read(outputs, inputs)
    assert len(read) == outputs
    assert all(len({*row}) == len(row) for row in read.tolist())
    assert {*read.flatten().tolist()} == {*range(inputs)}


@pytest.mark.parametrize("kind", ["thin", "scaled", "ones", "dense", "one too many"])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 12), (3, 67)])
def test_convolutions_leave_out_zeros_only(kind, outputs, inputs):
    x = image("x", 2, inputs, 9, 8).double() - 0.5
    dense = image("weight", outputs, inputs, 3, 3).double()
    weight = thin.thin_filters("weight", dense, 2.0)
    bias = image("bias", outputs).double()
    if kind == "scaled":
        weight = weight * bias.view(-1, 1, 1, 1)
    elif kind == "one too many":
        weight[0, next(i for i in range(inputs) if i not in thin.channels_read(outputs, inputs)[0])] = 1
    elif kind != "thin":
        weight = dense if kind == "dense" else torch.ones_like(dense)
    for geometry in ({"padding": 1}, {"stride": 2, "dilation": 2, "padding": 2}):
        expected = F.conv2d(x, weight, bias, **geometry)
        with thin.Thinly():
            torch.testing.assert_close(F.conv2d(x, weight, bias, **geometry), expected)


def test_ops_compute_theirs_likewise():
    x, dense = image("x", 1, 64, 9, 8).double(), image("weight", 64, 64, 3, 3).double()
    weight, mask = thin.thin_filters("weight", dense, 1.0), (image("mask", 1, 1, 9, 8) > 0.5).double()
    expected = ops.partial_conv2d(x, mask, weight, padding=1)
    with FlopCounterMode(display=False) as counted, thin.Thinly():
        got = ops.partial_conv2d(x, mask, weight, padding=1)
    torch.testing.assert_close(got, expected)
    assert 0 < counted.get_total_flops() < 2 * 9 * 64 * 64 * 72 / 10

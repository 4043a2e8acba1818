"""Convolutional layers as public networks write them in plain PyTorch, and the fastest plain form of each.

What our layers are measured against. "As written" is what a network's author writes and a user runs; "in place" computes
the same with as few passes over memory as plain PyTorch allows without gradients. Both take any memory format.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.models.partialconv_layers import PartialConv2d

EPS = 1e-8


def gated(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """DeepFill v2's layer, ELU(f)·sigmoid(g) of one convolution's halves, as written. options: F.conv2d's."""
    features, gates = F.conv2d(x, weight, bias, **options).chunk(2, dim=1)
    return F.elu(features) * torch.sigmoid(gates)


def gated_in_place(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """The same in half of the memory: the convolution's own output is overwritten."""
    features, gates = F.conv2d(x, weight, bias, **options).chunk(2, dim=1)
    return F.elu_(features).mul_(gates.sigmoid_())


def partial(
    x: Tensor, mask: Tensor, ones: Tensor, weight: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """NVIDIA's partial convolution, as its layer computes it where each call brings a mask; mask 1 = valid.

    Args:
        x: (B, Cin, H, W).
        mask: (1|B, 1, H, W) for the single-channel layer, (1|B, Cin, H, W) for the multi-channel one.
        ones: filters that sum the mask, (1, 1, kh, kw) or (Cout, Cin, kh, kw), which the layer keeps (`mask_filters`).
        weight, bias, options: of F.conv2d.

    Returns:
        The output (B, Cout, H', W') and the updated mask, of one channel or of Cout.
    """
    valid = F.conv2d(mask, ones, **options)
    updated = valid.clamp(0, 1)
    ratio = ones[0].numel() / (valid + EPS) * updated
    raw = F.conv2d(x * mask, weight, bias, **options)
    if bias is None:
        return raw * ratio, updated
    b = bias.view(1, -1, 1, 1)
    return ((raw - b) * ratio + b) * updated, updated


def partial_in_place(
    x: Tensor, mask: Tensor, ones: Tensor, weight: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The same: the bias joins after the ratio, and the convolution's own output is overwritten, in two passes."""
    updated = F.conv2d(mask, ones, **options)
    ratio = ones[0].numel() / (updated + EPS)
    ratio.mul_(updated.clamp_(0, 1))
    out = F.conv2d(x * mask, weight, None, **options)
    if bias is None:
        return out.mul_(ratio), updated
    # ratio holds a factor of the updated mask already; the second one is 1 or 0 for masks of ones and zeros.
    return out.mul_(ratio.mul_(updated)).addcmul_(bias.view(1, -1, 1, 1), updated), updated


def mask_filters(weight: Tensor, channels: int) -> Tensor:
    """The ones with which a layer of `weight` sums a mask of one or of all input channels."""
    return torch.ones_like(weight if channels > 1 else weight[:1, :1])


class MultiChannelPartialConv2d(PartialConv2d):
    """Our reference layer, its masks summed as the ports of PConv-UNet do: a full convolution with filters of ones."""

    ones: Tensor

    @torch.no_grad()
    def _statistics(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        every = mask.expand(-1, self.in_channels, -1, -1)
        total = F.conv2d(every, self.ones, None, self.stride, self.padding, self.dilation)
        updated = (total != 0).to(total.dtype) if self.binary else total.clamp(0, 1)
        window = self.ones[0].numel() if self.scale == "window" else 1
        return torch.where(total == 0, 0.0, window / (total + self.eps) * updated), updated


def with_mask_convolutions(network: nn.Module) -> nn.Module:
    """A copy of a network of partial convolutions that pays for its masks what the public ports pay."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if type(module) is PartialConv2d:
            module.__class__ = MultiChannelPartialConv2d
            module.ones = torch.ones_like(module.weight)
    return network

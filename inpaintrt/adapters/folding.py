"""Algebra that adapters share: batch norm into convolution weights.

Folded weights are made on each call, in the graph. That costs one pass over the weights, needs no second copy of the
model, can never be stale, and is differentiable and exportable as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Affine = tuple[Tensor, Tensor]
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def is_plain_batch_norm(module: nn.Module | None, channels: int) -> bool:
    """A batch norm that is an affine map in eval mode: running statistics kept, `channels` wide."""
    return isinstance(module, BATCH_NORMS) and module.num_features == channels and module.running_mean is not None


def batch_norm_affine(bn: Any) -> Affine:
    """The scale and shift (each (C,)) that an eval-mode batch norm applies.

    Computed in float64 and rounded once: an error in a scale is an error in every output of its channel.
    """
    scale = torch.rsqrt(bn.running_var.double() + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -bn.running_mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    dtype = bn.running_var.dtype
    return scale.to(dtype), shift.to(dtype)


def batch_norm_affines(norms: Sequence[Any]) -> list[Affine]:
    """`batch_norm_affine` of each, in a dozen operations on all at once: on a GPU, launches are what folding costs."""
    alike = {(bn.eps, bn.running_var.dtype, bn.running_var.device, bn.weight is None, bn.bias is None) for bn in norms}
    if len(norms) < 2 or len(alike) > 1 or norms[0].weight is None or norms[0].bias is None:
        return [batch_norm_affine(bn) for bn in norms]
    variance, mean, weight, bias = (
        torch.cat([getattr(bn, name) for bn in norms]) for name in ("running_var", "running_mean", "weight", "bias")
    )
    scale = torch.rsqrt(variance.double() + norms[0].eps) * weight
    shift = bias - mean * scale
    widths = [bn.num_features for bn in norms]
    return list(zip(scale.to(variance.dtype).split(widths), shift.to(variance.dtype).split(widths), strict=True))


def scale_outputs(weight: Tensor, scale: Tensor) -> Tensor:
    """A convolution weight (out, in, k, k) with each output channel scaled."""
    return weight * scale.view(-1, 1, 1, 1)


def fold_weight(weight: Tensor, affine: Affine | None) -> Tensor:
    """The weight of a convolution that applies `affine` to its outputs, too; None stands for the identity."""
    return weight if affine is None else scale_outputs(weight, affine[0])


def scale_of(affine: Affine | None) -> Tensor | None:
    return None if affine is None else affine[0]


def fold_bias(bias: Tensor | None, affine: Affine | None) -> Tensor | None:
    """The bias of a convolution that applies `affine` to its outputs, too."""
    if affine is None:
        return bias
    scale, shift = affine
    return shift if bias is None else torch.addcmul(shift, bias, scale)


def total(*biases: Tensor | None) -> Tensor | None:
    """The bias of a sum of convolutions: absent ones count as 0, and all absent is absent."""
    given = [bias for bias in biases if bias is not None]
    return sum(given[1:], given[0]) if given else None


def joined_biases(biases: Sequence[Tensor | None], widths: Sequence[int]) -> Tensor | None:
    """The bias of convolutions whose outputs lie side by side, `widths` wide."""
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    return torch.cat([given.new_zeros(n) if b is None else b for b, n in zip(biases, widths, strict=True)])


def memory_format_of(x: Tensor) -> torch.memory_format:
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def padded(conv: Any, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """x under the padding of a Conv2d where that is not zeros, and the zero padding that is left to do."""
    rows, columns = conv.padding
    if conv.padding_mode == "zeros" or not (rows or columns):
        return x, (rows, columns)
    return F.pad(x, (columns, columns, rows, rows), mode=conv.padding_mode), (0, 0)

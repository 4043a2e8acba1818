"""Algebra that adapters share: batch norm into convolution weights, reflection without padded copies.

Folded weights are made on each call, in the graph. That costs one pass over the weights, needs no second copy of the
model, can never be stale, and is differentiable and exportable as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = Callable[[Tensor, Tensor, Tensor | None, int, int], Tensor]


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


def conv2d_as(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a Conv2d with square padding does, in its geometry and padding mode, with other weights."""
    pad = conv.padding[0]
    if conv.padding_mode == "reflect" and (*conv.kernel_size, *conv.dilation) == (2 * pad + 1, 2 * pad + 1, 1, 1):
        return conv2d_reflect(x, weight, bias, stride=conv.stride[0], padding=pad)
    x, padding = padded(conv, x)
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation)


def conv2d_reflect(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int, padding: int, conv: Convolution = F.conv2d
) -> Tensor:
    """conv2d under reflection padding, without a padded copy of x; `conv` computes the map, F.conv2d the borders.

    Only the outermost outputs read reflected values: the whole map is convolved with zero padding (which the library
    does without a copy), then the border rows and columns are computed again from narrow, really padded strips. At full
    resolution the padded copy would cost more than the strips: it is fresh memory, and fresh memory is slow to fill.
    """
    out = conv(x, weight, bias, stride, padding)
    if padding == 0:
        return out
    rows, columns = out.shape[-2:]
    ring = -(-padding // stride)  # outputs from each border whose windows may leave the input
    kernel = weight.shape[-2:]

    def recompute(narrow: int, y: tuple[int, int], x_range: tuple[int, int]) -> None:
        window = x
        for dim in (narrow, -3 - narrow):  # the narrow dimension first: the other then copies little
            window = _reflected(window, dim, y if dim == -2 else x_range, kernel[dim], stride, padding)
        out[:, :, y[0] : y[1], x_range[0] : x_range[1]] = F.conv2d(window, weight, bias, stride)

    recompute(-2, (0, ring), (0, columns))
    recompute(-1, (0, rows), (0, ring))
    # At stride 2 over an even size the last window ends inside when it reaches no further than one pixel.
    if stride != 2 or padding > 1 or x.shape[-2] % 2:
        recompute(-2, (rows - ring, rows), (0, columns))
    if stride != 2 or padding > 1 or x.shape[-1] % 2:
        recompute(-1, (0, rows), (columns - ring, columns))
    return out


def _reflected(x: Tensor, dim: int, outputs: tuple[int, int], kernel: int, stride: int, padding: int) -> Tensor:
    """The rows (dim −2) or columns (−1) of x that outputs [first, last) read, mirrored at the borders (edge not repeated)."""
    first, last = outputs
    size = x.shape[dim]
    at = torch.arange(first * stride - padding, (last - 1) * stride - padding + kernel, device=x.device).abs()
    return x.index_select(dim, torch.minimum(at, 2 * (size - 1) - at))


def conv2d_few_outputs(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """conv2d (stride 1, zero padding of a same convolution) for very few output channels, two by two pixels at a time.

    Blocked convolutions fill vectors with output channels, so 3 of them waste most lanes. Computing a 2×2 block of
    outputs as 4·Cout channels of one stride-2 convolution with a kernel one larger fills them: 3.1× less work at 7×7.
    H and W must be even.
    """
    c_out, c_in, k, _ = weight.shape
    if stride != 1 or k != 2 * padding + 1:
        raise ValueError("only a same convolution of stride 1 can be computed two by two")
    blocks = weight.new_zeros(c_out, 2, 2, c_in, k + 1, k + 1)
    for dy in range(2):
        for dx in range(2):
            blocks[:, dy, dx, :, dy : dy + k, dx : dx + k] = weight
    wide = None if bias is None else bias.repeat_interleave(4)
    y = F.conv2d(x, blocks.view(4 * c_out, c_in, k + 1, k + 1), wide, stride=2, padding=padding)
    return F.pixel_shuffle(y, 2)

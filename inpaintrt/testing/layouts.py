"""Memory layouts for tests: the same values with other strides, inside memory whose margins are poisoned with NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {}


def _layout(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    LAYOUTS[function.__name__] = function
    return function


def _poisoned(x: Tensor, shape: Sequence[int]) -> Tensor:
    """NaN, or the least integer, in x's dtype."""
    return x.new_full(shape, torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)


@_layout
def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


@_layout
def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


@_layout
def transposed(x: Tensor) -> Tensor:
    """The last two dimensions exchanged in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x.contiguous()


@_layout
def sliced(x: Tensor) -> Tensor:
    """Cut out of a larger buffer full of NaN: a read outside shows in the result."""
    buffer = _poisoned(x, [n + 2 for n in x.shape])
    view = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


@_layout
def offset(x: Tensor) -> Tensor:
    """Contiguous, one element after an aligned address."""
    buffer = _poisoned(x, [x.numel() + 1])
    return buffer[1:].view(x.shape).copy_(x)


@_layout
def every_other(x: Tensor) -> Tensor:
    """Every second element of the last dimension; NaN between them."""
    buffer = _poisoned(x, [*x.shape[:-1], 2 * x.shape[-1]])
    return buffer[..., ::2].copy_(x)


@_layout
def expanded(x: Tensor) -> Tensor:
    """Stride 0 over the batch: all samples are the first."""
    return x[:1].expand(x.shape) if x.dim() > 1 and x.shape[0] > 1 else x.contiguous()

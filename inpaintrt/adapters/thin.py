"""Trials of wide networks at little cost: copies whose filters read a few channels each.

How a network joins its layers does not depend on their width, but what a trial in float64 costs does. In a thin copy each
filter reads some of its input channels, and all filters of a layer together read all of them; the other weights are 0.
While the copy runs, convolutions with such filters leave out the products with 0, and filters of one value sum the
channels first: the same function of the same tensors, in a hundredth of the time.

Nothing is assumed of the weights that a convolution gets: they are looked at, and those of another kind are convolved as
ever. A thin copy shares its filters between runs, so what runs must not write to them: it is for networks whose layers
were tried by themselves before, on copies of their own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inpaintrt.runtime import registry
from inpaintrt.testing.recipe import tensor_for

from .trial import Twin, bare_copy

_LEAST = 3
"""How many channels a filter reads, if the filters are enough to read all of them."""


def channels_read(outputs: int, inputs: int) -> Tensor:
    """(outputs, n): which channels each filter reads; together they read all."""
    n = min(inputs, max(_LEAST, -(-inputs // outputs)))
    return torch.arange(outputs * n).view(outputs, n) % inputs


def _where(read: Tensor, weight: Tensor) -> Tensor:
    """`read` as an index into a weight (Cout, Cin, kh, kw) along its channels."""
    return read.to(weight.device)[:, :, None, None].expand(-1, -1, *weight.shape[2:])


def thin_filters(name: str, like: Tensor, gain: float) -> Tensor:
    """float64 filters of the shape of `like`, scaled by fan-in as recipe weights are, and by `gain`."""
    read = channels_read(*like.shape[:2])
    values = tensor_for(name, (*read.shape, *like.shape[2:])).to(like.device, torch.float64)
    values *= gain
    return torch.zeros_like(like, dtype=torch.float64).scatter_(1, _where(read, like), values)


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """torch's convolution, without the products that are known to be 0."""
    if groups != 1 or x.dim() != 4:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    first = weight[:1, :1]
    if not any(weight.stride()) or bool((weight == first[0, 0, 0, 0]).all()):
        y = F.conv2d(x.sum(1, keepdim=True), first, None, stride, padding, dilation)
        y = y.expand(-1, len(weight), -1, -1)
        return y.clone() if bias is None else y + bias.view(-1, 1, 1)
    read = channels_read(*weight.shape[:2])
    if 2 * read.shape[1] >= weight.shape[1]:
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    few = weight.gather(1, _where(read, weight))
    if few.count_nonzero() < weight.count_nonzero():
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    return F.conv2d(x[:, read.view(-1)], few, bias, stride, padding, dilation, len(weight))


class Thinly(TorchFunctionMode):
    """Within this context convolutions, also those of this library's ops, leave out what is 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            return convolved(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") == "inpaintrt":
            with self:  # which is suspended while a function is handled
                return registry.get(func._opname).run_reference(*args)
        return func(*args, **(kwargs or {}))


class ThinTwin(Twin):
    """A `Twin` in float64 with thin filters; those of `ones` are ones.

    `gains`: what filters are multiplied by.
    """

    def __init__(self, module: nn.Module, ones: list[Tensor], gains: dict[Tensor, float]) -> None:
        wide = {name: p for name, p in module.named_parameters() if p.dim() == 4 and p.is_floating_point()}
        made: dict[int, Any] = {
            id(p): nn.Parameter(thin_filters(name, p, gains.get(p, 1.0)), requires_grad=False)
            for name, p in wide.items()
            if all(p is not counter for counter in ones)
        }
        for counter in ones:  # one number in memory, whatever the shape
            value = torch.ones((), dtype=torch.float64, device=counter.device).expand(counter.shape)
            made[id(counter)] = nn.Parameter(value, requires_grad=False) if isinstance(counter, nn.Parameter) else value
        self._double = bare_copy(module, made).double()
        self._shared = {id(t): t for t in (*self._double.parameters(), *self._double.buffers()) if t.dim() == 4}
        with torch.no_grad():
            for name, tensor in (*self._double.named_parameters(), *self._double.named_buffers()):
                if tensor.dim() != 4 and tensor.is_floating_point():
                    tensor.copy_(tensor_for(name, tuple(tensor.shape)))
        self.device = next(iter(wide.values())).device

    def copy(self, dtype: torch.dtype) -> Any:
        if dtype != torch.float64:
            raise ValueError(f"a thin copy in {dtype}; there are those in torch.float64")
        return copy.deepcopy(self._double, dict(self._shared))

    def run(self, *args: Any) -> Any:
        with Thinly():
            return super().run(*args)

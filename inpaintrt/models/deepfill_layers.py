"""The layers of both DeepFill versions as the public ports name them: plain and gated convolutions, attention.

A gated convolution is act(f)·sigmoid(g) of two convolutions f and g of its input (Yu et al., "Free-Form Image Inpainting
with Gated Convolution", ICCV 2019). Ports keep them in one convolution whose first half of channels is f, or in two.
Names of attributes are the ports', because state-dict keys and adapters go by them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.ops import contextual_attention, contextual_attention_with_offsets

PADDINGS = ("zeros", "reflect", "replicate", "tf")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU, "relu": nn.ReLU, "leaky_relu": partial(nn.LeakyReLU, 0.2), "none": nn.Identity,
}  # fmt: skip


class TFConv2d(nn.Conv2d):
    """Convolution padded with zeros as TensorFlow's "SAME" does: ⌈n/stride⌉ outputs, the smaller half of the padding first.

    So a 3×3 window with stride 2 on an even size begins at the first pixel, where a padding of 1 would begin before it.
    """

    def forward(self, x: Tensor) -> Tensor:
        pad: list[int] = []
        for axis in (1, 0):
            size, stride = x.shape[2 + axis], self.stride[axis]
            reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            pad += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pad))


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, padding: str = "zeros"
) -> nn.Conv2d:
    """A convolution that keeps the size (divides it by `stride`), with its bias.

    padding: "zeros", "reflect" or "replicate", dilation·(kernel − 1)/2 on every side (rounded down), or "tf".
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}; accepted: {', '.join(PADDINGS)}")
    if padding == "tf" and stride > 1:
        return TFConv2d(inputs, outputs, kernel, stride, dilation=dilation)
    mode: Any = "zeros" if padding == "tf" else padding  # with stride 1 both sides are equal
    return nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel - 1) // 2, dilation, padding_mode=mode)


def activation_named(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; accepted: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class ConvLayer(nn.Module):
    """Convolution, then activation: `conv`."""

    def __init__(self, conv: nn.Conv2d, activation: str = "elu") -> None:
        super().__init__()
        self.conv = conv
        self.activation = activation_named(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


class GatedConv(nn.Module):
    """Gated convolution in one: `conv` gives 2C channels, features first, then gates; out come C."""

    def __init__(self, conv: nn.Module, activation: str = "elu") -> None:
        super().__init__()
        self.conv = conv
        self.activation = activation_named(activation)

    def forward(self, x: Tensor) -> Tensor:
        feature, gate = self.conv(x).chunk(2, dim=1)
        return self.activation(feature) * torch.sigmoid(gate)


class SplitGatedConv(nn.Module):
    """Gated convolution in two: `conv2d` gives the features, `mask_conv2d` the gates."""

    def __init__(self, conv2d: nn.Module, mask_conv2d: nn.Module, activation: str = "elu") -> None:
        super().__init__()
        self.conv2d = conv2d
        self.mask_conv2d = mask_conv2d
        self.activation = activation_named(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv2d(x)) * torch.sigmoid(self.mask_conv2d(x))


class SpectralNorm(nn.Module):
    """A convolution (`module`) whose weight is divided by an estimate of its largest singular value.

    Every forward, **in eval mode too**, takes one step of the power iteration and keeps its vectors, as in the port that
    has these layers: v = unit(Wᵀu), u = unit(W v), σ = u·(W v), weight = W/σ. So outputs drift by little from call to call.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight
        del conv.weight
        rows, columns = weight.shape[0], weight[0].numel()
        conv.weight_u = nn.Parameter(F.normalize(torch.randn(rows), dim=0), requires_grad=False)
        conv.weight_v = nn.Parameter(F.normalize(torch.randn(columns), dim=0), requires_grad=False)
        conv.weight_bar = nn.Parameter(weight.detach())
        self.module = conv

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self.module
        matrix = conv.weight_bar.flatten(1)
        with torch.no_grad():
            v = _unit(matrix.mT @ conv.weight_u)
            u = _unit(matrix @ v)
            conv.weight_u.copy_(u)
            conv.weight_v.copy_(v)
        sigma = u.dot(matrix @ v)
        return conv._conv_forward(x, conv.weight_bar / sigma, conv.bias)


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm() + 1e-12)


class Upsampled(nn.Module):
    """Nearest-neighbour upsampling by 2, then a layer, which is the child `name`."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(upsample(x))


def upsample(x: Tensor) -> Tensor:
    """(B, C, h, w) → (B, C, 2h, 2w), nearest neighbour."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ContextualAttention(nn.Module):
    """`ops.contextual_attention` with fixed options.

    Args:
        options: keyword arguments of the op.
        buffer: name under which the port keeps the 3×3 identity by which it propagates scores; None where it has none.
            The op does without; the buffer is there for the state dict.
    """

    def __init__(self, options: dict[str, Any], buffer: str | None = None) -> None:
        super().__init__()
        self.options = options
        if buffer is not None:
            self.register_buffer(buffer, torch.eye(3).view(1, 1, 3, 3))

    def forward(self, foreground: Tensor, background: Tensor, mask: Tensor | None = None, **changed: Any) -> Tensor:
        """foreground, background (B, C, h, w), mask (1|B, 1, 4h, 4w), 1 = hole → (B, C, h, w)."""
        return contextual_attention(foreground, background, mask, **{**self.options, **changed})

    def with_offsets(
        self, foreground: Tensor, background: Tensor, mask: Tensor | None = None, **changed: Any
    ) -> tuple[Tensor, Tensor]:
        """Also where each cell's best patch is: (B, 2, h/rate, w/rate), rows and columns relative to the cell."""
        return contextual_attention_with_offsets(foreground, background, mask, **{**self.options, **changed})

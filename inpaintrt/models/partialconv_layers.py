"""Partial convolution as a plain PyTorch layer: the differences between public implementations are its arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = ("window", "one")


class PartialConv2d(nn.Conv2d):
    """A convolution of valid pixels, renormalised by their number; its state dict is a Conv2d's.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of `nn.Conv2d`. Groups are those
            of the features; a mask is summed over all of its channels.
        scale: "window" multiplies by the size of the window (NVIDIA, mmagic), "one" does not (naoto0804).
        binary: the updated mask is 1 where the window holds anything valid (naoto0804); else the sum, clamped to [0, 1].
        eps: added to the sum before it divides.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        scale: str = "window",
        binary: bool = False,
        eps: float = 1e-8,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; accepted: {', '.join(SCALES)}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.scale, self.binary, self.eps = scale, binary, eps

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Features and updated mask.

        Args:
            x: (B, Cin, H, W).
            mask: (1|B, 1|Cin, H, W), **1 = valid**, 0 = hole; None: all valid ("partial convolution based padding").

        Returns:
            (B, Cout, H', W') in x's dtype, exactly 0 where a window holds nothing valid, and (1|B, 1, H', W').
        """
        if mask is None:
            mask = x.new_ones(1, 1, *x.shape[2:])
        ratio, updated = self._statistics(mask)
        y = self._conv_forward(x * mask, self.weight, None) * ratio
        if self.bias is not None:
            y = (y + self.bias.view(-1, 1, 1)) * updated
        return y.to(x.dtype), updated.to(mask.dtype)

    @torch.no_grad()
    def _statistics(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What features are multiplied by, and the updated mask: (1|B, 1, H', W'), float32 at least.

        All filters of a public implementation's mask convolution are ones, so one plane says what all of them would.
        """
        plane = mask.to(torch.promote_types(mask.dtype, torch.float32)).sum(1, keepdim=True)
        ones = plane.new_ones(1, 1, *self.kernel_size)
        total = F.conv2d(plane, ones, None, self.stride, self.padding, self.dilation)
        updated = (total != 0).to(total.dtype) if self.binary else total.clamp(0, 1)
        window = mask.shape[1] * ones.numel() if self.scale == "window" else 1
        return torch.where(total == 0, 0.0, window / (total + self.eps) * updated), updated


class Shell(nn.Module):
    """A partial convolution under a further name, as one port's state dict has it."""

    def __init__(self, conv: PartialConv2d) -> None:
        super().__init__()
        self.input_conv = conv

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.input_conv(x, mask)  # type: ignore[no-any-return]


class PartialBlock(nn.Module):
    """A partial convolution, then a batch norm and an activation where there are any, on (features, mask)."""

    def __init__(self, conv: nn.Module, norm: nn.BatchNorm2d | None, activation: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        if norm is not None:
            self.bn = norm
        if activation is not None:
            self.activation = activation

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = self.conv(x, mask)
        for name in ("bn", "activation"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x, mask

"""LaMa: resolution-robust large-mask inpainting with Fourier convolutions, as a plain PyTorch reference network.

Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions", WACV 2022. State-dict keys are those
of the public checkpoints (`model.1.ffc.convl2l.weight`, …), so that their weights load unchanged; module attributes have
the public names too, because adapters recognise a network by them.

The network is a stem (7×7), strided 3×3 convolutions, residual blocks of fast Fourier convolutions (FFC) at 1/8 of the
resolution, and transposed convolutions back. An FFC carries two streams, local and global; the global-to-global path
mixes channels in the frequency domain and so sees the whole image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Streams = tuple[Tensor, Tensor | None]


class FourierUnit(nn.Module):
    """rfft2 (orthonormal) → 1×1 convolution over interleaved real and imaginary channels → batch norm → ReLU → inverse.

    Channel 2c is the real, 2c + 1 the imaginary part of channel c. The rectified spectrum is not Hermitian, and the
    inverse follows the numpy rule whatever the device: complex inverse over rows, then real inverse over columns, which
    ignores the imaginary part of the bins kx = 0 and (even width) kx = w/2. cuFFT's 2-D inverse assumes symmetry instead
    and gives other numbers, hence the two one-dimensional calls.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_layer = nn.Conv2d(2 * in_channels, 2 * out_channels, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(2 * out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) → (B, Cout, h, w), any h and w from 1."""
        b, _, h, w = x.shape
        spectrum = torch.view_as_real(torch.fft.rfft2(x, norm="ortho"))  # (B, C, h, w//2 + 1, 2)
        y = spectrum.permute(0, 1, 4, 2, 3).reshape(b, -1, h, w // 2 + 1)
        y = self.relu(self.bn(self.conv_layer(y)))
        y = y.view(b, -1, 2, h, w // 2 + 1).permute(0, 1, 3, 4, 2).contiguous()
        rows = torch.fft.ifft(torch.view_as_complex(y), dim=-2, norm="ortho")
        return torch.fft.irfft(rows, n=w, dim=-1, norm="ortho")


class SpectralTransform(nn.Module):
    """1×1 convolution, batch norm, ReLU; then x + FourierUnit(x); then 1×1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, hidden, kernel_size=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)
        )
        self.fu = FourierUnit(hidden, hidden)
        self.conv2 = nn.Conv2d(hidden, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(x + self.fu(x))  # type: ignore[no-any-return]


class FFC(nn.Module):
    """Fast Fourier convolution of a local and a global stream; a path between empty streams is absent (Identity).

    ratio_in and ratio_out are the global shares of the channels, rounded down.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        ratio_in: float,
        ratio_out: float,
        stride: int = 1,
        padding: int = 0,
        padding_mode: Literal["zeros", "reflect", "replicate"] = "reflect",
    ) -> None:
        super().__init__()
        in_global, out_global = int(in_channels * ratio_in), int(out_channels * ratio_out)
        in_local, out_local = in_channels - in_global, out_channels - out_global

        def path(inputs: int, outputs: int) -> nn.Module:
            if inputs == 0 or outputs == 0:
                return nn.Identity()
            return nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=False, padding_mode=padding_mode)

        self.convl2l = path(in_local, out_local)
        self.convl2g = path(in_local, out_global)
        self.convg2l = path(in_global, out_local)
        self.convg2g: nn.Module = nn.Identity()
        if in_global and out_global:
            self.convg2g = SpectralTransform(in_global, out_global)
        self.global_in_num = in_global
        self.ratio_gout = ratio_out

    def forward(self, x: Tensor | Streams) -> Streams:
        local, wide = x if isinstance(x, tuple) else (x, None)
        out_local = self.convl2l(local)
        out_wide = None if isinstance(self.convl2g, nn.Identity) else self.convl2g(local)
        if wide is not None:
            out_local = out_local + self.convg2l(wide)
            out_wide = out_wide + self.convg2g(wide)
        return out_local, out_wide


class FFC_BN_ACT(nn.Module):
    """FFC, then batch norm and ReLU on each stream."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        ratio_in: float,
        ratio_out: float,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.ffc = FFC(in_channels, out_channels, kernel_size, ratio_in, ratio_out, stride, padding)
        out_global = int(out_channels * ratio_out)
        self.bn_l = nn.BatchNorm2d(out_channels - out_global)
        self.bn_g = nn.BatchNorm2d(out_global) if out_global else nn.Identity()
        self.act_l = nn.ReLU(inplace=True)
        self.act_g = nn.ReLU(inplace=True) if out_global else nn.Identity()

    def forward(self, x: Tensor | Streams) -> Streams:
        local, wide = self.ffc(x)
        local = self.act_l(self.bn_l(local))
        return local, None if wide is None else self.act_g(self.bn_g(wide))


class FFCResnetBlock(nn.Module):
    """Two FFCs with their ReLUs, and the input added to each stream; nothing after the addition."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.conv1 = FFC_BN_ACT(channels, channels, 3, ratio, ratio, padding=1)
        self.conv2 = FFC_BN_ACT(channels, channels, 3, ratio, ratio, padding=1)

    def forward(self, x: Streams) -> Streams:
        local, wide = self.conv2(self.conv1(x))
        return x[0] + local, x[1] + wide


class ConcatTupleLayer(nn.Module):
    """The two streams as one tensor, local channels first."""

    def forward(self, x: Streams) -> Tensor:
        return torch.cat([stream for stream in x if stream is not None], dim=1)


class LaMa(nn.Module):
    """The LaMa generator. Defaults are big-lama's (51.0 M parameters).

    Args:
        n_blocks: residual blocks; 18 in big-lama, 9 in lama-fourier, 6 in the shipped lama_mini.
        base_width: channels after the stem; doubled by each of the `n_downsampling` strided convolutions.
        ratio: share of the global stream in the residual blocks.
    """

    size_multiple = 8
    min_size = 16

    def __init__(
        self,
        n_blocks: int = 18,
        base_width: int = 64,
        n_downsampling: int = 3,
        ratio: float = 0.75,
        max_width: int = 1024,
    ) -> None:
        super().__init__()
        if n_downsampling < 1:
            raise ValueError(f"n_downsampling is {n_downsampling}; accepted: 1 or more")
        self.config = {
            "n_blocks": n_blocks, "base_width": base_width, "n_downsampling": n_downsampling, "ratio": ratio,
            "max_width": max_width,
        }  # fmt: skip
        self.size_multiple = 1 << n_downsampling
        self.min_size = 2 * self.size_multiple  # reflection by one pixel needs two at the bottleneck

        def width(level: int) -> int:
            return min(max_width, base_width << level)

        layers: list[nn.Module] = [nn.ReflectionPad2d(3), FFC_BN_ACT(4, base_width, 7, 0, 0)]
        for level in range(n_downsampling):
            last = level == n_downsampling - 1
            layers.append(FFC_BN_ACT(width(level), width(level + 1), 3, 0, ratio if last else 0, stride=2, padding=1))
        layers += [FFCResnetBlock(width(n_downsampling), ratio) for _ in range(n_blocks)]
        layers.append(ConcatTupleLayer())
        for level in range(n_downsampling, 0, -1):
            layers += [
                nn.ConvTranspose2d(width(level), width(level - 1), 3, stride=2, padding=1, output_padding=1),
                nn.BatchNorm2d(width(level - 1)),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(base_width, 3, 7), nn.Sigmoid()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 4, H, W): RGB in [0, 1] with the hole set to 0, then the mask (1 = hole) → (B, 3, H, W) in [0, 1].

        H and W must be multiples of `size_multiple` and at least `min_size` (pad first; see `inpaintrt.pipeline`).
        """
        return self.model(x)  # type: ignore[no-any-return]

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1]; values under the hole are ignored.
            mask: (B, 1, H, W), 1 = hole, 0 = known; any dtype.

        Returns:
            (B, 3, H, W); known pixels as given, the hole from the network.
        """
        hole = mask.to(image.dtype)
        known = torch.where(mask != 0, torch.zeros((), dtype=image.dtype, device=image.device), image)
        prediction = self(torch.cat([known, hole], dim=1))
        return torch.where(mask != 0, prediction, image)


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `LaMa`, read off the shapes of a state dict with keys `model.…`.

    Raises: `KeyError` with the first key that a LaMa generator has and this state dict lacks.
    """
    base_width = state["model.1.ffc.convl2l.weight"].shape[0]
    n_downsampling = 0
    while f"model.{2 + n_downsampling}.ffc.convl2l.weight" in state:
        n_downsampling += 1
    n_blocks = 0
    while f"model.{2 + n_downsampling + n_blocks}.conv1.ffc.convl2l.weight" in state:
        n_blocks += 1
    last = f"model.{1 + n_downsampling}"
    local = state[f"{last}.ffc.convl2l.weight"].shape[0]
    wide = state[f"{last}.ffc.convl2g.weight"].shape[0]
    widths = [state[f"model.{2 + i}.ffc.convl2l.weight"].shape[0] for i in range(n_downsampling - 1)] + [local + wide]
    return {
        "n_blocks": n_blocks,
        "base_width": base_width,
        "n_downsampling": n_downsampling,
        "ratio": wide / (local + wide),
        "max_width": max(widths),
    }

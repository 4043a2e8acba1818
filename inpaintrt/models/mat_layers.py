"""Layers of MAT as plain torch modules: StyleGAN 2's under its names, partial convolutions, masked window attention.

Weights are stored unscaled and multiplied by a constant at each call, as in the public checkpoints ("equalized learning
rate", Karras et al., 2018). Leaky ReLUs have slope 0.2 and are followed by a gain of √2.

Masks have **1 = valid** (known), 0 = hole, and may be fractional. In half precision the places that would lose everything
are float32: masks and their ratios, norms, attention's softmax, styles, and modulation and demodulation of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.ops._resampling import resample
from inpaintrt.ops.modulated_conv2d import convolve_resampled, modulated

from .stylegan2_layers import EPS, doubled, fir, normalised, wide

Size = tuple[int, int]
"""Rows and columns."""

MASKED = -100.0
"""What a masked key's logit gets. It is finite, so keys that are all masked compete as if none were."""


def biased(x: Tensor, bias: Tensor, activation: str, channels: int = 1) -> Tensor:
    """act(x + bias) · gain; activation "linear" (gain 1) or "lrelu" (gain √2), bias along dimension `channels`.

    Rounded to x's dtype once.
    """
    y = wide(x)
    y = y + bias.to(y.dtype).view([-1 if i == channels % x.dim() else 1 for i in range(x.dim())])
    if activation == "lrelu":
        y = F.leaky_relu(y, 0.2) * math.sqrt(2)
    return y.to(x.dtype)


def resampled_convolution(x: Tensor, weight: Tensor, taps: Tensor, up: int = 1, down: int = 1) -> Tensor:
    """Cross-correlation of x (B, I, H, W) with weight (O, I, k, k), "same" padding, twice or half the size.

    Half: the low-pass filter, then stride 2. Twice (3×3 only): zeros between pixels, the convolution, then the filter
    with gain 4.
    """
    margin = weight.shape[-1] // 2
    if down == 2:
        return F.conv2d(resample(x, taps.to(x.dtype), padding=(margin + 1,) * 4), weight, stride=2)
    if up == 2:
        y = F.conv_transpose2d(x, weight.transpose(0, 1).flip(2, 3), stride=2)
        return resample(y, taps.to(x.dtype), padding=(1, 1, 1, 1), gain=4.0)
    return F.conv2d(x, weight, padding=margin)


class FullyConnected(nn.Module):
    """act(x · (W · lr/√inputs)ᵀ + b · lr) along the last dimension, in x's dtype."""

    def __init__(
        self, inputs: int, outputs: int, activation: str = "linear", lr_multiplier: float = 1.0, bias_init: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias_init))
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(inputs)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.weight_gain
        return biased(F.linear(x, weight), self.bias * self.bias_gain, self.activation, -1)


class Conv2dLayer(nn.Module):
    """act(conv(x, W · 1/√(I·k²)) + b), with a change of size by 2 where `up` or `down` is 2."""

    resample_filter: Tensor

    def __init__(
        self, inputs: int, outputs: int, kernel: int, activation: str = "lrelu", *, up: int = 1, down: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("resample_filter", fir())
        self.activation, self.up, self.down = activation, up, down
        self.weight_gain = 1 / math.sqrt(inputs * kernel * kernel)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.weight_gain
        return biased(
            resampled_convolution(x, weight, self.resample_filter, self.up, self.down), self.bias, self.activation
        )


# ---- style-modulated convolutions -----------------------------------------------------------------------------------


class ModulatedConv2d(nn.Module):
    """A convolution whose weights each sample's style scales by input channel (Karras et al., StyleGAN2, 2020).

    s = affine(style); w = W · 1/√(I·k²) · s; with `demodulate`, w / √(Σ w² + 1e-8) for each output channel.
    """

    resample_filter: Tensor

    def __init__(
        self, inputs: int, outputs: int, kernel: int, style_width: int, *, demodulate: bool = True, up: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel, kernel))
        self.register_buffer("resample_filter", fir())
        self.affine = FullyConnected(style_width, inputs, bias_init=1.0)
        self.demodulate, self.up = demodulate, up
        self.weight_gain = 1 / math.sqrt(inputs * kernel * kernel)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x (B, I, H, W), style (B, style_width) → (B, O, up·H, up·W)."""
        scales = self.affine(wide(style))
        filters = modulated(wide(self.weight[0]), scales, self.demodulate, EPS, self.weight_gain).to(x.dtype)
        taps = self.resample_filter.to(x.dtype)
        return convolve_resampled(x, filters, self.up, 1, self.weight.shape[-1] // 2, taps)


class StyleConv(nn.Module):
    """Modulated 3×3 convolution, noise, bias, leaky ReLU.

    Args:
        resolution: rows and columns of the output, for the stored noise; None for a layer without noise.
    """

    noise_const: Tensor

    def __init__(
        self, inputs: int, outputs: int, style_width: int, *, resolution: int | None = None, up: int = 1
    ) -> None:
        super().__init__()
        if resolution is not None:
            self.noise_strength = nn.Parameter(torch.zeros(()))
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.conv = ModulatedConv2d(inputs, outputs, 3, style_width, up=up)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        """noise (B|1, 1, H, W) of the output's size, of variance 1: it is multiplied by the layer's strength."""
        y = self.conv(x, style)
        if noise is not None:
            y = y + (noise * self.noise_strength).to(y.dtype)
        return biased(y, self.bias, "lrelu")


class ToRGB(nn.Module):
    """Features to RGB by a modulated 1×1 convolution, added to the RGB image of the level below, doubled in size.

    RGB is float32 in half precision: it is summed over all levels.
    """

    resample_filter: Tensor

    def __init__(self, inputs: int, style_width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("resample_filter", fir())
        self.conv = ModulatedConv2d(inputs, 3, 1, style_width, demodulate=False)

    def forward(self, x: Tensor, style: Tensor, below: Tensor | None = None) -> Tensor:
        y = biased(wide(self.conv(x, style)), self.bias, "linear")
        if below is None:
            return y
        return y + (below if below.shape == y.shape else self.doubled(below))

    def doubled(self, below: Tensor) -> Tensor:
        """RGB (B, 3, H, W) at twice the size: each pixel three quarters of the nearest one and a quarter of the next, along
        both axes, with zeros outside."""
        return doubled(below, 4 * self.resample_filter)


class Mapping(nn.Module):
    """Latent z to styles: normalised, then eight fully connected layers, the result once for each layer of the decoder.

    Float32 at least. State: the mean style `w_avg`, towards which truncation pulls.
    """

    w_avg: Tensor

    def __init__(self, z_width: int, w_width: int, copies: int, layers: int = 8) -> None:
        super().__init__()
        self.copies, self.layers = copies, layers
        self.register_buffer("w_avg", torch.zeros(w_width))
        for i in range(layers):
            self.add_module(f"fc{i}", FullyConnected(w_width if i else z_width, w_width, "lrelu", 0.01))

    def forward(self, z: Tensor, truncation_psi: float = 1.0, truncation_cutoff: int | None = None) -> Tensor:
        """z (B, z_width) → (B, copies, w_width).

        truncation_psi: 1 leaves the styles as they are, 0 gives the mean; of the first `truncation_cutoff` copies only.
        """
        x = z.to(wide(self.w_avg).dtype)
        x = normalised(x)
        for i in range(self.layers):
            x = self.get_submodule(f"fc{i}")(x)
        styles = x[:, None].repeat(1, self.copies, 1)
        if truncation_psi != 1:
            cut = styles[:, :truncation_cutoff]
            styles[:, :truncation_cutoff] = self.w_avg.to(x.dtype).lerp(cut, truncation_psi)
        return styles


# ---- masks ----------------------------------------------------------------------------------------------------------


class PartialStep(NamedTuple):
    """What a mask says of one partial convolution.

    Attributes:
        ratio: (B, 1, H, W), by which its result is multiplied, after bias and activation; 0 where no token is valid.
        valid: (B, 1, H, W), the mask after it.
    """

    ratio: Tensor
    valid: Tensor


class AttentionStep(NamedTuple):
    """What a mask says of one block of window attention.

    Attributes:
        window, shift: side of the windows, and by how many tokens they are rolled.
        mask: (B, H, W, 1), of its keys: what `ops.window_attention` takes.
        valid: (B, H, W, 1), the mask after it: what `ops.window_mask_update` gives.
    """

    window: int
    shift: int
    mask: Tensor
    valid: Tensor


Step = PartialStep | AttentionStep
"""Layers take it in place of a mask, from which they would compute it."""


class PartialConv(nn.Module):
    """A `Conv2dLayer` whose **output**, after its activation, is scaled by how much of each window is valid.

    Its input is not masked. The ratio is not 1 at the borders of a mask of ones: the window's padding counts as hole.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, activation: str = "lrelu", *, up: int = 1, down: int = 1
    ) -> None:
        super().__init__()
        self.conv = Conv2dLayer(inputs, outputs, kernel, activation, up=up, down=down)
        self.kernel, self.down = kernel, down

    def forward(self, x: Tensor, mask: Tensor | PartialStep | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B, I, H, W), mask (B, 1, H, W), its step or None → output and its mask (None without one)."""
        y = self.conv(x)
        if mask is None:
            return y, None
        step = mask if isinstance(mask, PartialStep) else partial_ratio(mask, self.kernel, self.down)
        return y * step.ratio.to(y.dtype), step.valid


def partial_ratio(mask: Tensor, kernel: int = 3, stride: int = 1) -> PartialStep:
    """Ratio and updated mask of a partial convolution, both (B, 1, H′, W′), of mask (B, 1, H, W).

    valid = min(Σ window, 1); ratio = k² / (Σ window + 1e-8) · valid. Padding is zero; the low-pass filter before a
    stride of 2 does not count.
    """
    mask = wide(mask)
    total = F.conv2d(mask, mask.new_ones(1, 1, kernel, kernel), stride=stride, padding=kernel // 2)
    valid = total.clamp(0, 1)
    return PartialStep(kernel * kernel / (total + EPS) * valid, valid)


def window_validity(windows: Tensor) -> Tensor:
    """windows (n, N, 1) of a mask → min(Σ, 1) for all tokens of each window."""
    return windows.sum(1, keepdim=True).clamp(0, 1).expand_as(windows)


# ---- tokens and windows ---------------------------------------------------------------------------------------------


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), rows first."""
    return x.flatten(2).transpose(1, 2)


def to_features(x: Tensor, size: Size) -> Tensor:
    """(B, H·W, C) → (B, C, H, W)."""
    return x.transpose(1, 2).reshape(len(x), -1, *size)


class Windows(NamedTuple):
    """How a map of tokens is cut into windows: first rolled up and left by `shift`, around its borders, then cut."""

    height: int
    width: int
    window: int
    shift: int

    def cut(self, x: Tensor) -> Tensor:
        """(B, H·W, C) → (B · windows, window², C), windows and the tokens in each by rows."""
        x = x.view(-1, self.height, self.width, x.shape[-1])
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        side = self.window
        x = x.view(-1, self.height // side, side, self.width // side, side, x.shape[-1])
        return x.transpose(2, 3).reshape(-1, side * side, x.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """What `cut` took apart."""
        side, channels = self.window, windows.shape[-1]
        x = windows.reshape(-1, self.height // side, self.width // side, side, side, channels)
        x = x.transpose(2, 3).reshape(-1, self.height, self.width, channels)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x.view(-1, self.height * self.width, channels)

    def strangers(self, device: torch.device) -> Tensor | None:
        """(windows, N, N), −100 between tokens that rolling brought together from opposite borders, else 0; or None."""
        if not self.shift:
            return None

        def part(length: int) -> Tensor:
            at = torch.arange(length, device=device)
            return (at >= length - self.window).long() + (at >= length - self.shift)

        region = 3 * part(self.height)[:, None] + part(self.width)
        label = self._replace(shift=0).cut(region.view(1, -1, 1)).squeeze(-1)
        return torch.where(label[:, :, None] == label[:, None, :], 0.0, MASKED)


class WindowAttention(nn.Module):
    """Attention of several heads among the tokens of each window.

    Queries and keys are of tokens divided by their norm (over all heads), values of the tokens themselves. What a
    masked key, and a key of another region, adds to the logit is −100; both are added. A fractional mask is itself added.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (FullyConnected(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, mask: Tensor | None = None, strangers: Tensor | None = None) -> Tensor:
        """x (B · windows, N, C), mask (B · windows, N, 1) or None, strangers (windows, N, N) or None → like x."""
        unit = F.normalize(wide(x), dim=-1).to(x.dtype)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(unit), self.k(unit), self.v(x)))
        logits = wide(q) @ wide(k).transpose(-2, -1) * (q.shape[-1] ** -0.5)
        if strangers is not None:
            grouped = logits.unflatten(0, (-1, len(strangers)))
            logits = (grouped + strangers[:, None].to(logits.dtype)).flatten(0, 1)
        if mask is not None:
            added = torch.where(mask == 0, MASKED, torch.where(mask == 1, 0.0, mask))
            logits = logits + added.view(len(x), 1, 1, -1).to(logits.dtype)
        weights = logits.softmax(-1).to(v.dtype)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two fully connected layers, the first with a leaky ReLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = FullyConnected(width, hidden, "lrelu")
        self.fc2 = FullyConnected(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))  # type: ignore[no-any-return]


class SwinBlock(nn.Module):
    """mlp(fuse([x, attention(x)])), tokens in windows of a rolled map; no layer norm, nothing is added."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.attn = WindowAttention(width, heads)
        self.fuse = FullyConnected(2 * width, width, "lrelu")
        self.mlp = MLP(width, 2 * width)
        self.window, self.shift = window, shift

    def forward(
        self, x: Tensor, size: Size, mask: Tensor | AttentionStep | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, H·W, C), mask (B, H·W, 1), its step or None → tokens and mask: a window with any valid token is valid."""
        windows = Windows(*size, self.window, self.shift)
        masks: Tensor | None = None
        valid: Tensor | None = None
        if isinstance(mask, AttentionStep):
            masks, valid = windows.cut(mask.mask), mask.valid.flatten(1, 2)
        elif mask is not None:
            masks = windows.cut(mask)
            valid = windows.join(window_validity(masks))
        attended = windows.join(self.attn(windows.cut(x), masks, windows.strangers(x.device)))
        return self.mlp(self.fuse(torch.cat([x, attended], dim=-1))), valid


class Resample(nn.Module):
    """Tokens of a map of twice (up = 2) or half (down = 2) the size, by a partial convolution."""

    def __init__(self, inputs: int, outputs: int, *, up: int = 1, down: int = 1) -> None:
        super().__init__()
        self.conv = PartialConv(inputs, outputs, up=up, down=down)

    def forward(
        self, x: Tensor, size: Size, mask: Tensor | PartialStep | None = None
    ) -> tuple[Tensor, Size, Tensor | None]:
        y, valid = self.conv(to_features(x, size), to_features(mask, size) if isinstance(mask, Tensor) else mask)
        return to_tokens(y), (y.shape[2], y.shape[3]), None if valid is None else to_tokens(valid)


class BasicLayer(nn.Module):
    """A change of size, blocks of attention with every other one shifted, a convolution, and what came in added.

    Args:
        width, heads: of the blocks.
        depth: number of blocks.
        window: side of the windows.
        side: shorter side of the map that the network was designed for; where a window covers it nothing is shifted,
            on larger maps neither.
        downsample: the change of size, if any.
    """

    def __init__(
        self, width: int, heads: int, depth: int, window: int, side: int, downsample: Resample | None = None
    ) -> None:
        super().__init__()
        if downsample is not None:
            self.downsample = downsample
        shift = window // 2 if side > window else 0
        self.blocks = nn.ModuleList([SwinBlock(width, heads, min(window, side), shift * (i % 2)) for i in range(depth)])
        self.conv = PartialConv(width, width)

    def forward(
        self, x: Tensor, size: Size, mask: Tensor | Sequence[Step] | None = None
    ) -> tuple[Tensor, Size, Tensor | None]:
        """x (B, H·W, C), mask (B, H·W, 1), the steps of all layers in turn or None → tokens, size and mask of the new map."""
        steps = None if mask is None or isinstance(mask, Tensor) else iter(mask)
        if hasattr(self, "downsample"):
            x, size, mask = self.downsample(x, size, next(steps) if steps else mask)
        before = x
        for block in self.blocks:
            x, mask = block(x, size, next(steps) if steps else mask)
        last = next(steps) if steps else mask
        y, valid = self.conv(to_features(x, size), to_features(last, size) if isinstance(last, Tensor) else last)
        return to_tokens(y) + before, size, None if valid is None else to_tokens(valid)

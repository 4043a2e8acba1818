"""Partial convolutions as strangers write them: layers, blocks and U-Nets in the structures of public implementations.

Written for these tests from descriptions of what the implementations compute, under other class names. Attributes have the
public names, since state dicts and constructors fix them; all masks are summed by convolutions with ones, as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# ---- layers ---------------------------------------------------------------------------------------------------------


class Caching(nn.Conv2d):
    """In the manner of NVIDIA: what was derived from a mask is kept for calls of the same shape without one."""

    whole_shape = True

    def __init__(self, *args, multi_channel=False, return_mask=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.multi_channel, self.return_mask = multi_channel, return_mask
        shape = (self.out_channels, self.in_channels) if multi_channel else (1, 1)
        self.weight_maskUpdater = torch.ones(*shape, *self.kernel_size)
        self.slide_winsize = self.weight_maskUpdater[0].numel()
        self.last_size = (None,) * (4 if self.whole_shape else 2)
        self.update_mask = self.mask_ratio = None

    def _statistics(self, x, mask):
        if mask is None:
            mask = torch.ones_like(x) if self.multi_channel else x.new_ones(1, 1, *x.shape[2:])
        ones = self.weight_maskUpdater.to(x)
        total = F.conv2d(mask, ones, None, self.stride, self.padding, self.dilation)
        self.update_mask = total.clamp(0, 1)
        self.mask_ratio = self.slide_winsize / (total + 1e-8) * self.update_mask

    def forward(self, x, mask_in=None):
        size = tuple(x.shape) if self.whole_shape else tuple(x.shape[2:])
        if mask_in is not None or self.last_size != size:
            self.last_size = size
            with torch.no_grad():
                self._statistics(x, mask_in)
        raw = super().forward(x if mask_in is None else x * mask_in)
        if self.bias is None:
            out = raw * self.mask_ratio
        else:
            b = self.bias.view(1, -1, 1, 1)
            out = ((raw - b) * self.mask_ratio + b) * self.update_mask
        return (out, self.update_mask) if self.return_mask else out


class OlderCaching(Caching):
    """Older copies compare height and width only, and always return the mask."""

    whole_shape = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, return_mask=True, **kwargs)


class Buffered(nn.Conv2d):
    """In the manner of mmagic: the ones are in the state dict, nothing is kept, and eps is an argument."""

    def __init__(self, *args, multi_channel=False, eps=1e-8, **kwargs):
        super().__init__(*args, **kwargs)
        self.multi_channel, self.eps = multi_channel, eps
        shape = (self.out_channels, self.in_channels) if multi_channel else (1, 1)
        self.register_buffer("weight_mask_updater", torch.ones(*shape, *self.kernel_size))
        self.mask_kernel_numel = self.weight_mask_updater[0].numel()

    def forward(self, x, mask=None, return_mask=True):
        if mask is None:
            return super().forward(x)
        assert mask.shape[1] == (self.in_channels if self.multi_channel else 1)
        with torch.no_grad():
            total = F.conv2d(mask, self.weight_mask_updater, None, self.stride, self.padding, self.dilation)
            updated = total.clamp(0, 1)
            ratio = self.mask_kernel_numel / (total + self.eps) * updated
        out = super().forward(x * mask)
        if self.bias is None:
            out = out * ratio
        else:
            b = self.bias.view(1, -1, 1, 1)
            out = ((out - b) * ratio + b) * updated
        return (out, updated) if return_mask else out


class TwoConvolutions(nn.Module):
    """In the manner of naoto0804: a second, frozen convolution sums the mask; no factor; anything valid counts as 1."""

    def __init__(self, inputs, outputs, kernel, stride=1, padding=0, dilation=1, groups=1, bias=True):
        super().__init__()
        self.input_conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
        self.mask_conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, False)
        nn.init.ones_(self.mask_conv.weight)
        self.mask_conv.weight.requires_grad_(False)

    def forward(self, x, mask):
        raw = self.input_conv(x * mask)
        b = (
            torch.zeros_like(raw)
            if self.input_conv.bias is None
            else self.input_conv.bias.view(1, -1, 1, 1).expand_as(raw)
        )
        with torch.no_grad():
            total = self.mask_conv(mask)
        nothing = total == 0
        out = ((raw - b) / total.masked_fill(nothing, 1.0) + b).masked_fill(nothing, 0.0)
        return out, torch.ones_like(out).masked_fill(nothing, 0.0)


# ---- blocks and networks --------------------------------------------------------------------------------------------

GEOMETRY = {"down-7": (7, 2, 3), "down-5": (5, 2, 2), "down-3": (3, 2, 1), "none": (3, 1, 1)}


class Activated(nn.Module):
    """In the manner of naoto0804's blocks."""

    def __init__(self, inputs, outputs, bn=True, sample="none", activ="relu", bias=False):
        super().__init__()
        kernel, stride, padding = GEOMETRY[sample]
        self.conv = TwoConvolutions(inputs, outputs, kernel, stride, padding, bias=bias)
        if bn:
            self.bn = nn.BatchNorm2d(outputs)
        if activ == "relu":
            self.activation = nn.ReLU()
        elif activ == "leaky":
            self.activation = nn.LeakyReLU(negative_slope=0.2)

    def forward(self, x, mask):
        y, mask = self.conv(x, mask)
        if hasattr(self, "bn"):
            y = self.bn(y)
        if hasattr(self, "activation"):
            y = self.activation(y)
        return y, mask


def sample_of(level):
    return {1: "down-7", 2: "down-5", 3: "down-5"}.get(level, "down-3")


def widths_of(levels, width):
    return [3, *(width << min(level, 3) for level in range(levels))]


class Unet(nn.Module):
    """In the manner of naoto0804's network, of any width."""

    def __init__(self, layer_size=7, width=64, upsampling_mode="nearest"):
        super().__init__()
        self.layer_size, self.upsampling_mode = layer_size, upsampling_mode
        widths = widths_of(layer_size, width)
        for level in range(1, layer_size + 1):
            below, here = widths[level - 1 : level + 1]
            self.add_module(f"enc_{level}", Activated(below, here, level > 1, sample_of(level)))
            up = Activated(here + below, below, level > 1, activ="leaky" if level > 1 else None, bias=level == 1)
            self.add_module(f"dec_{level}", up)

    def forward(self, x, mask):
        features, masks = [x], [mask]
        for level in range(1, self.layer_size + 1):
            y, m = getattr(self, f"enc_{level}")(features[-1], masks[-1])
            features.append(y)
            masks.append(m)
        y, m = features.pop(), masks.pop()
        for level in range(self.layer_size, 0, -1):
            y = F.interpolate(y, scale_factor=2, mode=self.upsampling_mode)
            m = F.interpolate(m, scale_factor=2, mode="nearest")
            y, m = torch.cat([y, features.pop()], 1), torch.cat([m, masks.pop()], 1)
            y, m = getattr(self, f"dec_{level}")(y, m)
        return y, m


class ConvModule(nn.Module):
    """In the manner of mmagic's blocks."""

    def __init__(self, inputs, outputs, kernel, stride, padding, norm, act, bias):
        super().__init__()
        self.conv = Buffered(inputs, outputs, kernel, stride, padding, bias=bias, multi_channel=True)
        if norm:
            self.bn = nn.BatchNorm2d(outputs)
        if act is not None:
            self.activate = act

    def forward(self, x, mask=None, activate=True, norm=True, return_mask=True):
        x, mask = self.conv(x, mask)
        if norm and hasattr(self, "bn"):
            x = self.bn(x)
        if activate and hasattr(self, "activate"):
            x = self.activate(x)
        return (x, mask) if return_mask else x


class Encoder(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.num_layers = len(widths) - 1
        for level in range(1, len(widths)):
            kernel, stride, padding = GEOMETRY[sample_of(level)]
            block = ConvModule(
                *widths[level - 1 : level + 1], kernel, stride, padding, level > 1, nn.ReLU(), level == 1
            )
            self.add_module(f"enc{level}", block)

    def forward(self, x, mask):
        found = {"features": [x], "masks": [mask]}
        for level in range(1, self.num_layers + 1):
            x, mask = getattr(self, f"enc{level}")(x, mask)
            found["features"].append(x)
            found["masks"].append(mask)
        return found


class Decoder(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.num_layers = len(widths) - 1
        for level in range(1, len(widths)):
            below, here = widths[level - 1 : level + 1]
            act = nn.LeakyReLU(0.2) if level > 1 else None
            self.add_module(f"dec{level}", ConvModule(here + below, below, 3, 1, 1, level > 1, act, level == 1))

    def forward(self, found):
        features, masks = list(found["features"]), list(found["masks"])
        x, mask = features.pop(), masks.pop()
        for level in range(self.num_layers, 0, -1):
            x = torch.cat([F.interpolate(x, scale_factor=2), features.pop()], 1)
            mask = torch.cat([F.interpolate(mask, scale_factor=2), masks.pop()], 1)
            x, mask = getattr(self, f"dec{level}")(x, mask)
        return x, mask


class EncoderDecoder(nn.Module):
    """In the manner of mmagic's network."""

    def __init__(self, levels=7, width=64):
        super().__init__()
        self.encoder, self.decoder = Encoder(widths_of(levels, width)), Decoder(widths_of(levels, width))

    def forward(self, x, mask_in):
        return self.decoder(self.encoder(x, mask_in))


class Chain(nn.Module):
    """NVIDIA's layers one after the other, with norms between them."""

    def __init__(self, width=8, multi_channel=False):
        super().__init__()
        self.first = Caching(3, width, 5, 1, 2, multi_channel=multi_channel, return_mask=True)
        self.norm = nn.BatchNorm2d(width)
        self.second = Caching(width, 6, 3, 2, 1, bias=False, multi_channel=multi_channel, return_mask=True)
        self.last = Caching(6, 3, 3, 1, 1, multi_channel=multi_channel)

    def forward(self, x, mask):
        x, mask = self.first(x, mask)
        x, mask = self.second(F.relu(self.norm(x)), mask)
        return self.last(x, mask)

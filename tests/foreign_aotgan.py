"""AOT-GAN as strangers write it: blocks and generators in the structures of public ports.

Written for these tests from descriptions of what the ports compute, under other class names. Attributes have the ports'
names, since state dicts fix them; what is not written in an attribute is in the code, and adapters must find it out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def standardised(v, eps=1e-9, unbiased=True):
    """Mean −5, deviation 10, over the pixels."""
    deviation = v.std((2, 3), keepdim=True, unbiased=unbiased) + eps
    return 5 * (2 * (v - v.mean((2, 3), keepdim=True)) / deviation - 1)


# ---- in the manner of researchmm ------------------------------------------------------------------------------------


class Numbered(nn.Module):
    """A block whose branches are children with numbers in their names."""

    def __init__(self, dim=16, rates=(1, 2, 4, 8), eps=1e-9):
        super().__init__()
        self.rates, self.eps = rates, eps
        for i, rate in enumerate(rates):
            self.add_module(f"block{i:02d}", self.branch(dim, dim // len(rates), rate))
        self.fuse = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3, dilation=1))
        self.gate = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3, dilation=1))

    def branch(self, dim, part, rate):
        return nn.Sequential(nn.ReflectionPad2d(rate), nn.Conv2d(dim, part, 3, dilation=rate), nn.ReLU(True))

    def joined(self, x):
        return self.fuse(torch.cat([getattr(self, f"block{i:02d}")(x) for i in range(len(self.rates))], 1))

    def forward(self, x):
        mask = torch.sigmoid(standardised(self.gate(x), self.eps))
        return x * (1 - mask) + self.joined(x) * mask


class Doubling(nn.Module):
    def __init__(self, inputs, outputs, scale=2):
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=True))


class Plain(nn.Module):
    """A generator of three Sequentials, called with image and mask."""

    def __init__(self, width=64, rates=(1, 2, 4, 8), block_num=2, block=Numbered, doubling=Doubling):
        super().__init__()
        w = width
        self.encoder = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(4, w, 7), nn.ReLU(True),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1), nn.ReLU(True),
            nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1), nn.ReLU(True),
        )  # fmt: skip
        self.middle = nn.Sequential(*[block(4 * w, rates) for _ in range(block_num)])
        self.decoder = nn.Sequential(
            doubling(4 * w, 2 * w), nn.ReLU(True), doubling(2 * w, w), nn.ReLU(True), nn.Conv2d(w, 3, 3, padding=1)
        )

    def forward(self, x, mask):
        return torch.tanh(self.decoder(self.middle(self.encoder(torch.cat([x, mask], 1)))))


# ---- in the manner of mmagic ----------------------------------------------------------------------------------------


class Shell(nn.Module):
    """A convolution and what may follow it."""

    def __init__(self, *geometry, padding=0, dilation=1, activated=True):
        super().__init__()
        self.conv = nn.Conv2d(*geometry, padding=padding, dilation=dilation)
        self.with_activation = activated
        if activated:
            self.activate = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        return self.activate(x) if self.with_activation else x


class Listed(nn.Module):
    """A block whose branches are in a list, of convolutions in shells."""

    def __init__(self, dim=16, rates=(1, 2, 4, 8)):
        super().__init__()
        self.dilation_rates = rates
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReflectionPad2d(rate), Shell(dim, dim // 4, 3, dilation=rate)) for rate in rates
        )
        self.fuse = nn.Sequential(nn.ReflectionPad2d(1), Shell(dim, dim, 3, activated=False))
        self.gate = nn.Sequential(nn.ReflectionPad2d(1), Shell(dim, dim, 3, activated=False))

    def forward(self, x):
        fused = self.fuse(torch.cat([branch(x) for branch in self.blocks], 1))
        mask = torch.sigmoid(standardised(self.gate(x)))
        return x * (1 - mask) + fused * mask


class Encoder(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.ReflectionPad2d(3),
            Shell(4, w, 7),
            Shell(w, 2 * w, 4, 2, padding=1),
            Shell(2 * w, 4 * w, 4, 2, padding=1),
        )

    def forward(self, x):
        return self.encoder(x)


class Neck(nn.Module):
    def __init__(self, dim, rates, block_num):
        super().__init__()
        self.model = nn.Sequential(*[Listed(dim, rates) for _ in range(block_num)])

    def forward(self, x):
        return self.model(x)


class Decoder(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.decoder = nn.ModuleList(
            [
                Shell(4 * w, 2 * w, 3, padding=1),
                Shell(2 * w, w, 3, padding=1),
                Shell(w, 3, 3, padding=1, activated=False),
            ]
        )

    def forward(self, x):
        *before, last = self.decoder
        for layer in before:
            x = layer(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
        return torch.tanh(last(x))


class Staged(nn.Module):
    """A generator of three modules, registered in another order than they run, called with one tensor."""

    def __init__(self, width=64, rates=(1, 2, 4, 8), block_num=2):
        super().__init__()
        self.encoder = Encoder(width)
        self.decoder = Decoder(width)
        self.dilation_neck = Neck(4 * width, rates, block_num)

    def forward(self, x):
        return self.decoder(self.dilation_neck(self.encoder(x)))


# ---- look-alikes ----------------------------------------------------------------------------------------------------


class Biased(Numbered):
    def forward(self, x):
        mask = torch.sigmoid(standardised(self.gate(x), unbiased=False))
        return x * (1 - mask) + self.joined(x) * mask


class Exchanged(Numbered):
    def forward(self, x):
        mask = torch.sigmoid(standardised(self.gate(x)))
        return x * mask + self.joined(x) * (1 - mask)


class Ungated(Numbered):
    def forward(self, x):
        mask = torch.sigmoid(self.gate(x))
        return x * (1 - mask) + self.joined(x) * mask


class GatedByTheResult(Numbered):
    def forward(self, x):
        fused = self.joined(x)
        mask = torch.sigmoid(standardised(self.gate(fused)))
        return x * (1 - mask) + fused * mask


class Backwards(Numbered):
    def joined(self, x):
        return self.fuse(torch.cat([getattr(self, f"block{i:02d}")(x) for i in reversed(range(len(self.rates)))], 1))


class Nearest(Doubling):
    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


class Cornerless(Doubling):
    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


class MaskFirst(Plain):
    def forward(self, x, mask):
        return torch.tanh(self.decoder(self.middle(self.encoder(torch.cat([mask, x], 1)))))


class Clipped(Plain):
    def forward(self, x, mask):
        return self.decoder(self.middle(self.encoder(torch.cat([x, mask], 1)))).clamp(-1, 1)

"""GLCIC and small convolutional blocks as strangers write them, in the structures of public ports.

Written for these tests from descriptions of what the ports compute, under other class names. Attributes have the ports'
names, since state dicts fix them; in which order a norm and an activation are called is in the code only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# ---- in the manner of otenim: everything in one module, by number ---------------------------------------------------


class Completion(nn.Module):
    """Convolution, ReLU, batch norm."""

    def __init__(self, unit=64):
        super().__init__()
        channels = 4
        for n in range(1, 18):
            outputs = (4 if 4 <= n <= 12 else 2 if n in (2, 3, 13, 14) else 1) * unit
            if n >= 16:
                outputs = unit // 2 if n == 16 else 3
            if n in (13, 15):
                self.add_module(f"deconv{n}", nn.ConvTranspose2d(channels, outputs, 4, stride=2, padding=1))
            else:
                rate = 2 ** (n - 6) if 7 <= n <= 10 else 1
                size, pad = (5, 2) if n == 1 else (3, rate)
                stride = 2 if n in (2, 4) else 1
                self.add_module(f"conv{n}", nn.Conv2d(channels, outputs, size, stride, pad, rate))
            if n < 17:
                self.add_module(f"bn{n}", nn.BatchNorm2d(outputs))
            self.add_module(f"act{n}", nn.ReLU() if n < 17 else nn.Sigmoid())
            channels = outputs

    def layer(self, n, x):
        x = getattr(self, f"deconv{n}" if n in (13, 15) else f"conv{n}")(x)
        return getattr(self, f"bn{n}")(getattr(self, f"act{n}")(x))

    def forward(self, x):
        for n in range(1, 17):
            x = self.layer(n, x)
        return self.act17(self.conv17(x))


class NormFirst(Completion):
    """A copy in which the norm comes before the activation."""

    def layer(self, n, x):
        x = getattr(self, f"deconv{n}" if n in (13, 15) else f"conv{n}")(x)
        return getattr(self, f"act{n}")(getattr(self, f"bn{n}")(x))


class Logits(Completion):
    """A copy that leaves the sigmoid to its caller, and its activations to functions."""

    def __init__(self, unit=64):
        super().__init__(unit)
        for n in range(1, 18):
            delattr(self, f"act{n}")

    def forward(self, x):
        for n in range(1, 17):
            conv = getattr(self, f"deconv{n}" if n in (13, 15) else f"conv{n}")
            x = getattr(self, f"bn{n}")(F.relu(conv(x)))
        return self.conv17(x)


class Skipping(Completion):
    """Of the same parts, another network: the stem is added to the layer that has its size again."""

    def forward(self, x):
        first = x = self.layer(1, x)
        for n in range(2, 16):
            x = self.layer(n, x)
        return self.act17(self.conv17(self.layer(16, x + first)))


# ---- in the manner of mmagic: shells in encoder, neck and decoder ---------------------------------------------------


class Shell(nn.Module):
    """A convolution with its norm and activation, in any order, and a padding layer where the mode is not its own."""

    def __init__(self, inputs, outputs, size, *, deconv=False, norm=True, act="relu", order="cna", pad=None, **kwargs):
        super().__init__()
        self.order = order
        self.with_explicit_padding = pad is not None
        if pad is not None:
            self.padding_layer = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}[pad](
                kwargs.pop("padding")
            )
        kind = nn.ConvTranspose2d if deconv else nn.Conv2d
        self.conv = kind(inputs, outputs, size, bias=not norm, **kwargs)
        if norm:
            self.bn = nn.BatchNorm2d(inputs if order.index("n") < order.index("c") else outputs)
        if act is not None:
            self.activate = {"relu": nn.ReLU(inplace=True), "leaky": nn.LeakyReLU(0.1), "silu": nn.SiLU()}[act]

    def forward(self, x, activate=True, norm=True):
        for step in self.order:
            if step == "c":
                x = self.conv(self.padding_layer(x) if self.with_explicit_padding else x)
            elif step == "n" and norm and hasattr(self, "bn"):
                x = self.bn(x)
            elif step == "a" and activate and hasattr(self, "activate"):
                x = self.activate(x)
        return x


class Encoder(nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.enc1 = Shell(4, unit, 5, padding=2)
        self.enc2 = Shell(unit, 2 * unit, 3, stride=2, padding=1)
        self.enc3 = Shell(2 * unit, 2 * unit, 3, padding=1)
        self.enc4 = Shell(2 * unit, 4 * unit, 3, stride=2, padding=1)
        self.enc5 = Shell(4 * unit, 4 * unit, 3, padding=1)
        self.enc6 = Shell(4 * unit, 4 * unit, 3, padding=1)

    def forward(self, x):
        for n in range(1, 7):
            x = getattr(self, f"enc{n}")(x)
        return x


class Neck(nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.dilation_convs = nn.Sequential(
            *(Shell(4 * unit, 4 * unit, 3, padding=rate, dilation=rate) for rate in (2, 4, 8, 16))
        )

    def forward(self, x):
        return self.dilation_convs(x)


class Decoder(nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.dec1 = Shell(4 * unit, 4 * unit, 3, padding=1)
        self.dec2 = Shell(4 * unit, 4 * unit, 3, padding=1)
        self.dec3 = Shell(4 * unit, 2 * unit, 4, stride=2, padding=1, deconv=True)
        self.dec4 = Shell(2 * unit, 2 * unit, 3, padding=1)
        self.dec5 = Shell(2 * unit, unit, 4, stride=2, padding=1, deconv=True)
        self.dec6 = Shell(unit, unit // 2, 3, padding=1)
        self.dec7 = Shell(unit // 2, 3, 3, padding=1, norm=False, act=None)

    def forward(self, x):
        for n in range(1, 8):
            x = getattr(self, f"dec{n}")(x)
        return x.clamp(-1, 1)


class EncoderDecoder(nn.Module):
    def __init__(self, unit=64):
        super().__init__()
        self.encoder = Encoder(unit)
        self.decoder = Decoder(unit)
        self.dilation_neck = Neck(unit)

    def forward(self, x):
        return self.decoder(self.dilation_neck(self.encoder(x)))


class Inpaintor(nn.Module):
    """The application's shell: a generator beside its discriminator, image and mask in [-1, 1] and {0, 1}."""

    def __init__(self, unit=64):
        super().__init__()
        self.generator = EncoderDecoder(unit)
        self.disc = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.Flatten())

    def forward(self, image, mask):
        filled = self.generator(torch.cat([image * (1 - mask), mask], 1))
        return filled * mask + image * (1 - mask)

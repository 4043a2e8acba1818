"""LaMa as strangers write it: other class names, gates that are the number 1, missing streams that are the number 0.

Written for these tests, in the shape that public copies have: it loads the same state dicts, multiplies by one and adds
zero where they do, and has their options. Adapters must recognise it without ever having seen its classes.
"""

from __future__ import annotations

import torch
from torch import nn


class Spectrum(nn.Module):
    def __init__(self, width, fft_norm="ortho"):
        super().__init__()
        self.conv_layer = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(True)
        self.use_se = False
        self.spatial_scale_factor = None
        self.spectral_pos_encoding = False
        self.ffc3d = False
        self.fft_norm = fft_norm

    def forward(self, x):
        size = x.shape[-2:]
        f = torch.fft.rfftn(x, dim=(-2, -1), norm=self.fft_norm)
        f = torch.stack((f.real, f.imag), dim=-1).permute(0, 1, 4, 2, 3).contiguous()
        f = f.view(x.size(0), -1, *f.shape[3:])
        f = self.relu(self.bn(self.conv_layer(f)))
        f = f.view(x.size(0), -1, 2, *f.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
        return torch.fft.irfftn(torch.complex(f[..., 0], f[..., 1]), s=size, dim=(-2, -1), norm=self.fft_norm)


class Spectral(nn.Module):
    def __init__(self, c_in, c_out, lfu=False, **options):
        super().__init__()
        self.enable_lfu = lfu
        self.downsample = nn.Identity()
        self.conv1 = nn.Sequential(
            nn.Conv2d(c_in, c_out // 2, 1, bias=False), nn.BatchNorm2d(c_out // 2), nn.ReLU(True)
        )
        self.fu = Spectrum(c_out // 2, **options)
        if lfu:
            self.lfu = Spectrum(c_out // 2)
        self.conv2 = nn.Conv2d(c_out // 2, c_out, 1, bias=False)

    def forward(self, x):
        x = self.conv1(self.downsample(x))
        out = self.fu(x)
        local = self.lfu(x) if self.enable_lfu else 0
        return self.conv2(x + out + local)


class TwoStreams(nn.Module):
    def __init__(
        self, c_in, c_out, k, r_in, r_out, stride=1, padding=0, gated=False, padding_mode="reflect", **options
    ):
        super().__init__()
        gi, go = int(c_in * r_in), int(c_out * r_out)

        def conv(a, b):
            return (
                nn.Conv2d(a, b, k, stride, padding, bias=False, padding_mode=padding_mode) if a and b else nn.Identity()
            )

        self.ratio_gin, self.ratio_gout, self.global_in_num, self.gated = r_in, r_out, gi, gated
        self.convl2l, self.convl2g = conv(c_in - gi, c_out - go), conv(c_in - gi, go)
        self.convg2l = conv(gi, c_out - go)
        self.convg2g = Spectral(gi, go, **options) if gi and go else nn.Identity()
        self.gate = nn.Conv2d(c_in, 2, 1) if gated else nn.Identity()

    def forward(self, x):
        local, wide = x if isinstance(x, tuple) else (x, 0)
        gate_a = gate_b = 1
        if self.gated:
            gates = torch.sigmoid(self.gate(torch.cat([t for t in (local, wide) if torch.is_tensor(t)], 1)))
            gate_a, gate_b = gates.chunk(2, 1)
        out_l, out_g = 0, 0
        if self.ratio_gout != 1:
            out_l = self.convl2l(local) + self.convg2l(wide) * gate_a
        if self.ratio_gout != 0:
            out_g = self.convl2g(local) * gate_b + self.convg2g(wide)
        return out_l, out_g


class Layer(nn.Module):
    def __init__(self, c_in, c_out, k, r_in, r_out, act=nn.ReLU, **options):
        super().__init__()
        self.ffc = TwoStreams(c_in, c_out, k, r_in, r_out, **options)
        go = int(c_out * r_out)
        self.bn_l = nn.Identity() if r_out == 1 else nn.BatchNorm2d(c_out - go)
        self.bn_g = nn.Identity() if r_out == 0 else nn.BatchNorm2d(go)
        self.act_l = nn.Identity() if r_out == 1 else act(inplace=True)
        self.act_g = nn.Identity() if r_out == 0 else act(inplace=True)

    def forward(self, x):
        local, wide = self.ffc(x)
        return self.act_l(self.bn_l(local)), self.act_g(self.bn_g(wide))


class Residual(nn.Module):
    def __init__(self, c, ratio, inline=False, **options):
        super().__init__()
        self.conv1 = Layer(c, c, 3, ratio, ratio, padding=1, **options)
        self.conv2 = Layer(c, c, 3, ratio, ratio, padding=1, **options)
        self.inline = inline

    def forward(self, x):
        local, wide = self.conv2(self.conv1(x))
        return x[0] + local, x[1] + wide


class Join(nn.Module):
    def forward(self, x):
        return torch.cat([t for t in x if torch.is_tensor(t)], 1)


class Wrapper(nn.Module):
    """A generator under another name, inside an application's own module."""

    def __init__(self, width=8, blocks=2, ratio=0.75, act=nn.ReLU, **options):
        super().__init__()
        shared = nn.ReLU(True)
        layers = [nn.ReflectionPad2d(3), Layer(4, width, 7, 0, 0)]
        layers += [
            Layer(width << i, width << i + 1, 3, 0, ratio if i == 2 else 0, stride=2, padding=1) for i in range(3)
        ]
        layers += [Residual(8 * width, ratio, act=act, **options) for _ in range(blocks)]
        layers += [Join()]
        for i in (3, 2, 1):
            layers += [
                nn.ConvTranspose2d(width << i, width << i - 1, 3, 2, 1, output_padding=1),
                nn.BatchNorm2d(width << i - 1),
                shared,
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Sigmoid()]
        self.generator = nn.Module()
        self.generator.model = nn.Sequential(*layers)

    def forward(self, image, mask):
        x = torch.cat([image * (1 - mask), mask], 1)
        return mask * self.generator.model(x) + (1 - mask) * image

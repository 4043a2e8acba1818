"""LaMa as strangers write it: other class names, gates that are the number 1, missing streams that are the number 0.

Written for these tests, in the shapes that public copies have: they load the same state dicts, multiply by one and add
zero where those do, and have their options. Adapters must recognise them without ever having seen the classes.

`Wrapper` keeps its layers in a Sequential, as LaMa does; `Listed` in a ModuleList; `Wired` names each, in the manner of
ZITS (biased convolutions, zero padding where it strides, blocks of one tensor, features added between layers, tanh);
`Skip` is a block of FcF's kind (no norms, local Fourier unit, three residuals).
"""

from __future__ import annotations

import torch
from torch import nn


def norm_or_not(width, norm):
    return [nn.BatchNorm2d(width)] if norm else []


class Spectrum(nn.Module):
    def __init__(self, width, fft_norm="ortho", norm=True, conv_bias=False):
        super().__init__()
        self.conv_layer = nn.Conv2d(2 * width, 2 * width, 1, bias=conv_bias)
        if norm:
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
        f = self.conv_layer(f)
        f = self.relu(self.bn(f) if hasattr(self, "bn") else f)
        f = f.view(x.size(0), -1, 2, *f.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
        return torch.fft.irfftn(torch.complex(f[..., 0], f[..., 1]), s=size, dim=(-2, -1), norm=self.fft_norm)


class Spectral(nn.Module):
    def __init__(self, c_in, c_out, lfu=False, stride=1, norm=True, columns_by_width=False, **options):
        super().__init__()
        half = c_out // 2
        self.enable_lfu, self.columns_by_width = lfu, columns_by_width
        self.downsample = nn.AvgPool2d(kernel_size=(2, 2), stride=2) if stride == 2 else nn.Identity()
        self.conv1 = nn.Sequential(nn.Conv2d(c_in, half, 1, bias=False), *norm_or_not(half, norm), nn.ReLU(True))
        self.fu = Spectrum(half, norm=norm, **options)
        if lfu:
            self.lfu = Spectrum(half, norm=norm)
        self.conv2 = nn.Conv2d(half, c_out, 1, bias=False)

    def forward(self, x):
        x = self.conv1(self.downsample(x))
        out = self.fu(x)
        local = 0
        if self.enable_lfu:
            c, h, w = x.shape[1:]
            parts = torch.cat(torch.split(x[:, : c // 4], h // 2, dim=-2), 1).contiguous()
            parts = torch.cat(torch.split(parts, (w if self.columns_by_width else h) // 2, dim=-1), 1).contiguous()
            local = self.lfu(parts).repeat(1, 1, 2, 2).contiguous()
        return self.conv2(x + out + local)


class TwoStreams(nn.Module):
    def __init__(
        self, c_in, c_out, k, r_in, r_out, stride=1, padding=0, dilation=1, bias=False, gated=False,
        padding_mode="reflect", **options,
    ):  # fmt: skip
        super().__init__()
        gi, go = int(c_in * r_in), int(c_out * r_out)

        def conv(a, b):
            if not a or not b:
                return nn.Identity()
            return nn.Conv2d(a, b, k, stride, padding, dilation, bias=bias, padding_mode=padding_mode)

        self.ratio_gin, self.ratio_gout, self.global_in_num = r_in, r_out, gi
        if gated is not None:
            self.gated = gated
        self.convl2l, self.convl2g = conv(c_in - gi, c_out - go), conv(c_in - gi, go)
        self.convg2l = conv(gi, c_out - go)
        self.convg2g = Spectral(gi, go, stride=stride, **options) if gi and go else nn.Identity()
        self.gate = nn.Conv2d(c_in, 2, 1) if gated else nn.Identity()

    def forward(self, x):
        local, wide = x if isinstance(x, tuple) else (x, 0)
        gate_a = gate_b = 1
        if getattr(self, "gated", False):
            gates = torch.sigmoid(self.gate(torch.cat([t for t in (local, wide) if torch.is_tensor(t)], 1)))
            gate_a, gate_b = gates.chunk(2, 1)
        out_l, out_g = 0, 0
        if self.ratio_gout != 1:
            out_l = self.convl2l(local) + self.convg2l(wide) * gate_a
        if self.ratio_gout != 0:
            out_g = self.convl2g(local) * gate_b + self.convg2g(wide)
        return out_l, out_g


class Layer(nn.Module):
    def __init__(self, c_in, c_out, k, r_in, r_out, act=nn.ReLU, norm=True, **options):
        super().__init__()
        self.ffc = TwoStreams(c_in, c_out, k, r_in, r_out, norm=norm, **options)
        go = int(c_out * r_out)
        self.bn_l = nn.Identity() if r_out == 1 or not norm else nn.BatchNorm2d(c_out - go)
        self.bn_g = nn.Identity() if r_out == 0 or not norm else nn.BatchNorm2d(go)
        self.act_l = nn.Identity() if r_out == 1 else act(inplace=True)
        self.act_g = nn.Identity() if r_out == 0 else act(inplace=True)

    def forward(self, x):
        local, wide = self.ffc(x)
        return self.act_l(self.bn_l(local)), self.act_g(self.bn_g(wide))


class Residual(nn.Module):
    def __init__(self, c, ratio, inline=False, dilation=1, **options):
        super().__init__()
        self.conv1 = Layer(c, c, 3, ratio, ratio, padding=dilation, dilation=dilation, **options)
        self.conv2 = Layer(c, c, 3, ratio, ratio, padding=dilation, dilation=dilation, **options)
        self.inline = inline

    def forward(self, x):
        if self.inline:
            n = self.conv1.ffc.global_in_num
            x = x[:, :-n], x[:, -n:]
        local, wide = self.conv2(self.conv1(x))
        out = x[0] + local, x[1] + wide
        return torch.cat(out, 1) if self.inline else out


class OneTensor(nn.Module):
    """An inline block that has no option of that name."""

    def __init__(self, c, ratio, **options):
        super().__init__()
        self.conv1 = Layer(c, c, 3, ratio, ratio, padding=1, **options)
        self.conv2 = Layer(c, c, 3, ratio, ratio, padding=1, **options)
        self.n_wide = int(c * ratio)

    def forward(self, x):
        streams = x[:, : -self.n_wide], x[:, -self.n_wide :]
        return x + torch.cat(self.conv2(self.conv1(streams)), 1)


class BareLayer(nn.Module):
    """FFC and activations without so much as a place for norms."""

    def __init__(self, c, ratio, **options):
        super().__init__()
        self.ffc = TwoStreams(c, c, 3, ratio, ratio, padding=1, norm=False, **options)
        self.act_l = nn.ReLU(True)
        self.act_g = nn.ReLU(True)

    def forward(self, x):
        local, wide = self.ffc(x)
        return self.act_l(local), self.act_g(wide)


class BareResidual(nn.Module):
    def __init__(self, c, ratio, **options):
        super().__init__()
        self.conv1, self.conv2 = BareLayer(c, ratio, **options), BareLayer(c, ratio, **options)

    def forward(self, x):
        local, wide = self.conv2(self.conv1(x))
        return x[0] + local, x[1] + wide


class Skip(nn.Module):
    """In the manner of FcF: no norms, local Fourier units, and the input added three times, on one tensor."""

    def __init__(self, c=32, ratio=0.75):
        super().__init__()
        self.block = BareResidual(c, ratio, lfu=True)
        self.n_wide = int(c * ratio)

    def forward(self, x):
        local, wide = x[:, : -self.n_wide], x[:, -self.n_wide :]
        inner_l, inner_g = self.block((local, wide))
        return torch.cat([local + inner_l, wide + inner_g], 1) + x


class Join(nn.Module):
    def forward(self, x):
        return torch.cat([t for t in x if torch.is_tensor(t)], 1)


def generator_layers(width=8, blocks=2, ratio=0.75, depth=3, end=(nn.Sigmoid,), joined_first=False, **options):
    """The layers of a generator in order; `joined_first`: its blocks take one tensor, so the streams are joined before."""
    shared, norm = nn.ReLU(True), options.get("norm", True)
    plain = {k: v for k, v in options.items() if k in ("act", "norm", "bias", "padding_mode")}
    layers = [nn.ReflectionPad2d(3), Layer(4, width, 7, 0, 0, **plain)]
    for i in range(depth):
        last = i == depth - 1
        layers += [Layer(width << i, width << i + 1, 3, 0, ratio if last else 0, stride=2, padding=1, **plain)]
    middle = [Residual(width << depth, ratio, inline=joined_first, **options) for _ in range(blocks)]
    layers += [Join(), *middle] if joined_first else [*middle, Join()]
    for i in range(depth, 0, -1):
        layers += [nn.ConvTranspose2d(width << i, width << i - 1, 3, 2, 1, output_padding=1)]
        layers += [*norm_or_not(width << i - 1, norm), shared]
    return [*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), *(act() for act in end)]


class Wrapper(nn.Module):
    """A generator under another name, inside an application's own module."""

    def __init__(self, **options):
        super().__init__()
        self.generator = nn.Module()
        self.generator.model = nn.Sequential(*generator_layers(**options))

    def forward(self, image, mask):
        x = torch.cat([image * (1 - mask), mask], 1)
        return mask * self.generator.model(x) + (1 - mask) * image


class Listed(nn.Module):
    """The layers in a list, called in a loop: nothing to swap as a whole."""

    def __init__(self, **options):
        super().__init__()
        self.steps = nn.ModuleList(generator_layers(**options))

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Wired(nn.Module):
    """In the manner of ZITS: plain biased convolutions around blocks of one tensor, and features from elsewhere."""

    def __init__(self, width=8, blocks=2):
        super().__init__()
        self.pad = nn.ReflectionPad2d(3)
        self.conv1, self.bn1 = nn.Conv2d(4, width, 7), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width)
        self.conv3, self.bn3 = nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.BatchNorm2d(4 * width)
        self.middle = nn.Sequential(*(OneTensor(4 * width, 0.75, bias=True) for _ in range(blocks)))
        self.up1, self.bn4 = nn.ConvTranspose2d(4 * width, 2 * width, 3, 2, 1, 1), nn.BatchNorm2d(2 * width)
        self.up2, self.bn5 = nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 3, 7)
        self.alpha = nn.Parameter(torch.full((), 0.3))

    def forward(self, x, features=None):
        x = torch.relu(self.bn1(self.conv1(self.pad(x))))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        x = self.middle(x if features is None else x + self.alpha * features)
        x = torch.relu(self.bn4(self.up1(x)))
        x = torch.relu(self.bn5(self.up2(x)))
        return (torch.tanh(self.last(self.pad(x))) + 1) / 2

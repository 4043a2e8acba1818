"""StyleGAN 2's layers as strangers hold them, under three sets of names, written anew from a description of what they compute.

- NVIDIA's, of which FcF and MI-GAN's Co-ModGAN are built: one module per layer, noise by a mode, clamp and gain.
- MAT's: the modulated convolution is a module inside the layer, pictures are added up in it, and some layers follow a mask.
- Ports that nest small modules: a blur, a convolution, noise, an activation with its bias.

and MI-GAN's separable convolutions. None of it is the library's: resampling is a depthwise convolution as everywhere.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

TAPS = (1.0, 3.0, 3.0, 1.0)


def binomial():
    line = torch.tensor(TAPS)
    return torch.outer(line, line) / 64


def filtered(x, taps, up=1, down=1, pads=(0, 0), gain=1.0):
    """Zeros between pixels, zeros around them, true convolution of each channel, every `down`-th pixel."""
    b, c, h, w = x.shape
    if up > 1:
        grid = x.new_zeros(b, c, h, up, w, up)
        grid[:, :, :, 0, :, 0] = x
        x = grid.reshape(b, c, h * up, w * up)
    x = F.pad(x, (pads[0], pads[1], pads[0], pads[1]))
    kernel = (taps.flip([0, 1]) * gain).to(x.dtype)[None, None].repeat(c, 1, 1, 1)
    return F.conv2d(x, kernel, stride=down, groups=c)


def resampling_convolution(x, weight, taps, up=1, down=1, groups=1, convolves=False):
    """`convolves`: with the kernel mirrored."""
    k = weight.shape[-1]
    if convolves:
        weight = weight.flip([2, 3])
    if down == 2 and k == 1:
        return F.conv2d(filtered(x, taps, down=2, pads=(1, 1)), weight, groups=groups)
    if down == 2:
        return F.conv2d(filtered(x, taps, pads=(k // 2 + 1, k // 2 + 1)), weight, stride=2, groups=groups)
    if up == 2 and k == 1:
        return filtered(F.conv2d(x, weight, groups=groups), taps, up=2, pads=(2, 1), gain=4.0)
    if up == 2:
        o, i = weight.shape[0] // groups, weight.shape[1]
        across = weight.reshape(groups, o, i, k, k).transpose(1, 2).reshape(groups * i, o, k, k).flip([2, 3])
        y = F.conv_transpose2d(x, across, stride=2, groups=groups)
        return filtered(y, taps, pads=(2 - k // 2, 2 - k // 2), gain=4.0)
    return F.conv2d(x, weight, padding=k // 2, groups=groups)


def bias_act(x, bias=None, act="linear", gain=None, clamp=None, dim=1):
    if bias is not None:
        x = x + bias.to(x.dtype).reshape([-1 if n == dim else 1 for n in range(x.dim())])
    known = {"linear": (lambda t: t, 1.0), "lrelu": (lambda t: F.leaky_relu(t, 0.2), 2**0.5), "relu": (F.relu, 2**0.5)}
    function, usual = known[act]
    x = function(x) * (usual if gain is None else gain)
    return x if clamp is None else x.clamp(-clamp, clamp)


class FullyConnectedLayer(nn.Module):
    def __init__(self, in_features, out_features, activation="linear", lr_multiplier=1.0, bias_init=0.0):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init)))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x):
        y = x.matmul((self.weight * self.weight_gain).t().to(x.dtype))
        return bias_act(y, self.bias * self.bias_gain, self.activation)


# ---- NVIDIA's names -------------------------------------------------------------------------------------------------


class Conv2dLayer(nn.Module):
    def __init__(
        self, in_channels, out_channels, kernel_size=3, bias=True, activation="lrelu", up=1, down=1, conv_clamp=None
    ):
        super().__init__()
        self.activation, self.up, self.down, self.conv_clamp = activation, up, down, conv_clamp
        self.register_buffer("resample_filter", binomial())
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = 1.0 if activation == "linear" else 2**0.5
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x, gain=1):
        y = resampling_convolution(
            x, self.weight * self.weight_gain, self.resample_filter, self.up, self.down, convolves=self.up > 1
        )
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(y, self.bias, self.activation, self.act_gain * gain, clamp)


def modulated(x, weight, styles, taps, up=1, demodulate=True, fused=True, convolves=False):
    b, i = styles.shape
    w = weight[None] * styles[:, None, :, None, None]
    scale = (w.square().sum([2, 3, 4]) + 1e-8).rsqrt() if demodulate else styles.new_ones(b, len(weight))
    if not fused:
        y = resampling_convolution(x * styles.view(b, i, 1, 1), weight, taps, up, convolves=convolves)
        return y * scale.view(b, -1, 1, 1)
    w = (w * scale.view(b, -1, 1, 1, 1)).reshape(-1, *weight.shape[1:])
    y = resampling_convolution(x.reshape(1, -1, *x.shape[2:]), w, taps, up, groups=b, convolves=convolves)
    return y.reshape(b, -1, *y.shape[2:])


class SynthesisLayer(nn.Module):
    """`adds_bias` False: FcF's, which holds a bias and leaves it out. `normalises`: MI-GAN's Co-ModGAN."""

    adds_bias, normalises = True, False

    def __init__(
        self, in_channels, out_channels, w_dim, resolution, up=1, use_noise=True, conv_clamp=None, activation="lrelu"
    ):
        super().__init__()
        self.in_channels, self.resolution, self.up, self.use_noise = in_channels, resolution, up, use_noise
        self.activation, self.conv_clamp, self.act_gain = activation, conv_clamp, 2**0.5
        self.register_buffer("resample_filter", binomial())
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x, w, noise_mode="random", fused_modconv=True, gain=1):
        assert noise_mode in ("random", "const", "none")
        side = self.resolution // self.up
        assert list(x.shape[1:]) == [self.in_channels, side, side]
        styles, weight = self.affine(w), self.weight
        if self.normalises:
            weight = weight * weight.square().mean([1, 2, 3], keepdim=True).rsqrt()
            styles = styles * styles.square().mean().rsqrt()
        noise = None
        if self.use_noise and noise_mode == "random":
            noise = torch.randn([len(x), 1, self.resolution, self.resolution], device=x.device) * self.noise_strength
        if self.use_noise and noise_mode == "const":
            noise = self.noise_const * self.noise_strength
        gained = weight if self.normalises else weight / math.sqrt(self.weight[0].numel())
        y = modulated(x, gained, styles, self.resample_filter, self.up, fused=fused_modconv, convolves=self.up > 1)
        if noise is not None:
            y = y.add_(noise)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        bias = self.bias if self.adds_bias else None
        return bias_act(y, bias, self.activation, self.act_gain * gain, clamp)


class BiaslessLayer(SynthesisLayer):
    adds_bias = False


class NormalisingLayer(SynthesisLayer):
    normalises = True


class ToRGBLayer(nn.Module):
    def __init__(self, in_channels, out_channels, w_dim, kernel_size=1, conv_clamp=None):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x, w, fused_modconv=True):
        styles = self.affine(w) * self.weight_gain
        y = modulated(x, self.weight, styles, None, demodulate=False, fused=fused_modconv)
        return bias_act(y, self.bias, clamp=self.conv_clamp)


# ---- MAT's ----------------------------------------------------------------------------------------------------------


class ModulatedConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, style_dim, demodulate=True, up=1):
        super().__init__()
        self.demodulate, self.up = demodulate, up
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel_size, kernel_size))
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.register_buffer("resample_filter", binomial())
        self.affine = FullyConnectedLayer(style_dim, in_channels, bias_init=1)

    def forward(self, x, style):
        weight = self.weight[0] * self.weight_gain
        return modulated(x, weight, self.affine(style), self.resample_filter, self.up, self.demodulate)


class StyleConv(nn.Module):
    def __init__(self, in_channels, out_channels, style_dim, resolution, up=1, use_noise=False, activation="lrelu"):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, style_dim, up=up)
        self.use_noise, self.resolution, self.activation, self.conv_clamp = use_noise, resolution, activation, None
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.act_gain = 2**0.5

    def forward(self, x, style, noise_mode="random", gain=1):
        y = self.conv(x, style)
        if self.use_noise:
            if noise_mode == "random":
                noise = torch.randn([len(y), 1, *y.shape[2:]], device=y.device) * self.noise_strength
            if noise_mode == "const":
                noise = self.noise_const * self.noise_strength
            y = y + noise  # fails where there is no such mode
        return bias_act(y, self.bias, self.activation, self.act_gain * gain, self.conv_clamp)


class ToRGB(nn.Module):
    def __init__(self, in_channels, out_channels, style_dim, kernel_size=1):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, kernel_size, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", binomial())
        self.conv_clamp = None

    def forward(self, x, style, skip=None):
        y = bias_act(self.conv(x, style), self.bias, clamp=self.conv_clamp)
        if skip is None:
            return y
        if skip.shape != y.shape:
            skip = filtered(skip, self.resample_filter, up=2, pads=(2, 1), gain=4.0)
        return y + skip


class Conv2dLayerPartial(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=3, activation="lrelu", up=1, down=1):
        super().__init__()
        self.conv = Conv2dLayer(in_channels, out_channels, kernel_size, activation=activation, up=up, down=down)
        self.counter = torch.ones(1, 1, kernel_size, kernel_size)  # no buffer
        self.window, self.stride, self.padding = kernel_size**2, down, kernel_size // 2

    def forward(self, x, mask=None):
        y = self.conv(x)
        if mask is None:
            return y, None
        with torch.no_grad():
            if self.counter.type() != mask.type():
                self.counter = self.counter.to(mask)
            covered = F.conv2d(mask, self.counter, stride=self.stride, padding=self.padding)
            ratio = self.window / (covered + 1e-8)
            covered = covered.clamp(0, 1)
            ratio = ratio * covered
        return y * ratio, covered


# ---- ports of small modules -----------------------------------------------------------------------------------------


class Blur(nn.Module):
    def __init__(self, pads, gain=1.0):
        super().__init__()
        self.register_buffer("kernel", binomial() * gain)
        self.pads = pads

    def forward(self, x):
        return filtered(x, self.kernel, pads=self.pads)


class EqualConv2d(nn.Module):
    def __init__(self, inputs, outputs, kernel_size, stride=1, padding=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.scale = 1 / math.sqrt(inputs * kernel_size**2)
        self.stride, self.padding = stride, padding
        self.bias = None

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


class FusedLeakyReLU(nn.Module):
    def __init__(self, channels, negative_slope=0.2, scale=2**0.5):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.negative_slope, self.scale = negative_slope, scale

    def forward(self, x):
        return F.leaky_relu(x + self.bias.view(1, -1, 1, 1), self.negative_slope) * self.scale


class ConvLayer(nn.Sequential):
    def __init__(self, inputs, outputs, kernel_size, downsample=False):
        blur = [Blur((2, 2))] if downsample else []
        stride, padding = (2, 0) if downsample else (1, kernel_size // 2)
        super().__init__(*blur, EqualConv2d(inputs, outputs, kernel_size, stride, padding), FusedLeakyReLU(outputs))


class EqualLinear(nn.Module):
    def __init__(self, inputs, outputs, bias_init=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.full([outputs], bias_init))
        self.scale = 1 / math.sqrt(inputs)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class PortModulatedConv2d(nn.Module):
    def __init__(self, inputs, outputs, kernel_size, style_dim, demodulate=True, upsample=False):
        super().__init__()
        self.upsample, self.demodulate, self.padding = upsample, demodulate, kernel_size // 2
        if upsample:
            self.blur = Blur((1, 1), 4.0)
        self.scale = 1 / math.sqrt(inputs * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, inputs, 1.0)

    def forward(self, x, style):
        b, i, h, w = x.shape
        weight = self.scale * self.weight * self.modulation(style).view(b, 1, i, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        k, x = weight.shape[-1], x.view(1, b * i, h, w)
        if self.upsample:
            weight = weight.transpose(1, 2).reshape(b * i, -1, k, k)
            y = F.conv_transpose2d(x, weight, stride=2, groups=b)
            return self.blur(y.view(b, -1, *y.shape[2:]))
        y = F.conv2d(x, weight.view(-1, i, k, k), padding=self.padding, groups=b)
        return y.view(b, -1, *y.shape[2:])


class NoiseInjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, noise=None):
        if noise is None:
            noise = x.new_empty(len(x), 1, *x.shape[2:]).normal_()
        return x + self.weight * noise


class StyledConv(nn.Module):
    def __init__(self, inputs, outputs, kernel_size, style_dim, upsample=False):
        super().__init__()
        self.conv = PortModulatedConv2d(inputs, outputs, kernel_size, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(outputs)

    def forward(self, x, style, noise=None):
        return self.activate(self.noise(self.conv(x, style), noise=noise))


class Upsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", binomial() * 4)

    def forward(self, x):
        return filtered(x, self.kernel, up=2, pads=(2, 1))


class PortToRGB(nn.Module):
    def __init__(self, inputs, style_dim, upsample=True):
        super().__init__()
        if upsample:
            self.upsample = Upsample()
        self.conv = PortModulatedConv2d(inputs, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x, style, skip=None):
        y = self.conv(x, style) + self.bias
        return y if skip is None else y + self.upsample(skip)


# ---- MI-GAN ---------------------------------------------------------------------------------------------------------


class LeakyReLUWithGain(nn.Module):
    def __init__(self, gain=2**0.5, clamp=256):
        super().__init__()
        self.gain, self.clamp = gain, clamp

    def forward(self, x):
        return (F.leaky_relu(x, 0.2) * self.gain).clamp(-self.clamp, self.clamp)


class Downsample2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.filter = nn.Conv2d(channels, channels, 4, stride=2, padding=1, groups=channels, bias=False)
        self.filter.weight.data.copy_(binomial())

    def forward(self, x):
        return self.filter(x)


class Upsample2d(nn.Module):
    def __init__(self, channels, resolution):
        super().__init__()
        kept = torch.zeros(1, 1, resolution, resolution)
        kept[..., ::2, ::2] = 1
        self.register_buffer("filter_const", kept)
        self.nearest = nn.Upsample(scale_factor=2, mode="nearest")
        self.filter = nn.Conv2d(channels, channels, 4, groups=channels, bias=False)
        self.filter.weight.data.copy_(binomial() * 4)

    def forward(self, x):
        return self.filter(F.pad(self.nearest(x) * self.filter_const, (2, 1, 2, 1)))


class SeparableConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, resolution=None, use_noise=False, up=1, down=1):
        super().__init__()
        self.use_noise = use_noise
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.activation = LeakyReLUWithGain()
        self.downsample = Downsample2d(in_channels) if down == 2 else None
        self.upsample = Upsample2d(out_channels, resolution) if up == 2 else None
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))

    def forward(self, x):
        x = self.activation(self.conv1(x))
        x = self.conv2(x if self.downsample is None else self.downsample(x))
        if self.upsample is not None:
            x = self.upsample(x)
        if self.use_noise:
            x = x.add_(self.noise_const * self.noise_strength)
        return self.activation(x)


class _EncoderBlock(nn.Module):
    def __init__(self, inputs, outputs, first, down):
        super().__init__()
        if first:
            self.fromrgb, self.act = nn.Conv2d(4, inputs, 1), LeakyReLUWithGain()
        self.conv1 = SeparableConv2d(inputs, inputs)
        self.conv2 = SeparableConv2d(inputs, outputs, down=2 if down else 1)

    def forward(self, x):
        if hasattr(self, "fromrgb"):
            x = self.act(self.fromrgb(x))
        feature = self.conv1(x)
        return self.conv2(feature), feature


class _DecoderBlock(nn.Module):
    def __init__(self, inputs, outputs, resolution, up):
        super().__init__()
        self.conv1 = SeparableConv2d(inputs, outputs, resolution, up, 2 if up else 1)
        self.conv2 = SeparableConv2d(outputs, outputs, resolution, up)
        self.torgb = nn.Conv2d(outputs, 3, 1)
        if up:
            self.upsample = Upsample2d(3, resolution)

    def forward(self, x, feature, picture):
        x = self.conv2(self.conv1(x) + feature)
        y = self.torgb(x)
        return x, y if picture is None else self.upsample(picture) + y


class _Blocks(nn.Module):
    pass


class MIGANGenerator(nn.Module):
    def __init__(self, resolution=16, widths=(6, 8, 10)):
        super().__init__()
        self.encoder, self.synthesis = _Blocks(), _Blocks()
        self.sizes = [resolution >> n for n in range(len(widths))]
        below = [*widths[1:], widths[-1]]
        for n, r in enumerate(self.sizes):
            last = n == len(self.sizes) - 1
            setattr(self.encoder, f"b{r}", _EncoderBlock(widths[n], below[n], n == 0, not last))
            setattr(self.synthesis, f"b{r}", _DecoderBlock(below[n], widths[n], r, not last))

    def forward(self, x):
        features, picture = {}, None
        for r in self.sizes:
            x, features[r] = getattr(self.encoder, f"b{r}")(x)
        for r in reversed(self.sizes):
            x, picture = getattr(self.synthesis, f"b{r}")(x, features[r], picture)
        return picture

"""MAT as the applications vendor it, in the structure of the public code.

Written for these tests from a description of what that code computes, under other class names. Attributes have the public
names, since state dicts fix them; so does what a module is called with.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

# ---- layers of StyleGAN 2 -------------------------------------------------------------------------------------------

GAINS = {"linear": 1.0, "lrelu": math.sqrt(2.0)}


def activate(x, bias, kind, along=1):
    shape = [1] * x.dim()
    shape[along] = -1
    x = x + bias.to(x.dtype).reshape(shape)
    return F.leaky_relu(x, 0.2) * GAINS["lrelu"] if kind == "lrelu" else x


def lowpass(x, f, pads, gain=1.0, up=1, down=1):
    """Zeros between pixels, zeros around, the filter, every down-th pixel; pads: before and after, alike for both axes."""
    b, c, h, w = x.shape
    if up > 1:
        spread = x.new_zeros(b, c, h * up, w * up)
        spread[:, :, ::up, ::up] = x
        x = spread
    x = F.pad(x, (*pads, *pads))
    return F.conv2d(x, (f * gain).to(x.dtype)[None, None].repeat(c, 1, 1, 1), groups=c)[:, :, ::down, ::down]


def taps():
    one = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return one[:, None] * one


def convolve(x, weight, f, up=1, down=1, groups=1):
    pad = weight.shape[-1] // 2
    if up == 2:
        turned = torch.cat([part.transpose(0, 1) for part in weight.flip([2, 3]).chunk(groups)])
        return lowpass(F.conv_transpose2d(x, turned, stride=2, groups=groups), f, (1, 1), 4.0)
    if down == 2:
        return F.conv2d(lowpass(x, f, (pad + 1, pad + 1)), weight, stride=2, groups=groups)
    return F.conv2d(x, weight, padding=pad, groups=groups)


class Dense(nn.Module):
    def __init__(self, in_features, out_features, bias=True, activation="linear", lr_multiplier=1, bias_init=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x):
        w, b = self.weight * self.weight_gain, self.bias * self.bias_gain
        if self.activation == "linear" and x.dim() == 2:
            return torch.addmm(b[None], x, w.t())
        return activate(x @ w.t(), b, self.activation, x.dim() - 1)


class Conv(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, activation="lrelu", up=1, down=1):
        super().__init__()
        self.activation, self.up, self.down = activation, up, down
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", taps())
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x, gain=1):
        y = convolve(x, self.weight * self.weight_gain, self.resample_filter, self.up, self.down)
        return activate(y, self.bias, self.activation) * gain


class Modulated(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, style_dim, demodulate=True, up=1):
        super().__init__()
        self.demodulate, self.up = demodulate, up
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel_size, kernel_size))
        self.register_buffer("resample_filter", taps())
        self.affine = Dense(style_dim, in_channels, bias_init=1)
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x, style):
        b, c, h, w = x.shape
        weight = self.weight_gain * self.weight * self.affine(style).view(b, 1, c, 1, 1)
        if self.demodulate:
            weight = weight * (weight.pow(2).sum([2, 3, 4]) + 1e-8).rsqrt().view(b, -1, 1, 1, 1)
        y = convolve(x.reshape(1, -1, h, w), weight.flatten(0, 1), self.resample_filter, self.up, groups=b)
        return y.view(b, -1, *y.shape[2:])


class Styled(nn.Module):
    """What strangers call StyleConv."""

    def __init__(self, in_channels, out_channels, style_dim, resolution, use_noise=False, up=1):
        super().__init__()
        self.conv = Modulated(in_channels, out_channels, 3, style_dim, up=up)
        self.use_noise, self.resolution = use_noise, resolution
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.activation = "lrelu"

    def forward(self, x, style, noise_mode="random", gain=1):
        x = self.conv(x, style)
        if self.use_noise:
            if noise_mode == "random":
                noise = torch.randn([x.shape[0], 1, *x.shape[2:]], device=x.device) * self.noise_strength
            if noise_mode == "const":
                noise = self.noise_const * self.noise_strength
            x = x + noise  # unbound for any other mode, as in the public code
        return activate(x, self.bias, self.activation) * gain


class RGB(nn.Module):
    def __init__(self, in_channels, style_dim):
        super().__init__()
        self.conv = Modulated(in_channels, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("resample_filter", taps())

    def forward(self, x, style, skip=None):
        y = activate(self.conv(x, style), self.bias, "linear")
        if skip is None:
            return y
        if skip.shape != y.shape:
            skip = lowpass(skip, self.resample_filter, (2, 1), 4.0, up=2)
        return y + skip


# ---- the transformer ------------------------------------------------------------------------------------------------


class Partial(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, activation="lrelu", up=1, down=1):
        super().__init__()
        self.conv = Conv(in_channels, out_channels, kernel_size, activation, up, down)
        self.counter = torch.ones(1, 1, kernel_size, kernel_size)
        self.size, self.stride = kernel_size, down

    def forward(self, x, mask=None):
        x = self.conv(x)
        if mask is None:
            return x, None
        with torch.no_grad():
            self.counter = self.counter.to(mask)
            total = F.conv2d(mask, self.counter, stride=self.stride, padding=self.size // 2)
            mask = total.clamp(0, 1)
            ratio = self.size**2 / (total + 1e-8) * mask
        return x * ratio, mask


def as_map(x, size):
    return x.permute(0, 2, 1).reshape(len(x), -1, *size)


def as_tokens(x):
    return x.flatten(2).permute(0, 2, 1)


class Merging(nn.Module):
    """Both PatchMerging and PatchUpsampling."""

    def __init__(self, in_channels, out_channels, up=1, down=1):
        super().__init__()
        self.conv = Partial(in_channels, out_channels, 3, up=up, down=down)

    def forward(self, x, x_size, mask=None):
        x, mask = self.conv(as_map(x, x_size), None if mask is None else as_map(mask, x_size))
        return as_tokens(x), x.shape[2:], None if mask is None else as_tokens(mask)


def partition(x, window):
    """(B, H, W, C) → (B · windows, window, window, C)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window, window, c)


def departition(x, window, h, w):
    x = x.reshape(-1, h // window, w // window, window, window, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


class Attention(nn.Module):
    least = staticmethod(lambda x: 1e-12)
    """What a token's norm is at least."""

    def __init__(self, dim, window_size, num_heads):
        super().__init__()
        self.window_size, self.num_heads, self.scale = window_size, num_heads, (dim // num_heads) ** -0.5
        self.q, self.k, self.v, self.proj = (Dense(dim, dim) for _ in range(4))
        self.softmax = nn.Softmax(-1)

    def heads(self, x):
        return x.reshape(*x.shape[:2], self.num_heads, -1).permute(0, 2, 1, 3)

    def forward(self, x, mask_windows=None, mask=None):
        unit = F.normalize(x, dim=-1, eps=self.least(x))
        q, k, v = self.heads(self.q(unit)), self.heads(self.k(unit)).transpose(2, 3), self.heads(self.v(x))
        scores = (q @ k) * self.scale
        if mask is not None:
            n = len(mask)
            scores = (scores.view(-1, n, *scores.shape[1:]) + mask[None, :, None]).view(scores.shape)
        if mask_windows is not None:
            keys = mask_windows.squeeze(-1)[:, None, None, :]
            keys = torch.where(keys == 0, -100.0, torch.where(keys == 1, 0.0, keys))
            scores = scores + keys
            with torch.no_grad():
                mask_windows = mask_windows.sum(1, keepdim=True).clamp(0, 1).repeat(1, x.shape[1], 1)
        x = (self.softmax(scores) @ v).transpose(1, 2).reshape(x.shape)
        return self.proj(x), mask_windows


class PortedAttention(Attention):
    """As in the port whose least norm is the rounding unit of the dtype."""

    least = staticmethod(lambda x: torch.finfo(x.dtype).eps)


class OddAttention(Attention):
    """A stranger thing: twice the scores."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale *= 2


class Feed(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Dense(dim, hidden, activation="lrelu")
        self.fc2 = Dense(hidden, dim)

    def forward(self, x):
        return self.fc2(self.fc1(x))


class Block(nn.Module):
    """What strangers call SwinTransformerBlock."""

    attention = Attention

    def __init__(self, dim, input_resolution, num_heads, window_size=8, shift_size=0, mlp_ratio=2.0):
        super().__init__()
        if min(input_resolution) <= window_size:
            window_size, shift_size = min(input_resolution), 0
        self.input_resolution, self.window_size, self.shift_size = input_resolution, window_size, shift_size
        self.attn = self.attention(dim, window_size, num_heads)
        self.fuse = Dense(2 * dim, dim, activation="lrelu")
        self.mlp = Feed(dim, int(dim * mlp_ratio))
        self.register_buffer("attn_mask", self.strangers(input_resolution) if shift_size > 0 else None)

    def strangers(self, size):
        labels = torch.zeros(1, *size, 1)
        cuts = (slice(0, -self.window_size), slice(-self.window_size, -self.shift_size), slice(-self.shift_size, None))
        if self.shift_size:
            for i, rows in enumerate(cuts):
                for j, columns in enumerate(cuts):
                    labels[:, rows, columns] = 3 * i + j
        labels = partition(labels, self.window_size).flatten(1)
        apart = labels[:, None] - labels[:, :, None]
        return apart.masked_fill(apart != 0, -100.0)

    def forward(self, x, x_size, mask=None):
        h, w = x_size
        side, shift = self.window_size, self.shift_size

        def cut(t):
            t = t.reshape(len(t), h, w, -1)
            t = torch.roll(t, (-shift, -shift), (1, 2)) if shift else t
            return partition(t, side).flatten(1, 2)

        def join(t):
            t = departition(t, side, h, w)
            t = torch.roll(t, (shift, shift), (1, 2)) if shift else t
            return t.reshape(len(x), h * w, -1)

        stored = self.attn_mask if self.input_resolution == x_size else self.strangers(x_size).to(x.device)
        y, windows = self.attn(cut(x), None if mask is None else cut(mask), stored)
        y = self.mlp(self.fuse(torch.cat([x, join(y)], -1)))
        return y, None if mask is None else join(windows)


class PortedBlock(Block):
    attention = PortedAttention


class OddBlock(Block):
    attention = OddAttention


class Stage(nn.Module):
    """What strangers call BasicLayer."""

    def __init__(self, dim, input_resolution, depth, num_heads, window_size, downsample=None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(
            Block(dim, input_resolution, num_heads, window_size, window_size // 2 * (i % 2)) for i in range(depth)
        )
        self.conv = Partial(dim, dim, 3)

    def forward(self, x, x_size, mask=None):
        if self.downsample is not None:
            x, x_size, mask = self.downsample(x, x_size, mask)
        identity = x
        for block in self.blocks:
            x, mask = block(x, x_size, mask)
        x, mask = self.conv(as_map(x, x_size), None if mask is None else as_map(mask, x_size))
        return as_tokens(x) + identity, x_size, None if mask is None else as_tokens(mask)


class ToStyle(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Sequential(*(Conv(in_channels, in_channels, 3, down=2) for _ in range(3)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = Dense(in_channels, out_channels, activation="lrelu")

    def forward(self, x):
        return self.fc(self.pool(self.conv(x)).flatten(1))


class DecoderLevel(nn.Module):
    """What strangers call DecStyleBlock and DecBlock; the style of a layer is `pick`ed by the decoder around it."""

    def __init__(self, side, in_channels, out_channels, style_dim, use_noise):
        super().__init__()
        self.conv0 = Styled(in_channels, out_channels, style_dim, side, use_noise, up=2)
        self.conv1 = Styled(out_channels, out_channels, style_dim, side, use_noise)
        self.toRGB = RGB(out_channels, style_dim)

    def forward(self, x, img, styles, skip, noise_mode="random"):
        x = self.conv0(x, styles[0], noise_mode=noise_mode)
        x = x + skip
        x = self.conv1(x, styles[1], noise_mode=noise_mode)
        return x, self.toRGB(x, styles[2], skip=img)


class InPlaceLevel(DecoderLevel):
    """Writes to what its convolutions return, whole and in part."""

    def forward(self, x, img, styles, skip, noise_mode="random"):
        x = self.conv0(x, styles[0], noise_mode=noise_mode)
        x *= 0.5
        x.add_(skip).clamp_(-2, 2)
        x = self.conv1(x, styles[1], noise_mode=noise_mode)
        x[:, ::2] *= -1
        return x, self.toRGB(x, styles[2], skip=img)


def mixed(x, style):
    """A style where a draw says so."""
    draw = F.dropout(torch.ones_like(x) * 0.5, training=True)
    return x * draw + style * (1 - draw)


class First(nn.Module):
    """What strangers call FirstStage."""

    def __init__(self, img_resolution, dim, w_dim, use_noise=False):
        super().__init__()
        levels = int(math.log2(img_resolution)) - 6
        self.conv_first = Partial(4, dim, 3)
        self.enc_conv = nn.ModuleList(Partial(dim, dim, 3, down=2) for _ in range(levels))
        changes = [None, (1, 2), (1, 2), (2, 1), (2, 1)]
        self.tran = nn.ModuleList(
            Stage(dim, [side, side], depth, 6, window, change and Merging(dim, dim, *change))
            for side, depth, window, change in zip(
                (64, 32, 16, 32, 64), (2, 3, 4, 3, 2), (8, 16, 16, 16, 8), changes, strict=True
            )
        )
        self.down_conv = nn.Sequential(*(Conv(dim, dim, 3, down=2) for _ in range(4)), nn.AdaptiveAvgPool2d((1, 1)))
        self.to_style = Dense(dim, 2 * dim, activation="lrelu")
        self.ws_style = Dense(w_dim, dim, activation="lrelu")
        self.to_square = Dense(dim, 256, activation="lrelu")
        self.dec_conv = nn.ModuleList(DecoderLevel(64 << (i + 1), dim, dim, 3 * dim, use_noise) for i in range(levels))

    def forward(self, images_in, masks_in, ws, noise_mode="random"):
        x, mask = self.conv_first(torch.cat([masks_in - 0.5, images_in * masks_in], 1), masks_in)
        skips = [x]
        for i, conv in enumerate(self.enc_conv):
            x, mask = conv(x, mask)
            if i < len(self.enc_conv) - 1:
                skips.append(x)
        size = x.shape[-2:]
        x, mask = as_tokens(x), as_tokens(mask)
        mid, middle = [], len(self.tran) // 2
        for i, stage in enumerate(self.tran):
            if i < middle:
                x, size, mask = stage(x, size, mask)
                mid.append(x)
            elif i == middle:
                x, size, _ = stage(x, size, None)
                ws = self.ws_style(ws[:, -1])
                square = F.interpolate(self.to_square(ws)[:, None], size=x.shape[1], mode="linear", align_corners=False)
                x = mixed(x, square.permute(0, 2, 1))
                style = torch.cat([self.to_style(self.down_conv(as_map(x, size)).flatten(1)), ws], 1)
            else:
                x, size, _ = stage(x, size, None)
                x = x + mid.pop()
        x, img = as_map(x, size), None
        for level, skip in zip(self.dec_conv, reversed(skips), strict=True):
            x, img = level(x, img, [style] * 3, skip, noise_mode=noise_mode)
        return self.paste(img, images_in, masks_in)

    def paste(self, img, images_in, masks_in):
        return img * (1 - masks_in) + images_in * masks_in


class EncoderLevel(nn.Module):
    def __init__(self, in_channels, out_channels, first):
        super().__init__()
        self.conv0 = Conv(in_channels, out_channels, 1) if first else Conv(in_channels, out_channels, 3, down=2)
        self.conv1 = Conv(out_channels, out_channels, 3)

    def forward(self, x):
        return self.conv1(self.conv0(x))


class Encoder(nn.Module):
    def __init__(self, sides, width):
        super().__init__()
        for i, side in enumerate(sides):
            inputs = width(2 * side) if i else 7
            setattr(self, f"EncConv_Block_{side}x{side}", EncoderLevel(inputs, width(side), first=i == 0))

    def forward(self, x):
        out = {}
        for block in self.children():
            x = block(x)
            out[int(math.log2(x.shape[-1]))] = x
        return out


class LowestLevel(nn.Module):
    def __init__(self, side, channels, style_dim, use_noise):
        super().__init__()
        self.conv0 = Conv(channels, channels, 3)
        self.conv1 = Styled(channels, channels, style_dim, side, use_noise)
        self.toRGB = RGB(channels, style_dim)

    def forward(self, x, img, styles, skip, noise_mode="random"):
        x = self.conv1(self.conv0(x) + skip, styles[0], noise_mode=noise_mode)
        return x, self.toRGB(x, styles[1], skip=None)


class Decoder(nn.Module):
    def __init__(self, sides, width, style_dim, use_noise):
        super().__init__()
        self.sides = sides[::-1]
        for side in self.sides:
            level = (
                LowestLevel(side, width(side), style_dim, use_noise)
                if side == 16
                else DecoderLevel(side, width(side // 2), width(side), style_dim, use_noise)
            )
            setattr(self, f"Dec_{side}x{side}", level)

    def forward(self, x, ws, gs, features, noise_mode="random"):
        img, styles = None, [torch.cat([w, gs], 1) for w in ws.unbind(1)]
        for i, side in enumerate(self.sides):
            at = 2 * i - 1
            x, img = getattr(self, f"Dec_{side}x{side}")(
                x, img, styles[max(at, 0) :], features[4 + i], noise_mode=noise_mode
            )
        return img


class Synthesis(nn.Module):
    first = First

    def __init__(self, w_dim, img_resolution, dim=180, channel_max=512, use_noise=False):
        super().__init__()
        sides = [2**i for i in range(int(math.log2(img_resolution)), 3, -1)]

        def width(side):
            return min(channel_max, 64 * channel_max // side)

        self.num_ws = 2 * len(sides) + 2
        self.first_stage = self.first(img_resolution, dim, w_dim)
        self.enc = Encoder(sides, width)
        self.to_square = Dense(w_dim, 256, activation="lrelu")
        self.to_style = ToStyle(width(16), 2 * width(16))
        self.dec = Decoder(sides, width, w_dim + 2 * width(16), use_noise)

    def forward(self, images_in, masks_in, ws, noise_mode="random", return_stg1=False):
        coarse = self.first_stage(images_in, masks_in, ws, noise_mode=noise_mode)
        x = images_in * masks_in + coarse * (1 - masks_in)
        features = self.enc(torch.cat([masks_in - 0.5, x, images_in * masks_in], 1))
        x = features[4]
        square = self.to_square(ws[:, 0]).view(-1, 1, 16, 16)
        x = mixed(x, F.interpolate(square, size=x.shape[-2:], mode="bilinear", align_corners=False))
        features[4] = x
        img = self.dec(x, ws, self.to_style(x), features, noise_mode=noise_mode)
        img = self.paste(img, images_in, masks_in)
        return (img, coarse) if return_stg1 else img

    def paste(self, img, images_in, masks_in):
        return img * (1 - masks_in) + images_in * masks_in


class Mapping(nn.Module):
    def __init__(self, z_dim, w_dim, num_ws):
        super().__init__()
        self.num_ws = num_ws
        for i in range(8):
            setattr(self, f"fc{i}", Dense(w_dim if i else z_dim, w_dim, activation="lrelu", lr_multiplier=0.01))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, skip_w_avg_update=False):
        x = z.to(self.w_avg.dtype) * (z.pow(2).mean(1, keepdim=True) + 1e-8).rsqrt()
        for i in range(8):
            x = getattr(self, f"fc{i}")(x)
        x = x[:, None].repeat(1, self.num_ws, 1)
        if truncation_psi != 1:
            x[:, :truncation_cutoff] = self.w_avg.lerp(x[:, :truncation_cutoff], truncation_psi)
        return x


class Generator(nn.Module):
    synthesises = Synthesis

    def __init__(self, z_dim, w_dim, img_resolution, **options):
        super().__init__()
        self.z_dim = z_dim
        self.synthesis = self.synthesises(w_dim, img_resolution, **options)
        self.mapping = Mapping(z_dim, w_dim, self.synthesis.num_ws)

    def forward(
        self,
        images_in,
        masks_in,
        z,
        c,
        truncation_psi=1,
        truncation_cutoff=None,
        skip_w_avg_update=False,
        noise_mode="none",
        return_stg1=False,
    ):
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        if not return_stg1:
            return self.synthesis(images_in, masks_in, ws, noise_mode=noise_mode)
        return self.synthesis(images_in, masks_in, ws, noise_mode=noise_mode, return_stg1=True)


# ---- networks of the same parts that must not be taken for MAT ------------------------------------------------------


class Unpasted(First):
    """Its coarse image goes to the second stage whole."""

    def paste(self, img, images_in, masks_in):
        return img


class Reversed(Synthesis):
    """Its masks say 1 = hole at the end."""

    def paste(self, img, images_in, masks_in):
        return img * masks_in + images_in * (1 - masks_in)


class UnpastedSynthesis(Synthesis):
    first = Unpasted


class Averaged(Synthesis):
    """Its output depends on all of the decoder's."""

    def paste(self, img, images_in, masks_in):
        return super().paste(img - img.mean(), images_in, masks_in)

"""DeepFill as strangers write it: attention modules, gated convolutions and generators in the structures of public ports.

Written for these tests from descriptions of what the ports compute, under other class names. Attributes have the ports'
names, since state dicts and constructors fix them; what is not written in an attribute is in the code, and adapters must
find it out.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---- contextual attention -------------------------------------------------------------------------------------------


def windows(x, side, step, before, after):
    """(B, C, h, w) → (B, cells, C, side, side)."""
    b, c = x.shape[:2]
    columns = F.unfold(F.pad(x, (before, after, before, after)), side, stride=step)
    return columns.view(b, c, side, side, -1).permute(0, 4, 1, 2, 3)


def spread(scores, grid, kernel):
    """Sums along both diagonals of the matrix (1, 1, L, L), by convolution with the identity, in either order of lines."""
    rows, columns = grid
    pad = kernel.shape[-1] // 2
    for _ in range(2):
        scores = F.conv2d(scores, kernel, padding=pad)
        scores = scores.view(rows, columns, rows, columns).permute(1, 0, 3, 2).reshape_as(scores)
        rows, columns = columns, rows
    return scores


def colours(offsets):
    """A picture of offsets (B, 2, h, w), by way of numpy."""
    values = offsets.cpu().numpy().astype(np.float32)
    angle, length = np.arctan2(values[:, 0], values[:, 1]), np.hypot(values[:, 0], values[:, 1])
    length = length / max(1.0, length.max())
    picture = np.stack([np.cos(angle) * length, np.sin(angle) * length, length], 1)
    return torch.from_numpy((picture + 1) / 2)


class Attention(nn.Module):
    """What the ports share: a loop over samples, one convolution with as many filters as there are cells."""

    def __init__(self, ksize=3, stride=1, rate=2, fuse_k=3, softmax_scale=10.0, fuse=True):
        super().__init__()
        self.ksize, self.stride, self.rate = ksize, stride, rate
        self.fuse_k, self.softmax_scale, self.fuse = fuse_k, softmax_scale, fuse

    def kernel(self):
        return torch.eye(self.fuse_k).view(1, 1, self.fuse_k, self.fuse_k)  # made in each forward, in the default dtype

    def smaller(self, x, factor):
        return F.interpolate(x, scale_factor=1.0 / factor, mode="nearest")

    def cells(self, mask, f):
        return self.smaller(mask, 4 * self.rate)[:1]

    def lengths(self, patches):
        return (patches.square() + 1e-4).sum(dim=(1, 2, 3), keepdim=True).sqrt()

    def blend(self, scores, usable):
        weights = torch.softmax(scores * usable * self.softmax_scale, dim=1)
        return weights * usable

    def paste(self, weights, patches, shape):
        return F.conv_transpose2d(weights, patches, stride=self.rate, padding=1) / 4.0

    def attend(self, f, b, mask):
        grid = f.shape[2] // self.rate, f.shape[3] // self.rate
        raw = windows(b, 2 * self.rate, self.rate, 1, 1)
        few, many = self.smaller(f, self.rate), windows(self.smaller(b, self.rate), self.ksize, 1, 1, 1)
        holes = f.new_zeros(1, 1, *grid) if mask is None else self.cells(mask, f)
        outputs, all_weights = [], []
        for i in range(len(f)):
            hole = holes[min(i, len(holes) - 1)][None]
            usable = (windows(hole, self.ksize, 1, 1, 1).mean(dim=(2, 3, 4)) == 0).to(f.dtype).view(1, -1, 1, 1)
            keys = many[i] / self.lengths(many[i])
            scores = F.conv2d(few[i : i + 1], keys, padding=self.ksize // 2)
            if self.fuse:
                square = scores.view(1, 1, grid[0] * grid[1], grid[0] * grid[1])
                scores = spread(square, grid, self.kernel()).view(1, -1, *grid)
            weights = self.blend(scores, usable)
            outputs.append(self.paste(weights, raw[i], f.shape))
            all_weights.append(weights)
        return torch.cat(outputs), torch.cat(all_weights)

    def offsets(self, weights):
        rows, columns = weights.shape[2:]
        best = weights.argmax(1)
        own = torch.arange(rows * columns, device=best.device).view(rows, columns)
        return torch.stack([best // columns - own // columns, best % columns - own % columns], 1)

    def forward(self, f, b, mask=None):
        return self.attend(f, b, mask)[0]


class WithFlow(Attention):
    """In the manner of daa233: the flow picture at image size always comes along."""

    def __init__(self, *args, use_cuda=False, device_ids=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.use_cuda, self.device_ids = use_cuda, device_ids

    def forward(self, f, b, mask=None):
        out, weights = self.attend(f, b, mask)
        picture = colours(self.offsets(weights)).to(f)
        return out, F.interpolate(picture, scale_factor=self.rate * 4, mode="nearest")


class Maybe(Attention):
    """In the manner of nipponjo: a buffer for the identity, a floor under norms, the flow on request."""

    def __init__(self, *args, n_down=2, return_flow=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_down, self.return_flow = n_down, return_flow
        self.register_buffer("fuse_weight", torch.eye(self.fuse_k)[None, None])

    def kernel(self):
        return self.fuse_weight

    def cells(self, mask, f):
        return self.smaller(mask, 2**self.n_down * self.rate)[:1]

    def lengths(self, patches):
        return patches.square().sum(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-4)

    def forward(self, f, b, mask=None):
        out, weights = self.attend(f, b, mask)
        if not self.return_flow:
            return out, None
        picture = colours(self.offsets(weights)).to(f)
        return out, F.interpolate(picture, scale_factor=self.rate, mode="bilinear", align_corners=True)


class Aligned(Maybe):
    """Likewise in TensorFlow's sampling, as torch.linspace rounds it."""

    def smaller(self, x, factor):
        rows, columns = (
            (torch.linspace(0, n - 1, n // factor, dtype=torch.float32) + 0.5).floor().long() for n in x.shape[2:]
        )
        return x[:, :, rows][:, :, :, columns]


class Faithful(Maybe):
    """In the manner of YY: TensorFlow's sampling exactly, the mask in two hops, one for each sample."""

    def smaller(self, x, factor):
        def taken(n):
            m = n // factor
            step = np.float32(n - 1) / np.float32(max(m - 1, 1))
            return torch.from_numpy(np.floor(np.arange(m, dtype=np.float32) * step + np.float32(0.5)).astype(np.int64))

        return x[:, :, taken(x.shape[2])][:, :, :, taken(x.shape[3])]

    def cells(self, mask, f):
        return self.smaller(self.smaller(mask, 4), self.rate)


class Resized(Attention):
    """In the manner of csqiangwen: the mask is first brought to the size of the features."""

    def cells(self, mask, f):
        return self.smaller(F.interpolate(mask, size=f.shape[2:], mode="nearest"), self.rate)[:1]


class Normalised(nn.Module):
    """In the manner of mmagic: other names, a mask for each sample at the features' size, rows that sum to one, a true mean
    of patches, and all weights returned."""

    def __init__(self, scale=0.5, fuse_kernel_size=3, softmax_scale=10):
        super().__init__()
        self.scale, self.fuse_kernel_size, self.softmax_scale = scale, fuse_kernel_size, softmax_scale
        self.register_buffer("fuse_kernel", torch.eye(fuse_kernel_size)[None, None])

    def forward(self, x, context, mask=None):
        half = F.interpolate(x, scale_factor=self.scale)
        grid = half.shape[2:]
        keys = windows(F.interpolate(context, scale_factor=self.scale), 3, 1, 1, 1)
        keys = keys / keys.square().sum(dim=(2, 3, 4), keepdim=True).sqrt().clamp_min(1e-4)
        scores = torch.stack([F.conv2d(half[i : i + 1], keys[i], padding=1)[0] for i in range(len(x))])
        cells = grid[0] * grid[1]
        scores = torch.cat([spread(s.view(1, 1, cells, cells), grid, self.fuse_kernel) for s in scores])
        scores = scores.view(len(x), cells, *grid)
        if mask is not None:
            holes = F.max_pool2d(F.interpolate(mask, scale_factor=self.scale), 3, 1, 1)
            scores = scores.masked_fill(holes.flatten(1)[:, :, None, None] > 0, -torch.inf)
        weights = torch.softmax(scores * self.softmax_scale, dim=1)
        raw = windows(context, 4, 2, 1, 1)
        out = torch.cat(
            [F.conv_transpose2d(w[None], r, stride=2, padding=1) for w, r in zip(weights, raw, strict=True)]
        )
        ones = torch.ones_like(weights[:1, :1])
        return out / F.conv_transpose2d(ones, ones.new_ones(1, 1, 4, 4), stride=2, padding=1), weights


# ---- gated convolutions ---------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """One convolution, features before gates; three outputs are a picture without gates (nipponjo)."""

    def __init__(self, c_in, c_out, k, stride=1, rate=1, activation="elu", gated=True, padding_mode="zeros"):
        super().__init__()
        self.cnum_out, self.gated = c_out, gated
        self.activation = {"elu": nn.ELU(), "relu": nn.ReLU(), "lrelu": nn.LeakyReLU(0.2), None: None}[activation]
        outputs = 2 * c_out if gated else c_out
        self.conv = nn.Conv2d(c_in, outputs, k, stride, rate * (k - 1) // 2, rate, padding_mode=padding_mode)

    def forward(self, x):
        x = self.conv(x)
        if not self.gated:
            return x
        features, gates = torch.split(x, self.cnum_out, dim=1)
        features = features if self.activation is None else self.activation(features)
        return features * torch.sigmoid(gates)


class Unpadded(nn.Module):
    """Likewise; the padding is TensorFlow's, and in the forward."""

    def __init__(self, c_in, c_out, k, stride=1, rate=1, activation=F.elu):
        super().__init__()
        self.ks, self.stride, self.rate, self.activation = k, stride, rate, activation
        self.conv = nn.Conv2d(c_in, c_out if c_out == 3 else 2 * c_out, k, stride, dilation=rate)

    def forward(self, x):
        both = [
            max((-(-n // self.stride) - 1) * self.stride + self.rate * (self.ks - 1) + 1 - n, 0) for n in x.shape[2:]
        ]
        x = F.pad(x, (both[1] // 2, both[1] - both[1] // 2, both[0] // 2, both[0] - both[0] // 2))
        x = self.conv(x)
        if x.shape[1] == 3:
            return x
        features, gates = x.chunk(2, dim=1)
        return self.activation(features) * torch.sigmoid(gates)


class Itself(nn.Conv2d):
    """Likewise, as a convolution (CR-Fill)."""

    def __init__(self, c_in, c_out, k, stride=1, rate=1, activation=None):
        super().__init__(c_in, c_out, k, stride, rate * (k - 1) // 2, rate)
        self.activation = activation

    def forward(self, x):
        x = super().forward(x)
        if self.out_channels == 3 or self.activation is None:
            return x
        x, gates = torch.split(x, self.out_channels // 2, 1)
        return self.activation(x) * torch.sigmoid(gates)


class Shell(nn.Module):
    """A convolution and its padding layer, if any (mmcv)."""

    def __init__(self, c_in, c_out, k, stride, rate, mode):
        super().__init__()
        pad = rate * (k - 1) // 2
        self.with_padding = mode == "reflect"
        if self.with_padding:
            self.padding_layer = nn.ReflectionPad2d(pad)
        self.conv = nn.Conv2d(c_in, c_out, k, stride, 0 if self.with_padding else pad, rate)

    def forward(self, x):
        return self.conv(self.padding_layer(x) if self.with_padding else x)


class Simple(nn.Module):
    """In the manner of mmagic: a shell inside, the gates' sigmoid a child, no activation where it is none."""

    def __init__(self, c_in, c_out, k, stride=1, rate=1, activation="elu", padding_mode="reflect"):
        super().__init__()
        self.with_feat_act = activation is not None
        self.conv = Shell(c_in, 2 * c_out, k, stride, rate, padding_mode)
        if self.with_feat_act:
            self.feat_act = nn.ELU() if activation == "elu" else nn.ReLU()
        self.gate_act = nn.Sigmoid()

    def forward(self, x):
        x, gate = torch.split(self.conv(x), self.conv.conv.out_channels // 2, dim=1)
        return (self.feat_act(x) if self.with_feat_act else x) * self.gate_act(gate)


class Powered(nn.Module):
    """A convolution whose weight is divided by its norm, by a power iteration in each forward."""

    def __init__(self, conv):
        super().__init__()
        weight = conv.weight.data
        del conv._parameters["weight"]
        conv.register_parameter("weight_u", nn.Parameter(F.normalize(torch.randn(len(weight)), dim=0), False))
        conv.register_parameter("weight_v", nn.Parameter(F.normalize(torch.randn(weight[0].numel()), dim=0), False))
        conv.register_parameter("weight_bar", nn.Parameter(weight))
        self.module = conv

    def forward(self, x):
        conv = self.module
        matrix = conv.weight_bar.view(len(conv.weight_bar), -1)
        long = matrix.data.t() @ conv.weight_u.data
        conv.weight_v.data = long / (long.norm() + 1e-12)
        tall = matrix.data @ conv.weight_v.data
        conv.weight_u.data = tall / (tall.norm() + 1e-12)
        conv.weight = conv.weight_bar / (conv.weight_u @ (matrix @ conv.weight_v))
        return conv(x)


class Twofold(nn.Module):
    """Two convolutions behind a padding layer; `order`: "csq" (its norm is for show), "zhao" or "ava"."""

    def __init__(
        self, c_in, c_out, k, stride=1, padding=0, dilation=1, pad_type="zero", activation="elu", norm="none", sn=False,
        order="csq",
    ):  # fmt: skip
        super().__init__()
        pads = {"zero": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}
        self.pad = pads[pad_type](padding)
        self.norm = {"none": None, "in": nn.InstanceNorm2d(c_out), "bn": nn.BatchNorm2d(c_out)}[norm]
        kinds = {
            "elu": nn.ELU(),
            "relu": nn.ReLU(inplace=True),
            "lrelu": nn.LeakyReLU(0.2),
            "tanh": nn.Tanh(),
            "none": None,
        }
        self.activation, self.order = kinds[activation], order
        convs = [nn.Conv2d(c_in, c_out, k, stride, padding=0, dilation=dilation) for _ in range(2)]
        self.conv2d, self.mask_conv2d = map(Powered, convs) if sn else convs
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        x = self.pad(x)
        features, gates = self.conv2d(x), self.sigmoid(self.mask_conv2d(x))
        act = self.activation or nn.Identity()
        if self.order == "csq":
            return act(features) * gates
        norm = self.norm or nn.Identity()
        return act(norm(features * gates)) if self.order == "zhao" else norm(act(features) * gates)


class Doubled(nn.Module):
    """Twice the size by nearest neighbour, then a gated convolution."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.scale_factor = 2
        self.gated_conv2d = Twofold(*args, **kwargs)

    def forward(self, x):
        return self.gated_conv2d(F.interpolate(x, scale_factor=self.scale_factor, mode="nearest"))


class Enlarged(nn.Module):
    """Likewise around one convolution; the child is called as a convolution would be."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = Halves(c_in, c_out, 3)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


# ---- generators -----------------------------------------------------------------------------------------------------


class Stage(nn.Sequential):
    """Layers called one after the other; sizes double before those that `doubled` names."""

    def __init__(self, layers, doubled=()):
        super().__init__(*layers)
        self.doubled = doubled

    def forward(self, x):
        for i, layer in enumerate(self):
            x = layer(F.interpolate(x, scale_factor=2.0) if i in self.doubled else x)
        return x


def down(c_in, c, activation="elu"):
    """From the image to a quarter of its size."""
    half = [Halves(c_in, c, 5), Halves(c, c, 3, 2), Halves(c, c, 3)]
    return [*half, Halves(c, 2 * c, 3, 2), Halves(2 * c, 2 * c, 3, activation=activation)]


def up(c_in, c):
    """From a quarter of the size to an image."""
    narrow = [Halves(c_in, c, 3), Halves(c, c, 3), Halves(c, c, 3), Halves(c, c, 3)]
    return Stage([*narrow, Halves(c, c, 3), Halves(c, c, 3), Halves(c, 3, 3, gated=False)], doubled=(2, 4))


class TwoStages(nn.Module):
    """A small generator in the manner of the ports: two images, and whatever its attention says beside its output.

    `reduced`: the mask goes to the attention at the features' size. `beside`: what else reads the attention: "norm", over
    all pixels, or "features", returned as they are.
    """

    def __init__(self, attention, width=4, reduced=False, beside=None, call="image, ones and mask, mask"):
        super().__init__()
        self.reduced, self.beside, self.call = reduced, beside, call
        c_in = 5 if "ones" in call else 4
        self.coarse = Stage(
            [*down(c_in, width), Halves(2 * width, 2 * width, 3, rate=8), *up(2 * width, width)], (8, 10)
        )
        self.branch = Stage([*down(3, width), Halves(2 * width, 2 * width, 3, rate=4)])
        self.matching = Stage(down(3, width, "relu"))
        self.contextual_attention = attention
        self.matched = Stage([Halves(2 * width, 2 * width, 3), Halves(2 * width, 2 * width, 3)])
        self.norm = nn.InstanceNorm2d(2 * width) if beside == "norm" else nn.Identity()
        self.together = up(4 * width, width)

    def forward(self, x, mask=None):
        mask = x[:, -1:] if mask is None else mask
        image = x[:, :3]
        if self.call == "image, mask":
            x = torch.cat([image * (1 - mask), mask], 1)
        first = torch.tanh(self.coarse(x))
        seen = first * mask + image * (1 - mask)
        features = self.matching(seen)
        hole = F.interpolate(mask, size=features.shape[2:]) if self.reduced else mask
        found = self.contextual_attention(features, features, hole)
        matched, *rest = found if isinstance(found, tuple) else (found,)
        both = torch.cat([self.branch(seen), self.norm(self.matched(matched))], 1)
        result = first, torch.tanh(self.together(both))
        return (*result, matched) if self.beside == "features" else (*result, *(t for t in rest if t is not None))

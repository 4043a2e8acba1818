"""guided-diffusion's UNet as a stranger may have copied it: other class names, other code, the public state dict.

It guards itself against half precision by naming float32, as the public code does, and takes keywords that it ignores.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Embedded(nn.Module):
    """Marks what is called with the embedding."""


class Row(nn.Sequential, Embedded):
    def forward(self, x, emb):
        for part in self:
            x = part(x, emb) if isinstance(part, Embedded) else part(x)
        return x


class Bigger(nn.Module):
    def __init__(self, channels, learned):
        super().__init__()
        self.learned = learned
        if learned:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.conv(x) if self.learned else x


class Smaller(nn.Module):
    def __init__(self, channels, learned):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else nn.AvgPool2d(2, 2)

    def forward(self, x):
        return self.op(x)


class Cell(Embedded):
    def __init__(self, width, outputs, emb, film, way=None, flip=False):
        super().__init__()
        self.film, self.way, self.flip = film, way, flip
        self.in_layers = nn.Sequential(Norm(32, width), Swish(), nn.Conv2d(width, outputs, 3, padding=1))
        make = {"up": Bigger, "down": Smaller}.get(way)
        self.h_upd, self.x_upd = (make(width, False) if make else nn.Identity() for _ in range(2))
        self.emb_layers = nn.Sequential(Swish(), nn.Linear(emb, 2 * outputs if film else outputs))
        self.out_layers = nn.Sequential(
            Norm(32, outputs), Swish(), nn.Dropout(0.2), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if width == outputs else nn.Conv2d(width, outputs, 1)

    def forward(self, x, emb):
        y = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
        e = self.emb_layers(emb).type(y.dtype)[..., None, None]
        if self.film:
            first, second = e.chunk(2, dim=1)
            shift, scale = (first, second) if self.flip else (second, first)
            y = self.out_layers[1:](self.out_layers[0](y) * (scale + 1) + shift)
        else:
            y = self.out_layers(y + e)
        return y + self.skip_connection(self.x_upd(x))


class Mixer(nn.Module):
    def __init__(self, width, heads, interleaved=True, temperature=1.0):
        super().__init__()
        self.heads, self.interleaved, self.temperature = heads, interleaved, temperature
        self.norm = Norm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x):
        b, c, *space = x.shape
        flat = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(flat))
        per_head = (
            (b, self.heads, 3, c // self.heads, -1) if self.interleaved else (b, 3, self.heads, c // self.heads, -1)
        )
        q, k, v = qkv.reshape(per_head).unbind(2 if self.interleaved else 1)
        weights = (q.transpose(2, 3) @ k * (self.temperature * (c // self.heads) ** -0.5)).float().softmax(-1)
        y = v @ weights.to(v.dtype).transpose(2, 3)
        return (flat + self.proj_out(y.reshape(b, c, -1))).reshape(b, c, *space)


class Painter(nn.Module):
    """channels at factor 1; a level attends where its index is in `attends`."""

    def __init__(self, channels=32, factors=(1, 2), repeats=1, attends=(1,), head=32, film=True, blocks=True, learned=True,
                 classes=None, interleaved=True, flip=False, fault=""):  # fmt: skip
        super().__init__()
        self.channels, self.fault, self.dtype = channels, fault, torch.float32
        emb = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), Swish(), nn.Linear(emb, emb))
        if classes:
            self.label_emb = nn.Embedding(classes, emb)

        def cell(width, outputs, way=None):
            return Cell(width, outputs, emb, film, way, flip)

        def row(width, outputs, level):
            mixer = [Mixer(outputs, outputs // head, interleaved)] if level in attends else []
            return [cell(width, outputs), *mixer]

        def resized(width, way):
            return cell(width, width, way) if blocks else {"up": Bigger, "down": Smaller}[way](width, learned)

        self.input_blocks = nn.ModuleList([Row(nn.Conv2d(3, channels, 3, padding=1))])
        width, widths = channels, [channels]
        for level, factor in enumerate(factors):
            for _ in range(repeats):
                self.input_blocks.append(Row(*row(width, factor * channels, level)))
                width = factor * channels
                widths.append(width)
            if level + 1 < len(factors):
                self.input_blocks.append(Row(resized(width, "down")))
                widths.append(width)
        self.middle_block = Row(cell(width, width), Mixer(width, width // head, interleaved), cell(width, width))
        self.output_blocks = nn.ModuleList()
        for level, factor in reversed([*enumerate(factors)]):
            for i in range(repeats + 1):
                parts = row(width + widths.pop(), factor * channels, level)
                width = factor * channels
                if level and i == repeats:
                    parts.append(resized(width, "up"))
                self.output_blocks.append(Row(*parts))
        self.out = nn.Sequential(Norm(32, width), Swish(), nn.Conv2d(width, 6, 3, padding=1))

    def forward(self, x, timesteps, y=None, gt=None, **others):
        half = self.channels // 2
        frequencies = 10000 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        if self.fault == "frequencies":
            frequencies = 10000 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / (half - 1))
        angles = timesteps[:, None].float() * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))
        if y is not None:
            emb = emb + self.label_emb(y)
        if self.fault == "keywords" and gt is not None:
            x = x + gt
        h, kept = x.type(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            kept.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            parts = [kept.pop(), h] if self.fault == "order" else [h, kept.pop()]
            h = block(torch.cat(parts, dim=1), emb)
        if self.fault == "scaled":
            h = h * 0.5
        return self.out(h.type(x.dtype))


class Pooled(nn.Module):
    """The classifier: a way down and a mean, for gradients."""

    def __init__(self, **options):
        super().__init__()
        painter = Painter(**options)
        self.channels, self.time_embed = painter.channels, painter.time_embed
        self.input_blocks, self.middle_block = painter.input_blocks, painter.middle_block
        self.out = nn.Linear(self.middle_block[0].out_layers[-1].out_channels, 5)

    def forward(self, x, timesteps):
        half = self.channels // 2
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb, h = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1)), x
        for block in self.input_blocks:
            h = block(h, emb)
        return self.out(F.silu(self.middle_block(h, emb)).mean((2, 3)))

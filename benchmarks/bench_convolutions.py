"""The convolutions of real networks at 512 pixels, in groups, each against its eager form in either memory format.

Every case is one distinct layer. In each, the fastest form of theirs is compared with the fastest form of ours, and the run
ends with the geometric mean of those ratios over each group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt import ops
from inpaintrt.runtime.spec import Cost

SMOKE = 16  # pixels of a side, in a smoke run
LAST = torch.channels_last
OURS = ["inpaintrt", "inpaintrt nhwc"]


@dataclass(frozen=True)
class Layer:
    """A convolution of `inputs` to `outputs` channels (those of a gated one after its gates) on a square map."""

    inputs: int
    outputs: int
    side: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1

    def __str__(self) -> str:
        more = [f"-k{self.kernel}"] * (self.kernel != 3) + [f"-s{self.stride}"] * (self.stride != 1)
        more += [f"-d{self.dilation}"] * (self.dilation != 1)
        return f"{self.inputs}to{self.outputs}x{self.side}{''.join(more)}"

    @property
    def options(self) -> dict[str, int]:
        padding = self.dilation * (self.kernel // 2)
        return {"stride": self.stride, "padding": padding, "dilation": self.dilation}

    def cost(self, outputs: int) -> Cost:
        """Flops of the direct form for so many filters; bytes of input, filters and output."""
        cells = (self.side // self.stride) ** 2
        filters = self.inputs * self.kernel**2 * outputs
        return Cost(2.0 * filters * cells, 4.0 * (self.inputs * self.side**2 + filters + self.outputs * cells))


# 3×3 layers of stride 1, by network. Transposed and strided ones, and first and last ones of 7×7, are other algorithms.
PLAIN = {
    "lama": [Layer(128, 128, 64), Layer(384, 128, 64), Layer(128, 384, 64)],
    "deepfill_v1": [
        Layer(64, 64, 256), Layer(128, 128, 128), *(Layer(128, 128, 128, dilation=d) for d in (2, 4, 8, 16)),
        Layer(128, 64, 256), Layer(64, 32, 512), Layer(32, 16, 512), Layer(16, 3, 512), Layer(256, 128, 128),
    ],
    "aotgan": [
        *(Layer(256, 64, 128, dilation=d) for d in (1, 2, 4, 8)), Layer(256, 256, 128), Layer(256, 128, 256),
        Layer(128, 64, 512), Layer(64, 3, 512),
    ],
    "mat": [
        Layer(4, 180, 512), *(Layer(180, 180, side) for side in (512, 256, 128, 64, 32, 16)), Layer(64, 64, 512),
        Layer(128, 128, 256), Layer(256, 256, 128), *(Layer(512, 512, side) for side in (64, 32, 16)),
    ],
}  # fmt: skip
LARGE = {
    "glcic": [Layer(4, 64, 512, 5)],
    "deepfill_v1": [Layer(5, 32, 512, 5)],
    "ipt": [Layer(64, 64, 48, 5)],  # its patches are 48 pixels
}
GATED = {
    "deepfill_v2": [
        Layer(5, 24, 512, 5), Layer(24, 48, 512, stride=2), Layer(48, 48, 256), Layer(48, 96, 256, stride=2),
        *(Layer(96, 96, 128, dilation=d) for d in (1, 2, 4, 8, 16)), Layer(96, 48, 256), Layer(48, 24, 512),
        Layer(24, 12, 512), Layer(3, 24, 512, 5), Layer(24, 24, 512, stride=2), Layer(24, 48, 256),
        Layer(48, 48, 256, stride=2), Layer(48, 96, 128), Layer(192, 96, 128),
    ],
}  # fmt: skip
PARTIAL = {
    "partialconv_unet": [
        Layer(3, 64, 512, 7, 2), Layer(64, 128, 256, 5, 2), Layer(128, 256, 128, 5, 2), Layer(256, 512, 64, stride=2),
        *(Layer(512, 512, side, stride=2) for side in (32, 16, 8)), *(Layer(1024, 512, side) for side in (8, 16, 32)),
        Layer(768, 256, 64), Layer(384, 128, 128), Layer(192, 64, 256), Layer(67, 3, 512),
    ],
}  # fmt: skip


def cases(groups: Mapping[str, list[Layer]]) -> list[Any]:
    return [pytest.param(layer, id=f"{network}-{layer}") for network, layers in groups.items() for layer in layers]


def operands(layer: Layer, filters: int, smoke: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rectified noise, weights that keep its size, and a bias."""
    generator = torch.Generator().manual_seed(0)
    side = min(SMOKE, layer.side) if smoke else layer.side
    x = torch.randn(1, layer.inputs, side, side, generator=generator).relu_()
    weight = torch.randn(filters, layer.inputs, layer.kernel, layer.kernel, generator=generator)
    bias = torch.randn(filters, generator=generator)
    return x.to(device), (weight / weight[0].numel() ** 0.5).to(device), bias.to(device)


def in_channels_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous(memory_format=LAST) if t.dim() == 4 else t for t in tensors)


@pytest.mark.parametrize("layer", cases(PLAIN))
@torch.inference_mode()
def test_3x3(versus, device, layer):
    plain(versus, device, layer, "3×3 layers, stride 1")


@pytest.mark.parametrize("layer", cases(LARGE))
@torch.inference_mode()
def test_5x5(versus, device, layer):
    plain(versus, device, layer, "5×5 layers, stride 1")


def plain(versus: Any, device: torch.device, layer: Layer, group: str) -> None:
    """The bare convolution with its bias and zero padding, which torch needs no copy for: only the algebra differs."""
    given = operands(layer, layer.outputs, versus.smoke, device)
    last = in_channels_last(*given)
    versus(
        {
            "conv2d": lambda: F.conv2d(*given, **layer.options),
            "conv2d channels-last": lambda: F.conv2d(*last, **layer.options),
            "inpaintrt": lambda: ops.fused_conv2d(*given, **layer.options),
            "inpaintrt nhwc": lambda: ops.fused_conv2d(*last, **layer.options),
        },
        baseline="conv2d", cost=layer.cost(layer.outputs), device=device, shape=given[0].shape, op="fused_conv2d", ours=OURS,
        group=group, means={"conv2d, in its best memory format": ["conv2d", "conv2d channels-last"]},
    )  # fmt: skip


@pytest.mark.parametrize("layer", cases(GATED))
@torch.inference_mode()
def test_gated(versus, device, baselines, layer):
    given = operands(layer, 2 * layer.outputs, versus.smoke, device)
    last = in_channels_last(*given)
    eager = {
        "eager": lambda: baselines.gated(*given, **layer.options),
        "eager channels-last": lambda: baselines.gated(*last, **layer.options),
    }
    in_place = {
        "in place": lambda: baselines.gated_in_place(*given, **layer.options),
        "in place channels-last": lambda: baselines.gated_in_place(*last, **layer.options),
    }
    versus(
        {
            **eager, **in_place,
            "inpaintrt": lambda: ops.gated_conv2d(*given, **layer.options),
            "inpaintrt nhwc": lambda: ops.gated_conv2d(*last, **layer.options),
        },
        cost=layer.cost(2 * layer.outputs), device=device, shape=given[0].shape, op="gated_conv2d", ours=OURS,
        group="gated layers", means={"the eager module": [*eager], "the fastest eager form": [*eager, *in_place]},
    )  # fmt: skip


@pytest.mark.parametrize("masks", ["single", "multi"])
@pytest.mark.parametrize("layer", cases(PARTIAL))
@torch.inference_mode()
def test_partial(versus, device, baselines, layer, masks):
    """A mask of one plane, and one of all channels: a copy of that plane in each, as networks of such layers have it up to
    where they join features. No candidate is told; ours looks, and does better than where channels differ."""
    given = operands(layer, layer.outputs, versus.smoke, device)
    x, weight, bias = given
    mask = torch.ones(1, 1, *x.shape[2:], device=device)
    side = x.shape[2]
    mask[..., side // 4 : side // 2, side // 3 : 2 * side // 3] = 0
    mask = mask.repeat(1, layer.inputs if masks == "multi" else 1, 1, 1)
    ones = baselines.mask_filters(weight, mask.shape[1])
    last = in_channels_last(x, mask, ones, weight, bias)

    def first_plane(results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return results[0], results[1][:, :1]

    def call(form: Any, *tensors: Tensor) -> Any:
        return lambda: first_plane(form(*tensors, **layer.options))

    eager = {
        "eager": call(baselines.partial, x, mask, ones, weight, bias),
        "eager channels-last": call(baselines.partial, *last),
    }
    in_place = {
        "in place": call(baselines.partial_in_place, x, mask, ones, weight, bias),
        "in place channels-last": call(baselines.partial_in_place, *last),
    }
    versus(
        {
            **eager, **in_place,
            "inpaintrt": lambda: ops.partial_conv2d(x, mask, weight, bias, **layer.options),
            "inpaintrt nhwc": lambda: ops.partial_conv2d(last[0], last[1], last[3], bias, **layer.options),
        },
        cost=layer.cost(layer.outputs), device=device, shape=x.shape, op="partial_conv2d", ours=OURS, mask_channels=masks,
        group=f"partial layers, {masks}-channel masks",
        means={"the eager module": [*eager], "the fastest eager form": [*eager, *in_place]},
    )  # fmt: skip

r"""Partial convolution: a convolution of the valid pixels, renormalised by how many of them its window holds.

$$ s = \sum_{\mathrm{window}} m, \quad u = \mathrm{clamp}(s, 0, 1), \qquad
   \mathrm{out} = u \left( \frac{N}{s + \epsilon} \, u \, \mathrm{conv}(x \cdot m, W) + b \right) $$

with N = kh · kw · (channels of m given); u is the mask of the output (Liu et al., "Image Inpainting for Irregular Holes Using
Partial Convolutions", ECCV 2018, eq. 1 and 2). Public implementations sum a multi-channel mask by a convolution with
ones, as costly as the convolution itself; but the sum over channels is the same for every output, so one plane and a box
sum are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from ._convolution import NO_PADDING, check_alike, check_operands, check_shape, convolve, output_size, single
from ._engine import cpu_numerics, cpu_refuses
from ._shared import empty_output, pad_sides

SCALES = ("window", "one")


def _reference(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: list[int] = NO_PADDING,
    dilation: int = 1,
    scale: str = "window",
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        valid = single(mask)
        ones = torch.ones((1, 1, *weight.shape[2:]), dtype=valid.dtype, device=x.device)
        s = convolve(valid.sum(1, keepdim=True), ones, None, stride, padding, dilation)
        updated = s.clamp(0, 1)
        window = mask.shape[1] * weight.shape[2] * weight.shape[3] if scale == "window" else 1
        ratio = window / torch.where(updated == 0, 1, s + eps) * updated
        y = single(convolve(x * mask, weight, None, stride, padding, dilation)) * ratio
        if bias is not None:
            y = (y + single(bias).view(-1, 1, 1)) * updated
        y = torch.where(updated == 0, 0, y).to(x.dtype)
        return y, updated.to(x.dtype).expand(x.shape[0], 1, *y.shape[2:]).contiguous()


def _out(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    scale: str,
    eps: float,
) -> Outputs:
    check_operands(x, weight, stride, dilation, padding, "zeros")
    b, c, h, w = x.shape
    if weight.shape[1] != c:
        raise ValueError(f"x has {c} channels, weight is {tuple(weight.shape)}; accepted: (Cout, {c}, kh, kw)")
    if scale not in SCALES or not eps >= 0:
        raise ValueError(f"scale is {scale!r}, eps {eps}; accepted: {', '.join(SCALES)}; 0 or more")
    check_shape("mask", mask, *((m, n, h, w) for m in (1, b) for n in (1, c)))
    check_shape("bias", bias, (weight.shape[0],))
    check_alike(x, mask=mask, weight=weight, bias=bias)
    size = output_size((h, w), weight.shape[2:], stride, padding, dilation)
    return (
        empty_output((b, weight.shape[0], *size), x),
        torch.empty((b, 1, *size), dtype=x.dtype, device=x.device),
    )


def _cpu_refuses(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    scale: str,
    eps: float,
) -> Iterator[str]:
    """Kernels longer than 64, strides above 8."""
    yield from cpu_refuses(x, weight, stride, padding, dilation)


def _cpu_numerics(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    *rest: object,
) -> object:
    return cpu_numerics(x, weight, stride, padding, dilation)


def _samples(level: str) -> Iterator[Sample]:
    def sample(
        id: str,
        x: tuple[int, ...],
        outputs: int,
        kernel: int = 3,
        *,
        channels: int = 1,
        masks: int = 0,
        **kwargs: object,
    ) -> Sample:
        shapes = {"x": x, "mask": (masks or x[0], channels, *x[2:]), "weight": (outputs, x[1], kernel, kernel)}
        if kwargs.pop("bias", True):
            shapes["bias"] = (outputs,)
        reach = int(kwargs.get("dilation", 1)) * (kernel // 2)  # type: ignore[call-overload]
        return Sample(id, shapes, {"padding": [reach] * 4, **kwargs}, masks=("mask",))

    if level == "bench":
        # PConv-UNet at 512 pixels: encoder (7×7 and 5×5, strided), decoder 3×3; and a 5×5 layer of stride 1.
        yield sample("3to64x512-k7s2", (1, 3, 512, 512), 64, 7, stride=2)
        yield sample("64to128x256-k5s2", (1, 64, 256, 256), 128, 5, stride=2)
        yield sample("256to512x64-s2", (1, 256, 64, 64), 512, stride=2)
        for inputs, outputs, side in ((192, 64, 256), (384, 128, 128), (768, 256, 64)):
            yield sample(f"{inputs}to{outputs}x{side}", (1, inputs, side, side), outputs)
        yield sample("64to64x128-k5", (1, 64, 128, 128), 64, 5)
        return
    yield sample("winograd", (1, 5, 17, 22), 7)
    yield sample("channels", (2, 3, 9, 14), 4, channels=3)
    yield sample("one_mask", (2, 6, 18, 17), 5, masks=1, scale="one")
    yield sample("strided", (1, 4, 12, 9), 3, 5, stride=2, bias=False)
    yield sample("dilated", (1, 3, 13, 10), 4, dilation=2, eps=1e-6)
    yield sample("one", (1, 1, 1, 1), 1, 1)
    yield sample("empty_batch", (0, 3, 4, 4), 2)
    if level == "full":
        yield sample("k7", (1, 3, 33, 30), 20, 7, stride=2, channels=3)
        yield sample("k5", (1, 18, 25, 40), 33, 5)
        yield sample("wide", (1, 150, 20, 18), 40, channels=150)
        yield sample("no_padding", (2, 7, 20, 21), 9, padding=[0, 0, 0, 0])
        yield sample("threads", (3, 33, 45, 31), 25)


def _cost(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    *_: object,
) -> Cost:
    h, w = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    out = x.shape[0] * weight.shape[0] * h * w
    flops = 2.0 * out * weight[0].numel()
    return Cost(flops=flops, bytes=(x.numel() + mask.numel() + weight.numel() + out) * x.element_size())


SPEC = OpSpec(
    name="partial_conv2d",
    summary="masked convolution, renormalised by the valid pixels of each window, and the updated mask",
    reference=_reference,
    out=_out,
    lanes={
        "triton": Lane(),
        "cuda": Lane(),
        "cupy": Lane(),
        "cpu": Lane(dtypes=frozenset({torch.float32, torch.bfloat16}), refuses=_cpu_refuses, numerics=_cpu_numerics),  # type: ignore[arg-type]
    },
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)


def partial_conv2d(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int = 1,
    scale: str = "window",
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """u · (window/(s + eps) · u · conv(x · mask) + bias), and u = clamp(s, 0, 1), where s sums the mask over each window.

    Without a bias u is a factor once, not twice, as in the public implementations; that is a difference for 0 < u < 1 only.

    Args:
        x: (B, Cin, H, W), float32, bfloat16, float16 (float64: reference only); any strides.
        mask: (1|B, 1|Cin, H, W), **1 = valid**, 0 = hole; numbers between and beyond count as they are; any dtype. Outside
            the image nothing is valid.
        weight: (Cout, Cin, kh, kw); bias: (Cout,). Dtype of x.
        stride, dilation: as in torch, the same in both directions.
        padding: zeros on all sides, or (vertical, horizontal), or (top, left, bottom, right), or "same", or "tf_same".
        scale: "window": window = kh · kw · (channels of mask), NVIDIA's; "one": window = 1, as in naoto0804's port.
        eps: of the quotient, which is computed in float32 whatever x is. Windows with s ≤ 0 give 0 for any eps.

    Returns:
        The output (B, Cout, H', W'), dtype of x, channels_last if x is, else contiguous; and the updated mask
        (B, 1, H', W'), dtype of x, contiguous. Differentiable.

    Raises:
        ValueError: shapes, dtypes or options do not fit; the message names them.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Holes of the output are exactly 0, not the bias, whatever lies under them. Where a window holds less than a quarter of what
    the image's fullest holds, its rounding error is multiplied with it, and Winograd's would exceed its bound: a CPU computes
    such windows once more by themselves, in the direct form; an image with so many of them that this costs more than it saves,
    as under precision="ieee". Each image is judged by its own mask: what it gives does not depend on the others'.

    Source: Liu et al., ECCV 2018, eq. 1 and 2.
    """
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; accepted: 4-D tensors")
    sides = pad_sides(padding, x.shape[2:], weight.shape[2:], stride, dilation)
    return _call(x, mask.to(x.dtype), weight, bias, stride, sides, dilation, scale, eps)  # type: ignore[no-any-return]

"""What the convolution ops share: their plain definition, sizes of outputs, and argument checks with one wording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._shared import PADDING_MODES

NO_PADDING = [0, 0, 0, 0]


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """torch's convolution with padding [top, left, bottom, right] of any mode."""
    top, left, bottom, right = padding
    if padding_mode == "zeros" and (top, left) == (bottom, right):
        return F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return F.conv2d(F.pad(x, (left, right, top, bottom), mode), weight, bias, stride, 0, dilation, groups)


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: int,
    padding_mode: str = "zeros",
) -> list[int]:
    """Rows and columns of a convolution's output.

    Raises: `ValueError` where there are none, or where reflection reaches beyond the input.
    """
    h, w = size
    sides = (padding[0] + padding[2], padding[1] + padding[3])
    out = [
        (length + both - dilation * (k - 1) - 1) // stride + 1
        for length, both, k in zip(size, sides, kernel, strict=True)
    ]
    if min(out) < 1 or min(size) < 1:
        raise ValueError(f"x of {h}×{w} with padding {list(padding)} is smaller than the kernel's reach")
    if padding_mode == "reflect" and not (max(padding[::2]) < h and max(padding[1::2]) < w):
        raise ValueError(f"reflection by {list(padding)} (top, left, bottom, right) needs more than x's {h}×{w}")
    return out


def check_operands(x: Tensor, weight: Tensor, stride: int, dilation: int, padding: Sequence[int], mode: str) -> None:
    """What holds for every convolution here."""
    if x.dim() != 4 or weight.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)}; accepted: 4-D floating-point tensors"
        )
    if min(weight.shape) < 1:
        raise ValueError(f"weight is {tuple(weight.shape)}; accepted: no empty dimension")
    if min(stride, dilation) < 1:
        raise ValueError(f"stride is {stride}, dilation {dilation}; accepted: 1 or more")
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"padding is {list(padding)}; accepted: (top, left, bottom, right), none negative")
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_mode is {mode!r}; accepted: {', '.join(PADDING_MODES)}")


def check_alike(x: Tensor, **others: Tensor | None) -> None:
    """Tensors that must have x's dtype and be on its device."""
    for name, t in others.items():
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{name} is {t.dtype} on {t.device}; accepted: x's {x.dtype} on {x.device}")


def check_parameters(x: Tensor, **others: Tensor | None) -> None:
    """Weights and vectors, which may be float32 beside x of half precision, and must be on its device."""
    accepted = {x.dtype, torch.float32} if x.dtype in (torch.bfloat16, torch.float16) else {x.dtype}
    for name, t in others.items():
        if t is not None and (t.dtype not in accepted or t.device != x.device):
            more = " or float32" if len(accepted) > 1 else ""
            raise ValueError(f"{name} is {t.dtype} on {t.device}; accepted: x's {x.dtype}{more}, on {x.device}")


def refuses_wide(x: Tensor, *parameters: object) -> Iterator[str]:
    """A sentence against weights or vectors of another dtype than x's, where kernels know one."""
    if any(isinstance(t, Tensor) and t.dtype != x.dtype for t in parameters):
        yield "weights or vectors of another dtype than x's are not covered"


def check_shape(name: str, t: Tensor | None, *accepted: tuple[int, ...]) -> None:
    if t is not None and tuple(t.shape) not in accepted:
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}; accepted: {' or '.join(map(str, dict.fromkeys(accepted)))}"
        )


def single(t: Tensor) -> Tensor:
    """In the dtype of sums: float32 at least."""
    return t.to(dtype_of_sums(t))


def dtype_of_sums(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32

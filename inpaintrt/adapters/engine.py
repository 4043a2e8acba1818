"""Convolutions inside fused forwards: the engine where it has kernels, torch elsewhere.

Adapters say what is to be computed, a geometry, tensors and what surrounds the sums; which library does it is decided
here and nowhere else. On a CPU that is `ops.fused_conv2d` and `ops.gated_conv2d`, which read padding, several inputs and
residuals in place; on a GPU it is cuDNN's convolution, and one pass for what comes after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt import ops
from inpaintrt.ops._shared import PADDING_MODES, activate
from inpaintrt.runtime import native

from .folding import padded

Parts = Tensor | Sequence[Tensor]


def activated(act: Any, y: Tensor) -> Tensor:
    """`act` (a module, a pair of name and alpha, or None) on a tensor that nobody else holds."""
    if isinstance(act, tuple):
        return activate(y, *act)
    return y if act is None else y.relu_() if isinstance(act, nn.ReLU) else act(y)  # type: ignore[no-any-return]


def convolved(
    conv: Any,
    x: Parts,
    weight: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None,
    act: Any = None,
    before: Tensor | None = None,
    after: Tensor | None = None,
    scale: Tensor | None = None,
    upsample: int = 1,
) -> Tensor:
    """act(scale · conv(x) + bias + before) + after with the geometry of `conv` (transposed, too), another weight and bias.

    x: one tensor, or several, read side by side along the channels.
    weight: one tensor, or those of two parts of x whose convolutions are summed: of one kernel, or, where `adds_pointwise`,
        the second 1×1.
    act: a module, a pair (name, alpha) as ops have them, or None.
    after: gives the sum its dtype.
    scale: one factor per output, such as a batch norm's.
    upsample: 2 reads x doubled by nearest neighbour.
    """
    dtype = _kernel_dtype(conv, x)
    transposed = getattr(conv, "transposed", False)
    if dtype is None and not isinstance(weight, Tensor):
        weight = torch.cat(weight, dim=0 if transposed else 1)
    if dtype is None:
        assert isinstance(weight, Tensor)
        if scale is not None:
            weight = weight * (scale.view(-1, 1, 1) if transposed else scale.view(-1, 1, 1, 1))
        y = _torchs(conv, x, weight, bias, upsample)
        return _plus(activated(act, y if before is None else y.add_(before)), after)
    name, alpha = ("relu", None) if isinstance(act, nn.ReLU) else act if isinstance(act, tuple) else ("none", None)
    fused = act is None or isinstance(act, (nn.ReLU, tuple))
    fits = after is not None and after.dtype == dtype and before is None and fused
    residual = after if fits else before
    y = ops.fused_conv2d(
        _in(dtype, x), _read_in(dtype, weight), None if bias is None else _read_in(dtype, bias),
        stride=conv.stride[0], padding=conv.padding, dilation=conv.dilation[0], padding_mode=conv.padding_mode,
        upsample=upsample, transposed=transposed, output_padding=conv.output_padding[0] if transposed else 0,
        scale=None if scale is None else _read_in(dtype, scale),
        activation=name, alpha=alpha, residual=None if residual is None else residual.to(dtype),
        residual_mode="after" if fits else "before",
    )  # fmt: skip
    return _plus(y if fused else activated(act, y), None if fits else after)


def adds_pointwise(conv: Any, x: Tensor) -> bool:
    """Whether `convolved` can add a 1×1 convolution of another tensor, of the output's size, in the sums of conv(x)."""
    plain = tuple(conv.kernel_size) == (3, 3) and conv.stride[0] == 1 and conv.dilation[0] <= 64
    return plain and not getattr(conv, "transposed", False) and _kernel_dtype(conv, x) is not None


def gate_convolved(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, act: tuple[str, float | None]) -> Tensor:
    """act(f) · σ(g), where f and g are the halves of conv(x), with the geometry of `conv`, another weight and bias."""
    name, alpha = act
    dtype = _kernel_dtype(conv, x)
    if dtype is None:
        return ops.gated_activation(_torchs(conv, x, weight, bias), activation=name, alpha=alpha)
    return ops.gated_conv2d(
        x.to(dtype), _read_in(dtype, weight), None if bias is None else _read_in(dtype, bias),
        stride=conv.stride[0], padding=conv.padding, dilation=conv.dilation[0], padding_mode=conv.padding_mode,
        activation=name, alpha=alpha,
    )  # fmt: skip


def _torchs(conv: Any, x: Parts, weight: Tensor, bias: Tensor | None, upsample: int = 1) -> Tensor:
    joined = x if isinstance(x, Tensor) else torch.cat(list(x), dim=1)
    if upsample > 1:
        joined = F.interpolate(joined, scale_factor=float(upsample), mode="nearest")
    if getattr(conv, "transposed", False):
        return F.conv_transpose2d(
            joined, weight, bias, conv.stride, conv.padding, conv.output_padding, 1, conv.dilation
        )
    around, padding = padded(conv, joined)
    return F.conv2d(around, weight, bias, conv.stride, padding, conv.dilation)


def _in(dtype: torch.dtype, x: Parts) -> Parts:
    return x.to(dtype) if isinstance(x, Tensor) else [part.to(dtype) for part in x]


def _read_in(dtype: torch.dtype, weight: Any) -> Any:
    """Weights and vectors as kernels of `dtype` take them: float32 ones as they are, without a copy."""
    parts = [weight] if isinstance(weight, Tensor) else weight
    return weight if all(part.dtype == torch.float32 for part in parts) else _in(dtype, weight)


def _plus(y: Tensor, after: Tensor | None) -> Tensor:
    return y if after is None else y.to(after.dtype).add_(after)


def _kernel_dtype(conv: Any, x: Parts) -> torch.dtype | None:
    """What `ops.fused_conv2d` is to compute in, where it has more to offer than torch's convolution; else None."""
    first = x if isinstance(x, Tensor) else x[0]
    if first.device.type != "cpu" or conv.padding_mode not in PADDING_MODES:
        return None
    if not torch.compiler.is_compiling() and native.missing():  # the op would be torch's convolution and a copy
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32 if first.dtype == torch.float32 else None
    if torch.get_autocast_dtype("cpu") != torch.bfloat16 or first.dtype == torch.float64:
        return None
    if torch.compiler.is_compiling():  # a program may run on another machine than the one that compiles it
        return None
    return torch.bfloat16 if _bf16_pays() else None


@functools.cache
def _bf16_pays() -> bool:
    """Ours was measured to be the faster convolution with AVX512_BF16 alone; with AMX only torch's uses the tiles."""
    amx = torch.cpu.get_capabilities().get("amx_tile", False)
    return not native.missing() and native.library().cpu_isa() == "avx512bf16" and not amx

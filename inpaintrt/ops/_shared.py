"""What several ops' references share: activations by name, and argument checks with one wording."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torch.utils.dlpack
from torch import Tensor
from torch.nn import Parameter

from inpaintrt.runtime import native

ACTIVATIONS = ("none", "relu", "leaky_relu", "elu", "silu", "sigmoid", "tanh")
PADDING_MODES = ("zeros", "reflect", "replicate")
DEFAULT_ALPHA = {"leaky_relu": 0.2, "elu": 1.0}


def activate(x: Tensor, activation: str, alpha: float | None) -> Tensor:
    """The activation `activation` of x; `alpha` is the slope of leaky_relu (0.2) or the scale of elu (1.0)."""
    if activation == "none":
        return x
    if activation in DEFAULT_ALPHA:
        value = DEFAULT_ALPHA[activation] if alpha is None else alpha
        return F.leaky_relu(x, value) if activation == "leaky_relu" else F.elu(x, value)
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    return plain[activation](x)


def check_activation(activation: str, alpha: float | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted: {', '.join(ACTIVATIONS)}")
    if alpha is not None and activation not in DEFAULT_ALPHA:
        raise ValueError(f"alpha is {alpha} but activation {activation!r} has no parameter; accepted: None")


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where x is that and not also contiguous, else contiguous: the format of an op's output."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


LARGE = 4 << 20
"""Bytes from which an output comes from the kernels' arena: what ops need one after the other is then the same memory, and
stays mapped. The C library maps the largest tensors anew each time, and keeps free the holes that smaller ones leave."""


def empty_output(shape: Sequence[int], x: Tensor) -> Tensor:
    """An op's output of this shape, in dtype, device and memory format of x; large ones in memory that was used before.

    Such a tensor owns its storage as any other does; it cannot be resized.
    """
    layout = memory_format(x)
    size = math.prod(shape) * x.element_size()
    if size < LARGE or type(x) not in (Tensor, Parameter) or x.device.type != "cpu" or native.missing():
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    block = torch.utils.dlpack.from_dlpack(native.library().arena_tensor(size))
    strides = torch.empty(shape, device="meta", memory_format=layout).stride()
    return torch.empty(0, dtype=x.dtype).set_(block.untyped_storage(), 0, shape, strides)  # type: ignore[call-overload]


def pad_sides(
    padding: int | Sequence[int] | str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: int,
    dilation: int,
    transposed: bool = False,
) -> list[int]:
    """A convolution's `padding` as [top, left, bottom, right].

    Numbers: all sides, (vertical, horizontal), or all four. "same" is torch's (stride 1; the larger half last),
    "tf_same" TensorFlow's (output size ⌈size/stride⌉).

    Raises: `ValueError` for other words, negative numbers, or "same" with a stride.
    """
    if isinstance(padding, str):
        if padding not in ("same", "tf_same") or transposed or (padding == "same" and stride != 1):
            raise ValueError(
                f"padding is {padding!r} with stride {stride}{', transposed' if transposed else ''}; accepted: numbers, "
                '"same" (stride 1), "tf_same"'
            )
        reach = [dilation * (k - 1) for k in kernel]
        both = [max((-(-n // stride) - 1) * stride + r + 1 - n, 0) for n, r in zip(size, reach, strict=True)]
        return [both[0] // 2, both[1] // 2, both[0] - both[0] // 2, both[1] - both[1] // 2]
    sides = [padding] * 4 if isinstance(padding, int) else list(padding) * (4 // max(1, len(padding)))
    if len(sides) != 4 or min(sides) < 0:
        raise ValueError(f"padding is {padding}; accepted: one number, two or four, none negative")
    return sides

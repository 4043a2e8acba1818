"""Somebody else's float32 code, run in float64: for the truth that results are judged by.

Code that guards itself against half precision names float32 in its forward: a group norm of `x.float()`, a torso in
`self.dtype`, an embedding that begins as float32. In a float64 copy of such a module these casts would meet float64
weights and fail; within this context they leave float64 as it is, and what begins as float32 is widened where it meets
float64 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = (Tensor.type, Tensor.to)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Widened(TorchFunctionMode):
    """Within this context float64 tensors stay float64 where code casts them to a smaller floating-point type."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor):
            if first.dtype == torch.float64 and (func is Tensor.float or (func in _CASTS and _narrows(args, kwargs))):
                return first
            if func is F.linear and first.dtype != args[1].dtype == torch.float64:
                args = (first.double(), *args[1:])
        return func(*args, **kwargs)


def _narrows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a cast says no more than a floating-point type below float64."""
    given = (*args[1:], *kwargs.values())
    return len(given) == 1 and any(given[0] is dtype for dtype in _FLOATS)

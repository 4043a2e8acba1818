"""A tensor whose values are computed when somebody reads them.

Attention modules return, beside their output, a picture of the attention flow or the matrix of all weights, which cost
more than the output and which most callers drop. A fused forward returns a `Deferred` in their place: shape, dtype, device
and strides are known, the values come from the original forward, on copies of the inputs of that call, at the first
operation on it. Whoever never looks never pays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Deferred(Tensor):
    """Made by `deferred`; every operation on it is the operation on its values, and returns plain tensors."""

    _make: Callable[[], Tensor] | None
    _made: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def values(self) -> Tensor:
        """The values, computed once."""
        if self._made is None:
            assert self._make is not None
            with torch.no_grad():
                self._made, self._make = self._make(), None  # what it holds is free now
        return self._made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(Deferred, Deferred.values, (args, kwargs or {}))
        return func(*args, **kwargs)

    # What reads memory without an operation.

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.values().numpy(*args, **kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.values().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self.values().tolist()

    def data_ptr(self) -> int:
        return self.values().data_ptr()

    def untyped_storage(self) -> Any:
        return self.values().untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.values().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.values())


def deferred(like: Tensor, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """A tensor with the shape, strides and dtype of `like`, on `device`, with the values of make()."""
    made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        Deferred, like.shape, strides=like.stride(), dtype=like.dtype, device=device, requires_grad=False
    )
    made._make, made._made = make, None
    return made  # type: ignore[no-any-return]

"""The same random numbers in several runs of a network, whatever device and dtype they are drawn in.

A seed alone gives runs in float32 and float64 different numbers: normal and uniform numbers of double precision take
more of a generator's bits. So one run notes what it draws, and another takes these numbers instead of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_RANDOM = {
    "bernoulli", "bernoulli_", "exponential_", "multinomial", "native_dropout", "normal", "normal_", "rand", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "random_", "randperm", "uniform_",
}  # fmt: skip
"""Operators whose results are drawn. (`torch.Tag.nondeterministic_seeded` is on attention, too, that only might drop.)"""


@contextlib.contextmanager
def seeded(module: nn.Module, args: Any = (), seed: int = 0) -> Iterator[None]:
    """Within this context torch's generators, on the CPU and on all devices of a module and of arguments for it, start
    from a seed; afterwards they are where they were."""
    held = (*module.parameters(), *module.buffers(), *(a for a in tree_leaves(args) if isinstance(a, Tensor)))
    devices = sorted({t.device.index for t in held if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
            generator.manual_seed(seed)
        yield


class noted(TorchDispatchMode):
    """Within this context everything that is drawn at random is kept in `draws`, in its order.

    It works below autograd, where `torch.randn`, `Tensor.normal_`, dropout and all others are a few operators, and so
    inside TorchScript, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if _is_random(func):
            self.draws.append(_drawn(func, made).clone())
        return made


class replayed(TorchDispatchMode):
    """Within this context what is drawn at random is what another run noted, in its order and as far as shapes agree."""

    def __init__(self, draws: list[Tensor]) -> None:
        super().__init__()
        self._draws = iter(draws)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if _is_random(func):
            known = next(self._draws, None)
            if known is not None and known.shape == _drawn(func, made).shape:
                _drawn(func, made).copy_(known)
                if func is torch.ops.aten.native_dropout.default and args[2]:
                    made[0].copy_(args[0] * known / (1 - args[1]))
        return made


def _is_random(func: Any) -> bool:
    namespace, _, name = func._schema.name.partition("::")
    return namespace == "aten" and name in _RANDOM


def _drawn(func: Any, made: Any) -> Tensor:
    """What an operator drew: its result; of dropout, which elements it kept."""
    return made[1] if func is torch.ops.aten.native_dropout.default else made  # type: ignore[no-any-return]

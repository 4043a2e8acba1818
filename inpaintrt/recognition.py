"""Which modules of a model have a fused form, and what is remembered about those that could not take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import adapters
from .runtime.swap import obstacles

_REFUSED = "_inpaintrt_refused"


@dataclass(frozen=True)
class Found:
    """A module that an adapter knows; `why_not` is empty where it can be swapped."""

    path: str
    module: nn.Module
    adapter: Any
    why_not: str

    @property
    def name(self) -> str:
        return self.path or type(self.module).__name__


def recognise(path: str, module: nn.Module) -> Found | None:
    if isinstance(module, torch.jit.ScriptModule):
        return None  # adapters look at attributes that a TorchScript module imitates but does not have
    for adapter in adapters.ADAPTERS:
        why_not = adapter.match(module)
        if why_not != "":
            return Found(path, module, adapter, why_not or next(obstacles(module), ""))
    return None


def refuse(module: nn.Module, adapter: str, why: str) -> None:
    """Remember, for `explain`, why a recognised module stays as it is."""
    module.__dict__[_REFUSED] = (adapter, why)


def refusal(module: nn.Module) -> tuple[str, str] | None:
    """(adapter, why), where one is remembered."""
    return module.__dict__.get(_REFUSED)


def forget_refusal(module: nn.Module) -> None:
    module.__dict__.pop(_REFUSED, None)

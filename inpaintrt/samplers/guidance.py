"""Class guidance: a classifier's gradient, which moves every step towards a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Guidance = Callable[..., Tensor]
"""guidance(x, t, **model_kwargs) -> (B, C, H, W): the step's mean grows by its variance times this."""


def classifier_guidance(classifier: Callable[..., Tensor], scale: float = 1.0) -> Guidance:
    """scale · ∇ₓ log p(y | x, t) of a classifier of noisy images (Dhariwal and Nichol 2021, algorithm 1).

    Args:
        classifier: called as classifier(x, t); returns logits (B, classes).
        scale: more than 1 makes the class more pronounced and the samples less diverse.

    Returns:
        A function for `guidance=` of the samplers. It needs labels.

    Raises:
        ValueError: when called: no labels were given.
    """

    def guidance(x: Tensor, t: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        if y is None:
            raise ValueError("labels is None; classifier guidance needs the class of each image")
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            chosen = F.log_softmax(classifier(leaf, t).float(), dim=-1).gather(1, y[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, leaf)
        return gradient * scale

    return guidance

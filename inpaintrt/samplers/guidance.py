"""Class guidance: a classifier's gradient, which moves every step towards a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Guidance = Callable[..., Tensor]
"""guidance(x, t, **model_kwargs) -> (B, C, H, W): the step's mean grows by its variance times this."""


@dataclass(frozen=True, eq=False)
class ClassifierGuidance:
    """What `classifier_guidance` returns. Checkpoints are compared by its fields."""

    classifier: Callable[..., Tensor]
    scale: float

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        if y is None:
            raise ValueError("labels is None; classifier guidance needs the class of each image")
        if getattr(self.classifier, "training", False):
            raise ValueError("the classifier is in training mode; call classifier.eval() first")
        with torch.inference_mode(False), torch.enable_grad():
            # Of what was made in inference mode nothing can be kept for a gradient.
            x, t, y = (v.clone() if v.is_inference() else v for v in (x, t, y))
            leaf = x.detach().requires_grad_()
            chosen = F.log_softmax(self.classifier(leaf, t).float(), dim=-1).gather(1, y[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, leaf)
        return gradient * self.scale


def classifier_guidance(classifier: Callable[..., Tensor], scale: float = 1.0) -> ClassifierGuidance:
    """scale · ∇ₓ log p(y | x, t) of a classifier of noisy images (Dhariwal and Nichol 2021, algorithm 1).

    Args:
        classifier: called as classifier(x, t); returns logits (B, classes). In eval mode.
        scale: more than 1 makes the class more pronounced and the samples less diverse.

    Returns:
        A function for `guidance=` of the samplers. It needs labels.

    Raises:
        ValueError: when called: no labels were given, or the classifier trains.
    """

    return ClassifierGuidance(classifier, scale)

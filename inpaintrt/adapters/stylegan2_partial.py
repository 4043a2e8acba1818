"""MAT's partial convolutions: an equalised convolution whose result is scaled by how much of each window is valid.

$$ u = \\textstyle\\sum_{window} m, \\quad m' = \\min(u, 1), \\quad
   y = \\frac{k^2}{u + 10^{-8}} \\, m' \\cdot \\mathrm{layer}(x) $$

x is not masked, and the ratio comes after the activation: another layer than NVIDIA's partial convolution, which
`partial` covers. At the border of a mask of ones the ratio is 9/6 and 9/4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.models.mat_layers import PartialStep, partial_ratio
from inpaintrt.testing.recipe import image

from .stylegan2_forms import form_of
from .stylegan2_layers import PICTURE, Form, Layer, layer_of, outputs, parameters_of, refuses, styled, why_tiny
from .trial import Twin, Verdicts, same, settings_of

_SIDE = 8


def conv_of(module: Any) -> Any:
    """The equalised convolution in a module of nothing else that is called with an image and perhaps a mask; or None."""
    if len(module._modules) != 1 or module._parameters or module._buffers:
        return None
    conv, takes = module._modules.get("conv"), parameters_of(module)
    if conv is None or takes is None or len(takes.names) != 2 or takes.defaults != (None,):
        return None
    layer = layer_of(conv)
    return None if layer is None or layer.affine is not None else conv


def masked(
    conv: Any, layer: Layer, form: Form, x: Tensor, mask: Tensor | PartialStep | None
) -> tuple[Tensor, Tensor | None]:
    """The layer's result and its mask: x (B, Cin, H, W), mask (1|B, 1, H, W), **1 = valid**, fractions allowed, or None. Our
    own network has a plan of its masks, and gives a layer its step."""
    y = styled(conv, layer, form, (x,))
    if mask is None:
        return y, None
    with torch.no_grad():
        step = mask if isinstance(mask, PartialStep) else partial_ratio(mask, layer.weight.shape[-1], form.down)
        ratio, valid = step.ratio.to(y.dtype), step.valid
    return (y * ratio if y.requires_grad else y.mul_(ratio)), valid


def _judge(module: Any) -> bool | str:
    """Whether it may be called with a mask (a layer that doubles never is), or why it is another kind of module."""
    twin = Twin(module)
    conv = conv_of(twin.copy(torch.float64))
    layer, form = layer_of(conv), form_of(conv, layer_of(conv))
    assert layer is not None
    assert isinstance(form, Form)
    x = (image("probe/stylegan2/x", 2, layer.weight.shape[1], _SIDE, _SIDE + 2) * 2 - 1).to(twin.device).double()
    hole = image("probe/stylegan2/hole", 2, 1, _SIDE, _SIDE + 2).to(x)
    mask = torch.where(hole < 0.3, hole, hole.round())
    mask[:, :, 1:6, 2:7] = 0

    def agrees(given: Tensor | None) -> bool:
        exact, own = twin.run(x, given), masked(conv, layer, form, x, given)
        if not isinstance(exact, tuple) or len(exact) != len(own):
            return False
        return all(a is b if b is None else same(a, b) for a, b in zip(own, exact, strict=True))

    with torch.no_grad():
        try:
            if not agrees(None):
                return "it has the parts of MAT's partial convolution, but computes something else"
        except Exception:  # somebody else's code, which may want other arguments than its structure suggests
            return "it is not called with an image and perhaps a mask"
        try:
            return agrees(mask)
        except Exception:
            return False


_verdicts: Verdicts[bool] = Verdicts(_judge)


def takes_masks(module: Any, conv: Any) -> bool | str:
    """Whether calls with a mask are known, or why a module with this convolution is not MAT's."""
    form = form_of(conv, layer_of(conv))
    if isinstance(form, str):
        return form
    return _verdicts.of(module, (*settings_of(module), form, conv.weight.shape[2]))


class PartialAdapter:
    """An equalised convolution and the ratio of its mask, (x, mask or None) → (y, mask or None)."""

    name = "mat.partial"
    ops: tuple[str, ...] = ("modulated_conv2d",)
    algorithm = "bias, activation and the change of size in the convolution, the ratio in place"
    deep = False
    named = True

    def match(self, module: nn.Module) -> str | None:
        conv = conv_of(module)
        if conv is None:
            return ""
        known = takes_masks(module, conv)
        return known if isinstance(known, str) else None

    def forward(self, module: Any, x: Tensor, mask: Tensor | PartialStep | None = None) -> tuple[Tensor, Tensor | None]:
        conv = conv_of(module)
        layer = layer_of(conv)
        form = form_of(conv, layer)
        if layer is None or isinstance(form, str):
            raise RuntimeError(f"the module was changed after it was accelerated: {form or 'another structure'}")
        # The copy is small, and all that comes of it is channels-last as tokens are, and as what decoders make of tokens,
        # to which these features are added: maps of two formats take 20 times as long.
        if x.shape[1] <= PICTURE:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            return masked(conv, layer, form, x, mask)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        if why := why_tiny(module, args):
            yield why
            return
        conv = conv_of(module)
        known = "it is no partial convolution any more" if conv is None else takes_masks(module, conv)
        if isinstance(known, str):
            yield known
            return
        layer = layer_of(conv)
        form = form_of(conv, layer)
        assert layer is not None
        assert isinstance(form, Form)
        if not 1 <= len(args) <= 2:
            yield f"called with {len(args)} arguments"
            return
        yield from refuses(conv, layer, form, args[:1])
        x, mask = args[0], args[1] if len(args) == 2 else None
        if mask is None:
            return
        if isinstance(mask, PartialStep):
            if mask.ratio.device != x.device or tuple(mask.ratio.shape) != (len(x), 1, *outputs(form, x)):
                yield f"its plan is for a result of {tuple(mask.ratio.shape)} on {mask.ratio.device}"
            elif mask.ratio.requires_grad and torch.is_grad_enabled():
                yield "a gradient is asked of its mask"
            return
        shapes = [(n, 1, *x.shape[2:]) for n in (1, len(x))]
        if not isinstance(mask, Tensor) or mask.dtype != x.dtype or tuple(mask.shape) not in shapes:
            yield f"its mask is not {shapes[-1]} in {x.dtype}"
        elif not known:
            yield "called with a mask, for which no form is known"
        elif mask.requires_grad and torch.is_grad_enabled():
            yield "a gradient is asked of its mask"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: a copy was compared in `match`."""
        return iter(())


ADAPTERS = (PartialAdapter(),)

"""Adapters of StyleGAN 2's layers; what they are and what is done is said in `stylegan2_layers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import stylegan2_partial
from .stylegan2_forms import form_of
from .stylegan2_layers import Form, Layer, layer_of, makes_picture, refuses, styled, why_tiny


class StyledAdapter:
    """A modulated convolution with what follows it, also one that makes the picture."""

    name = "stylegan2.styled"
    ops: tuple[str, ...] = ("modulated_conv2d", "upfirdn2d")
    algorithm = "one convolution of shared filters; styles, noise, bias, activation and the change of size in it"
    deep = False
    named = True

    def match(self, module: nn.Module) -> str | None:
        layer = layer_of(module)
        if layer is None or not self.covers(layer):
            return ""
        form = form_of(module, layer)
        if isinstance(form, str):
            return form
        return "" if makes_picture(layer, form) and not form.skips else None

    def covers(self, layer: Layer) -> bool:
        return layer.affine is not None

    def forward(self, module: Any, *args: Any) -> Tensor:
        with torch.autocast(args[0].device.type, enabled=False):
            return styled(module, *_read(module), args)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        if why := why_tiny(module, args):
            yield why
            return
        layer = layer_of(module)
        form = form_of(module, layer)
        if layer is None or isinstance(form, str):
            yield form or "it is no layer of StyleGAN 2 any more"  # type: ignore[misc]
        else:
            yield from refuses(module, layer, form, args)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: a layer is made for one size of images, so that a copy was compared in `match`, on smaller ones."""
        return iter(())


class ConvolutionAdapter(StyledAdapter):
    """An equalised convolution with its activation and change of size, without a style."""

    name = "stylegan2.convolution"
    ops: tuple[str, ...] = ("modulated_conv2d",)
    algorithm = "bias, activation, gain, clamp and the change of size in the convolution"

    def covers(self, layer: Layer) -> bool:
        return layer.affine is None


def _read(module: Any) -> tuple[Layer, Form]:
    """What `match` accepted."""
    layer = layer_of(module)
    form = form_of(module, layer)
    if layer is None or isinstance(form, str):
        raise RuntimeError(f"the module was changed after it was accelerated: {form or 'another structure'}")
    return layer, form


ADAPTERS = (*stylegan2_partial.ADAPTERS, StyledAdapter(), ConvolutionAdapter())

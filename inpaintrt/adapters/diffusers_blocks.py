"""The residual block of diffusers' image UNets and autoencoders (`ResnetBlock2D`), and of whoever copies it.

Its parts are guided-diffusion's under other names, so its fused form is `guided_blocks.residual`. What its structure does not
say is found by a trial: whether it doubles or halves the size, and whether the embedding is activated first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.testing.recipe import image

from .ffc import refuses_tensor
from .guided_blocks import Residual, geometry, is_conv2d, modulated, refuses_gradient, residual
from .trial import Twin, Verdicts, same, settings_of

_CHILDREN = ("norm1", "conv1", "norm2", "conv2", "nonlinearity")


@dataclass(frozen=True)
class Form:
    """What a block does with the size ("up", "down" or ""), and whether SiLU comes before its linear layer."""

    way: str
    activates: bool


def block_of(module: Any) -> Residual | None:
    """None for what is no residual block of this kind. Its linear layer may be None."""
    parts = module._modules
    norm1, conv1, norm2, conv2, activation = (parts.get(name) for name in _CHILDREN)
    if activation is None or not (isinstance(norm1, nn.GroupNorm) and isinstance(norm2, nn.GroupNorm)):
        return None
    if not (is_conv2d(conv1) and is_conv2d(conv2)):
        return None
    linear, skip = getattr(module, "time_emb_proj", None), getattr(module, "conv_shortcut", None)
    if not isinstance(linear, nn.Linear | None) or not (skip is None or is_conv2d(skip)):
        return None
    width, outputs = conv1.in_channels, conv2.out_channels  # type: ignore[union-attr]
    fits = (
        norm1.num_channels == width
        and conv1.out_channels == norm2.num_channels == conv2.in_channels == outputs  # type: ignore[union-attr]
        and (linear is None or linear.out_features in (outputs, 2 * outputs))
        and (width == outputs if skip is None else (skip.in_channels, skip.out_channels) == (width, outputs))
    )
    return Residual(module, norm1, conv1, linear, norm2, conv2, skip) if fits else None


def _fused(block: Residual, form: Form, x: Tensor, embedding: Tensor | None) -> Tensor:
    modulation = None
    if block.linear is not None:
        assert embedding is not None
        modulation = modulated(block.linear, F.silu(embedding) if form.activates else embedding)
    y = residual(block, form.way, x, modulation)
    divisor = getattr(block.module, "output_scale_factor", 1.0)
    return y if divisor == 1 else y / divisor


def _judge(module: Any) -> Form | str:
    twin = Twin(module)
    block = block_of(twin.copy(torch.float64))
    assert block is not None
    x = (image("probe/diffusers/x", 2, block.widths[0], 2, 4) * 4 - 2).double().to(twin.device)
    embedding = None
    if block.linear is not None:
        embedding = (image("probe/diffusers/emb", 2, block.linear.in_features) * 4 - 2).double().to(twin.device)
    try:
        exact = twin.run(x, embedding)
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    rows = exact.shape[2] if isinstance(exact, Tensor) and exact.dim() == 4 else 0
    way = {1: "down", 2: "", 4: "up"}.get(rows)
    if way is None:
        return "it has the parts of a residual block of diffusers, but changes the size in another way"
    for form in (Form(way, True), Form(way, False)):
        with torch.no_grad():
            if same(_fused(block, form, x, embedding), exact):
                return form
    return "it has the parts of a residual block of diffusers, but computes something else"


_forms: Verdicts[Form] = Verdicts(_judge)


def form_of(block: Residual) -> Form | str:
    """The form of a block, or why it has none. Blocks that differ in widths alone are tried once."""
    width, outputs = block.widths
    names = {outputs: "outputs", width: "width"}
    parts = [m for m in block.module.modules() if not isinstance(m, (nn.Conv2d, nn.GroupNorm, nn.Linear))]
    settings = tuple(tuple(names.get(v, v) if type(v) is int else v for v in settings_of(part)) for part in parts)
    convs = [(type(c), geometry(c), c.bias is None) for c in (block.conv1, block.conv2, block.skip) if c is not None]
    norms = tuple((type(norm), norm.eps, norm.weight is None) for norm in (block.norm1, block.norm2))
    taken = None if block.linear is None else block.scales
    return _forms.of(block.module, (settings, tuple(convs), norms, taken, width == outputs, block.skip is None))


class ResidualAdapter:
    """A residual block: (image, embedding or None) → image."""

    name = "diffusers.residual"
    ops: tuple[str, ...] = ("group_norm_silu", "fused_conv2d")
    algorithm = "norm, modulation and SiLU in one pass, sums in convolutions, 3×3 by Winograd F(4×4) on CPU"
    deep = False
    named = True

    def match(self, module: nn.Module) -> str | None:
        block = block_of(module)
        if block is None:
            return ""
        form = form_of(block)
        return form if isinstance(form, str) else None

    def forward(self, module: Any, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        block = block_of(module)
        form = "" if block is None else form_of(block)
        assert block is not None
        assert not isinstance(form, str)
        return _fused(block, form, x, embedding)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        block = block_of(module)
        form = "it is no residual block any more" if block is None else form_of(block)
        if block is None or isinstance(form, str):
            yield str(form)
            return
        if len(args) != 2:
            yield "called with other arguments than an image and an embedding"
            return
        x, embedding = args
        yield from refuses_tensor(x, block.conv1.weight, block.widths[0])
        yield from _refuses_embedding(block, embedding, len(x))
        if form.way == "down" and any(n % 2 for n in x.shape[2:]):
            yield f"the size {tuple(x.shape[2:])} cannot be halved"
        yield from refuses_gradient(*(t for t in args if isinstance(t, Tensor)))

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        block = block_of(module)
        assert block is not None
        for rows, columns in ((2, 4), (6, 2)):
            x = image("probe/diffusers/x", 2, block.widths[0], rows, columns) * 4 - 2
            linear = block.linear
            yield x, None if linear is None else image("probe/diffusers/emb", 2, linear.in_features) * 4 - 2


def _refuses_embedding(block: Residual, embedding: Any, count: int) -> Iterator[str]:
    if block.linear is None:
        if embedding is not None:
            yield "it has no layer for the embedding that it gets"
    elif not isinstance(embedding, Tensor):
        yield "it gets no embedding"
    elif embedding.shape != (count, block.linear.in_features):
        yield f"the embedding is {tuple(embedding.shape)}; accepted: {(count, block.linear.in_features)}"
    elif embedding.dtype != block.linear.weight.dtype or embedding.device != block.linear.weight.device:
        yield f"the embedding is {embedding.dtype} on {embedding.device}"


ADAPTERS = (ResidualAdapter(),)

"""MAT's transformer block as strangers write it: window attention, a layer that joins it with its input, an MLP.

$$ a = A(W_q\\hat x + b_q,\\ W_k\\hat x + b_k,\\ W_v x + b_v), \\qquad
   y = \\mathrm{fc}_2(\\mathrm{fc}_1(\\mathrm{fuse}([x, \\mathrm{proj}(a)]))), \\qquad
   \\hat x = x / \\max(|x|, \\varepsilon) $$

with A masked, shifted window attention, and with no layer norm and no residual (Li et al., "MAT: Mask-Aware Transformer for
Large Hole Image Inpainting", CVPR 2022, section 3.3). A block is read by the names that the checkpoints fix (`attn.q`,
`attn.k`, `attn.v`, `attn.proj`, `fuse`, `mlp.fc1`, `mlp.fc2`); what its code makes of them, the ε among it, is found by a
trial (see `trial`).

What is done: windows are addresses instead of rolled, cut, joined and rolled copies; the mask of shifted windows, which the
public code builds on the CPU in every call, is never made; `proj` is multiplied into the half of `fuse` that reads it, gains
of weights and activations into weights; layers run as 1×1 convolutions of a channels-last map, in which the engine is
faster than torch's products are, and reads both inputs of `fuse` in place. All folding is done in each call, so that it cannot
be stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt import ops
from inpaintrt.models.mat_layers import AttentionStep
from inpaintrt.testing.recipe import image

from .engine import convolved
from .ffc import Rule, first_broken
from .gated import Geometry
from .trial import Twin, Verdicts, same, settings_of

POINTWISE = Geometry((1, 1), (1, 1), (0, 0), (1, 1), "zeros")

# ---- reading --------------------------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, tuple[tuple[str, float | None], float]] = {
    "linear": (("none", None), 1.0),
    "lrelu": (("leaky_relu", 0.2), 2**0.5),
}
"""By their names in the public code: what ops call them, and the gain after them, which they let pass."""


@dataclass(frozen=True)
class Linear:
    """A fully connected layer with scaled weights; a plain `nn.Linear` is one, too."""

    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.layer.weight.shape)

    @property
    def kind(self) -> Any:
        return getattr(self.layer, "activation", "linear")

    @property
    def act(self) -> tuple[str, float | None]:
        return _ACTIVATIONS[self.kind][0]

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs), with the gains of the weight and of the activation."""
        return self.layer.weight * (getattr(self.layer, "weight_gain", 1.0) * _ACTIVATIONS[self.kind][1])  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor:
        """(outputs,), likewise."""
        return self.layer.bias * (getattr(self.layer, "bias_gain", 1.0) * _ACTIVATIONS[self.kind][1])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Block:
    q: Linear
    k: Linear
    v: Linear
    proj: Linear
    fuse: Linear
    fc1: Linear
    fc2: Linear
    heads: int
    window: int
    shift: int

    @property
    def layers(self) -> tuple[Linear, ...]:
        return (self.q, self.k, self.v, self.proj, self.fuse, self.fc1, self.fc2)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.q.shape[-1]


def block_of(module: Any) -> Block | None:
    """None for what is no block of MAT."""
    attention, fuse, mlp = (getattr(module, name, None) for name in ("attn", "fuse", "mlp"))
    layers = [getattr(attention, n, None) for n in ("q", "k", "v", "proj")]
    layers += [fuse, *(getattr(mlp, n, None) for n in ("fc1", "fc2"))]
    if not all(isinstance(getattr(layer, "weight", None), Tensor) for layer in layers):
        return None

    def number(*names: str) -> int | None:
        values = (getattr(m, name, None) for m in (module, attention) for name in names)
        return next((value for value in values if isinstance(value, int)), None)

    q, k, v, proj, fuse, fc1, fc2 = map(Linear, layers)
    heads, window, shift = number("heads", "num_heads"), number("window", "window_size"), number("shift", "shift_size")
    if heads is None or window is None or shift is None:
        return None
    return Block(q, k, v, proj, fuse, fc1, fc2, heads, window, shift)


def _fits(block: Block) -> bool:
    c, hidden = block.width, block.fc1.shape[0]
    shapes = [(c, c)] * 4 + [(c, 2 * c), (hidden, c), (c, hidden)]
    return [layer.shape for layer in block.layers] == shapes


RULES: tuple[Rule, ...] = (
    (_fits, "the widths of its layers do not fit together"),
    (lambda b: all(isinstance(layer.layer.bias, Tensor) for layer in b.layers), "a layer has no bias"),
    (lambda b: all(layer.kind in _ACTIVATIONS for layer in b.layers), "an activation is neither linear nor lrelu"),
    (
        lambda b: all(layer.kind == "linear" for layer in (b.q, b.k, b.v, b.proj)),
        "queries, keys, values or their projection are activated",
    ),
    (lambda b: b.heads > 0 and b.width % b.heads == 0, "its heads do not divide its channels"),
    (lambda b: 0 <= b.shift < b.window, "its windows are shifted by more than their side"),
)

# ---- what a block computes, found by trials -------------------------------------------------------------------------

_EPS = ("1e-12", "finfo")
"""Least norms by which tokens are divided: the official 1e-12; the ports' rounding unit of their dtype."""
_FAINT = 1e-14
"""Tokens at which these differ in float64."""


def _least_norm(eps: str, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if eps == "finfo" else float(eps)


def _judge(module: Any) -> str:
    """The ε of a block; a sentence, with a blank in it, where it is none of MAT."""
    twin, block = Twin(module), _read(module)
    inputs = [_in_double(args, twin.device) for args in _trials(block)]
    try:
        exact = [twin.run(*args) for args in inputs]
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    fresh = _read(twin.copy(torch.float64))
    with torch.no_grad():
        for eps in _EPS:
            ours = (swin_block(fresh, eps, *args) for args in inputs)
            if all(_same_pair(got, wanted) for got, wanted in zip(ours, exact, strict=True)):
                return eps
    return "it has the parts of a MAT block, but computes something else of them"


def _same_pair(got: tuple[Any, Any], wanted: Any) -> bool:
    if not isinstance(wanted, tuple) or len(wanted) != 2 or not same(got[0], wanted[0]):
        return False
    return same(got[1], wanted[1]) if isinstance(got[1], Tensor) else wanted[1] is None


_verdicts: Verdicts[str] = Verdicts(_judge)


def form_of(module: Any, block: Block | None) -> str:
    """The ε of a module that was read into `block`; "" for what is none, else a sentence says why it has no fused form."""
    if block is None:
        return ""
    if why := first_broken(RULES, block):
        return why
    parts = tuple((settings_of(layer.layer), layer.shape) for layer in block.layers)
    return _verdicts.of(module, (*settings_of(module), settings_of(module.attn), parts))


def _is_form(found: str) -> bool:
    return found in _EPS


def probe_tokens(block: Block) -> tuple[Tensor, tuple[int, int], Tensor]:
    """Tokens, size and mask: two windows with all there is: regions without a valid token, fractions, tokens of 0."""
    height, width = block.window, 2 * block.window
    x = image("probe/tokens", 1, height * width, block.width) * 2 - 1
    mask = (image("probe/mask", 1, height, width) * 5).floor().clamp(max=4) / 4
    mask[:, : block.shift, width // 2 :] = 0
    mask[:, :, : width // 4] = mask[:, :, : width // 4].round()
    mask = mask.view(1, -1, 1)
    return x * (mask > 0), (height, width), mask


def _trials(block: Block) -> Iterator[tuple[Any, ...]]:
    x, size, mask = probe_tokens(block)
    faint = torch.ones(1, x.shape[1], 1, dtype=torch.float64)
    faint[:, ::3] = _FAINT
    yield x * faint, size, mask
    yield x * faint, size, mask * 0
    yield x * faint, size, None


def _in_double(args: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple(a.to(device).double() if isinstance(a, Tensor) else a for a in args)


# ---- the fused form -------------------------------------------------------------------------------------------------


def swin_block(
    block: Block, eps: str, x: Tensor, size: tuple[int, int], mask: Tensor | AttentionStep | None = None
) -> tuple[Tensor, Tensor | None]:
    """x (B, H·W, C), size (H, W), mask (B, H·W, 1) **1 = valid**, its step or None → tokens and mask of the next block."""
    height, width = size
    tokens = x.reshape(len(x), height, width, -1)
    keys = mask.mask if isinstance(mask, AttentionStep) else mask
    valid = None if keys is None else keys.reshape(len(x), height, width, 1)
    wide = tokens.float() if tokens.dtype in (torch.bfloat16, torch.float16) else tokens
    unit = F.normalize(wide, dim=-1, eps=_least_norm(eps, x.dtype)).to(tokens.dtype)

    both = _of_tokens(unit, torch.cat([block.q.weight, block.k.weight]), torch.cat([block.q.bias, block.k.bias]))
    q, k = both.chunk(2, -1)
    v = _of_tokens(tokens, block.v.weight, block.v.bias)
    side, shift = block.window, block.shift
    attended = ops.window_attention(q, k, v, window_size=side, num_heads=block.heads, shift=shift, mask=valid)

    own, others = block.fuse.weight.chunk(2, 1)
    with torch.autocast(x.device.type, enabled=False):  # products of weights are not rounded to what data are
        others, bias = others @ block.proj.weight, torch.addmv(block.fuse.bias, others, block.proj.bias)
    y = _of_tokens([tokens, attended], torch.cat([own, others], 1), bias, block.fuse.act)
    y = _of_tokens(y, block.fc1.weight, block.fc1.bias, block.fc1.act)
    y = _of_tokens(y, block.fc2.weight, block.fc2.bias, block.fc2.act)
    y = y.reshape(len(x), height * width, -1)
    if valid is None:
        return y, None
    if isinstance(mask, AttentionStep):
        return y, mask.valid.reshape(len(x), -1, 1)
    return y, ops.window_mask_update(valid, window_size=side, shift=shift).reshape(len(x), -1, 1)


def _of_tokens(
    x: Tensor | list[Tensor], weight: Tensor, bias: Tensor, act: tuple[str, float | None] = ("none", None)
) -> Tensor:
    """act(x · weightᵀ + bias) along the last dimension of maps (B, H, W, C), one or several side by side."""
    parts = [x] if isinstance(x, Tensor) else x
    maps = [part.permute(0, 3, 1, 2) for part in parts]
    y = convolved(POINTWISE, maps[0] if isinstance(x, Tensor) else maps, weight[:, :, None, None], bias, act)
    return y.permute(0, 2, 3, 1)


# ---- adapter --------------------------------------------------------------------------------------------------------


class BlockAdapter:
    """A block called as (tokens, (H, W), mask) that returns tokens and mask."""

    name = "mat.block"
    ops: tuple[str, ...] = ("fused_conv2d", "window_attention", "window_mask_update")
    algorithm = "windows by addresses, no mask of shifted windows, projection folded into the next layer"
    deep = False

    def match(self, module: nn.Module) -> str | None:
        form = form_of(module, block_of(module))
        return None if _is_form(form) else form

    def forward(self, module: Any, x: Tensor, size: tuple[int, int], mask: Tensor | AttentionStep | None = None) -> Any:
        block = _read(module)
        form = form_of(module, block)
        if not _is_form(form):
            raise RuntimeError(f"the module was changed after it was accelerated: {form}")
        return swin_block(block, form, x.contiguous(), (int(size[0]), int(size[1])), mask)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        block = block_of(module)
        if not _is_form(form := form_of(module, block)):
            yield form or "it is no block of MAT any more"
            return
        assert block is not None
        if len(args) not in (2, 3) or not isinstance(args[0], Tensor) or args[0].dim() != 3:
            yield "called with other arguments than tokens (B, H·W, C), their size and a mask"
            return
        x, size, mask = args if len(args) == 3 else (*args, None)
        weight = block.q.layer.weight
        if x.shape[2] != block.width or x.device != weight.device or 0 in x.shape:
            yield f"tokens {tuple(x.shape)} on {x.device}; the weights take {block.width} channels on {weight.device}"
        if not _computes(x, weight):
            yield f"tokens {x.dtype} with weights {weight.dtype}; both must be float32, float64 or bfloat16"
        yield from _refuses_size(block, size, x.shape[1])
        if getattr(module, "attn_mask", None) is not None and module.input_resolution == size:
            yield "its stored mask is for this size, and used"
        yield from _refuses_mask(mask.mask.flatten(1, 2) if isinstance(mask, AttentionStep) else mask, x)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        block = _read(module)
        tokens, size, valid = probe_tokens(block)
        x, mask = (t.to(block.q.layer.weight.dtype) for t in (tokens, valid))
        yield x, size, mask
        yield x, size, None


def _computes(x: Tensor, weight: Tensor) -> bool:
    if x.dtype == torch.bfloat16 and weight.dtype == torch.float32:  # what an earlier layer leaves under autocast
        return torch.is_autocast_enabled(x.device.type)
    return x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64, torch.bfloat16)


def _refuses_size(block: Block, size: Any, tokens: int) -> Iterator[str]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        yield "the size is not (H, W)"
    elif size[0] * size[1] != tokens:
        yield f"{tokens} tokens for a map of {tuple(size)}"
    elif size[0] % block.window or size[1] % block.window:
        yield f"windows of {block.window} do not divide a map of {tuple(size)}"


def _refuses_mask(mask: Any, x: Tensor) -> Iterator[str]:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != (*x.shape[:2], 1) or mask.device != x.device:
        yield "the mask is not (B, H·W, 1) on the tokens' device"
    elif mask.dtype not in (x.dtype, torch.float32) or mask.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        yield f"the mask is {mask.dtype}, the tokens are {x.dtype}"
    elif mask.requires_grad and torch.is_grad_enabled():
        yield "gradients may be asked of the mask"


def _read(module: Any) -> Block:
    block = block_of(module)
    if block is None:
        raise RuntimeError("the module was changed after it was accelerated: it is no block of MAT any more")
    return block


ADAPTERS = (BlockAdapter(),)

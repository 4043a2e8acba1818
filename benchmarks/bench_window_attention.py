"""window_attention at MAT's and Swin's layers, against the way of the public code, SDPA with a materialised mask, compiled.

All start from projected queries, keys and values and end with a map: rolling and cutting belong to what is measured. What
depends on the shift alone is made beforehand, as networks keep it in a buffer; for SDPA the whole mask is.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import inpaintrt
from inpaintrt import ops
from inpaintrt.models.mat_layers import SwinBlock
from inpaintrt.ops.window_attention import SPEC, regions, windows
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.policy import use_backend
from inpaintrt.testing import recipe

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# valid: every token; half: every other, at random; hole: a box of half the area, with windows of each kind.
MASKS = ("none", "valid", "half", "hole")
CASES = [(id, mask) for id, sample in SAMPLES.items() for mask in (MASKS if "mask" in sample.shapes else MASKS[:1])]


def make_mask(kind: str, height: int, width: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(1, height, width, 1)
    if kind == "half":
        return (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    if kind == "hole":
        tall, wide = round(0.7 * height), round(0.7 * width)
        mask[:, height // 6 : height // 6 + tall, width // 6 : width // 6 + wide] = 0
    return mask


class Eager:
    """MAT's layer: copies of windows, scores, shift mask, validity of keys, softmax, weighted values, copies back."""

    def __init__(self, sample, mask: Tensor | None, bias: Tensor | None, device: torch.device, dtype: torch.dtype):
        self.heads, self.size, self.shift = (sample.kwargs[n] for n in ("num_heads", "window_size", "shift"))
        _, self.height, self.width, self.channels = sample.shapes["q"]
        label = windows(regions(self.height, self.width, self.size, self.shift), self.size, self.shift)[0]
        self.seams = torch.where(label == label.mT, 0.0, -100.0).to(device, dtype)  # (windows, N, N)
        self.mask = None if mask is None else mask.to(device, dtype)
        self.bias = bias

    def cut(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B·windows, N, C)."""
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        b, h, w, c = x.shape
        x = x.view(b, h // self.size, self.size, w // self.size, self.size, c).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, self.size**2, c)

    def paste(self, x: Tensor) -> Tensor:
        """Its inverse."""
        down, across = self.height // self.size, self.width // self.size
        x = x.view(-1, down, across, self.size, self.size, self.channels).permute(0, 1, 3, 2, 4, 5)
        return torch.roll(x.reshape(-1, self.height, self.width, self.channels), (self.shift, self.shift), (1, 2))

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B·windows, heads, N, channels of a head)."""
        return self.cut(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = self.split(q), self.split(k), self.split(v)
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
        if self.bias is not None:
            scores = scores + self.bias
        scores = (scores.unflatten(0, (-1, len(self.seams))) + self.seams[:, None]).flatten(0, 1)
        if self.mask is not None:
            valid = self.cut(self.mask).squeeze(-1)
            valid = valid.masked_fill(valid == 0, -100.0).masked_fill(valid == 1, 0.0)
            scores = scores + valid[:, None, None, :]
        return self.paste((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))

    def materialised(self) -> Tensor:
        """All that is added to the scores, (windows, 1 or heads, N, N)."""
        added = self.seams[:, None]
        if self.mask is not None:
            valid = self.cut(self.mask).squeeze(-1)
            added = added + torch.where(valid == 1, 0.0, torch.where(valid == 0, -100.0, valid))[:, None, None, :]
        return (added if self.bias is None else added + self.bias).contiguous()

    def with_sdpa(self, q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(self.split(q), self.split(k), self.split(v), attn_mask=added)
        return self.paste(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sample", "mask_kind"), CASES)
@torch.inference_mode()
def test_window_attention(versus, device, sample, dtype, mask_kind):
    sample, dtype = SAMPLES[sample], DTYPES[dtype]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: torch.randn(s, generator=generator).to(device, dtype) for n, s in sample.shapes.items() if n != "mask"
    }
    mask = make_mask(mask_kind, *sample.shapes["q"][1:3])
    mask = None if mask is None else mask.to(device, dtype)
    q, k, v = (tensors[n] for n in "qkv")
    options = {**sample.kwargs, "mask": mask, "bias": tensors.get("bias")}
    eager = Eager(sample, mask, tensors.get("bias"), device, dtype)
    added = eager.materialised()
    candidates = {
        "eager": lambda: eager(q, k, v),
        "SDPA, materialised mask": lambda: eager.with_sdpa(q, k, v, added),
        "inpaintrt": lambda: ops.window_attention(q, k, v, **options),
    }
    args = SPEC.bind(q, k, v, **options)
    able = [backend for backend, reasons in dispatchers[SPEC.name].reasons(args, q).items() if not reasons]
    for backend in able[1:]:  # the first is what the dispatcher takes; the others show whether it should
        candidates[f"inpaintrt on {backend}"] = lambda backend=backend: forced(backend, q, k, v, options)
    if not versus.smoke:
        candidates["compile"] = versus.compiled(eager, q, k, v)
    wide = {n: o.double() if isinstance(o, Tensor) else o for n, o in options.items()}
    versus(
        candidates,
        truth=lambda: SPEC.run_reference(*SPEC.bind(q.double(), k.double(), v.double(), **wide)),
        cost=SPEC.cost(*args), device=device, dtype=dtype, shape=q.shape, op=SPEC.name, mask=mask_kind, direction="forward",
    )  # fmt: skip


@pytest.mark.parametrize("window", [8, 16])
@pytest.mark.parametrize("mask_kind", MASKS)
@torch.inference_mode()
def test_block(versus, device, window, mask_kind):
    """MAT's whole block at 64×64 tokens of 180 channels, shifted: attention, the layer that joins it, the MLP."""
    side, channels = 64, 180
    original = recipe.fill(SwinBlock(channels, 6, window, window // 2)).eval().to(device)
    accelerated = inpaintrt.accelerate(copy.deepcopy(original))
    x = (recipe.image("tokens", 1, side * side, channels) * 2 - 1).to(device)
    mask = make_mask(mask_kind, side, side)
    mask = None if mask is None else mask.view(1, -1, 1).to(device)
    wide = copy.deepcopy(original).double()
    versus(
        {"eager": lambda: original(x, (side, side), mask)[0], "inpaintrt": lambda: accelerated(x, (side, side), mask)[0]},
        truth=lambda: wide(x.double(), (side, side), None if mask is None else mask.double())[0],
        device=device, shape=x.shape, block=f"mat, window {window}", mask=mask_kind, direction="forward",
    )  # fmt: skip


def forced(backend: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, object]) -> Tensor:
    with use_backend(backend, op=SPEC.name):
        return ops.window_attention(q, k, v, **options)

r"""Window attention: softmax attention inside windows of a map, shifted or not, with a mask of valid tokens.

$$ p_{ij} = \operatorname{softmax}_j\left(s\, q_i \cdot k_j + \beta_{ij} + R_{ij} + V_j\right), \qquad
   \mathrm{out}_i = \sum_j p_{ij}\, v_j $$

i and j run over the tokens of one window. With a shift the windows lie on the map rolled by −shift, so those of the last
row and column hold tokens that are no neighbours: R is mask_value between two such regions, 0 within one. V is
mask_value where the mask is 0, 0 where it is 1, and **the mask itself** elsewhere, a small bonus, as MAT has it
(Li et al., "MAT: Mask-Aware Transformer for Large Hole Image Inpainting", CVPR 2022); without mask and with a bias it is
the attention of Swin (Liu et al., "Swin Transformer", ICCV 2021).

mask_value is a number, not −∞, and that decides results. Where all keys of a window are invalid, it cancels, and attention
is that without a mask. Where a query's own region has no valid key, its own invalid keys and the *valid* keys of the
other regions tie at −100: information crosses the seam of a rolled map exactly there.

**Windows without a valid token, in closed form.** Their addends cancel, so no mask is looked at. MAT's hold one vector,
as its partial convolutions leave 0 where nothing is valid; weights add up to 1, so that the result is the value itself,
whatever weights are. The CPU kernel compares the values of such a window, and computes no weights where they agree.
What a network's masks are at each of its layers follows from the input's mask alone: `models.mat_masks`.

Eager torch rolls, cuts windows out, writes every score five times over, and copies all of it back; the kernels compute
addresses instead. Where norms bound the logits, keys whose weights would vanish in float32 are left out, with their products and
exponentials.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

MOST_ROWS = 4096  # of a window, in CUDA kernels


def windows(x: Tensor, size: int, shift: int) -> Tensor:
    """(B, H, W, C) as (B, windows, size², C): windows and their tokens row by row, of the map rolled by −shift."""
    rolled = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
    b, h, w, c = x.shape
    cut = rolled.reshape(b, h // size, size, w // size, size, c).transpose(2, 3)
    return cut.reshape(b, h // size * (w // size), size * size, c)


def from_windows(cut: Tensor, height: int, width: int, size: int, shift: int) -> Tensor:
    """The inverse of `windows`."""
    b, c = cut.shape[0], cut.shape[-1]
    rolled = cut.reshape(b, height // size, width // size, size, size, c).transpose(2, 3).reshape(b, height, width, c)
    return torch.roll(rolled, (shift, shift), (1, 2)) if shift else rolled


def regions(height: int, width: int, size: int, shift: int, device: torch.device | None = None) -> Tensor:
    """(1, H, W, 1) int64: equal numbers inside one window are one region of the map before it was rolled."""
    labels = []
    for length in (height, width):
        rolled = torch.arange(length, device=device)
        label = (rolled >= length - size).long() + (rolled >= length - shift).long()
        labels.append(torch.roll(label, shift))
    return (3 * labels[0][:, None] + labels[1])[None, :, :, None]


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    num_heads: int,
    shift: int = 0,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    mask_value: float = -100.0,
) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    height, width = q.shape[1:3]
    with torch.autocast(q.device.type, enabled=False):
        # (B, windows, heads, N, channels of a head)
        queries, keys, values = (
            windows(t.to(wide), window_size, shift).unflatten(-1, (num_heads, -1)).transpose(2, 3) for t in (q, k, v)
        )
        factor = queries.shape[-1] ** -0.5 if scale is None else scale
        logits = (queries * factor) @ keys.mT
        if bias is not None:
            logits = logits + bias.to(wide)
        if shift:
            label = windows(regions(height, width, window_size, shift, q.device), window_size, shift).unsqueeze(2)
            logits = logits + torch.where(label == label.mT, 0.0, mask_value)
        if mask is not None:
            valid = windows(mask.to(wide), window_size, shift).unsqueeze(2).mT
            addend = torch.where(valid == 1, 0.0, torch.where(valid == 0, mask_value, valid))
            logits = logits + addend
        out = (torch.softmax(logits, -1) @ values).transpose(2, 3).flatten(3)
        return from_windows(out, height, width, window_size, shift).to(q.dtype).contiguous()


def check_map(name: str, x: Tensor, window_size: int, shift: int) -> None:
    """Raise `ValueError` unless x is a floating-point (B, H, W, C) that the windows divide, and the shift is theirs."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; accepted: (B, H, W, C), floating point")
    if window_size < 1 or not 0 <= shift < window_size:
        raise ValueError(f"window_size is {window_size}, shift {shift}; accepted: 1 or more, 0 to window_size − 1")
    h, w = x.shape[1:3]
    if h % window_size or w % window_size or 0 in (h, w):
        raise ValueError(f"{name} is {h}×{w}; accepted: positive multiples of window_size ({window_size})")


def _out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    num_heads: int,
    shift: int,
    scale: float | None,
    mask: Tensor | None,
    bias: Tensor | None,
    mask_value: float,
) -> Outputs:
    check_map("q", q, window_size, shift)
    for name, t in (("k", k), ("v", v)):
        if (t.shape, t.dtype, t.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}; "
                f"accepted: what q is, {tuple(q.shape)} {q.dtype} on {q.device}"
            )
    b, h, w, c = q.shape
    if num_heads < 1 or c % num_heads or c == 0:
        raise ValueError(
            f"num_heads is {num_heads}; accepted: a divisor of q's {c} channels, of which there is one at least"
        )
    if not -float("inf") < mask_value < float("inf"):
        raise ValueError(f"mask_value is {mask_value}; accepted: finite numbers (ties between masked keys are defined)")
    tokens = window_size**2
    for name, extra, shapes in (
        ("mask", mask, [(1, h, w, 1), (b, h, w, 1)]),
        ("bias", bias, [(num_heads, tokens, tokens)]),
    ):
        if extra is None:
            continue
        if tuple(extra.shape) not in shapes or extra.dtype not in (q.dtype, torch.float32) or extra.device != q.device:
            raise ValueError(
                f"{name} is {tuple(extra.shape)} {extra.dtype} on {extra.device}; accepted: "
                f"{' or '.join(map(str, dict.fromkeys(shapes)))}, {q.dtype} or float32, on {q.device}"
            )
    return (torch.empty(q.shape, dtype=q.dtype, device=q.device),)


def _gpu_refuses(q: Tensor, k: Tensor, v: Tensor, window_size: int, num_heads: int, *rest: object) -> Iterator[str]:
    """Heads of more than 64 channels."""
    if q.shape[3] // num_heads > 64:
        yield f"a head has {q.shape[3] // num_heads} channels; the kernel keeps up to 64 in registers"


def _cuda_refuses(*args: Any) -> Iterator[str]:
    """Heads of more than 64 channels, windows of more than 4096 rows."""
    yield from _gpu_refuses(*args)
    if args[3] > MOST_ROWS:
        yield f"a window has {args[3]} rows; the kernel counts the tokens of up to {MOST_ROWS} in 32 bits"


def _samples(level: str) -> Iterator[Sample]:
    def sample(
        id: str,
        *shape: int,
        heads: int = 1,
        size: int,
        masks: int = 0,
        bias: bool = False,
        fractional: bool = False,
        **kwargs: object,
    ) -> Sample:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys("qkv", shape)
        if masks:
            shapes["mask"] = (masks, *shape[1:3], 1)
        if bias:
            shapes["bias"] = (heads, size**2, size**2)
        return Sample(
            id, shapes, {"window_size": size, "num_heads": heads, **kwargs}, masks=() if fractional else ("mask",)
        )

    if level == "bench":
        # MAT at 512 pixels: 64² and 32² tokens; then its wider windows at 64², and the first two stages of Swin-T at 224.
        for side, size in ((64, 8), (32, 16), (64, 16)):
            yield sample(f"mat{side}w{size}", 1, side, side, 180, heads=6, size=size, masks=1, shift=size // 2)
        yield sample("swin56w7", 1, 56, 56, 96, heads=3, size=7, bias=True, shift=3)
        yield sample("swin28w7", 1, 28, 28, 192, heads=6, size=7, bias=True, shift=3)
        return
    yield sample("plain", 2, 4, 6, 6, heads=2, size=2)
    yield sample("one", 1, 1, 1, 1, size=1)
    yield sample("masked", 2, 8, 4, 10, heads=2, size=4, masks=2)
    yield sample("shifted", 1, 9, 6, 9, heads=3, size=3, shift=1)
    yield sample("both", 2, 8, 12, 30, size=4, masks=1, shift=2, scale=0.1)
    yield sample("biased", 1, 6, 6, 8, heads=2, size=3, masks=1, bias=True, shift=2, scale=0.125)
    yield sample("fractional", 1, 4, 8, 5, size=4, masks=1, fractional=True, shift=2)
    yield sample("soft_mask", 2, 5, 5, 3, size=5, masks=2, mask_value=-2.5, shift=3)
    yield sample("empty_batch", 0, 4, 4, 4, heads=2, size=2)
    if level == "full":
        yield sample("mat", 2, 16, 24, 60, heads=2, size=8, masks=2, shift=4, scale=0.05)
        yield sample("mat_unbounded", 1, 16, 16, 60, heads=2, size=8, masks=1, shift=4)
        yield sample("wide_windows", 1, 32, 48, 60, heads=2, size=16, masks=1, shift=8, scale=0.02)
        yield sample("swin", 1, 28, 21, 96, heads=3, size=7, bias=True, shift=3)
        yield sample("heads_of_64", 1, 8, 8, 128, heads=2, size=8, masks=1)
        yield sample("threads", 3, 24, 24, 34, heads=2, size=6, masks=1, shift=5, scale=0.05)


def _cost(q: Tensor, k: Tensor, v: Tensor, window_size: int, num_heads: int, *rest: object) -> Cost:
    # Two products over all keys, and about 20 operations of softmax a score. (Skipped keys are not taken off.)
    scores = q.shape[0] * q.shape[1] * q.shape[2] * float(window_size**2)
    return Cost(flops=scores * (4.0 * q.shape[3] + 20.0 * num_heads), bytes=4.0 * q.numel() * q.element_size())


SPEC = OpSpec(
    name="window_attention",
    summary="masked, shifted window attention by index arithmetic, without rolled or cut copies",
    reference=_reference,
    out=_out,
    lanes={
        "cuda": Lane(refuses=_cuda_refuses),
        "cupy": Lane(refuses=_cuda_refuses),
        "triton": Lane(refuses=_gpu_refuses),
        "cpu": Lane(),
    },
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    num_heads: int,
    shift: int = 0,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    mask_value: float = -100.0,
) -> Tensor:
    """Attention of each token to the tokens of its window, on a map whose windows may be shifted.

    Args:
        q: queries (B, H, W, C), projected (and normalised, if the network does) by the caller; head j has the channels
            [j·C/num_heads, (j+1)·C/num_heads). float32, bfloat16, float16 (float64: reference only); any strides.
        k: keys, as q.
        v: values, as q.
        window_size: side of a window; it divides H and W.
        num_heads: divides C.
        shift: windows lie on the map rolled by (−shift, −shift), 0 to window_size − 1.
        scale: factor on q·k; None for (C/num_heads)^−½.
        mask: (1|B, H, W, 1), **1 = valid**, 0 = invalid; other values are added to the logits of their key as they are.
            dtype of q or float32. None: all valid.
        bias: (num_heads, N, N) with N = window_size², added to the logits of [head, query, key], tokens of a window row by
            row; dtype of q or float32.
        mask_value: finite; added to the logit of an invalid key, and to that of a key in another region of a shifted
            window; both add up.

    Returns:
        (B, H, W, C), contiguous, dtype of q. Differentiable. A window without a valid key attends as if there were no mask.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, or the windows do not divide the map.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Logits, softmax and sums are float32 for half-precision inputs. Source: Liu et al., ICCV 2021, section 3.2; Li et al., CVPR
    2022, section 3.3.
    """
    return _call(q, k, v, window_size, num_heads, shift, scale, mask, bias, mask_value)  # type: ignore[no-any-return]

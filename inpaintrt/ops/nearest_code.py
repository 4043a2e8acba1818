r"""Nearest code: which entry of a codebook each vector is quantised to.

$$ \mathrm{out}_n = \operatorname*{arg\,min}_{k \in S_n} \left(|x_n|^2 + |e_k|^2 - 2\, x_n \cdot e_k\right) $$

S_n is the whole codebook. Of a dual codebook, it is the first `split` entries for vectors that are known and the others
for the rest (Liu et al., "Reduce Information Loss in Transformers for Pluralistic Image Inpainting", CVPR 2022: patches
with a hole in them are quantised by codes of their own). The quantiser is that of van den Oord et al., "Neural Discrete
Representation Learning", NeurIPS 2017.

Eager torch writes and reads a matrix of all distances several times; the kernels keep, for each vector, the least one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample


def _reference(x: Tensor, codebook: Tensor, *, split: int | None = None, known: Tensor | None = None) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):  # a rounded distance is another code
        x, codebook = x.to(wide), codebook.to(wide)
        distances = x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * (x @ codebook.t())
    if split is None or known is None:
        return distances.argmin(1)
    return torch.where(known != 0, distances[:, :split].argmin(1), split + distances[:, split:].argmin(1))


def _out(x: Tensor, codebook: Tensor, split: int | None, known: Tensor | None) -> Outputs:
    for name, t in (("x", x), ("codebook", codebook)):
        if t.dim() != 2 or not t.is_floating_point():
            raise ValueError(f"{name} is {tuple(t.shape)} {t.dtype}; accepted: 2-D, floating point")
    if min(codebook.shape) < 1:
        raise ValueError(f"codebook is {tuple(codebook.shape)}; accepted: (K, D) with K and D at least 1")
    if x.shape[1] != codebook.shape[1] or (x.dtype, x.device) != (codebook.dtype, codebook.device):
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}; accepted: (N, {codebook.shape[1]}) {codebook.dtype} on "
            f"{codebook.device}, as the codebook"
        )
    if (split is None) != (known is None):
        raise ValueError(
            f"split is {split} and known is {'None' if known is None else tuple(known.shape)}; accepted: both or neither"
        )
    if split is not None and not 0 < split < codebook.shape[0]:
        raise ValueError(f"split is {split}; accepted: 1 to {codebook.shape[0] - 1}, so that neither half is empty")
    if known is not None and (known.shape != x.shape[:1] or known.device != x.device):
        raise ValueError(
            f"known is {tuple(known.shape)} on {known.device}; accepted: ({x.shape[0]},) on {x.device}, one for each x"
        )
    return (torch.empty(x.shape[0], dtype=torch.int64, device=x.device),)


MOST_CODES = 1 << 24
"""Codes that a kernel counts: their groups' numbers must be exact as float32."""


def _refuses(x: Tensor, codebook: Tensor, split: int | None, known: Tensor | None) -> Iterator[str]:
    """Codebooks of more than 2^24 entries; a `known` that is neither bool nor of x's dtype."""
    if codebook.shape[0] > MOST_CODES:
        yield f"codebook has {codebook.shape[0]} entries; the kernel counts up to {MOST_CODES}"
    if known is not None and known.dtype not in (torch.bool, x.dtype):
        yield f"known is {known.dtype}; the kernel reads torch.bool or {x.dtype}, x's dtype"


def _samples(level: str) -> Iterator[Sample]:
    def sample(id: str, n: int, k: int, d: int, split: int | None = None) -> Sample:
        known = {} if split is None else {"known": (n,)}
        return Sample(id, {"x": (n, d), "codebook": (k, d), **known}, {} if split is None else {"split": split})

    if level == "bench":
        yield sample("1024x8192", 1024, 8192, 256)  # PUT (TPAMI): the known patches of an image
        yield sample("1024x512", 1024, 512, 256)  # PUT (CVPR)
        yield sample("1024x9216", 1024, 9216, 256, 8192)  # both codebooks in one call
        return
    yield sample("odd", 5, 37, 7)
    yield sample("one", 1, 1, 1)
    yield sample("split", 19, 70, 33, 41)
    yield sample("empty_batch", 0, 4, 3)
    if level == "full":
        yield sample("long", 3, 11, 515, 5)
        yield sample("threads", 131, 1061, 64, 900)


def _cost(x: Tensor, codebook: Tensor, split: int | None, known: Tensor | None) -> Cost:
    n, d = x.shape
    codes = codebook.shape[0] if split is None else split  # the known ones are most of an image
    read = (x.numel() + codebook.numel()) * x.element_size()
    return Cost(flops=2.0 * n * codes * d, bytes=float(read + 8 * n))


SPEC = OpSpec(
    name="nearest_code",
    summary="the nearest entry of a codebook, or of the half that a vector's kind selects",
    reference=_reference,
    out=_out,
    lanes=dict.fromkeys(("cuda", "triton", "cupy", "cpu"), Lane(refuses=_refuses)),
    samples=_samples,
    cost=_cost,
    differentiable=False,
)

_call = register(SPEC)


def nearest_code(x: Tensor, codebook: Tensor, *, split: int | None = None, known: Tensor | None = None) -> Tensor:
    """Index of the codebook entry at the least squared distance |x|² + |e|² − 2x·e; the first of equal ones.

    Args:
        x: (N, D), float32, bfloat16, float16 (float64: reference only); any strides.
        codebook: (K, D), dtype and device of x; K and D at least 1.
        split: 1 to K − 1: vectors that are known search entries [0, split), the others [split, K). With `known` only.
        known: (N,), bool or any number: not 0 = known.

    Returns:
        int64 (N,), indices into the whole codebook. As with `torch.argmin`, a distance that is NaN is less than any
        other, and the first index is returned where all are infinite. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, split leaves a half empty, or comes without known.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Distances are float32 or more. Two entries whose distances differ by less than float32's rounding of |x|² + |e|² may be
    exchanged. Source: Liu et al., CVPR 2022, section 3.1.
    """
    return _call(x, codebook, split, known)  # type: ignore[no-any-return]

r"""AOT gate: the end of a block that aggregates contextual transformations.

$$ \mathrm{out} = x + (\mathrm{fuse} - x) \cdot \sigma\!\left(10\,\frac{g - \mu}{s + \varepsilon} - 5\right) $$

μ and s are mean and unbiased standard deviation of the gate g over the pixels of a channel, so the mask depends on how a
pixel differs from its image, not on the gate's scale: 0.0067 at the mean, a half at half a deviation above it. AOT-GAN
(Zeng et al., "Aggregated Contextual Transformations for High-Resolution Image Inpainting", TVCG 2022) ends each of its
blocks with it. Eager torch makes about twelve passes over the three tensors; the kernels make two: statistics, blend.

Because the statistics are those of the whole image, the result of a tile is not a tile of the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from ._shared import empty_output


def _reference(x: Tensor, fuse: Tensor, gate: Tensor, *, eps: float = 1e-9) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    g = gate.to(torch.float64)  # a float32 mean loses what is left of a gate like 10⁴ ± 0.01
    centred = g - g.mean((2, 3), keepdim=True)
    # Not torch.std, which warns of a single pixel (NaN, as here). The norm's gradient in a constant channel is 0.
    deviation = torch.linalg.vector_norm(centred, dim=(2, 3), keepdim=True) / max(g.shape[2] * g.shape[3] - 1, 0) ** 0.5
    mask = torch.sigmoid(10 * centred / (deviation + eps) - 5).to(wide)
    return (x.to(wide) + (fuse.to(wide) - x.to(wide)) * mask).to(x.dtype)


def _out(x: Tensor, fuse: Tensor, gate: Tensor, eps: float) -> Outputs:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; accepted: (B, C, H, W), floating point")
    for name, t in (("fuse", fuse), ("gate", gate)):
        if (t.shape, t.dtype, t.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}; "
                f"accepted: what x is, {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; accepted: 0 or more")
    return (empty_output(x.shape, x),)


def _samples(level: str) -> Iterator[Sample]:
    def sample(id: str, *shape: int, eps: float = 1e-9) -> Sample:
        return Sample(id, {"x": shape, "fuse": shape, "gate": shape}, {"eps": eps})

    if level == "bench":
        # AOT-GAN's blocks for images of 256, 512 and 1024 pixels; MIT2's narrower ones for 512.
        for channels, side in ((256, 64), (256, 128), (256, 256), (128, 128)):
            yield sample(f"{channels}x{side}", 1, channels, side, side)
        return
    yield sample("odd", 2, 3, 5, 7)
    yield sample("two", 1, 1, 1, 2)  # the fewest that have a deviation: of one pixel all is NaN
    yield sample("long_row", 1, 1, 3, 1031)
    yield sample("empty_batch", 0, 4, 3, 3)
    yield sample("eps", 2, 18, 6, 4, eps=0.5)
    if level == "full":
        yield sample("channels", 2, 67, 9, 6)
        yield sample("column", 3, 16, 129, 1)
        yield sample("pieces", 1, 2, 130, 257)
        yield sample("threads", 1, 48, 96, 97)


def _cost(x: Tensor, fuse: Tensor, gate: Tensor, eps: float) -> Cost:
    # Read once each and written once: a kernel that keeps a channel's gate in the cache between its passes.
    return Cost(flops=20.0 * x.numel(), bytes=4.0 * x.numel() * x.element_size())


SPEC = OpSpec(
    name="aot_gate",
    summary="x + (fuse − x) · sigmoid(10 · (gate − mean)/std − 5), the end of an AOT-GAN block",
    reference=_reference,
    out=_out,
    lanes={"cuda": Lane(), "triton": Lane(), "cupy": Lane(), "cpu": Lane()},
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)


def aot_gate(x: Tensor, fuse: Tensor, gate: Tensor, *, eps: float = 1e-9) -> Tensor:
    """x + (fuse − x) · sigmoid(10 · (gate − mean)/(std + eps) − 5), mean and std of gate over the pixels of a channel.

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 (float64: reference only); any strides. The block's input.
        fuse: as x, in any strides; what the mask 1 selects.
        gate: as x, in any strides; its mean and unbiased standard deviation are taken per sample and channel.
        eps: added to the standard deviation, at least 0. A constant channel has the mask sigmoid(−5) = 0.0067.

    Returns:
        Shape and dtype of x, channels_last if x is, else contiguous. NaN where a channel has one pixel, or a pixel of its
        gate is not finite. Differentiable.

    Raises:
        ValueError: x is not 4-D floating point, fuse or gate differs from it in shape, dtype or device, or eps < 0.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Statistics do not cancel, whatever the gate's mean; arithmetic is float32 or more for half-precision inputs, so that eps
    does not become 0, and is rounded once. Source: Zeng et al., TVCG 2022.
    """
    return _call(x, fuse, gate, eps)  # type: ignore[no-any-return]

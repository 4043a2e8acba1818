r"""Group norm with scale and shift by time step, and SiLU: what stands before each convolution of a diffusion UNet.

$$ \mathrm{out} = \mathrm{act}\!\left(\left(\gamma \cdot \frac{x - \mu}{\sqrt{v + \varepsilon}} + \beta\right)
   \cdot (1 + \mathrm{scale}) + \mathrm{shift}\right) $$

μ and v are mean and biased variance over the pixels of a group of neighbouring channels (Wu and He, "Group
Normalization", ECCV 2018). scale and shift come from the embedding of the time step, one number per sample and channel
(Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021). Eager torch makes one pass for the
statistics and four for the rest, with as many temporaries; the kernels make two, statistics and all else, and read the
features and the skip connection of a decoder where they are, without joining them.

Because the statistics are those of the whole image, the result of a tile is not a tile of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from ._shared import empty_output

_ACTIVATIONS = ("silu", "none")


def _reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    second: Tensor | None = None,
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    joined = x if second is None else torch.cat([x, second], dim=1)
    b, c, h, w = joined.shape
    # In float64, and centred first: a float32 mean loses what is left of features like 10⁴ ± 0.01, and torch's group_norm
    # of channels_last images subtracts the square of the mean from the mean of squares.
    groups = joined.to(torch.float64).reshape(b, num_groups, c // num_groups * h * w)
    centred = groups - groups.mean(2, keepdim=True)
    deviation = (centred.square().mean(2, keepdim=True) + eps).sqrt()
    y = (centred / deviation).reshape(joined.shape).to(wide)
    for factor, addend, more in ((weight, bias, 0), (scale, shift, 1)):
        if factor is not None:
            y = y * _per_channel(more + factor.to(wide))
        if addend is not None:
            y = y + _per_channel(addend.to(wide))
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _per_channel(vector: Tensor) -> Tensor:
    return vector[..., None, None]


def _out(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
    second: Tensor | None,
) -> Outputs:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; accepted: (B, C, H, W) or (B, C, T), floating point")
    b, c, h, w = x.shape
    if second is not None:
        kind = (second.dtype, second.device)
        if second.dim() != 4 or (second.shape[0], *second.shape[2:]) != (b, h, w) or kind != (x.dtype, x.device):
            raise ValueError(
                f"the second part of x is {tuple(second.shape)} {second.dtype} on {second.device}; "
                f"accepted: {(b, 'C', h, w)} {x.dtype} on {x.device}, as the first"
            )
        c += second.shape[1]
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"num_groups is {num_groups}, x has {c} channels; accepted: groups of equally many channels")
    for name, vector, shape in (
        ("weight", weight, (c,)),
        ("bias", bias, (c,)),
        ("scale", scale, (b, c)),
        ("shift", shift, (b, c)),
    ):
        if vector is None:
            continue
        if vector.shape != shape or vector.dtype not in (x.dtype, torch.float32) or vector.device != x.device:
            raise ValueError(
                f"{name} is {tuple(vector.shape)} {vector.dtype} on {vector.device}; "
                f"accepted: {tuple(shape)} {x.dtype} or torch.float32 on {x.device}"
            )
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; accepted: 0 or more")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted: {', '.join(_ACTIVATIONS)}")
    return (empty_output((b, c, h, w), x),)


def _samples(level: str) -> Iterator[Sample]:
    def sample(id: str, x: tuple[int, ...], groups: int, *, tensors: str = "weight bias", **kwargs: object) -> Sample:
        shapes = {"x": x}
        for name in tensors.split():
            shapes[name] = x[:2] if name in ("scale", "shift") else x[1:2]
        return Sample(id, shapes, {"num_groups": groups, **kwargs})

    film = "weight bias scale shift"
    if level == "bench":
        # Guided diffusion's UNets, batch 1: of 128 channels at 64 pixels, of 256 channels at 256 pixels (RePaint).
        for c, side in (
            (128, 64),
            (256, 32),
            (384, 16),
            (512, 8),
            (1024, 8),
            (256, 256),
            (512, 64),
            (1536, 32),
            (1024, 16),
        ):
            yield sample(f"{c}x{side}", (1, c, side, side), 32, tensors=film)
        return
    yield sample("odd", (2, 6, 5, 7), 3, tensors=film)
    yield sample("one", (1, 2, 1, 1), 2)
    yield sample("long_row", (1, 2, 3, 1031), 1, activation="none")
    yield sample("empty_batch", (0, 4, 3, 3), 2, tensors=film)
    yield sample("plain", (1, 4, 9, 4), 2, tensors="", eps=0.5)
    yield sample("scale_only", (2, 40, 3, 5), 4, tensors="scale", activation="none")
    yield sample("shift_and_bias", (1, 20, 4, 3), 20, tensors="bias shift")
    if level == "full":
        yield sample("wide_groups", (2, 102, 9, 6), 2, tensors=film)
        yield sample("layer_norm", (3, 35, 129, 1), 1)
        yield sample("pieces", (1, 4, 130, 257), 2, tensors=film)
        yield sample("threads", (1, 96, 48, 49), 32, tensors=film)


def _cost(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
    second: Tensor | None,
) -> Cost:
    # Read once and written once: a kernel that keeps a group in the cache between its passes.
    n = x.numel() + (0 if second is None else second.numel())
    return Cost(flops=(24.0 if activation == "silu" else 8.0) * n, bytes=2.0 * n * x.element_size())


SPEC = OpSpec(
    name="group_norm_silu",
    summary="SiLU(group_norm(x) · (1 + scale) + shift), of one tensor or of two read as joined",
    reference=_reference,
    out=_out,
    lanes={"cuda": Lane(), "triton": Lane(), "cupy": Lane(), "cpu": Lane()},
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)


def group_norm_silu(
    x: Tensor | Sequence[Tensor],
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """act(group_norm(x) · (1 + scale) + shift), with group_norm(x) = (x − mean)/√(variance + eps) · weight + bias.

    Args:
        x: (B, C, H, W) or (B, C, T), float32, bfloat16, float16 (float64: reference only); any strides. Or several that
            differ in C alone, read as their concatenation along the channels: the second where it is, more are joined first.
            A group may hold channels of both.
        num_groups: a divisor of C, of all parts together.
        weight, bias: (C,), dtype of x or float32; None is 1 and 0.
        scale, shift: (B, C), dtype of x or float32, any strides; None is 0.
        eps: added to the biased variance, at least 0.
        activation: "silu" or "none".

    Returns:
        Shape (with all parts' channels) and dtype of x, channels_last if x (its first part) is, else contiguous; of a
        (B, C, T) view of a channels_last image, such a view again. NaN in groups that hold a value that is not finite.
        Differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, num_groups does not divide C, eps < 0 or another activation.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Statistics do not cancel, whatever the mean; arithmetic is float32 or more for half-precision inputs and is rounded
    once. Sources: Wu and He, ECCV 2018, eq. 1 to 3; Dhariwal and Nichol, NeurIPS 2021, section 3.1.
    """
    second = None
    if not isinstance(x, Tensor):
        x, *rest = x
        if rest:
            second = rest[0] if len(rest) == 1 else torch.cat(rest, dim=1)
    if x.dim() != 3:
        return _call(x, num_groups, weight, bias, scale, shift, eps, activation, second)  # type: ignore[no-any-return]
    second = None if second is None else second[..., None]
    y: Tensor = _call(x[..., None], num_groups, weight, bias, scale, shift, eps, activation, second)
    return y[..., 0]

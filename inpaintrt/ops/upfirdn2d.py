r"""Resampling by a FIR filter: zeros between the samples, padding, a filter, every n-th sample.

$$ \mathrm{out}_{y,x} = \mathrm{gain} \sum_{i,j} f_{i,j} \, \hat{x}_{d y + K - 1 - i,\; d x + K - 1 - j} $$

where $\hat{x}$ is x with u − 1 zeros after each sample, padded or cropped, and K the filter's size. It is how StyleGAN 2 and the
networks that are built on it halve and double images without aliasing (Karras et al., "Analyzing and Improving the Image
Quality of StyleGAN", CVPR 2020, appendix B). Eager torch writes the zeros out and multiplies by them: sixteen products for
four that count; where the filter is an outer product, kernels filter rows and columns in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from ._convolution import dtype_of_sums, single
from ._resampling import resample, resampled_size
from ._shared import empty_output

LARGEST_FILTER = 16
LARGEST_FACTOR = 8
_ONCE = [1, 1]
_NONE = [0, 0, 0, 0]


def _reference(
    x: Tensor,
    f: Tensor,
    *,
    up: list[int] = _ONCE,
    down: list[int] = _ONCE,
    padding: list[int] = _NONE,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return resample(single(x), f.to(dtype_of_sums(x)), up, down, padding, flip_filter, gain).to(x.dtype)


def _out(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], flip_filter: bool, gain: float
) -> Outputs:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; accepted: (B, C, H, W), floating point")
    if f.dim() != 2 or min(f.shape) < 1 or not f.is_floating_point() or f.device != x.device:
        raise ValueError(
            f"f is {tuple(f.shape)} {f.dtype} on {f.device}; accepted: (rows, columns), floating point, on {x.device}"
        )
    if [len(up), len(down), len(padding)] != [2, 2, 4] or min(*up, *down) < 1:
        raise ValueError(f"up is {up}, down {down}, padding {padding}; accepted: 1 or more each; one number, 2 or 4")
    size = resampled_size(x.shape[2:], f.shape, up, down, padding)
    return (empty_output((*x.shape[:2], *size), x),)


def _cpu_refuses(x: Tensor, f: Tensor, up: list[int], down: list[int], *_: object) -> Iterator[str]:
    """Filters longer than 16 taps, factors above 8."""
    if max(f.shape) > LARGEST_FILTER:
        yield f"the filter has {f.shape[0]}×{f.shape[1]} taps; up to {LARGEST_FILTER} on a side are covered"
    if max(*up, *down) > LARGEST_FACTOR:
        yield f"up is {up}, down {down}; up to {LARGEST_FACTOR} is covered"


def _samples(level: str) -> Iterator[Sample]:
    def sample(id: str, x: tuple[int, ...], f: tuple[int, int], **kwargs: object) -> Sample:
        return Sample(id, {"x": x, "f": f}, kwargs)

    if level == "bench":
        # Co-ModGAN at 512 pixels: after and before its convolutions, and the sum of RGB images. MI-GAN's, too.
        yield sample("blur-64x513", (1, 64, 513, 513), (4, 4), padding=[1, 1, 1, 1], gain=4.0)
        yield sample("blur-512x65", (1, 512, 65, 65), (4, 4), padding=[1, 1, 1, 1], gain=4.0)
        yield sample("up-3x256", (1, 3, 256, 256), (4, 4), up=[2, 2], padding=[2, 1, 2, 1], gain=4.0)
        yield sample("up-128x128", (1, 128, 128, 128), (4, 4), up=[2, 2], padding=[2, 1, 2, 1], gain=4.0)
        yield sample("down-64x512", (1, 64, 512, 512), (4, 4), down=[2, 2], padding=[1, 1, 1, 1])
        return
    yield sample("up", (2, 3, 5, 7), (4, 4), up=[2, 2], padding=[2, 1, 2, 1], gain=4.0)
    yield sample("down", (1, 18, 9, 12), (4, 4), down=[2, 2], padding=[1, 1, 1, 1])
    yield sample("blur", (1, 17, 6, 21), (3, 5), padding=[2, 2, 1, 1], flip_filter=True)
    yield sample("cropped", (2, 5, 9, 8), (2, 3), up=[1, 2], down=[3, 1], padding=[-1, 3, 2, -2])
    yield sample("one", (1, 1, 1, 1), (1, 1), up=[2, 2], down=[2, 2])
    yield sample("empty_batch", (0, 3, 4, 4), (4, 4), padding=[2, 1, 2, 1])
    if level == "full":
        yield sample("long_row", (1, 2, 2, 1031), (1, 6), up=[3, 1], down=[2, 1], padding=[3, 2, 0, 0])
        yield sample("tall", (1, 33, 40, 1), (16, 1), up=[1, 8], padding=[0, 0, 8, 7])
        yield sample("threads", (2, 24, 65, 64), (4, 4), padding=[1, 1, 1, 1], gain=4.0)


def _cost(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], flip_filter: bool, gain: float
) -> Cost:
    h, w = resampled_size(x.shape[2:], f.shape, up, down, padding)
    out = x.shape[0] * x.shape[1] * h * w
    taps = -(-f.shape[0] // up[1]) + -(-f.shape[1] // up[0])  # of those that are not zeros, in rows and in columns
    return Cost(flops=2.0 * taps * out, bytes=float(x.numel() + out) * x.element_size())


SPEC = OpSpec(
    name="upfirdn2d",
    summary="zeros between the samples, padding, a FIR filter, every n-th sample",
    reference=_reference,
    out=_out,
    lanes={
        "cuda": Lane(),
        "cupy": Lane(),
        "triton": Lane(),
        "cpu": Lane(dtypes=frozenset({torch.float32, torch.bfloat16}), refuses=_cpu_refuses),
    },
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)


def as_filter(f: Tensor | None, like: Tensor, name: str = "f") -> Tensor:
    """A filter as (rows, columns), in the dtype of `like`'s sums: of one dimension for rows and columns, None is 1."""
    if f is None:
        return torch.ones((1, 1), dtype=dtype_of_sums(like), device=like.device)
    if not isinstance(f, Tensor):
        raise ValueError(f"{name} is a {type(f).__name__}; accepted: a tensor, (rows, columns) or (taps,), or None")
    f = f.to(dtype_of_sums(like))
    return f[:, None] * f[None] if f.dim() == 1 else f


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """x with zeros inserted, padded, filtered by f and decimated; arguments mean what they mean in StyleGAN 2's code.

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 (float64: reference only); any strides.
        f: filter, (rows, columns), or (taps,) for rows and columns alike, or None for 1; floating point, used as float32.
        up: each sample is followed by up − 1 zeros, the last one too; one number, or (x, y).
        down: every down-th sample is kept, from the first on; one number, or (x, y).
        padding: zeros around the enlarged image, where negative a crop; one number, (x, y) or (left, right, top, bottom).
        flip_filter: False convolves, so that the filter's last tap meets the first sample; True correlates.
        gain: factor on the result.

    Returns:
        (B, C, (H·up + top + bottom − rows)//down + 1, …), dtype of x, channels_last if x is, else contiguous. Differentiable.

    Raises:
        ValueError: shapes or options do not fit, or nothing is left of x; the message names them.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Sums are float32, rounded once. Source: Karras et al., CVPR 2020, appendix B.
    """
    pairs = [list(n) if isinstance(n, Sequence) else [int(n)] * 2 for n in (up, down)]
    sides = list(padding) if isinstance(padding, Sequence) else [int(padding)] * 4
    if len(sides) == 2:
        sides = [sides[0], sides[0], sides[1], sides[1]]
    return _call(x, as_filter(f, x), *pairs, sides, flip_filter, gain)  # type: ignore[no-any-return]

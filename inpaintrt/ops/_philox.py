"""Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

The definition that every backend reproduces. A number depends on its sample's seed, its place in the sample, a stream
and a call, on nothing else: not on the batch it is computed in, its layout, the device or the number of threads.

- key: the 64 bits of the sample's seed, low word first;
- counter: (block mod 2³², block div 2³², stream, call), where block = e div 4 of the element's index e within its sample
  in logical C, H, W order; element e takes word e mod 4. A last block that is not full is computed whole;
- uniform: u = fma(float32(w), 2⁻³², 2⁻³³) in float32, within [2⁻³³, 1];
- normal: (z₀, z₁) = √(−2 ln u₀) · (cos 2πu₁, sin 2πu₁), and (z₂, z₃) from u₂, u₃.

Words and uniforms have the same bits on every backend; a backend's normal differs from the exact one of its uniforms by at
most 2⁻²² · max(1, r), r its radius √(−2 ln u).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

INITIAL, STEP, KNOWN = 0, 1, 2
"""Streams: the image that sampling starts from, the noise of a step, the noise of the known region."""

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Word = Tensor | int
"""32 bits: an int64 tensor of 0 to 2³² − 1, or one such number for all."""


def philox4x32(counter: Sequence[Word], key: Sequence[Word]) -> Tensor:
    """The four words of each counter, in a new last dimension, as int64 numbers from 0 to 2³² − 1.

    `counter` (4) and `key` (2) hold what `Word` says, tensors of shapes that broadcast together; one at least is a tensor.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = ((k + by) & WORD for k, by in zip((k0, k1), _INCREMENTS, strict=True))
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)  # type: ignore[arg-type]


def _product(a: Word, b: int) -> tuple[Word, Word]:
    """High and low word of a · b, by halves of b: no partial sum leaves 63 bits."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def uniform(words: Tensor) -> Tensor:
    """float32 uniforms of words: one rounding in the conversion, one in the sum."""
    return words.to(torch.float32) * 2.0**-32 + 2.0**-33


def box_muller(uniforms: Tensor) -> Tensor:
    """Normals, in float64, of uniforms whose last dimension holds pairs (radius, angle)."""
    u = uniforms.to(torch.float64).unflatten(-1, (-1, 2))
    radius = (-2.0 * u[..., 0].log()).sqrt()
    quarters = 4.0 * u[..., 1]
    nearest = quarters.round()
    angle = (quarters - nearest) * (math.pi / 2)  # within ±π/4, so that the axes are met exactly
    cosine, sine = angle.cos(), angle.sin()
    quadrant = nearest.to(torch.int64) & 3
    odd = (quadrant & 1).bool()
    x, y = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    sign = (1 - (quadrant & 2)).to(torch.float64)
    return torch.stack((radius * sign * x, radius * sign * y), -1).flatten(-2)


def normal(seeds: Tensor, shape: Sequence[int], stream: int, call: Word, dtype: torch.dtype) -> Tensor:
    """Normals of `shape` = (B, …) for B seeds; `call` may be a number on the device."""
    elements = math.prod(shape[1:])
    block = torch.arange((elements + 3) // 4, device=seeds.device)
    seed = seeds.to(torch.int64).unsqueeze(1)
    call = call.to(torch.int64) & WORD if isinstance(call, Tensor) else call
    words = philox4x32((block & WORD, block >> 32, stream, call), (seed & WORD, seed >> 32 & WORD))
    return box_muller(uniform(words)).to(dtype).flatten(1)[:, :elements].reshape(tuple(shape))


def check_seeds(seeds: Tensor, batch: int, device: torch.device) -> None:
    if seeds.dtype != torch.int64 or tuple(seeds.shape) != (batch,) or seeds.device != device:
        raise ValueError(
            f"seeds is {tuple(seeds.shape)} {seeds.dtype} on {seeds.device}; accepted: ({batch},) torch.int64 on {device}, "
            "one seed per sample"
        )


def check_call(call: int, counter: Tensor | None, device: torch.device) -> None:
    if not 0 <= call <= WORD:
        raise ValueError(f"call is {call}; accepted: 0 to 2**32 - 1")
    if counter is None:
        return
    if counter.dim() != 0 or counter.dtype not in (torch.int32, torch.int64) or counter.device != device:
        raise ValueError(
            f"call is {tuple(counter.shape)} {counter.dtype} on {counter.device}; accepted: a number, or a 0-d tensor of "
            f"torch.int32 or torch.int64 on {device}"
        )
    if call:
        raise ValueError(f"call is {call} and a tensor too; accepted: one of them")


def philox_normal(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    call: int | Tensor = 0,
    stream: int = INITIAL,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise that depends on seed, place, stream and call only: the image that sampling starts from.

    Args:
        seeds: int64 (B,), one per sample; all 64 bits count.
        shape: (B, …) of the result; a sample's elements are counted in this order.
        call: position in the sequence of draws, 0 to 2³² − 1: a number, or a 0-d int32 or int64 tensor on the seeds' device.
        stream: 0 initial image (default), 1 noise of steps, 2 noise of known regions.
        dtype: float32, or float64 for the numbers that float32 rounds.

    Returns:
        Tensor of `shape` and `dtype` on the seeds' device. The noise that `sampler_step` and `linear_step` make of the same
        seeds, call and stream differs from it by at most 2⁻²² · max(1, r), r = √(−2 ln u).

    Raises:
        ValueError: seeds is not int64 (B,), or call, stream or dtype is none of the above.
    """
    shape = tuple(shape)
    if not shape:
        raise ValueError("shape is (); accepted: (B, …)")
    check_seeds(seeds, shape[0], seeds.device)
    at, counter = split_call(call)
    check_call(at, counter, seeds.device)
    if not 0 <= stream <= WORD:
        raise ValueError(f"stream is {stream}; accepted: 0 to 2**32 - 1")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; accepted: torch.float32, torch.float64")
    return normal(seeds, shape, stream, call, dtype)


def split_call(call: int | Tensor) -> tuple[int, Tensor | None]:
    """A call's number as a schema holds it: in the program, or on the device."""
    return (0, call) if isinstance(call, Tensor) else (call, None)

r"""Linear step: what most diffusion samplers do between two calls of their network.

$$ y = \mathrm{clamp}\left(\sum_i a_i t_i + a_z z, \pm c\right), \qquad
\mathrm{out} = m\,(g \cdot \mathrm{known} + s k) + (1 - m)\,y $$

DDPM, DDIM, Euler (ancestral too), DPM-Solver++, UniPC, DDNM, SDEdit and the blend of latent inpainting are sums of a few
tensors of one shape with numbers that are known before the loop (Song et al., "Denoising Diffusion Implicit Models", ICLR
2021; Karras et al., NeurIPS 2022; Lu et al., 2022; Zhao et al., NeurIPS 2023; Wang et al., ICLR 2023; Meng et al., ICLR
2022; Avrahami et al., 2023). Eager torch makes a pass for every product and every sum; the kernels make one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inpaintrt.runtime.library import register, register_out
from inpaintrt.runtime.spec import FLOATS, Cost, Lane, OpSpec, Outputs, Sample

from . import _philox
from ._sampling import blend, check_image, check_known, check_like, check_out, check_table, column, drawn
from ._shared import empty_output

MOST_TERMS = 5


def _reference(
    terms: list[Tensor],
    coefficients: Tensor,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    call: int = 0,
    counter: Tensor | None = None,
    clip: float | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    first, n = terms[0], len(terms)
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    a = [column(coefficients.to(wide), i) for i in range(n + 3)]
    y = a[0] * first.to(wide)
    for factor, term in zip(a[1:n], terms[1:], strict=True):
        y = y + factor * term.to(wide)
    draws = [] if noise is None else [t.to(wide) for t in noise.unbind()]
    if seeds is not None:
        draws = [drawn(seeds, stream, y, call, counter) for stream in (_philox.STEP, _philox.KNOWN)]
    if draws:
        y = y + a[n] * draws[0]
    if clip is not None:
        y = y.clamp(-clip, clip)
    if known is not None and mask is not None:
        noised = a[n + 1] * known.to(wide)
        if len(draws) > 1:
            noised = noised + a[n + 2] * draws[1]
        y = blend(mask.to(wide), noised, y)
    return y.to(first.dtype)


def _check(
    terms: Sequence[Tensor],
    coefficients: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    call: int,
    counter: Tensor | None,
    clip: float | None,
    known: Tensor | None,
    mask: Tensor | None,
) -> None:
    n = len(terms)
    if not 1 <= n <= MOST_TERMS:
        raise ValueError(f"terms has {n} tensors; accepted: 1 to {MOST_TERMS}")
    x = terms[0]
    check_image("terms[0]", x)
    for i, term in enumerate(terms):
        if (term.shape, term.dtype, term.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"terms[{i}] is {tuple(term.shape)} {term.dtype} on {term.device}; "
                f"accepted: what terms[0] is, {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    check_table("coefficients", coefficients, n + 3, x)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; accepted: None or a positive number")
    check_known(known, mask, x)
    if noise is not None and seeds is not None:
        raise ValueError("noise and seeds are both given; accepted: one of them, or neither")
    if seeds is not None:
        _philox.check_seeds(seeds, x.shape[0], x.device)
    if noise is not None:
        check_like("noise", noise, [(1, *x.shape), (2, *x.shape)], x)
    _philox.check_call(call, counter, x.device)


def _out(
    terms: Sequence[Tensor],
    coefficients: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    call: int,
    counter: Tensor | None,
    clip: float | None,
    known: Tensor | None,
    mask: Tensor | None,
) -> Outputs:
    _check(terms, coefficients, noise, seeds, call, counter, clip, known, mask)
    return (empty_output(terms[0].shape, terms[0]),)


def _into(outs: Outputs, terms: Sequence[Tensor], *others: object) -> None:
    _check(terms, *others)  # type: ignore[arg-type]
    check_out("out", outs[0], terms[0])


def _refuses(
    terms: Sequence[Tensor],
    coefficients: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    call: int,
    counter: Tensor | None,
    clip: float | None,
    known: Tensor | None,
    mask: Tensor | None,
) -> Iterator[str]:
    """Terms of float64; noise, known or mask of another dtype than float32 and the terms'; coefficients but float32."""
    dtype = terms[0].dtype
    if dtype not in FLOATS:
        yield f"terms are {str(dtype).removeprefix('torch.')}, the kernel reads float32, bfloat16 and float16"
    if coefficients.dtype != torch.float32:
        yield f"coefficients are {str(coefficients.dtype).removeprefix('torch.')}, the kernel reads float32"
    for name, t in (("noise", noise), ("known", known), ("mask", mask)):
        if t is not None and t.dtype != dtype:
            yield f"{name} is {str(t.dtype).removeprefix('torch.')}, the kernel reads the terms' dtype"


def _samples(level: str) -> Iterator[Sample]:
    def sample(
        id: str, terms: int, *shape: int, noise: int = 0, seeds: bool = False, known: bool = False, rows: bool = False,
        **kwargs: object,
    ) -> Sample:  # fmt: skip
        b, _, h, w = shape
        a = torch.tensor([*[0.9, -0.35, 0.25, 0.125, -0.0625][:terms], 0.3, 0.8, 0.6])
        values = {"coefficients": torch.stack([a * (1 - 0.25 * i) for i in range(b)]) if rows else a}
        shapes: dict[str, tuple[int, ...]] = {"terms": (terms, *shape)}
        shapes["coefficients"] = tuple(values["coefficients"].shape)
        if noise:
            shapes["noise"] = (noise, *shape)
        if seeds:
            values["seeds"] = torch.tensor([42, -7, 1 << 40, -(1 << 63)])[torch.arange(b) % 4]
            shapes["seeds"] = (b,)
        if known:
            shapes |= {"known": shape, "mask": (b, 1, h, w)}
        return Sample(id, shapes, kwargs, masks=("mask",), values=values)

    if level == "bench":
        yield sample("ddim", 2, 1, 3, 256, 256, clip=1.0)
        yield sample("ancestral", 2, 1, 3, 256, 256, seeds=True, call=17)
        yield sample("unipc", 4, 2, 4, 64, 64)  # latents of a 512-pixel image, with guidance
        yield sample("latent_blend", 1, 2, 4, 64, 64, noise=2, known=True)
        yield sample("ancestral512x8", 2, 8, 3, 512, 512, seeds=True, call=17)
        return
    yield sample("odd", 2, 2, 3, 5, 7, seeds=True, known=True, call=3)
    yield sample("one", 1, 1, 1, 1, 1)
    yield sample("long_row", 3, 1, 1, 3, 1031, clip=0.5, seeds=True)
    yield sample("empty_batch", 2, 0, 3, 4, 4, seeds=True)
    yield sample("rows", 5, 3, 2, 4, 9, noise=1, rows=True)
    yield sample("given", 4, 2, 3, 4, 6, noise=2, known=True, clip=1.5)
    yield sample("blend", 1, 2, 2, 3, 5, known=True)
    yield sample("noise_and_known", 2, 1, 4, 3, 8, noise=1, known=True)
    if level == "full":
        yield sample("threads", 2, 2, 3, 96, 97, seeds=True, known=True, rows=True, call=2**32 - 1)
        yield sample("threads_plain", 5, 1, 3, 130, 257)


def _cost(
    terms: Sequence[Tensor],
    coefficients: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    call: int,
    counter: Tensor | None,
    clip: float | None,
    known: Tensor | None,
    mask: Tensor | None,
) -> Cost:
    x = terms[0]
    read = sum(t.numel() * t.element_size() for t in (*terms, noise, known, mask) if t is not None)
    each = 2.0 * len(terms) + (0.0 if seeds is None else 60.0) + (0.0 if known is None else 6.0)
    return Cost(flops=each * x.numel(), bytes=float(read + x.numel() * x.element_size()))


SPEC = OpSpec(
    name="linear_step",
    summary="a sum of up to five tensors and noise, clamped, with a known region blended in: one step of most samplers",
    reference=_reference,
    out=_out,
    into=_into,
    lanes=dict.fromkeys(("cuda", "triton", "cupy", "cpu"), Lane(refuses=_refuses)),
    samples=_samples,
    cost=_cost,
    differentiable=False,
)

_call = register(SPEC)
_call_out = register_out(SPEC)


def linear_step(
    terms: Sequence[Tensor] | Tensor,
    coefficients: Tensor,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    call: int | Tensor = 0,
    clip: float | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Σ aᵢ·termᵢ + a_z·z, clamped; where mask is 1, g·known + s·k instead.

    Args:
        terms: 1 to 5 tensors (B, C, H, W) of one dtype, float32, bfloat16 or float16 (float64: reference only), any strides;
            or a stack of them (n, B, C, H, W).
        coefficients: a₁ … aₙ, a_z, g, s: float32, (n + 3,) or (B, n + 3), on the terms' device.
        noise: (1, B, C, H, W): z, or (2, B, C, H, W): z and k, in the terms' dtype. What is not given is 0.
        seeds: int64 (B,), instead of noise: z and k are drawn in the kernel (Philox, streams 1 and 2; see
            `philox_normal`). Neither noise nor seeds: z = k = 0, a deterministic step.
        call: position in the sequence of calls, so that each draws other noise, 0 to 2³² − 1; a number, or a 0-d int32 or
            int64 tensor on the terms' device (in the schema: counter), which a replayed graph may read anew.
        counter: see call.
        clip: bound of the sum's absolute value, or None.
        known: (1|B, C, H, W) in the terms' dtype: clean image or latents; None: no blend.
        mask: (1|B, 1|C, H, W) in the terms' dtype, **1 = keep known**, 0 = the step's result, fractions blend. Given if known is.
        out: tensor to write into, as a term in shape and dtype, any strides without overlap. It may be one of the terms
            itself; otherwise it shares memory with no argument.

    Returns:
        As terms[0] in shape and dtype, channels_last if it is, else contiguous; `out` where given. NaN where a term has
        one. Not differentiable.

    Raises:
        ValueError: a shape, dtype or device is none of the above, noise and seeds are both given, or one of known and mask.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Arithmetic is float32, rounded once. Sources: Song et al., ICLR 2021; Karras et al., NeurIPS 2022; Lu et al. 2022; Zhao et
    al., NeurIPS 2023; Wang et al., ICLR 2023; Meng et al., ICLR 2022.
    """
    given = list(terms.unbind()) if isinstance(terms, Tensor) else list(terms)
    at, counter = _philox.split_call(call)
    args = (given, coefficients, noise, seeds, at, counter, clip, known, mask)
    return _call(*args) if out is None else _call_out((out,), *args)[0]  # type: ignore[no-any-return]

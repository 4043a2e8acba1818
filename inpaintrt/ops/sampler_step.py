r"""Sampler step: one reverse step of a diffusion sampler, with its noise and the known region in it.

$$ \hat x_0 = \mathrm{clamp}(x_0(x, \epsilon), \pm c), \qquad \mu = c_1 \hat x_0 + c_2 x + \sigma^2 \nabla, \qquad
x' = m\,(g \cdot \mathrm{known} + s z_2) + (1 - m)\,\left(\sqrt{A}\,\mu + \sqrt{n A \sigma^2 + (1 - A)}\; z_1\right) $$

The posterior of a Gaussian diffusion (Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, eqs. 7 and 11;
learned variances: Nichol and Dhariwal, ICML 2021, eq. 15; guidance: Dhariwal and Nichol, NeurIPS 2021, algorithm 1), and
the known region of an image noised to where the next call takes place (Lugmayr et al., "RePaint: Inpainting using
Denoising Diffusion Probabilistic Models", CVPR 2022, algorithm 1). RePaint goes back up some steps between two calls;
Gaussians compose, so all of that is the factor √A and the variance 1 − A in the same pass. Eager torch makes some thirty
passes over the image; the kernels make one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inpaintrt.runtime.library import register, register_out
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from . import _philox
from ._sampling import (
    blend,
    check_image,
    check_known,
    check_like,
    check_out,
    check_table,
    column,
    drawn,
    float32_only,
)
from ._shared import empty_output

ROW = (
    "sqrt_recip",  # √(1/ᾱₜ)
    "sqrt_recipm1",  # √(1/ᾱₜ − 1)
    "coef_x0",  # of the posterior mean
    "coef_x",
    "min_log",  # log of the clipped posterior variance; variance="fixed": of the variance
    "max_log",  # log βₜ
    "nonzero",  # 0 in the last step, else 1
    "undo_scale",  # √A, A = ᾱ(next call)/ᾱ(after this step); 1 without undo steps
    "undo_var",  # 1 − A
    "known_scale",  # √ᾱ of the next call; 1 pastes
    "known_sigma",  # √(1 − ᾱ) of the next call; 0 pastes
    "blend",  # not 0: blend the known region in
    "timestep",  # what the model is told; the op does not read it, nor the rest
    "undo_steps",
    "reserved0",
    "reserved1",
)
"""Names of a row's 16 numbers, in order."""

PREDICTIONS = ("epsilon", "x0", "v")
VARIANCES = ("learned_range", "learned", "fixed")


def _reference(
    x: Tensor,
    model_output: Tensor,
    row: Tensor,
    *,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    call: int = 0,
    counter: Tensor | None = None,
    prediction: str = "epsilon",
    variance: str = "learned_range",
    clip: float | None = 1.0,
    guidance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    r = {name: column(row.to(wide), i) for i, name in enumerate(ROW)}
    now, made = x.to(wide), model_output[:, : x.shape[1]].to(wide)
    x0 = {
        "epsilon": lambda: r["sqrt_recip"] * now - r["sqrt_recipm1"] * made,
        "x0": lambda: made,
        "v": lambda: (now - r["sqrt_recipm1"] * made) / r["sqrt_recip"],
    }[prediction]()
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    log_variance = r["min_log"]
    if variance != "fixed":
        log_variance = model_output[:, x.shape[1] :].to(wide)
    if variance == "learned_range":
        share = (log_variance + 1) / 2
        log_variance = share * r["max_log"] + (1 - share) * r["min_log"]
    y = r["coef_x0"] * x0 + r["coef_x"] * now
    if guidance is not None:
        y = y + log_variance.exp() * guidance.to(wide)

    if noise is not None:
        y = y + r["nonzero"] * (0.5 * log_variance).exp() * noise[0].to(wide)
        if noise.shape[0] == 1:
            return y.to(x.dtype), x0.to(x.dtype)
        y = r["undo_scale"] * y + r["undo_var"].sqrt() * noise[1].to(wide)
        k = noise[2].to(wide)
    else:
        assert seeds is not None, "one of noise and seeds is given"
        z, k = (drawn(seeds, stream, now, call, counter) for stream in (_philox.STEP, _philox.KNOWN))
        spread = r["nonzero"] * r["undo_scale"] * r["undo_scale"] * log_variance.exp() + r["undo_var"]
        y = r["undo_scale"] * y + spread.sqrt() * z
    if known is not None and mask is not None:
        noised = r["known_scale"] * known.to(wide) + r["known_sigma"] * k
        y = torch.where(r["blend"] != 0, blend(mask.to(wide), noised, y), y)
    return y.to(x.dtype), x0.to(x.dtype)


def _check(
    x: Tensor,
    model_output: Tensor,
    row: Tensor,
    known: Tensor | None,
    mask: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    call: int,
    counter: Tensor | None,
    prediction: str,
    variance: str,
    clip: float | None,
    guidance: Tensor | None,
) -> None:
    check_image("x", x)
    for name, value, accepted in (("prediction", prediction, PREDICTIONS), ("variance", variance, VARIANCES)):
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    b, c, h, w = x.shape
    shape = (b, c if variance == "fixed" else 2 * c, h, w)
    if tuple(model_output.shape) != shape or not model_output.is_floating_point() or model_output.device != x.device:
        raise ValueError(
            f"model_output is {tuple(model_output.shape)} {model_output.dtype} on {model_output.device}; accepted with "
            f"variance {variance!r}: {shape}, floating point on {x.device}"
        )
    check_table("row", row, len(ROW), x)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; accepted: None or a positive number")
    if guidance is not None:
        check_like("guidance", guidance, [(b, c, h, w)], x)
    check_known(known, mask, x)
    if (noise is None) == (seeds is None):
        raise ValueError(
            f"noise and seeds are both {'None' if noise is None else 'given'}; accepted: exactly one of them"
        )
    if seeds is not None:
        _philox.check_seeds(seeds, b, x.device)
    if noise is not None:
        check_like("noise", noise, [(3, b, c, h, w), (1, b, c, h, w)], x)
        if known is not None and noise.shape[0] == 1:
            raise ValueError(
                "known is given with one noise, after which the step ends; accepted: noise of (3, B, C, H, W), or known=None"
            )
    _philox.check_call(call, counter, x.device)


def _out(
    x: Tensor,
    model_output: Tensor,
    row: Tensor,
    known: Tensor | None,
    mask: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    call: int,
    counter: Tensor | None,
    prediction: str,
    variance: str,
    clip: float | None,
    guidance: Tensor | None,
) -> Outputs:
    _check(
        x, model_output, row, known, mask, noise, seeds, call, counter, prediction, variance, clip, guidance
    )  # fmt: skip
    return empty_output(x.shape, x), empty_output(x.shape, x)


def _into(outs: Outputs, *args: object) -> None:
    _check(*args)  # type: ignore[arg-type]
    x = args[0]
    assert isinstance(x, Tensor)
    for name, out in zip(("out[0]", "out[1]"), outs, strict=True):
        check_out(name, out, x)


def _refuses(
    x: Tensor,
    model_output: Tensor,
    row: Tensor,
    known: Tensor | None,
    mask: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    call: int,
    counter: Tensor | None,
    prediction: str,
    variance: str,
    clip: float | None,
    guidance: Tensor | None,
) -> Iterator[str]:
    """Other dtypes than float32, but for model_output, which may be 16 bits wide."""
    if model_output.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        yield f"model_output is {str(model_output.dtype).removeprefix('torch.')}, the kernel reads float32, bfloat16 and float16"
    yield from float32_only(row=row, known=known, mask=mask, noise=noise, guidance=guidance)


def example_row(**changed: float) -> Tensor:
    """A row as of step 50 of 250, followed by ten undo steps: for tests and benchmarks."""
    row = dict.fromkeys(ROW, 0.0)
    row |= {"sqrt_recip": 1.23687619, "sqrt_recipm1": 0.7279167, "coef_x0": 0.03811865, "coef_x": 0.96105007}
    row |= {"min_log": -4.15450682, "max_log": -4.12294274, "nonzero": 1.0, "undo_scale": 0.91, "undo_var": 0.1719}
    row |= {"known_scale": 0.74, "known_sigma": 0.6726, "blend": 1.0, "timestep": 201.0, "undo_steps": 10.0}
    return torch.tensor(list((row | changed).values()))


def _samples(level: str) -> Iterator[Sample]:
    def sample(
        id: str, *shape: int, known: bool = False, noise: int = 0, rows: Tensor | None = None, **kwargs: object
    ) -> Sample:
        b, c, h, w = shape
        twice = 1 if kwargs.get("variance") == "fixed" else 2
        values = {"row": example_row() if rows is None else rows}
        shapes: dict[str, tuple[int, ...]] = {"x": shape, "model_output": (b, twice * c, h, w)}
        shapes["row"] = tuple(values["row"].shape)
        if known:
            shapes |= {"known": shape, "mask": (b, 1, h, w)}
        if noise:
            shapes["noise"] = (noise, *shape)
        else:
            values["seeds"] = torch.tensor([42, -7, 1 << 40, -(1 << 63)])[torch.arange(b) % 4]
            shapes["seeds"] = (b,)
        if kwargs.pop("guidance", False):
            shapes["guidance"] = shape
        return Sample(id, shapes, kwargs, masks=("mask",), values=values)

    if level == "bench":
        yield sample("256", 1, 3, 256, 256, known=True, call=17)  # RePaint at 256 pixels
        yield sample("512x8", 8, 3, 512, 512, known=True, call=17)
        return
    last = example_row(nonzero=0.0, undo_scale=1.0, undo_var=0.0, known_scale=1.0, known_sigma=0.0)
    yield sample("odd", 2, 3, 5, 7, known=True, call=3)
    yield sample("one", 1, 1, 1, 1, known=True)
    yield sample("long_row", 1, 1, 3, 1031, variance="fixed", clip=None)
    yield sample("empty_batch", 0, 3, 4, 4, known=True)
    yield sample("rows", 3, 2, 4, 9, known=True, rows=torch.stack((example_row(), last, example_row(blend=0.0))))
    yield sample("given", 2, 3, 4, 6, known=True, noise=3)
    yield sample("given_one", 2, 2, 3, 5, noise=1, variance="learned")
    yield sample("guided", 1, 3, 6, 5, known=True, guidance=True, prediction="v", clip=0.8)
    yield sample("x0", 1, 4, 3, 8, prediction="x0", call=2**32 - 1)
    if level == "full":
        yield sample("threads", 2, 3, 96, 97, known=True, call=2409)
        yield sample("given_threads", 1, 3, 130, 257, known=True, noise=3, guidance=True)


def _cost(
    x: Tensor,
    model_output: Tensor,
    row: Tensor,
    known: Tensor | None,
    mask: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    call: int,
    counter: Tensor | None,
    prediction: str,
    variance: str,
    clip: float | None,
    guidance: Tensor | None,
) -> Cost:
    # Philox: 40 multiplications, additions and exclusive ors per element of integers, and Box and Muller's functions.
    read = sum(t.numel() * t.element_size() for t in (x, model_output, known, mask, noise, guidance) if t is not None)
    each = 40.0 + (0.0 if seeds is None else 60.0)
    return Cost(flops=each * x.numel(), bytes=float(read + 2 * x.numel() * x.element_size()))


SPEC = OpSpec(
    name="sampler_step",
    summary="one reverse diffusion step with its noise, undo steps and known region",
    reference=_reference,
    out=_out,
    into=_into,
    lanes=dict.fromkeys(("cuda", "triton", "cupy", "cpu"), Lane(dtypes=frozenset({torch.float32}), refuses=_refuses)),
    samples=_samples,
    cost=_cost,
    differentiable=False,
)

_call = register(SPEC)
_call_out = register_out(SPEC)


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    row: Tensor,
    *,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    call: int | Tensor = 0,
    prediction: str = "epsilon",
    variance: str = "learned_range",
    clip: float | None = 1.0,
    guidance: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One reverse step from x: the posterior's mean and variance, noise, undo steps, and the known region blended in.

    Args:
        x: (B, C, H, W), float32 (other floating dtypes: reference only); any strides. The sample at the current step.
        model_output: (B, 2C, H, W), prediction and then variance, or (B, C, H, W) with variance="fixed"; float32, bfloat16
            or float16.
        row: the step's 16 coefficients, named by `ROW` in this module, float32, (16,) or (B, 16), on x's device.
        known: (1|B, C, H, W), the clean image whose known region is kept; float32. None: nothing is blended, whatever
            row says.
        mask: (1|B, 1|C, H, W), **1 = keep known**, 0 = unknown, fractions blend; float32. Given if known is.
        noise: (3, B, C, H, W): (z, u, k) of step, undo steps and known region, in the unfused order y = mean +
            nonzero·e^(logvar/2)·z, y = undo_scale·y + √undo_var·u, m·(known_scale·known + known_sigma·k) + (1 − m)·y. Or
            (1, B, C, H, W): z alone; then the result is the first of these y, and undo and blend are the caller's.
        seeds: int64 (B,), instead of noise: noise is drawn in the kernel (Philox, streams 1 and 2; see `philox_normal`), and
            step and undo steps are one Gaussian: equal in distribution to noise, not in value.
        call: position in the sequence of calls, so that each draws other noise, 0 to 2³² − 1; a number, or a 0-d int32 or
            int64 tensor on x's device (in the schema: counter), which a replayed graph may read anew.
        counter: see call.
        prediction: what the model predicts: "epsilon", "x0", or "v".
        variance: "learned_range" (a share of the way from min_log to max_log, −1 to 1, not clamped), "learned" (its
            logarithm), "fixed" (e^min_log).
        clip: bound of |x0|, or None.
        guidance: (B, C, H, W), float32: the mean grows by variance · guidance.
        out: (next x, x0) to write into, as x in shape and dtype, any strides without overlap. The first may be x itself;
            otherwise they share memory with no argument.

    Returns:
        (next x, x0), x0 being the (clamped) prediction of the clean image; as x in shape and dtype, channels_last if x is,
        else contiguous; `out` where given. NaN where x or the model's output has one. Not differentiable.

    Raises:
        ValueError: a shape, dtype or device is none of the above, both or neither of noise and seeds are given, or one of
            known and mask, or an option is unknown.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Where mask is exactly 0 or 1, a pixel uses one noise only. Sources: Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and
    Nichol 2021; Lugmayr et al., CVPR 2022.
    """
    at, counter = _philox.split_call(call)
    args = (x, model_output, row, known, mask, noise, seeds, at, counter, prediction, variance, clip, guidance)
    return _call(*args) if out is None else _call_out(out, *args)  # type: ignore[no-any-return]

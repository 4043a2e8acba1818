r"""Fourier unit: a 1×1 convolution in the frequency domain, the heart of a fast Fourier convolution (FFC).

$$ \mathrm{out} = \mathrm{irfft2}\bigl(\mathrm{ReLU}(W \cdot \mathrm{rfft2}(x) + b)\bigr) + \mathrm{residual} $$

Both transforms are orthonormal; W mixes the real and imaginary parts of all channels, and the ReLU acts on real and
imaginary parts separately. Chi, Jiang and Mu, "Fast Fourier Convolution", NeurIPS 2020; LaMa (Suvorov et al., WACV 2022)
fills large holes with it, because every output sees the whole image. Eager torch makes eight passes around the two
transforms and the product: stack, permute, batch norm, ReLU, permute, complex, two scalings.

**The inverse of a spectrum that is not Hermitian.** The ReLU breaks the symmetry ky → −ky of the bins kx = 0 and (even
w) kx = w/2, and then libraries disagree about what `irfft2` means. The rule here is numpy's, on every backend: a complex
inverse over rows (dim −2), then a real inverse over columns (dim −1) that ignores the imaginary part of those two bins.
cuFFT's two-dimensional inverse, which stock torch calls on a GPU, reads half of those columns only and returns other
numbers: 8 to 16 % RMS of the unit's output, seen by users as grid artefacts at large sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from ._convolution import check_alike, check_parameters, refuses_wide
from ._shared import empty_output


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    b, _, h, w = x.shape
    half = w // 2 + 1
    spectral = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):  # spectra have a range that half precision lacks
        kernel = weight.to(spectral).reshape(*weight.shape[:2], 1, 1)
        if b == 0:  # torch.fft refuses an empty batch; any layer gives the shape and the (zero) gradients
            out = F.conv2d(x.to(spectral), kernel[::2, ::2], None if bias is None else bias[::2].to(spectral))
            return (out if residual is None else out + residual).to(x.dtype)
        spectrum = torch.view_as_real(torch.fft.rfft2(x.to(spectral).contiguous(), norm="ortho"))  # (B, C, h, half, 2)
        y = spectrum.permute(0, 1, 4, 2, 3).reshape(b, -1, h, half)  # channel 2c: real, 2c + 1: imaginary part
        y = F.relu(F.conv2d(y, kernel, None if bias is None else bias.to(spectral)))
        y = y.view(b, -1, 2, h, half).permute(0, 1, 3, 4, 2).contiguous()
        rows = torch.fft.ifft(torch.view_as_complex(y), dim=-2, norm="ortho")
        out = torch.fft.irfft(rows, n=w, dim=-1, norm="ortho")
        return (out if residual is None else out + residual).to(x.dtype)


def _out(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Outputs:
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, C, h, w) with C, h, w of at least 1")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; accepted: floating point")
    b, c, h, w = x.shape
    matrix = tuple(weight.shape[:2]) if weight.dim() == 2 or tuple(weight.shape[2:]) == (1, 1) else ()
    if not matrix or matrix[1] != 2 * c or matrix[0] % 2 or not matrix[0]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted with {c} channels: (2·Co, {2 * c}[, 1, 1])")
    if bias is not None and tuple(bias.shape) != matrix[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; accepted: ({matrix[0]},)")
    shape = (b, matrix[0] // 2, h, w)
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; accepted: {shape}")
    check_alike(x, residual=residual)
    check_parameters(x, weight=weight, bias=bias)
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype}; accepted: weight's {weight.dtype}")
    return (empty_output(shape, x),)


def _triton_refuses(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> Iterator[str]:
    """Float32 weight and bias beside x of half precision."""
    yield from refuses_wide(x, weight, bias)


def _cuda_refuses(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> Iterator[str]:
    """Heights and widths above 3840, whose transforms do not fit into shared memory; float32 weight beside half x."""
    yield from refuses_wide(x, weight, bias)
    if max(x.shape[2:]) > 3840:
        yield f"h and w are {x.shape[2]} and {x.shape[3]}; a transform in shared memory has at most 3840 points"


def _samples(level: str) -> Iterator[Sample]:
    def sample(id: str, b: int, c: int, co: int, h: int, w: int, bias: bool = True, residual: bool = True) -> Sample:
        shapes: dict[str, tuple[int, ...]] = {"x": (b, c, h, w), "weight": (2 * co, 2 * c, 1, 1)}
        if bias:
            shapes["bias"] = (2 * co,)
        if residual:
            shapes["residual"] = (b, co, h, w)
        return Sample(id, shapes)

    if level == "bench":
        # big-lama's bottleneck for 256, 512, 456×560 and 1024 pixels; FcF-like narrow maps at full resolution.
        for c, h, w in ((192, 32, 32), (192, 64, 64), (192, 57, 70), (192, 128, 128), (24, 256, 256)):
            yield sample(f"{c}x{h}x{w}", 1, c, c, h, w, residual=False)
        return
    yield sample("odd", 2, 3, 3, 5, 7)
    yield sample("one", 1, 1, 1, 1, 1)
    yield sample("square", 1, 18, 17, 8, 8)
    yield sample("prime", 1, 5, 6, 13, 11, residual=False)
    yield sample("column", 2, 2, 3, 6, 1, bias=False)
    yield sample("row", 1, 4, 2, 1, 10, bias=False, residual=False)
    yield sample("empty_batch", 0, 2, 2, 3, 3)
    if level == "full":
        yield sample("lama_mini", 2, 48, 48, 32, 28)
        yield sample("big_lama", 1, 192, 192, 24, 30, residual=False)
        yield sample("crop", 1, 33, 20, 57, 70)
        yield sample("threads", 3, 16, 40, 45, 64)
        for h, w in ((1, 1024), (1024, 2), (1021, 3), (2, 1021), (509, 9), (98, 243), (62, 67), (121, 169)):
            yield sample(f"{h}x{w}", 1, 2, 2, h, w)


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Cost:
    b, c, h, w = x.shape
    outputs, inputs = weight.shape[:2]
    transforms = 2.5 * h * w * math.log2(max(2, h * w)) * (c + outputs // 2)
    mix = 2.0 * inputs * outputs * h * (w // 2 + 1)
    tensors = [x, x.new_empty(()).expand(b, outputs // 2, h, w), *([] if residual is None else [residual])]
    moved = sum(t.numel() for t in tensors) * x.element_size() + weight.nbytes
    return Cost(flops=b * (transforms + mix), bytes=moved)


SPEC = OpSpec(
    name="fourier_unit",
    summary="rfft2, channel mix, ReLU, irfft2: the spectral part of a fast Fourier convolution",
    reference=_reference,
    out=_out,
    lanes={
        "cuda": Lane(refuses=_cuda_refuses),
        "cupy": Lane(refuses=_cuda_refuses),
        "triton": Lane(refuses=_triton_refuses),
        "cpu": Lane(),
    },
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)


def fourier_unit(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """irfft2(ReLU(weight · rfft2(x) + bias)) + residual, both transforms orthonormal over (h, w).

    Args:
        x: (B, C, h, w), any h and w from 1; float32, bfloat16, float16 (float64: reference only); any strides.
        weight: (2·Co, 2·C) or (2·Co, 2·C, 1, 1), dtype of x: row 2o (2o + 1) gives the real (imaginary) part of output
            channel o, column 2c (2c + 1) reads the real (imaginary) part of input channel c. Beside x of half precision it
            may be float32, and is used as it is.
        bias: (2·Co,), dtype of weight, added to the orthonormal spectrum at every frequency, before the ReLU; None for 0.
        residual: (B, Co, h, w), added after the inverse; None for 0.

    Returns:
        (B, Co, h, w), dtype of x, channels_last if x is, else contiguous. Differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Spectra are float32 whatever the dtype of x, so that half precision cannot overflow between the transforms (the bin of
    frequency 0 is √(h·w) times the mean); the result is rounded once. The inverse follows numpy's rule for spectra that
    are not Hermitian, on every backend (see the module's docstring). Source: Chi et al., NeurIPS 2020, section 3.2; Suvorov
    et al., WACV 2022.
    """
    return _call(x, weight, bias, residual)  # type: ignore[no-any-return]

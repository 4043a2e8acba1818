r"""Fused convolution: everything that inpainting networks wrap around a convolution, in one pass over memory.

$$ \mathrm{out} = \mathrm{act}(s \cdot (\mathrm{conv}(\mathrm{pad}(\mathrm{up}(x \cdot m)), W) + W_2 x_2) + t + b) + r $$

with any padding mode, a mask m on the input, nearest-neighbour upsampling, a 1×1 convolution of another input in the same
sums, a folded batch norm (s, t), bias b, activation and a residual r before or after it. On the CPU, 3×3 convolutions of
stride 1 are computed by Winograd's F(4×4, 3×3) (Lavin and Gray, CVPR 2016): 36 products where the direct form needs 144.
Its rounding error is larger, about 1e-6 relative RMS at worst instead of 2e-7, and has a bound of its own
(`docs/numerics.md`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt.runtime.library import register
from inpaintrt.runtime.policy import ieee
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample
from inpaintrt.testing.compare import Numerics

from ._convolution import (
    NO_PADDING,
    check_alike,
    check_operands,
    check_parameters,
    check_shape,
    convolve,
    output_size,
    refuses_wide,
    single,
)
from ._engine import cpu_numerics, cpu_refuses
from ._shared import activate, check_activation, empty_output, pad_sides


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: list[int] = NO_PADDING,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    mask: Tensor | None = None,
    upsample: int = 1,
    transposed: bool = False,
    output_padding: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    alpha: float | None = None,
    residual: Tensor | None = None,
    residual_mode: str = "after",
    second: Tensor | None = None,
    second_weight: Tensor | None = None,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if second is not None and second_weight is not None and _alike(weight, second_weight):
            weight, second_weight = torch.cat([weight, second_weight], dim=0 if transposed else 1), None
        if second is not None and second_weight is None:
            x = torch.cat([x, second], dim=1)
        weight = weight.to(x.dtype)
        if mask is not None:
            x = x * mask
        if upsample > 1:
            x = F.interpolate(x, scale_factor=float(upsample), mode="nearest")
        alone = scale is None and shift is None and second_weight is None
        inside = bias if alone and bias is not None and bias.dtype == x.dtype else None
        if transposed:
            y = F.conv_transpose2d(x, weight, inside, stride, padding[:2], output_padding, groups, dilation)
        else:
            y = convolve(x, weight, inside, stride, padding, dilation, groups, padding_mode)
        y = single(y)
        if second_weight is not None:
            assert second is not None
            y = y + single(F.conv2d(second, second_weight.to(x.dtype)))
        if scale is not None:
            y = y * single(scale).view(-1, 1, 1)
        for vector in (shift, bias if inside is None else None):
            if vector is not None:
                y = y + single(vector).view(-1, 1, 1)
        if residual is not None and residual_mode == "before":
            y = y + residual
        y = activate(y, activation, alpha)
        if residual is not None and residual_mode == "after":
            y = y + residual
        return y.to(x.dtype)


def _out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    groups: int,
    padding_mode: str,
    mask: Tensor | None,
    upsample: int,
    transposed: bool,
    output_padding: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    alpha: float | None,
    residual: Tensor | None,
    residual_mode: str,
    second: Tensor | None,
    second_weight: Tensor | None,
) -> Outputs:
    check_operands(x, weight, stride, dilation, padding, padding_mode)
    if groups < 1 or upsample not in (1, 2) or residual_mode not in ("before", "after"):
        raise ValueError(
            f"groups is {groups}, upsample {upsample}, residual_mode {residual_mode!r}; accepted: 1 or more; 1 or 2; "
            "before, after"
        )
    if transposed and (padding_mode != "zeros" or upsample != 1 or padding[:2] != padding[2:]):
        raise ValueError("a transposed convolution takes zero padding, the same on both sides, and no upsampling")
    if output_padding and not transposed:
        raise ValueError(f"output_padding is {output_padding}; accepted: 0 unless transposed")
    check_activation(activation, alpha)
    b, c, h, w = x.shape
    if second_weight is not None and second is None:
        raise ValueError("a second weight is given, but no second part of x")
    inputs, outputs = (
        (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, weight.shape[0])
    )
    beside = second_weight is not None and not _alike(weight, second_weight)
    if second is not None and second_weight is not None and not beside:
        _check_apart(x, weight, second, second_weight, transposed, groups)
        inputs += second.shape[1]
    if second is not None and not beside:
        check_shape("the second part of x", second, (b, second.shape[1], h, w))
        c += second.shape[1]
    if c != inputs or outputs % groups:
        raise ValueError(f"x has {c} channels, weight is {tuple(weight.shape)} in {groups} groups; they do not fit")
    if transposed:
        size = [
            (n - 1) * stride - 2 * p + dilation * (k - 1) + output_padding + 1
            for n, p, k in zip((h, w), padding, weight.shape[2:], strict=False)
        ]
        if min(size) < 1 or min(h, w) < 1:
            raise ValueError(f"x of {h}×{w} with padding {padding} leaves nothing of the transposed convolution")
    else:
        size = output_size((h * upsample, w * upsample), weight.shape[2:], stride, padding, dilation, padding_mode)
    shape = (b, outputs, *size)
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        check_shape(name, vector, (outputs,))
    check_shape("mask", mask, *((m, n, h, w) for m in (1, b) for n in (1, c)))
    check_shape("residual", residual, shape)
    check_alike(x, mask=mask, residual=residual, second=second)
    check_parameters(x, weight=weight, bias=bias, scale=scale, shift=shift, second_weight=second_weight)
    if second is not None and second_weight is not None and beside:
        check_shape("the second part of x", second, (b, second.shape[1], *size))
        check_shape("its weight", second_weight, (outputs, second.shape[1], 1, 1))
    return (empty_output(shape, x),)


def _cpu_refuses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    groups: int,
    padding_mode: str,
    mask: Tensor | None,
    upsample: int,
    transposed: bool,
    *rest: object,
) -> Iterator[str]:
    """Kernels longer than 64, strides above 8, groups; a 1×1 weight beside what is not Winograd's in two dimensions."""
    yield from cpu_refuses(x, weight, stride, padding, dilation)
    if groups != 1:
        yield f"groups is {groups}; 1 is covered"
    sides, plain = tuple(weight.shape[2:]), stride == upsample == 1 and not transposed and dilation <= 64
    second_weight = rest[-1]
    beside = isinstance(second_weight, Tensor) and not _alike(weight, second_weight)
    if beside and not (plain and (sides == (3, 3) or (sides == (5, 5) and not ieee.get()))):
        yield 'a 1×1 weight is covered beside 3×3 and, but under precision="ieee", 5×5 filters of stride 1'


def _gpu_refuses(x: Tensor, weight: Tensor, *rest: object) -> Iterator[str]:
    """A second weight; float32 weights or vectors beside half precision."""
    yield from refuses_wide(x, weight, *rest)
    if rest[-1] is not None:
        yield "a second part of x with a weight of its own is not covered"


def _cpu_numerics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    groups: int,
    padding_mode: str,
    mask: Tensor | None,
    upsample: int,
    transposed: bool,
    *_: object,
) -> Numerics:
    return cpu_numerics(x, weight, stride, padding, dilation, upsample=upsample, transposed=transposed)


def _samples(level: str) -> Iterator[Sample]:
    def sample(
        id: str, x: tuple[int, ...], outputs: int, kernel: int = 3, *, tensors: str = "", **kwargs: object
    ) -> Sample:
        groups = int(kwargs.get("groups", 1))  # type: ignore[call-overload]
        weight = (
            (x[1], outputs // groups, kernel, kernel)
            if kwargs.get("transposed")
            else (outputs, x[1] // groups, kernel, kernel)
        )
        shapes: dict[str, tuple[int, ...]] = {"x": x, "weight": weight}
        for name in tensors.split():
            shapes[name] = (x[0], 1, *x[2:]) if name == "mask" else (outputs,)
        if kwargs.pop("with_residual", False):
            shapes["residual"] = (x[0], outputs, *x[2:])
        return Sample(id, shapes, {"padding": [kernel // 2] * 4, **kwargs})

    if level == "bench":
        # Stride-1 3×3 layers at 512 pixels: LaMa (to local, to global), DeepFill's and AOT-GAN's bottlenecks, MAT's decoder.
        for c, outputs, side in ((512, 128, 64), (128, 384, 64), (192, 192, 64), (256, 256, 128), (64, 64, 256)):
            yield sample(f"{c}to{outputs}x{side}", (1, c, side, side), outputs, tensors="bias")
        return
    yield sample("winograd", (1, 5, 13, 22), 7, tensors="bias", with_residual=True)
    yield sample("reflect", (2, 18, 9, 14), 17, padding_mode="reflect", activation="relu", tensors="bias")
    yield sample(
        "before",
        (1, 3, 16, 16),
        33,
        padding_mode="replicate",
        activation="elu",
        residual_mode="before",
        with_residual=True,
    )
    yield sample("one", (1, 1, 1, 1), 1, 1)
    yield sample("small", (1, 4, 3, 5), 6, tensors="bias")
    yield sample("strided", (2, 6, 9, 7), 4, stride=2, tensors="bias scale shift", activation="silu")
    yield sample("masked", (2, 3, 8, 9), 5, tensors="mask", dilation=2, padding=[2, 2, 2, 2])
    yield sample("grouped", (1, 4, 6, 6), 8, groups=2, activation="leaky_relu", alpha=0.1)
    yield sample("upsampled", (1, 3, 5, 4), 2, upsample=2, padding_mode="reflect")
    yield sample("transposed", (1, 4, 5, 6), 3, transposed=True, stride=2, output_padding=1, tensors="bias")
    yield sample("uneven", (1, 3, 7, 10), 4, stride=2, padding=[1, 0, 1, 1])
    yield sample("empty_batch", (0, 3, 4, 4), 2)
    if level == "full":
        yield sample("one_by_one", (1, 9, 10, 11), 12, 1, tensors="bias")
        yield sample("deep", (1, 341, 10, 11), 12, 1, tensors="bias", residual_mode="before", with_residual=True)
        yield sample("no_padding", (1, 16, 20, 19), 32, padding=[0, 0, 0, 0], activation="tanh")
        yield sample("two", (1, 16, 20, 19), 40, padding=[2, 0, 1, 2], activation="sigmoid")
        yield sample("threads", (3, 33, 45, 31), 49, padding_mode="reflect", tensors="bias", with_residual=True)
        yield sample("wide_row", (1, 20, 1, 300), 20, padding_mode="replicate")
        yield sample("to_local", (1, 512, 24, 20), 128, padding_mode="reflect")


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> Cost:
    (out,) = _out(x.to("meta"), weight.to("meta"), None if bias is None else bias.to("meta"), *_on_meta(rest))  # type: ignore[arg-type]
    taps = weight.shape[1] * weight.shape[2] * weight.shape[3]
    flops = 2.0 * taps * (x.numel() if rest[7] else out.numel())
    moved = x.nbytes + weight.nbytes + out.nbytes
    second, beside = rest[-2:]
    if isinstance(second, Tensor) and isinstance(beside, Tensor):
        taps = beside.shape[2] * beside.shape[3]
        flops += 2.0 * taps * (second.numel() * beside.shape[1] if rest[7] else second.shape[1] * out.numel())
        moved += second.nbytes + beside.nbytes
    return Cost(flops=flops, bytes=moved)


def _on_meta(values: Sequence[object]) -> list[object]:
    return [v.to("meta") if isinstance(v, Tensor) else v for v in values]


SPEC = OpSpec(
    name="fused_conv2d",
    summary="convolution with padding mode, mask, upsampling, folded norm, bias, activation and residual in one pass",
    reference=_reference,
    out=_out,
    lanes={
        "triton": Lane(refuses=_gpu_refuses),
        "cuda": Lane(refuses=_gpu_refuses),
        "cupy": Lane(refuses=_gpu_refuses),
        "cpu": Lane(dtypes=frozenset({torch.float32, torch.bfloat16}), refuses=_cpu_refuses, numerics=_cpu_numerics),
    },
    samples=_samples,
    cost=_cost,
)

_call = register(SPEC)

_WHOLE_BLOCKS = 32
"""Channels that fill vectors of lanes on every ISA of a CPU: its kernels read the second part where the first ends."""


def _alike(weight: Tensor, second_weight: Tensor) -> bool:
    """Whether the two have one kernel: then both parts of x are read alike, side by side."""
    return weight.shape[2:] == second_weight.shape[2:]


def _check_apart(
    x: Tensor, weight: Tensor, second: Tensor, second_weight: Tensor, transposed: bool, groups: int
) -> None:
    """Weights of one kernel, each against its part of x."""
    if groups != 1:
        raise ValueError(f"groups is {groups}; accepted for two weights of one kernel: 1")
    inputs, outputs = weight.shape[:2] if transposed else (weight.shape[1], weight.shape[0])
    if x.shape[1] != inputs:
        raise ValueError(
            f"the first part of x has {x.shape[1]} channels, its weight is {tuple(weight.shape)}; they do not fit"
        )
    first, last = (second.shape[1], outputs) if transposed else (outputs, second.shape[1])
    check_shape("its weight", second_weight, (first, last, *weight.shape[2:]))
    check_alike(x, second=second)
    if weight.dtype != second_weight.dtype:
        raise ValueError(f"the weights are {weight.dtype} and {second_weight.dtype}; accepted: one dtype")


def _joins(first: Tensor) -> bool:
    """Whether a first part is no place for kernels to read a second one beside."""
    return first.dim() != 4 or (first.device.type == "cpu" and first.shape[1] % _WHOLE_BLOCKS != 0)


def _in_two(x: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """x as one tensor, or as two where kernels read them side by side."""
    if isinstance(x, Tensor):
        return x, None
    first, *rest = x
    if not rest:
        return first, None
    if _joins(first):
        return torch.cat([first, *rest], dim=1), None
    return first, rest[0] if len(rest) == 1 else torch.cat(rest, dim=1)


def fused_conv2d(
    x: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    mask: Tensor | None = None,
    upsample: int = 1,
    transposed: bool = False,
    output_padding: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    alpha: float | None = None,
    residual: Tensor | None = None,
    residual_mode: str = "after",
) -> Tensor:
    """act(scale · conv(x) + shift + bias) + residual.

    Args:
        x: (B, Cin, H, W), or several of equal size, read as their concatenation along the channels; floating point. On
            a CPU, the second of two is read in its place, without joining them, if the first has a multiple of 32 channels.
        weight: (Cout, Cin/groups, kh, kw); for `transposed` (Cin, Cout/groups, kh, kw). Dtype of x, as all tensors but mask;
            beside x of half precision also float32, which is rounded to x's dtype as it is read.
            Or two, one for each of two parts of x, whose convolutions are summed. A second one (the torch op's
            `second_weight`) of the same kernel is read like the first, in one group: as their concatenation along the input
            channels, without joining them where a CPU does not join x. Beside a larger kernel it may be (Cout, C2, 1, 1);
            then its part (B, C2, H', W') has the output's size, and the options before the sum are not for it.
        bias: (Cout,), dtype of x; beside x of half precision also float32, which is used as it is; so scale and shift.
        stride, dilation, groups: as in torch.
        padding: on all sides, or (vertical, horizontal), or (top, left, bottom, right), or "same" (torch's: the larger half
            last, for stride 1), or "tf_same" (TensorFlow's, for any stride: output size ⌈size/stride⌉).
        padding_mode: "zeros", "reflect" (edge not repeated) or "replicate".
        mask: (1|B, 1|Cin, H, W), multiplied onto x before anything else; any dtype, converted to that of x.
        upsample: 2 reads x doubled by nearest neighbour.
        transposed, output_padding: transposed convolution, as in torch.
        scale, shift: (Cout,), a folded batch norm.
        activation: "none", "relu", "leaky_relu", "elu", "silu", "sigmoid" or "tanh"; `alpha` as in `gated_activation`.
        residual: the output's shape; added after the activation, or before it with residual_mode="before".

    Returns:
        (B, Cout, H', W'), dtype of x, channels_last if x is, else contiguous. Differentiable.

    Raises:
        ValueError: shapes, dtypes or options do not fit; the message names them.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    On the CPU, float32 and bfloat16 in one group have kernels. Sums are float32. Of float32, convolutions of 3×3, 5×5,
    and 5 or 7 columns may be Winograd's, with an RMS error of up to 8 times and a largest error of up to 12 times the direct
    form's; precision="ieee" keeps to the direct form and F(2×2, 3×3), whose error is the direct form's.
    """
    second_weight = None
    if isinstance(weight, Tensor):
        x, second = _in_two(x)
    elif isinstance(x, Tensor) or len(x) != 2 or len(weight) != 2:
        raise ValueError("weight has several parts; accepted: two, for two parts of x")
    else:
        (x, second), (weight, second_weight) = x, weight
        all_4d = all(t.dim() == 4 for t in (x, second, weight, second_weight))
        if all_4d and _alike(weight, second_weight) and (x.device.type != "cpu" or _joins(x)):
            _check_apart(x, weight, second, second_weight, transposed, groups)
            weight, second_weight = torch.cat([weight, second_weight], dim=0 if transposed else 1), None
            x, second = _in_two((x, second))
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; accepted: 4-D tensors")
    size = [n * upsample for n in x.shape[2:]]
    sides = pad_sides(padding, size, weight.shape[2:], stride, dilation, transposed)
    masked = None if mask is None else mask.to(x.dtype)
    return _call(  # type: ignore[no-any-return]
        x, weight, bias, stride, sides, dilation, groups, padding_mode, masked, upsample, transposed, output_padding,
        scale, shift, activation, alpha, residual, residual_mode, second,
        second_weight,
    )  # fmt: skip

"""gated_activation in Triton: out = gain · act(f) · sigmoid(g), where y = [f | g] along the channels.

What bounds it: memory. Forward reads two elements and writes one, backward reads three and writes two, nothing is
read twice: 37.7 MB for 1×96×256×256 in float32, 8 µs at 4.8 TB/s. The arithmetic must stay below that. Instructions per
output element, elu, counted in the sm_90 binary: forward 49 in float32 and 41 in bfloat16, backward 72 and 54, and 4 to
6 more for NHWC. While its memory serves one element of the forward pass, an H200 issues about 82 in float32 and 41 in
bfloat16, which is why the 16-bit kernels take the shorter exponential (`PRECISE`). Counted, not yet timed on a GPU.

How the index space is cut: the host merges dimensions (`collapse`), so that NCHW becomes B rows of C·H·W, NHWC B·H·W
rows of C, and one sample of NCHW a single row. A program takes BLOCK consecutive elements in the output's order,
whatever rows they lie in, as vectors of VEC elements; one division per vector and row border finds where inputs are.

Considered:
- Tiles of [rows, channels] for NHWC: no divisions, but C = 24 or 48 leaves a quarter of the lanes idle, or needs tiles
  so narrow that a warp touches many rows. Here no lane is idle at any C.
- Leaving vectors to Triton's analysis of runtime sizes: it sees only multiples of 16, so C = 24 would be loaded element
  by element, with a division each, and every new image size could compile a new kernel. VEC is found on the host
  instead, and no integer argument is specialised: one binary serves every size of a layout.
- A grid of sample × block, which would save the division for NCHW batches: about 5 instructions an element where memory
  is the limit, for a second code path. Not taken.

`enable_fp_fusion` is False, and where a fused multiply-add is wanted `tl.fma` says so: results do not change with
Triton's default, which 3.10 flips, and the interpreter computes what the GPU does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lib import (
    Budget,
    Launch,
    Nest,
    activate,
    activate_backward,
    collapse,
    from_float32,
    needs_wide,
    nest_offsets,
    nest_vectors,
    resolve_alpha,
    run,
    sigmoid,
    to_float32,
)

_INTS = ["total", "n1", "n2", "n3", "y_gate", "y0", "y1", "y2", "y3", "o0", "o1", "o2", "o3"]


@triton.jit(do_not_specialize=_INTS)
def _forward(
    y,  # (B, 2C, H, W); sizes, strides and the gates' distance are those of the nest, in vectors
    out,  # (B, C, H, W)
    alpha,
    gain,
    total,
    n1,
    n2,
    n3,
    y_gate,
    y0,
    y1,
    y2,
    y3,
    o0,
    o1,
    o2,
    o3,
    ACT: tl.constexpr,
    NDIM: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PRECISE: tl.constexpr = y.dtype.element_ty == tl.float32
    i, inside, lane = nest_vectors(total, VEC, WIDE, BLOCK)
    at = nest_offsets(i, n1, n2, n3, y0, y1, y2, y3, NDIM) * VEC + lane
    f = to_float32(tl.load(y + at, mask=inside))
    g = to_float32(tl.load(y + y_gate * VEC + at, mask=inside))
    result = gain * activate(f, alpha, ACT, PRECISE) * sigmoid(g, PRECISE)
    at = nest_offsets(i, n1, n2, n3, o0, o1, o2, o3, NDIM) * VEC + lane
    tl.store(out + at, from_float32(result, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_INTS, "dy_gate", "d0", "d1", "d2", "d3"])
def _backward(
    grad,  # (B, C, H, W)
    y,  # (B, 2C, H, W)
    dy,  # (B, 2C, H, W)
    alpha,
    gain,
    total,
    n1,
    n2,
    n3,
    y_gate,
    y0,
    y1,
    y2,
    y3,
    o0,
    o1,
    o2,
    o3,
    dy_gate,
    d0,
    d1,
    d2,
    d3,
    ACT: tl.constexpr,
    NDIM: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PRECISE: tl.constexpr = y.dtype.element_ty == tl.float32
    i, inside, lane = nest_vectors(total, VEC, WIDE, BLOCK)
    at = nest_offsets(i, n1, n2, n3, y0, y1, y2, y3, NDIM) * VEC + lane
    f = to_float32(tl.load(y + at, mask=inside))
    g = to_float32(tl.load(y + y_gate * VEC + at, mask=inside))
    at = nest_offsets(i, n1, n2, n3, o0, o1, o2, o3, NDIM) * VEC + lane
    dout = to_float32(tl.load(grad + at, mask=inside))
    a = activate(f, alpha, ACT, PRECISE)
    s = sigmoid(g, PRECISE)
    df = activate_backward(gain * (dout * s), f, a, alpha, ACT, PRECISE)
    dg = dout * (gain * a) * (1.0 - s) * s  # in torch's order, so that inf and NaN appear where they do there
    at = nest_offsets(i, n1, n2, n3, d0, d1, d2, d3, NDIM) * VEC + lane
    tl.store(dy + at, from_float32(df, dy.dtype.element_ty), mask=inside)
    tl.store(dy + dy_gate * VEC + at, from_float32(dg, dy.dtype.element_ty), mask=inside)


def default_config(elements: int, vec: int) -> dict[str, int]:
    """Launch configuration for an output of `elements` elements, loaded `vec` at a time.

    1024 elements for 128 threads are one or two 16-byte loads per thread and stream. Single elements come at most four
    to a thread, because each takes its own divisions. Below 2¹⁸ elements large blocks would make too few programs for
    the largest GPUs (132 to 148 processors). Reasoned, not measured.
    """
    if elements < 2**18:
        return {"BLOCK": 256, "num_warps": 2}
    return {"BLOCK": 512 if vec == 1 else 1024, "num_warps": 4}


def forward(args: Sequence[Any], outs: Sequence[Tensor]) -> Launch | None:
    """The launch for (y, activation, alpha, gain) -> (out,), or None where out is empty. Reads no data."""
    y, activation, alpha, gain = args
    (out,) = outs
    if out.numel() == 0:
        return None
    nest = collapse(tuple(out.shape), (out.stride(), y.stride()), (out.shape[1] * y.stride(1),), out.element_size())
    o_strides, y_strides = nest.strides
    integers = (*nest.sizes[1:], *nest.offsets, *y_strides, *o_strides)
    return _launch(_forward, (y, out), integers, nest, activation, alpha, gain)


def backward(args: Sequence[Any], outs: Sequence[Tensor]) -> Launch | None:
    """The launch for ([grad], y, activation, alpha, gain, needs) -> (dy,), or None where dy is empty. Reads no data."""
    (grad,), y, activation, alpha, gain, _ = args
    (dy,) = outs
    if dy.numel() == 0:
        return None
    strides = (dy.stride(), y.stride(), grad.stride())
    gates = (grad.shape[1] * y.stride(1), grad.shape[1] * dy.stride(1))
    nest = collapse(tuple(grad.shape), strides, gates, dy.element_size())
    d_strides, y_strides, g_strides = nest.strides
    y_gate, dy_gate = nest.offsets
    integers = (*nest.sizes[1:], y_gate, *y_strides, *g_strides, dy_gate, *d_strides)
    return _launch(_backward, (grad, y, dy), integers, nest, activation, alpha, gain)


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    integers: tuple[int, ...],
    nest: Nest,
    activation: str,
    alpha: float | None,
    gain: float,
) -> Launch:
    elements = nest.total * nest.vec
    config = default_config(elements, nest.vec)
    block = config["BLOCK"]
    constants = {"ACT": activation, "NDIM": nest.ndim, "VEC": nest.vec, "WIDE": needs_wide(*tensors), "BLOCK": block}
    return Launch(
        kernel=kernel,
        grid=(-(-elements // block),),
        args=(*tensors, resolve_alpha(activation, alpha), float(gain), nest.total, *integers),
        constants=constants,
        options={"num_warps": config["num_warps"], "enable_fp_fusion": False},
    )


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (out,) from args = (y, activation, alpha, gain)."""
    run(forward(args, outs), outs)


def launch_backward(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Fill outs = (dy,) from args = ([grad], y, activation, alpha, gain, needs)."""
    run(backward(args, outs), outs)


# ---- what the cross-compilation check compiles, and what it allows --------------------------------------------------

BUDGET = Budget(registers=64, shared_bytes=0)


def variants() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of everything worth compiling: each dtype in each layout, each activation in one of them."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def y(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        yield from _variant("one row", y(1, 96, 256, 256), "elu")
        yield from _variant("NHWC", y(2, 48, 256, 256).to(memory_format=torch.channels_last), "elu")
        yield from _variant("strided", y(2, 96, 256, 256)[:, ::2, 1:-1, ::2], "elu")
        yield from _variant("wide", y(3, 2, 32768, 32768), "elu")
        yield from _variant("small", y(1, 64, 16, 16), "elu")
    for activation in ("none", "relu", "leaky_relu", "silu", "sigmoid", "tanh"):
        yield from _variant("one row", torch.empty((1, 96, 256, 256), device="meta"), activation)


def _variant(layout: str, y: Tensor, activation: str) -> Iterator[tuple[str, Launch]]:
    out = torch.empty_like(y.narrow(1, 0, y.shape[1] // 2))
    name = f"{str(y.dtype).removeprefix('torch.')} {activation} {layout}"
    for label, launch in (
        (f"forward {name}", forward((y, activation, None, 1.0), (out,))),
        (f"backward {name}", backward(([out], y, activation, None, 1.0, [True]), (torch.empty_like(y),))),
    ):
        assert launch is not None, "variants are not empty"
        yield label, launch

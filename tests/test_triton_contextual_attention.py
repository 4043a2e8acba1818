"""contextual_attention's Triton kernels in the interpreter: tiles, wrap-around, queries, memory; beyond test_ops.py's matrix.

Blocks are made so small that small grids have several of every kind, with edges.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
    pytest.skip("set TRITON_INTERPRET=1: the interpreter stage of CI runs these", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from inpaintrt.kernels import _lib  # noqa: E402
from inpaintrt.kernels import contextual_attention as kernels  # noqa: E402

from inpaintrt.ops.contextual_attention import SPEC, source_index  # noqa: E402
from inpaintrt.testing import close_to_truth  # noqa: E402

# numpy, which computes for the interpreter, reports the overflows and NaN that these tests provoke.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMALL = {
    "gather": {"CELLS": 32, "CHANNELS": 2},
    "keys": {"KEYS": 32},
    "gram": {"CELLS": 64, "KEYS": 64, "STEP": 4},
    "scores": {"CELLS": 64, "KEYS": 64},
    "weights": {"CELLS": 16, "KEYS": 32},
    "paste": {"CELLS": 8, "CHANNELS": 4, "STEP": 16},
    "store": {"CELLS": 8, "CHANNELS": 4},
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x,
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "all_reversed": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "out_of_nan": lambda x: torch.full((*x.shape[:3], 2 * x.shape[3] + 3), math.nan, dtype=x.dtype)[..., 3::2].copy_(x),
    "expanded_batch": lambda x: x[:1].expand(x.shape),
}


def small(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Small blocks, tiles of at most these rows and columns of cells, and keys in two parts."""
    monkeypatch.setattr(kernels, "config", lambda stage, channels, wide: {**SMALL[stage], "num_warps": 4})
    monkeypatch.setattr(kernels, "tiling", lambda h, w, *_: (min(rows, h), min(columns, w)))
    monkeypatch.setattr(kernels, "_SHORTEST", 16)


def arguments(b: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """Arguments for a grid of h×w cells, logits of about ten; options "mask" and "queries" may be numbers of samples."""
    generator = torch.Generator().manual_seed(h * 100 + w)
    x, y = (torch.randn(b, c, 2 * h, 2 * w, generator=generator).to(dtype) for _ in range(2))
    for name in ("mask", "queries"):
        if isinstance(options.get(name), int):
            options[name] = torch.rand(options[name], 1, h, w, generator=generator) < (0.08 if name == "mask" else 0.3)
    return list(SPEC.bind(x, y, **{"softmax_scale": 0.5, **options}))


def attention(args: list[Any]) -> Tensor:
    (out,) = SPEC.out(*args)
    kernels.launch(args, (out.fill_(math.nan),))
    return out


def share_of_tolerance(out: Tensor, args: list[Any]) -> float:
    """The error as a share of what the tolerance rule allows."""
    exact = SPEC.run_reference(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
    assert bool(exact.isfinite().all())
    return close_to_truth(out, exact, SPEC.run_reference(*args)).share


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse_size", [0, 1, 3])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (2, 2), (2, 5), (5, 2), (3, 4), (7, 3)])
def test_wrap_around_in_tiles_of_every_kind(
    grid: tuple[int, int], fuse_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In grids this narrow most neighbours are reached around an end; frames are larger than the grid."""
    for rows, columns in ((9, 9), (2, 3)):
        small(monkeypatch, rows, columns)
        args = arguments(1, 3, *grid, fuse_size=fuse_size)
        assert share_of_tolerance(attention(args), args) <= 1


@pytest.mark.parametrize("grid", [(2, 2), (2, 5), (5, 2), (3, 4), (7, 3)])
def test_a_kernel_without_wrap_around_would_not_pass(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def along(x: Tensor, step: int, fill: float) -> Tensor:
        """The neighbour in the same line, or none."""
        return F.pad(x, (0, 1), value=fill)[..., 1:] if step > 0 else F.pad(x, (1, 0), value=fill)[..., :-1]

    args = arguments(1, 3, *grid)
    exact, baseline = SPEC.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args)), attention(args)
    monkeypatch.setattr(sys.modules["inpaintrt.ops.contextual_attention"], "_along", along)
    assert close_to_truth(SPEC.run_reference(*args), exact, baseline).share > 1000


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": "tf"},
        {"norm": "sum_eps", "eps": 0.03},
        {"mask": 2},
        {"mask": 1, "mask_mode": "neginf"},
        {"divisor": "overlap"},
        {"stride": 2},
        {"stride": 3, "mask": 2, "mask_mode": "neginf", "divisor": "overlap"},
        {"queries": 2, "mask": 2},
        {"queries": 1, "sampling": "tf", "fuse_size": 0, "norm": "sum_eps"},
        {"softmax_scale": -0.3},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_every_option_in_tiles(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 4, 3)
    args = arguments(2, 5, 4, 5, **options)
    assert share_of_tolerance(attention(args), args) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_strides_of_every_tensor(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 3, 2)
    args = arguments(2, 5, 3, 3, dtype, mask=2, queries=2)
    for at in (0, 1, 2, 13):
        args[at] = LAYOUTS[layout](args[at] if at < 2 else args[at].float())
    order = {"nhwc": (0, 2, 3, 1), "out_of_nan": (3, 0, 2, 1)}.get(layout, (0, 1, 2, 3))
    out, buffer = poison((2, 5, 6, 6), dtype, order)
    kernels.launch(args, (out,))
    assert share_of_tolerance(out, args) <= 1
    assert margins_untouched(buffer)


@pytest.mark.parametrize("sampling", ["stride", "tf"])
def test_sampled_rows_are_the_definitions(sampling: str) -> None:
    """Ties of "tf" hang on each operation being rounded to float32."""
    for n in (*range(1, 200), 255, 256, 499, 501, 1023):
        expected = torch.tensor(source_index(2 * n, 2, sampling), dtype=torch.int32)
        x = torch.empty(1, 1, 2 * n, 2, device="meta")
        args = SPEC.bind(x, x, sampling=sampling)
        step = kernels.forward(args, (x,))[0].args[3]
        found = torch.empty(1024, dtype=torch.int32)
        _sampled[(1,)](found, step, n)
        assert torch.equal(found[:n], expected), n


@triton.jit
def _sampled(out, step, n):
    i = tl.arange(0, 1024)
    tl.store(out + i, kernels._source(i, step, n))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64],
    ids=str,
)
def test_anything_but_zero_is_a_hole_or_a_query(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 3, 3)
    args = arguments(1, 2, 3, 5, mask=1, queries=1)
    expected = attention(args)
    for at in (2, 13):
        floating = dtype.is_floating_point
        some = [-1.0, torch.finfo(dtype).tiny, math.inf, math.nan] if floating else [-1, 1, 3]
        values = torch.tensor(some).to(dtype) if dtype == torch.uint8 else torch.tensor(some, dtype=dtype)
        zero = -0.0 if floating else 0
        places = torch.arange(15).view(1, 1, 3, 5) % len(values)
        args[at] = torch.where(args[at], values[places], torch.full((), zero, dtype=dtype))
    assert torch.equal(attention(args), expected)


def test_nothing_usable() -> None:
    args = arguments(2, 2, 2, 3, mask=2)
    args[2] = torch.zeros(2, 1, 2, 3)
    args[2][0] = 1
    out = attention(args)
    assert bool((out[0] == 0).all())
    assert bool((out[1] != 0).all())
    args[11] = "neginf"
    out = attention(args)
    assert bool(out[0].isnan().all())
    assert bool(out[1].isfinite().all())


# ---- queries --------------------------------------------------------------------------------------------------------


def test_queries_change_no_number_and_tiles_without_any_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 2, 3)
    args = arguments(1, 3, 4, 6, mask=1)
    everything = attention(args)
    asked = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    asked[..., 2, 4] = asked[..., 3, 5] = True  # in the last of four tiles
    args[13] = asked
    pixels = asked.repeat_interleave(2, 2).repeat_interleave(2, 3)
    out = attention(args)
    assert torch.equal(out, torch.where(pixels, everything, 0.0))

    launches = kernels.forward(args, (out,))
    for tile in range(4):
        products, scores, weights, paste, _ = launches[2 + 5 * tile : 7 + 5 * tile]
        written = []
        for launch, at in ((products, 3), (scores, 3), (weights, 3), (paste, 3)):
            launch.args[at].fill_(math.nan)
            _lib.run(launch, (out,))
            written.append(not bool(launch.args[at].isnan().all()))
        assert written == [tile == 3] * 4


# ---- memory ---------------------------------------------------------------------------------------------------------


def poison(shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A dense tensor full of NaN (dimensions in memory in `order`) inside a larger buffer of NaN: (tensor, buffer)."""
    n = math.prod(shape)
    buffer = torch.full((n + 128,), math.nan if dtype.is_floating_point else 77, dtype=dtype)
    inside = buffer[64:-64].view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    return inside, buffer


def margins_untouched(buffer: Tensor) -> bool:
    margins = torch.cat([buffer[:64], buffer[-64:]])
    return bool((margins.isnan() if buffer.is_floating_point() else margins == 77).all())


@pytest.mark.parametrize("options", [{}, {"mask": 1, "queries": 1, "fuse_size": 0}], ids=["bare", "some"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (8, 8)])
def test_workspaces_are_written_before_read_and_only_inside(
    grid: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, 8, 4)
    args = arguments(1, 3, *grid, **options)
    expected = attention(args)
    out, buffer = poison(tuple(expected.shape), torch.float32, (0, 1, 2, 3))
    launches = kernels.forward(args, (out,))
    own = {t.untyped_storage().data_ptr() for t in (*args, out) if isinstance(t, Tensor)}
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def poisoned(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() in own:
            return value
        return buffers.setdefault(value.data_ptr(), poison((value.numel(),), value.dtype, (0,)))[0]

    _lib.run([dataclasses.replace(k, args=tuple(map(poisoned, k.args))) for k in launches], (out,))
    assert torch.equal(out, expected)
    assert len(buffers) == 6
    assert margins_untouched(buffer)
    assert all(margins_untouched(b) for _, b in buffers.values())


@pytest.mark.parametrize("side", [(64, 64), (128, 128), (256, 256), (8, 2048), (2048, 8), (270, 480), (18, 18)])
@pytest.mark.parametrize("channels", [96, 128, 192])
def test_workspace_is_bounded(channels: int, side: tuple[int, int]) -> None:
    """12·T·L·4 bytes with T = 128 cells, whatever the width and the batch; L is padded to a multiple of 64."""
    x = torch.empty(3, channels, *side, device="meta")
    cells = -(-side[0] * side[1] // 4 // 64) * 64
    for fuse_size in (0, 3):
        launches = kernels.forward(SPEC.bind(x, x, fuse_size=fuse_size), (x,))
        workspaces = {id(a): a.nbytes for k in launches for a in k.args if isinstance(a, Tensor) and a.dim() == 1}
        assert len(workspaces) == 6
        assert sum(workspaces.values()) <= 12 * 128 * cells * 4


@pytest.mark.parametrize("grid", [(1, 1), (1, 700), (700, 1), (23, 41), (64, 64)])
@pytest.mark.parametrize("channels", [1, 192, 5000])
def test_tiles_cover_the_output_once(channels: int, grid: tuple[int, int]) -> None:
    height, width = grid
    x = torch.empty(1, channels, 2 * height, 2 * width, device="meta")
    seen = torch.zeros(height, width)
    for launch in kernels.forward(SPEC.bind(x, x), (x,)):
        if launch.kernel is kernels._store:
            top, left, rows, columns = launch.args[5:9]
            assert rows * columns <= kernels._LARGEST.value
            seen[top : top + rows, left : left + columns] += 1
    assert bool((seen == 1).all())


def test_empty_tensors_launch_nothing() -> None:
    x = torch.empty(0, 3, 4, 4)
    assert kernels.forward(SPEC.bind(x, x), (x,)) == []
    kernels.launch(SPEC.bind(x, x), (x,))


def test_wide_offsets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 2, 3)
    args = arguments(2, 3, 3, 4, mask=2, queries=2)
    narrow = attention(args)
    monkeypatch.setattr(kernels, "needs_wide", lambda *tensors: True)
    assert all(launch.constants["WIDE"] for launch in kernels.forward(args, (narrow,)))
    assert torch.equal(attention(args), narrow)


@pytest.mark.parametrize("far_dimension", range(4))
def test_offsets_beyond_32_bits(far_dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements 2³⁰ apart, in memory that is reserved but, except for a few pages, not there."""
    small(monkeypatch, 2, 2)
    far, shape, strides = 2**30, [2, 2, 4, 4], [64, 32, 8, 1]
    shape[far_dimension], strides[far_dimension] = 4, far
    reserved = mmap.mmap(-1, 8 * far, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    memory = torch.frombuffer(reserved, dtype=torch.float16)
    x, y, out = (memory.as_strided(shape, strides, first) for first in (0, 256, 512))
    args = [x.copy_(torch.randn(shape)), y.copy_(torch.randn(shape)), *arguments(1, 1, 2, 2)[2:]]
    cells = [shape[0], 1, 2, 2]
    for at, first in ((2, 768), (13, 1024)):
        args[at] = memory.as_strided(cells, strides, first).fill_(0)
    args[2][0, 0, 0, 1], args[13][:, :, 1] = 1, 1
    assert kernels.forward(args, (out,))[0].constants["WIDE"]
    kernels.launch(args, (out,))
    assert share_of_tolerance(out, args) <= 1

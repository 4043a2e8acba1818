"""What only upfirdn2d has: the public implementations' numbers, its arguments' forms, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inpaintrt import ops
from inpaintrt.ops.upfirdn2d import SPEC
from inpaintrt.runtime.spec import FLOATS
from inpaintrt.testing import assert_close_to_truth

from . import golden_style as golden

FUNCTIONS = [
    pytest.param(case, run, id=run)
    for case in ("upfirdn2d", "nvidia_ops")
    for run in golden.case(case)["runs"]
    if golden.case(case)["modules"][golden.case(case)["runs"][run]["module"]]["class"] == "function upfirdn2d"
]


@pytest.mark.parametrize("backend", golden.backends(SPEC))
@pytest.mark.parametrize(("case", "run"), FUNCTIONS)
def test_golden(case, run, backend):
    """Doubling, halving, odd factors, crops and flips, of two public implementations."""
    spec = golden.case(case)["runs"][run]
    given = dict(golden.case(case)["modules"][spec["module"]]["args"])
    pictures = golden.pictures(spec)
    if "pad" in given:  # one implementation pads both axes alike
        given["padding"] = [*given["pad"], *given.pop("pad")]
    f = pictures["k" if "k" in pictures else "f"]
    tensors = golden.tensors(case)
    if backend == "reference":
        out = ops.upfirdn2d(pictures["x"].double(), f.double(), **given)
        torch.testing.assert_close(out, tensors[f"{run}.out64"], rtol=0, atol=1e-13)
    with golden.backend(backend, "upfirdn2d"):
        out = ops.upfirdn2d(pictures["x"], f, **given)
    assert_close_to_truth(out, tensors[f"{run}.out64"], tensors[f"{run}.out"])


def test_forms_of_the_arguments_agree():
    """One number, pairs and all four sides; a filter of one dimension and its outer product; no filter and 1."""
    x, taps = torch.randn(2, 3, 8, 6), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    outer = taps[:, None] * taps
    expected = ops.upfirdn2d(x, outer, up=[2, 2], down=[1, 1], padding=[2, 2, 2, 2])
    assert torch.equal(ops.upfirdn2d(x, taps, 2, 1, 2), expected)
    assert torch.equal(ops.upfirdn2d(x, taps, (2, 2), (1, 1), (2, 2)), expected)
    assert torch.equal(ops.upfirdn2d(x, outer, 2, padding=2, flip_filter=True), expected), "the filter is symmetric"
    assert torch.equal(ops.upfirdn2d(x, None, padding=1), ops.upfirdn2d(x, torch.ones(1, 1), padding=1))


def test_x_comes_first_in_pairs():
    """(x, y) and (left, right, top, bottom), as in the public code: the other way round than sizes of tensors."""
    x = torch.randn(1, 1, 4, 5)
    out = ops.upfirdn2d(x, torch.ones(1, 1), up=(3, 2), padding=(1, 2, 0, -1))
    assert out.shape == (1, 1, 4 * 2 - 1, 5 * 3 + 3)
    assert torch.equal(out[0, 0, ::2, 1:-2:3], x[0, 0])
    assert out.count_nonzero() == x.numel()


def test_a_whole_turns_into_a_whole():
    """A filter of sum 1 keeps a constant's interior, doubled with gain 4 and halved."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    x = torch.full((1, 20, 8, 10), 2.5)
    for out in (
        ops.upfirdn2d(x, taps, up=2, padding=(2, 1, 2, 1), gain=4.0),
        ops.upfirdn2d(x, taps, down=2, padding=1),
    ):
        assert torch.equal(out[..., 1:-1, 1:-1], torch.full_like(out[..., 1:-1, 1:-1], 2.5))


@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
def test_a_filter_keeps_its_own_precision(dtype):
    """Half-precision images are filtered by float32 taps: 1/3 is 1/3."""
    x, f = torch.ones(1, 2, 4, 9, dtype=dtype), torch.full((1, 3), 1 / 3)
    out = ops.upfirdn2d(x, f, padding=[1, 1, 0, 0])
    assert out.dtype == dtype
    assert torch.equal(out[..., 1:-1], torch.ones_like(out[..., 1:-1]))


@pytest.mark.parametrize("op", ["upfirdn2d", "modulated_conv2d"])
def test_nothing_of_the_image_is_copied(op):
    """Only the filter is brought to the dtype of sums, in which half precision is what is added up, not what is stored."""
    x, f = torch.ones(1, 32, 96, 96, dtype=torch.bfloat16), torch.ones(4, 4)
    calls = {
        "upfirdn2d": lambda: ops.upfirdn2d(x, f, padding=1),
        "modulated_conv2d": lambda: ops.modulated_conv2d(
            x, torch.ones(32, 32, 3, 3).bfloat16(), torch.ones(1, 32).bfloat16(), up=2, resample_filter=f
        ),
    }
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
                copied.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Copies():
        calls[op]()
    assert max(copied, default=0) < x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 0, 4, 5), (0, 3, 4, 5)])
def test_of_nothing_comes_nothing(shape, dtype):
    x = torch.zeros(shape, dtype=dtype)
    assert ops.upfirdn2d(x, torch.ones(2, 3), up=2, padding=1).shape == (*shape[:2], 9, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x is \(3, 4, 4\)"),
        ({"f": torch.zeros(2, 2, 2)}, r"f is \(2, 2, 2\)"),
        ({"f": torch.zeros(2, 2, dtype=torch.int32)}, None),
        ({"f": [1.0, 3.0]}, "f is a list; accepted: a tensor"),
        ({"up": np.int64(1), "padding": np.int32(0)}, None),
        ({"up": 0}, "up is"),
        ({"up": (2, 2, 2)}, "up is"),
        ({"padding": (1, 2, 3)}, "padding"),
        ({"padding": -3}, "smaller than the filter"),
        ({"f": torch.zeros(9, 1)}, "smaller than the filter"),
    ],
)
def test_refusals(change, message):
    given = {"x": torch.zeros(1, 3, 4, 5), "f": torch.ones(2, 2), **change}
    if message is None:  # numbers are numbers
        assert torch.equal(ops.upfirdn2d(**given), torch.zeros(1, 3, 3, 4))
        return
    with pytest.raises(ValueError, match=message):
        ops.upfirdn2d(**given)

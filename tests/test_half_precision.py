"""Float32 weights beside bfloat16 images: what a model under autocast has, without the copies that autocast makes."""

from __future__ import annotations

import importlib

import pytest
import torch

from inpaintrt import ops, use_backend
from inpaintrt.runtime import native
from inpaintrt.testing.compare import close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

needs_native = pytest.mark.skipif(bool(native.missing()), reason="needs the native library")


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("c", "outputs", "kernel", "size", "options"),
    [
        (48, 40, 3, (20, 22), {"padding": 1, "padding_mode": "reflect"}),  # Winograd's, a whole vector of filters
        (48, 40, 1, (20, 22), {}),  # pointwise
        (33, 18, 3, (15, 14), {"padding": 1, "stride": 2}),
        (16, 4, 7, (20, 20), {"padding": 3}),  # few filters
        (64, 100, 3, (3, 3), {"padding": 1}),  # few pixels
        (20, 24, 5, (12, 14), {"padding": 2, "dilation": 2}),
    ],
)
def test_weights_are_rounded_as_they_are_read(c, outputs, kernel, size, options, layout):
    """By each algorithm the bits that rounded copies give; vectors are used as they are."""
    x, weight = _draw(2, c, *size).bfloat16(), _draw(outputs, c, kernel, kernel, seed=1) / (kernel * c**0.5)
    x, weight, rounded = (LAYOUTS[layout](t) for t in (x, weight, weight.bfloat16()))
    vectors = [_draw(outputs, seed=seed) for seed in (2, 3, 4)]
    exact = [v.bfloat16().float() for v in vectors]
    for op, names in ((ops.fused_conv2d, ("bias", "scale", "shift")), (ops.gated_conv2d, ("bias",))):

        def run(weight, vectors, op=op, names=names):
            with use_backend("cpu"):
                return op(x, weight, **dict(zip(names, vectors, strict=False)), **options)

        assert torch.equal(run(weight, exact), run(rounded, [v.bfloat16() for v in exact]))
        assert torch.equal(run(weight, vectors), run(rounded, vectors))
        assert not torch.equal(run(weight, vectors), run(weight, [v.bfloat16() for v in vectors]))
        with use_backend("reference"):
            assert torch.equal(op(x, weight, vectors[0], **options), op(x, rounded, vectors[0], **options))


@needs_native
@pytest.mark.parametrize("kernel", [1, 3])
def test_two_weights(kernel):
    """One for each of two parts of the input, of one kernel and of two."""
    x, more = _draw(1, 32, 14, 15).bfloat16(), _draw(1, 21, 14, 15, seed=1).bfloat16()
    weights = [_draw(40, 32, 3, 3, seed=2) / 17, _draw(40, 21, kernel, kernel, seed=3) / (5 * kernel)]
    bias = _draw(40, seed=4)
    with use_backend("cpu"):
        got = ops.fused_conv2d((x, more), weights, bias, padding=1)
        assert torch.equal(got, ops.fused_conv2d((x, more), [w.bfloat16() for w in weights], bias, padding=1))
    if kernel == 3:
        with pytest.raises(ValueError, match="one dtype"):
            ops.fused_conv2d((x, more), [weights[0], weights[1].bfloat16()], padding=1)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fourier_unit_rounds_once(dtype):
    """Weight and bias are used as they are; the result is the rounded one of float32."""
    x, weight, bias = _draw(2, 20, 9, 14).to(dtype), _draw(34, 40, seed=1) / 6, _draw(34, seed=2)
    residual = _draw(2, 17, 9, 14, seed=3).to(dtype)
    with use_backend("cpu"):
        got = ops.fourier_unit(x, weight, bias, residual)
        want = ops.fourier_unit(x.float(), weight, bias, residual.float())
    assert torch.equal(got, want.to(dtype))
    with use_backend("reference"):
        base = ops.fourier_unit(x, weight, bias, residual)
    truth = ops.fourier_unit(x.double(), weight.double(), bias.double(), residual.double())
    assert close_to_truth(got, truth, base).ok
    with pytest.raises(ValueError, match=r"bias is torch\.float32; accepted: weight's"):
        ops.fourier_unit(x, weight.to(dtype), bias)


@pytest.mark.parametrize("op", [ops.fused_conv2d, ops.gated_conv2d])
def test_gradients_have_the_dtypes_of_what_was_given(op):
    x, weight, bias = _draw(1, 4, 6, 7).bfloat16(), _draw(6, 4, 3, 3, seed=1), _draw(6, seed=2)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    op(*leaves, padding=1).float().square().sum().backward()
    wide = [t.float().requires_grad_() for t in (x, weight.bfloat16(), bias)]
    op(*wide, padding=1).square().sum().backward()
    for leaf, other in zip(leaves, wide, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad.float(), other.grad, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("op", [ops.fused_conv2d, ops.gated_conv2d])
def test_other_mixtures_are_refused(op):
    x, weight = torch.zeros(1, 4, 6, 7), torch.zeros(6, 4, 3, 3)
    for image, filters, accepted in [
        (x, weight.bfloat16(), "x's torch.float32, on"),
        (x.bfloat16(), weight.half(), "x's torch.bfloat16 or float32, on"),
        (x.bfloat16(), weight.double(), "x's torch.bfloat16 or float32, on"),
        (x.double(), weight, "x's torch.float64, on"),
    ]:
        with pytest.raises(ValueError, match=f"weight is {filters.dtype} on cpu; accepted: {accepted}"):
            op(image, filters)


@pytest.mark.parametrize("name", ["fused_conv2d", "gated_conv2d", "fourier_unit"])
@pytest.mark.parametrize("lane", ["triton", "cuda", "cupy"])
def test_lanes_of_gpus_say_so(name, lane):
    spec = importlib.import_module(f"inpaintrt.ops.{name}").SPEC
    sample = next(s for s in spec.samples("small") if "bias" in s.shapes and not s.kwargs.get("mask"))
    for x, parameters, refused in [(torch.bfloat16, torch.float32, True), (torch.bfloat16, torch.bfloat16, False)]:
        tensors = {key: torch.zeros(shape, dtype=x) for key, shape in sample.shapes.items()}
        for key in ("weight", "bias"):
            tensors[key] = tensors[key].to(parameters)
        args = spec.bind(**tensors, **sample.kwargs)
        sentences = list(spec.lanes[lane].refuses(*args))
        assert sentences == (["weights or vectors of another dtype than x's are not covered"] if refused else [])

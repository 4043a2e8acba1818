"""Gradients: the reference by gradcheck, kernels against the reference's in float64."""

from __future__ import annotations

import pytest
import torch

from inpaintrt import ops, use_backend
from inpaintrt.runtime import dispatch, registry
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.spec import FLOATS, as_outputs
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

DIFFERENTIABLE = [name for name in registry.names() if registry.get(name).differentiable]


def _tensors(sample, dtype=torch.float64, layout="contiguous"):
    generator = torch.Generator().manual_seed(2)
    return {n: LAYOUTS[layout](t).to(dtype) for n, t in sample.tensors(generator, 2.0).items()}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name):
    torch.set_num_threads(1)  # thousands of tiny calls
    spec = registry.get(name)
    for sample in spec.samples("smoke"):
        tensors = _tensors(sample)
        if any(t.numel() == 0 or t.numel() > 500 for t in tensors.values()):
            continue
        leaves = {n: t.requires_grad_() for n, t in tensors.items() if n not in sample.masks}

        def call(*values, sample=sample, tensors=tensors, leaves=leaves):
            return getattr(ops, name)(**tensors | dict(zip(leaves, values, strict=True)), **sample.kwargs)

        assert torch.autograd.gradcheck(call, list(leaves.values()))


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str))
@pytest.mark.parametrize(
    ("name", "backend"), [(n, b) for n in DIFFERENTIABLE for b in (*registry.get(n).backward_lanes, "reference")]
)
def test_backward_kernels(name, backend, dtype, layout):
    spec = registry.get(name)
    for sample in spec.samples("smoke"):
        tensors = _tensors(sample, dtype, layout)
        args = spec.bind(**tensors, **sample.kwargs)
        key = next(iter(tensors.values()))
        grads = [torch.randn(o.shape).to(dtype) for o in as_outputs(spec.run_reference(*args))]
        needs = [isinstance(a, torch.Tensor) for a, p in zip(args, spec.signature.parameters.values(), strict=True)
                 if p.annotation in (torch.Tensor, torch.Tensor | None)]  # fmt: skip
        call = (grads, *args, needs)
        if backend != "reference" and dispatchers[name + "_backward"].reasons(call, key)[backend]:
            continue
        op = getattr(torch.ops.inpaintrt, name + "_backward").default
        seen = []
        dispatch.observers.append(lambda *c: seen.append(c[:2]))  # noqa: B023
        try:
            with use_backend(backend, op=name):
                actual = op(*call)
        finally:
            dispatch.observers.clear()
        assert seen == [(name + "_backward", backend)]
        for wide, got in ((torch.float64, None), (dtype, actual)):
            leaves = [t.detach().to(wide).requires_grad_() for t in tensors.values()]
            bound = spec.bind(**dict(zip(tensors, leaves, strict=True)), **sample.kwargs)
            outputs = as_outputs(spec.run_reference(*bound))
            found = torch.autograd.grad(outputs, leaves, [g.to(wide) for g in grads], materialize_grads=True)
            if got is None:
                truth = found
        for g, exact, base in zip(actual, truth, found, strict=True):
            assert_close_to_truth(g, exact, base, context=f"{name} {backend} {sample.id}")


def test_gradient_uses_the_forward_backend():
    """The policy of the forward call decides for the backward one, which runs later and maybe elsewhere."""
    seen = []
    y = torch.randn(1, 4, 3, 3, requires_grad=True)
    dispatch.observers.append(lambda *c: seen.append(c[:2]))
    try:
        with use_backend("reference"):
            out = ops.gated_activation(y)
        out.sum().backward()
    finally:
        dispatch.observers.clear()
    assert seen == [("gated_activation", "reference"), ("gated_activation_backward", "reference")]


def test_no_gradient_recorded_without_need():
    assert not ops.gated_activation(torch.randn(1, 2, 2, 2)).requires_grad
    with torch.no_grad():
        assert not ops.gated_activation(torch.randn(1, 2, 2, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives(name):
    """Gradient penalties differentiate twice: the reference's gradient stands in, since kernels have none of their own."""
    spec = registry.get(name)
    for sample in list(spec.samples("smoke"))[:1]:
        tensors = _tensors(sample)
        masks = {n: tensors.pop(n) for n in sample.masks if n in tensors}
        leaves = {n: t.requires_grad_() for n, t in tensors.items()}

        def call(*values, sample=sample, leaves=leaves, masks=masks):
            result = getattr(ops, name)(**dict(zip(leaves, values, strict=True)), **masks, **sample.kwargs)
            return result[0] if isinstance(result, tuple) else result  # a mask that is returned depends on masks alone

        # Along random directions: whole Jacobians of second derivatives would take minutes.
        assert torch.autograd.gradgradcheck(call, list(leaves.values()), fast_mode=True)


def test_gradient_at_nan_is_torchs():
    y = torch.tensor([[torch.nan, -1.0, 2.0, 0.0] * 5, [1.0, -1.0, 0.5, 2.0] * 5]).view(1, 2, 4, 5).requires_grad_()
    for activation in ("relu", "leaky_relu", "silu", "tanh"):
        (got,) = torch.autograd.grad(ops.gated_activation(y, activation=activation).sum(), y)
        with use_backend("reference"):
            (base,) = torch.autograd.grad(ops.gated_activation(y, activation=activation).sum(), y)
        torch.testing.assert_close(got, base, equal_nan=True)

"""Registration: torch's own checks, compilation and export, with dynamic sizes."""

from __future__ import annotations

import io

import pytest
import torch
from torch.library import opcheck

from inpaintrt import ops
from inpaintrt.runtime import registry
from inpaintrt.runtime.spec import as_outputs


def _dense(spec, sample, layout, requires_grad):
    tensors = sample.tensors(torch.Generator().manual_seed(0))
    tensors = {n: t.to(memory_format=layout) if t.dim() == 4 else t for n, t in tensors.items()}
    for name, tensor in tensors.items():
        tensor.requires_grad_(requires_grad and name not in (*sample.masks, *sample.values))
    return spec.bind(**tensors, **sample.kwargs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", registry.names())
def test_forward(name, requires_grad, layout):
    spec = registry.get(name)
    for sample in list(spec.samples("smoke"))[:3]:
        result = opcheck(getattr(torch.ops.inpaintrt, name).default, _dense(spec, sample, layout, requires_grad))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", [n for n in registry.names() if registry.get(n).differentiable])
def test_backward(name):
    spec = registry.get(name)
    sample = next(iter(spec.samples("smoke")))
    args = _dense(spec, sample, torch.contiguous_format, False)
    grads = [torch.randn_like(o) for o in as_outputs(spec.run_reference(*args))]
    needs = [isinstance(a, torch.Tensor) for a, p in zip(args, spec.signature.parameters.values(), strict=True)
             if p.annotation in (torch.Tensor, torch.Tensor | None)]  # fmt: skip
    op = getattr(torch.ops.inpaintrt, name + "_backward").default
    assert set(opcheck(op, (grads, *args, needs)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_with_dynamic_sizes(backend):
    def function(y):
        return ops.gated_activation(y, activation="silu") * 2 + 1

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((1, 2, 3, 4), (2, 8, 5, 6), (3, 10, 7, 9)):
        y = torch.randn(shape, requires_grad=True)
        (got,) = torch.autograd.grad(compiled(y).square().sum(), y)
        (base,) = torch.autograd.grad(function(y).square().sum(), y)
        torch.testing.assert_close(got, base)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "sizes caused recompilation"


class _Gate(torch.nn.Module):
    def forward(self, y):
        return ops.gated_activation(y, gain=1.5)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(strict):
    height, width = torch.export.Dim("height", min=2, max=99), torch.export.Dim("width", min=2, max=99)
    program = torch.export.export(
        _Gate(), (torch.randn(1, 4, 5, 6),), dynamic_shapes=({2: height, 3: width},), strict=strict
    )
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    assert [n.target for n in nodes] == [torch.ops.inpaintrt.gated_activation.default], "one node for one op"
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    y = torch.randn(1, 4, 11, 13, requires_grad=True)
    torch.testing.assert_close(loaded(y), _Gate()(y))
    loaded(y).sum().backward()
    assert y.grad is not None


def test_vmap_and_functional_gradients():
    y = torch.randn(3, 1, 4, 5, 6)
    batched = torch.func.vmap(ops.gated_activation)(y)
    torch.testing.assert_close(batched, ops.gated_activation(y.flatten(0, 1)).view(3, 1, 2, 5, 6))
    jacobian = torch.autograd.functional.jacobian(lambda v: ops.gated_activation(v).sum((1, 2, 3)), y[0])
    assert jacobian.shape == (1, *y[0].shape)

"""aot_gate where a plain formulation goes wrong: means that dwarf the deviation, constants, half precision, one pixel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inpaintrt import ops, use_backend
from inpaintrt.ops.aot_gate import SPEC
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.spec import FLOATS
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

DTYPES = sorted(FLOATS, key=str)
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
CLOSED = torch.tensor(-5.0, dtype=torch.float64).sigmoid()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _device(backend: str) -> str:
    """Where this backend's tensors are: on a GPU if there is one and it runs there."""
    return "cuda" if torch.cuda.is_available() and backend in ("cuda", "cupy", "triton") else "cpu"


def _able(backend: str) -> bool:
    x = torch.ones(1, 1, 1, 2, device=_device(backend))
    return backend == "reference" or not dispatchers[SPEC.name].reasons((x, x, x, 1e-9), x)[backend]


@pytest.fixture(params=[name for name in (*SPEC.lanes, "reference") if _able(name)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this machine has."""
    return str(request.param)


def run(backend: str, x: Tensor, fuse: Tensor, gate: Tensor, eps: float = 1e-9) -> Tensor:
    x, fuse, gate = (t.to(_device(backend)) for t in (x, fuse, gate))
    with use_backend(backend, op=SPEC.name):
        return ops.aot_gate(x, fuse, gate, eps=eps).cpu()


def masks(backend: str, gate: Tensor, eps: float = 1e-9) -> Tensor:
    """What the gate becomes: the blend of 0 and 1."""
    return run(backend, torch.zeros_like(gate), torch.ones_like(gate), gate, eps)


def exact(gate: Tensor, eps: float = 1e-9) -> Tensor:
    """The mask by another route than the reference's, in float64."""
    wide = gate.double()
    return (10 * (wide - wide.mean((2, 3), True)) / (wide.std((2, 3), keepdim=True) + eps) - 5).sigmoid()


def test_is_the_networks_formula(backend: str) -> None:
    """As AOT-GAN's block writes it: 2 · (v − mean)/std − 1, five times."""
    x, fuse, gate = (noise(2, 5, 6, 7 + i)[..., :7] for i in range(3))
    value = 5 * (2 * (gate - gate.mean((2, 3), True)) / (gate.std((2, 3), keepdim=True) + 1e-9) - 1)
    mask = value.sigmoid()
    torch.testing.assert_close(run(backend, x, fuse, gate), x * (1 - mask) + fuse * mask, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize(
    ("mean", "scale"), [(1e4, 0.01), (-1e4, 1e-3), (3e6, 1.0), (1.0, 1e-7), (0.0, 1e-11), (0.0, 1e30)]
)
def test_statistics_do_not_cancel(backend: str, mean: float, scale: float, memory: str) -> None:
    gate = (mean + scale * noise(1, 18, 33, 65)).to(memory_format=FORMATS[memory])
    got = masks(backend, gate)
    assert_close_to_truth(got, exact(gate), exact(gate).float())


@pytest.mark.parametrize("memory", FORMATS)
def test_an_outlier_at_the_first_pixel(backend: str, memory: str) -> None:
    """Where sums are taken relative to a pixel, it had better not be this one."""
    gate = noise(1, 3, 130, 127)
    gate[:, :, 0, 0] = 1e6
    gate = gate.to(memory_format=FORMATS[memory])
    assert_close_to_truth(masks(backend, gate), exact(gate), exact(gate).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_constant_channels_are_closed(backend: str, layout: str, dtype: torch.dtype) -> None:
    """0/10⁻⁹ is 0. In float16 10⁻⁹ itself would be 0, and the result NaN."""
    levels = torch.tensor([0.0, 3.3, -1e4, 6e4, 1e-7]).to(dtype)
    gate = LAYOUTS[layout](levels[None, :, None, None].expand(1, -1, 7, 149).contiguous())
    got = masks(backend, gate)
    assert_close_to_truth(got, CLOSED.expand(got.shape), CLOSED.to(dtype).expand(got.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_counts_in_every_dtype(backend: str, dtype: torch.dtype) -> None:
    gate = (1e-7 * torch.tensor([0.0, 1.0, 2.0, 5.0])).to(dtype).view(1, 1, 2, 2)
    for eps in (1e-9, 1e-6, 0.25):
        truth = 1 - exact(gate, eps)
        got = run(backend, torch.ones_like(gate), torch.zeros_like(gate), gate, eps)
        assert_close_to_truth(got, truth, truth.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pixel_has_no_deviation(backend: str, dtype: torch.dtype) -> None:
    assert bool(masks(backend, noise(2, 3, 1, 1).to(dtype)).isnan().all())


@pytest.mark.parametrize("memory", FORMATS)
def test_what_is_not_finite_stays_in_its_channel(backend: str, memory: str) -> None:
    gate = noise(2, 19, 9, 8)
    gate[0, 2, 3, 4], gate[1, 17, 0, 0], gate[1, 18, 8, 7] = torch.nan, torch.inf, -torch.inf
    bad = torch.zeros(2, 19, dtype=torch.bool)
    bad[0, 2] = bad[1, 17] = bad[1, 18] = True
    got = masks(backend, gate.to(memory_format=FORMATS[memory])).isnan()
    assert torch.equal(got.all(3).all(2), bad)
    assert torch.equal(got.any(3).any(2), bad)


@pytest.mark.parametrize("formats", [("nchw", "nhwc"), ("nhwc", "nchw")])
def test_output_has_the_format_of_x(backend: str, formats: tuple[str, str]) -> None:
    x, fuse, gate = (noise(2, 20, 5, 7 + i)[..., :7] for i in range(3))
    expected = SPEC.run_reference(x, fuse, gate, 1e-9)
    first, other = (FORMATS[name] for name in formats)
    got = run(
        backend,
        x.contiguous(memory_format=first),
        fuse.contiguous(memory_format=other),
        gate.contiguous(memory_format=other),
    )
    assert got.is_contiguous(memory_format=first)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_gradient_of_constants_and_of_one_pixel() -> None:
    """Where the deviation has no derivative it passes 0 on, as torch.std does; NaN is NaN."""
    for shape, finite in (((1, 2, 3, 4), True), ((1, 2, 1, 1), False)):
        x, fuse, gate = (torch.full(shape, v, requires_grad=True) for v in (1.0, 2.0, 3.0))
        ops.aot_gate(x, fuse, gate).sum().backward()
        for t in (x, fuse, gate):
            assert t.grad is not None
            assert bool(t.grad.isfinite().all()) == finite


def test_gradient_is_right() -> None:
    inputs = tuple(noise(1, 2, 3, 4 + i)[..., :4].double().requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(ops.aot_gate, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 4)}, r"x is \(2, 3, 4\)"),
        ({"x": torch.ones(1, 2, 3, 4, dtype=torch.int32)}, "x is .* torch.int32"),
        ({"fuse": torch.ones(1, 2, 3, 1)}, r"fuse is \(1, 2, 3, 1\)"),
        ({"gate": torch.ones(1, 2, 3, 4).half()}, "gate is .* torch.float16"),
        ({"eps": -1e-9}, "eps is -1e-09"),
        ({"eps": float("nan")}, "eps is nan"),
    ],
)
def test_wrong_calls(change: dict[str, Any], message: str) -> None:
    x = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        ops.aot_gate(**{"x": x, "fuse": x, "gate": x, **change})

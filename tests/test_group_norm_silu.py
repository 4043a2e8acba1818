"""group_norm_silu where the generated matrix does not reach: torch's own formula, two parts, views (B, C, T), other dtypes of
the vectors, statistics that cancel, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt import ops, use_backend
from inpaintrt.ops.group_norm_silu import SPEC
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.spec import FLOATS
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.layouts import LAYOUTS

DTYPES = sorted(FLOATS, key=str)
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _device(backend: str) -> str:
    """Where this backend's tensors are: on a GPU if there is one and it runs there."""
    return "cuda" if torch.cuda.is_available() and backend in ("cuda", "cupy", "triton") else "cpu"


def _able(backend: str) -> bool:
    x = torch.ones(1, 1, 1, 2, device=_device(backend))
    return backend == "reference" or not dispatchers[SPEC.name].reasons(SPEC.bind(x, 1), x)[backend]


@pytest.fixture(params=[name for name in (*SPEC.lanes, "reference") if _able(name)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this machine has."""
    return str(request.param)


def run(backend: str, x: Tensor | list[Tensor], groups: int, **options: Any) -> Tensor:
    device = _device(backend)
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
    with use_backend(backend, op=SPEC.name):
        joined = x.to(device) if isinstance(x, Tensor) else [part.to(device) for part in x]
        return ops.group_norm_silu(joined, groups, **moved).cpu()


def exact(x: Tensor, groups: int, **options: Any) -> Tensor:
    """By another route than the reference's, in float64, without the activation."""
    wide = x.double().reshape(x.shape[0], groups, -1)
    y = (wide - wide.mean(2, True)) / (wide.var(2, correction=0, keepdim=True) + options.get("eps", 1e-5)).sqrt()
    return y.reshape(x.shape)


@pytest.mark.parametrize("memory", FORMATS)
def test_is_the_networks_formula(backend: str, memory: str) -> None:
    """As guided diffusion writes it: norm, then scale and shift from two halves of an embedding, then SiLU."""
    x, weight, bias = noise(2, 24, 6, 7).to(memory_format=FORMATS[memory]), noise(24), noise(24) + 1
    scale, shift = noise(2, 48).chunk(2, dim=1)
    y = F.group_norm(x, 8, weight, bias) * (1 + scale[..., None, None]) + shift[..., None, None]
    got = run(backend, x, 8, weight=weight, bias=bias, scale=scale, shift=shift)
    torch.testing.assert_close(got, F.silu(y), rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=FORMATS[memory])
    got = run(backend, x, 8, weight=weight, bias=bias, activation="none")
    torch.testing.assert_close(got, F.group_norm(x, 8, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("first", "second"), [(16, 8), (20, 4), (5, 19), (24, 24)])
def test_two_parts_are_one(backend: str, first: int, second: int, layout: str, dtype: torch.dtype) -> None:
    """Groups of which some hold channels of both."""
    channels = first + second
    parts = [LAYOUTS[layout](noise(2, c, 5, 9)).to(dtype) for c in (first, second)]
    vectors = {"weight": noise(channels), "bias": noise(channels), "scale": noise(2, channels)}
    joined = torch.cat(parts, dim=1)
    truth = SPEC.reference(joined.double(), 3, **{n: v.double() for n, v in vectors.items()})
    got = run(backend, parts, 3, **vectors)
    assert_close_to_truth(got, truth, SPEC.reference(joined, 3, **vectors))


def test_parts_of_different_memory_formats_and_of_three(backend: str) -> None:
    parts = [noise(2, c, 5, 9) for c in (18, 6, 12)]
    truth = SPEC.reference(torch.cat(parts, 1).double(), 4)
    for formats in (("nchw", "nhwc", "nchw"), ("nhwc", "nchw", "nchw")):
        mixed = [p.contiguous(memory_format=FORMATS[f]) for p, f in zip(parts, formats, strict=True)]
        got = run(backend, mixed, 4)
        assert got.is_contiguous(memory_format=FORMATS[formats[0]])
        assert_close_to_truth(got, truth, SPEC.reference(torch.cat(parts, 1), 4))


def test_tokens(backend: str) -> None:
    """(B, C, T), as attention blocks see images; of a channels_last image a view with channels innermost."""
    image = noise(2, 12, 5, 6)
    for memory in FORMATS.values():
        tokens = image.to(memory_format=memory).flatten(2)
        got = run(backend, tokens, 4, activation="none")
        assert got.stride() == tokens.stride()
        torch.testing.assert_close(got, F.group_norm(image, 4).flatten(2), rtol=1e-5, atol=1e-5)
    got = run(backend, [tokens, tokens], 4)
    torch.testing.assert_close(got, run(backend, torch.cat([tokens, tokens], 1), 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_may_be_float32(backend: str, dtype: torch.dtype) -> None:
    """Half-precision features with the parameters of GroupNorm32; nothing is rounded to the features' dtype before."""
    x = noise(2, 8, 9, 4).to(dtype)
    vectors = {"weight": noise(8), "bias": noise(8).to(dtype), "scale": noise(2, 8).to(dtype), "shift": noise(2, 8)}
    truth = SPEC.reference(x.double(), 2, **{n: v.double() for n, v in vectors.items()})
    assert_close_to_truth(run(backend, x, 2, **vectors), truth, truth.to(dtype))


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize(
    ("mean", "scale", "eps"),
    [(1e3, 1.0, 1e-5), (-1e4, 0.01, 1e-5), (3e6, 1.0, 1e-5), (1.0, 1e-6, 1e-14), (0.0, 1e30, 0.0)],
)
def test_statistics_do_not_cancel(backend: str, mean: float, scale: float, eps: float, memory: str) -> None:
    x = (mean + scale * noise(1, 18, 33, 65)).to(memory_format=FORMATS[memory])
    truth = exact(x, 3, eps=eps)
    assert_close_to_truth(run(backend, x, 3, eps=eps, activation="none"), truth, truth.float())


@pytest.mark.parametrize("memory", FORMATS)
def test_an_outlier_at_the_first_pixel(backend: str, memory: str) -> None:
    """Where sums are taken relative to a pixel, it had better not be this one."""
    x = noise(1, 4, 130, 127)
    x[:, :, 0, 0] = 1e6
    x = x.to(memory_format=FORMATS[memory])
    assert_close_to_truth(run(backend, x, 2, activation="none"), exact(x, 2), exact(x, 2).float())


@pytest.mark.parametrize("memory", FORMATS)
def test_what_is_not_finite_stays_in_its_group(backend: str, memory: str) -> None:
    x = noise(2, 20, 9, 8)
    x[0, 2, 3, 4], x[1, 17, 0, 0], x[1, 10, 8, 7] = torch.nan, torch.inf, -torch.inf
    bad = torch.zeros(2, 20, dtype=torch.bool)
    bad[0, 0:5] = bad[1, 15:20] = bad[1, 10:15] = True
    got = run(backend, x.to(memory_format=FORMATS[memory]), 4).isnan()
    assert torch.equal(got.all(3).all(2), bad)
    assert torch.equal(got.any(3).any(2), bad)


@pytest.mark.parametrize("memory", FORMATS)
def test_large_outputs(memory: str) -> None:
    """Beyond what fits the cache, where results are written past it; a width that no vector divides, more than one sample."""
    for shape in ((1, 32, 370, 371), (3, 48, 200, 160)):
        x, weight, bias = noise(*shape).to(memory_format=FORMATS[memory]), noise(shape[1]), noise(shape[1])
        torch.testing.assert_close(
            ops.group_norm_silu(x, 8, weight, bias), F.silu(F.group_norm(x, 8, weight, bias)), rtol=2e-5, atol=1e-5
        )


def test_gradient_is_right() -> None:
    inputs = (noise(1, 4, 3, 4), noise(1, 2, 3, 4), noise(6), noise(6), noise(1, 6), noise(1, 7)[:, 1:])
    x, second, weight, bias, scale, shift = (t.double().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(
        lambda a, b, w, c, s, t: ops.group_norm_silu([a, b], 3, w, c, scale=s, shift=t),
        (x, second, weight, bias, scale, shift),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3)}, r"x is \(2, 3\)"),
        ({"x": torch.ones(1, 6, 3, 4, dtype=torch.int32)}, "x is .* torch.int32"),
        ({"x": [torch.ones(1, 4, 3, 4), torch.ones(1, 2, 3, 1)]}, r"second part of x is \(1, 2, 3, 1\)"),
        ({"x": [torch.ones(1, 4, 3, 4), torch.ones(1, 2, 3, 4).half()]}, "second part of x is .* torch.float16"),
        ({"num_groups": 4}, "num_groups is 4, x has 6 channels"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"weight": torch.ones(5)}, r"weight is \(5,\)"),
        ({"bias": torch.ones(6).half()}, "bias is .* torch.float16"),
        ({"scale": torch.ones(6)}, r"scale is \(6,\)"),
        ({"shift": torch.ones(2, 6)}, r"shift is \(2, 6\)"),
        ({"eps": -1e-9}, "eps is -1e-09"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"activation": "relu"}, "activation is 'relu'"),
    ],
)
def test_wrong_calls(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(**{"x": torch.ones(1, 6, 3, 4), "num_groups": 2, **change})

"""nearest_code where the generated matrix does not look: ties, NaN and infinities, dual codebooks, wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inpaintrt import ops, use_backend
from inpaintrt.ops.nearest_code import SPEC
from inpaintrt.runtime.library import dispatchers


def _device(backend: str) -> str:
    return "cuda" if torch.cuda.is_available() and backend in ("cuda", "cupy", "triton") else "cpu"


def _able(backend: str) -> bool:
    x = torch.ones(1, 2, device=_device(backend))
    return backend == "reference" or not dispatchers[SPEC.name].reasons(SPEC.bind(x, x), x)[backend]


@pytest.fixture(params=[name for name in (*SPEC.lanes, "reference") if _able(name)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this machine has."""
    return str(request.param)


def run(backend: str, x: Tensor, codebook: Tensor, split: int | None = None, known: Tensor | None = None) -> Tensor:
    there = _device(backend)
    with use_backend(backend, op=SPEC.name):
        known = None if known is None else known.to(there)
        return ops.nearest_code(x.to(there), codebook.to(there), split=split, known=known).cpu()


def test_the_first_of_equal_codes_wins(backend: str) -> None:
    codes = torch.tensor([[3.0, 4.0], [1.0, 2.0], [5.0, 6.0]]).repeat(30, 1)
    x = torch.tensor([[1.0, 2.0], [5.1, 6.0], [2.9, 4.0], [1.0, 2.0]])
    assert run(backend, x, codes).tolist() == [1, 2, 0, 1]
    known = torch.tensor([True, True, False, False])
    assert run(backend, x, codes, 40, known).tolist() == [1, 2, 42, 40]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_each_kind_searches_its_half(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(57, 20, generator=generator), torch.randn(133, 20, generator=generator)
    known = (torch.rand(57, generator=generator) < 0.4).to(dtype)
    for split in (1, 16, 50, 132):
        found = run(backend, x, codes, split, known)
        distances = torch.cdist(x.double(), codes.double())
        expected = torch.where(known != 0, distances[:, :split].argmin(1), split + distances[:, split:].argmin(1))
        assert torch.equal(found, expected)
    none, every = torch.zeros(57, dtype=dtype), torch.ones(57, dtype=dtype)
    assert torch.equal(run(backend, x, codes, 50, every), run(backend, x, codes[:50]))
    assert torch.equal(run(backend, x, codes, 50, none), 50 + run(backend, x, codes[50:]))


def traps(codes: int) -> tuple[Tensor, list[Tensor]]:
    """Vectors with NaN, infinities and large numbers, and codebooks with one of those at the first, a middle or the last code."""
    book = torch.ones(codes, 3)
    x = torch.tensor([[math.inf, 1, 1], [-math.inf, 1, 1], [math.nan, 1, 1], [1e30, 1, 1], [0, 0, 0]])
    cases = [book, -book]
    for special in (math.nan, math.inf, -math.inf, 1e30):
        for place in {0, codes // 2, codes - 1}:
            cases.append(book.clone())
            cases[-1][place, 1] = special
    return x, cases


@pytest.mark.parametrize("codes", [1, 5, 16, 33, 70])
def test_nan_comes_first_and_infinities_last(backend: str, codes: int) -> None:
    x, cases = traps(codes)
    for case in cases:
        assert torch.equal(run(backend, x, case), SPEC.run_reference(*SPEC.bind(x, case)))
    if codes > 1:
        known = torch.tensor([True, False, True, False, True])
        for case in cases:
            expected = SPEC.run_reference(*SPEC.bind(x, case, split=codes // 2, known=known))
            assert torch.equal(run(backend, x, case, codes // 2, known), expected)


def test_a_margin_of_a_few_roundings_is_seen(backend: str) -> None:
    """A product in half the digits (TF32, bfloat16) would choose among these codes at random."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 256, generator=generator)
    codes = x.repeat(2, 1) + 0.02 * torch.randn(128, 256, generator=generator)
    distances = torch.cdist(x.double(), codes.double()).square()
    assert torch.equal(run(backend, x, codes), distances.argmin(1))


def test_wrong_arguments_are_named() -> None:
    x, codes, known = torch.ones(4, 3), torch.ones(6, 3), torch.ones(4)
    for message, call in {
        "x is .*accepted: 2-D": lambda: ops.nearest_code(x[0], codes),
        "codebook is .*K and D at least 1": lambda: ops.nearest_code(x, codes[:0]),
        r"accepted: \(N, 3\)": lambda: ops.nearest_code(torch.ones(4, 2), codes),
        "both or neither": lambda: ops.nearest_code(x, codes, split=2),
        "accepted: 1 to 5": lambda: ops.nearest_code(x, codes, split=6, known=known),
        r"known is \(3,\)": lambda: ops.nearest_code(x, codes, split=2, known=known[:3]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()

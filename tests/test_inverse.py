"""A device whose 2-D inverse real FFT assumes symmetry, as cuFFT's does: recognised, explained, and not blamed on a swap.

No such device is needed. Torch's CPU kernel is replaced by one that does what cuFFT's multi-dimensional plans do: in the
columns kx = 0 and kx = w/2 it reads the rows ky ≤ h/2 and takes the others for their mirror images.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import inpaintrt as irt
from inpaintrt.runtime.inverse import numpy_inverse
from inpaintrt.runtime.swap import record_of
from inpaintrt.testing import recipe

from . import foreign_lama
from .applications import archive

NOTE = "assumes the spectrum of a real image"


def assuming_symmetry(spectrum: Tensor, dims: list[int], normalization: int, size: int) -> Tensor:
    """`aten::_fft_c2r` by complex transforms; over one dimension all libraries agree."""
    last = dims[-1]
    y = spectrum.movedim(last, -1).clone()
    if len(dims) > 1:
        rows = dims[0] % spectrum.dim()
        assert (len(dims), rows, last % spectrum.dim()) == (2, spectrum.dim() - 2, spectrum.dim() - 1)
        h = y.shape[-2]
        for column in {0, size // 2} if size % 2 == 0 else {0}:
            for ky in range(h):
                mirror = -ky % h
                if ky > mirror:
                    y[..., ky, column] = y[..., mirror, column].conj_physical()
                elif ky == mirror:
                    y[..., ky, column] = y[..., ky, column].real.to(y.dtype)
        y = torch.ops.aten._fft_c2c(y, [rows], normalization, False)
    whole = torch.cat([y, y[..., 1 : size - size // 2].flip(-1).conj_physical()], dim=-1)
    result = torch.ops.aten._fft_c2c(whole, [whole.dim() - 1], normalization, False).real
    return result.movedim(-1, last).contiguous()


@pytest.fixture
def symmetric():
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fft_c2r", assuming_symmetry, "CPU", allow_override=True)
    yield
    library._destroy()


def spectrum(h: int, w: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(2, 3, h, w // 2 + 1, dtype=dtype)


@pytest.mark.parametrize("size", [(8, 6), (5, 7), (6, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("norm", ["ortho", "forward", "backward"])
def test_the_rule_is_what_the_cpu_does(size, norm, request):
    y = spectrum(*size)
    expected = torch.fft.irfftn(y, s=size, dim=(-2, -1), norm=norm)
    assert torch.equal(torch.fft.irfft(torch.fft.ifft(y, dim=-2, norm=norm), n=size[1], dim=-1, norm=norm), expected)
    request.getfixturevalue("symmetric")
    y.imag[..., 0] += 1  # so that even one row is not symmetric
    plain = torch.fft.irfftn(y, s=size, dim=(-2, -1), norm=norm)
    with numpy_inverse() as rule:
        by_rule = torch.fft.irfftn(y, s=size, dim=(-2, -1), norm=norm)
        again = torch.fft.irfft2(y, s=size, norm=norm)
        torch.fft.irfft(y, n=size[1], dim=-1, norm=norm)
    assert rule.calls == 2, "one-dimensional inverses mean the same everywhere"
    assert torch.equal(by_rule, again)
    y.imag[..., 0] -= 1
    with numpy_inverse():
        torch.testing.assert_close(torch.fft.irfftn(y, s=size, dim=(-2, -1), norm=norm), expected)
    if size[0] > 2:
        assert (plain - by_rule).abs().max() > 1e-3 * by_rule.abs().max(), "the simulated device differs"


def test_the_simulated_device_is_right_where_all_agree(symmetric):
    for h, w in ((8, 6), (5, 7), (7, 4)):
        x = torch.randn(2, 3, h, w, dtype=torch.float64)
        torch.testing.assert_close(torch.fft.irfftn(torch.fft.rfftn(x, dim=(-2, -1)), s=(h, w), dim=(-2, -1)), x)


def example() -> tuple[Tensor, Tensor]:
    return recipe.image("a", 1, 3, 64, 80), (recipe.image("b", 1, 1, 64, 80) > 0.5).float()


def test_a_swap_is_kept_and_explained(symmetric):
    module = recipe.fill(foreign_lama.Layer(16, 16, 3, 0.5, 0.5, padding=1)).eval()
    streams = (torch.randn(1, 8, 9, 6), torch.randn(1, 8, 9, 6))
    before = module(streams)[1]
    irt.accelerate(module, strict=True)
    assert record_of(module)
    (note,) = [note for note in irt.explain(module).notes if NOTE in note]
    assert note.startswith("(model): on this device the original's inverse FFT")
    assert "agrees with the original computed by that rule" in note
    assert not torch.allclose(module(streams)[1], before, rtol=1e-3, atol=1e-4), "there is something to explain"


def test_verify_is_satisfied_and_says_why(symmetric):
    model = irt.accelerate(recipe.fill(foreign_lama.Wrapper()).eval(), strict=True)
    report = irt.verify(model, *example())
    assert report.ok, str(report)
    explained = {note.split(":")[0] for note in report.notes if NOTE in note}
    assert explained == {row["part"] for row in report.rows}
    assert len(explained) >= 6
    share = float(report.notes[-1].split("own output differs by ")[1].split(" ")[0])
    assert 1e-4 < share < 1


def test_nothing_is_explained_where_nothing_differs(symmetric):
    """Our reference makes one-dimensional inverses, on every device."""
    model = irt.accelerate(recipe.fill(irt.models.create("lama", n_blocks=1, base_width=4)).eval(), strict=True)
    report = irt.verify(model, torch.rand(1, 4, 32, 40))
    assert report.ok, str(report)
    assert not any(NOTE in note for note in (*report.notes, *irt.explain(model).notes))


@pytest.mark.parametrize("simulated", [False, True])
def test_it_excuses_nothing_else(simulated, request):
    if simulated:
        request.getfixturevalue("symmetric")

    class Lookalike(foreign_lama.Layer):
        def forward(self, x):
            local, wide = super().forward(x)
            return local, wide * 1.001

    module = recipe.fill(Lookalike(16, 16, 3, 0.5, 0.5, padding=1)).eval()
    assert record_of(irt.accelerate(module)) is None
    assert "another function" in irt.explain(module).rows[0]["why not"]
    report = irt.verify(irt.accelerate(module, probe=False), (torch.randn(1, 8, 6, 6), torch.randn(1, 8, 6, 6)))
    assert not report.ok
    assert not any(note.startswith("(model): ") for note in report.notes), str(report)


def test_an_archive_is_rebuilt_on_such_a_device(symmetric):
    image, mask = example()
    script = archive(recipe.fill(foreign_lama.Wrapper()), image, mask)
    model = irt.accelerate(script, strict=True)
    assert not isinstance(model, torch.jit.ScriptModule)
    assert any(NOTE in note for note in irt.explain(model).notes)

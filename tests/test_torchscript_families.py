"""TorchScript archives of other families than LaMa: rebuilt where weights say enough, refused by the family's name where not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inpaintrt as irt
from inpaintrt.runtime.swap import record_of
from inpaintrt.testing import recipe

from . import foreign_aotgan, foreign_glcic
from .applications import archive


def _pair(height=48, width=64):
    return recipe.image("image", 1, 3, height, width) * 2 - 1, (recipe.image("mask", 1, 1, height, width) > 0.5).float()


def _joined():
    return (torch.cat(_pair(), dim=1),)


def _archive(model, args):
    return archive(recipe.fill(model).eval(), *args)


class Swapped(nn.Module):
    """A network that is called in a way in which nobody calls its family."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = foreign_glcic.Completion(16)

    def forward(self, mask, image):
        return self.generator(torch.cat([image, mask], dim=1))


ARCHIVES = {
    "aotgan": (lambda: foreign_aotgan.Plain(16), _pair),
    "glcic": (lambda: foreign_glcic.Completion(16), _joined),
    "deepfill_v2": (lambda: irt.models.create("deepfill_v2"), lambda: _pair(64, 64)),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("family", ARCHIVES)
def test_rebuilt(family):
    make, arguments = ARCHIVES[family]
    script, args = _archive(make(), arguments()), arguments()
    model = irt.accelerate(script, strict=True)
    called = "one tensor" if len(args) == 1 else "(image, mask)"
    assert f"{family}, called with {called}" in model.rebuilt_from
    assert any(record_of(module) for module in model.modules())
    with torch.no_grad():
        got, expected = model(*args), script(*args)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("make", "arguments", "why"),
    [
        (
            lambda: foreign_aotgan.Plain(16, block=foreign_aotgan.Ungated),
            _pair,
            r"as aotgan, called with \(image, mask\): .*another function",
        ),
        (lambda: foreign_glcic.NormFirst(16), _joined, "as glcic, called with one tensor: .*another function"),
        (Swapped, lambda: _pair()[::-1], "a glcic network is not called with 2 tensors"),
    ],
)
def test_refused_by_the_family_s_name(make, arguments, why):
    script = _archive(make(), arguments())
    assert irt.accelerate(script) is script
    assert any(row["adapter"] == "torchscript" for row in irt.explain(script).rows)
    with pytest.raises(irt.UnsupportedError, match=why):
        irt.accelerate(script, strict=True)

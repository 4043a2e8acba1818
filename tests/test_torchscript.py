"""TorchScript archives, and the objects of applications that hold them: rebuilt, replaced, put back, or refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import inpaintrt as irt
from inpaintrt import pipeline
from inpaintrt.runtime.swap import record_of
from inpaintrt.testing import recipe
from inpaintrt.verification import END_TO_END_AGREEMENT, END_TO_END_RMS

from . import foreign_lama
from .applications import Eraser, Manager, Simple, archive, padded, public_archive

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
FOLDER = Path(__file__).parent / "data"


def small(**options) -> foreign_lama.Wrapper:
    return recipe.fill(foreign_lama.Wrapper(**options)).eval()


def pair(height: int = 24, width: int = 32) -> tuple[Tensor, Tensor]:
    return torch.rand(1, 3, height, width), (torch.rand(1, 1, height, width) > 0.5).long()


def photo(name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(Image.open(FOLDER / f"{name}.jpg")), np.asarray(Image.open(FOLDER / f"{name}-mask.png"))


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """The share of 8-bit values within one level."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return float((np.abs(a.astype(int) - b) <= 1).mean())


@pytest.fixture(scope="module")
def script() -> torch.jit.ScriptModule:
    return archive(small(), *pair())


@pytest.fixture(scope="module")
def big_script() -> torch.jit.ScriptModule:
    return public_archive()


@pytest.fixture(scope="module")
def rebuilt(script) -> nn.Module:
    return irt.accelerate(script, strict=True)


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_another_model_comes_back_and_says_so(script, rebuilt):
    assert rebuilt is not script
    assert not isinstance(rebuilt, torch.jit.ScriptModule)
    assert not rebuilt.training
    assert record_of(rebuilt.generator.model) is not None
    report = irt.explain(rebuilt, *pair())
    assert report.rows[0]["why not"] is None
    assert "100.0% of the parameters" in report.notes[0]
    assert "not the object that was given, but rebuilt from its weights: TorchScript module" in report.notes[1]
    assert irt.verify(rebuilt, *pair()).ok
    assert "accelerate was not called" in irt.explain(archive(small(), *pair())).rows[0]["why not"]


@pytest.mark.parametrize("size", [(16, 16), (40, 56), (64, 48)])
@pytest.mark.parametrize("kind", ["int64", "uint8", "float", "soft", "bool"])
def test_it_computes_what_the_archive_computes(script, rebuilt, size, kind):
    image, mask = pair(*size)
    if kind == "soft":
        mask = torch.rand(mask.shape)
    theirs = {"uint8": mask.byte(), "float": mask.float()}.get(kind, mask)
    ours = mask.bool() if kind == "bool" else theirs  # the archive's arithmetic knows no bool
    with torch.no_grad():
        expected, actual = script(image, theirs), rebuilt(image, ours)
    assert actual.dtype == expected.dtype
    assert ((actual - expected).norm() / expected.norm()) < END_TO_END_RMS
    assert ((actual - expected).abs() * 255 <= 1).double().mean() >= END_TO_END_AGREEMENT
    if kind != "soft":
        known = (mask == 0).expand_as(image)
        assert torch.equal(actual[known], image[known])


def test_batches(rebuilt):
    image, mask = torch.rand(3, 3, 24, 16), (torch.rand(3, 1, 24, 16) > 0.5).long()
    with torch.no_grad():
        whole = rebuilt(image, mask)
        parts = torch.cat([rebuilt(image[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_a_bare_generator_is_called_as_before():
    script = archive(small().generator.model, torch.rand(1, 4, 24, 32))
    model = irt.accelerate(script, strict=True)
    x = torch.rand(1, 4, 40, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(x), script(x), rtol=1e-4, atol=1e-5)
    assert "one tensor" in irt.explain(model).notes[1]


@pytest.mark.parametrize("last", [nn.Tanh(), None])
def test_what_the_weights_do_not_say_is_found_by_numbers(last):
    module = small()
    module.generator.model[-1] = last or nn.Identity()
    script = archive(module, *pair())
    model = irt.accelerate(script, strict=True)
    image, mask = pair(16, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(image, mask), script(image, mask), rtol=1e-4, atol=1e-5)


def test_the_rebuilt_model_is_an_ordinary_module(script, rebuilt):
    image, mask = pair()
    with torch.no_grad():
        expected = rebuilt(image, mask)
        assert torch.equal(copy.deepcopy(rebuilt)(image, mask), expected)
        plain = pickle.loads(pickle.dumps(rebuilt))
        torch.testing.assert_close(plain(image, mask), expected, rtol=1e-4, atol=1e-5)
    assert not any(record_of(m) for m in plain.modules())
    assert all(p.requires_grad for p in rebuilt.parameters())
    theirs = {p.data_ptr() for p in script.parameters()}
    assert not theirs & {p.data_ptr() for p in rebuilt.parameters()}, "weights are shared with the archive"
    twin = irt.restore(copy.deepcopy(rebuilt))
    assert not any(record_of(m) for m in twin.modules())


def test_the_archive_is_left_as_it_was():
    script = archive(small(), *pair())
    before = {name: tensor.clone() for name, tensor in script.state_dict().items()}
    random = torch.get_rng_state()
    irt.accelerate(script)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], tensor) for name, tensor in script.state_dict().items())
    assert irt.restore(script) is script


def test_sizes_that_no_network_takes_are_refused_with_the_way_out(rebuilt):
    for height, width in ((17, 24), (24, 20), (8, 8)):
        with pytest.raises(
            ValueError, match=rf"{height} rows and {width} columns; accepted: multiples of 8, at least 16"
        ):
            rebuilt(*pair(height, width))


def test_fill_takes_it(rebuilt):
    image = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    hole = np.zeros((37, 50), bool)
    hole[5:20, 30:50] = True
    result = pipeline.fill(rebuilt, image, hole)
    assert np.array_equal(result[~hole], image[~hole])
    with irt.disabled():
        assert agreement(result, pipeline.fill(rebuilt, image, hole)) >= END_TO_END_AGREEMENT


@pytest.mark.parametrize("owner", ["rebuilt", "swapped"])
def test_a_stale_weight_is_never_used(owner):
    module = small()
    made = irt.accelerate(archive(module, *pair()) if owner == "rebuilt" else module, strict=True)
    image, mask = pair()
    mask = mask.float()
    names = (
        "5.conv1.ffc.convl2l.weight",
        "1.bn_l.bias",
        "6.conv2.ffc.convg2g.fu.conv_layer.weight",
        "4.bn_g.running_var",
    )
    changes = (
        lambda p: p.data.mul_(1.5),
        lambda p: p.data.copy_(p.data.flip(0)),
        lambda p: p.detach().numpy().__imul__(0.5),
        lambda p: setattr(p, "data", p.detach() * 0.9),
    )
    for name, change, grad in itertools.product(names, changes, (True, False)):
        model = copy.deepcopy(made)
        tensor = model.generator.model.state_dict(keep_vars=True)[name]
        with torch.set_grad_enabled(grad):
            before = model(image, mask)
            change(tensor)
            fast = model(image, mask)
            with irt.disabled():
                torch.testing.assert_close(fast, model(image, mask), rtol=1e-4, atol=1e-5)
        assert not torch.equal(fast, before), "the change shows; else this proves nothing"


def test_gradients_reach_the_rebuilt_weights(rebuilt):
    model, (image, mask) = copy.deepcopy(rebuilt), pair()

    def gradients():
        model.zero_grad()
        model(image, mask).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    fast = gradients()
    with irt.disabled():
        for name, gradient in gradients().items():
            torch.testing.assert_close(fast[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


# ---- what is refused ------------------------------------------------------------------------------------------------


class Unblended(foreign_lama.Wrapper):
    def forward(self, image, mask):
        return self.generator.model(torch.cat([image * (1 - mask), mask], 1))


class KnownMask(foreign_lama.Wrapper):
    """1 = known."""

    def forward(self, image, mask):
        return super().forward(image, 1 - mask)


class HardMask(foreign_lama.Wrapper):
    """Equal for masks of 0 and 1."""

    def forward(self, image, mask):
        return super().forward(image, (mask > 0.5) * 1)


class Slightly(foreign_lama.Wrapper):
    def forward(self, image, mask):
        return super().forward(image, mask) * (1 + 1e-5)


class Third(foreign_lama.Wrapper):
    def forward(self, image, mask, noise):
        return super().forward(image, mask) + noise


@pytest.mark.parametrize("kind", [Unblended, KnownMask, HardMask, Slightly])
def test_another_function_is_refused_and_the_archive_comes_back(kind):
    script = archive(recipe.fill(kind()), torch.rand(1, 3, 24, 32), torch.rand(1, 1, 24, 32))
    assert irt.accelerate(script) is script
    (row,) = irt.explain(script).rows
    assert "in float64 the outputs differ" in row["why not"]
    assert "8 other forms of it differ, too" in row["why not"]
    with pytest.raises(irt.UnsupportedError, match=r"torchscript: as lama, called with .image, mask., result blended"):
        irt.accelerate(script, strict=True)


def _half():
    return archive(small(), *pair()).half()


def _frozen():
    return torch.jit.freeze(archive(small(), *pair()))


def _training():
    script = archive(small(), *pair())
    return script.train()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: archive(nn.Sequential(nn.Conv2d(3, 3, 3)), torch.rand(1, 3, 8, 8)), "not a lama generator"),
        (
            lambda: archive(recipe.fill(Third()), *pair(), torch.rand(1, 3, 24, 32)),
            "called with .image: Tensor, mask: Ten",
        ),
        (_half, "its weights are torch.float16; known is torch.float32"),
        (_frozen, "no weights by name"),
        (_training, "training mode; call eval"),
        (lambda: archive(nn.Sigmoid(), torch.rand(1, 3)), "no weights by name"),
    ],
)
def test_what_cannot_be_rebuilt_comes_back_with_the_reason(make, why):
    script = make()
    assert irt.accelerate(script) is script
    assert [row["adapter"] for row in irt.explain(script).rows] == ["torchscript"]
    with pytest.raises(irt.UnsupportedError, match=why):
        irt.accelerate(script, strict=True)


def test_an_archive_that_raises_is_refused_with_its_message():
    class FixedSize(foreign_lama.Wrapper):
        def forward(self, image, mask):
            return super().forward(image, mask) + torch.zeros(1, 3, 24, 32)

    script = archive(recipe.fill(FixedSize()), *pair())
    assert irt.accelerate(script) is script
    assert r"does not run on (1, 3, 16, 24) float32, (1, 1, 16, 24)" in irt.explain(script).rows[0]["why not"]


def test_options_of_a_model_hold_for_what_is_rebuilt(script):
    with pytest.raises(irt.UnsupportedError, match="overflow"):
        irt.accelerate(script, precision="fp16")
    with pytest.raises(ValueError, match="did you mean"):
        irt.accelerate(script, only="lama.generater")
    assert irt.accelerate(script, skip="torchscript") is script
    assert irt.accelerate(script, skip=["lama.*", "convolution*"]) is script
    model = irt.accelerate(script, only="generator.model.5")
    assert [name for name, m in model.named_modules() if record_of(m)] == ["generator.model.5"]
    assert irt.accelerate(script, only="lama.generator", precision="bf16").generator is not None


# ---- applications ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHOTOS)
def test_a_manager_gives_the_same_bytes(big_script, name):
    image, mask = photo(name)
    manager = Manager(big_script, window_above=600)
    before = manager(image, mask)
    assert irt.accelerate(manager, strict=True) is manager
    assert not isinstance(manager.model.model, torch.jit.ScriptModule)
    after = manager(image, mask)
    assert agreement(after, before) >= END_TO_END_AGREEMENT
    known = mask == 0
    assert np.array_equal(after[known], before[known])
    assert not np.array_equal(before[~known], image[..., ::-1][~known]), "the hole was not filled"
    assert irt.restore(manager) is manager
    assert manager.model.model is big_script
    assert [*vars(manager.model)] == ["device", "model"]


@pytest.mark.parametrize("name", ["chelsea", "rocket"])
def test_a_simple_object_gives_the_same_picture(big_script, name):
    image, mask = (Image.open(FOLDER / file) for file in (f"{name}.jpg", f"{name}-mask.png"))
    simple = Simple(big_script)
    before = simple(image, mask)
    assert before.size == tuple(-(-side // 8) * 8 for side in image.size)
    irt.accelerate(simple)
    report = irt.explain(simple, image, mask)
    assert [(row["module"], row["why not"]) for row in report.rows] == [("model.generator.model", None)]
    assert "model is not the object that was given" in report.notes[1]
    assert agreement(np.asarray(simple(image, mask)), np.asarray(before)) >= END_TO_END_AGREEMENT


@pytest.mark.parametrize("name", ["chelsea", "rocket"])
def test_fill_pads_as_the_applications_do(big_script, name):
    """Right and bottom, edge pixels repeated, cropped back: 451 columns and 427 rows are no multiples of 8."""
    image, mask = photo(name)
    theirs = Eraser(big_script)(image, mask)[..., ::-1]
    ours = pipeline.fill(irt.accelerate(irt.load("lama_mini")), image, mask > 0)
    hole = mask > 0
    assert agreement(ours[hole], theirs[hole]) >= END_TO_END_AGREEMENT
    assert padded(image, 8).shape != image.shape


def test_modules_held_by_an_object_are_swapped_in_place():
    module = small()
    holder = types.SimpleNamespace(model=types.SimpleNamespace(net=module), other=nn.Conv2d(3, 3, 1))
    irt.accelerate(holder, only="model.*")
    assert holder.model.net is module
    assert record_of(module.generator.model)
    assert irt.explain(holder).rows[0]["module"] == "model.net.generator.model"
    irt.refresh(holder)
    irt.restore(holder)
    assert not any(record_of(m) for m in module.modules())


def test_an_archive_held_twice_is_rebuilt_once_and_put_back_in_both_places(script):
    class Application(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([script])
            self.again = script

        def forward(self, image, mask):
            return self.again(image, mask)

    holder = types.SimpleNamespace(app=Application(), direct=script)
    irt.accelerate(holder, strict=True)
    made = holder.direct
    assert made is holder.app.again is holder.app.inner[0]
    assert record_of(made.generator.model)
    copied = copy.deepcopy(holder.app)
    image, mask = pair()
    with torch.no_grad():
        torch.testing.assert_close(copied(image, mask), script(image, mask), rtol=1e-4, atol=1e-5)
    irt.accelerate(holder)
    assert holder.direct is made, "a second call has nothing left to rebuild"
    irt.restore(holder)
    assert holder.direct is holder.app.again is holder.app.inner[0] is script
    assert set(vars(holder)) == {"app", "direct"}
    assert not any("_inpaintrt" in key for key in vars(holder.app))


def test_a_strict_failure_leaves_an_object_as_it_was(script):
    other = archive(nn.Sequential(nn.Conv2d(3, 3, 3)), torch.rand(1, 3, 8, 8))
    holder = types.SimpleNamespace(first=script, second=other)
    with pytest.raises(irt.UnsupportedError, match="second: torchscript"):
        irt.accelerate(holder, strict=True)
    assert holder.first is script
    irt.accelerate(holder)
    assert holder.first is not script
    assert holder.second is other
    assert [row["module"] for row in irt.explain(holder).rows] == ["first.generator.model", "second"]


def test_a_holder_that_cannot_be_changed_is_refused(script):
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        model: torch.jit.ScriptModule

    holder = Frozen(script)
    irt.accelerate(holder)
    assert holder.model is script
    assert "does not let the attribute 'model' be replaced" in irt.explain(holder).rows[0]["why not"]
    with pytest.raises(irt.UnsupportedError, match="does not let"):
        irt.accelerate(holder, strict=True)


def test_objects_without_a_module_are_named_with_what_they_hold():
    class Property:
        def __init__(self):
            self.path = "big-lama.pt"
            self.loaded = types.SimpleNamespace(device="cpu")
            self.me = self

        @property
        def model(self):
            raise AssertionError("properties are not run")

    for call in (irt.accelerate, irt.restore, irt.explain):
        with pytest.raises(TypeError, match=r"a Property was given.*path \(str\).*loaded: device \(str\)"):
            call(Property())
    for thing in (3, [nn.ReLU()], lambda x: x, nn.ReLU, torch):
        with pytest.raises(TypeError, match=f"a {type(thing).__name__} was given"):
            irt.accelerate(thing)
    with pytest.raises(TypeError, match="the module that it holds"):
        irt.verify(types.SimpleNamespace(model=nn.ReLU()), torch.rand(1))

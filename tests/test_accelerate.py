"""Model-level calls: options, reports, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import inpaintrt as irt
from inpaintrt.runtime.swap import record_of, why_original
from inpaintrt.testing import recipe

from . import foreign_lama

DATA = Path(__file__).parent / "data"


@pytest.fixture
def model():
    return recipe.fill(irt.models.create("lama", n_blocks=2, base_width=4)).eval()


@pytest.fixture
def x():
    return torch.rand(1, 4, 16, 24)


def _swapped(model):
    return [name for name, m in model.named_modules() if record_of(m)]


def test_containers_come_before_what_they_contain(model):
    irt.accelerate(model)
    assert _swapped(model) == ["model"]


def test_only_and_skip(model):
    irt.accelerate(model, skip="lama.generator")
    assert _swapped(model) == ["model.5", "model.6"], "what a skipped container holds is still found"
    irt.restore(model)
    irt.accelerate(model, only=["model.5", "model.6.conv1"])
    assert _swapped(model) == ["model.5", "model.6.conv1"]
    irt.restore(model)
    irt.accelerate(model, only="lama.*", skip="model.6*")
    assert _swapped(model) == ["model"]
    with pytest.raises(ValueError, match=r"did you mean 'lama\.generator'"):
        irt.accelerate(model, only="lama.generater")


def test_a_container_that_fails_leaves_its_parts():
    """One wrong layer in a generator: the probe refuses the whole, the good blocks are still made fast."""

    class Lookalike(foreign_lama.Layer):
        def forward(self, x):
            local, wide = super().forward(x)
            return local * 1.01, wide

    model = recipe.fill(foreign_lama.Wrapper()).eval()
    model.generator.model[5].conv1.__class__ = Lookalike
    irt.accelerate(model)
    assert _swapped(model) == ["generator.model.5.conv1.ffc", "generator.model.5.conv2", "generator.model.6"]
    report = irt.verify(model, torch.rand(1, 3, 64, 80), torch.rand(1, 1, 64, 80).round())
    assert report.ok, str(report)


def test_bad_options(model):
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        irt.accelerate(model, backend="cudnn")
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        irt.accelerate(model, precision="fp8")


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_bf16_on_photos(name):
    """Finite, and on average within one 8-bit level of the float32 result; also inside the hole alone."""
    image, mask = (np.asarray(Image.open(DATA / file)) for file in (f"{name}.jpg", f"{name}-mask.png"))
    sides = [(0, -side % 8) for side in mask.shape]
    hole = np.pad(mask > 0, sides, mode="symmetric")
    known = np.pad(image, [*sides, (0, 0)], mode="symmetric") * ~hole[..., None] / 255
    x = torch.from_numpy(np.concatenate([known, hole[..., None]], axis=2).astype(np.float32).transpose(2, 0, 1)[None])
    model = irt.load("lama_mini")
    with torch.no_grad():
        expected = model(x)
        by_name = irt.accelerate(model, precision="bf16", strict=True)(x)
        assert irt.explain(model, x).rows[0]["why not"] is None
        irt.accelerate(model, precision="fp32")
        with torch.autocast("cpu", torch.bfloat16):
            assert irt.explain(model, x).rows[0]["why not"] is None
            by_context = model(x)
    assert by_name.dtype == torch.float32
    for result in (by_name, by_context.float()):
        assert bool(result.isfinite().all())
        error = (result - expected).abs()
        assert 0 < error.mean() < 1 / 255
        assert error[0][:, torch.from_numpy(hole)].mean() < 1 / 255


def test_bf16_keeps_no_cast_weights(model, x):
    """Autocast remembers cast weights until the outermost context ends; a caller's may be long."""
    irt.accelerate(model, precision="bf16")
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        before = model(x)
        for p in model.parameters():
            p.data.mul_(1.1)
        after = model(x)
    assert not torch.equal(before, after)
    with torch.no_grad():
        assert torch.equal(model(x), after)


def test_fp16_is_refused_before_anything_changes(model, x):
    with pytest.raises(irt.UnsupportedError, match=r"overflow float16, which gives black images .use bf16."):
        irt.accelerate(model, precision="fp16")
    assert not _swapped(model)
    with pytest.raises(irt.UnsupportedError, match="its activations may overflow float16"):  # it has no spectra
        irt.accelerate(nn.Conv2d(4, 8, 3).eval(), precision="fp16")
    irt.accelerate(model)
    with pytest.raises(irt.UnsupportedError, match="its activations and spectra may overflow"):
        irt.accelerate(model, precision="fp16")
    assert _swapped(model) == ["model"], "what was accelerated stays so"


def test_float16_calls_take_the_original_forward(model, x):
    """Autocast or a model converted to half: the caller's choice, and the original's result or error."""

    def outcome(net, x):
        try:
            return net(x)
        except RuntimeError as error:
            return str(error)

    def same(net, x):
        with torch.no_grad(), irt.disabled():
            expected = outcome(net, x)
        with torch.no_grad():
            actual = outcome(net, x)
        return torch.equal(actual, expected) if isinstance(expected, torch.Tensor) else actual == expected

    irt.accelerate(model)
    swapped = model.model
    with torch.autocast("cpu", torch.float16):
        assert "overflow float16" in why_original(swapped, (x,), {})
        assert same(model, x)
    assert not why_original(swapped, (x,), {})
    assert "torch.float16" in why_original(model.half().model, (x.half(),), {})
    assert same(model, x.half())


def test_nothing_recognised():
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    assert irt.accelerate(model) is model
    assert "No module was recognised" in str(irt.explain(model))


def test_explain(model, x):
    before = irt.explain(model)
    assert {row["why not"] for row in before.rows} == {"accelerate was not called"}
    assert [row["module"] for row in before.rows][:2] == ["model", "model.5"]
    irt.accelerate(model)
    report = irt.explain(model, x)
    assert [row["adapter"] for row in report.rows] == ["lama.generator"]
    assert report.rows[0]["why not"] is None
    assert report.notes == ("1 module accelerated, with 100.0% of the parameters.",)
    assert json.loads(report.to_json())["rows"][0]["module"] == "model"
    assert report.to_markdown().count("|") > 8
    assert "lama.generator" in str(report)
    model.train()
    assert "training" in irt.explain(model, x).rows[0]["why not"]


def test_explain_names_the_reason_per_call(model):
    irt.accelerate(model)
    report = irt.explain(model, torch.rand(1, 4, 17, 24))
    assert "not a multiple of 8" in report.rows[0]["why not"]


def test_verify():
    model, x = irt.accelerate(irt.load("lama_mini")), torch.rand(1, 4, 64, 80)
    report = irt.verify(model, x)
    assert report.ok, str(report)
    assert [row["adapter"] for row in report.rows] == ["lama.ffc"] * 12 + ["lama.generator", None]
    assert report.rows[-1]["uint8 within 1"] == 1.0
    with pytest.raises(ValueError, match="example"):
        irt.verify(model)
    irt.restore(model)
    assert "compares it with itself" in str(irt.verify(model, x))


def test_verify_finds_a_wrong_swap(x):
    class Lookalike(foreign_lama.Layer):
        def forward(self, x):
            local, wide = super().forward(x)
            return local * 1.001, wide

    module = irt.accelerate(recipe.fill(Lookalike(16, 16, 3, 0.5, 0.5, padding=1)).eval(), probe=False)
    report = irt.verify(module, (torch.randn(1, 8, 6, 6), torch.randn(1, 8, 6, 6)))
    assert not report.ok
    assert report.rows[0]["of limit"] > 1


def test_odd_sizes_behave_like_the_original(model):
    """Sizes that the fused form does not take run the original, whatever that does."""
    irt.accelerate(model)
    odd = torch.rand(1, 4, 18, 30)
    fast = model(odd)
    with irt.disabled():
        assert torch.equal(fast, model(odd))
    for bad in (torch.rand(1, 4, 8, 8), torch.rand(1, 3, 16, 16), torch.rand(4, 16)):
        with pytest.raises(RuntimeError) as first, irt.disabled():
            model(bad)
        with pytest.raises(RuntimeError) as second:
            model(bad)
        assert str(first.value) == str(second.value), "the original's own message"


def test_nan_reaches_the_output_as_before(model, x):
    x[0, 0, 3, 3] = torch.nan
    irt.accelerate(model)
    fast = model(x)
    with irt.disabled():
        assert torch.equal(fast.isnan(), model(x).isnan())


def test_model_and_input_on_other_devices(model, x):
    """The original's own message, not one from inside the fused form."""
    with pytest.raises((RuntimeError, NotImplementedError)) as own:
        model(x.to("meta"))
    irt.accelerate(model)
    with pytest.raises((RuntimeError, NotImplementedError)) as ours:
        model(x.to("meta"))
    assert str(ours.value) == str(own.value)


def test_lazy_names():
    assert "accelerate" in dir(irt)
    with pytest.raises(AttributeError, match="acelerate"):
        irt.acelerate  # noqa: B018
    for name in irt.__all__:
        assert getattr(irt, name) is not None


def test_lazy_modules_are_explained():
    model = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    assert "2 parameters of lazy modules have no size yet" in " ".join(irt.explain(model).notes)
    irt.accelerate(model)
    report = irt.explain(model)
    assert [row["module"] for row in report.rows] == ["2"]
    assert "100.0% of the parameters" in report.notes[0]
    model(torch.zeros(1, 3, 20, 20))
    assert not any("lazy" in note for note in irt.explain(model).notes)


def test_info_never_raises_and_sees_one_openmp():
    torch.ones(4).sum()
    report = irt.info()
    items = {row["item"]: row["value"] for row in report.rows}
    assert "error" not in items
    assert items["inpaintrt"] == irt.__version__
    assert items["gated_activation · cpu"] == "available"
    pools = [row["value"] for row in report.rows if row["item"] == "OpenMP runtime mapped"]
    assert len(pools) == 1, pools
    assert items["OpenMP bound"] == pools[0]


def test_empty_cache_and_refresh(model):
    irt.empty_cache()
    assert irt.refresh(model) is model

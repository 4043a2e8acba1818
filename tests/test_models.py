"""Reference networks against the public implementations' numbers, and the loader."""

from __future__ import annotations

import json
import pathlib
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import inpaintrt
from inpaintrt import models
from inpaintrt.models import lama
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import assert_close_to_truth, recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"


def _case(name):
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


def _input(spec):
    return recipe.image(spec["name"], *spec["shape"]) * spec.get("scale", 1.0) + spec.get("shift", 0.0)


def _damp(module, steps):
    state = module.state_dict(keep_vars=True)
    for step in steps:
        assert step["op"] == "pow2"
        for key, power in step["keys"].items():
            state[key].data.mul_(2.0**power)
    return module


def _lama(case, **options):
    (spec,) = case["modules"].values()
    module = lama.LaMa(n_blocks=spec["args"]["n_blocks"], base_width=spec["args"]["ngf"], **options)
    listed = [(key, tuple(shape)) for key, shape, *_ in spec["state_dict"]]
    assert [(k, tuple(v.shape)) for k, v in module.state_dict().items()] == listed, "the public state-dict layout"
    return _damp(recipe.fill(module), spec["after_fill"]).eval()


@pytest.mark.parametrize("accelerated", [False, True], ids=["reference", "accelerated"])
@pytest.mark.parametrize("name", ["lama_small", "lama_big"])
def test_lama_golden(name, accelerated):
    case, tensors = _case(name)
    network = _lama(case)
    if accelerated:
        inpaintrt.accelerate(network)
        assert "accelerated" in repr(network)
    for run, spec in case["runs"].items():
        image, mask = _input(spec["inputs"]["image"]), tensors[f"{run}.mask"]
        x = torch.cat([image * (1 - mask), mask], dim=1)
        with torch.no_grad():
            out, filled = network(x), network.inpaint(image, mask)
        assert_close_to_truth(out, tensors[f"{run}.out64"], tensors[f"{run}.out"], context=f"{name} {run}")
        assert torch.equal(filled[mask.expand_as(filled) == 0], image[mask.expand_as(image) == 0])
        if tensors[f"{run}.inpainted"].shape == filled.shape:
            torch.testing.assert_close(filled, tensors[f"{run}.inpainted"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("accelerated", [False, True], ids=["reference", "accelerated"])
def test_ffc_golden(accelerated):
    case, tensors = _case("ffc_odd")
    module = recipe.fill(lama.FFC_BN_ACT(32, 32, 3, 0.75, 0.75, padding=1)).eval()
    if accelerated:
        inpaintrt.accelerate(module)
        assert "lama.ffc" in repr(module)
    inputs = case["runs"]["s13x10"]["inputs"]
    with torch.no_grad():
        out = module((_input(inputs["x_l"]), _input(inputs["x_g"])))
    for got, end in zip(out, ("l", "g"), strict=True):
        assert_close_to_truth(got, tensors[f"s13x10.out_{end}64"], tensors[f"s13x10.out_{end}"])


def test_fourier_unit_golden():
    """Even, odd and one-wide sizes; the rectified spectrum is not Hermitian, so this tests the inverse rule."""
    case, tensors = _case("fourier_unit")
    module = recipe.fill(lama.FourierUnit(6, 6)).eval()
    from inpaintrt.adapters.lama import fourier_unit

    for run, spec in case["runs"].items():
        x = _input(spec["inputs"]["x"])
        with torch.no_grad():
            for got in (
                module(x),
                fourier_unit(module, x),
                fourier_unit(module, x.to(memory_format=torch.channels_last)),
            ):
                assert_close_to_truth(got, tensors[f"{run}.out64"], tensors[f"{run}.out"], context=run)


def test_sizes_and_config():
    network = models.create("lama", n_blocks=1, base_width=4)
    assert (network.size_multiple, network.min_size) == (8, 16)
    assert lama.config_from_state_dict(network.state_dict())["n_blocks"] == 1
    with torch.no_grad():
        assert network(torch.rand(1, 4, 16, 24)).shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="n_downsampling"):
        lama.LaMa(n_downsampling=0)


def test_values_under_the_hole_do_not_matter():
    network = recipe.fill(models.create("lama", n_blocks=1, base_width=4)).eval()
    image, mask = torch.rand(1, 3, 16, 16), (torch.rand(1, 1, 16, 16) > 0.5).float()
    poisoned = torch.where(mask != 0, torch.nan, image)
    with torch.no_grad():
        assert torch.equal(network.inpaint(poisoned, mask), network.inpaint(image, mask))


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small():
    return recipe.fill(models.create("lama", n_blocks=1, base_width=4))


def test_shipped_model_loads():
    network = inpaintrt.load("lama_mini")
    assert sum(p.numel() for p in network.parameters()) == 1_201_699
    assert not network.training


@pytest.mark.parametrize("prefix", ["", "generator.", "model.generator."])
@pytest.mark.parametrize("wrap", ["plain", "lightning"])
def test_checkpoints(tmp_path, small, prefix, wrap):
    state = {prefix + k: v for k, v in small.state_dict().items()}
    if wrap == "lightning":
        state = {"state_dict": {**state, "discriminator.w": torch.zeros(1)}, "epoch": 3}
    torch.save(state, tmp_path / "weights.ckpt")
    loaded = inpaintrt.load("lama", tmp_path / "weights.ckpt")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), small.state_dict().values(), strict=True)
    )


class _Payload:
    def __reduce__(self):
        return print, ("code from a weights file ran",)


def test_bad_files(tmp_path, small, capsys):
    def refuse(name, match):
        with pytest.raises(WeightsError, match=match) as raised:
            inpaintrt.load("lama", tmp_path / name)
        assert name in str(raised.value)

    refuse("absent.pt", "no such file")
    (tmp_path / "folder.pt").mkdir()
    refuse("folder.pt", "folder")
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint" * 9)
    refuse("noise.pt", "cannot be read|more than tensors")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    refuse("noise.safetensors", "damaged|cannot be read")
    save_file({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    refuse("other.safetensors", "not a lama generator: none of its 1 keys")
    state = {k: v.contiguous() for k, v in small.state_dict().items()}
    save_file({k: v for k, v in state.items() if k != "model.5.conv1.bn_l.bias"}, tmp_path / "cut.safetensors")
    refuse("cut.safetensors", "model.5.conv1.bn_l.bias")
    save_file({**state, "model.1.bn_l.bias": torch.zeros(9)}, tmp_path / "shape.safetensors")
    refuse("shape.safetensors", "shapes do not fit")
    save_file({**state, "model.1.bn_l.bias": torch.full((4,), torch.nan)}, tmp_path / "nan.safetensors")
    refuse("nan.safetensors", "NaN")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    refuse("half.safetensors", "damaged|cannot be read")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(_Payload()))
    refuse("code.pt", "no code is run|cannot be read")
    torch.save([1, 2], tmp_path / "list.pt")
    refuse("list.pt", "no state dict in it, but list")
    assert "ran" not in capsys.readouterr().out


def test_names():
    with pytest.raises(ValueError, match="did you mean 'lama_mini'"):
        inpaintrt.load("lama_mni")
    with pytest.raises(ValueError, match="takes no path"):
        inpaintrt.load("lama_mini", "x.pt")
    with pytest.raises(ValueError, match="needs a path"):
        inpaintrt.load("lama")
    with pytest.raises(ValueError, match="unknown model"):
        models.create("gan")

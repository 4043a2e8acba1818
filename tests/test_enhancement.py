"""`inpaintrt enhance`: from photo and weights to a file, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import inpaintrt as irt
from inpaintrt import cli, enhancement, models
from inpaintrt.testing import recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of three tasks, and photos."""
    folder = tmp_path_factory.mktemp("enhance")
    network = recipe.fill(models.create("ipt", tasks=("x2", "x1"), features=4, layers=1, patch=24))
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.startswith(("sub_mean", "add_mean")):
                fresh = models.create("ipt", features=4, layers=1, patch=24).state_dict()[name]
                value.copy_(fresh)
    save_file(network.state_dict(), folder / "ipt.safetensors")
    pixels = (recipe.image("photo", 30, 41, 4) * 256).byte().numpy()
    Image.fromarray(pixels[..., :3]).save(folder / "photo.png")
    Image.fromarray(pixels).save(folder / "alpha.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels[:23, :, :3]).save(folder / "small.png")
    return folder


def run(folder, photo, out, *options):
    return cli.main(
        ["enhance", str(folder / photo), "-o", str(out), "--weights", str(folder / "ipt.safetensors"), *options]
    )


@pytest.mark.parametrize("photo", ["photo.png", "alpha.png", "grey.png"])
@pytest.mark.parametrize("task", ["x2", "derain"])
def test_file_to_file(folder, tmp_path, capsys, photo, task):
    out = tmp_path / "out.png"
    assert run(folder, photo, out, "--task", task) == 0
    network = irt.load("ipt", folder / "ipt.safetensors")
    given = np.asarray(Image.open(folder / photo).convert("RGB"))
    scale = 2 if task == "x2" else 1
    x = torch.from_numpy(given.copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = network.forward_chop(x, task)[0].permute(1, 2, 0).clamp(0, 255)
    made = np.asarray(Image.open(out))
    assert made.shape == (30 * scale, 41 * scale, 3)
    assert np.abs(made - expected.numpy()).max() < 0.6
    said = capsys.readouterr().err
    assert "8 patches" in said
    assert ("transparency" in said) == (photo == "alpha.png")


def test_a_task_has_a_place(folder, tmp_path, capsys):
    for place, name in (("0", "x2"), ("1", "x1")):
        named, placed = tmp_path / f"{name}.png", tmp_path / f"{place}.png"
        assert run(folder, "photo.png", named, "--task", name) == run(folder, "photo.png", placed, "--task", place) == 0
        assert named.read_bytes() == placed.read_bytes()
    capsys.readouterr()
    assert run(folder, "photo.png", tmp_path / "out.png", "--task", "2") == 2
    assert "task is 2; accepted: one name or place" in capsys.readouterr().err


def test_folders(folder, tmp_path, capsys):
    """One file per photo; a photo that cannot be enhanced is told and does not stop the others."""
    out = tmp_path / "out"
    assert run(folder, ".", out, "--task", "x1", "--format", "ppm") == 1
    said = capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["alpha.ppm", "grey.ppm", "photo.ppm"]
    assert "small.png  FAILED: image has 23 rows" in said
    assert "3 enhanced, 1 failed" in said
    assert run(folder, "photo.png", tmp_path / "one.ppm", "--task", "x1") == 0
    assert (tmp_path / "one.ppm").read_bytes() == (out / "photo.ppm").read_bytes()
    assert run(folder, ".", out, "--task", "x1", "--format", "ppm") == 2
    assert "there are already alpha.ppm" in capsys.readouterr().err
    assert run(folder, ".", tmp_path / "never", "--task", "x3") == 2, "no photo could do better"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(folder, empty, out) == 2
    assert "no photos in" in capsys.readouterr().err


def test_what_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    for photo, options, message in (
        ("small.png", ["--task", "x2"], "23 rows and 41 columns; accepted: at least 24 of both"),
        ("photo.png", [], "This network's tasks are 0: x2, 1: x1"),
        ("photo.png", ["--task", "x3"], "task is 'x3'"),
        ("none.png", ["--task", "x2"], "none.png"),
    ):
        assert run(folder, photo, out, *options) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    out.write_bytes(b"here")
    assert run(folder, "photo.png", out, "--task", "x2") == 2
    assert out.read_bytes() == b"here"


@pytest.mark.parametrize("command", ["explain", "verify"])
def test_reports(folder, capsys, command):
    assert cli.main([command, "--model", "ipt", "--weights", str(folder / "ipt.safetensors")]) == 0
    assert "ipt.body" in capsys.readouterr().out


def test_fill_is_not_for_it(folder, tmp_path, capsys):
    photo, weights = str(folder / "photo.png"), str(folder / "ipt.safetensors")
    assert cli.main(["fill", photo, photo, "-o", str(tmp_path / "o.png"), "--model", "ipt", "--weights", weights]) == 2
    assert "fills no holes" in capsys.readouterr().err


def test_what_python_refuses(folder):
    network = irt.load("ipt", folder / "ipt.safetensors")
    image = np.zeros((30, 30, 3), np.uint8)
    with pytest.raises(TypeError, match="has no tiled"):
        enhancement.enhance(torch.nn.Identity(), image)
    with pytest.raises(ValueError, match="float64"):
        enhancement.enhance(network, image.astype(float), "x2")
    with pytest.raises(ValueError, match="training mode"):
        enhancement.enhance(network.train(), image, "x2")

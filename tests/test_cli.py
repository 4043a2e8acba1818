"""The command line: what is written, what is said, and the exit status."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor, nn

import inpaintrt
from inpaintrt import cli, jobs
from inpaintrt.runtime.errors import ImageError, KernelError, UnsupportedError
from inpaintrt.testing import recipe

DATA = Path(__file__).parent / "data"
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


class Painter(nn.Module):
    """A model that paints holes in one colour, quickly."""

    size_multiple = 8
    min_size = 16
    runs = 0

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        self.runs += 1
        return torch.where(mask > 0, torch.tensor([0.25, 0.5, 0.75]).view(1, 3, 1, 1), image)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    """Stands in for every model; `painter.accelerated` says whether and how it was accelerated."""
    model = Painter().eval()
    model.accelerated = None

    def accelerate(net: nn.Module, *, backend: str, composited: bool = False) -> nn.Module:
        net.accelerated = backend
        assert composited, "fill pastes the photo's known pixels"
        return net

    monkeypatch.setattr(inpaintrt, "load", lambda name, path=None: model)
    monkeypatch.setattr(inpaintrt, "accelerate", accelerate)
    return model


def run(*args: object) -> int:
    """`inpaintrt <args>` in this process; argparse leaves by SystemExit."""
    try:
        return cli.main([str(arg) for arg in args])
    except SystemExit as leave:
        return int(leave.code or 0)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A small photo and its mask, a quarter hole."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "photo.png")
    mask = np.zeros((20, 30), np.uint8)
    mask[:10, :15] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing may be on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("inpaintrt: error: ")
    return lines[0]


# One photo


def test_a_photo_is_filled(painter: Painter, pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    photo, mask = pair
    assert run("fill", photo, mask, "-o", tmp_path / "out.png") == 0
    before, after = pixels(photo), pixels(tmp_path / "out.png")
    hole = pixels(mask) > 0
    assert np.array_equal(after[~hole], before[~hole])
    assert (after[hole] == [63, 127, 191]).all()
    assert painter.accelerated == "auto"
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"inpaintrt: \[1/1\] photo\.png  \d+\.\d\d s  hole: 25\.0 % of the pixels \(white\); "
        r"--invert-mask if white means keep\n", err
    )  # fmt: skip


def test_inverting_fills_the_rest(painter: Painter, pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    photo, mask = pair
    assert run("fill", photo, mask, "-o", tmp_path / "out.png", "--invert-mask") == 0
    changed = (pixels(photo) != pixels(tmp_path / "out.png")).any(axis=2)
    assert np.array_equal(changed, pixels(mask) == 0)
    assert "75.0 % of the pixels (black)" in capsys.readouterr().err


def test_options_reach_the_model(painter: Painter, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    threads: list[int] = []
    monkeypatch.setattr(
        jobs, "fill_file", lambda *a, **k: threads.append(torch.get_num_threads()) or jobs.Done("", (), ())
    )
    before = torch.get_num_threads()
    assert run("fill", *pair, "-o", tmp_path / "a.png", "--backend", "cpu", "--threads", "1") == 0
    assert painter.accelerated == "cpu"
    assert threads == [1]
    assert torch.get_num_threads() == before


def test_skipped_work_is_told(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    network = inpaintrt.models.create("mat", resolution=128, dim=12, z_dim=8, w_dim=8, channel_max=32)
    monkeypatch.setattr(inpaintrt, "load", lambda name, path=None: recipe.fill(network).eval())
    assert run("fill", *pair, "-o", tmp_path / "a.png", "--model", "mat", "--weights", "mat.pth") == 0
    assert re.search(
        r"note: .*composited: the last call skipped \d+% of the decoders' convolutions", capsys.readouterr().err
    )


def test_options_of_networks(
    painter: Painter, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Which of them load a network, by its class, and which its `inpaint` takes."""
    asked: list[Any] = []
    monkeypatch.setattr(inpaintrt, "load", lambda name, path=None, **making: asked.append(making) or painter)
    monkeypatch.setattr(
        Painter, "inpaint", lambda self, image, mask, **given: asked.append(given) or torch.zeros_like(image)
    )

    def fill(*options: object) -> int:
        asked.clear()
        return run("fill", *pair, "-o", tmp_path / "a.png", "--overwrite", *options)

    assert fill("--model", "mat", "--weights", "mat.pth", "--seed", 3, "--option", "noise_mode=none") == 0
    assert asked == [{}, {"noise_mode": None, "seed": 3}]
    options = [part for pair in ("rates=2,4,8,16", "prefix=generator_average") for part in ("--option", pair)]
    assert fill("--model", "aotgan", "--weights", "aot.pt", *options) == 0
    assert asked == [{"rates": (2, 4, 8, 16), "prefix": "generator_average"}, {}]
    assert fill("--model", "big.pt", "--option", "padding_mode=zeros") == 0
    assert asked == [{"padding_mode": "zeros"}, {}]
    capsys.readouterr()
    assert fill("--seed", 3) == 2
    assert "--seed 3: lama_mini draws no random numbers; mat, comodgan, put do" in error(capsys)
    assert fill("--model", "glcic", "--weights", "g.pt", "--option", "mpv=0.5") == 2
    assert "option mpv is 0.5; accepted: values with commas between" in error(capsys)
    assert asked == []


def test_an_option_that_a_network_has_not(pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    model = inpaintrt.models.create("lama", n_blocks=1, base_width=4)
    torch.save(model.state_dict(), tmp_path / "lama.pt")
    for option, message in (
        ("padding=zeros", "has no option 'padding'; accepted: "),
        ("padding_mode=bounce", "bounce"),
    ):
        out = tmp_path / "out.png"
        assert run("fill", *pair, "-o", out, "--model", tmp_path / "lama.pt", "--option", option) == 2
        assert message in error(capsys)


def test_no_accelerate(painter: Painter, pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert run("fill", *pair, "-o", tmp_path / "a.png", "--no-accelerate") == 0
    assert painter.accelerated is None


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lama_mini", ("lama_mini", None)),
        ("some/big.pt", ("lama", "some/big.pt")),
        ("big.safetensors", ("lama", "big.safetensors")),
    ],
)
def test_a_model_is_a_name_or_a_file(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, name: str, wanted: tuple[str, str | None]
) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(name: str, path: Path | None = None) -> nn.Module:
        asked.append((name, None if path is None else path.as_posix()))
        return Painter().eval()

    monkeypatch.setattr(inpaintrt, "load", load)
    assert run("fill", *pair, "-o", tmp_path / "a.png", "--model", name, "--no-accelerate") == 0
    assert asked == [wanted]


def test_an_empty_mask_writes_the_photo_and_runs_nothing(
    painter: Painter, pair: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    photo, mask = pair
    Image.new("L", (30, 20)).save(mask)
    assert run("fill", photo, mask, "-o", tmp_path / "out.png") == 0
    assert painter.runs == 0
    assert np.array_equal(pixels(photo), pixels(tmp_path / "out.png"))
    assert "marks no hole" in capsys.readouterr().err


def test_a_full_mask_warns(painter: Painter, pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    photo, mask = pair
    Image.new("L", (30, 20), 255).save(mask)
    assert run("fill", photo, mask, "-o", tmp_path / "out.png") == 0
    assert "warning: mask.png marks every pixel as hole" in capsys.readouterr().err


def test_a_lossy_result_warns(painter: Painter, pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    assert run("fill", *pair, "-o", tmp_path / "out.jpg") == 0
    assert "warning: out.jpg: JPEG is lossy" in capsys.readouterr().err


def test_a_turned_photo_written_without_exif_warns(painter: Painter, tmp_path: Path, capsys: Any) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (16, 24), "red").save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (24, 16), 255).save(tmp_path / "m.png")
    assert run("fill", tmp_path / "a.jpg", tmp_path / "m.png", "-o", tmp_path / "b.bmp") == 0
    assert "holds no orientation" in capsys.readouterr().err
    assert pixels(tmp_path / "b.bmp").shape == (16, 24, 3)


def test_a_large_photo_is_filled_in_crops(
    painter: Painter, pair: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    photo, mask = (tmp_path / name for name in ("large.png", "large-mask.png"))
    Image.new("RGB", (900, 700), "red").save(photo)
    marks = np.zeros((700, 900), np.uint8)
    marks[30:40, 30:40] = marks[600:610, 800:810] = 255
    Image.fromarray(marks).save(mask)
    assert run("fill", photo, mask, "-o", tmp_path / "o.png", "--max-pixels", 40_000, "--margin", 16) == 0
    assert painter.runs == 2
    capsys.readouterr()
    assert run("fill", photo, mask, "-o", tmp_path / "p.png", "--max-pixels", 1000, "--margin", 16) == 2
    assert "80 x 80 (6,400 pixels with padding), more than 1,000 at once; --max-pixels 6400" in error(capsys)
    assert not (tmp_path / "p.png").exists()


# Errors


def test_errors_are_one_line_status_2_and_no_output(
    painter: Painter, pair: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    photo, mask = pair
    out = tmp_path / "out.png"
    (tmp_path / "bad.png").write_bytes(photo.read_bytes()[:200])
    Image.new("L", (31, 20)).save(tmp_path / "other.png")
    Image.new("CMYK", (30, 20)).save(tmp_path / "ink.jpg")
    cases = {
        "no such file": (tmp_path / "none.png", mask, "-o", out),
        "bad.png: .*damaged": (tmp_path / "bad.png", mask, "-o", out),
        "31 x 20 pixels, .* is 30 x 20": (photo, tmp_path / "other.png", "-o", out),
        "CMYK": (tmp_path / "ink.jpg", mask, "-o", out),
        r"written as \.png": (photo, mask, "-o", tmp_path / "out.heic"),
        "does not exist": (photo, mask, "-o", tmp_path / "nowhere" / "out.png"),
        "exists": (photo, mask, "-o", photo),
        "is a folder": (photo, mask, "-o", tmp_path / "folder.png"),
        "two files or two folders": (photo, tmp_path, "-o", out),
        "invalid choice: 'gpu'": (photo, mask, "-o", out, "--backend", "gpu"),
        "0 is not positive": (photo, mask, "-o", out, "--max-pixels", "0"),
        "required: -o/--out": (photo, mask),
    }
    (tmp_path / "folder.png").mkdir()
    files = sorted(tmp_path.iterdir())
    for words, args in cases.items():
        assert run("fill", *args) == 2, words
        assert re.search(words, error(capsys)), words
    assert sorted(tmp_path.iterdir()) == files
    assert painter.runs == 0


def test_overwriting_has_to_be_asked_for(painter: Painter, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    assert run("fill", *pair, "-o", out) == 2
    assert out.read_bytes() == b"old"
    assert run("fill", *pair, "-o", out, "--overwrite") == 0
    assert pixels(out).shape == (20, 30, 3)


@pytest.mark.parametrize("name", ["nonesuch", "missing.safetensors", "corrupt.safetensors"])
def test_wrong_models_are_one_line(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Any, monkeypatch: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corrupt.safetensors").write_bytes(b"not weights")
    assert run("fill", *pair, "-o", "out.png", "--model", name) == 2
    assert name in error(capsys)
    assert not Path("out.png").exists()


def test_a_network_that_returns_nan_writes_nothing(
    painter: Painter, pair: tuple[Path, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Painter, "inpaint", lambda self, image, mask: image * float("nan"))
    assert run("fill", *pair, "-o", tmp_path / "out.png") == 2
    assert "NaN" in error(capsys)
    assert not (tmp_path / "out.png").exists()


def test_a_defect_of_the_library_keeps_its_traceback(
    painter: Painter, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    def broken(self: Painter, image: Tensor, mask: Tensor) -> Tensor:
        raise KernelError("a kernel failed")

    monkeypatch.setattr(Painter, "inpaint", broken)
    with pytest.raises(KernelError):
        run("fill", *pair, "-o", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_an_interruption_is_quiet_and_leaves_nothing(
    painter: Painter, pair: tuple[Path, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def interrupted(self: Painter, image: Tensor, mask: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Painter, "inpaint", interrupted)
    assert run("fill", *pair, "-o", tmp_path / "out.png") == 130
    assert capsys.readouterr().err == "inpaintrt: interrupted\n"
    assert not (tmp_path / "out.png").exists()


# Folders


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The four photos and their masks, apart: photos/, masks/, out/ (not there yet)."""
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    masks.mkdir()
    for name in PHOTOS:
        shutil.copy(DATA / f"{name}.jpg", photos)
        shutil.copy(DATA / f"{name}-mask.png", masks)
    (photos / "notes.txt").write_text("not a picture")
    (photos / ".hidden.png").write_bytes(b"")
    return photos, masks, tmp_path / "out"


def test_folders(painter: Painter, folders: tuple[Path, Path, Path], capsys: Any) -> None:
    photos, masks, out = folders
    (masks / "rocket-mask.png").rename(masks / "rocket.png")
    (masks / "coffee-mask.png").rename(masks / "coffee_mask.png")
    assert run("fill", photos, masks, "-o", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.png" for name in PHOTOS]
    for name in PHOTOS:
        hole = pixels(DATA / f"{name}-mask.png") > 0
        before, after = pixels(DATA / f"{name}.jpg"), pixels(out / f"{name}.png")
        assert np.array_equal(before[~hole], after[~hole])
    err = capsys.readouterr().err.splitlines()
    assert [re.match(r"inpaintrt: \[(\d)/4\] (\w+)\.jpg  \d+\.\d\d s  hole", line).groups() for line in err[:4]] == [
        (str(i), name) for i, name in enumerate(PHOTOS, 1)
    ]
    assert err[4].startswith("inpaintrt: 4 filled, 0 failed, ")


def test_photos_and_masks_in_one_folder(painter: Painter, tmp_path: Path) -> None:
    assert run("fill", DATA, DATA, "-o", tmp_path / "out", "--format", "webp") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.webp" for name in PHOTOS]


def test_a_bad_file_does_not_stop_the_others(painter: Painter, folders: tuple[Path, Path, Path], capsys: Any) -> None:
    photos, masks, out = folders
    (photos / "chelsea.jpg").write_bytes((DATA / "chelsea.jpg").read_bytes()[:5000])
    Image.new("L", (5, 5)).save(masks / "rocket-mask.png")
    assert run("fill", photos, masks, "-o", out) == 1
    assert sorted(path.name for path in out.iterdir()) == ["astronaut.png", "coffee.png"]
    err = capsys.readouterr().err
    assert re.search(r"\[2/4\] chelsea\.jpg  FAILED: .*damaged", err)
    assert re.search(r"\[4/4\] rocket\.jpg  FAILED: .*5 x 5", err)
    assert "2 filled, 2 failed" in err


def test_what_every_photo_would_meet_stops_the_work(
    painter: Painter, folders: tuple[Path, Path, Path], capsys: Any, monkeypatch: Any
) -> None:
    def refused(self: Painter, image: Tensor, mask: Tensor) -> Tensor:
        raise UnsupportedError("fused_conv2d", {"cuda": ["x is on cpu"]})

    monkeypatch.setattr(Painter, "inpaint", refused)
    photos, masks, out = folders
    assert run("fill", photos, masks, "-o", out) == 2
    assert "fused_conv2d: cuda: x is on cpu" in error(capsys)


def test_folders_that_do_not_match_are_an_error_before_any_work(
    painter: Painter, folders: tuple[Path, Path, Path], capsys: Any
) -> None:
    photos, masks, out = folders
    (masks / "rocket-mask.png").rename(masks / "rokcet-mask.png")
    shutil.copy(masks / "coffee-mask.png", masks / "coffee.png")
    assert run("fill", photos, masks, "-o", out) == 2
    line = error(capsys)
    assert re.search(r"no mask in .* for rocket\.jpg", line)
    assert re.search(r"no photo in .* for the masks rokcet-mask\.png", line)
    assert re.search(r"more than one mask in .* for coffee\.jpg", line)
    assert not out.exists()
    assert painter.runs == 0


def test_two_photos_with_one_result_are_an_error(
    painter: Painter, folders: tuple[Path, Path, Path], capsys: Any
) -> None:
    photos, masks, out = folders
    Image.open(photos / "coffee.jpg").save(photos / "coffee.png")
    assert run("fill", photos, masks, "-o", out) == 2
    assert "coffee.jpg and coffee.png would become one coffee.png" in error(capsys)


def test_existing_results_are_listed_before_any_work(
    painter: Painter, folders: tuple[Path, Path, Path], capsys: Any
) -> None:
    photos, masks, out = folders
    out.mkdir()
    (out / "coffee.png").write_bytes(b"old")
    assert run("fill", photos, masks, "-o", out) == 2
    assert "already coffee.png" in error(capsys)
    assert painter.runs == 0
    assert run("fill", photos, masks, "-o", out, "--overwrite") == 0
    assert (out / "coffee.png").read_bytes() != b"old"


def test_a_folder_without_photos_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    with pytest.raises(ImageError, match="no photos in"):
        jobs.plan(tmp_path / "masks", tmp_path / "masks", tmp_path / "out")


# Reports; with the real model


def test_info(capsys: Any) -> None:
    assert run("info") == 0
    assert torch.__version__ in capsys.readouterr().out
    assert run("info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize("command", ["explain", "verify"])
def test_explain_and_verify(command: str, capsys: Any) -> None:
    assert run(command, "--size", "32x48", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is True
    assert data["rows"]
    assert run(command, "--size", "32x48", "--markdown") == 0
    assert capsys.readouterr().out.startswith("**")


def test_sizes_are_checked(capsys: Any) -> None:
    assert run("verify", "--size", "33x48") == 2
    assert "33x48: both sides must be multiples of 8 and at least 16" in error(capsys)
    assert run("verify", "--size", "33") == 2
    assert "HEIGHTxWIDTH" in error(capsys)


def test_bench_of_a_model_and_of_an_op(tmp_path: Path, capsys: Any) -> None:
    for what in ("lama_mini", "gated_activation"):
        assert run("bench", what, "--size", "32x32", "--rounds", 2, "--json", tmp_path / "bench.json") == 0
        assert "ratio" in capsys.readouterr().out
        data = json.loads((tmp_path / "bench.json").read_text())
        assert data["schema"] == 1
        assert data["machine"]["torch"] == torch.__version__
        for row in data["rows"]:
            assert row["low"] <= row["ratio"] <= row["high"]
            assert row["reference ms"] > 0


def test_the_demo(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from inpaintrt import demo

    small = (96, 64)
    Image.open(DATA / "coffee.jpg").resize(small).save(tmp_path / "coffee.jpg")
    Image.open(DATA / "coffee-mask.png").resize(small, Image.Resampling.NEAREST).save(tmp_path / "coffee-mask.png")
    monkeypatch.setattr(demo, "_FOLDER", tmp_path)
    monkeypatch.setattr(demo, "_BUDGET", 0.5)
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):  # a second run replaces the first one's picture
        assert run("demo", "-o", out) == 0
    text = capsys.readouterr().out
    for words in ("96 x 64", "speed-up", "95 % interval", "RMS", "8-bit values in the hole", "verified"):
        assert words in text
    assert [path.name for path in out.iterdir()] == [demo.PICTURE]
    sheet = pixels(out / demo.PICTURE)
    photo, mask = demo.photo_and_mask()
    width, height = photo.size
    assert sheet.shape == (height, 3 * width + 16, 3)
    first, second, third = (sheet[:, i * (width + 8) :][:, :width] for i in range(3))
    assert np.array_equal(first, photo.rgb)
    assert (second[mask.hole] == (255, 0, 255)).all()
    assert np.array_equal(third[~mask.hole], first[~mask.hole])
    assert (third[mask.hole] != first[mask.hole]).any()


def test_the_photo_of_the_demo_and_its_hole() -> None:
    from inpaintrt import demo

    photo, mask = demo.photo_and_mask()
    assert photo.size == (600, 400)
    assert mask.share == pytest.approx(0.0455, abs=1e-3)
    x = demo.example(64, 96)
    assert x.shape == (1, 4, 64, 96)
    assert set(x[:, 3].unique().tolist()) == {0.0, 1.0}
    assert float((x[:, :3] * x[:, 3:]).abs().max()) == 0


def test_the_demo_where_no_folder_can_be(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run("demo", "-o", tmp_path / "file") == 2
    assert "the folder cannot be made" in error(capsys)


# The program


def test_the_program_in_a_process(pair: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "inpaintrt", "fill", *map(str, pair), "-o", str(tmp_path / "out.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "out.png").shape == (20, 30, 3)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("inpaintrt: error: ")
    assert "Traceback" not in again.stderr


def test_explain_in_a_fresh_process() -> None:
    # In a process of its own, since `explain` used before `accelerate` once found a module of that name.
    command = [sys.executable, "-P", "-m", "inpaintrt", "explain", "--size", "32x48"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_and_version(capsys: Any) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"inpaintrt {inpaintrt.__version__}\n"
    for command in ("fill", "demo", "info", "explain", "verify", "bench"):
        assert run(command, "--help") == 0
        assert command in capsys.readouterr().out
    assert run() == 2


def test_importing_the_package_and_the_command_line_does_not_import_pillow() -> None:
    program = "import sys, inpaintrt, inpaintrt.cli, inpaintrt.pipeline; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0

"""The attention flow: colours of the public ports and of the paper, what is recorded, and the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import inpaintrt
from inpaintrt import cli, models, ops, pipeline, use_backend, viz
from inpaintrt.ops.contextual_attention import SPEC
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.errors import InpaintRTError, UnsupportedError
from inpaintrt.runtime.library import dispatchers
from inpaintrt.testing import recipe

GOLDEN = Path(__file__).parent / "golden"
WHITE = (255, 255, 255)


def colour(row: float, column: float, largest: float = 1.0) -> tuple[int, ...]:
    """Of one offset."""
    offsets = torch.tensor([row, column], dtype=torch.float64).view(1, 2, 1, 1)
    return tuple(viz.attention_flow(offsets, largest=largest)[0, 0, 0].tolist())


# ---- colours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ca_daa", "ca_jy", "ca_nip", "ca_nip_tf"])
def test_colours_are_those_of_the_public_code(name: str) -> None:
    """Each port returns its picture in a form of its own: enlarged by nearest neighbour or bilinearly, 0 to 1 or ±1."""
    tensors = load_file(GOLDEN / name / "tensors.safetensors")
    stored = tensors["hard.flow_image"].double()
    if name == "ca_daa":
        picture = viz.attention_flow(tensors["hard.offsets"], size=(64, 64))
        assert np.array_equal(picture, (stored * 255).permute(0, 2, 3, 1).round().byte().numpy())
        return
    cells = torch.from_numpy(viz.attention_flow(tensors["hard.offsets"])).permute(0, 3, 1, 2).double()
    ours = F.interpolate(cells, (16, 16), mode="bilinear", align_corners=True)
    theirs = (stored + 1) * 127.5 if name == "ca_jy" else stored * 255
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_directions_are_those_of_the_paper() -> None:
    """White attends to itself, pink is bottom left, green is top right."""
    assert colour(0, 0) == WHITE
    red, green, blue = colour(1, -1, largest=2**0.5)
    assert red > green < blue
    red, green, blue = colour(-1, 1, largest=2**0.5)
    assert red < green > blue
    assert colour(1, 0) == (255, 0, 0), "the wheel begins below"


def test_length_is_saturation() -> None:
    saturations = [255 - min(colour(length, 0)) for length in np.linspace(0, 1, 6)]
    assert saturations == pytest.approx([0, 51, 102, 153, 204, 255], abs=1)
    assert colour(1.01, 0) == (191, 0, 0), "what is longer than the rim is darkened"


def test_hues_go_round() -> None:
    """In small steps, but for the seam of the scheme: its last hue is a sixth short of the first, straight below."""
    angles = np.linspace(0, 2 * np.pi, 2000)
    offsets = torch.tensor(np.stack([np.cos(angles), np.sin(angles)])).view(1, 2, 1, -1)
    hues = viz.attention_flow(offsets, largest=1.0)[0, 0].astype(int)
    assert np.abs(np.diff(hues, axis=0)).max() <= 10
    assert np.abs(hues[0] - hues[-1]).max() <= 255 / 6
    assert len(np.unique(hues, axis=0)) > 900
    assert np.array_equal(hues.max(axis=1), np.full(2000, 255))


def test_the_longest_offset_has_full_colour() -> None:
    offsets = torch.tensor([[[0, 3], [1, 0]], [[0, 4], [0, -2]]], dtype=torch.int32)[None]
    picture = viz.attention_flow(offsets)
    assert tuple(picture[0, 0, 0]) == WHITE
    assert tuple(picture[0, 0, 1]) == colour(3, 4, largest=5)
    assert tuple(picture[0, 1, 0]) == colour(1, 0, largest=5)
    assert np.array_equal(viz.attention_flow(7 * offsets), picture)
    assert np.array_equal(viz.attention_flow(offsets, largest=5), picture)
    both = viz.attention_flow(torch.cat([offsets, 2 * offsets]), largest=10)
    assert np.array_equal(both[1], picture[0]), "one length for all"
    assert not np.array_equal(both[0], picture[0])
    assert np.array_equal(viz.attention_flow(torch.cat([offsets, 2 * offsets]))[0], picture[0]), "or each its own"
    assert (viz.attention_flow(torch.zeros(1, 2, 3, 4)) == 255).all()
    assert viz.attention_flow(torch.zeros(0, 2, 3, 4)).shape == (0, 3, 4, 3)


def test_the_legend_is_the_wheel() -> None:
    wheel = viz.legend(101)
    assert wheel.shape == (101, 101, 3)
    assert tuple(wheel[0, 0]) == tuple(wheel[50, 50]) == WHITE
    for row, column in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        assert tuple(wheel[50 + 50 * row, 50 + 50 * column]) == colour(row, column)
    assert tuple(wheel[50 + 20, 50 - 15]) == colour(20, -15, largest=50)


# ---- sizes and masks ------------------------------------------------------------------------------------------------


def some_offsets(batch: int = 1, rows: int = 4, columns: int = 6) -> Tensor:
    return (20 * recipe.image("offsets", batch, 2, rows, columns) - 10).round().int()


def test_cells_are_enlarged_by_nearest_neighbour() -> None:
    offsets = some_offsets()
    cells = viz.attention_flow(offsets)
    assert cells.shape == (1, 4, 6, 3)
    assert cells.dtype == np.uint8
    assert np.array_equal(viz.attention_flow(offsets, size=(32, 48)), cells.repeat(8, axis=1).repeat(8, axis=2))
    odd = viz.attention_flow(offsets, size=(10, 7))
    assert np.array_equal(odd, cells[:, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]][:, :, [0, 0, 1, 2, 3, 4, 5]])


def test_only_the_hole_is_coloured() -> None:
    offsets = some_offsets(batch=2)
    mask = torch.zeros(2, 1, 32, 48)
    mask[0, :, 5:21, 9:30] = 0.5
    mask[1, :, 20:30, 33:40] = 1
    picture = viz.attention_flow(offsets, mask, largest=20)
    whole = viz.attention_flow(offsets, size=(32, 48), largest=20)
    hole = mask[:, 0].numpy() != 0
    assert np.array_equal(picture[hole], whole[hole])
    assert (picture[~hole] == 255).all()
    assert not (whole[~hole] == 255).all()
    for dtype in (torch.bool, torch.uint8, torch.float16):
        assert np.array_equal(viz.attention_flow(offsets, mask != 0, largest=20), picture), dtype
    shared = viz.attention_flow(offsets, mask[:1], largest=20)
    assert np.array_equal(shared[0], picture[0])
    assert (shared[1][~hole[0]] == 255).all()


def test_a_mask_of_cells_is_enlarged_too() -> None:
    offsets = some_offsets()
    cells = recipe.image("mask", 1, 1, 4, 6) < 0.5
    enlarged = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    picture = viz.attention_flow(offsets, cells, size=(32, 48))
    assert np.array_equal(picture, viz.attention_flow(offsets, enlarged))


def test_the_longest_offset_is_that_of_what_is_shown() -> None:
    offsets = torch.zeros(1, 2, 2, 2)
    offsets[0, 0] = torch.tensor([[3.0, 100.0], [1.0, 0.0]])
    mask = torch.tensor([[1, 0], [1, 1]]).view(1, 1, 2, 2)
    assert tuple(viz.attention_flow(offsets, mask)[0, 0, 0]) == (255, 0, 0)
    assert tuple(viz.attention_flow(offsets)[0, 0, 1]) == (255, 0, 0)
    assert (viz.attention_flow(offsets, torch.zeros(1, 1, 2, 2)) == 255).all()


@pytest.mark.parametrize(
    ("message", "offsets", "mask", "options"),
    [
        (r"offsets has shape \(2, 4, 6\)", torch.zeros(2, 4, 6), None, {}),
        (r"offsets has shape \(1, 3, 4, 6\).*accepted: \(B, 2, h, w\)", torch.zeros(1, 3, 4, 6), None, {}),
        (r"offsets has shape \(1, 2, 0, 6\)", torch.zeros(1, 2, 0, 6), None, {}),
        (r"mask has shape \(32, 48\); accepted: \(1 or 2, 1, H, W\)", some_offsets(2), torch.zeros(32, 48), {}),
        (r"mask has shape \(3, 1, 4, 6\)", some_offsets(2), torch.zeros(3, 1, 4, 6), {}),
        (r"mask has shape \(1, 1, 0, 6\)", some_offsets(2), torch.zeros(1, 1, 0, 6), {}),
        ("size is 0×6; accepted: 1 or more", some_offsets(), None, {"size": (0, 6)}),
        ("largest is 0; accepted: positive", some_offsets(), None, {"largest": 0}),
        ("largest is nan", some_offsets(), None, {"largest": float("nan")}),
    ],
)
def test_what_does_not_fit_is_named(
    message: str, offsets: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        viz.attention_flow(offsets, mask, **options)


# ---- recording ------------------------------------------------------------------------------------------------------


def example(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Features and an image-size mask, another for each sample."""
    mask = torch.zeros(batch, 1, 32, 48)
    for i in range(batch):
        mask[i, :, 8 * i : 8 * i + 16, 8:32] = 1
    return recipe.image("features", batch, 5, 16, 24), mask


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_each_call_is_recorded(backend: str) -> None:
    x, mask = example()
    asked = torch.ones(2, 1, 8, 12, dtype=torch.bool)
    with use_backend(backend), viz.record_attention() as heard:
        assert heard == []
        out = ops.contextual_attention(x, x, mask, mask_sampling=[("tf", 4)], sampling="tf")
        ops.contextual_attention(x[:1], x[:1].flip(3), fuse_size=0, queries=asked[:1])
    ops.contextual_attention(x, x)
    assert len(heard) == 2
    expected = ops.contextual_attention_with_offsets(x, x, mask, mask_sampling=[("tf", 4)], sampling="tf")
    assert torch.equal(heard[0].offsets, expected[1])
    with use_backend(backend):
        again = ops.contextual_attention(x, x, mask, mask_sampling=[("tf", 4)], sampling="tf")
    assert torch.equal(out, again), "recording changes nothing"
    assert torch.equal(heard[1].offsets, ops.contextual_attention_with_offsets(x[:1], x[:1].flip(3), fuse_size=0)[1])
    assert heard[0].mask is not None
    assert heard[0].mask.shape == (2, 1, 8, 12)
    assert heard[0].queries is None
    assert heard[1].mask is None
    assert torch.equal(heard[1].queries, asked[:1])


def test_offsets_are_those_of_the_moment_of_the_call() -> None:
    x, mask = example()
    expected = ops.contextual_attention_with_offsets(x, x, mask)[1]
    with viz.record_attention() as heard:
        ops.contextual_attention(x, x, mask)
        x.mul_(-1).add_(recipe.image("other", *x.shape))
    assert torch.equal(heard[0].offsets, expected)


def test_a_backend_forced_for_all_need_not_give_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy of the call does not reach the second op, which some backends lack."""
    x, mask = example()
    expected = ops.contextual_attention_with_offsets(x, x, mask)[1]
    gone = dispatchers["contextual_attention_with_offsets"]
    monkeypatch.setattr(gone, "lanes", {})
    gone.clear()
    try:
        with use_backend("cpu"), pytest.raises(UnsupportedError):
            ops.contextual_attention_with_offsets(x, x, mask)
        forced = "reference" if dispatchers["contextual_attention"].reasons(SPEC.bind(x, x), x)["cpu"] else "cpu"
        with use_backend(forced), viz.record_attention() as heard:
            ops.contextual_attention(x, x, mask)
    finally:
        monkeypatch.undo()
        gone.clear()
    assert torch.equal(heard[0].offsets, expected)


def test_gradients_flow_and_are_not_recorded() -> None:
    x, mask = example()
    leaf = x.clone().requires_grad_()
    with viz.record_attention() as heard:
        ops.contextual_attention(leaf, leaf, mask, softmax_scale=0.5).square().sum().backward()
    assert len(heard) == 1
    assert not heard[0].offsets.requires_grad
    other = x.clone().requires_grad_()
    ops.contextual_attention(other, other, mask, softmax_scale=0.5).square().sum().backward()
    assert torch.equal(leaf.grad, other.grad)


def test_recording_ends_with_its_context() -> None:
    before = list(dispatch.observers)
    x, _ = example()
    with pytest.raises(KeyError), viz.record_attention():
        raise KeyError
    assert dispatch.observers == before
    with viz.record_attention() as outer, viz.record_attention() as inner:
        ops.contextual_attention(x, x)
    assert len(outer) == len(inner) == 1
    with viz.record_attention() as heard:
        ops.contextual_attention_with_offsets(x, x)  # whose caller has the offsets
    assert heard == []
    assert dispatch.observers == before


@pytest.mark.parametrize("name", ["deepfill_v1", "deepfill_v2"])
def test_a_network_is_recorded(name: str) -> None:
    """Its attention is heard once per image, accelerated or not, and the offsets are the network's own."""
    network = recipe.fill(models.create(name))
    side = max(64, network.min_size)
    image, mask = recipe.image("photo", 1, 3, side, side), torch.zeros(1, 1, side, side)
    mask[..., 20:44, 12:50] = 1
    with viz.record_attention() as heard:
        network.inpaint(image, mask)
    (attention,) = heard
    assert attention.offsets.shape == (1, 2, side // 8, side // 8)
    assert attention.offsets.any()
    assert attention.mask is not None
    assert torch.equal(attention.mask, mask[..., ::8, ::8] != 0)


# ---- from photo to picture ------------------------------------------------------------------------------------------


class Mover(nn.Module):
    """Fills by contextual attention over its pixels, of which four by four are a feature; remembers what it saw."""

    size_multiple = 8
    min_size = 16

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        self.seen = F.avg_pool2d(image, 4), mask
        out = ops.contextual_attention(*self.seen[:1] * 2, mask, fuse_size=0)
        return torch.where(mask != 0, F.interpolate(out, scale_factor=4.0), image)

    def offsets(self) -> Tensor:
        features, mask = self.seen
        return ops.contextual_attention_with_offsets(features, features, mask, fuse_size=0)[1]


class Blind(nn.Module):
    size_multiple = 8
    min_size = 16

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        return image


def photo_and_hole(height: int = 43, width: int = 61) -> tuple[np.ndarray, np.ndarray]:
    photo = (255 * recipe.image("photo", height, width, 3)).byte().numpy()
    hole = np.zeros((height, width), bool)
    hole[10:35, 20:47] = True
    return photo, hole


def test_flow_of_a_photo_of_any_size() -> None:
    photo, hole = photo_and_hole()
    model = Mover().eval()
    picture = viz.flow_of_fill(model, photo, hole)
    assert picture.shape == (43, 61, 3)
    assert (picture[~hole] == 255).all()
    assert model.seen[1].shape == (1, 1, 48, 64), "padded to multiples of 8"
    shown = np.zeros((1, 1, 48, 64), bool)
    shown[..., :43, :61] = hole
    expected = viz.attention_flow(model.offsets(), torch.from_numpy(shown))
    assert np.array_equal(picture, expected[0, :43, :61])
    whole = viz.flow_of_fill(model, photo, hole, whole=True)
    assert np.array_equal(whole, viz.attention_flow(model.offsets(), size=(48, 64))[0, :43, :61])
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5


def test_nothing_to_show() -> None:
    photo, hole = photo_and_hole()
    with pytest.raises(InpaintRTError, match="the mask marks no hole"):
        viz.flow_of_fill(Mover().eval(), photo, hole & False)
    with pytest.raises(InpaintRTError, match="Blind calls no contextual attention; DeepFill v1 and v2 do"):
        viz.flow_of_fill(Blind().eval(), photo, hole)
    with pytest.raises(TypeError, match="has no size_multiple"):
        viz.flow_of_fill(nn.Identity().eval(), photo, hole)


def test_large_photos_are_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fill` would cut it into crops, whose cells could not point outside."""
    monkeypatch.setattr(pipeline, "MAX_PIXELS", 100)
    model = Mover().eval()
    viz.flow_of_fill(model, *photo_and_hole(64, 96))
    assert model.seen[1].shape == (1, 1, 64, 96)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mover(monkeypatch: pytest.MonkeyPatch) -> Mover:
    """Stands in for every model; `mover.asked` says for which, `mover.backend` how it was accelerated."""
    model: Any = Mover().eval()

    def load(name: str, path: Path | None = None) -> nn.Module:
        model.asked = (name, path)
        return model

    def accelerate(net: Any, *, backend: str) -> nn.Module:
        net.backend = backend
        return net

    monkeypatch.setattr(inpaintrt, "load", load)
    monkeypatch.setattr(inpaintrt, "accelerate", accelerate)
    return model


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    photo, hole = photo_and_hole()
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(hole).save(tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


def flow(*args: object) -> int:
    try:
        return cli.main(["flow", *map(str, args)])
    except SystemExit as leave:
        return int(leave.code or 0)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_command_writes_the_picture(mover: Any, files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "flow.png"
    assert flow(*files, "-o", out, "--weights", "v2.pth", "--backend", "cpu") == 0
    assert mover.asked == ("deepfill_v2", Path("v2.pth"))
    assert mover.backend == "cpu"
    photo, hole = photo_and_hole()
    assert np.array_equal(pixels(out), viz.flow_of_fill(mover, photo, hole))
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert re.fullmatch(r"inpaintrt: \S+flow\.png  \d+\.\d\d s  hole: 25\.7 % of the pixels \(white\); .*\n", stderr)


def test_options_of_the_command(mover: Any, files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    photo, hole = photo_and_hole()
    out = tmp_path / "flow.png"
    assert flow(*files, "-o", out, "--model", "deepfill_v1", "--weights", "v1.pth", "--whole") == 0
    assert mover.asked == ("deepfill_v1", Path("v1.pth"))
    assert mover.backend == "auto"
    assert np.array_equal(pixels(out), viz.flow_of_fill(mover, photo, hole, whole=True))
    assert flow(*files, "-o", out) == 2
    assert flow(*files, "-o", out, "--overwrite", "--invert-mask") == 0
    assert np.array_equal(pixels(out), viz.flow_of_fill(mover, photo, ~hole))
    assert "(black)" in capsys.readouterr().err


def test_the_photo_may_have_alpha(mover: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    """A format that could not hold the photo holds the picture."""
    photo, hole = photo_and_hole()
    alpha = np.full((*hole.shape, 1), 100, np.uint8)
    Image.fromarray(np.concatenate([photo, alpha], axis=2)).save(tmp_path / "alpha.png")
    assert flow(tmp_path / "alpha.png", files[1], "-o", tmp_path / "flow.bmp") == 0
    assert np.array_equal(pixels(tmp_path / "flow.bmp"), viz.flow_of_fill(mover, photo, hole))


def test_errors_of_the_command(
    mover: Any, files: tuple[Path, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    photo, mask = files
    out = tmp_path / "out.png"
    Image.new("L", (61, 43)).save(tmp_path / "empty.png")
    Image.new("L", (60, 43), 255).save(tmp_path / "narrow.png")
    Image.new("RGB", (16_400, 16)).save(tmp_path / "long.png")
    Image.new("L", (16_400, 16), 255).save(tmp_path / "long-mask.png")
    cases = {
        "no such file|cannot be read": (tmp_path / "none.png", mask, "-o", out),
        "60 x 43 pixels, .* is 61 x 43": (photo, tmp_path / "narrow.png", "-o", out),
        "empty.png marks no hole": (photo, tmp_path / "empty.png", "-o", out),
        r"written as \.png": (photo, mask, "-o", tmp_path / "out.heic"),
        "exists; --overwrite": (photo, mask, "-o", photo),
        "WEBP allows 16383 pixels": (tmp_path / "long.png", tmp_path / "long-mask.png", "-o", tmp_path / "out.webp"),
        "required: -o/--out": (photo, mask),
    }
    present = sorted(tmp_path.iterdir())
    for words, args in cases.items():
        assert flow(*args) == 2, words
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(rf"inpaintrt: error: .*({words}).*\n", captured.err), words
    assert not hasattr(mover, "asked"), "errors come before the work"
    monkeypatch.setattr(inpaintrt, "load", lambda name, path=None: Blind().eval())
    assert flow(photo, mask, "-o", out) == 2
    assert "Blind calls no contextual attention" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == present


def test_a_network_needs_weights(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    assert flow(*files, "-o", tmp_path / "out.png") == 2
    assert "load('deepfill_v2') needs a path to weights" in capsys.readouterr().err
    assert flow(*files, "-o", tmp_path / "out.png", "--model", "lama_mini") == 2
    assert "LaMa calls no contextual attention" in capsys.readouterr().err.replace("Accelerated", "")
    assert not (tmp_path / "out.png").exists()

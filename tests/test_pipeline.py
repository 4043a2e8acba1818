"""Filling arrays: known pixels untouched at any size, memory bounded by crops, nothing that is not finite in or out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inpaintrt import images, pipeline, windows
from inpaintrt.runtime.errors import ImageError, InpaintRTError


class Painter(nn.Module):
    """Keeps the contract of a model, checks the caller's side of it, and paints the hole in one colour.

    The composite rounds the known pixels (factor 0.999), so that a caller who takes them from it is found out.
    """

    size_multiple = 8
    min_size = 16

    def __init__(self, colour: tuple[float, float, float] = (0.25, 0.5, 0.75)) -> None:
        super().__init__()
        self.colour = nn.Parameter(torch.tensor(colour))
        self.calls: list[tuple[int, int]] = []
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.eval()

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        b, c, h, w = image.shape
        assert (c, mask.shape) == (3, (b, 1, h, w))
        assert h % 8 == w % 8 == 0
        assert min(h, w) >= 16
        assert image.dtype == mask.dtype == self.colour.dtype
        assert not torch.is_grad_enabled()
        assert bool(((mask == 0) | (mask == 1)).all())
        assert float(image.min()) >= 0
        assert float(image.max()) <= 1
        self.calls.append((h, w))
        self.seen.append((image, mask))
        return torch.where(mask > 0, self.colour.view(1, 3, 1, 1), image * 0.999)


PAINTED = [63, 127, 191]  # floor(255 · colour)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def box(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def test_the_hole_is_filled_truncated_and_the_rest_is_the_input() -> None:
    image, mask = noise(40, 56), box(40, 56, (5, 6, 20, 30))
    before = image.copy()
    result = pipeline.fill(Painter(), image, mask)
    assert result.dtype == np.uint8
    assert np.array_equal(result[~mask], image[~mask])
    assert np.array_equal(np.unique(result[mask], axis=0), [PAINTED])
    assert np.array_equal(image, before)
    assert not np.shares_memory(result, image)


def test_the_network_sees_rgb_with_the_hole_set_to_zero_and_padding_by_reflection() -> None:
    image, mask = noise(18, 21), box(18, 21, (16, 0, 18, 3))
    model = Painter()
    pipeline.fill(model, image, mask)
    seen, hole = model.seen[0]
    assert seen.shape == (1, 3, 24, 24)
    known = np.where(mask[..., None], 0, image)
    wanted = np.pad(known, ((0, 6), (0, 3), (0, 0)), "symmetric").astype(np.float32) / 255
    assert torch.equal(seen[0], torch.from_numpy(wanted).permute(2, 0, 1))
    assert torch.equal(hole[0, 0] > 0, torch.from_numpy(np.pad(mask, ((0, 6), (0, 3)), "symmetric")))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_known_pixels_are_bit_identical_for_any_size_and_mask(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    seed = data.draw(st.integers(0, 1000))
    image = noise(height, width, seed)
    mask = np.random.default_rng(seed).random((height, width)) < data.draw(st.sampled_from([0, 0.001, 0.05, 0.5, 1]))
    limit = data.draw(st.sampled_from([10**6, 256 * 256]))
    result = pipeline.fill(Painter(), image, mask, max_pixels=limit, margin=data.draw(st.integers(0, 40)))
    assert np.array_equal(result[~mask], image[~mask])
    assert (result[mask] == PAINTED).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (1, 16), (7, 3), (16, 16), (17, 8)])
def test_extreme_sizes(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    mask = np.zeros(shape, bool)
    mask[-1, -1] = True
    model = Painter()
    result = pipeline.fill(model, image, mask)
    assert np.array_equal(result[~mask], image[~mask])
    assert result[-1, -1].tolist() == PAINTED
    assert model.calls == [tuple(max(16, -(-side // 8) * 8) for side in shape)]


def test_an_empty_mask_returns_a_copy_and_does_not_run_the_network() -> None:
    image, model = noise(20, 20), Painter()
    result = pipeline.fill(model, image, np.zeros((20, 20), bool))
    assert model.calls == []
    assert np.array_equal(result, image)
    assert not np.shares_memory(result, image)


def test_a_full_mask_shows_the_network_nothing_and_is_filled() -> None:
    model = Painter()
    result = pipeline.fill(model, noise(20, 24), np.ones((20, 24), bool))
    assert float(model.seen[0][0].max()) == 0
    assert (result == PAINTED).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floats_keep_their_dtype_and_bits(dtype: type) -> None:
    image = np.random.default_rng(0).random((20, 30, 3)).astype(dtype)
    mask = box(20, 30, (3, 3, 9, 9))
    result = pipeline.fill(Painter(), image, mask)
    assert result.dtype == dtype
    assert np.array_equal(result[~mask], image[~mask])
    assert np.array_equal(np.unique(result[mask], axis=0), [[0.25, 0.5, 0.75]])


def test_what_lies_under_the_hole_is_not_read() -> None:
    mask = box(20, 30, (3, 3, 9, 9))
    clean = np.random.default_rng(0).random((20, 30, 3), np.float32)
    dirty = clean.copy()
    dirty[mask] = [np.nan, np.inf, -5]
    models = Painter(), Painter()
    results = [pipeline.fill(model, image, mask) for model, image in zip(models, (clean, dirty), strict=True)]
    assert np.array_equal(*results)
    assert torch.equal(models[0].seen[0][0], models[1].seen[0][0])


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "NaN or Inf"), (np.inf, "NaN or Inf"), (1.5, r"outside \[0, 1\]"), (-0.1, "outside")]
)
def test_known_values_that_are_no_colours_are_refused_with_their_place(value: float, words: str) -> None:
    image = np.full((20, 30, 3), 0.5, np.float32)
    image[4, 7, 1] = image[9, 9, 0] = value
    with pytest.raises(ValueError, match=f"2 known values.*{words}.*row 4, column 7, channel 1"):
        pipeline.fill(Painter(), image, box(20, 30, (0, 0, 2, 2)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_network_that_returns_nan_is_an_error(value: float, dtype: type) -> None:
    image = np.zeros((20, 30, 3), dtype)
    with pytest.raises(InpaintRTError, match="4 values that are NaN or Inf"):
        pipeline.fill(Painter((0.5, value, 0.5)), image, box(20, 30, (0, 0, 2, 2)))


@pytest.mark.parametrize("colour", [-0.5, 1.5])
def test_bytes_are_clipped(colour: float) -> None:
    mask = box(20, 30, (0, 0, 2, 2))
    result = pipeline.fill(Painter((colour,) * 3), noise(20, 30), mask)
    assert (result[mask] == (0 if colour < 0 else 255)).all()


def test_a_read_only_and_strided_image_is_accepted() -> None:
    image = noise(40, 60)[::2, ::-3]
    image.flags.writeable = False
    mask = box(*image.shape[:2], (2, 2, 9, 9))
    assert np.array_equal(pipeline.fill(Painter(), image, mask)[~mask], image[~mask])


def test_numeric_masks() -> None:
    image, mask = noise(20, 20), box(20, 20, (2, 2, 9, 9))
    wanted = pipeline.fill(Painter(), image, mask)
    for dtype in (np.uint8, np.int64, np.float32):
        assert np.array_equal(pipeline.fill(Painter(), image, mask.astype(dtype)), wanted)
    for value in (255, 0.5, np.nan):
        with pytest.raises(ValueError, match="0 = known and 1 = hole"):
            pipeline.fill(Painter(), image, mask * np.float32(value))


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        (np.zeros((8, 8), np.uint8), np.zeros((8, 8), bool), r"image has shape \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8), bool), "accepted: .H, W, 3"),
        (np.zeros((0, 8, 3), np.uint8), np.zeros((0, 8), bool), "at least one pixel"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9), bool), r"\(8, 8\) rows and columns, mask \(8, 9\)"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 1), bool), "mask has shape"),
        (np.zeros((8, 8, 3), np.int32), np.zeros((8, 8), bool), "image has dtype int32"),
    ],
)
def test_wrong_arrays_are_named(image: np.ndarray, mask: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipeline.fill(Painter(), image, mask)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval"):
        pipeline.fill(Painter().train(), noise(20, 20), np.ones((20, 20), bool))


def test_another_kind_of_model_is_named() -> None:
    with pytest.raises(TypeError, match="Identity, has no size_multiple, min_size, inpaint; accepted"):
        pipeline.fill(nn.Identity().eval(), noise(20, 20), np.ones((20, 20), bool))


def test_the_model_runs_in_its_own_dtype() -> None:
    mask = box(20, 20, (0, 0, 5, 5))
    result = pipeline.fill(Painter().to(torch.bfloat16), noise(20, 20), mask)
    assert (result[mask] == PAINTED).all()


# Crops of large images

SIZES = windows.Sizes(8, 16)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_crops_fill_each_hole_pixel_once_and_stay_within_the_limit(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 400))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    mask = np.zeros((height, width), bool)
    for _ in range(data.draw(st.integers(0, 12))):
        top, left = random.integers(0, height), random.integers(0, width)
        mask[top : top + random.integers(1, 30), left : left + random.integers(1, 30)] = True
    limit, margin = data.draw(st.sampled_from([20_000, 60_000, 10**6])), data.draw(st.integers(0, 40))
    boxes = windows._components(mask)[1] if mask.any() else []
    fits = all(SIZES.pixels(windows._windows(box, margin, mask.shape)) <= limit for box in boxes)
    if SIZES.pixels((0, 0, height, width)) > limit and not fits:
        with pytest.raises(ImageError, match="--max-pixels"):
            next(windows.crops(mask, SIZES, limit, margin))
        return
    times = np.zeros(mask.shape, int)
    for window, owned in windows.crops(mask, SIZES, limit, margin):
        assert SIZES.pixels(window) <= limit
        view = np.s_[window.top : window.bottom, window.left : window.right]
        assert owned.shape == mask[view].shape
        times[view] += owned
        rows, columns = np.nonzero(owned)  # with context on all sides, up to the image's border
        assert rows.min() >= min(margin, rows.min() + window.top)
        assert columns.min() >= min(margin, columns.min() + window.left)
        assert owned.shape[0] - 1 - rows.max() >= min(margin, height - 1 - rows.max() - window.top)
        assert owned.shape[1] - 1 - columns.max() >= min(margin, width - 1 - columns.max() - window.left)
    assert np.array_equal(times, mask)


def test_holes_far_apart_are_filled_apart_and_near_ones_together() -> None:
    mask = box(1000, 1000, (100, 100, 120, 120), (100, 900, 120, 920), (860, 860, 870, 870), (900, 900, 910, 910))
    found = [window for window, _ in windows.crops(mask, SIZES, 200_000, 64)]
    assert len(found) == 3


def test_no_hole_is_cut() -> None:
    mask = box(600, 600, (300, 40, 304, 560), (40, 300, 560, 304))  # a cross
    with pytest.raises(ImageError, match=r"crop of 600 x 600 \(360,000 pixels.*--max-pixels 360000") as error:
        pipeline.fill(Painter(), noise(600, 600), mask, max_pixels=200_000, margin=64)
    assert "200,000" in str(error.value)
    model = Painter()
    pipeline.fill(model, noise(600, 600), mask, max_pixels=360_000, margin=64)
    assert model.calls == [(600, 600)]


def test_interlocked_holes_share_no_pixel() -> None:
    # The second hole's column 600 crosses the first one's bounding box, and one crop for both would be too large.
    mask = box(1000, 1000, (32, 32, 40, 640), (32, 32, 640, 40), (330, 600, 928, 608), (920, 600, 928, 928))
    found = list(windows.crops(mask, SIZES, 500_000, 8))
    assert len(found) == 2
    times = np.zeros(mask.shape, int)
    for window, owned in found:
        view = np.s_[window.top : window.bottom, window.left : window.right]
        times[view] += owned
    assert np.array_equal(times, mask)
    assert (mask[found[0][0].top : found[0][0].bottom, found[0][0].left : found[0][0].right] != found[0][1]).any()


def test_a_crop_sees_the_holes_of_others_as_holes() -> None:
    class Watcher(Painter):
        def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
            assert bool((image.amax(1, keepdim=True)[mask > 0] == 0).all())
            return super().inpaint(image, mask)

    image = np.full((400, 800, 3), 200, np.uint8)
    mask = box(400, 800, (200, 300, 210, 310), (200, 364, 210, 374))
    model = Watcher()
    result = pipeline.fill(model, image, mask, max_pixels=60_000, margin=100)  # 68,672 pixels would show both
    assert len(model.calls) == 2
    assert all(float(hole.sum()) > 100 for _, hole in model.seen), "the crops do not overlap; the test tests nothing"
    assert (result[mask] == PAINTED).all()


def test_filling_in_crops_equals_filling_at_once_where_the_context_suffices() -> None:
    class Blur(Painter):
        """Each hole pixel: the mean of the known pixels within 12 pixels."""

        def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
            known = 1 - mask
            mean = nn.functional.avg_pool2d
            total = mean(image * known, 25, 1, 12, divisor_override=1)
            filled = total / mean(known, 25, 1, 12, divisor_override=1).clamp(min=1)
            return torch.where(mask > 0, filled.double().round(decimals=4).to(image.dtype), image)

    image = noise(500, 700)
    mask = box(500, 700, (0, 0, 9, 9), (200, 300, 212, 306), (491, 690, 500, 700))
    whole = pipeline.fill(Blur(), image, mask)
    cropped = pipeline.fill(Blur(), image, mask, max_pixels=10_000, margin=24)
    assert np.array_equal(whole, cropped)


def test_many_specks_are_planned_quickly() -> None:
    mask = np.zeros((4000, 6000), bool)
    random = np.random.default_rng(0)
    mask[random.integers(0, 4000, 3000), random.integers(0, 6000, 3000)] = True
    found = [window for window, _ in windows.crops(mask, SIZES, pipeline.MAX_PIXELS, 256)]
    assert len(found) < 40
    assert sum(SIZES.pixels(window) for window in found) < 4 * mask.size


# A real photo


def test_a_photo_is_filled_plausibly_by_the_default_model() -> None:
    import inpaintrt

    folder = Path(__file__).parent / "data"
    photo, mask = images.read_photo(folder / "coffee.jpg"), images.read_mask(folder / "coffee-mask.png")
    result = pipeline.fill(inpaintrt.load("lama_mini"), photo.rgb, mask.hole)
    assert np.array_equal(result[~mask.hole], photo.rgb[~mask.hole])
    error = np.abs(result[mask.hole].astype(int) - photo.rgb[mask.hole]).mean()
    far = np.abs(photo.rgb[~mask.hole].mean(axis=0) - photo.rgb[mask.hole]).mean()
    assert error < far / 2, f"mean error {error:.1f} levels; the mean colour has {far:.1f}"


# Networks of a single size


class Small(Painter):
    """Sees 64 rows and 96 columns, and paints what it is told: the mean of what it sees as known, if no colour."""

    only_size = (64, 96)
    size_multiple = min_size = 96

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        assert image.shape[2:] == self.only_size
        return super().inpaint(image, mask)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_frames_fill_every_hole_pixel_once_and_hold_their_holes(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    size = (data.draw(st.sampled_from([32, 64, 100])), data.draw(st.sampled_from([32, 96])))
    mask = np.zeros((height, width), bool)
    for _ in range(data.draw(st.integers(0, 4))):
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        mask[top : top + rows, left : left + columns] = True
    times = np.zeros((height, width), int)
    for window, owned, scale in windows.frames(mask, size):
        rows, columns = window.bottom - window.top, window.right - window.left
        assert min(window.top, window.left) >= 0
        assert window.bottom <= height
        assert window.right <= width
        assert owned.shape == (rows, columns)
        assert scale >= 1
        assert rows <= np.ceil(size[0] * scale)
        assert columns <= np.ceil(size[1] * scale)
        if scale > 1 and (rows, columns) != (height, width):  # some context on at least one side of each axis
            filled = np.argwhere(owned)
            extent = filled.max(0) - filled.min(0) + 1
            assert (extent <= np.array(size) * windows._SHARE * scale + 1).all()
        times[window.top : window.bottom, window.left : window.right] += owned
    assert np.array_equal(times, mask)


def test_a_network_of_one_size_fills_photos_of_any() -> None:
    for height, width in ((20, 30), (64, 96), (64, 97), (300, 200), (200, 1)):
        image = noise(height, width)
        mask = box(height, width, (1, 0, 9, 12), (height // 2, width // 2, height - 3, width))
        result = pipeline.fill(Small(), image, mask)
        assert np.array_equal(result[~mask], image[~mask])
        if pipeline.reduction(Small(), mask) == 1:
            assert (result[mask] == PAINTED).all()
        else:  # what is made larger again is blended with its surroundings
            even = np.broadcast_to(np.array(PAINTED, np.uint8), image.shape)
            assert (np.abs(pipeline.fill(Small(), even, mask) - even.astype(int)) <= 1).all()


def test_holes_that_fit_are_filled_at_the_photos_resolution() -> None:
    image, mask = noise(300, 400), box(300, 400, (10, 10, 50, 70), (200, 300, 240, 372))
    model = Small()
    assert pipeline.reduction(model, mask) == 1
    pipeline.fill(model, image, mask)
    assert len(model.calls) == 2
    for seen, hole in model.seen:
        patch, known = seen[0].permute(1, 2, 0).numpy(), hole[0, 0].numpy() == 0
        places = [  # where the first row and column of what was seen lies in the photo
            (top, left)
            for top in range(300 - 63)
            for left in range(400 - 95)
            if np.array_equal(known, ~mask[top : top + 64, left : left + 96])
            and np.allclose(patch[known], image[top : top + 64, left : left + 96][known] / np.float32(255))
        ]
        assert len(places) == 1


def test_a_hole_too_large_is_seen_smaller_without_a_trace_of_what_lies_under_it() -> None:
    image = np.full((256, 384, 3), 100, np.uint8)
    mask = box(256, 384, (1, 1, 255, 383))
    image[mask] = 255
    model = Small()
    assert pipeline.reduction(model, mask) == 4
    assert pipeline.reduction(Painter(), mask) == 1
    result = pipeline.fill(model, image, mask)
    (seen, hole), *others = model.seen
    assert not others
    assert bool((hole[:, :, 1:-1, 1:-1] == 1).all())
    assert bool((seen[hole.expand_as(seen) == 0] == np.float32(100 / 255)).all())
    assert bool((seen[hole.expand_as(seen) == 1] == 0).all())
    assert (result[~mask] == 100).all()
    assert np.array_equal(np.unique(result[mask], axis=0), [PAINTED])

"""Photos and masks as files: what comes in, what goes out, what is refused, and that nothing is lost on the way."""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from inpaintrt import images
from inpaintrt.runtime.errors import ImageError

ORIENTATION = ExifTags.Base.Orientation
LOSSLESS = sorted(suffix for suffix, form in images.WRITES.items() if form.lossless)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random pixels: anything resampled, rotated the wrong way or reordered shows."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return values[..., 0] if channels == 1 else values


def saved(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def hole_in(pixels: np.ndarray) -> np.ndarray:
    hole = np.zeros(pixels.shape[:2], bool)
    hole[1 : 1 + max(1, pixels.shape[0] // 2), : max(1, pixels.shape[1] // 3)] = True
    return hole


def stored(path: Path, mode: str) -> np.ndarray:
    """The file's pixels as stored, without EXIF rotation."""
    with Image.open(path) as image:
        assert image.format != "TIFF", "Pillow turns TIFF files while loading"
        return np.asarray(image.convert(mode))


def fill_with(photo: images.Photo, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((*photo.pixels.shape[:2], 3), colour, np.uint8)


def exif_with(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    return exif


# Modes


def _palette(path: Path, **options: object) -> np.ndarray:
    image = Image.fromarray(noise(9, 7)).quantize(16)
    image.save(path, **options)
    return np.asarray(image.convert("RGBA" if "transparency" in options else "RGB"))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_the_mode_is_kept_and_only_the_hole_changes(tmp_path: Path, channels: int, mode: str) -> None:
    pixels = noise(12, 9, channels)
    photo = images.read_photo(saved(tmp_path / "a.png", pixels))
    hole = hole_in(pixels)
    images.write_photo(tmp_path / "b.png", photo, fill_with(photo, (30, 60, 92)), hole)
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode == mode
        found = np.asarray(image)
    assert np.array_equal(found[~hole], pixels[~hole])
    grey = channels <= 2
    colour = found[hole] if channels == 1 else found[hole][:, : 1 if grey else 3]
    assert np.array_equal(np.unique(colour.reshape(-1, 1 if grey else 3), axis=0), [[61]] if grey else [[30, 60, 92]])
    if mode in ("LA", "RGBA"):
        assert np.array_equal(found[..., -1], pixels[..., -1])


def test_grey_is_shown_to_the_network_as_equal_channels(tmp_path: Path) -> None:
    pixels = noise(5, 6, 1)
    photo = images.read_photo(saved(tmp_path / "a.png", pixels))
    assert np.array_equal(photo.rgb, np.stack([pixels] * 3, axis=2))


def test_a_palette_becomes_rgb_and_says_so(tmp_path: Path) -> None:
    wanted = _palette(tmp_path / "a.png")
    photo = images.read_photo(tmp_path / "a.png")
    assert np.array_equal(photo.pixels, wanted)
    assert photo.notes == ("a.png: palette colours become RGB",)


def test_a_transparent_palette_becomes_rgba(tmp_path: Path) -> None:
    wanted = _palette(tmp_path / "a.png", transparency=3)
    photo = images.read_photo(tmp_path / "a.png")
    assert photo.has_alpha
    assert set(np.unique(photo.pixels[..., 3])) == {0, 255}
    assert np.array_equal(photo.pixels[..., :3], wanted[..., :3])


@pytest.mark.parametrize(("channels", "key"), [(1, 7), (3, (1, 2, 3))])
def test_a_transparent_colour_becomes_alpha(tmp_path: Path, channels: int, key: object) -> None:
    pixels = noise(4, 4, channels)
    pixels[1, 2] = key
    photo = images.read_photo(saved(tmp_path / "a.png", pixels, transparency=key))
    assert photo.pixels.shape[2] == channels + 1
    assert photo.pixels[1, 2, -1] == 0
    assert np.array_equal(np.squeeze(photo.pixels[..., :-1]), pixels)


def test_one_bit_becomes_grey(tmp_path: Path) -> None:
    bits = noise(8, 11, 1) > 127
    photo = images.read_photo(saved(tmp_path / "a.png", bits))
    assert np.array_equal(photo.pixels[..., 0], np.where(bits, 255, 0))
    hole = hole_in(bits)
    images.write_photo(tmp_path / "b.png", photo, fill_with(photo, (90, 90, 90)), hole)
    assert np.array_equal(stored(tmp_path / "b.png", "L")[~hole], photo.pixels[..., 0][~hole])


# Orientation and metadata


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_filled_as_displayed_and_stored_as_before(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    source = saved(tmp_path / f"a{suffix}", noise(24, 40), exif=exif_with(orientation).tobytes(), **options)
    with Image.open(source) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    photo = images.read_photo(source)
    assert np.array_equal(photo.rgb, shown)
    assert photo.orientation == orientation

    hole = hole_in(shown)
    target = tmp_path / "b.png"
    images.write_photo(target, photo, fill_with(photo, (1, 2, 3)), hole)
    with Image.open(target) as image:
        assert image.getexif()[ORIENTATION] == orientation
        assert image.getexif()[ExifTags.Base.Make] == "Maker"
        assert image.getexif().get_ifd(ExifTags.IFD.GPSInfo) == {ExifTags.GPS.GPSLatitudeRef: "N"}
        again = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(again[~hole], shown[~hole])
    assert np.array_equal(np.unique(again[hole], axis=0), [[1, 2, 3]])
    if suffix != ".tif":
        before, after = stored(source, "RGB"), stored(target, "RGB")
        assert (before == after).all(axis=2).sum() == (~hole).sum()


def test_a_turned_grey_tiff_is_read_right(tmp_path: Path) -> None:
    pixels = noise(5, 8, 1)  # Pillow garbles such a file when it opens it by name
    photo = images.read_photo(saved(tmp_path / "a.tif", pixels, exif=exif_with(6).tobytes()))
    assert np.array_equal(photo.pixels[..., 0], np.rot90(pixels, -1))


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_every_lossless_format_shows_the_same_picture(tmp_path: Path, suffix: str) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(10, 17), exif=exif_with(6)))
    hole = hole_in(photo.pixels)
    images.write_photo(tmp_path / f"b{suffix}", photo, fill_with(photo, (9, 8, 7)), hole)
    again = images.read_photo(tmp_path / f"b{suffix}")
    assert np.array_equal(again.pixels[~hole], photo.pixels[~hole])
    assert again.orientation == (6 if images.WRITES[suffix].exif else 1)


def test_profile_and_resolution_are_kept(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = images.read_photo(saved(tmp_path / "a.jpg", noise(16, 16), icc_profile=profile, dpi=(300, 300)))
    for name in ("b.png", "b.jpg", "b.tif"):
        images.write_photo(tmp_path / name, photo, photo.rgb, hole_in(photo.pixels))
        with Image.open(tmp_path / name) as image:
            assert image.info["icc_profile"] == profile
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)


def _with_thumbnail(order: str, thumbnail: bytes) -> bytes:
    """EXIF with Make and Orientation, and a second directory that holds an embedded picture."""
    make = b"Maker\0\0\0"

    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        if kind == 3:  # a short sits in the first half of the field
            return struct.pack(order + "HHIHH", tag, kind, count, value, 0)
        return struct.pack(order + "HHII", tag, kind, count, value)

    first_end = 8 + 2 + 2 * 12 + 4
    second = first_end + len(make)
    data = second + 2 + 2 * 12 + 4
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    first = struct.pack(order + "H", 2) + entry(0x010F, 2, 6, first_end) + entry(0x0112, 3, 1, 6)
    first += struct.pack(order + "I", second)
    rest = struct.pack(order + "H", 2) + entry(0x0201, 4, 1, data) + entry(0x0202, 4, 1, len(thumbnail))
    return b"Exif\0\0" + head + first + make + rest + struct.pack(order + "I", 0) + thumbnail


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_embedded_thumbnail_does_not_survive(tmp_path: Path, order: str) -> None:
    secret = b"\xff\xd8what was removed\xff\xd9"
    exif = _with_thumbnail(order, secret)
    photo = images.read_photo(saved(tmp_path / "a.jpg", noise(16, 24), exif=exif))
    images.write_photo(tmp_path / "b.jpg", photo, photo.rgb, hole_in(photo.pixels))
    assert secret in (tmp_path / "a.jpg").read_bytes()
    assert secret not in (tmp_path / "b.jpg").read_bytes()
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.getexif()[ExifTags.Base.Make] == "Maker"
        assert image.getexif()[ORIENTATION] == 6
        assert not image.getexif().get_ifd(ExifTags.IFD.IFD1)
        changed = [i for i, (a, b) in enumerate(zip(exif, image.info["exif"], strict=True)) if a != b]
    assert len(changed) <= 4 + len(secret), "bytes other than the link and the thumbnail changed"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_left_out_with_a_note(tmp_path: Path) -> None:
    exif = bytearray(_with_thumbnail("<", b"x"))
    exif[10:14] = struct.pack("<I", 10_000)  # the first directory lies beyond the end
    photo = images.read_photo(saved(tmp_path / "a.jpg", noise(16, 24), exif=bytes(exif)))
    assert photo.exif is None
    assert photo.orientation == 1
    assert "damaged EXIF" in photo.notes[0]
    images.write_photo(tmp_path / "b.png", photo, photo.rgb, hole_in(photo.pixels))


def test_a_jpeg_is_written_with_the_tables_it_was_read_with(tmp_path: Path) -> None:
    source = Path(__file__).parent / "data" / "coffee.jpg"
    photo = images.read_photo(source)
    hole = hole_in(photo.pixels)
    images.write_photo(tmp_path / "b.jpg", photo, photo.rgb, hole)
    Image.open(source).convert("RGB").save(tmp_path / "fine.jpg", quality=95, subsampling=0)
    with (
        Image.open(source) as before,
        Image.open(tmp_path / "b.jpg") as after,
        Image.open(tmp_path / "fine.jpg") as fine,
    ):
        assert before.quantization == after.quantization
        kept, other = (np.abs(np.asarray(before, int) - np.asarray(image, int)).mean() for image in (after, fine))
    assert kept < other / 2  # a second coding with the same tables is nearly the first, closer than one of high quality


# What is refused


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _deep_png(colour_type: int) -> bytes:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    row = b"\0" + struct.pack(f">{4 * channels}H", *range(0, 4000 * channels, 1000))
    header = struct.pack(">IIBBBBB", 4, 3, 16, colour_type, 0, 0, 0)
    parts = _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(row * 3)), _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _deep_tiff() -> bytes:
    """4 x 3 pixels RGB of 16 bits, uncompressed, little-endian."""
    pixels = np.arange(36, dtype="<u2").tobytes()
    bits = 8 + len(pixels)
    start = bits + 6
    tags = [
        (256, 3, 1, 4), (257, 3, 1, 3), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, 3), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", start) + pixels + struct.pack("<3H", 16, 16, 16) + directory


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((f"{kind}.png", _deep_png(kind)) for kind in (0, 2, 4, 6)),
        ("rgb.tif", _deep_tiff()),
        ("rgb.ppm", b"P6 2 1 65535\n" + bytes(12)),
        ("grey.pgm", b"P5 2 1 1023\n" + bytes(4)),
    ],
)
def test_sixteen_bits_are_refused_rather_than_cut(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with Image.open(tmp_path / name) as image:
        image.load()  # a valid file, which Pillow would read
    with pytest.raises(ImageError, match=r"more than 8 bits.*convert it to 8-bit RGB"):
        images.read_photo(tmp_path / name)


@pytest.mark.parametrize(
    ("mode", "suffix", "words"), [("CMYK", ".jpg", "CMYK"), ("CMYK", ".tif", "CMYK"), ("F", ".tif", "floating"),
                                  ("I", ".tif", "more than 8 bits"), ("I;16", ".tif", "more than 8 bits"),
                                  ("LAB", ".tif", "L\\*a\\*b")]
)  # fmt: skip
def test_other_kinds_of_pixels_are_refused_with_the_way_out(tmp_path: Path, mode: str, suffix: str, words: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.new(mode, (8, 6)).save(path)
    with pytest.raises(ImageError, match=f"a{suffix}: .*{words}.*convert it to 8-bit RGB"):
        images.read_photo(path)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_several_frames_are_refused(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(noise(6, 8, seed=i)) for i in range(3)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="holds 3 frames"):
        images.read_photo(tmp_path / f"a{suffix}")


def test_a_still_gif_is_read(tmp_path: Path) -> None:
    Image.fromarray(noise(6, 8)).quantize(8).save(tmp_path / "a.gif")
    assert images.read_photo(tmp_path / "a.gif").size == (8, 6)


def test_the_first_picture_of_a_phone_jpeg_is_read(tmp_path: Path) -> None:
    first, second = (Image.fromarray(noise(16, 24, seed=i)) for i in range(2))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second], quality=95)
    first.save(tmp_path / "alone.jpg", quality=95)
    photo = images.read_photo(tmp_path / "a.jpg")
    assert "2 pictures" in photo.notes[0]
    assert np.array_equal(photo.pixels, images.read_photo(tmp_path / "alone.jpg").pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp", ".ppm", ".gif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a{suffix}"
    image = Image.fromarray(noise(64, 64))
    (image.quantize(256) if suffix == ".gif" else image).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ImageError, match=f"a{suffix}"):
        images.read_photo(path)


def test_a_png_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", noise(40, 40))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 200] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ImageError, match="damaged"):
        images.read_photo(path)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "folder.png").mkdir()
    for name, words in {
        "empty.png": "empty",
        "text.jpg": "not a picture",
        "page.eps": "not a picture",  # Pillow would start another program to read it
        "folder.png": "directory",
        "missing.png": "cannot be read: No such file",
    }.items():
        with pytest.raises(ImageError, match=rf"{name}: .*{words}"):
            images.read_photo(tmp_path / name)


def test_a_decompression_bomb_is_refused_with_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", noise(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ImageError, match="1,000 pixels"):
        images.read_photo(path)


# Masks


def test_white_is_hole_from_128_on(tmp_path: Path) -> None:
    values = np.array([[0, 1, 127, 128, 254, 255]], np.uint8)
    mask = images.read_mask(saved(tmp_path / "m.png", values))
    assert mask.hole.tolist() == [[False, False, False, True, True, True]]
    assert mask.between == pytest.approx(4 / 6)
    assert mask.describe() == (
        "hole: 50.0 % of the pixels (white); --invert-mask if white means keep; "
        "66.7 % of the mask is neither 0 nor 255: white from 128 on"
    )


def test_inverting_gives_the_complement(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    plain, inverted = images.read_mask(path), images.read_mask(path, invert=True)
    assert np.array_equal(inverted.hole, ~plain.hole)
    assert "(black)" in inverted.describe()


@pytest.mark.parametrize("invert", [False, True])
def test_a_transparent_mask_pixel_is_known(tmp_path: Path, invert: bool) -> None:
    painted = 0 if invert else 255
    pixels = np.full((4, 6, 4), painted, np.uint8)
    pixels[..., 3] = 0
    pixels[1:3, 2:5, 3] = 255
    hole = images.read_mask(saved(tmp_path / "m.png", pixels), invert=invert).hole
    assert np.array_equal(hole, pixels[..., 3] == 255)


def test_colour_masks_are_turned_to_grey_as_pillow_does(tmp_path: Path) -> None:
    pixels = noise(20, 20)
    path = saved(tmp_path / "m.png", pixels)
    assert np.array_equal(images.read_mask(path).hole, np.asarray(Image.open(path).convert("L")) >= 128)


def test_palette_and_one_bit_masks(tmp_path: Path) -> None:
    bits = noise(9, 9, 1) > 127
    saved(tmp_path / "one.png", bits)
    Image.fromarray(bits).convert("P").save(tmp_path / "palette.png")
    for name in ("one.png", "palette.png"):
        assert np.array_equal(images.read_mask(tmp_path / name).hole, bits)


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0 %"), (1e-6, "0.1 %"), (0.123, "12.3 %"), (1 - 1e-6, "99.9 %"), (1, "100.0 %")]
)
def test_a_share_never_rounds_to_none_or_all(share: float, text: str) -> None:
    assert images.percent(share) == text


def test_sizes_that_differ_are_named(tmp_path: Path) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(30, 20)))
    mask = images.read_mask(saved(tmp_path / "m.png", noise(30, 21, 1)))
    with pytest.raises(ImageError, match=r"m\.png is 21 x 30 pixels, .*a\.png is 20 x 30"):
        images.check_sizes(photo, mask)


def test_a_mask_in_stored_orientation_gets_a_hint(tmp_path: Path) -> None:
    photo = images.read_photo(saved(tmp_path / "a.jpg", noise(16, 24), exif=exif_with(6)))
    mask = images.read_mask(saved(tmp_path / "m.png", noise(16, 24, 1)))
    with pytest.raises(ImageError, match=r"24 x 16.*16 x 24 as displayed.*stored turned"):
        images.check_sizes(photo, mask)
    images.check_sizes(photo, images.read_mask(saved(tmp_path / "n.png", noise(24, 16, 1))))


# Writing


def test_a_suffix_that_is_not_written_is_refused(tmp_path: Path) -> None:
    for name in ("a.heic", "a", "a.gif"):
        with pytest.raises(ImageError, match=r"written as \.png"):
            images.writes(tmp_path / name)
    assert images.writes("A.PNG").name == "PNG"


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".ppm"])
def test_alpha_is_never_dropped(tmp_path: Path, suffix: str) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(6, 6, 4)))
    with pytest.raises(ImageError, match="alpha"):
        images.write_photo(tmp_path / f"b{suffix}", photo, photo.rgb, hole_in(photo.pixels))
    assert not (tmp_path / f"b{suffix}").exists()


def test_a_side_too_long_for_the_format_is_refused(tmp_path: Path) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(1, 20_000)))
    with pytest.raises(ImageError, match="16383"):
        images.check_writable(tmp_path / "b.webp", photo)
    images.write_photo(tmp_path / "b.png", photo, photo.rgb, hole_in(photo.pixels))


def test_existing_files_are_replaced_only_if_asked(tmp_path: Path) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(6, 6)))
    target = tmp_path / "b.png"
    target.write_bytes(b"old")
    with pytest.raises(ImageError, match="exists"):
        images.write_photo(target, photo, photo.rgb, hole_in(photo.pixels))
    assert target.read_bytes() == b"old"
    images.write_photo(target, photo, photo.rgb, hole_in(photo.pixels), overwrite=True)
    assert images.read_photo(target).size == (6, 6)


def test_a_result_takes_the_name_at_once_and_leaves_nothing_else(tmp_path: Path) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(6, 6)))
    (tmp_path / "b.png").write_bytes(b"old")
    os.link(tmp_path / "b.png", tmp_path / "link")
    images.write_photo(tmp_path / "b.png", photo, photo.rgb, hole_in(photo.pixels), overwrite=True)
    assert (tmp_path / "link").read_bytes() == b"old", "the old file was written into instead of being replaced"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "link"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(6, 6)))
    with pytest.raises(ImageError, match="nowhere does not exist"):
        images.write_photo(tmp_path / "nowhere" / "b.png", photo, photo.rgb, hole_in(photo.pixels))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(6, 6)))
    (tmp_path / "b.png").write_bytes(b"old")

    def fail(self: Image.Image, file: io.BytesIO, **options: object) -> None:
        file.write(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(ImageError, match="disk full"):
        images.write_photo(tmp_path / "b.png", photo, photo.rgb, hole_in(photo.pixels), overwrite=True)
    assert (tmp_path / "b.png").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", noise(6, 6))
    (tmp_path / "b.png").write_bytes(b"old")
    program = """
        import os, sys
        from PIL import Image
        from inpaintrt import images
        def killed(self, file, **options):
            file.write(b"half a pict")
            file.flush()
            os.kill(os.getpid(), 9)
        photo = images.read_photo("a.png")
        Image.Image.save = killed
        images.write_photo("b.png", photo, photo.rgb, photo.rgb[..., 0] > 9, overwrite=True)
    """
    done = subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(program)], cwd=tmp_path, check=False)
    assert done.returncode == -9
    assert (tmp_path / "b.png").read_bytes() == b"old"


def test_a_codec_that_changes_known_pixels_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(6, 6)))
    save = Image.Image.save

    def spoil(self: Image.Image, *args: object, **options: object) -> None:
        self.putpixel((5, 5), tuple(255 - value for value in self.getpixel((5, 5))))
        save(self, *args, **options)

    monkeypatch.setattr(Image.Image, "save", spoil)
    with pytest.raises(ImageError, match="changed known pixels"):
        images.write_photo(tmp_path / "b.png", photo, photo.rgb, hole_in(photo.pixels))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_results_have_ordinary_permissions(tmp_path: Path) -> None:
    photo = images.read_photo(saved(tmp_path / "a.png", noise(6, 6)))
    images.write_photo(tmp_path / "b.png", photo, photo.rgb, hole_in(photo.pixels))
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "b.png").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_known_pixels_are_bit_identical_for_any_size_mask_mode_and_orientation(
    tmp_path: Path, data: st.DataObject
) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    channels = data.draw(st.integers(1, 4))
    suffix = data.draw(st.sampled_from([s for s in LOSSLESS if images.WRITES[s].alpha or channels in (1, 3)]))
    seed = data.draw(st.integers(0, 99))
    source = tmp_path / "a.png"
    exif = exif_with(data.draw(st.integers(1, 8)))
    saved(source, noise(height, width, channels, seed), exif=exif)
    photo = images.read_photo(source)
    hole = np.random.default_rng(seed).random(photo.pixels.shape[:2]) < data.draw(st.sampled_from([0, 0.5, 1]))
    target = tmp_path / f"b{suffix}"
    images.write_photo(target, photo, noise(*photo.pixels.shape[:2], 3, seed + 1), hole, overwrite=True)
    found = images.read_photo(target).pixels
    if suffix == ".webp" and channels < 3:  # WebP has no grey
        found = np.concatenate([found[..., :1], found[..., 3:]], axis=2)
    assert np.array_equal(found[~hole], photo.pixels[~hole])

"""Photos and masks as files: what is read, what is refused, and how a result is written without harm.

A photo is held as displayed (EXIF orientation applied) in 8-bit grey or RGB, with or without alpha. Writing turns the
pixels back, so that the file shows as before and every known pixel is the stored one. Anything that 8 bits and three
channels cannot carry (CMYK, 16 bits, floats, animations) is refused with the way out, never reduced in silence.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from . import _exif
from .runtime.errors import ImageError

Pixels = NDArray[np.uint8]
Hole = NDArray[np.bool_]

THRESHOLD = 128
"""A mask value of at least this is hole."""

READS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
READ_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pbm"}
)


@dataclass(frozen=True)
class Format:
    """What a file format that results are written in can hold. `max_side` is in pixels."""

    name: str
    lossless: bool
    alpha: bool
    exif: bool
    max_side: int
    options: dict[str, Any]


_JPEG = Format(
    "JPEG", lossless=False, alpha=False, exif=True, max_side=65_500, options={"quality": 95, "subsampling": 0}
)
_TIFF = Format("TIFF", lossless=True, alpha=True, exif=True, max_side=2**31 - 1, options={})
WRITES = {
    ".png": Format("PNG", lossless=True, alpha=True, exif=True, max_side=2**31 - 1, options={}),
    # exact: keep the colours of fully transparent pixels too.
    ".webp": Format(
        "WEBP", lossless=True, alpha=True, exif=True, max_side=16_383, options={"lossless": True, "exact": True}
    ),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": Format("BMP", lossless=True, alpha=False, exif=False, max_side=2**31 - 1, options={}),
    ".ppm": Format("PPM", lossless=True, alpha=False, exif=False, max_side=2**31 - 1, options={}),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
}

_KEPT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA"})
_WAY_OUT = "convert it to 8-bit RGB first, in an editor or with: magick IN -colorspace sRGB -depth 8 OUT.png"
_REFUSED = {
    "CMYK": "holds CMYK (ink) colours, which an RGB network cannot keep",
    "YCbCr": "holds YCbCr colours, which cannot be written back unchanged",
    "LAB": "holds L*a*b* colours, which cannot be written back unchanged",
    "F": "holds floating-point pixels, more than the 8 bits that are filled",
    "I": "holds pixels of more than 8 bits, which would be cut to 8",
}
_DEEP = re.compile(r"(L|LA|I|La|RGB|RGBA|RGBX|RGBa);16")


@dataclass(frozen=True)
class Photo:
    """A picture from a file, as displayed.

    pixels: (H, W, C) uint8, displayed orientation; C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha (straight).
    orientation: EXIF orientation (1 to 8) of the file; results are written in it.
    jpeg: quantisation tables and chroma subsampling of a JPEG file, reused if the result is a JPEG too.
    notes: what a person should know about how the file was read, one sentence each.
    """

    path: Path
    pixels: Pixels
    orientation: int = 1
    exif: bytes | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    jpeg: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def rgb(self) -> Pixels:
        """(H, W, 3): what the network sees; grey is repeated, alpha is left out."""
        return self.pixels[..., :3] if self.pixels.shape[2] >= 3 else np.repeat(self.pixels[..., :1], 3, axis=2)

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as displayed."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def with_fill(self, filled: Pixels, hole: Hole) -> Pixels:
        """`pixels` with the colours of `filled` (H, W, 3) in the hole: averaged for a grey photo; alpha stays."""
        result = self.pixels.copy()
        if self.pixels.shape[2] >= 3:
            result[hole, :3] = filled[hole]
        else:
            result[hole, 0] = (filled[hole].sum(axis=1, dtype=np.uint16) + 1) // 3
        return result


@dataclass(frozen=True)
class Mask:
    """Where a photo is to be filled.

    hole: (H, W) bool, as displayed.
    between: share of the values that were neither 0 nor 255.
    """

    path: Path
    hole: Hole
    inverted: bool
    between: float

    @property
    def share(self) -> float:
        """Hole pixels over all pixels, 0 to 1."""
        return float(self.hole.mean())

    def describe(self) -> str:
        """One sentence from which a person sees a mask of the wrong polarity."""
        colour, other = ("black", "drop --invert-mask if white means fill") if self.inverted else (
            "white", "--invert-mask if white means keep")  # fmt: skip
        text = f"hole: {percent(self.share)} of the pixels ({colour}); {other}"
        if self.between:
            text += f"; {percent(self.between)} of the mask is neither 0 nor 255: white from {THRESHOLD} on"
        return text


def percent(share: float) -> str:
    """A share as text that says 0 or 100 only where that is exact."""
    return f"{min(max(100 * share, 0.1), 99.9) if 0 < share < 1 else 100 * share:.1f} %"


def read_photo(path: str | os.PathLike[str]) -> Photo:
    """Read a photo: JPEG, PNG, WebP, TIFF, BMP, GIF or PPM; 8-bit grey, RGB or palette, with or without alpha.

    Palettes become RGB, one-bit pictures grey, a transparent colour alpha.

    Raises: `ImageError`, one sentence, for anything else: missing, damaged, too large, of a kind that cannot be kept.
    """
    path = Path(path)
    with _opened(path) as image:
        notes = _check_kind(path, image)
        try:
            orientation, exif = _exif.orientation(image), _exif.kept(image)
        except _exif.DAMAGED as error:
            orientation, exif = 1, None
            notes.append(f"{path.name}: damaged EXIF data is left out ({error})")
        jpeg = None
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            jpeg = {"qtables": image.quantization, "subsampling": max(JpegImagePlugin.get_sampling(image), 0)}
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever they meet: OSError, SyntaxError, ValueError, struct.error
            raise ImageError(f"{path}: the file is damaged or incomplete: {error}") from error
        mode = _kept_mode(image)
        if image.mode in ("P", "PA"):
            notes.append(f"{path.name}: palette colours become {mode}")
        return Photo(
            path=path,
            pixels=_displayed(image, mode),
            orientation=orientation,
            exif=exif,
            icc=image.info.get("icc_profile") or None,
            dpi=_dpi(image.info.get("dpi")),
            jpeg=jpeg,
            notes=tuple(notes),
        )


def read_mask(path: str | os.PathLike[str], *, invert: bool = False) -> Mask:
    """Read a mask: white = hole, or black = hole with `invert`.

    Colours are turned to grey (ITU-R 601), inverted if asked, and multiplied by the alpha if there is one, so that
    transparent means known either way. A value of at least 128 is hole.

    Raises: `ImageError` as `read_photo`.
    """
    pixels = read_photo(path).pixels
    if pixels.shape[2] >= 3:
        weights = np.array([19595, 38470, 7471], np.uint32)
        grey = ((pixels[..., :3] @ weights + 0x8000) >> 16).astype(np.uint16)
    else:
        grey = pixels[..., 0].astype(np.uint16)
    if invert:
        grey = 255 - grey
    if pixels.shape[2] in (2, 4):
        grey = (grey * pixels[..., -1] + 127) // 255
    between = float(((grey != 0) & (grey != 255)).mean())
    return Mask(Path(path), grey >= THRESHOLD, invert, between)


def check_sizes(photo: Photo, mask: Mask) -> None:
    """Raise `ImageError` naming both sizes unless the mask fits the photo as displayed."""
    width, height = photo.size
    found = mask.hole.shape[1], mask.hole.shape[0]
    if found == (width, height):
        return
    displayed, hint = "", ""
    if photo.orientation >= 5 and found == (height, width):
        displayed = " as displayed"
        hint = (
            f"; the photo is stored turned (EXIF orientation {photo.orientation}): the mask follows what viewers show"
        )
    raise ImageError(
        f"{mask.path} is {found[0]} x {found[1]} pixels, {photo.path} is {width} x {height}{displayed}; "
        f"a mask has the size of its photo{hint}"
    )


def writes(path: str | os.PathLike[str]) -> Format:
    """The format that a file name asks for. Raises `ImageError` for a suffix that is not written."""
    path = Path(path)
    found = WRITES.get(path.suffix.lower())
    if found is None:
        what = f"as {path.suffix}" if path.suffix else "to a name without suffix"
        raise ImageError(f"{path}: results are written as {', '.join(WRITES)}, not {what}")
    return found


def check_writable(path: str | os.PathLike[str], photo: Photo) -> None:
    """Raise `ImageError` where the format of `path` cannot hold the result for `photo`; meant for before the work."""
    target = writes(path)
    if photo.has_alpha and not target.alpha:
        raise ImageError(f"{path}: {target.name} cannot hold the alpha of {photo.path}; write a .png, .webp or .tif")
    if max(photo.size) > target.max_side:
        width, height = photo.size
        limit = f"{target.name} allows {target.max_side} pixels a side"
        raise ImageError(f"{path}: {limit}, {photo.path} is {width} x {height}; write a .png or .tif")


def write_photo(
    path: str | os.PathLike[str], photo: Photo, filled: Pixels, hole: Hole, *, overwrite: bool = False
) -> None:
    """Write `photo` with its hole replaced by `filled` (H, W, 3), both as displayed; all or nothing.

    The file keeps orientation, EXIF (without its thumbnail, which would still show what was removed), colour profile
    and resolution; a format without EXIF gets the pixels as displayed. A lossless file is read back before it gets its
    name, and every pixel outside the hole is compared with the photo's. On any failure the target is as it was.

    Raises: `ImageError`.
    """
    path = Path(path)
    check_writable(path, photo)
    target = writes(path)
    stored = photo.with_fill(filled, hole)
    if target.exif:
        stored = _exif.TURN[_exif.INVERSE.get(photo.orientation, photo.orientation)](stored)
    image = Image.fromarray(np.ascontiguousarray(stored[..., 0] if stored.shape[2] == 1 else stored))
    with replacing(path, overwrite=overwrite) as file:
        try:
            image.save(file, format=target.name, **_save_options(target, photo))
        except (OSError, ValueError, struct.error) as error:
            raise ImageError(f"{path}: cannot be written as {target.name}: {error}") from error
        if target.lossless:
            file.seek(0)
            with Image.open(file, formats=[target.name]) as back:
                back.load()
                found = _displayed(back, image.mode)
            if found.shape != photo.pixels.shape or ((found != photo.pixels).any(axis=2) & ~hole).any():
                raise ImageError(f"{path}: writing {target.name} changed known pixels; nothing was written")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to write and read beside `path` that becomes `path` when the block ends, and vanishes if it raises.

    Raises: `ImageError` where the folder is missing or not writable, or where `path` exists and `overwrite` is not set.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.part")
    try:
        file = open(temporary, "x+b")  # noqa: SIM115 (closed below, before the rename)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_target(path, overwrite=overwrite)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise `ImageError` where a file cannot take the name `path`."""
    if path.is_dir():
        raise ImageError(f"{path} is a folder; give a file name")
    if path.exists() and not overwrite:
        raise ImageError(f"{path} exists; --overwrite (overwrite=True) replaces it")
    if not path.parent.is_dir():
        raise ImageError(f"{path}: the folder {path.parent} does not exist")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """The file's picture, not decoded yet."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    # Opened here and not by Pillow, which maps a file that it knows by name and then misreads turned grey TIFF files.
    with file:
        try:
            image = Image.open(file, formats=READS)
            if image.format == "PNG":
                image.verify()  # checksums, which decoding ignores
                image = Image.open(file, formats=READS)
        except Image.DecompressionBombError as error:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise ImageError(
                f"{path}: more than {limit:,} pixels, the limit against decompression bombs; "
                "raise PIL.Image.MAX_IMAGE_PIXELS for a file that you trust"
            ) from error
        except UnidentifiedImageError as error:
            if path.stat().st_size == 0:
                raise ImageError(f"{path}: the file is empty") from error
            raise ImageError(f"{path}: damaged, or not a picture that is read ({', '.join(READS)})") from error
        except Exception as error:  # headers are parsed by plugins that raise whatever they meet
            raise ImageError(f"{path}: the file is damaged or incomplete: {error}") from error
        with image:
            yield image


def _check_kind(path: Path, image: ImageFile.ImageFile) -> list[str]:
    """Refuse what would lose something; return the notes."""
    try:
        frames = int(getattr(image, "n_frames", 1))
    except Exception as error:  # counting frames reads the file
        raise ImageError(f"{path}: the file is damaged or incomplete: {error}") from error
    notes = []
    if image.format == "MPO":
        # Phones and cameras append previews or gain maps to an ordinary JPEG; the first picture is the photo.
        notes.append(f"{path.name}: holds {frames} pictures; the first is filled and the others are left out")
    elif frames > 1:
        raise ImageError(f"{path}: holds {frames} frames; extract one first, for example: magick '{path}[0]' one.png")
    if image.mode.startswith("I;") or _is_deep(image):
        raise ImageError(f"{path}: holds pixels of more than 8 bits, which would be cut to 8; {_WAY_OUT}")
    if image.mode not in _KEPT_MODES:
        what = _REFUSED.get(image.mode, f"holds pixels of mode {image.mode!r}, which cannot be written back unchanged")
        raise ImageError(f"{path}: {what}; {_WAY_OUT}")
    return notes


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether the file has more than 8 bits a channel, by what the decoder is told; Pillow reduces RGB silently."""
    for tile in image.tile:
        for word in tile[3] if isinstance(tile[3], tuple) else (tile[3],):
            if isinstance(word, str) and _DEEP.match(word):
                return True
            if image.format == "PPM" and isinstance(word, int) and word > 255:  # the largest value, in its header
                return True
    return False


def _kept_mode(image: Image.Image) -> str:
    """The mode that carries the picture: L, LA, RGB or RGBA."""
    keyed = "transparency" in image.info
    if image.mode in ("1", "L"):
        return "LA" if keyed else "L"
    if image.mode in ("P", "PA", "RGB"):
        return "RGBA" if keyed or image.mode == "PA" else "RGB"
    return image.mode


def _displayed(image: Image.Image, mode: str) -> Pixels:
    """(H, W, C) of a decoded picture, turned as its EXIF orientation says (Pillow turns TIFF files itself)."""
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    try:
        orientation = _exif.orientation(image)
    except _exif.DAMAGED:
        orientation = 1
    return np.ascontiguousarray(_exif.TURN[orientation](pixels if pixels.ndim == 3 else pixels[..., None]))


def _dpi(value: Any) -> tuple[float, float] | None:
    if not value or len(value) != 2:
        return None
    x, y = float(value[0]), float(value[1])
    return (x, y) if math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0 else None


def _save_options(target: Format, photo: Photo) -> dict[str, Any]:
    options = dict(target.options)
    if target.exif and photo.exif:
        options["exif"] = photo.exif
    if photo.icc:
        options["icc_profile"] = photo.icc
    if photo.dpi:
        options["dpi"] = photo.dpi
    if target.name == "JPEG" and photo.jpeg:
        del options["quality"]
        options |= photo.jpeg
    return options

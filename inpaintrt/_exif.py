"""EXIF data: how a file's picture is turned for display, and what of the data a result keeps."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

DAMAGED = (struct.error, SyntaxError, ValueError, KeyError, TypeError, OSError)

TURN: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
INVERSE = {6: 8, 8: 6}  # the others undo themselves

_KEPT_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Orientation,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)


def orientation(image: Image.Image) -> int:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in TURN else 1


def kept(image: Image.Image) -> bytes | None:
    """The file's EXIF data without a thumbnail; from its tags where there is no EXIF block (TIFF, XMP orientation)."""
    tags = image.getexif()
    raw = image.info.get("exif")
    if raw:
        stated = Image.Exif()
        stated.load(raw)
        if stated.get(ExifTags.Base.Orientation) == tags.get(ExifTags.Base.Orientation):
            return without_thumbnail(raw)
    chosen = Image.Exif()
    for tag in _KEPT_TAGS:
        if tag in tags:
            chosen[tag] = tags[tag]
    for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if found := tags.get_ifd(part):
            chosen[part] = dict(found)
    return chosen.tobytes() if len(chosen) else None


def without_thumbnail(exif: bytes) -> bytes:
    """EXIF data with the second directory unlinked and its embedded picture zeroed; every other byte stays.

    Raises: `ValueError` or `struct.error` for data that is no TIFF structure.
    """
    data = bytearray(exif)
    start = 6 if data.startswith(b"Exif\0\0") else 0
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[start : start + 2]))
    if order is None:
        raise ValueError("no TIFF header")

    def number(kind: str, offset: int) -> int:
        return int(struct.unpack_from(order + kind, data, start + offset)[0])

    def end_of(directory: int) -> int:
        return directory + 2 + 12 * number("H", directory)

    link = end_of(number("I", 4))
    # Some writers leave out the link after the last directory.
    second = number("I", link) if start + link + 4 <= len(data) else 0
    if second == 0:
        return exif
    entries = {number("H", e): number("I", e + 8) for e in range(second + 2, end_of(second), 12)}
    offset, length = entries.get(0x0201, 0), entries.get(0x0202, 0)
    size = len(range(*slice(start + offset, start + offset + length).indices(len(data))))
    data[start + offset : start + offset + size] = bytes(size)
    struct.pack_into(order + "I", data, start + link, 0)
    return bytes(data)

"""Which photos are filled with which masks or enhanced, and one of them from file to file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from . import enhancement, images, pipeline
from .runtime.errors import ImageError

_ENDINGS = ("-mask", "_mask")


@dataclass(frozen=True)
class Job:
    """A photo, its mask and the file that the result goes to."""

    photo: Path
    mask: Path
    target: Path


@dataclass(frozen=True)
class Done:
    """What became of a photo. `summary` says what was done; `notes` and `warnings` are sentences for a person."""

    summary: str
    notes: Sequence[str]
    warnings: Sequence[str]


def plan(photo: Path, mask: Path, out: Path, *, suffix: str = ".png", overwrite: bool = False) -> list[Job]:
    """The jobs for two files, or for two folders; everything that can be known to fail does so here, before any work.

    In folders a photo `a.jpg` belongs to the mask `a.*`, `a-mask.*` or `a_mask.*`; subfolders and hidden files are not
    looked at. Photos and masks may lie in one folder; masks then need the ending. Results are `<out>/<photo's
    stem><suffix>`.

    Raises: `ImageError`.
    """
    for path in (photo, mask):
        if not path.exists():
            raise ImageError(f"{path}: no such file or folder")
    if photo.is_dir() != mask.is_dir():
        folder, file = (photo, mask) if photo.is_dir() else (mask, photo)
        raise ImageError(f"{folder} is a folder and {file} a file; give two files or two folders")
    if not photo.is_dir():
        return [Job(photo, mask, _target(out, overwrite))]
    pairs = dict(_pairs(photo, mask))
    targets = _targets(pairs, out, suffix, overwrite)
    return [Job(path, pairs[path], target) for path, target in targets]


def plan_photos(photo: Path, out: Path, *, suffix: str = ".png", overwrite: bool = False) -> list[tuple[Path, Path]]:
    """(photo, target) of a file, or of each photo in a folder, as in `plan`.

    Raises: `ImageError`.
    """
    if not photo.is_dir():
        return [(photo, _target(out, overwrite))]
    if not (photos := _pictures(photo)):
        raise ImageError(f"no photos in {photo} ({', '.join(sorted(images.READ_SUFFIXES))})")
    return _targets(photos, out, suffix, overwrite)


def fill_file(
    model: nn.Module,
    job: Job,
    *,
    invert_mask: bool = False,
    max_pixels: int = pipeline.MAX_PIXELS,
    margin: int = pipeline.MARGIN,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Done:
    """Read photo and mask, fill, write; the target appears whole or not at all. Options: as in `pipeline.fill`.

    Raises: `ImageError` for files, `InpaintRTError` for what goes wrong in the network.
    """
    photo = images.read_photo(job.photo)
    images.check_writable(job.target, photo)
    mask = images.read_mask(job.mask, invert=invert_mask)
    images.check_sizes(photo, mask)
    warnings = []
    if not mask.hole.any():
        warnings.append(f"{job.mask.name} marks no hole: the pixels are written as they are, the network was not run")
    elif mask.hole.all():
        warnings.append(f"{job.mask.name} marks every pixel as hole: the network sees nothing of the photo")
    if not (target := images.writes(job.target)).lossless:
        warnings.append(f"{job.target.name}: {target.name} is lossy, known pixels are only as exact as it keeps them")
    if photo.orientation != 1 and not target.exif:
        warnings.append(f"{job.target.name}: {target.name} holds no orientation; the pixels are written as displayed")
    if (times := pipeline.reduction(model, mask.hole)) > 1:
        warnings.append(
            f"{job.photo.name}: a hole is larger than the network sees; it is filled {times:.1f} times coarser"
        )
    filled = pipeline.fill(model, photo.rgb, mask.hole, max_pixels=max_pixels, margin=margin, options=options)
    images.write_photo(job.target, photo, filled, mask.hole, overwrite=overwrite)
    return Done(mask.describe(), photo.notes, warnings)


def enhance_file(
    model: nn.Module,
    path: Path,
    target: Path,
    task: int | str | None = None,
    *,
    blend: str = "original",
    overwrite: bool = False,
) -> Done:
    """Read a photo, enhance, write; the target appears whole or not at all.

    Raises: `ImageError` for files, ValueError for what the network cannot take, `InpaintRTError` for what goes wrong in it.
    """
    photo = images.read_photo(path)
    patches = enhancement.patches(model, photo.rgb, task)
    # Sizes and orientation in EXIF would not be the result's; a profile of grey would not fit its colours.
    kept = photo.icc if photo.pixels.shape[2] >= 3 else None
    made = replace(photo, pixels=photo.rgb, orientation=1, exif=None, icc=kept)
    images.check_writable(target, made)
    pixels = enhancement.enhance(model, photo.rgb, task, blend=blend)
    everywhere = np.ones(pixels.shape[:2], bool)
    images.write_photo(target, replace(made, pixels=pixels), pixels, everywhere, overwrite=overwrite)
    notes = [*photo.notes, *([f"{path.name} has transparency, which was left out"] if photo.has_alpha else [])]
    return Done(f"{pixels.shape[1]} x {pixels.shape[0]}, {patches} patches", notes, ())


def _target(out: Path, overwrite: bool) -> Path:
    images.writes(out)
    images.check_target(out, overwrite=overwrite)
    return out


def _targets(photos: Iterable[Path], out: Path, suffix: str, overwrite: bool) -> list[tuple[Path, Path]]:
    """Each photo with its file in the folder `out`. Raises: `ImageError`, of all that is in the way there."""
    images.writes(Path("out").with_suffix(suffix))
    work = [(path, out / (path.stem + suffix)) for path in photos]
    sources = defaultdict(list)
    for path, target in work:
        sources[target].append(path.name)
    clashes = [f"{' and '.join(names)} would become one {t.name}" for t, names in sources.items() if len(names) > 1]
    if out.exists() and not out.is_dir():
        clashes.append(f"{out} is a file; give a folder")
    if not overwrite and (old := [target.name for target in sources if target.exists()]):
        clashes.append(f"in {out} there are already {_some(old)}; --overwrite replaces them")
    if clashes:
        raise ImageError("; ".join(clashes))
    return work


def _pairs(photos: Path, masks: Path) -> list[tuple[Path, Path]]:
    shared = photos.samefile(masks)
    pictures = [path for path in _pictures(photos) if not shared or not path.stem.endswith(_ENDINGS)]
    candidates = [path for path in _pictures(masks) if not shared or path.stem.endswith(_ENDINGS)]
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in candidates:
        by_stem[path.stem].append(path)
    found = {path: [m for ending in ("", *_ENDINGS) for m in by_stem[path.stem + ending]] for path in pictures}
    used = {path for matches in found.values() for path in matches}
    problems = []
    if not pictures:
        problems.append(f"no photos in {photos} ({', '.join(sorted(images.READ_SUFFIXES))})")
    if missing := [path.name for path, matches in found.items() if not matches]:
        problems.append(f"no mask in {masks} for {_some(missing)} (same stem, or with -mask or _mask after it)")
    if double := [path.name for path, matches in found.items() if len(matches) > 1]:
        problems.append(f"more than one mask in {masks} for {_some(double)}")
    if spare := [path.name for path in candidates if path not in used]:
        problems.append(f"no photo in {photos} for the masks {_some(spare)}")
    if problems:
        raise ImageError("; ".join(problems))
    return [(path, matches[0]) for path, matches in found.items()]


def _pictures(folder: Path) -> list[Path]:
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in images.READ_SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        raise ImageError(f"{folder}: {error.strerror}") from error


def _some(names: Sequence[str]) -> str:
    """Names for a message: all, or the first ten and a count."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")

"""The demonstration: one photo, filled by the default model before and after acceleration, with times and errors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import inpaintrt as irt

from . import images, pipeline
from .report import Report
from .runtime.errors import ImageError

PICTURE = "inpaintrt-demo.png"
_HOLE_COLOUR = (255, 0, 255)
_FOLDER = Path(__file__).with_name("data") / "demo"
_BUDGET = 15.0  # seconds of timing


def photo_and_mask() -> tuple[images.Photo, images.Mask]:
    """The photo that ships with the package and its hole."""
    return images.read_photo(_FOLDER / "coffee.jpg"), images.read_mask(_FOLDER / "coffee-mask.png")


def example(height: int, width: int) -> Tensor:
    """What a LaMa generator is given: (1, 4, height, width), the demo photo with its hole set to 0, and the mask."""
    photo, mask = photo_and_mask()
    size = (width, height)
    image = np.asarray(Image.fromarray(photo.rgb).resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    hole = np.asarray(Image.fromarray(mask.hole).resize(size, Image.Resampling.NEAREST), np.float32)[..., None]
    stacked = np.concatenate([image * (1 - hole), hole], axis=2)
    return torch.from_numpy(stacked.transpose(2, 0, 1).copy()).unsqueeze(0)


def run(folder: str | os.PathLike[str] = ".", *, backend: str = "auto", say: Callable[[str], object] = print) -> bool:
    """Accelerate, verify, fill, time; print one table and write one picture, `<folder>/inpaintrt-demo.png`.

    Returns: whether the accelerated model was verified.
    """
    target = Path(folder) / PICTURE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{target.parent}: the folder cannot be made ({error.strerror})") from None
    images.check_target(target, overwrite=True)
    photo, mask = photo_and_mask()
    width, height = photo.size

    moments = [time.perf_counter()]
    model = irt.load("lama_mini")
    moments.append(time.perf_counter())
    irt.accelerate(model, backend=backend)
    moments.append(time.perf_counter())
    filled = pipeline.fill(model, photo.rgb, mask.hole)
    moments.append(time.perf_counter())

    proof = irt.verify(model, example(height, width))
    if not proof.ok:
        say(str(proof))
    errors = _errors(model, photo.rgb, mask.hole)
    times = _times(model, photo.rgb, mask.hole)
    _draw(target, photo.rgb, mask.hole, filled)

    parameters = sum(p.numel() for p in model.parameters())
    rows = {
        "photo": f"{photo.path.name}, {width} x {height}, hole {images.percent(mask.share)}",
        "model": f"lama_mini, {parameters:,} parameters, {torch.get_num_threads()} threads",
        "load, accelerate, first fill": ", ".join(f"{b - a:.2f} s" for a, b in pairwise(moments)),
        "verified": f"{'yes' if proof.ok else 'NO'}, {len(proof.rows)} comparisons with the untouched model",
        **times,
        **errors,
        "picture": f"{target}: photo, hole, fill",
    }
    table = tuple({"what": name, "result": value} for name, value in rows.items())
    say(
        str(Report("inpaintrt demo: the same model before and after accelerate()", ("what", "result"), table, proof.ok))
    )
    return proof.ok


def _errors(model: nn.Module, image: images.Pixels, hole: images.Hole) -> dict[str, str]:
    """How far the accelerated fill is from the untouched model's over the hole, and from the photo elsewhere."""
    real = image.astype(np.float32) / 255
    with irt.disabled():
        exact, exact_bytes = pipeline.fill(model, real, hole)[hole], pipeline.fill(model, image, hole)[hole]
    error = np.abs(pipeline.fill(model, real, hole)[hole] - exact, dtype=np.float64)
    filled = pipeline.fill(model, image, hole)
    levels = np.abs(filled[hole].astype(int) - exact_bytes)
    return {
        "error in the hole": f"max {error.max():.1e}, RMS {np.sqrt((error**2).mean()):.1e} (values in [0, 1])",
        "8-bit values in the hole": f"{100 * (levels == 0).mean():.3f} % equal, largest difference {levels.max()}",
        "pixels outside the hole": f"{int((filled != image)[~hole].any(-1).sum())} differ from the photo's",
    }


def _times(model: nn.Module, image: images.Pixels, hole: images.Hole) -> dict[str, str]:
    from .testing.timing import compare, interleave

    def accelerated() -> object:
        return pipeline.fill(model, image, hole)

    def reference() -> object:
        with irt.disabled():
            return pipeline.fill(model, image, hole)

    start = time.perf_counter()
    reference()
    accelerated()
    pair = time.perf_counter() - start
    rounds = int(np.clip(_BUDGET / (2 * pair), 3, 30))
    times = interleave({"reference": reference, "accelerated": accelerated}, rounds=rounds)
    ratio = compare(times["reference"], times["accelerated"])
    medians = {name: 1e3 * float(np.median(seconds)) for name, seconds in times.items()}
    return {
        "reference": f"{medians['reference']:.1f} ms, median of {2 * rounds}",
        "accelerated": f"{medians['accelerated']:.1f} ms, median of {2 * rounds}, interleaved with the reference",
        "speed-up": f"{ratio.median:.2f} x (95 % interval {ratio.low:.2f} to {ratio.high:.2f})",
    }


def _draw(target: Path, image: images.Pixels, hole: images.Hole, filled: images.Pixels) -> None:
    """Photo, hole and fill side by side on white."""
    marked = image.copy()
    marked[hole] = _HOLE_COLOUR
    gap = np.full((len(image), 8, 3), 255, np.uint8)
    sheet = np.concatenate([image, gap, marked, gap, filled], axis=1)
    with images.replacing(target, overwrite=True) as file:
        Image.fromarray(sheet).save(file, format="PNG")

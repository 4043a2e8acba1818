"""What products hold instead of a model: objects that take an image and a mask as bytes and keep a model within.

Written for these tests after the behaviour of two popular applications: what they feed to a TorchScript LaMa, and what
they do with the result.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

import inpaintrt as irt

from . import foreign_lama


def archive(module: torch.nn.Module, *example: torch.Tensor) -> torch.jit.ScriptModule:
    """A TorchScript file's content, as it comes back from the file."""
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), example, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file).eval()


def public_archive() -> torch.jit.ScriptModule:
    """The shipped weights in the form of the public archives: traced from (image, mask), integer masks, blended."""
    module = foreign_lama.Wrapper(width=16, blocks=6)
    module.generator.load_state_dict(irt.load("lama_mini").state_dict())
    return archive(module, torch.rand(1, 3, 120, 120), (torch.rand(1, 1, 120, 120) > 0.5).long())


def padded(array: np.ndarray, multiple: int) -> np.ndarray:
    """Rows and columns to a multiple, on the bottom and right, edge pixels repeated."""
    below, right = (-size % multiple for size in array.shape[:2])
    return np.pad(array, ((0, below), (0, right)) + ((0, 0),) * (array.ndim - 2), mode="symmetric")


def _batch(array: np.ndarray) -> torch.Tensor:
    planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(planes.astype(np.float32) / 255)[None]


class Eraser:
    """One model of an application that offers many."""

    name = "lama"
    multiple = 8

    def __init__(self, model: torch.jit.ScriptModule) -> None:
        self.device = torch.device("cpu")
        self.model = model

    @torch.no_grad()
    def __call__(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """RGB and mask, uint8, of any size → BGR uint8: the hole from the model, the rest blended from the image."""
        filled = self.forward(padded(image, self.multiple), padded(mask, self.multiple))
        filled = filled[: image.shape[0], : image.shape[1]]
        share = mask[..., None] / 255
        return (filled * share + image[..., ::-1] * (1 - share)).astype(np.uint8)

    def forward(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        hole = (_batch(mask) > 0) * 1  # int64
        result = self.model(_batch(image).to(self.device), hole.to(self.device))
        levels = np.clip(result[0].permute(1, 2, 0).cpu().numpy() * 255, 0, 255).astype(np.uint8)
        return levels[..., ::-1]


class Manager:
    """Chooses the model and cuts large images to a window around the hole."""

    def __init__(self, model: torch.jit.ScriptModule, *, window_above: int = 800, margin: int = 128) -> None:
        self.available = {"lama": Eraser}
        self.window_above, self.margin = window_above, margin
        self.model = Eraser(model)

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if max(image.shape) <= self.window_above:
            return self.model(image, mask)
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        top, left = (max(0, int(at[0]) - self.margin) for at in (rows, columns))
        window = np.s_[top : int(rows[-1]) + self.margin, left : int(columns[-1]) + self.margin]
        result = image[..., ::-1].copy()
        result[window] = self.model(image[window], mask[window])
        return result


class Simple:
    """The small wrapper that scripts use: pictures in, a picture out, of the padded size."""

    def __init__(self, model: torch.jit.ScriptModule) -> None:
        self.model = model
        self.device = torch.device("cpu")

    def __call__(self, image: Image.Image, mask: Image.Image) -> Image.Image:
        pixels, hole = (padded(np.asarray(picture), 8) for picture in (image.convert("RGB"), mask.convert("L")))
        with torch.inference_mode():
            result = self.model(_batch(pixels), (_batch(hole) > 0) * 1)
        return Image.fromarray(np.clip(result[0].permute(1, 2, 0).numpy() * 255, 0, 255).astype(np.uint8))

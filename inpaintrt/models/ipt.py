"""IPT: one transformer for super-resolution, denoising and deraining, in plain torch.

Chen et al., "Pre-Trained Image Processing Transformer", CVPR 2021. Every task has a head and a tail of convolutions and an
embedding; the transformer between them is shared. The network sees patches of 48×48 pixels; `forward_chop` makes an image of
overlapping ones. 115.5 M parameters and 33 G multiply-adds per patch with 12 + 12 layers, as in the released files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ipt_chop, ipt_tiles
from .ipt_layers import CELL, Body, head, mean_shift, tail

TASKS = {"x2": 2, "x3": 3, "x4": 4, "denoise": 1, "denoise30": 1, "denoise50": 1, "derain": 1, "x1": 1}
"""Names of tasks, and how much larger their results are. `x1`: one that keeps the size, of which no more is known."""
_PRETRAINED = ("x2", "x3", "x4", "denoise30", "denoise50", "derain")
"""The file of all tasks, whose order its shapes alone do not say."""


class IPT(nn.Module):
    """The network.

    Args:
        tasks: names, each a key of `TASKS`, in the order of heads, tails and embeddings.
        features: channels of heads and tails; a token has nine times as many.
        heads: of each attention; divides a token's channels.
        layers: of the encoder, and of the decoder.
        patch: rows and columns of a patch, a multiple of 12.
        queries: embeddings of tasks, if there are more than tasks.

    Attributes:
        config: the arguments that make this network.

    Raises: `ValueError` for values that no network can be made of.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str] = ("x4",),
        features: int = 64,
        heads: int = 12,
        layers: int = 12,
        patch: int = 48,
        queries: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(tasks, str) or not tasks or not set(tasks) <= set(TASKS):
            raise ValueError(f"tasks are {tasks!r}; accepted: a sequence of {', '.join(TASKS)}, at least one")
        if min(features, heads, layers) < 1 or CELL**2 * features % heads:
            raise ValueError(
                f"features are {features}, heads {heads}, layers {layers}; accepted: 1 or more, heads that divide "
                f"{CELL**2} · features"
            )
        if patch < 12 or patch % 12:
            raise ValueError(f"patch is {patch}; accepted: a multiple of 12")
        if queries is not None and queries < len(tasks):
            raise ValueError(f"queries are {queries} for {len(tasks)} tasks; accepted: one for each, or more")
        self.config = {
            "tasks": tuple(tasks), "features": features, "heads": heads, "layers": layers, "patch": patch,
            "queries": queries or len(tasks),
        }  # fmt: skip
        self.tasks, self.patch = tuple(tasks), patch
        self.sub_mean, self.add_mean = mean_shift(-1), mean_shift(1)
        self.head = nn.ModuleList(head(features) for _ in tasks)
        self.body = Body(patch, features, heads, layers, queries or len(tasks))
        self.tail = nn.ModuleList(tail(features, TASKS[task]) for task in tasks)

    def index(self, task: int | str | None = None) -> int:
        """The place of a task.

        Args:
            task: its name or place. None: the only one. A task that keeps the size is also found where the weights do not
                say which one they are for ("x1").

        Raises: `ValueError` for a task that this network has not, and for one that it has more than once.
        """
        own = f"this network's tasks are {', '.join(f'{i}: {name}' for i, name in enumerate(self.tasks))}"
        if task is None and len(self.tasks) == 1:
            return 0
        if isinstance(task, int) and not isinstance(task, bool):
            if 0 <= task < len(self.tasks):
                return task
        elif isinstance(task, str):
            wanted = task if task in self.tasks or TASKS.get(task) != 1 else "x1"
            if self.tasks.count(wanted) == 1:
                return self.tasks.index(wanted)
        raise ValueError(f"task is {task!r}; accepted: one name or place of those here. {own[0].upper()}{own[1:]}")

    def scale(self, task: int | str | None = None) -> int:
        """How much larger the result of a task is. Raises: as `index`."""
        return TASKS[self.tasks[self.index(task)]]

    def forward(self, x: Tensor, task: int | str | None = None) -> Tensor:
        """Patches, each by itself.

        Args:
            x: (B, 3, patch, patch) RGB in [0, 255], in the weights' dtype.
            task: name or place; may be left out where there is one.

        Returns:
            (B, 3, s · patch, s · patch) RGB, about [0, 255], where s is `scale(task)`.

        Raises: `ValueError` for other shapes (`forward_chop` takes images) and for tasks that are not here.
        """
        at = self.index(task)
        if tuple(x.shape[1:]) != (3, self.patch, self.patch):
            raise ValueError(
                f"x is {tuple(x.shape)}; accepted: patches (B, 3, {self.patch}, {self.patch}). Images: forward_chop"
            )
        ipt_chop.check_dtype(x, self.sub_mean.weight)
        features = self.head[at](self.sub_mean(x))
        return self.add_mean(self.tail[at](self.body(features, at) + features))  # type: ignore[no-any-return]

    @torch.no_grad()
    def forward_chop(self, x: Tensor, task: int | str | None = None, *, batch: int = 64) -> Tensor:
        """Images as the public code makes them: of overlapping patches, many of them computed more than once.

        Without gradients: patches are trained, by `forward`.

        Args:
            x: (B, 3, H, W) RGB in [0, 255], H and W at least `patch`, in the weights' dtype.
            task: as in `forward`.
            batch: patches at once.

        Returns:
            (B, 3, s · H, s · W) RGB, about [0, 255].

        Raises: as `forward`; `ValueError` for images smaller than a patch and a batch below 1.
        """
        at = self.index(task)
        ipt_chop.check_image(x, self.patch)
        ipt_chop.check_dtype(x, self.sub_mean.weight)
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch is {batch!r}; accepted: 1 or more, a whole number")
        return torch.cat(
            [
                ipt_chop.chopped(lambda patches: self(patches, at), image[None], self.patch, self.scale(at), batch)
                for image in x
            ]
        )

    @torch.no_grad()
    def tiled(
        self,
        x: Tensor,
        task: int | str | None = None,
        *,
        blend: str = "original",
        max_bytes: int = ipt_tiles.MAX_BYTES,
    ) -> Tensor:
        """Images, of overlapping patches that are computed once each, on x's device.

        Without gradients: what they need of all patches would be above any ceiling.

        Args:
            x: (B, 3, H, W) RGB in [0, 255], H and W at least `patch`, in the weights' dtype.
            task: as in `forward`.
            blend: "original" gives what `forward_chop` gives, but for rounding; "smooth" weighs patches by a raised cosine,
                which leaves no seams and is another result.
            max_bytes: about how much memory patches may take at once, the result not counted; one is always computed.

        Returns:
            (B, 3, s · H, s · W) RGB, about [0, 255].

        Raises: as `forward_chop`; `ValueError` for another blend and for a ceiling below 1.
        """
        at = self.index(task)
        ipt_chop.check_image(x, self.patch)
        ipt_chop.check_dtype(x, self.sub_mean.weight)
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes!r}; accepted: 1 or more, a whole number")
        batch = max(1, min(ipt_tiles.MOST, max_bytes // (self._elements_per_patch(at) * x.element_size())))
        return ipt_tiles.tiled(
            lambda patches: self(patches, at), x, self.patch, self.scale(at), blend=blend, batch=batch
        )

    def _elements_per_patch(self, at: int) -> int:
        """About how many numbers the plain forward holds at once for a patch: scores, hidden layers, the tail's features."""
        options: dict[str, Any] = self.config
        features, heads, pixels = options["features"], options["heads"], self.patch**2
        tokens = pixels // CELL**2
        transformer = 20 * pixels * features + 3 * heads * tokens**2
        return max(transformer, (3 * self.scale(at) ** 2 + 2) * pixels * features)  # type: ignore[no-any-return]


# ---- what weights say about their network ---------------------------------------------------------------------------

ANCHORS = ("body.encoder.layers.0.self_attn.in_proj_weight",)
NAMES = r"(sub_mean|add_mean|head|body|tail)\."
PREFIX = ""
FOREIGN = ()


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `IPT`, read off the keys and shapes of a state dict.

    Shapes say neither how many heads an attention has (12 in all released files; give `heads=`) nor what a task that keeps
    the size is for: it is called "x1", but for the six of the file of all tasks (give `tasks=`).

    Raises: `KeyError` with the key that such a network has and this state dict lacks.
    """
    features = state["head.0.0.weight"].shape[0]
    counted = [int(match[1]) for key in state if (match := re.match(r"tail\.(\d+)\.1\.weight$", key))]
    tasks = []
    for i in range(len(counted)):
        first = state.get(f"tail.{i}.0.0.weight")
        grown = 1 if first is None else math.isqrt(first.shape[0] // features)
        tasks.append(f"x{grown**2 if f'tail.{i}.0.2.weight' in state else grown}")
    if not tasks:
        raise KeyError("tail.0.1.weight")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"a tail that enlarges {unknown[0][1:]} times; accepted: 1, 2, 3, 4")
    if len(tasks) == len(_PRETRAINED) and all(
        int(task[1:]) == TASKS[name] for task, name in zip(tasks, _PRETRAINED, strict=True)
    ):
        tasks = [*_PRETRAINED]
    layers = [int(m[1]) for key in state if (m := re.match(r"body\.encoder\.layers\.(\d+)\.norm1\.weight$", key))]
    return {
        "tasks": tuple(tasks),
        "features": features,
        "layers": len(layers),
        "patch": CELL * math.isqrt(state["body.position_encoding.pe.weight"].shape[0]),
        "queries": state["body.query_embed.weight"].shape[0],
    }


def part(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is left of tensors and `config` where `options` name some of the file's tasks, in any order.

    Where they name as many as the file has, they say what its tasks are called, and everything is left.

    Raises: `ValueError` for a task that the file has not, or of which it does not say which one it is.
    """
    wanted, there = options.get("tasks", ()), config["tasks"]
    if isinstance(wanted, str) or not wanted or not set(wanted) <= set(TASKS) or len(wanted) >= len(there):
        return dict(tensors), dict(config)
    if config["queries"] < len(there):
        raise ValueError(f"{config['queries']} embeddings of {len(there)} tasks; accepted: one for each, or more")
    places = []
    for task in wanted:
        name = task if task in there or TASKS[task] != 1 else "x1"
        if there.count(name) != 1:
            own = ", ".join(f"{i}: {name}" for i, name in enumerate(there))
            raise ValueError(
                f"tasks are {tuple(wanted)}; accepted: some of those in the file, or all of them. It has {own}"
            )
        places.append(there.index(name))
    left = {key: tensor for key, tensor in tensors.items() if not re.match(r"(head|tail)\.", key)}
    for at, place in enumerate(places):
        for kind in ("head", "tail"):
            found = (key for key in tensors if key.startswith(f"{kind}.{place}."))
            left |= {f"{kind}.{at}{key.removeprefix(f'{kind}.{place}')}": tensors[key] for key in found}
    left["body.query_embed.weight"] = left["body.query_embed.weight"][places]
    return left, {**config, "tasks": tuple(wanted), "queries": len(wanted)}


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    """How many heads there are, where a file holds the modules."""
    note = modules.get("body.encoder.layers.0.self_attn")
    heads = None if note is None else note.attributes.get("num_heads")
    return {"heads": heads} if isinstance(heads, int) else {}

"""DeepFill where the caller composites: attention for those cells only whose output reaches the hole.

After its attention a DeepFill generator has nothing but convolutions, so each pixel of its output depends on the attention
at few cells. Of an image that is put together as `image · (1 − mask) + output · mask` only the hole is taken from the
output: a cell whose output cannot reach the hole need not be computed, and the composite stays the same.

How far one cell reaches is not read off the layers but measured, with all that a stranger's decoder may contain: a copy of
the generator runs on a small image, the attention's output is replaced by zeros with NaN in one cell, and where the
generator's images are NaN is what depends on that cell, since NaN times zero is NaN. For the released networks this gives
23 pixels around the 8×8 of a cell, which is what their layers say: four 3×3 convolutions at a quarter of the resolution
(4 · 4 pixels), two at half (2 · 2), three at full (3). Layers before or beside the attention do not count.

A measurement holds for every size and place because the layers are the same everywhere. So this is asked, too: that two
cells at different places reach equally far, and that the mask which the attention is given is the caller's, at the image's
size: one that was reduced before may have lost a stroke. Where any of this fails, all cells are computed, and `explain`
says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.runtime.swap import disabled, record_of, swap
from inpaintrt.testing.compare import flat_tensors
from inpaintrt.testing.recipe import image

from .contextual_attention import ContextualAttentionAdapter, Reach, form_of
from .trial import Twin

_SIDE = 96
"""Of the images on which reach is measured: far more than the released networks reach."""


def restrict(modules: Iterable[nn.Module]) -> None:
    """Let accelerated attention modules compute what reaches a composited output; a note in `explain` says what it comes to.

    Args:
        modules: all modules of a model, such as `model.modules()`; the outermost ones are its generators, whose output the
            caller composites.
    """
    modules = list(modules)
    inside = {child for module in modules for child in module.modules() if child is not module}
    for root in (module for module in modules if module not in inside):
        found = [(path, m) for path, m in root.named_modules() if _is_accelerated(m)]
        reach = reach_of(root, found[0][0]) if len(found) == 1 else f"the model has {len(found)} attention modules"
        for _, attention in found:
            _bind(attention, reach)


def _is_accelerated(module: nn.Module) -> bool:
    record = record_of(module)
    return record is not None and isinstance(record.adapter, ContextualAttentionAdapter)


def _bind(attention: nn.Module, reach: Reach | str) -> None:
    record = record_of(attention)
    assert record is not None
    if isinstance(reach, str):
        note = f"composited=True has no effect: {reach}"
        swap(attention, dataclasses.replace(record, note=note))
        return
    beyond = f"{reach.top}, {reach.right}, {reach.bottom} and {reach.left} pixels"
    note = (
        f"composited: only cells whose output reaches the hole are computed; one reaches {beyond} beyond the top, right, "
        f"bottom and left of its {reach.cell}×{reach.cell}"
    )
    swap(attention, dataclasses.replace(record, adapter=ContextualAttentionAdapter(reach), note=note))


def reach_of(generator: nn.Module, path: str) -> Reach | str:
    """How far the output of one cell of the attention at `path` reaches in the generator's images; or why that is unknown.

    The generator is called with image and mask, or with one tensor that holds both, as the ports are.
    """
    twin = Twin(generator)
    mask = (image("probe/hole", 1, 1, _SIDE, _SIDE) > 0.5).float().to(twin.device)
    refused = ""
    for args in _conventions(mask):
        try:
            run = _Run(twin, path, args, None)
        except Exception as error:  # this is not how it is called
            refused = refused or f"{type(error).__name__}: {error}"
            continue
        return _measured(twin, path, args, mask, run)
    return f"the model cannot be called with an image and a mask: {refused}"


def _conventions(mask: Tensor) -> Iterator[tuple[Tensor, ...]]:
    picture = image("probe/image", 1, 3, *mask.shape[2:]).to(mask.device) * 2 - 1
    known, ones = picture * (1 - mask), torch.ones_like(mask)
    joined = torch.cat([known, ones, mask], 1), torch.cat([known, mask], 1)
    yield known, mask
    for x in joined:
        yield x, mask
    for x in joined:
        yield (x,)


class _Run:
    """One forward of a generator's copy: what its attention was given, and what came out.

    Raises where the generator does, or where its attention is not called once.
    """

    def __init__(self, twin: Twin, path: str, args: tuple[Tensor, ...], cell: tuple[int, int] | None) -> None:
        generator = twin.copy(torch.float32)
        calls: list[tuple[Any, ...]] = []

        def replace(module: Any, given: tuple[Any, ...], result: Any) -> Any:
            calls.append(given)
            features, form = given[0], form_of(module)
            assert not isinstance(form, str)
            out, rate = torch.zeros_like(features), form.options["rate"]
            if cell is not None:
                row, column = (rate * n for n in cell)
                out[:, :, row : row + rate, column : column + rate] = torch.nan
            return (out, *result[1:]) if isinstance(result, tuple) else out

        handle = generator.get_submodule(path).register_forward_hook(replace)
        with torch.no_grad(), disabled(), torch.random.fork_rng(devices=[]):
            self.outputs = flat_tensors(generator(*args))
        handle.remove()
        (self.given,) = calls


def _measured(twin: Twin, path: str, args: tuple[Tensor, ...], mask: Tensor, run: _Run) -> Reach | str:
    given = run.given[2] if len(run.given) > 2 else None
    if not isinstance(given, Tensor) or given.shape != mask.shape or not torch.equal(given.to(mask), mask):
        return "its attention is not given the mask itself, at the image's size"
    if any(not bool(t.isfinite().all()) for t in run.outputs):
        return "its outputs are not finite where they are measured"
    form = form_of(twin.copy(torch.float32).get_submodule(path))
    assert not isinstance(form, str)
    grid = run.given[0].shape[2] // form.options["rate"]
    found = {_reach(_Run(twin, path, args, cell).outputs, cell, _SIDE // grid) for cell in _middle(grid)}
    if len(found) > 1:
        return "how far a cell reaches depends on where it is"
    return found.pop()


def _middle(grid: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (grid // 2, grid // 2), (grid // 2 - 1, grid // 2 + 1)


def _reach(outputs: list[Tensor], cell: tuple[int, int], side: int) -> Reach | str:
    """What NaN in one cell, `side` pixels large, makes of a generator's outputs."""
    affected = [t for t in outputs if bool(t.isnan().any())]
    if not affected:
        return "its outputs do not depend on its attention"
    if any(t.dim() != 4 or tuple(t.shape[2:]) != (_SIDE, _SIDE) for t in affected):
        return "an output that is no image depends on its attention"
    spots = torch.stack([t.isnan().flatten(0, 1).any(0) for t in affected]).any(0).nonzero()
    (top, left), (bottom, right) = spots.min(0).values.tolist(), spots.max(0).values.tolist()
    if min(top, left) == 0 or max(bottom, right) == _SIDE - 1:
        return "what comes after its attention depends on all of it"
    first, last = [side * n for n in cell], [side * (n + 1) - 1 for n in cell]
    beyond = (first[0] - top, first[1] - left, bottom - last[0], right - last[1])
    return Reach(side, *(max(0, n) for n in beyond))

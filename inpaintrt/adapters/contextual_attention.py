"""Contextual attention as strangers write it: DeepFill v1 and v2 in all ports, called as (features, features, mask).

These modules have no parameters, at most the identity kernel of their propagation as a buffer, and a few numbers: the
kernel size, rate and softmax scale, whether scores are propagated. What else tells ports apart is in their code only: which
pixels the matching grid takes, how a mask comes down to it and whose mask a batch uses, how keys are normalised, what
becomes of masked keys, what the pasted patches are divided by. Trials find it out (see `trial`). A module that equals none
of the known forms is refused.

Beside its output a module may return a second thing: None, a picture of the attention flow, or the matrix of all weights.
The first is returned as it is, the others are deferred (see `deferred`): computed by the original, with its time and
memory, when somebody reads them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt import ops
from inpaintrt.models.deepfill_layers import ContextualAttention
from inpaintrt.ops.contextual_attention import SPEC, grid_mask, source_index
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.runtime.swap import disabled
from inpaintrt.testing.compare import close_to_truth
from inpaintrt.testing.recipe import image

from .deferred import deferred
from .folding import memory_format_of
from .trial import Twin, Verdicts, same, settings_of

Hops = tuple[tuple[str, int], ...]

# ---- reading: numbers from attributes -------------------------------------------------------------------------------

_NAMES = {
    "patch_size": ("patch_size", "ksize", "kernel_size", "unfold_corr_kernel_size"),
    "stride": ("stride", "unfold_corr_stride"),
    "rate": ("rate",),
    "fuse_size": ("fuse_size", "fuse_k", "fuse_kernel_size"),
    "softmax_scale": ("softmax_scale",),
}
_DEFAULTS: dict[str, Any] = {"patch_size": 3, "stride": 1, "rate": 2, "fuse_size": 3, "softmax_scale": 10.0}


def numbers_of(module: Any) -> dict[str, Any] | None:
    """The numeric options of the op that a module's attributes name; None for what is no contextual attention.

    The evidence: no parameters, and a softmax scale or the size of a propagation kernel.
    """
    if not any(isinstance(getattr(module, name, None), (int, float)) for name in ("softmax_scale", "fuse_k")):
        return None
    if any(True for _ in module.parameters()):
        return None
    found = dict(_DEFAULTS)
    for option, names in _NAMES.items():
        value = next((v for name in names if isinstance(v := getattr(module, name, None), (int, float))), None)
        if value is not None:
            found[option] = type(_DEFAULTS[option])(value)
    scale = getattr(module, "scale", None)
    if not isinstance(getattr(module, "rate", None), int) and isinstance(scale, float) and 0 < scale < 1:
        found["rate"] = round(1 / scale)
    if getattr(module, "fuse", True) is False:
        found["fuse_size"] = 0
    return found


def _propagates_otherwise(module: nn.Module) -> bool:
    """Whether a buffer is something else than the identity kernel. Asked on the CPU only: an answer must not wait for a GPU."""
    return any(t.device.type == "cpu" and not torch.equal(t, _identity(t)) for t in module.buffers())


def _identity(kernel: Tensor) -> Tensor:
    side = kernel.shape[-1] if kernel.dim() else 0
    return torch.eye(side, dtype=kernel.dtype, device=kernel.device).expand_as(kernel) if side else kernel + 1


# ---- the form, found by trials --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Second:
    """What a module returns beside its output, relative to features (B, C, h, w) with L = h·w/rate² cells."""

    kind: str
    """"none", "weights" (B, L, h/rate, w/rate) or "flow" (B, channels, times·h, times·w)."""
    channels: int = 0
    times: int = 1
    channels_last: bool = False

    def like(self, f: Tensor, rate: int) -> Tensor:
        b, _, h, w = f.shape
        grid = (h // rate, w // rate)
        shape = (
            (b, grid[0] * grid[1], *grid)
            if self.kind == "weights"
            else (b, self.channels, self.times * h, self.times * w)
        )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=f.dtype, device="meta").to(memory_format=layout)


@dataclass(frozen=True)
class Form:
    """What a module computes: options of the op, the masks it takes, what it returns."""

    options: Mapping[str, Any]
    masks: Mapping[int, Hops]
    """Pixels of the mask per cell, and how the mask comes down to the cells."""
    takes_none: bool
    rounds_like_linspace: bool
    keeps_channels_last: bool
    second: Second | None
    """None: it returns its output alone."""


_STYLES = tuple(
    dict(zip(("sampling", "norm", "eps", "divisor"), style, strict=True))
    for style in itertools.product(("stride", "tf"), ("max", "sum_eps"), (1e-4, 1e-3), ("const4", "overlap"))
)
_MASKINGS = tuple(
    dict(zip(("mask_mode", "mask_batch"), masking, strict=True))
    for masking in itertools.product(("zero", "neginf"), ("first", "each"))
)
_GRID = (6, 10)


def _judge(module: Any) -> Form | str:
    numbers = numbers_of(module)
    assert numbers is not None
    rate = numbers["rate"]
    if rate < 1 or numbers["patch_size"] % 2 == 0 or numbers["stride"] < 1:
        return f"its numbers are no contextual attention's: {numbers}"
    trial = _Trial(module, rate)
    try:
        plain, _ = trial.run(torch.float64, None)
        takes_none = True
    except Exception as error:  # somebody else's code: it may need a mask, or be called otherwise
        plain, takes_none, why = None, False, f"{type(error).__name__}: {error}"
    down = getattr(module, "n_down", 2)
    sizes = dict.fromkeys((rate * 2 ** (down if isinstance(down, int) else 2), rate, 1))
    runs = {n: run for n in sizes if (run := trial.try_masks(n)) is not None}
    if plain is None and not runs:
        return f"the original cannot run as (features, features, mask): {why}"
    options, masks = trial.fit(numbers, plain, runs)
    if options is None:
        return "it is like contextual attention, but its numbers are none of the known forms'"
    return trial.finish(options, masks, takes_none)


class _Trial:
    """The original's results on small inputs, and the forms that fit them."""

    def __init__(self, module: nn.Module, rate: int) -> None:
        self.twin, self.rate = Twin(module), rate
        size = (2, 3, _GRID[0] * rate, _GRID[1] * rate)
        # Small enough that no softmax has a single winner, and that an epsilon beside a norm is seen.
        self.f, self.b = (
            0.06 * (image(f"probe/{name}", *size) - 0.3).to(self.twin.device) for name in ("query", "key")
        )
        self.b[..., : 4 * rate, : 4 * rate] *= 2e-4

    def mask(self, n: int) -> Tensor:
        """Holes of single pixels, other ones in each sample, which no two ways of sampling see alike."""
        noise = image(f"probe/holes{n}", 2, 1, _GRID[0] * n, _GRID[1] * n)
        return (noise < 0.05).float().to(self.twin.device)

    def run(self, dtype: torch.dtype, mask: Tensor | None, f: Tensor | None = None) -> tuple[Tensor, Any]:
        """(output, all that was returned); raises where the output is not features."""
        f, b = (self.f, self.b) if f is None else (f, self.b if f.shape == self.b.shape else f)
        given = (f.to(dtype), b.to(dtype), *(() if mask is None else (mask.to(dtype),)))
        result = self.twin.run(*given)
        out = result[0] if isinstance(result, (tuple, list)) and len(result) == 2 else result
        if not isinstance(out, Tensor) or out.shape != f.shape:
            raise TypeError(
                f"the result is not features, or a pair of features and something else: {type(result).__name__}"
            )
        return out, result

    def try_masks(self, n: int) -> tuple[Tensor, Tensor] | None:
        """Outputs for masks of n pixels per cell, of few holes and of nothing but a hole; None where it takes no such masks."""
        try:
            few = self.run(torch.float64, self.mask(n))[0]
            return few, self.run(torch.float64, torch.ones_like(self.mask(n)))[0]
        except Exception:  # a size that this module does not take
            return None

    def ours(
        self, options: Mapping[str, Any], mask: Tensor | None = None, hops: Hops | None = None, batch: str = "each"
    ) -> Tensor:
        cells = grid_mask(mask, self.f.shape[2:], self.rate, hops, batch)
        return SPEC.reference(self.f.double(), self.b.double(), cells, **options)  # type: ignore[no-any-return]

    def fit(
        self, numbers: Mapping[str, Any], plain: Tensor | None, runs: Mapping[int, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any] | None, dict[int, Hops]]:
        """The first options that give the original's numbers, and the masks that it takes."""
        for style in _STYLES:
            options = {**numbers, **style}
            if plain is not None and not same(self.ours(options), plain):
                continue
            if not runs:
                return {**options, "mask_mode": "zero", "mask_batch": "each"}, {}
            for masking in _MASKINGS:
                found = {n: hops for n in runs if (hops := self._hops(options, masking, n, runs[n])) is not None}
                if found:
                    return {**options, **masking}, found
        return None, {}

    def _hops(
        self, options: Mapping[str, Any], masking: Mapping[str, str], n: int, expected: tuple[Tensor, Tensor]
    ) -> Hops | None:
        """How a mask of n pixels per cell comes down to the cells; None where no way gives the original's numbers."""
        options, batch = {**options, "mask_mode": masking["mask_mode"]}, masking["mask_batch"]
        for hops in _ways(n, self.rate):
            masks = self.mask(n), torch.ones_like(self.mask(n))
            if all(same(self.ours(options, m, hops, batch), e) for m, e in zip(masks, expected, strict=True)):
                return hops
        return None

    def finish(self, options: dict[str, Any], masks: dict[int, Hops], takes_none: bool) -> Form | str:
        """Whether the op is as accurate in float32, and what the module returns."""
        n = next(iter(masks), None)
        mask = None if n is None else self.mask(n)
        truth, _ = self.run(torch.float64, mask)
        base, result = self.run(torch.float32, mask)
        with launches() as heard, torch.no_grad():
            got = ops.contextual_attention(
                self.f, self.b, mask, **options, mask_sampling=None if n is None else masks[n]
            )
        verdict = close_to_truth(got, truth, base, numerics=numerics_of(heard))
        if not verdict.ok:
            return f"in float32: {verdict.message}"
        nhwc = self.f.contiguous(memory_format=torch.channels_last)
        out, _ = self.run(torch.float32, mask, nhwc)
        if not base.is_contiguous() or not (out.is_contiguous() or out.stride() == nhwc.stride()):
            return "its output is neither contiguous nor channels_last"
        second = self._second(result, base)
        if isinstance(second, str):
            return second
        linspace = options["sampling"] == "tf" and self._rounds_like_linspace(options, masks)
        return Form(options, masks, takes_none, linspace, not out.is_contiguous(), second)

    def _second(self, result: Any, out: Tensor) -> Second | str | None:
        if isinstance(result, Tensor):
            return None
        second = result[1]
        if second is None:
            return Second("none")
        if not isinstance(second, Tensor) or second.dim() != 4:
            return f"it also returns a {type(second).__name__}, which has no deferred form"
        times = second.shape[2] // out.shape[2]
        last = memory_format_of(second) == torch.channels_last
        kinds = [Second("weights", channels_last=last), Second("flow", second.shape[1], times, last)]
        for kind in kinds:
            like = kind.like(out, self.rate)
            if (like.shape, like.stride(), like.dtype) == (second.shape, second.stride(), second.dtype):
                return kind
        return f"it also returns a tensor of {tuple(second.shape)}, which is neither a flow picture nor all weights"

    def _rounds_like_linspace(self, options: Mapping[str, Any], masks: Mapping[int, Hops]) -> bool:
        """Whether ties of TensorFlow's sampling fall as torch.linspace rounds them, at a size where that differs."""
        size = next(n for n in range(2 * self.rate, 4096, self.rate) if _rounded_by_linspace(n, self.rate))
        f = 0.06 * (image("probe/tall", 1, 3, size, 2 * self.rate).to(self.twin.device) - 0.3)
        n = next(iter(masks), None)
        mask = None if n is None else f.new_zeros(1, 1, size // self.rate * n, 2 * n)
        base, _ = self.run(torch.float32, mask, f)
        got = SPEC.reference(f, f, None, **{k: v for k, v in options.items() if k != "mask_batch"})
        return bool((got - base).abs().max() > 1e-3 * base.abs().max())


def _ways(n: int, rate: int) -> Iterator[Hops]:
    """From masks of n pixels per cell to cells: in one hop, or over the size of the features."""
    yield (("stride", n),)
    if n > 1:
        yield (("tf", n),)
    if n > rate > 1 and n % rate == 0:
        for first, second in (("tf", "tf"), ("stride", "tf"), ("tf", "stride")):
            yield ((first, n // rate), (second, rate))


@functools.lru_cache(maxsize=256)
def _rounded_by_linspace(size: int, factor: int) -> bool:
    """Whether linspace takes other rows than TensorFlow does when it reduces `size` by `factor`."""
    rows = (torch.linspace(0, size - 1, size // factor, dtype=torch.float32) + 0.5).floor().int().tolist()
    return rows != list(source_index(size, factor, "tf"))


_verdicts: Verdicts[Form] = Verdicts(_judge)
_defaults = {"rate": 2, "mask_batch": "each", "mask_sampling": ()}


def form_of(module: nn.Module) -> Form | str:
    """The form of a contextual attention; "" for what is none, else a sentence says why there is no form."""
    if isinstance(module, ContextualAttention):  # of our reference networks, which is the op and says so
        options = {**_defaults, **module.options}
        hops, pixels = options.pop("mask_sampling"), 1
        for _, factor in hops:
            pixels *= factor
        return Form(options, {pixels: hops}, True, False, True, None)
    if numbers_of(module) is None:
        return ""
    if not torch.compiler.is_compiling() and _propagates_otherwise(module):
        return "its propagation kernel is not the identity"
    kernels = tuple((tuple(t.shape), t.device.type) for t in module.buffers())
    return _verdicts.of(module, (*settings_of(module), kernels))


# ---- the cells that matter ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """The pixels of the image that depend on one cell's output: its own square of `cell` pixels and so many beyond."""

    cell: int
    top: int
    left: int
    bottom: int
    right: int

    def queries(self, mask: Tensor) -> Tensor:
        """Mask (B, 1, H, W), not 0 = hole → bool (B, 1, H/cell, W/cell), True where a cell's output reaches the hole."""
        hole = F.pad((mask != 0).float(), (self.left, self.right, self.top, self.bottom))
        rows = F.max_pool2d(hole, (self.cell + self.top + self.bottom, 1), (self.cell, 1))
        return F.max_pool2d(rows, (1, self.cell + self.left + self.right), (1, self.cell)) > 0


# ---- adapter --------------------------------------------------------------------------------------------------------


class ContextualAttentionAdapter:
    """A module called as (features, features, mask).

    `reach`: where the caller composites the output, what depends on one cell's output (see `deepfill`); None: all matters.
    """

    name = "deepfill.attention"
    ops: tuple[str, ...] = ("contextual_attention",)
    algorithm = "no L×L matrix"
    deep = False

    def __init__(self, reach: Reach | None = None) -> None:
        self.reach = reach

    def match(self, module: nn.Module) -> str | None:
        form = form_of(module)
        return form if isinstance(form, str) else None

    def forward(self, module: Any, f: Tensor, b: Tensor, mask: Tensor | None = None) -> Any:
        form = form_of(module)
        if isinstance(form, str):
            raise RuntimeError(f"the module was changed after it was accelerated: {form or 'another kind'}")
        n = _pixels_per_cell(f, mask, form.options["rate"])
        out = ops.contextual_attention(
            f, b, mask, **form.options, mask_sampling=form.masks.get(n), queries=self._queries(f, mask, n)
        )
        if not form.keeps_channels_last:
            out = out.contiguous()
        if form.second is None:
            return out
        return out, _second(module, form, f, b, *(() if mask is None else (mask,)))

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        form = form_of(module)
        if isinstance(form, str):
            yield form or "it is no contextual attention any more"
            return
        if len(args) not in (2, 3) or not all(isinstance(t, Tensor) and t.dim() == 4 for t in args[:2]):
            yield "called with other arguments than (features, features, mask)"
            return
        f, b, mask = args if len(args) == 3 else (*args, None)
        yield from _refuses_features(f, b, form.options["rate"])
        yield from _refuses_mask(f, mask, form)
        if form.rounds_like_linspace and torch.compiler.is_compiling():
            yield "ties of its sampling depend on the size, which a compiled graph leaves open"
        elif form.rounds_like_linspace:
            yield from _refuses_sizes(f, mask, form)
        if form.second is not None and form.second.kind != "none":
            if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
                yield "a compiled graph cannot defer its second output; the module that returns none compiles"
            if form.second.kind == "weights" and torch.is_grad_enabled() and (f.requires_grad or b.requires_grad):
                yield "all weights are returned, and gradients may be asked of them"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: `match` has asked both of the probe's questions, for a module that has no weights."""
        yield from ()

    def _queries(self, f: Tensor, mask: Tensor | None, n: int) -> Tensor | None:
        """The cells that can reach the hole; all where the mask does not tell each sample's hole in the image."""
        if self.reach is None or mask is None or n != self.reach.cell or mask.shape[0] != f.shape[0]:
            return None
        return self.reach.queries(mask)


def _pixels_per_cell(f: Tensor, mask: Tensor | None, rate: int) -> int:
    return 0 if mask is None else mask.shape[2] * rate // f.shape[2]


def _refuses_features(f: Tensor, b: Tensor, rate: int) -> Iterator[str]:
    if f.dtype not in (torch.float32, torch.float64) and not torch.is_autocast_enabled(f.device.type):
        yield f"features are {f.dtype}; accepted: float32, float64, and bfloat16 under autocast"
    if (f.shape, f.dtype, f.device) != (b.shape, b.dtype, b.device):
        yield f"the features differ: {tuple(f.shape)} {f.dtype} and {tuple(b.shape)} {b.dtype}"
    if 0 in f.shape or f.shape[2] % rate or f.shape[3] % rate:
        yield f"features of {tuple(f.shape)}: height and width must be multiples of {rate}"


def _refuses_mask(f: Tensor, mask: Any, form: Form) -> Iterator[str]:
    if mask is None:
        if not form.takes_none:
            yield "called without a mask"
        return
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        yield "the mask is not one tensor (B, 1, H, W)"
        return
    n, rate = _pixels_per_cell(f, mask, form.options["rate"]), form.options["rate"]
    if tuple(mask.shape[2:]) != (f.shape[2] // rate * n, f.shape[3] // rate * n) or n not in form.masks:
        known = " or ".join(f"{k}×{k} pixels" for k in form.masks)
        yield f"the mask of {tuple(mask.shape[2:])} has {n} pixels per cell across; this module was proved with {known or 'none'}"
    if form.options["mask_batch"] == "each" and mask.shape[0] != f.shape[0]:
        yield f"{mask.shape[0]} masks for {f.shape[0]} samples"
    if mask.device != f.device:
        yield f"the mask is on {mask.device}, the features on {f.device}"


def _refuses_sizes(f: Tensor, mask: Tensor | None, form: Form) -> Iterator[str]:
    """Against sizes whose sampling has ties that torch.linspace and TensorFlow round differently."""
    hops: list[tuple[Sequence[int], Hops]] = [(f.shape[2:], (("tf", form.options["rate"]),))]
    if mask is not None:
        hops.append((mask.shape[2:], form.masks.get(_pixels_per_cell(f, mask, form.options["rate"]), ())))
    for size, way in hops:
        size = list(size)
        for name, factor in way:
            if name == "tf" and any(_rounded_by_linspace(n, factor) for n in size):
                yield f"at {tuple(size)} this module rounds ties of its sampling otherwise than TensorFlow does"
                return
            size = [n // factor for n in size]


def _second(module: Any, form: Form, f: Tensor, b: Tensor, *mask: Tensor) -> Tensor | None:
    """The module's second output: None, or the original's when it is read, for the inputs as they are now."""
    assert form.second is not None
    if form.second.kind == "none":
        return None
    query = f.detach().clone()
    inputs = (query, query if b is f else b.detach().clone(), *(t.detach().clone() for t in mask))

    def make() -> Tensor:
        with disabled():
            return module.forward(*inputs)[1]  # type: ignore[no-any-return]

    return deferred(form.second.like(f, form.options["rate"]), f.device, make)


ADAPTERS = (ContextualAttentionAdapter(),)

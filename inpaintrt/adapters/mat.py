"""MAT where the caller composites: tiles of the decoders that no pixel of the hole depends on are not computed.

Both decoders end with the known pixels pasted back, and nothing in them looks further than a few pixels (see
`models.mat_sparse`). So a network keeps its own forward, and all that it draws at random stays in its order; while it runs,
its style-modulated convolutions know from the mask which pixels of their results are needed, compute tiles of these, and
leave 0 elsewhere. What such a layer computes, `stylegan2_layers` says.

That what is left out does not matter is asked of a stranger's network, not believed: it runs twice with all layers replaced by
stand-ins that cost nothing (see `_Wiring`), with 0 and with noise in the pixels that are not needed. What every layer of
the encoders is given and what comes out must be the same, bit for bit. That the tiles themselves are right, each convolution's
own trial says.

Only under `composited=True`, although for finite numbers the network's own result is the same at every pixel: NaN or
infinity among known pixels spreads over a dense decoder's neighbourhood and, as 0 · NaN, through the paste, which tiles do
not follow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.models import mat
from inpaintrt.models.mat_layers import Size
from inpaintrt.models.mat_sparse import MARGIN, MARGIN_UP, LevelPlan, Tiles, decoder_plan
from inpaintrt.runtime.swap import Adapter, Record, disabled, record_of, restore_module, swap
from inpaintrt.testing.compare import flat_tensors
from inpaintrt.testing.recipe import image

from . import mat_attention
from .mat_maps import convolved_lazily
from .stylegan2_forms import form_of
from .stylegan2_layers import Form, Layer, layer_of, noise_of, outputs, refuses, style_of, with_noise
from .trial import bare_copy

NAME = "mat.generator"
_TAPS = 4
"""Of the filter around a doubling, for which the margins of tiles are made."""

# ---- what a call needs ----------------------------------------------------------------------------------------------


@dataclass
class Hole:
    """What the maps of one call need, by their size, and what was done.

    Attributes:
        levels: of the decoders; larger maps have no other sizes.
        dense, done: multiply-adds of the convolutions above the smallest maps: all, and those of tiles with their margins.
    """

    levels: dict[tuple[int, ...], LevelPlan]
    dense: int = 0
    done: int = 0
    tiles: set[Size] = field(default_factory=set)

    @staticmethod
    def of(mask: Tensor, levels: int) -> Hole:
        """mask: (B, 1, H, W), **1 = known**; everything else is pasted over, in part at least."""
        return Hole({tuple(level.rgb.shape[2:]): level for level in decoder_plan(mask != 1, levels)})

    def count(self, cost: int, tiles: list[Tiles], pixels: int) -> None:
        """Note a layer's work on each sample, at `cost` multiply-adds for each of a map's pixels."""
        self.dense += cost * pixels * len(tiles)
        self.done += cost * sum(pixels if t.covers_all else t.pixels for t in tiles)
        self.tiles |= {t.sides for t in tiles if not t.covers_all and t.count}

    @property
    def note(self) -> str:
        share = 1 - self.done / self.dense if self.dense else 0.0
        of = f", in tiles of {', '.join(f'{h}×{w}' for h, w in sorted(self.tiles))} pixels" if self.tiles else ""
        return f"composited: the last call skipped {share:.0%} of the decoders' convolutions{of}"


_hole: ContextVar[Hole | None] = ContextVar("inpaintrt_mat_hole", default=None)

# ---- style-modulated convolutions -----------------------------------------------------------------------------------


def style_layer(module: Any) -> Layer | None:
    """A 3×3 convolution in a style, perhaps doubling; None for all else (RGB is not worth tiles: it has three channels)."""
    layer = layer_of(module)
    if layer is None or layer.affine is None or layer.weight.shape[2] != 3 or len(layer.weight) == 3:
        return None
    return layer


def why_not_tiled(module: Any) -> str:
    """Why a layer's tiles would not be its own; "" where they are."""
    layer = style_layer(module)
    form = form_of(module, layer)
    if layer is None or isinstance(form, str):
        return form or "it is no style-modulated convolution"  # type: ignore[return-value]
    if form.down != 1 or form.skips or (form.up == 2 and (layer.taps is None or layer.taps.shape[-1] > _TAPS)):
        return "a layer reads more pixels than margins of tiles have"
    return ""


class TiledConvolution:
    """A style-modulated convolution that computes the needed tiles inside a call that knows them, else what it was.

    `inner`: the adapter that the layer has outside such calls; None: the original.
    """

    name = "mat.tiles"
    ops: tuple[str, ...] = ("modulated_conv2d",)
    deep = False
    named = True

    def __init__(self, inner: Adapter | None) -> None:
        self.inner = inner
        self.algorithm = "tiles that the hole depends on" + (f"; else {inner.algorithm}" if inner else "")

    def match(self, module: nn.Module) -> str | None:
        return why_not_tiled(module) or None

    def forward(self, module: Any, *args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):  # precision="bf16" leaves these layers in float32
            call = _tiled_call(module, args)
            if call is not None:
                return self._tiled(module, args, *call)
        assert self.inner is not None, "refuses() leaves such calls to the original"
        return self.inner.forward(module, *args)

    def _tiled(
        self, module: Any, args: tuple[Any, ...], hole: Hole, needed: Tensor, layer: Layer, form: Form
    ) -> Tensor:
        x, given, up = args[0], layer.takes.given(args), form.up
        noise = noise_of(layer, form, x, given)
        style, gain = style_of(layer, args[1]), float(given.get("gain", 1.0))
        margin = MARGIN_UP if up == 2 else MARGIN
        tiles = [Tiles.cheapest(needed[b : b + 1], margin) for b in range(len(needed))]
        hole.count(layer.weight.numel() // up**2, tiles, needed[0].numel())
        if all(t.covers_all for t in tiles):
            return with_noise(module, layer, form, style, gain, x, noise)
        results = []
        compute = Tiles.convolved if len(tiles) > 1 else convolved_lazily
        for b, own in enumerate(tiles):
            one = slice(b, b + 1)
            apply = functools.partial(with_noise, module, layer, form, style[one], gain)
            over = noise if noise is None or len(noise) == 1 else noise[one]
            results.append(compute(own, apply, x if len(x) == 1 else x[one], over, len(layer.weight), up=up))
        return torch.cat(results) if len(results) > 1 else results[0]

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        if _tiled_call(module, args) is not None:
            return
        if self.inner is None:
            yield "not in a call of the network that skips tiles"
        else:
            yield from self.inner.refuses(module, *args)

    def probe_inputs(self, module: nn.Module) -> Iterator[tuple[Any, ...]]:
        """None: the layer's own trial says what it is."""
        yield from ()


def _tiled_call(module: Any, args: tuple[Any, ...]) -> tuple[Hole, Tensor, Layer, Form] | None:
    """For a call of which tiles are to be computed: what is needed of it, bool (B, 1, H, W), and what the layer is."""
    hole = _hole.get()
    layer = None if hole is None else style_layer(module)
    form = form_of(module, layer)
    if hole is None or layer is None or isinstance(form, str) or next(refuses(module, layer, form, args), ""):
        return None
    x = args[0]
    level = hole.levels.get(tuple(outputs(form, x)))
    if level is None:
        return None
    needed = level.conv0 if form.up == 2 else level.conv1
    return None if len(needed) not in (1, len(x)) else (hole, needed.expand(len(x), -1, -1, -1), layer, form)


# ---- whole networks -------------------------------------------------------------------------------------------------


def is_network(module: Any) -> bool:
    """MAT's two stages under one forward: our `MAT`, the public code's synthesis network."""
    if isinstance(module, mat.MAT):
        return True
    if isinstance(module, mat.Synthesis):
        return False  # its stages are called by the network around it
    first = getattr(module, "first_stage", None)
    parts = getattr(first, "enc_conv", None), getattr(first, "dec_conv", None), getattr(module, "dec", None)
    return all(isinstance(part, nn.Module) for part in parts)


class NetworkAdapter:
    """A network called with (images, masks, …), **mask 1 = known**; its own forward runs, and its layers skip tiles."""

    name = NAME
    ops: tuple[str, ...] = ()
    algorithm = "tiles of the decoders that the hole depends on"
    deep = True
    named = True
    takes_keywords = True

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def match(self, module: nn.Module) -> str | None:
        return None if is_network(module) else ""

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        hole = Hole.of(_argument(module, 1, args, kwargs), self.levels)
        token = _hole.set(hole)
        try:
            result = type(module).__inpaintrt_original__.forward(module, *args, **kwargs)
        finally:
            _hole.reset(token)
        record = record_of(module)
        if record is not None:
            swap(module, dataclasses.replace(record, note=hole.note))
        return result

    def refuses(self, module: Any, *args: Any, **kwargs: Any) -> Iterator[str]:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            yield "which tiles are computed depends on the mask's values, which a compiled graph leaves open"
            return
        x, mask = (_argument(module, n, args, kwargs) for n in (0, 1))
        if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (x, mask)):
            yield "called with other arguments than an image and a mask"
        elif (
            not len(x) or mask.shape != (len(x), 1, *x.shape[2:]) or any(n % (1 << self.levels) for n in mask.shape[2:])
        ):
            yield f"image {tuple(x.shape)}, mask {tuple(mask.shape)}: the network does not take such a pair"
        elif torch.is_autocast_enabled(x.device.type):
            yield "under autocast, in which its layers compute all of their maps"
        elif mask.is_cuda and torch.cuda.is_current_stream_capturing():
            yield "which tiles are computed depends on the mask's values, which a captured graph cannot read"

    def probe_inputs(self, module: nn.Module) -> Iterator[tuple[Any, ...]]:
        """None: `restrict` asks what there is to ask."""
        yield from ()


def _argument(module: Any, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of a network's forward, given by place or by name."""
    original = getattr(type(module), "__inpaintrt_original__", type(module))
    name = original.forward.__code__.co_varnames[1 + position]
    return args[position] if position < len(args) else kwargs.get(name)


def networks(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Those of the modules that `restrict` may restrict."""
    yield from ((path, module) for path, module in modules if is_network(module))


def restrict(network: nn.Module, options: Record) -> str:
    """Let a network leave out what its composited output does not depend on; the reason against it, or "".

    options: of the layers.
    """
    release(network)
    layers = list(_style_layers(network))
    levels = max((_doublings(stage) for stage in _stages(network)), default=0)
    if not levels:
        return "it has no decoder with style-modulated convolutions"
    for layer in layers:
        if why := why_not_tiled(layer):
            return f"a style-modulated convolution: {why}"
    if not isinstance(network, mat.MAT) and (why := _why_not_wired(network, levels)):
        return why
    for layer in layers:
        record = record_of(layer)
        own = options if record is None else record
        swap(layer, dataclasses.replace(own, adapter=TiledConvolution(record.adapter if record else None), note=""))
    # Its own forward runs, in which only layers that are swapped themselves compute otherwise than before.
    swap(network, Record(NetworkAdapter(levels), "auto", "fp32", True, "composited: tiles are skipped"))
    return ""


def release(network: nn.Module) -> None:
    """Undo `restrict`, also where its layers were swapped anew since."""
    for module in network.modules():
        record = record_of(module)
        if record is None or not isinstance(record.adapter, (TiledConvolution, NetworkAdapter)):
            continue
        inner = getattr(record.adapter, "inner", None)
        if inner is None:
            restore_module(module)
        else:
            swap(module, dataclasses.replace(record, adapter=inner))


def _stages(network: Any) -> tuple[Any, Any]:
    synthesis = getattr(network, "synthesis", network)
    return synthesis.first_stage.dec_conv, synthesis.dec


def _doublings(decoder: nn.Module) -> int:
    forms = [form_of(m, style_layer(m)) for m in _style_layers(decoder)]
    return sum(isinstance(form, Form) and form.up == 2 for form in forms)


def _style_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost ones: a layer holds a convolution that would pass for one."""
    for child in module.children():
        if style_layer(child) is None:
            yield from _style_layers(child)
        else:
            yield child


# ---- what is around the layers --------------------------------------------------------------------------------------

_WIDTH = 4
"""Channels of all maps while stand-ins run."""


def _why_not_wired(network: Any, levels: int) -> str:
    """Why what is left out of the decoders may matter in a stranger's network; "" where it does not."""
    size = 64 << len(network.first_stage.enc_conv)
    x, mask = image("probe/image", 1, 3, size, size) * 2 - 1, torch.ones(1, 1, size, size)
    mask[..., size // 3 : size // 2, size // 4 : size // 4 + 9] = 0
    mask[..., -3:, -5:] = 0.5
    hole = Hole.of(mask, levels)
    first = network.first_stage
    style = first.ws_style.weight.shape[1] if isinstance(getattr(first, "ws_style", None), nn.Module) else 1
    ws = image("probe/ws", 1, 64, style) * 2 - 1
    flags = {name: True for name in ("return_stg1",) if name in type(network).forward.__code__.co_varnames}
    try:
        runs = [_Wiring(network, hole, garbage).run(x, mask, ws, **flags) for garbage in (0.0, 1e3)]
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return f"it cannot be run with stand-ins for its layers: {type(error).__name__}: {error}"
    if not all(torch.equal(*pair) for pair in zip(*runs, strict=True)):
        return "what its decoders make outside the hole reaches its encoders or its output"
    return ""


class _Wiring:
    """A copy of a network with stand-ins for its layers: maps of few channels, each pixel of the pixels below it."""

    def __init__(self, network: nn.Module, hole: Hole, garbage: float) -> None:
        self._network = bare_copy(network).cpu().float()
        self._hole, self._garbage = hole, garbage
        self._given: list[Tensor] = []
        inside: set[nn.Module] = set()
        for module in self._network.modules():
            stand_in = None if module in inside else self._stand_in(module)
            if stand_in is not None:
                inside.update(module.modules())
                module.forward = stand_in

    def run(self, *args: Tensor, **flags: bool) -> list[Tensor]:
        """What the layers of the encoders were given, and all that came out."""
        with torch.no_grad(), disabled(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [*flat_tensors(self._network(*args, **flags)), *self._given]

    def _stand_in(self, module: Any) -> Callable[..., Any] | None:
        if mat_attention.block_of(module) is not None:
            return lambda x, size, mask=None: (x, mask)
        if (layer := style_layer(module)) is not None:
            form = form_of(module, layer)
            assert isinstance(form, Form)
            return lambda x, *rest, up=form.up, **options: self._decoded(x, up)
        weight = module._parameters.get("weight")
        if weight is None:
            return None
        if weight.dim() == 5:
            return lambda x, *rest, n=weight.shape[1], **options: x[:, :n]
        if weight.dim() == 4:
            return lambda x, *rest, up=module.up, down=module.down, **options: self._encoded(x, up, down)
        if weight.dim() == 2:
            return lambda x, *rest, n=weight.shape[0], **options: x.mean(-1, keepdim=True).expand(*x.shape[:-1], n)
        return None

    def _encoded(self, x: Tensor, up: int, down: int) -> Tensor:
        self._given.append(x)
        y = nn.functional.avg_pool2d(x.mean(1, keepdim=True), down).expand(-1, _WIDTH, -1, -1)
        return y.repeat_interleave(up, 2).repeat_interleave(up, 3)

    def _decoded(self, x: Tensor, up: int) -> Tensor:
        y = x.repeat_interleave(up, 2).repeat_interleave(up, 3)
        level = self._hole.levels.get(tuple(y.shape[2:]))
        if level is None:
            return y
        noise = image(f"probe/{y.shape[2]}", 1, 1, *y.shape[2:]) * self._garbage
        return torch.where(level.conv0 if up == 2 else level.conv1, y, noise)

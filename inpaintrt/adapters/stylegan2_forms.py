"""Which form of StyleGAN 2's layer a stranger's module has, found by running a copy of it on small images.

Layers of one class differ in width and in the size of their images, not in what they do; one of them is tried, and the
verdict is remembered by the class and those attributes that say neither. Copies have small planes of noise. Weights are
small, so that the ε of the demodulation shows; images are ordinary in one run and large in another, so that a clamp does.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.ops._shared import ACTIVATIONS
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.testing.compare import close_to_truth
from inpaintrt.testing.recipe import image

from .stylegan2_layers import (
    BELOW,
    DRAWN,
    GIVEN,
    HALF,
    NOTHING,
    PICTURE,
    SAME,
    STORED,
    TENSOR,
    Form,
    Layer,
    layer_of,
    styled,
)
from .trial import Twin, Verdicts, same, settings_of

_SIDE = 8
"""Of the images of trials, in pixels, on the larger side of a change of size."""
_FAINT, _STRONG = 2.0**-4, 2.0**12
"""Factors on the weights, and on the images of the second run."""
_SIZES = ("resolution", "res", "size")
"""What copies call the size of the images that a layer is made for."""
_CLAMPS = ("conv_clamp", "clamp")
_UNTOLD_CLAMP = 256.0
_NVIDIA = {"linear": "none", "lrelu": "leaky_relu", "swish": "silu"}
_MODES = ("none", "const", "random")


def form_of(module: Any, layer: Layer | None) -> Form | str:
    """The form of a layer; "" for what is none, else a sentence says why there is no form."""
    return "" if layer is None else _verdicts.of(module, _key(module, layer))


def _key(module: Any, layer: Layer) -> tuple[Any, ...]:
    """What a verdict depends on: class and attributes without widths and sizes, and which tensors there are."""
    held = (layer.bias, layer.taps, layer.affine, layer.noise_strength, layer.noise_const, layer.skip_taps)
    parts = [part for part in module.modules() if part is not layer.affine]  # which is called as it is
    asked = (*map(settings_of, parts), layer.weight.shape, tuple(None if part is None else 0 for part in held))
    if layer.affine is not None:
        asked = (*asked, layer.affine.weight.shape)
    if layer.noise_const is not None:
        asked = (*asked, layer.noise_const.shape)
    found = _keys.get(asked)
    if found is None:
        found = _keys[asked] = _nameless(module, layer, asked)
    return found


_keys: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def _nameless(module: Any, layer: Layer, asked: tuple[Any, ...]) -> tuple[Any, ...]:
    widths = {*layer.weight.shape[:2], *((layer.noise_const.shape[-1],) if layer.noise_const is not None else ())}
    if layer.affine is not None:
        widths.add(layer.affine.weight.shape[1])
    gains = {layer.weight_gain, *(1 / math.sqrt(n) for n in widths)}
    bounds = {vars(module)[name] for name in _CLAMPS if isinstance(vars(module).get(name), (int, float))}

    def nameless(value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value in bounds:
            return "clamp"
        if isinstance(value, int) and value > _SIDE and value in widths:
            return "width"
        return "gain" if isinstance(value, float) and any(math.isclose(value, g) for g in gains) else value

    settings = tuple(tuple(map(nameless, part)) for part in asked if not isinstance(part, torch.Size))
    shape = layer.weight.shape
    return (settings, shape[2], shape[0] <= PICTURE, [*module._modules] == ["blur"])


class _SmallTwin(Twin):
    """A `Twin` with faint weights, made for images of `_SIDE` pixels."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        for part in self._single.modules():
            for name in _SIZES:
                if isinstance(getattr(part, name, None), int) and not isinstance(getattr(part, name), bool):
                    setattr(part, name, _SIDE)
            if part._buffers.get("noise_const") is not None:
                part._buffers["noise_const"] = _picture("stored", _SIDE, _SIDE).to(self.device)
        with torch.no_grad():
            layer_of(self._single).weight.mul_(_FAINT)  # type: ignore[union-attr]

    def run(self, *args: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return super().run(*args)

    def ours(self, form: Form, *args: Any) -> Tensor:
        dtype = args[0].dtype
        twin = self.copy(dtype)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return styled(twin, layer_of(twin), form, args)  # type: ignore[arg-type]


def _picture(name: str, *shape: int) -> Tensor:
    return image(f"probe/stylegan2/{name}", *shape) * 2 - 1


def _judge(module: Any) -> Form | str:
    return _Trial(module).judge()


_verdicts: Verdicts[Form] = Verdicts(_judge)


class _Trial:
    """The runs of one copy. `x` and `style` are float64."""

    def __init__(self, module: Any) -> None:
        self.module, self.twin = module, _SmallTwin(module)
        self.layer: Layer = layer_of(self.twin.copy(torch.float64))  # type: ignore[assignment]
        up = _ratio(module, "up")
        rows = max(1, _SIDE // up)
        columns = rows if self.layer.noise_const is not None or any(hasattr(module, n) for n in _SIZES) else rows + 2
        self.x = self._made("x", 2, self.layer.weight.shape[1], rows, columns)
        affine = self.layer.affine
        self.style = None if affine is None else self._made("style", 2, affine.weight.shape[1])

    def _made(self, name: str, *shape: int) -> Tensor:
        return _picture(name, *shape).to(self.twin.device, torch.float64)

    def args(self, x: Tensor | None = None, **given: Any) -> tuple[Any, ...]:
        """Arguments by position, up to the last that is given."""
        takes = self.layer.takes
        start = [self.x if x is None else x, *(() if self.style is None else (self.style,))]
        if not given:
            return tuple(start)
        usual: dict[str, Any] = dict(zip(takes.names[::-1], takes.defaults[::-1], strict=False))
        last = max(takes.names.index(name) for name in given)
        return (*start, *(given.get(name, usual[name]) for name in takes.names[len(start) : last + 1]))

    def original(self, **given: Any) -> Tensor | None:
        """The original's result; None where it has none for such a call."""
        try:
            found = self.twin.run(*self.args(**given))
        except Exception:  # somebody else's code: in some modes it has no answer
            return None
        return found if isinstance(found, Tensor) else None

    def agrees(self, form: Form, exact: Tensor | None, **given: Any) -> bool:
        return exact is not None and same(self.twin.ours(form, *self.args(**given)), exact)

    def judge(self) -> Form | str:
        for asked in self._ways():
            exact, clamped = self.original(**asked), self.original(**asked, x=self.x * _STRONG)
            if exact is None or clamped is None:
                continue
            for form in self._forms(exact, self._kind(asked)):
                if self.agrees(form, exact, **asked) and self.agrees(form, clamped, **asked, x=self.x * _STRONG):
                    whole = self._completed(form)
                    return self._against_rounding(whole, asked, exact) or whole
        return "it has the parts of a layer of StyleGAN 2, but computes something else"

    # ---- one form ----

    def _ways(self) -> Iterator[dict[str, Any]]:
        """Calls that differ in where noise comes from."""
        names = self.layer.takes.names
        if "noise_mode" in names:
            yield from ({"noise_mode": mode} for mode in _MODES)
            return
        yield {}
        if "noise" in names:
            size = [n * _ratio(self.module, "up") for n in self.x.shape[2:]]
            yield {"noise": self._made("noise", 2, 1, *size)}

    def _kind(self, asked: dict[str, Any]) -> str | None:
        return TENSOR if "noise" in asked else asked.get("noise_mode")

    def _sources(self, kind: str | None) -> tuple[str, ...]:
        return (GIVEN, NOTHING) if kind == TENSOR else (NOTHING, STORED, DRAWN)

    def _forms(self, exact: Tensor, kind: str | None) -> Iterator[Form]:
        """All forms that the tensors and attributes of the layer leave open, likely ones first."""
        layer, module = self.layer, self.module
        ratio = exact.shape[2] / self.x.shape[2] if exact.dim() == 4 else 0.0
        if ratio not in (0.5, 1.0, 2.0) or exact.shape[1] != len(layer.weight):
            return
        up, down = (2 if ratio == 2 else 1), (2 if ratio == 0.5 else 1)
        resampled, modulated = up != down, layer.affine is not None
        sum_of_taps = 1.0 if layer.taps is None or not resampled else float(layer.taps.sum())
        flips = (up > 1, up == 1) if layer.weight.shape[2] > 1 else (False,)
        demodulations = ((True, 1e-8), (True, 0.0), (False, 1e-8)) if modulated else ((False, 1e-8),)
        if layer.skip_taps is not None and not resampled:
            sum_of_taps = float(layer.skip_taps.sum())
        for clamp, biased, source, demodulation, flip, activation in itertools.product(
            _clamps(module), (True, False) if layer.bias is not None else (False,), self._sources(kind), demodulations,
            flips, _activations(module),
        ):  # fmt: skip
            yield Form(
                up, down, flip, *demodulation, biased, activation, clamp, 1.0 if sum_of_taps < 2 else 1 / 4,
                noise=((kind, source),),
            )  # fmt: skip

    def _completed(self, form: Form) -> Form:
        """The form with all that can be asked of the layer besides."""
        noise = []
        for asked in self._ways():
            kind, exact = self._kind(asked), self.original(**asked)
            for source in self._sources(kind) if exact is not None else ():
                if self.agrees(dataclasses.replace(form, noise=((kind, source),)), exact, **asked):
                    noise.append((kind, source))
                    break
        form = dataclasses.replace(form, noise=tuple(noise))
        quiet = next(a for a in self._ways() if any(self._kind(a) == kind for kind, _ in form.noise))
        names = self.layer.takes.names
        if "gain" in names:
            runs: list[dict[str, Any]] = [{"gain": 0.5}, {"gain": 0.5, "x": self.x * _STRONG}]
            scaled = dataclasses.replace(form, scaled=True)
            if all(self.agrees(scaled, self.original(**quiet, **run), **quiet, **run) for run in runs):
                form = scaled
        name = next((name for name in BELOW if name in names), None)
        for kind, share in ((SAME, 1), (HALF, 2)) if name else ():
            below = self._made("below", 2, len(self.layer.weight), *(n // share for n in self.x.shape[2:]))
            picture: dict[str, Any] = {str(name): below, **quiet}
            if kind == HALF and self.layer.skip_taps is None:
                continue
            if self.agrees(form, self.original(**picture), **picture):
                form = dataclasses.replace(form, skips=form.skips | {kind})
        return form

    def _against_rounding(self, form: Form, asked: dict[str, Any], exact: Tensor) -> str:
        """Whether the fused form is as accurate in float32: the sentence against it, or an empty string."""
        single = tuple(a.float() if isinstance(a, Tensor) else a for a in self.args(**asked))
        base = self.twin.run(*single)
        with launches() as heard:
            got = self.twin.ours(form, *single)
        if got.stride() != base.stride():
            return f"its result has strides {base.stride()}"
        verdict = close_to_truth(got, exact, base, numerics=numerics_of(heard))
        return "" if verdict.ok or DRAWN in dict(form.noise).values() else f"in float32: {verdict.message}"


def _ratio(module: Any, name: str) -> int:
    """An attribute `up` or `down` of a layer or of its convolution, which may be a number or a bool."""
    for part in (module, getattr(module, "conv", None)):
        for spelling in (name, f"{name}sample"):
            found = getattr(part, spelling, None)
            if isinstance(found, int):
                return 2 if found in (True, 2) and (found == 2 or isinstance(found, bool)) else 1
    return 1


def _clamps(module: Any) -> tuple[str | float | None, ...]:
    for name in _CLAMPS:
        if name in vars(module):
            return (None if getattr(module, name) is None else name,)
    return None, _UNTOLD_CLAMP


def _activations(module: Any) -> tuple[str, ...]:
    told = getattr(module, "activation", None)
    if not isinstance(told, str):
        return "leaky_relu", "none"
    name = _NVIDIA.get(told, told)
    return (name,) if name in ACTIVATIONS else ()

"""AOT-GAN as strangers write it: blocks of dilated convolutions with a gate, and whole generators.

$$ x + (\\mathrm{fuse} - x) \\cdot \\sigma\\!\\left(10 \\frac{\\mathrm{gate} - \\mu}{s + \\varepsilon} - 5\\right) $$

A block is read into its convolutions, each with the padding layer before it and the ReLU after it: several branches, whose
outputs lie side by side in what `fuse` reads, and `gate`. What the block then does with these two is in its code only, and
found by trials (see `trial`); on an image of almost no contrast the ε that it adds to the deviation shows.

A generator is three stages in a row: convolutions; blocks; convolutions, before each of which but the last the size is
doubled (bilinear, corners on corners); then tanh. That, and the order of image and mask, is in its code, too: the probe
compares the whole.

What is done: reflection is read by index where the convolution has a kernel, ReLU and tanh are done by the convolution that
they follow, the gate's dozen passes over memory are one op. A generator runs channels-last inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt import ops
from inpaintrt.testing.recipe import image

from .engine import convolved
from .ffc import Rule, first_broken, refuses_padding, refuses_tensor
from .folding import memory_format_of
from .gated import Geometry
from .trial import Twin, Verdicts, same, settings_of

T = TypeVar("T")

# ---- reading: modules by role ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution with the padding layer before it (or None) and whether a ReLU follows."""

    conv: Any
    pad: Any
    relu: bool

    @property
    def geometry(self) -> Geometry:
        conv = self.conv
        if self.pad is None:
            return Geometry(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
        return Geometry(conv.kernel_size, conv.stride, self.pad.padding[:2], conv.dilation, "reflect")


def layers_of(module: Any) -> list[Layer] | str:
    """The convolutions of what runs its parts in order; a sentence where it has parts of another kind."""
    found: list[Layer] = []
    pad = None
    for part in _parts(module):
        if isinstance(part, nn.ReflectionPad2d) and pad is None:
            pad = part
        elif isinstance(part, nn.Conv2d):
            found.append(Layer(part, pad, relu=False))
            pad = None
        elif isinstance(part, nn.ReLU) and found and pad is None and not found[-1].relu:
            found[-1] = dataclasses.replace(found[-1], relu=True)
        else:
            return f"it has a {type(part).__name__} among its convolutions"
    return found if pad is None else "it has a padding layer that no convolution follows"


def _parts(module: Any) -> Iterator[Any]:
    """Modules without children, in the order of their registration; identities are left out."""
    children = list(module.children())
    for child in children:
        yield from _parts(child)
    if not children and not isinstance(module, nn.Identity):
        yield module


@dataclass(frozen=True)
class Block:
    branches: list[Layer]
    fuse: Layer
    gate: Layer

    @property
    def layers(self) -> list[Layer]:
        return [*self.branches, self.fuse, self.gate]

    @property
    def width(self) -> int:
        return int(self.gate.conv.in_channels)


def block_of(module: Any) -> Block | str | None:
    """None for what is no AOT block; a sentence for one of which a part cannot be read."""
    children = dict(module.named_children())
    if "fuse" not in children or "gate" not in children:
        return None
    fuse, gate = children.pop("fuse"), children.pop("gate")
    if set(children) == {"blocks"} and isinstance(children["blocks"], nn.ModuleList):
        branches = list(children["blocks"])
    elif all(name.startswith("block") and name[5:].isdigit() for name in children):
        branches = list(children.values())
    else:
        return None
    found: list[Layer] = []
    for part in (*branches, fuse, gate):
        layers = layers_of(part)
        if isinstance(layers, str):
            return layers
        if len(layers) != 1:
            return f"one of its branches has {len(layers)} convolutions"
        found += layers
    return Block(found[:-2], found[-2], found[-1]) if branches else None


@dataclass(frozen=True)
class Generator:
    encoder: list[Layer]
    blocks: list[tuple[Any, Block | str | None]]
    """Modules, and what they were read into."""
    decoder: list[Layer]

    @property
    def stride(self) -> int:
        product = 1
        for layer in self.encoder:
            product *= layer.conv.stride[0]
        return product

    @property
    def last(self) -> Any:
        return self.decoder[-1].conv


def generator_of(module: Any) -> Generator | str | None:
    """None for what is no AOT-GAN generator; a sentence for one of which a part cannot be read."""
    stages = dict(module.named_children())
    encoder, decoder = stages.pop("encoder", None), stages.pop("decoder", None)
    if encoder is None or decoder is None or len(stages) != 1:
        return None
    (middle,) = stages.values()
    blocks = _blocks(middle)
    if not blocks:
        return None
    before, after = layers_of(encoder), layers_of(decoder)
    for stage, layers in (("encoder", before), ("decoder", after)):
        if isinstance(layers, str) or not layers:
            return f"its {stage}: {layers or 'it has no convolution'}"
    return Generator(before, blocks, after)  # type: ignore[arg-type]


def _blocks(stage: Any) -> list[tuple[Any, Block | str | None]]:
    """The children of a stage, or of what is alone in it, where all of them are blocks."""
    children = list(stage.children())
    blocks = [(child, block_of(child)) for child in children]
    if all(block is not None for _, block in blocks):
        return blocks
    return _blocks(children[0]) if len(children) == 1 else []


# ---- rules ----------------------------------------------------------------------------------------------------------


def _is_plain(layer: Layer) -> bool:
    conv = layer.conv
    square = all(
        isinstance(v, tuple) and len({*v}) == 1 for v in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    )
    alone = layer.pad is None or (len({*layer.pad.padding}) == 1 and conv.padding == (0, 0))
    return conv.groups == 1 and square and alone


def _keeps_size(layer: Layer) -> bool:
    g = layer.geometry
    return g.stride[0] == 1 and 2 * g.padding[0] == g.dilation[0] * (g.kernel_size[0] - 1)


LAYER_RULES: tuple[Rule, ...] = (
    (
        lambda part: all(map(_is_plain, part.layers)),
        "its convolutions are grouped, not square, or padded in more than one way",
    ),
)
BLOCK_RULES: tuple[Rule, ...] = (
    *LAYER_RULES,
    (lambda b: all(map(_keeps_size, b.layers)), "its convolutions change the size"),
    (
        lambda b: (
            {layer.conv.in_channels for layer in b.branches} == {b.width}
            and b.fuse.conv.in_channels == sum(layer.conv.out_channels for layer in b.branches)
            and b.fuse.conv.out_channels == b.gate.conv.out_channels == b.width
        ),
        "the widths of its convolutions do not fit together",
    ),
)


def why_not_generator(generator: Generator | str | None) -> str | None:
    """None for what can be swapped, "" for what is none at all, else the reason."""
    if generator is None or isinstance(generator, str):
        return generator or ""
    if not all(map(_is_plain, (*generator.encoder, *generator.decoder))):
        return LAYER_RULES[0][1]
    for i, (module, block) in enumerate(generator.blocks):
        if isinstance(form := form_of(module, block), str):
            return f"block {i}: {form}"
    return None


# ---- what a block does with its gate, found by trials ---------------------------------------------------------------

_EPS = (1e-9, 1e-8, 1e-5, 1e-6, 1e-12, 0.0)
_FAINT = 1e-9
"""The contrast at which these differ."""


def _judge(module: Any) -> float | str:
    """The ε of a block."""
    twin, block = Twin(module), _read(block_of(module))
    inputs = [x.to(twin.device).double() for x in (probe_input(block), probe_input(block) * _FAINT)]
    try:
        exact = [twin.run(x) for x in inputs]
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    fresh = _read(block_of(twin.copy(torch.float64)))
    with torch.no_grad():
        mixed = [fuse_and_gate(fresh, x) for x in inputs]
        for eps in _EPS:
            ours = (ops.aot_gate(x, *both, eps=eps) for x, both in zip(inputs, mixed, strict=True))
            if all(map(same, ours, exact)):
                return eps
    return "it has the parts of an AOT block, but does not compute x + (fuse − x)·σ(10·(gate − mean)/(std + eps) − 5)"


_verdicts: Verdicts[float] = Verdicts(_judge)


def form_of(module: Any, block: Block | str | None) -> float | str:
    """The ε of a module that was read into `block`; "" for what is none, else a sentence says why it has no fused form."""
    if block is None or isinstance(block, str):
        return block or ""
    if why := first_broken(BLOCK_RULES, block):
        return why
    parts = tuple((type(layer.conv), layer.geometry, layer.relu, layer.conv.bias is None) for layer in block.layers)
    return _verdicts.of(module, (*settings_of(module), parts))


def probe_input(block: Block) -> Tensor:
    """(1, C, h, w), large enough for the padding."""
    side = 1 + max(layer.geometry.padding[0] for layer in block.layers)
    return image("probe/aot", 1, block.width, max(side, 5), max(side, 5) + 1) * 4 - 2


# ---- the fused forms ------------------------------------------------------------------------------------------------


def applied(layer: Layer, x: Tensor, act: tuple[str, None] | None = None) -> Tensor:
    """A convolution with its padding and activation."""
    return convolved(layer.geometry, x, layer.conv.weight, layer.conv.bias, ("relu", None) if layer.relu else act)


def fuse_and_gate(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a block mixes x with, and the gate before its normalisation; in the dtype of x."""
    branches = torch.cat([applied(branch, x) for branch in block.branches], dim=1)
    return applied(block.fuse, branches).to(x.dtype), applied(block.gate, x).to(x.dtype)


def aot_block(block: Block, eps: float, x: Tensor) -> Tensor:
    return ops.aot_gate(x, *fuse_and_gate(block, x), eps=eps)


# ---- what a call cannot have ----------------------------------------------------------------------------------------


def _refuses_layers(layers: Sequence[Layer], size: Sequence[int]) -> Iterator[str]:
    """Against sizes that are too small for layers which keep the size."""
    for layer in layers:
        yield from refuses_padding(layer.geometry, size)
    if min(size) < 1:
        yield f"the input of {tuple(size)} has no pixel"


def _outputs(geometry: Geometry, size: Sequence[int]) -> tuple[int, ...]:
    reach = geometry.dilation[0] * (geometry.kernel_size[0] - 1) + 1
    return tuple((n + 2 * geometry.padding[0] - reach) // geometry.stride[0] + 1 for n in size)


def _conventions(module: Any) -> tuple[int, ...]:
    """With how many tensors a generator is called: one that holds image and mask, or both; the first is to be probed first."""
    original = getattr(type(module), "__inpaintrt_original__", type(module))
    code = original.forward.__code__
    names = code.co_varnames[1 : code.co_argcount]
    required = len(names) - len(original.forward.__defaults__ or ())
    if required == 2:
        return (2,)
    return (1, 2) if len(names) > 1 and "mask" in names[1] else (1,)


# ---- adapters -------------------------------------------------------------------------------------------------------
# Each reads its module again on every call and holds it against the rules: a child that was replaced since counts.


class GeneratorAdapter:
    """A whole generator: (image, mask), or both in one tensor, → image."""

    name = "aotgan.generator"
    ops: tuple[str, ...] = ("fused_conv2d", "aot_gate")
    algorithm = "reflection, activations and gates fused, 3×3 by Winograd F(4×4) on CPU; channels-last inside"
    deep = True

    def match(self, module: nn.Module) -> str | None:
        return why_not_generator(generator_of(module))

    def forward(self, module: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        generator = _read(generator_of(module))
        y = x if mask is None else torch.cat([x, mask], dim=1)
        # A convolution's output is channels-last where its input or its weight is.
        formats = memory_format_of(y), memory_format_of(generator.last.weight)
        y = y.contiguous(memory_format=torch.channels_last)
        for layer in generator.encoder:
            y = applied(layer, y)
        for part, block in generator.blocks:
            y = aot_block(_read(block), _read(form_of(part, block)), y)
        *before, last = generator.decoder
        for layer in before:
            y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=True)  # what it is made of can go
            y = applied(layer, y)
        y = applied(last, y, ("tanh", None))
        layout = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
        return y.contiguous(memory_format=layout)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        found = generator_of(module)
        if (why := why_not_generator(found)) is not None:
            yield why or "it is no AOT-GAN generator any more"
            return
        generator = _read(found)
        given = args[:1] if len(args) == 2 and args[1] is None else args
        if len(given) not in _conventions(module):
            yield "called with other arguments than image and mask"
            return
        first, x = generator.encoder[0].conv, given[0]
        yield from refuses_tensor(x, first.weight, first.in_channels - len(given[1:]))
        size = tuple(x.shape[2:])
        if any(_kind(plane) != (x.dtype, x.device, (len(x), 1, *size)) for plane in given[1:]):
            yield "the mask is not (B, 1, H, W) in the image's dtype"
        if any(n % generator.stride for n in size):
            yield f"the size {size} is not a multiple of {generator.stride}"
        for layer in generator.encoder:
            yield from _refuses_layers([layer], size)
            size = _outputs(layer.geometry, size)
        for _, block in generator.blocks:
            yield from _refuses_layers(_read(block).layers, size)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        generator = _read(generator_of(module))
        reach = max(layer.geometry.padding[0] for _, block in generator.blocks for layer in _read(block).layers)
        side = generator.stride * (1 + max(reach, 1))
        inputs = generator.encoder[0].conv.in_channels
        picture = image("probe/image", 1, inputs - 1, side, side + generator.stride) * 2 - 1
        mask = (image("probe/mask", 1, 1, *picture.shape[2:]) > 0.5).float()
        for count in _conventions(module):
            yield (torch.cat([picture, mask], 1),) if count == 1 else (picture, mask)


class BlockAdapter:
    """One block, x → x."""

    name = "aotgan.block"
    ops: tuple[str, ...] = ("fused_conv2d", "aot_gate")
    algorithm = "reflection and activations fused, 3×3 by Winograd F(4×4) on CPU, one op for normalisation and gate"
    deep = False

    def match(self, module: nn.Module) -> str | None:
        form = form_of(module, block_of(module))
        return form if isinstance(form, str) else None

    def forward(self, module: Any, x: Tensor) -> Tensor:
        block = block_of(module)
        return aot_block(_read(block), _read(form_of(module, block)), x)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        found = block_of(module)
        if isinstance(form := form_of(module, found), str):
            yield form or "it is no AOT block any more"
            return
        block = _read(found)
        x = args[0] if len(args) == 1 else None
        yield from refuses_tensor(x, block.gate.conv.weight, block.width)
        yield from _refuses_layers(block.layers, x.shape[2:])  # type: ignore[union-attr]

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        block = _read(block_of(module))
        side = max(13, 1 + max(layer.geometry.padding[0] for layer in block.layers))  # 13: enough tiles for Winograd
        yield (image("probe/aot", 1, block.width, side, side + 1) * 4 - 2,)


def _kind(t: Any) -> tuple[Any, ...]:
    return (t.dtype, t.device, tuple(t.shape)) if isinstance(t, Tensor) else ()


def _read(found: T | str | None) -> T:
    """What `match` accepted."""
    if found is None or isinstance(found, str):
        raise RuntimeError(f"the module was changed after it was accelerated: {found or 'another structure'}")
    return found


ADAPTERS = (GeneratorAdapter(), BlockAdapter())

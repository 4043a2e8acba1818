"""DeepFill's two-stage network, of which v1 and v2 are settings; see `deepfill_v1` and `deepfill_v2`.

Stage 1 completes the image coarsely. Stage 2 reads that with the known pixels put back, in two branches: one of dilated
convolutions, and one that fills the hole with patches of the background by contextual attention; a decoder takes both.
Every port has these 42 convolutions under names of its own: here they have the original's (conv1 … conv17, xconv1 …,
pmconv1 …, allconv11 …), and a layout says where each one lies in a port's tree of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .deepfill_layers import (
    ContextualAttention,
    ConvLayer,
    GatedConv,
    SpectralNorm,
    SplitGatedConv,
    Upsampled,
    convolution,
    upsample,
)
from .making import only_known


@dataclass(frozen=True, kw_only=True)
class DeepFillOptions:
    """What differs between public ports. A port is a preset of these; the defaults are the most frequent values.

    Attributes:
        layout: of the state dict, a key of `LAYOUTS`.
        width: channels after the first layer (after gating); 4·width are matched.
        decoder_width: the same unit for the decoder of stage 2; None for `width`.
        gate: "none" (v1), "one" convolution for features and gates, or "two".
        gated_rgb: gate the two layers that give an image, too.
        spectral_norm: on the upsampling layers (gate "two" only).
        padding: of every convolution: "zeros", "reflect", or "tf" (TensorFlow's "SAME").
        match_activation: of the layer before the attention, "relu" or "elu"; the others are "elu".
        bounded: how both images are brought to [-1, 1], by "tanh" or by "clip".
        known_range: of the values of known pixels.
        hole_value: of pixels under the hole in the input.
        fills_hole: the network itself puts `hole_value` under the mask; else its caller has done so.
        ones: the input has a channel of ones between image and mask.
        mask_to_stage2: stage 2 gets the additional channels of the input, too, not the image alone.
        sampling: which pixels attention matches, "stride" or "tf", also for the mask.
        mask_hops: 2 for a mask reduced first to the features' size, then to the matching grid. Only "tf" sees a difference.
        mask_batch: "first" matches the whole batch under the first sample's mask, as most ports do, "each" under its own.
        norm, mask_mode, divisor: of `ops.contextual_attention`.
        fuse_size: cells over which scores are propagated; 0 for no propagation.
        stride: only every stride-th patch of the background, down and across, is offered to the softmax.
        rate: reduction before matching; the number of scores falls with its fourth power. The fast kernels are for 2.
    """

    layout: str
    width: int = 24
    decoder_width: int | None = None
    gate: Literal["none", "one", "two"] = "one"
    gated_rgb: bool = False
    spectral_norm: bool = False
    padding: Literal["zeros", "reflect", "tf"] = "zeros"
    match_activation: Literal["relu", "elu"] = "relu"
    bounded: Literal["tanh", "clip"] = "tanh"
    known_range: tuple[float, float] = (-1.0, 1.0)
    hole_value: float = 0.0
    fills_hole: bool = False
    ones: bool = True
    mask_to_stage2: bool = False
    sampling: Literal["stride", "tf"] = "stride"
    mask_hops: Literal[1, 2] = 1
    mask_batch: Literal["first", "each"] = "first"
    norm: Literal["max", "sum_eps"] = "max"
    mask_mode: Literal["zero", "neginf"] = "zero"
    divisor: Literal["const4", "overlap"] = "const4"
    fuse_size: int = 3
    stride: int = 1
    rate: int = 2

    @property
    def attention(self) -> dict[str, Any]:
        """Keyword arguments of `ops.contextual_attention`."""
        hops = (4, self.rate) if self.mask_hops == 2 else (4 * self.rate,)
        names = ("stride", "rate", "fuse_size", "sampling", "mask_batch", "norm", "mask_mode", "divisor")
        return {**{n: getattr(self, n) for n in names}, "mask_sampling": tuple((self.sampling, n) for n in hops)}


# ---- layers and where ports keep them -------------------------------------------------------------------------------

COARSE = tuple(f"conv{n}" for n in range(1, 18))
REFINE = tuple(f"xconv{n}" for n in range(1, 11))
MATCH = tuple(f"pmconv{n}" for n in range(1, 7))
MATCHED = ("pmconv9", "pmconv10")
COMBINE = tuple(f"allconv{n}" for n in range(11, 18))
ATTENTION = "attention"


class Layer(NamedTuple):
    """A convolution of the original: its number says what it does."""

    branch: str
    number: int
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        return f"{self.branch}conv{self.number}"

    @property
    def kernel(self) -> int:
        return 5 if self.number == 1 else 3

    @property
    def stride(self) -> int:
        return 2 if self.number in (2, 4) else 1

    @property
    def dilation(self) -> int:
        return 1 << self.number - 6 if 7 <= self.number <= 10 and self.branch != "pm" else 1

    @property
    def upsamples(self) -> bool:
        return self.number in (13, 15)

    @property
    def gives_image(self) -> bool:
        return self.number == 17


def layers(options: DeepFillOptions) -> Iterator[Layer]:
    """The 42 convolutions with their channels (after gating)."""
    wide, inputs = options.width, 4 + options.ones
    last = options.decoder_width or wide
    inputs2 = inputs if options.mask_to_stage2 else 3

    def chain(branch: str, numbers: list[int], channels: int, widths: list[int]) -> Iterator[Layer]:
        for number, width in zip(numbers, widths, strict=True):
            yield Layer(branch, number, channels, width)
            channels = width

    def decoder(unit: int) -> list[int]:
        return [4 * unit, 4 * unit, 2 * unit, 2 * unit, unit, unit // 2, 3]

    yield from chain("", [*range(1, 18)], inputs, [n * wide for n in (1, 2, 2, *[4] * 7)] + decoder(wide))
    yield from chain("x", [*range(1, 11)], inputs2, [n * wide for n in (1, 1, 2, 2, *[4] * 6)])
    yield from chain("pm", [*range(1, 7), 9, 10], inputs2, [n * wide for n in (1, 1, 2, *[4] * 5)])
    yield from chain("all", [*range(11, 18)], 8 * wide, decoder(last))


def _flat(name: str) -> str:
    """The original's full name: conv2_downsample, conv7_atrous, conv13_upsample."""
    branch, _, number = name.rpartition("conv")
    kinds = {2: "_downsample", 4: "_downsample", 13: "_upsample", 15: "_upsample"}
    if branch != "pm":
        kinds |= dict.fromkeys(range(7, 11), "_atrous")
    return name + kinds.get(int(number), "")


def _nip_tf() -> dict[str, str]:
    return {
        **{name: _flat(name) for name in (*COARSE, *REFINE, *MATCH)},
        ATTENTION: "contextual_attention",
        **{name: _flat(name) for name in (*MATCHED, *COMBINE)},
    }


def _nip() -> dict[str, str]:
    """Blocks of two layers around each change of size."""
    down = [f"down_block{n}.{part}" for n in (1, 2) for part in ("conv1_downsample", "conv2")]
    up = [f"up_block{n}.{part}" for n in (1, 2) for part in ("conv1_upsample", "conv2")]
    coarse = ["conv1", *down, *(f"conv_bn{n}" for n in range(1, 8)), *up, "conv_to_rgb"]
    refine = ["conv1", *down, *(f"conv_bn{n}" for n in range(1, 6))]
    match = ["conv1", *down, "conv_bn1"]
    combine = ["conv_bn6", "conv_bn7", *up, "conv_to_rgb"]
    return {
        **dict(zip(COARSE, (f"stage1.{part}" for part in coarse), strict=True)),
        **dict(zip(REFINE, (f"stage2.conv_{part}" for part in refine), strict=True)),
        **dict(zip(MATCH, (f"stage2.ca_{part}" for part in match), strict=True)),
        ATTENTION: "stage2.contextual_attention",
        **dict(zip(MATCHED, ("stage2.ca_conv_bn4", "stage2.ca_conv_bn5"), strict=True)),
        **dict(zip(COMBINE, (f"stage2.{part}" for part in combine), strict=True)),
    }


def _mma() -> dict[str, str]:
    """Encoder, neck of dilated layers, decoder; registered in another order than they run."""
    encoder = [f"enc{n}" for n in range(1, 7)]
    neck = [f"dilation_neck.dilation_convs.{n}" for n in range(4)]
    decoder = [f"decoder.dec{n}" for n in range(1, 8)]
    attention = "stage2.contextual_attention_neck"
    return {
        **dict(zip(COARSE[:6], (f"stage1.encoder.{part}" for part in encoder), strict=True)),
        **dict(zip(COARSE[10:], (f"stage1.{part}" for part in decoder), strict=True)),
        **dict(zip(COARSE[6:10], (f"stage1.{part}" for part in neck), strict=True)),
        **dict(zip(MATCH, (f"stage2.encoder_attention.{part}" for part in encoder), strict=True)),
        **dict(zip(REFINE[:6], (f"stage2.encoder_conv.{part}" for part in encoder), strict=True)),
        ATTENTION: f"{attention}.contextual_attention",
        **dict(zip(MATCHED, (f"{attention}.conv1", f"{attention}.conv2"), strict=True)),
        **dict(zip(REFINE[6:], (f"stage2.{part}" for part in neck), strict=True)),
        **dict(zip(COMBINE, (f"stage2.{part}" for part in decoder), strict=True)),
    }


def _csq() -> dict[str, str]:
    """Sequences of layers by number."""
    parts = {"coarse": COARSE, "refine_conv": REFINE, "refine_atten_1": MATCH, "refine_atten_2": MATCHED,
             "refine_combine": COMBINE}  # fmt: skip
    paths = {name: f"{part}.{n}" for part, names in parts.items() for n, name in enumerate(names)}
    return {**paths, ATTENTION: "context_attention"}


def _daa() -> dict[str, str]:
    """The original's names without `_upsample`, and without x in the second stage."""
    paths = {name: _flat(name).removesuffix("_upsample") for name in (*COARSE, *REFINE, *MATCH, *MATCHED, *COMBINE)}
    return {
        **{name: f"coarse_generator.{paths[name]}" for name in COARSE},
        **{name: f"fine_generator.{paths[name].removeprefix('x')}" for name in (*REFINE, *MATCH)},
        ATTENTION: "fine_generator.contextul_attention",
        **{name: f"fine_generator.{paths[name]}" for name in (*MATCHED, *COMBINE)},
    }


class Layout(NamedTuple):
    """Where a port keeps the layers: paths in the order of its state dict, and what it wraps them in."""

    paths: Callable[[], dict[str, str]]
    upsampled: str | None = None
    """The child that holds the layer in a module that upsamples; None where layers stand for themselves."""
    conv_layers: bool = False
    """The convolution of a gated layer is itself inside a module, under the same name `conv`."""
    identity: str | None = None
    """The attention's buffer."""


LAYOUTS = {
    "nip": Layout(_nip, upsampled="conv", identity="fuse_weight"),
    "nip_tf": Layout(_nip_tf, upsampled="conv"),
    "mma": Layout(_mma, conv_layers=True, identity="fuse_kernel"),
    "csq": Layout(_csq, upsampled="gated_conv2d"),
    "daa": Layout(_daa),
}


def _built(layer: Layer, options: DeepFillOptions, layout: Layout) -> nn.Module:
    activation = options.match_activation if layer.name == MATCH[-1] else "none" if layer.gives_image else "elu"
    gate = options.gate if options.gated_rgb or not layer.gives_image else "none"

    def conv(outputs: int) -> nn.Conv2d:
        return convolution(layer.inputs, outputs, layer.kernel, layer.stride, layer.dilation, options.padding)

    if gate == "two":
        two: list[nn.Module] = [conv(layer.outputs), conv(layer.outputs)]
        if options.spectral_norm and layer.upsamples:
            two = [SpectralNorm(part) for part in two if isinstance(part, nn.Conv2d)]
        built: nn.Module = SplitGatedConv(two[0], two[1], activation)
    elif gate == "one":
        one = conv(2 * layer.outputs)
        built = GatedConv(ConvLayer(one, "none") if layout.conv_layers else one, activation)
    else:
        built = ConvLayer(conv(layer.outputs), activation)
    return Upsampled(layout.upsampled, built) if layer.upsamples and layout.upsampled else built


# ---- the network ----------------------------------------------------------------------------------------------------


class DeepFill(nn.Module):
    """Both versions; use `DeepFillV1` or `DeepFillV2`.

    Args:
        port: whose weights it takes and whose numbers it gives, a key of `PORTS`.
        options: of `DeepFillOptions`, in place of the port's.

    Attributes:
        size_multiple, min_size: what height and width must be.
        config: the arguments that make this network.
    """

    PORTS: ClassVar[Mapping[str, DeepFillOptions]]

    def __init__(self, port: str, **options: Any) -> None:
        super().__init__()
        if port not in self.PORTS:
            raise ValueError(f"port is {port!r}; accepted: {', '.join(self.PORTS)}")
        only_known(type(self), options, DeepFillOptions)
        self.options = _checked(replace(self.PORTS[port], **options))
        self.config = {"port": port, **asdict(self.options)}
        self.size_multiple = 4 * self.options.rate
        # Reflection by 16 pixels needs more than 16 at a quarter of the resolution.
        smallest = 68 if self.options.padding == "reflect" else 1
        self.min_size = -(-smallest // self.size_multiple) * self.size_multiple

        layout = LAYOUTS[self.options.layout]
        self._paths = layout.paths()
        plan = {layer.name: layer for layer in layers(self.options)}
        for name, path in self._paths.items():
            if name == ATTENTION:
                self._attach(path, ContextualAttention(self.options.attention, layout.identity))
            else:
                self._attach(path, _built(plan[name], self.options, layout))

    def _attach(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *outer, last = path.split(".")
        for part in outer:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)

    def layer(self, name: str) -> nn.Module:
        """The module of a layer by the original's name (conv1 … conv17, xconv1 …, pmconv1 …, allconv11 …, attention)."""
        return self.get_submodule(self._paths[name])

    def _run(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            layer = self.layer(name)
            if name.endswith(("conv13", "conv15")) and not isinstance(layer, Upsampled):
                x = upsample(x)
            x = layer(x)
        return x

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The images of both stages, with nothing pasted back.

        Args:
            x: (B, 3, H, W) RGB in the port's range with its value under the hole (`options.known_range`, `hole_value`;
                ports with `fills_hole` put it there themselves); or (B, 5, H, W): that, ones, and the mask ((B, 4, H, W),
                that and the mask, in ports without `ones`).
            mask: (1|B, 1, H, W), **1 = hole**, 0 = known. May be left out where x holds it.

        Returns:
            Coarse and refined image, each (B, 3, H, W) in [-1, 1]. Composite: `refined · mask + image · (1 − mask)`.

        Raises: `ValueError` for other shapes and for heights or widths that are no multiples of `size_multiple` or below
            `min_size` (pad first; see `inpaintrt.pipeline`).
        """
        return self._stages(x, mask, self._attend)[:2]

    def forward_with_offsets(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, and where the attention looked.

        The third result is int32 (B, 2, H/8, W/8) at rate 2: row and column, in cells, of the patch with the largest
        weight, minus the cell's own. Raises: as `forward`.
        """
        return self._stages(x, mask, self._attend_with_offsets)

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], whatever the port's range; values under the hole are ignored.
            mask: (B, 1, H, W), **1 = hole**, 0 = known; any dtype. Every sample is matched under its own mask, whatever
                `mask_batch` is.

        Returns:
            (B, 3, H, W) in [0, 1]; known pixels as given, the hole from the second stage.

        Raises: as `forward`.
        """
        low, high = self.options.known_range
        filled = self._stages(self.network_input(image, mask), None, self._attend, mask_batch="each")[1]
        return torch.where(mask != 0, ((filled - low) / (high - low)).clamp(0, 1), image)

    def network_input(self, image: Tensor, mask: Tensor) -> Tensor:
        """What `forward` takes, of what `inpaint` does: all channels, the mask as 0 and 1."""
        low, high = self.options.known_range
        hole = mask != 0
        known = torch.where(hole, self.options.hole_value, image * (high - low) + low)
        plane = hole.to(image.dtype)
        return torch.cat([known, *[torch.ones_like(plane)] * self.options.ones, plane], dim=1)

    def _attend(self, x: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        matched = self.layer(ATTENTION)(x, x, mask, **options)
        return matched, matched

    def _attend_with_offsets(self, x: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        attention: Any = self.layer(ATTENTION)
        return attention.with_offsets(x, x, mask, **options)

    def _stages(
        self, x: Tensor, mask: Tensor | None, attend: Callable[..., tuple[Tensor, Tensor]], **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, hole = self._input(x, mask)
        coarse = self._bounded(self._run(COARSE, x))
        seen = coarse * hole + x[:, :3] * (1 - hole)
        if self.options.mask_to_stage2:
            seen = torch.cat([seen, x[:, 3:]], dim=1)
        matched, offsets = attend(self._run(MATCH, seen), hole, **options)
        both = torch.cat([self._run(REFINE, seen), self._run(MATCHED, matched)], dim=1)
        return coarse, self._bounded(self._run(COMBINE, both)), offsets

    def _bounded(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if self.options.bounded == "tanh" else x.clamp(-1.0, 1.0)

    def _input(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """All channels that stage 1 reads, and the mask (1|B, 1, H, W), in x's dtype."""
        channels = 4 + self.options.ones
        if x.dim() != 4 or x.shape[1] not in (3, channels) or (mask is None and x.shape[1] == 3):
            rest = "ones and mask" if self.options.ones else "mask"
            raise ValueError(
                f"x is {tuple(x.shape)} and mask {'missing' if mask is None else 'given'}; accepted: (B, 3, H, W) with a mask, "
                f"or (B, {channels}, H, W), image, {rest}"
            )
        height, width = x.shape[2:]
        if height % self.size_multiple or width % self.size_multiple or min(height, width) < self.min_size:
            raise ValueError(
                f"image is {height}×{width}; accepted: height and width divisible by {self.size_multiple}, at least "
                f"{self.min_size}. Pad image and mask and crop the result, or call inpaintrt.pipeline.fill"
            )
        if mask is None:
            mask = x[:, -1:]
        elif mask.dim() != 4 or mask.shape[0] not in (1, len(x)) or mask.shape[1:] != (1, height, width):
            raise ValueError(f"mask is {tuple(mask.shape)}; accepted: (1 or {len(x)}, 1, {height}, {width})")
        hole = mask.to(x.dtype)
        if x.shape[1] == 3:
            if self.options.fills_hole:
                x = x * (1 - hole) + self.options.hole_value * hole
            plane = hole.expand(len(x), -1, -1, -1)
            x = torch.cat([x, *[torch.ones_like(plane)] * self.options.ones, plane], dim=1)
        return x, hole


def _checked(options: DeepFillOptions) -> DeepFillOptions:
    """The options themselves. Raises: `ValueError` for what no network can be made of."""
    accepted = {
        "layout": tuple(LAYOUTS),
        "gate": ("none", "one", "two"),
        "match_activation": ("relu", "elu"),
        "bounded": ("tanh", "clip"),
        "mask_hops": (1, 2),
    }
    for name, values in accepted.items():
        if (value := getattr(options, name)) not in values:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(str, values))}")
    for name in ("width", "decoder_width"):
        width = getattr(options, name)
        if width is not None and (width < 2 or width % 2):
            raise ValueError(f"{name} is {width}; accepted: even, 2 or more")
    if options.rate < 1 or options.stride < 1:
        raise ValueError(f"rate is {options.rate}, stride {options.stride}; accepted: 1 or more")
    if options.spectral_norm and options.gate != "two":
        raise ValueError(f"spectral_norm is on with gate {options.gate!r}; accepted: gate 'two'")
    return options


# ---- what weights say about their network ---------------------------------------------------------------------------


def config_from_state_dict(
    state: Mapping[str, Tensor], ports: Mapping[str, DeepFillOptions], anchors: Mapping[str, str]
) -> dict[str, Any]:
    """Constructor arguments read off the keys and shapes of a state dict.

    Args:
        state: with the port's own names.
        ports: presets by name.
        anchors: for each of the ports that weights are recognised as, a key that no other one has: the weight of the first
            layer of a branch that is `width` wide.

    Raises:
        KeyError: with the key that such a generator has and this state dict lacks.
        ValueError: the weights are of a network that ours cannot be.
    """
    port, anchor = next((name, anchor) for name, anchor in anchors.items() if anchor in state)
    options = ports[port]
    layout = LAYOUTS[options.layout]
    paths = layout.paths()
    first = next(path for path in paths.values() if anchor.startswith(f"{path}."))

    def width(key: str) -> int:
        """Channels after gating."""
        return state[key].shape[0] // (2 if options.gate == "one" else 1)

    config: dict[str, Any] = {"port": port, "width": width(anchor)}
    if options.decoder_width is not None:
        config["decoder_width"] = width(paths["allconv12"] + anchor.removeprefix(first)) // 4
    if options.spectral_norm:
        config["spectral_norm"] = any(key.endswith(".weight_bar") for key in state)
    if layout.identity is not None:
        identity = f"{paths[ATTENTION]}.{layout.identity}"
        if not torch.equal(state[identity].cpu().float(), torch.eye(3).view(1, 1, 3, 3)):
            raise ValueError(f"{identity} is not the 3×3 identity, so scores are propagated in another way")
    return config


def config_from_modules(modules: Mapping[str, Any], layouts: set[str]) -> dict[str, Any]:
    """What notes on modules (`models.weights_file`) tell beyond shapes: whether a pickled attention propagates scores."""
    for path in (LAYOUTS[layout].paths()[ATTENTION] for layout in sorted(layouts)):
        if path in modules and isinstance(fuse := modules[path].attributes.get("fuse"), bool):
            return {"fuse_size": 3 if fuse else 0}
    return {}

"""TorchScript archives: recognised by their weights, rebuilt as a reference network, proved by numbers.

Archives are traces: a graph and weights, closed to any change. What can be done is to build the network anew from the
weights, which carry the public names, and to show that it computes what the archive computes. That is tried for every
family whose names for weights are found (`models.loading`). A state dict does not say all of it (activations, padding
modes, whether the result is blended), so each possibility that fits the archive's signature is tried, and one is taken
only if it gives the archive's own numbers, in float64 to float32's resolution, at two sizes, for integer and soft masks.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.runtime.errors import WeightsError
from inpaintrt.runtime.probe import Finding, compare, in_double
from inpaintrt.testing.recipe import image

NAME = "torchscript"
_BLENDED = ("lama",)
"""Families of which archives are known that take image and mask and blend, where the network takes one tensor."""


class Blended(nn.Module):
    """A generator called as the public archives are: image and mask in, the image with its hole filled out.

    forward(image, mask) blends in floating point, as they do: mask · prediction + (1 − mask) · image. So a mask between
    0 and 1 makes a soft edge, and known pixels are the image's own.
    """

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator
        self.size_multiple: int = generator.size_multiple
        self.min_size: int = generator.min_size

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with its hole filled.

        Args:
            image: (B, 3, H, W) RGB in [0, 1]; H and W multiples of `size_multiple` and at least `min_size`.
            mask: (B, 1, H, W), 1 = hole, 0 = known; integer, bool, or floating point (soft).

        Returns: (B, 3, H, W).

        Raises: `ValueError` for other sizes, which the network would answer with an output of another size.
        """
        height, width = image.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple or min(height, width) < self.min_size:
            raise ValueError(
                f"image has {height} rows and {width} columns; accepted: multiples of {self.size_multiple}, at least "
                f"{self.min_size}. Pad image and mask on the right and bottom (numpy's mode 'symmetric') and crop the "
                "result, or call inpaintrt.pipeline.fill"
            )
        hole = mask.to(image.dtype)
        prediction = self.generator(torch.cat([image * (1 - hole), hole], dim=1))
        return hole * prediction + (1 - hole) * image

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        """As the generator's `inpaint`: what lies under the hole is not read, and the mask is 0 or not 0."""
        result: Tensor = self.generator.inpaint(image, mask)
        return result


def rebuild(script: torch.jit.ScriptModule) -> nn.Module | str:
    """A reference network with the archive's weights, device and calling convention; or why there is none.

    The network is in eval mode, shares no memory with the archive, and says in `rebuilt_from` what it was made of.
    """
    state: dict[str, Tensor] = script.state_dict()
    if why := _obstacle(script, state):
        return why
    arguments = [a for a in script._c._get_method("forward").schema.arguments if a.name != "self"]
    if len(arguments) not in (1, 2) or any(str(a.type) != "Tensor" for a in arguments):
        taken = ", ".join(f"{a.name}: {a.type}" for a in arguments)
        return f"it is called with ({taken}); known are (image, mask), and one tensor that holds both"
    weight = next(t for t in state.values() if t.is_floating_point())
    with torch.no_grad():  # copies that are leaves
        copies = copy.deepcopy(script), copy.deepcopy(script).double()
    from inpaintrt.models import loading  # with all the networks: only archives need them

    reasons = []
    for family in loading.families_of(state) or ("lama",):  # which of none of them says what was found
        differences: list[str] = []
        for options in _silent_options(family):
            try:
                generator: Any = loading.build(family, state, "the TorchScript module", **options)
            except WeightsError as error:
                differences = [str(error)]
                break
            network = _called_alike(generator, family, len(arguments))
            if network is None:
                differences = [f"a {family} network is not called with {len(arguments)} tensors"]
                break
            convention = _convention(network, len(arguments))
            network.to(weight.device).eval()
            finding = _difference(copies, network, generator.config, len(arguments))
            if not finding.why_not:
                name = getattr(script, "original_name", type(script).__name__)
                origin = f"TorchScript module {name}, {family}, {convention}"
                network.rebuilt_from = f"{origin}; {finding.note}" if finding.note else origin
                return network
            differences.append(f"as {family}, {convention}: {finding.why_not}")
        others = f" ({len(differences) - 1} other forms of it differ, too)" if len(differences) > 1 else ""
        reasons.append(differences[0] + others)
    return "; ".join(reasons)


def _called_alike(generator: Any, family: str, count: int) -> Any:
    """The network as a module of `count` tensors; None where it is called otherwise."""
    parameters = inspect.signature(generator.forward).parameters.values()
    required = sum(p.default is p.empty for p in parameters)
    if required <= count <= len(parameters):
        return generator
    return Blended(generator) if count == 2 and family in _BLENDED else None


def _convention(network: Any, count: int) -> str:
    if isinstance(network, Blended):
        return "called with (image, mask), result blended"
    return "called with (image, mask)" if count == 2 else "called with one tensor"


def _silent_options(family: str) -> Iterator[dict[str, Any]]:
    """Options of a family's network that leave no trace in a state dict; those of the released models first."""
    if family != "lama":
        yield {}
        return
    for padding, activation in itertools.product(
        ({}, {"down_padding_mode": "zeros"}, {"padding_mode": "zeros"}), ("sigmoid", "tanh", "none")
    ):
        yield {**padding, "output_activation": activation}


def _obstacle(script: torch.jit.ScriptModule, state: Mapping[str, Tensor]) -> str:
    weights = [t for t in state.values() if t.is_floating_point()]
    if not weights:
        return "it holds no weights by name (a frozen module keeps them in its graph)"
    if (dtypes := {t.dtype for t in weights}) != {torch.float32}:
        return f"its weights are {', '.join(sorted(map(str, dtypes)))}; known is torch.float32"
    if len(devices := {t.device for t in weights}) > 1:
        return f"its weights are on several devices ({', '.join(sorted(map(str, devices)))})"
    if any(m.training and hasattr(m, "running_mean") for m in script.modules()):
        return "its batch norms are in training mode; call eval() first"
    return ""


class _CannotRun(Exception):
    """The archive raised; the message says on what."""


def _difference(archive: tuple[Any, Any], network: Any, config: Mapping[str, Any], count: int) -> Finding:
    """What keeps `network` from being the archive's equal.

    The archive comes as copies (a graph may write to its buffers), its own and one in float64, and runs unoptimised (it
    would specialise to these sizes).
    """
    jit: Any = torch.jit
    wide = copy.deepcopy(network).double()
    device = next(network.parameters()).device
    note = ""
    with torch.no_grad(), jit.optimized_execution(False):
        for args in _inputs(network, config, count):
            args = tuple(t.to(device) for t in args)
            try:
                finding = compare(
                    lambda pair, args: pair[1](*args),
                    _run_archive,
                    ((archive[0], network), args),
                    ((archive[1], wide), in_double(args)),
                    deep=True,
                )
            except _CannotRun as error:
                return Finding(str(error))
            if finding.why_not:
                return Finding(f"input {_described(args)}: {finding.why_not}")
            note = finding.note or note
    return Finding(note=note)


def _run_archive(pair: tuple[Any, Any], args: tuple[Tensor, ...]) -> Any:
    try:
        return pair[0](*args)
    except RuntimeError as error:
        last = (str(error).strip().splitlines() or ["no message"])[-1]
        raise _CannotRun(f"the archive does not run on {_described(args)}: {last}") from None


def _inputs(network: Any, config: Mapping[str, Any], count: int) -> Iterator[tuple[Tensor, ...]]:
    """Two sizes, of which the second gives odd maps inside where the network takes them; integer and soft masks."""
    unit, channels = network.size_multiple, config.get("in_channels", 4) - 1
    sizes = ((2, 2), (3, 3)) if config.get("enable_lfu") else ((1, 1), (1, 2)) if unit > 32 else ((2, 3), (5, 2))
    least = -(-network.min_size // unit)
    for height, width in ((unit * max(rows, least), unit * max(columns, least)) for rows, columns in sizes):
        picture = image("probe/image", 1, channels, height, width)
        noise = image("probe/mask", 1, 1, height, width)
        for mask in ((noise > 0.6).long(), (2 * noise - 0.5).clamp(0, 1)):
            if isinstance(network, Blended):
                yield picture, mask
            elif count == 2:
                yield picture, mask.to(picture.dtype)
            else:
                plane = mask.to(picture.dtype)
                ones = [torch.ones_like(plane)] if getattr(getattr(network, "options", None), "ones", False) else []
                yield (torch.cat([picture * (1 - mask), *ones, plane], dim=1),)


def _described(args: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in args)

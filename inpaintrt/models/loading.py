"""Networks by name, and weights from files or state dicts in any of the forms in which they are passed around."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.runtime.errors import WeightsError

from . import (
    aotgan,
    comodgan,
    deepfill_v1,
    deepfill_v2,
    glcic,
    guided_classifier,
    guided_unet,
    ipt,
    lama,
    mat,
    migan,
    partialconv_unet,
    put,
)
from .weights_file import ModuleNote, WeightsFile

NETWORKS = {
    "lama": lama.LaMa,
    "deepfill_v1": deepfill_v1.DeepFillV1,
    "deepfill_v2": deepfill_v2.DeepFillV2,
    "aotgan": aotgan.AOTGAN,
    "glcic": glcic.GLCIC,
    "mat": mat.MAT,
    "partialconv_unet": partialconv_unet.PConvUNet,
    "comodgan": comodgan.CoModGAN,
    "migan": migan.MIGAN,
    "guided_unet": guided_unet.GuidedUNet,
    "guided_classifier": guided_classifier.GuidedClassifier,
    "ipt": ipt.IPT,
    "put": put.PUT,
}
SHIPPED = {"lama_mini": ("lama", "lama_mini.safetensors")}
_FAMILIES = {
    "lama": lama,
    "deepfill_v1": deepfill_v1,
    "deepfill_v2": deepfill_v2,
    "aotgan": aotgan,
    "glcic": glcic,
    "mat": mat,
    "partialconv_unet": partialconv_unet,
    "comodgan": comodgan,
    "migan": migan,
    "guided_unet": guided_unet,
    "guided_classifier": guided_classifier,
    "ipt": ipt,
    "put": put,
}
"""Modules that know what their weights look like. Each has ANCHORS: keys below the container of layers, one of which is in
every such file and in no other; NAMES: a pattern that fits the beginning of all keys there; PREFIX: what precedes them in
our own state dict; FOREIGN, `config_from_state_dict` and `config_from_modules`. See `models.lama`. One may have `essential`,
which leaves out what a file holds but a network needs not, and `part`, which leaves what options ask for of a file that holds
more."""

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_OTHERS = (
    (r"^(.*\.)?(discriminator\..*|model0\.0\.weight)$", "the discriminator of a GAN"),
    (r"\.ffc_skip\.", "an FcF generator"),
    (r"(^|\.)head\.\d+\.conv_gate\.gain$", "manga-image-translator's AOT network of gated, standardised convolutions"),
    (r"model\.diffusion_model\.", "a latent diffusion model"),
    (r"model\.\d+\.conv_block\.", "a LaMa without Fourier convolutions"),
    (r"(^|\.)conv13_upsample_conv\.", "a CR-Fill generator"),
    (r"\.convl2l\.weight$", "a network of Fourier convolutions with another layout"),
)


def create(name: str, **options: Any) -> nn.Module:
    """The network `name`, a key of `NETWORKS`, in eval mode with fresh weights; options are its class's.

    Raises: `ValueError` for an unknown name.
    """
    return _network(name)(**options).eval()


def load(name: str, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
    """The network `name` in eval mode with weights, float32 on the CPU.

    Args:
        name: "lama_mini" (shipped with the package, no path), or a family, a key of `NETWORKS`, together with
            `path`.
        path: safetensors, a torch checkpoint of any age (plain or nested state dict, Lightning checkpoint, pickled
            module), a plain pickle of networks (`.pkl`) or a TorchScript archive. Only tensors are read; no code in the
            file is imported or run.
        options: as for `build`.

    Raises:
        ValueError: unknown name, or path missing or superfluous.
        WeightsError: no such file, damaged, or not this network; the message says what was found and what is expected.
    """
    if name in SHIPPED:
        if path is not None or options:
            raise ValueError(
                f"{name!r} ships with the package and takes no path and no options; for a file use load('lama', path)"
            )
        name, shipped = SHIPPED[name]
        path = Path(__file__).parent.parent / "data" / shipped
    _network(name)
    if path is None:
        raise ValueError(f"load({name!r}) needs a path to weights; shipped models: {', '.join(SHIPPED)}")
    with WeightsFile(Path(path)) as weights:
        return build(name, weights, weights.source, **options)


def build(
    family: str, state: Mapping[str, Tensor], source: str = "state dict", *, prefix: str | None = None, **options: Any
) -> nn.Module:
    """A reference network with the weights of a state dict, which are copied: eval mode, float32, the state's device.

    Args:
        family: a key of `NETWORKS`.
        state: tensors by name; whatever precedes the public keys is stripped, and other networks beside it are ignored.
        source: where the weights come from, for messages.
        prefix: which one to take where the state holds several networks of the family, such as "generator_ema".
        options: arguments of the network's class, which override what was inferred. Of a LaMa, the shapes fix everything
            but padding modes and output activation; those are read from modules where a file has them (TorchScript
            archives, pickled modules), and are the released models' otherwise. Of a DeepFill, names and shapes fix the
            public port (`port`), and thereby the rest.

    Raises:
        ValueError, TypeError: unknown family or option.
        WeightsError: not this network; the message says what was found.
    """
    network_class = _network(family)
    definition: Any = _FAMILIES[family]
    root = _root(family, state, source, prefix)
    for pattern, what in definition.FOREIGN:
        if any(re.search(pattern, name) for name in state):
            raise WeightsError(f"{source}: {what}")
    tensors = {short: state[name] for short, name in _below(root, state, definition).items()}
    modules: Mapping[str, ModuleNote] = getattr(state, "modules", {})
    notes = {short: modules[name] for short, name in _below(root, modules, definition).items()}
    try:
        tensors = getattr(definition, "essential", dict)(tensors)
        config = definition.config_from_state_dict(tensors)
    except KeyError as missing:
        raise WeightsError(f"{source}: not a {family} generator, the key {missing} is missing") from None
    except ValueError as error:
        raise WeightsError(f"{source}: not a {family} generator that ours can be: {error}") from None
    config |= definition.config_from_modules(notes)
    if hasattr(definition, "part"):
        try:
            tensors, config = definition.part(tensors, config, options)
        except ValueError as error:
            raise WeightsError(f"{source}: {error}") from None
    try:
        with torch.device("meta"):  # nothing to initialise: the weights take the parameters' place
            network = network_class(**{**config, **options})
    except ValueError as error:
        if options:
            raise
        raise WeightsError(f"{source}: not a {family} generator that ours can be: {error}") from None
    _check(network, tensors, family, source)
    device = next(t.device for t in tensors.values())
    own = {key: _own(tensors.pop(key, None), like, device) for key, like in network.state_dict().items()}
    network.load_state_dict(own, assign=True)
    if bad := [k for k, t in network.state_dict().items() if t.is_floating_point() and not bool(t.isfinite().all())]:
        raise WeightsError(f"{source}: {len(bad)} tensors hold NaN or infinity, first {bad[0]}")
    return network.eval()


def families_of(state: Mapping[str, Tensor]) -> list[str]:
    """The families of which a state dict holds a network, by their names for weights; keys of `NETWORKS`."""
    return [name for name, definition in _FAMILIES.items() if _roots(definition.ANCHORS, state)]


def _network(name: str) -> Any:
    if name not in NETWORKS:
        known = [*SHIPPED, *NETWORKS]
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"unknown model {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Known: {', '.join(known)}"
        )
    return NETWORKS[name]


def _root(family: str, state: Mapping[str, Tensor], source: str, prefix: str | None) -> str:
    """The dotted path of the container in `state` whose children are the network's layers."""
    anchors = _FAMILIES[family].ANCHORS
    found = _roots(anchors, state)
    ends = f"ends in {' or '.join(map(repr, anchors))}"
    if not found:
        others = [
            (bool(_roots(other.ANCHORS, state)), f"a {name} generator (load it under that name)")
            for name, other in _FAMILIES.items()
        ]
        others += [(any(re.search(pattern, name) for name in state), what) for pattern, what in _OTHERS]
        for is_this, what in others:
            if is_this:
                raise WeightsError(
                    f"{source}: {what}, not a {family} generator; expected a {family} generator, with a key that {ends}"
                )
        some = ", ".join(list(state)[:3])
        raise WeightsError(
            f"{source}: not a {family} generator: none of its {len(state)} keys {ends} (found {some}, …)"
        )
    if prefix is not None:
        chosen = [root for root in found if f"{root}.".startswith(f"{prefix.rstrip('.')}.")]
        if len(chosen) != 1:
            raise WeightsError(f"{source}: {len(chosen)} {family} generators under {prefix!r} (found {_quoted(found)})")
        return chosen[0]
    if len(found) > 1:
        plain = [root for root in found if not {"generator", "G_ema"}.isdisjoint(root.split("."))]
        if len(plain) != 1:
            raise WeightsError(
                f"{source}: {len(found)} {family} generators, {_quoted(found)}; choose one with prefix=…"
            )
        return plain[0]
    return found[0]


def _roots(anchors: Iterable[str], state: Iterable[str]) -> list[str]:
    return [
        name.removesuffix(anchor).rstrip(".")
        for name in state
        for anchor in anchors
        if f".{name}".endswith(f".{anchor}")
    ]


def _below(root: str, names: Mapping[str, Any], definition: Any) -> dict[str, str]:
    """A network's names as they are in our state dict, with the names they have here."""
    start = f"{root}." if root else ""
    return {
        definition.PREFIX + name.removeprefix(start): name
        for name in names
        if name.startswith(start) and re.match(definition.NAMES, name.removeprefix(start))
    }


def _check(network: nn.Module, tensors: Mapping[str, Tensor], family: str, source: str) -> None:
    """Refuse weights that do not fill the network, or that it would ignore."""
    expected = network.state_dict()
    missing = [key for key in expected if key not in tensors and not key.endswith("num_batches_tracked")]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"{source}: not a whole {family} generator, the key {missing[0]!r}{more} is missing")
    if unknown := [key for key in tensors if key not in expected]:
        raise WeightsError(
            f"{source}: a {family} generator with {len(unknown)} tensors that ours does not have, first {unknown[0]!r} "
            f"{tuple(tensors[unknown[0]].shape)}"
        )
    for key, like in expected.items():
        if (tensor := tensors.get(key)) is None:
            continue
        if tensor.shape != like.shape:
            raise WeightsError(
                f"{source}: shapes do not fit a {family} generator: {key} is {tuple(tensor.shape)}, "
                f"expected {tuple(like.shape)}"
            )
        if like.is_floating_point() and tensor.dtype not in _FLOATS:
            raise WeightsError(f"{source}: {key} is {tensor.dtype}, expected {', '.join(map(str, _FLOATS))}")


def _own(tensor: Tensor | None, like: Tensor, device: torch.device) -> Tensor:
    """A copy in the network's element type; zeros for a counter that the file leaves out."""
    if tensor is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    return tensor.detach().to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def _quoted(roots: list[str]) -> str:
    return ", ".join(repr(root) for root in roots)

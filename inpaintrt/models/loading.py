"""Networks by name, and weights from files. Only tensors are ever read from a file: no pickled code runs."""

from __future__ import annotations

import difflib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.runtime.errors import WeightsError

from . import lama

NETWORKS = {"lama": lama.LaMa}
SHIPPED = {"lama_mini": ("lama", "lama_mini.safetensors")}
_ANCHOR = {"lama": "model.1.ffc.convl2l.weight"}
_CONFIG = {"lama": lama.config_from_state_dict}


def create(name: str, **options: Any) -> nn.Module:
    """The network `name` ("lama") in eval mode with fresh weights; options are those of its class.

    Raises: `ValueError` for an unknown name.
    """
    return _network(name)(**options).eval()  # type: ignore[no-any-return]


def load(name: str, path: str | os.PathLike[str] | None = None) -> Any:
    """The network `name` in eval mode with weights, float32 on the CPU.

    Args:
        name: "lama_mini" (shipped with the package, no path), or a family ("lama") together with `path`.
        path: .safetensors, or a torch checkpoint (.pt, .pth, .ckpt) with a plain or Lightning state dict. Any prefix
            before the public keys is accepted; the configuration is read off the shapes.

    Raises:
        ValueError: unknown name, or path missing or superfluous.
        WeightsError: no such file, damaged, or not this network; the message says what was found.
    """
    if name in SHIPPED:
        if path is not None:
            raise ValueError(f"{name!r} ships with the package and takes no path; for a file use load('lama', path)")
        family, file = SHIPPED[name]
        path = Path(__file__).parent.parent / "data" / file
    else:
        family = name
        _network(family)
        if path is None:
            raise ValueError(f"load({name!r}) needs a path to weights; shipped models: {', '.join(SHIPPED)}")
    path = Path(path)
    state = _without_prefix(_read(path), _ANCHOR[family], path, family)
    try:
        network = NETWORKS[family](**_CONFIG[family](state))
        network.load_state_dict({k: state[k] for k in network.state_dict()})
    except KeyError as missing:
        raise WeightsError(f"{path}: not a {family} generator, the key {missing} is missing") from None
    except RuntimeError as error:
        raise WeightsError(f"{path}: shapes do not fit a {family} generator: {error}") from None
    if bad := [k for k, t in network.state_dict().items() if t.is_floating_point() and not bool(t.isfinite().all())]:
        raise WeightsError(f"{path}: {len(bad)} tensors hold NaN or infinity, first {bad[0]}")
    return network.eval()


def _network(name: str) -> Any:
    if name not in NETWORKS:
        known = [*SHIPPED, *NETWORKS]
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"unknown model {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Known: {', '.join(known)}"
        )
    return NETWORKS[name]


def _read(path: Path) -> Mapping[str, Tensor]:
    """All tensors of a weights file by key."""
    if not path.is_file():
        raise WeightsError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds more than tensors, and no code is run from a weights file: {_line(error)}"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path}: cannot be read ({_line(error)})") from None
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise WeightsError(f"{path}: damaged safetensors file ({_line(error)})") from None
        raise
    for key in ("state_dict", "gen_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"{path}: no state dict in it, but {type(content).__name__}")
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def _without_prefix(state: Mapping[str, Tensor], anchor: str, path: Path, family: str) -> dict[str, Tensor]:
    """The part of `state` under the prefix at which the network's first key is found, prefix removed."""
    short = anchor.split(".", 1)[1]
    for key in state:
        if key == anchor or key.endswith("." + anchor):
            prefix = key.removesuffix(anchor)
            return {
                k.removeprefix(prefix): v.float() if v.is_floating_point() else v
                for k, v in state.items()
                if k.startswith(prefix)
            }
        if key == short:
            return {"model." + k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    some = ", ".join(list(state)[:3])
    raise WeightsError(
        f"{path}: not a {family} generator: none of its {len(state)} keys ends in {anchor!r} (found {some}, …)"
    )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

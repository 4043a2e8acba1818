"""A sampler's state on disk, so that a run that was killed goes on where it was, with the same result bit for bit.

Noise is drawn by counters, so a state is a sample and the number of calls that were made. The file also says of what run it
is, as digests, and is taken up by no other.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.runtime.errors import CheckpointError

_FORMAT = "inpaintrt sampler 1"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state, and how often.

    The file is replaced as a whole, so that it is always one state or another, and removed when the run has its result.

    Args:
        path: of the file; its folder exists. A file that is there is continued from if it is of the same run.
        seconds: least time between two writes; 0 writes after every call of the model.
    """

    path: str | os.PathLike[str]
    seconds: float = 60.0

    def read(self, identity: Mapping[str, str]) -> tuple[int, dict[str, Tensor]] | None:
        """Calls that were made and the state after them; None where there is no file.

        Raises:
            CheckpointError: the file is no checkpoint, damaged, or of a run with another identity; it says which parts.
        """
        from safetensors import SafetensorError, safe_open  # at first use: importing the package stays light

        path = Path(self.path)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told = dict(file.metadata() or {})
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: no checkpoint of a sampler, or a damaged one: {error}") from error
        if told.pop("format", None) != _FORMAT or not told.get("done", "").isdecimal():
            raise CheckpointError(f"{path}: no checkpoint of a sampler of this version; it is left as it is")
        done = int(told.pop("done"))
        if different := sorted(name for name in {*identity, *told} if identity.get(name) != told.get(name)):
            raise CheckpointError(
                f"{path}: the checkpoint of another run, with other {', '.join(different)}; remove it, or give another path"
            )
        return done, state

    def write(self, done: int, identity: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
        """Replace the file by this state.

        Raises:
            CheckpointError: it cannot be written; what was there before still is.
        """
        from safetensors.torch import save

        path = Path(self.path)
        content = save(
            {name: t.detach().cpu().contiguous() for name, t in state.items()},
            {"format": _FORMAT, "done": str(done), **identity},
        )
        temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.part")
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise CheckpointError(f"{path}: the checkpoint cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        Path(self.path).unlink(missing_ok=True)


def digest(*values: Any) -> str:
    """A short digest of tensors, by their content, and of whatever else there is, by its repr."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            total.update(digest(*(part for item in sorted(value.items()) for part in item)).encode())
        else:
            total.update(repr(value).encode())
        total.update(b"\0")
    return total.hexdigest()[:32]


def digest_of_model(model: Any) -> str:
    """Of its weights' names, shapes and some of their values: enough to tell two checkpoints of a network apart."""
    if not isinstance(model, nn.Module):
        return digest(getattr(model, "__qualname__", type(model).__qualname__))
    weights = model.state_dict()
    some = [t[tuple(slice(None, None, max(1, -(-n // 2))) for n in t.shape)].flatten() for t in weights.values()]
    values = torch.cat([t.to(torch.float32) for t in some]) if some else torch.empty(0)
    return digest([(name, tuple(t.shape)) for name, t in weights.items()], values)

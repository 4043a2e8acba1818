"""A sampler's state on disk, so that a run that was killed goes on where it was, with the same result bit for bit.

Noise is drawn by counters, so a state is a sample and the number of calls that were made. The file also says of what run it
is, as digests, and is taken up by no other.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import numbers
import os
import secrets
import types
from collections.abc import Iterable, Mapping
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

    The file is replaced as a whole, so that it is always one state or another, and removed when the run has its result, or
    when it fails before there was any work to keep. A run is told from others by all its arguments. Of a model and of guidance
    that are functions or objects of your own, what they compute with is compared as far as it can be seen: code, and the
    numbers, tensors and networks that they hold, but nothing in lists, in mappings, or in a module's functions that they call.

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
    """Of a network: its weights' names, shapes and some of their values, enough to tell two checkpoints apart.

    Of a function: its code, and what that refers to: numbers, strings, tensors, networks, tuples of them, functions inside it.
    Of another object, such as one with a `__call__`: its class, and of a dataclass the fields, else the networks and tensors
    among its attributes. Lists and mappings are not looked into, so that what is noted in them makes no other model.
    """
    return digest(_plain(model))


def _plain(value: Any, within: tuple[int, ...] = ()) -> Any:
    """What tells a value from others, by its repr, in any process."""
    if value is None or isinstance(value, (numbers.Number, str, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, nn.Module):
        weights = value.state_dict()
        some = [t[tuple(slice(None, None, max(1, -(-n // 2))) for n in t.shape)].flatten() for t in weights.values()]
        values = torch.cat([t.to(torch.float32) for t in some]) if some else torch.empty(0)
        return digest([(name, tuple(t.shape)) for name, t in weights.items()], values)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if id(value) in within:  # a function that refers to itself
        return name
    return name, [_plain(part, (*within, id(value))) for part in _parts(value)]


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, tuple):
        return value
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, value.co_consts
    if isinstance(value, types.FunctionType):
        names = inspect.getclosurevars(value)
        used = [v for v in names.globals.values() if not isinstance(v, types.FunctionType)]  # no walk through libraries
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return value.__code__, *defaults, *names.nonlocals.values(), *used
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, tuple(sorted(value.keywords.items()))
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [v for v in getattr(value, "__dict__", {}).values() if isinstance(v, (nn.Module, Tensor))]

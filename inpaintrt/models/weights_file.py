"""Tensors of a weights file by name, whichever of the usual forms it has; what a file contains is never run.

A file is judged by its content, not by its suffix: safetensors; torch's zip form (1.6 and later), be it a state dict, a
training checkpoint or a pickled module; torch's older form; plain pickles with tensors in them, as StyleGAN2's heirs write
networks; and TorchScript archives. The last are read like checkpoints, by attribute path: `torch.jit.load` would compile the
archive's code and run its `__setstate__` methods.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from inpaintrt.runtime.errors import WeightsError

from . import pickled
from .pickled import Record, Storage, TensorRef

_DAMAGE = (ValueError, KeyError, RuntimeError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
"""What readers raise on files that are cut short or altered."""

EXPECTED = "safetensors, a torch checkpoint or a TorchScript archive"


@dataclass(frozen=True)
class ModuleNote:
    """What a file says about a module besides its tensors."""

    kind: str
    """Name of its class."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""
    """Source of its class in a TorchScript archive."""


class WeightsFile(Mapping[str, Tensor], AbstractContextManager["WeightsFile"]):
    """The tensors of an open file by dotted name, each read when it is asked for.

    Attributes:
        source: the file's name, for messages.
        modules: notes on modules by dotted name, where the file has them (TorchScript archives, pickled modules).
    """

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self.modules: dict[str, ModuleNote] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self._buffer: tuple[str, bytearray] = ("", bytearray())
        if not path.is_file():
            raise WeightsError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            self._open(path)
        except BaseException as error:
            self._file.close()
            if isinstance(error, _DAMAGE) and not isinstance(error, WeightsError):
                self.refuse(f"damaged ({_line(error)})")
            raise

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._readers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __getitem__(self, name: str) -> Tensor:
        reader = self._readers[name]
        try:
            return reader()
        except _DAMAGE as error:
            raise WeightsError(f"{self.source}: damaged at {name} ({_line(error)})") from None

    def refuse(self, found: str) -> NoReturn:
        raise WeightsError(f"{self.source}: {found}; expected {EXPECTED}") from None

    # ---- the forms of a file ----

    def _open(self, path: Path) -> None:
        head = self._file.read(1024)
        self._file.seek(0)
        if head.startswith(b"PK\x03\x04"):
            self._open_zip(path)
        elif _LEGACY.match(head):
            self._open_legacy()
        elif len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32:
            self._open_safetensors(path)
        elif re.match(rb"\x80[\x02-\x05]", head):  # so may a safetensors file begin, with the length of its header
            self._open_pickle()
        else:
            self.refuse(_what_else(head, path))

    def _open_safetensors(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, "pt")
            names = list(file.keys())
        except SafetensorError as error:
            raise WeightsError(f"{path}: damaged safetensors file ({_line(error)})") from None
        for name in names:
            self._readers[name] = partial(file.get_tensor, name)

    def _open_zip(self, path: Path) -> None:
        if not zipfile.is_zipfile(self._file):
            self.refuse(
                f"a zip archive cut short: {path.stat().st_size} bytes, and the directory at its end is missing"
            )
        archive = zipfile.ZipFile(self._file)
        names = dict.fromkeys(archive.namelist())  # a set in order
        roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)]
        if len(roots) != 1:
            self.refuse(_what_else_in_zip(list(names)))
        (root,) = roots
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() != b"little":
            self.refuse("a checkpoint written on a big-endian machine")
        content = pickled.read(io.BytesIO(archive.read(f"{root}data.pkl")))

        def read(storage: Storage) -> bytearray:
            entry = archive.getinfo(f"{root}data/{storage.key}")
            if entry.file_size != storage.nbytes:
                raise ValueError(f"{entry.file_size} bytes in place of {storage.nbytes}")
            buffer = bytearray(storage.nbytes)
            with archive.open(entry) as file:
                if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
                    raise EOFError("the file ends early")
            return buffer

        def code(name: str) -> str:
            """Source of a class in a TorchScript archive: module a.b of class C is in code/a/b.py."""
            module, _, own = name.rpartition(".")
            entry = f"{root}code/{module.replace('.', '/')}.py"
            if entry not in names:
                return ""
            classes = re.split(r"^class (\w+)\(", archive.read(entry).decode("utf-8", "replace"), flags=re.MULTILINE)
            return dict(zip(classes[1::2], classes[2::2], strict=True)).get(own, "")

        script = f"{root}constants.pkl" in names
        self._collect(content, read, code if script else None)
        if not self._readers:
            self.refuse(
                "a frozen TorchScript archive, whose weights are constants without names (save it before torch.jit.freeze)"
                if script
                else f"no tensors in it, but {_name_of(content)}"
            )

    def _open_legacy(self) -> None:
        pickled.read(self._file)  # magic number
        pickled.read(self._file)  # protocol version
        system = pickled.read(self._file)
        if not (isinstance(system, dict) and system.get("little_endian", True)):
            self.refuse("a checkpoint written on a big-endian machine")
        storages: dict[str, Storage] = {}
        content = pickled.read(self._file, storages)
        keys = pickled.read(self._file)
        if not (isinstance(keys, list) and all(key in storages for key in keys)):
            raise ValueError("its list of storages does not fit its content")
        start, size = self._file.tell(), self._file.seek(0, io.SEEK_END)
        at: dict[str, int] = {}
        for key in keys:  # each storage is its element count, then its bytes
            at[key] = start
            start += 8 + storages[key].nbytes
        if start > size:
            self.refuse(f"a torch checkpoint cut short: {size} bytes of at least {start}")

        def read(storage: Storage) -> bytearray:
            self._file.seek(at[storage.key])
            (count,) = struct.unpack("<q", self._file.read(8))
            if count != storage.numel:
                raise ValueError(f"{count} elements in place of {storage.numel}")
            return bytearray(self._file.read(storage.nbytes))

        self._collect(content, read, None)
        if not self._readers:
            self.refuse(f"no tensors in it, but {_name_of(content)}")

    def _open_pickle(self) -> None:
        def read(storage: Storage) -> bytearray:
            if storage.data is None:
                raise ValueError("the values of its tensors are in another file")
            return bytearray(storage.data)

        content = pickled.read(self._file)
        if any(name.startswith("dnnlib.tflib.") for name in _names_in(content)):
            self.refuse(_TENSORFLOW)
        self._collect(content, read, None)
        if not self._readers:
            self.refuse(f"a pickle that torch did not write, no tensors in it, but {_name_of(content)}")

    # ---- from a pickle's content to names ----

    def _collect(self, content: Any, read: Callable[[Storage], bytearray], code: Callable[[str], str] | None) -> None:
        def tensor(ref: TensorRef) -> Tensor:
            if ref.storage.numel == 0:
                return torch.empty(ref.size, dtype=ref.dtype)
            if self._buffer[0] != ref.storage.key:  # neighbours often share one
                self._buffer = (ref.storage.key, read(ref.storage))
            flat = torch.frombuffer(self._buffer[1], dtype=ref.dtype)
            return flat.as_strided(ref.size, ref.stride, ref.offset)

        for name, value in _walk(content):
            if isinstance(value, TensorRef):
                self._readers[name] = partial(tensor, value)
            else:
                kind, state = _kind_and_state(value)
                self.modules[name] = ModuleNote(kind, state, code(value.name) if code else "")


def _names_in(content: Any) -> Iterator[str]:
    """Of the records in a pickle that is one, or holds them side by side or by name."""
    parts = (
        content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else [content]
    )
    yield from (part.name for part in parts if isinstance(part, Record))


def _walk(content: Any) -> Iterator[tuple[str, TensorRef | Record]]:
    """Tensors and records in nested containers and modules, each by its dotted path; every container once."""
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", content)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, TensorRef):
            yield path, value
            continue
        if not isinstance(value, dict | Record) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Record):
            yield path, value
        children = _children(value) if isinstance(value, Record) else value
        inside = [(f"{path}.{key}" if path else key, child) for key, child in children.items() if isinstance(key, str)]
        todo += reversed(inside)


def _children(record: Record) -> dict[Any, Any]:
    """What a module or a dict-like object holds: a pickled nn.Module keeps its parts in three dicts."""
    _, state = _kind_and_state(record)
    parts = [state[name] for name in ("_parameters", "_buffers", "_modules") if isinstance(state.get(name), dict)]
    return {key: child for part in [record.items, *(parts or [state])] for key, child in part.items()}


def _kind_and_state(record: Record) -> tuple[str, dict[Any, Any]]:
    """A module's class and attributes. StyleGAN2's code wraps both, and the source of the class, in a call with one dict."""
    meta = record.args[0] if record.kind == "_reconstruct_persistent_obj" and len(record.args) == 1 else None
    kind, state = (meta.get("class_name"), meta.get("state")) if isinstance(meta, dict) else (record.kind, record.state)
    return str(kind), state if isinstance(state, dict) else {}


# ---- what a file is instead ----

_TENSORFLOW = (
    "a pickle of TensorFlow networks (dnnlib.tflib), whose variables have other names and layouts; load these weights as "
    "they were converted for torch (for Co-ModGAN the files of github.com/zengxianyu/co-mod-gan-pytorch)"
)
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY = re.compile(re.escape(pickle.dumps(_MAGIC, protocol=2)))
_HEADS: tuple[tuple[bytes, str], ...] = (
    (rb"\s*version https://git-lfs", "a Git LFS pointer, not the file itself (run `git lfs pull`)"),
    (rb"\s*(<!doctype html|<html|<\?xml)", "a web page, probably an error page saved in place of the download"),
    (rb"\s*[{\[]", "a JSON text"),
    (rb"\x89HDF", "an HDF5 file (Keras)"),
    (rb"GGUF", "a GGUF file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x1f\x8b", "a gzip archive; unpack it first"),
    (rb".{4}TFL3", "a TensorFlow Lite model"),
    (rb"\x08[\x01-\x20].{0,200}(pytorch|onnx|tf2onnx)", "an ONNX model"),
    (rb".{257}ustar", "a tar archive"),
)


def _what_else(head: bytes, path: Path) -> str:
    if not head:
        return "an empty file"
    if path.suffix.lower() == ".onnx":
        return "an ONNX model"
    for pattern, what in _HEADS:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            return what
    if path.suffix.lower() == ".safetensors":
        return "a damaged safetensors file"
    return f"an unknown format beginning with {head[:12]!r}"


def _what_else_in_zip(names: list[str]) -> str:
    if any(re.search(r"(^|/)(archive_format|serialized_exported_program\.json|models/\w+\.json)$", n) for n in names):
        return "an exported program (torch.export)"
    inside = [name for name in names if name.endswith((".ckpt", ".pt", ".pth", ".safetensors", ".bin"))]
    if inside:
        return f"a zip archive that contains {', '.join(inside[:3])}; unpack it and load that"
    return f"a zip archive of {', '.join(names[:3])}"


def _name_of(content: Any) -> str:
    return content.name if isinstance(content, Record) else f"a {type(content).__name__}"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


__all__ = ["EXPECTED", "ModuleNote", "WeightsFile"]

"""Pickles read as data: containers, numbers and tensors come out; everything else becomes an inert `Record`.

Python's unpickler imports and calls whatever a file names. This one interprets the opcodes itself: a name is only looked
up in the table at the end, which holds the few constructors that tensors and plain containers are made with, and any
other name stays a name. So checkpoints with callbacks, configurations or whole foreign modules in them can be read, and
nothing that they contain is imported or run.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import torch


@dataclass(frozen=True)
class Storage:
    """Raw memory that a pickle refers to: element type and count, and under which key the file holds it.

    `data` are its bytes where the pickle itself holds them.
    """

    key: str
    dtype: torch.dtype
    numel: int
    data: memoryview | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read yet: a strided view of a storage, sizes in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Record:
    """A name that a pickle mentions, or an object made from it: what it was given, and no behaviour."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The class's own name: "Sigmoid" of "torch.nn.modules.activation.Sigmoid"."""
        return self.name.rpartition(".")[2]


def read(stream: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """The object of the next pickle in `stream`, which is left behind its end.

    `storages` receives every storage that the pickle refers to, by key.

    Raises: `ValueError` for anything that is not a sound pickle.
    """
    machine = _Machine({} if storages is None else storages)
    position = None
    try:
        for opcode, argument, position in pickletools.genops(stream):  # noqa: B007
            machine.step(opcode.name, argument)
        return machine.pop()
    except (
        ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, MemoryError, RecursionError, struct.error,
    ) as error:  # fmt: skip
        raise ValueError(f"damaged pickle near byte {position}: {error or type(error).__name__}") from error


class _Machine:
    """The stack machine of the pickle protocols 0 to 5."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("stack underflow")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """All values since the last mark, oldest first."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP" if self.marks and len(self.stack) == self.marks[-1]:
                self.marks.pop()
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                self.stack.append(self.stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "EMPTY_TUPLE":
                empty: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
                self.stack.append(empty.get(name, tuple)())
            case "LIST":
                self.stack.append(self.pop_mark())
            case "TUPLE":
                self.stack.append(tuple(self.pop_mark()))
            case "FROZENSET":
                self.stack.append(frozenset(self.pop_mark()))
            case "DICT":
                self.stack.append(_pairs(self.pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [self.pop() for _ in range(int(name[-1]))]
                self.stack.append(tuple(reversed(values)))
            case "APPEND" | "APPENDS":
                values = [self.pop()] if name == "APPEND" else self.pop_mark()
                if isinstance(target := self.stack[-1], list):  # a list-like record loses its elements
                    target.extend(values)
            case "ADDITEMS":
                values = self.pop_mark()
                if isinstance(target := self.stack[-1], set):
                    target.update(values)
            case "SETITEM" | "SETITEMS":
                values = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_mark()
                target = self.stack[-1]
                (target.items if isinstance(target, Record) else _as(dict, target)).update(_pairs(values))
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[int(argument)])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GLOBAL":
                self.stack.append(Record(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                own, module = self.pop(), self.pop()
                self.stack.append(Record(f"{_as(str, module)}.{_as(str, own)}"))
            case "REDUCE" | "NEWOBJ":
                args, callee = self.pop(), self.pop()
                self.stack.append(_construct(callee, args))
            case "NEWOBJ_EX":
                _keywords, args, callee = self.pop(), self.pop(), self.pop()
                self.stack.append(_construct(callee, args))
            case "INST":
                self.stack.append(_construct(Record(argument.replace(" ", ".")), tuple(self.pop_mark())))
            case "OBJ":
                callee, *rest = self.pop_mark()
                self.stack.append(_construct(callee, tuple(rest)))
            case "BUILD":
                state = self.pop()
                if isinstance(target := self.stack[-1], Record):  # attributes of containers and tensors say nothing
                    target.state = state
            case "BINPERSID":
                self.stack.append(value := _persistent(self.pop()))
                if isinstance(value, Storage):
                    self.storages[value.key] = value
            case "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError(f"opcode {name}, which torch does not write")
            case _:  # the remaining opcodes push the constant that they carry
                self.stack.append(argument)


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in place of {kind.__name__}")
    return value


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))


def _persistent(reference: Any) -> Any:
    """What torch keeps outside the pickle: ("storage", type, key, device, count[, view]) or ("module", class, …)."""
    tag, kind, *rest = _as(tuple, reference)
    if tag == "module":
        return kind
    if tag != "storage":
        raise ValueError(f"unknown reference {tag!r}")
    key, _device, numel, *view = rest
    if view and view[0] is not None:
        raise ValueError("a storage that is a view of another, as torch 0.3 wrote them")
    if (dtype := _STORAGES.get(_as(Record, kind).name)) is None:
        raise ValueError(f"storage of unknown type {kind.name}")
    if _as(int, numel) < 0:
        raise ValueError(f"storage of {numel} elements")
    return Storage(str(key), dtype, numel)


def _construct(callee: Any, args: Any) -> Any:
    """What calling a name gives: by the table below, or a record of the attempt."""
    name = _as(Record, callee).name
    make = _CONSTRUCTORS.get(name)
    return Record(name, _as(tuple, args)) if make is None else make(*_as(tuple, args))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
    """torch._utils._rebuild_tensor and _v2; _v3 names the element type after (requires_grad, hooks)."""
    storage = _as(Storage, storage)
    dtype = _DTYPES[rest[2].name] if len(rest) > 2 and isinstance(rest[2], Record) else storage.dtype
    size, stride = tuple(_as(int, n) for n in size), tuple(_as(int, n) for n in stride)
    if min((_as(int, offset), *size, *stride), default=0) < 0 or len(size) != len(stride):
        raise ValueError(f"tensor of size {size}, stride {stride}, offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (elements := math.prod(size)) and max(last + 1, elements) * dtype.itemsize > storage.nbytes:
        raise ValueError(f"tensor of size {size}, stride {stride}, offset {offset} in {storage.nbytes} bytes")
    return TensorRef(storage, dtype, offset, size, stride)


def _embedded(data: Any) -> Storage:
    """torch.storage._load_from_bytes: a storage inside a plain pickle, itself a small file in torch's older form."""
    stream = io.BytesIO(_as(bytes, data))
    _magic, _protocol, system, storage, _keys = (read(stream) for _ in range(5))
    if not _as(dict, system).get("little_endian", True):
        raise ValueError("a storage written on a big-endian machine")
    (count,) = struct.unpack("<q", stream.read(8))
    raw = memoryview(data)[stream.tell() :][: _as(Storage, storage).nbytes]
    if count != storage.numel or len(raw) != storage.nbytes:
        raise ValueError(f"{count} elements in {len(raw)} bytes in place of {storage.numel}")
    return Storage(f"{storage.key} in {id(data)}", storage.dtype, storage.numel, raw)


def _subclass(make: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes of its own."""
    return _construct(make, args)


def _first(value: Any, *_: Any) -> Any:
    return value


def _mapping(*args: Any) -> dict[Any, Any]:
    """A dict, ordered or not, from nothing or from pairs."""
    return dict(args[0]) if args and isinstance(args[0], list | tuple | dict) else {}


_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32", "uint64")
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in (*_FLOATS, *_INTEGERS)}
_STORAGES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool, "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128, "torch.storage.UntypedStorage": torch.uint8,
}  # fmt: skip
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.storage._load_from_bytes": _embedded,
    "torch.jit._pickle.restore_type_tag": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.Size": _first,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "builtins.dict": _mapping,
}

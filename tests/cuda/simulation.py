"""CUDA kernels without a GPU: the launches of a plan, compiled for the host, on CPU tensors (see simulated_device.h).

For a new op, `build(folder, "<op>", entries)` is all: the instances that its plans can name.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaintrt.runtime import native

ROOT = Path(__file__).resolve().parents[2]
CPU = 1  # DLPack's device type
_OUTCOMES = (
    "",
    "no such kernel",
    "other parameters than the kernel's",
    "not all threads at a barrier",
    "shared memory overrun",
)


class Launch(NamedTuple):
    """One kernel launch, as the binding gives it."""

    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    params: bytes
    round: int | None = None  # of a launch that is repeated


class Plan(NamedTuple):
    """What one call launches."""

    launches: list[Launch]
    workspace_bytes: int


def plan(planner: str, args: Sequence[Any], outs: Sequence[Tensor], *, ieee: bool = False) -> Plan:
    """The launch plan of a call on CPU tensors."""
    launches, workspace_bytes = native.library().planner(planner)(tuple(args), tuple(outs), CPU, ieee)
    return Plan([Launch(*launch) for launch in launches], workspace_bytes)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("params_bytes", ctypes.c_uint),
        ("params", ctypes.c_char_p),
        ("workspace", ctypes.c_void_p),
        ("round", ctypes.c_int),  # -1: no such parameter
        ("reversed", ctypes.c_int),
    )


class Simulator:
    """Runs plans whose kernels it was built with."""

    def __init__(self, library: Path) -> None:
        self._simulate = ctypes.CDLL(str(library)).simulate

    def __call__(self, plan: Plan, *, reverse: bool = False) -> None:
        """All launches in order, with a workspace full of NaN that is watched on both sides."""
        margin = 256
        memory = torch.full((plan.workspace_bytes + 3 * margin,), 255, dtype=torch.uint8)
        begin = -memory.data_ptr() % margin + margin
        workspace = memory[begin:].data_ptr() if plan.workspace_bytes else None
        for launch in plan.launches:
            self.launch(launch, workspace, reverse=reverse)
        assert bool((memory[:begin] == 255).all()), "the workspace was written before its begin"
        assert bool((memory[begin + plan.workspace_bytes :] == 255).all()), "the workspace was written beyond its end"

    def launch(self, launch: Launch, workspace: int | None = None, *, reverse: bool = False) -> None:
        """One launch, with the workspace at this address; `reverse` runs the last thread of a block first."""
        three = ctypes.c_uint * 3
        entry, grid, block, shared_bytes, params, round = launch
        round = -1 if round is None else round
        form = _Launch(three(*grid), three(*block), shared_bytes, len(params), params, workspace, round, reverse)
        outcome = self._simulate(entry.encode(), ctypes.byref(form))
        assert outcome == 0, f"{entry}: {_OUTCOMES[outcome]}"


def build(folder: Path, op: str, entries: Iterable[str], csrc: Path = ROOT / "csrc") -> Simulator:
    """A simulator of `op`'s instances; needs nvcc, as the host's compiler with CUDA's headers."""
    cases = "\n".join(f"  SIMULATE({entry})" for entry in sorted(entries))
    (folder / f"{op}.cpp").write_text(f"""
#include "simulated_device.h"
#include "cuda/{op}.cuh"
extern "C" int simulate(const char* entry, const simulated::Launch* launch) {{
{cases}
  return simulated::kNoSuchKernel;
}}
""")
    library = folder / f"{op}.so"
    flags = ["-x", "c++", "-std=c++17", "-O2", "-shared", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror"]
    command = ["nvcc", *flags, f"-I{Path(__file__).parent}", f"-I{csrc}", str(folder / f"{op}.cpp"), "-o", str(library)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}"
    return Simulator(library)


class SimulatedCupy:
    """As much of CuPy as the cupy backend uses, on CPU tensors; its modules hold simulated kernels."""

    def __init__(self, simulate: Simulator) -> None:
        self.simulate = simulate
        self.compiled: list[tuple[str, ...]] = []  # the instances of each module
        self.launched: list[str] = []
        self.cuda = self

    def Device(self, index: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def RawModule(self, *, code: str, options: Sequence[str], name_expressions: tuple[str, ...]) -> SimulatedCupy:
        self.compiled.append(name_expressions)
        return self

    def get_function(self, entry: str) -> _SimulatedKernel:
        assert any(entry in names for names in self.compiled)
        return _SimulatedKernel(self, entry)


class _SimulatedKernel:
    def __init__(self, cupy: SimulatedCupy, entry: str) -> None:
        self._cupy, self._entry = cupy, entry
        self.max_dynamic_shared_size_bytes = 48 * 1024

    def __call__(self, grid: Any, block: Any, args: Sequence[Any], *, shared_mem: int) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes, f"{self._entry} may not use {shared_mem} bytes"
        self._cupy.launched.append(self._entry)
        params, *further = map(_python, args)
        workspace, round = (*further, None, None)[:2]
        self._cupy.simulate.launch(Launch(self._entry, grid, block, shared_mem, params, round), workspace)


def _python(arg: Any) -> Any:
    """A kernel's parameter: bytes or an integer."""
    return arg.tobytes() if arg.dtype.kind == "V" else int(arg)

"""Compiles every Triton kernel for GPUs that are not here, and holds it to its budget.

    python -m inpaintrt.kernels.aot --check [--arch 80 90] [--json FILE]

Needs no GPU and no driver. Each op module of this package names its launches in `variants()` and what they may use in
`BUDGET`; they are compiled down to machine code from tensors on the meta device, and registers, local memory (spills)
and shared memory are read from the result. A new op needs no change here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._lib import INTERPRETING, Budget, Launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture."""

    op: str
    variant: str
    arch: int
    registers: int  # per thread
    local_bytes: int  # per thread; these kernels declare no local arrays, so anything here is spilled registers
    shared_bytes: int  # per program, static and dynamic

    def over(self, budget: Budget) -> list[str]:
        """One sentence for each budget that is exceeded."""
        found = []
        if self.local_bytes:
            found.append(f"spills {self.local_bytes} bytes per thread; none are allowed")
        if self.registers > budget.registers:
            found.append(f"uses {self.registers} registers per thread; the budget is {budget.registers}")
        if self.shared_bytes > budget.shared_bytes:
            found.append(f"uses {self.shared_bytes} bytes of shared memory; the budget is {budget.shared_bytes}")
        return [f"{self.op}: {self.variant} on sm_{self.arch} {sentence}" for sentence in found]


def op_modules() -> Iterator[tuple[str, ModuleType]]:
    """The kernel modules of this package by op name."""
    package = importlib.import_module(__package__ or "")
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_") and info.name != "aot":
            yield info.name, importlib.import_module(f"{package.__name__}.{info.name}")


def measure(op: str, variant: str, launch: Launch, arch: int) -> Usage:
    """Compile one launch for one architecture (86 means sm_86) and read what it uses."""
    options = dict(launch.options)
    if "enable_fp_fusion" not in options:
        raise ValueError(f"{op}: {variant} leaves enable_fp_fusion to Triton's default, which changes between versions")
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]  # ships with Triton
        report = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    entry = re.search(rf"Function {compiled.metadata.name}:\s+(.*)", report)
    if entry is None:
        raise RuntimeError(f"cuobjdump says nothing of {compiled.metadata.name}: {report!r}")
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", entry[1])}
    return Usage(
        op=op,
        variant=variant,
        arch=arch,
        registers=used["REG"],
        local_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=used["SHARED"] + compiled.metadata.shared,
    )


def source(launch: Launch) -> Any:
    """The launch as Triton's compiler input, specialised as the JIT would.

    That is on aligned pointers, on None, and on integers that are 1 or multiples of 16 unless `do_not_specialize` names
    them.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    arguments = dict(zip((p.name for p in launch.kernel.params), launch.args, strict=False)) | dict(launch.constants)
    aligned = [["tt.divisibility", 16]]
    for index, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(index,)] = aligned
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif type(value) is int:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(index,)] = aligned
        else:
            raise TypeError(
                f"kernel argument {parameter.name} is {value!r}; accepted: tensor, int, float, None, or a constexpr"
            )
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def survey(architectures: Iterable[int]) -> tuple[list[Usage], list[str]]:
    """Every variant of every op on every architecture, and the sentences about those over budget."""
    if INTERPRETING.value:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it to cross-compile")
    architectures = tuple(architectures)
    usages: list[Usage] = []
    problems: list[str] = []
    for op, module in op_modules():
        for variant, launch in module.variants():
            for arch in architectures:
                usage = measure(op, variant, launch, arch)
                usages.append(usage)
                problems += usage.over(module.BUDGET)
    return usages, problems


def table(usages: Sequence[Usage]) -> str:
    """Registers per thread: a row per variant, a column per architecture; also shared and spilled bytes, if any."""
    architectures = sorted({u.arch for u in usages})
    cells: dict[str, dict[int, str]] = {}
    for u in usages:
        text = str(u.registers)
        text += f" +{u.shared_bytes}B" if u.shared_bytes else ""
        text += f" spill {u.local_bytes}B" if u.local_bytes else ""
        cells.setdefault(f"{u.op} {u.variant}", {})[u.arch] = text
    head = ["registers", *(f"sm_{arch}" for arch in architectures)]
    rows = [[name, *(row.get(arch, "") for arch in architectures)] for name, row in cells.items()]
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *rows]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m inpaintrt.kernels.aot", description="Cross-compile the Triton kernels."
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a kernel spills or exceeds its budget")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, metavar="CC", help="for example 80 90")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    usages, problems = survey(options.arch)
    print(table(usages))
    print(f"{len(usages)} binaries in {time.perf_counter() - start:.1f} s, Triton {triton.__version__}")
    if options.json:
        rows = {"triton": triton.__version__, "usages": [asdict(u) for u in usages], "problems": problems}
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    for problem in problems:
        print(f"over budget: {problem}", file=sys.stderr)
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""One stem per op everywhere, complete specifications, and the direction of imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from inpaintrt import ops
from inpaintrt.runtime import native, registry
from inpaintrt.runtime.settings import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
OPS = registry.names()

# What a lane of an op consists of.
FILES = {
    "cpu": ("csrc/cpu/{}.cpp",),
    "triton": ("kernels/{}.py",),
    "cuda": ("csrc/plan/{}.h", "csrc/plan/{}.cpp", "csrc/cuda/{}.cuh", "csrc/cuda/{}.cu"),
    "cupy": ("csrc/plan/{}.h", "csrc/plan/{}.cpp", "csrc/cuda/{}.cuh"),
}
ALWAYS = ("inpaintrt/ops/{}.py", "benchmarks/bench_{}.py", "docs/ops/{}.md")
# Files beside those of ops that are shared by them.
SHARED = {
    "inpaintrt/ops": {"__init__", "_shared"},
    "csrc/cpu": {"dispatch", "parallel", "arena"},
    "kernels": {"__init__", "_lib", "aot"},
    "csrc/plan": {"plan", "nest"},
    "csrc/cuda": {"common", "activation", "library"},
    "docs/ops": {"README"},
}


def declared(op: str) -> set[str]:
    """The files that the op's specification promises."""
    lanes = [file for lane in registry.get(op).lanes for file in FILES[lane]]
    return {file.format(op) for file in (*ALWAYS, *lanes)}


# ---- one stem -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_every_declared_lane_has_its_files(op: str) -> None:
    assert not [file for file in sorted(declared(op)) if not (ROOT / file).is_file()]


@pytest.mark.parametrize("folder", SHARED)
def test_no_file_without_an_op(folder: str) -> None:
    """A kernel that no lane declares is dead, or its lane was forgotten."""
    suffixes = {
        Path(file).suffix for lane in (ALWAYS, *FILES.values()) for file in lane if Path(file).parent == Path(folder)
    }
    found = {path for path in (ROOT / folder).iterdir() if path.suffix in suffixes and path.stem not in SHARED[folder]}
    assert found, "no op is here: the folder has moved"
    promised = {file for op in OPS for file in declared(op)}
    assert not sorted(name for path in found if (name := path.relative_to(ROOT).as_posix()) not in promised)


def test_native_sources_are_named_in_cmake() -> None:
    (names,) = re.findall(r"set\(INPAINTRT_OPS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert set(names.split()) == {op for op in OPS if {"cpu", "cuda", "cupy"} & set(registry.get(op).lanes)}


@pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")
def test_the_native_library_holds_what_the_specifications_declare() -> None:
    specs = [registry.get(op) for op in OPS]
    forward = {spec.name for spec in specs if "cpu" in spec.lanes}
    backward = {spec.name + "_backward" for spec in specs if "cpu" in spec.backward_lanes}
    assert set(native.library().cpu_kernels()) == forward | backward
    assert all(native.library().planner(spec.name) is not None for spec in specs if "cupy" in spec.lanes)


def test_public_functions_are_the_ops() -> None:
    assert sorted(ops.__all__) == sorted(OPS)
    assert all(getattr(ops, op).__module__ == f"inpaintrt.ops.{op}" for op in OPS)


# ---- specifications -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_specification_is_complete(op: str) -> None:
    spec = registry.get(op)
    levels = {level: [sample.id for sample in spec.samples(level)] for level in ("smoke", "full", "bench")}
    assert all(levels.values())
    assert all(len(ids) == len(set(ids)) for ids in levels.values())
    assert set(levels["smoke"]) <= set(levels["full"])
    assert set(spec.lanes) <= set(BACKENDS) - {"auto", "reference"}
    assert set(spec.backward_lanes) <= set(spec.lanes)
    assert spec.differentiable or not spec.backward_lanes
    shapes = [shape for sample in spec.samples("smoke") for shape in sample.shapes.values()]
    assert any(0 in shape for shape in shapes), "no sample is empty"
    assert any(set(shape) <= {1, 2} for shape in shapes), "no sample is one pixel"


@pytest.mark.parametrize("op", OPS)
def test_documentation_names_every_argument(op: str) -> None:
    doc = getattr(ops, op).__doc__ or ""
    assert all(heading in doc for heading in ("Args:\n", "Returns:\n", "Raises:\n"))
    arguments = doc.split("Args:\n")[1].split("Returns:")[0]
    missing = [name for name in registry.get(op).signature.parameters if not re.search(rf"\b{name}\b", arguments)]
    assert not missing


# ---- layers ---------------------------------------------------------------------------------------------------------

# What each layer may import of this package, besides itself. `testing` is beside the layers, and uses only the runtime.
MAY_IMPORT = {
    "runtime": {"runtime", "backends", "testing", "_C"},
    "backends": {"runtime", "backends", "kernels"},
    "ops": {"runtime", "ops"},
    "adapters": {"runtime", "ops", "adapters", "testing"},
    "models": {"runtime", "models"},
}


def imported(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file of the package imports, anywhere in it."""
    package = path.relative_to(ROOT).parent.parts
    package = ("inpaintrt", *package) if package[0] == "kernels" else package  # as it is installed
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = (
                [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
                if node.level
                else [node.module]
            )
            base = ".".join(part for part in parts if part)
            yield from ((f"{base}.{alias.name}" for alias in node.names) if base == "inpaintrt" else (base,))


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layers_import_only_what_is_below(layer: str) -> None:
    for path in (ROOT / "inpaintrt" / layer).glob("*.py"):
        own = {name.split(".")[1] for name in imported(path) if name.startswith("inpaintrt.")}
        assert own <= MAY_IMPORT[layer], path.name


def test_nothing_imports_the_bare_name_kernels() -> None:
    """That name belongs to another package; from the root of the repository it would find this folder."""
    for path in (*ROOT.glob("inpaintrt/**/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")):
        assert not [name for name in imported(path) if name.split(".")[0] == "kernels"], path


def test_kernels_know_nothing_of_the_package() -> None:
    for path in ROOT.glob("kernels/*.py"):
        own = {name for name in imported(path) if name.startswith("inpaintrt")}
        assert all(name.startswith("inpaintrt.kernels") for name in own), path


def test_native_code_knows_neither_torch_nor_python() -> None:
    banned = re.compile(r'#include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')
    for path in ROOT.glob("csrc/**/*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and "bindings" not in path.parts:
            assert not banned.search(path.read_text()), path


def test_the_interface_header_needs_only_the_standard_library() -> None:
    header = (ROOT / "csrc" / "include" / "inpaintrt" / "abi.h").read_text()
    assert re.findall(r"#include (\S+)", header) == ["<stdint.h>"]

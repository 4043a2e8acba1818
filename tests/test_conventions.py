"""What a reader relies on and no other test would notice: one stem per op, complete specifications, who imports whom."""

from __future__ import annotations

import ast
import inspect
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import inpaintrt as irt
from inpaintrt import ops
from inpaintrt.runtime import native, registry
from inpaintrt.runtime.settings import BACKENDS

from .conftest import part_of

ROOT = Path(__file__).resolve().parents[1]
OPS = registry.names()

CMAKE = (ROOT / "CMakeLists.txt").read_text()
PARTS = re.findall(r"set\(INPAINTRT_PARTS ([^)]*)\)", CMAKE)[0].split()

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
    "inpaintrt/ops": {"__init__", "_shared", "_convolution", "_engine", "_resampling", "_philox", "_sampling"},
    "csrc/cpu": {"dispatch", "parallel", "arena", "preferences", *PARTS},
    "kernels": {"__init__", "_lib", "_planes", "_conv2d", "_fir", "_philox", "_samples", "aot"},
    "csrc/plan": {
        "plan",
        "nest",
        "fft",
        "conv2d",
        "conv2d_call",
        "windows",
        "windows_call",
        "step",
        "step_plan",
        "moments",
        "moments_plan",
        "resample",
        "resample_plan",
    },
    "csrc/cuda": {"common", "activation", "library", "fft", "mma", "conv2d", "philox", "step", "moments", "resample"},
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


def test_no_benchmark_without_an_op() -> None:
    others = {"convolutions", "guided_unet", "memory", "models", "overhead", "put", "startup"}
    assert {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")} == {*OPS, *others}


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
    (names,) = re.findall(r"set\(INPAINTRT_OPS ([^)]*)\)", CMAKE)
    assert set(names.split()) == {op for op in OPS if {"cpu", "cuda", "cupy"} & set(registry.get(op).lanes)}


def test_ops_compiled_for_products_of_pairs_are_those_on_the_convolution_engine() -> None:
    (names,) = re.findall(r"set\(INPAINTRT_OPS_avx512bf16 ([^)]*)\)", (ROOT / "cmake" / "isa.cmake").read_text())
    assert set(names.split()) == {op for op in OPS if '#include "conv_call.h"' in source(op)}


def source(op: str) -> str:
    path = ROOT / "csrc" / "cpu" / f"{op}.cpp"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("folders", [("cpu",), ("plan", "cuda")], ids="+".join)
def test_no_two_headers_define_a_type_of_one_name(folders: tuple[str, ...]) -> None:
    """The linker would take the member functions of either for those of both."""
    definition = re.compile(r"^(?:struct|class|enum class) (?:alignas\(.*?\) )?(\w+)[^;{]*\{", re.M)
    owners: dict[str, set[str]] = {}
    headers = [
        path for folder in folders for path in (ROOT / "csrc" / folder).iterdir() if path.suffix in (".h", ".cuh")
    ]
    for path in sorted(headers):
        space, *parts = re.split(r"^namespace (\S+) \{$", path.read_text(), flags=re.M)
        for space, text in zip(parts[::2], parts[1::2], strict=True):
            for name in definition.findall(text):
                owners.setdefault(f"{space}::{name}", set()).add(path.name)
    assert len(owners) > 20, "the pattern finds no types any more"
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}


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
def test_benchmarked_calls_have_a_floor(op: str) -> None:
    spec = registry.get(op)
    for sample in spec.samples("bench"):
        tensors = {name: torch.empty(shape, device="meta") for name, shape in sample.shapes.items()}
        cost = spec.cost(*spec.bind(**tensors, **sample.kwargs))
        assert 0 < cost.flops < math.inf, sample.id
        assert 0 < cost.bytes < math.inf, sample.id


@pytest.mark.parametrize("op", OPS)
def test_documentation_names_every_argument(op: str) -> None:
    doc = getattr(ops, op).__doc__ or ""
    assert all(heading in doc for heading in ("Args:\n", "Returns:\n", "Raises:\n"))
    arguments = doc.split("Args:\n")[1].split("Returns:")[0]
    missing = [name for name in registry.get(op).signature.parameters if not re.search(rf"\b{name}\b", arguments)]
    assert not missing


PUBLIC: dict[str, Callable[..., object]] = {
    name: getattr(irt, name) for name in irt.__all__ if inspect.isfunction(getattr(irt, name))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_documentation_of_the_package(name: str) -> None:
    """Every option is named, and what is raised has its section."""
    text = inspect.getdoc(PUBLIC[name]) or ""
    parameters = [p.name for p in inspect.signature(PUBLIC[name]).parameters.values()]
    assert text
    assert not [p for p in parameters[1:] if not re.search(rf"\b{p}\b", text)]
    body = ast.parse(inspect.getsource(PUBLIC[name]))
    assert re.search("^Raises:", text, re.M) or not any(isinstance(node, ast.Raise) for node in ast.walk(body))


# ---- layers ---------------------------------------------------------------------------------------------------------

PURE = ("inpaintrt.testing.compare", "inpaintrt.testing.recipe", "inpaintrt.testing.layouts")
# What each part may import of the package besides itself; the first entry that fits a module holds. A part that is not
# named is at the top (command line, session, documentation) and may import all.
LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PURE, ()),
    "inpaintrt.testing.timing": (),
    "inpaintrt.kernels": (),
    "inpaintrt.runtime": ("inpaintrt._C", *PURE),
    "inpaintrt.backends": ("inpaintrt.runtime",),
    "inpaintrt.ops": ("inpaintrt.runtime", *PURE),
    "inpaintrt.models": ("inpaintrt.runtime", "inpaintrt.ops"),
    "inpaintrt.samplers": ("inpaintrt.runtime", "inpaintrt.ops"),
    "inpaintrt.adapters": ("inpaintrt.runtime", "inpaintrt.ops", "inpaintrt.models", *PURE),
}


def modules() -> Iterator[tuple[str, Path]]:
    """The package's modules by name."""
    for folder, prefix in ((ROOT / "inpaintrt", "inpaintrt"), (ROOT / "kernels", "inpaintrt.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((prefix, *parts)).removesuffix(".__init__"), path


def imported(module: str, tree: ast.AST, is_package: bool = False) -> set[str]:
    """Full names of what a module imports, inside functions and for type checking too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                package = module.split(".")[: -up or None]
                base = ".".join([*package, *filter(None, [node.module])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def forbidden(module: str, names: set[str]) -> set[str]:
    part = next((p for p in LAYERS if within(module, (p,))), None)
    ours = {name for name in names if within(name, ("inpaintrt",))}
    return {name for name in ours if not within(name, (part, *LAYERS[part]))} if part else set()


def test_the_scan_sees_what_it_should() -> None:
    def scan(module: str, source: str, is_package: bool = False) -> set[str]:
        return forbidden(module, imported(module, ast.parse(source), is_package))

    assert scan("inpaintrt.runtime.swap", "def f():\n    from inpaintrt.ops import x") == {"inpaintrt.ops.x"}
    assert scan("inpaintrt.runtime.swap", "from ..adapters import lama") == {"inpaintrt.adapters.lama"}
    assert scan("inpaintrt.adapters", "from .. import acceleration", True) == {"inpaintrt.acceleration"}
    assert scan("inpaintrt.testing.compare", "import inpaintrt") == {"inpaintrt"}
    assert scan("inpaintrt.kernels.op", "from . import _lib\nfrom inpaintrt.runtime import spec") == {
        "inpaintrt.runtime.spec"
    }
    assert not scan("inpaintrt.ops.op", "import torch\nfrom ._shared import x\nfrom inpaintrt.runtime.spec import Lane")
    assert not scan("inpaintrt.cli", "from . import adapters")


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_go_down(module: str, path: Path) -> None:
    names = imported(module, ast.parse(path.read_text(encoding="utf-8")), path.name == "__init__.py")
    assert not forbidden(module, names)


def test_nobody_imports_the_bare_name_kernels() -> None:
    assert within("kernels.gated_activation", ("kernels",))
    for folder in ("inpaintrt", "kernels", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            names = imported(path.stem, ast.parse(path.read_text(encoding="utf-8")))
            assert not [n for n in names if within(n, ("kernels",))], f"{path} imports another package's name"


def test_import_is_light() -> None:
    """What the package adds to torch's own imports: nothing optional, no library, no device."""
    program = """
        import sys, torch
        before = {*sys.modules}
        import inpaintrt as irt
        if sys.argv[1] == "use":
            irt.accelerate, irt.explain, irt.ops.gated_activation, irt.load, irt.use_backend, irt.Report
        heavy = {"PIL", "triton", "cupy", "safetensors", "inpaintrt._C", "inpaintrt.kernels"}
        print(sorted(heavy & {*sys.modules} - before), torch.cuda.is_initialized())
    """
    for how in ("import", "use"):
        command = [sys.executable, "-P", "-c", textwrap.dedent(program), how]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[] False\n", how


def test_the_runtime_stays_small() -> None:
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "inpaintrt/runtime").glob("**/*.py"))
    assert lines < 2500, f"{lines} lines: the runtime is what everybody has to understand"


# ---- native code and kernels ----------------------------------------------------------------------------------------

# Headers of the C and C++ standard libraries, of POSIX, and of the compiler.
STANDARD = re.compile(r"(sys/\w+|pthread|dlfcn|link|unistd|immintrin|std\w+|string|math)\.h|[a-z_]+")


def includes(path: Path) -> Iterator[tuple[str, bool]]:
    """(name, whether in quotes)"""
    for quote, name in re.findall(r'^\s*#\s*include\s*(["<])([^">]+)', path.read_text(encoding="utf-8"), re.M):
        yield name, quote == '"'


def resolve(name: str, path: Path) -> Path | None:
    folders = (path.parent, ROOT / "csrc", ROOT / "csrc" / "include", ROOT / "csrc" / "cpu")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


@pytest.mark.parametrize("folder", ["include/inpaintrt", "cpu", "plan"])
def test_native_code_needs_no_torch_python_or_cuda(folder: str) -> None:
    paths = [p for p in (ROOT / "csrc" / folder).iterdir() if p.suffix in (".h", ".cpp")]
    assert paths
    for path in paths:
        for name, quoted in includes(path):
            if not quoted:
                assert STANDARD.fullmatch(name), f"{path.name} includes <{name}>"
                continue
            found = resolve(name, path)
            assert found is not None, f"{path.name} includes {name}"
            inside = found.resolve().relative_to(ROOT / "csrc").parts[0]
            assert inside in ("include", "cpu", "plan"), f"{path.name} includes {name}"
    if folder.startswith("include"):
        assert {name for p in paths for name, _ in includes(p)} == {"stdint.h"}, "the C ABI needs one header"


def test_torch_and_python_end_at_the_bindings() -> None:
    banned = re.compile(r"(torch|ATen|c10|pybind11)/|Python\.h")
    paths = [p for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    outside = {p for p in paths if any(banned.match(name) for name, _ in includes(p))}
    assert {p.parent.name for p in outside} == {"bindings"}, "the scan finds the bindings, and nothing else"


def test_device_code_includes_what_nvrtc_has() -> None:
    """`.cuh` files and what they include: CUDA's two half types, each other, and plan headers that include the same."""
    todo, seen = [*(ROOT / "csrc/cuda").glob("*.cuh")], set()
    assert todo
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name, quoted in includes(path):
            if name in ("cuda_fp16.h", "cuda_bf16.h"):
                continue
            found = resolve(name, path) if quoted else None
            allowed = found is not None and (found.suffix == ".cuh" or found.parent.name == "plan")
            assert allowed, f"{path.name} includes {name}"
            todo.append(found)


def uses(tree: ast.AST, owner: str, name: str) -> bool:
    """Whether `owner.name` occurs, or `name` imported from Triton."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value).split(".")[-1] == owner:
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton"):
            found = {alias.name for alias in node.names}
            if name in found:
                return True
    return False


def test_triton_rules() -> None:
    assert uses(ast.parse("@triton.autotune(configs=[])\ndef f(): pass"), "triton", "autotune")
    assert uses(ast.parse("from triton import jit\nfrom triton import autotune"), "triton", "autotune")
    assert uses(ast.parse("acc = tl.dot(a, b)"), "tl", "dot")
    assert not uses(ast.parse("torch.dot(a, b)"), "tl", "dot")
    for module, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not uses(tree, "triton", "autotune"), f"{path} cannot run in the interpreter and stalls first calls"
        if module != "inpaintrt.kernels._lib":
            assert not uses(tree, "tl", "dot"), f"{path}: `dot` of kernels/_lib.py is right in the interpreter too"


def test_parts_of_the_suite_make_the_whole() -> None:
    tests = list(range(11))
    parts = [part_of(tests, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(test for part in parts for test in part) == tests
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert part_of(tests, "1/1") == tests
    for wrong in ("0/3", "4/3", "3", "a/b", "1/0"):
        with pytest.raises(pytest.UsageError, match=f"--part is '{wrong}'"):
            part_of(tests, wrong)

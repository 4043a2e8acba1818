"""docs/add-an-op.md carried out: its code blocks, written into a copy of the repository, are a complete op.

The copy is built and runs the generated tests, in processes that see nothing of this checkout. What is proved: the page
is right, and adding an op needs no change to the runtime, the backends, the bindings or the tests.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from .once import made_once

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "add-an-op.md"
OP = "scaled_residual"
GENERATED = f"docs/ops/{OP}.md"
_LEFT_OUT = {"__pycache__", "build", "dist", "out", "results", "golden"}


def left_out(folder: str, names: list[str]) -> set[str]:
    """What a copy of the repository does without: caches, environments, builds, large test data."""
    hidden = {name for name in names if name.startswith(".") and name not in (".ci", ".clang-format")}
    return hidden | {name for name in names if name in _LEFT_OUT or name.endswith(".so")}


@dataclass(frozen=True)
class Block:
    language: str
    path: str
    text: str


def blocks() -> list[Block]:
    """The code blocks of the page that are headed by a file."""
    return [Block(*found) for found in re.findall(r"^```(\w+) (\S+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)]


def apply(difference: str, text: str) -> str:
    """`text` with each hunk of `difference` applied; `…` stands for whatever is there."""
    for hunk in difference.strip("\n").split("\n\n"):
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        text, count = re.subn(
            "^" + re.escape(old).replace("…", "(.*?)") + "$",
            lambda found, new=new: new.replace("…", found[1]) if found.groups() else new,
            text, flags=re.M | re.S,
        )  # fmt: skip
        assert count == 1, f"{count} places fit {old!r}"
    return text


# ---- the page ------------------------------------------------------------------------------------------------------


def test_differences_apply():
    assert apply("-set(OPS …)\n+set(OPS … new)\n", "set(OPS a b)\nset(X)\n") == "set(OPS a b new)\nset(X)\n"
    assert apply(" one\n+two\n\n-[…]\n+[…, 3]", "one\nzwei\n[1,\n 2]\n") == "one\ntwo\nzwei\n[1,\n 2, 3]\n"
    with pytest.raises(AssertionError, match="0 places"):
        apply("-absent\n+new", "one\n")


def test_checklist_names_the_files_of_the_example():
    table = PAGE.read_text().split("## Checklist")[1].split("\n## ")[0]
    named = {path for row in re.findall(r"^\| (`.*?) \|", table, re.M) for path in re.findall(r"`(.*?)`", row)}
    assert {path.replace("<op>", OP) for path in named} == {block.path for block in blocks()} | {GENERATED}


def test_example_is_not_an_op_of_the_library():
    assert not list(ROOT.glob(f"*/**/{OP}.*"))


# ---- the copy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """A repository with the example op, and the package that was built from it."""

    root: Path
    before: dict[str, str]

    @property
    def site(self) -> Path:
        return self.root.parent / "site"

    def digests(self) -> dict[str, str]:
        return digests(self.root)

    def python(self, *arguments: str, **env: str) -> str:
        """The output of a Python process that imports the copy's package; the test fails with it where it fails.

        -S keeps out the import hook of an editable installation, -P the checkout that lies in the current folder.
        """
        installed = [p for p in sys.path if p and ("-packages" in p or not Path(p).is_relative_to(ROOT))]
        path = [str(self.site), *installed]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1", **env}
        return run([sys.executable, "-S", "-P", *arguments], cwd=self.root, env=env)

    def pytest(self, *arguments: str, **env: str) -> str:
        return self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **env)


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    def make(folder: Path) -> None:
        root = folder / "repository"
        shutil.copytree(ROOT, root, ignore=left_out)
        made = Copy(root, digests(root))
        for block in blocks():
            target = root / block.path
            target.write_text(apply(block.text, target.read_text()) if block.language == "diff" else block.text)
        build(made)
        made.python("-m", "inpaintrt.testing.docs", "--write")
        (folder / "before.json").write_text(json.dumps(made.before))

    folder = made_once(tmp_path_factory, "add_an_op", make)
    return Copy(folder / "repository", json.loads((folder / "before.json").read_text()))


def build(made: Copy) -> None:
    """The package as a wheel lays it out, with the native library for this machine's Python."""
    assert importlib.util.find_spec("pybind11"), "pip install cmake ninja pybind11"
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": tools}
    pybind11 = run([sys.executable, "-m", "pybind11", "--cmakedir"]).strip()
    folder = made.root.parent / "build"
    options = ["SKBUILD_PROJECT_VERSION=0.0.0", "INPAINTRT_CUDA=OFF", "INPAINTRT_WERROR=ON", f"pybind11_DIR={pybind11}"]
    options += [f"Python_EXECUTABLE={sys.executable}"]
    options += [
        "CMAKE_BUILD_TYPE=Quick",
        "INPAINTRT_ISAS=scalar;avx2",
    ]  # a tenth of a release's time; speed is not the subject
    run(["cmake", "-G", "Ninja", "-S", str(made.root), "-B", str(folder), *(f"-D{o}" for o in options)], env=env)
    run(["cmake", "--build", str(folder)], env=env)
    run(["cmake", "--install", str(folder), "--prefix", str(made.site)], env=env)
    shutil.copytree(made.root / "inpaintrt", made.site / "inpaintrt", dirs_exist_ok=True)
    shutil.copytree(made.root / "kernels", made.site / "inpaintrt" / "kernels")


def lanes(output: str) -> dict[str, tuple[int, int]]:
    """Cases that ran and were refused, by backend, as tests/conftest.py sums them up."""
    found = re.findall(rf"^{OP} · (\w+): (\d+) / (\d+)$", output, re.M)
    return {backend: (int(ran), int(refused)) for backend, ran, refused in found}


@pytest.mark.slow
def test_only_the_named_files_differ(copy: Copy) -> None:
    after = copy.digests()
    changed = {path for path in after.keys() | copy.before.keys() if after.get(path) != copy.before.get(path)}
    generated = {path for path in changed if path.startswith("docs/ops/")}
    assert changed - generated == {block.path for block in blocks()}
    assert GENERATED in generated
    assert not any(
        path.startswith(("inpaintrt/runtime/", "inpaintrt/backends/", "csrc/bindings/", "tests/")) for path in changed
    )


@pytest.mark.slow
def test_the_copy_is_what_runs(copy: Copy) -> None:
    where = copy.python(
        "-c", "import inpaintrt, inpaintrt._C, inpaintrt.kernels as k; print(inpaintrt.__file__, k.__file__)"
    )
    assert all(Path(file).is_relative_to(copy.site) for file in where.split())


@pytest.mark.slow
def test_generated_tests_conventions_and_opcheck(copy: Copy) -> None:
    output = copy.pytest("tests/test_ops.py", "tests/test_opcheck.py", "tests/test_grad.py", "-k", OP)
    assert lanes(output)["cpu"] == (lanes(output)["reference"][0], 0), output
    assert re.search(rf"test_forward\[{OP}|passed", output)
    copy.pytest("tests/test_conventions.py")


@pytest.mark.slow
def test_scalar_kernel_gives_the_same_numbers(copy: Copy) -> None:
    output = copy.pytest("tests/test_ops.py", "-k", f"{OP} and cpu", INPAINTRT_CPU_ISA="scalar")
    assert lanes(output)["cpu"][0] > 0


CROSS_COMPILE = f"""
import sys
from inpaintrt.kernels import aot
aot.op_modules = lambda found=dict(aot.op_modules()): iter([("{OP}", found["{OP}"])])
sys.exit(aot.main(["--check", "--arch", "90"]))
"""


@pytest.mark.slow
def test_triton_lane(copy: Copy) -> None:
    pytest.importorskip("triton")
    output = copy.pytest("tests/test_ops.py", "-k", f"{OP} and triton", TRITON_INTERPRET="1")
    ran, refused = lanes(output)["triton"]
    assert ran > 0
    assert refused == 0
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(copy.root.parent / "triton")}
    usage = copy.python("-c", CROSS_COMPILE, **env)
    assert f"{OP} forward bfloat16 strided" in usage


@pytest.mark.slow
def test_page_and_benchmark(copy: Copy) -> None:
    copy.python("-m", "inpaintrt.testing.docs", "--check")
    assert "residual + scale · x" in (copy.root / GENERATED).read_text()
    assert "1 passed" in copy.pytest(f"benchmarks/bench_{OP}.py", "-c", "pyproject.toml")


# ---- the CUDA lanes, as far as a machine without a GPU can prove them ------------------------------------------------

PLANS = """
import pathlib, sys, torch
sys.path.insert(0, "tests/cuda")
import simulation
from inpaintrt.ops.scaled_residual import SPEC
from inpaintrt.testing import assert_close_to_truth

folder, *entries = sys.argv[1:] or [None]
simulate = simulation.build(pathlib.Path(folder), "scaled_residual", entries) if folder else None
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    wide = torch.randn(2, 3, 8, 17).to(dtype)
    for x in (wide[..., 1:], wide[..., 1:].contiguous()):  # rows that no pack can start at, and whole packs
        residual = torch.randn(x.shape).to(dtype)
        (out,) = SPEC.out(x, residual, 0.5)
        plan = simulation.plan("scaled_residual", (x, residual, 0.5), (out.fill_(torch.nan),))
        (launch,) = plan.launches
        print(launch.entry)
        if simulate is not None:
            simulate(plan)
            truth = SPEC.run_reference(x.double(), residual.double(), 0.5)
            assert_close_to_truth(out, truth, SPEC.run_reference(x, residual, 0.5), context=launch.entry)
"""


@pytest.mark.slow
def test_cuda_lanes(copy: Copy, tmp_path: Path) -> None:
    entries = copy.python("-c", PLANS).split("\n")[:-1]
    types = {"float": 4, "__half": 8, "__nv_bfloat16": 8}
    assert set(entries) == {f"irt::{OP}<{t}, {pack}, int>" for t, most in types.items() for pack in (1, most)}
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("nvcc not found: the device code was not compiled")
    copy.python("-c", PLANS, str(tmp_path), *entries)

    csrc = copy.root / "csrc"
    include = [f"-I{csrc}", f"-I{csrc / 'include'}", f"-I{csrc / 'cpu'}"]
    compiled = tmp_path / "kernels.o"
    device = ["-std=c++17", "-arch=sm_90", "--Werror", "all-warnings", "-Xptxas=-v"]
    log = run([nvcc, *device, *include, "-c", str(csrc / "cuda" / f"{OP}.cu"), "-o", str(compiled)])
    assert all(entry.encode() in compiled.read_bytes() for entry in entries)
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 12

"""The documentation is run: code blocks, their printed output, commands, links, variables, generated pages."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from inpaintrt import cli, ops
from inpaintrt.runtime.settings import EXTERNAL, PREFIX, Settings
from inpaintrt.testing import docs

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), ROOT / "benchmarks" / "README.md"])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@dataclass(frozen=True)
class Block:
    info: str
    line: int
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S):
        yield Block(found[1].strip(), text[: found.start()].count("\n") + 2, found[2])


def pages_with(condition: Callable[[Block], bool]) -> list[str]:
    return [name for name, page in zip(NAMES, PAGES, strict=True) if any(map(condition, blocks(page)))]


# ---- Python ---------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")


def normal(line: str) -> str:
    """A line of output as far as every machine prints it: without the values of numbers and the width of columns."""
    return " ".join(re.sub(r"─+", "─", NUMBER.sub("#", line)).split())


def same_output(shown: str, printed: str) -> bool:
    """Whether `printed` is what a page shows; a line `…` stands for any number of lines."""
    wanted, found = (
        [normal(line) for line in shown.strip().splitlines()],
        [normal(line) for line in printed.strip().splitlines()],
    )
    pattern = "".join(r"(?:.*\n)*" if line == "…" else re.escape(line) + "\n" for line in wanted)
    return re.fullmatch(pattern, "".join(line + "\n" for line in found)) is not None


def test_outputs_are_compared():
    assert same_output("a  1.5e-07\n…\nz", "a 2\nb\nc\nz\n")
    assert same_output("── ───\n", "─── ──")
    for shown, printed in (("a 1", "b 1"), ("a\n…\nz", "a\nb"), ("a", "a\nb"), ("yes", "no")):
        assert not same_output(shown, printed)


@pytest.mark.parametrize(
    "name", [n for n in pages_with(lambda b: b.info == "python") if not n.startswith("benchmarks/")]
)
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace per page, in an empty folder. A block `text output` shows what the block before it prints."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = io.StringIO()
    for block in blocks(ROOT / name):
        if block.info == "python":
            printed = io.StringIO()
            padded = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's own lines
            with contextlib.redirect_stdout(printed):
                exec(compile(padded, ROOT / name, "exec"), namespace)
        elif block.info == "text output":
            assert same_output(block.text, printed.getvalue()), (
                f"line {block.line} shows another output than\n{printed.getvalue()}"
            )
    assert torch.is_grad_enabled()


# ---- C++ ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cpp_example_builds_and_runs(tmp_path: Path) -> None:
    """embedding.md's two files beside a checkout named `inpaintrt`, as a product has it."""
    for block in blocks(ROOT / "docs" / "embedding.md"):
        if block.info.startswith(("cpp ", "cmake ")):
            (tmp_path / block.info.split()[1]).write_text(block.text)
    (tmp_path / "inpaintrt").symlink_to(ROOT)
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    quick = "-DCMAKE_BUILD_TYPE=Quick '-DINPAINTRT_ISAS=scalar;avx2'"
    for command in (f"cmake -G Ninja -S . -B build {quick}", "cmake --build build --target app", "build/app"):
        done = subprocess.run(shlex.split(command), cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    isa, value = done.stdout.split(": ")
    expected = ops.gated_activation(torch.ones(1, 2, 1, 1)).item()
    assert float(value) == pytest.approx(expected, abs=1e-6)
    assert isa in ("scalar", "avx2")


# ---- commands -------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """(environment, words) of each command in a page's shell blocks."""
    for block in blocks(page):
        if block.info in ("sh", "bash", "shell"):
            for line in block.text.replace("\\\n", " ").splitlines():
                for part in re.split(r"\s&&\s|;\s", line):
                    words = shlex.split(part, comments=True)
                    env = {}
                    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                        key, _, value = words.pop(0).partition("=")
                        env[key] = value
                    if words:
                        yield env, words


def every_command(first: str) -> list[tuple[str, list[str]]]:
    return [
        (name, words)
        for name, page in zip(NAMES, PAGES, strict=True)
        for _, words in commands(page)
        if words[0] == first
    ]


@pytest.mark.parametrize(
    ("name", "words"), every_command("inpaintrt"), ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_commands_of_the_program_parse(name: str, words: list[str]) -> None:
    args = cli._parser().parse_args(words[1:])
    assert callable(args.run), name


def test_every_command_of_the_program_is_documented() -> None:
    (action,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert {words[1] for _, words in every_command("inpaintrt")} == set(action.choices)
    options = {o for a in action.choices["fill"]._actions for o in a.option_strings if o.startswith("--")}
    filling = (ROOT / "docs" / "filling.md").read_text()
    used = set(re.findall(r"--[a-z][a-z-]+", filling))
    assert used <= options
    assert {"--invert-mask", "--overwrite", "--max-pixels", "--margin", "--format", "--model", "--threads"} <= used


def test_other_commands_name_what_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    stages = set(re.findall(r"^stage_(\w+)\(\)", (ROOT / ".ci" / "run").read_text(), re.M))
    gpu_stages = set(re.findall(r"^ *(\w+)\) +\w", (ROOT / ".ci" / "gpu").read_text(), re.M)) | {
        "build",
        "test",
        "sanitize",
        "bench",
    }
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    checked = set()
    for page in PAGES:
        for _, words in commands(page):
            checked.add(words[0])
            if words[0] == "make":
                assert set(words[1:]) <= targets, page
            elif words[0] == "pip":
                named = {
                    extra for word in words for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")
                }
                assert named <= extras, page
            elif words[0] == "python" and words[1] == "-m" and words[2].startswith("inpaintrt"):
                assert importlib.util.find_spec(words[2]), page
            elif words[0] == "pytest":
                missing = [
                    word for word in words[1:] if re.match(r"(tests|benchmarks)/", word) and not (ROOT / word).exists()
                ]
                assert not missing, page
            elif words[0] in (".ci/run", ".ci/gpu"):
                assert set(words[1:]) <= (stages if words[0] == ".ci/run" else gpu_stages), page
    assert {"make", "pip", "python", "pytest"} <= checked


def test_the_readme_begins_with_the_two_commands() -> None:
    first, second = list(blocks(ROOT / "README.md"))[:2]
    assert (first.text, second.text) == ("make demo\n", "make test\n")
    assert first.line < 10


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_environment_variables_exist(name: str) -> None:
    known = {PREFIX + field.upper() for field in Settings.__dataclass_fields__} | {PREFIX + field for field in EXTERNAL}
    known |= {PREFIX + "OPS", PREFIX + "ISAS"}  # CMake's lists, which add-an-op.md and embedding.md name
    code = re.compile(r"^```(cpp|cmake|diff).*?^```$", re.M | re.S)  # which has macros of its own
    found = set(re.findall(rf"\b{PREFIX}[A-Z_]*[A-Z]\b", code.sub("", (ROOT / name).read_text())))
    assert found <= known


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_the_text_exist(name: str) -> None:
    """Paths of this repository in backticks, unless they hold a placeholder."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    paths = re.findall(r"`((?:inpaintrt|kernels|csrc|tests|benchmarks|docs|\.ci)/[\w./-]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_page_is_reachable_from_the_readme() -> None:
    seen, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)\s#:]+\.md)", page.read_text(encoding="utf-8")):
            queue.append((page.parent / target).resolve())
    assert {page for page in PAGES if page.parent == ROOT or "docs" in page.parts} <= seen


# ---- generated pages ------------------------------------------------------------------------------------------------


def test_generated_pages_are_current() -> None:
    assert list(docs.outdated(ROOT, docs.pages(ROOT))) == [], "run python -m inpaintrt.testing.docs --write"


def test_the_generator_writes_checks_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(tmp_path)]
    with pytest.raises(SystemExit):
        docs.main(["--write", *root])
    (tmp_path / "docs" / "ops").mkdir(parents=True)
    gone = tmp_path / "docs" / "ops" / "gone.md"
    gone.write_text("an op that is no more")
    assert docs.main(["--check", *root]) == 1
    assert gone.exists(), "--check changed something"
    assert docs.main(["--write", *root]) == 0
    assert not gone.exists()
    capsys.readouterr()
    assert docs.main(["--check", *root]) == 0
    assert capsys.readouterr().out == ""
    page = tmp_path / "docs" / "environment.md"
    page.write_text(page.read_text() + "more\n")
    assert docs.main(["--check", *root]) == 1
    assert capsys.readouterr().out == "docs/environment.md\n"


def test_op_pages_say_what_the_specification_says() -> None:
    page = (ROOT / "docs" / "ops" / "gated_activation.md").read_text()
    for part in (
        r"\mathrm{out} = \mathrm{gain}",
        "- `alpha`: slope",
        'activation: str = "elu"',
        "| `cpu` | float32, bfloat16, float16 |",
    ):
        assert part in page

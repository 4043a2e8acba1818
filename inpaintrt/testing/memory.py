"""Peak memory of a call, from the kernel's own books (Linux).

"Extra" memory is the highest resident set during the call minus the resident set before it: what the caller must have
free beyond the loaded model. It is measured in a fresh process, since memory that an allocator kept from an earlier
call would hide part of it.
"""

from __future__ import annotations

import builtins
import ctypes
import dis
import gc
import inspect
import json
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

_MARK = "inpaintrt-result:"


@dataclass(frozen=True)
class Peak:
    """Resident bytes around one call, and how long it took."""

    before: int
    peak: int
    after: int
    seconds: float

    @property
    def extra(self) -> int:
        """Bytes needed during the call beyond those resident before it."""
        return self.peak - self.before


def missing() -> str:
    """Why the peak cannot be measured here, or an empty string."""
    try:
        _reset_peak()
        status("VmHWM")
    except (OSError, KeyError) as error:
        return f"this system does not let a process reset and read its peak resident set: {error!r}"
    return ""


def status(field: str) -> int:
    """A memory field of this process in bytes: "VmRSS" (resident now) or "VmHWM" (its peak since the last reset)."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, flags=re.MULTILINE)
    if not found:
        raise KeyError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def settle() -> None:
    """Give back what allocators keep for reuse (Python's garbage, the workspace arena, glibc's free lists)."""
    from inpaintrt.runtime import native

    gc.collect()
    native.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def peak_of(run: Callable[[], object]) -> Peak:
    """Call `run` once and watch the resident set of this process; the result is kept until the peak has been read.

    Raises: `OSError` or `KeyError` where `missing` has a reason.
    """
    settle()
    _reset_peak()
    before = status("VmRSS")
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    peak, after = status("VmHWM"), status("VmRSS")
    del result
    return Peak(before, max(peak, after), after, seconds)


def measure_in_subprocess(prepare: Callable[..., Any], *args: object, timeout: float = 600) -> Peak:
    """The peak of one call in a fresh interpreter.

    `prepare(*args)` runs there first, unmeasured: it loads, packs, warms up, and returns the callable to measure. What
    `in_fresh_process` asks of a function holds for it.
    """
    tail = f"from {__name__} import peak_of\nimport dataclasses\nresult = dataclasses.asdict(peak_of(result))"
    return Peak(**_run(prepare, args, tail, timeout))


def in_fresh_process(function: Callable[..., Any], *args: object, timeout: float = 600) -> Any:
    """`function(*args)` in a fresh interpreter; its result comes back as JSON.

    Its source is sent over, so it must be self-contained (imports inside, nothing from its module or an enclosing
    function), and `args` must be literals.

    Raises: `ValueError` with the names that it takes from outside; `RuntimeError` with the end of the child's messages.
    """
    return _run(function, args, "", timeout)


def _run(function: Callable[..., Any], args: tuple[object, ...], tail: str, timeout: float) -> Any:
    if foreign := sorted(_foreign_names(function.__code__)):
        raise ValueError(
            f"{function.__name__} uses {', '.join(foreign)} from outside; a fresh process has no such names"
        )
    program = "\n".join(
        [
            "from __future__ import annotations",
            textwrap.dedent(inspect.getsource(function)),
            f"result = {function.__name__}(*{args!r})",
            tail,
            "import json",
            f"print({_MARK!r} + json.dumps(result))",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{function.__name__}{args} failed in a fresh process:\n{done.stderr[-2000:]}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK))
    return json.loads(line.removeprefix(_MARK))


def _foreign_names(code: CodeType) -> set[str]:
    """Names that `code`, or a function inside it, takes from its module or an enclosing function."""
    names = set(code.co_freevars)
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL" and not hasattr(builtins, instruction.argval):
            names.add(instruction.argval)
        elif isinstance(instruction.argval, CodeType):
            names |= _foreign_names(instruction.argval) - set(code.co_cellvars) - set(code.co_freevars)
    return names


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # 5: set the peak to what is resident now

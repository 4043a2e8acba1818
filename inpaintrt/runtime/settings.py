"""Settings from the environment. Each field is one `INPAINTRT_<NAME>` variable, read once at import.

A name that is set but unknown warns, with the nearest known one, because a misspelt switch is worse than none.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PREFIX = "INPAINTRT_"
BACKENDS = ("auto", "cpu", "cuda", "cupy", "triton", "reference")
# Read elsewhere: by the build (CMake, scikit-build-core), or by the native library when it loads.
EXTERNAL = ("BUILD_NATIVE", "CUDA", "CUDA_ARCHS", "CPU_ISA")


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "on", "yes"):
        return True
    if text.lower() in ("0", "false", "off", "no", ""):
        return False
    raise ValueError("accepted: 1, 0, true, false, on, off, yes, no")


def _backend(text: str) -> str:
    if text not in BACKENDS:
        raise ValueError(f"accepted: {', '.join(BACKENDS)}")
    return text


def _setting(default: Any, parse: Any, doc: str) -> Any:
    return field(default=default, metadata={"parse": parse, "doc": doc})


@dataclass(frozen=True)
class Settings:
    backend: str = _setting("auto", _backend, "backend of every op unless `use_backend` says otherwise")
    disable: bool = _setting(False, _flag, "accelerated modules run their original forward: the switch for incidents")
    strict: bool = _setting(False, _flag, "an op that finds no backend raises instead of running its reference")
    cache: str = _setting("auto", str, "folder for what `inpaintrt tune` finds; auto: below XDG_CACHE_HOME or ~/.cache")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        values: dict[str, Any] = {}
        for item in fields(cls):
            text = env.get(PREFIX + item.name.upper())
            if text is None:
                continue
            try:
                values[item.name] = item.metadata["parse"](text)
            except ValueError as error:
                raise ValueError(f"{PREFIX}{item.name.upper()}={text!r}: {error}") from None
        known = [PREFIX + item.name.upper() for item in fields(cls)] + [PREFIX + name for name in EXTERNAL]
        for name in env:
            if name.startswith(PREFIX) and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
                warnings.warn(f"unknown environment variable {name}{hint}", stacklevel=2)
        return cls(**values)


settings = Settings.from_env(os.environ)

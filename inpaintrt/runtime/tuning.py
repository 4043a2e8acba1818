"""The user's file of preferences: what `inpaintrt tune` found on this kind of CPU, read when the native library loads.

It names the algorithm to take for calls of a form (`native.Choice`), so it changes speed and never what is allowed: a
file that cannot be used is left aside, with one line in the log. There is one per kind of CPU, since machines may share a
home folder.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .settings import settings

log = logging.getLogger("inpaintrt")
SCHEMA = 1


def folder() -> Path:
    """Where the files are; it need not exist."""
    if settings.cache != "auto":
        return Path(settings.cache).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "inpaintrt"


def path() -> Path:
    """This CPU's file; it need not exist. Family and model tell generations apart that report one name ("AMD EPYC")."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        lines = ""
    found = [re.search(rf"^{key}\s*:\s*(.+)$", lines, re.M) for key in ("model name", "cpu family", "model")]
    words = [item[1] for item in found if item] or [platform.machine()]
    return folder() / f"tuning-{re.sub(r'[^a-z0-9]+', '-', ' '.join(words).lower()).strip('-')}.json"


def read(version: str) -> dict[str, str]:
    """Algorithms by key, of a file that the native library of this version made; empty where there is none."""
    try:
        if not folder().is_dir():
            return {}
        data = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder, or JSON nested too deeply
        log.info("preferences are left aside: %s: %s", settings.cache, error)
        return {}
    if fault := _fault(data, version):
        log.info("preferences are left aside: %s: %s; inpaintrt tune makes new ones", path(), fault)
        return {}
    return dict(data["preferences"])


def content(preferences: Mapping[str, str], version: str) -> bytes:
    """What `read` takes."""
    data = {"schema": SCHEMA, "version": version, "preferences": dict(sorted(preferences.items()))}
    return json.dumps(data, indent=1, ensure_ascii=False).encode() + b"\n"


def _fault(data: Any, version: str) -> str:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return f"it is no file of preferences with schema {SCHEMA}"
    if data.get("version") != version:
        return f"it was made by version {data.get('version')}, this is {version}"
    pairs = data.get("preferences")
    if not isinstance(pairs, dict) or not all(isinstance(text, str) for text in pairs.values()):
        return "its preferences are not one algorithm for each key"
    return ""

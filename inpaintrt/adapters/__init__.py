"""Adapters: one file per model family. Containers come before what they contain."""

from __future__ import annotations

from inpaintrt.runtime.swap import Adapter

from . import lama

ADAPTERS: tuple[Adapter, ...] = (*lama.ADAPTERS,)

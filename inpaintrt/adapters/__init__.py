"""Adapters: one file per model family. Containers come before what they contain."""

from __future__ import annotations

from inpaintrt.runtime.swap import Adapter

from . import contextual_attention, gated, lama

ADAPTERS: tuple[Adapter, ...] = (*lama.ADAPTERS, *contextual_attention.ADAPTERS, *gated.ADAPTERS)

"""Adapters: one file per model family. Containers come before what they contain."""

from __future__ import annotations

from inpaintrt.runtime.swap import Adapter

from . import (
    aotgan,
    contextual_attention,
    convolution,
    gated,
    glcic,
    lama,
    mat_attention,
    migan,
    partialconv,
    stylegan2,
)

ADAPTERS: tuple[Adapter, ...] = (
    *lama.ADAPTERS,
    *aotgan.ADAPTERS,
    *glcic.ADAPTERS,
    *partialconv.ADAPTERS,
    *mat_attention.ADAPTERS,
    *contextual_attention.ADAPTERS,
    *gated.ADAPTERS,
    *migan.ADAPTERS,
    *stylegan2.ADAPTERS,
    *convolution.ADAPTERS,
)

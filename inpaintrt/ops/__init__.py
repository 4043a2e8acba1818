"""Functional ops: differentiable, safe to compile and to export. One file per op; see `docs/ops`."""

from .gated_activation import gated_activation

__all__ = ["gated_activation"]

"""Functional ops: differentiable, safe to compile and to export. One file per op; see `docs/ops`."""

from .fourier_unit import fourier_unit
from .gated_activation import gated_activation

__all__ = ["fourier_unit", "gated_activation"]

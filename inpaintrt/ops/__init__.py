"""Functional ops: differentiable, safe to compile and to export. One file per op; see `docs/ops`."""

from .fourier_unit import fourier_unit
from .fused_conv2d import fused_conv2d
from .gated_activation import gated_activation

__all__ = ["fourier_unit", "fused_conv2d", "gated_activation"]

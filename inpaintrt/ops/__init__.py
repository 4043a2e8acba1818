"""Functional ops: differentiable, safe to compile and to export. One file per op; see `docs/ops`."""

from ._philox import philox_normal as philox_normal
from .aot_gate import aot_gate
from .contextual_attention import contextual_attention
from .contextual_attention_with_offsets import contextual_attention_with_offsets
from .fourier_unit import fourier_unit
from .fused_conv2d import fused_conv2d
from .gated_activation import gated_activation
from .gated_conv2d import gated_conv2d
from .group_norm_silu import group_norm_silu
from .linear_step import linear_step
from .modulated_conv2d import modulated_conv2d
from .nearest_code import nearest_code
from .partial_conv2d import partial_conv2d
from .sampler_step import sampler_step
from .upfirdn2d import upfirdn2d
from .window_attention import window_attention
from .window_mask_update import window_mask_update

# fmt: off
__all__ = ["aot_gate", "contextual_attention", "contextual_attention_with_offsets", "fourier_unit", "fused_conv2d", "gated_activation", "gated_conv2d", "group_norm_silu", "linear_step", "modulated_conv2d", "nearest_code", "partial_conv2d", "sampler_step", "upfirdn2d", "window_attention", "window_mask_update"]

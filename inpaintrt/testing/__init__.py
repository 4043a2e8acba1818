"""Helpers that prove numbers: comparison with a float64 truth, layouts, poison, timing, memory. Public, and tested."""

from .compare import Verdict, assert_close_to_truth, close_to_truth

__all__ = ["Verdict", "assert_close_to_truth", "close_to_truth"]

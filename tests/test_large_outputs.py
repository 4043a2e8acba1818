"""Large outputs live in the arena's memory: reused, counted, and like any other tensor to whoever holds them."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from inpaintrt import ops
from inpaintrt.ops import _shared
from inpaintrt.runtime import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")


@pytest.fixture
def small_is_large(monkeypatch):
    monkeypatch.setattr(_shared, "LARGE", 1 << 10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_they_are_ordinary_tensors(small_is_large, layout, mode):
    x, weight = torch.randn(2, 8, 16, 17).to(memory_format=layout), torch.randn(5, 8, 3, 3)
    with mode():
        y = ops.fused_conv2d(x, weight, padding=1)
        assert y.is_contiguous(memory_format=layout)
        assert (y.storage_offset(), y._base, y.requires_grad) == (0, None, False)
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
        kept = y.clone()
        y.mul_(2).sub_(kept)
        twin = copy.deepcopy(y)
        del y
    ops.fused_conv2d(x, weight, padding=1).zero_()
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file), kept, rtol=1e-5, atol=1e-5)


def test_memory_is_used_again_and_given_back(small_is_large):
    x, weight = torch.randn(1, 16, 256, 256), torch.randn(16, 16, 1, 1)
    with torch.no_grad():
        native.empty_cache()
        before = native.library().arena_bytes()
        first = ops.fused_conv2d(x, weight)
        address = first.data_ptr()
        assert native.library().arena_bytes() > before
        second = ops.fused_conv2d(x, weight)
        assert second.data_ptr() != address, "the first is still held"
        view = first[:, 2:4]
        del first
        third = ops.fused_conv2d(x, weight)
        assert third.data_ptr() != address, "a view holds it"
        torch.testing.assert_close(view, second[:, 2:4], rtol=0, atol=0)
        del view
        assert ops.fused_conv2d(x, weight).data_ptr() == address
        del second, third
        native.empty_cache()
        assert native.library().arena_bytes() == before


def test_gradients_flow_through_them(small_is_large):
    x, weight = torch.randn(1, 8, 16, 17, requires_grad=True), torch.randn(5, 8, 3, 3, requires_grad=True)
    got = torch.autograd.grad(ops.fused_conv2d(x, weight, padding=1).square().sum(), (x, weight))
    expected = torch.autograd.grad(torch.nn.functional.conv2d(x, weight, padding=1).square().sum(), (x, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_an_unheld_capsule_gives_its_block_back():
    before = native.library().arena_bytes()
    capsule = native.library().arena_tensor(5 << 20)
    assert native.library().arena_bytes() >= before
    del capsule
    native.empty_cache()
    assert native.library().arena_bytes() <= before

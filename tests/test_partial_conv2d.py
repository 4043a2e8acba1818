"""What only partial_conv2d has: the rule for holes, soft masks, one plane for many channels, the mask it returns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inpaintrt import ops, use_backend
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.errors import UnsupportedError
from inpaintrt.runtime.policy import use_ieee
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.compare import WINOGRAD


def _nvidias(x, mask, weight, bias, eps=1e-8, **geometry):
    """As the original multi-channel module computes it: a second convolution, with ones, for the mask."""
    mask = mask.expand_as(x)
    ones = torch.ones_like(weight)
    s = F.conv2d(mask, ones, **geometry)
    updated = s.clamp(0, 1)
    ratio = weight[0].numel() / (s + eps) * updated
    raw = F.conv2d(x * mask, weight, bias, **geometry)
    if bias is None:
        return raw * ratio, updated
    b = bias.view(1, -1, 1, 1)
    return ((raw - b) * ratio + b) * updated, updated


def _layer(c, outputs, kernel, h=30, w=26):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, c, h, w, generator=generator)
    weight = torch.randn(outputs, c, kernel, kernel, generator=generator) / (c * kernel**2) ** 0.5
    mask = torch.ones(2, 1, h, w)
    mask[0, :, 4:19, 3:20] = 0
    mask[1, :, ::2] = 0
    return x, mask, weight, torch.randn(outputs, generator=generator)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize(
    ("c", "outputs", "kernel", "stride"),
    [(3, 64, 7, 2), (64, 40, 5, 1), (33, 36, 3, 1), (18, 3, 3, 1), (64, 128, 5, 2), (70, 96, 3, 2)],
)
def test_is_nvidias(c, outputs, kernel, stride, channels, with_bias, layout):
    x, mask, weight, bias = _layer(c, outputs, kernel)
    bias = bias if with_bias else None
    mask = mask.expand_as(x) if channels else mask
    geometry = {"stride": stride, "padding": kernel // 2}
    with use_backend("cpu", op="partial_conv2d"), dispatch.launches() as heard:
        got, updated = ops.partial_conv2d(x.to(memory_format=layout), mask, weight, bias, **geometry)
    assert got.is_contiguous(memory_format=layout)
    own, theirs = _nvidias(x, mask, weight, bias, **geometry)
    wide = (t if t is None else t.double() for t in (x, mask, weight, bias))
    assert torch.equal(updated, theirs[:, :1])
    assert_close_to_truth(got, _nvidias(*wide, **geometry)[0], own, numerics=heard[0].numerics)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_windows_without_valid_pixels_give_zero(backend):
    """Whatever lies under the hole, whatever eps: no bias, no NaN."""
    x, mask, weight, bias = _layer(4, 6, 3)
    mask[:] = 0
    mask[:, :, 20:] = 1
    for eps in (1e-8, 1e-6, 0.0):
        with use_backend(backend, op="partial_conv2d"):
            got, updated = ops.partial_conv2d(x, mask, weight, bias, padding=1, eps=eps)
        assert bool((got[:, :, :19] == 0).all())
        assert bool((updated[:, :, :19] == 0).all())
        assert bool((got[:, :, 20:] != 0).any())
        assert bool(got.isfinite().all())


@pytest.mark.parametrize(("c", "outputs", "size"), [(64, 64, 64), (150, 40, 20), (192, 64, 64), (512, 128, 32)])
@pytest.mark.parametrize("share", [0.6, 0.99])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_sparse_windows_keep_to_the_bound(kernel, stride, c, outputs, size, share):
    """Their sums are multiplied, and errors with them: F(4×4, 3×3) alone would exceed it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, c, size, size, generator=generator).relu_()
    weight = torch.randn(outputs, c, kernel, kernel, generator=generator) / (kernel**2 * c) ** 0.5
    mask = (torch.rand(1, 1, size, size, generator=generator) < share).float()
    geometry = {"stride": stride, "padding": kernel // 2}
    with use_backend("cpu", op="partial_conv2d"):
        got, _ = ops.partial_conv2d(x, mask, weight, **geometry)
    with use_backend("reference", op="partial_conv2d"):
        own, _ = ops.partial_conv2d(x, mask, weight, **geometry)
        truth, _ = ops.partial_conv2d(x.double(), mask.double(), weight.double(), **geometry)
    assert_close_to_truth(got, truth, own, numerics=WINOGRAD)


def _strokes(size, generator):
    """Thin lines through a valid image, and thin lines of what is valid in a hole."""
    mask = torch.ones(size, size)
    for row, column, width in torch.randint(2, size - 8, (5, 3), generator=generator).tolist():
        mask[row : row + 1 + width % 6] = 0
        mask[:, column : column + 1 + width % 5] = 0
    mask[size // 2 :, size // 2 :] = 0
    mask[size // 2 + 8 :: 9, size // 2 :] = 1
    return mask


def _points(size, generator):
    """Single valid pixels in a large hole."""
    mask = torch.ones(size, size)
    mask[size // 4 : 3 * size // 4, size // 4 :] = 0
    for row, column in torch.randint(size // 4 + 4, 3 * size // 4 - 4, (6, 2), generator=generator).tolist():
        mask[row, column] = 1
    return mask


def _fractions(size, generator):
    """A hole whose pixels count for less and less towards its middle, so that a window's sum may be anything."""
    mask = torch.ones(size, size)
    inner = slice(size // 4, 3 * size // 4)
    mask[inner, inner] = torch.rand(size // 2, size // 2, generator=generator) ** 8
    return mask


@pytest.mark.parametrize("masks", [_strokes, _points, _fractions])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(3, 1, 1), (3, 2, 1), (3, 1, 3), (5, 1, 1), (5, 2, 1), (7, 2, 1)],
)
def test_thin_windows_are_as_accurate_as_the_direct_form(kernel, stride, dilation, dtype, layout, channels, masks):
    """Windows less than a quarter as full as the fullest are judged alone, by the rule of direct convolutions."""
    generator = torch.Generator().manual_seed(1)
    size, c, outputs = 64, 67, 72
    x = torch.randn(2, c, size, size, generator=generator).relu_().to(dtype).to(memory_format=layout)
    weight = (torch.randn(outputs, c, kernel, kernel, generator=generator) / (kernel**2 * c) ** 0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    mask = torch.stack([masks(size, generator), torch.ones(size, size)])[:, None].to(dtype)
    if channels:
        mask = mask.repeat(1, c, 1, 1).to(memory_format=layout)
        mask[:, ::2, size // 2 :] *= torch.rand(2, 1, size // 2, size, generator=generator).round().to(dtype)
    geometry = {"stride": stride, "padding": kernel // 2 * dilation, "dilation": dilation}
    with use_backend("cpu", op="partial_conv2d"):
        got, updated = ops.partial_conv2d(x, mask, weight, bias, **geometry)
    with use_backend("reference", op="partial_conv2d"):
        own, theirs = ops.partial_conv2d(x, mask, weight, bias, **geometry)
        truth, _ = ops.partial_conv2d(x.double(), mask.double(), weight.double(), bias.double(), **geometry)
    sums = F.conv2d(mask.double().sum(1, keepdim=True), torch.ones(1, 1, kernel, kernel).double(), **geometry)[:, 0]
    thin = (sums > 0) & (sums < 0.25 * sums.amax((1, 2), keepdim=True))
    assert bool(thin.any())
    torch.testing.assert_close(updated, theirs)
    assert_close_to_truth(got, truth, own, numerics=WINOGRAD)
    at = [t.movedim(1, -1)[thin] for t in (got, truth, own)]
    assert_close_to_truth(*at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_image_is_judged_by_its_own_mask(dtype):
    """To the last bit: whatever masks the other images of a batch have, and as if it were alone."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 64, 48, 48, generator=generator).to(dtype)
    weight = (torch.randn(64, 64, 3, 3, generator=generator) / 24).to(dtype)
    full, sparse = torch.ones(48, 48), torch.ones(48, 48)
    sparse[::2] = sparse[:, ::3] = 0  # of a window's pixels
    sparse[:12] = 1
    points = _points(48, generator)
    mask = torch.stack([full, sparse, points, full, points, sparse])[:, None]
    with use_backend("cpu", op="partial_conv2d"):
        got, updated = ops.partial_conv2d(x, mask, weight, padding=1)
        all_full, _ = ops.partial_conv2d(x, torch.ones_like(mask), weight, padding=1)
        alone = [ops.partial_conv2d(x[i : i + 1], mask[i : i + 1], weight, padding=1) for i in range(6)]
        with use_ieee():
            ieee, _ = ops.partial_conv2d(x, mask, weight, padding=1)
    assert torch.equal(got[0], all_full[0])
    assert torch.equal(got[3], all_full[3])
    assert torch.equal(got, torch.cat([y for y, _ in alone]))
    assert torch.equal(updated, torch.cat([u for _, u in alone]))
    # Where most windows are thin, the whole image is computed as under "ieee"; else those windows alone are.
    assert [torch.equal(got[i], ieee[i]) for i in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "other strides"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [3, 16, 67])
@pytest.mark.parametrize("value", [0.0, 1e-38, float("nan")])
def test_a_single_number_of_a_mask_of_all_channels_counts(value, c, dtype, layout):
    """Where all channels are alike, one stands for them: a mask that differs in one number of one channel is none of those."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, c, 21, 37, generator=generator).to(dtype)
    weight = torch.randn(20, c, 3, 3, generator=generator).to(dtype)
    alike = (torch.rand(1, 1, 21, 37, generator=generator) < 0.8).to(dtype).repeat(1, c, 1, 1)
    if layout == "channels last":
        alike = alike.to(memory_format=torch.channels_last)
    if layout == "other strides":
        alike = alike.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    with use_backend("cpu", op="partial_conv2d"):
        one, _ = ops.partial_conv2d(x, alike[:, :1], weight, padding=1, scale="one")
        same, _ = ops.partial_conv2d(x, alike, weight * c, padding=1, scale="one")
        for y, column, channel in ((0, 0, c - 1), (20, 36, c // 2), (9, 31, 1)):
            mask = alike.clone(memory_format=torch.preserve_format)
            mask[0, :, y, column], mask[0, channel, y, column] = 1, value
            got, updated = ops.partial_conv2d(x, mask, weight, padding=1)
            with use_backend("reference", op="partial_conv2d"):
                own, theirs = ops.partial_conv2d(x, mask, weight, padding=1)
                truth, _ = ops.partial_conv2d(x.double(), mask.double(), weight.double(), padding=1)
            assert torch.equal(updated.isnan(), theirs.isnan())
            assert bool(got[own.isnan()].isnan().all())
            finite = got.isfinite()  # Winograd's tiles may spread a NaN
            assert finite.sum() > 0.9 * finite.numel()
            assert_close_to_truth(*(t[finite] for t in (got, truth, own)), numerics=WINOGRAD)
    torch.testing.assert_close(same, one, rtol=3e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-1)


def test_soft_masks_count_as_they_are():
    x, mask, weight, bias = _layer(4, 6, 3)
    soft = mask * torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) * 0.2
    with use_backend("reference", op="partial_conv2d"):
        expected, theirs = ops.partial_conv2d(x, soft, weight, bias, padding=1)
    got, updated = ops.partial_conv2d(x, soft, weight, bias, padding=1)
    assert 0 < float(updated[updated > 0].min()) < 1
    torch.testing.assert_close(updated, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_scale_one_is_scale_window_over_its_size():
    x, mask, weight, _ = _layer(6, 8, 3)
    for channels in (1, 6):
        m = mask.expand(-1, channels, -1, -1)
        one, _ = ops.partial_conv2d(x, m, weight, padding=1, scale="one")
        window, _ = ops.partial_conv2d(x, m, weight, padding=1)
        torch.testing.assert_close(one * (9 * channels), window, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64, torch.int64])
def test_masks_of_any_dtype(dtype):
    x, mask, weight, bias = _layer(6, 8, 3)
    got = ops.partial_conv2d(x, mask.to(dtype), weight, bias, padding=1)
    expected = ops.partial_conv2d(x, mask, weight, bias, padding=1)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got[1].dtype == torch.float32


def test_one_mask_for_all_images():
    x, mask, weight, bias = _layer(6, 8, 3)
    got = ops.partial_conv2d(x, mask[:1], weight, bias, padding=1)
    expected = ops.partial_conv2d(x, mask[:1].expand(2, -1, -1, -1), weight, bias, padding=1)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradients_are_the_originals():
    x, mask, weight, bias = _layer(3, 4, 3, 9, 8)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    got, _ = ops.partial_conv2d(leaves[0], mask.double(), leaves[1], leaves[2], padding=1)
    expected, _ = _nvidias(leaves[0], mask.double(), leaves[1], leaves[2], padding=1)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(1, 2, 8, 8)}, "mask"),
        ({"mask": torch.ones(1, 1, 8, 7)}, "mask"),
        ({"weight": torch.zeros(6, 3, 3, 3)}, "channels"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"scale": "area"}, "scale"),
        ({"eps": -1.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"x": torch.zeros(1, 4, 8, 8).long()}, "floating"),
        ({"weight": torch.zeros(6, 4, 9, 9)}, "smaller"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    call = {"x": torch.zeros(1, 4, 8, 8), "mask": torch.ones(1, 1, 8, 8), "weight": torch.zeros(6, 4, 3, 3)}
    with pytest.raises(ValueError, match=message):
        ops.partial_conv2d(**{**call, **change})


def test_float16_is_refused_with_a_reason():
    x, weight = torch.zeros(1, 4, 8, 8).half(), torch.zeros(6, 4, 3, 3).half()
    with use_backend("cpu", op="partial_conv2d"), pytest.raises(UnsupportedError, match="float16"):
        ops.partial_conv2d(x, torch.ones(1, 1, 8, 8), weight)

"""What only fused_conv2d has: words for padding, several inputs, the numerics of Winograd and who refuses it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from inpaintrt import ops, use_backend
from inpaintrt.ops.fused_conv2d import SPEC
from inpaintrt.runtime import dispatch, native
from inpaintrt.runtime.errors import UnsupportedError
from inpaintrt.runtime.policy import use_ieee
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.compare import DIRECT, WINOGRAD, Numerics, close_to_truth
from inpaintrt.testing.layouts import LAYOUTS


def _layer(c, outputs, h, w, seed=0, kernel=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, c, h, w, generator=generator).relu_()
    weight = torch.randn(outputs, c, kernel, kernel, generator=generator) / (kernel**2 * c) ** 0.5
    return x, weight, torch.randn(outputs, generator=generator)


def test_same_is_torchs():
    x, weight, bias = _layer(3, 4, 7, 10)
    even = torch.randn(4, 3, 4, 2)
    for w, b in ((weight, bias), (even, None)):
        torch.testing.assert_close(ops.fused_conv2d(x, w, b, padding="same"), F.conv2d(x, w, b, padding="same"))


@pytest.mark.parametrize(
    ("size", "stride", "kernel"), [((7, 10), 2, 3), ((8, 9), 2, 4), ((5, 6), 3, 5), ((6, 6), 1, 3)]
)
def test_tf_same_puts_the_smaller_half_first(size, stride, kernel):
    x, weight = torch.randn(1, 2, *size), torch.randn(3, 2, kernel, kernel)
    got = ops.fused_conv2d(x, weight, stride=stride, padding="tf_same")
    assert got.shape[2:] == tuple(-(-n // stride) for n in size)
    sides = []
    for n in reversed(size):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        sides += [total // 2, total - total // 2]
    torch.testing.assert_close(got, F.conv2d(F.pad(x, sides), weight, stride=stride))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths", [(2, 4, 3), (32, 7), (64, 1, 33), (96,), (32, 64)])
def test_several_inputs_are_their_concatenation(widths, layout):
    x, weight, bias = _layer(sum(widths), 5, 16, 17)
    mask = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) > 0.3).float()
    parts = [LAYOUTS[layout](part) for part in x.split(list(widths), dim=1)]
    for case in ({"padding": 1}, {"stride": 2}, {"mask": mask}, {"upsample": 2}, {"weight": weight[..., :1, :1]}):
        case = {"weight": weight, "bias": bias, **case}
        assert torch.equal(ops.fused_conv2d(parts, **case), ops.fused_conv2d(x, **case))


def test_both_parts_have_gradients():
    x, weight, bias = _layer(40, 5, 16, 17)
    parts = [part.clone().requires_grad_() for part in x.split([32, 8], dim=1)]
    ops.fused_conv2d(parts, weight, bias, padding=1).square().sum().backward()
    whole = x.clone().requires_grad_()
    F.conv2d(whole, weight, bias, padding=1).square().sum().backward()
    for part, grad in zip(parts, whole.grad.split([32, 8], dim=1), strict=True):
        torch.testing.assert_close(part.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "turned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("first", "kernel", "size", "options"),
    [
        (32, 3, (33, 40), {"padding": 1, "padding_mode": "reflect", "activation": "relu"}),
        (64, 3, (5, 6), {"padding": 2, "dilation": 2}),
        (160, 3, (4, 5), {"padding": 1, "stride": 2}),
        (32, 5, (12, 17), {"padding": 2}),
        (32, 4, (9, 9), {"padding": 1, "stride": 2, "transposed": True, "output_padding": 1}),
        (32, 3, (7, 9), {"padding": 1, "upsample": 2}),
        (96, 1, (20, 31), {"activation": "elu"}),
        (20, 3, (9, 14), {"padding": 1}),
    ],
)
def test_weights_of_two_parts_are_one_over_the_channels_of_both(first, kernel, size, options, dtype, memory):
    """By each algorithm, bit for bit of contiguous ones; and where the first part ends within a vector of lanes."""
    outputs, second = 37, 45
    turned = options.get("transposed", False)
    x, _, bias = (t.to(dtype) for t in _layer(first + second, outputs, *size))
    whole = torch.randn(first + second, outputs, kernel, kernel).mul_(0.1).to(dtype)
    parts = [w if turned else w.transpose(0, 1) for w in whole.split([first, second])]
    joined = torch.cat(parts, dim=0 if turned else 1)
    if memory == "channels_last":
        parts[1] = parts[1].to(memory_format=torch.channels_last)
    elif memory == "contiguous":
        parts = [part.contiguous() for part in parts]
    images = x.split([first, second], dim=1)
    with use_backend("cpu", op="fused_conv2d"):
        got = ops.fused_conv2d(images, parts, bias, **options)
        want = ops.fused_conv2d(images, joined.contiguous(), bias, **options)
    if memory == "contiguous":
        assert torch.equal(got, want)
    torch.testing.assert_close(got, want, **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}))
    with use_backend("reference"):
        assert torch.equal(
            ops.fused_conv2d(images, parts, bias, **options), ops.fused_conv2d(x, joined, bias, **options)
        )


def test_weights_of_two_parts_have_gradients():
    x, weight, bias = _layer(40, 5, 16, 17)
    leaves = [t.clone().requires_grad_() for t in (*x.split([32, 8], dim=1), *weight.split([32, 8], dim=1))]
    ops.fused_conv2d(leaves[:2], leaves[2:], bias, padding=1).square().sum().backward()
    whole = [t.clone().requires_grad_() for t in (x, weight)]
    F.conv2d(*whole, bias, padding=1).square().sum().backward()
    wanted = [part for t in whole for part in t.grad.split([32, 8], dim=1)]
    for leaf, grad in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("first", [32, 20])  # read in its place, and joined
def test_weights_of_two_parts_that_do_not_fit_are_refused(first):
    x, more = torch.zeros(1, first, 8, 8), torch.zeros(1, 5, 8, 8)
    weight, beside = torch.zeros(4, first, 3, 3), torch.zeros(4, 5, 3, 3)
    for parts, weights, options, message in [
        ((x, more), (weight, beside[:3]), {}, "its weight"),
        ((x, more), (weight, beside[:, :4]), {}, "its weight"),
        ((x, more), (weight[:, :10], beside), {}, f"the first part of x has {first} channels"),
        ((x, more), (weight, beside.double()), {}, "one dtype"),
        ((x, more.bfloat16()), (weight, beside), {}, "second is torch.bfloat16"),
        ((x, more), (weight[:, : first // 2], beside), {"groups": 2}, "groups is 2"),
        ((x, more), (weight, beside[..., :2]), {}, "its weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.fused_conv2d(parts, weights, padding=1, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (3, {"padding": 1, "padding_mode": "reflect", "activation": "relu"}),
        (3, {"padding": 2, "dilation": 2, "residual_mode": "before"}),
        (5, {"padding": (2, 0, 1, 2), "activation": "elu"}),
        (3, {"stride": 2}),
        (4, {"upsample": 2, "padding": 1}),
    ],
)
@pytest.mark.parametrize(
    ("c", "beside", "outputs", "h", "w"), [(20, 37, 35, 21, 26), (40, 3, 70, 49, 50), (3, 64, 2, 9, 8)]
)
def test_pointwise_convolutions_in_the_same_sums(c, beside, outputs, h, w, kernel, options, dtype, layout):
    """By filters and by tiles, one panel of outputs and several; and what no kernel takes, which is torch's."""
    x, weight, bias = (t.to(dtype) for t in _layer(c, outputs, h, w, kernel=kernel))
    size = ops.fused_conv2d(x, weight, **{k: v for k, v in options.items() if k != "residual_mode"}).shape[2:]
    more, more_weight, _ = (t.to(dtype) for t in _layer(beside, outputs, *size, kernel=1))
    residual, scale = torch.randn(1, outputs, *size).to(dtype), torch.rand(outputs).to(dtype) + 0.5
    tensors = {"bias": bias, "scale": scale, "residual": residual}
    parts = [LAYOUTS[layout](part) for part in (x, more)]
    got = ops.fused_conv2d(parts, (weight, more_weight), **tensors, **options)

    def in_two(kind):
        rest = {name: t.to(kind) for name, t in tensors.items()}
        alone = {k: v for k, v in options.items() if k not in ("activation", "residual_mode")}
        y = ops.fused_conv2d(x.to(kind), weight.to(kind), **alone) + F.conv2d(more.to(kind), more_weight.to(kind))
        y = y * rest["scale"].view(-1, 1, 1) + rest["bias"].view(-1, 1, 1)
        before = options.get("residual_mode") == "before"
        y = y + rest["residual"] if before else y
        y = {"relu": F.relu, "elu": F.elu}.get(options.get("activation"), lambda t: t)(y)
        return y if before else y + rest["residual"]

    numerics = WINOGRAD if dtype == torch.float32 else DIRECT
    assert_close_to_truth(got, in_two(torch.float64), in_two(torch.float32).to(dtype), numerics=numerics)
    assert got.is_contiguous(memory_format=torch.channels_last) == parts[0].is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pointwise_convolutions_have_the_same_bits_on_any_number_of_threads(threads):
    x, weight, bias = _layer(40, 70, 49, 50)
    more, more_weight, _ = _layer(19, 70, 49, 50, kernel=1)
    before = torch.get_num_threads()
    try:
        results = []
        for number in (1, threads):
            torch.set_num_threads(number)
            with use_backend("cpu", op="fused_conv2d"):
                results.append(ops.fused_conv2d((x, more), (weight, more_weight), bias, padding=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_pointwise_convolutions_have_gradients():
    x, weight, bias = _layer(7, 5, 16, 17)
    more, more_weight, _ = _layer(9, 5, 16, 17, kernel=1)
    leaves = [t.clone().requires_grad_() for t in (x, more, weight, more_weight, bias)]
    ops.fused_conv2d(leaves[:2], leaves[2:4], leaves[4], padding=1).square().sum().backward()
    same = [t.clone().requires_grad_() for t in (x, more, weight, more_weight, bias)]
    y = F.conv2d(same[0], same[2], same[4], padding=1) + F.conv2d(same[1], same[3])
    y.square().sum().backward()
    for leaf, other in zip(leaves, same, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_pointwise_convolutions_that_no_kernel_takes_are_refused_with_a_reason():
    x, weight, _ = _layer(4, 4, 8, 8)
    more, beside = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 1, 1)
    wide = torch.zeros(4, 4, 5, 5)
    with use_backend("cpu", op="fused_conv2d"):
        ops.fused_conv2d((x, more), (wide, beside), padding=2)
        with use_ieee(), pytest.raises(UnsupportedError, match="a 1×1 weight is covered beside 3×3"):
            ops.fused_conv2d((x, more), (wide, beside), padding=2)
        with pytest.raises(UnsupportedError, match="a 1×1 weight is covered beside 3×3"):
            ops.fused_conv2d((x, more[..., :4, :4]), (weight, beside), padding=1, stride=2)
    for lane in ("triton", "cuda", "cupy"):
        (why,) = SPEC.lanes[lane].refuses(x, weight, more, beside)
        assert "weight of its own" in why
        assert not list(SPEC.lanes[lane].refuses(x, weight, more, None))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [0, 1, 2, (1, 2), (2, 0, 1, 1)])
def test_winograd_equals_the_direct_form(mode, padding):
    """Every padding mode, side by side with torch's own pad and convolution in float64."""
    x, weight, bias = _layer(21, 37, 18, 23)
    sides = [padding] * 4 if isinstance(padding, int) else list(padding) * (4 // len(padding))
    top, left, bottom, right = sides
    around = (left, right, top, bottom)
    residual = torch.randn(1, 37, 16 + top + bottom, 21 + left + right)

    def direct(dtype):
        padded = F.pad(x.to(dtype), around, "constant" if mode == "zeros" else mode)
        return F.elu(F.conv2d(padded, weight.to(dtype), bias.to(dtype))) + residual.to(dtype)

    with use_backend("cpu", op="fused_conv2d"):
        got = ops.fused_conv2d(x, weight, bias, padding=padding, padding_mode=mode, activation="elu", residual=residual)
    assert_close_to_truth(got, direct(torch.float64), direct(torch.float32), numerics=WINOGRAD)


@pytest.mark.parametrize(
    ("c", "outputs", "h", "w"), [(512, 128, 32, 28), (128, 384, 57, 70), (64, 64, 64, 64), (192, 128, 36, 36)]
)
def test_winograd_error_at_real_layers(c, outputs, h, w):
    """Chains of 64 channels keep F(4×4, 3×3) near half of its bound, where one long chain used all of it."""
    x, weight, bias = _layer(c, outputs, h, w)
    with use_backend("cpu", op="fused_conv2d"):
        got = ops.fused_conv2d(x, weight, bias, padding=1)
    truth, own = F.conv2d(x.double(), weight.double(), bias.double(), padding=1), F.conv2d(x, weight, bias, padding=1)
    assert close_to_truth(got, truth, own, numerics=Numerics(rms=5.0, max=8.0)).ok
    assert float((got - truth).square().mean().sqrt() / truth.square().mean().sqrt()) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("c", "outputs", "h", "w"), [(1, 1, 1, 1), (9, 12, 5, 19), (64, 33, 8, 16), (385, 40, 3, 21)])
def test_one_by_one(c, outputs, h, w, dtype, layout):
    """Channels that fill vectors of pairs, end in half a pair, or are a single one; in any memory."""
    shapes = {"x": (2, c, h, w), "weight": (outputs, c, 1, 1), "bias": (outputs,), "residual": (2, outputs, h, w)}
    generator = torch.Generator().manual_seed(1)
    tensors = {n: LAYOUTS[layout](torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}
    for mode in ("before", "after"):
        args = SPEC.bind(**tensors, activation="elu", residual_mode=mode)
        with use_backend("cpu", op="fused_conv2d"):
            got = ops.fused_conv2d(**tensors, activation="elu", residual_mode=mode)
        truth = SPEC.run_reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        assert_close_to_truth(got, truth, SPEC.run_reference(*args))


def test_bfloat16_is_never_winograds():
    x, weight, bias = (t.bfloat16() for t in _layer(8, 8, 32, 32))
    with dispatch.launches() as heard:
        got = ops.fused_conv2d(x, weight, bias, padding=1)
        ops.fused_conv2d(x, weight[..., :1, :1], bias)
    assert [(launch.backend, launch.numerics) for launch in heard] == [("cpu", DIRECT), ("cpu", DIRECT)]
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert_close_to_truth(got, truth, F.conv2d(x, weight, bias, padding=1))


@pytest.mark.skipif(bool(native.missing()), reason="needs the native library")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "options"),
    [(2, {}), (4, {"stride": 2}), (5, {"mask": True}), (3, {"upsample": 2}), (8, {"padding_mode": "reflect"})],
)
def test_few_pixels_and_large_filters(side, options, dtype, layout):
    """By columns, where pixels are the lanes, whether or not the planner would choose that here."""
    x, weight, bias = (LAYOUTS[layout](t.to(dtype)) if t.dim() == 4 else t for t in _layer(96, 40, side, side + 1))
    if options.get("mask"):
        options = {"mask": (torch.rand(1, 1, side, side + 1) > 0.4).to(dtype)}
    bias, options = bias.to(dtype), {"padding": 1, **options}

    def run(x=x, weight=weight, bias=bias, **more):
        return ops.fused_conv2d(x, weight, bias, **{**options, **more})

    heard = []

    def listen(op, backend, args):
        heard.append((backend, native.choice(op, args, SPEC.out(*args))))

    dispatch.observers.append(listen)
    before = native.preferences()
    try:
        run()
        choice = heard[0][1]
        assert "columns" in choice.algorithms
        native.prefer({choice.key: "columns"})
        got = run()
        assert heard[1] == ("cpu", dataclasses.replace(choice, algorithm="columns"))
    finally:
        dispatch.observers.remove(listen)
        native.prefer(before)
    more = {"mask": options["mask"].double()} if "mask" in options else {}
    truth = run(x.double(), weight.double(), bias.double(), **more)
    bound = 2**-8 if dtype == torch.bfloat16 else 2e-6
    assert (got.double() - truth).abs().max() <= bound * truth.abs().max()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("stride", "dilation", "kernel"), [(1, 1, 5), (1, 4, 3), (2, 1, 3), (2, 1, 4), (3, 2, 7), (1, 2, 5)]
)
def test_every_geometry_has_a_kernel(kernel, stride, dilation, mode):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 20, 29, 26, generator=generator)
    weight = torch.randn(35, 20, kernel, kernel, generator=generator) / (20 * kernel**2) ** 0.5
    sides = [dilation * (kernel // 2)] * 2 + [dilation * (kernel // 2), 1]

    def direct(dtype):
        top, left, bottom, right = sides
        padded = F.pad(x.to(dtype), (left, right, top, bottom), "constant" if mode == "zeros" else mode)
        return F.conv2d(padded, weight.to(dtype), stride=stride, dilation=dilation)

    for image in (x, x.to(memory_format=torch.channels_last)):
        with use_backend("cpu", op="fused_conv2d"), dispatch.launches() as heard:
            got = ops.fused_conv2d(image, weight, stride=stride, dilation=dilation, padding=sides, padding_mode=mode)
        assert_close_to_truth(got, direct(torch.float64), direct(torch.float32), numerics=dispatch.numerics_of(heard))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "more"), [(3, 2, 1, 1), (4, 2, 1, 0), (2, 2, 0, 0), (5, 3, 1, 2)]
)
def test_transposed_convolutions_by_phases(kernel, stride, padding, more):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 18, 9, 13, generator=generator)
    weight = torch.randn(18, 21, kernel, kernel, generator=generator) / (18 * kernel**2 / stride**2) ** 0.5
    with use_backend("cpu", op="fused_conv2d"), dispatch.launches() as heard:
        got = ops.fused_conv2d(x, weight, stride=stride, padding=padding, transposed=True, output_padding=more)
    truth = F.conv_transpose2d(x.double(), weight.double(), None, stride, padding, more)
    own = F.conv_transpose2d(x, weight, None, stride, padding, more)
    assert_close_to_truth(got, truth, own, numerics=dispatch.numerics_of(heard))


@contextlib.contextmanager
def _by(algorithm, *args, **kwargs):
    """The engine's algorithm for a call, whatever the planner would choose."""
    bound = SPEC.bind(*args, **kwargs)
    choice = native.choice(SPEC.name, bound, SPEC.out(*bound))
    assert algorithm in choice.algorithms
    before = native.preferences()
    native.prefer({**before, choice.key: algorithm})
    try:
        with use_backend("cpu", op="fused_conv2d"):
            yield
    finally:
        native.prefer(before)


ALONG_ROWS = {5: "winograd F(4,5) along rows", 7: "winograd F(2,7) along rows"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize(("height", "width"), [(5, 5), (7, 7), (1, 5), (3, 7), (8, 5)])
def test_winograd_along_rows_equals_the_direct_form(height, width, mode, dtype):
    """Rows of one tile and of several groups of tiles, in one strip and in two; more channels than a vector has."""
    generator = torch.Generator().manual_seed(1)
    for c, outputs, h, w in [(1, 1, 8, 4), (4, 37, 11, 131), (19, 24, 9, 30), (33, 5, 5, 1200)]:
        x = torch.randn(2, c, h, w, generator=generator).to(dtype)
        weight = (torch.randn(outputs, c, height, width, generator=generator) / (c * height * width) ** 0.5).to(dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype)
        call = {"padding": [height // 2, 3, height // 2, 2], "padding_mode": mode, "activation": "elu"}
        with _by(ALONG_ROWS[width], x, weight, bias, **call):
            got = ops.fused_conv2d(x, weight, bias, **call)
        truth, own = _reference(x.double(), weight.double(), bias.double(), **call), _reference(x, weight, bias, **call)
        assert_close_to_truth(got, truth, own, numerics=WINOGRAD if dtype == torch.float32 else DIRECT)


@pytest.mark.parametrize(("c", "outputs", "kernel", "side"), [(4, 64, 7, 256), (5, 32, 5, 256), (64, 64, 5, 48)])
def test_error_along_rows_at_real_layers(c, outputs, kernel, side):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, c, side, side, generator=generator)
    weight = torch.randn(outputs, c, kernel, kernel, generator=generator) / (kernel**2 * c) ** 0.5
    with _by(ALONG_ROWS[kernel], x, weight, padding=[kernel // 2] * 4):
        got = ops.fused_conv2d(x, weight, padding=kernel // 2)
    truth, own = F.conv2d(x.double(), weight.double(), padding=kernel // 2), F.conv2d(x, weight, padding=kernel // 2)
    assert close_to_truth(got, truth, own, numerics=Numerics(rms=4.0, max=6.0)).ok
    assert float((got - truth).square().mean().sqrt() / truth.square().mean().sqrt()) < 1e-6


BY_PHASES = {2: "winograd F(4×4,2×2) by phases", 3: "winograd F(4×4,3×3) by phases"}
STRIDED = [(3, 2, {"stride": 2}), (4, 2, {"stride": 2}), (5, 3, {"stride": 2})]
TRANSPOSED = [
    (3, 2, {"stride": 2, "transposed": True, "output_padding": 1}),
    (4, 2, {"stride": 2, "transposed": True}),
    (5, 3, {"stride": 2, "transposed": True, "output_padding": 1}),
]
DOUBLED = [(2, 2, {"upsample": 2}), (3, 2, {"upsample": 2}), (4, 3, {"upsample": 2}), (5, 3, {"upsample": 2})]


def _reference(x, weight, bias=None, **options):
    return SPEC.run_reference(*SPEC.bind(x, weight, bias, **options))


SIZES = [(1, 1), (2, 1), (3, 3), (8, 17), (31, 26)]
SIDES = [[1, 1, 1, 1], [2, 2, 2, 2], [0, 0, 1, 1], [2, 1, 0, 3], [3, 3, 3, 3]]


@pytest.mark.parametrize(
    ("kernel", "taps", "options", "mode"),
    [(*case, mode) for case in STRIDED + DOUBLED for mode in ("zeros", "reflect", "replicate")]
    + [(*case, "zeros") for case in TRANSPOSED],
)
def test_winograd_by_phases_equals_the_direct_form(kernel, taps, options, mode):
    """Images of one pixel, kernels larger than the image, more padding on one side than on the other (as tf_same)."""
    generator = torch.Generator().manual_seed(1)
    sides = (18, 21) if options.get("transposed") else (21, 18)
    weight = torch.randn(*sides, kernel, kernel, generator=generator) / (18 * kernel**2) ** 0.5
    bias = torch.randn(21, generator=generator)
    computed = 0
    for (h, w), padding in itertools.product(SIZES, SIDES):
        x = torch.randn(2, 18, h, w, generator=generator)
        call = {**options, "padding": padding, "padding_mode": mode}
        bound = SPEC.bind(x, weight, bias, **call)
        try:
            algorithms = native.choice(SPEC.name, bound, SPEC.out(*bound)).algorithms
        except ValueError:  # smaller than the kernel, or than what is reflected
            continue
        if mode == "reflect" and options.get("upsample") and max(padding) > 1:
            assert BY_PHASES[taps] not in algorithms  # the doubled image does not reflect what is stored
            continue
        with _by(BY_PHASES[taps], x, weight, bias, **call):
            got = ops.fused_conv2d(x, weight, bias, **call)
        truth, own = _reference(x.double(), weight.double(), bias.double(), **call), _reference(x, weight, bias, **call)
        assert_close_to_truth(got, truth, own, numerics=WINOGRAD)
        computed += 1
    assert computed >= 5


@pytest.mark.parametrize(("c", "outputs", "side"), [(64, 128, 64), (256, 128, 32), (512, 256, 24)])
@pytest.mark.parametrize(("kernel", "taps", "options"), [*STRIDED, *TRANSPOSED[:2], DOUBLED[1]])
def test_error_by_phases_at_real_layers(kernel, taps, options, c, outputs, side):
    """F(4×4, 2×2) is near a third of its bound, F(4×4, 3×3) near half of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, c, side, side, generator=generator).relu_()
    sides = (c, outputs) if options.get("transposed") else (outputs, c)
    weight = torch.randn(*sides, kernel, kernel, generator=generator) / (kernel**2 * c) ** 0.5
    call = {**options, "padding": [(kernel - 1) // 2] * 4}
    with _by(BY_PHASES[taps], x, weight, **call):
        got = ops.fused_conv2d(x, weight, **call)
    truth, own = _reference(x.double(), weight.double(), **call), _reference(x, weight, **call)
    limits = Numerics(rms=4.0, max=6.0) if taps == 2 else Numerics(rms=5.0, max=8.0)
    assert close_to_truth(got, truth, own, numerics=limits).ok
    assert float((got - truth).square().mean().sqrt() / truth.square().mean().sqrt()) < 1e-6


def test_ieee_has_nothing_by_phases():
    x, weight, _ = _layer(64, 128, 64, 64)
    bound = SPEC.bind(x, weight, stride=2, padding=[1, 1, 1, 1])
    assert BY_PHASES[2] in native.choice(SPEC.name, bound, SPEC.out(*bound)).algorithms
    with use_ieee():
        assert native.choice(SPEC.name, bound, SPEC.out(*bound)).algorithms == ("direct", "columns")


@pytest.mark.parametrize(("kernel", "taps", "options"), [STRIDED[0], TRANSPOSED[1], DOUBLED[1]])
def test_bfloat16_by_phases_keeps_the_ordinary_bound(kernel, taps, options):
    """Transforms and products are float32; the filters that phases of a doubled image add up, too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 96, 20, 26, generator=generator).relu_().bfloat16()
    sides = (96, 64) if options.get("transposed") else (64, 96)
    weight = (torch.randn(*sides, kernel, kernel, generator=generator) / (kernel**2 * 96) ** 0.5).bfloat16()
    call = {**options, "padding": [1] * 4}
    with _by(BY_PHASES[taps], x, weight, **call):
        got = ops.fused_conv2d(x, weight, **call)
    assert_close_to_truth(got, _reference(x.double(), weight.double(), **call), _reference(x, weight, **call))


@pytest.mark.parametrize(
    ("mode", "padding"), [("zeros", 1), ("zeros", 2), ("reflect", 1), ("reflect", 2), ("replicate", 2)]
)
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_doubled_images(kernel, mode, padding, precise):
    """By four phases under "ieee" (where padding lets them), read as doubled by Winograd's algorithm."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 34, 9, 12, generator=generator)
    weight = torch.randn(40, 34, kernel, kernel, generator=generator) / (34 * kernel**2) ** 0.5

    def direct(dtype):
        image = F.interpolate(x.to(dtype), scale_factor=2.0, mode="nearest")
        return F.conv2d(F.pad(image, [padding] * 4, "constant" if mode == "zeros" else mode), weight.to(dtype))

    with contextlib.ExitStack() as stack:
        if precise:
            stack.enter_context(use_ieee())
        stack.enter_context(use_backend("cpu", op="fused_conv2d"))
        heard = stack.enter_context(dispatch.launches())
        got = ops.fused_conv2d(x, weight, upsample=2, padding=padding, padding_mode=mode)
        numerics = dispatch.numerics_of(heard)
    assert_close_to_truth(got, direct(torch.float64), direct(torch.float32), numerics=numerics)


def test_weights_may_change_in_any_way():
    """Nothing of a weight is kept between calls."""
    for shape in ((8, 6, 3, 3), (8, 6, 5, 5), (8, 6, 4, 4), (8, 6, 1, 1), (3, 6, 7, 7)):
        x, weight = torch.randn(1, 6, 24, 24), torch.randn(shape)
        ops.fused_conv2d(x, weight)

        def same(weight=weight, x=x):
            torch.testing.assert_close(ops.fused_conv2d(x, weight), F.conv2d(x, weight), rtol=1e-4, atol=1e-4)

        weight.mul_(2)
        same()
        weight.data.copy_(torch.randn(shape))
        same()
        weight.numpy()[:] = 1.5
        same()
        with torch.inference_mode():
            made = torch.randn(shape)
            same(made)
            made.add_(1)
            same(made)


def test_groups_and_other_dtypes_are_refused_with_a_reason():
    x, weight, bias = _layer(4, 4, 8, 8)
    with use_backend("cpu", op="fused_conv2d"):
        for case, why in (
            ({"x": x, "weight": weight[:, :2], "groups": 2}, "groups is 2"),
            ({"x": x.double(), "weight": weight.double()}, "float64"),
            ({"x": x.half(), "weight": weight.half()}, "float16"),
            ({"x": x, "weight": torch.randn(2, 4, 65, 1), "padding": 40}, "65×1"),
            ({"x": x, "weight": weight, "stride": 9}, "stride is 9"),
        ):
            with pytest.raises(UnsupportedError, match=why):
                ops.fused_conv2d(**case)
    torch.testing.assert_close(
        ops.fused_conv2d(x, weight[:, :2], bias, groups=2), F.conv2d(x, weight[:, :2], bias, groups=2)
    )


BESIDE = (torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": -1}, "padding"),
        ({"padding": "valid"}, "padding"),
        ({"padding": "same", "stride": 2}, "padding"),
        ({"padding": 8, "padding_mode": "reflect"}, "reflection"),
        ({"padding_mode": "circular"}, "padding_mode"),
        ({"residual_mode": "during"}, "residual_mode"),
        ({"upsample": 3}, "upsample"),
        ({"output_padding": 1}, "output_padding"),
        ({"transposed": True, "padding_mode": "reflect"}, "transposed"),
        ({"groups": 2}, "channels"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"residual": torch.zeros(1, 4, 8, 8)}, "residual"),
        ({"mask": torch.zeros(1, 2, 8, 8)}, "mask"),
        ({"weight": torch.zeros(4, 4, 3, 3, dtype=torch.bfloat16)}, "weight"),
        ({"weight": torch.zeros(0, 4, 3, 3)}, "weight"),
        ({"x": torch.zeros(1, 0, 8, 8), "weight": torch.zeros(4, 0, 3, 3)}, "weight"),
        ({"x": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "floating"),
        ({"weight": torch.zeros(4, 4, 9, 9)}, "smaller"),
        ({"stride": 0}, "stride"),
        ({"dilation": 4}, "smaller"),
        ({"activation": "gelu"}, "activation"),
        ({"weight": (torch.zeros(4, 4, 3, 3), torch.zeros(4, 3, 1, 1))}, "two parts of x"),
        ({"x": [torch.zeros(1, 4, 8, 8)], "weight": [torch.zeros(4, 4, 3, 3)]}, "two parts of x"),
        ({"x": BESIDE, "weight": (torch.zeros(4, 4, 3, 3), torch.zeros(4, 3, 1, 1))}, "second part"),  # of another size
        ({"x": BESIDE, "weight": (torch.zeros(4, 4, 3, 3), torch.zeros(4, 2, 1, 1)), "padding": 1}, "its weight"),
        ({"x": BESIDE, "weight": (torch.zeros(4, 4, 3, 3), torch.zeros(4, 3, 2, 2)), "padding": 1}, "its weight"),
        (
            {"x": BESIDE, "weight": (torch.zeros(4, 4, 3, 3), torch.zeros(4, 3, 1, 1).double()), "padding": 1},
            "second_weight",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    x, weight, bias = _layer(4, 4, 8, 8)
    with pytest.raises(ValueError, match=message):
        ops.fused_conv2d(**{"x": x, "weight": weight, "bias": bias, **change})


def test_lanes_state_their_numerics():
    x, weight, _ = _layer(4, 4, 8, 8)
    numerics = SPEC.lanes["cpu"].numerics
    assert numerics(*SPEC.bind(x, weight, padding=[1, 1, 1, 1])) == WINOGRAD
    assert numerics(*SPEC.bind(x, weight[..., :1, :1])) == DIRECT == Numerics(2.0, 2.0)


@pytest.mark.parametrize(
    ("sides", "options"),
    [((k, k), {"stride": 2}) for k in range(1, 8)]
    + [((k, k), {"stride": 2, "transposed": True}) for k in range(1, 8)]
    + [((k, k), {"upsample": 2}) for k in range(1, 8)]
    + [((3, 4), {"stride": 2}), ((3, 5), {"stride": 2}), ((3, 3), {"stride": 2, "dilation": 2})]
    + [((3, 3), {"stride": 3}), ((3, 3), {"stride": 2, "upsample": 2}), ((3, 3), {"dilation": 3}), ((3, 5), {})]
    + [((5, 3), {}), ((1, 7), {}), ((7, 7), {}), ((7, 7), {"dilation": 2}), ((7, 7), {"stride": 2})],
)
def test_numerics_are_winograds_where_the_engine_may_take_it(sides, options):
    weight = torch.randn(4, 4, *sides)
    bound = SPEC.bind(torch.randn(1, 4, 16, 16), weight, padding=[1, 1, 1, 1], **options)
    algorithms = native.choice(SPEC.name, bound, SPEC.out(*bound)).algorithms
    spreads = any(name.startswith("winograd") for name in algorithms)
    assert (SPEC.lanes["cpu"].numerics(*bound) == WINOGRAD) == spreads


@pytest.mark.parametrize(("c", "outputs", "h", "w"), [(512, 128, 32, 28), (128, 384, 40, 33), (64, 64, 64, 64)])
def test_ieee_has_the_direct_forms_error(c, outputs, h, w):
    x, weight, bias = _layer(c, outputs, h, w)
    with use_ieee(), use_backend("cpu", op="fused_conv2d"), dispatch.launches() as heard:
        got = ops.fused_conv2d(x, weight, bias, padding=1)
        assert heard[0].numerics == DIRECT
    truth, own = F.conv2d(x.double(), weight.double(), bias.double(), padding=1), F.conv2d(x, weight, bias, padding=1)
    assert_close_to_truth(got, truth, own)

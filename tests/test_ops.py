"""The matrix, generated from the specs: op × backend × dtype × sample × layout.

A case that a backend refuses is not skipped: the test checks that it gives a reason and that forcing it raises with that
reason. Which cases ran is printed at the end of the session.
"""

from __future__ import annotations

import pytest
import torch

from inpaintrt import ops, use_backend
from inpaintrt.backends.triton import interpreting
from inpaintrt.runtime import dispatch, registry
from inpaintrt.runtime.errors import UnsupportedError
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.spec import FLOATS, as_outputs
from inpaintrt.testing import assert_close_to_truth
from inpaintrt.testing.compare import DIRECT, WINOGRAD
from inpaintrt.testing.layouts import LAYOUTS

from .conftest import ran

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = sorted(FLOATS, key=str)
# The reference multiplies the zeros around an image, or in it, with infinities, 0 · ∞ = NaN; kernels leave those products out.
PADS_PATCHES = ("contextual_attention", "contextual_attention_with_offsets", "upfirdn2d")
# The other way round: the engine multiplies zeros around an image with infinite weights, oneDNN leaves those products out.
READS_PADDING = ("fused_conv2d", "gated_conv2d", "partial_conv2d")


def _cases():
    for name in registry.names():
        spec = registry.get(name)
        for backend in (*spec.lanes, "reference"):
            for index, sample in enumerate(spec.samples("smoke")):
                for dtype in DTYPES:
                    # Pairwise rather than the product: each sample meets each dtype, and layouts rotate over samples.
                    layouts = list(LAYOUTS)
                    places = (index % len(layouts), (index + DTYPES.index(dtype)) % len(layouts))
                    for layout in dict.fromkeys(layouts[place] for place in places):  # in an order that stays
                        yield pytest.param(
                            name, backend, sample, dtype, layout, id=_id(name, backend, dtype, sample, layout)
                        )


def _id(name, backend, dtype, sample, layout):
    return f"{name}-{backend}-{str(dtype).removeprefix('torch.')}-{sample.id}-{layout}"


def _arguments(spec, sample, dtype, layout, device):
    generator = torch.Generator().manual_seed(1)
    tensors = {n: LAYOUTS[layout](t).to(device) for n, t in sample.tensors(generator, 2.0).items()}
    tensors = {n: t if n in sample.values else _keep_strides(t, dtype) for n, t in tensors.items()}
    return tensors, spec.bind(**tensors, **sample.kwargs)


def _each(function, args):
    """Arguments with `function` applied to their tensors, in lists too."""

    def one(a):
        if isinstance(a, list):
            return [one(b) for b in a]
        return function(a) if isinstance(a, torch.Tensor) else a

    return tuple(map(one, args))


def _key(args):
    """The tensor whose device and dtype decide."""
    return next(a for a in args if isinstance(a, torch.Tensor))


def _double(t):
    return t.double() if t.is_floating_point() else t


def _keep_strides(t, dtype):
    out = torch.empty_strided(t.shape, t.stride(), dtype=torch.float32, device=t.device).to(dtype)
    return out.copy_(t) if 0 not in t.stride() else t[:1].to(dtype).expand(t.shape)


def _public(spec):
    return getattr(ops, spec.name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "backend", "sample", "dtype", "layout"), list(_cases()))
def test_matrix(name, backend, sample, dtype, layout, device):
    check(name, backend, sample, dtype, layout, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", registry.names())
def test_whole_matrix(name, device, full):
    """Every sample in every layout, dtype and backend (--full), or the samples that smoke leaves out, once."""
    spec = registry.get(name)
    smoke = {s.id for s in spec.samples("smoke")}
    for sample in spec.samples("full"):
        for backend in (*spec.lanes, "reference"):
            if full:
                for dtype in DTYPES:
                    for layout in LAYOUTS:
                        check(name, backend, sample, dtype, layout, device)
            elif sample.id not in smoke and not (backend == "triton" and device == "cpu"):  # the interpreter is slow
                check(name, backend, sample, torch.float32, "contiguous", device)


def check(name, backend, sample, dtype, layout, device):
    spec = registry.get(name)
    tensors, args = _arguments(spec, sample, dtype, layout, device)
    key = next(iter(tensors.values()))
    reasons = [] if backend == "reference" else dispatchers[name].reasons(args, key)[backend]
    if reasons:
        ran[name, backend, "refused"] += 1
        with use_backend(backend, op=name), pytest.raises(UnsupportedError) as raised:
            _public(spec)(**tensors, **sample.kwargs)
        assert all(reason in str(raised.value) for reason in reasons)
        return
    ran[name, backend, "ran"] += 1
    seen = []
    before = [t.clone() for t in tensors.values()]
    dispatch.observers.append(lambda *call: seen.append(call[:2]))
    runs = 1 if backend == "triton" and interpreting() else 2  # one after the other, and slowly: nothing can differ
    try:
        with use_backend(backend, op=name):
            first, *others = (as_outputs(_public(spec)(**tensors, **sample.kwargs)) for _ in range(runs))
    finally:
        dispatch.observers.clear()
    assert seen == [(name, backend)] * runs
    baseline = as_outputs(spec.run_reference(*args))
    truth = as_outputs(spec.run_reference(*_each(_double, args)))
    fake = spec.out(*_each(lambda t: t.to("meta"), args))
    for got, *again, exact, base, shape in zip(first, *others, truth, baseline, fake, strict=True):
        assert all(torch.equal(got, other) for other in again), "two runs differ"
        if not got.is_floating_point():  # indices: the samples leave no doubt about them
            assert torch.equal(got, exact), _id(name, backend, dtype, sample, layout)
            continue
        numerics = spec.lanes[backend].numerics(*args) if backend in spec.lanes else DIRECT
        assert_close_to_truth(got, exact, base, numerics=numerics, context=_id(name, backend, dtype, sample, layout))
        assert (got.shape, got.dtype, got.stride()) == (shape.shape, shape.dtype, shape.stride())
    for kept, tensor in zip(before, tensors.values(), strict=True):
        assert torch.equal(kept, tensor), "an input was written to"


@pytest.mark.parametrize("name", registry.names())
def test_result_does_not_depend_on_threads(name):
    spec = registry.get(name)
    for sample in spec.samples("full"):
        tensors, _ = _arguments(spec, sample, torch.float32, "contiguous", "cpu")
        _, args = _arguments(spec, sample, torch.float32, "contiguous", "cpu")
        if dispatchers[name].reasons(args, _key(args))["cpu"]:
            continue  # torch computes it, which makes no such promise
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(as_outputs(_public(spec)(**tensors, **sample.kwargs)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", registry.names())
def test_non_finite_values_are_where_the_reference_has_them(name):
    """NaN and infinities in, at every position of a vector: kernels must not lose or invent them."""
    spec = registry.get(name)
    huge = 1e18 if name in READS_PADDING else 1e30  # whose products overflow, but not in a fused multiply-add
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, huge, -huge, 89.0, -104.0, 1e-30])
    for sample in spec.samples("smoke"):
        tensors, _ = _arguments(spec, sample, torch.float32, "contiguous", "cpu")
        for t in (t for n, t in tensors.items() if n not in (*sample.masks, *sample.values)):
            flat = t.view(-1)
            places = torch.randperm(flat.numel())[: flat.numel() // 2]
            flat[places] = special[torch.arange(len(places)) % len(special)]
        args = spec.bind(**tensors, **sample.kwargs)
        for got, base in zip(
            as_outputs(_public(spec)(**tensors, **sample.kwargs)), as_outputs(spec.run_reference(*args)), strict=True
        ):
            on_cpu = "cpu" in spec.lanes and not dispatchers[name].reasons(args, _key(args))["cpu"]
            if on_cpu and (spec.lanes["cpu"].numerics(*args) == WINOGRAD or name in READS_PADDING):
                # Phases add taps before they multiply: (a − b)·∞ is infinite where a·∞ − b·∞ is NaN.
                lost = got.isfinite() if sample.kwargs.get("upsample", 1) > 1 else ~got.isnan()
                assert not bool(lost[base.isnan()].any()), f"{sample.id}: a NaN was lost"
                continue  # one more may appear: all outputs of a tile share its inputs
            if on_cpu and name in PADS_PATCHES:
                assert bool(base.isnan()[got.isnan()].all()), f"{sample.id}: a NaN was invented"
                continue
            assert torch.equal(got.isnan(), base.isnan()), sample.id
            finite = ~base.isnan()
            torch.testing.assert_close(got[finite], base[finite], rtol=1e-5, atol=1e-6)


def test_memory_around_the_output_is_untouched():
    """Native kernels write into views of a canary buffer: nothing outside the view may change."""
    from inpaintrt.runtime import native

    kernel = native.library().cpu_kernel("gated_activation")
    for shape in ((1, 1, 1, 1), (2, 3, 5, 7), (1, 17, 3, 31), (1, 16, 64, 5)):
        b, c, h, w = shape
        y = torch.randn(b, 2 * c, h, w)
        canary = torch.full((b + 2, c + 2, h + 2, w + 2), 7.0)
        view = canary[1:-1, 1:-1, 1:-1, 1:-1]
        kernel((y, "elu", None, 1.0), (view,), 2)
        assert torch.equal(view, ops.gated_activation(y))
        view.fill_(7.0)
        assert bool((canary == 7.0).all())

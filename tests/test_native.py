"""The Python binding: what it refuses instead of crashing, and that it may be used after fork."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from inpaintrt.runtime import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "native")

Y, OUT = torch.ones(1, 2, 3, 4), torch.empty(1, 1, 3, 4)
ARGS = (Y, "elu", None, 1.0)


def _kernel(name="gated_activation"):
    return native.library().cpu_kernel(name)


def test_names():
    library = native.library()
    assert {library.cpu_kernel(name) is None for name in library.cpu_kernels()} == {False}
    assert library.cpu_kernel("absent") is None
    assert library.planner("absent") is None
    assert library.cuda_kernel("absent") is None


@pytest.mark.parametrize(
    ("args", "outs", "error", "message"),
    [
        (ARGS, (None,), TypeError, "expected a torch.Tensor"),
        (ARGS, (torch.empty(OUT.shape, device="meta"),), RuntimeError, "meta"),
        ((Y, "elu", None, object()), (OUT,), TypeError, "an argument of type object has no native form"),
        ((Y, "elu", None, 1 << 70), (OUT,), OverflowError, "too (big|large)"),
        ((Y, "el\ud800u", None, 1.0), (OUT,), UnicodeEncodeError, "surrogates"),
        ((Y.to(torch.complex64), *ARGS[1:]), (OUT,), ValueError, "no native form"),
        ((Y.reshape(1, 1, 1, 1, 2, 3, 4), *ARGS[1:]), (OUT,), ValueError, "no native form"),
        ((Y.to_sparse(), *ARGS[1:]), (OUT,), RuntimeError, "storage"),
        (([Y] * 65,), (OUT,), ValueError, "too many arguments"),
        (([1] * 129,), (OUT,), ValueError, "too many arguments"),
        ((1,) * 41, (OUT,), ValueError, "too many arguments"),
        (ARGS, (OUT,) * 65, ValueError, "too many arguments"),
        ((Y, [Y, 1], None, 1.0), (OUT,), TypeError, "expected a torch.Tensor"),
        ((Y, [1, Y], None, 1.0), (OUT,), TypeError, "tensors or integers"),
        ((Y, [1.5], None, 1.0), (OUT,), TypeError, "tensors or integers"),
        ((), (OUT,), ValueError, r"expected \(y, activation, alpha, gain\)"),
        ((Y, "gelu", None, 1.0), (OUT,), ValueError, "unknown activation"),
        ((Y, "elu", "1", 1.0), (OUT,), ValueError, "expected y, activation, alpha and gain"),
        (ARGS, (Y,), ValueError, "must be"),
    ],
)
def test_refusals(args, outs, error, message):
    before = OUT.clone()
    with pytest.raises(error, match=message):
        _kernel()(args, outs, 1)
    torch.testing.assert_close(OUT, before, equal_nan=True)


def test_a_dtype_without_a_kernel():
    with pytest.raises(RuntimeError, match="dtype must be"):
        _kernel()((Y.double(), *ARGS[1:]), (OUT.double(),), 1)


def test_a_list_cannot_change_while_it_is_read():
    """`__index__` is Python code: it could shrink the list below the length that was read before."""

    class Evil:
        def __index__(self):
            arguments.clear()
            return 1

    arguments = [Evil(), 1, 2, 3]
    with pytest.raises(TypeError, match="tensors or integers"):
        _kernel()((Y, arguments, None, 1.0), (OUT,), 1)
    assert len(arguments) == 4


def test_gradients_have_the_shape_of_what_they_belong_to():
    kernel = _kernel("gated_activation_backward")
    args = ([torch.ones_like(OUT)], *ARGS, [True])
    for out in (OUT, Y.new_empty(1, 2, 3, 2), Y.half()):
        with pytest.raises(ValueError, match="the gradient of y must have y's shape and dtype"):
            kernel(args, (out,), 1)
    kernel(args, (torch.empty_like(Y),), 1)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_empty_tensors(shape):
    y = torch.empty(shape)
    assert y.data_ptr() == 0
    b, c, h, w = shape
    _kernel()((y, *ARGS[1:]), (torch.empty(b, c // 2, h, w),), 2)


def test_a_library_that_is_none_of_ours_is_refused():
    library = native.library()
    native.cuda_missing()  # loads ours, where there is one
    before = library.cuda_info()
    with pytest.raises(RuntimeError, match="not an inpaintrt CUDA library"):
        library.load_cuda(library.__file__)
    with pytest.raises(RuntimeError, match="cannot open"):
        library.load_cuda("/nonexistent.so")
    assert library.cuda_info() == before


def test_a_child_of_fork_runs_kernels():
    """GNU's OpenMP pool does not survive fork: a child that used it would wait for ever."""
    program = """
        import os, signal, torch
        from inpaintrt import ops
        torch.set_num_threads(2)
        y = torch.randn(1, 64, 64, 64)
        want = ops.gated_activation(y).numpy()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if (ops.gated_activation(y).numpy() == want).all() else 1)  # torch.equal would hang
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-P", "-W", "ignore", "-c", textwrap.dedent(program)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "0\n"

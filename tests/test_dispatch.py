"""Policy, refusals, settings, failure: what the user is told, and that nothing happens silently."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from inpaintrt import ops, use_backend
from inpaintrt.runtime import dispatch, registry
from inpaintrt.runtime.errors import KernelError, UnsupportedError
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.settings import Settings

Y = torch.ones(1, 2, 2, 2)


def _which(**kwargs):
    seen = []
    dispatch.observers.append(lambda op, backend, args: seen.append(backend))
    try:
        ops.gated_activation(Y, **kwargs)
    finally:
        dispatch.observers.clear()
    return seen


def test_policy_nests_and_ends():
    assert _which() == ["cpu"]
    with use_backend("reference"):
        assert _which() == ["reference"]
        with use_backend("cpu", op="gated_activation"):
            assert _which() == ["cpu"]
        assert _which() == ["reference"]
    assert _which() == ["cpu"]


def test_policy_is_per_thread():
    results = {}

    def work(backend):
        with use_backend(backend):
            for _ in range(200):
                results.setdefault(backend, set()).update([_requested()])

    def _requested():
        from inpaintrt.runtime.policy import policy, requested

        return requested(policy.get(), "gated_activation")

    threads = [threading.Thread(target=work, args=(b,)) for b in ("cpu", "reference", "auto")]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == {b: {b} for b in ("cpu", "reference", "auto")}


def test_many_threads_compute_the_same():
    y = torch.randn(1, 8, 33, 35)
    expected = ops.gated_activation(y)
    failures = []

    def work():
        for _ in range(50):
            if not torch.equal(ops.gated_activation(y), expected):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures


def test_unknown_names_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="did you mean 'triton'"), use_backend("tritn"):
        pass
    with pytest.raises(ValueError, match="did you mean 'gated_activation'"), use_backend("cpu", op="gated_activatio"):
        pass


def test_forced_and_unsupported_raises_with_the_reason():
    with use_backend("cuda"), pytest.raises(UnsupportedError, match="needs cuda") as raised:
        ops.gated_activation(Y)
    assert raised.value.reasons.keys() == {"cuda"}
    assert pickle.loads(pickle.dumps(raised.value)).reasons == raised.value.reasons
    with use_backend("cpu"), pytest.raises(UnsupportedError, match="float64 is not among"):
        ops.gated_activation(Y.double())


def test_every_refusal_names_something():
    for name in registry.names():
        for backend, reasons in dispatchers[name].reasons((Y.double(), "elu", None, 1.0), Y.double()).items():
            assert reasons, backend
            assert all(isinstance(r, str) and len(r) > 10 for r in reasons)


def test_backends_are_asked_once_whether_they_are_there(monkeypatch):
    """Not on every call of a layer that asks what speaks against it: to look for a package takes longer than small layers."""
    dispatcher, asked = dispatchers["gated_activation"], []
    dispatcher.clear()
    monkeypatch.setattr("inpaintrt.backends.cupy.missing", lambda op, device: asked.append(op) or "it is elsewhere")
    for _ in range(2):
        found = dispatcher.reasons((Y, "elu", None, 1.0), Y)["cupy"]
        assert found == ["it is elsewhere"]
        found.clear()  # the caller's own
    assert asked == ["gated_activation"]
    dispatcher.clear()
    assert dispatcher.reasons((Y, "elu", None, 1.0), Y)["cupy"]
    assert len(asked) == 2
    dispatcher.clear()


def test_automatic_fallback_says_so_once(caplog):
    dispatchers["gated_activation"].clear()
    with caplog.at_level(logging.INFO, logger="inpaintrt"):
        for _ in range(3):
            ops.gated_activation(Y.double())
    said = [r.getMessage() for r in caplog.records if "runs its reference" in r.getMessage()]
    assert len(said) == 1
    assert "cpu: dtype float64" in said[0]


def test_strict_turns_the_fallback_into_an_error(monkeypatch):
    monkeypatch.setattr(dispatch, "settings", dataclasses.replace(dispatch.settings, strict=True))
    with pytest.raises(UnsupportedError):
        ops.gated_activation(Y.double())


def test_kernel_errors_propagate_with_context(monkeypatch):
    """An error inside a kernel is not retried elsewhere: no fallback hides it."""

    def broken(args, outs):
        raise RuntimeError("the device burned")

    dispatcher = dispatchers["gated_activation"]
    dispatcher.clear()
    monkeypatch.setattr("inpaintrt.backends.cpu.launcher", lambda op: broken)
    with pytest.raises(
        KernelError, match=r"gated_activation on cpu failed for \(1, 2, 2, 2\) float32.*the device burned"
    ) as raised:
        ops.gated_activation(Y)
    assert isinstance(raised.value.__cause__, RuntimeError)
    dispatcher.clear()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.gated_activation(torch.ones(1, 3, 2, 2)),
            r"y has shape \(1, 3, 2, 2\); accepted: \(B, 2C, H, W\)",
        ),
        (lambda: ops.gated_activation(torch.ones(2, 2)), "y has shape"),
        (lambda: ops.gated_activation(torch.ones(1, 2, 2, 2, dtype=torch.int32)), "dtype torch.int32"),
        (lambda: ops.gated_activation(Y, activation="gelu"), "activation is 'gelu'; accepted: none, relu"),
        (lambda: ops.gated_activation(Y, activation="silu", alpha=0.1), "has no parameter"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_native_call_checks_for_itself():
    """The C ABI is public: it validates what it reads, whoever calls."""
    from inpaintrt.runtime import native

    kernel = native.library().cpu_kernel("gated_activation")
    out = torch.empty(1, 1, 2, 2)
    for args, outs, error in [
        ((Y, "gelu", None, 1.0), (out,), ValueError),
        ((Y, "elu", None, 1.0), (torch.empty(1, 2, 2, 2),), ValueError),
        ((Y, "elu", None, 1.0), (out.double(),), ValueError),
        ((Y.double(), "elu", None, 1.0), (out.double(),), RuntimeError),
        ((None, "elu", None, 1.0), (out,), ValueError),
        ((Y, "elu", None, 1.0), (), ValueError),
        ((Y, {}, None, 1.0), (out,), TypeError),
        ((Y,) * 99, (out,), ValueError),
        ((Y.to("meta"), "elu", None, 1.0), (out,), (ValueError, BufferError, RuntimeError)),
        ((torch.ones([1] * 7), "elu", None, 1.0), (out,), ValueError),
    ]:
        with pytest.raises(error):
            kernel(args, outs, 1)
    assert native.library().cpu_kernel("no_such_op") is None


def test_out_of_memory_keeps_its_type(monkeypatch):
    """A server catches `torch.OutOfMemoryError` to shrink its batch; the context comes as a note."""

    def full(args, outs):
        raise torch.OutOfMemoryError("no memory")

    dispatcher = dispatchers["gated_activation"]
    dispatcher.clear()
    monkeypatch.setattr("inpaintrt.backends.cpu.launcher", lambda op: full)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        ops.gated_activation(Y)
    assert "in gated_activation on cpu, for (1, 2, 2, 2) float32" in raised.value.__notes__[0]
    dispatcher.clear()


# ---- settings -------------------------------------------------------------------------------------------------------


def test_settings():
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env({"INPAINTRT_BACKEND": "cpu", "INPAINTRT_STRICT": "on"}) == Settings(
        backend="cpu", strict=True
    )
    with pytest.raises(ValueError, match=r"INPAINTRT_STRICT='maybe': accepted: 1, 0"):
        Settings.from_env({"INPAINTRT_STRICT": "maybe"})
    with pytest.raises(ValueError, match="INPAINTRT_BACKEND='gpu'"):
        Settings.from_env({"INPAINTRT_BACKEND": "gpu"})
    with pytest.warns(
        UserWarning, match="unknown environment variable INPAINTRT_BACKENDS; did you mean INPAINTRT_BACKEND"
    ):
        Settings.from_env({"INPAINTRT_BACKENDS": "cpu"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Settings.from_env({"INPAINTRT_CPU_ISA": "avx2", "PATH": "x"})


def _python(code, **env):
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_settings_reach_a_process():
    code = (
        "import torch, inpaintrt\nfrom inpaintrt import ops\nfrom inpaintrt.runtime import dispatch\n"
        "dispatch.observers.append(lambda op, backend, args: print(backend))\nops.gated_activation(torch.ones(1,2,2,2))"
    )
    assert _python(code).stdout == "cpu\n"
    assert _python(code, INPAINTRT_BACKEND="reference").stdout == "reference\n"
    assert "needs cuda" in _python(code, INPAINTRT_BACKEND="cuda").stderr
    bad = _python(code, INPAINTRT_CPU_ISA="mmx")
    assert bad.stdout == "reference\n"
    explained = _python("import inpaintrt; print(inpaintrt.info())", INPAINTRT_CPU_ISA="mmx")
    assert "INPAINTRT_CPU_ISA=mmx: unknown" in explained.stdout


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_every_isa_gives_the_same_numbers(isa):
    code = (
        "import torch; from inpaintrt import ops; from inpaintrt.runtime import native\n"
        "torch.manual_seed(0); y = 3 * torch.randn(2, 6, 9, 11)\n"
        "out = [ops.gated_activation(y, activation=a) for a in ('elu', 'silu', 'tanh')]\n"
        "print(native.library().cpu_isa(), sum(o.double().sum().item() for o in out))"
    )
    name, value = _python(code, INPAINTRT_CPU_ISA=isa).stdout.split()
    own = _python(code).stdout.split()[1]
    assert name == isa
    assert float(value) == pytest.approx(float(own), rel=1e-6)


def test_disable_is_a_kill_switch():
    code = (
        "import torch, inpaintrt as irt\nfrom inpaintrt.runtime.swap import why_original\n"
        "m = irt.accelerate(irt.models.create('lama', n_blocks=1, base_width=4))\n"
        "print(why_original(m.model, (torch.rand(1, 4, 16, 16),), {}))"
    )
    assert _python(code, INPAINTRT_DISABLE="1").stdout == "acceleration is disabled\n"
    assert _python(code).stdout == "\n"

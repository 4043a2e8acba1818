"""Other ways of running a network fast, each set up as its own documentation advises: the baselines of whole models.

All get the same network on the same input with our number of threads, fixed shapes, input and output in memory that is
not copied, and their warm-up. What one of them cannot do is reported with its own words, never left out; and one whose
numbers are not the network's is reported instead of timed.

Packages: `pip install 'inpaintrt[peers]'`. One that is missing is reported as such.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from inpaintrt.runtime.policy import use_backend
from inpaintrt.runtime.spec import as_outputs

Candidate = Callable[[], Any]
Inputs = tuple[Tensor, ...]
Builder = Callable[[nn.Module, Inputs], Candidate]

SAME_NUMBERS = 1e-3
"""Relative RMS from the eager network up to which another engine's float32 result is the same network's."""
ONNX_OPSET = 20  # the first whose DFT takes the axis as an input, as torch's exporter writes it
WARM_UP = 3  # calls: TorchScript optimises during the second


@dataclass
class Found:
    """What came of `prepare`: the peers that run, how long each took to get ready, and why the others do not."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        return [f"{name}: {why}" for name, why in self.refused.items()]


def prepare(
    builders: Mapping[str, Builder],
    network: nn.Module,
    inputs: Inputs,
    expected: Any,
    *,
    ported: Mapping[str, Callable[..., Any]],
    tolerance: float = SAME_NUMBERS,
) -> Found:
    """Build each peer, compare its results with `expected` (the eager network's), and keep those that agree.

    Args:
        builders: of the peers, by name.
        network, inputs: what they are to run; on the CPU, in eval mode.
        expected: what `network(*inputs)` gives.
        ported: see `in_torch_ops`.
        tolerance: relative RMS up to which results agree.
    """
    found = Found()
    try:
        network = in_torch_ops(network, inputs, ported)
    except Exception as error:  # then it keeps ops of ours, on their reference; most peers will refuse those by name
        found.refused["the network in torch's own operations"] = reason(error)
    for name, build in builders.items():
        start = time.perf_counter()
        try:
            with use_backend("reference"):
                candidate = build(network, inputs)
                results = as_outputs(candidate())
        except Exception as error:  # each engine fails in its own way, and that is the result
            found.refused[name] = reason(error)
            continue
        seconds = time.perf_counter() - start
        error = difference(results, as_outputs(expected))
        if error <= tolerance:
            found.candidates[name], found.seconds[name] = partial(_on_reference, candidate), seconds
        else:
            found.refused[name] = f"not timed, its result differs by {error:.2g} (relative RMS)"
    return found


def _on_reference(candidate: Candidate) -> Any:
    """No op of ours that a peer may have kept runs on a kernel of ours."""
    with use_backend("reference"):
        return candidate()


def difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative RMS difference of any output; infinite where their number or shapes differ, or for NaN."""
    if [tuple(r.shape) for r in results] != [tuple(e.shape) for e in expected]:
        return float("inf")
    worst = 0.0
    for result, other in zip(results, expected, strict=True):
        a, b = result.detach().double(), other.detach().double()
        error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
        worst = max(worst, error if error == error else float("inf"))
    return worst


# ---- one network for all --------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """An exported program as a module that can be traced, exported and compiled again."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.exported = program
        self.program = program.module()
        self.training = False

    def train(self, mode: bool = True) -> Plain:
        """Exported modules have one mode and refuse to be asked."""
        if mode:
            raise ValueError("an exported network has no training mode")
        return self

    def forward(self, *inputs: Tensor) -> Any:
        return self.program(*inputs)


@torch.no_grad()
def in_torch_ops(network: nn.Module, inputs: Inputs, ported: Mapping[str, Callable[..., Any]]) -> nn.Module:
    """`network` without ops of ours, which no peer knows: each is replaced as public networks write it.

    Args:
        network: returned as it is where it calls no op of ours.
        inputs: of the shapes to export for.
        ported: by op name, the public way; called with the op's arguments by name.

    Raises: `NotImplementedError` for an op without one.
    """
    program = torch.export.export(network, inputs)
    ours = {node.target for node in program.graph.nodes if getattr(node.target, "namespace", "") == "inpaintrt"}
    if not ours:
        return network

    def replaced(op: Any) -> Callable[..., Any]:
        name = op._schema.name.split("::")[1]
        if name not in ported:
            raise NotImplementedError(f"the network calls {name}, for which no form in torch's own operations is known")

        def call(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip((a.name for a in op._schema.arguments), args, strict=False))
            defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
            return ported[name](**defaults | given | kwargs)

        return call

    return Plain(program.run_decompositions({op: replaced(op) for op in ours}))


# ---- the peers ------------------------------------------------------------------------------------------------------


def channels_last(network: nn.Module, inputs: Inputs) -> Candidate:
    """Eager, all in channels_last: what torch's tuning guide advises for convolutions on CPUs."""
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = [t.contiguous(memory_format=torch.channels_last) for t in inputs]
    return lambda: last(*given)


def torchscript(network: nn.Module, inputs: Inputs) -> Candidate:
    """Traced, frozen, optimised for inference (batch norms folded, convolutions in oneDNN's own layouts), warmed up."""
    traced = torch.jit.trace(network, inputs, check_trace=False)
    fast = torch.jit.optimize_for_inference(torch.jit.freeze(traced.eval()))
    for _ in range(WARM_UP):
        fast(*inputs)
    return lambda: fast(*inputs)


def onnxruntime(network: nn.Module, inputs: Inputs) -> Candidate:
    """Exported by torch, all graph optimisations, tensors bound to our memory; threads stop spinning when a call ends."""
    ort = _package("onnxruntime")
    _package("onnx")
    _package("onnxscript")
    with contextlib.redirect_stdout(None):
        program = torch.onnx.export(network, inputs, dynamo=True, opset_version=ONNX_OPSET, verbose=False)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL  # one operator at a time, on all threads
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    model = program.model_proto.SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    outputs = [torch.empty(node.shape) for node in session.get_outputs()]
    float32 = _package("numpy").float32
    for node, tensor in zip(session.get_inputs(), inputs, strict=True):
        binding.bind_input(node.name, "cpu", 0, float32, tuple(tensor.shape), tensor.data_ptr())
    for node, tensor in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(node.name, "cpu", 0, float32, tuple(tensor.shape), tensor.data_ptr())

    def run(inputs: Inputs = inputs) -> list[Tensor]:  # holds the bound memory
        session.run_with_iobinding(binding)
        return outputs

    return run


def openvino(network: nn.Module, inputs: Inputs, precision: str = "f32") -> Candidate:
    """Converted with fixed shapes, compiled for latency; its tensors share our memory.

    What was exported already is converted from that, other networks from a trace: either way has networks it cannot do.

    precision: "f32" or "bf16". Raises: `RuntimeError` where it runs with other threads or another precision than asked.
    """
    ov = _package("openvino")
    threads = torch.get_num_threads()
    if isinstance(network, Plain):
        model = ov.convert_model(network.exported)
    else:
        traced = torch.jit.trace(network, inputs, check_trace=False)
        model = ov.convert_model(traced, example_input=inputs, input=[tuple(t.shape) for t in inputs])
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = ov.Core().compile_model(model, "CPU", options)
    used = (compiled.get_property("INFERENCE_NUM_THREADS"), compiled.get_property("INFERENCE_PRECISION_HINT"))
    if used != (threads, getattr(ov.Type, precision)):
        raise RuntimeError(f"asked for {threads} threads and {precision}, it uses {used[0]} and {used[1]}")
    request = compiled.create_infer_request()
    for i, tensor in enumerate(inputs):
        request.set_input_tensor(i, ov.Tensor(tensor.numpy(), shared_memory=True))
    count = len(compiled.outputs)

    def run(inputs: Inputs = inputs) -> list[Tensor]:  # holds the shared memory
        request.infer()
        return [torch.from_numpy(request.get_output_tensor(i).data) for i in range(count)]

    return run


PEERS: dict[str, Builder] = {
    "channels-last": channels_last,
    "torchscript": torchscript,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
"""In float32, on a CPU."""

PEERS_BF16: dict[str, Builder] = {"openvino bf16": partial(openvino, precision="bf16")}


# ---- parts ----------------------------------------------------------------------------------------------------------


def reason(error: Exception) -> str:
    """Why a peer does not run: the first line of its error that says what is wrong, without folders and colours."""
    if isinstance(error, MissingPackage):
        return str(error)
    text = re.sub(r"\x1b\[\d*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not re.match(r"Check '|FrontEnd API|Exception|Model wasn't fully", line)]
    line = re.sub(r"(?:/[^/:\s'\"]+)+/", "", (telling or lines or ["no message"])[0])
    return f"cannot run, {type(error).__name__}: {line[:200]}"


class MissingPackage(Exception):
    """A peer's package is not installed."""


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingPackage(f"not run, no package {name} (pip install 'inpaintrt[peers]')") from None

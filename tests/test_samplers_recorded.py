"""Calls that are recorded once and replayed. A GPU's graphs are tests/gpu's; here a trace of the same step is replayed."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import inpaintrt as irt
from inpaintrt import models, samplers
from inpaintrt.runtime.errors import InpaintRTError
from inpaintrt.samplers import Schedule, loop
from inpaintrt.samplers.recorded import Recorded
from inpaintrt.testing import recipe

IMAGE = recipe.image("recorded", 2, 3, 8, 8)
HOLE = torch.zeros(1, 1, 8, 8)
HOLE[..., 2:5, 1:6] = 1
HOLE[..., 6, :] = 0.5
WALK = Schedule.repaint(8, jump_length=3, resampling=2)
RUNS = {
    "repaint": (samplers.repaint, {"schedule": WALK, "seeds": [3, 4]}, {"step": len(WALK.calls)}),
    "ddnm": (samplers.ddnm, {"schedule": WALK, "seeds": [3, 4]}, {"down": 12, "travel": 2}),
    "sdedit": (samplers.sdedit, {"start": 5, "passes": 3, "seeds": [3, 4]}, {"step": 13, None: 2}),
}


def unet(**options):
    made = models.create("guided_unet", model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                         attention_resolutions=(2,), **options)  # fmt: skip
    return recipe.fill(made.eval()).requires_grad_(False)


class Traced:
    """`Recorded` where there is no GPU: a trace holds what a graph would, operations on tensors in their places."""

    def __init__(self, step, chain):
        self.step, self.chain, self.steps, self.calls = step, chain, {}, {}

    def __call__(self, call, kind):
        self.calls[kind] = self.calls.get(kind, 0) + 1
        if kind is None:
            self.step(call, None)
        elif kind not in self.steps:
            self.steps[kind] = None
            self.step(torch.tensor(call), kind)
        else:
            if self.steps[kind] is None:
                self.steps[kind] = self.trace(kind)
            self.steps[kind](torch.tensor(call))

    def trace(self, kind):
        before = {name: tensor.clone() for name, tensor in vars(self.chain).items() if isinstance(tensor, torch.Tensor)}

        def run(at):
            self.step(at, kind)

        made = make_fx(run, _error_on_data_dependent_ops=True)(torch.tensor(0))
        for name, tensor in before.items():  # tracing ran it; recording a graph does not
            getattr(self.chain, name).copy_(tensor)
        return made


@pytest.fixture
def traced(monkeypatch):
    made, chains, begin = [], [], loop._begin
    monkeypatch.setattr(loop, "_begin", lambda chain, *args: chains.append(chain) or begin(chain, *args))
    monkeypatch.setattr(loop, "Recorded", lambda step, device: made.append(Traced(step, chains[-1])) or made[-1])
    monkeypatch.setattr(loop, "recordable", lambda inputs: None)
    return made


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_recorded_calls_give_the_same_image(name, accelerated, traced):
    sampler, options, kinds = RUNS[name]
    model = unet()
    if accelerated:
        irt.accelerate(model)
    expected = sampler(model, IMAGE, HOLE, **options)
    got = sampler(model, IMAGE, HOLE, cuda_graph=True, **options)
    assert torch.equal(got, expected)
    assert traced[0].calls == kinds


def test_labels_and_guidance_are_recorded(traced):
    model, weights = irt.accelerate(unet(num_classes=4)), recipe.image("classifier", 4, 3 * 64) - 0.5
    guidance = samplers.classifier_guidance(lambda x, t: x.flatten(1) @ weights.mT + t[:, None] / 1000, scale=2.0)
    options = {"schedule": WALK, "seeds": [3, 4], "labels": [1, 2], "guidance": guidance}
    expected = samplers.repaint(model, IMAGE, HOLE, **options)
    assert torch.equal(samplers.repaint(model, IMAGE, HOLE, cuda_graph=True, **options), expected)
    options["labels"] = [1, 3]
    assert not torch.equal(samplers.repaint(model, IMAGE, HOLE, **options), expected)


def test_views_of_the_samples_are_recorded(traced):
    def run(model, **more):
        return samplers.repaint(model, IMAGE, HOLE, schedule=WALK, seeds=[3, 4], variance="fixed_small", **more)

    expected = run(lambda x, t: x.transpose(2, 3).clone())
    assert torch.equal(run(lambda x, t: x.transpose(2, 3), cuda_graph=True), expected)


def test_a_recorded_run_is_cancelled_and_resumed(tmp_path, traced):
    options = {"schedule": WALK, "seeds": [3, 4], "checkpoint": samplers.Checkpoint(tmp_path / "run.safetensors")}
    model = unet()
    expected = samplers.repaint(model, IMAGE, HOLE, schedule=WALK, seeds=[3, 4])
    stop = iter([False] * 5 + [True])
    with pytest.raises(samplers.Cancelled):
        samplers.repaint(model, IMAGE, HOLE, cuda_graph=True, cancel=lambda: next(stop), **options)
    assert torch.equal(samplers.repaint(model, IMAGE, HOLE, cuda_graph=True, **options), expected)
    assert [sum(t.calls.values()) for t in traced] == [5, len(WALK.calls) - 5]


# ---- streams and graphs, without a GPU ------------------------------------------------------------------------------


class Stream:
    def __init__(self, device=None):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class Cuda:
    """As much of `torch.cuda` as `Recorded` uses; ending a recording that failed raises and restores nothing, as torch's."""

    def __init__(self, monkeypatch):
        self.caller = self.current = Stream()
        self.recordings, self.replays = [], []
        cuda = self

        class Graph:
            def replay(self):
                cuda.replays.append(self)

        class Entered:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, cuda.current = cuda.current, self.stream

            def __exit__(self, *_):
                cuda.current = self.before

        class Recording(Entered):
            def __init__(self, graph, stream=None, **options):
                super().__init__(stream)
                cuda.recordings.append(options)

            def __exit__(self, kind, *_):
                if kind is not None and issubclass(kind, RuntimeError):
                    raise RuntimeError("operation failed due to a previous error during capture")
                super().__exit__()

        names = {
            "Stream": Stream, "CUDAGraph": Graph, "stream": Entered, "graph": Recording, "device": contextlib.nullcontext,
            "current_stream": lambda: self.current, "graph_pool_handle": object,
        }  # fmt: skip
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_first_calls_and_recordings_share_a_stream_and_a_pool(cuda):
    ran = []

    def step(call, kind):
        ran.append((kind, int(call), cuda.current))

    recorded = Recorded(step, torch.device("cpu"))
    for call, kind in enumerate(["a", "b", "a", "b", None, "a", "b"]):
        recorded(call, kind)
    assert [(kind, call) for kind, call, _ in ran] == [("a", 0), ("b", 1), ("a", 2), ("b", 3), (None, 4)]
    (side,) = {stream for kind, _, stream in ran if kind}
    assert ran[-1][2] is cuda.current is cuda.caller is not side
    assert side.waited_for == [cuda.caller] * 2
    assert cuda.caller.waited_for == [side] * 2
    assert len({options["pool"] for options in cuda.recordings}) == 1
    assert {options["capture_error_mode"] for options in cuda.recordings} == {"thread_local"}
    assert cuda.replays == [recorded._graphs[kind] for kind in "abab"]


def test_a_model_that_cannot_be_recorded(cuda):
    def step(call, kind):
        if cuda.recordings:
            raise RuntimeError("operation not permitted when stream is capturing")

    recorded = Recorded(step, torch.device("cpu"))
    recorded(0, "step")
    with pytest.raises(InpaintRTError, match=r"cannot be recorded as a CUDA graph: .* or cuda_graph=False") as caught:
        recorded(1, "step")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert cuda.current is cuda.caller


def test_after_a_first_call_that_fails_the_caller_waits_for_it(cuda):
    def step(call, kind):
        raise ValueError("the model returned something else")

    recorded = Recorded(step, torch.device("cpu"))
    with pytest.raises(ValueError, match="something else"):
        recorded(0, "step")
    assert cuda.current is cuda.caller
    assert len(cuda.caller.waited_for) == 1
    assert not recorded._graphs


@pytest.mark.parametrize("name", RUNS)
def test_refused(name):
    sampler, options, _ = RUNS[name]
    with pytest.raises(ValueError, match="cuda_graph is True and image is on cpu; accepted: an image on a CUDA device"):
        sampler(unet(), IMAGE, HOLE, cuda_graph=True, **options)

"""What every sampler's loop offers: progress, cancelling, and checkpoints that lead to the same result bit for bit."""

from __future__ import annotations

import functools
import itertools
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inpaintrt import samplers
from inpaintrt.runtime.errors import InpaintRTError
from inpaintrt.samplers import Cancelled, Checkpoint, CheckpointError, Schedule, Tables, loop
from inpaintrt.samplers.checkpoint import digest, digest_of_model
from inpaintrt.testing import recipe

SCHEDULE = Schedule.repaint(12, jump_length=4, resampling=2)
CALLS = 20


class Model(nn.Module):
    """Fails, or does something else, before its call number `at`."""

    def __init__(self, at=None, action=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.at, self.action, self.count = at, action, itertools.count()
        self.eval()

    def forward(self, x, t, y=None):
        if next(self.count) == self.at:
            self.action()
        return torch.cat([(self.weight * x).tanh() + t[0] / 5000, x.sin()], 1)


class Killed(Exception):
    pass


def kill():
    raise Killed


def problem():
    image = recipe.image("runs", 2, 3, 6, 8)
    mask = torch.zeros(2, 1, 6, 8)
    mask[..., 2:5, 3:7] = 1
    return image, mask


RUNS = {
    "repaint": {"schedule": SCHEDULE},
    "ddnm": {"schedule": SCHEDULE},
    "sdedit": {"start": 10, "passes": 2},
}


def sample(name="repaint", model=None, **changed):
    image, mask = problem()
    arguments = {"image": image, "mask": mask, "seeds": [3, 4], **RUNS[name]} | changed
    return getattr(samplers, name)(model or Model(), **arguments)


# ---- progress and cancelling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_progress_counts_and_estimates(name):
    told = []

    def progress(p):
        time.sleep(0.002)
        told.append(p)

    sample(name, progress=progress)
    assert [p.done for p in told] == list(range(1, CALLS + 1))
    assert {p.calls for p in told} == {CALLS}
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(told))
    assert all(p.seconds_left == pytest.approx(p.seconds / p.done * (CALLS - p.done)) for p in told)
    assert told[-1].seconds_left == 0 < told[0].seconds_left


@pytest.mark.parametrize("name", RUNS)
def test_cancelling_ends_between_two_calls(name):
    answers = itertools.count()
    model = Model()
    with pytest.raises(Cancelled, match="cancelled after 5 of 20 calls") as caught:
        sample(name, model, cancel=lambda: next(answers) == 5)
    assert (caught.value.done, caught.value.calls, next(model.count)) == (5, 20, 5)
    assert isinstance(caught.value, InpaintRTError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


class Event:
    finished = False

    def query(self):
        return self.finished


def test_calls_that_wait_on_a_gpu_are_not_done(monkeypatch):
    """What a GPU was given and has not finished yet is time that is left, and nothing waits for it."""
    events, told = [], []

    class Stream:
        def record_event(self):
            events.append(Event())
            return events[-1]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(loop, "_counter", lambda device, counter=loop._counter: counter(torch.device("cuda")))

    def progress(p):
        told.append(p)
        if len(events) in (4, 8):  # the first three are finished, then five
            for event in events[: len(events) // 2 + 1]:
                event.finished = True

    sample(progress=progress)
    assert [p.done for p in told] == [0] * 4 + [3] * 4 + [5] * 12 + [CALLS]
    assert told[0].seconds_left == math.inf
    assert told[6].seconds_left == pytest.approx(told[6].seconds / 3 * (CALLS - 3))
    assert told[-1].seconds_left == 0


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("at", [1, 9, 10, 19])
def test_a_run_that_was_killed_goes_on_bit_for_bit(name, at, tmp_path):
    """Also at the border of two passes, call 10 of SDEdit."""
    whole = sample(name)
    checkpoint = Checkpoint(tmp_path / "run.safetensors", seconds=0)
    with pytest.raises(Killed):
        sample(name, Model(at, kill), checkpoint=checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    model, told = Model(), []
    resumed = sample(name, model, checkpoint=checkpoint, progress=told.append)
    assert torch.equal(resumed, whole)
    assert (next(model.count), told[0].done) == (CALLS - at, at + 1)
    assert told[0].seconds_left == pytest.approx(told[0].seconds * (CALLS - at - 1)), "the rate is of this run's calls"
    assert not list(tmp_path.iterdir()), "nothing is left when the result is there"


@pytest.mark.parametrize(("at", "seconds"), [(0, 0), (0, 60), (5, 60)])
def test_a_run_that_fails_before_there_is_work_to_keep_leaves_no_file(at, seconds, tmp_path):
    """It would refuse the corrected call, being another run's."""
    checkpoint = Checkpoint(tmp_path / "run", seconds)
    with pytest.raises(Killed):
        sample(model=Model(at, kill), checkpoint=checkpoint)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="the model returned"):
        sample(model=lambda x, t: x, checkpoint=checkpoint)
    assert torch.equal(sample(checkpoint=checkpoint), sample())
    with pytest.raises(Cancelled):
        sample(cancel=lambda: True, checkpoint=checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_cancelled_run_goes_on(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run", seconds=1e9)
    answers = itertools.count()
    with pytest.raises(Cancelled):
        sample(cancel=lambda: next(answers) == 9, checkpoint=checkpoint)
    model = Model()
    assert torch.equal(sample(model=model, checkpoint=checkpoint), sample())
    assert next(model.count) == CALLS - 9


def test_a_checkpoint_is_written_once_in_its_time(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Checkpoint, "write", lambda self, done, *_: written.append(done))
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)  # each look at the clock is a second later
    sample(checkpoint=Checkpoint(tmp_path / "run", seconds=5))
    assert written == [0, 5, 10, 15]


PROGRAM = """
    import sys, time, torch
    from inpaintrt.samplers import Checkpoint
    sys.path.insert(0, {tests!r})
    from test_samplers_runs import Model, sample

    def progress(p):
        print(p.done, flush=True)
        time.sleep(0.05)

    sample(progress=progress, checkpoint=Checkpoint({path!r}, seconds=0))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_process_that_was_killed_goes_on(tmp_path):
    path = tmp_path / "run.safetensors"
    program = textwrap.dedent(PROGRAM.format(tests=os.path.dirname(__file__), path=str(path)))
    with subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 6:
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    model = Model()
    assert torch.equal(sample(model=model, checkpoint=Checkpoint(path)), sample())
    assert CALLS - 7 <= next(model.count) <= CALLS - 6


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seeds": [3, 5]}, "seeds"),
        ({"schedule": Schedule.plain(20)}, "schedule or tables"),
        ({"schedule": Schedule.repaint(12, jump_length=3, resampling=2)}, "schedule or tables"),
        ({"clip": 0.9}, "options"),
        ({"variance": "learned"}, "options"),
        ({"labels": 3}, "labels and model_kwargs"),
        ({"guidance": lambda x, t: 0 * x}, "guidance"),
        ({"image": recipe.image("another", 2, 3, 6, 8)}, "image"),
        ({"mask": problem()[1].roll(1, -1)}, "image, mask"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changed, named, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Killed):
        sample(model=Model(4, kill), checkpoint=Checkpoint(path, 0))
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"checkpoint of another run, with other {named}; remove it"):
        sample(checkpoint=Checkpoint(path), **changed)
    assert path.read_bytes() == content


TABLES = Tables.linear().respaced("ddim12")


@pytest.mark.parametrize(
    ("name", "first", "second", "named"),
    [
        ("sdedit", {"passes": 2}, {"passes": 3}, "start, passes or tables"),
        ("sdedit", {"passes": 2, "start": 5}, {"passes": 1, "start": 10}, "start, passes or tables"),
        *(
            (name, {"tables": TABLES}, {"tables": Tables(TABLES.betas, TABLES.timesteps + 1)}, "schedule or tables")
            for name in ("repaint", "ddnm")
        ),
        ("sdedit", {"tables": Tables.linear()}, {"tables": Tables.linear().rescaled(900)}, "start, passes or tables"),
    ],
)
def test_what_the_model_is_told_and_how_often_is_part_of_a_run(name, first, second, named, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Killed):
        sample(name, Model(4, kill), checkpoint=Checkpoint(path, 0), **first)
    with pytest.raises(CheckpointError, match=f"with other {named};"):
        sample(name, checkpoint=Checkpoint(path), **second)


class Classifier(nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.eval()

    def forward(self, x, t):
        return self.weight * torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)


def test_another_guidance_is_another_run(tmp_path):
    path = tmp_path / "run"

    def guided(classifier, scale, model=None):
        return sample(model=model, labels=0, guidance=samplers.classifier_guidance(classifier, scale),
                      checkpoint=Checkpoint(path, 0))  # fmt: skip

    with pytest.raises(Killed):
        guided(Classifier(), 3.0, Model(4, kill))
    for other in ((Classifier(), 2.0), (Classifier(0.5), 3.0), (lambda x, t: Classifier()(x, t), 3.0)):
        with pytest.raises(CheckpointError, match="with other guidance;"):
            guided(*other)
    guided(Classifier(), 3.0)
    assert not path.exists()


def test_other_weights_are_another_run(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Killed):
        sample(model=Model(4, kill), checkpoint=Checkpoint(path, 0))
    model = Model()
    nn.init.constant_(model.weight, 0.71)
    with pytest.raises(CheckpointError, match="with other weights;"):
        sample(model=model, checkpoint=Checkpoint(path))
    with pytest.raises(CheckpointError, match="sampler"):
        sample("sdedit", checkpoint=Checkpoint(path))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_no_checkpoint_stays(content, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    model = Model()
    with pytest.raises(CheckpointError, match="no checkpoint of a sampler"):
        sample(model=model, checkpoint=Checkpoint(path, 0))
    assert path.read_bytes() == content
    assert next(model.count) == 0


def test_a_damaged_checkpoint(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Killed):
        sample(model=Model(4, kill), checkpoint=Checkpoint(path, 0))
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        sample(checkpoint=Checkpoint(path))
    path.write_bytes(content)
    save_file({"x": load_file(path)["x"][:1]}, path, metadata_of(path))
    with pytest.raises(CheckpointError, match="the checkpoint is damaged; remove it"):
        sample(checkpoint=Checkpoint(path))


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_place_that_cannot_be_written_to_is_found_before_the_first_call(tmp_path):
    model = Model()
    with pytest.raises(
        CheckpointError, match=r"missing/run: the checkpoint cannot be written: No such file or directory"
    ):
        sample(model=model, checkpoint=Checkpoint(tmp_path / "missing" / "run"))
    with pytest.raises(CheckpointError, match="no checkpoint of a sampler"):
        sample(model=model, checkpoint=Checkpoint(tmp_path))
    assert next(model.count) == 0
    assert not list(tmp_path.iterdir())


def test_writing_that_fails_leaves_the_state_before_and_no_parts(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with pytest.raises(Killed):
        sample(model=Model(4, kill), checkpoint=Checkpoint(path, 0))
    content = path.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
            sample(checkpoint=Checkpoint(path, 0))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert path.read_bytes() == content
    assert torch.equal(sample(checkpoint=Checkpoint(path)), sample())


def test_checkpoints_need_seeds(tmp_path):
    image, _ = problem()
    noises = torch.zeros(samplers.draws(SCHEDULE), *image.shape)
    with pytest.raises(ValueError, match="checkpoint and noises are both given"):
        sample(seeds=None, noises=noises, checkpoint=Checkpoint(tmp_path / "run"))


def test_nan_is_never_kept(tmp_path):
    """What a checkpoint holds is finite, and the error tells between which calls that ended."""
    path = tmp_path / "run"
    model = Model()

    def spoil():
        model.weight.data.fill_(torch.nan)

    model.at, model.action = 6, spoil
    with pytest.raises(InpaintRTError, match=r"after call 7 of 20 .* in one of the calls 6 to 6, counted from 0"):
        sample(model=model, checkpoint=Checkpoint(path, 0))
    assert load_file(path)["x"].isfinite().all()
    assert metadata_of(path)["done"] == "6"


# ---- digests --------------------------------------------------------------------------------------------------------


def test_digests_tell_values_shapes_and_dtypes_apart():
    values = [
        torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.ones(4), torch.zeros(()), "0", 0,
        {"a": torch.zeros(4)}, {"b": torch.zeros(4)},
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest("a", "b") != digest("ab")
    x = torch.arange(6.0).view(2, 3)
    assert digest(x) == digest(x.T.contiguous().T)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_digests_of_models():
    a, b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
    assert digest_of_model(a) != digest_of_model(b)
    b.load_state_dict(a.state_dict())
    assert digest_of_model(a) == digest_of_model(b)
    assert digest_of_model(a.to(memory_format=torch.channels_last)) == digest_of_model(b)
    assert digest_of_model(nn.Identity()) == digest_of_model(nn.Identity())
    assert digest_of_model(kill) != digest_of_model(problem)


class Wrapper:
    def __init__(self, network):
        self.network, self.calls, self.seen = network, 0, []

    def __call__(self, x, t):
        self.calls += 1
        self.seen.append(x)
        return self.network(x)


NETWORK = nn.Linear(2, 2)


def scaled(factor, weight=None, *, bias=0.0):
    def model(x, t, more=bias):
        return factor * x + (0 if weight is None else weight) + more

    return model


def test_digests_of_functions_and_objects():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    different = [
        scaled(1.0), scaled(2.0), scaled(1.0, torch.ones(1)), scaled(1.0, torch.zeros(1)), scaled(1.0, bias=1.0), scaled(a),
        scaled(b), scaled((1.0, 2.0)), scaled(scaled(3.0)), scaled(scaled(4.0)), Wrapper(a), Wrapper(b), lambda x, t: 0.5 * x,
        lambda x, t: 0.6 * x, lambda x, t: a(x), lambda x, t: b(x), functools.partial(scaled, 1.0),
        functools.partial(scaled, 2.0), a.forward, b.forward, Wrapper(b).__call__, scaled, None,
        samplers.classifier_guidance(a, 1.0), samplers.classifier_guidance(a, 2.0), samplers.classifier_guidance(b, 1.0),
    ]  # fmt: skip
    assert len({digest_of_model(model) for model in different}) == len(different)
    for make in (lambda: scaled(1.0, torch.ones(1)), lambda: Wrapper(a), lambda: functools.partial(scaled, 1.0)):
        assert digest_of_model(make()) == digest_of_model(make())
    calls, model = [], Wrapper(a)

    def noting(x, t):
        calls.append(t)
        return noting if x is None else NETWORK(x)

    before = digest_of_model(model), digest_of_model(noting)
    model(torch.ones(2), 0)
    noting(torch.ones(2), 0)
    assert (digest_of_model(model), digest_of_model(noting)) == before, "what is noted is not what is computed"
    with torch.no_grad():
        NETWORK.weight.add_(1)
        a.weight.add_(1)
    assert digest_of_model(model) != before[0]
    assert digest_of_model(noting) != before[1]


def test_digests_of_functions_are_those_of_other_processes():
    program = "import sys; sys.path.insert(0, {!r}); import test_samplers_runs as t; print(t.digest_of_model(t.scaled(t.sample)))"
    command = [sys.executable, "-P", "-c", program.format(os.path.dirname(__file__))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == digest_of_model(
        scaled(sample)
    )

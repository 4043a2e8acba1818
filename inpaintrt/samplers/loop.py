"""The loop around a model: calls, progress, cancelling, checkpoints. What happens between two calls is a `Chain`'s business.

Nothing in the loop waits for the device: timesteps and coefficients lie there before it begins, and the sample is looked
at only where it is written to disk, and at the end. So a call can be recorded and replayed, too (`recorded.Recorded`).
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaintrt.runtime.errors import Cancelled, CheckpointError, InpaintRTError
from inpaintrt.runtime.swap import step_tables

from .checkpoint import Checkpoint, digest, digest_of_model
from .guidance import Guidance
from .inputs import Inputs, check_labels
from .recorded import Recorded, recordable

Call = int | Tensor
"""Which call of the model, counted from 0: a number, or an int64 tensor () on the samples' device, which is not read."""


def entry(table: Tensor, call: Call) -> Tensor:
    """What a table (calls, …) holds for one call, (…)."""
    return table[call] if isinstance(call, int) else table.index_select(0, call.reshape(1))[0]


class Progress(NamedTuple):
    """How far a run is."""

    done: int
    """Calls that are finished. On a GPU not all that were handed to it."""
    calls: int
    seconds: float
    """Since this run began or was continued."""
    seconds_left: float
    """At the speed so far; infinite while no call is finished."""


class Chain(ABC):
    """A sampling chain: samples `x`, and what becomes of them with each output of a model.

    Args:
        timesteps: (calls,), what the model is told at each call: int64, or float32 for fractions.
        channels: of the model's output that are accepted, and `hint`, how to have others accepted.
    """

    name: str

    def __init__(self, inputs: Inputs, timesteps: Tensor, channels: tuple[int, ...], hint: str = "") -> None:
        self.inputs = inputs
        self.device = inputs.image.device
        # A row for each call, so that the model gets a contiguous tensor without a copy.
        self.timesteps = timesteps.to(self.device)[:, None].repeat(1, inputs.shape[0])
        self.accepted = tuple((inputs.shape[0], n, *inputs.shape[2:]) for n in channels)
        self.hint = hint

    x: Tensor
    """(n, C, H, W), float32: what the model is given next; after the last call the result, in [−1, 1]. It keeps its place in
    memory from `begin` or `restore` on."""

    @property
    def calls(self) -> int:
        return self.timesteps.shape[0]

    @abstractmethod
    def begin(self) -> None:
        """Set the samples before the first call."""

    @abstractmethod
    def kind(self, call: int) -> str | None:
        """Calls of one kind do the same but for what they read at their place in tables; None: not even that."""

    @abstractmethod
    def advance(self, call: Call, kind: str | None, output: Tensor, gradient: Tensor | None) -> None:
        """Take the model's output for `x`, of one of the `accepted` shapes, and write the next samples to `x`.

        `kind` is the call's. Where there is one, `call` may be a tensor, and whatever is kept until another call is written
        in place.
        """

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What tells this chain from others, besides its inputs: digests by name, one of them of timesteps too."""

    def state(self) -> dict[str, Tensor]:
        """What has to be kept between two calls."""
        return {"x": self.x}

    def restore(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Go on after `done` calls from a `state`."""
        self.x = state["x"].to(self.device)


def run(
    chain: Chain,
    model: Callable[..., Tensor],
    *,
    guidance: Guidance | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """A chain's result.

    Raises:
        ValueError: the model's output has another shape, or it lacks a class that is asked for; a checkpoint or graphs are asked
            for where the noises are given, or graphs on another device than a GPU.
        InpaintRTError: the model returned NaN or Inf, or its call cannot be recorded. `Cancelled` and `CheckpointError` are
            kinds of it.
    """
    check_labels(model, chain.inputs)
    arguments = chain.inputs.arguments
    identity = _identity(chain, model, guidance) if checkpoint else {}
    if cuda_graph:
        recordable(chain.inputs)

    def step(call: Call, kind: str | None) -> None:
        output = model(chain.x, told(call), **arguments)
        _check_output(output, chain)
        gradient = None
        if guidance is not None:
            gradient = _apart(guidance(chain.x, entry(chain.timesteps, call), **arguments), chain.x)
        chain.advance(call, kind, _apart(output, chain.x), gradient)

    with torch.no_grad():
        told = _told(model, chain)
        first = _begin(chain, checkpoint, identity)
        take = Recorded(step, chain.device) if cuda_graph else step
        started = saved = time.monotonic()
        finite = first  # calls after which the samples were looked at, and were finite
        finished, reported = _counter(chain.device), first
        try:
            for call in range(first, chain.calls):
                if cancel is not None and cancel():
                    if checkpoint and call > finite:
                        _check_finite(chain, call, finite)
                        checkpoint.write(call, identity, chain.state())
                    raise Cancelled(call, chain.calls)
                take(call, chain.kind(call))
                now, made = time.monotonic(), call + 1
                if checkpoint and now - saved >= checkpoint.seconds and made < chain.calls:
                    _check_finite(chain, made, finite)
                    checkpoint.write(made, identity, chain.state())
                    saved, finite = now, made
                if progress is not None:
                    reported = finished(made)
                    progress(_progress(first, reported, chain.calls, now - started))
            _check_finite(chain, chain.calls, finite)
        except BaseException as error:
            if checkpoint and not finite and not isinstance(error, Cancelled):
                checkpoint.remove()  # it holds no work, and would stand in the way of a corrected call
            raise
        if progress is not None and reported < chain.calls:
            progress(_progress(first, chain.calls, chain.calls, time.monotonic() - started))
    if checkpoint:
        checkpoint.remove()
    return chain.x


def _progress(first: int, done: int, calls: int, spent: float) -> Progress:
    left = spent / (done - first) * (calls - done) if done > first else math.inf
    return Progress(done, calls, spent, left)


def _counter(device: torch.device) -> Callable[[int], int]:
    """Asked after each call, with how many were handed to the device: how many it has finished. It is not waited for."""
    if device.type != "cuda":
        return lambda made: made
    pending: deque[torch.cuda.Event] = deque()

    def finished(made: int) -> int:
        pending.append(torch.cuda.current_stream(device).record_event())
        while pending and pending[0].query():
            pending.popleft()
        return made - len(pending)

    return finished


def _apart(made: Tensor, x: Tensor) -> Tensor:
    """What was made of x, copied where it is a view of x: the next samples are written there."""
    shared = made.untyped_storage()._cdata == x.untyped_storage()._cdata
    return made.clone() if shared else made


def _told(model: object, chain: Chain) -> Callable[[Call], Tensor]:
    """What the model is told at a call: timesteps, with their embeddings where it was accelerated to read those."""
    table_of = step_tables(model)
    if table_of is None:
        return lambda call: entry(chain.timesteps, call)
    steps, index = chain.timesteps[:, 0].unique(return_inverse=True)
    table = table_of(steps, chain.inputs.arguments.get("y"), chain.inputs.shape[0])
    rows = [table[i] for i in range(len(table))]
    places = index.tolist()
    return lambda call: rows[places[call]] if isinstance(call, int) else table[entry(index, call)]


def _begin(chain: Chain, checkpoint: Checkpoint | None, identity: Mapping[str, str]) -> int:
    """Calls already made. The first state is written at once, so that a place that cannot be written to is found now."""
    chain.begin()
    if checkpoint is None:
        return 0
    if found := checkpoint.read(identity):
        done, state = found
        wanted = {name: t.shape for name, t in chain.state().items()}
        if {name: t.shape for name, t in state.items()} != wanted or done > chain.calls:
            raise CheckpointError(f"{checkpoint.path}: the checkpoint is damaged; remove it to start anew")
        chain.restore(done, state)
        return done
    checkpoint.write(0, identity, chain.state())
    return 0


def _identity(chain: Chain, model: Any, guidance: Guidance | None) -> dict[str, str]:
    inputs = chain.inputs
    if inputs.seeds is None:
        raise ValueError("checkpoint and noises are both given; accepted: a checkpoint with seeds")
    return {
        "sampler": chain.name,
        "image": digest(inputs.known),
        "mask": digest(inputs.hole),
        "seeds": digest(inputs.seeds),
        "labels and model_kwargs": digest(inputs.arguments),
        "weights": digest_of_model(model),
        "guidance": digest_of_model(guidance),
        **chain.identity(),
    }


def _check_output(output: object, chain: Chain) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(f"the model returned {type(output).__name__}; accepted: a tensor")
    if tuple(output.shape) not in chain.accepted:
        accepted = " or ".join(map(str, chain.accepted))
        raise ValueError(f"the model returned {tuple(output.shape)}; accepted: {accepted}{chain.hint}")


def _check_finite(chain: Chain, done: int, finite: int) -> None:
    """That no sample holds NaN or Inf: waits for the device."""
    wrong = [~torch.isfinite(t).flatten(1) for t in chain.state().values()]
    counts = sum(w.sum(1) for w in wrong).tolist()  # type: ignore[union-attr]
    if not any(counts):
        return
    sample = next(i for i, count in enumerate(counts) if count)
    raise InpaintRTError(
        f"after call {done} of {chain.calls} of the model sample {sample} holds {counts[sample]} values that are NaN or Inf; "
        f"the model (or guidance) returned some in one of the calls {finite} to {done - 1}, counted from 0"
    )

"""The loop around a model: calls, progress, cancelling, checkpoints. What happens between two calls is a `Chain`'s business.

Nothing in the loop waits for the device: timesteps and coefficients lie there before it begins, and the sample is looked
at only where it is written to disk, and at the end.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inpaintrt.runtime.errors import Cancelled, CheckpointError, InpaintRTError
from inpaintrt.runtime.swap import step_tables

from .checkpoint import Checkpoint, digest, digest_of_model
from .guidance import Guidance
from .inputs import Inputs


class Progress(NamedTuple):
    """How far a run is. On a GPU, of the work that was handed to it."""

    done: int
    calls: int
    seconds: float
    """Since this run began or was continued."""
    seconds_left: float


class Chain(ABC):
    """A sampling chain: samples `x`, and what becomes of them with each output of a model.

    Args:
        timesteps: int64 (calls,), what the model is told at each call.
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
    """(n, C, H, W), float32: what the model is given next; after the last call the result, in [−1, 1]."""

    @property
    def calls(self) -> int:
        return self.timesteps.shape[0]

    @abstractmethod
    def begin(self) -> None:
        """Set the samples before the first call."""

    @abstractmethod
    def advance(self, call: int, output: Tensor, gradient: Tensor | None) -> None:
        """Take the model's output for `x`, of one of the `accepted` shapes, and replace `x`."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What tells this chain from others, besides its inputs: digests by name."""

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
) -> Tensor:
    """A chain's result.

    Raises:
        ValueError: the model's output has another shape; a checkpoint is asked for where the noises are given.
        InpaintRTError: the model returned NaN or Inf. `Cancelled` and `CheckpointError` are kinds of it.
    """
    arguments = chain.inputs.arguments
    identity = _identity(chain, model, guidance) if checkpoint else {}
    with torch.no_grad():
        told = _told(model, chain)
        first = _begin(chain, checkpoint, identity)
        started = saved = time.monotonic()
        finite = first  # calls after which the samples were looked at, and were finite
        for call in range(first, chain.calls):
            if cancel is not None and cancel():
                if checkpoint and call > finite:
                    _check_finite(chain, call, finite)
                    checkpoint.write(call, identity, chain.state())
                raise Cancelled(call, chain.calls)
            output = model(chain.x, told[call], **arguments)
            _check_output(output, chain)
            gradient = None if guidance is None else guidance(chain.x, chain.timesteps[call], **arguments)
            chain.advance(call, output, gradient)
            now, done = time.monotonic(), call + 1
            if checkpoint and now - saved >= checkpoint.seconds and done < chain.calls:
                _check_finite(chain, done, finite)
                checkpoint.write(done, identity, chain.state())
                saved, finite = now, done
            if progress is not None:
                spent = now - started
                progress(Progress(done, chain.calls, spent, spent / (done - first) * (chain.calls - done)))
        _check_finite(chain, chain.calls, finite)
    if checkpoint:
        checkpoint.remove()
    return chain.x


def _told(model: object, chain: Chain) -> Sequence[Tensor]:
    """What the model is told at each call: timesteps, with their embeddings where it was accelerated to read those."""
    table_of = step_tables(model)
    if table_of is None:
        return chain.timesteps.unbind()
    steps, index = chain.timesteps[:, 0].unique(return_inverse=True)
    table = table_of(steps, chain.inputs.arguments.get("y"), chain.inputs.shape[0])
    rows = [table[i] for i in range(len(table))]
    return [rows[i] for i in index.tolist()]


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
        "guidance": digest(getattr(guidance, "__qualname__", type(guidance).__qualname__)),
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

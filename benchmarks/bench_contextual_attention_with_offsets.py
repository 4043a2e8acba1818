"""contextual_attention_with_offsets against the ports' way, which finds the best keys in the matrix of all weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.contextual_attention_with_offsets import SPEC


def _without_offsets() -> ModuleType:
    """The other benchmark, whose features and port are used here. (This folder is no package.)"""
    spec = importlib.util.spec_from_file_location(
        "bench_plain", Path(__file__).with_name("bench_contextual_attention.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = _without_offsets()


def keys_of(offsets: Tensor) -> Tensor:
    """(B, h, w): the index of the key that each offset leads to, as the ports return it."""
    rows, columns = offsets.shape[2:]
    own = torch.arange(rows * columns, device=offsets.device).view(rows, columns)
    return (own // columns + offsets[:, 0]) * columns + own % columns + offsets[:, 1]


@pytest.mark.parametrize("sample", plain.SAMPLES)
@torch.inference_mode()
def test_contextual_attention_with_offsets(versus, device, sample):
    x, mask = (t.to(device) for t in plain.example(sample, versus.smoke))
    scale = plain.SCALES["features"]

    def port():
        return plain.as_ports_write_it(x, mask, scale, offsets=True)

    def ours():
        return ops.contextual_attention_with_offsets(x, x, mask, softmax_scale=scale)

    # Only near ties may be decided otherwise; outputs are compared below.
    assert (port()[1] == keys_of(ours()[1])).float().mean() > 0.999
    candidates = {"eager": lambda: port()[:1], "inpaintrt": lambda: ours()[0]}
    args = SPEC.bind(x, x, mask, softmax_scale=scale)
    truth = None
    if x.shape[3] <= plain.AFFORDABLE:
        candidates["reference"] = lambda: SPEC.run_reference(*args)[0]
        truth = lambda: SPEC.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args))[0]  # noqa: E731
    if not versus.smoke:
        compiled = versus.compiled(plain.as_ports_write_it, x, mask, scale, True)
        candidates["compile"] = lambda: compiled()[:1]
    versus(
        candidates, truth=truth, cost=SPEC.cost(*args), rounds=plain.ROUNDS.get(x.shape[3]),
        device=device, shape=x.shape, op=SPEC.name, direction="forward",
    )  # fmt: skip

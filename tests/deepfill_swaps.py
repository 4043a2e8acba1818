"""What the tests of DeepFill's adapters share: calls before and after a swap, and their inputs."""

from __future__ import annotations

import copy
import pathlib
import re

import pytest
import torch

import inpaintrt as irt
from inpaintrt.runtime import dispatch
from inpaintrt.runtime.swap import record_of, why_original
from inpaintrt.testing import assert_close_to_truth, recipe
from inpaintrt.testing.compare import flat_tensors

from . import foreign_deepfill as foreign

GOLDEN = pathlib.Path(__file__).parent / "golden"


def swapped(model):
    return {(path, record_of(m).adapter.name) for path, m in model.named_modules() if record_of(m)}


def call(module, *args):
    with torch.no_grad():
        return module(*args)


def original(module, *args):
    """What the module computed before it was swapped, from a copy that the call cannot change."""
    with irt.disabled(), torch.no_grad():
        return copy.deepcopy(module)(*args)


def in_float64(module, *args):
    """The original in float64; ports make constants in the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        return original(copy.deepcopy(module).double(), *(t.double() if torch.is_tensor(t) else t for t in args))
    finally:
        torch.set_default_dtype(torch.float32)


def assert_equal_by_the_rule(module, *args):
    """Fused output against the original's error; returns what the fused form returned."""
    truth, base = flat_tensors(in_float64(module, *args)), flat_tensors(original(module, *args))
    assert why_original(module, args, {}) == ""
    with dispatch.launches() as heard:
        result = call(module, *args)
    got = flat_tensors(result)
    assert heard
    assert len(got) == len(base)
    for g, t, b in zip(got, truth, base, strict=True):
        assert g.stride() == b.stride()
        assert_close_to_truth(g, t, b, numerics=dispatch.numerics_of(heard))
    return result


def why_not(model, path=""):
    rows = {row["module"]: row for row in irt.explain(model).rows}
    return rows[path or "(model)"]["why not"] or ""


def refused(module, why):
    module = irt.accelerate(module.eval())
    assert record_of(module) is None
    assert why in why_not(module), why_not(module)
    with pytest.raises(irt.UnsupportedError, match=re.escape(why)):
        irt.accelerate(module, strict=True)


def features(*shape, name="ca"):
    return (recipe.image(name, *shape) - 0.3) * 0.1


def mask(*shape, name="holes", part=0.03):
    return (recipe.image(name, *shape) < part).float()


def result(module, *args):
    try:
        return call(module, *args)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def generator(**options):
    made = options.pop("attention", foreign.Maybe)()
    return recipe.fill(foreign.TwoStages(made, **options)).eval()


def image(rows=96, columns=128, batch=1):
    picture = recipe.image("picture", batch, 3, rows, columns) * 2 - 1
    mask = torch.zeros(batch, 1, rows, columns)
    for i in range(batch):
        mask[i, :, 40 + 8 * i : 51, 60:71] = 1
    return torch.cat([picture * (1 - mask), torch.ones_like(mask), mask], 1), mask

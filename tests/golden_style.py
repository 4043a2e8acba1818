"""Golden cases of the style-modulated networks and their ops: inputs, weights and stored numbers."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import pathlib
import re

import torch
from safetensors.torch import load_file

from inpaintrt import use_backend
from inpaintrt.testing import assert_close_to_truth, recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def case(name):
    return json.loads((GOLDEN / name / "case.json").read_text())


@functools.cache
def tensors(name):
    return load_file(GOLDEN / name / "tensors.safetensors")


def backends(spec):
    """The reference, and the lanes of an op that run on this machine's CPU."""
    device = torch.device("cpu")
    modules = {lane: importlib.import_module(f"inpaintrt.backends.{lane}") for lane in spec.lanes}
    return ["reference", *(lane for lane, module in modules.items() if not module.missing(spec.name, device))]


def backend(name, op):
    """Nothing for the reference by its own path: a context that forces `name` otherwise."""
    return use_backend(name, op=op) if name else contextlib.nullcontext()


def picture(spec):
    return recipe.image(spec["name"], *spec["shape"]) * spec.get("scale", 1.0) + spec.get("shift", 0.0)


def mask(spec):
    made = torch.full(spec["shape"], float(spec["base"]))
    for batch, channel, top, bottom, left, right, value in spec["rects"]:
        at = [slice(None) if n == "all" else slice(n, n + 1) for n in (batch, channel)]
        made[at[0], at[1], top:bottom, left:right] = value
    return made


def pictures(run):
    """The inputs of a run by name, as float32."""
    return {name: (picture if s["kind"] == "image" else mask)(s) for name, s in run["inputs"].items()}


def fill(module, spec):
    """Recipe weights, then the steps that the case lists; checks the public state-dict layout on the way."""
    own = module.state_dict()
    if not isinstance(spec["state_dict"], str):
        assert {key: list(t.shape) for key, t in own.items()} == {key: shape for key, shape, *_ in spec["state_dict"]}
    assert sum(p.numel() for p in module.parameters()) == spec["parameters"]
    recipe.fill(module)
    for step in spec["after_fill"]:
        for key in step["keys"]:
            if step["op"] == "pow2":
                own[key].mul_(2.0 ** step["keys"][key])
            elif step["op"] == "image":
                own[key].copy_(recipe.image(key, *own[key].shape) * step["scale"] + step["shift"])
            else:
                assert step["op"] == "fir4"
                taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
                own[key].copy_(step["gain"] * torch.outer(taps, taps) / 64)
    return module.eval()


def cut(t, info):
    """The part of a result that is stored."""
    if "slice" not in info:
        return t
    at = re.search(r"full\[(.*?)\]", info["slice"])[1]
    return t[tuple(slice(*(int(n) if n else None for n in part.strip().split(":"))) for part in at.split(","))]


def assert_golden(name, key, actual, actual64=None):
    """The stored part of a result: float64 to the last bits, float32 within its tolerance."""
    stored, info = tensors(name), case(name)["tensors"][key]
    if f"{key}64" in stored:
        truth = stored[f"{key}64"]
        if actual64 is not None:
            torch.testing.assert_close(cut(actual64, info), truth, rtol=1e-12, atol=1e-12)
        assert_close_to_truth(cut(actual, info), truth, stored[key], context=key)
    else:
        torch.testing.assert_close(cut(actual, info), stored[key], rtol=1e-4, atol=1e-5)

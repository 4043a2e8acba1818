"""IPT against the public implementation's numbers, the loading of its weights, and what it refuses."""

from __future__ import annotations

import copy
import json
import pathlib
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from inpaintrt import models
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = {"features": 4, "heads": 2, "layers": 1, "patch": 24}
ALL = ("x2", "x3", "x4", "denoise30", "denoise50", "derain")


def _case(name):
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


def _network(case, tensors):
    """Ours, with the case's weights; its state dict must be the public one's."""
    given = case["args"]["option.py defaults, overridden by"]
    names = {"num_layers": "layers", "num_heads": "heads", "n_feats": "features", "num_queries": "queries"}
    options = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    network = models.create("ipt", tasks=[f"x{scale}" for scale in given["scale"]], **options)
    own = network.state_dict()
    assert {k: list(t.shape) for k, t in own.items()} == {k: spec["shape"] for k, spec in case["state_dict"].items()}
    recipe.fill(network)
    for key in case["weights"]["set_after_fill"]:
        own[key].copy_(tensors[f"set:{key}"])
    for key, factor in case["weights"]["scale_after_fill"].items():
        own[key].mul_(factor)
    return network


def _cut(tensor, info):
    """The part of a result that is stored."""
    parts = info.get("slice", "[:]").strip("[]").split(",")
    return tensor[tuple(slice(*(int(n) if n.strip() else None for n in part.split(":"))) for part in parts)]


def _assert_golden(case, tensors, run, single, double):
    """float64 to its last digits, float32 no further from it than twice the public code's own error."""
    info, stored = case["tensors"], tensors[f"out64_{run}"]
    largest = stored.abs().max().item()
    torch.testing.assert_close(_cut(double, info[f"out64_{run}"]), stored, rtol=0, atol=1e-12 * largest)
    error, public = single.double() - double, case["upstream_fp32_vs_fp64"][f"out_{run}"]
    assert error.abs().max().item() <= 2 * public["max_abs"]
    assert error.square().mean().sqrt().item() <= 2 * public["rms"]
    expected = tensors[f"out_{run}"]
    torch.testing.assert_close(_cut(single, info[f"out_{run}"]), expected, rtol=0, atol=3 * public["max_abs"])


def _stages(network):
    """What the parts of a network return in its next call, by the names of the golden cases."""
    seen = {}
    parts = [("enc", network.body.encoder.layers[-1]), ("dec", network.body.decoder.layers[-1]), ("body", network.body)]
    for name, part in [*parts, *(("head", head) for head in network.head)]:
        part.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out))
    return seen


@pytest.mark.parametrize("name", ["ipt_small", "ipt_recipe_means", "ipt_wide_2layers", "ipt_full_x2"])
def test_golden(name):
    case, tensors = _case(name)
    network = _network(case, tensors)
    x = recipe.image(*_image(case["inputs"]["x"])) * 255
    seen = _stages(network)
    for run, given in case["inputs"]["runs"].items():
        with torch.no_grad():
            single, stages = network(x, given["scale_idx"]), dict(seen)
            double = network.double()(x.double(), given["scale_idx"])
            network.float()
        for key, part in stages.items():
            if (stored := f"mid_{run}_{key}") in tensors:
                cut = _cut(part, case["tensors"][stored])
                largest = tensors[stored].abs().max().item()
                torch.testing.assert_close(cut, tensors[stored], rtol=0, atol=5e-6 * largest)
        _assert_golden(case, tensors, run, single, double)


def _image(spec):
    """`recipe.image('name', 1, 3, 48, 48) * 255` as its arguments."""
    name, sizes = re.fullmatch(r"recipe\.image\('([^']+)', ([\d, ]+)\) \* 255", spec).groups()
    return (name, *map(int, sizes.split(",")))


CHOPPED = list(_case("ipt_forward_chop")[0]["inputs"])


@pytest.mark.parametrize("run", CHOPPED)
def test_forward_chop(run):
    case, tensors = _case("ipt_forward_chop")
    network = _network(case, tensors)
    spec = case["inputs"][run]
    x = recipe.image(*_image(spec["x"])) * 255
    calls = []
    network.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    with torch.no_grad():
        single = network.forward_chop(x, spec["idx_scale"])
        computed = sum(calls)
        double = copy.deepcopy(network).double().forward_chop(x.double(), spec["idx_scale"])
    _assert_golden(case, tensors, run, single, double)
    assert computed == spec["patches run"]


def _tiny(**options):
    return recipe.fill(models.create("ipt", **{**TINY, **options}))


def test_a_batch_is_its_images():
    network = _tiny(tasks=("x2", "denoise"))
    x = recipe.image("batch", 2, 3, 31, 40) * 255
    with torch.no_grad():
        both = network.forward_chop(x, "x2", batch=3)
        assert both.shape == (2, 3, 62, 80)
        torch.testing.assert_close(both[1:], network.forward_chop(x[1:], "x2"), rtol=1e-6, atol=1e-3)


def test_tasks_have_names_and_places():
    network = _tiny(tasks=("x2", "x1", "x3"))
    assert [network.index(task) for task in ("x2", 1, "derain", "denoise", "x3")] == [0, 1, 1, 1, 2]
    assert network.scale("x3") == 3
    assert _tiny(tasks=("derain",)).index() == 0
    for wrong in (None, "x4", "upscale", 3, -1, True):
        with pytest.raises(ValueError, match=r"This network's tasks are 0: x2, 1: x1, 2: x3"):
            network.index(wrong)
    with pytest.raises(ValueError, match="task is 'denoise'"):
        _tiny(tasks=("x1", "x1")).index("denoise")
    with pytest.raises(ValueError, match="task is 'denoise'"):
        _tiny(tasks=("derain",)).index("denoise")


def test_refusals():
    network = _tiny()
    with pytest.raises(ValueError, match=r"x is \(1, 3, 24, 25\); accepted: patches \(B, 3, 24, 24\)"):
        network(torch.zeros(1, 3, 24, 25))
    for shape in ((1, 3, 23, 40), (1, 4, 24, 24), (3, 24, 24), (0, 3, 24, 24)):
        with pytest.raises(ValueError, match=r"H and W at least 24, one patch"):
            network.forward_chop(torch.zeros(shape))
    for x, message in (
        (
            torch.zeros(1, 3, 24, 24).double(),
            "x is torch.float64 on cpu; accepted: torch.float32 on cpu, as the weights",
        ),
        (torch.zeros(1, 3, 24, 24).bfloat16(), "x is torch.bfloat16 on cpu"),
        (torch.zeros(1, 3, 24, 24, dtype=torch.uint8), "x is torch.uint8 on cpu"),
        (torch.zeros(1, 3, 24, 24, device="meta"), "x is torch.float32 on meta; accepted: torch.float32 on cpu"),
    ):
        for call in (network, network.forward_chop, network.tiled):
            with pytest.raises(ValueError, match=re.escape(message)):
                call(x)
    for batch in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"batch is {batch}; accepted: 1 or more"):
            network.forward_chop(torch.zeros(1, 3, 24, 24), batch=batch)
    for options, message in (
        ({"tasks": "x4"}, "tasks are 'x4'"),
        ({"tasks": ()}, "at least one"),
        ({"tasks": ("x5",)}, "accepted: a sequence of x2, x3"),
        ({"heads": 5}, "heads that divide"),
        ({"layers": 0}, "1 or more"),
        ({"patch": 20}, "a multiple of 12"),
        ({"queries": 1, "tasks": ("x2", "x3")}, "queries are 1 for 2 tasks"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            models.create("ipt", **{**TINY, **options})


@pytest.mark.parametrize("tasks", [("x4",), ("x2", "x3", "x1"), ALL])
def test_weights_tell_what_they_are_of(tasks, tmp_path):
    path = tmp_path / "weights.safetensors"
    network = _tiny(tasks=tasks, layers=2, queries=7)
    save_file({f"model.{key}": tensor for key, tensor in network.state_dict().items()}, path)
    loaded = models.load("ipt", path, heads=2)
    assert loaded.config == network.config
    x = recipe.image("loaded", 1, 3, 24, 24) * 255
    with torch.no_grad():
        assert torch.equal(loaded(x, len(tasks) - 1), network(x, len(tasks) - 1))
    with pytest.raises(WeightsError, match="a ipt generator"):
        models.load("mat", path)


@pytest.mark.parametrize("tasks", [("x2",), ("derain", "x3"), ["x4", "denoise50", "x2"]])
def test_some_tasks_of_a_file(tasks, tmp_path):
    path, x = tmp_path / "weights.safetensors", recipe.image("loaded", 1, 3, 24, 24) * 255
    network = _tiny(tasks=ALL, queries=7)
    save_file(network.state_dict(), path)
    loaded = models.load("ipt", path, heads=2, tasks=tasks)
    assert loaded.config == {**network.config, "tasks": tuple(tasks), "queries": len(tasks)}
    with torch.no_grad():
        for task in tasks:
            assert torch.equal(loaded(x, task), network(x, task))


def test_tasks_that_a_file_has_not(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(_tiny(tasks=("x2", "x1", "x3")).state_dict(), path)
    assert models.load("ipt", path, heads=2, tasks=("derain",)).index("derain") == 0  # its only one that keeps the size
    for tasks in (("x4",), ("x2", "x4")):
        with pytest.raises(WeightsError, match=rf"tasks are \('{tasks[0]}'.*It has 0: x2, 1: x1, 2: x3"):
            models.load("ipt", path, heads=2, tasks=tasks)
    save_file(_tiny(tasks=("x1", "x1", "x3")).state_dict(), path)
    with pytest.raises(WeightsError, match=r"tasks are \('derain',\)"):
        models.load("ipt", path, heads=2, tasks=("derain",))  # which of the two?
    with pytest.raises(ValueError, match="tasks are 'x3'; accepted: a sequence"):
        models.load("ipt", path, heads=2, tasks="x3")


def test_a_pickled_network_tells_its_heads(tmp_path):
    network = _tiny(tasks=("x1",))
    torch.save(network, tmp_path / "whole.pt")
    assert models.load("ipt", tmp_path / "whole.pt", tasks=("derain",)).config == {
        **network.config,
        "tasks": ("derain",),
    }


def test_weights_that_lack_something(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = _tiny().state_dict()
    save_file({key: tensor for key, tensor in state.items() if not key.startswith("tail")}, path)
    with pytest.raises(WeightsError, match=r"'tail\.0\.1\.weight' is missing"):
        models.load("ipt", path, heads=2)
    save_file(state | {"body.query_embed.weight": torch.zeros(1, 7)}, path)
    with pytest.raises(WeightsError, match=r"body\.query_embed\.weight is \(1, 7\), expected \(1, 2304\)"):
        models.load("ipt", path, heads=2)
    save_file(state | {"tail.0.0.0.weight": torch.zeros(100, 4, 3, 3)}, path)
    with pytest.raises(WeightsError, match="enlarges 25 times"):
        models.load("ipt", path, heads=2)

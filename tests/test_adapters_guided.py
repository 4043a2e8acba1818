"""guided-diffusion's UNet, ours and a stranger's, accelerated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import inpaintrt as irt
from inpaintrt import models
from inpaintrt.adapters import guided
from inpaintrt.runtime.dispatch import launches, numerics_of
from inpaintrt.testing import assert_close_to_truth, recipe

from . import golden_style as golden
from .foreign_guided import Cell, Mixer, Painter, Pooled
from .test_guided import BLOCKS, VARIANTS, attention_block, filled, res_block, small, stored

OPTIONS = {
    "film": {},
    "added": {"film": False, "interleaved": False},
    "convolutions": {"blocks": False, "factors": (1, 2, 2), "attends": (1, 2)},
    "no_weights": {"blocks": False, "learned": False, "repeats": 2},
    "classes": {"classes": 4, "head": 64},
}


def painter(**options):
    return recipe.fill(Painter(**options)).eval()


def example(batch=2, rows=8, columns=12):
    return recipe.image("x", batch, 3, rows, columns) * 4 - 2, torch.tensor([996, 37, 0][:batch])


def labels(network, batch=2):
    return (torch.tensor([3, 0, 1][:batch]),) if hasattr(network, "label_emb") else ()


def row(model, *args):
    (found,) = (r for r in irt.explain(model, *args).rows if r["module"] == "(model)")
    return found


class Operations(TorchDispatchMode):
    """Notes what torch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def agrees(network, *args, **keywords):
    """Accelerated against original, by the end-to-end rule of `verify`."""
    with irt.disabled():
        expected = network(*args, **keywords)
    got = network(*args, **keywords)
    assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())
    error = (got - expected).double().pow(2).mean().sqrt() / expected.abs().max()
    assert error < 2e-5, error
    return got


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_strangers_networks(options, batch):
    network = painter(**OPTIONS[options])
    args = (*example(batch), *labels(network, batch))
    assert irt.accelerate(network) is network
    assert row(network, *args)["adapter"] == "guided.unet"
    assert row(network, *args)["why not"] is None
    agrees(network, *args)
    irt.restore(network)
    assert type(network) is Painter


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(variant):
    network, args, given = small(variant)
    irt.accelerate(network, strict=True)
    assert row(network, *args)["why not"] is None
    with torch.no_grad():
        out = network(*args)
    error = (out - given["out64"]).pow(2).mean().sqrt() / given["out64"].abs().max()
    assert error < 2e-5


@pytest.mark.parametrize("fault", ["frequencies", "order", "scaled"])
def test_networks_that_do_something_else_keep_their_code_and_have_their_blocks_swapped(fault):
    network = painter(fault=fault)
    args = example()
    irt.accelerate(network)
    rows = {r["module"]: r for r in irt.explain(network, *args).rows}
    assert "its code does something else with them" in rows["(model)"]["why not"]
    assert rows["middle_block.0"]["adapter"] == "guided.residual"
    assert rows["middle_block.1"]["adapter"] == "guided.attention"
    agrees(network, *args)


def test_verify_judges_the_blocks_and_the_whole():
    network = painter()
    irt.accelerate(network)
    report = irt.verify(network, *example())
    assert report.ok
    parts = {r["part"]: r["adapter"] for r in report.rows}
    assert parts["input_blocks.1.0"] == "guided.residual"
    assert parts["middle_block.1"] == "guided.attention"
    assert parts["(model)"] == "guided.unet"


def test_calls_by_keywords():
    network = irt.accelerate(painter(classes=4))
    x, t = example()
    y = labels(network)[0]
    out = agrees(network, x, timesteps=t, y=y)
    for keywords in ({"gt": x}, {"gt": x, "gt_keep_mask": x}):
        assert torch.equal(agrees(network, x, t, y=y, **keywords), out)
        assert not list(network._inpaintrt.adapter.refuses(network, x, t, y, **keywords))
    used = irt.accelerate(painter(fault="keywords"))
    with torch.no_grad(), irt.disabled():
        expected = used(x, t, gt=x)
    with torch.no_grad():
        assert torch.equal(used(x, t, gt=x), expected)
    assert "beyond image, timesteps and labels (gt)" in "".join(used._inpaintrt.adapter.refuses(used, x, t, gt=x))


@pytest.mark.parametrize("flipped", [Cell(32, 64, 48, True, flip=True), Cell(32, 32, 48, True, way="up", flip=True)])
def test_a_shift_before_the_scale_is_refused(flipped):
    block = torch.nn.ModuleDict({"block": recipe.fill(flipped).eval()})
    irt.accelerate(block)
    (refused,) = (r for r in irt.explain(block).rows if r["module"] == "block")
    assert "computes something else" in refused["why not"]


def test_another_temperature_is_refused():
    block = torch.nn.ModuleDict({"block": recipe.fill(Mixer(64, 2, temperature=1.5)).eval()})
    irt.accelerate(block, skip="convolution*")
    (refused,) = (r for r in irt.explain(block).rows if r["module"] == "block")
    assert "computes something else" in refused["why not"]


@pytest.mark.parametrize("case", [c for c in golden.case("guided_blocks")["cases"] if c.startswith(("res_", "att_"))])
def test_blocks_by_themselves(case):
    make = res_block if case.startswith("res_") else attention_block
    block, given = filled("guided_blocks", case, make(**BLOCKS[case]["arguments"])), stored("guided_blocks", case)
    irt.accelerate(block, strict=True)
    args = [given[key] for key in ("x", "emb") if key in given]
    with torch.no_grad(), launches() as heard:
        out = block(*args)
    assert_close_to_truth(out, given["out64"], given["out"], numerics=numerics_of(heard))


def test_blocks_keep_the_memory_format():
    x, emb = recipe.image("x", 2, 64, 6, 8), recipe.image("emb", 2, 48)
    for block, args in ((Cell(64, 32, 48, True), (x, emb)), (Mixer(64, 2), (x,))):
        irt.accelerate(recipe.fill(block).eval(), strict=True)
        for layout in (torch.contiguous_format, torch.channels_last):
            agrees(block, args[0].contiguous(memory_format=layout), *args[1:])


def test_compiles_and_exports_whole():
    network = irt.accelerate(painter())
    args = example()
    with torch.no_grad():
        expected = network(*args)
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*args), expected)
        torch.testing.assert_close(torch.export.export(network, args).module()(*args), expected)


def test_training_and_hooks_run_the_original():
    network = irt.accelerate(painter())
    args = example()
    network.train()
    assert row(network, *args)["why not"] == "the module is in training mode"
    network.eval()
    handle = network.middle_block[0].register_forward_hook(lambda *_: None)
    assert "a hook sits on a child" in row(network, *args)["why not"]
    handle.remove()
    assert row(network, *args)["why not"] is None


def test_sizes_that_the_network_cannot_take_are_the_originals():
    network = irt.accelerate(painter())
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        network(*example(rows=9))
    assert "is not a multiple of 2" in "".join(network._inpaintrt.adapter.refuses(network, *example(rows=9)))


def test_gradients_are_the_originals():
    network = recipe.fill(Pooled(attends=(0, 1))).eval()
    x, t = example()

    def guidance():
        image = x.clone().requires_grad_()
        return torch.autograd.grad(network(image, t).log_softmax(-1)[:, 2].sum(), image)[0]

    expected = guidance()
    irt.accelerate(network)
    assert {r["adapter"] for r in irt.explain(network, x, t).rows} >= {"guided.residual", "guided.attention"}
    torch.testing.assert_close(guidance(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    agrees(network, x, t)
    unet = irt.accelerate(painter())
    (why,) = unet._inpaintrt.adapter.refuses(unet, x.clone().requires_grad_(), t)
    assert "a gradient with respect to its input" in why


def test_bf16():
    network = painter()
    args = example()
    with torch.no_grad():
        expected = network(*args)
        with torch.autocast("cpu", torch.bfloat16):
            eager = network(*args)
    irt.accelerate(network, precision="bf16")
    assert row(network, *args)["why not"] is None
    with torch.no_grad():
        got = network(*args)
    assert got.dtype == torch.float32
    assert (got - expected).pow(2).mean() <= 4 * (eager.float() - expected).pow(2).mean()
    assert not torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_16_bit_torso(dtype, precision):
    """`use_fp16` of the public configurations, before or after accelerating: fused, and no further from float32."""
    network, args, given = small("legacy_updown_film")
    with torch.no_grad():
        exact = network(*args)
    irt.accelerate(network, **({"precision": precision} if precision else {}))
    network.convert_torso(dtype)
    again = irt.accelerate(irt.restore(copy.deepcopy(network)))
    for model in (network, again):
        assert row(model, *args)["why not"] is None
        with torch.no_grad(), launches() as heard:
            got = model(*args)
        with torch.no_grad(), irt.disabled():
            original = model(*args)
        assert "group_norm_silu" in {event.op for event in heard}
        assert (got.dtype, got.stride()) == (original.dtype, original.stride())
        assert 0 < (got - exact).square().mean() <= 1.2 * (original - exact).square().mean()
    if dtype == torch.float16:
        torch.testing.assert_close(got, given["out_fp16torso"], rtol=0, atol=5e-3)
    table = guided.StepTable(network, args[1][:1], batch=len(args[0]))
    with torch.no_grad():
        read, computed = network(args[0], table[0]), network(args[0], args[1][:1].expand(len(args[0])))
        assert (read - computed).square().mean() <= (original - exact).square().mean()
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast is on" in row(network, *args)["why not"]
    network.bfloat16()
    assert "input torch.float32 with weights torch.bfloat16" in "".join(
        network._inpaintrt.adapter.refuses(network, *args)
    )


# ---- a schedule's embeddings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 4])
def test_tables_give_what_timesteps_give(classes, monkeypatch):
    network = irt.accelerate(painter(classes=classes))
    x, _ = example()
    y = labels(network)
    steps = torch.tensor([999, 500, 3])
    table = guided.StepTable(network, steps, *y, batch=2)
    assert len(table) == 3
    reads = []
    kept = guided.kept
    monkeypatch.setattr(guided, "kept", lambda *args: reads.append(kept(*args)) or reads[-1])
    for i, t in enumerate(steps):
        with torch.no_grad():
            plain = network(x, t.repeat(2), *y)
            got = network(x, table[i], *y)
            with irt.disabled():
                original = network(x, table[i], *y)
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got, original, rtol=1e-4, atol=1e-4)
    assert [rows is not None for rows in reads] == [False, True] * 3


@pytest.mark.parametrize("write", ["linear", "data", "timesteps", "labels", "replaced"])
def test_tables_are_never_stale(write):
    network = irt.accelerate(painter(classes=4))
    x, _ = example()
    y = labels(network)[0]
    t = guided.StepTable(network, torch.tensor([999, 500]), y)[1]
    with torch.no_grad():
        before = network(x, t, y)
        if write == "linear":
            network.middle_block[0].emb_layers[1].weight.mul_(2)
        elif write == "data":
            network.time_embed[2].weight.data.mul_(2)
        elif write == "timesteps":
            t.add_(100)
        elif write == "labels":
            y = torch.tensor([1, 1])
        else:
            network.middle_block[2].emb_layers[1] = recipe.fill(torch.nn.Linear(128, 128))
        plain = network(x, t.clone(), y)
        assert torch.equal(network(x, t, y), plain)
    assert not torch.equal(plain, before)


@pytest.mark.parametrize("at", [1, torch.tensor(1)])
def test_a_step_that_was_written_to_is_not_read_again(at):
    """A table hands out the same memory each time."""
    network = irt.accelerate(painter())
    x, _ = example()
    table = guided.StepTable(network, torch.tensor([999, 500]), batch=2)
    assert hasattr(table[at], guided._ROWS)
    table[1].sub_(300)
    assert table[at].tolist() == [200, 200]
    with torch.no_grad():
        assert torch.equal(network(x, table[at]), network(x, torch.tensor([200, 200])))


def test_tables_hold_each_label_once():
    network = irt.accelerate(painter(classes=4))
    steps, y = torch.tensor([999, 500.25, 3]), torch.tensor([3, 0, 3, 3, 0])
    x = recipe.image("x", 5, 3, 8, 12)
    for labels_ in (y, y[:2], y[2:4]):
        images, table = x[: len(labels_)], guided.StepTable(network, steps, labels_)
        assert table._table.shape[:2] == (3, len(labels_.unique()))
        with torch.no_grad():
            plain = network(images, steps[1].expand(len(labels_)), labels_)
            for at in (1, torch.tensor(1)):
                torch.testing.assert_close(network(images, table[at], labels_), plain, rtol=1e-5, atol=1e-5)


def test_reading_a_table_at_a_tensor_copies_two_rows():
    """Whatever it does is done again in each replay of a graph."""
    table = guided.StepTable(painter(), torch.tensor([999, 500]), batch=2)
    at = torch.tensor(1)
    with Operations() as counter:
        table[at]
    assert sum("index_select" in name for name in counter.names) == 2
    assert not any(word in name for name in counter.names for word in ("stack", "cat", "copy", "clone"))


def test_tables_in_inference_mode():
    network = irt.accelerate(painter())
    x, t = example()
    with torch.inference_mode():
        table = guided.StepTable(network, t[:1], batch=len(x))
        torch.testing.assert_close(network(x, table[0]), network(x, t[:1].expand(len(x))), rtol=1e-5, atol=1e-5)


def test_samplers_let_accelerated_networks_read_a_table(monkeypatch):
    network, reads = irt.accelerate(painter()), []
    kept = guided.kept
    monkeypatch.setattr(guided, "kept", lambda *args: reads.append(kept(*args)) or reads[-1])
    schedule = irt.samplers.Schedule.repaint(4, jump_length=2, resampling=2)
    hole = torch.zeros(1, 1, 8, 8)
    hole[..., 2:5, 2:5] = 1
    image = torch.rand(1, 3, 8, 8)
    with_table = irt.samplers.repaint(network, image, hole, seeds=1, schedule=schedule)
    assert len(reads) == len(schedule.calls)
    assert all(rows is not None for rows in reads)
    plain = irt.samplers.repaint(lambda x, t: network(x, t.clone()), image, hole, seeds=1, schedule=schedule)
    torch.testing.assert_close(with_table, plain, rtol=1e-4, atol=1e-4)


def test_tables_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="model is a Linear"):
        guided.StepTable(torch.nn.Linear(2, 2), torch.tensor([1]))
    network = painter(classes=4)
    with pytest.raises(ValueError, match=r"y None; accepted: \(N,\), and \(B,\)"):
        guided.StepTable(network, torch.tensor([1]))


def test_copies_stay_accelerated():
    network = irt.accelerate(models.create("guided_unet", model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                                           attention_resolutions=(2,)))  # fmt: skip
    twin = copy.deepcopy(network)
    assert row(twin, *example())["why not"] is None

"""The fused schedulers against diffusers' own, step by step: values, random numbers, options, what is saved."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re
import sys

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra `diffusers`)")

from inpaintrt.samplers import diffusers as fused  # noqa: E402 (where diffusers is there)
from inpaintrt.samplers.diffusers import alphas, coefficients, sigmas  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
V = {"prediction_type": "v_prediction"}
SAMPLE = {"prediction_type": "sample"}

# name, config, steps, arguments of step, channels of the output over those of the sample
RUNS = [
    ("DDPMScheduler", {}, 8, {"generator"}, 1),
    ("DDPMScheduler", {**SD, **V, "clip_sample": False, "steps_offset": 1, "variance_type": "fixed_large"}, 7, {"generator"}, 1),
    ("DDPMScheduler", {**SAMPLE, "variance_type": "fixed_small_log", "clip_sample_range": 0.7}, 6, {"generator"}, 1),
    ("DDPMScheduler", {"variance_type": "learned_range", "timestep_spacing": "trailing"}, 9, {"generator"}, 2),
    ("DDIMScheduler", {}, 8, {}, 1),
    ("DDIMScheduler", {**SD, "clip_sample": False, "set_alpha_to_one": False}, 8, {"eta": 0.6, "generator": 1}, 1),
    ("DDIMScheduler", {"clip_sample_range": 0.8}, 7, {"use_clipped_model_output": True, "eta": 1.0, "generator": 1}, 1),
    ("DDIMScheduler", {**V, "rescale_betas_zero_snr": False, "timestep_spacing": "trailing"}, 6, {"eta": 0.3, "generator": 1}, 1),
    ("DDIMScheduler", SAMPLE, 6, {}, 1),
    ("DDIMScheduler", SAMPLE, 6, {"use_clipped_model_output": True}, 1),
    ("EulerDiscreteScheduler", SD, 8, {}, 1),
    ("EulerDiscreteScheduler", {**SD, **V, "use_karras_sigmas": True}, 8, {}, 1),
    ("EulerDiscreteScheduler", {**SD, **SAMPLE}, 8, {}, 1),
    ("EulerAncestralDiscreteScheduler", SD, 8, {"generator"}, 1),
    ("EulerAncestralDiscreteScheduler", {**SD, **V, "timestep_spacing": "trailing"}, 8, {"generator"}, 1),
    ("DPMSolverMultistepScheduler", SD, 8, {}, 1),
    ("DPMSolverMultistepScheduler", {**SD, **V, "solver_type": "heun", "use_karras_sigmas": True}, 20, {}, 1),
    ("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "sde-dpmsolver++"}, 12, {"generator"}, 1),
    ("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, 18, {"generator"}, 1),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 1}, 6, {}, 1),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}, 18, {}, 1),
    ("DPMSolverMultistepScheduler", {**SD, "final_sigmas_type": "sigma_min"}, 9, {}, 1),
    ("DPMSolverMultistepScheduler", FLOW, 9, {}, 1),
    ("DPMSolverMultistepScheduler", {**SD, **SAMPLE}, 9, {}, 1),
    ("UniPCMultistepScheduler", SD, 8, {}, 1),
    ("UniPCMultistepScheduler", {**SD, **V, "solver_order": 3, "use_karras_sigmas": True}, 16, {}, 1),
    ("UniPCMultistepScheduler", {**SD, "solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"}, 12, {}, 1),
    ("UniPCMultistepScheduler", {**SD, "disable_corrector": [0, 1, 4]}, 10, {}, 1),
    ("UniPCMultistepScheduler", FLOW, 10, {}, 1),
]  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trajectory(scheduler, steps, arguments, wide, dtype=torch.float32, shape=(2, 3, 6, 8)):
    """Every sample and predicted image of a chain whose outputs are given, and what the generator draws next."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    arguments = dict.fromkeys(arguments) | (dict(arguments) if isinstance(arguments, dict) else {})
    if "generator" in arguments:
        arguments["generator"] = generator
    x, found = (normal(*shape) * scheduler.init_noise_sigma).to(dtype), []
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        output = normal(shape[0], wide * shape[1], *shape[2:], seed=i + 1).to(dtype)
        result = scheduler.step(output, t, x, **arguments)
        x = result.prev_sample
        found.append((x, getattr(result, "pred_original_sample", x)))
    return found, torch.rand(1, generator=generator)


def both(name, config):
    return getattr(fused, name)(**config), getattr(diffusers, name)(**config)


def assert_close(found, expected, scheduler):
    """Samples and predicted images of a chain, each within 8 roundings for every step so far, at the size of the largest
    value so far (sigmas begin at 15). An image that is clipped was up to 1/√abar larger before, and so were its roundings."""
    largest, gain = 1.0, 1.0
    if "clip_sample" in scheduler.config:
        gain = scheduler.alphas_cumprod[scheduler.timesteps[0].item()].item() ** -0.5
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert all(t.isfinite().all() for t in theirs)
        largest = max(largest, *(t.abs().max().item() for t in theirs))
        for a, b, factor in zip(ours, theirs, (1.0, gain)[: len(ours)], strict=True):
            assert (a - b).abs().max().item() <= 8 * (i + 1) * 2.0**-24 * largest * factor, i


@pytest.fixture
def passes(monkeypatch):
    """How often the ops were called by the schedulers."""
    calls = []

    def counted(op):
        def call(*args, **kwargs):
            calls.append(op.__name__)
            return op(*args, **kwargs)

        return call

    for module in (alphas, sigmas):
        for name in ("linear_step", "sampler_step"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return calls


@pytest.mark.parametrize(("name", "config", "steps", "arguments", "wide"), RUNS)
def test_steps_are_diffusers(name, config, steps, arguments, wide, passes):
    ours, theirs = both(name, config)
    found, next_number = trajectory(ours, steps, arguments, wide)
    expected, other_number = trajectory(theirs, steps, arguments, wide)
    assert len(passes) >= steps - 1, "the fused form was not used"
    assert torch.equal(next_number, other_number), "as many random numbers are drawn"
    assert_close(found, expected, theirs)


def test_every_scheduler_has_a_run():
    assert {name for name, *_ in RUNS} | {"RePaintScheduler"} == set(fused.__all__)


@pytest.mark.parametrize("name", fused.__all__)
def test_the_interface_is_diffusers(name, tmp_path):
    """Pipelines read parameters' names; what is saved has diffusers' name and loads with and without this package."""
    ours, theirs = getattr(fused, name), getattr(diffusers, name)
    assert issubclass(ours, theirs)
    for method in ("step", "set_timesteps", "undo_step", "scale_model_input"):
        if hasattr(theirs, method):
            parameters = [list(inspect.signature(getattr(c, method)).parameters) for c in (ours, theirs)]
            assert parameters[0] == parameters[1]
            defaults = [
                [p.default for p in inspect.signature(getattr(c, method)).parameters.values()] for c in (ours, theirs)
            ]
            assert defaults[0] == defaults[1]
    ours(num_train_timesteps=77).save_pretrained(tmp_path)
    for loads in (ours, theirs):
        assert loads.from_pretrained(tmp_path).config.num_train_timesteps == 77
    assert type(ours.from_config(theirs(num_train_timesteps=55).config)) is ours
    assert ours(num_train_timesteps=5).config["num_train_timesteps"] == 5


@pytest.mark.parametrize(("name", "config", "steps", "arguments", "wide"), [r for r in RUNS if "DDPM" not in r[0]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(name, config, steps, arguments, wide, dtype):
    """As exact as diffusers' own: both against float32 from the same inputs, one step at a time."""
    ours, theirs = both(name, config)
    found, _ = trajectory(ours, steps, arguments, wide, dtype)
    expected, _ = trajectory(theirs, steps, arguments, wide, dtype)
    assert [x.dtype for x, _ in found] == [x.dtype for x, _ in expected]
    reference, _ = trajectory(getattr(diffusers, name)(**config), steps, arguments, wide)
    ours, theirs = (torch.stack([x.float() for x, _ in r]) for r in (found, expected))
    exact = torch.stack([x for x, _ in reference])
    band = torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).square().mean().sqrt() <= 2 * (theirs - exact).square().mean().sqrt() + band


# ---- RePaint --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "steps"), [({}, 20), ({"eta": 1.0, "clip_sample": False}, 20), ({"eta": 0.5}, 250), ({}, 300)]
)
@pytest.mark.parametrize("shapes", ["one", "each"])
def test_repaint(config, steps, shapes, passes):
    """The pipeline's loop, undo steps too; 20 steps are 50 training steps apart, 250 four, 300 three."""
    image = normal(2 if shapes == "each" else 1, 3, 6, 8, seed=50)
    mask = (normal(2 if shapes == "each" else 1, 3 if shapes == "each" else 1, 6, 8, seed=51) > 0).float()
    results = []
    for scheduler in both("RePaintScheduler", config):
        scheduler.set_timesteps(steps, jump_length=3, jump_n_sample=2)
        generator = torch.Generator().manual_seed(3)
        x, found = normal(2, 3, 6, 8), []
        last = scheduler.timesteps[0] + 1
        for i, t in enumerate(scheduler.timesteps[:120]):
            if t < last:
                output = normal(2, 3, 6, 8, seed=i) + 0.3 * x
                result = scheduler.step(output, t, x, image, mask, generator)
                x = result.prev_sample
                found.append((x, result.pred_original_sample))
            else:
                x = scheduler.undo_step(x, last, generator)
                found.append((x,))
            last = t
        results.append((found, torch.rand(1, generator=generator)))
    (found, number), (expected, other) = results
    assert torch.equal(number, other)
    assert "linear_step" in passes
    assert_close(found, expected, scheduler)


# ---- what is not fused, and what is not asked ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "arguments"),
    [
        ("DDPMScheduler", {"thresholding": True}, {"generator"}),
        ("DDIMScheduler", {"thresholding": True}, {}),
        ("EulerDiscreteScheduler", SD, {"s_churn": 2.0, "generator": 1}),
        ("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
        ("UniPCMultistepScheduler", {**SD, "predict_x0": False, "final_sigmas_type": "sigma_min"}, {}),
    ],
)
def test_the_rest_is_diffusers_own(name, config, arguments, passes):
    ours, theirs = both(name, config)
    found, _ = trajectory(ours, 8, arguments, 1)
    expected, _ = trajectory(theirs, 8, arguments, 1)
    assert not passes
    assert all(torch.equal(a, b) for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("kind", ["float64", "video"])
def test_other_tensors_are_diffusers_own(name, kind, passes):
    shape = (1, 3, 4, 6, 8) if kind == "video" else (1, 3, 6, 8)
    dtype = torch.float64 if kind == "float64" else torch.float32
    results = []
    for scheduler in both(name, SD):
        scheduler.set_timesteps(5)
        x = normal(*shape).to(dtype)
        for i, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(normal(*shape, seed=i).to(dtype), t, x).prev_sample
        results.append(x)
    assert (results[0] - results[1]).abs().max() < 1e-4 * results[1].abs().max()
    if kind == "video":
        assert not passes
        assert torch.equal(*results)


def test_errors_are_diffusers_own():
    x = normal(1, 3, 6, 8)
    euler = fused.EulerDiscreteScheduler()
    euler.set_timesteps(5)
    with pytest.raises(ValueError, match="Passing integer indices"):
        euler.step(x, 1, x)
    ddim = fused.DDIMScheduler()
    ddim.set_timesteps(5)
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        ddim.step(x, ddim.timesteps[0], x, eta=1.0, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        fused.DPMSolverMultistepScheduler().step(x, torch.tensor(1), x)


@pytest.mark.parametrize("name", fused.__all__)
def test_a_step_before_timesteps_are_set(name):
    """As diffusers' own; but for its RePaint, which fails without a word on what is missing."""
    x, results = normal(1, 3, 6, 8), []
    for scheduler in both(name, {}):
        more = (x, x[:, :1]) if name == "RePaintScheduler" else ()
        try:
            result = scheduler.step(x, scheduler.timesteps[3], x, *more, return_dict=False)
            results.append(len(result))
        except (TypeError, ValueError) as error:
            results.append(str(error)[:38])
    asked = "Number of inference steps is 'None'"
    assert results[0] == results[1] or (results[0].startswith(asked) and name in ("DDIMScheduler", "RePaintScheduler"))
    assert isinstance(results[0], int) or results[0].startswith(asked)
    if name == "RePaintScheduler":
        scheduler = fused.RePaintScheduler()
        with pytest.raises(ValueError, match=f"{asked}; run 'set_timesteps'"):
            scheduler.undo_step(x, scheduler.timesteps[3])


def test_tuples_are_returned_where_asked():
    x = normal(1, 3, 6, 8)
    for name in ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        scheduler = getattr(fused, name)(**SD)
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[0]
        scheduler.scale_model_input(x, t)
        result = scheduler.step(
            x, t, x, return_dict=False, **({} if name.startswith("EulerD") else {"generator": None})
        )
        assert isinstance(result, tuple)
        assert len(result) == 2


def test_timesteps_are_found_in_every_form():
    x, made = normal(1, 3, 6, 8), normal(1, 3, 6, 8, seed=1)
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(10)
    for i, t in enumerate(scheduler.timesteps[3:], 3):
        forms = (t, t.clone(), t.item(), torch.tensor(t.item(), dtype=torch.int32), scheduler.timesteps[i])
        assert {scheduler._step_of(form) for form in forms} == {i}
        results = [scheduler.step(made, form, x).prev_sample for form in forms]
        assert all(torch.equal(results[0], r) for r in results)
    expected = diffusers.DDIMScheduler()
    expected.set_timesteps(10)
    assert scheduler._step_of(5) is None
    assert torch.equal(scheduler.step(made, 5, x).prev_sample, expected.step(made, 5, x).prev_sample)


def test_new_timesteps_make_new_coefficients():
    x, made = normal(1, 3, 6, 8), normal(1, 3, 6, 8, seed=1)
    scheduler = fused.DDIMScheduler()
    results = []
    for steps in (10, 4, 10):
        scheduler.set_timesteps(steps)
        results.append(scheduler.step(made, scheduler.timesteps[1], x).prev_sample)
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize(("name", "config", "steps", "arguments", "wide"), RUNS)
def test_after_the_first_step_nothing_is_asked_of_the_device(name, config, steps, arguments, wide, monkeypatch):
    """No value of timesteps or samples is read, and no coefficient brought there, once all kinds of steps have been made."""
    if config.get("solver_order") == 3 and name.startswith("DPM"):
        pytest.skip("third-order steps of DPM-Solver are diffusers' own")
    scheduler = getattr(fused, name)(**config)
    trajectory(scheduler, steps, arguments, wide)
    made = dict(scheduler._kept())
    timesteps = scheduler.timesteps
    x = normal(1, 3, 6, 8) * scheduler.init_noise_sigma
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = 0
    if hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums, scheduler.model_outputs = 0, [None] * len(scheduler.model_outputs)
        scheduler.last_sample = None
    arguments = {
        k: (None if k == "generator" else v)
        for k, v in (arguments.items() if isinstance(arguments, dict) else ((a, 0) for a in arguments))
    }

    def asked(self, *_):
        raise AssertionError("a value was read")

    outputs = [normal(1, 3 * wide, 6, 8, seed=i) for i in range(steps)]
    elements = list(timesteps)
    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__"):
            patch.setattr(torch.Tensor, method, asked)
        for t, output in zip(elements, outputs, strict=True):
            x = scheduler.step(output, t, x, **arguments).prev_sample
    assert set(scheduler._kept()) == set(made)
    assert x.isfinite().all()


def test_what_suits():
    x = normal(1, 3, 6, 8)
    assert coefficients.suits(x, x.clone())
    for other in (x.half(), x[:, :1], x[0], x.double()):
        assert not coefficients.suits(x, other)
        assert other.dim() == 4 or not coefficients.suits(other)
    assert not coefficients.suits(x.double(), x.double())


def test_the_package_tells_what_is_missing(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("inpaintrt.samplers.diffusers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs diffusers: pip install 'inpaintrt\[diffusers\]'"):
        importlib.import_module("inpaintrt.samplers.diffusers")


def test_the_example_of_the_documentation_runs():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "diffusion.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python diffusers\n(.*?)^```$", page, re.M | re.S)
    images = []
    for module in ("inpaintrt.samplers.diffusers", "diffusers"):
        names: dict[str, object] = {}
        torch.manual_seed(0)  # of the weights
        exec(example.replace("from inpaintrt.samplers.diffusers", f"from {module}"), names)
        images.append(names["images"])
    assert images[0].shape == (1, 16, 16, 3)
    assert abs(images[0] - images[1]).max() < 1e-5

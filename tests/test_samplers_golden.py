"""RePaint's whole loop on guided-diffusion's network, against the public code's, with its noises."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from inpaintrt import samplers
from inpaintrt.models.guided_classifier import GuidedClassifier
from inpaintrt.models.guided_unet import GuidedUNet
from inpaintrt.samplers import Schedule, Tables
from inpaintrt.testing import assert_close_to_truth, recipe

GOLDEN = pathlib.Path(__file__).parent / "golden" / "repaint_loop"
CASE = json.loads((GOLDEN / "case.json").read_text())


@pytest.mark.parametrize("variant", CASE["variants"])
def test_the_public_loop(variant):
    spec = CASE["variants"][variant]
    stored = {
        key.removeprefix(f"{variant}/"): t
        for key, t in load_file(GOLDEN / "tensors.safetensors").items()
        if key.startswith(f"{variant}/")
    }
    jump = dict(spec["jump"])
    schedule = Schedule.repaint(
        jump.pop("t_T"), step_resampling=jump.pop("n_sample"), resampling=jump.pop("jump_n_sample"),
        **{name.replace("n_sample", "resampling"): value for name, value in jump.items()},
    )  # fmt: skip
    assert list(schedule.times) == stored["times"].tolist()
    options = {name: value for name, value in spec["unet"].items() if name != "image_size"}
    unet = GuidedUNet(**options).eval()
    recipe.fill(unet)
    seen = []

    def model(x, t, **labels):
        seen.append((x.clone(), t[0].item()))
        return unet(x, t, **labels)

    guidance = None
    if spec["guidance"]:
        assert spec["guidance"] == "cond_fn(x) = 0.5*(target - x)"

        def guidance(x, t):
            return 0.5 * (stored["target"] - x)

    result = samplers.repaint(
        model, (stored["gt"] + 1) / 2, 1 - stored["mask"], schedule=schedule, noises=stored["noises"], paste=False,
        tables=Tables.linear().respaced(spec["timestep_respacing"]), labels=spec["y"], guidance=guidance,
    )  # fmt: skip
    assert [t for _, t in seen] == stored["t_model"].tolist()
    exact, public = stored["final64"].clamp(-1, 1), stored["final"].clamp(-1, 1)
    assert_close_to_truth(2 * result - 1, exact, public)
    errors = spec["max_abs_difference_float32_vs_float64_per_call"]
    for call, x in zip(stored["calls"].tolist(), stored["x_in"], strict=True):
        # Both are as far from float64 as the call before, whose weights of 157 amplify roundings, left them.
        assert (seen[call][0] - x).abs().max() < 3 * max(errors[: call + 1]), call


def test_the_cases_cover_what_matters():
    variants = CASE["variants"].values()
    assert {v["mask"] for v in variants} == {"binary", "frac"}
    assert any(v["guidance"] for v in variants)
    assert any(v["y"] for v in variants)
    assert torch.tensor([v["clipped_share_final"] for v in variants]).max() < 0.5


def test_class_guidance_by_a_guided_classifier():
    """The networks of the class-conditional setting together: each step's gradient is the classifier's at its sample."""
    classifier = GuidedClassifier(
        image_size=16,
        out_channels=10,
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
    ).eval()
    unet = GuidedUNet(
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_heads=2,
        num_classes=10,
    ).eval()
    for network in (classifier, unet):
        recipe.fill(network)
    image, mask = recipe.image("guided", 1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    run = {"seeds": [1, 2], "schedule": Schedule.plain(4), "labels": 3}
    gradient = samplers.classifier_guidance(classifier, 2.0)
    asked = []

    def guidance(x, t, y):
        asked.append((x.clone(), t, y, gradient(x, t, y)))
        return asked[-1][-1]

    guided = samplers.repaint(unet, image, mask, guidance=guidance, **run)
    assert not torch.equal(guided, samplers.repaint(unet, image, mask, **run))
    assert [t.tolist() for _, t, _, _ in asked] == [[n, n] for n in (999, 666, 333, 0)]
    for x, t, y, found in asked:
        # By differences in float64: along the gradient the class's log probability grows by the gradient's length.
        exact, along = classifier.double(), found.double() / found.norm()
        ahead, behind = (
            exact(x.double() + d * along, t).log_softmax(1).gather(1, y[:, None]).sum() for d in (1e-4, -1e-4)
        )
        assert (ahead - behind).item() / 2e-4 == pytest.approx(found.norm().item() / 2, rel=1e-3)
        classifier.float()
    assert all(p.grad is None for network in (classifier, unet) for p in network.parameters())

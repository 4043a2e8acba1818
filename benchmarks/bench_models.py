"""Whole networks: the untouched model, other engines that run it (`peers.py`), and the accelerated one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import inpaintrt
from inpaintrt import models
from inpaintrt.models.ipt_tiles import tiled
from inpaintrt.runtime.spec import Cost, as_outputs
from inpaintrt.samplers import Schedule, draws, repaint
from inpaintrt.testing import recipe
from inpaintrt.testing.compare import flat_tensors
from inpaintrt.testing.memory import in_fresh_process

SMOKE = (128, 128)
BF16 = 0.1
"""Relative RMS from float32 allowed to whole networks in bfloat16: with these weights big-lama is at 0.04 in any engine."""


@dataclass(frozen=True)
class Case:
    """A network and what it is measured on.

    make: the network. size: height and width. rounds: None = what the time budget allows. group: of geometric means.
    tolerance: relative RMS allowed to ours in float32. smoke: the network of a smoke run, where one has a single size.
    """

    make: Callable[[], nn.Module]
    size: tuple[int, int]
    rounds: int | None = 4
    group: str = ""
    tolerance: float = 2e-5
    smoke: Callable[[], nn.Module] | None = None


def lama_mini() -> nn.Module:
    return inpaintrt.load("lama_mini")


def big_lama() -> nn.Module:
    """big-lama's shape with recipe weights: its time does not depend on their values."""
    return recipe.fill(models.create("lama", n_blocks=18, base_width=64))


def with_recipe_weights(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return recipe.fill(models.create(name))

    return make


class Drawn(nn.Module):
    """A network with its random vector drawn once, so that two of its calls can be compared."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.network_input = network, network.network_input
        self.register_buffer("z", 2 * recipe.image("z", 1, network.z_length) - 1)

    def forward(self, x: Tensor) -> Any:
        return self.network(x, z=self.z)


def comodgan(size: int = 512) -> nn.Module:
    """With stored noise: what is drawn could not be compared."""
    return Drawn(recipe.fill(models.create("comodgan", port="migan", size=size)))


def migan(size: int = 512) -> nn.Module:
    """Recipe weights, but filters of changes of size as they are: they are parameters there."""
    network = models.create("migan", size=size)
    filters = {name: t.clone() for name, t in network.state_dict().items() if name.endswith("filter.weight")}
    recipe.fill(network).load_state_dict(filters, strict=False)
    return network


class AtStep(nn.Module):
    """A diffusion UNet at one timestep of its schedule, called with the image alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("t", torch.tensor([500]))

    def network_input(self, image: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask != 0, recipe.image("noise", *image.shape), image) * 2 - 1

    def forward(self, x: Tensor) -> Any:
        return self.network(x, self.t)


def guided_unet(width: int = 128) -> nn.Module:
    """guided-diffusion's UNet as it is made for 64 pixels, 64-channel heads at 16 and 8 of them."""
    options = {"channel_mult": (1, 2, 3, 4), "attention_resolutions": (4, 8), "num_head_channels": width // 2}
    return AtStep(recipe.fill(models.create("guided_unet", model_channels=width, **options)))


BIG_LAMA = {
    "big_lama": Case(big_lama, (512, 512), group="big_lama"),
    "big_lama_256": Case(big_lama, (256, 256), group="big_lama"),
    "big_lama_1024": Case(big_lama, (1024, 1024), rounds=2, group="big_lama"),
    "big_lama_crop": Case(big_lama, (456, 560), group="big_lama"),  # around a hole: 57×70 at the bottleneck
}
CASES = {"lama_mini": Case(lama_mini, (400, 600), rounds=None)} | BIG_LAMA
CASES |= {
    name: Case(with_recipe_weights(name), (512, 512), group=name)
    for name in ("deepfill_v1", "deepfill_v2", "glcic", "partialconv_unet")
}
# Its gates are normalised over the image, which amplifies rounding: torch's own channels-last result is 4e-5 away.
CASES["aotgan"] = Case(with_recipe_weights("aotgan"), (512, 512), group="aotgan", tolerance=1e-4)

CASES |= {
    make.__name__: Case(make, (512, 512), group=make.__name__, smoke=functools.partial(make, SMOKE[0]))
    for make in (comodgan, migan)
}
# One call of the hundreds that make an image.
CASES["guided_unet"] = Case(
    guided_unet, (64, 64), rounds=None, group="guided_unet", smoke=functools.partial(guided_unet, 32)
)


def masked_photo(model: Any, height: int, width: int) -> tuple[Tensor, ...]:
    """What the model takes: an image with a rectangular hole, and the mask (1 = hole), in one tensor or in several."""
    image = recipe.image("photo", 1, 3, height, width)
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 4 : height // 2, width // 3 : 2 * width // 3] = 1
    x, *rest = as_outputs(model.network_input(image, mask))
    return x, *(valid.expand_as(x).contiguous() for valid in rest)  # ports give masks with all channels


def cost(model: nn.Module, inputs: tuple[Tensor, ...]) -> Cost:
    """Flops of the convolutions as written (Winograd transforms need fewer); bytes of weights, input and output."""
    with FlopCounterMode(display=False) as counter:
        outputs = flat_tensors(model(*inputs))
    moved = sum(t.nbytes for t in (*model.parameters(), *inputs, *outputs))
    return Cost(counter.get_total_flops(), moved)


def plain(call: Callable[[], Any]) -> Any:
    """Without any kernel of ours: our DeepFill calls the attention op, whose reference is as fast as the ports' code."""
    with inpaintrt.use_backend("reference"):
        return call()


def once(versus: Any, name: str) -> Case:
    """The case; in a smoke run, where all sizes are one, only the first of a network."""
    case = CASES[name]
    first = next(n for n, other in CASES.items() if other.make is case.make)
    if versus.smoke and name != first:
        versus.skip_timing()
        pytest.skip(f"a smoke run of {name} is that of {first}")
    return case


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_model(versus, device, baselines, peers, wanted_peers, ported, name):
    case = once(versus, name)
    original = ((versus.smoke and case.smoke) or case.make)().eval().to(device)
    accelerated = inpaintrt.accelerate(copy.deepcopy(original))
    inputs = tuple(t.to(device) for t in masked_photo(original, *(SMOKE if versus.smoke else case.size)))
    candidates = {"eager": lambda: plain(lambda: original(*inputs)), "inpaintrt": lambda: accelerated(*inputs)}
    eager = ["eager"]
    if name == "partialconv_unet":  # our reference sums masks in one plane, which no port does
        as_ported = baselines.with_mask_convolutions(original)
        eager = ["eager as ported"]
        candidates["eager as ported"] = lambda: [output[:, :3] for output in as_ported(*inputs)]
    builders = {"compile": lambda network, given: versus.compiled(network, *given, freezing=device.type == "cpu")}
    if device.type == "cpu":
        builders |= peers.PEERS
    others = other_engines(versus, peers, wanted_peers, builders, original, inputs, ported=ported)
    versus(
        candidates | others.candidates,
        tolerances=dict.fromkeys(others.candidates, peers.SAME_NUMBERS) | {"inpaintrt": case.tolerance},
        cost=cost(original, inputs), rounds=case.rounds, device=device, shape=inputs[0].shape, model=name, notes=others.notes,
        group=f"{case.group} fp32", means=compared(case, eager, [*others.candidates]),
    )  # fmt: skip


MAT_HOLES = ("box 15 %", "strokes 20 %", "box 60 %")


def mat_hole(kind: str, side: int) -> Tensor:
    """(1, 1, side, side), 1 = hole: a box off the centre, or slanted strokes over the whole image."""
    share, mask = int(kind.split()[1]) / 100, torch.zeros(1, 1, side, side)
    if kind.startswith("strokes"):
        y, x = torch.arange(side)[:, None], torch.arange(side)
        return ((x + 2 * y) % (side // 2) < share * (side // 2)).float().expand_as(mask).contiguous()
    edge = round(side * share**0.5)
    mask[..., (side - edge) // 3 :, (side - edge) // 2 :][..., :edge, :edge] = 1
    return mask


@pytest.mark.parametrize("hole", MAT_HOLES)
@torch.no_grad()
def test_mat(versus, device, hole):
    """MAT at 512 px, whose work depends on the hole where the caller composites. All draws come from one seed."""
    if versus.smoke and hole != MAT_HOLES[0]:
        versus.skip_timing()
        pytest.skip(f"a smoke run is that of {MAT_HOLES[0]}")
    side = 128 if versus.smoke else 512
    original = recipe.fill(models.create("mat", resolution=side)).eval().to(device)
    everywhere = inpaintrt.accelerate(copy.deepcopy(original))
    composited = inpaintrt.accelerate(copy.deepcopy(original), composited=True)
    image, mask = recipe.image("photo", 1, 3, side, side).to(device), mat_hole(hole, side).to(device)
    candidates = {
        name: lambda network=network: network.inpaint(image, mask, seed=0)
        for name, network in (
            ("eager", original), ("inpaintrt, all pixels", everywhere), ("inpaintrt", composited),
        )
    }  # fmt: skip
    known = original.network_input(image, mask)
    versus(
        candidates, cost=cost(original, (*known, torch.zeros(1, original.z_dim, device=device))), rounds=2, device=device,
        shape=image.shape, model=f"mat, {hole}", group="mat fp32",
        means={"eager": ["eager"], "all pixels": ["inpaintrt, all pixels"]},
    )  # fmt: skip


SAME_IMAGE = 1e-3
"""Relative RMS allowed to an image at the end of a chain of calls, each of which takes the rounding of the one before."""


@torch.no_grad()
def test_repaint(versus, device):
    """RePaint's loop with the same noises: the public code's order of steps in eager, and ours; and with noise that is drawn."""
    case = CASES["guided_unet"]
    original = ((versus.smoke and case.smoke) or case.make)().network.eval().to(device)
    accelerated = inpaintrt.accelerate(copy.deepcopy(original))
    steps, jump = (4, 2) if versus.smoke else (50, 5)
    schedule = Schedule.repaint(steps, jump_length=jump, resampling=3)
    height, width = (16, 16) if versus.smoke else case.size
    image, mask = recipe.image("photo", 1, 3, height, width).to(device), mat_hole("box 15 %", height).to(device)
    noises = torch.randn(draws(schedule), *image.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def run(network: nn.Module, **noise: Any) -> Tensor:
        return repaint(network, image, mask, schedule=schedule, **noise)

    candidates = {
        "eager": lambda: plain(lambda: run(original, noises=noises)),
        "inpaintrt": lambda: run(accelerated, noises=noises),
        "inpaintrt, noise drawn": lambda: run(accelerated, seeds=1),
    }
    versus(
        candidates, tolerances={"inpaintrt": SAME_IMAGE, "inpaintrt, noise drawn": math.inf}, rounds=1, device=device,
        shape=image.shape, model=f"repaint, {len(schedule.calls)} calls", group="repaint fp32", means={"eager": ["eager"]},
    )  # fmt: skip


@pytest.mark.parametrize(("size", "layers"), [((96, 96), 4), ((100, 130), 4), ((96, 96), 12)])
@torch.no_grad()
def test_ipt(versus, device, size, layers):
    """IPT's width with 4 + 4 layers, or all 12 + 12, an image: the public order of work in eager, and every patch once."""
    tasks, small = ("denoise",), {"features": 4, "heads": 2, "layers": 1, "patch": 24}
    original = recipe.fill(models.create("ipt", tasks=tasks, **(small if versus.smoke else {"layers": layers})))
    original.head[0][0].weight.mul_(2.0**-6)  # values are up to 255: attention would single out tokens otherwise
    original.requires_grad_(False).to(device)
    in_float32 = inpaintrt.accelerate(copy.deepcopy(original))
    in_bf16 = inpaintrt.accelerate(copy.deepcopy(original), precision="bf16")
    height, width = (30, 37) if versus.smoke else size
    x = (recipe.image("photo", 1, 3, height, width) * 255).to(device)
    candidates = {
        "eager": lambda: original.forward_chop(x),
        "eager, patches once": lambda: original.tiled(x),
        "inpaintrt bf16": lambda: in_bf16.tiled(x),
        "inpaintrt": lambda: in_float32.tiled(x),
    }
    patch = x[..., : original.patch, : original.patch]
    patches = ((height - original.patch + 11) // 12 + 1) * ((width - original.patch + 11) // 12 + 1)
    others = {}
    if device.type == "cuda" and not versus.smoke:  # all patches at once, so that one shape is all there is
        fast = versus.compiled_form(lambda given: original(given), patch.expand(patches, -1, -1, -1).contiguous())
        others["compile"] = lambda: tiled(fast, x, original.patch, 1)
    with FlopCounterMode(display=False) as counter:
        original(patch)
    needed = Cost(counter.get_total_flops() * patches, sum(p.nbytes for p in original.parameters()))
    versus(
        candidates | others,
        tolerances={"inpaintrt bf16": BF16}, cost=needed, rounds=2, device=device, shape=x.shape,
        model=f"ipt, {layers} + {layers} layers", group=f"ipt-{layers} fp32",
        means={name: [name] for name in ("eager", *others)},
    )  # fmt: skip


@pytest.mark.parametrize("name", BIG_LAMA)
@torch.no_grad()
def test_bf16(versus, device, peers, wanted_peers, ported, name):
    """Convolutions in bfloat16, against what else runs so, and against ourselves in float32."""
    case = once(versus, name)
    original = case.make().eval().to(device)
    (x,) = (t.to(device) for t in masked_photo(original, *(SMOKE if versus.smoke else case.size)))
    in_float32 = inpaintrt.accelerate(copy.deepcopy(original))
    in_bf16 = inpaintrt.accelerate(copy.deepcopy(original), precision="bf16")

    def autocast() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return original(x).float()

    candidates = {
        "eager": lambda: original(x),
        "eager autocast": autocast,
        "inpaintrt fp32": lambda: in_float32(x),
        "inpaintrt": lambda: in_bf16(x).float(),
    }
    builders = peers.PEERS_BF16 if device.type == "cpu" else {}
    others = other_engines(versus, peers, wanted_peers, builders, original, (x,), ported=ported, tolerance=BF16)
    versus(
        candidates | others.candidates,
        tolerances=dict.fromkeys(("eager autocast", "inpaintrt", *others.candidates), BF16),
        cost=cost(original, (x,)), rounds=case.rounds, device=device, dtype=torch.bfloat16, shape=x.shape, model=name,
        notes=others.notes, group=f"{case.group} bf16",
        means={form: [form] for form in ("inpaintrt fp32", "eager", "eager autocast", *others.candidates)},
    )  # fmt: skip


def other_engines(versus, peers, wanted, builders, network, inputs, **options):
    """The peers that are asked for and can run the network; none in a smoke run."""
    wanted_builders = {} if versus.smoke else {name: build for name, build in builders.items() if wanted(name)}
    if not wanted_builders:
        return peers.Found()
    expected = plain(lambda: network(*inputs))
    found = peers.prepare(wanted_builders, network, inputs, expected, **options)
    versus.setup_seconds.update(found.seconds)
    return found


def compared(case: Case, eager: list[str], others: list[str]) -> dict[str, list[str]]:
    """What to take geometric means of: eager, the fastest peer, and each peer where a network has several sizes."""
    if not case.group:
        return {}
    means = {"eager": eager} | ({"the fastest peer": others} if others else {})
    return means | ({name: [name] for name in others} if case.group == "big_lama" else {})


def steady(name: str, accelerated: bool, height: int, width: int):
    """Seconds per call, after two calls, in a process that ran nothing else: what a program with one model sees."""
    import time

    import torch

    import inpaintrt
    from inpaintrt.testing import recipe

    torch.set_grad_enabled(False)
    model = inpaintrt.load(name) if name == "lama_mini" else recipe.fill(inpaintrt.models.create(name))
    if accelerated:
        inpaintrt.accelerate(model)
    image, mask = recipe.image("photo", 1, 3, height, width), torch.zeros(1, 1, height, width)
    mask[..., height // 4 : height // 2, width // 3 : 2 * width // 3] = 1
    given = model.network_input(image, mask)
    x = (given,) if isinstance(given, torch.Tensor) else tuple(given)
    times = []
    with inpaintrt.use_backend("auto" if accelerated else "reference"):  # our networks call some ops themselves
        for _ in range(7):
            start = time.perf_counter()
            model(*x)
            times.append(time.perf_counter() - start)
    return times[2:]


ALONE = {
    "lama_mini": ("lama_mini", (400, 600)),
    "lama_256": ("lama", (256, 256)),
    "lama_crop": ("lama", (456, 560)),
    "lama_1024": ("lama", (1024, 1024)),
    **{
        name: (name, (512, 512))
        for name in ("lama", "deepfill_v1", "deepfill_v2", "glcic", "partialconv_unet", "aotgan")
    },
}
"""Networks, by the names that `load` and `create` know, and the size of their images."""


@pytest.mark.parametrize("case", ALONE)
def test_own_process(versus, case):
    """As above, but each candidate alone in fresh processes, in turn.

    In one process the candidates share the allocator's heap: what `accelerate`'s probe frees there spares the eager
    model the page faults of its large intermediates, which a program without inpaintrt pays on every call.
    """
    name, size = ALONE[case]
    if versus.smoke:
        size = SMOKE
        in_fresh_process(steady, "lama_mini", True, *size)
        versus.skip_timing()
        return
    times: dict[str, list[float]] = {"eager": [], "inpaintrt": []}
    for pair in range(4):
        for candidate in ("eager", "inpaintrt") if pair % 2 == 0 else ("inpaintrt", "eager"):
            times[candidate] += in_fresh_process(steady, name, candidate == "inpaintrt", *size)[:4]
    versus.record(times, baseline="eager", shape=(1, 4, *size), model=name, notes=["each candidate in its own process"])

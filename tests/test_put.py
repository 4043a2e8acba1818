"""PUT against the public implementation's numbers: codec, transformer, and tokens for given random numbers."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import inpaintrt as irt
from inpaintrt import models
from inpaintrt.models.put import PUT
from inpaintrt.models.put_codec import IMAGENET, PVQVAE
from inpaintrt.models.put_sampling import Tokens
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import assert_close_to_truth, recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"
SMALL: dict[str, Any] = {
    "width": 32, "channels": 48, "outputs": 40, "blocks": 3, "decoder_channels": 48, "decoder_blocks": 2,
}  # fmt: skip
GRID = (8, 12)


def codec_like(generation: str) -> PVQVAE:
    if generation == "cvpr":
        return PVQVAE(codes=96, split=64, **SMALL)
    return PVQVAE(codes=160, split=128, blocks_per_scale=2, pixels=IMAGENET, composite=True, **SMALL)


def model_like(generation: str, **options: Any) -> PUT:
    return PUT(
        codec_like(generation),
        generation=generation,
        **{"layers": 3, "width": 64, "heads": 4, "grid": GRID} | options,
    )


def _case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


def _filled(module: torch.nn.Module, weights: dict[str, Any]) -> Any:
    """Recipe weights with the changes of a golden case."""
    state = recipe.fill(module.eval()).state_dict()
    assert not weights["set_after_fill"]
    with torch.no_grad():
        for key in weights["buffers_filled"]:
            state[key].copy_(recipe.tensor_for(key, tuple(state[key].shape)))
        for key, factor in weights["scale_after_fill"].items():
            state[key].mul_(factor)
    return module


def _image(tag: str) -> Tensor:
    coarse = recipe.image(f"{tag}/image/coarse", 2, 3, *GRID).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (recipe.image(f"{tag}/image", 2, 3, 64, 96) * 0.25 + coarse * 0.75) * 255


def _mask(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["mask_in"].bool().unsqueeze(1)


def _stored(case: dict[str, Any], key: str, whole: Tensor) -> Tensor:
    """The part of a whole result that the case stores as `key`."""
    steps = re.findall(r":(?:(\d+))?", case["tensors"][key].get("slice", ":").replace("::", ":").replace(" ", ""))
    return whole[tuple(slice(None, None, int(step or 1)) for step in steps)]


def _agrees(
    case: dict[str, Any], tensors: dict[str, Tensor], key: str, actual: Tensor, exact: Tensor, deep: bool = False
) -> None:
    """Float64 of ours is the public code's float64; our float32 is as accurate as theirs."""
    truth = key.replace("out", "out64", 1)
    if truth != key and truth in tensors:
        ours = _stored(case, truth, exact)
        assert (ours - tensors[truth]).abs().max() <= 1e-9 * tensors[truth].abs().max().clamp(min=1)
    ours, exact = _stored(case, key, actual), _stored(case, key, exact)
    if deep:  # through many layers, equally accurate results differ by chance: docs/numerics.md, "End to end"
        assert (ours - exact).square().mean().sqrt() <= 2e-5 * exact.square().mean().sqrt()
        return
    assert_close_to_truth(ours, exact, tensors[key], context=key)


# ---- the codec ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["cvpr", "tpami"])
@torch.no_grad()
def test_codec_against_the_public_one(generation: str) -> None:
    case, tensors = _case(f"put_codec_{generation}")
    codec = _filled(codec_like(generation), case["weights"])
    state = {key: list(t.shape) for key, t in codec.state_dict().items()}
    assert state == {key: entry["shape"] for key, entry in case["state_dict"].items()}
    double = _filled(codec_like(generation), case["weights"]).double()
    image, mask = _image(f"put_c{generation[0]}"), _mask(tensors)

    share = codec.known_share(mask)
    assert torch.equal(share, tensors["unmask_ratio"])
    z, exact = (m.encode((image * mask).to(m.quant_conv.weight.dtype)) for m in (codec, double))
    _agrees(case, tensors, "out_feature", z, exact)
    tokens = codec.quantize(z, share == 1)
    assert torch.equal(tokens, tensors["token_masked"].long())
    whole, exact_whole = (m.encode(image.to(m.quant_conv.weight.dtype)) for m in (codec, double))
    _agrees(case, tensors, "out_feature_unmasked", whole, exact_whole)
    every = torch.ones_like(share, dtype=torch.bool)
    assert torch.equal(codec.quantize(whole, every), tensors["token_unmasked"].long())
    assert torch.equal(codec.quantize(whole, share == 1), tensors["token_erase"].long())

    floats = mask.float()
    for i, (ours, true) in enumerate(
        zip(
            codec.decoder.encoder(codec.pixels.normalise(image * mask)),
            double.decoder.encoder(codec.pixels.normalise((image * mask).double())),
            strict=True,
        )
    ):
        _agrees(case, tensors, f"mid_ref_{i}", ours, true)
    raw = codec.decoder(codec.features(tokens), codec.pixels.normalise(image * mask), floats)
    true = double.decoder(double.features(tokens), codec.pixels.normalise((image * mask).double()), floats.double())
    _agrees(case, tensors, "out_decoder_raw", raw, true, deep=True)
    out, true = codec.decode(tokens, image * mask, mask), double.decode(tokens, (image * mask).double(), mask)
    _agrees(case, tensors, "out_decode", out, true, deep=True)


# ---- the transformer ------------------------------------------------------------------------------------------------

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "cvpr": {},
    "cvpr_gelu": {"layers": 2, "activation": "GELU"},
    "tpami": {},
    "tpami_nobias": {"layers": 2, "heads": 2, "qkv_bias": False},
}


@pytest.mark.parametrize("tag", TRANSFORMERS)
@torch.no_grad()
def test_logits_against_the_public_ones(tag: str) -> None:
    case, tensors = _case("put_transformer_logits")
    model, double = (
        _filled(model_like(tag.split("_")[0], **TRANSFORMERS[tag]), case["weights"][tag]) for _ in range(2)
    )
    double.double()
    own = {key: list(t.shape) for key, t in model.state_dict().items() if not key.startswith("content_codec.")}
    public = {k.removeprefix(f"{tag}:"): e["shape"] for k, e in case["state_dict"].items() if k.startswith(f"{tag}:")}
    assert own == public
    shape = (2, 96, 64) if tag.startswith("cvpr") else (2, 8, 12, 64)
    x = (recipe.image(f"put_tl/emb_{tag}", *shape) * 4 - 2).view(2, 96, 64)
    got, exact = model.logits(x), double.logits(x.double())
    rows = torch.stack((torch.arange(5, 60, 7), torch.arange(8).flip(0)))
    some = model.logits(x, rows)
    assert_close_to_truth(some, exact.gather(1, rows[..., None].expand(-1, -1, exact.shape[2])),
                          got.gather(1, rows[..., None].expand(-1, -1, exact.shape[2])), context="some rows")  # fmt: skip
    if tag.startswith("tpami"):
        got, exact = got.unflatten(1, GRID), exact.unflatten(1, GRID)
    _agrees(case, tensors, f"out_{tag}", got, exact)


# ---- sampling -------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, tuple[Any, ...]]] = {
    "cvpr": {
        "greedy_1": (1, 1.0, 1), "greedy_20": (1, 1.0, 20), "greedy_all": (1, 1.0, 0), "top5_1": (5, 1.0, 1),
        "top5_7": (5, 1.0, 7), "top50_all": (50, 1.0, 0), "ratio_half_20_t2": (0.5, 2.0, 20),
        "raster_top5": (5, 1.0, 1, True),
    },
    "tpami": {
        "greedy_1": (1, 1.0, 1), "greedy_20": (1, 1.0, 20), "greedy_all": (1, 1.0, 0), "top20_20": (20, 1.0, 20),
        "top20_7": (20, 1.0, 7), "default_c": (0.8, 1.0, None), "raster_20": (20, 1.0, 20, True),
        "cosine_4": (20, 1.0, "cosine_4"), "linear-1_5": (20, 1.0, "linear-1_5"),
    },
}  # fmt: skip


def _public_draws(tag: str, run: str) -> Any:
    def draw(step: int, samples: list[int], rows: int, classes: int) -> Tensor:
        u = recipe.image(f"{tag}/{run}/u{step}", len(samples) * rows, classes).double()
        return -torch.log1p(-(u + 2**-25)).view(len(samples), rows, classes)

    return draw


def _walk_draws(public: Any, unknown: Tensor) -> Any:
    """The walk of the CVPR code visits each place that is unknown in any sample, and draws for all samples there."""
    visits = unknown.any(0).long().cumsum(0) - 1
    calls = [visits[one].tolist() for one in unknown]

    def draw(step: int, samples: list[int], rows: int, classes: int) -> Tensor:
        return torch.stack([public(calls[b][step], range(len(calls)), 1, classes)[b] for b in samples])

    return draw


@pytest.mark.parametrize(("generation", "run"), [(g, run) for g, runs in RUNS.items() for run in runs])
@torch.no_grad()
def test_tokens_for_the_same_draws(generation: str, run: str) -> None:
    case, tensors = _case(f"put_sample_{generation}")
    model = _filled(model_like(generation), case["weights"])
    assert {k: list(t.shape) for k, t in model.state_dict().items()} == {
        k: e["shape"] for k, e in case["state_dict"].items()
    }
    tag, (top_k, temperature, each, *raster) = f"put_s{generation[0]}", RUNS[generation][run]
    image, mask, seen = _image(tag), _mask(tensors), []
    options: dict[str, Any] = {"top_k": top_k, "temperature": temperature, "tokens_per_step": each}
    options["raster_order"] = bool(raster)
    draws = _public_draws(tag, run)
    if raster and generation == "cvpr":
        draws = _walk_draws(draws, model.content_codec.known_share(mask).flatten(1) < 1)
    tokens, order = model.sample(image, mask, draws=draws, progress=lambda *at: seen.append(at), **options)
    assert torch.equal(tokens, tensors[f"token_{run}"].long())
    if f"order_{run}" in tensors:
        assert torch.equal(order, tensors[f"order_{run}"].long())
    assert seen == [(i + 1, len(seen)) for i in range(int(order.max()))]
    exact = model.double().content_codec.decode(tokens, (image * mask).double(), mask)
    out = model.float().complete(image, mask, draws=draws, **options)
    _agrees(case, tensors, f"out_{run}", out, exact, deep=True)
    fused, again = irt.accelerate(model).sample(image, mask, draws=draws, **options)
    assert torch.equal(fused, tokens)
    assert torch.equal(again, order)


@pytest.fixture(scope="module", params=["cvpr", "tpami"])
def small(request: pytest.FixtureRequest) -> PUT:
    case, _ = _case(f"put_sample_{request.param}")
    return _filled(model_like(request.param), case["weights"])  # type: ignore[no-any-return]


def _masks(*kinds: str) -> Tensor:
    mask = torch.ones(len(kinds), 1, 64, 96, dtype=torch.bool)
    for one, kind in zip(mask, kinds, strict=True):
        if kind == "hole":
            one[:, 11:47, 20:70] = False
        elif kind == "unknown":
            one[:] = False
    return mask


def test_a_batch_may_hold_images_without_holes_and_without_known_patches(small: PUT) -> None:
    image = _image("put_sc")[[0, 1, 0]]
    tokens, order = small.sample(image, _masks("whole", "hole", "unknown"), seeds=[1, 2, 3])
    chosen = (order > 0).sum((1, 2)).tolist()
    assert chosen[0] == 0
    assert 0 < chosen[1] < 96
    assert chosen[2] == 96
    for i, kind in enumerate(("whole", "hole", "unknown")):  # what becomes of a sample is its own affair
        alone, _ = small.sample(image[i : i + 1], _masks(kind), seeds=[i + 1])
        assert torch.equal(alone[0], tokens[i])
    empty, _ = small.sample(image[:0], _masks())
    assert empty.shape == (0, 8, 12)


def test_several_results_of_one_image_differ_and_repeat(small: PUT) -> None:
    image, mask = _image("put_sc")[:1], _masks("hole")
    options: dict[str, Any] = {"results": 3, "top_k": 30, "tokens_per_step": 9}
    first = small.complete(image, mask, seeds=[7, 8, 9], **options)
    assert first.shape == (3, 3, 64, 96)
    assert not torch.equal(first[0], first[1])
    again = small.complete(image, mask, seeds=[9, 7, 8], **options)
    torch.testing.assert_close(again[[1, 2, 0]], first)
    torch.testing.assert_close(small(image, mask, seed=3), small.complete(image, mask, seeds=[3]))


def test_the_model_stays_in_eval_mode_and_gradients_are_not_kept(small: PUT) -> None:
    out = small.complete(_image("put_sc")[:1], _masks("hole"), top_k=5)
    assert not small.training
    assert not out.requires_grad


def test_a_last_pass_that_is_the_first_ranks_its_draws_too() -> None:
    """The CVPR code draws by rank as long as a pass chooses a number of tokens, however few are left."""
    case, _ = _case("put_sample_cvpr")
    model, asked = _filled(model_like("cvpr"), case["weights"]), []

    def draws(step: int, samples: list[int], rows: int, classes: int) -> Tensor:
        asked.append(rows)
        return torch.ones(len(samples), rows, classes)

    _, order = model.sample(_image("put_sc")[:1], _masks("hole"), tokens_per_step=50, draws=draws, top_k=5)
    assert asked == [int((order > 0).sum())]


def test_known_tokens_are_the_same_under_autocast(small: PUT) -> None:
    image, mask = _image("put_sc"), _masks("hole", "whole")
    exact, order = small.sample(image, mask, seeds=[1, 2], top_k=5)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = small.sample(image, mask, seeds=[1, 2], top_k=5)
    assert torch.equal(tokens[order == 0], exact[order == 0])


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("many", [9, 50])  # of 35 unknown ones, or 96: some, and more than a sample has
def test_a_pass_can_be_captured_and_replayed(small: PUT, accelerated: bool, many: int) -> None:
    """A trace holds what a CUDA graph would: operations on the same tensors, with nothing that the host read of one image."""
    model = irt.accelerate(copy.deepcopy(small)) if accelerated else small
    classes = model.to_logits.out_features
    draws = [recipe.image(f"put_draw_{i}", 2, many, classes) + 0.01 for i in range(2)]
    states = [model.begin(_image(tag), _masks(*kinds)) for tag, kinds in
              (("put_sc", ("hole", "hole")), ("put_l", ("hole", "unknown")), ("put_l", ("unknown", "hole")))]  # fmt: skip
    unknown = int((~states[1].known).sum(1).max())

    def run(embedded: Tensor, codes: Tensor, order: Tensor, known: Tensor, table: Tensor, drawn: Tensor) -> None:
        state = Tokens(embedded, codes, order, known, table)
        model.step(state, drawn, number=3, many=many, unknown=unknown, keep=5)

    with torch.no_grad():
        recorded = make_fx(run, _error_on_data_dependent_ops=True)(*_copies(states[0]), draws[0])
    for state in states:
        for drawn in draws:
            ours, expected = _copies(state), _copies(state)
            recorded(*ours, drawn)
            run(*expected, drawn)
            assert int((expected[2] == 3).sum()) > many
            for made, wanted in zip(ours, expected, strict=True):
                assert torch.equal(made, wanted)


def _copies(state: Tokens) -> tuple[Tensor, ...]:
    return tuple(getattr(state, field.name).clone() for field in dataclasses.fields(state))


class _Waits(TorchFunctionMode):
    """Notes what would wait for a GPU: values read by the host, and numbers that it copies there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        written = name == "__setitem__" and not isinstance(args[2], Tensor)
        if written or name in ("tensor", "tolist", "item", "cpu", "numpy", "__bool__", "__int__", "nonzero"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once(small: PUT) -> None:
    """At the masks; also where samples are done at different times, and while the result is decoded."""
    image, mask = _image("put_sc")[[0, 1, 0]], _masks("whole", "hole", "unknown")
    draws = recipe.image("waits", 3, 96, small.to_logits.out_features) + 0.01
    with _Waits() as waits:
        small.complete(image, mask, tokens_per_step=20, top_k=5, draws=lambda i, b, rows, _: draws[: len(b), :rows])
    assert waits.seen == ["tolist"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64])
def test_masks_are_of_any_dtype(small: PUT, dtype: torch.dtype) -> None:
    image, mask = _image("put_sc")[:1], _masks("hole")
    expected, made = (small.complete(image, m, seeds=[1], top_k=5) for m in (mask, mask.to(dtype)))
    assert torch.equal(made, expected)
    assert torch.equal(small.begin(image, mask.to(dtype)).known, small.begin(image, mask).known)


@pytest.mark.parametrize("call", ["sample", "complete", "begin"])
def test_masks_of_other_values_are_refused(small: PUT, call: str) -> None:
    image, mask = _image("put_sc")[:1], _masks("hole")
    count = int(mask.sum())
    for wrong, message in (
        (mask.to(torch.uint8) * 255, f"mask has {count} values such as 255; accepted: bool, or 1 = known and 0 = hole"),
        (mask * 0.5, f"mask has {count} values such as 0.5"),
        (torch.where(mask, 1.0, torch.nan), f"mask has {mask.numel() - count} values such as nan"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(small, call)(image, wrong)


def test_what_is_under_the_hole_is_not_read(small: PUT) -> None:
    image, mask = _image("put_sc")[:1], _masks("hole")
    expected = small.complete(image, mask, seeds=[1], top_k=5)
    for under in (torch.nan, torch.inf, 300.0):
        made = small.complete(torch.where(mask, image, under), mask.float(), seeds=[1], top_k=5)
        assert torch.equal(made, expected)


def test_seeds_may_be_a_tensor(small: PUT) -> None:
    image, mask = _image("put_sc"), _masks("hole", "hole")
    expected, _ = small.sample(image, mask, seeds=[3, -4], top_k=5)
    made, _ = small.sample(image, mask, seeds=torch.tensor([3, -4]), top_k=5)
    assert torch.equal(made, expected)
    alone, _ = small.sample(image[:1], mask[:1], seeds=3, top_k=5)
    assert torch.equal(alone[0], expected[0])


def _drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return lambda *asked: torch.ones(shape, dtype=dtype)


def test_wrong_arguments_are_named(small: PUT) -> None:
    image, mask = _image("put_sc"), _masks("hole", "whole")
    classes = small.to_logits.out_features
    for message, options in {
        "top_k is 1000": {"top_k": 1000},
        "top_k is -1": {"top_k": -1},
        "top_k is '5'; accepted: 0 to 1": {"top_k": "5"},
        r"top_k is 1\.5; accepted": {"top_k": 1.5},
        "top_k is True": {"top_k": True},
        "temperature is 0": {"temperature": 0.0, "top_k": 5},
        "temperature is '1'": {"temperature": "1", "top_k": 5},
        "seeds are 1": {"seeds": [1], "top_k": 5},
        "seeds are 2 together with draws": {"seeds": [1, 2], "draws": _drawn(1), "top_k": 5},
        r"seeds hold 1\.5; accepted: integers of 64 bits": {"seeds": [1, 1.5], "top_k": 5},
        r"seeds are \(2,\) torch.int32; accepted: int64": {"seeds": torch.zeros(2, dtype=torch.int32), "top_k": 5},
        "tokens_per_step is 'all'": {"tokens_per_step": "all", "top_k": 5},
        rf"draws are \(1, 1, {classes}\)": {"draws": _drawn(1, 1, classes), "top_k": 5},
        r"draws are \(1, 20, 7\) .*; accepted: \(1, ": {"draws": _drawn(1, 20, 7), "top_k": 5},
        r"draws are .* torch.int64": {
            "draws": _drawn(1, 96, classes, dtype=torch.int64),
            "tokens_per_step": 0,
            "top_k": 5,
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            small.sample(image, mask, **options)  # type: ignore[arg-type]
    for wrong in (image.double(), image.bfloat16(), image.byte()):
        with pytest.raises(
            ValueError, match=rf"image is \(2, 3, 64, 96\) {wrong.dtype} on cpu; accepted: .* torch.float32"
        ):
            small.sample(wrong, mask)
    with pytest.raises(ValueError, match=r"image is .* on meta; accepted: .* on cpu"):
        small.begin(image.to("meta"), mask)
    for results in (2.0, "2"):
        with pytest.raises(ValueError, match=f"results is {results!r}"):
            small.complete(image, mask, results=results)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"image is \(2, 3, 64, 64\)"):
        small.sample(image[..., :64], mask)
    with pytest.raises(ValueError, match="mask is"):
        small.sample(image, mask[:1])
    with pytest.raises(ValueError, match="results is 0"):
        small.complete(image, mask, results=0)
    with pytest.raises(ValueError, match="generation is 'x'"):
        PUT(generation="x")
    with pytest.raises(ValueError, match="patch is 12"):
        PVQVAE(patch=12)


def test_networks_that_cannot_be_are_named() -> None:
    small = {"codes": 24, "split": 16, "width": 8, "channels": 8, "outputs": 8, "decoder_channels": 8}
    for codec, message in (
        ({"split": 25}, "split is 25; accepted: 1 to 24"),
        ({"split": 0}, "split is 0; accepted: 1 to 24"),
        ({"codes": 0}, "split is 16; accepted: 1 to 0"),
        ({"channels": 0}, "channels 0"),
        ({"decoder_blocks": -1}, "decoder_blocks -1"),
    ):
        with pytest.raises(ValueError, match=message):
            PVQVAE(**small | codec)  # type: ignore[arg-type]
    for options, message in (
        ({"classes": 25}, "classes are 25; accepted: 1 to 24"),
        ({"classes": 0}, "classes are 0"),
        ({"layers": 0}, "layers are 0"),
        ({"width": 0}, "width is 0"),
        ({"heads": -2}, "heads -2"),
        ({"grid": (0, 4)}, r"grid is \(0, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            PUT(small, **{"layers": 1, "width": 16, "heads": 2} | options)  # type: ignore[arg-type]
    assert PUT(small | {"split": 24}, layers=1, width=16, heads=2).to_logits.out_features == 24


# ---- files and photos -----------------------------------------------------------------------------------------------

SQUARE = (8, 8)


@pytest.fixture(scope="module", params=["cvpr", "tpami"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PUT, pathlib.Path]:
    """A small network of 64 × 64 pixels, and its weights as the public trainer stores them."""
    width = {"cvpr": 64, "tpami": 128}[request.param]
    network = recipe.fill(
        model_like(request.param, width=width, heads={"cvpr": 8, "tpami": 2}[request.param], grid=SQUARE)
    )
    path = tmp_path_factory.mktemp("put") / "last.pth"
    torch.save({"last_epoch": 3, "model": network.state_dict()}, path)
    return network, path


def test_weights_say_what_network_they_are_of(file: tuple[PUT, pathlib.Path]) -> None:
    network, path = file
    loaded = models.load("put", path, pixels="imagenet", composite=True)
    assert (loaded.generation, loaded.grid, loaded.only_size) == (network.generation, SQUARE, (64, 64))
    assert not loaded.training
    image, mask = recipe.image("put_l", 1, 3, 64, 64) * 255, torch.ones(1, 1, 64, 64, dtype=torch.bool)
    mask[:, :, 20:45, 9:50] = False
    network.content_codec.pixels, network.content_codec.composite = IMAGENET, True
    assert torch.equal(loaded.complete(image, mask, seeds=[5]), network.complete(image, mask, seeds=[5]))


def test_weights_that_do_not_fit_are_named(file: tuple[PUT, pathlib.Path], tmp_path: pathlib.Path) -> None:
    network, _ = file
    state = dict(network.state_dict())
    for change, message in (
        ({"pos_emb": state["pos_emb"][:, :60]}, "pos_emb is"),  # 7 × 8 places
        ({"to_logits.bias": None}, "'to_logits.bias' is missing"),
        ({"content_codec.quantize.embedding": state["content_codec.quantize.embedding"][:, :7]}, "shapes do not fit"),
        ({"emb_proj.weight": None}, "'emb_proj.weight' is missing"),
    ):
        torch.save({k: t for k, t in (state | change).items() if t is not None}, tmp_path / "bad.pth")
        with pytest.raises(WeightsError, match=message):
            models.load("put", tmp_path / "bad.pth")
    more = {
        f"to_logits.{key}": state[f"to_logits.{key}"].repeat(9, *[1] * (n - 1))
        for key, n in (("weight", 2), ("bias", 1))
    }
    torch.save(state | more, tmp_path / "more.pth")
    codes, classes = (len(state[key]) for key in ("content_codec.quantize.embedding", "to_logits.bias"))
    with pytest.raises(WeightsError, match=f"{9 * classes} logits for {codes} codes; accepted"):
        models.load("put", tmp_path / "more.pth")
    torch.save({k: t for k, t in state.items() if not k.startswith("content_codec")}, tmp_path / "half.pth")
    with pytest.raises(WeightsError, match="content_codec"):
        models.load("put", tmp_path / "half.pth")
    with pytest.raises(ValueError, match="pixels are 'bytes'"):
        models.load("put", file[1], pixels="bytes")


def test_inpaint_keeps_what_is_known(file: tuple[PUT, pathlib.Path]) -> None:
    network, _ = file
    image, hole = recipe.image("put_i", 2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    hole[0, :, 10:30, 10:40] = 1
    made = network.inpaint(image, hole, seed=4, tokens_per_step=3, top_k=5)
    known = (hole == 0).expand_as(image)
    assert torch.equal(made[known], image[known])
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    again = network.inpaint(torch.where(known, image, 0.5), hole, seed=4, tokens_per_step=3, top_k=5)
    assert torch.equal(again, made), "what lies under the hole was read"
    for whole in (torch.uint8, torch.int64):
        with pytest.raises(ValueError, match=rf"image is \(2, 3, 64, 64\) {whole}; accepted: .*floating in \[0, 1\]"):
            network.inpaint((image * 255).to(whole), hole)


def _photo_and_mask(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """90 × 130 pixels, as arrays and as files."""
    from PIL import Image

    photo = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    mask = np.zeros((90, 130), np.uint8)
    mask[30:60, 40:80] = 255
    Image.fromarray(photo).save(folder / "photo.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return photo, mask, [str(folder / name) for name in ("photo.png", "mask.png")]


def test_a_photo_larger_than_the_network_is_filled(file: tuple[PUT, pathlib.Path], tmp_path: pathlib.Path) -> None:
    from PIL import Image

    from inpaintrt import cli

    photo, mask, paths = _photo_and_mask(tmp_path)
    weights = ["--model", "put", "--weights", str(file[1])]
    assert cli.main(["fill", *paths, "-o", str(tmp_path / "out.png"), *weights]) == 0
    with Image.open(tmp_path / "out.png") as opened:
        made = np.asarray(opened)
    assert np.array_equal(made[mask == 0], photo[mask == 0])
    assert (made[mask > 0] != photo[mask > 0]).any()


def test_options_of_fill(
    file: tuple[PUT, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from inpaintrt import cli

    _, _, paths = _photo_and_mask(tmp_path)
    asked, sample = [], PUT.sample

    def noted(self: PUT, *args: Any, **given: Any) -> Any:
        asked.append((self.content_codec.pixels, self.content_codec.composite, given))
        return sample(self, *args, **given)

    monkeypatch.setattr(PUT, "sample", noted)

    def fill(*options: str) -> bytes:
        out = tmp_path / "out.png"
        command = ["fill", *paths, "-o", str(out), "--model", "put", "--weights", str(file[1]), "--overwrite", *options]
        assert cli.main(command) == 0, capsys.readouterr()
        return out.read_bytes()

    plain = fill()
    assert asked[-1][2] == {
        "tokens_per_step": 20, "raster_order": False, "top_k": None, "temperature": 1.0, "seeds": [0], "draws": None,
        "progress": None,
    }  # fmt: skip
    assert fill("--seed", "0") == plain
    options = ["pixels=imagenet", "composite=true", "tokens_per_step=cosine_4", "top_k=5", "temperature=0.5"]
    fill("--seed", "7", *(part for option in options for part in ("--option", option)))
    assert asked[-1][:2] == (IMAGENET, True)
    given = asked[-1][2]
    assert [given[k] for k in ("tokens_per_step", "top_k", "temperature", "seeds")] == ["cosine_4", 5, 0.5, [7]]
    fill("--option", "tokens_per_step=none", "--option", "grid=8,8", "--option", "seed=2")
    assert (asked[-1][2]["tokens_per_step"], asked[-1][2]["seeds"]) == (None, [2])

    done = len(asked)
    for options, message in (
        (["--option", "steps=3"], "option is 'steps'; accepted for PUT: seed, tokens_per_step, raster_order, top_k"),
        (["--option", "top_k=many"], "option top_k is 'many'; accepted: a number, none"),
        (["--option", "composite=1"], "option composite is 1; accepted: true or false"),
        (["--option", "top_k"], "option is 'top_k'; accepted: KEY=VALUE"),
        (["--option", "top_k=1", "--option", "top_k=2"], "option top_k is given more than once"),
        (["--option", "pixels=bytes"], "pixels are 'bytes'; accepted: 'imagenet'"),
        (["--option", "seed=1", "--seed", "2"], "are both given"),
        (["--option", "top_k=100000"], "top_k is 100000; accepted"),
    ):
        command = [
            "fill",
            *paths,
            "-o",
            str(tmp_path / "new.png"),
            "--model",
            "put",
            "--weights",
            str(file[1]),
            *options,
        ]
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new.png").exists()
    assert len(asked) == done + 1


@pytest.mark.parametrize("command", ["explain", "verify"])
def test_a_network_from_a_file_is_explained_and_verified(
    command: str, file: tuple[PUT, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from inpaintrt import cli

    assert cli.main([command, "--model", "put", "--weights", str(file[1])]) == 0, capsys.readouterr()
    assert cli.main([command, "--model", "put", "--weights", str(file[1]), "--size", "96x64"]) == 2
    assert "the network knows only 64x64" in capsys.readouterr().err

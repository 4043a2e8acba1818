"""Window attention against the public networks' numbers, and where "skip what is masked" goes wrong."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from inpaintrt import ops, use_backend
from inpaintrt.ops.window_attention import SPEC, from_windows, regions, windows
from inpaintrt.ops.window_mask_update import SPEC as UPDATE
from inpaintrt.runtime.errors import UnsupportedError
from inpaintrt.runtime.library import dispatchers
from inpaintrt.testing import assert_close_to_truth, recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"
KINDS = ("plain", "valid", "shift", "both")


def _device(backend: str) -> str:
    """Where this backend's tensors are: on a GPU if there is one and it runs there."""
    return "cuda" if torch.cuda.is_available() and backend in ("cuda", "cupy", "triton") else "cpu"


def _able(backend: str) -> bool:
    x = torch.ones(1, 2, 2, 2, device=_device(backend))
    args = SPEC.bind(x, x, x, window_size=2, num_heads=1)
    return backend == "reference" or not dispatchers[SPEC.name].reasons(args, x)[backend]


@pytest.fixture(params=[name for name in (*SPEC.lanes, "reference") if _able(name)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this machine has."""
    return str(request.param)


def run(backend: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    options = {n: o.to(_device(backend)) if isinstance(o, Tensor) else o for n, o in options.items()}
    with use_backend(backend, op=SPEC.name):
        return ops.window_attention(*(t.to(_device(backend)) for t in (q, k, v)), **options).cpu()


def update(backend: str, mask: Tensor, **options: Any) -> Tensor:
    if backend not in (*UPDATE.lanes, "reference"):
        pytest.skip(f"window_mask_update has no lane {backend}")
    with use_backend(backend, op=UPDATE.name):
        return ops.window_mask_update(mask.to(_device(backend)), **options).cpu()


def by_the_reference(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    options = {n: o.to(dtype) if isinstance(o, Tensor) else o for n, o in options.items()}
    return SPEC.run_reference(*SPEC.bind(q.to(dtype), k.to(dtype), v.to(dtype), **options))  # type: ignore[no-any-return]


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """By the tolerance rule; returns the result."""
    got = run(backend, q, k, v, **options)
    truth = by_the_reference(torch.float64, q, k, v, **options)
    assert_close_to_truth(got, truth, by_the_reference(torch.float32, q, k, v, **options), context=backend)
    return got


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(*shape: int, scale: float = 1.0) -> list[Tensor]:
    return [noise(*shape, seed=i) * (scale if i < 2 else 1.0) for i in range(3)]


# ---- golden cases: what the public networks computed ----------------------------------------------------------------


def _case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = GOLDEN / name
    return json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")


def _cut(full: Tensor, description: dict[str, Any]) -> Tensor:
    """The part of a tensor that was kept, such as "[:, ::3]"."""
    if "slice" not in description:
        return full
    fields = description["slice"].strip("[]").split(",")
    return full[tuple(slice(*(int(n) if n.strip() else None for n in field.split(":"))) for field in fields)]


def _compare(case: dict[str, Any], tensors: dict[str, Tensor], name: str, got: Tensor) -> None:
    """By the tolerance rule, with the public code's float32 and float64 numbers."""
    exact = tensors[name.replace("out", "out64", 1)]
    both = [case["tensors"][n] for n in (name, name.replace("out", "out64", 1))]
    if both[0].get("slice") == both[1].get("slice"):
        assert_close_to_truth(_cut(got, both[1]), exact, tensors[name], context=name)
        return
    recorded = case["upstream_fp32_vs_fp64"][name]
    error = _cut(got, both[1]).double() - exact
    band = 2 * torch.finfo(torch.float32).eps * recorded["max_abs_of_out64"]
    assert error.abs().max().item() <= 2 * recorded["max_abs"] + band
    assert error.square().mean().sqrt().item() <= 2 * recorded["rms"] + band


def _fc(key: str, weight: tuple[int, int], factor: float, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    filled = recipe.tensor_for(f"{key}.weight", weight).double() * factor
    return filled, recipe.tensor_for(f"{key}.bias", weight[:1]).double() if bias else None


@pytest.mark.parametrize(("size", "kind"), list(itertools.product((8, 16), KINDS)))
def test_golden_mat(backend: str, size: int, kind: str) -> None:
    case, tensors = _case("mat_window_attention")
    made = case["args"][f"ws{size}"]
    heads, dim, tokens = made["num_heads"], made["dim"], size * size
    shift = made["shift"] if kind in ("shift", "both") else 0
    x = ((recipe.image(f"mat_wa/x_ws{size}", 6, tokens, dim) * 2 - 1) * 2).double()
    mask = tensors[f"mask_in_ws{size}"][..., None] if kind in ("valid", "both") else None

    def on_map(cut: Tensor) -> Tensor:
        return from_windows(cut[None], made["H"], made["W"], size, shift).float()

    def projected(name: str, of: Tensor) -> Tensor:
        weight, bias = _fc(name, (dim, dim), case["weights"]["scale_after_fill"][f"{name}.weight"] / dim**0.5)
        return F.linear(of, weight, bias)

    unit = F.normalize(x, dim=-1)
    q, k, v = (on_map(projected(n, of)) for n, of in (("q", unit), ("k", unit), ("v", x)))
    options = {"window_size": size, "num_heads": heads, "shift": shift}
    out = run(backend, q, k, v, mask=None if mask is None else on_map(mask), **options)
    got = projected("proj", windows(out.double(), size, shift)[0]).float()
    _compare(case, tensors, f"out_ws{size}_{kind}", got)
    if mask is not None:
        updated = windows(update(backend, on_map(mask), window_size=size, shift=shift), size, shift)
        assert torch.equal(updated[0, :, :, 0], tensors[f"mask_out_ws{size}"][:, None].expand(-1, tokens))


def _relative_bias(case: dict[str, Any], key: str, name: str, heads: int, size: int) -> Tensor:
    """(heads, N, N) of a table with a row per offset between two tokens."""
    table = recipe.tensor_for(key, ((2 * size - 1) ** 2, heads)) * case["weights"][name]["scale_after_fill"][key]
    along = torch.arange(size * size)
    down, right = along // size, along % size
    index = (down[:, None] - down + size - 1) * (2 * size - 1) + right[:, None] - right + size - 1
    return table[index].permute(2, 0, 1)


@pytest.mark.parametrize("name", ["attn", "attn_nobias"])
def test_golden_swin_attention(backend: str, name: str) -> None:
    case, tensors = _case("swin_window_attention")
    made = case["args"][name]
    size, heads, dim = made["window_size"][0], made["num_heads"], made["dim"]
    x = (recipe.image("sw/x_attn", 8, size * size, dim) * 2 - 1).double()
    weight, offset = _fc("qkv", (3 * dim, dim), case["weights"][name]["scale_after_fill"]["qkv.weight"],
                         made.get("qkv_bias", True))  # fmt: skip
    q, k, v = F.linear(x, weight, offset).float().view(8, size, size, 3 * dim).split(dim, -1)
    bias = _relative_bias(case, "relative_position_bias_table", name, heads, size)
    out = run(backend, q, k, v, window_size=size, num_heads=heads, bias=bias)
    projection = _fc("proj", (dim, dim), 1.0)
    _compare(case, tensors, f"out_{name}_plain", F.linear(out.flatten(1, 2).double(), *projection).float())


@pytest.mark.parametrize("name", ["block", "block_shift"])
def test_golden_swin_block(backend: str, name: str) -> None:
    case, tensors = _case("swin_window_attention")
    made = case["args"][name]
    size, heads, dim, grid = made["window_size"], made["num_heads"], made["dim"], made["input_resolution"]
    x = (recipe.image("sw/x_block", 2, grid[0] * grid[1], dim) * 4 - 2).double()

    def normalised(y: Tensor, key: str) -> Tensor:
        weight, bias = (recipe.tensor_for(f"{key}.{n}", (dim,)).double() for n in ("weight", "bias"))
        return F.layer_norm(y, (dim,), weight, bias)

    def linear(y: Tensor, key: str, outputs: int) -> Tensor:
        return F.linear(y, *_fc(key, (outputs, y.shape[-1]), 1.0))

    projected = linear(normalised(x, "norm1"), "attn.qkv", 3 * dim).float()
    q, k, v = projected.view(2, *grid, 3 * dim).split(dim, -1)
    bias = _relative_bias(case, "attn.relative_position_bias_table", name, heads, size)
    out = run(backend, q, k, v, window_size=size, num_heads=heads, shift=made["shift_size"], bias=bias)
    x = x + linear(out.flatten(1, 2).double(), "attn.proj", dim)
    x = x + linear(F.gelu(linear(normalised(x, "norm2"), "mlp.fc1", 4 * dim)), "mlp.fc2", dim)
    _compare(case, tensors, f"out_{name}", x.float())


def test_golden_permutations() -> None:
    case, tensors = _case("swin_window_process")
    for tag, made in case["args"].items():
        b, h, w, c = (made[n] for n in "BHWC")
        size, shift = made["window_size"], made["shift_size"]
        index = torch.arange(b * h * w * c)
        cut = windows(index.view(b, h, w, c), size, shift)
        assert torch.equal(cut.reshape(-1, size, size, c).int(), tensors[f"part_{tag}"]), tag
        merged = from_windows(index.view(b, -1, size * size, c), h, w, size, shift)
        assert torch.equal(merged.int(), tensors[f"merge_{tag}"]), tag


def test_regions_are_the_shift_masks() -> None:
    """Of a 16×24 map's last two windows, and of Swin's last three, as the public code builds them."""
    for name, key, height, width, size, shift in (
        ("mat_window_attention", "shift_mask_ws8", 16, 24, 8, 4),
        ("swin_window_attention", "attn_mask", 28, 21, 7, 3),
    ):
        golden = _case(name)[1][key]
        label = windows(regions(height, width, size, shift), size, shift)[0]
        assert torch.equal((label != label.mT)[-len(golden) :], golden == -100)


# ---- what masks mean ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("shift", [0, 3])
def test_a_uniform_mask_cancels(backend: str, value: float, shift: int) -> None:
    """All valid, all invalid, all as good as valid: attention without a mask; in a shifted map too, where own keys have
    −100 and those of other regions −200. Eager float32 loses digits at −100, so that case has a bound of its own."""
    q, k, v = qkv(2, 16, 8, 60, scale=0.7)
    options: dict[str, Any] = {"window_size": 8, "num_heads": 2, "shift": shift}
    got = check(backend, q, k, v, mask=torch.full((1, 16, 8, 1), value), **options)
    exact = by_the_reference(torch.float64, q, k, v, **options)
    assert bool((got - exact).abs().max() < (1e-6 if value else 2e-5))


@pytest.mark.parametrize("place", [0, 17, 63])
def test_one_valid_token_is_all_there_is(backend: str, place: int) -> None:
    q, k, v = qkv(1, 8, 8, 30, scale=0.5)
    mask = torch.zeros(1, 8, 8, 1)
    mask.view(-1)[place] = 1
    got = run(backend, q, k, v, window_size=8, num_heads=1, mask=mask)
    expected = v.view(64, 30)[place].expand(64, 30)
    torch.testing.assert_close(got.view(64, 30), expected, rtol=1e-6, atol=1e-6)


def test_an_invalid_region_sees_its_own_keys_and_valid_ones_beyond_the_seam(backend: str) -> None:
    """The tie at −100. With −∞, or by leaving invalid keys out, queries of that region get something else."""
    q, k, v = qkv(1, 8, 8, 30, scale=0.5)
    label = windows(regions(8, 8, 8, 4), 8, 4)[0, 0, :, 0]
    assert label.unique().numel() == 4
    valid = (label != label[0]) & (torch.arange(64) % 3 > 0)
    mask = from_windows(valid.float().view(1, 1, 64, 1), 8, 8, 8, 4)
    out = windows(check(backend, q, k, v, window_size=8, num_heads=1, shift=4, mask=mask), 8, 4)[0, 0]
    queries, keys, values = (windows(t.double(), 8, 4)[0, 0] for t in (q, k, v))
    own = label == label[0]
    usable = own | valid
    weights = torch.softmax((queries[own] @ keys[usable].T) * 30**-0.5, -1)
    torch.testing.assert_close(out[own].double(), weights @ values[usable], rtol=0, atol=2e-5)


def _vacant(shift: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of 24×16 tokens in windows of 8 those of the first two have no valid one, and one value (of 30 awkward numbers)."""
    q, k, v = qkv(1, 24, 16, 60, scale=0.6)
    mask = (noise(1, 24, 16, 1, seed=3) > 0).float()
    cut = windows(v, 8, shift)
    cut[:, :2] = noise(60, seed=4) / 3
    valid = windows(mask, 8, shift)
    valid[:, :2] = 0
    return [q, k, from_windows(cut, 24, 16, 8, shift)], from_windows(valid, 24, 16, 8, shift), cut[:, :2]


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_windows_without_a_valid_token_in_closed_form(backend: str, dtype: torch.dtype, shift: int) -> None:
    """One value in, that value out: bit for bit from the kernel that does not compute any weights for it."""
    inputs, mask, value = _vacant(shift)
    options: dict[str, Any] = {"window_size": 8, "num_heads": 2, "shift": shift, "mask": mask}
    inputs = [t.to(dtype) for t in inputs]
    got = run(backend, *inputs, **options)
    truth = by_the_reference(torch.float64, *inputs, **options)
    assert_close_to_truth(got, truth, by_the_reference(torch.float32, *inputs, **options).to(dtype))
    found = windows(got, 8, shift)[:, :2]
    if backend == "cpu" or dtype != torch.float32:
        assert torch.equal(found, value.to(dtype))
    torch.testing.assert_close(found.float(), value.to(dtype).float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, 1e20])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_one_value_is_none_where_logits_are_not_finite(backend: str, operand: int, what: float) -> None:
    """In a window without a valid token; 10²⁰ in queries and keys overflows where they meet."""
    inputs, mask, _ = _vacant(0)
    inputs[operand][0, 2, 1, 3] = what
    if what == 1e20 and operand < 2:
        inputs[1 - operand][0, 5, 5, 3] = what
    if operand == 2:
        inputs[2][0, :8, :8, 3] = what
    options: dict[str, Any] = {"window_size": 8, "num_heads": 2, "mask": mask}
    got, base = run(backend, *inputs, **options), by_the_reference(torch.float32, *inputs, **options)
    assert torch.equal(got[0, :8].isfinite(), base[0, :8].isfinite())
    assert bool(got[0, :8].isfinite().all()) == (operand == 2 and what == 1e20)
    torch.testing.assert_close(got, base, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shift", [0, 1, 4, 7])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_masks_of_all_sorts(backend: str, heads: int, shift: int) -> None:
    """Valid, invalid and fractional windows, and regions of each, side by side; logits that allow skipping."""
    q, k, v = qkv(2, 16, 24, 30 * heads, scale=0.6)
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(2, 16, 24, 1, generator=generator)
    mask[0] = (mask[0] > 0.5).float()
    mask[1, :8] = (mask[1, :8] * 5).floor() / 4
    mask[0, :, :5] = 0
    mask[1, 8:, 9:] = 1
    check(backend, q, k, v, window_size=8, num_heads=heads, shift=shift, mask=mask)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("factor", [1.0, 4.0, 12.0])
def test_an_invalid_key_may_win(backend: str, factor: float, shift: int) -> None:
    """Logits that differ by more than 100: the mask is an addend, and no more. Eighths, so that logits are not rounded."""
    q, k, v = qkv(1, 8, 8, 16, scale=factor)
    q, k = (q * 8).round() / 8, (k * 8).round() / 8
    mask = (noise(1, 8, 8, 1, seed=9) > 0.9).float()
    q[0, 3, 3], k[0, 4, 4] = 8 * factor, 1.5 * factor
    mask[0, 4, 4] = 0
    got = check(backend, q, k, v, window_size=4 if shift else 8, num_heads=1, shift=shift, mask=mask)
    assert bool(got.isfinite().all())


def test_values_count_where_weights_are_tiny(backend: str) -> None:
    """e⁻¹⁰⁰ of 10³⁷ is 4·10⁻⁷: nothing beside values of 1, but a lot where those are 0."""
    q, k, v = qkv(1, 4, 4, 8, scale=0.01)
    mask = torch.ones(1, 4, 4, 1)
    mask[0, 1, 2] = 0
    for small, huge in ((1.0, 1e37), (0.0, 1e37), (1e-30, 1e8), (1e-38, 1.0)):
        values = v * small
        values[0, 1, 2] = huge
        check(backend, q, k, values, window_size=4, num_heads=1, mask=mask)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_what_is_not_finite_is_not_skipped(backend: str, operand: int, what: float) -> None:
    """At an invalid key, in a window whose other keys are valid."""
    inputs = qkv(1, 8, 8, 12, scale=0.1)
    inputs[operand][0, 2, 1, 3] = what
    mask = torch.ones(1, 8, 8, 1)
    mask[0, 2, 1] = 0
    options: dict[str, Any] = {"window_size": 4, "num_heads": 3, "mask": mask}
    got = run(backend, *inputs, **options)
    base = by_the_reference(torch.float32, *inputs, **options)
    assert torch.equal(got.isfinite(), base.isfinite())
    assert bool((~got.isfinite()).any())
    torch.testing.assert_close(got, base, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, -3.5, 2.0, -0.0, 1e-3])
def test_any_mask_value_is_added(backend: str, special: float) -> None:
    q, k, v = qkv(1, 8, 8, 12)
    mask = torch.ones(1, 8, 8, 1)
    mask[0, 2, 1], mask[0, 0, 5] = special, 0
    options: dict[str, Any] = {"window_size": 4, "num_heads": 2, "mask": mask, "shift": 1}
    got, base = run(backend, q, k, v, **options), by_the_reference(torch.float32, q, k, v, **options)
    torch.testing.assert_close(got, base, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("mask_value", [0.0, -1.0, -30.0, -1e4, 50.0])
@pytest.mark.parametrize("biased", [False, True])
def test_other_mask_values(backend: str, biased: bool, mask_value: float) -> None:
    q, k, v = qkv(2, 8, 12, 20)
    mask = (noise(2, 8, 12, 1, seed=3) > 0).float()
    bias = noise(2, 16, 16, seed=4) if biased else None
    check(backend, q, k, v, window_size=4, num_heads=2, shift=3, mask=mask, bias=bias, mask_value=mask_value)


@pytest.mark.parametrize("size", range(1, 17))
def test_every_window_size(backend: str, size: int) -> None:
    q, k, v = qkv(1, 2 * size, size, 18, scale=0.8)
    mask = (noise(1, 2 * size, size, 1, seed=6) > -0.5).float()
    check(backend, q, k, v, window_size=size, num_heads=1, shift=size // 3, mask=mask)


@pytest.mark.parametrize("channels", [1, 7, 15, 16, 17, 30, 31, 32, 33, 48, 64, 80])
def test_every_width_of_a_head(backend: str, channels: int) -> None:
    q, k, v = qkv(1, 8, 4, 2 * channels, scale=0.7)
    mask = (noise(1, 8, 4, 1, seed=7) > 0).float()
    if backend == "triton" and channels > 64:
        with pytest.raises(UnsupportedError, match="80 channels"):
            run(backend, q, k, v, window_size=4, num_heads=2, shift=2, mask=mask)
        return
    check(backend, q, k, v, window_size=4, num_heads=2, shift=2, mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_with_a_float32_mask_and_bias(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in qkv(1, 8, 8, 24))
    mask = torch.where(noise(1, 8, 8, 1, seed=8) > 0, 1.0, 0.99999)  # 1 in bfloat16
    bias = 3 * noise(2, 16, 16, seed=1)
    for options in ({"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias}):
        got = run(backend, q, k, v, window_size=4, num_heads=2, shift=1, **options)
        wide = {n: o.double() for n, o in options.items()}
        truth = by_the_reference(torch.float64, q, k, v, window_size=4, num_heads=2, shift=1, **wide)
        assert_close_to_truth(got, truth, truth.to(dtype))


def test_the_mask_is_broadcast_over_the_batch(backend: str) -> None:
    q, k, v = qkv(3, 4, 4, 8)
    mask = (noise(1, 4, 4, 1, seed=2) > 0).float()
    options: dict[str, Any] = {"window_size": 2, "num_heads": 2, "shift": 1}
    one = run(backend, q, k, v, mask=mask, **options)
    assert torch.equal(one, run(backend, q, k, v, mask=mask.expand(3, -1, -1, -1), **options))


# ---- the update -----------------------------------------------------------------------------------------------------


def test_updated_masks(backend: str) -> None:
    """None valid: 0. One, or many: 1. Less than one in sum: that sum. Negative: 0. NaN: itself."""
    mask = torch.zeros(1, 8, 24, 1)
    mask[0, :4, 4], mask[0, 3, 8], mask[0, 5:7, 13], mask[0, 1, 17], mask[0, 6, 20] = 1, 1, 0.25, -2, torch.nan
    got = update(backend, mask, window_size=4)[0, ::4, ::4, 0]
    expected = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0.5, 0, torch.nan]])
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    moved = update(backend, mask, window_size=4, shift=1)
    torch.testing.assert_close(
        moved,
        update(backend, mask.roll((-1, -1), (1, 2)), window_size=4).roll((1, 1), (1, 2)),
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip


# ---- wrong calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3, 4)}, r"q is \(2, 3, 4\)"),
        ({"q": torch.ones(1, 4, 4, 6, dtype=torch.int32)}, "q is .* torch.int32"),
        ({"k": torch.ones(1, 4, 4, 5)}, r"k is \(1, 4, 4, 5\)"),
        ({"v": torch.ones(1, 4, 4, 6).half()}, "v is .* torch.float16"),
        ({"window_size": 3}, r"q is 4×4; accepted: positive multiples of window_size \(3\)"),
        ({"window_size": 0}, "window_size is 0"),
        ({"shift": 2}, "window_size is 2, shift 2"),
        ({"shift": -1}, "shift -1"),
        ({"num_heads": 4}, "num_heads is 4"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"mask": torch.ones(1, 4, 4)}, r"mask is \(1, 4, 4\)"),
        ({"mask": torch.ones(3, 4, 4, 1)}, r"mask is \(3, 4, 4, 1\)"),
        ({"mask": torch.ones(1, 4, 4, 1, dtype=torch.bool)}, "mask is .* torch.bool"),
        ({"mask": torch.ones(1, 4, 4, 1, dtype=torch.float16)}, "mask is .* torch.float16"),
        ({"bias": torch.ones(4, 4)}, r"bias is \(4, 4\)"),
        ({"mask_value": -float("inf")}, "mask_value is -inf"),
        ({"mask_value": float("nan")}, "mask_value is nan"),
    ],
)
def test_wrong_calls(change: dict[str, Any], message: str) -> None:
    x = torch.ones(1, 4, 4, 6)
    with pytest.raises(ValueError, match=message):
        ops.window_attention(**{"q": x, "k": x, "v": x, "window_size": 2, "num_heads": 2, **change})


@pytest.mark.parametrize(
    ("mask", "size", "message"),
    [
        (torch.ones(1, 4, 4, 2), 2, r"mask is \(1, 4, 4, 2\)"),
        (torch.ones(4, 4, 1), 2, r"mask is \(4, 4, 1\)"),
        (torch.ones(1, 4, 5, 1), 2, "mask is 4×5"),
        (torch.ones(1, 4, 4, 1, dtype=torch.bool), 2, "torch.bool"),
        (torch.ones(1, 4, 4, 1), 0, "window_size is 0"),
    ],
)
def test_wrong_updates(mask: Tensor, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.window_mask_update(mask, window_size=size)

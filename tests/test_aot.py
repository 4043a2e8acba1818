"""Cross-compilation without a GPU, and the budgets: CI compiles every variant, these tests compile one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler that is tested here", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from inpaintrt.kernels import (  # noqa: E402
    _lib,
    aot,
    fourier_unit,
    fused_conv2d,
    gated_activation,
    gated_conv2d,
    partial_conv2d,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def one_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(gated_activation.variants())

    def variants() -> Iterator[tuple[str, _lib.Launch]]:
        yield first

    monkeypatch.setattr(gated_activation, "variants", variants)
    monkeypatch.setattr(aot, "op_modules", lambda: iter([("gated_activation", gated_activation)]))


def test_every_kernel_module_is_found() -> None:
    modules = dict(aot.op_modules())
    assert modules["gated_activation"] is gated_activation
    for name, module in modules.items():
        assert isinstance(module.BUDGET, _lib.Budget), name
        labels = [label for label, _ in module.variants()]
        assert labels, name
        assert len(labels) == len(set(labels)), name


@pytest.mark.usefixtures("one_variant")
def test_compiles_for_gpus_that_are_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "usage.json"
    assert aot.main(["--check", "--arch", "80", "90", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["usages"]
    assert [row["arch"] for row in rows] == [80, 90]
    assert all(16 <= row["registers"] <= gated_activation.BUDGET.registers for row in rows)
    assert all(row["local_bytes"] == row["shared_bytes"] == 0 for row in rows)
    printed = capsys.readouterr().out
    assert "sm_80" in printed
    assert "sm_90" in printed


@pytest.mark.usefixtures("one_variant")
def test_over_budget_fails_with_names_and_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gated_activation, "BUDGET", _lib.Budget(registers=8, shared_bytes=0))
    assert aot.main(["--check", "--arch", "80"]) == 1
    message = capsys.readouterr().err
    assert "gated_activation: forward float32 elu one row on sm_80 uses" in message
    assert "registers per thread; the budget is 8" in message
    assert aot.main(["--arch", "80"]) == 0, "without --check it only reports"


def test_spills_are_seen() -> None:
    label = "backward float32 elu one row"
    launch = dict(gated_activation.variants())[label]
    starved = dataclasses.replace(launch, options={**launch.options, "maxnreg": 24})
    usage = aot.measure("gated_activation", label, starved, 80)
    assert usage.local_bytes > 0
    assert any("spills" in sentence for sentence in usage.over(gated_activation.BUDGET))


def test_shared_memory_is_held_to_its_budget() -> None:
    usage = aot.Usage("op", "variant", 90, registers=10, local_bytes=0, shared_bytes=4096)
    assert usage.over(_lib.Budget(registers=10, shared_bytes=4096)) == []
    assert usage.over(_lib.Budget(registers=10, shared_bytes=4095)) == [
        "op: variant on sm_90 uses 4096 bytes of shared memory; the budget is 4095"
    ]


def test_fusion_must_be_explicit() -> None:
    label, launch = next(gated_activation.variants())
    silent = dataclasses.replace(launch, options={"num_warps": 4})
    with pytest.raises(ValueError, match="enable_fp_fusion"):
        aot.measure("gated_activation", label, silent, 80)


def test_layouts_compile_to_wide_accesses() -> None:
    """The point of finding vectors on the host: 16-byte accesses in both memory formats, single ones for gathers."""
    launches = dict(gated_activation.variants())
    for label in ("forward bfloat16 elu one row", "backward bfloat16 elu NHWC", "forward float32 elu strided"):
        options = dict(launches[label].options)
        compiled = triton.compile(aot.source(launches[label]), target=aot.GPUTarget("cuda", 90, 32), options=options)
        accesses = [line for line in compiled.asm["ptx"].splitlines() if "ld.global" in line or "st.global" in line]
        assert accesses, label
        assert all((".v4.b32" in line) == ("strided" not in label) for line in accesses), label


@triton.jit
def _product(a, b, c, k, CHUNK: tl.constexpr):
    m, j = tl.arange(0, 32), tl.arange(0, 16)
    acc = tl.zeros((32, 32), tl.float32)
    for first in range(0, k, 16):
        left = tl.load(a + m[:, None] * k + (first + j)[None, :])
        right = tl.load(b + (first + j)[:, None] * 32 + m[None, :])
        acc = _lib.dot_chunk(left, right, acc) if CHUNK else _lib.dot(left, right, acc)
    tl.store(c + m[:, None] * 32 + m[None, :], acc)


def _assembly(launch: _lib.Launch, arch: int = 90) -> dict[str, str]:
    target, options = aot.GPUTarget("cuda", arch, 32), dict(launch.options)
    return dict(triton.compile(aot.source(launch), target=target, options=options).asm)


def _chained(assembly: dict[str, str]) -> list[bool]:
    """For each dot of a program, whether its sum goes on from a variable and not from zeros."""
    return [not start.startswith("%cst") for start in re.findall(r"tt\.dot [^,]+, [^,]+, (%\w+)", assembly["ttir"])]


def test_the_compiler_keeps_chunked_sums_apart() -> None:
    """Triton turns `acc + dot(a, b)` into `dot(a, b, acc)`: faster by one addition, and √K times less accurate."""
    t = torch.empty(1, device="meta")
    for chunk in (False, True):
        options = {"num_warps": 4, "enable_fp_fusion": False}
        assembly = _assembly(_lib.Launch(_product, (1,), (t, t, t, 100), {"CHUNK": chunk}, options))
        assert _chained(assembly) == [not chunk]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_multiplied_in_float32(dtype: str) -> None:
    """On sm_100 Triton makes a product with a converted operand TF32 unless it cannot see the conversion."""
    assembly = _assembly(dict(fourier_unit.variants())[f"forward {dtype} NHWC mix"], 100)
    assert "fma.rn.f32" in assembly["ptx"]
    assert "mma" not in assembly["ptx"]


def test_spectra_are_ieee_float32_in_chunks() -> None:
    launches = dict(fourier_unit.variants())
    for stage in ("rows", "columns", "mix", "columns back", "rows back"):
        assembly = _assembly(launches[f"forward float32 NHWC {stage}"])
        assert _chained(assembly) == [False, False], stage
        assert "fma.rn.f32" in assembly["ptx"], stage
        assert "mma" not in assembly["ptx"], f"{stage} computes on tensor cores, which round operands"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_convolutions_keep_their_precision(arch: int) -> None:
    """IEEE products never meet a tensor core; TF32 ones round both operands to nearest first."""
    for module, label in ((gated_conv2d, "float32 NHWC"), (partial_conv2d, "float32 NCHW")):
        assembly = _assembly(dict(module.variants())[f"forward {label}"], arch)
        assert "fma.rn.f32" in assembly["ptx"]
        assert "mma" not in assembly["ptx"], label
        assert not any(_chained(assembly)), label
    ptx = _assembly(dict(gated_conv2d.variants())["forward tf32 NHWC"], arch)["ptx"]
    assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[arch] in ptx
    # Each program rounds the elements of three tiles: of pixels, features and gates.
    launch = dict(gated_conv2d.variants())["forward tf32 NHWC"]
    pixels, outputs, step = (launch.constants[name] for name in ("PIXELS", "OUTPUTS", "CHANNELS"))
    rounded = ptx.count("cvt.rna.tf32.f32") * 32 * launch.options["num_warps"]
    assert rounded >= (pixels + 2 * outputs) * step


def test_convolutions_of_channels_last_copy_whole_vectors() -> None:
    """16 bytes at a time from memory to shared memory, and 16-byte stores, at widths that are no multiple of 16 elements."""
    launch = dict(gated_conv2d.variants())["forward float16 NHWC"]  # 24 channels
    ptx = _assembly(launch, 80)["ptx"]
    copies = [line for line in ptx.splitlines() if "cp.async.c" in line and "shared.global" in line]
    assert copies
    assert all("0x10" in line.split("],")[-1] or ", 16" in line for line in copies), copies[0]
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert stores
    assert all(".v4.b32" in line for line in stores)
    doubled = dict(fused_conv2d.variants())["forward bfloat16 NHWC doubled"]
    assert "cp.async" in _assembly(doubled, 80)["ptx"]


def test_one_binary_serves_every_size_of_image() -> None:
    """What is compiled depends on layout, options and block sizes, not on height and width."""
    found = []
    for side in (512, 528, 531):
        x = gated_conv2d.example("bfloat16 NHWC", 1, 48, side, side)
        args = (x, x.new_empty(96, 48, 3, 3), None, 1, [1, 1, 1, 1], 1, "zeros", "elu", None, 1.0)
        launch = gated_conv2d.forward(args, (x,))[-1]
        source = aot.source(launch)
        found.append((source.signature, source.constants, source.attrs, launch.constants, launch.options))
    assert found[0] == found[1] == found[2]


def test_none_is_a_constant() -> None:
    launches = dict(fourier_unit.variants())
    bare, full = (launches[f"forward float32 {layout} rows back"] for layout in ("NCHW", "NHWC"))
    assert None in bare.args
    assert aot.source(bare).signature["residual"] == "constexpr"
    assert aot.source(full).signature["residual"] == "*fp32"

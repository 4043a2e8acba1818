"""Memory of a forward (peak resident set during it minus that after load and packing), and of what acceleration keeps.

Each model runs in a fresh process, so that nothing that an earlier call left in an allocator hides a part of the peak.
"""

from __future__ import annotations

import pytest

from inpaintrt.testing import memory

ONE_SIZE = ("mat", "comodgan", "migan")
CASES = {"lama_mini": (400, 600)} | dict.fromkeys(
    ("lama", "deepfill_v1", "deepfill_v2", "aotgan", "glcic", "partialconv_unet", *ONE_SIZE), (512, 512)
)
"""Networks, by the names that `load` and `create` know, and the size of their images."""
CASES["ipt"] = (96, 96)  # all patches of such an image at once
ALLOWED_KEPT = 0.25  # of the parameters' bytes, for folded or packed weights


def forward(name: str, accelerated: bool, height: int, width: int):
    """In a fresh process: a model is loaded and packed, then another one like it, whose forward is measured.

    The first one pays for what any first forward leaves behind (imports, oneDNN's code, threads), so that the memory
    that the second keeps after acceleration and a small forward is its folded and packed weights.
    """
    import torch

    import inpaintrt
    from inpaintrt.testing import memory, recipe

    torch.set_grad_enabled(False)

    def masked(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = recipe.image("photo", 1, 3, height, width), torch.zeros(1, 1, height, width)
        mask[..., height // 4 : height // 2, width // 3 : 2 * width // 3] = 1
        return image, mask

    def call(model, height: int, width: int):
        if name == "ipt":
            down, across = ((n - model.patch + 11) // 12 + 1 for n in (height, width))
            patches = recipe.image("photo", down * across, 3, model.patch, model.patch) * 255
            return lambda: model(patches)
        image, mask = masked(height, width)
        return lambda: model.inpaint(image, mask)

    for _ in range(2):
        model = None  # the first model goes before the second one comes
        if name == "lama_mini":
            model = inpaintrt.load(name)
        elif name == "ipt":
            model = recipe.fill(inpaintrt.models.create(name, tasks=("denoise",), layers=4))
        else:
            model = recipe.fill(inpaintrt.models.create(name))
        memory.settle()
        loaded = memory.status("VmRSS")
        if accelerated:
            inpaintrt.accelerate(model)
        side = 60 if name == "ipt" else max(128, model.min_size)
        call(model, side, side)()
        memory.settle()
        kept = memory.status("VmRSS") - loaded
    peak = memory.peak_of(call(model, height, width))
    parameters = sum(p.nbytes for p in model.parameters())
    return {"kept": kept, "extra": peak.extra, "parameters": parameters, "seconds": peak.seconds}


@pytest.mark.skipif(bool(memory.missing()), reason=f"not run: {memory.missing()}")
@pytest.mark.parametrize("name", CASES)
def test_memory(versus, name):
    if versus.smoke and name in ONE_SIZE:
        versus.skip_timing()
        pytest.skip(f"{name} has no size small enough for a smoke run")
    if versus.smoke:
        memory.in_fresh_process(forward, name, True, *((60, 60) if name == "ipt" else (128, 128)))
        versus.skip_timing()
        return
    size, runs = CASES[name], 2
    found = {
        kind: [memory.in_fresh_process(forward, name, accelerated, *size) for _ in range(runs)]
        for kind, accelerated in (("eager", False), ("inpaintrt", True))
    }
    extra = {kind: min(run["extra"] for run in runs) for kind, runs in found.items()}
    kept = max(0, min(run["kept"] for run in found["inpaintrt"]))
    parameters = found["eager"][0]["parameters"]
    ours, theirs = extra["inpaintrt"] / 2**20, extra["eager"] / 2**20
    # Their seconds are those of a first forward in a process that just gave its memory back: kept, but not compared.
    versus.record(
        {kind: [run["seconds"] for run in runs] for kind, runs in found.items()},
        shape=(1, 3 if name == "ipt" else 4, *size),
        model=name,
        extra_memory=extra,
        kept_bytes=kept,
        parameter_bytes=parameters,
        notes=[
            f"forward needs {ours:.0f} MiB, eager {theirs:.0f}: {ours / theirs:.2f}x (allowed 1); acceleration keeps "
            f"{kept / 2**20:.1f} MiB, {kept / parameters:.2f}x the parameters (allowed {ALLOWED_KEPT})"
        ],
    )

"""Time until a program is useful: importing, accelerating, the first image. Fresh processes, files in page cache."""

from __future__ import annotations

from inpaintrt.testing.memory import in_fresh_process
from inpaintrt.testing.timing import interleave, median_interval, summary

ALLOWED_IMPORT_S = 0.150  # beyond torch's own import
ALLOWED_ACCELERATE_S = 5.0


def imports():
    """Seconds of `import torch`, of `import inpaintrt` after it, and of loading what its public names stand for."""
    import time

    start = time.perf_counter()
    import torch  # noqa: F401

    with_torch = time.perf_counter()
    import inpaintrt

    ready = time.perf_counter()
    for name in inpaintrt.__all__:
        getattr(inpaintrt, name)
    return {"torch": with_torch - start, "inpaintrt": ready - with_torch, "names": time.perf_counter() - ready}


def accelerating(blocks: int):
    """Seconds of `accelerate` on a LaMa with big-lama's widths."""
    import time

    import inpaintrt
    from inpaintrt.testing import recipe

    model = recipe.fill(inpaintrt.models.create("lama", n_blocks=blocks, base_width=64)).eval()
    start = time.perf_counter()
    inpaintrt.accelerate(model)
    return time.perf_counter() - start


def first_image(accelerated: bool, height: int, width: int):
    """From a fresh interpreter to the first output: the process's own time is what counts, so nothing is returned."""
    import torch

    import inpaintrt

    torch.set_grad_enabled(False)
    model = inpaintrt.load("lama_mini").eval()
    if accelerated:
        inpaintrt.accelerate(model)
    model(torch.rand(1, 4, height, width))


def test_import(versus):
    found = [in_fresh_process(imports) for _ in range(1 if versus.smoke else 10)]
    if versus.smoke:
        versus.skip_timing()
        return
    times = {name: [run[name] for run in found] for name in ("inpaintrt", "names", "torch")}
    median, low, high = (1e3 * v for v in median_interval(times["inpaintrt"]))
    names, whole = (1e3 * summary(times[name]).p50 for name in ("names", "torch"))
    note = (
        f"{median:.1f} ms [{low:.1f}, {high:.1f}] beyond torch's {whole:.0f}; allowed {1e3 * ALLOWED_IMPORT_S:.0f}. "
        f"Public names load at first use; all of them take {names:.0f} ms more"
    )
    versus.record(times, notes=[note])


def test_accelerate_big_lama(versus):
    if versus.smoke:
        in_fresh_process(accelerating, 1)
        versus.skip_timing()
        return
    times = {"inpaintrt": [in_fresh_process(accelerating, 18) for _ in range(3)]}
    versus.record(times, model="big_lama", notes=[f"allowed {ALLOWED_ACCELERATE_S:.0f} s"])


def test_first_image(versus):
    """Interpreter start to first output of lama_mini; acceleration pays for its probes and packing here."""
    size = (128, 128) if versus.smoke else (400, 600)
    candidates = {
        "eager": lambda: in_fresh_process(first_image, False, *size),
        "inpaintrt": lambda: in_fresh_process(first_image, True, *size),
    }
    if versus.smoke:
        candidates["inpaintrt"]()
        versus.skip_timing()
        return
    times = interleave(candidates, rounds=3, warmup=0)
    versus.record(times, baseline="eager", shape=(1, 4, *size), model="lama_mini")

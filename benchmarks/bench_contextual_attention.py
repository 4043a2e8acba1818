"""contextual_attention at DeepFill's layers, 256 to 1024 pixels, against the way of the public ports, eager and compiled.

"features" look like what a network's layer gives, so that most weights vanish; "soft" spreads the weights over all keys,
which is the worst case for a kernel that skips what vanishes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.contextual_attention import SPEC

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
SCALES = {"features": 10.0, "soft": 0.01}
SMOKE = 32  # pixels of a side of the features in a smoke run
ROUNDS = {64: None, 128: 3, 256: 1}  # by side; None: what the time budget allows
# Above this, neither a float64 truth nor the reference (as slow as a port) is affordable.
AFFORDABLE = 128


def features(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """ReLU(f)·sigmoid(g) of noise that is mostly smooth: neighbouring patches resemble each other, distant ones do not."""
    b, c, h, w = shape
    coarse = torch.randn(b, 2 * c, max(1, h // 8), max(1, w // 8), generator=generator)
    smooth = F.interpolate(coarse, (h, w), mode="bilinear", align_corners=False)
    f, g = (2 * smooth + 0.25 * torch.randn(smooth.shape, generator=generator)).chunk(2, dim=1)
    return F.relu(f) * torch.sigmoid(g)


def as_ports_write_it(
    x: Tensor, mask: Tensor, softmax_scale: float, offsets: bool = False, norm: str = "max"
) -> tuple[Tensor, ...]:
    """The patches of each sample as filters of a convolution, propagation as two one-channel convolutions of the matrix
    of all scores with the identity, the weights pasted by a transposed convolution; and, if wanted, the best keys."""
    b, c, h, w = x.shape
    rows, columns = h // 2, w // 2
    cells = rows * columns
    values = F.unfold(x, 4, padding=1, stride=2).view(b, c, 4, 4, cells).permute(0, 4, 1, 2, 3)
    small = F.interpolate(x, scale_factor=0.5)
    keys = F.unfold(small, 3, padding=1).view(b, c, 3, 3, cells).permute(0, 4, 1, 2, 3)
    allowed = (F.unfold(mask, 3, padding=1).mean(1) == 0).to(x.dtype).view(-1, cells, 1, 1)
    identity = torch.eye(3, dtype=x.dtype, device=x.device).view(1, 1, 3, 3)
    results, best = [], []
    for i in range(b):
        squares = keys[i].square()
        if norm == "max":
            filters = keys[i] / squares.sum((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-4)
        else:
            filters = keys[i] / (squares + 1e-4).sum((1, 2, 3), keepdim=True).sqrt()
        scores = F.conv2d(small[i : i + 1], filters, padding=1).view(1, 1, cells, cells)
        scores = F.conv2d(scores, identity, padding=1).view(1, rows, columns, rows, columns)
        scores = scores.permute(0, 2, 1, 4, 3).reshape(1, 1, cells, cells)
        scores = F.conv2d(scores, identity, padding=1).view(1, columns, rows, columns, rows)
        scores = scores.permute(0, 2, 1, 4, 3).reshape(1, cells, rows, columns)
        usable = allowed[i : i + 1] if len(allowed) > 1 else allowed
        weights = torch.softmax(scores * usable * softmax_scale, dim=1) * usable
        results.append(F.conv_transpose2d(weights, values[i], stride=2, padding=1) / 4)
        if offsets:
            best.append(weights.argmax(dim=1))
    return (torch.cat(results), torch.cat(best)) if offsets else (torch.cat(results),)


def ported(
    foreground: Tensor, background: Tensor, mask: Tensor | None, softmax_scale: float, norm: str, **options: object
) -> Tensor:
    """The op in that form, given all of its arguments, for networks that are to do without ops of ours."""
    known = {"patch_size": 3, "stride": 1, "rate": 2, "fuse_size": 3, "sampling": "stride", "eps": 1e-4, "mask_mode": "zero",
             "divisor": "const4", "queries": None}  # fmt: skip
    if other := {name: value for name, value in options.items() if value != known[name]}:
        raise NotImplementedError(f"the ports' attention is written here without {other}")
    if mask is None:
        mask = foreground.new_zeros(1, 1, foreground.shape[2] // 2, foreground.shape[3] // 2)
    return as_ports_write_it(foreground, mask.to(foreground.dtype), softmax_scale, norm=norm)[0]


def example(sample: str, smoke: bool) -> tuple[Tensor, Tensor]:
    """Features and a mask of cells with a hole of a third of each side."""
    shapes = SAMPLES[sample].shapes
    if smoke:
        shrink = shapes["foreground"][3] // SMOKE
        shapes = {name: (b, c, h // shrink, w // shrink) for name, (b, c, h, w) in shapes.items()}
    mask = torch.zeros(shapes["mask"])
    rows, columns = mask.shape[2:]
    mask[..., rows // 3 : 2 * rows // 3, columns // 3 : 2 * columns // 3] = 1
    return features(shapes["foreground"], torch.Generator().manual_seed(0)), mask


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_contextual_attention(versus, device, sample, kind):
    x, mask = (t.to(device) for t in example(sample, versus.smoke))
    scale = SCALES[kind]
    last = x.to(memory_format=torch.channels_last)
    candidates = {
        "eager": lambda: as_ports_write_it(x, mask, scale),
        "inpaintrt": lambda: ops.contextual_attention(x, x, mask, softmax_scale=scale),
        "inpaintrt nhwc": lambda: ops.contextual_attention(last, last, mask, softmax_scale=scale),
    }
    args = SPEC.bind(x, x, mask, softmax_scale=scale)
    truth = None
    if x.shape[3] <= AFFORDABLE:
        candidates["reference"] = lambda: SPEC.run_reference(*args)
        truth = lambda: SPEC.run_reference(*(a.double() if isinstance(a, Tensor) else a for a in args))  # noqa: E731
    if not versus.smoke:
        candidates["compile"] = versus.compiled(as_ports_write_it, x, mask, scale)
    versus(
        candidates, truth=truth, cost=SPEC.cost(*args), rounds=ROUNDS.get(x.shape[3]),
        device=device, shape=x.shape, op=SPEC.name, kind=kind, direction="forward",
    )  # fmt: skip

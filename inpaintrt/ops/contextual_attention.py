r"""Contextual attention: fill a hole with weighted patches of the background, matched patch by patch.

$$ s_{qk} = \frac{\langle f_q, b_k \rangle}{\lVert b_k \rVert}, \qquad
   p_{qk} = \mathrm{softmax}_k\bigl(\lambda \cdot \mathrm{propagate}(s)_{qk}\bigr), \qquad
   \mathrm{out} = \tfrac14 \sum_{q,k} p_{qk} \cdot \mathrm{paste}(B_k \to q) $$

f_q and b_k are 3×3 patches of the features on a grid of every other pixel, B_k are 4×4 patches of all background pixels,
pasted with a stride of 2, so that each pixel is an average of four. Yu et al., "Generative Image Inpainting with
Contextual Attention", CVPR 2018, section 4. Propagation adds the scores of neighbouring cells under equal shifts, first
in row-major, then in column-major order, lines wrapping around: after the last column comes the first one of the next
row. Eager ports hold about five matrices of L×L scores, L = h·w/4: 24 GB for an image of 1080p.

**What the kernels do instead**, exactly: patch scores are diagonal box sums of the Gram matrix of pixels (a ninth of the
products), propagation is two more such sums, all masked keys are one virtual key, and pasting is four products of
diagonally summed weights with the four even/odd phases of the background (a quarter of the products). Rows of cells
stream through buffers; no L×L matrix exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inpaintrt.runtime.library import register
from inpaintrt.runtime.spec import Cost, Lane, OpSpec, Outputs, Sample

from ._shared import empty_output

LARGEST = 1 << 24
"""Scores that the reference and its gradient hold at a time: 64 MB in float32, all of those of one 512-pixel image."""

SAMPLINGS = ("stride", "tf")
NORMS = ("max", "sum_eps")
MASK_MODES = ("zero", "neginf")
DIVISORS = ("const4", "overlap")


def _float32(x: float) -> float:
    """x rounded to float32, by arithmetic alone (Veltkamp's splitting): compilers trace it, and take it for a constant."""
    t = x * (2.0**29 + 1.0)
    return t - (t - x)


def source_index(size: int, factor: int, sampling: str) -> list[int]:
    """The rows (or columns) of `size` that nearest-neighbour reduction by `factor` reads.

    "stride": 0, factor, 2·factor, …; "tf": TensorFlow 1's resize with align_corners, ⌊i·(size − 1)/(size/factor − 1) + ½⌋
    with each step rounded to float32, which decides the ties.
    """
    count = size // factor
    if sampling == "stride":
        return list(range(0, count * factor, factor))
    step = _float32((size - 1) / (count - 1)) if count > 1 else float(factor)
    return [min(int(_float32(_float32(i * step) + 0.5)), size - 1) for i in range(count)]


def reduced(x: Tensor, factor: int, sampling: str) -> Tensor:
    """x (B, C, H, W) → (B, C, H/factor, W/factor) by nearest neighbour."""
    if sampling == "stride":
        return x[:, :, ::factor, ::factor]
    rows, columns = (torch.tensor(source_index(n, factor, sampling), device=x.device) for n in x.shape[2:])
    return x.index_select(2, rows).index_select(3, columns)


def _along(x: Tensor, step: int, fill: float) -> Tensor:
    """What comes `step` (±1) later in row-major order over the last two dimensions; `fill` beyond the ends."""
    flat = x.flatten(-2)
    moved = F.pad(flat[..., 1:], (0, 1), value=fill) if step > 0 else F.pad(flat[..., :-1], (1, 0), value=fill)
    return moved.unflatten(-1, x.shape[-2:])


def _down(x: Tensor, step: int, fill: float) -> Tensor:
    """Likewise in column-major order."""
    return _along(x.transpose(-1, -2), step, fill).transpose(-1, -2)


_Move = Callable[[Tensor, int, float], Tensor]


def _moved(x: Tensor, move: _Move, steps: int, fill: float) -> Tensor:
    for _ in range(abs(steps)):
        x = move(x, 1 if steps > 0 else -1, fill)
    return x


def _neighbours(cells: Tensor, grid: Sequence[int], move: _Move, reach: int) -> list[Tensor]:
    """For each of 2·reach + 1 shifts: the cell that each of `cells` becomes, −1 where there is none."""
    index = torch.arange(grid[0] * grid[1]).view(*grid)
    return [_moved(index, move, d, -1).flatten()[cells] for d in range(-reach, reach + 1)]


def _diagonal_sums(scores: Tensor, have: Tensor, want: list[Tensor], grid: Sequence[int], move: _Move) -> Tensor:
    """Scores of `have` cells (B, n, L) → for each wanted cell the sum over shifts of both cells."""
    row = torch.full((grid[0] * grid[1] + 1,), len(have))  # the last one, of zeros, for cells that do not exist
    row[have] = torch.arange(len(have))
    padded = F.pad(scores, (0, 0, 0, 1))
    reach = len(want) // 2
    parts = (
        _moved(padded[:, row[cells].to(scores.device)].unflatten(-1, grid), move, d, 0.0)
        for d, cells in enumerate(want, -reach)
    )
    return sum(parts, start=torch.zeros((), dtype=scores.dtype, device=scores.device)).flatten(-2)


def allowed_keys(mask: Tensor | None, grid: Sequence[int], patch_size: int, device: torch.device) -> Tensor:
    """(1|B, L), False where a patch of the key touches a hole; pixels outside the image are none."""
    if mask is None:
        return torch.ones(1, grid[0] * grid[1], dtype=torch.bool, device=device)
    hole = (mask != 0).float()
    return F.max_pool2d(hole, patch_size, 1, patch_size // 2).eq(0).flatten(1)


def attend(
    foreground: Tensor,
    background: Tensor,
    mask: Tensor | None,
    patch_size: int,
    stride: int,
    rate: int,
    fuse_size: int,
    softmax_scale: float,
    sampling: str,
    norm: str,
    eps: float,
    mask_mode: str,
    divisor: str,
    queries: Tensor | None,
    want_offsets: bool,
) -> tuple[Tensor, Tensor]:
    """The definition: output and, if wanted, offsets; a strip of rows of cells at a time where L×L scores are many."""
    b, c, h, w = foreground.shape
    grid, wide = (h // rate, w // rate), torch.promote_types(foreground.dtype, torch.float32)
    cells = grid[0] * grid[1]
    with torch.autocast(foreground.device.type, enabled=False):  # logits reach thousands
        source, target = background.to(wide), foreground.to(wide)
        probes = F.unfold(reduced(target, rate, sampling), patch_size, padding=patch_size // 2)
        keys = F.unfold(reduced(source, rate, sampling), patch_size, padding=patch_size // 2)
        squares = keys.square().sum(1, keepdim=True)
        squares = squares.clamp_min(eps**2) if norm == "max" else squares + keys.shape[1] * eps
        before, after = rate // 2, rate - rate // 2
        values = F.unfold(F.pad(source, (before, after, before, after)), 2 * rate, stride=rate)
        allowed = allowed_keys(mask, grid, patch_size, foreground.device).unsqueeze(1)
        on_grid = torch.zeros(grid, dtype=torch.bool, device=foreground.device)
        on_grid[::stride, ::stride] = True
        reach = fuse_size // 2

        def strip(first: int, last: int, probes: Tensor, lengths: Tensor, keys: Tensor, values: Tensor):  # type: ignore[no-untyped-def]
            centre = torch.arange(first * grid[1], last * grid[1])
            columns = _neighbours(centre, grid, _down, reach)
            middle = torch.cat(columns).clamp_min(0).unique()
            rows = _neighbours(middle, grid, _along, reach)
            have = torch.cat(rows).clamp_min(0).unique()
            scores = probes[:, :, have.to(probes.device)].mT @ keys / lengths
            scores = _diagonal_sums(scores, have, rows, grid, _along)
            scores = _diagonal_sums(scores, middle, columns, grid, _down)
            masked = 0.0 if mask_mode == "zero" else -torch.inf
            logits = torch.where(allowed, softmax_scale * scores, masked)
            logits = torch.where(on_grid.flatten(), logits, -torch.inf)
            weights = torch.softmax(logits, -1)
            if mask_mode == "zero":
                weights = torch.where(allowed, weights, 0.0)
            size = ((last - first + 1) * rate, (grid[1] + 1) * rate)
            best = weights.detach().argmax(-1) if want_offsets else centre
            return F.fold(values @ weights.mT, size, 2 * rate, stride=rate), best

        tall = max(1, min(grid[0], LARGEST // (max(1, b) * cells * grid[1])))
        starts = range(0, grid[0], tall)
        total = target.new_zeros(b, c, h + rate, w + rate)
        best = []
        for first in starts:
            last = min(first + tall, grid[0])
            operands = (first, last, probes, squares.sqrt(), keys, values)
            if len(starts) > 1 and torch.is_grad_enabled():  # the gradient computes each strip again
                part, found = checkpoint(strip, *operands, use_reentrant=False, preserve_rng_state=False)
            else:
                part, found = strip(*operands)
            best.append(found)
            total = total + F.pad(part, (0, 0, first * rate, h - last * rate))
        out = total[:, :, before : before + h, before : before + w]
        if divisor == "const4":
            out = out / 4
        else:
            out = (
                out
                / F.fold(torch.ones_like(values[:1, : 4 * rate**2]), total.shape[2:], 2 * rate, stride=rate)[
                    :, :, before : before + h, before : before + w
                ]
            )
        if queries is not None:
            out = torch.where((queries != 0).repeat_interleave(rate, 2).repeat_interleave(rate, 3), out, 0.0)
        out = out.to(foreground.dtype)
        if not want_offsets:
            return out, out
        own = torch.arange(cells, device=out.device)
        index = torch.cat(best, 1)
        found = torch.stack((index // grid[1] - own // grid[1], index % grid[1] - own % grid[1]), 1)
        return out, found.view(b, 2, *grid).int()


def _reference(
    foreground: Tensor,
    background: Tensor,
    mask: Tensor | None = None,
    *,
    patch_size: int = 3,
    stride: int = 1,
    rate: int = 2,
    fuse_size: int = 3,
    softmax_scale: float = 10.0,
    sampling: str = "stride",
    norm: str = "max",
    eps: float = 1e-4,
    mask_mode: str = "zero",
    divisor: str = "const4",
    queries: Tensor | None = None,
) -> Tensor:
    return attend(
        foreground, background, mask, patch_size, stride, rate, fuse_size, softmax_scale, sampling, norm, eps, mask_mode,
        divisor, queries, want_offsets=False,
    )[0]  # fmt: skip


def check(
    foreground: Tensor,
    background: Tensor,
    mask: Tensor | None,
    patch_size: int,
    stride: int,
    rate: int,
    fuse_size: int,
    softmax_scale: float,
    sampling: str,
    norm: str,
    eps: float,
    mask_mode: str,
    divisor: str,
    queries: Tensor | None,
) -> Tensor:
    """Raise `ValueError` for what does not fit; return the output, not filled in."""
    if foreground.dim() != 4 or not foreground.is_floating_point():
        raise ValueError(
            f"foreground is {tuple(foreground.shape)} {foreground.dtype}; accepted: (B, C, h, w), floating point"
        )
    if (background.shape, background.dtype, background.device) != (
        foreground.shape,
        foreground.dtype,
        foreground.device,
    ):
        raise ValueError(
            f"background is {tuple(background.shape)} {background.dtype} on {background.device}; accepted: what foreground "
            f"is, {tuple(foreground.shape)} {foreground.dtype} on {foreground.device}"
        )
    if (
        rate < 1
        or stride < 1
        or patch_size < 1
        or patch_size % 2 == 0
        or fuse_size < 0
        or (fuse_size and fuse_size % 2 == 0)
    ):
        raise ValueError(
            f"patch_size is {patch_size}, stride {stride}, rate {rate}, fuse_size {fuse_size}; accepted: 1 or more, the sizes "
            "odd, fuse_size 0 for no propagation"
        )
    b, c, h, w = foreground.shape
    if 0 in (c, h, w) or h % rate or w % rate:
        raise ValueError(
            f"foreground is {c}×{h}×{w}; accepted: sizes of 1 or more, height and width divisible by rate ({rate})"
        )
    for name, value, accepted in (
        ("sampling", sampling, SAMPLINGS),
        ("norm", norm, NORMS),
        ("mask_mode", mask_mode, MASK_MODES),
        ("divisor", divisor, DIVISORS),
    ):
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps is {eps}; accepted: positive, because all-zero patches are divided by it")
    shape = (1, h // rate, w // rate)
    for name, t in (("mask", mask), ("queries", queries)):
        if t is not None and (t.dim() != 4 or t.shape[0] not in (1, b) or tuple(t.shape[1:]) != shape):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; accepted: (1 or {b}, {', '.join(map(str, shape))})")
        if t is not None and t.device != foreground.device:
            raise ValueError(f"{name} is on {t.device}; accepted: foreground's {foreground.device}")
    return empty_output(foreground.shape, foreground)


def _out(*args: object) -> Outputs:
    return (check(*args),)  # type: ignore[arg-type]


def refuses(
    foreground: Tensor,
    background: Tensor,
    mask: Tensor | None,
    patch_size: int,
    stride: int,
    rate: int,
    fuse_size: int,
    *rest: object,
) -> Iterator[str]:
    """Patches other than 3×3, rates other than 2, propagation over other than 3 cells."""
    if patch_size != 3 or rate != 2 or fuse_size not in (0, 1, 3):
        yield (
            f"patch_size is {patch_size}, rate {rate}, fuse_size {fuse_size}; the kernels are written for 3, 2, and 3 or none"
        )


def _cuda_refuses(foreground: Tensor, *rest: object) -> Iterator[str]:
    """Likewise; and images of more than 2²⁴ pixels, 2¹⁸ channels, or 2³⁰ cells in a batch."""
    yield from refuses(foreground, *rest)  # type: ignore[arg-type]
    b, c, h, w = foreground.shape
    if h * w > 1 << 24 or c > 1 << 18 or b * (h // 2) * (w // 2) > 1 << 30:
        yield f"foreground is {b}×{c}×{h}×{w}; the launch plan takes up to 2²⁴ pixels, 2¹⁸ channels and 2³⁰ cells"


def samples(level: str) -> Iterator[Sample]:
    def sample(id: str, b: int, c: int, h: int, w: int, mask: int = 0, **kwargs: object) -> Sample:
        shapes: dict[str, tuple[int, ...]] = {"foreground": (b, c, h, w), "background": (b, c, h, w)}
        rate = int(kwargs.get("rate", 2))  # type: ignore[call-overload]
        if mask:
            shapes["mask"] = (mask, 1, h // rate, w // rate)
        if kwargs.pop("some", False):
            shapes["queries"] = (b, 1, h // rate, w // rate)
        return Sample(id, shapes, kwargs, masks=("mask", "queries"))

    if level == "bench":
        # DeepFill v2 (96 channels), v1 (128) and a wider port (192) at 256, 512 and 1024 pixels.
        for c, side in ((96, 64), (96, 128), (128, 128), (192, 128), (96, 256)):
            yield sample(f"{c}x{side}x{side}", 1, c, side, side, mask=1)
        return
    soft = {"softmax_scale": 0.25}
    yield sample("odd_grid", 2, 3, 10, 14, mask=2, **soft)
    yield sample("one", 1, 1, 2, 2)
    yield sample("hard", 1, 18, 24, 20, mask=1, softmax_scale=2.0)
    yield sample("row", 1, 4, 2, 20, mask=1, **soft)
    yield sample("column", 2, 2, 18, 2, mask=1, norm="sum_eps", **soft)
    yield sample("plain", 1, 5, 12, 12, mask=1, fuse_size=0, divisor="overlap", mask_mode="neginf", **soft)
    yield sample("tf", 1, 6, 12, 16, mask=1, sampling="tf", **soft)
    yield sample("strided", 1, 6, 12, 10, mask=1, stride=2, divisor="overlap", **soft)
    yield sample("some", 2, 7, 12, 14, mask=2, some=True, **soft)
    yield sample("wide_patch", 1, 2, 9, 12, mask=1, patch_size=5, rate=3, fuse_size=5, **soft)
    yield sample("empty_batch", 0, 2, 4, 4)
    if level == "full":
        yield sample("v2", 1, 96, 32, 32, mask=1, **soft)
        yield sample("v1", 2, 128, 24, 40, mask=1, norm="sum_eps")
        yield sample("threads", 2, 33, 46, 36, mask=2, mask_mode="neginf", divisor="overlap", **soft)
        yield sample("wide", 1, 20, 12, 150, mask=1, **soft)
        yield sample("wide_some", 1, 20, 30, 134, mask=1, some=True, **soft)


def cost(foreground: Tensor, background: Tensor, mask: Tensor | None, patch_size: int, stride: int, rate: int,
         *rest: object) -> Cost:  # fmt: skip
    b, c, h, w = foreground.shape
    cells = h // rate * (w // rate)
    # Gram matrix and four phases of pasting; diagonal sums and softmax are about 30 operations a pair.
    pairs = b * cells * float(cells)
    return Cost(flops=pairs * (2 * c + 8 * c + 30), bytes=3.0 * foreground.numel() * foreground.element_size())


SPEC = OpSpec(
    name="contextual_attention",
    summary="patch matching, propagation, masked softmax and patch pasting without a matrix of all scores",
    reference=_reference,
    out=_out,
    lanes={
        "triton": Lane(refuses=refuses),
        "cuda": Lane(refuses=_cuda_refuses),
        "cupy": Lane(refuses=_cuda_refuses),
        "cpu": Lane(refuses=refuses),
    },
    samples=samples,
    cost=cost,
)

_call = register(SPEC)


def grid_mask(
    mask: Tensor | None,
    size: Sequence[int],
    rate: int,
    mask_sampling: Sequence[tuple[str, int]] | None,
    mask_batch: str,
) -> Tensor | None:
    """The mask of the caller, (1|B, 1, n·h/rate, n·w/rate), as a bool mask of cells.

    Raises: `ValueError` where sizes or options do not fit.
    """
    if mask_batch not in ("each", "first"):
        raise ValueError(f"mask_batch is {mask_batch!r}; accepted: each, first")
    if mask is None or len(size) < 2 or min(size) < rate:
        return mask  # features without cells: the op's own check says what is wrong with them
    grid = (size[0] // rate, size[1] // rate)
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; accepted: (1 or B, 1, n·{grid[0]}, n·{grid[1]})")
    hops = (("stride", max(1, mask.shape[2] // grid[0])),) if mask_sampling is None else tuple(mask_sampling)
    factor = 1
    for name, n in hops:
        if name not in SAMPLINGS or n < 1:
            raise ValueError(
                f"mask_sampling has ({name!r}, {n}); accepted: names {', '.join(SAMPLINGS)}, factors from 1"
            )
        factor *= n
    if tuple(mask.shape[2:]) != (grid[0] * factor, grid[1] * factor):
        times = "n" if mask_sampling is None else factor
        raise ValueError(
            f"mask is {mask.shape[2]}×{mask.shape[3]}; accepted: {times} times the grid of {grid[0]}×{grid[1]} cells"
        )
    for name, n in hops:
        mask = reduced(mask, n, name) if n > 1 else mask
    return (mask[:1] if mask_batch == "first" else mask) != 0


def contextual_attention(
    foreground: Tensor,
    background: Tensor,
    mask: Tensor | None = None,
    *,
    patch_size: int = 3,
    stride: int = 1,
    rate: int = 2,
    fuse_size: int = 3,
    softmax_scale: float = 10.0,
    sampling: str = "stride",
    mask_sampling: Sequence[tuple[str, int]] | None = None,
    mask_batch: str = "each",
    norm: str = "max",
    eps: float = 1e-4,
    mask_mode: str = "zero",
    divisor: str = "const4",
    queries: Tensor | None = None,
) -> Tensor:
    """`foreground` rebuilt from patches of `background`.

    Args:
        foreground: (B, C, h, w), h and w divisible by `rate`; float32, bfloat16, float16 (float64: reference only); any
            strides. Its patches ask.
        background: as foreground. Its patches are keys and values.
        mask: (1|B, 1, n·h/rate, n·w/rate) for any n (image size is usually 4h × 4w), **1 = hole**, any value but 0 counts,
            any dtype; None for no hole. A key is usable where its whole patch is free of holes.
        patch_size: side of the patches compared, odd.
        stride: of the keys: 2 offers every other row and column of patches to the softmax (the paper's strided background).
        rate: reduction for matching; values are patches of 2·rate pixels.
        fuse_size: cells over which scores are propagated along both orders, odd; 0 for no propagation.
        softmax_scale: factor λ on the propagated scores.
        sampling: which pixels the matching grid takes: "stride" (0, rate, 2·rate, …; the PyTorch ports) or "tf" (the
            original's nearest neighbour with aligned corners).
        mask_sampling: hops from the mask to the grid, such as (("tf", 4), ("tf", 2)) of the original; None for one of "stride".
        mask_batch: "each" sample has its mask, or the "first" is used for all, as most ports do.
        norm: keys are divided by "max" (‖b_k‖, eps) or by √(‖b_k‖² + C·patch_size²·eps), "sum_eps".
        eps: see norm.
        mask_mode: unusable keys keep logit 0 and then lose their weight, without renormalisation ("zero"), or have none at
            all ("neginf"; a sample without a usable key is NaN, as in mmagic).
        divisor: "const4" (borders darken, as in the original) or the true "overlap" of patches.
        queries: (1|B, 1, h/rate, w/rate), nonzero where a cell's output is needed; elsewhere it is 0 and costs nothing.

    Returns:
        (B, C, h, w), dtype of foreground, channels_last if that is, else contiguous. Differentiable in foreground and
        background; above 2²⁴ scores gradients are computed in strips, never with a matrix of all scores.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the message names the argument.
        UnsupportedError: a backend forced by `use_backend` cannot run this call.

    Scores, softmax and sums are float32 whatever the dtype: logits reach thousands, so half precision would choose other
    patches. With all keys masked and mask_mode="zero" the output is 0. Defaults are those of the common PyTorch ports; the
    original is `sampling="tf", mask_sampling=(("tf", 4), ("tf", 2)), mask_batch="first"`. Source: Yu et al., CVPR 2018,
    section 4, and the code of both DeepFill releases.
    """
    cells = grid_mask(mask, foreground.shape[-2:], rate, mask_sampling, mask_batch) if rate > 0 else mask
    return _call(  # type: ignore[no-any-return]
        foreground, background, cells, patch_size, stride, rate, fuse_size, softmax_scale, sampling, norm, eps, mask_mode,
        divisor, None if queries is None else queries != 0,
    )  # fmt: skip

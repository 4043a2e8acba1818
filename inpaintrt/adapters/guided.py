"""guided-diffusion's UNet in whatever copy: the whole network channels-last, its blocks fused (`guided_blocks`).

A network is read into rows of blocks. What its code does with them (which output is kept for which block of the way up,
what embedding they are given, what is cast and when) is found without computing anything: in a copy that shares the
weights, each block is replaced by a stand-in that returns noise of the right shape, and what each was given must be what
the plan says, to the last bit. So a network of any size is recognised in the time that its small blocks take to be tried.

Embeddings depend on the timestep and the label alone. `StepTable` holds them for a whole schedule, as every block needs
them.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaintrt.models.guided_layers import timestep_embedding
from inpaintrt.runtime.swap import disabled
from inpaintrt.testing.recipe import image

from .engine import convolved
from .ffc import refuses_tensor
from .folding import memory_format_of
from .guided_blocks import (
    ADAPTERS as BLOCK_ADAPTERS,
)
from .guided_blocks import (
    Attention,
    Block,
    Residual,
    applied,
    blocks_in,
    modulated,
    normed,
    refuses_gradient,
    size_after,
)
from .trial import Verdicts, bare_copy, settings_of

# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A UNet by its parts.

    down: rows of blocks after the first convolution, each of whose output is kept. up: rows that are given the features and
    what was kept last.
    """

    time: tuple[Any, Any]
    labels: Any
    first: Any
    down: list[list[Block]]
    middle: list[Block]
    up: list[list[Block]]
    norm: Any
    last: Any

    @property
    def blocks(self) -> list[Block]:
        return [block for row in (*self.down, self.middle, *self.up) for block in row]

    @property
    def residuals(self) -> list[Residual]:
        return [block for block in self.blocks if isinstance(block, Residual)]

    @property
    def multiple(self) -> int:
        """What heights and widths must be multiples of."""
        halvings = [block for row in self.down for block in row if size_after(block, (2,)) == (1,)]
        return 2 ** len(halvings)


def network_of(module: Any) -> Network | str | None:
    """None for what is no such UNet, a sentence for one of which a part cannot be read."""
    parts = module._modules
    down, up, middle, out, time = (
        parts.get(name) for name in ("input_blocks", "output_blocks", "middle_block", "out", "time_embed")
    )
    if not (isinstance(down, nn.ModuleList) and isinstance(up, nn.ModuleList) and len(down) == len(up)):
        return None
    if not all(isinstance(row, nn.Sequential) for row in (middle, out, time, *down, *up)):
        return None
    linears = [layer for layer in time.children() if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    ends = list(out.children())  # type: ignore[union-attr]
    first = next(down[0].children(), None)
    if len(linears) != 2 or len(ends) != 3 or not isinstance(ends[0], nn.GroupNorm):
        return None
    if not isinstance(first, nn.Conv2d) or len(down[0]) != 1 or not isinstance(ends[-1], nn.Conv2d):  # type: ignore[arg-type]
        return None
    rows: list[list[Block]] = []
    width, widths = first.out_channels, [first.out_channels]
    for row in (*down[1:], middle, *up):
        if len(rows) >= len(down):
            width += widths.pop()
        blocks = blocks_in(row, width)
        if isinstance(blocks, str):
            return f"it has {blocks}"
        width = blocks[-1].widths[1] if blocks else width
        rows.append(blocks)
        if len(rows) < len(down):
            widths.append(width)
    n = len(down) - 1
    return Network(
        (linears[0], linears[1]), parts.get("label_emb"), first, rows[:n], rows[n], rows[n + 1 :], ends[0], ends[-1]
    )


# ---- the fused form -------------------------------------------------------------------------------------------------


def embedding(network: Network, timesteps: Tensor, y: Tensor | None) -> Tensor:
    """SiLU of the embedding of timesteps (B,) and labels (B,) or None, as blocks' linear layers take it."""
    before, after = network.time
    emb = modulated(before, timestep_embedding(timesteps, before.in_features).to(before.weight.dtype))
    emb = modulated(after, F.silu(emb))
    return F.silu(emb if network.labels is None else emb + network.labels(y))


def modulations(network: Network, timesteps: Tensor, y: Tensor | None) -> Sequence[Tensor]:
    """What every residual block makes of the embedding, in their order: (B, channels or twice as many)."""
    if (rows := kept(network, timesteps, y)) is not None:
        return rows
    with torch.autocast(timesteps.device.type, enabled=False):
        emb = embedding(network, timesteps, y)
        return [modulated(block.linear, emb) for block in network.residuals]


def has_half_torso(network: Network) -> bool:
    """Whether convolutions in blocks are 16 bits wide, and all else float32: `use_fp16` of the public configurations."""
    sides = network.first.weight.dtype, network.last.weight.dtype
    return sides in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32))


def denoised(network: Network, x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The network's output for images and what residual blocks are given.

    Of a 16-bit torso the image is cast at its border, as the public code does.
    """
    formats = memory_format_of(x), memory_format_of(network.last.weight)
    given = iter(rows)

    def run(blocks: Sequence[Block], h: Any) -> Any:
        for block in blocks:
            h = applied(block, h, next(given) if isinstance(block, Residual) else None)
        return h

    first, last = network.first, network.last
    halved = has_half_torso(network)
    h = x.contiguous(memory_format=torch.channels_last)
    h = convolved(first, h.to(first.weight.dtype) if halved else h, first.weight, first.bias)
    skips = [h]
    for blocks in network.down:
        h = run(blocks, h)
        skips.append(h)
    h = run(network.middle, h)
    for blocks in network.up:
        h = run(blocks, (h, skips.pop()))
    h = convolved(last, normed(network.norm, h.to(x.dtype) if halved else h), last.weight, last.bias)
    return h.contiguous(
        memory_format=torch.channels_last if torch.channels_last in formats else torch.contiguous_format
    )


# ---- a schedule's embeddings, kept ----------------------------------------------------------------------------------

_ROWS = "_inpaintrt_rows"


class StepTable:
    """What every residual block of a UNet makes of each timestep of a schedule (and each label), computed once.

    `table[i]` is a plain tensor of timesteps that carries its row: `model(x, table[i], y)` computes with it what it would
    compute with `timesteps[i]`, and an accelerated model reads the row instead of multiplying by the weights of some forty
    linear layers. Whatever loses the row (`.to`, `+`, an original forward) loses time only. A row is not read once the
    model's weights, or the timesteps, have been written to or replaced since.

    Writes through `.data` are noticed on a CPU; on a GPU, where looking would wait for it, they need a new table.

    Args:
        model: a UNet of guided-diffusion's kind, accelerated or not.
        timesteps: (N,), of all steps, on the model's device.
        y: (B,) labels of the images that will be denoised together, for a model that has classes.
        batch: number of images, where y does not tell.

    Raises: `ValueError` for another model, other shapes, or labels that are missing or superfluous.
    """

    def __init__(self, model: nn.Module, timesteps: Tensor, y: Tensor | None = None, *, batch: int = 1) -> None:
        network = network_of(model)
        if not isinstance(network, Network):
            raise ValueError(
                f"model is a {type(model).__name__}; accepted: a UNet of guided-diffusion's kind {network or ''}"
            )
        if timesteps.dim() != 1 or (y is None) != (network.labels is None) or (y is not None and y.dim() != 1):
            raise ValueError(
                f"timesteps is {tuple(timesteps.shape)}, y {None if y is None else tuple(y.shape)}; accepted: (N,), and "
                f"{'None' if network.labels is None else '(B,)'}"
            )
        self._y, self._count = y, batch if y is None else len(y)
        with torch.no_grad(), torch.autocast(timesteps.device.type, enabled=False):
            self._steps = timesteps[:, None].repeat(1, self._count)
            labels, places = (None, None) if y is None else y.unique(return_inverse=True)
            each = timesteps[:, None].expand(-1, 1 if labels is None else len(labels))
            emb = torch.stack([embedding(network, step, labels) for step in each])
            self._table = torch.cat([modulated(block.linear, emb) for block in network.residuals], dim=2)
        self._places: Tensor | None = None if labels is None or len(labels) == 1 else places
        self._widths = [block.linear.out_features for block in network.residuals]
        self._state, self._version = _state_of(network), _version(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, i: int | Tensor) -> Tensor:
        """(B,) timesteps of step i, which carry what the blocks need. A tensor, int64 (), is not read by the host."""
        step, row = (
            t[i] if isinstance(i, int) else t.index_select(0, i.reshape(1))[0] for t in (self._steps, self._table)
        )
        row = row.expand(self._count, -1) if self._places is None else row.index_select(0, self._places)
        if _version(self._steps) == self._version:  # else a step was written to, and this may be it
            step.__dict__[_ROWS] = row.split(self._widths, dim=1), self._state, self._y, _version(step)
        return step


def kept(network: Network, timesteps: Tensor, y: Tensor | None) -> Sequence[Tensor] | None:
    """The rows that timesteps carry, where they still hold for this network and these labels."""
    carried = None if torch.compiler.is_compiling() else timesteps.__dict__.get(_ROWS)
    if carried is None:
        return None
    rows, state, labels, version = carried
    if labels is not y or version != _version(timesteps) or state != _state_of(network):
        return None
    return rows  # type: ignore[no-any-return]


def _state_of(network: Network) -> tuple[Any, ...]:
    """Identity and version of all weights that a table depends on, and on the CPU some of their values.

    Writing to `.data` leaves versions alone. On a GPU that stays unseen: looking at values would wait for the device.
    """
    layers = [*network.time, *([] if network.labels is None else [network.labels])]
    layers += [block.linear for block in network.residuals]
    tensors = [t for layer in layers for t in (layer.weight, getattr(layer, "bias", None)) if t is not None]
    samples = [t.detach().flatten()[:: max(1, t.numel() // 8)][:8] for t in tensors if t.device.type == "cpu"]
    places = tuple((t.data_ptr(), _version(t), t.dtype) for t in tensors)
    return *places, tuple(torch.cat(samples).tolist()) if samples else ()


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


# ---- what a network's code does with its blocks ---------------------------------------------------------------------


@dataclass(frozen=True)
class Wiring:
    """keywords: whether a call may have other keywords than x, timesteps and y, which the code does not look at."""

    keywords: bool


class _StandIns:
    """A copy of a network, which shares its weights, with stand-ins for its blocks that return noise and keep their inputs."""

    def __init__(self, module: nn.Module) -> None:
        shared: dict[int, Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self.twin = bare_copy(module, shared)
        network = network_of(self.twin)
        assert isinstance(network, Network)
        self.network, self.given, self.made = network, [], []  # type: ignore[var-annotated]
        first = network.first
        self.side = network.multiple
        self.x = image("probe/guided/x", 1, first.in_channels, self.side, 2 * self.side).to(first.weight)
        size: Sequence[int] = self.x.shape[2:]
        self._stand_in(first, first.out_channels, size)
        for block in network.blocks:
            size = size_after(block, size)
            self._stand_in(block.module, block.widths[1], size)
        self._stand_in(self.twin.out, network.last.out_channels, size)

    def _stand_in(self, module: nn.Module, channels: int, size: Sequence[int]) -> None:
        at = len(self.made)
        self.made.append(image(f"probe/guided/{at}", 1, channels, *size).to(self.x))

        def forward(*args: Any) -> Tensor:
            self.given.append((at, args))
            return self.made[at]  # type: ignore[no-any-return]

        module.__dict__["forward"] = forward

    def run(self, t: Tensor, y: Tensor | None, keywords: dict[str, Any]) -> Any:
        self.given.clear()
        given = (self.x, t) if y is None else (self.x, t, y)
        with torch.no_grad(), disabled(), torch.random.fork_rng(devices=[]):
            return self.twin(*given, **keywords)

    def planned(self) -> list[tuple[Tensor, bool]]:
        """What each stand-in should be given, and whether the embedding, too."""
        network, at, plan = self.network, 0, [(self.x, False)]
        skips, h = [self.made[0]], self.made[0]
        rows = [*network.down, network.middle, *network.up]
        for i, row in enumerate(rows):
            if i > len(network.down):
                h = torch.cat([h, skips.pop()], dim=1)
            for block in row:
                at += 1
                plan.append((h, isinstance(block, Residual)))
                h = self.made[at]
            if i < len(network.down):
                skips.append(h)
        return [*plan, (h, False)]

    def obeys(self, result: Any, emb: Tensor) -> bool:
        """Whether the last run went by the plan."""
        plan = self.planned()
        if [at for at, _ in self.given] != list(range(len(plan))):
            return False
        for (_, args), (h, embedded) in zip(self.given, plan, strict=True):
            if len(args) != 1 + embedded or not torch.equal(args[0], h):
                return False
            if embedded and (args[1].shape != emb.shape or not _near(F.silu(args[1]), emb)):
                return False
        return isinstance(result, Tensor) and torch.equal(result, self.made[-1])


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for the last bit of frequencies, which t = 999 makes 6e-5 of."""
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max())


def _judge(module: Any) -> Wiring | str:
    try:
        copy = _StandIns(module)
        t = torch.tensor([421], device=copy.x.device)
        y = None if copy.network.labels is None else torch.zeros_like(t) + (copy.network.labels.num_embeddings - 1)
        with torch.no_grad():
            emb = embedding(copy.network, t, y)
        if not copy.obeys(copy.run(t, y, {}), emb):
            return "it has the parts of guided-diffusion's UNet, but its code does something else with them"
    except Exception as error:  # somebody else's code, which may want other arguments than its structure suggests
        return f"the original cannot run on the probe's input: {type(error).__name__}: {error}"
    parameters = list(inspect.signature(_original(module).forward).parameters.values())[4:]
    others = {p.name: object() for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        others["gt"] = object()
    try:  # what is no tensor can be passed on, but not be used
        return Wiring(bool(others) and copy.obeys(copy.run(t, y, others), emb))
    except Exception:
        return Wiring(False)


def _original(module: Any) -> Any:
    return getattr(type(module), "__inpaintrt_original__", type(module))


_wirings: Verdicts[Wiring] = Verdicts(_judge)


def wiring_of(module: Any, network: Network | str | None) -> Wiring | str:
    """How a network's code is called; "" for what is no such network, else a sentence says why it has no fused form."""
    if not isinstance(network, Network):
        return network or ""
    forms = tuple(
        (type(b), b.widths, (b.heads, b.new_order) if isinstance(b, Attention) else b.way) for b in network.blocks
    )
    key = (settings_of(module), forms, tuple(map(len, (*network.down, *network.up))))
    return _wirings.of(module, key)


# ---- what was read, kept for the next call --------------------------------------------------------------------------

_read: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], list[Any], Network | str | None, Wiring | str]] = (
    weakref.WeakKeyDictionary()
)


def read(module: Any) -> tuple[Network | str | None, Wiring | str]:
    """`network_of` and `wiring_of`, read again only where a module inside, or any attribute of one, is another object.

    A network has a thousand modules, and reading them takes longer than looking at their attributes' identities. What was
    looked at is held, so that no other object takes its place in memory.
    """
    if torch.compiler.is_compiling():
        network = network_of(module)
        return network, wiring_of(module, network)
    held = [value for part in module.modules() for value in (part, *vars(part).values()) if value is not module]
    ids = list(map(id, held))
    known = _read.get(module)
    if known is None or known[0] != ids:
        network = network_of(module)
        known = _read[module] = (ids, held, network, wiring_of(module, network))
    return known[2:]


# ---- the adapter ----------------------------------------------------------------------------------------------------


class UNetAdapter:
    """A whole UNet: (image, timesteps[, labels]) → image."""

    name = "guided.unet"
    ops: tuple[str, ...] = ("group_norm_silu", "fused_conv2d")
    algorithm = "norms with modulation and SiLU in one pass, sums and joins in convolutions; channels-last inside"
    deep = True
    named = True
    takes_keywords = True

    def match(self, module: nn.Module) -> str | None:
        _, form = read(module) if "input_blocks" in module._modules else (None, "")
        return None if isinstance(form, Wiring) else form

    def forward(self, module: Any, x: Tensor, timesteps: Tensor, y: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        network, _wiring = read(module)
        assert isinstance(network, Network)
        rows = modulations(network, timesteps, y)
        if not has_half_torso(network):
            return denoised(network, x, rows)
        with torch.autocast(x.device.type, enabled=False):  # precision="bf16" is for weights of float32
            return denoised(network, x, rows)

    def step_table(self, module: Any, timesteps: Tensor, y: Tensor | None, batch: int) -> StepTable:
        return StepTable(module, timesteps, y, batch=batch)

    def refuses(self, module: Any, *args: Any, **keywords: Any) -> Iterator[str]:
        network, form = read(module)
        if not isinstance(network, Network) or isinstance(form, str):
            yield form or "it is no such UNet any more"  # type: ignore[misc]
            return
        if (keywords or len(args) > 3) and not form.keywords:
            yield f"called with arguments beyond image, timesteps and labels ({', '.join(keywords) or len(args)})"
            return
        x, t, y = (*args, None, None)[:3] if args else (None, None, None)
        halved = has_half_torso(network)
        yield from refuses_tensor(x, (network.last if halved else network.first).weight, network.first.in_channels)
        if not isinstance(x, Tensor) or x.dim() != 4:
            return
        if halved and torch.is_autocast_enabled(x.device.type):
            yield "its blocks are 16 bits wide already, and autocast is on"
        if not isinstance(t, Tensor) or t.shape != (len(x),) or t.device != x.device:
            yield "timesteps are not one number for each image, on its device"
        if (y is None) != (network.labels is None) or (
            y is not None and (not isinstance(y, Tensor) or y.shape != t.shape)
        ):
            yield "labels are missing, superfluous, or not one for each image"
        if any(n % network.multiple or not n for n in x.shape[2:]):
            yield f"the size {tuple(x.shape[2:])} is not a multiple of {network.multiple}"
        yield from refuses_gradient(x)

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: blocks were tried and the wiring compared while it was recognised, whatever the network's size."""
        return iter(())


ADAPTERS = (UNetAdapter(), *BLOCK_ADAPTERS)

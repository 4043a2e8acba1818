"""IPT's wrapper, which cuts an image into overlapping patches and joins what its network makes of them.

The public code computes the patches of all four borders again, and joins on the host. Here each patch is computed once and
joined where it is (`models.ipt_tiles`). The wrapper's rule does not depend on its network, so it is tried with another one,
which is quick and has no symmetry: whoever joins otherwise, or turns the image eight ways, keeps his own code. The public code
moves patches to a GPU and spreads them over several by itself; in the trial all of that stays where the wrapper's weights are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inpaintrt.models.ipt_tiles import MOST, tiled
from inpaintrt.runtime.swap import disabled
from inpaintrt.testing.recipe import image

from .trial import Verdicts, bare_copy, same, settings_of


class _Network(nn.Module):
    """Patches (n, 3, P, P) to (n, 3, s · P, s · P): every pixel of a result depends on its place and on the whole patch."""

    def __init__(self, patch: int, scale: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(image("ipt.network", 3, scale * patch, scale * patch).double(), requires_grad=False)
        self.scale = scale

    def set_scale(self, index: int) -> None:
        """There is one."""

    def forward(self, x: Tensor) -> Tensor:
        larger = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return larger * self.weight + x.mean((1, 2, 3), keepdim=True)


class _Here(TorchFunctionMode):
    """`Tensor.cuda()` gives a tensor on this device, whether or not there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0].to(self.device) if func is Tensor.cuda else func(*args, **(kwargs or {}))


_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """What this thread sends to a GPU, or to several, is computed on a device by the network that it is sent to.

    Of other threads, calls of `data_parallel` pass through; what they had from before is there again at the end.
    """
    public: Any = torch.nn.parallel
    with _one_at_a_time, _Here(device):
        original, own = public.data_parallel, threading.get_ident()

        def data_parallel(module: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != own:
                return original(module, inputs, *args, **kwargs)
            return module(*inputs) if isinstance(inputs, tuple) else module(inputs)

        public.data_parallel = data_parallel
        try:
            yield
        finally:
            public.data_parallel = original


def _device(module: Any) -> torch.device:
    """Where the wrapper's weights are."""
    first = next(module.model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _why_not(module: Any) -> str | None:
    """What keeps a module from having the fused form; empty: nothing; None: it is no such module at all."""
    network, scales, patch = (getattr(module, name, None) for name in ("model", "scale", "patch_size"))
    if not isinstance(network, nn.Module) or not isinstance(getattr(network, "body", None), nn.Module):
        return None
    if getattr(network.body, "query_embed", None) is None or not isinstance(scales, (list, tuple)):
        return None
    if not isinstance(patch, int) or patch < 12 or patch % 12:
        return f"its patches are {patch} pixels; accepted: multiples of 12"
    if not scales or not all(isinstance(scale, int) and scale > 0 for scale in scales):
        return f"its scales are {scales}; accepted: whole numbers"
    return ""


def _judge(module: Any) -> str:
    patch, device = module.patch_size, _device(module)
    for at, scale in enumerate(module.scale):
        network = _Network(patch, scale).to(device)
        copied: Any = bare_copy(module, {id(module.model): network})  # type: ignore[dict-item]
        for rows, columns in ((patch + patch // 4 + 1, patch + patch // 2 + 3), (patch, 2 * patch)):
            x = image("ipt.image", 1, 3, rows, columns).double().to(device)
            try:
                with torch.no_grad(), disabled(), _on(device):
                    exact = copied(x, at)
            except Exception as error:  # somebody else's code
                return f"the original cannot run on the trial's image: {type(error).__name__}: {error}"
            with torch.no_grad():
                elsewhere = isinstance(exact, Tensor) and exact.device != device
                if elsewhere or not same(tiled(network, x, patch, scale), exact):
                    return "it joins patches by another rule than IPT's, or computes something else"
    return ""


_verdicts: Verdicts[None] = Verdicts(_judge)  # type: ignore[arg-type]


def _verdict(module: Any) -> str:
    key = settings_of(module), tuple(module.scale), module.patch_size, _device(module).type
    return _verdicts.of(module, key) or ""


class ImageAdapter:
    """A wrapper around IPT's network, called with an image and the place of a task."""

    name = "ipt.image"
    ops: tuple[str, ...] = ()
    algorithm = "every patch once, joined where it is computed"
    deep = True
    holds = True
    named = True

    def match(self, module: nn.Module) -> str | None:
        why_not = _why_not(module)
        if why_not is None:
            return ""
        return why_not or _verdict(module) or None

    def forward(self, module: Any, x: Tensor, idx_scale: int) -> Tensor:
        module.idx_scale = idx_scale
        if hasattr(module.model, "set_scale"):
            module.model.set_scale(idx_scale)
        batch = getattr(getattr(module, "args", None), "crop_batch_size", MOST)
        return tiled(module.model, x, module.patch_size, module.scale[idx_scale], batch=batch)

    def refuses(self, module: Any, *args: Any) -> Iterator[str]:
        why_not = _why_not(module)
        if why_not is None or why_not or (why_not := _verdict(module)):
            yield why_not or "it is no wrapper of IPT any more"
            return
        if len(args) != 2 or not isinstance(args[1], int) or not 0 <= args[1] < len(module.scale):
            yield "not called with an image and the place of a task"
            return
        x, patch = args[0], module.patch_size
        if not isinstance(x, Tensor) or x.dim() != 4 or tuple(x.shape[:2]) != (1, 3) or min(x.shape[2:]) < patch:
            yield f"its input is no image (1, 3, H, W) of at least {patch} × {patch} pixels"
        elif any(x.device != p.device for p in module.model.parameters()):
            yield "the image lies elsewhere than the weights"

    def probe_inputs(self, module: Any) -> Iterator[tuple[Any, ...]]:
        """None: its rule was compared in `match`, with a network that is quicker."""
        return iter(())


ADAPTERS = (ImageAdapter(),)

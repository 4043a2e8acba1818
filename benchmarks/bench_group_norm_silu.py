"""group_norm_silu at the shapes of guided diffusion's UNets, against eager torch and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaintrt import ops
from inpaintrt.ops.group_norm_silu import SPEC
from inpaintrt.runtime.library import dispatchers
from inpaintrt.runtime.policy import use_backend

SAMPLES = {sample.id: sample for sample in SPEC.samples("bench")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
GROUPS = 32


def as_networks_write_it(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = F.group_norm(x, GROUPS, weight, bias)
    return F.silu(y * (1 + scale[..., None, None]) + shift[..., None, None])


def without_film(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def make(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, layout: str, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, *vectors = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes.values())
    return [x.to(memory_format=LAYOUTS[layout]), *vectors]


@pytest.mark.parametrize("film", [True, False], ids=["film", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", SAMPLES)
@torch.inference_mode()
def test_group_norm_silu(versus, device, sample, dtype, layout, film):
    tensors = make(SAMPLES[sample].shapes, DTYPES[dtype], layout, device)[: 5 if film else 3]
    named = dict(zip(("x", "weight", "bias", "scale", "shift"), tensors, strict=False))
    eager = as_networks_write_it if film else without_film

    def ours() -> Tensor:
        return ops.group_norm_silu(num_groups=GROUPS, **named)

    def forced(backend: str) -> Tensor:
        with use_backend(backend, op=SPEC.name):
            return ours()

    candidates = {"eager": lambda: eager(*tensors), "inpaintrt": ours}
    args = SPEC.bind(num_groups=GROUPS, **named)
    able = [backend for backend, reasons in dispatchers[SPEC.name].reasons(args, args[0]).items() if not reasons]
    for backend in able[1:]:  # the first is what the dispatcher takes; the others show whether it should
        candidates[f"inpaintrt on {backend}"] = lambda backend=backend: forced(backend)
    if not versus.smoke:
        candidates["compile"] = versus.compiled(eager, *tensors)
    truth = SPEC.bind(num_groups=GROUPS, **{name: tensor.double() for name, tensor in named.items()})
    versus(
        candidates, truth=lambda: SPEC.run_reference(*truth), cost=SPEC.cost(*args),
        device=device, dtype=args[0].dtype, shape=args[0].shape, op=SPEC.name, layout=layout, direction="forward",
    )  # fmt: skip

"""Deterministic weights from a parameter's name, so that probes, tests and benchmarks need no weight files.

Every floating-point parameter and every batch-norm running statistic is drawn from a generator seeded with the CRC-32 of
its state-dict key: the same values on every machine. Weights are scaled by fan-in, so signals keep their size through
layers; a probe with these weights sees terms that a fresh or zero-initialised model would hide.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def tensor_for(key: str, shape: tuple[int, ...]) -> Tensor:
    """float32 values for state-dict entry `key`."""
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    if key.endswith("running_var"):
        value = 0.5 + noise.random(shape, dtype=np.float32)
    elif key.endswith("running_mean"):
        value = 0.1 * noise.standard_normal(shape, dtype=np.float32)
    else:
        value = noise.standard_normal(shape, dtype=np.float32)
        if len(shape) >= 2:
            value /= np.sqrt(np.prod(shape[1:], dtype=np.float64)).astype(np.float32)
        elif key.endswith("weight"):
            value = 1.0 + 0.1 * value
        else:
            value = 0.1 * value
    return torch.from_numpy(np.asarray(value, dtype=np.float32)).reshape(shape)


def state_for(module: nn.Module) -> dict[str, Tensor]:
    """Recipe values for all parameters and running statistics of `module`; other buffers as they are (copies)."""
    state = {
        name: tensor_for(name, tuple(p.shape)).to(p) for name, p in module.named_parameters() if p.is_floating_point()
    }
    for name, buffer in module.named_buffers():
        statistic = name.endswith(("running_mean", "running_var"))
        state[name] = tensor_for(name, tuple(buffer.shape)).to(buffer) if statistic else buffer.detach().clone()
    return state


def fill(module: nn.Module) -> nn.Module:
    """Overwrite `module`'s parameters and running statistics in place with recipe values; returns it."""
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in state_for(module).items():
            if name in own:
                own[name].copy_(value)
    return module


def image(name: str, *shape: int) -> Tensor:
    """Uniform [0, 1) float32 test input named `name`."""
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(noise.random(shape, dtype=np.float32))

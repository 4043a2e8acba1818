"""One meaning for inverse real FFTs over several dimensions, whatever the device.

For a spectrum that is not Hermitian, libraries disagree. On a CPU torch follows the numpy rule: complex inverses over
all dimensions but the last, then a real inverse over that one. On CUDA it makes one cuFFT plan, which assumes that the
spectrum is that of a real image and reads only half of the bins kx = 0 and kx = w/2; other devices have other habits.
A LaMa built on `torch.fft.irfftn` is therefore another function on a GPU than on the CPU it may have been trained on,
and differs there from ours for no fault of either. `numpy_inverse` lets an original be asked again under the rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class numpy_inverse(TorchDispatchMode):
    """Within this context every inverse real FFT over several dimensions follows the numpy rule.

    It works below autograd, where all spellings (irfft2, irfftn, hfftn) are one operator, and so inside TorchScript, too.
    `calls` counts the transforms that were rewritten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._fft_c2r.default and len(args[1]) > 1:
            spectrum, dims, normalization, last_size = args
            self.calls += 1
            rows = torch.ops.aten._fft_c2c.default(spectrum, dims[:-1], normalization, False)
            return torch.ops.aten._fft_c2r.default(rows, dims[-1:], normalization, last_size)
        return func(*args, **(kwargs or {}))


def inverse_note(as_it_is: list[Tensor], by_rule: list[Tensor]) -> str:
    """The sentence for a user whose original follows another rule; both lists are its outputs, in float64."""
    changed = sum((a - b).double().square().sum().item() for a, b in zip(as_it_is, by_rule, strict=True))
    whole = sum(b.double().square().sum().item() for b in by_rule)
    relative = (changed / whole) ** 0.5 if whole else 0.0
    return (
        "on this device the original's inverse FFT over two dimensions assumes the spectrum of a real image, which its "
        "ReLU has broken (cuFFT's 2-D inverse does so); ours follows the numpy rule, as the CPU does, and agrees with the "
        f"original computed by that rule, from which the original's own output differs by {relative:.2g} of the RMS"
    )

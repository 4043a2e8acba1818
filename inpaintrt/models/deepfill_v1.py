"""DeepFill v1: the first network with contextual attention, of plain convolutions, as a plain PyTorch network.

Yu et al., "Generative Image Inpainting with Contextual Attention", CVPR 2018. 3.6 M parameters. State-dict keys are those
of the public ports that have weights; the port "jy" computes what the original TensorFlow network does, from weights in
the layout of "daa".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import deepfill
from .deepfill import DeepFill, DeepFillOptions

PORTS = {
    "daa": DeepFillOptions(
        layout="daa", width=32, gate="none", bounded="clip", mask_to_stage2=True, norm="sum_eps",
    ),
    "jy": DeepFillOptions(
        layout="daa", width=32, gate="none", bounded="clip", mask_to_stage2=True, padding="tf", sampling="tf", mask_hops=2,
    ),
    "mma": DeepFillOptions(
        layout="mma", width=32, decoder_width=32, gate="none", bounded="clip", padding="reflect", match_activation="elu",
        mask_to_stage2=True, mask_batch="each", mask_mode="neginf", divisor="overlap",
    ),
}  # fmt: skip


class DeepFillV1(DeepFill):
    """The DeepFill v1 generator.

    Args:
        port: whose weights it takes and whose numbers it gives:

            - "daa": daa233/generative-inpainting-pytorch, trained there or converted from TensorFlow;
            - "jy": JiahuiYu/generative_inpainting (v1.0.0), the original, with the keys of "daa";
            - "mma": open-mmlab/mmagic.
        options: of `inpaintrt.models.deepfill.DeepFillOptions`, in place of the port's; `stride` and `rate` save work and
            memory in the attention at large sizes, as the paper proposes.

    Images are RGB in [-1, 1] with 0 under the hole; results are in [-1, 1]. `inpaint` takes and gives [0, 1].
    """

    PORTS = PORTS

    def __init__(self, port: str = "daa", **options: Any) -> None:
        super().__init__(port, **options)


_BY_LAYOUT = {"daa": "coarse_generator.conv1.conv.weight", "mma": "stage1.encoder.enc1.conv.weight"}
ANCHORS = tuple(_BY_LAYOUT.values())
NAMES = r"(coarse_generator|fine_generator|stage[12])(\.|$)"
PREFIX = ""
FOREIGN = ()


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `DeepFillV1`; "jy" is never among them, because its keys are those of "daa"."""
    return deepfill.config_from_state_dict(state, PORTS, _BY_LAYOUT)


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    return deepfill.config_from_modules(modules, set(_BY_LAYOUT))

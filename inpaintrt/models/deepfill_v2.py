"""DeepFill v2: free-form inpainting with gated convolutions and contextual attention, as a plain PyTorch network.

Yu et al., "Free-Form Image Inpainting with Gated Convolution", ICCV 2019. 4.1 M parameters at width 24. State-dict keys
are those of the public ports that have weights, and so are padding, sampling, masks and the order of channels; the port
"jy" computes what the original TensorFlow network does, from weights in the layout of "nip_tf".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import deepfill
from .deepfill import DeepFill, DeepFillOptions

PORTS = {
    "nip": DeepFillOptions(layout="nip"),
    "nip_tf": DeepFillOptions(layout="nip_tf", padding="tf", sampling="tf", fuse_size=0),
    "jy": DeepFillOptions(layout="nip_tf", padding="tf", sampling="tf", mask_hops=2),
    "mma": DeepFillOptions(
        layout="mma", decoder_width=32, gated_rgb=True, padding="reflect", match_activation="elu", mask_to_stage2=True,
        mask_batch="each", mask_mode="neginf", divisor="overlap",
    ),
    "csq": DeepFillOptions(
        layout="csq", width=48, gate="two", gated_rgb=True, spectral_norm=True, ones=False, known_range=(0.0, 1.0),
        hole_value=1.0, fills_hole=True, mask_to_stage2=True, norm="sum_eps",
    ),
}  # fmt: skip


class DeepFillV2(DeepFill):
    """The DeepFill v2 generator.

    Args:
        port: whose weights it takes and whose numbers it gives:

            - "nip": nipponjo/deepfillv2-pytorch, `networks.py` (files `states_pt_*`);
            - "nip_tf": the same, `networks_tf.py` (files `states_tf_*`), which does not propagate scores;
            - "jy": JiahuiYu/generative_inpainting, the original, with the keys of "nip_tf";
            - "mma": open-mmlab/mmagic;
            - "csq": csqiangwen/DeepFillv2_Pytorch, whose spectral norms make outputs drift from call to call.
        options: of `inpaintrt.models.deepfill.DeepFillOptions`, in place of the port's; `stride` and `rate` save work and
            memory in the attention at large sizes, as the paper proposes.

    Images are RGB in [-1, 1] with 0 under the hole, in "csq" in [0, 1] with 1 under it; results are in [-1, 1]. `inpaint`
    takes and gives [0, 1] for every port.
    """

    PORTS = PORTS

    def __init__(self, port: str = "nip", **options: Any) -> None:
        super().__init__(port, **options)


_BY_LAYOUT = {
    "nip": "stage1.conv1.conv.weight",
    "nip_tf": "xconv1.conv.weight",
    "mma": "stage1.encoder.enc1.conv.conv.weight",
    "csq": "coarse.0.conv2d.weight",
}
ANCHORS = tuple(_BY_LAYOUT.values())
NAMES = r"((x|pm|all)?conv\d+(_\w+)?|stage[12]|coarse|refine_\w+|context\w*_attention)(\.|$)"
PREFIX = ""
FOREIGN = ()


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `DeepFillV2`; "jy" is never among them, because its keys are those of "nip_tf"."""
    return deepfill.config_from_state_dict(state, PORTS, _BY_LAYOUT)


def config_from_modules(modules: Mapping[str, Any]) -> dict[str, Any]:
    return deepfill.config_from_modules(modules, set(_BY_LAYOUT))

"""Filling holes by a diffusion model: schedules, tables, and chains that blend the known pixels into every step."""

from inpaintrt.runtime.errors import Cancelled, CheckpointError

from .checkpoint import Checkpoint
from .ddnm_chain import ddnm
from .guidance import classifier_guidance
from .loop import Progress
from .repaint_chain import draws, repaint
from .rows import repaint_rows
from .schedule import Call, Schedule
from .sdedit_chain import sdedit
from .tables import Tables

__all__ = [
    "Call", "Cancelled", "Checkpoint", "CheckpointError", "Progress", "Schedule", "Tables", "classifier_guidance", "ddnm",
    "draws", "repaint", "repaint_rows", "sdedit",
]  # fmt: skip

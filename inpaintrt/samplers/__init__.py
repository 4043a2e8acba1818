"""Filling holes by a diffusion model: schedules, tables, and chains that blend the known pixels into every step."""

from .schedule import Call, Schedule
from .tables import Tables

__all__ = ["Call", "Schedule", "Tables"]

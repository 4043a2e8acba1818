"""Reference networks in plain PyTorch, with the state-dict layout of the public checkpoints."""

from .loading import create, load

__all__ = ["create", "load"]

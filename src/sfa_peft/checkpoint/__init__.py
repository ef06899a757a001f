"""A saved adapter: how positions are coded, what its files may hold, and how they are written, read and checked."""

from .error import CheckpointError

__all__ = ["CheckpointError"]

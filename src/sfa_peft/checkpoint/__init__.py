"""A saved adapter: how positions are coded, what its files may hold, and how they are written and checked."""

from .validation import CheckpointError

__all__ = ["CheckpointError"]

"""The checkpoint format: coding of positions, packing, checks, reading and writing of adapter files."""

from .error import CheckpointError

__all__ = ["CheckpointError"]

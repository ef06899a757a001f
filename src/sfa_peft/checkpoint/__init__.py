"""What an adapter's file may hold, checked before anything of it reaches a model."""

from .validation import CheckpointError, check_state_dict

__all__ = ["CheckpointError", "check_state_dict"]

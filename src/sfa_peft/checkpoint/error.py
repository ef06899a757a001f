"""The one error of everything that reads what was saved."""


class CheckpointError(ValueError):
    """A checkpoint does not fit the model, contradicts itself, or is damaged. Nothing of it was loaded."""

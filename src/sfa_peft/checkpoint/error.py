"""The error that all readers of saved files raise."""


class CheckpointError(ValueError):
    """A checkpoint does not fit the model, contradicts itself, or is damaged. Nothing was loaded.

    Raised when an adapter, its config or a ticket is read. The message says what is wrong and what to do.
    """

"""The errors that a user of the scripts can mend."""


class FlagError(ValueError):
    """Flags that do not fit together, or not the model."""


class DataError(ValueError):
    """The dataset, or the way in which it was described, cannot be used."""

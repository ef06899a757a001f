"""The errors that a user of the scripts can mend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FlagError(ValueError):
    """Flags that do not fit together, or not the model."""


class DataError(ValueError):
    """The dataset, or the way in which it was described, cannot be used."""


@contextmanager
def told(*kinds: type[Exception]) -> Iterator[None]:
    """End the script with a sentence, and not with a traceback, if an error of these kinds is raised."""
    try:
        yield
    except kinds as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error

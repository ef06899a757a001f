"""Saves the progress of a search, so that a stopped search can resume."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import CheckpointError
from ..checkpoint.files import load_tensors, write_whole
from ..checkpoint.seal import digest_of

FORMAT = "sfa_peft search 5"


@dataclass
class Progress:
    """The progress of a search.

    Attributes:
        losses: The loss of each completed step, over all rounds.
        tensors: The state of the training, by name.
    """

    losses: list[float]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class SearchCheckpoint:
    """A file with the progress of a search.

    Attributes:
        path: The file.
        settings: All settings that affect the search. A file with other settings cannot be resumed.
    """

    path: Path
    settings: dict[str, Any]

    def save(self, progress: Progress) -> None:
        """Write the progress. An existing file is replaced atomically."""
        described = {"settings": json.dumps(self.settings), "losses": json.dumps(progress.losses)}
        digest = _digest(progress.tensors, described)
        write_whole(self.path, progress.tensors, {"format": FORMAT, "digest": digest, **described})

    def load(self) -> Progress | None:
        """Read the progress, or None if there is no file.

        Raises:
            CheckpointError: If the file is damaged.
            ValueError: If the file belongs to another search. The message names the differing setting.
        """
        if not self.path.exists():
            return None
        try:
            tensors, metadata = load_tensors(self.path)
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"checkpoint={str(self.path)!r} is not a search that this version can resume. Delete the file to "
                    f"start again, or name another one."
                )
            settings, losses = _described(metadata, tensors)
        except CheckpointError as error:
            raise self.damaged(error) from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"checkpoint={str(self.path)!r} belongs to another search: {name} was {settings.get(name)!r} and "
                    f"is now {value!r}. Delete the file to start again."
                )
        return Progress(losses, tensors)

    def damaged(self, why: object) -> CheckpointError:
        return CheckpointError(f"checkpoint={str(self.path)!r} is damaged ({why}). Delete the file to start again.")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _digest(tensors: dict[str, Tensor], described: dict[str, str]) -> str:
    """SHA-256 of the progress, since a changed value would give another ticket."""
    return hashlib.sha256(json.dumps([digest_of(tensors), described], sort_keys=True).encode()).hexdigest()


def _described(metadata: dict[str, str], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], list[float]]:
    """The settings and the losses in a file."""
    described = {name: metadata.get(name, "") for name in ("settings", "losses")}
    if metadata.get("digest") != _digest(tensors, described):
        raise CheckpointError("its digest differs")
    try:
        settings, losses = (json.loads(text) for text in described.values())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(error)) from error
    is_list = isinstance(losses, list) and all(isinstance(loss, float) and math.isfinite(loss) for loss in losses)
    if not isinstance(settings, dict) or not is_list:
        raise CheckpointError("its description is not that of a search")
    return settings, losses

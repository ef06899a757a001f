"""Saves the progress of a search, so that a stopped search can resume."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint.files import write_whole

FORMAT = "sfa_peft search 3"


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
        metadata = {
            "format": FORMAT,
            "settings": json.dumps(self.settings),
            "losses": json.dumps(progress.losses),
        }
        write_whole(self.path, progress.tensors, metadata)

    def load(self) -> Progress | None:
        """Read the progress, or None if there is no file.

        Raises:
            ValueError: If the file belongs to another search, or is damaged. The message names the differing setting.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"checkpoint={str(self.path)!r} is not a search that this version can resume. Delete the file "
                        f"to start again, or name another one."
                    )
                settings = json.loads(metadata["settings"])
                for name, value in self.settings.items():
                    if settings.get(name) != value:
                        raise ValueError(
                            f"checkpoint={str(self.path)!r} belongs to another search: {name} was "
                            f"{settings.get(name)!r} and is now {value!r}. Delete the file to start again."
                        )
                losses = json.loads(metadata["losses"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"checkpoint={str(self.path)!r} is damaged ({error}). Delete the file to start again."
            ) from error
        return Progress(losses, tensors)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

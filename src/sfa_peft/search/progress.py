"""A search's progress on disk, so that a search that was stopped goes on where it was."""

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
    """Where a search is.

    Attributes:
        losses: The loss of each step done, over all rounds.
        tensors: What training holds, by names of its own.
    """

    losses: list[float]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class SearchCheckpoint:
    """A file that holds the progress of one search.

    Attributes:
        path: The file.
        settings: Everything that decides what the search does; a file with other settings is not resumed.
    """

    path: Path
    settings: dict[str, Any]

    def save(self, progress: Progress) -> None:
        """Write the progress; the old file is replaced as a whole."""
        metadata = {
            "format": FORMAT,
            "settings": json.dumps(self.settings),
            "losses": json.dumps(progress.losses),
        }
        write_whole(self.path, progress.tensors, metadata)

    def load(self) -> Progress | None:
        """Read the progress, or None if there is no file.

        Raises:
            ValueError: If the file is of another search, or damaged; says which setting differs.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"checkpoint={str(self.path)!r} is no search that this version can resume.")
                settings = json.loads(metadata["settings"])
                for name, value in self.settings.items():
                    if settings.get(name) != value:
                        raise ValueError(
                            f"checkpoint={str(self.path)!r} is of another search: {name} was {settings.get(name)!r} "
                            f"and is {value!r}. Delete the file to start anew."
                        )
                losses = json.loads(metadata["losses"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"checkpoint={str(self.path)!r} is damaged ({error}). Delete the file to start anew."
            ) from error
        return Progress(losses, tensors)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

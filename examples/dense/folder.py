"""A run's folder: what an earlier run has left in it stays whole until a new result is, and takes its place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import FlagError

RUN = "run.json"
RESULTS = "results.json"
TICKET = "ticket.safetensors"
SEARCH = "search.safetensors"
CHECKPOINTS = "checkpoints"
BEST = "best"  # the adapter of the step with the best score, where that is not the last
COMPARED = "compared"  # the runs of other methods; no product of this one
PICTURES = "pictures"
LOGS = "logs"
REPORT = "report.html"
TICKET_PICTURE = "ticket.png"
TRAINED = (
    *("adapter_config.json", "adapter_model.safetensors", "base_config.json", "preprocessor_config.json"),
    *("head.safetensors", "model.safetensors"),
)
PRODUCTS = (
    *(RUN, RESULTS, TICKET, TICKET_PICTURE, SEARCH, CHECKPOINTS, BEST, PICTURES, LOGS, REPORT, "README.md"),
    *TRAINED,
)
UNFINISHED = "unfinished_run"
COMPLETE = "complete_run"
DISCARDED = "discarded_run"
STEP = re.compile("step_([0-9]+)")  # what a checkpoint is called

DESCRIBED = {"task": str, "model": str, "id2label": dict, "args": dict}  # in `run.json`
SIZES = ("trained_backbone_parameters", "backbone_parameters")
MEASURED = {"method": str, "before": dict, "after": dict, **dict.fromkeys(SIZES, int)}  # in `results.json`


class RunFolder:
    """The folder that `--output_dir` names, and the one inside where a run writes until it is complete.

    Attributes:
        path: The folder.
        work: Where the run writes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.work = path, path / UNFINISHED

    @property
    def is_finished(self) -> bool:
        """Whether a run has ended here."""
        return (self.path / RUN).is_file()

    @property
    def is_unfinished(self) -> bool:
        """Whether a run has begun here, and not ended."""
        return self.work.is_dir()

    def mend(self) -> None:
        """Do the rest, if a run was killed while its complete result was put in place."""
        if (self.work / RESULTS).is_file():
            self.put_in_place()
        elif (self.path / COMPLETE).is_dir():
            self._move()
        if (self.path / DISCARDED).is_dir():
            shutil.rmtree(self.path / DISCARDED)

    def check_is_free(self, overwrite: bool) -> None:
        """Check that a run may begin here.

        Raises:
            FlagError: If that would replace what is here, and `overwrite` does not say so, or it is of no run.
        """
        where = f"--output_dir {self.path}"
        if self.path.exists() and not self.path.is_dir():
            raise FlagError(f"{where} is no folder")
        foreign = [] if self.is_finished else [path.name for path in self._products()]
        if foreign:
            raise FlagError(f"{where}: {', '.join(foreign)} would be replaced, and is of no run; name another folder")
        if overwrite:
            return
        if self.is_unfinished:
            resumable = (self.work / SEARCH).is_file() or checkpoints_in(self.work / CHECKPOINTS)
            go_on = "go on with it by --resume_from_checkpoint latest" if resumable else "it left no checkpoint"
            raise FlagError(
                f"{where}: a run has begun there and not ended; {go_on}, begin anew with --overwrite, or name another "
                f"folder"
            )
        if self.is_finished:
            remedy = "replace the run with --overwrite, or name another folder"
            flags = read_json(self.path / RUN, DESCRIBED, remedy)
            raise FlagError(
                f"{where}: a finished run is there ({flags['task']}, --method {flags['args'].get('method')}); replace "
                f"it with --overwrite, or name another folder"
            )

    def begin(self, described: Mapping[str, Any], checkpoint: Path | None, goes_on: bool) -> None:
        """Make ready for a run.

        Args:
            described: What `run.json` tells.
            checkpoint: That it goes on from, if any.
            goes_on: Whether it goes on with the run that is unfinished here.
        """
        if not goes_on and self.work.exists():
            # Renamed, then removed: a kill must not leave its checkpoints without the flags that they are of.
            self.work.rename(self.path / DISCARDED)
            shutil.rmtree(self.path / DISCARDED)
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / RUN, described)
        if checkpoint is not None and not goes_on:
            self._take(checkpoint)

    def _take(self, checkpoint: Path) -> None:
        """Copy a checkpoint of another run, or of the one that has ended here, with what belongs to it."""
        source = run_of(checkpoint)
        if (checkpoint / TICKET).is_file():
            shutil.copy(checkpoint / TICKET, self.work / TICKET)
        for name in (BEST, PICTURES, LOGS):
            if (source / name).is_dir():
                shutil.copytree(source / name, self.work / name)
        # The best step of a run that has ended may be its last, which lies in the run's own folder.
        if not (source / BEST).is_dir() and any((source / name).is_file() for name in TRAINED):
            (self.work / BEST).mkdir()
            for name in (*TRAINED, RUN, "README.md", TICKET_PICTURE):
                if (source / name).is_file():
                    shutil.copy(source / name, self.work / BEST / name)
        copy = self.work / CHECKPOINTS / f"unfinished_{checkpoint.name}"
        shutil.copytree(checkpoint, copy)
        copy.rename(copy.with_name(checkpoint.name))

    def put_in_place(self) -> None:
        """Replace what an earlier run has left by what this one has written. What is of no run stays."""
        for path in self._products():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.work.rename(self.path / COMPLETE)
        self._move()

    def _move(self) -> None:
        for path in (self.path / COMPLETE).iterdir():
            path.rename(self.path / path.name)
        (self.path / COMPLETE).rmdir()

    def _products(self) -> Iterator[Path]:
        return (self.path / name for name in PRODUCTS if (self.path / name).exists())


class Products:
    """What a script makes in a folder: of an earlier call nothing is replaced until all of the new is there.

    Args:
        folder: Of `--output_dir`.
        names: What the script writes into it.
        record: Of these the one that says that they are of the script, a JSON.
        what: What they are, for people.
        overwrite: Whether earlier ones may be replaced.

    Attributes:
        work: Where the script writes, once it has begun.

    Raises:
        FlagError: If earlier ones would be replaced, and `overwrite` does not say so, or files of something else.
    """

    def __init__(self, folder: Path, names: Sequence[str], record: str, what: str, overwrite: bool) -> None:
        self.folder, self.names, self.record = folder, names, record
        self.work = folder / f"unfinished_{Path(record).stem}"
        where = f"--output_dir {folder}"
        if folder.exists() and not folder.is_dir():
            raise FlagError(f"{where} is no folder")
        there = [name for name in names if (folder / name).exists()]
        if there and record not in there:
            raise FlagError(
                f"{where}: {', '.join(there)} would be replaced, and is not of {what}; name another folder"
            )
        if there and not overwrite:
            raise FlagError(f"{where}: {what} is there; replace it with --overwrite, or name another folder")

    def begin(self) -> Path:
        """Make the folder to write into, without what a call that was stopped has left there."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        return self.work

    def put(self, content: Mapping[str, Any]) -> None:
        """Write the record, and move all to its place, for what was there before."""
        write_json(self.work / self.record, content)
        (self.work / self.record).rename(self.folder / self.record)  # first: it says that what comes is the script's
        for name in self.names:
            if name == self.record:
                continue
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            if (self.work / name).exists():
                (self.work / name).rename(path)
        self.work.rmdir()


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint is of."""
    return checkpoint.resolve().parents[1]


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first. What else lies there is passed over."""
    found = [path for path in folder.glob("step_*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_json(path: Path, needed: Mapping[str, type], remedy: str) -> dict[str, Any]:
    """Read what `write_json` has written.

    Args:
        path: The file.
        needed: The fields that must be there, and of which type.
        remedy: What to do if it is damaged.

    Raises:
        FileNotFoundError: If there is no such file.
        FlagError: If it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FlagError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise FlagError(f"{path} is damaged (it holds no fields); {remedy}")
    for name, kind in needed.items():
        if not isinstance(content.get(name), kind):
            raise FlagError(f"{path} is damaged (it has no {name!r}, or not as expected); {remedy}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is whole, or not there."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole, or not there, after a kill and after a loss of power. It is UTF-8."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

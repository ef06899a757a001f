"""Reads tensors, and writes files atomically: a process that is killed leaves the old files or the new ones."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .error import CheckpointError

MAX_HEADER = 1 << 24  # bytes of the header of a safetensors file
_STAGE = ".sfa-save-"


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Its folder is created if it does not exist."""
    with staged(path.parent) as stage:
        save_tensors(stage / path.name, tensors, metadata)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: If it is not a safetensors file, or damaged.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        raise CheckpointError(f"{str(path)!r} is not a file.")
    # Opened once: safetensors opens a file twice, and a save in between would mix two versions.
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if MAX_HEADER < size < len(data):
        raise CheckpointError(f"{str(path)!r} has a header of {size:,} bytes, and no adapter has {MAX_HEADER:,}.")
    try:
        tensors = load(data)
        metadata: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        return tensors, metadata
    except (SafetensorError, RuntimeError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is not a safetensors file, or damaged: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file. The same content always gives the same bytes.

    safetensors writes the metadata in a random order, so the header is replaced by a sorted one of the same size.
    """
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous()
        # safetensors refuses tensors that share memory, such as tied parameters.
        address = flat.untyped_storage().data_ptr()
        separate[name] = flat.clone() if address in storages else flat
        storages.add(address)
    save_file(separate, path, metadata)
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise RuntimeError(f"safetensors wrote a header of {size} bytes, but the sorted one has {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))


@contextmanager
def staged(folder: Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder to write to. At the end, each file in it is moved to `folder` atomically.

    All files are synced to the disk first and then renamed, in the order of their names. Files named in `last` come
    after all others, in that order. Other files in `folder` stay. An error inside leaves `folder` as it was. Temporary
    folders of killed processes are removed.

    Args:
        folder: The folder of the files. It is created if it does not exist.
        last: Names of files, without their folder.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    # From the name, a later save can see whether this process still runs.
    stage = Path(tempfile.mkdtemp(prefix=f"{_STAGE}{socket.gethostname()}-{os.getpid()}-", dir=folder))
    try:
        yield stage
        files = sorted(p.relative_to(stage) for p in stage.rglob("*") if p.is_file())
        files.sort(key=lambda file: last.index(file.name) if file.name in last else -1)
        for file in files:
            _sync(stage / file)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / file, folder / file)
            # Without this sync, a power cut could keep a later rename but lose this one.
            _sync((folder / file).parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _remove_leftovers(folder: Path) -> None:
    for stage in folder.glob(f"{_STAGE}*"):
        host, _, pid = stage.name.removeprefix(_STAGE).rpartition("-")[0].rpartition("-")
        if host == socket.gethostname() and pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(stage, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders, and needs no sync of them
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Loads datasets in the columns that the Hub uses, whole or as a stream, and the names of their classes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from .limits import whole
from .samples import Classes, DataError, printable
from .scenes import CLASSES, THINGS, make_scenes

SCENES = {"train": 400, "validation": 80}
NAMES = ("id2label.json", "label2id.json")


def add_arguments(parser: argparse.ArgumentParser, columns: Mapping[str, str]) -> None:
    """The flags that say where the data is and what its columns are called."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", help="A dataset's Hub id or folder. Default: embedded scenes, made from --data_seed."
    )
    group.add_argument("--dataset_config", help="The dataset's configuration, if it has several.")
    group.add_argument("--dataset_revision", help="A branch, tag or commit of the dataset.")
    group.add_argument("--train_split", default="train")
    group.add_argument("--validation_split", default="validation", help="May be a part, such as 'train[90%%:]'.")
    group.add_argument(
        "--streaming", action="store_true", help="Read the dataset as it comes, without downloading it."
    )
    group.add_argument("--shuffle_buffer", type=whole(1), default=1000, help="Rows that a stream is shuffled among.")
    group.add_argument("--max_train_samples", type=whole(1))
    group.add_argument("--max_eval_samples", type=whole(1))
    group.add_argument("--data_seed", type=whole(0), default=0, help="Of the embedded scenes.")
    for role, column in columns.items():
        group.add_argument(f"--{role}_column", default=column, help=f"Default: {column}.")
    group.add_argument(
        "--bad_data",
        choices=("skip", "error"),
        default="skip",
        help="Rows that cannot be used: skip and count them, or read everything first and stop at what is wrong.",
    )


@dataclass
class Rows:
    """The rows of a split, with images as they are in their files.

    Attributes:
        rows: Of the dataset.
        split: Its name, for messages.
        image_column: Where the image is.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    split: str
    image_column: str

    @property
    def is_stream(self) -> bool:
        return isinstance(self.rows, datasets.IterableDataset)

    @property
    def columns(self) -> list[str]:
        return self.rows.column_names or list(next(iter(self.rows), {}))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def where(self, row: Mapping[str, Any], index: int) -> str:
        """The name of a row's file, and its place in the split."""
        image = row.get(self.image_column)
        path = printable(image.get("path") or "") if isinstance(image, Mapping) else ""
        place = f"row {index} of {self.split}"
        if self.is_stream:  # which is shuffled
            return path or place
        return f"{path} ({place})" if path else place


def load_rows(args: argparse.Namespace, split: str, columns: Mapping[str, str]) -> Rows:
    """The rows of a split, ``train`` or ``validation``.

    Args:
        args: The flags of `add_arguments`.
        split: Which.
        columns: What each column that is needed is called.

    Raises:
        DataError: If there is no such dataset, split or column, or it is empty. Says which there are.
    """
    limit = args.max_train_samples if split == "train" else args.max_eval_samples
    name = args.train_split if split == "train" else args.validation_split
    if args.dataset is None:
        count = min(SCENES[split], limit or SCENES[split])
        rows = make_scenes(count, seed=2 * args.data_seed + (split == "validation"), style="day")
        rows = rows.to_iterable_dataset(num_shards=4) if args.streaming else rows
    else:
        rows = _load(args, name)
        if limit:
            rows = rows.take(limit) if args.streaming else rows.select(range(min(limit, len(rows))))
    if not args.streaming and not len(rows):
        raise DataError(f"split {name!r} of {args.dataset!r} is empty")
    result = Rows(rows, name, columns["image"])
    for role, column in columns.items():
        if column not in result.columns:
            raise DataError(
                f"dataset {args.dataset!r} has no column {column!r}; it has {result.columns}. Name it with "
                f"--{role}_column."
            )
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            result.rows = result.rows.cast_column(column, datasets.Image(decode=False))
    return result


def check_kinds(args: argparse.Namespace, rows: Rows, columns: Mapping[str, str]) -> None:
    """Check that no column that is there holds one number for each row; no role is one.

    Raises:
        DataError: If one does, as where `datasets` has made classes of the names of folders.
    """
    for role, column in columns.items():
        feature = (rows.rows.features or {}).get(column)
        if not isinstance(feature, datasets.ClassLabel | datasets.Value) or feature.dtype == "string":
            continue
        names = f" ({', '.join(feature.names[:6])})" if isinstance(feature, datasets.ClassLabel) else ""
        line = f'{{"image_file_name": "images/1.jpg", "{column}_file_name": "masks/1.png"}}'
        raise DataError(
            f"column {column!r} of dataset {args.dataset!r} holds one number for each row{names}, which is no "
            f"annotation: name another column with --{role}_column. Of folders such as images/ and masks/, `datasets` "
            f"makes one row for each file; to pair the files, write a metadata.jsonl beside the folders, with lines "
            f"such as {line}"
        )


def _load(args: argparse.Namespace, split: str) -> datasets.Dataset | datasets.IterableDataset:
    options = {"revision": args.dataset_revision} if args.dataset_revision else {}
    try:
        return datasets.load_dataset(
            args.dataset, args.dataset_config, split=split, streaming=args.streaming, **options
        )
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise DataError(f"--dataset {args.dataset!r} is neither a folder nor a dataset on the Hub: {error}") from error
    except ValueError as error:
        hint = " Name splits with --train_split and --validation_split." if "split" in str(error).lower() else ""
        raise DataError(f"split {split!r} of dataset {args.dataset!r} cannot be loaded: {error}{hint}") from error


def embedded_classes(things: bool) -> dict[int, str]:
    """The classes of the embedded scenes: of pixels, or of objects."""
    return dict(enumerate(THINGS if things else CLASSES))


def load_classes(
    args: argparse.Namespace, rows: Rows, column: str, key: str | None = None, ignored: Collection[str] = ()
) -> Classes:
    """The classes: of ``--id2label``, of the features of the dataset, or of an `id2label.json` beside it.

    Args:
        args: With `id2label`, a file or ``repo_id/file`` of a dataset repository on the Hub.
        rows: A split, for its features.
        column: Where the classes are.
        key: And where in it.
        ignored: Names that are no class, beside the usual ones.

    Raises:
        DataError: If there are none, or they are damaged.
    """
    if args.id2label:
        return Classes(_read_names(_file_of(args.id2label), args.id2label), ignored)
    if args.dataset is None:
        return Classes(embedded_classes(things=key is not None))
    names = _class_names((rows.rows.features or {}).get(column), key)
    if names:
        return Classes(dict(enumerate(names)), ignored)
    for name in NAMES:
        path = Path(args.dataset) / name
        if not Path(args.dataset).is_dir():
            with suppress(EntryNotFoundError):
                path = Path(hf_hub_download(args.dataset, name, repo_type="dataset", revision=args.dataset_revision))
        if path.is_file():
            return Classes(_read_names(path, str(path)), ignored)
    raise DataError(
        f"dataset {args.dataset!r} does not name its classes: it has neither {' nor '.join(NAMES)}, and no ClassLabel "
        f'in column {column!r}. Give --id2label a file such as {{"0": "sky", ...}}.'
    )


def _file_of(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    parts = name.split("/")
    if len(parts) < 3:
        raise DataError(f"--id2label {name!r} is neither a file nor a `user/repository/file` on the Hub")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), repo_type="dataset"))
    except (EntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError) as error:
        raise DataError(f"--id2label {name!r} is neither a file nor on the Hub: {error}") from error


def _read_names(path: Path, name: str) -> dict[int, str]:
    """Names by ids, of a file that maps ids to names, or names to ids."""
    try:
        pairs = json.loads(path.read_text()).items()
        if all(isinstance(value, int) for _, value in pairs):
            return {i: label for label, i in pairs}
        return {int(i): str(label) for i, label in pairs}
    except (ValueError, AttributeError) as error:
        raise DataError(f'{name!r} must map ids to names, as in {{"0": "sky", ...}}: {error}') from error


def _class_names(feature: Any, key: str | None) -> list[str] | None:
    """The names in a `ClassLabel`, which may lie in lists and in the dict that `key` is of."""
    while isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    if isinstance(feature, Mapping) and key is not None:
        return _class_names(feature.get(key), None)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None

"""Loads datasets in the columns that the Hub uses, whole or as a stream, and the names of their classes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from .errors import DataError
from .layouts import Layout, look
from .limits import whole
from .samples import Classes, printable
from .scenes import CLASSES, THINGS, make_scenes

SCENES = {"train": 400, "validation": 80}
NAMES = ("id2label.json", "label2id.json")
VALIDATION = ("validation", "valid", "val", "dev", "eval")  # what such a split is called
MADE = 0.2  # of the training split, where there is none


def add_arguments(parser: argparse.ArgumentParser, columns: Mapping[str, str]) -> None:
    """The flags that say where the data is and what its columns are called."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", help="A dataset's Hub id or folder. Default: embedded scenes, made from --data_seed."
    )
    group.add_argument("--dataset_config", help="The dataset's configuration, if it has several.")
    group.add_argument("--dataset_revision", help="A branch, tag or commit of the dataset.")
    group.add_argument("--train_split", default="train")
    group.add_argument(
        "--validation_split",
        help="May be a part, such as 'train[90%%:]'. Default: what is called so; else a fifth of the training split.",
    )
    group.add_argument(
        "--streaming", action="store_true", help="Read the dataset as it comes, without downloading it."
    )
    group.add_argument("--shuffle_buffer", type=whole(1), default=1000, help="Rows that a stream is shuffled among.")
    group.add_argument("--max_train_samples", type=whole(1))
    group.add_argument("--max_eval_samples", type=whole(1))
    group.add_argument(
        "--data_seed", type=whole(0), default=0, help="Of the embedded scenes, and of a split that is made."
    )
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
        names: The classes, if what the rows were read from names them.
        colours: Their numbers by the colours of label maps, red first in 24 bits, if it has any.
        told: What a person should know about how the data was understood.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    split: str
    image_column: str
    names: dict[int, str] = field(default_factory=dict)
    colours: dict[int, int] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

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


def load_splits(args: argparse.Namespace, columns: Mapping[str, str], needed: Collection[str]) -> tuple[Rows, Rows]:
    """The rows for training and for validation.

    Args:
        args: The flags of `add_arguments`.
        columns: What each column is called.
        needed: Those that must be there.

    Raises:
        DataError: If there is no such dataset, split or column, or it is empty. Says which there are.
    """
    if args.dataset is None:
        train, validation = (_scenes(args, split, columns["image"]) for split in ("train", "validation"))
    else:
        layout = look(Path(args.dataset), columns)
        train, validation = _of_layout(args, layout, columns) if layout else _of_datasets(args, columns)
    for rows, limit in ((train, args.max_train_samples), (validation, args.max_eval_samples)):
        if limit:
            rows.rows = rows.rows.take(limit) if rows.is_stream else rows.rows.select(range(min(limit, len(rows))))
        if not rows.is_stream and not len(rows):
            raise DataError(f"split {rows.split!r} of {args.dataset!r} is empty")
        for role in needed:
            if columns[role] not in rows.columns:
                raise DataError(
                    f"dataset {args.dataset!r} has no column {columns[role]!r}; it has {rows.columns}. Name it with "
                    f"--{role}_column. docs/own-data.md shows how folders of files are laid out."
                )
        for column, feature in (rows.rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows.rows = rows.rows.cast_column(column, datasets.Image(decode=False))
    return train, validation


def _scenes(args: argparse.Namespace, split: str, image: str) -> Rows:
    rows = make_scenes(SCENES[split], seed=2 * args.data_seed + (split == "validation"), style="day")
    return Rows(rows.to_iterable_dataset(num_shards=4) if args.streaming else rows, split, image)


def _of_layout(args: argparse.Namespace, layout: Layout, columns: Mapping[str, str]) -> tuple[Rows, Rows]:
    """The splits of a folder that `layouts` understands."""
    splits = {
        name or "all": datasets.Dataset.from_list(rows, features=layout.features)
        for name, rows in layout.splits.items()
    }
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
    told = [f"{args.dataset}: {layout.kind} ({counts})", *layout.told]
    only = next(iter(splits)) if len(splits) == 1 and args.train_split not in splits else None
    train_split = only or args.train_split
    for wanted in (train_split, args.validation_split or train_split):
        if wanted not in splits:
            raise DataError(f"{args.dataset} has no split {wanted!r}; it has {', '.join(splits)}")
    validation_split = args.validation_split or ("validation" if "validation" in splits else None)
    validation = splits[validation_split] if validation_split else None
    made = _split(args, splits[train_split], train_split, validation, validation_split, columns["image"], told)
    for rows in made:
        rows.names, rows.colours = layout.names, layout.colours
        if args.streaming:
            rows.rows = rows.rows.to_iterable_dataset(num_shards=min(4, len(rows)))
    return made


def _of_datasets(args: argparse.Namespace, columns: Mapping[str, str]) -> tuple[Rows, Rows]:
    """The splits of what `datasets` loads."""
    split = args.validation_split
    if split is None:
        names = _names_of_splits(args)
        split = next((name for name in VALIDATION if name in names), None)
    validation = _load(args, split) if split else None
    return _split(args, _load(args, args.train_split), args.train_split, validation, split, columns["image"], [])


def _split(
    args: argparse.Namespace,
    train: datasets.Dataset,
    train_split: str,
    validation: datasets.Dataset | None,
    validation_split: str | None,
    image: str,
    told: list[str],
) -> tuple[Rows, Rows]:
    """Rows of both splits; where there is none for validation, it is a part of the other, and that is told.

    Raises:
        DataError: If it cannot be made.
    """
    if validation is None:
        if args.streaming and isinstance(train, datasets.IterableDataset):
            raise DataError(
                f"dataset {args.dataset!r} has no split for validation, and a stream cannot be divided: name "
                f"one with --validation_split"
            )
        if len(train) < 2:
            raise DataError(f"dataset {args.dataset!r} has {len(train)} rows, which cannot be divided for validation")
        parts = train.train_test_split(test_size=max(1, round(MADE * len(train))), seed=args.data_seed)
        train, validation = parts["train"], parts["test"]
        validation_split = f"{train_split}, a fifth"
        told = [
            *told,
            f"{args.dataset} has no validation split: {len(validation)} of {len(train) + len(validation)} rows, drawn "
            f"by --data_seed {args.data_seed}, are kept for it",
        ]
    return Rows(train, train_split, image, told=told), Rows(validation, str(validation_split), image)


def _names_of_splits(args: argparse.Namespace) -> list[str]:
    options = {"revision": args.dataset_revision} if args.dataset_revision else {}
    with _explained(args, "split"):
        return datasets.get_dataset_split_names(args.dataset, args.dataset_config, **options)


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
        raise DataError(
            f"column {column!r} of dataset {args.dataset!r} holds one number for each row{names}, which is no "
            f"annotation: name another column with --{role}_column. Of folders of pictures, `datasets` makes one row "
            f"for each file; docs/own-data.md shows how files that belong together are called."
        )


def _load(args: argparse.Namespace, split: str) -> datasets.Dataset | datasets.IterableDataset:
    options = {"revision": args.dataset_revision} if args.dataset_revision else {}
    with _explained(args, split):
        return datasets.load_dataset(
            args.dataset, args.dataset_config, split=split, streaming=args.streaming, **options
        )


@contextmanager
def _explained(args: argparse.Namespace, split: str) -> Iterator[None]:
    """Errors of `datasets` as sentences."""
    try:
        yield
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
    """The classes, as `named_classes` finds their names.

    Raises:
        DataError: If there are none, or they are damaged.
    """
    names = named_classes(args, rows, column, key)
    if names is None:
        raise DataError(
            f"dataset {args.dataset!r} does not name its classes: it has neither {' nor '.join(NAMES)}, and no "
            f'ClassLabel in column {column!r}. Give --id2label a file such as {{"0": "sky", ...}}.'
        )
    return Classes(names, ignored)


def named_classes(args: argparse.Namespace, rows: Rows, column: str, key: str | None = None) -> dict[int, str] | None:
    """The names: of ``--id2label``, of the rows' source or features, or of an `id2label.json` beside them.

    Args:
        args: With `id2label`, a file or ``repo_id/file`` of a dataset repository on the Hub.
        rows: A split, for its features.
        column: Where the classes are.
        key: And where in it.

    Returns:
        None if nothing names them.

    Raises:
        DataError: If they are damaged.
    """
    if args.id2label:
        return _read_names(_file_of(args.id2label), args.id2label)
    if args.dataset is None:
        return embedded_classes(things=key is not None)
    if rows.names:
        return rows.names
    names = _class_names((rows.rows.features or {}).get(column), key)
    if names:
        return dict(enumerate(names))
    for name in NAMES:
        path = Path(args.dataset) / name
        if not Path(args.dataset).is_dir():
            with suppress(EntryNotFoundError):
                path = Path(hf_hub_download(args.dataset, name, repo_type="dataset", revision=args.dataset_revision))
        if path.is_file():
            return _read_names(path, str(path))
    return None


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

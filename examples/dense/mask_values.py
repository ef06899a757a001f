"""Which classes label maps hold, where nobody names them; and maps of 0 and 255, and of colours."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from .data import Rows, load_classes, named_classes
from .errors import DataError
from .samples import IGNORE_INDEX, BadSampleError, Classes, open_picture

MOST_READ = 2000  # maps are read to find the classes
FEW_READ = 50  # if the classes are named, to see whether 255 is one
MOST_COLOURS = 64  # more are no classes, but the noise of a format such as JPEG


@dataclass
class Values:
    """What is in the label maps that were read.

    Attributes:
        ids: The values of maps of one channel.
        colours: Those of maps of three, red first in 24 bits.
        example: For each value or colour, the first row that has it.
    """

    ids: set[int] = field(default_factory=set)
    colours: set[int] = field(default_factory=set)
    example: dict[int, str] = field(default_factory=dict)


def values_in(rows: Rows, column: str, most: int) -> Values:
    """Read label maps, evenly spaced; those that cannot be read are told of later, with all that is wrong."""
    found = Values()
    places = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)).tolist()
    for place in tqdm(places, desc="looking for the classes in the label maps", disable=len(places) <= FEW_READ):
        row = rows[place]
        try:
            label = np.asarray(open_picture(row[column], "label map"))
        except BadSampleError:
            continue
        where = rows.where(row, place)
        if label.ndim == 3 and not (label[..., :1] == label[..., :3]).all():
            own, into = np.unique(colours_of(label)).tolist(), found.colours
        else:
            own, into = np.unique(label if label.ndim == 2 else label[..., 0]).tolist(), found.ids
        for value in own:
            found.example.setdefault(int(value), where)
        into |= {int(value) for value in own}
        if len(found.colours) > MOST_COLOURS:
            break
    return found


def colours_of(label: np.ndarray) -> np.ndarray:
    """A map of colours as one of numbers: red first in 24 bits."""
    parts = label[..., :3].astype(np.int64)
    return (parts[..., 0] << 16) | (parts[..., 1] << 8) | parts[..., 2]


def load_map_classes(args: argparse.Namespace, rows: Rows, column: str) -> Classes:
    """The classes of label maps: as they are named, or else as the maps show them; what was found is told.

    Raises:
        DataError: If they are damaged, or not named in a stream, which is not read twice.
    """
    names = named_classes(args, rows, column)
    if isinstance((rows.rows.features or {}).get(column), Mapping):  # objects, which are drawn
        if args.reduce_labels:
            raise DataError(
                "--reduce_labels is for masks, and these are drawn from objects: call class 0 'unlabelled' with "
                "--id2label to ignore what no object covers"
            )
        return Classes(names)
    if rows.is_stream or args.dataset is None or args.reduce_labels:
        return load_classes(args, rows, column)
    if rows.colours and not args.id2label:
        return Classes(names, colours=rows.colours)
    names, colours, told = classes_in(rows, column, names or {})
    rows.told += told
    return Classes(names, colours=colours)


def classes_in(rows: Rows, column: str, names: Mapping[int, str]) -> tuple[dict[int, str], dict[int, int], list[str]]:
    """The names and colours of classes that label maps hold, and what to tell about it.

    Args:
        rows: With the maps.
        column: Where they are.
        names: Of the classes, if they are known.

    Raises:
        DataError: If the maps hold colours without end.
    """
    found = values_in(rows, column, FEW_READ if names else MOST_READ)
    if found.ids == {0, IGNORE_INDEX} and not found.colours:
        if names and set(names) != {0, 1}:
            return dict(names), {}, []
        first, second = names.values() if names else ("background", "foreground")
        told = f"the label maps hold 0 and 255: 0 is {first!r}, 255 is {second!r}"
        return {0: first, IGNORE_INDEX: second}, {}, [told if names else f"{told}; --id2label gives other names"]
    if names:
        return dict(names), {}, []
    if len(found.colours) > MOST_COLOURS or len(found.ids) > IGNORE_INDEX:
        first = next(iter(found.example.values()))
        raise DataError(
            f"the label maps hold more than {MOST_COLOURS} values (in {first}, for example), which are no classes: "
            f"save masks as PNG, since JPEG changes their values, without smooth edges; or name the classes with "
            f"--id2label"
        )
    if found.colours:
        order = sorted(found.colours | {i * 0x010101 for i in found.ids})
        named = {i: f"#{colour:06x}" for i, colour in enumerate(order)}
        told = (
            f"the label maps hold {len(order)} colours, and each is a class that is called as its colour; name them "
            f"a class_dict.csv beside the images, with lines such as `road,128,64,128`"
        )
        return named, {colour: i for i, colour in enumerate(order)}, [told]
    ids = sorted(found.ids - {IGNORE_INDEX})
    if set(ids) <= {0, 1} and len(ids) == 2:
        named = {0: "background", 1: "foreground"}
    else:
        named = {i: f"class {i}" for i in ids}
    told = f"nothing names the classes: the label maps hold {', '.join(map(str, ids[:12]))}{', ...' * (len(ids) > 12)}"
    ignored = "; 255 is ignored" if IGNORE_INDEX in found.ids else ""
    return named, {}, [f"{told}{ignored}; name them with --id2label or a classes.txt beside the images"]

"""The `Ticket` class: a ticket that can be saved, inspected, compared, and installed in another model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from ..checkpoint.coding import Code, encode_all, most_positions
from ..checkpoint.files import load_tensors, write_whole
from ..checkpoint.packing import join_codes, split_codes
from ..checkpoint.seal import shapes_in
from ..checkpoint.validation import decoded
from ..layers.granularity import GRANULARITIES, NO_BLOCKS, Granularity, position_dtype
from .quotas import GROUPINGS
from .selection import Parameters, Positions

FORMAT = "sfa_peft ticket 1"

G = TypeVar("G")


def shapes_of(candidates: Parameters) -> dict[str, tuple[int, ...]]:
    """The shape of each candidate, by ``"module.parameter"``."""
    return {f"{module}.{name}": tuple(p.shape) for module, named in candidates.items() for name, p in named.items()}


@dataclass(frozen=True)
class Ticket:
    """The positions that the internal adapters may change, and the widths of the external adapters.

    Attributes:
        positions (`dict[str, dict[str, Tensor]]`):
            For each module and parameter, the sorted indices of the chosen units, 1-D integer tensors.
        shapes (`dict[str, tuple[int, ...]]`):
            The shape of each candidate parameter, by ``"module.parameter"``, also if none of its units was chosen.
        granularity (`Granularity`): The unit that a position counts.
        widths (`dict[str, dict[str, int]]`, defaults to `{}`):
            For each place, the width of the external adapter on each module.
        criterion (`str`, defaults to `""`): The name of the criterion that chose the positions.
    """

    positions: Positions
    shapes: dict[str, tuple[int, ...]]
    granularity: Granularity
    widths: dict[str, dict[str, int]] = field(default_factory=dict)
    criterion: str = ""

    def by_name(self) -> dict[str, Tensor]:
        """The positions in each parameter that has any, by ``"module.parameter"``."""
        return {
            f"{module}.{name}": indices
            for module, parameters in self.positions.items()
            for name, indices in parameters.items()
        }

    def chosen(self, name: str) -> Tensor:
        """The positions in the parameter ``"module.parameter"``, a 1-D integer tensor. It may be empty."""
        module, _, parameter = name.rpartition(".")
        chosen = self.positions.get(module, {}).get(parameter)
        return torch.empty(0, dtype=torch.int32) if chosen is None else chosen

    def elements(self, name: str) -> int:
        """The number of elements of the parameter ``"module.parameter"`` in the ticket."""
        count = len(self.chosen(name))
        return count * self.granularity.size(self.shapes[name]) if count else 0

    def counts(self, group_of: Callable[[str], G]) -> dict[G, tuple[int, int]]:
        """For each group of modules, its elements in the ticket and its candidate elements.

        Args:
            group_of: Maps a module's name to its group.
        """
        found: dict[G, tuple[int, int]] = {}
        for name, shape in self.shapes.items():
            group = group_of(name.rpartition(".")[0])
            chosen, size = found.get(group, (0, 0))
            found[group] = (chosen + self.elements(name), size + prod(shape))
        return found

    @property
    def size(self) -> int:
        """The number of elements in the ticket."""
        return sum(self.elements(name) for name in self.shapes)

    @property
    def density(self) -> float:
        """The fraction of the candidate elements that is in the ticket; 0 without candidates."""
        return self.size / max(sum(prod(shape) for shape in self.shapes.values()), 1)

    @overload
    def overlap(self, other: Ticket, per: None = None) -> float: ...

    @overload
    def overlap(self, other: Ticket, per: str) -> dict[str, float]: ...

    def overlap(self, other: Ticket, per: str | None = None) -> float | dict[str, float]:
        """The intersection over union (IoU) of two tickets: 1 if they are the same, 0 if they are disjoint.

        Two random tickets of density d have about ``d / (2 - d)``.

        Args:
            other (`Ticket`): A ticket for the same model, with the same granularity.
            per (`str`, *optional*, defaults to `None`):
                The groups: `layer`, `type` or `module`. None compares the whole tickets.

        Returns:
            A number in [0, 1], or with `per` one for each group; NaN where neither ticket has positions.

        Raises:
            ValueError: If the tickets have different candidates or granularities, or `per` is not known.
        """
        if per is not None and per not in GROUPINGS:
            raise ValueError(f"per={per!r} is not known; choose one of {sorted(GROUPINGS)} or None.")
        ious = self.overlaps(other, GROUPINGS[per] if per else lambda module: "")
        return ious if per else ious.get("", float("nan"))

    def _check_comparable(self, other: Ticket) -> None:
        difference = None
        if self.granularity != other.granularity:
            difference = f"one has granularity {self.granularity}, the other {other.granularity}"
        for name in (*self.shapes, *other.shapes):
            shapes = self.shapes.get(name), other.shapes.get(name)
            if difference is None and shapes[0] != shapes[1]:
                what = [f"has shape {shape}" if shape else "is not a candidate" for shape in shapes]
                difference = f"in one {name!r} {what[0]}, in the other it {what[1]}"
        if difference:
            raise ValueError(
                f"tickets can be compared on the same candidates only: {difference}. Use adapters with the same "
                f"architecture, `target_modules` and granularity."
            )

    def overlaps(self, other: Ticket, group_of: Callable[[str], G]) -> dict[G, float]:
        """The intersection over union (IoU) in each group of modules.

        Args:
            other: A ticket for the same model, with the same granularity.
            group_of: Maps a module's name to its group.

        Raises:
            ValueError: If the tickets have different candidates or granularities.
        """
        self._check_comparable(other)
        counts: dict[G, list[int]] = {}
        for name, shape in self.shapes.items():
            a, b = self.chosen(name), other.chosen(name)
            both = int(torch.isin(a, b, assume_unique=True).sum()) if len(a) and len(b) else 0
            unit = self.granularity.size(shape) if len(a) or len(b) else 0
            row = counts.setdefault(group_of(name.rpartition(".")[0]), [0, 0])
            row[0] += both * unit
            row[1] += (len(a) + len(b) - both) * unit
        return {group: both / either if either else float("nan") for group, (both, either) in counts.items()}

    def save(self, path: str | Path) -> None:
        """Save the ticket as one safetensors file: the coded positions, and the rest as metadata.

        An existing file is replaced atomically. The folder is created if it does not exist.

        Args:
            path (`str` or `Path`): The file.

        Raises:
            ValueError: If the ticket has more than half of the positions of very large parameters.
        """
        positions = dict(sorted(self.by_name().items()))
        described = {
            "sizes": {name: len(indices) for name, indices in positions.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "granularity": self.granularity.name,
            "widths": self.widths,
            "criterion": self.criterion,
        }
        codes = join_codes(encode_all(list(positions.values())))
        if sum(len(indices) for indices in positions.values()) > most_positions(codes.nbytes):
            raise ValueError("the ticket has most positions of its parameters: train the whole parameters instead.")
        write_whole(Path(path), {"positions": codes}, {"format": FORMAT, "ticket": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Load a ticket that `save` has written.

        Args:
            path (`str` or `Path`): The file.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If the file is not a ticket, or damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no ticket at {str(path)!r}.")
        tensors, metadata = load_tensors(Path(path))
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{str(path)!r} is not a ticket that this version of sfa_peft reads: its format is "
                f"{metadata.get('format')!r}, not {FORMAT!r}."
            )
        try:
            return cls._from_file(json.loads(metadata["ticket"]), tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{str(path)!r}: {error}") from error
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{str(path)!r}: the ticket's description is damaged ({error}).") from error

    @classmethod
    def _from_file(cls, described: Mapping[str, Any], tensors: dict[str, Tensor]) -> Ticket:
        name = described["granularity"]
        if name not in GRANULARITIES:
            raise CheckpointError(NO_BLOCKS if name == "block" else f"the granularity {name!r} is not known")
        granularity = GRANULARITIES[name]
        shapes = shapes_in(described["shapes"])
        sizes = {str(name): int(size) for name, size in described["sizes"].items()}
        most = most_positions(tensors["positions"].nbytes)
        if sum(sizes.values()) > most:
            raise CheckpointError(f"a file of this size holds at most {most:,} positions, not {sum(sizes.values()):,}")
        positions: Positions = {}
        codes_by_name: dict[str, Code] = {}
        codes = split_codes("positions", tensors["positions"], len(sizes))
        for name, code in zip(sorted(sizes), codes, strict=True):
            if name not in shapes:
                raise CheckpointError(f"there are positions of {name!r}, but its shape is not in the description.")
            codes_by_name[name] = Code(code, sizes[name], granularity.count(shapes[name]))
        for name, indices in decoded(codes_by_name).items():
            module, _, parameter = name.rpartition(".")
            dtype = position_dtype(granularity.count(shapes[name]))
            positions.setdefault(module, {})[parameter] = indices.to(dtype)
        widths = {
            str(place): {str(m): int(w) for m, w in modules.items()} for place, modules in described["widths"].items()
        }
        if not all(width > 0 for modules in widths.values() for width in modules.values()):
            raise CheckpointError("a width in the description is not possible; widths are ints of at least 1.")
        return cls(positions, shapes, granularity, widths, str(described["criterion"]))

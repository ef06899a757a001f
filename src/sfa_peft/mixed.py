"""Mixed batches: one adapter for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # the only tree functions that know transformers' outputs

BASE = "__base__"  # PEFT's name for a sample that no adapter is to change


def rows_of(names: Sequence[str], length: int, device: torch.device) -> dict[str, Tensor]:
    """For each adapter, the indices of its rows in a tensor of so many, where a sample has one row or several.

    Backbones with windows have the windows of a sample behind each other in the batch dimension.

    Raises:
        ValueError: If the rows do not divide among the samples.
    """
    if not names or length % len(names):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {length} "
            f"respectively."
        )
    each = length // len(names)
    samples: dict[str, list[int]] = {}
    for sample, name in enumerate(names):
        samples.setdefault(name, []).extend(range(sample * each, (sample + 1) * each))
    return {name: torch.tensor(rows, device=device) for name, rows in samples.items()}


def joined(parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """The parts of a batch in the order of its rows."""
    return torch.cat(list(parts))[torch.cat(list(rows)).argsort()]


def run_each(
    names: Sequence[str], run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], what: str
) -> Any:
    """Run a module's part of a batch for each adapter, and put the outputs together again.

    Args:
        names: The adapter of each sample.
        run: Called with an adapter's name, and the arguments in which every tensor that has a row for each sample
            has those of the adapter's samples alone.
        args, kwargs: The arguments for the whole batch, in any lists, tuples and dicts.
        what: The module, for messages.

    Raises:
        ValueError: If an output does not have a row for each sample.
    """
    batch = len(names)
    rows = rows_of(names, batch, torch.device("cpu"))
    outputs, specs = [], []
    for name, own in rows.items():

        def part(value: Any, own: Tensor = own) -> Any:
            is_batch = isinstance(value, Tensor) and value.dim() and len(value) == batch
            return value.index_select(0, own.to(value.device)) if is_batch else value

        leaves, spec = pytree.tree_flatten(run(name, *pytree.tree_map(part, args), **pytree.tree_map(part, kwargs)))
        outputs.append(leaves)
        specs.append(spec)
    merged = []
    for leaves in zip(*outputs, strict=True):
        if not isinstance(leaves[0], Tensor):
            merged.append(leaves[0])
            continue
        if any(not leaf.dim() or len(leaf) != len(own) for leaf, own in zip(leaves, rows.values(), strict=True)):
            raise ValueError(f"{what} gives an output without a row for each sample, so batches cannot be mixed here.")
        merged.append(joined(leaves, [own.to(leaves[0].device) for own in rows.values()]))
    return pytree.tree_unflatten(merged, specs[0])

"""Mixed batches: one adapter for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # the only tree functions that know transformers' outputs

BASE = "__base__"  # PEFT's name for a sample that no adapter is to change


@dataclass(frozen=True)
class Mixture:
    """Which adapter each sample of a batch is to have.

    Attributes:
        names: The adapters, one for each sample.
        has_windows: Whether a tensor may have several rows for each sample, behind each other: backbones with windows
            put those of a sample there. Elsewhere more rows than samples would be something else.
    """

    names: tuple[str, ...]
    has_windows: bool = False
    _known: dict[tuple[int, torch.device], dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, x: Tensor) -> dict[str, Tensor]:
        """For each adapter, the indices of its rows in a tensor; made once for each size, since that waits for a GPU.

        Raises:
            ValueError: If the rows are not those of the samples, or that cannot be told.
        """
        samples, length = len(self.names), len(x)
        each, rest = divmod(length, samples)
        if rest or not each or (each > 1 and not self.has_windows):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {samples} and "
                f"{length} respectively."
            )
        if not self.has_windows and x.dim() == 3 and x.shape[1] == samples:
            raise ValueError(
                f"a layer got a tensor of shape {tuple(x.shape)}, in which samples cannot be told from tokens: use "
                f"another number of samples than {samples}."
            )
        if (length, x.device) not in self._known:
            rows: dict[str, list[int]] = {}
            for sample, name in enumerate(self.names):
                rows.setdefault(name, []).extend(range(sample * each, (sample + 1) * each))
            self._known[length, x.device] = {n: torch.tensor(own, device=x.device) for n, own in rows.items()}
        return self._known[length, x.device]


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
    samples: dict[str, list[int]] = {}
    for sample, name in enumerate(names):
        samples.setdefault(name, []).append(sample)
    if len(samples) == 1:
        return run(names[0], *args, **kwargs)

    def outputs_of(name: str, own: list[int]) -> tuple[list[Any], Any]:
        def part(value: Any) -> Any:
            is_batch = isinstance(value, Tensor) and value.dim() and len(value) == len(names)
            return value[own] if is_batch else value

        return pytree.tree_flatten(run(name, *pytree.tree_map(part, args), **pytree.tree_map(part, kwargs)))

    outputs = {name: outputs_of(name, own) for name, own in samples.items()}
    counts = {len(own) for own in samples.values()}
    if len(counts) == 1:
        # The first dimension could be of that size by chance. With one sample more it shows which one is the batch's.
        name, own = next(iter(samples.items()))
        more, _ = outputs_of(name, [*own, own[0]])
        _check_batch_first(more, len(own) + 1, what)
    for name, (leaves, _) in outputs.items():
        _check_batch_first(leaves, len(samples[name]), what)
    rows = [torch.tensor(own) for own in samples.values()]
    merged = [
        joined(leaves, [own.to(leaves[0].device) for own in rows]) if isinstance(leaves[0], Tensor) else leaves[0]
        for leaves in zip(*(leaves for leaves, _ in outputs.values()), strict=True)
    ]
    return pytree.tree_unflatten(merged, next(iter(outputs.values()))[1])


def _check_batch_first(leaves: Sequence[Any], count: int, what: str) -> None:
    if any(isinstance(leaf, Tensor) and (not leaf.dim() or len(leaf) != count) for leaf in leaves):
        raise ValueError(f"{what} gives an output without a row for each sample, so batches cannot be mixed here.")

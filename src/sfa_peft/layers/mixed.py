"""Mixed batches: each sample has its adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # transformers registers its output classes here only

BASE = "__base__"  # PEFT's name for a sample without an adapter


@dataclass(frozen=True)
class Mixture:
    """The adapter of each sample of a batch.

    Attributes:
        names: The adapters, one for each sample.
        has_windows: Whether a tensor may have several consecutive rows for each sample, as the windows of Swin. In
            other backbones, a tensor with more rows than samples is an error.
    """

    names: tuple[str, ...]
    has_windows: bool = False
    _known: dict[tuple[int, torch.device], dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, x: Tensor) -> dict[str, Tensor]:
        """For each adapter, the indices of its rows in `x`. Cached, since making them synchronizes with a GPU.

        Raises:
            ValueError: If the rows of `x` do not match the samples, or may be tokens.
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
                f"a layer got a tensor of shape {tuple(x.shape)}, in which samples cannot be told from tokens: use a "
                f"number of samples other than {samples}."
            )
        if (length, x.device) not in self._known:
            rows: dict[str, list[int]] = {}
            for sample, name in enumerate(self.names):
                rows.setdefault(name, []).extend(range(sample * each, (sample + 1) * each))
            self._known[length, x.device] = {n: torch.tensor(indices, device=x.device) for n, indices in rows.items()}
        return self._known[length, x.device]


class _Call(threading.local):
    """The mixed batch that the present thread runs: the mixture of each module, or None.

    It belongs to the thread and not to the modules, since several threads may run one model at the same time. It is
    an attribute from the beginning, so that a compiled graph has a guard on it. (A `ContextVar` cannot be compiled.)
    Neither reaches a thread that is started inside of a forward pass, nor a backward pass that computes activations
    again. That is no loss: adapter names are refused in training, and `mixing` refuses a base that starts threads.
    """

    def __init__(self) -> None:
        self.mixtures: Mapping[nn.Module, Mixture] | None = None


_call = _Call()


def mixture_of(module: nn.Module) -> Mixture | None:
    """The mixture that a layer or head has to use now, in this thread. None outside of mixed batches."""
    mixtures = _call.mixtures
    return None if mixtures is None else mixtures.get(module)


@contextmanager
def using(mixtures: Mapping[nn.Module, Mixture]) -> Iterator[None]:
    """Let the present thread run these modules with these mixtures. Other modules keep what they have."""
    outer = _call.mixtures
    _call.mixtures = {**(outer or {}), **mixtures}
    try:
        yield
    finally:
        _call.mixtures = outer


def in_order(parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """Concatenate the parts of a batch in the order of its rows."""
    return torch.cat(list(parts))[torch.cat(list(rows)).argsort()]


def run_each(
    names: Sequence[str], run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], what: str
) -> Any:
    """Run a module once for each adapter, on the samples of that adapter, and join the outputs.

    Args:
        names: The adapter of each sample.
        run: Called with the name of an adapter and the arguments. Tensors with a row for each sample have only the
            rows of this adapter's samples.
        args, kwargs: The arguments for the whole batch, in any lists, tuples and dicts.
        what: The module, for error messages.

    Raises:
        ValueError: If an output does not have a row for each sample.
    """
    samples: dict[str, list[int]] = {}
    for sample, name in enumerate(names):
        samples.setdefault(name, []).append(sample)
    if len(samples) == 1:
        return run(names[0], *args, **kwargs)

    def outputs_of(name: str, indices: list[int]) -> tuple[list[Any], Any]:
        def part(value: Any) -> Any:
            is_batch = isinstance(value, Tensor) and value.dim() and len(value) == len(names)
            return value[indices] if is_batch else value

        return pytree.tree_flatten(run(name, *pytree.tree_map(part, args), **pytree.tree_map(part, kwargs)))

    outputs = {name: outputs_of(name, indices) for name, indices in samples.items()}
    counts = {len(indices) for indices in samples.values()}
    if len(counts) == 1:
        # The first dimension could have this size by chance. A run with one more sample shows whether it is the batch.
        name, indices = next(iter(samples.items()))
        more, _ = outputs_of(name, [*indices, indices[0]])
        _check_batch_first(more, len(indices) + 1, what)
    for name, (leaves, _) in outputs.items():
        _check_batch_first(leaves, len(samples[name]), what)
    rows = [torch.tensor(indices) for indices in samples.values()]
    merged = [
        in_order(leaves, [part.to(leaves[0].device) for part in rows]) if isinstance(leaves[0], Tensor) else leaves[0]
        for leaves in zip(*(leaves for leaves, _ in outputs.values()), strict=True)
    ]
    return pytree.tree_unflatten(merged, next(iter(outputs.values()))[1])


def _check_batch_first(leaves: Sequence[Any], count: int, what: str) -> None:
    if any(isinstance(leaf, Tensor) and (not leaf.dim() or len(leaf) != count) for leaf in leaves):
        raise ValueError(
            f"{what} returns an output without a row for each sample, so it does not support mixed batches: group the "
            f"samples by adapter, and use set_adapter."
        )

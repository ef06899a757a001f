"""Keeps the changed parameters of all layers between forward passes, instead of computing each of them in each pass.

Under autocast, a frozen weight is cast in every forward pass, and the cast is kept until backward. A changed parameter
in the dtype of the computation takes the place of this cast, and the forward pass is that of the base. The changed
parameters of a model are views of one buffer for each dtype. In each forward pass, the values are written to it at all
chosen positions together, in a handful of operations, where each layer alone would need as many.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bottleneck import autocasts
from .sparse import PARAMETERS, Changeable, Kept, SparseDelta

ALIGNMENT = 128  # elements, so that each view is aligned as a tensor of its own


@dataclass
class Buffer:
    """The changed parameters of one dtype.

    Attributes:
        flat: The parameters, one after the other.
        index: The indices in `flat` that the adapter changes.
        old: The base's values at these indices.
        new: Memory for the changed values.
        values: The adapter's values, in the order of `index`.
    """

    flat: Tensor
    index: Tensor
    old: Tensor
    new: Tensor
    values: list[Tensor]

    def refresh(self) -> None:
        torch.add(self.old, torch.cat([values.detach().reshape(-1) for values in self.values]), out=self.new)
        self.flat.index_copy_(0, self.index, self.new)


class Seen(NamedTuple):
    """A tensor when it was read, which is held, so that no other one gets its place in memory.

    Attributes:
        tensor: The tensor.
        address: Of its memory.
        version: Of its memory. None for values: an optimizer may write to them without a new version, so they are read
            in every pass. The base and the ticket stay as they are in training.
    """

    tensor: Tensor
    address: int
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor, is_fixed: bool = True) -> Seen:
        return cls(tensor, tensor.data_ptr(), tensor._version if is_fixed else None)

    def is_still(self, tensor: Tensor | None) -> bool:
        return (
            tensor is self.tensor
            and tensor.data_ptr() == self.address
            and (self.version is None or tensor._version == self.version)
        )


@dataclass
class Entry:
    """What is kept of one layer, and the tensors that it was made from."""

    delta: SparseDelta
    dtype: torch.dtype
    base: dict[str, Seen]
    ticket: dict[str, tuple[Seen, Seen]]
    buffer: Buffer | None = None
    earlier: Buffer | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    epoch: int = -1

    @classmethod
    def of(cls, module: Changeable, delta: SparseDelta, dtype: torch.dtype) -> Entry:
        base = {name: Seen.of(p) for name in PARAMETERS if (p := getattr(module, name)) is not None}
        ticket = {c.name: (Seen.of(c.positions), Seen.of(c.values, is_fixed=False)) for c in delta.changes}
        return cls(delta, dtype, base, ticket)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The weight, and the bias if there is one."""
        return {name: seen.tensor for name, seen in self.base.items()}

    def has_base(self, module: Changeable) -> bool:
        """Whether the parameters of the module are still those that this was made from."""
        for name in PARAMETERS:
            tensor, seen = getattr(module, name), self.base.get(name)
            if tensor is not None if seen is None else not seen.is_still(tensor):
                return False
        return True

    def is_of(self, module: Changeable, delta: SparseDelta, dtype: torch.dtype) -> bool:
        """Whether this is what is wanted."""
        if delta is not self.delta or dtype != self.dtype or not self.has_base(module):
            return False
        for name, (positions, values) in self.ticket.items():
            if not positions.is_still(delta.positions(name)) or not values.is_still(delta.values(name)):
                return False
        return True


def _can_be_kept(module: Changeable, delta: SparseDelta) -> bool:
    """Not of tensors that are made anew in every pass (FSDP, `torch.func`), and not of those without versions."""
    tensors = [t for t in (module.weight, module.bias, *delta.parameters()) if t is not None]
    return all(type(t) is nn.Parameter and not t.is_meta and not t.is_inference() for t in tensors)


class ChangedParameters:
    """The changed parameters of the layers of a model, which all share this object.

    A layer joins in its first forward pass, and is computed without being kept. In the next pass the memory is made,
    for all layers that have joined. A copy of the model starts without any.

    Args:
        always (`bool`, *optional*, defaults to `None`):
            Whether to keep them: True for the fastest forward pass, at the cost of a copy of the adapted weights;
            False for the least memory. None keeps them under autocast, where they take the place of its casts.
    """

    def __init__(self, always: bool | None = None) -> None:
        self.always = always
        self._entries: weakref.WeakKeyDictionary[nn.Module, Entry] = weakref.WeakKeyDictionary()
        self._epoch = 0
        self._lock = threading.Lock()  # several threads may run one model

    def __deepcopy__(self, memo: dict[int, object]) -> ChangedParameters:
        memo[id(self)] = copied = ChangedParameters(self.always)
        return copied

    def __reduce__(self) -> tuple[type[ChangedParameters], tuple[bool | None]]:
        return ChangedParameters, (self.always,)

    def keeps(self, x: Tensor) -> bool:
        """Whether changed parameters are kept when the model gets `x`: under autocast, or as `always` says."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        return autocasts(x) if self.always is None else self.always

    def of(self, layer: nn.Module, module: Changeable, delta: SparseDelta, dtype: torch.dtype) -> Kept | None:
        """The changed parameters of a layer in `dtype`; None if they are not kept yet, or cannot be.

        Args:
            layer: The layer.
            module: The module whose parameters are changed.
            delta: The change.
            dtype: The dtype of the computation.
        """
        entry = self._entries.get(layer)
        if entry is None or not entry.is_of(module, delta, dtype):
            if not _can_be_kept(module, delta):
                return None
            new = Entry.of(module, delta, dtype)
            if entry is not None and entry.dtype == dtype and entry.has_base(module):  # another adapter on the layer
                new.earlier, new.weight, new.bias = entry.buffer or entry.earlier, entry.weight, entry.bias
            with self._lock:
                self._entries[layer] = new
            return None
        # A layer that runs again belongs to a new forward pass, before which values may have been trained.
        if entry.buffer is None or entry.epoch == self._epoch:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                if entry.buffer is None:
                    self._build()
                self._epoch += 1
                for buffer in {id(e.buffer): e.buffer for e in self._entries.values()}.values():
                    if buffer is not None:
                        buffer.refresh()
        entry.epoch = self._epoch
        assert entry.buffer is not None
        assert entry.weight is not None
        return Kept(entry.weight, entry.bias, entry.buffer.flat, entry.buffer.flat._version)

    def forget(self, layer: nn.Module) -> None:
        """Called when the tensors of a layer are replaced. New ones may have the addresses of the old ones."""
        with self._lock:
            self._entries.pop(layer, None)

    def clear(self) -> None:
        """Free the memory."""
        with self._lock:
            self._entries.clear()

    def _build(self) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[Entry]] = {}
        for entry in self._entries.values():
            groups.setdefault((entry.dtype, entry.parameters["weight"].device), []).append(entry)
        for (dtype, device), entries in groups.items():
            _fill(entries, dtype, device)


def _fill(entries: Sequence[Entry], dtype: torch.dtype, device: torch.device) -> None:
    """Make the buffer of some layers, in the memory of an earlier one if they all have it."""
    earlier = {id(e.buffer or e.earlier): e.buffer or e.earlier for e in entries}
    before = next(iter(earlier.values())) if len(earlier) == 1 else None
    if before is not None:
        flat = before.flat
        flat.index_copy_(0, before.index, before.old.to(dtype))
    else:
        flat = _laid_out(entries, dtype, device)
    indices, old, values = [], [], []
    for entry in entries:
        for name, parameter in entry.parameters.items():
            if name in entry.delta.changed:
                start = getattr(entry, name).storage_offset()
                granularity, positions = entry.delta.granularity, entry.delta.positions(name).long()
                numbers = torch.arange(start, start + parameter.numel(), device=device).view(parameter.shape)
                indices.append(granularity.read(numbers, positions).reshape(-1))
                old.append(granularity.read(parameter.detach().contiguous(), positions).reshape(-1))
                values.append(entry.delta.values(name))
    buffer = Buffer(flat, torch.cat(indices), torch.cat(old), torch.empty(0), values)
    buffer.new = torch.empty(len(buffer.index), dtype=dtype, device=device)
    for entry in entries:
        entry.buffer, entry.earlier = buffer, None


def _laid_out(entries: Sequence[Entry], dtype: torch.dtype, device: torch.device) -> Tensor:
    """New memory with the parameters of some layers, which get views of it."""
    sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for entry in entries for p in entry.parameters.values()]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    starts = iter(accumulate(sizes, initial=0))
    for entry in entries:
        for name, parameter in entry.parameters.items():
            start = next(starts)
            view = flat[start : start + parameter.numel()].view(parameter.shape)
            view.copy_(parameter)
            setattr(entry, name, view)
    return flat

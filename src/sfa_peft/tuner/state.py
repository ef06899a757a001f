"""Converts an adapter's tensors between a checkpoint and the model."""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..checkpoint.coding import encode_all
from ..checkpoint.names import INTERNAL, POSITIONS, PREFIX, is_adapter_key, is_positions_key
from ..checkpoint.packing import unpack
from ..checkpoint.validation import check_finite, decode_state_dict
from ..layers.adapted import sfa_layers

ALIGNMENT = 64  # bytes, the alignment of torch's allocator


def without_adapter_name(key: str, adapter_name: str) -> str:
    return re.sub(rf"(\.sfa_(?:internal|external|parallel))\.{re.escape(adapter_name)}\.", r"\1.", key)


def encoded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter, with coded positions."""
    positions = {key: tensor for key, tensor in tensors.items() if is_positions_key(key)}
    return tensors | dict(zip(positions, encode_all(list(positions.values())), strict=True))


def unpacked(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the model. In a file, the internal ones are packed."""
    sizes, shapes = {}, {}
    for name, layer in sfa_layers(model):
        if adapter_name in layer.sfa_internal:
            delta = layer.sfa_internal[adapter_name]
            for p in delta.changed:
                full = f"{name.removeprefix(PREFIX)}.{p}"
                sizes[full], shapes[full] = len(delta.positions(p)), tuple(getattr(delta, p).shape)
    return unpack(tensors, sizes, lambda name, count: shapes[name])


def decoded(model: nn.Module, adapter_name: str, remapped: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint as the model needs them, after all checks."""
    expected, units = {}, {}
    for name, layer in sfa_layers(model):
        for key, tensor in layer.state_dict(prefix=f"{name}.").items():
            if without_adapter_name(key, adapter_name) != key:
                expected[key] = tensor
        if adapter_name in layer.sfa_internal:
            delta = layer.sfa_internal[adapter_name]
            for p in delta.changed:
                count = delta.granularity.count(getattr(layer.changeable, p).shape)
                units[f"{name}{INTERNAL}{adapter_name}.{p}{POSITIONS}"] = count
    adapter = decode_state_dict({k: t for k, t in remapped.items() if is_adapter_key(k)}, expected, units)
    present = model.state_dict()
    heads = {}
    for key, tensor in remapped.items():
        if key in adapter:
            continue
        if key in present and present[key].shape != tensor.shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(present[key].shape)} in the "
                f"model; build the base model with the head that the adapter was trained with (num_labels)."
            )
        check_finite(key, tensor)
        heads[key] = _like(tensor, present[key]) if key in present else tensor
    return {key: _own(tensor) for key, tensor in (adapter | heads).items()}


def _like(tensor: Tensor, present: Tensor) -> Tensor:
    """A tensor with the dtype and device of the tensor that it replaces. A meta tensor gives only the dtype."""
    return tensor.to(present.dtype) if present.is_meta else tensor.to(present)


def _own(tensor: Tensor) -> Tensor:
    """A tensor with a separate, aligned storage. A tensor in the memory of a file may have any address.

    With `low_cpu_mem_usage` a model uses tensors as they are, and sums over unaligned memory round differently.
    """
    is_separate = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() % ALIGNMENT == 0
    return tensor if is_separate else tensor.clone()

"""An adapter's tensors as a state dict has them, and as the model has them."""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..checkpoint.coding import encode_all
from ..checkpoint.names import INTERNAL, POSITIONS, PREFIX, is_adapter_key, is_positions_key
from ..checkpoint.packing import unpack
from ..checkpoint.validation import check_finite, decode_state_dict
from ..layers.adapted import sfa_layers

ALIGNMENT = 64  # bytes, as torch allocates


def without_adapter_name(key: str, adapter_name: str) -> str:
    return re.sub(rf"(\.sfa_(?:internal|external|parallel))\.{re.escape(adapter_name)}\.", r"\1.", key)


def encoded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter with their positions coded."""
    positions = {key: tensor for key, tensor in tensors.items() if is_positions_key(key)}
    return tensors | dict(zip(positions, encode_all(list(positions.values())), strict=True))


def unpacked(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their own names; a file has the internal ones packed together."""
    sizes, shapes = {}, {}
    for name, layer in sfa_layers(model):
        if adapter_name in layer.sfa_internal:
            delta = layer.sfa_internal[adapter_name]
            for p in delta.changed:
                full = f"{name.removeprefix(PREFIX)}.{p}"
                sizes[full], shapes[full] = len(delta.positions(p)), tuple(getattr(delta, p).shape)
    return unpack(tensors, sizes, lambda name, count: shapes[name])


def decoded(model: nn.Module, adapter_name: str, remapped: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint as the model takes them, after all checks."""
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
    own = model.state_dict()
    heads = {}
    for key, tensor in remapped.items():
        if key in adapter:
            continue
        if key in own and own[key].shape != tensor.shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(own[key].shape)} in the "
                f"model; build the base model with the head that the adapter was trained with (num_labels)."
            )
        check_finite(key, tensor)
        heads[key] = _like(tensor, own[key]) if key in own else tensor
    return {key: _own(tensor) for key, tensor in (adapter | heads).items()}


def _like(tensor: Tensor, present: Tensor) -> Tensor:
    """A tensor in the dtype and on the device of the one that it replaces, which may have no device yet."""
    return tensor.to(present.dtype) if present.is_meta else tensor.to(present)


def _own(tensor: Tensor) -> Tensor:
    """A tensor with a storage of its own, at an address that kernels like: one in a file's memory may be at any.

    With `low_cpu_mem_usage` a model takes tensors as they are, and a sum over odd addresses rounds in another way.
    """
    is_own = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() % ALIGNMENT == 0
    return tensor if is_own else tensor.clone()

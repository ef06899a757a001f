"""Converts an adapter's tensors between a checkpoint and the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..checkpoint.coding import encode_all
from ..checkpoint.names import INTERNAL, KINDS, POSITIONS, PREFIX, is_adapter_key, is_positions_key
from ..checkpoint.packing import unpack
from ..checkpoint.reader import adapter_in_load
from ..checkpoint.validation import check_finite, decode_state_dict
from ..layers.adapted import SFALayer
from ..layers.leaves import modules_outside
from ..layers.sparse import SparseDelta

ALIGNMENT = 64  # bytes, the alignment of torch's allocator


def without_adapter_name(key: str, adapter_name: str) -> str:
    for kind in KINDS:
        key = key.replace(f"{kind}{adapter_name}.", kind)
    return key


# A ticket stays the same while its values are trained, so the codes of the last save are kept with their positions.
_CODES: WeakKeyDictionary[SparseDelta, dict[str, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def state_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter and its heads by their names in a checkpoint, with coded positions.

    As PEFT's `get_peft_model_state_dict`, which also gathers what several processes share, and goes through the whole
    model several times.
    """
    layers, heads = _parts(model, adapter_name)
    tensors = {
        f"{name}.{kind}.{adapter_name}.{p}": tensor
        for name, layer in layers
        for kind, module in layer.modules_of(adapter_name)
        for p, tensor in module.state_dict().items()
    }
    coded = _encoded(layers, adapter_name, tensors)
    state = {without_adapter_name(key, adapter_name): tensor for key, tensor in coded.items()}
    for name, head in heads:
        state |= {f"{name}.{p}": tensor for p, tensor in head.modules_to_save[adapter_name].state_dict().items()}
    return state


def encoded(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter, with coded positions."""
    return _encoded(_parts(model, adapter_name)[0], adapter_name, tensors)


def _encoded(
    layers: Iterable[tuple[str, SFALayer]], adapter_name: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    caches = {
        f"{name}{INTERNAL}{adapter_name}.{p}{POSITIONS}": _CODES.setdefault(delta, {})
        for name, _, delta, p in _changed(layers, adapter_name)
    }
    positions = {key: tensor.detach().cpu() for key, tensor in tensors.items() if is_positions_key(key)}
    kept = {key: caches[key][key] for key in positions if key in caches.get(key, ())}
    codes = {key: code for key, (indices, code) in kept.items() if torch.equal(indices, positions[key])}
    new = [key for key in positions if key not in codes]
    for key, code in zip(new, encode_all([positions[key] for key in new]), strict=True):
        codes[key] = code
        if key in caches:
            caches[key][key] = positions[key].clone(), code
    return tensors | codes


def unpacked(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint. In a file, the internal ones are packed."""
    sizes, shapes = {}, {}
    for name, _, delta, p in _changed(_parts(model, adapter_name)[0], adapter_name):
        full = f"{name.removeprefix(PREFIX)}.{p}"
        sizes[full], shapes[full] = len(delta.positions(p)), tuple(delta.values(p).shape)
    return unpack(tensors, sizes, lambda name, count: shapes[name])


def loadable(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the model, after all checks. Changes nothing.

    Raises:
        CheckpointError: If they are not exactly the tensors of the adapter and its heads.
    """
    return {key: _separate(tensor) for key, (tensor, _) in _matched(model, adapter_name, tensors).items()}


@torch.no_grad()
def write(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> bool:
    """Copy the tensors of a checkpoint into an adapter and its heads, after all checks.

    Returns:
        False if nothing was copied, since tensors of the adapter have no values (meta), or are sharded.

    Raises:
        CheckpointError: If they are not exactly the tensors of the adapter and its heads.
    """
    matched = _matched(model, adapter_name, tensors)
    if any(type(present) is not Tensor or present.is_meta for _, present in matched.values()):
        return False
    for tensor, present in matched.values():
        present.copy_(tensor)
    return True


def _matched(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """For the name of each tensor of an adapter in the model, the one in the checkpoint and the one in the model."""
    layers, wrappers = _parts(model, adapter_name)
    names: dict[str, str] = {}  # in a checkpoint, without PEFT's prefix -> in the model
    expected: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    units: dict[str, int] = {}
    for name, layer in layers:
        for kind, module in layer.modules_of(adapter_name):
            for p, tensor in module.state_dict().items():
                key = f"{name}.{kind}.{adapter_name}.{p}"
                names[f"{name}.{kind}.{p}".removeprefix(PREFIX)], expected[key] = key, tensor
    for name, layer, delta, p in _changed(layers, adapter_name):
        count = delta.granularity.count(getattr(layer.changeable, p).shape)
        units[f"{name}{INTERNAL}{adapter_name}.{p}{POSITIONS}"] = count
    for name, wrapper in wrappers:
        for p, tensor in wrapper.modules_to_save[adapter_name].state_dict().items():
            key = f"{name}.modules_to_save.{adapter_name}.{p}"
            names[f"{name}.{p}".removeprefix(PREFIX)], heads[key] = key, tensor
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = names.get(key.removeprefix(PREFIX), key)  # PEFT has renamed those of the heads already
        if name in found or key in expected:
            raise CheckpointError(f"the checkpoint has {key!r} twice, once with the adapter's name; save it again.")
        found[name] = tensor

    # What is read from a file during a load has been checked for finite values.
    is_read = adapter_in_load() is not None
    adapter = {key: tensor for key, tensor in found.items() if key not in heads and is_adapter_key(key)}
    result = decode_state_dict(adapter, expected, units, is_read)
    rest = {key: tensor for key, tensor in found.items() if key not in adapter}
    check_heads(rest, heads)
    for key, tensor in rest.items():
        if not is_read:
            check_finite(key, tensor)
        result[key] = _like(tensor, heads[key])
    present = expected | heads
    return {key: (tensor, present[key]) for key, tensor in result.items()}


def check_heads(found: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
    """Check the tensors of a checkpoint that are outside the adapter's layers: those of the heads, and no others.

    Args:
        found: The tensors by name.
        heads: The tensors of the heads in the model.

    Raises:
        CheckpointError: If a tensor is missing, is in none of the heads, or has another shape.
    """
    for key, tensor in found.items():
        if key not in heads:
            raise CheckpointError(
                f"the checkpoint has {key!r}, which belongs neither to the adapter nor to its `modules_to_save`. "
                f"Loading it would change the base model, so it is refused. Download or save the adapter again."
            )
        if tensor.is_floating_point() != heads[key].is_floating_point() or tensor.is_complex():
            raise CheckpointError(
                f"{key!r} has dtype {tensor.dtype} in the checkpoint, and {heads[key].dtype} in the model. The "
                f"checkpoint is damaged; download or save it again."
            )
        if heads[key].shape != tensor.shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(heads[key].shape)} in the "
                f"model; build the base model with the head that the adapter was trained with (num_labels)."
            )
    missing = heads.keys() - found.keys()
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {min(missing)!r} ({len(missing)} such) of `modules_to_save`; download or save the "
            f"adapter again."
        )


def _parts(
    model: nn.Module, adapter_name: str
) -> tuple[list[tuple[str, SFALayer]], list[tuple[str, ModulesToSaveWrapper]]]:
    """The layers and the heads that have an adapter, by name."""
    layers, heads = [], []
    for name, module in modules_outside(model, (SFALayer,)):
        if isinstance(module, SFALayer):
            if module.modules_of(adapter_name):
                layers.append((name, module))
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            heads.append((name, module))
    return layers, heads


def _changed(
    layers: Iterable[tuple[str, SFALayer]], adapter_name: str
) -> Iterator[tuple[str, SFALayer, SparseDelta, str]]:
    """The parameters that an adapter changes: the name and the layer, the change, and the parameter's name."""
    for name, layer in layers:
        delta = layer.internal_of(adapter_name)
        if delta is not None:
            for p in delta.changed:
                yield name, layer, delta, p


def tensors_of(model: nn.Module, adapter_name: str) -> list[Tensor]:
    """The parameters and buffers of an adapter and its heads."""
    layers, heads = _parts(model, adapter_name)
    modules = [module for _, layer in layers for _, module in layer.modules_of(adapter_name)]
    modules += [head.modules_to_save[adapter_name] for _, head in heads]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _like(tensor: Tensor, present: Tensor) -> Tensor:
    """A tensor with the dtype and device of the tensor that it replaces. A meta tensor gives only the dtype."""
    return tensor.to(present.dtype) if present.is_meta else tensor.to(present)


def _separate(tensor: Tensor) -> Tensor:
    """A tensor with a separate, aligned storage. A tensor in the memory of a file may have any address.

    With `low_cpu_mem_usage` a model uses tensors as they are, and sums over unaligned memory round differently.
    """
    is_separate = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() % ALIGNMENT == 0
    return tensor if is_separate else tensor.clone()

"""Checks the tensors of a checkpoint against its config and the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .coding import Code, CodeError, decode_all
from .error import CheckpointError
from .names import INTERNAL, POSITIONS, PREFIX, external_kind, is_adapter_key

_NOT_ONE_SAVE = "The two files are not from the same save, or damaged; download or save the adapter again."
# The limit of positions where a parameter's number of units is not known. No parameter is that large.
ANY_UNITS = 1 << 42


def check_sizes(
    tensors: Mapping[str, Tensor],
    ticket_sizes: Mapping[str, int],
    external_widths: Mapping[str, Mapping[str, int]],
    units: Mapping[str, int],
    external_conv: int = 0,
) -> dict[str, Tensor]:
    """Check the tensors of a checkpoint against its config, without a model.

    Args:
        tensors: The tensors of the file.
        ticket_sizes: For each parameter, the number of its units in the ticket.
        external_widths: For each place, the width of the external adapter on each module.
        units: The number of units of each parameter, where it is known.
        external_conv: The height and width of the filters of external adapters; 0 without filters.

    Returns:
        The decoded positions, by the names of their tensors.

    Raises:
        CheckpointError: If tensors are missing, unexpected, or of another shape, or positions are damaged.
    """
    adapter_keys = {key.removeprefix(PREFIX): key for key in tensors if is_adapter_key(key)}
    announced: set[str] = set()
    codes: dict[str, Code] = {}

    def take(name: str) -> tuple[str, Tensor]:
        if name not in adapter_keys:
            raise CheckpointError(
                f"adapter_model.safetensors does not have {name!r}, which adapter_config.json announces. "
                f"{_NOT_ONE_SAVE}"
            )
        announced.add(name)
        return adapter_keys[name], tensors[adapter_keys[name]]

    def shaped(name: str, shape: tuple[int, ...]) -> Tensor:
        key, tensor = take(name)
        if tuple(tensor.shape[: len(shape)]) != shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(tensor.shape)} in adapter_model.safetensors, but {shape} according to "
                f"adapter_config.json. {_NOT_ONE_SAVE}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{key!r} has dtype {tensor.dtype}, and not a floating-point one. {_NOT_ONE_SAVE}")
        return tensor

    for full_name, size in ticket_sizes.items():
        module, _, parameter = full_name.rpartition(".")
        values = shaped(f"{module}{INTERNAL}{parameter}", (size,))
        if values.numel() < size:
            raise CheckpointError(f"the values of {full_name!r} have shape {tuple(values.shape)}. {_NOT_ONE_SAVE}")
        key, code = take(f"{module}{INTERNAL}{parameter}{POSITIONS}")
        codes[key] = Code(code, size, units.get(full_name, ANY_UNITS))
    for place, modules in external_widths.items():
        kind = external_kind(place)
        for module, width in modules.items():
            _, up = take(f"{module}.{kind}.up.weight")
            channels = up.shape[0] if up.dim() == 2 else 0
            if not channels:
                raise CheckpointError(
                    f"{module}.{kind}.up.weight has shape {tuple(up.shape)} in adapter_model.safetensors, and an "
                    f"external adapter has at least one channel. {_NOT_ONE_SAVE}"
                )
            shaped(f"{module}.{kind}.up.weight", (channels, width))
            shaped(f"{module}.{kind}.down.weight", (width, channels))
            shaped(f"{module}.{kind}.down.bias", (width,))
            if external_conv:
                shaped(f"{module}.{kind}.conv.weight", (width, 1, external_conv, external_conv))
    unexpected = adapter_keys.keys() - announced
    if unexpected:
        raise CheckpointError(
            f"adapter_model.safetensors has {sorted(unexpected)[0]!r} ({len(unexpected)} such), which "
            f"adapter_config.json does not announce. {_NOT_ONE_SAVE}"
        )
    return checked_positions(codes)


def decode_state_dict(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], units: Mapping[str, int], is_read: bool = False
) -> dict[str, Tensor]:
    """Check the tensors of a file against an injected adapter, and decode the positions. Changes nothing.

    Args:
        found: The tensors of the file, by the model's keys.
        expected: The tensors of the injected adapter, by the same keys. Only shapes and dtypes are read.
        units: For each key of positions, the number of units of the parameter.
        is_read: Whether they come from a reader, and so have finite values and sorted positions.

    Returns:
        The tensors in the model's dtypes, with positions as sorted, unique indices.

    Raises:
        CheckpointError: If keys are missing or unexpected, a shape differs, a value is not finite, or positions cannot
            be decoded. The message names the first such key and what to do.
    """
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unexpected:
        which, keys = ("checkpoint", missing) if missing else ("adapter in the model", unexpected)
        raise CheckpointError(
            f"the {which} lacks {sorted(keys)[0]!r} ({len(keys)} such). A checkpoint cannot be loaded into an adapter "
            f"with another ticket: use PeftModel.from_pretrained(base, path, is_trainable=True), or run the same "
            f"search first. If the tickets are the same, adapter_config.json and adapter_model.safetensors are not "
            f"from the same save, or the checkpoint was saved for another architecture."
        )
    codes = {key: Code(tensor, len(expected[key]), units[key]) for key, tensor in found.items() if key in units}
    positions = {
        key: indices.to(dtype=expected[key].dtype, device=found[key].device)
        for key, indices in checked_positions(codes, is_read).items()
    }
    fitting = {key: _fitting(key, tensor, expected[key]) for key, tensor in found.items() if key not in units}
    if not is_read:
        for key, tensor in fitting.items():
            check_finite(key, tensor)
    return positions | fitting


def checked_positions(codes: Mapping[str, Code], are_sorted: bool = False) -> dict[str, Tensor]:
    """The positions by the names of their tensors, decoded if they are coded, and checked."""
    positions = {key: code.code for key, code in codes.items()}
    for key, code in codes.items():
        if _is_decoded(code.code):
            check_positions(key, code.code, code.count, code.units, are_sorted)
    return positions | decoded({key: code for key, code in codes.items() if not _is_decoded(code.code)})


def _is_decoded(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int32, torch.int64)


def check_positions(key: str, positions: Tensor, count: int, units: int, are_sorted: bool = False) -> None:
    """Raise a `CheckpointError` unless `positions` are `count` sorted, unique indices in [0, units).

    With `are_sorted` it is known that they are sorted and unique.
    """
    is_right = positions.dim() == 1 and len(positions) == count
    is_right = is_right and (are_sorted or bool((positions.diff() > 0).all()))
    if not is_right or (count and not 0 <= int(positions[0]) <= int(positions[-1]) < units):
        raise CheckpointError(
            f"{key!r} does not hold {count:,} positions that are sorted and among {units:,} units: it has shape "
            f"{tuple(positions.shape)} and positions up to {int(positions.max()) if positions.numel() else 'none'}. "
            f"Load the checkpoint into the model that it was saved from."
        )


def _fitting(key: str, tensor: Tensor, expected: Tensor) -> Tensor:
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"{key!r} has shape {tuple(tensor.shape)} in the checkpoint, but {tuple(expected.shape)} according to "
            f"adapter_config.json and the model. Load it into the model it was trained on; to load another ticket use "
            f"PeftModel.from_pretrained(base, path, is_trainable=True), or run the same search first."
        )
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{key!r} has dtype {tensor.dtype} in the checkpoint; expected a floating-point one such as "
            f"{expected.dtype}. The checkpoint is damaged; download or save it again."
        )
    return tensor.to(expected.dtype)


def decoded(codes: Mapping[str, Code]) -> dict[str, Tensor]:
    """Decode positions, by the names of their tensors.

    Raises:
        CheckpointError: If a code is not valid. The message names the first such tensor.
    """
    for key, code in codes.items():
        tensor = code.code
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise CheckpointError(
                f"{key!r} must be coded positions, a 1-D tensor of dtype torch.uint8; it is {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}."
            )
    try:
        return dict(zip(codes, decode_all(list(codes.values())), strict=True))
    except CodeError as error:
        key, code = list(codes.items())[error.index]
        raise CheckpointError(
            f"{key!r} is not the code of {code.count:,} positions ({error}). The checkpoint is damaged, or its ticket "
            f"differs from adapter_config.json; to load another ticket use PeftModel.from_pretrained(base, path, "
            f"is_trainable=True), or run the same search first."
        ) from error


def is_sound(key: str, tensor: Tensor) -> bool:
    """Whether the values are finite. A head may hold infinities (such as an attention mask), but no NaN."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(torch.isfinite(values).all()) if is_adapter_key(key) else not bool(values.isnan().any())


def check_finite(key: str, tensor: Tensor) -> None:
    """Raise a `CheckpointError` unless the values pass `is_sound`."""
    if not is_sound(key, tensor):
        raise CheckpointError(
            f"{key!r} holds values that are not finite; the checkpoint is damaged, or the training has diverged."
        )

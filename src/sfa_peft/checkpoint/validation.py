"""Checks of a checkpoint's tensors against what the config announced and the model has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint does not fit the model or contradicts itself. Nothing of it was loaded."""


POSITIONS = "_positions"


def check_state_dict(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limits: Mapping[str, int]) -> None:
    """Check an adapter's tensors; change nothing.

    Args:
        found: The tensors of the file.
        expected: The tensors that the injected adapter has, by the same keys; read for shape and kind of dtype.
        limits: For each key of positions, the number of units that the parameter has.

    Raises:
        CheckpointError: If keys are missing or too many, a shape differs, a value is not finite, or positions are not
            sorted, unique and in range. The message names the first key concerned and what to do.
    """
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unexpected:
        kind, keys = ("lacks", missing) if missing else ("has, but the adapter does not,", unexpected)
        raise CheckpointError(
            f"the checkpoint {kind} {sorted(keys)[0]!r} ({len(keys)} such). Into an adapter with another ticket it "
            f"cannot be loaded: use PeftModel.from_pretrained(base, path, is_trainable=True), or run the same search "
            f"first. Otherwise adapter_config.json and adapter_model.safetensors are not of one save, or it was saved "
            f"for another architecture."
        )
    for key, tensor in found.items():
        own = expected[key]
        if tensor.shape != own.shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(tensor.shape)} in the checkpoint, but adapter_config.json and the model "
                f"make it {tuple(own.shape)}. Load it into the model it was trained on; for another ticket use "
                f"PeftModel.from_pretrained(base, path, is_trainable=True), or run the same search first."
            )
        if tensor.is_floating_point() != own.is_floating_point() or tensor.is_complex():
            raise CheckpointError(
                f"{key!r} has dtype {tensor.dtype} in the checkpoint; expected one like {own.dtype}."
            )
        if key.endswith(POSITIONS):
            check_positions(key, tensor, limits[key])
        elif tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise CheckpointError(f"{key!r} holds values that are not finite; the checkpoint is damaged.")


def check_positions(key: str, positions: Tensor, limit: int) -> None:
    """Raise a `CheckpointError` unless positions are sorted, unique and in [0, limit)."""
    if not len(positions):
        return
    positions = positions.long()
    if int(positions[0]) < 0 or int(positions[-1]) >= limit or not bool((positions[1:] > positions[:-1]).all()):
        raise CheckpointError(
            f"{key!r} must be sorted, without repeats, and in [0, {limit}); the checkpoint is damaged."
        )

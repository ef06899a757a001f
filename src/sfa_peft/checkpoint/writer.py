"""Writes adapters: packs the tensors, seals them together with their config, and writes each file once."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import save_tensors
from .packing import pack
from .seal import CONFIG, DIGEST, KEY, MAX_SEAL, WEIGHTS, digest_of
from .validation import is_sound


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: The folder. It is created if it does not exist.
        tensors: The adapter's tensors, with coded positions. They are packed here.
        config: The fields of the adapter's config.
        shapes: For each parameter that the ticket could choose from, its shape.
        dtype_of: The dtype of a tensor in the file, from its name; None keeps the tensor's dtype.

    Raises:
        ValueError: If a value is not finite, or not in the dtype of the file. Nothing is written then.
    """
    packed = {name: _cast(name, tensor, dtype_of(name), tensors) for name, tensor in pack(tensors).items()}
    fields = {**config, DIGEST: digest_of(packed)}
    sealed = {"config": fields, "shapes": {name: list(shape) for name, shape in shapes.items()}}
    text = json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode()
    if len(text) > MAX_SEAL:
        raise ValueError(
            f"the config and the shapes of the targets take {len(text):,} bytes, and a file may have {MAX_SEAL:,}: "
            f"name fewer modules in `target_modules` and `exclude_modules`. Nothing was saved."
        )
    seal = zlib.compress(text, 9)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(folder / WEIGHTS, packed, {"format": "pt", KEY: base64.b85encode(seal).decode()})


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None, tensors: Mapping[str, Tensor]) -> Tensor:
    if not is_sound(name, tensor):
        name = next((part for part, values in tensors.items() if not is_sound(part, values)), name)
        raise ValueError(f"{name!r} holds values that are not finite: the training has diverged. Nothing was saved.")
    if not tensor.is_floating_point():
        return tensor
    cast = tensor if dtype is None else tensor.to(dtype)
    if cast.isinf().any() and not tensor.isinf().any():
        raise ValueError(
            f"{name!r} holds values up to {tensor.abs().max():.3g}, which {dtype} cannot hold; save it in bfloat16 or "
            f"float32 (`values_dtype`, `heads_dtype`). Nothing was saved."
        )
    return cast

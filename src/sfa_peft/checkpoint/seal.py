"""The seal: metadata of an adapter's weights file that shows whether a checkpoint is damaged or mixed.

The metadata of `adapter_model.safetensors` contains the digest of the tensors and a copy of the `adapter_config.json`
that was saved with them. `adapter_config.json` contains the same digest. A save replaces the weights first and the
config next. If it is killed in between, the config has another digest, and the copy is the config that belongs to the
weights. docs/checkpoint-format.md has the layout.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .error import CheckpointError
from .files import load_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KEY = "sfa_peft"
DIGEST = "weights_digest"
# Bytes. No config is that large, so a larger seal is neither written nor decompressed.
MAX_SEAL = 1 << 22


@dataclass(frozen=True)
class AdapterFile:
    """The content of a weights file.

    Attributes:
        tensors: The tensors by name, as they are in the file: packed if it has a seal.
        digest: The digest of the tensors.
        config: The config that was saved with them; None if the file has no seal, because another program wrote it.
        shapes: For each parameter that the ticket could choose from, its shape. Empty if the file has no seal.
    """

    tensors: dict[str, Tensor]
    digest: str
    config: dict[str, Any] | None
    shapes: dict[str, tuple[int, ...]]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shapes_in(described: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters, from JSON.

    Raises:
        ValueError, TypeError, AttributeError: If they are not shapes. A parameter that a ticket can choose from has no
            dimension of 0, and a dimension fits in 31 bits.
    """
    shapes = {name: tuple(shape) for name, shape in described.items()}
    if not all(type(n) is int and 0 < n <= 1 << 31 for shape in shapes.values() for n in shape):
        raise ValueError("a shape is not possible")
    return shapes


def read(path: Path) -> AdapterFile:
    """Read a weights file with all its tensors.

    Raises:
        CheckpointError: If it is not a safetensors file, or its seal is damaged or does not match its tensors.
    """
    tensors, metadata = load_tensors(path)
    digest = digest_of(tensors)
    if KEY not in metadata:
        return AdapterFile(tensors, digest, None, {})
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(base64.b85decode(metadata[KEY]), MAX_SEAL)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("too long or too short")
        sealed = json.loads(text)
        config = dict(sealed["config"])
        shapes = shapes_in(sealed["shapes"])
        expected = config[DIGEST]
    except (binascii.Error, zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the seal of {str(path)!r} is damaged ({error}); download or save it again.") from error
    if expected != digest:
        raise CheckpointError(
            f"the tensors of {str(path)!r} are not those that were saved: their digest is {digest[:16]}..., but the "
            f"file's seal has {str(expected)[:16]}.... The file is damaged, or was changed; download or save it again."
        )
    return AdapterFile(tensors, digest, config, shapes)

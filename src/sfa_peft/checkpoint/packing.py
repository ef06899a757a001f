"""Packs the internal adapters of a file into two tensors, one of values and one of coded positions.

A ticket spreads over hundreds of parameters. With tensors of their own, their names in the file's header would take
more room than the content of a small ticket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from .validation import INTERNAL, POSITIONS, CheckpointError, is_positions_key

PREFIX = "base_model.model"
VALUES = f"{PREFIX}{INTERNAL}values"
CODES = f"{PREFIX}{INTERNAL}positions"


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the values of all parameters, in the order of their names, into one tensor, and the positions into another.

    The latter begins with the length of each parameter's code, as 32-bit little-endian numbers. Values of several
    dtypes are kept in the widest one.
    """
    values = {key: t for key, t in tensors.items() if INTERNAL in key and not is_positions_key(key) and key != VALUES}
    names = sorted(values, key=_parameter_of)
    if not names or VALUES in tensors:
        return dict(tensors)
    codes = [tensors[name + POSITIONS] for name in names]
    dtype = values[names[0]].dtype
    for name in names:
        dtype = torch.promote_types(dtype, values[name].dtype)
    lengths = torch.tensor([len(code) for code in codes], dtype=torch.int32).view(torch.uint8)
    rest = {key: t for key, t in tensors.items() if INTERNAL not in key}
    return rest | {
        VALUES: torch.cat([values[name].reshape(-1).to(dtype) for name in names]),
        CODES: torch.cat([lengths, *codes]),
    }


def unpack(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, int], values_shape: Callable[[str, int], tuple[int, ...]]
) -> dict[str, Tensor]:
    """Undo `pack`. Tensors that are not packed stay as they are.

    Args:
        tensors: The tensors of a file.
        sizes: For each parameter in the ticket, the number of its units.
        values_shape: For a parameter and its number of units, the shape of their values.

    Raises:
        CheckpointError: If the packed tensors are not of these sizes.
    """
    if VALUES not in tensors and CODES not in tensors:
        return dict(tensors)
    if VALUES not in tensors or CODES not in tensors:
        raise CheckpointError(f"of {VALUES!r} and {CODES!r} there is only one; the checkpoint is damaged.")
    values, codes = tensors[VALUES], tensors[CODES]
    if values.dim() != 1 or codes.dim() != 1 or codes.dtype != torch.uint8:
        raise CheckpointError(
            f"{VALUES!r} and {CODES!r} must be 1-D, and the latter bytes; the checkpoint is damaged."
        )
    names = sorted(sizes)
    if len(codes) < 4 * len(names):
        raise CheckpointError(f"{CODES!r} is too short for {len(names)} parameters; {_OTHER_SIZES}")
    shapes = [values_shape(name, sizes[name]) for name in names]
    counts = [prod(shape) for shape in shapes]
    lengths = codes[: 4 * len(names)].clone().view(torch.int32).tolist()
    if min(lengths, default=0) < 0 or sum(lengths) != len(codes) - 4 * len(names):
        raise CheckpointError(f"{CODES!r} is not of {len(names)} parameters; {_OTHER_SIZES}")
    if min(counts, default=0) < 0 or sum(counts) != len(values):
        raise CheckpointError(f"{VALUES!r} holds {len(values):,} values, not {sum(counts):,}; {_OTHER_SIZES}")
    result = {key: t for key, t in tensors.items() if key not in (VALUES, CODES)}
    each = zip(names, shapes, values.split(counts), codes[4 * len(names) :].split(lengths), strict=True)
    for name, shape, own, code in each:
        module, _, parameter = name.rpartition(".")
        key = f"{PREFIX}.{module}{INTERNAL}{parameter}"
        result[key], result[key + POSITIONS] = own.reshape(shape), code
    return result


_OTHER_SIZES = (
    "adapter_config.json, or the adapter that it is loaded into, has another ticket, or the checkpoint is damaged. "
    "For another ticket use PeftModel.from_pretrained(base, path, is_trainable=True), or run the same search first."
)


def _parameter_of(key: str) -> str:
    return key.removeprefix(f"{PREFIX}.").replace(INTERNAL, ".")

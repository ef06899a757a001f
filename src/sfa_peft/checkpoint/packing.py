"""Packs the internal adapters of a file into two tensors, one of values and one of coded positions.

A ticket has positions in hundreds of parameters. With separate tensors, the names in the file's header would be larger
than the content of a small ticket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from .error import CheckpointError
from .names import INTERNAL, POSITIONS, PREFIX, is_positions_key

VALUES = f"{PREFIX}{INTERNAL[1:]}values"
CODES = f"{PREFIX}{INTERNAL[1:]}positions"


def join_codes(codes: Sequence[Tensor]) -> Tensor:
    """Join codes into one tensor: first the length of each as a 32-bit little-endian number, then the codes."""
    lengths = torch.tensor([len(code) for code in codes], dtype=torch.int32).view(torch.uint8)
    return torch.cat([lengths, *codes])


def split_codes(key: str, joined: Tensor, count: int) -> list[Tensor]:
    """Undo `join_codes` of `count` codes.

    Raises:
        CheckpointError: If `joined` does not hold `count` codes. The message names the tensor, `key`.
    """
    if joined.dim() != 1 or joined.dtype != torch.uint8:
        raise CheckpointError(
            f"{key!r} must be a 1-D tensor of bytes (uint8); it has dtype {joined.dtype} and {joined.dim()} "
            f"dimensions. The file is damaged; download or save it again."
        )
    lengths = joined[: 4 * count].clone().view(torch.int32).tolist() if len(joined) >= 4 * count else [-1]
    if min(lengths, default=0) < 0 or sum(lengths) != len(joined) - 4 * count:
        raise CheckpointError(f"{key!r} does not hold the positions of {count} parameters: {_OTHER_SIZES}")
    return list(joined[4 * count :].split(lengths))


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pack the values of all parameters into one tensor, and their positions into another, in the order of the names.

    If the values have several dtypes, the widest one is used for all.
    """
    values = {key: t for key, t in tensors.items() if INTERNAL in key and not is_positions_key(key) and key != VALUES}
    names = sorted(values, key=_parameter_of)
    if not names or VALUES in tensors:
        return dict(tensors)
    codes = [tensors[name + POSITIONS] for name in names]
    dtype = values[names[0]].dtype
    for name in names:
        dtype = torch.promote_types(dtype, values[name].dtype)
    rest = {key: t for key, t in tensors.items() if INTERNAL not in key}
    return rest | {
        VALUES: torch.cat([values[name].reshape(-1).to(dtype) for name in names]),
        CODES: join_codes(codes),
    }


def unpack(
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    values_shape: Callable[[str, int], tuple[int, ...]],
) -> dict[str, Tensor]:
    """Undo `pack`. Tensors that are not packed stay as they are.

    Args:
        tensors: The tensors of a file.
        sizes: For each parameter in the ticket, the number of its units in the ticket.
        values_shape: The shape of the values, from the name of a parameter and the number of units.

    Raises:
        CheckpointError: If the packed tensors do not have these sizes.
    """
    if VALUES not in tensors and CODES not in tensors:
        return dict(tensors)
    if VALUES not in tensors or CODES not in tensors:
        raise CheckpointError(
            f"the checkpoint has only one of {VALUES!r} and {CODES!r}. It is damaged; download or save it again."
        )
    values, names = tensors[VALUES], sorted(sizes)
    codes = split_codes(CODES, tensors[CODES], len(names))
    shapes = [values_shape(name, sizes[name]) for name in names]
    counts = [prod(shape) for shape in shapes]
    if min(counts, default=0) < 0 or values.shape != (sum(counts),):
        raise CheckpointError(f"{VALUES!r} has shape {tuple(values.shape)}, expected ({sum(counts)},): {_OTHER_SIZES}")
    result = {key: t for key, t in tensors.items() if key not in (VALUES, CODES)}
    for name, shape, part, code in zip(names, shapes, values.split(counts), codes, strict=True):
        module, _, parameter = name.rpartition(".")
        key = f"{PREFIX}{module}{INTERNAL}{parameter}"
        result[key], result[key + POSITIONS] = part.reshape(shape), code
    return result


_OTHER_SIZES = (
    "the ticket differs from that of the adapter in the model or of adapter_config.json, or the checkpoint is "
    "damaged. To load another ticket use PeftModel.from_pretrained(base, path, is_trainable=True), or run the same "
    "search first."
)


def _parameter_of(key: str) -> str:
    return key.removeprefix(PREFIX).replace(INTERNAL, ".")

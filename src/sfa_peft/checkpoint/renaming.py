"""PEFT's `key_mapping`: loading an adapter into a model in which the adapted modules have other names.

PEFT renames the tensors of the file. An SFA config names modules as well, so it is renamed in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING

from . import CheckpointError
from .packing import CODES, VALUES
from .validation import PREFIX, is_adapter_key

if TYPE_CHECKING:
    from .config import SFAConfig

KeyMapping = Mapping[str, str]

_ACTIVE: ContextVar[KeyMapping] = ContextVar("key_mapping", default=MappingProxyType({}))


@contextmanager
def key_mapping(mapping: KeyMapping | None) -> Iterator[None]:
    """Rename the configs that are read meanwhile."""
    token = _ACTIVE.set(mapping or {})
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def rename(name: str, mapping: KeyMapping) -> str:
    """A name by the first pattern that matches, as PEFT does it."""
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def rename_config(config: SFAConfig, keys: Iterable[str]) -> None:
    """Rename the modules in a config that was read from a file with tensors `keys`; remember what they were called.

    Raises:
        CheckpointError: If two modules would get one name.
    """
    mapping = _ACTIVE.get()
    if not mapping:
        return

    def renamed(names: Iterable[str]) -> dict[str, str]:
        new = {name: rename(name, mapping) for name in names}
        if len(set(new.values())) < len(new):
            twice = next(n for n in new.values() if list(new.values()).count(n) > 1)
            raise CheckpointError(f"key_mapping={dict(mapping)!r} gives the name {twice!r} to two modules.")
        return new

    parameters = renamed(config.ticket_sizes or {})
    config.ticket_sizes = {parameters[name]: size for name, size in (config.ticket_sizes or {}).items()}
    config.external_widths = {
        place: {new: widths[old] for old, new in renamed(widths).items()}
        for place, widths in (config.external_widths or {}).items()
    }
    if config.modules_to_save:
        heads = _heads_in(keys, config.modules_to_save)
        config.modules_to_save = [rename(head, mapping) for head in heads]
    if config.target_heads:
        config.target_heads = [rename(head, mapping) for head in config.target_heads]
    if config.base_fingerprint is not None:
        roots = [rename(f"{root}.", mapping).removesuffix(".") for root in config.base_fingerprint["roots"]]
        config.base_fingerprint = config.base_fingerprint | {"roots": roots}
    shapes = getattr(config, "sealed_shapes", {})
    config.sealed_shapes = {rename(name, mapping): shape for name, shape in shapes.items()}  # type: ignore[attr-defined]
    config.renamed_from = {new: old for old, new in parameters.items()}  # type: ignore[attr-defined]
    config.packed_names = {f"{PREFIX}{rename(k.removeprefix(PREFIX), mapping)}": k for k in (VALUES, CODES)}  # type: ignore[attr-defined]


def _heads_in(keys: Iterable[str], endings: Collection[str]) -> list[str]:
    """The full names of the heads whose tensors a file has: a config may name them by their endings."""
    paths = [key.removeprefix(PREFIX).split(".")[:-1] for key in keys if not is_adapter_key(key)]
    around = [[".".join(path[:depth]) for depth in range(1, len(path) + 1)] for path in paths]
    exact = set(endings) & {name for own in around for name in own}
    rest = tuple(set(endings) - exact)
    heads = (next((n for n in own if n in exact or (rest and n.endswith(rest))), None) for own in around)
    return [head for head in dict.fromkeys(heads) if head is not None]

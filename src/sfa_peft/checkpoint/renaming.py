"""PEFT's `key_mapping`: loads an adapter into a model in which the adapted modules have other names.

PEFT renames the tensors of a file. An SFA config contains module names too, so both are renamed here, in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from .error import CheckpointError
from .names import ADAPTER, PREFIX, is_adapter_key

KeyMapping = Mapping[str, str]


class NamesModules(Protocol):
    """The config fields that contain module names."""

    ticket_sizes: dict[str, int]
    external_widths: dict[str, dict[str, int]]
    modules_to_save: list[str] | None
    target_heads: list[str] | None
    base_fingerprint: dict[str, object] | None


def rename(name: str, mapping: KeyMapping) -> str:
    """Rename by the first pattern that matches, as PEFT does."""
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def rename_key(key: str, mapping: KeyMapping) -> str:
    """The new name of a tensor. In the name of an adapter's tensor, only the module is renamed."""
    module, mark, rest = key.removeprefix(PREFIX).partition(ADAPTER)
    # With a dot, since in the config a parameter's name follows, and a pattern may match the dot.
    new = rename(f"{module}.", mapping).removesuffix(".") if mark else rename(module, mapping)
    return f"{PREFIX}{new}{mark}{rest}"


def rename_config(config: NamesModules, keys: Iterable[str], mapping: KeyMapping) -> None:
    """Rename the modules in a config, which was read with the tensors `keys`.

    Raises:
        CheckpointError: If two modules would get the same name.
    """

    def renamed(names: Iterable[str]) -> dict[str, str]:
        new = {name: rename(name, mapping) for name in names}
        if len(set(new.values())) < len(new):
            twice = next(n for n in new.values() if list(new.values()).count(n) > 1)
            raise CheckpointError(f"key_mapping={dict(mapping)!r} gives the name {twice!r} to two modules.")
        return new

    parameters = renamed(config.ticket_sizes)
    config.ticket_sizes = {parameters[name]: size for name, size in config.ticket_sizes.items()}
    config.external_widths = {
        place: {new: widths[old] for old, new in renamed(widths).items()}
        for place, widths in config.external_widths.items()
    }
    if config.modules_to_save:
        heads = _heads_in(keys, config.modules_to_save)
        config.modules_to_save = [rename(head, mapping) for head in heads]
    if config.target_heads:
        config.target_heads = [rename(head, mapping) for head in config.target_heads]
    if config.base_fingerprint is not None:
        roots = config.base_fingerprint["roots"]
        assert isinstance(roots, list)
        new = [rename(f"{root}.", mapping).removesuffix(".") for root in roots]
        config.base_fingerprint = config.base_fingerprint | {"roots": new}


def _heads_in(keys: Iterable[str], endings: Collection[str]) -> list[str]:
    """The full names of the heads in a file. A config may contain only their endings."""
    paths = [key.removeprefix(PREFIX).split(".")[:-1] for key in keys if not is_adapter_key(key)]
    around = [[".".join(path[:depth]) for depth in range(1, len(path) + 1)] for path in paths]
    exact = set(endings) & {name for names in around for name in names}
    rest = tuple(set(endings) - exact)
    heads = (next((n for n in names if n in exact or (rest and n.endswith(rest))), None) for names in around)
    return [head for head in dict.fromkeys(heads) if head is not None]

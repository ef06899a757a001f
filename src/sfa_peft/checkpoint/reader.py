"""Reads saved adapters. A file is read once, and is checked as far as this is possible without a model."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from ..layers.granularity import Granularity
from .error import CheckpointError
from .names import is_adapter_key, is_in_endings
from .packing import unpack
from .renaming import KeyMapping, NamesModules, rename, rename_config, rename_key
from .seal import CONFIG, DIGEST, WEIGHTS, AdapterFile, read
from .validation import check_finite, check_sizes

PICKLE = "adapter_model.bin"
# These fields decide what the adapter computes, so they must be the same in the config and in the weights' seal.
SEALED = (
    "external_activation",
    "external_conv",
    "external_scale",
    "external_widths",
    "format_version",
    "internal_granularity",
    "modules_to_save",
    "ticket_sizes",
)


class Announces(NamesModules, Protocol):
    """A config that describes the weights that were saved with it."""

    external_conv: int | None
    weights_digest: str | None

    def __init__(self, **fields: Any) -> None: ...

    @property
    def granularity(self) -> Granularity: ...

    def to_dict(self) -> dict[str, Any]: ...

    @staticmethod
    def without_patterns(fields: dict[str, Any]) -> dict[str, Any]: ...


C = TypeVar("C", bound=Announces)


@dataclass(frozen=True)
class SavedAdapter(Generic[C]):
    """A saved adapter that has been read and checked.

    Attributes:
        config: The config that belongs to the weights.
        tensors: The tensors by name. Those of the ticket are unpacked, with positions as sorted indices.
        shapes: For each parameter that the ticket could choose from, its shape in the model that the adapter was
            trained on. Empty if the file does not have them.
    """

    config: C
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]


@dataclass
class Load:
    """The state of a load, shared by the functions that take part in it.

    Attributes:
        key_mapping: How modules are renamed: patterns and their replacements.
        saved: The adapter, after it is read. None before, and for an adapter of another method.
        begun: Whether it is known that the adapter is an SFA adapter.
        restores: Whether an error in this load restores the model, so that its parts need not.
    """

    key_mapping: KeyMapping = field(default_factory=dict)
    saved: SavedAdapter[Any] | None = None
    begun: bool = False
    restores: bool = False

    def begin(self) -> None:
        """Called when it is known that the adapter is an SFA adapter, before it is read."""
        self.begun = True

    def before_injection(self) -> None:
        """Called before an `SFAModel` touches the model."""


LOAD: ContextVar[Load | None] = ContextVar("load", default=None)


def adapter_in_load() -> SavedAdapter[Any] | None:
    """The adapter that is being loaded, after it has been read and checked."""
    load = LOAD.get()
    return None if load is None else load.saved


def is_restored() -> bool:
    """Whether a load is in progress that restores the model after an error."""
    load = LOAD.get()
    return load is not None and load.restores


def weights_of(name: str, subfolder: str | None = None, **kwargs: Any) -> Path | None:
    """The weights file of a saved adapter, in a folder or from the Hub; None if there is none. See `file_of`."""
    return file_of(name, WEIGHTS, subfolder, **kwargs)


def file_of(name: str, file: str, subfolder: str | None = None, **kwargs: Any) -> Path | None:
    """A file of a saved adapter, in a folder or from the Hub; None if there is none.

    Args:
        name: A folder, or a repository on the Hub.
        file: The name of the file.
        subfolder: A subfolder of it.
        kwargs: Arguments of `huggingface_hub.hf_hub_download`. Others are ignored.
    """
    folder = Path(name, subfolder) if subfolder else Path(name)
    if os.path.lexists(folder / file):  # also a broken link, for which the error says so
        return folder / file
    if (folder / CONFIG).is_file():
        return None
    known = inspect.signature(hf_hub_download).parameters
    options = {key: value for key, value in kwargs.items() if key in known}
    try:
        return Path(hf_hub_download(name, file, subfolder=subfolder, **options))
    except LocalEntryNotFoundError:
        raise  # the Hub could not be reached, so the file may exist
    except EntryNotFoundError:
        return None


def open_adapter(config: C | None, weights: Path, mapping: KeyMapping, config_class: type[C]) -> SavedAdapter[C]:
    """Read a weights file.

    Args:
        config: The config beside the file, or None if it is not the config of an adapter. If it is not of the same
            save, since a save was interrupted, the config in the file's seal is used.
        weights: The file.
        mapping: How modules are renamed.
        config_class: The class of the config.

    Raises:
        CheckpointError: If the file is damaged, or does not match its config.
    """
    file = read(weights)
    if file.config is None:
        if config is None:
            raise CheckpointError(
                f"{CONFIG} beside {str(weights)!r} does not say which parameters the adapter changes (`ticket_sizes`, "
                f"`external_widths`). It is not from the same save; save the adapter again."
            )
        if config.weights_digest not in (None, file.digest):
            raise CheckpointError(
                f"the tensors of {str(weights)!r} are not those that {CONFIG} was saved with: {DIGEST} differs. "
                f"The file is damaged, or was changed. If the change was intended, remove {DIGEST} from {CONFIG}."
            )
    elif config is not None and config.weights_digest == file.digest:
        _check_sealed(config, file.config)
    else:
        warnings.warn(
            f"{CONFIG} beside {str(weights)!r} was saved with other weights, since a save was interrupted. The config "
            f"in the weights file is used instead.",
            stacklevel=3,
        )
        try:
            config = config_class(**config_class.without_patterns(file.config))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"the config in the seal of {str(weights)!r} is not valid: {error}") from error
    tensors, positions = contents_of(config, file)
    saved = SavedAdapter(config, tensors | positions, file.shapes)
    config.weights_digest = None
    return _renamed(saved, mapping) if mapping else saved


def _renamed(saved: SavedAdapter[C], mapping: KeyMapping) -> SavedAdapter[C]:
    rename_config(saved.config, saved.tensors, mapping)
    tensors = {rename_key(key, mapping): tensor for key, tensor in saved.tensors.items()}
    return replace(saved, tensors=tensors, shapes={rename(n, mapping): shape for n, shape in saved.shapes.items()})


def tensors_of(config: Announces, file: AdapterFile) -> dict[str, Tensor]:
    """The tensors of a weights file by their names in the model. Positions are still coded.

    Raises:
        CheckpointError: If the tensors do not match the config.
    """

    def values_shape(name: str, count: int) -> tuple[int, ...]:
        if name not in file.shapes:
            raise CheckpointError(
                f"{WEIGHTS} does not contain the shape of {name!r}: its seal is damaged, or another program has "
                f"written the file without a seal. Download or save it again."
            )
        return config.granularity.values_shape(file.shapes[name], count)

    return unpack(file.tensors, config.ticket_sizes, values_shape)


def contents_of(config: Announces, file: AdapterFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors as in `tensors_of`, and the decoded positions by name, after all checks that need no model.

    Raises:
        CheckpointError: If the file does not match the config, or is damaged.
    """
    try:
        units = {name: config.granularity.count(shape) for name, shape in file.shapes.items()}
        for name, tensor in file.tensors.items():  # packed, and so a few large ones
            check_finite(name, tensor)
        tensors = tensors_of(config, file)
    except (IndexError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"the shapes in the file's seal are not valid: {error}") from error
    for name in tensors:
        if not is_adapter_key(name) and not is_in_endings(name, config.modules_to_save or ()):
            raise CheckpointError(
                f"{WEIGHTS} has {name!r}, which belongs neither to the adapter nor to a module in `modules_to_save`. "
                f"Loading it would change the base model, so it is refused. Download or save the adapter again."
            )
    sizes = check_sizes(tensors, config.ticket_sizes, config.external_widths, units, config.external_conv or 0)
    return tensors, sizes


def _check_sealed(config: Announces, sealed: Mapping[str, Any]) -> None:
    difference = difference_of(config.to_dict(), sealed)
    if difference:
        raise CheckpointError(
            f"{CONFIG} was changed, or is damaged. It differs from the config that the weights were saved with in "
            f"{difference}. Restore the field, or save the adapter again."
        )


def difference_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first field of `SEALED` that differs between two configs, with both values; None if there is none."""
    for name in SEALED:
        values = [json.loads(json.dumps(config.get(name), default=sorted)) for config in (one, other)]
        if name == "modules_to_save":  # PEFT's task classes append the name of their head at every load
            values = [list(dict.fromkeys(heads or ())) for heads in values]
        if name == "external_conv":  # files of 0.1 have no such field
            values = [size or 0 for size in values]
        if values[0] != values[1]:
            return f"{name}: {_short(values[0])} and {_short(values[1])}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

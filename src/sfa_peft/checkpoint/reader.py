"""The one reader of saved adapters: reads a file once, and checks what can be checked without a model."""

from __future__ import annotations

import inspect
import json
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
from .packing import unpack
from .renaming import KeyMapping, NamesModules, rename, rename_config, rename_key
from .seal import CONFIG, DIGEST, WEIGHTS, AdapterFile, read
from .validation import check_sizes

PICKLE = "adapter_model.bin"
# What a config must have in common with the weights' seal, since it decides what the adapter computes.
SEALED = (
    "external_activation",
    "external_scale",
    "external_widths",
    "format_version",
    "internal_granularity",
    "modules_to_save",
    "ticket_sizes",
)


class Announces(NamesModules, Protocol):
    """What a config says of the weights that were saved with it."""

    weights_digest: str | None

    def __init__(self, **fields: Any) -> None: ...

    @property
    def granularity(self) -> Granularity: ...

    def to_dict(self) -> dict[str, Any]: ...


C = TypeVar("C", bound=Announces)


@dataclass(frozen=True)
class SavedAdapter(Generic[C]):
    """A saved adapter that has been read and checked.

    Attributes:
        config: The config that belongs to the weights.
        tensors: The tensors by their names, those of the ticket unpacked, with positions as sorted indices.
        shapes: For each parameter that the ticket could choose from, its shape where the adapter was trained, as far
            as the file says.
    """

    config: C
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]


@dataclass
class Load:
    """A load that is going on, for all that takes part in it.

    Attributes:
        key_mapping: How modules are to be renamed.
        saved: The adapter, once it is read; None as long as it may be one of another method.
    """

    key_mapping: KeyMapping = field(default_factory=dict)
    saved: SavedAdapter[Any] | None = None

    def begin(self) -> None:
        """Called once it is known that an adapter of SFA is going to be read."""

    def before_injection(self) -> None:
        """Called before an `SFAModel` touches the model."""


LOAD: ContextVar[Load | None] = ContextVar("load", default=None)


def weights_of(name: str, subfolder: str | None = None, **kwargs: Any) -> Path | None:
    """The weights file of a saved adapter, in a folder or from the Hub; None if there is none.

    Args:
        name: A folder, or a repository on the Hub.
        subfolder: A folder in it.
        kwargs: Of those, the arguments of `huggingface_hub.hf_hub_download` are used.
    """
    folder = Path(name, subfolder) if subfolder else Path(name)
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / CONFIG).is_file():
        return None
    known = inspect.signature(hf_hub_download).parameters
    options = {key: value for key, value in kwargs.items() if key in known}
    try:
        return Path(hf_hub_download(name, WEIGHTS, subfolder=subfolder, **options))
    except LocalEntryNotFoundError:
        raise  # the Hub could not be asked
    except EntryNotFoundError:
        return None


def open_adapter(config: C, weights: Path, mapping: KeyMapping) -> SavedAdapter[C]:
    """Read a weights file.

    Args:
        config: The config beside it. Where another save was interrupted, the one sealed in the file takes its place.
        weights: The file.
        mapping: How modules are to be renamed.

    Raises:
        CheckpointError: If the file is damaged, or is not what its config announces.
    """
    file = read(weights)
    if file.config is None:
        if config.weights_digest not in (None, file.digest):
            raise CheckpointError(
                f"the tensors of {str(weights)!r} are not those that {CONFIG} was saved with: {DIGEST} differs. "
                f"The file is damaged, or was changed. Remove {DIGEST} from {CONFIG} if that was meant."
            )
    elif config.weights_digest == file.digest:
        _check_sealed(config, file.config)
    else:
        warnings.warn(
            f"{CONFIG} beside {str(weights)!r} was saved with other weights, by a save that did not come to its end. "
            f"The config that these weights carry is used instead.",
            stacklevel=3,
        )
        try:
            config = type(config)(**file.config)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"the config sealed in {str(weights)!r} is not valid: {error}") from error
    tensors, positions = contents_of(config, file)
    saved = SavedAdapter(config, tensors | positions, file.shapes)
    config.weights_digest = None
    return _renamed(saved, mapping) if mapping else saved


def _renamed(saved: SavedAdapter[C], mapping: KeyMapping) -> SavedAdapter[C]:
    rename_config(saved.config, saved.tensors, mapping)
    tensors = {rename_key(key, mapping): tensor for key, tensor in saved.tensors.items()}
    return replace(saved, tensors=tensors, shapes={rename(n, mapping): shape for n, shape in saved.shapes.items()})


def tensors_of(config: Announces, file: AdapterFile) -> dict[str, Tensor]:
    """The tensors of a weights file by their names in the model; positions are coded.

    Raises:
        CheckpointError: If they are not those that the config announces.
    """

    def values_shape(name: str, count: int) -> tuple[int, ...]:
        if name not in file.shapes:
            raise CheckpointError(
                f"{WEIGHTS} does not tell the shape of {name!r}: its seal is damaged, or another program has written "
                f"the file without it. Download or save it again."
            )
        return config.granularity.values_shape(file.shapes[name], count)

    return unpack(file.tensors, config.ticket_sizes or {}, values_shape)


def contents_of(config: Announces, file: AdapterFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `tensors_of` gives, and the decoded positions by their tensors' names, after all checks without a model.

    Raises:
        CheckpointError: If something in the file is not as the config announces, or damaged.
    """
    try:
        units = {name: config.granularity.count(shape) for name, shape in file.shapes.items()}
        tensors = tensors_of(config, file)
    except (IndexError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"the shapes in the file's seal are not valid: {error}") from error
    return tensors, check_sizes(tensors, config.ticket_sizes or {}, config.external_widths or {}, units)


def _check_sealed(config: Announces, sealed: Mapping[str, Any]) -> None:
    difference = difference_of(config.to_dict(), sealed)
    if difference:
        raise CheckpointError(
            f"{CONFIG} was changed, or is damaged. It and what the weights were saved with have another {difference}. "
            f"Set the field back, or save again."
        )


def difference_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What two configs have in different ways of what decides what an adapter computes; None if nothing."""
    for name in SEALED:
        values = [json.loads(json.dumps(config.get(name), default=sorted)) for config in (one, other)]
        if name == "modules_to_save":  # PEFT's classes for tasks name a head again when they load it
            values = [list(dict.fromkeys(heads or ())) for heads in values]
        if values[0] != values[1]:
            return f"{name}: {_short(values[0])} and {_short(values[1])}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""A saved adapter, read and checked without a model: where its files are, and whether they belong together."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from . import CheckpointError
from .packing import unpack
from .renaming import rename_config
from .seal import CONFIG, DIGEST, WEIGHTS, AdapterFile, read
from .validation import check_sizes

if TYPE_CHECKING:
    from .config import SFAConfig

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


# What is done before a config is read, where a load waits to know whether the adapter is one of SFA.
BEFORE_READING: ContextVar[Callable[[], None]] = ContextVar("before_reading", default=lambda: None)


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


def checked(config: SFAConfig, weights: Path) -> SFAConfig:
    """The config that belongs to a weights file: `config`, or the seal's where another save was interrupted.

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
    positions_of(config, file)
    config.weights_digest = None
    config.sealed_shapes = file.shapes  # type: ignore[attr-defined]  # for the model to be compared with
    rename_config(config, file.tensors)
    return config


def tensors_of(config: SFAConfig, file: AdapterFile) -> dict[str, Tensor]:
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


def positions_of(config: SFAConfig, file: AdapterFile) -> dict[str, Tensor]:
    """The decoded positions in a weights file by their tensors' names, after all checks that need no model.

    Raises:
        CheckpointError: If something in the file is not as the config announces, or damaged.
    """
    try:
        units = {name: config.granularity.count(shape) for name, shape in file.shapes.items()}
        tensors = tensors_of(config, file)
    except (IndexError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"the shapes in the file's seal are not valid: {error}") from error
    return check_sizes(tensors, config.ticket_sizes or {}, config.external_widths or {}, units)


def _check_sealed(config: SFAConfig, sealed: Mapping[str, Any]) -> None:
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

"""Loads of adapters: rolls back a failed load, and gives readable errors for damaged files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import nn

from ..checkpoint import CheckpointError
from ..checkpoint.names import is_adapter_key
from ..checkpoint.reader import LOAD, Load, is_restored, weights_of
from ..checkpoint.renaming import KeyMapping
from ..checkpoint.seal import CONFIG, read
from ..config import SFAConfig
from ..tuner.rollback import Rollback
from ..tuner.state import tensors_of
from .registration import NAME


def restoring(model: nn.Module, adapter_name: str | None = None) -> AbstractContextManager[object]:
    """Restores a model after an error, with the values of an adapter, unless a load in progress does so."""
    if is_restored():
        return nullcontext()
    return _rollback(model, adapter_name)


def _rollback(model: nn.Module, adapter_name: str | None) -> Rollback:
    rollback = Rollback(model)
    if adapter_name is not None:
        rollback.keep(tensors_of(model, adapter_name))
    return rollback


class AdapterLoad(Load):
    """A load of an adapter. If it fails, the model is restored: the adapter is removed, or as it was before.

    It does nothing until an SFA config is read, since the adapter may be one of another method.
    """

    def __init__(self, model: Any, adapter_name: Any, mapping: KeyMapping | None = None) -> None:
        super().__init__(mapping or {})
        self.model, self.adapter_name = model, adapter_name
        self.rollback: Rollback | None = None

    def begin(self) -> None:
        if self.begun or not isinstance(self.model, nn.Module):  # PEFT raises an error for this
            return
        self.rollback, self.restores = _rollback(self.model, self.adapter_name), True
        super().begin()

    def __enter__(self) -> AdapterLoad:
        self.token = LOAD.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.rollback is not None:
            self.rollback.restore()
        LOAD.reset(self.token)


@contextmanager
def readable_errors(load: Load, model_id: Any, options: dict[str, Any]) -> Iterator[None]:
    """Turn PEFT's errors about a damaged SFA adapter into a `CheckpointError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RecursionError, SafetensorError, JSONDecodeError, UnicodeError) as e:
        if isinstance(model_id, str | os.PathLike) and _is_saved_by_sfa(model_id, options):
            SFAConfig.from_pretrained(model_id, **options)  # its error says what is damaged
            if isinstance(e, KeyError) and load.begun:  # from a head, which `from_pretrained` does not check
                raise CheckpointError(
                    f"the SFA adapter {str(model_id)!r} is incomplete: it lacks {e.args[0]!r}. Download or save it "
                    f"again."
                ) from e
        raise


def _is_saved_by_sfa(model_id: str | os.PathLike[str], options: dict[str, Any]) -> bool:
    try:
        weights = weights_of(str(model_id), **options)
        config = Path(model_id, options.get("subfolder") or "", CONFIG)
        if config.is_file() and f'"{NAME}"' in config.read_text(encoding="utf-8", errors="replace"):
            return True
        return weights is not None and any(is_adapter_key(key) for key in read(weights).tensors)
    except (CheckpointError, HfHubHTTPError, HFValidationError, OSError):
        return False

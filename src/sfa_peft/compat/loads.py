"""Loads of adapters: rolls back a failed load, and gives readable errors for damaged files."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from ..checkpoint import CheckpointError
from ..checkpoint.names import is_adapter_key
from ..checkpoint.reader import LOAD, Load, weights_of
from ..checkpoint.renaming import KeyMapping
from ..checkpoint.seal import CONFIG, read
from ..config import SFAConfig
from ..layers.adapted import sfa_layers
from ..tuner.structure import discard_adapter
from .registration import NAME


class AdapterLoad(Load):
    """A load of an adapter. If it fails, the adapter is removed again, unless it existed before.

    It does nothing until an SFA config is read, since the adapter may be one of another method.
    """

    def __init__(self, model: Any, adapter_name: Any, mapping: KeyMapping | None = None) -> None:
        super().__init__(mapping or {})
        self.model, self.adapter_name = model, adapter_name
        self.begun = False

    def begin(self) -> None:
        if self.begun or not isinstance(self.model, nn.Module):  # PEFT raises an error for this
            return
        self.begun = True
        self.base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.flags = [(p, p.requires_grad) for p in self.base.parameters()]
        self.had_config = hasattr(self.base, "peft_config")
        self.was_loaded = getattr(self.base, "_hf_peft_config_loaded", None)  # set by transformers
        self.had_adapter = self.adapter_name in getattr(self.base, "peft_config", {})

    def __enter__(self) -> AdapterLoad:
        self.token = LOAD.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        LOAD.reset(self.token)
        if kind is not None and self.begun and not self.had_adapter:
            self._undo()

    def _undo(self) -> None:
        base, name = self.base, self.adapter_name
        is_new = any(name in layer.adapter_names for _, layer in sfa_layers(base))
        if is_new:
            discard_adapter(base, name)
        for p, requires_grad in self.flags:
            p.requires_grad_(requires_grad)
        if self.was_loaded is not None:
            base._hf_peft_config_loaded = self.was_loaded
        if is_new or not sfa_layers(base):
            configs = getattr(base, "peft_config", {})
            if isinstance(configs.get(name), SFAConfig):
                configs.pop(name)
            if not self.had_config and not configs and hasattr(base, "peft_config"):
                del base.peft_config


@contextmanager
def readable_errors(load: AdapterLoad, model_id: Any, options: dict[str, Any]) -> Iterator[None]:
    """Turn PEFT's errors about a damaged SFA adapter into a `CheckpointError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RecursionError, SafetensorError, JSONDecodeError, UnicodeError) as e:
        is_known = load.begun or _is_of_the_type(e)
        if is_known and isinstance(model_id, str | os.PathLike) and _is_saved_by_sfa(model_id, options):
            SFAConfig.from_pretrained(model_id, **options)  # its error says what is damaged
            if isinstance(e, KeyError):  # from a head, which `from_pretrained` does not check
                raise CheckpointError(
                    f"the SFA adapter {str(model_id)!r} is incomplete: it lacks {e.args[0]!r}. Download or save it "
                    f"again."
                ) from e
        raise


def _is_of_the_type(error: BaseException) -> bool:
    """Whether PEFT failed to read the method from a config, so that the adapter may be an SFA adapter."""
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return "_get_peft_type" in frames or frames[-1] in ("from_pretrained", "load_adapter")


def _is_saved_by_sfa(model_id: str | os.PathLike[str], options: dict[str, Any]) -> bool:
    try:
        weights = weights_of(str(model_id), **options)
        config = Path(model_id, options.get("subfolder") or "", CONFIG)
        if config.is_file() and f'"{NAME}"' in config.read_text(encoding="utf-8", errors="replace"):
            return True
        return weights is not None and any(is_adapter_key(key) for key in read(weights).tensors)
    except (CheckpointError, HfHubHTTPError, HFValidationError, OSError):
        return False

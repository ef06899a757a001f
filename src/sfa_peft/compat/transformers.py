"""The patches of transformers: `load_adapter` for SFA adapters, and `save_pretrained` for merged models.

transformers reads an adapter's file itself, and has no hook to decode it.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin

from ..checkpoint import CheckpointError
from ..checkpoint.reader import LOAD, Load, SavedAdapter
from ..checkpoint.seal import WEIGHTS
from ..checkpoint.validation import check_finite, check_sizes
from ..config import SFAConfig
from ..layers.granularity import position_dtype
from ..layers.merged import merged_leaves
from ..planning.base import base_parameters
from ..recorded import RecordedConfig
from .loads import AdapterLoad, readable_errors
from .patching import Method, arguments_of, in_own_context, patch

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@patch(
    PeftAdapterMixin,
    "load_adapter",
    "peft_model_id",
    "adapter_name",
    "peft_config",
    "adapter_state_dict",
    "adapter_kwargs",
    "load_config",
    "kwargs",
)
@in_own_context
def load_adapter_in_transformers(original: Method, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter as transformers' `load_adapter` does, with SFA's checks and decoded positions.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    given = arguments_of(original, args, kwargs)
    with readable_errors(Load(), _source(given), _options(given)):
        if not isinstance(given.get("peft_config"), SFAConfig):
            # transformers reads the config. It is an SFA adapter only if transformers then creates an SFAModel.
            token = LOAD.set(_HandOver())
            try:
                return original(*args, **kwargs)
            except _HandedOverError:
                pass
            finally:
                LOAD.reset(token)
        return _load_in_transformers(original, model, given)


class _HandedOverError(Exception):
    """Leaves transformers' `load_adapter`, which cannot read coded positions."""


class _HandOver(Load):
    def before_injection(self) -> None:
        raise _HandedOverError


def _source(given: dict[str, Any]) -> Any:
    return given.get("peft_model_id") or getattr(given.get("load_config"), "pretrained_model_name_or_path", None)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    others = given.get("kwargs", {})
    return {
        **(getattr(given.get("load_config"), "download_kwargs", None) or {}),
        **(given.get("adapter_kwargs") or {}),
        **{key: others[key] for key in HUB_OPTIONS if key in others},
    }


def _load_in_transformers(original: Method, model: PreTrainedModel, given: dict[str, Any]) -> Any:
    source, options = _source(given), _options(given)
    given = given | given.pop("kwargs", {})
    config: Any = given.get("peft_config")
    tensors = given.get("adapter_state_dict")
    if tensors is None and source is None:
        raise ValueError("an SFA adapter needs `peft_model_id`, or `adapter_state_dict` together with `peft_config`.")
    with AdapterLoad(model, given.get("adapter_name") or "default") as load:
        load.begin()
        if config is None or tensors is None:
            saved = SFAConfig.from_pretrained(source, **options)
            config = config or saved
        if not isinstance(config, RecordedConfig):
            raise CheckpointError(
                "peft_config does not describe the adapter that is loaded: leave it out, or use that of the model "
                "that the adapter is from."
            )
        if tensors is None:
            if load.saved is None:
                raise CheckpointError(f"{source!r} has no {WEIGHTS}; save the adapter with save_pretrained.")
            tensors = load.saved.tensors
        else:
            for key, tensor in tensors.items():
                check_finite(key, tensor)
            load.saved = SavedAdapter(config, tensors, {})
        sizes, widths = config.ticket_sizes, config.external_widths
        parameters = base_parameters(model, [""], config)
        units = {name: config.granularity.count(p.shape) for name, p in parameters if name in sizes}
        dtype = position_dtype(max(units.values(), default=0))
        checked = check_sizes(tensors, sizes, widths, units, config.external_conv or 0)
        positions = {k: p.to(dtype) for k, p in checked.items()}
        replaced = {"peft_model_id": None, "peft_config": config, "adapter_state_dict": tensors | positions}
        try:
            return original(**given | replaced)
        except RuntimeError as error:  # from torch, about tensors of other shapes
            raise CheckpointError(f"the adapter does not fit this {type(model).__name__}: {error}") from error


@patch(PreTrainedModel, "save_pretrained", applies=lambda model: bool(merged_leaves(model)))
def save_pretrained_of_merged(original: Method, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Refuse to save a merged model that has external adapters as modules: its config does not describe them.

    Raises:
        ValueError: Always.
    """
    leaves = list(merged_leaves(model))
    raise ValueError(
        f"this {type(model).__name__} has external adapters as modules on {len(leaves)} of its modules (such as "
        f"{leaves[0]!r}). Its config does not describe them, so from_pretrained would lose them. Save the adapter "
        f"itself, with save_pretrained of the PeftModel before merge_and_unload, and load it onto the base model."
    )

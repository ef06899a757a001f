"""What SFA needs of PEFT and transformers, checked before anything else is imported.

The declared ranges admit the next minor version of PEFT, and every one of transformers 5. If one of them lacks a hook
that SFA overrides, an adapter could be saved without its ticket, and nobody would notice. So the import stops.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

import peft
import transformers

# The newest versions that the tests have been run on. docs/compatibility.md has them all.
TESTED = {"peft": "0.21.2", "transformers": "5.24.0"}

# For each module or class: the names that SFA imports from it or overrides, and the parameters that it gives or takes.
# A name with parameters is a function; what `compat` replaces declares its own, see patching.py.
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "peft": {"NoMatchingPeftModuleError": ()},
    "peft.mapping": {"PEFT_TYPE_TO_TUNER_MAPPING": ()},
    "peft.utils": {"PeftType": (), "register_peft_method": ()},
    "peft.utils.hotswap": {"CONFIG_KEYS_TO_CHECK": ()},
    "peft.utils.integrations": {"dequantize_module_weight": ("module",)},
    "peft.utils.other": {"AuxiliaryTrainingWrapper": ()},
    "peft.tuners.tuners_utils": {
        "check_adapters_to_merge": ("module", "adapter_names"),
        "check_target_module_exists": ("config", "key"),
    },
    "peft.tuners.tuners_utils.BaseTuner": {
        "_cast_adapter_dtype": ("adapter_name", "autocast_adapter_dtype"),
        "_check_merge_allowed": ("self",),
        "_check_target_module_exists": ("peft_config", "key"),
        "_create_and_replace": ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
        "_get_adapter_state_dict": ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
        "_get_module_names_tied_with_embedding": ("self",),
        "_prepare_adapter_config": ("peft_config", "model_config"),
        "_remap_adapter_state_dict_for_load": ("model", "config", "adapter_name", "state_dict"),
        "_remove_adapter_name_from_key": ("key", "adapter_name"),
        "_replace_module": ("parent", "child_name", "new_module", "child"),
        "_unload_and_optionally_merge": ("merge", "progressbar", "safe_merge", "adapter_names"),
        "delete_adapter": ("adapter_name",),
        "inject_adapter": ("model", "adapter_name"),
        "merge_adapter": ("adapter_names", "safe_merge"),
        "merge_and_unload": ("progressbar", "safe_merge", "adapter_names"),
        "set_adapter": ("adapter_name",),
        "unload": ("self",),
    },
    "peft.tuners.tuners_utils.BaseTunerLayer": {
        "_get_available_adapters": ("self",),
        "_get_base_layer_device_and_dtype": ("base_layer",),
        "_move_adapter_to_device_of_base_layer": ("adapter_name", "device"),
        "delete_adapter": ("adapter_name",),
        "merge": ("safe_merge", "adapter_names"),
        "unmerge": ("self",),
    },
    "peft.utils.ModulesToSaveWrapper": {
        "_getattr_wrapped": ("name", "modules"),
        "delete_adapter": ("adapter_name", "new_active_adapters"),
        "forward": ("self",),
        "set_adapter": ("adapter_names",),
        "update": ("adapter_name",),
    },
    "transformers": {"PreTrainedConfig": (), "PreTrainedModel": ()},
    "transformers.integrations": {"PeftAdapterMixin": ()},
}


class PeftTooDifferentError(ImportError):
    """The installed PEFT or transformers cannot be extended with SFA."""


def incompatible(reason: object) -> PeftTooDifferentError:
    """The error for a PEFT or transformers that SFA does not work with. It says what to install."""
    tested = " ".join(f'"{name}=={version}"' for name, version in TESTED.items())
    return PeftTooDifferentError(
        f"sfa_peft cannot register itself with the installed peft {peft.__version__} and transformers "
        f"{transformers.__version__}: {reason}. Install a newer sfa_peft (`pip install --upgrade sfa-peft`), or "
        f"versions that this one was tested with (`pip install {tested}`)."
    )


def parameters_missing(function: Any, needed: Iterable[str]) -> list[str]:
    """Those of the needed parameters that a function does not have."""
    parameters = inspect.signature(getattr(function, "__func__", function)).parameters
    return [name for name in needed if name not in parameters]


def differences() -> list[str]:
    """How the installed PEFT and transformers differ from what SFA needs."""
    found = []
    for place, names in NEEDS.items():
        owner = _resolved(place)
        for name, parameters in names.items():
            there = (
                inspect.getattr_static(owner, name, None) if isinstance(owner, type) else getattr(owner, name, None)
            )
            missing = parameters_missing(there, parameters) if there is not None and parameters else []
            if there is None:
                found.append(f"there is no {place}.{name}")
            elif missing:
                found.append(f"{place}.{name} has no {', '.join(missing)}")
    return found


def check_libraries() -> None:
    """Check that the installed PEFT and transformers have what SFA needs.

    Raises:
        PeftTooDifferentError: If something is missing. The message names all of it, and says what to install.
    """
    found = differences()
    if found:
        raise incompatible("; ".join(found))


def _resolved(place: str) -> Any:
    """A module or a class by its full name; None if there is none."""
    try:
        return importlib.import_module(place)
    except ImportError:
        module, _, name = place.rpartition(".")
        return getattr(_resolved(module), name, None) if module else None

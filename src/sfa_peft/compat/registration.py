"""Registers SFA with PEFT.

`peft.utils.register_peft_method` is public, but takes only names that are in the `PeftType` enum, and there is no
public way to add one; `aenum.extend_enum` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from .guard import incompatible

NAME = "SFA"


def add_peft_type() -> None:
    """Add `SFA` to `PeftType`.

    Raises:
        PeftTooDifferentError: If the enum cannot be extended, or PEFT already has a method named SFA.
    """
    owners: Mapping[Any, type] = PEFT_TYPE_TO_TUNER_MAPPING  # NAME is not in the enum yet
    owner = owners.get(NAME)
    if owner is not None:
        raise incompatible(f"it has a method {NAME} already ({owner.__module__})")
    if NAME in PeftType.__members__:  # from an import that was interrupted
        return
    try:
        extend_enum(PeftType, NAME, NAME)
    except Exception as error:
        raise incompatible(f"PeftType cannot be extended ({error})") from error


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT.

    Raises:
        PeftTooDifferentError: If PEFT refuses the registration.
    """
    try:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    except Exception as error:
        raise incompatible(error) from error

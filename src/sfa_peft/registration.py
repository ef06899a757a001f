"""Makes SFA known to PEFT. The one place that reaches into PEFT beyond what it offers to extensions.

`peft.utils.register_peft_method` is public, but takes only names that are in the `PeftType` enum, and there is no
public way to add one; `aenum.extend_enum` does.
"""

from __future__ import annotations

import peft
from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "SFA"


class PeftTooDifferentError(ImportError):
    """The installed PEFT cannot be extended with SFA."""


def _error(reason: object) -> PeftTooDifferentError:
    return PeftTooDifferentError(
        f"sfa_peft cannot register itself with the installed peft {peft.__version__}: {reason}. "
        f"Install a version in the range that sfa_peft declares (`pip install --upgrade sfa-peft`)."
    )


def add_peft_type() -> None:
    """Add `SFA` to `PeftType`, once.

    Raises:
        PeftTooDifferentError: If the enum cannot be extended, or PEFT has a method of that name of its own.
    """
    if NAME not in PeftType.__members__:
        try:
            extend_enum(PeftType, NAME, NAME)
        except Exception as error:
            raise _error(f"PeftType cannot be extended ({error})") from error
    owner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[NAME])
    if owner is not None and owner.__module__.partition(".")[0] != __package__:
        raise _error(f"it has a method {NAME} already ({owner.__module__})")


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT, once; after a reload of this package, with its new classes.

    Raises:
        PeftTooDifferentError: If PEFT refuses.
    """
    peft_type = PeftType[NAME]
    if peft_type in PEFT_TYPE_TO_TUNER_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
        return
    try:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    except Exception as error:
        raise _error(error) from error

"""Makes SFA known to PEFT. The one place that reaches into other libraries beyond what they offer to extensions.

`peft.utils.register_peft_method` is public, but takes only names that are in the `PeftType` enum, and there is no
public way to add one; `aenum.extend_enum` does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import peft
from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
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
    """Add `SFA` to `PeftType`.

    Raises:
        PeftTooDifferentError: If the enum cannot be extended, or PEFT has a method of that name already.
    """
    owner = PEFT_TYPE_TO_TUNER_MAPPING.get(NAME)
    if owner is not None:
        raise _error(f"it has a method {NAME} already ({owner.__module__})")
    if NAME in PeftType.__members__:  # from an import that was interrupted
        return
    try:
        extend_enum(PeftType, NAME, NAME)
    except Exception as error:
        raise _error(f"PeftType cannot be extended ({error})") from error


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT.

    Raises:
        PeftTooDifferentError: If PEFT refuses.
    """
    try:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    except Exception as error:
        raise _error(error) from error


def arguments_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; none if they do not fit, of which the function itself tells."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def extend(cls: type, methods: Mapping[str, Callable[..., Any]], applies: Callable[[Any], bool]) -> None:
    """Let methods of another library's class run in SFA's way where SFA is concerned, and as they were elsewhere.

    Args:
        cls: The class.
        methods: By the method's name, SFA's own. It is called with the class's own, bound to its object, then the
            object (the class itself, for a class method), and then the arguments of the call.
        applies: Whether SFA's own is to run for an object; a class method always does.

    Raises:
        PeftTooDifferentError: If the class has no such method.
    """
    for name, own in methods.items():
        if not hasattr(cls, name):
            raise _error(f"{cls.__name__} has no {name}")
        original = vars(cls).get(name, getattr(cls, name))
        method = _class_method(own, original) if isinstance(original, classmethod) else _method(own, original, applies)
        setattr(cls, name, method)


def _method(
    own: Callable[..., Any], original: Callable[..., Any], applies: Callable[[Any], bool]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not applies(self):
            return original(self, *args, **kwargs)
        return own(functools.partial(original, self), self, *args, **kwargs)

    return method


def _class_method(own: Callable[..., Any], original: Any) -> Any:
    @functools.wraps(original.__func__)
    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        return own(functools.partial(original.__func__, cls), cls, *args, **kwargs)

    return classmethod(method)

"""How functions of other libraries are made to ask SFA first: each patch is declared here, and checked at import."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from .registration import PeftTooDifferentError, incompatible

Method = Callable[..., Any]
F = TypeVar("F", bound=Method)


@dataclass(frozen=True)
class Patch:
    """One function of another library, and what runs in its place where SFA is concerned.

    Attributes:
        owner: The class or module that has it.
        name: Its name there.
        needs: The parameters that SFA's own reads.
        own: SFA's own. It is called with the other library's, bound to its object, then with the object (a class for
            a class method, nothing for a function of a module), then with the arguments of the call.
        applies: Whether SFA's own is to run for an object.
    """

    owner: type | ModuleType
    name: str
    needs: tuple[str, ...]
    own: Method
    applies: Callable[[Any], bool]

    @property
    def original(self) -> Any:
        return vars(self.owner).get(self.name, getattr(self.owner, self.name, None))

    def difference(self) -> str | None:
        """What is not as SFA knows it; None if all is."""
        original = self.original
        what = f"{self.owner.__name__}.{self.name}"
        if original is None:
            return f"there is no {what}"
        parameters = inspect.signature(getattr(original, "__func__", original)).parameters
        missing = [name for name in self.needs if name not in parameters]
        return f"{what} has no {', '.join(missing)}" if missing else None

    def apply(self) -> None:
        original, own, applies = self.original, self.own, self.applies
        if isinstance(original, classmethod):
            function = original.__func__

            @functools.wraps(function)
            def class_method(cls: type, *args: Any, **kwargs: Any) -> Any:
                return own(functools.partial(function, cls), cls, *args, **kwargs)

            setattr(self.owner, self.name, classmethod(class_method))
        elif isinstance(self.owner, ModuleType):

            @functools.wraps(original)
            def of_module(*args: Any, **kwargs: Any) -> Any:
                return own(original, *args, **kwargs)

            setattr(self.owner, self.name, of_module)
        else:

            @functools.wraps(original)
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                if not applies(self):
                    return original(self, *args, **kwargs)
                return own(functools.partial(original, self), self, *args, **kwargs)

            setattr(self.owner, self.name, method)


PATCHES: list[Patch] = []


def patch(
    owner: type | ModuleType, name: str, *needs: str, applies: Callable[[Any], bool] = lambda _: True
) -> Callable[[F], F]:
    """Declare the decorated function to be a `Patch`."""

    def declare(own: F) -> F:
        PATCHES.append(Patch(owner, name, needs, own, applies))
        return own

    return declare


def apply_patches() -> None:
    """Apply all patches that have been declared, or none.

    Raises:
        PeftTooDifferentError: If a function is not as SFA knows it. Names all that differ.
    """
    differences = [difference for one in PATCHES if (difference := one.difference())]
    if differences:
        raise incompatible("; ".join(differences))
    for one in PATCHES:
        one.apply()


def arguments_of(function: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; none if they do not fit, of which the function itself tells."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


__all__ = ["PeftTooDifferentError", "apply_patches", "arguments_of", "patch"]

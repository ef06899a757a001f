"""Patches of functions of other libraries. Each patch is declared with `patch`, and checked when it is applied."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar, cast

from .guard import incompatible, parameters_missing

Method = Callable[..., Any]
F = TypeVar("F", bound=Method)


@dataclass(frozen=True)
class Patch:
    """A function of another library, and SFA's replacement.

    Attributes:
        owner: The class or module of the function.
        name: The name of the function.
        needs: The parameters of the function that the replacement reads.
        replacement: The replacement. Its first argument is the original function, bound to its object. The second one
            is the object (the class for a class method; it is left out for a function of a module). Then follow the
            arguments of the call.
        applies: Whether the replacement runs for an object.
    """

    owner: type | ModuleType
    name: str
    needs: tuple[str, ...]
    replacement: Method
    applies: Callable[[Any], bool]

    @property
    def original(self) -> Any:
        return vars(self.owner).get(self.name, getattr(self.owner, self.name, None))

    def difference(self) -> str | None:
        """How the function differs from what the patch needs; None if it does not differ."""
        original = self.original
        what = f"{self.owner.__name__}.{self.name}"
        if original is None:
            return f"there is no {what}"
        missing = parameters_missing(original, self.needs)
        return f"{what} has no {', '.join(missing)}" if missing else None

    def apply(self) -> None:
        original, replacement, applies = self.original, self.replacement, self.applies
        if isinstance(original, classmethod):
            function = original.__func__

            @functools.wraps(function)
            def class_method(cls: type, *args: Any, **kwargs: Any) -> Any:
                return replacement(functools.partial(function, cls), cls, *args, **kwargs)

            setattr(self.owner, self.name, classmethod(class_method))
        elif isinstance(self.owner, ModuleType):

            @functools.wraps(original)
            def of_module(*args: Any, **kwargs: Any) -> Any:
                return replacement(original, *args, **kwargs)

            setattr(self.owner, self.name, of_module)
        else:

            @functools.wraps(original)
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                if not applies(self):
                    return original(self, *args, **kwargs)
                return replacement(functools.partial(original, self), self, *args, **kwargs)

            setattr(self.owner, self.name, method)


PATCHES: list[Patch] = []


def patch(
    owner: type | ModuleType, name: str, *needs: str, applies: Callable[[Any], bool] = lambda _: True
) -> Callable[[F], F]:
    """Declare the decorated function as the replacement of `owner.name`; see `Patch`."""

    def declare(replacement: F) -> F:
        PATCHES.append(Patch(owner, name, needs, replacement, applies))
        return replacement

    return declare


def apply_patches() -> None:
    """Apply all declared patches, or none.

    Raises:
        PeftTooDifferentError: If a function differs from what its patch needs. The message names all of them.
    """
    differences = [difference for one in PATCHES if (difference := one.difference())]
    if differences:
        raise incompatible("; ".join(differences))
    for one in PATCHES:
        one.apply()


def arguments_of(function: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. Empty if they do not fit, since then the function itself raises an error."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def in_own_context(function: F) -> F:
    """Run a function in a copy of the context variables, so that none that it sets outlives it.

    A `finally` that resets them may be interrupted, and the mark of a load would remain for ever.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return copy_context().run(function, *args, **kwargs)

    return cast(F, run)

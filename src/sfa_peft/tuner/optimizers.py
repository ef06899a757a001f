"""Finds optimizers with parameters that an adapter no longer has, so that their steps would have no effect."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def holds_any(parameters: Iterable[Tensor]) -> Optimizer | None:
    """An optimizer in this process that has one of the parameters; None if there is none."""
    wanted = {id(p) for p in parameters}
    # With `type`, since `isinstance` on a lazy object of another library could import something.
    optimizers = (o for o in gc.get_objects() if issubclass(type(o), Optimizer))
    return next((o for o in optimizers if not wanted.isdisjoint(_trained_by(o))), None) if wanted else None


def _trained_by(optimizer: Any) -> set[int]:
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def warn_of_replaced(before: Iterable[Tensor], after: Iterable[Tensor], adapter_name: str) -> None:
    """Warn if an optimizer has a parameter that the adapter had before and no longer has."""
    kept = {id(p) for p in after}
    optimizer = holds_any(p for p in before if id(p) not in kept)
    if optimizer is not None:
        warnings.warn(
            f"an optimizer ({type(optimizer).__name__}) was created before adapter {adapter_name!r} got another "
            f"ticket, and has parameters that the adapter no longer has, so it would not train the adapter. Create "
            f"the optimizer after search_ticket, install_ticket or loading.",
            stacklevel=3,
        )

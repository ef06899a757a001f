"""Optimizers that hold parameters which an adapter no longer has: they would go on, and train nothing."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def holds_any(parameters: Iterable[Tensor]) -> Optimizer | None:
    """An optimizer of this process that trains one of the parameters; None if there is none."""
    wanted = {id(p) for p in parameters}
    # By the exact class: asking a lazy object of another library for its class could import something.
    optimizers = (o for o in gc.get_objects() if issubclass(type(o), Optimizer))
    return next((o for o in optimizers if not wanted.isdisjoint(_trained_by(o))), None) if wanted else None


def _trained_by(optimizer: Any) -> set[int]:
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def tell_left_behind(before: Iterable[Tensor], after: Iterable[Tensor], adapter_name: str) -> None:
    """Warn if an optimizer still trains a parameter that the adapter had before, and has no more."""
    kept = {id(p) for p in after}
    optimizer = holds_any(p for p in before if id(p) not in kept)
    if optimizer is not None:
        warnings.warn(
            f"an optimizer ({type(optimizer).__name__}) was made before adapter {adapter_name!r} got another ticket, "
            f"and holds parameters that the adapter has no more: it would train nothing there. Make the optimizer "
            f"after search_ticket, install_ticket or loading.",
            stacklevel=3,
        )

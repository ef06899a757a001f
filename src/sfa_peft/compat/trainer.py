"""Tells those who train with transformers' `Trainer` that its default learning rate is far too small for a ticket."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch.optim import Optimizer

from ..tuner.optimizers import internal_values
from .patching import Method, Patch

TINY = 5e-4  # ten times the default; the values of a ticket measured best with 1.5e-3 to 1.2e-2


def watch_trainer() -> None:
    """Look at the optimizers that `Trainer` makes from now on, if a program uses it.

    It is called when a model is adapted, and imports nothing, as `Trainer` takes seconds. In other loops somebody has
    chosen the rate, and torch has no place to look at it without touching the optimizers of all other models.
    """
    module = sys.modules.get("transformers.trainer")
    trainer = getattr(module, "Trainer", None)
    if trainer is None or getattr(trainer.create_optimizer, "looks_at_rates", False):
        return
    patch = Patch(trainer, "create_optimizer", (), create_optimizer, lambda _: True)
    if patch.difference() is None:
        patch.apply()
        trainer.create_optimizer.looks_at_rates = True


def create_optimizer(original: Method, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the optimizer as `Trainer` does, and warn if the values of a ticket get a tiny learning rate."""
    made = trainer.optimizer is None
    optimizer = original(*args, **kwargs)
    if made:
        warn_of_tiny_rate(trainer.optimizer, trainer.model)
    return optimizer


def warn_of_tiny_rate(optimizer: Optimizer, model: Any) -> None:
    """Warn if an optimizer trains the values of a ticket with a tiny learning rate."""
    values = internal_values(model)
    rates = [group["lr"] for group in optimizer.param_groups if any(id(p) in values for p in group["params"])]
    if rates and max(rates) < TINY:
        warnings.warn(
            f"Trainer trains the ticket's values with a learning rate of {max(rates):g}, where 2e-3 to 1e-1 "
            f"measured best: they would hardly change. Pass `optimizers=(torch.optim.AdamW(sfa_peft.parameter_groups("
            f"model)), None)` to Trainer, or set `learning_rate`.",
            stacklevel=4,
        )

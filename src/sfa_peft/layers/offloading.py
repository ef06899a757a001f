"""Weights that Accelerate keeps elsewhere (`cpu_offload`, `dispatch_model`): its hooks bring them for a module's call.

SFA reads the weights of a leaf and of its adapters without calling them, so it runs their hooks itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook")


@contextmanager
def brought(*modules: nn.Module) -> Iterator[None]:
    """Have the weights of modules where they are computed with, and send them back at the end."""
    hooks: list[tuple[nn.Module, Any]] = [(module, module._hf_hook) for module in modules if is_hooked(module)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, ())

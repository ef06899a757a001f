"""Weights that Accelerate offloads (`cpu_offload`, `dispatch_model`).

Accelerate's hooks load the weights of a module when the module is called. SFA reads the weights of a leaf and of its
adapters without calling these modules, so it runs the hooks itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook")


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Load the offloaded weights of modules on their device, and offload them again at the end."""
    hooks: list[tuple[nn.Module, Any]] = [(module, module._hf_hook) for module in modules if is_hooked(module)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, ())

"""Several adapters on one image: the modules before the first adapted one run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapted import SFALayer

_NOTHING: Any = object()


@contextmanager
def shared_trunk(model: nn.Module) -> Iterator[list[str]]:
    """While it is open, what comes before the first adapted layer runs once for an image, whatever adapter is active.

    For several tasks on one backbone, whose adapters all leave the first blocks alone (`SFAConfig.layers_to_transform`
    with the last blocks): each task continues from the outputs of these blocks. The outputs are exactly those of
    single runs. What is kept is used only for the very same input; with another one it is computed, and kept instead.
    The base's weights and autocast must stay as they are meanwhile.

    Args:
        model (`nn.Module`): A model in eval mode that has all the adapters. It is not for compiled models.

    Yields:
        The names of the modules that are shared.

    Raises:
        ValueError: If the model is in training mode, has no SFA adapter, or an adapter changes the first block.
        RuntimeError: If the model runs under `torch.inference_mode`, in which changes in place are not counted.

    Example:

        >>> with torch.no_grad(), shared_trunk(model):
        ...     for task in ("segmentation", "depth"):
        ...         model.set_adapter(task)
        ...         outputs[task] = model(pixel_values)  # (batch, 3, height, width)
    """
    if model.training:
        raise ValueError("shared_trunk shares outputs, which dropout makes different in training: call model.eval().")
    shared = _trunk_of(model)
    earlier = {name: vars(module).get("forward", _NOTHING) for name, module in shared.items()}
    try:
        for module in shared.values():
            module.forward = _Kept(module.forward)  # not a wrapper around it: hooks on the module keep working
        yield list(shared)
    finally:
        for name, module in shared.items():
            if earlier[name] is _NOTHING:
                vars(module).pop("forward", None)
            else:
                module.forward = earlier[name]


class _Kept:
    """A forward method that keeps its last output, and gives it again for the same input.

    The modules of a trunk give each other the tensors that are kept, so that a look at which tensors they are is
    enough. Only the first one may be called with a copy, which is compared.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.given: Any = _NOTHING
        self.output: Any = None
        self.versions: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("shared_trunk does not work under torch.inference_mode: use torch.no_grad.")
        given = (args, kwargs)
        if self.given is not _NOTHING and _same(self.given, given) and self.versions == self._versions():
            return self.output
        self.output = self.forward(*args, **kwargs)
        self.given = given
        self.versions = self._versions()
        return self.output

    def _versions(self) -> list[int]:
        """They count the changes in place of the tensors that were given, and of those in the output."""
        return [t._version for t in (*_tensors(self.given), *_tensors(self.output))]


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments have the same content, looking into containers."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (
            one.shape == other.shape
            and one.dtype == other.dtype
            and one.device == other.device
            and bool(torch.equal(one, other))
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return isinstance(one, bool | int | float | str) and bool(one == other)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _trunk_of(model: nn.Module) -> dict[str, nn.Module]:
    """The largest modules before the first adapted layer, by name, in the order in which the model has them."""
    found: dict[str, nn.Module] = {}
    name, module = "", model
    while not isinstance(module, SFALayer):
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if any(isinstance(inner, SFALayer) for inner in child.modules()):
                name, module = full, child
                break
            if next(child.parameters(), None) is not None:
                found[full] = child
        else:
            raise ValueError(f"{type(model).__name__} has no SFA adapter: call get_peft_model(base, SFAConfig(...)).")
    blocks = [parent for parent in found if parent.rpartition(".")[2].isdigit()]
    if not blocks:
        raise ValueError(
            f"no block can be shared, since an adapter changes the first one, in {name!r}. Train the adapters with "
            f"`layers_to_transform`, the numbers of the last blocks."
        )
    return found

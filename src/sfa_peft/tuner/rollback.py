"""Restores a model after a change that fails, so that a change is made as a whole or not at all."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

OWN = (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)  # all their attributes are restored
# Of other modules, what adapters change. PEFT and transformers add the last two to a base.
CHANGED = (
    *("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "training"),
    *("peft_config", "_hf_peft_config_loaded"),
)
# These tell which changes are in the base's parameters, so they are set only together with the parameters.
MERGED = ("merged_adapters", "_originals")

Attributes = dict[str, tuple[Any, Any]]  # by name: the value, and a copy of what a container holds


class Rollback:
    """Restores a model if an error leaves the `with` block, also an interrupt (Ctrl-C).

    Restored are: the very same modules, parameters, buffers and hooks, ``requires_grad`` flags, gradients, training
    modes, active adapters, and the configs with their fields. Values are restored only of tensors that were passed to
    `keep`. Restoring needs no memory for new tensors, and may be repeated.

    An interrupt can come between any two instructions, so the code in a `finally` may be interrupted as well. Hence a
    block may change the model at any point, and restore it with `restore` on success too: what an interrupt leaves
    half-restored is restored again from here. A second interrupt waits until this is done.

    Args:
        model: The model, with all modules that the block may change.
        every_attribute: Whether to restore all attributes of all modules. Otherwise, of the base's modules, those that
            adapters change: others may be the user's, such as a list of losses.
    """

    def __init__(self, model: nn.Module, every_attribute: bool = False) -> None:
        modules = list(model.modules())
        whole = [(m, every_attribute or isinstance(m, OWN)) for m in modules]
        self._attributes = [(vars(m), is_whole, _kept(vars(m), _names(vars(m), is_whole))) for m, is_whole in whole]
        configs = {id(c): c for m in modules for c in _configs(m)}
        self._configs = [(vars(c), True, _kept(vars(c), vars(c).keys())) for c in configs.values()]
        self._flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._values: list[tuple[Tensor, Tensor]] = []
        self._actions: list[Callable[[], object]] = []
        self._grad_mode = torch.is_grad_enabled()

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that the model had."""
        return [p for p, _, _ in self._flags]

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of tensors that will be changed in place."""
        self._values += [(t, t.detach().clone()) for t in tensors if not t.is_meta]

    def also(self, action: Callable[[], object]) -> None:
        """Call `action` when the model is restored. It may be called several times."""
        self._actions.append(action)

    def restore(self) -> None:
        """Restore the model."""
        with Uninterrupted():
            torch.set_grad_enabled(self._grad_mode)  # an interrupt can keep `no_grad` from ending
            for attributes, is_whole, kept in (*self._attributes, *self._configs):
                _put_back(attributes, is_whole, kept)
            self.restore_flags()
            for action in reversed(self._actions):
                action()
            with torch.no_grad():
                for tensor, value in self._values:
                    tensor.copy_(value)

    def restore_flags(self) -> None:
        """Restore the ``requires_grad`` flags and the gradients of the parameters that the model had."""
        for p, requires_grad, grad in self._flags:
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not grad:
                p.grad = grad

    def __enter__(self) -> Rollback:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A class and no generator: if an interrupt came just before a generator's `finally`, this would run much
        # later, when the generator is collected, and undo what has been done since.
        if kind is not None:
            self.restore()


class Uninterrupted:
    """Delays Ctrl-C (SIGINT) until the end of a `with` block of a few milliseconds.

    Impatient users press Ctrl-C twice. The second one would come while the model is being restored from the first
    one, where no code is left that could restore it. Python handles signals in the main thread only, so in other
    threads, and where the handler was not set from Python, there is nothing to delay.
    """

    def __enter__(self) -> None:
        self.came = False
        self.previous: Any = signal.getsignal(signal.SIGINT)
        if self.previous is not None:
            try:
                signal.signal(signal.SIGINT, self._note)
            except ValueError:  # not the main thread
                self.previous = None

    def _note(self, *_: object) -> None:
        self.came = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            if self.came:
                signal.raise_signal(signal.SIGINT)


def _names(attributes: dict[str, Any], is_whole: bool) -> list[str]:
    return [name for name in attributes if name not in MERGED] if is_whole else list(CHANGED)


def _configs(module: nn.Module) -> list[Any]:
    configs = vars(module).get("peft_config")
    return list(configs.values()) if isinstance(configs, dict) else []


def _kept(attributes: dict[str, Any], names: Iterable[str]) -> Attributes:
    return {name: (attributes[name], _content(attributes[name])) for name in names if name in attributes}


def _content(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set) else None


def _put_back(attributes: dict[str, Any], is_whole: bool, kept: Attributes) -> None:
    for name in _names(attributes, is_whole):
        if name not in kept:
            attributes.pop(name, None)
    for name, (value, content) in kept.items():
        attributes[name] = value
        if content is not None and not _is_same(value, content):  # in place, since hooks know their dict
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)


def _is_same(value: Any, content: Any) -> bool:
    """Whether a container holds the very same objects as its copy. Tensors cannot be compared by value."""
    if isinstance(value, dict):
        return list(value) == list(content) and all(value[key] is content[key] for key in value)
    return len(value) == len(content) and all(a is b for a, b in zip(value, content, strict=True))

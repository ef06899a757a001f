"""Makes an adapter out of two checkpoints: a base model, and the same model after sparse or full fine-tuning."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..config import SFAConfig
from ..layers.adapted import sfa_layers
from ..layers.granularity import Element
from ..layers.kinds import internal_parameters
from ..planning.base import backbone_parameters, in_heads, shared_parameters
from ..planning.budget import absolute_budget
from ..planning.plan import Planner, without_empty
from ..ticket.selection import Parameters, choose
from ..tuner.model import SFAModel, tuner_of
from ..tuner.rollback import Rollback


@dataclass(frozen=True)
class Extraction:
    """What an extracted adapter has of the difference between two models, outside its heads.

    Attributes:
        size: The number of values of the adapter.
        changed: The number of weights that differ, among those that an internal adapter can change.
        relative_error: The norm of the difference that is left out, relative to the norm of the whole difference.
        left_out: For each tensor that differs and that no internal adapter can change, the norm of its difference.
    """

    size: int
    changed: int
    relative_error: float
    left_out: dict[str, float]

    def __str__(self) -> str:
        text = f"{self.size:,} of {self.changed:,} changed weights; relative error {self.relative_error:.3g}"
        return text + (f"; not adapted: {_some(self.left_out)}" if self.left_out else "")


def extract_adapter(
    base: nn.Module,
    finetuned: nn.Module,
    budget: int | float | None = None,
    *,
    target_modules: Collection[str] | str | None = None,
    modules_to_save: list[str] | None = None,
    adapter_name: str = "default",
) -> tuple[PeftModel, Extraction]:
    """Make an internal adapter that turns a base model into a fine-tuned one.

    The ticket has the positions where the two models differ, or, with a budget, those with the largest absolute
    differences. Among all tickets of that size this one leaves out the smallest norm.

    Args:
        base (`nn.Module`): The base model. It is adapted in place, as by `get_peft_model`.
        finetuned (`nn.Module`): The fine-tuned model, of the same architecture. It is not changed.
        budget (`int` or `float`, *optional*, defaults to `None`):
            The largest number of values: an int, or a fraction of the backbone's parameters. With None the adapter has
            every difference, up to the rounding of a sum, and an error says what it cannot have.
        target_modules (`list[str]` or `str`, *optional*, defaults to `None`):
            The modules whose weights and biases may be changed, as in `SFAConfig`. None means all `nn.Linear`,
            `nn.Conv2d` and `nn.LayerNorm`, also outside the backbone.
        modules_to_save (`list[str]`, *optional*, defaults to `None`):
            The heads, which are taken over whole.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.

    Returns:
        The adapted model, and what the adapter has of the difference.

    Raises:
        ValueError: If the models do not have the same tensors, do not differ, or, without a budget, differ in tensors
            that an internal adapter cannot change or in more than half of the weights. Then nothing is changed.

    Example:

        ```py
        >>> model, extraction = extract_adapter(base, finetuned, budget=0.02, modules_to_save=["decode_head"])
        >>> print(extraction)
        >>> model.save_pretrained("adapter")
        ```
    """
    if target_modules is None:
        target_modules = _exactly(_adaptable(base, Planner(base, SFAConfig(modules_to_save=modules_to_save))))
    config = SFAConfig(
        budget=1 if budget is None else budget,
        external_modules=[],
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=modules_to_save,
    )
    planner = Planner(base, config)
    goal = finetuned.state_dict()
    _check_same_tensors(base.state_dict(), goal)
    shared = shared_parameters(base)
    candidates = {
        module: {name: p for name, p in parameters.items() if id(p) not in shared}
        for module, parameters in planner.candidates().items()
    }
    adaptable = {f"{module}.{name}" for module, parameters in candidates.items() for name in parameters}
    outside = {
        name: tensor
        for name, tensor in base.state_dict().items()
        if name not in adaptable and tensor.is_floating_point() and not in_heads(name, planner.heads)
    }
    norms = {name: float(_difference(tensor, goal[name]).norm()) for name, tensor in outside.items()}
    left_out = {name: norm for name, norm in norms.items() if norm}
    changed = sum(int(_difference(p, goal[name]).count_nonzero()) for name, p in _named(candidates))
    size = _size(base, config, candidates, changed, left_out, budget)

    def score(name: str, p: Tensor) -> Tensor:
        return _difference(p, goal[name]).abs().float()

    positions = without_empty(choose(candidates, score, Element(), size))
    with Rollback(base):
        model = get_peft_model(
            base,
            SFAConfig(
                budget=size,
                external_modules=[],
                target_modules=_exactly(positions),
                modules_to_save=modules_to_save,
            ),
            adapter_name=adapter_name,
        )
        tuner = tuner_of(model)
        tuner.install(adapter_name, positions)
        for name in planner.heads:
            copied = {k.removeprefix(f"{name}."): t for k, t in goal.items() if k.startswith(f"{name}.")}
            cast(ModulesToSaveWrapper, tuner.model.get_submodule(name)).modules_to_save[adapter_name].load_state_dict(
                copied
            )
        missing, whole = _fill(tuner, adapter_name, candidates, goal)
    missing, whole = (total + sum(norm**2 for norm in left_out.values()) for total in (missing, whole))
    return model, Extraction(size, changed, math.sqrt(missing / whole), left_out)


def _size(
    base: nn.Module,
    config: SFAConfig,
    candidates: Parameters,
    changed: int,
    left_out: dict[str, float],
    budget: int | float | None,
) -> int:
    """The size of the ticket.

    Raises:
        ValueError: If there is nothing to adapt, or, without a budget, the adapter would not be exact or be too large.
    """
    if not changed:
        raise ValueError(
            f"the models do not differ in the targets of an internal adapter"
            f"{f', but in {_some(left_out)}' if left_out else ''}; check which checkpoints they are."
        )
    if budget is not None:
        return min(absolute_budget(budget, backbone_parameters(base, config)), changed)
    total = sum(p.numel() for _, p in _named(candidates))
    if left_out:
        raise ValueError(
            f"the models also differ in {_some(left_out)}, which an internal adapter does not change. Name heads in "
            f"`modules_to_save`, or give a `budget` to leave them out."
        )
    if changed > total / 2:
        raise ValueError(
            f"the models differ in {changed:,} of {total:,} weights, which is no sparse change; give a `budget`."
        )
    return changed


def _some(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:3]))
    return shown + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def _exactly(names: Collection[str]) -> str:
    """A regular expression for these names. In a list each of them would be an ending."""
    return "|".join(map(re.escape, names))


def _adaptable(model: nn.Module, planner: Planner) -> list[str]:
    """The leaves outside the heads that take internal adapters."""
    return [
        name
        for name, leaf in planner.leaves.items()
        if internal_parameters(leaf)
        and not in_heads(name, planner.heads)
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]


def _check_same_tensors(base: dict[str, Tensor], finetuned: dict[str, Tensor]) -> None:
    for name in (*base, *finetuned):
        shapes = [tuple(state[name].shape) if name in state else None for state in (base, finetuned)]
        if shapes[0] != shapes[1]:
            there = [f"has shape {shape}" if shape is not None else "is missing" for shape in shapes]
            raise ValueError(
                f"the models have different tensors: {name!r} {there[0]} in the base and {there[1]} in the fine-tuned "
                f"model. Load both in the same class, with the same number of labels."
            )


def _named(parameters: Parameters) -> Iterator[tuple[str, Tensor]]:
    for module, tensors in parameters.items():
        for name, p in tensors.items():
            yield f"{module}.{name}", p


def _precise(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _difference(base: Tensor, goal: Tensor) -> Tensor:
    return _precise(goal).to(base.device) - _precise(base)


@torch.no_grad()
def _fill(tuner: SFAModel, adapter_name: str, candidates: Parameters, goal: dict[str, Tensor]) -> tuple[float, float]:
    """Give the adapter its values. Returns the squared norms of what is left out, and of the whole difference."""
    layers = dict(sfa_layers(tuner.model))
    missing = whole = 0.0
    for full_name, p in _named(candidates):
        module, _, name = full_name.rpartition(".")
        difference = _difference(p, goal[full_name]).flatten()
        whole += float(difference.double().square().sum())
        internal = layers[module].internal_of(adapter_name) if module in layers else None
        if internal is not None and name in internal.changed:
            values, at = internal.values(name), internal.positions(name).long()
            old, new = _precise(p).flatten()[at], _precise(goal[full_name]).to(p.device).flatten()[at]
            found = new - old
            found += new - (old + found)  # this difference was rounded, and so is the sum in the adapted model
            values.copy_(found)
            difference[at] = new - (old + values)
        missing += float(difference.double().square().sum())
    return missing, whole

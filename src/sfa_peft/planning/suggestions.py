"""What to write for a model whose blocks are not known: a proposal, made from the blocks that are seen in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..layers.kinds import internal_parameters
from ..layers.leaves import base_layer_of
from .architectures import leaf_names

MOST = 3  # classes that are proposed


class _MLP(NamedTuple):
    """Two linear layers in a row, from the channels to the hidden units and back. Names relative to the block."""

    fc1: str
    fc2: str

    @property
    def input(self) -> str:
        """The module whose input is the MLP's: the one around both layers, or the first layer."""
        around = self.fc1.rpartition(".")[0]
        return around if around and around == self.fc2.rpartition(".")[0] else self.fc1


class _Repeated(NamedTuple):
    """A class of blocks that a model repeats, and the first one of them."""

    block: nn.Module
    times: int

    @property
    def name(self) -> str:
        return type(self.block).__name__

    @property
    def leaves(self) -> list[str]:
        """The leaves that a ticket may choose from."""
        named = ((name, self.block.get_submodule(name)) for name in leaf_names(self.block))
        return [name for name, leaf in named if internal_parameters(leaf) and not _is_unseen(self.block, name)]

    @property
    def mlp(self) -> _MLP | None:
        """The last two linear layers that widen and narrow the same channels."""
        linear = [
            (n, m) for n in self.leaves if isinstance(m := base_layer_of(self.block.get_submodule(n)), nn.Linear)
        ]
        found = None
        for i, (fc1, first) in enumerate(linear):
            for fc2, second in linear[i + 1 :]:
                is_back = first.out_features == second.in_features and first.in_features == second.out_features
                if is_back and first.out_features != first.in_features:
                    found = _MLP(fc1, fc2)
        return found


def suggestion(model: nn.Module) -> str:
    """The blocks that a model repeats, and what to write for them, ready to be pasted. Empty if there are none."""
    repeated = list(_repeated(model))
    if not repeated:
        return ""
    seen = ", ".join(f"{found.name} ({found.times} times: {', '.join(found.leaves)})" for found in repeated)
    first = next((found for found in repeated if found.mlp is not None), repeated[0])
    return (
        f"\nIts repeated blocks are {seen}.\nFor every model with such blocks:\n\n{_registration(first)}\n"
        f"Or for this model alone:\n\n{_fields(first)}\n"
        f"If the blocks scale or normalize the output of the MLP, name that scale or norm as the place."
    )


def _registration(found: _Repeated) -> str:
    lines = [
        "    sfa_peft.register_architecture(",
        "        sfa_peft.Architecture(",
        f"            name={found.name!r},",
        f"            block={found.name!r},",
        f"            targets={tuple(found.leaves)!r},",
    ]
    if found.mlp is not None:
        lines += [
            f"            places={ {'mlp': found.mlp.fc2, 'mlp_parallel': found.mlp.fc2}!r},",
            f"            mlp_input={found.mlp.input!r},",
        ]
    return "\n".join([*lines, "        )", "    )", ""])


def _fields(found: _Repeated) -> str:
    external: object = [] if found.mlp is None else {found.mlp.fc2: found.mlp.input}
    return f"    SFAConfig(..., target_modules={found.leaves!r}, external_modules={external!r})\n"


def _repeated(model: nn.Module) -> Iterator[_Repeated]:
    """The outermost classes of blocks that stand in rows and have leaves that a ticket may choose from."""
    first: dict[type, nn.Module] = {}
    counts: dict[type, int] = {}

    def look(module: nn.Module) -> None:
        is_row = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        for child in module.children():
            is_block = is_row and base_layer_of(child) is child and next(child.children(), None) is not None
            if is_block and not isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                first.setdefault(type(child), child)
                counts[type(child)] = counts.get(type(child), 0) + 1
            look(child)

    look(model)
    found = (_Repeated(block, counts[cls]) for cls, block in first.items())
    inside = {type(inner) for block in first.values() for inner in block.modules() if inner is not block}
    # Stages contain blocks: of two classes, the inner one repeats more often.
    kept = [one for one in found if one.times > 1 and one.leaves]
    kept = [one for one in kept if not _has_inner(one, kept)]
    yield from [one for one in kept if one.mlp is not None or type(one.block) not in inside][:MOST]


def _has_inner(found: _Repeated, others: list[_Repeated]) -> bool:
    """Whether other repeated blocks are inside it: it is a stage."""
    inner = {type(module) for module in found.block.modules()} - {type(found.block)}
    return any(type(other.block) in inner and other.mlp is not None for other in others)


def _is_unseen(block: nn.Module, name: str) -> bool:
    """Whether a leaf belongs to `nn.MultiheadAttention`, which uses its parameters without calling it."""
    return isinstance(block.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)

"""What to write for a model whose blocks are not known: a proposal, made from the blocks that are seen in it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..layers.kinds import internal_parameters
from ..layers.leaves import base_layer_of, modules_outside
from .architectures import leaf_names

MOST = 3  # classes that are proposed
_ROWS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


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

    def contains(self, other: _Repeated) -> bool:
        return self is not other and any(type(module) is type(other.block) for module in self.block.modules())

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
    repeated = _repeated(model)
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


def _repeated(model: nn.Module) -> list[_Repeated]:
    """The classes of blocks that stand in rows and have leaves that a ticket may choose from."""
    blocks: dict[type, list[nn.Module]] = {}
    for _, row in modules_outside(model):
        for child in row.children() if isinstance(row, _ROWS) else ():
            is_leaf = next(child.children(), None) is None or base_layer_of(child) is not child
            if not is_leaf and not isinstance(child, _ROWS):
                blocks.setdefault(type(child), []).append(child)
    found = [_Repeated(rows[0], len(rows)) for rows in blocks.values() if len(rows) > 1]
    found = [one for one in found if one.leaves]
    no_stages = [one for one in found if not any(other.mlp is not None and one.contains(other) for other in found)]
    return [one for one in no_stages if one.mlp or not any(other.contains(one) for other in no_stages)][:MOST]


def _is_unseen(block: nn.Module, name: str) -> bool:
    """Whether a leaf belongs to `nn.MultiheadAttention`, which uses its parameters without calling it."""
    return isinstance(block.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)

"""The known architectures: their blocks, the places in a block, and the leaves that a ticket may choose from.

The keys of the table are class names of modules in transformers. They are looked up for every module of a model, so a
backbone inside a dense model is found too. Decoder layers are not, although their leaves have the same names.

The place of an external adapter is a leaf, and the adapter acts on its output. Some architectures scale (LayerScale in
DINOv2 and DINOv3) or normalize (Swinv2) the output of a sub-layer before the residual sum. There the place is after
the scale or the norm, which would otherwise damp or rescale the adapter's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn


@dataclass(frozen=True)
class PlainMLP:
    """An MLP ``fc2(activation(fc1(x)))`` that a config can make wider. All names are relative to the block.

    Attributes:
        field: The config field that decides the number of hidden units.
        is_ratio: Whether the field is a multiple of the channels. Otherwise it is the number of hidden units.
        factor: The parameter of the LayerScale between `fc2` and the place, if there is one.
        fc1: The first linear layer, from the channels to the hidden units.
        activation: The elementwise function of the hidden units.
        fc2: The second linear layer, whose output is the place or is multiplied by `factor`.
    """

    field: str
    is_ratio: bool
    factor: str | None = None
    fc1: str = "mlp.fc1"
    activation: str = "mlp.activation_fn"
    fc2: str = "mlp.fc2"


@dataclass(frozen=True)
class Known:
    """The description of a class of modules. All names are relative to the module.

    Attributes:
        targets: The leaves that the ticket may choose from. Leaves that a variant does not have are skipped.
        places: For each place, the leaf whose output the external adapter acts on.
        mlp_input: The module whose input is the MLP's input, for the parallel place.
        mlp: The MLP that a parallel external adapter can be folded into. None if the block normalizes its output.
    """

    targets: tuple[str, ...]
    places: dict[str, str] = field(default_factory=dict)
    mlp_input: str | None = None
    mlp: PlainMLP | None = None


_QKVO = tuple(f"attention.{name}_proj" for name in "qkvo")
_LAYER_SCALE_BLOCK = Known(
    targets=(
        "norm1",
        *_QKVO,
        "norm2",
        *(f"mlp.{name}" for name in ("fc1", "fc2", "gate_proj", "up_proj", "down_proj")),
    ),
    places={"attention": "layer_scale1", "mlp": "layer_scale2", "mlp_parallel": "layer_scale2"},
    mlp_input="mlp",
    mlp=PlainMLP("mlp_ratio", is_ratio=True, factor="layer_scale2.lambda1"),
)
_PRE_NORM_BLOCK = Known(
    targets=("layernorm_before", *_QKVO, "layernorm_after", "mlp.fc1", "mlp.fc2"),
    places={"attention": "attention.o_proj", "mlp": "mlp.fc2", "mlp_parallel": "mlp.fc2"},
    mlp_input="mlp",
    mlp=PlainMLP("mlp_ratio", is_ratio=True),
)

KNOWN: dict[str, Known] = {
    "SwinLayer": _PRE_NORM_BLOCK,
    "ViTLayer": replace(_PRE_NORM_BLOCK, mlp=PlainMLP("intermediate_size", is_ratio=False)),
    "Dinov2Layer": _LAYER_SCALE_BLOCK,
    "Dinov2WithRegistersLayer": _LAYER_SCALE_BLOCK,
    "RfDetrDinov2Layer": _LAYER_SCALE_BLOCK,
    "DINOv3ViTLayer": replace(
        _LAYER_SCALE_BLOCK,
        mlp=PlainMLP(
            "intermediate_size",
            is_ratio=False,
            factor="layer_scale2.lambda1",
            fc1="mlp.up_proj",
            activation="mlp.act_fn",
            fc2="mlp.down_proj",
        ),
    ),
    "Swinv2Layer": Known(
        targets=(
            *(f"attention.self.{name}" for name in ("query", "key", "value")),
            "attention.output.dense",
            "layernorm_before",
            "intermediate.dense",
            "output.dense",
            "layernorm_after",
        ),
        places={"attention": "layernorm_before", "mlp": "layernorm_after", "mlp_parallel": "layernorm_after"},
        mlp_input="intermediate",
    ),
    "SwinPatchMerging": Known(targets=("norm", "reduction")),
    "Swinv2PatchMerging": Known(targets=("reduction", "norm")),
}


class Place(NamedTuple):
    """A place of an external adapter, with full module names."""

    place: str
    module: str
    mlp_input: str | None


def known_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Known]]:
    """The prefix of the names in each known module, the module, and its description, in model order."""
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in KNOWN:
                yield (f"{name}." if name else ""), module, KNOWN[cls.__name__]
                break


def has_known_blocks(model: nn.Module) -> bool:
    return any(known.places for _, _, known in known_modules(model))


def known_prefixes(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of the names of all modules in known blocks."""
    return tuple(prefix for prefix, _, _ in known_modules(model))


def known_targets(model: nn.Module) -> list[str]:
    """Full names of the leaves that a ticket may choose from by default, in model order."""
    return [
        prefix + name
        for prefix, module, known in known_modules(model)
        for name in known.targets
        if _has_module(module, name)
    ]


def known_places(model: nn.Module) -> list[Place]:
    """Every place of every known block, in model order."""
    return [
        Place(place, prefix + name, prefix + known.mlp_input if place == "mlp_parallel" and known.mlp_input else None)
        for prefix, _, known in known_modules(model)
        for place, name in known.places.items()
    ]


def _has_module(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True

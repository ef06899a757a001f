"""The known architectures: the built-in table, and the blocks of a model that it describes.

Blocks are looked up by the names of their classes for every module of a model, so a backbone inside a dense model is
found too. Decoder layers are not, although their leaves have the same names. Every description goes through
`register_architecture`, as those of users do: of several for one class, the last one that applies is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ..layers.leaves import base_layer_of, channels_of
from ..layers.merged import hook_of
from .registry import MAPS, PATCHES, Architecture, PlainMLP, descriptions_of, register_architecture


def _block(
    name: str,
    block: str,
    norms: tuple[str, str],
    attention: tuple[str, ...],
    linear: tuple[str, ...],
    at: tuple[str, str] | None = None,
    block_input: str | None = None,
    mlp_input: str = "mlp",
    scales: bool = False,
    **more: Any,
) -> None:
    """Register a transformer block.

    Args:
        name, block, mlp_input, more: As in `Architecture`.
        block_input: As in `Architecture`; None for the norm of the MLP.
        norms: The norms of attention and MLP.
        attention: The other leaves of the attention, the last one of which gives its output.
        linear: The same for the MLP.
        at: The places `attention` and `mlp`, if they are not the last leaves of attention and MLP.
        scales: Whether the block scales the output of the MLP by a parameter of its own. Then there is no leaf whose
            output is added to the residual, and no place `block`.
    """
    at_attention, at_mlp = at or (attention[-1], linear[-1])
    at_block = {} if scales else {"block": at_mlp}
    register_architecture(
        Architecture(
            name,
            block,
            targets=(norms[0], *attention, norms[1], *linear),
            places={"attention": at_attention, "mlp": at_mlp, "mlp_parallel": at_mlp} | at_block,
            mlp_input=mlp_input,
            block_input=None if scales else block_input or norms[1],
            **more,
        )
    )


def _inside(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


_LAYERNORMS = ("layernorm_before", "layernorm_after")
_LAYER_NORMS = ("layer_norm1", "layer_norm2")
_NORMS = ("norm1", "norm2")
_QKVO = _inside("attention", "q_proj", "k_proj", "v_proj", "o_proj")
_FUSED = _inside("attn", "qkv", "proj")
_MLP = _inside("mlp", "fc1", "fc2")
_SPLIT_MLP = ("intermediate.dense", "output.dense")  # an MLP in two modules
_SCALES = ("layer_scale1", "layer_scale2")
_IN_PARTS = {"fc1": "intermediate.dense", "activation": "intermediate.intermediate_act_fn", "fc2": "output.dense"}
_RATIO = PlainMLP("mlp_ratio", is_ratio=True)
_SIZE = PlainMLP("intermediate_size", is_ratio=False)
_BEHIND_SCALE, _BEHIND_NORMS = "behind LayerScale", "behind the norms, which follow the sub-layers"
_BEFORE_SCALE = "before the scale, which is a parameter of the block and no module"


def _query_key_value(inner: str) -> tuple[str, ...]:
    """The attention of transformers' older blocks, with two modules inside."""
    return (*_inside(f"attention.{inner}", "query", "key", "value"), "attention.output.dense")


# Swin

_DIMENSIONS = "input_dimensions"  # the argument of Swin's blocks
_block("Swin", "SwinLayer", _LAYERNORMS, _QKVO, _MLP, mlp=_RATIO, grid=_DIMENSIONS)
register_architecture(Architecture("Swin, patch merging", "SwinPatchMerging", targets=("norm", "reduction")))
register_architecture(
    Architecture(
        "Swinv2",
        "Swinv2Layer",
        targets=(*_query_key_value("self"), "layernorm_before", *_SPLIT_MLP, "layernorm_after"),
        places={"attention": "layernorm_before"} | dict.fromkeys(("mlp", "mlp_parallel", "block"), "layernorm_after"),
        mlp_input="intermediate",
        block_input="intermediate",
        note=_BEHIND_NORMS,
        grid=_DIMENSIONS,
    )
)
register_architecture(Architecture("Swinv2, patch merging", "Swinv2PatchMerging", targets=("reduction", "norm")))
for _name, _class in (("MaskFormer's Swin", "MaskFormerSwin"), ("Donut's Swin", "DonutSwin")):
    _block(
        _name,
        f"{_class}Layer",
        _LAYERNORMS,
        _query_key_value("self"),
        _SPLIT_MLP,
        mlp_input="intermediate",
        mlp=PlainMLP("mlp_ratio", is_ratio=True, **_IN_PARTS),
        grid=_DIMENSIONS,
    )
    register_architecture(
        Architecture(f"{_name}, patch merging", f"{_class}PatchMerging", targets=("norm", "reduction"))
    )

# ViT

for _name, _class in (
    ("ViT", "ViTLayer"),
    ("DeiT", "DeiTLayer"),
    ("MSN", "ViTMSNLayer"),
    ("I-JEPA", "IJepaLayer"),
):
    _block(_name, _class, _LAYERNORMS, _QKVO, _MLP, mlp=_SIZE, grid=PATCHES)
_block("MAE", "ViTMAELayer", _LAYERNORMS, _QKVO, _MLP, mlp=_SIZE, inside=("ViTMAEModel",), note="the encoder alone")
_block("BEiT", "BeitLayer", _LAYERNORMS, _QKVO, _MLP, mlp=_SIZE, scales=True, note=_BEFORE_SCALE, grid=PATCHES)
for _name, _class in (("YOLOS", "YolosLayer"), ("DPT's ViT", "DPTViTLayer"), ("Data2Vec", "Data2VecVisionLayer")):
    _block(
        _name,
        _class,
        _LAYERNORMS,
        _query_key_value("attention"),
        _SPLIT_MLP,
        mlp_input="intermediate",
        mlp=PlainMLP("intermediate_size", is_ratio=False, **_IN_PARTS),
        scales=_name == "Data2Vec",
        note=_BEFORE_SCALE if _name == "Data2Vec" else "",
        grid=None if _name == "YOLOS" else PATCHES,  # YOLOS has its detection tokens after the patches
    )
_block(
    "ViTPose",
    "VitPoseBackboneLayer",
    _LAYERNORMS,
    _query_key_value("attention"),
    _MLP,
    mlp=PlainMLP("mlp_ratio", is_ratio=True, activation="mlp.activation"),
)
register_architecture(
    Architecture(
        "ViTPose, with experts",
        "VitPoseBackboneLayer",
        targets=("layernorm_before", *_query_key_value("attention"), "layernorm_after", *_MLP),
        places={"attention": "attention.output.dense"},
        has=("mlp.experts",),
        note="no place at the MLP, whose output is joined from several layers",
    )
)
_block(
    "VitDet",
    "VitDetLayer",
    _NORMS,
    _inside("attention", "qkv", "proj"),
    _MLP,
    mlp=PlainMLP("mlp_ratio", is_ratio=True, activation="mlp.act"),
    grid=MAPS,
)

# DINOv2 and DINOv3


def _layer_scale(
    name: str,
    block: str,
    mlp: PlainMLP,
    attention: tuple[str, ...] = _QKVO,
    has: tuple[str, ...] = (),
    grid: str | None = None,
) -> None:
    """Blocks of transformers with LayerScale, and a plain or a gated MLP."""
    register_architecture(
        Architecture(
            name,
            block,
            targets=("norm1", *attention, "norm2"),
            optional=_inside("mlp", "fc1", "fc2", "gate_proj", "up_proj", "down_proj", "weights_in", "weights_out"),
            places={"attention": "layer_scale1"} | dict.fromkeys(("mlp", "mlp_parallel", "block"), "layer_scale2"),
            mlp_input="mlp",
            block_input="norm2",
            mlp=mlp,
            has=has,
            note=_BEHIND_SCALE,
            grid=grid,
        )
    )


_SCALED_RATIO = PlainMLP("mlp_ratio", is_ratio=True, factor="layer_scale2.lambda1")
_SCALED_SIZE = PlainMLP(
    "intermediate_size",
    is_ratio=False,
    factor="layer_scale2.lambda1",
    fc1="mlp.up_proj",
    activation="mlp.act_fn",
    fc2="mlp.down_proj",
)
# transformers 5.18 gave the modules of DINOv2 the names that those of Swin and ViT have had since 5.9.
EARLIER = ", before transformers 5.18"
_EARLIER_RATIO = PlainMLP("mlp_ratio", is_ratio=True, factor="layer_scale2.lambda1", activation="mlp.activation")
for _name, _class in (
    ("DINOv2", "Dinov2Layer"),
    ("DINOv2 with registers", "Dinov2WithRegistersLayer"),
    ("RF-DETR's DINOv2", "RfDetrDinov2Layer"),
):
    # RF-DETR's has windows of tokens.
    _grid = None if _class == "RfDetrDinov2Layer" else PATCHES
    _layer_scale(_name, _class, _SCALED_RATIO, grid=_grid)
    _layer_scale(
        _name + EARLIER,
        _class,
        _EARLIER_RATIO,
        _query_key_value("attention"),
        has=("attention.attention.query",),
        grid=_grid,
    )
_layer_scale("DINOv3 ViT", "DINOv3ViTLayer", _SCALED_SIZE, grid=PATCHES)
_layer_scale("EoMT", "EomtLayer", _SCALED_RATIO, _inside("attention", "q_proj", "k_proj", "v_proj", "out_proj"))
_layer_scale("EoMT on DINOv3", "EomtDinov3Layer", _SCALED_SIZE)
_layer_scale(
    "rfdetr's windowed DINOv2",
    "WindowedDinov2WithRegistersLayer",
    _EARLIER_RATIO,
    _query_key_value("attention"),
)

# Hierarchical and promptable ones

_block(
    "SegFormer",
    "SegformerLayer",
    _LAYERNORMS,
    _QKVO,
    _MLP,
    optional=(*_inside("attention.sequence_reduction", "sequence_reduction", "layer_norm"), "mlp.dwconv.dwconv"),
    note="a convolution inside the MLP",
)
_block("Hiera", "HieraLayer", _LAYERNORMS, _FUSED, _MLP, mlp=_RATIO, optional=("proj",))
for _name, _class in (("SAM", "SamVisionLayer"), ("SAM-HQ", "SamHQVisionLayer")):
    _block(
        _name,
        _class,
        _LAYER_NORMS,
        _FUSED,
        _inside("mlp", "lin1", "lin2"),
        mlp=PlainMLP("mlp_dim", is_ratio=False, fc1="mlp.lin1", activation="mlp.act", fc2="mlp.lin2"),
        grid=MAPS,
        note="the vision encoder",
    )
_block(
    "SAM 2",
    "Sam2MultiScaleBlock",
    _LAYER_NORMS,
    _FUSED,
    _inside("mlp", "proj_in", "proj_out"),
    mlp=PlainMLP("mlp_ratio", is_ratio=True, fc1="mlp.proj_in", activation="mlp.activation", fc2="mlp.proj_out"),
    optional=("proj",),
    note="the vision encoder",
)
_block("SAM 3", "Sam3ViTLayer", _LAYER_NORMS, _QKVO, _MLP, mlp=_SIZE, note="the vision encoder")

# Vision towers, whose text towers have the same blocks

for _name, _class in (("CLIP", "CLIP"), ("SigLIP", "Siglip"), ("SigLIP 2", "Siglip2")):
    _block(
        _name,
        f"{_class}EncoderLayer",
        _LAYER_NORMS,
        _inside("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        _MLP,
        mlp=_SIZE,
        inside=(f"{_class}VisionModel", f"{_class}VisionTransformer"),
        grid=None if _class == "Siglip2" else PATCHES,  # SigLIP 2 embeds patches of any layout with a linear layer
        note="the vision tower alone",
    )

# timm, and Meta's own DINOv2 and DINOv3. Some of these names are common, so the blocks must have these parts too.

_PARTS = (*_NORMS, *_FUSED, *_MLP)
for _name, _class in (("ViT of timm and Meta", "Block"), ("Meta's DINOv3", "SelfAttentionBlock")):
    _grid = PATCHES if _class == "Block" else None
    _block(_name, _class, _NORMS, _FUSED, _MLP, has=_PARTS, grid=_grid)
    register_architecture(
        Architecture(
            f"{_name}, with LayerScale",
            _class,
            targets=("norm1", *_FUSED, "norm2"),
            optional=_inside("mlp", "fc1", "fc1_g", "fc1_x", "fc2", "w1", "w2", "w12", "w3"),
            places={"attention": "ls1"} | dict.fromkeys(("mlp", "mlp_parallel", "block"), "ls2"),
            mlp_input="mlp",
            block_input="norm2",
            has=(*_NORMS, *_FUSED, "mlp", "ls1", "ls2"),
            note=_BEHIND_SCALE + (", also NestedTensorBlock" if _class == "Block" else ""),
            grid=_grid,
        )
    )
# These read the weight of `qkv` without calling it.
_block(
    "BEiT of timm",
    "Block",
    _NORMS,
    ("attn.proj",),
    _MLP,
    has=(*_PARTS, "attn.q_bias"),
    scales=True,
    note=_BEFORE_SCALE,
)
for _name, _has_bias in (("DINOv3 and EVA of timm", False), ("EVA of timm, with its biases apart", True)):
    register_architecture(
        Architecture(
            _name,
            "EvaBlock",
            targets=("attn.proj", "mlp.fc2"),
            optional=(
                *_NORMS,
                *_inside("attn", *(() if _has_bias else ("qkv",)), "q_proj", "k_proj", "v_proj"),
                *_inside("mlp", "fc1", "fc1_g", "fc1_x"),
            ),
            places={"attention": "attn.proj", "mlp": "mlp.fc2", "mlp_parallel": "mlp.fc2"},
            mlp_input="mlp",
            has=("attn.proj", "mlp.fc2", *(("attn.q_bias",) if _has_bias else ())),
            note=_BEFORE_SCALE,
        )
    )
_block("Swin of timm", "SwinTransformerBlock", _NORMS, _FUSED, _MLP, has=_PARTS)
for _name, _class in (
    ("Swinv2 of Microsoft", "SwinTransformerBlock"),
    ("Swinv2 of timm", "SwinTransformerV2Block"),
):
    _block(
        *(_name, _class, _NORMS, ("attn.proj",), _MLP),
        at=_NORMS,
        block_input="mlp",
        has=(*_PARTS, "attn.cpb_mlp"),
        note=_BEHIND_NORMS,
    )
register_architecture(
    Architecture(
        "Swin and Swinv2 of timm, patch merging",
        "PatchMerging",
        targets=("norm", "reduction"),
        has=("norm", "reduction"),
    )
)


class Place(NamedTuple):
    """A place of an external adapter, with full module names. `reads` is the module whose input it reads, or None."""

    place: str
    module: str
    reads: str | None


def known_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Architecture]]:
    """The prefix of the names in each known module, the module, and its description, in model order."""
    for name, module in model.named_modules():
        found = _description_of(model, name, module)
        if found is not None:
            yield (f"{name}." if name else ""), module, found


def _description_of(model: nn.Module, name: str, module: nn.Module) -> Architecture | None:
    for cls in type(module).__mro__:
        for found in descriptions_of(cls.__name__):
            if all(_has(module, part) for part in found.has) and (
                not found.inside or _is_in(model, name, found.inside)
            ):
                return found
    return None


def _has(block: nn.Module, name: str) -> bool:
    """Whether a block has a module that does something, or a parameter."""
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None and not isinstance(found, nn.Identity)


def _is_in(model: nn.Module, name: str, classes: Iterable[str]) -> bool:
    """Whether a module is inside one of some classes."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    return any(cls.__name__ in classes for module in around for cls in type(module).__mro__)


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
        for name in (*known.targets, *known.optional)
        if _module(module, name) is not None
    ]


def known_places(model: nn.Module) -> list[Place]:
    """Every place of every known block, in model order. Those that a block lacks are left out (see `check_known`)."""
    return [
        Place(place, prefix + name, None if reads is None else prefix + reads)
        for prefix, module, known in known_modules(model)
        for place, name in known.places.items()
        for reads in [known.reads(place)]
        if all(_module(module, needed) is not None for needed in (name, reads) if needed is not None)
    ]


def known_grids(model: nn.Module) -> dict[tuple[str, str], tuple[str, str | None] | None]:
    """For each place and leaf where external adapters can have filters, where the grid of the tokens comes from.

    That is the name of a module, and of an argument of its forward; None where the tokens are maps. See `layers.grid`.
    """
    grids: dict[tuple[str, str], tuple[str, str | None] | None] = {}
    patches: dict[int, str] = {}  # the last convolution without overlap, by its number of channels
    for name, module in model.named_modules():
        base = base_layer_of(module)
        if isinstance(base, nn.Conv2d) and base.kernel_size == base.stride and max(base.kernel_size) > 1:
            patches[base.out_channels] = name
        known = _description_of(model, name, module)
        if known is None or known.grid is None:
            continue
        for place, leaf in known.places.items():
            full_name = f"{name}.{leaf}" if name else leaf
            if known.grid == MAPS:
                grids[place, full_name] = None
            elif known.grid == PATCHES:
                found = _module(module, leaf)
                width = None if found is None else channels_of(found)
                if width is not None and width[0] in patches:
                    grids[place, full_name] = patches[width[0]], None
            elif place != "attention":  # blocks that are told the grid have windows in their attention
                grids[place, full_name] = name, known.grid
    return grids


def check_known(model: nn.Module) -> None:
    """Check that the known blocks of a model have what their descriptions name.

    Raises:
        ValueError: If a block lacks a place or the MLP's input, if a place is no leaf, or if no block has a target.
            The message says which names are missing, and which there are.
    """
    blocks: dict[str, tuple[Architecture, list[tuple[str, nn.Module]]]] = {}
    for prefix, module, known in known_modules(model):
        blocks.setdefault(known.name, (known, []))[1].append((prefix.rstrip("."), module))
    for known, modules in blocks.values():
        for name, module in modules:
            where = f"the architecture {known.name!r} does not fit {name!r}, a {type(module).__name__}"
            for place, leaf in known.places.items():
                _check_leaf(module, leaf, f"{where}: its place `{place}` is {leaf!r}")
            for field_name in ("mlp_input", "block_input"):
                given = getattr(known, field_name)
                if given is not None and _module(module, given) is None:
                    raise ValueError(f"{where}: its {field_name} is {given!r}, which it lacks. {_listed(module)}")
        first = f"{modules[0][0]!r}, a {type(modules[0][1]).__name__}"
        missing = [t for t in known.targets if all(_module(module, t) is None for _, module in modules)]
        if missing:
            raise ValueError(
                f"the architecture {known.name!r} does not fit {first}: its targets {missing} are in no such block. "
                f"{_listed(modules[0][1])} Name them in `optional` if only some variants have them."
            )


def _check_leaf(block: nn.Module, name: str, where: str) -> None:
    leaf = _module(block, name)
    if leaf is None:
        raise ValueError(f"{where}, which it lacks. {_listed(block)}")
    is_leaf = base_layer_of(leaf) is not leaf or next(leaf.children(), None) is None or hook_of(leaf) is not None
    if not is_leaf:
        raise ValueError(f"{where}, a {type(leaf).__name__} with submodules; name a leaf. {_listed(block)}")


def _listed(block: nn.Module) -> str:
    return f"Its leaves are {', '.join(leaf_names(block))}."


def leaf_names(module: nn.Module) -> list[str]:
    """The names of the leaves of a module, in its order. A layer of a tuner is one leaf."""
    names = []
    for name, child in module.named_children():
        inner = [] if base_layer_of(child) is not child else leaf_names(child)
        names += [f"{name}.{leaf}" for leaf in inner] or [name]
    return names


def _module(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None

"""Folds the external adapters of a merged model into wider MLPs, so that it is a plain model of transformers.

``W2 act(W1 x + b1) + b2 + scale * up(act(down(x)))`` is the same MLP with more hidden units: the rows of `down` are
below those of `W1`, and the columns of ``scale * up`` beside those of `W2`. Behind a LayerScale the new columns are
divided by its factors. The config has one width for all blocks (or one ratio to the channels), so hidden units of
zeros fill up the blocks that have less.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..layers.bottleneck import ACTIVATIONS, ExternalAdapter
from ..layers.merged import PARALLEL, hook_of, merged_externals, merged_leaves, remove_externals
from ..layers.offloading import is_hooked
from ..planning.architectures import known_modules
from ..planning.base import shared_parameters
from ..planning.registry import PlainMLP

Widen = bool | Literal["auto"]

LITTLE = 0.1  # what zeros may add to the MLPs without being asked for, as a part of their parameters


class ExternalsKeptWarning(UserWarning):
    """Some external adapters of a merged model could not be folded into its weights."""


class _CannotFoldError(Exception):
    """External adapters cannot be folded. The message says why."""


class _CannotWidenError(_CannotFoldError):
    """The MLP of a block cannot get another width."""


@dataclass
class _Block:
    """A block of a known architecture with its plain MLP, and the external adapters that are folded into it."""

    name: str
    module: nn.Module
    mlp: PlainMLP
    leaf: str
    container: str
    externals: list[ExternalAdapter]

    def part(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)

    @property
    def fc1(self) -> nn.Linear:
        return cast(nn.Linear, self.part(self.mlp.fc1))

    @property
    def fc2(self) -> nn.Linear:
        return cast(nn.Linear, self.part(self.mlp.fc2))

    @property
    def place(self) -> nn.Module:
        return self.part(self.leaf)

    @property
    def factor(self) -> Tensor | None:
        return None if self.mlp.factor is None else self.module.get_parameter(self.mlp.factor)

    @property
    def channels(self) -> int:
        return self.fc1.in_features

    @property
    def units(self) -> int:
        """The hidden units that the MLP needs: its own, and those of the adapters."""
        return self.fc1.out_features + sum(adapter.width for adapter in self.externals)

    def units_with(self, value: float) -> int:
        """The hidden units that the config field gives with a value, computed as the models do."""
        return int(value * self.channels) if self.mlp.is_ratio else int(value)


@dataclass
class _Group:
    """The blocks that get their width from one config. With an obstacle none of them can be made wider."""

    blocks: list[_Block] = field(default_factory=list)
    obstacle: str = ""


def fold_externals(model: nn.Module, widen: Widen = "auto") -> dict[str, str]:
    """Fold the external adapters of a merged model into its MLPs, where that is exact, and change its config.

    The config of the model is replaced by a changed copy, since another model may use the same object.

    Args:
        model: A model that `merge_and_unload` has made, in place.
        widen: Whether the MLPs may get hidden units of zeros. With "auto" they may add up to a tenth to the parameters
            of the MLPs. With False nothing is folded.

    Returns:
        For each leaf whose external adapters are kept as modules, the reason.
    """
    kept = dict.fromkeys(
        merged_leaves(model),
        "only adapters without filters (external_conv=0) at the place mlp_parallel of a known block are a wider MLP",
    )
    if not kept:
        return {}
    if widen is False:
        return dict.fromkeys(kept, "widen=False")
    for group in _groups(model, kept):
        folded = [block for block in group.blocks if block.externals]
        if not folded:
            continue
        try:
            if group.obstacle:
                raise _CannotFoldError(f"another block with the same config cannot be widened ({group.obstacle})")
            _fold(model, group.blocks, widen)
        except _CannotFoldError as why:
            kept |= {block.name + block.leaf: str(why) for block in folded}
        else:
            for block in folded:
                del kept[block.name + block.leaf]
    return kept


def _groups(model: nn.Module, kept: dict[str, str]) -> list[_Group]:
    """The blocks of a model by their configs. Reasons why the adapters of single blocks are kept go into `kept`."""
    groups: dict[int, _Group] = {}
    shared = shared_parameters(model)
    for prefix, module, known in known_modules(model):
        leaf = known.places.get("mlp_parallel")
        if leaf is None or known.mlp_input is None:
            continue
        group = None
        try:
            if known.mlp is None:
                why = f" ({known.note})" if known.note else ""
                raise _CannotFoldError(f"no config makes the MLP of {type(module).__name__} wider{why}")
            block = _Block(prefix, module, known.mlp, leaf, known.mlp_input, [])
            group = groups.setdefault(id(_owner(model, block).config), _Group())
            group.blocks.append(block)
            block.externals = _foldable_externals(block, shared)
        except _CannotFoldError as why:
            if prefix + leaf in kept:
                kept[prefix + leaf] = str(why)
            if group is not None and isinstance(why, _CannotWidenError):
                group.obstacle = f"{prefix}{known.mlp_input}: {why}"
    return list(groups.values())


def warn_of_kept(model: nn.Module, kept: dict[str, str]) -> None:
    """Warn once about the external adapters that a merged model keeps as modules."""
    if not kept:
        return
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, why in kept.items():
        by_reason[why].append(name)
    reasons = "; ".join(f"{_some(names)}: {why}" for why, names in by_reason.items())
    cls = type(model).__name__
    warnings.warn(
        f"external adapters on {len(kept)} modules are not folded into the weights of {cls}: they stay in it as "
        f"modules. It computes the same as before, but its config does not describe them, so loading its weights into "
        f"a new {cls} would lose them, and save_pretrained refuses. Save the adapter itself, with save_pretrained of "
        f"the PeftModel before merging. Reasons: {reasons}.",
        ExternalsKeptWarning,
        stacklevel=3,
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Whether it is possible


def _around(model: nn.Module, prefix: str) -> list[tuple[str, PreTrainedModel]]:
    """The models of transformers around a block, with the prefixes of their names, from the outermost one."""
    path = prefix.rstrip(".").split(".")
    names = [".".join(path[:depth]) for depth in range(len(path))]
    around = ((f"{name}." if name else "", model.get_submodule(name)) for name in names)
    return [(name, module) for name, module in around if isinstance(module, PreTrainedModel)]


def _owner(model: nn.Module, block: _Block) -> PreTrainedModel:
    """The innermost model around a block whose config has the field."""
    for _, module in reversed(_around(model, block.name)):
        if hasattr(module.config, block.mlp.field):
            return module
    raise _CannotFoldError(f"no model of transformers around it has a config with {block.mlp.field}")


def _check_mlp(block: _Block, shared: dict[int, list[str]]) -> None:
    """Check that the MLP of a block can be made wider.

    Raises:
        _CannotWidenError: If it cannot.
    """
    mlp, container = block.mlp, block.part(block.container)
    around = mlp.fc2.rpartition(".")[0]  # the container, or a second one behind it
    parts = {
        f"{name}.{child}": module
        for name in (block.container, around)
        for child, module in block.part(name).named_children()
    }
    wanted = {mlp.fc1, mlp.activation, mlp.fc2}
    if not wanted <= parts.keys() or not all(_is_inert(parts[name]) for name in parts.keys() - wanted):
        raise _CannotWidenError(f"{type(container).__name__} is not a plain MLP of two linear layers (such as SwiGLU)")
    if type(block.fc1) is not nn.Linear or type(block.fc2) is not nn.Linear:
        raise _CannotWidenError(f"{mlp.fc1} and {mlp.fc2} are not both nn.Linear (such as a quantized one)")
    parameters = [*block.fc1.parameters(), block.fc2.weight]
    factor = [] if block.factor is None else [block.factor]
    if any(type(p) is not nn.Parameter or p.is_meta for p in parameters + factor):
        raise _CannotWidenError("its weights are not plain tensors (quantized, sharded or offloaded)")
    if any(is_hooked(module) for module in (block.fc1, block.fc2, block.place)):
        raise _CannotWidenError("its weights are offloaded")
    if any(id(p) in shared for p in parameters):
        raise _CannotWidenError("its weights are shared with another module")
    if hook_of(block.fc1) is not None:
        raise _CannotWidenError(f"an external adapter sits on {mlp.fc1}, whose output would be wider")


def _is_inert(module: nn.Module) -> bool:
    """Whether a module of an MLP does nothing in inference."""
    is_empty = isinstance(module, nn.ModuleList) and len(module) == 0
    return is_empty or isinstance(module, nn.Dropout | nn.Identity)


def _foldable_externals(block: _Block, shared: dict[int, list[str]]) -> list[ExternalAdapter]:
    """The external adapters at the place of a block.

    Raises:
        _CannotWidenError: If its MLP cannot be made wider, even without adapters.
        _CannotFoldError: If one of the adapters cannot be folded.
    """
    try:
        _check_mlp(block, shared)
    except AttributeError as error:  # the block was rebuilt, and lacks a part
        raise _CannotWidenError(str(error)) from error
    found = merged_externals(block.place)
    if not any(external.kind == PARALLEL for external in found):
        return []
    inside = [block.place, *(block.part(name) for name in (block.mlp.activation, block.mlp.fc2))]
    if any(external.kind != PARALLEL for leaf in inside for external in merged_externals(leaf)):
        raise _CannotFoldError("another external adapter reads the output of the MLP or of the block")
    adapters = [external.adapter for external in found]
    for adapter in adapters:
        if adapter.conv is not None:
            raise _CannotFoldError(f"its hidden units have filters (external_conv={adapter.kernel_size})")
        _check_activation(block, adapter)
        if block.fc1.bias is None and bool(adapter.down.bias.any()):
            raise _CannotFoldError("the MLP has no bias")
        if not all(bool(torch.isfinite(new).all()) for new in (*_rows(block, adapter), _columns(block, adapter))):
            raise _CannotFoldError(f"its values in the MLP's weights are not finite in {block.fc2.weight.dtype}")
    return adapters


@torch.no_grad()
def _check_activation(block: _Block, adapter: ExternalAdapter) -> None:
    """Check that the adapter and the MLP have the same function. Names do not tell: there are several GELUs."""
    activation = block.part(block.mlp.activation)
    x = torch.linspace(-10, 10, 2001, device=adapter.down.weight.device)
    expected = ACTIVATIONS[adapter.activation].forward(x)
    try:
        is_same = torch.allclose(activation(x), expected, rtol=1e-5, atol=1e-6)
    except Exception:  # not an elementwise function
        is_same = False
    if not is_same:
        raise _CannotFoldError(
            f"external_activation={adapter.activation!r} is not the activation of the MLP ({activation})"
        )


# The wider MLP


def _precise(tensor: Tensor) -> Tensor:
    """A tensor in at least float32: half precision is left for the results."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(block: _Block, adapter: ExternalAdapter) -> tuple[Tensor, Tensor]:
    """An adapter's rows of `fc1`, and its part of the bias."""
    return adapter.down.weight.detach().to(block.fc1.weight), adapter.down.bias.detach().to(block.fc1.weight)


def _columns(block: _Block, adapter: ExternalAdapter) -> Tensor:
    """An adapter's columns of `fc2`.

    Raises:
        _CannotFoldError: If a factor of LayerScale is zero where the adapter adds something.
    """
    up = _precise(adapter.up.weight) * adapter.scale
    if block.factor is not None:
        factor = _precise(block.factor).to(up.device)[:, None]
        removed = factor == 0
        if bool((removed & (up != 0)).any()):
            raise _CannotFoldError(f"a factor in {block.mlp.factor} is 0 at a channel that the adapter changes")
        up = up / torch.where(removed, torch.ones_like(factor), factor)
    return up.to(block.fc2.weight)


@torch.no_grad()
def _widened(block: _Block, units: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """`fc1.weight`, `fc1.bias` and `fc2.weight` of the MLP with the adapters and with `units` hidden units."""
    fc1, fc2 = block.fc1, block.fc2
    rows = [_rows(block, adapter) for adapter in block.externals]
    zeros = units - block.units
    weight = torch.cat([fc1.weight, *(w for w, _ in rows), fc1.weight.new_zeros(zeros, block.channels)])
    bias = None
    if fc1.bias is not None:
        bias = torch.cat([fc1.bias, *(b.to(fc1.bias) for _, b in rows), fc1.bias.new_zeros(zeros)])
    columns = [_columns(block, adapter) for adapter in block.externals]
    return weight, bias, torch.cat([fc2.weight, *columns, fc2.weight.new_zeros(fc2.out_features, zeros)], dim=1)


@torch.no_grad()
def _check_outputs(block: _Block, units: int) -> None:
    """Check on a few tokens that the wider MLP computes what the MLP and its adapters compute.

    The MLP of another class with the same names may have another forward.

    Raises:
        _CannotFoldError: If it does not.
    """
    if not block.externals:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, block.channels, generator=generator).to(block.fc1.weight)
    try:
        before = _run(block, x, block.fc1.weight, block.fc1.bias, block.fc2.weight)
        after = _run(block, x, *_widened(block, units))
    except Exception as error:
        raise _CannotFoldError(f"{type(block.part(block.container)).__name__} cannot be run alone: {error}") from error
    expected = _precise(before)
    for adapter in block.externals:
        hidden = F.linear(_precise(x), _precise(adapter.down.weight), _precise(adapter.down.bias))
        hidden = ACTIVATIONS[adapter.activation].forward(hidden) * adapter.scale
        expected = expected + F.linear(hidden, _precise(adapter.up.weight))
    tolerance = math.sqrt(torch.finfo(after.dtype).eps) * float(expected.abs().max())
    if not float((_precise(after) - expected).abs().max()) <= tolerance:
        raise _CannotFoldError(f"a wider {type(block.part(block.container)).__name__} computes something else")


def _run(block: _Block, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
    """The output of the block's MLP with other weights in inference, up to its place. No hooks run."""
    new = {id(block.fc1): _linear(weight, bias), id(block.fc2): _linear(columns, block.fc2.bias)}
    container = copy.copy(block.part(block.container))
    container._modules = {
        name: nn.Identity() if isinstance(module, nn.Dropout) else new.pop(id(module), module)
        for name, module in container._modules.items()
    }
    container.training = False
    y: Tensor = container.forward(x)
    for behind in new.values():  # `fc2`, if it is in another module
        y = behind(y)
    return y if block.factor is None else cast(Tensor, block.place.forward(y))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _widen(block: _Block, units: int) -> None:
    weight, bias, columns = _widened(block, units)
    for module, name, new in (
        (block.fc1, "weight", weight),
        (block.fc1, "bias", bias),
        (block.fc2, "weight", columns),
    ):
        if new is not None:
            setattr(module, name, nn.Parameter(new, requires_grad=getattr(module, name).requires_grad))
    block.fc1.out_features = block.fc2.in_features = units
    container = block.part(block.container)
    if block.mlp.field in vars(container):  # some MLPs keep the config's value
        setattr(container, block.mlp.field, units)


# The config


class _Configs:
    """Changed copies of all configs in a model that belong to the config of a group of blocks."""

    def __init__(self, root: PreTrainedModel, owner: PreTrainedModel, field: str, value: float) -> None:
        self.copies: dict[int, Any] = {}
        self.root: PreTrainedConfig = copy.deepcopy(root.config, self.copies)
        changed = [copy.deepcopy(owner.config, self.copies)]
        if not any(config is changed[0] for config in _nested(self.root)):
            # Some models copy the config of their backbone. Saving the model saves the original one.
            same = [c for c in _nested(self.root) if type(c) is type(owner.config) and _equal(c, owner.config)]
            if len(same) != 1:
                raise _CannotFoldError(f"the config of {type(root).__name__} does not have that of its backbone")
            changed += same
        for config in changed:
            setattr(config, field, value)

    def saved(self) -> PreTrainedConfig:
        """The config as it is after saving and loading."""
        fields = json.loads(self.root.to_json_string(use_diff=False))
        return type(self.root)(**fields)

    def put_into(self, model: nn.Module) -> None:
        for module in model.modules():
            for name, value in vars(module).items():
                if isinstance(value, PreTrainedConfig):
                    setattr(module, name, copy.deepcopy(value, self.copies))


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _nested(value)


def _equal(a: PreTrainedConfig, b: PreTrainedConfig) -> bool:
    return bool(a.to_dict() == b.to_dict())


def _values(blocks: Iterable[_Block]) -> list[float]:
    """The values of the config field that give every block the hidden units it needs; the smallest one first."""
    blocks = list(blocks)
    if not blocks[0].mlp.is_ratio:
        return [max(block.units for block in blocks)]
    ratio = max(block.units / block.channels for block in blocks)
    while any(block.units_with(ratio) < block.units for block in blocks):
        ratio = math.nextafter(ratio, math.inf)  # the product was rounded down
    whole = math.ceil(ratio)
    return [whole] if whole == ratio else [ratio, whole]


def _fold(model: nn.Module, blocks: list[_Block], widen: Widen) -> None:
    """Fold the adapters of blocks that have the same config.

    Raises:
        _CannotFoldError: If it is not possible, or needs more hidden units of zeros than `widen` allows. Then nothing
            is changed.
    """
    owner = _owner(model, blocks[0])
    prefix, root = _around(model, blocks[0].name)[0]
    name = blocks[0].mlp.field
    for value in _values(blocks):
        try:
            configs = _Configs(root, owner, name, value)
            saved = configs.saved()
            break
        except StrictDataclassError:  # some classes take whole numbers only
            continue
        except _CannotFoldError:
            raise
        except Exception as error:  # a class of a user can fail in any way
            raise _CannotFoldError(
                f"the config of {type(root).__name__} cannot be saved and loaded: {error}"
            ) from error
    else:
        raise _CannotFoldError(f"{type(owner.config).__name__} takes no {name}={value}")
    units = {id(block): block.units_with(value) for block in blocks}
    _check_cost(blocks, units, widen, f"{name}={value:g} in {type(owner.config).__name__}")
    _check_shapes(root, owner, saved, {block.name.removeprefix(prefix): (block, units[id(block)]) for block in blocks})
    for block in blocks:
        _check_outputs(block, units[id(block)])
    configs.put_into(model)
    for block in blocks:
        _widen(block, units[id(block)])
    remove_externals(model, [block.place for block in blocks if block.externals])


def _check_cost(blocks: list[_Block], units: dict[int, int], widen: Widen, setting: str) -> None:
    present = sum(block.fc1.out_features * (2 * block.channels + 1) for block in blocks)
    zeros = sum((units[id(block)] - block.units) * (2 * block.channels + 1) for block in blocks)
    if widen == "auto" and zeros > LITTLE * present:
        raise _CannotFoldError(
            f"they are a wider MLP, but with {setting}, the smallest value that fits all blocks, zeros would add "
            f"{zeros:,} parameters, {zeros / present:.0%} of the MLPs' parameters and FLOPs; "
            f"merge_and_unload(widen=True) does it, and save_pretrained works then"
        )


def _check_shapes(
    root: PreTrainedModel, owner: PreTrainedModel, config: PreTrainedConfig, blocks: dict[str, tuple[_Block, int]]
) -> None:
    """Check that a model built from a config has the wider MLPs, and otherwise the shapes of the present model.

    Raises:
        _CannotFoldError: If it does not.
    """
    try:
        with torch.device("meta"):
            built = {name: p.shape for name, p in type(root)(config).named_parameters()}
    except Exception as error:  # a class of a user can fail in any way
        raise _CannotFoldError(f"{type(root).__name__} cannot be built from its config: {error}") from error
    wide: dict[str, torch.Size] = {}
    for name, (block, units) in blocks.items():
        wide[f"{name}{block.mlp.fc1}.weight"] = torch.Size([units, block.channels])
        wide[f"{name}{block.mlp.fc1}.bias"] = torch.Size([units])
        wide[f"{name}{block.mlp.fc2}.weight"] = torch.Size([block.fc2.out_features, units])
    own = {id(p) for p in owner.parameters()} - {
        id(p)
        for leaf in merged_leaves(owner).values()
        for external in merged_externals(leaf)
        for p in external.adapter.parameters()
    }
    for name, p in root.named_parameters():
        if id(p) in own and built.get(name) != wide.get(name, p.shape):
            raise _CannotFoldError(f"{type(root).__name__} built from the wider config has another {name}")

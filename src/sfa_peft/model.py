"""SFAModel: what is adapted and how wide, its injection, and how it enters and leaves a state dict."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from . import backbones
from .budget import absolute_budget, external_cost, widths_within
from .checkpoint import CheckpointError, check_state_dict
from .checkpoint.validation import POSITIONS
from .config import SFAConfig
from .external import ExternalAdapter
from .layer import SFALayer, channels_of, internal_parameters, layer_class
from .ticket.criteria import DATA_FREE_CRITERIA
from .ticket.selection import Positions, choose


@dataclass(frozen=True)
class External:
    """An external adapter to be made: by `place` on `module`, read from `mlp_input` if it is parallel."""

    place: str
    module: str
    mlp_input: str | None
    channels: int
    channel_dim: int
    width: int = 0

    @property
    def cost(self) -> int:
        return external_cost(self.channels, self.width)


@dataclass
class Plan:
    """Everything an injection does, decided and checked before the model is touched."""

    externals: dict[str, list[External]] = field(default_factory=dict)
    positions: Positions = field(default_factory=dict)

    @property
    def modules(self) -> set[str]:
        return self.externals.keys() | self.positions.keys()


class SFAModel(BaseTuner):
    """A base model with Selective Feature Adapters (Deng et al., arXiv 2310.01843).

    Args:
        model: The model to be adapted, in place.
        peft_config: A `SFAConfig`, or a dict from adapter name to one.
        adapter_name: The adapter's name, "default" unless given.

    Raises:
        ValueError: If the config does not fit the model. The model is as it was then.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from sfa_peft import SFAConfig
        >>> model = get_peft_model(base, SFAConfig(budget=0.02, modules_to_save=["decode_head"]))
        ```
    """

    prefix = "sfa_"
    tuner_layer_cls = SFALayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # A copy, since injection fills in sizes, and the user may use the config object for another model.
        config = copy.deepcopy(self.peft_config[adapter_name])
        plan = _Planner(model, config).plan()
        config.external_widths = _external_widths(plan)
        config.ticket_sizes = _ticket_sizes(plan.positions)
        self.peft_config[adapter_name] = config
        self._plan = plan
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            remove_adapter(model, adapter_name)
            raise
        finally:
            del self._plan

    def _prepare_adapter_config(self, peft_config: SFAConfig, model_config: dict[str, Any]) -> SFAConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: SFAConfig, key: str) -> bool:  # type: ignore[override]
        if hasattr(self, "_plan"):
            return key in self._plan.modules
        names = {place_module for modules in (peft_config.external_widths or {}).values() for place_module in modules}
        return key in names | {name.rpartition(".")[0] for name in peft_config.ticket_sizes or {}}

    def _create_and_replace(
        self,
        peft_config: SFAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, SFALayer):
            layer = layer_class(target)(target, adapter_name)
            layer.set_adapter(self.active_adapters)
        positions = self._plan.positions.get(current_key)
        if positions is not None:
            layer.add_internal(
                adapter_name, positions, peft_config.internal_granularity, init_weights=peft_config.init_weights
            )
        for external in self._plan.externals.get(current_key, ()):
            adapter = ExternalAdapter(
                external.channels,
                external.width,
                activation=peft_config.external_activation,
                dropout=peft_config.external_dropout,
                scale=peft_config.external_scale,
                channel_dim=external.channel_dim,
                init_weights=peft_config.init_weights,
            )
            container = None if external.mlp_input is None else self.model.get_submodule(external.mlp_input)
            layer.add_external(adapter_name, adapter, container)
        layer.finish_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
            if target.training is False:
                layer.eval()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies `weight` from the replaced module as well, which a head without one does not have.
        setattr(parent, child_name, new_module)

    def unload(self) -> nn.Module:
        """Give back the base model, its original heads included (PEFT's own `unload` leaves the trained heads in)."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        return super().unload()

    def candidates(self, adapter_name: str) -> dict[str, dict[str, nn.Parameter]]:
        """What an adapter's ticket may choose from: for each module, its parameters by name, in model order."""
        return _Planner(self.model, self.peft_config[adapter_name]).candidates()

    def ticket_size(self, adapter_name: str) -> int:
        """How many parameters an adapter's ticket may hold: what its external adapters leave of the budget."""
        config = self.peft_config[adapter_name]
        planner = _Planner(self.model, config)
        candidates = planner.candidates()
        if not candidates:
            return 0
        if not config.uses_budget:
            return planner.density_size(candidates)
        externals = [e for own in planner.recorded_externals().values() for e in own]
        return planner.budget() - sum(e.cost for e in externals)

    def install_ticket(self, adapter_name: str, positions: Positions) -> None:
        """Give an adapter another ticket, with values of zero; the old ticket's values are dropped.

        Args:
            adapter_name: The adapter.
            positions: For each module and parameter, the sorted positions in the config's granularity.
        """
        config = self.peft_config[adapter_name]
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        own = [p for _, layer in sfa_layers(self.model) for p in layer.parameters_of(adapter_name)]
        upcast = all(p.dtype == torch.float32 for p in own)
        trainable = any(p.requires_grad for p in own)
        positions = _without_empty(positions)
        for _, layer in sfa_layers(self.model):
            if adapter_name in layer.sfa_internal:
                del layer.sfa_internal[adapter_name]
        self._plan = Plan(positions=positions)
        try:
            for name in positions:
                parent, _, child = name.rpartition(".")
                self._create_and_replace(
                    config, adapter_name, self.model.get_submodule(name), child, self.model.get_submodule(parent), name
                )
        finally:
            del self._plan
        unwrap_empty_layers(self.model)
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=upcast)
        config.ticket_sizes = _ticket_sizes(positions)
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)
        for _, layer in sfa_layers(self.model):
            if adapter_name in layer.sfa_internal:
                layer.sfa_internal[adapter_name].requires_grad_(trainable)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"(\.sfa_(?:internal|external|parallel))\.{re.escape(adapter_name)}\.", r"\1.", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SFAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected, limits = {}, {}
        for name, layer in sfa_layers(model):
            for key, tensor in layer.state_dict(prefix=f"{name}.").items():
                if cls._remove_adapter_name_from_key(key, adapter_name) != key:
                    expected[key] = tensor
            if adapter_name in layer.sfa_internal:
                delta = layer.sfa_internal[adapter_name]
                for p in delta.changed:
                    parameter = getattr(layer.get_base_layer(), p)
                    units = parameter.shape[0] if delta.granularity == "row" else parameter.numel()
                    limits[f"{name}.sfa_internal.{adapter_name}.{p}{POSITIONS}"] = units
        found = {k: v for k, v in remapped.items() if re.search(r"\.sfa_(internal|external|parallel)\.", k)}
        check_state_dict(found, expected, limits)
        for key, tensor in remapped.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{key!r} holds values that are not finite; the checkpoint is damaged.")
        return remapped


def sfa_layers(model: nn.Module) -> list[tuple[str, SFALayer]]:
    """All SFA layers of a model with their names, in model order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SFALayer)]


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of every SFA layer, and the layers that have none left out of the model."""
    for _, layer in sfa_layers(model):
        layer.delete_adapter(adapter_name)
    unwrap_empty_layers(model)


def unwrap_empty_layers(model: nn.Module) -> None:
    for name, layer in sfa_layers(model):
        if not layer.adapter_names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)


def _external_widths(plan: Plan) -> dict[str, dict[str, int]]:
    widths: dict[str, dict[str, int]] = {}
    for externals in plan.externals.values():
        for external in externals:
            widths.setdefault(external.place, {})[external.module] = external.width
    return widths


def _ticket_sizes(positions: Positions) -> dict[str, int]:
    return {f"{module}.{name}": len(p) for module, own in positions.items() for name, p in own.items() if len(p)}


class _Planner:
    """Decides what an injection does. Reads the model, changes nothing."""

    def __init__(self, model: nn.Module, config: SFAConfig) -> None:
        self.model, self.config = model, config
        # Leaves inside an SFA layer belong to it; other tuners' layers are not adapted.
        self.leaves = {
            name: module
            for name, module in _modules_outside_adapters(model)
            if isinstance(module, BaseTunerLayer) or next(module.children(), None) is None
        }

    def plan(self) -> Plan:
        if self.config.ticket_sizes is not None:
            return self._recorded_plan()
        places, candidates = self._places(), self.candidates()
        if not places and not candidates:
            raise ValueError(
                "SFAConfig leaves nothing to adapt: neither external adapters nor internal targets. Give "
                "`external_modules` or `target_modules`."
            )
        if self.config.uses_budget:
            externals, size = self._sizes_from_budget(places, candidates)
        else:
            externals, size = self._explicit_sizes(places, candidates)
        positions = self._initial_ticket(candidates, size)
        if not externals and not any(len(p) for own in positions.values() for p in own.values()):
            raise ValueError(
                "SFAConfig makes an adapter without any parameter: every width and the density are 0. Raise "
                "`external_width`, `internal_density` or `budget`."
            )
        plan = Plan(positions=_without_empty(positions))
        for external in externals:
            plan.externals.setdefault(external.module, []).append(external)
        return plan

    # Where

    def _places(self) -> list[External]:
        config = self.config
        if self._share == 0 or (not config.uses_budget and not config.external_width):
            return []
        if config.external_modules is not None:
            names = self._match("external_modules")
            for name in names:
                if name not in self.leaves:
                    raise ValueError(
                        f"SFAConfig.external_modules matches {name!r}, a {type(self.model.get_submodule(name)).__name__} "
                        f"with submodules; name the leaf that makes its output (such as its last nn.Linear)."
                    )
            return [self._external("module", name, None) for name in names]
        if not config.external_places:
            return []
        if not backbones.has_known_blocks(self.model):
            if config.target_modules is None:
                return []  # candidates tells the user what to name
            raise ValueError(
                f"{type(self.model).__name__} has no block of a known architecture ({', '.join(backbones.KNOWN)}), so "
                f"the places of external adapters are not known: give `external_modules`, or `[]` for none."
            )
        found = [
            self._external(place.place, place.module, place.mlp_input)
            for place in backbones.known_places(self.model)
            if place.place in config.external_places and self._is_allowed(place.module)
        ]
        if not found:
            raise ValueError(
                f"SFAConfig.external_places={config.external_places!r} leaves no place: `exclude_modules`, "
                f"`modules_to_save` or `layers_to_transform` take all away. Set `external_places=()` if that is meant."
            )
        return found

    def _external(self, place: str, name: str, mlp_input: str | None) -> External:
        module = self.leaves.get(name)
        channels = None if module is None else channels_of(module)
        if channels is None:
            kind = type(self.model.get_submodule(name)).__name__
            raise ValueError(
                f"an external adapter cannot sit on {name!r}, a {kind}: its channel width cannot be told. Name an "
                f"nn.Linear, nn.Conv2d or nn.LayerNorm in `external_modules`."
            )
        self._refuse_foreign(name, "external_modules")
        return External(place, name, mlp_input, *channels)

    def candidates(self) -> dict[str, dict[str, nn.Parameter]]:
        config = self.config
        if config.internal_density == 0 or (not config.uses_budget and config.internal_density is None):
            return {}
        if self._share == 1:
            return {}
        if config.target_modules is None:
            names = [n for n in backbones.known_targets(self.model) if self._is_allowed(n)]
            if not names:
                raise ValueError(
                    f"{type(self.model).__name__} has no block of a known architecture ({', '.join(backbones.KNOWN)})"
                    f" outside `modules_to_save` and `exclude_modules`: give `target_modules`, and `external_modules` "
                    f"for external adapters (`[]` for none of a kind)."
                )
        else:
            names = self._match("target_modules")
        candidates = {}
        for name in names:
            module = self.leaves.get(name)
            self._refuse_foreign(name, "target_modules")
            adaptable = module is not None and (
                module.takes_internal if isinstance(module, SFALayer) else layer_class(module).takes_internal
            )
            parameters = internal_parameters(module) if adaptable and module is not None else {}
            if not parameters:
                kind = type(self.model.get_submodule(name)).__name__
                raise ValueError(
                    f"SFAConfig.target_modules matches {name!r}, a {kind}: internal adapters work on nn.Linear, "
                    f"nn.Conv2d and nn.LayerNorm with parameters, and on subclasses that keep their forward."
                )
            candidates[name] = parameters
        return candidates

    @property
    def _share(self) -> float | None:
        """`external_share` where it decides; 0 or 1 where one kind is switched off."""
        config = self.config
        if not config.uses_budget:
            return None
        no_external = config.external_modules == set() or (
            config.external_modules is None and not config.external_places
        )
        if no_external:
            return 0.0
        return 1.0 if config.target_modules == set() else config.external_share

    def _refuse_foreign(self, name: str, field_name: str) -> None:
        module = self.leaves.get(name)
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SFALayer):
            raise ValueError(
                f"SFAConfig.{field_name} reaches {name!r}, which another PEFT method has adapted already "
                f"({type(module).__name__}); name other modules."
            )
        parent = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"SFAConfig.{field_name} reaches {name!r}: nn.MultiheadAttention uses its parameters without calling "
                f"that module, so an adapter on it would do nothing. Name a module behind the attention."
            )

    def _match(self, field_name: str) -> list[str]:
        patterns = getattr(self.config, field_name)
        if patterns == set():
            return []
        every = [name for name, _ in _modules_outside_adapters(self.model) if name]
        if patterns == "all-linear":
            matched = [n for n in every if isinstance(_unwrapped(self.leaves.get(n)), nn.Linear)]
        else:
            matched = [n for n in every if _matches(n, patterns)]
        allowed = [n for n in matched if self._is_allowed(n)]
        if not allowed:
            shown = sorted(patterns) if isinstance(patterns, set) else patterns
            why = (
                f"matches {matched[0]!r}{' and others' if len(matched) > 1 else ''}, but `modules_to_save`, "
                f"`exclude_modules` or `layers_to_transform` take all of them away"
                if matched
                else f"matches no module of {type(self.model).__name__}"
            )
            raise ValueError(f"SFAConfig.{field_name}={shown!r} {why}. Check the names, or use [] for none.")
        return allowed

    def _is_allowed(self, name: str) -> bool:
        """Whether PEFT's own rules for excluded modules, heads and layer indices leave `name` to the adapter."""
        config = self.config
        question = SimpleNamespace(
            target_modules=[name.rpartition(".")[2]] if "." in name else [name],
            exclude_modules=config.exclude_modules,
            modules_to_save=config.modules_to_save,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
        )
        return bool(check_target_module_exists(question, name))

    # How much

    def _sizes_from_budget(
        self, places: list[External], candidates: dict[str, dict[str, nn.Parameter]]
    ) -> tuple[list[External], int]:
        config = self.config
        budget = self.budget()
        externals: list[External] = []
        if places:
            share = self._share if candidates else 1.0
            assert share is not None
            widths = widths_within([p.channels for p in places], int(share * budget))
            externals = [_with_width(p, w) for p, w in zip(places, widths, strict=True) if w]
        size = budget - sum(e.cost for e in externals) if candidates else 0
        total = sum(p.numel() for own in candidates.values() for p in own.values())
        if size > total:
            raise ValueError(
                f"SFAConfig.budget={config.budget!r} leaves {size:,} parameters for the ticket, but the targets have "
                f"only {total:,}; lower the budget, raise `external_share` or name more `target_modules`."
            )
        return externals, size

    def _explicit_sizes(
        self, places: list[External], candidates: dict[str, dict[str, nn.Parameter]]
    ) -> tuple[list[External], int]:
        width = self.config.external_width
        rules = width if isinstance(width, dict) else {".*": width or 0}
        used: set[str] = set()

        def width_of(place: External) -> int:
            for pattern, rule in rules.items():
                if re.match(rf"(.*\.)?({pattern})$", place.module):
                    used.add(pattern)
                    return rule if isinstance(rule, int) else max(round(rule * place.channels), 1) if rule else 0
            return 0

        externals = [_with_width(p, w) for p in places if (w := width_of(p))]
        unused = [pattern for pattern in rules if pattern not in used]
        if places and unused:
            raise ValueError(
                f"SFAConfig.external_width: the pattern {unused[0]!r} matches no place of an external adapter; the "
                f"first place is {places[0].module!r}."
            )
        return externals, self.density_size(candidates)

    def budget(self) -> int:
        assert self.config.budget is not None
        return absolute_budget(self.config.budget, backbone_parameters(self.model, self.config))

    def density_size(self, candidates: dict[str, dict[str, nn.Parameter]]) -> int:
        total = sum(p.numel() for own in candidates.values() for p in own.values())
        return int((self.config.internal_density or 0) * total)

    # Which

    def _initial_ticket(self, candidates: dict[str, dict[str, nn.Parameter]], size: int) -> Positions:
        return choose(candidates, self._score, self.config.internal_granularity, size) if candidates else {}

    def _score(self, name: str, parameter: Tensor) -> Tensor:
        return DATA_FREE_CRITERIA[self.config.initial_ticket](name, parameter, self.config.ticket_seed)

    def _recorded_plan(self) -> Plan:
        """The plan of a config that an earlier injection filled in: its sizes, with the data-free ticket in them."""
        config = self.config
        assert config.ticket_sizes is not None
        plan = Plan(externals=self.recorded_externals())
        rows = config.internal_granularity == "row"
        for full_name, size in config.ticket_sizes.items():
            module, _, name = full_name.rpartition(".")
            self._require(module)
            self._refuse_foreign(module, "ticket_sizes")
            leaf = self.leaves[module]
            takes = leaf.takes_internal if isinstance(leaf, SFALayer) else layer_class(leaf).takes_internal
            parameters = internal_parameters(leaf) if takes else {}
            if name not in parameters:
                raise CheckpointError(_OTHER_ARCHITECTURE.format(name=full_name, model=type(self.model).__name__))
            parameter = parameters[name]
            units = parameter.shape[0] if rows else parameter.numel()
            if size > units:
                raise CheckpointError(
                    f"the adapter's ticket has {size:,} units in {full_name!r}, which has only {units:,} in this "
                    f"model; load it into the model it was trained on."
                )
            plan.positions.setdefault(module, {})[name] = self._recorded_positions(module, name, parameter, size, rows)
        return plan

    def recorded_externals(self) -> dict[str, list[External]]:
        externals: dict[str, list[External]] = {}
        known = {(p.place, p.module): p.mlp_input for p in backbones.known_places(self.model)}
        for place, modules in (self.config.external_widths or {}).items():
            for name, width in modules.items():
                self._require(name)
                if place == "mlp_parallel" and (place, name) not in known:
                    raise CheckpointError(_OTHER_ARCHITECTURE.format(name=name, model=type(self.model).__name__))
                external = self._external(place, name, known.get((place, name)))
                externals.setdefault(name, []).append(_with_width(external, width))
        return externals

    def _recorded_positions(self, module: str, name: str, parameter: Tensor, size: int, rows: bool) -> Tensor:
        if parameter.is_meta:
            return torch.arange(size, dtype=torch.int32)  # a placeholder; the loaded positions replace it
        amount = size * (parameter[0].numel() if rows else 1)
        chosen = choose({module: {name: parameter}}, self._score, self.config.internal_granularity, amount)
        return chosen[module][name]

    def _require(self, name: str) -> None:
        if name not in self.leaves:
            raise CheckpointError(_OTHER_ARCHITECTURE.format(name=name, model=type(self.model).__name__))


_OTHER_ARCHITECTURE = (
    "the adapter was saved for another architecture: it adapts {name!r}, which this {model} does not have in that form. "
    "Load it into the model it was trained on."
)


def _with_width(place: External, width: int) -> External:
    return External(place.place, place.module, place.mlp_input, place.channels, place.channel_dim, width)


def _without_empty(positions: Positions) -> Positions:
    kept = {m: {n: p for n, p in own.items() if len(p)} for m, own in positions.items()}
    return {m: own for m, own in kept.items() if own}


def _unwrapped(module: nn.Module | None) -> nn.Module | None:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _matches(name: str, patterns: set[str] | str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def _modules_outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The base model's modules by their own names: tuner layers stand for what they wrap, their insides are left out."""
    found: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        found.append((name, module))
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            inside.append(f"{name}.")
    return found


def backbone_parameters(model: nn.Module, config: SFAConfig) -> int:
    """Parameters of the base model outside the heads (`modules_to_save`), adapters not counted, tied ones once."""
    heads = config.modules_to_save or []

    def in_head(name: str) -> bool:
        return any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in heads)

    counted: dict[int, int] = {}
    adapters = {
        id(p)
        for _, layer in sfa_layers(model)
        for d in layer.adapter_layer_names
        for p in getattr(layer, d).parameters()
    }
    for name, p in model.named_parameters():
        if not in_head(name) and id(p) not in adapters:
            counted[id(p)] = p.numel()
    return sum(counted.values())

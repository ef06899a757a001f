"""The plan of an injection: what a config means for a model, decided and checked before the model is changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace

import torch
from peft import NoMatchingPeftModuleError, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..checkpoint.names import INTERNAL, MODULE, MODULE_PARALLEL, PREFIX
from ..checkpoint.reader import LOAD, adapter_in_load
from ..config import DEFAULT_CONV, PATTERN_FIELDS, SFAConfig
from ..layers.adapted import SFALayer
from ..layers.kinds import internal_parameters
from ..layers.leaves import base_layer_of, channels_of, modules_outside
from ..layers.merged import hook_of
from ..layers.quantized import dequantized, is_quantized
from ..recorded import RecordedConfig
from ..ticket.criteria import CRITERIA, Evidence
from ..ticket.selection import Positions, choose, count_elements
from .architectures import check_known, has_known_blocks, known_grids, known_modules, known_places, known_targets
from .base import backbone_parameters, head_modules, in_heads, in_module, shared_parameters
from .budget import External, absolute_budget, widths_within
from .suggestions import suggestion

# The heads that PEFT adds to `modules_to_save` for a task, even if the model does not have them.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}

COMPILED = "_orig_mod"  # torch.compile adds it to the names of the modules that it wraps


@dataclass
class Plan:
    """The external adapters and the positions of an injection, by module."""

    externals: dict[str, list[External]] = field(default_factory=dict)
    positions: Positions = field(default_factory=dict)

    @classmethod
    def of(cls, positions: Positions, externals: Iterable[External]) -> Plan:
        """A plan without empty parameters and without external adapters of width 0."""
        plan = cls(positions=without_empty(positions))
        for external in externals:
            if external.width:
                plan.externals.setdefault(external.module, []).append(external)
        return plan

    @property
    def modules(self) -> set[str]:
        return self.externals.keys() | self.positions.keys()

    @property
    def all_externals(self) -> list[External]:
        return [external for externals in self.externals.values() for external in externals]

    @property
    def external_cost(self) -> int:
        """The number of parameters of the external adapters."""
        return sum(external.cost for external in self.all_externals)

    @property
    def external_widths(self) -> dict[str, dict[str, int]]:
        widths: dict[str, dict[str, int]] = {}
        for external in self.all_externals:
            widths.setdefault(external.place, {})[external.module] = external.width
        return widths


def ticket_sizes(positions: Positions) -> dict[str, int]:
    """The number of units in the ticket, for each parameter that has any."""
    return {f"{module}.{name}": len(p) for module, named in positions.items() for name, p in named.items() if len(p)}


def without_empty(positions: Positions) -> Positions:
    kept = {m: {n: p for n, p in named.items() if len(p)} for m, named in positions.items()}
    return {m: named for m, named in kept.items() if named}


def is_in_layers(config: SFAConfig, name: str) -> bool:
    """Whether a module is in a layer of `layers_to_transform`, by PEFT's rules."""
    layers, patterns = config.layers_to_transform, config.layers_pattern
    if layers is None:
        return True
    question = SimpleNamespace(
        target_modules=[name.rpartition(".")[2]],
        layers_to_transform=layers if isinstance(layers, int) else set(layers),
        # They are names, but PEFT takes them as regular expressions.
        layers_pattern=[re.escape(p) for p in ([patterns] if isinstance(patterns, str) else patterns or ())],
    )
    return bool(check_target_module_exists(question, name))


class Planner:
    """Plans an injection. Reads the model, and does not change it."""

    def __init__(self, model: nn.Module, config: SFAConfig) -> None:
        self.model, self.config = model, config
        self.heads = head_modules(model, config)
        # A tuner layer counts as one leaf. Layers of other tuners are refused later, with a message that names them.
        modules = modules_outside(model)
        self.names = {name for name, _ in modules}
        self.leaves = {
            name: module
            for name, module in modules
            if isinstance(module, BaseTunerLayer) or next(module.children(), None) is None
        }

    def plan(self) -> Plan:
        """The plan for the model and the config.

        Raises:
            ValueError: If the config does not fit the model.
            CheckpointError: If the config is that of a saved adapter, and does not fit the model.
        """
        self._refuse_compiled()
        self._check_heads()
        if isinstance(self.config, RecordedConfig):
            return self._recorded_plan(self.config)
        if self.config.target_modules is None or self.config.external_modules is None:
            check_known(self.model)
        places, candidates = self.places(), self.candidates()
        if not places and not candidates:
            raise ValueError(
                "SFAConfig leaves nothing to adapt: there are no places for external adapters and no targets for "
                "internal ones. Give `external_modules` or `target_modules`."
            )
        if self.config.uses_budget:
            if candidates and self._lacks_places and self.config.external_places != ():
                warnings.warn(
                    f"{type(self.model).__name__} has no block of a known architecture, so this adapter is internal "
                    f"only. Name modules in SFAConfig.external_modules to get external adapters, or use [] for none."
                    f"{suggestion(self.model)}",
                    stacklevel=2,
                )
            externals, size = self._sizes_from_budget(places, candidates)
        else:
            externals, size = self._explicit_sizes(places, candidates)
        excluded = self.config.exclude_modules
        if excluded and not self._matched(_patterns(excluded)):
            warnings.warn(
                f"SFAConfig.exclude_modules={excluded!r} matches no module of {type(self.model).__name__}.",
                stacklevel=2,
            )
        self._warn_of_shared(candidates)
        self._warn_of_tied_heads()
        positions = self._initial_ticket(candidates, size)
        if not externals and not any(len(p) for named in positions.values() for p in named.values()):
            raise ValueError(
                "SFAConfig gives an adapter without parameters: every width and the density are 0, or too small for "
                "one unit of `internal_granularity`. Raise `external_width`, `internal_density` or `budget`."
            )
        return Plan.of(positions, externals)

    def _refuse_compiled(self) -> None:
        compiled = next((name for name in self.leaves if COMPILED in name.split(".")), None)
        if compiled is not None:
            raise ValueError(
                f"{type(self.model).__name__} is compiled. This renames its modules ({compiled!r}), so an adapter "
                f"would fit compiled models only. Compile last: torch.compile(get_peft_model(model, config)), or use "
                f"model.compile(), which renames nothing."
            )

    def _warn_of_shared(self, candidates: Iterable[str]) -> None:
        names = shared_parameters(self.model)
        for module in candidates:
            for p in self.leaves[module].parameters():
                if id(p) in names:
                    shared = " and ".join(map(repr, names[id(p)]))
                    warnings.warn(
                        f"{module!r} shares its parameter with another module: its names are {shared}. The internal "
                        f"adapter acts only in {module!r}, and cannot be merged.",
                        stacklevel=2,
                    )

    def _warn_of_tied_heads(self) -> None:
        names = shared_parameters(self.model)
        for head in self.heads:
            parameters = {f"{head}.{name}": name for name, p in self.model.get_submodule(head).named_parameters()}
            elsewhere = {
                other.removesuffix(f".{parameters[name]}")
                for name in parameters
                for other in names.get(id(self.model.get_parameter(name)), ())
                if not in_heads(other, [head])
            }
            if elsewhere:
                others = " and ".join(map(repr, sorted(elsewhere)))
                warnings.warn(
                    f"SFAConfig.modules_to_save names {head!r}, which is tied to {others}. The head is trained as a "
                    f"copy, so {others} keeps its weights, and the two are no longer tied. Leave the head out, or, if "
                    f"this is intended, untie the model first.",
                    stacklevel=2,
                )

    def _check_heads(self) -> None:
        of_task = TASK_HEADS.get(self.config.task_type or "", ())
        for head in self.config.modules_to_save or ():
            if head not in of_task and not any(name.endswith(head) for name in self.heads):
                raise ValueError(
                    f"SFAConfig.modules_to_save: {head!r} matches no module of {type(self.model).__name__}; its "
                    f"children are {[name for name, _ in self.model.named_children()]}."
                )
        for name in self.heads:
            module = self.model.get_submodule(name)
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                raise ValueError(
                    f"SFAConfig.modules_to_save names {name!r}, a {type(module).__name__}. The model calls its items, "
                    f"not the container: name the items, such as {f'{name}.{next(iter(module._modules), 0)}'!r}."
                )

    # Where

    def places(self) -> list[External]:
        """The possible external adapters in model order, with width 0.

        Raises:
            ValueError: If the config names no usable place.
        """
        config = self.config
        if self._share == 0 or (not config.uses_budget and not config.external_width):
            return []
        if config.external_modules is not None:
            names = self._match("external_modules")
            for name in names:
                if name not in self.leaves:
                    raise ValueError(
                        f"SFAConfig.external_modules matches {name!r}, a "
                        f"{type(self.model.get_submodule(name)).__name__} with submodules; name the leaf that "
                        f"computes its output (such as its last nn.Linear)."
                    )
            inputs = {name: self._input_of(name) for name in names}
            return [self._external(MODULE_PARALLEL if of else MODULE, name, of) for name, of in inputs.items()]
        if config.external_places == ():
            return []
        if not has_known_blocks(self.model):
            if config.target_modules is None or self._share is not None:
                return []  # the error of `candidates` says what to name
            raise ValueError(
                f"{type(self.model).__name__} has no block of a known architecture, so the places of external "
                f"adapters are not known: give `external_modules`, or `[]` for none.{suggestion(self.model)}"
            )
        known = known_places(self.model)
        asked = [place for place in known if place.place in self.external_places]
        if not asked:
            blocks = sorted({known.name for _, _, known in known_modules(self.model) if known.places})
            raise ValueError(
                f"SFAConfig.external_places={self.external_places!r}: the blocks of {type(self.model).__name__} "
                f"({', '.join(blocks)}) have only the places {sorted({place.place for place in known})}."
            )
        found = [self._external(*place) for place in asked if self._is_allowed(place.module)]
        if not found:
            raise ValueError(
                f"SFAConfig.external_places={self.external_places!r} leaves no place: `exclude_modules`, "
                f"`modules_to_save` or `layers_to_transform` exclude all of them. Change these fields, or set "
                f"`external_places=()` for no external adapters."
            )
        return found

    def _external(self, place: str, name: str, reads: str | None) -> External:
        module = self.leaves.get(name)
        self._refuse_merged(name)
        channels = None if module is None else channels_of(module)
        if channels is None:
            kind = type(self.model.get_submodule(name)).__name__
            raise ValueError(
                f"an external adapter cannot be added to {name!r}, a {kind}: its channel width is not known. Name an "
                f"nn.Linear, nn.Conv2d or nn.LayerNorm in `external_modules`."
            )
        self._refuse_foreign(name, "external_modules")
        size, channel_dim = channels
        grid = self._grid(place, name, channel_dim) if self.conv else None
        return External(place, name, reads, size, channel_dim, conv=self.conv, grid=grid)

    def _grid(self, place: str, name: str, channel_dim: int) -> tuple[str, str | None] | None:
        """Where the filters of an external adapter get the grid of the tokens from.

        Raises:
            ValueError: If the architecture does not tell. A CheckpointError for a saved adapter.
        """
        if place in (MODULE, MODULE_PARALLEL) or channel_dim != -1:
            return None  # maps, or an error when the model runs
        if (place, name) not in self._grids:
            error = CheckpointError if isinstance(self.config, RecordedConfig) else ValueError
            raise error(
                f"SFAConfig.external_conv={self.conv}: the grid of the tokens at the place {place!r} "
                f"of {name!r} is not known{' (attention is in windows)' if place == 'attention' else ''}. Use "
                f"external_conv=0, other `external_places`, or an Architecture with `grid` for "
                f"register_architecture."
            )
        return self._grids[place, name]

    @cached_property
    def conv(self) -> int:
        """The height and width of the filters of external adapters; 0 without filters."""
        config = self.config
        if config.external_conv is not None:
            return config.external_conv
        if config.external_modules is not None or config.external_placement == "auto":
            return 0
        return DEFAULT_CONV if self._know_grids(self.external_places) else 0

    @cached_property
    def external_places(self) -> tuple[str, ...]:
        """The places of external adapters: those of the config, or the default for this model."""
        config = self.config
        if config.external_places is not None:
            return tuple(config.external_places)
        has_filters = config.external_conv != 0 and config.external_placement != "auto"
        return ("block",) if has_filters and self._know_grids(("block",)) else ("mlp_parallel",)

    def _know_grids(self, places: Collection[str]) -> bool:
        """Whether the blocks that may be adapted have these places, with the grid of their tokens."""
        leaves: dict[str, set[str]] = {}
        for place in known_places(self.model):
            if self._is_allowed(place.module):
                leaves.setdefault(place.place, set()).add(place.module)
        asked = {(place, leaf) for place in places for leaf in leaves.get(place, ())}
        lacks = places == ("block",) and leaves.get("block") != leaves.get("mlp_parallel")
        return bool(asked) and not lacks and all(place in self._grids for place in asked)

    @cached_property
    def _grids(self) -> dict[tuple[str, str], tuple[str, str | None] | None]:
        return known_grids(self.model)

    def candidates(self) -> dict[str, dict[str, nn.Parameter]]:
        """For each module, the parameters that the ticket may choose from.

        Raises:
            ValueError: If the config names no usable module.
        """
        config = self.config
        if config.internal_density == 0 or (not config.uses_budget and config.internal_density is None):
            return {}
        if self._share == 1:
            return {}
        if config.target_modules is None:
            # Some libraries have norms with a forward of their own, such as timm. They are left out.
            known = known_targets(self.model)
            known = [n for n in known if n not in self.leaves or internal_parameters(self.leaves[n])]
            names = [n for n in (*known, *self._head_leaves()) if self._is_allowed(n)]
            if not names:
                is_known = bool(known_targets(self.model))
                where = " outside `modules_to_save` and `exclude_modules`" if is_known else ""
                raise ValueError(
                    f"{type(self.model).__name__} has no block of a known architecture{where}: give `target_modules` "
                    f"for internal adapters and `external_modules` for external ones (`[]` for none)."
                    f"{'' if is_known else suggestion(self.model)}"
                )
        else:
            names = self._match("target_modules")
        candidates = {}
        for name in names:
            self._refuse_merged(name)
            self._refuse_foreign(name, "target_modules" if config.target_modules is not None else "target_heads")
            parameters = internal_parameters(self.leaves.get(name))
            if not parameters:
                kind = type(self.model.get_submodule(name)).__name__
                raise ValueError(
                    f"SFAConfig.target_modules matches {name!r}, a {kind}: internal adapters work on nn.Linear, "
                    f"nn.Conv2d and nn.LayerNorm with parameters, and on subclasses that keep their forward."
                )
            fitting = {n: p for n, p in parameters.items() if config.granularity.count(p.shape)}
            if fitting:
                candidates[name] = fitting
        if names and not candidates:
            raise ValueError(
                f"SFAConfig.internal_granularity={config.internal_granularity!r} finds no unit in the weights of "
                f"{names[:3]}{'...' if len(names) > 3 else ''}: parameters with one dimension have no columns. "
                f"Use `element` or `row`."
            )
        return candidates

    def _head_leaves(self) -> list[str]:
        """The leaves in `target_heads` that a ticket may choose from, in model order."""
        leaves = []
        if not self.config.target_heads:
            return []
        for head in self.config.target_heads:
            found = [n for n, m in self.leaves.items() if internal_parameters(m) and in_module(n, [head])]
            if not any(self._is_allowed(n) for n in found):
                raise ValueError(
                    f"SFAConfig.target_heads: {type(self.model).__name__} has no nn.Linear, nn.Conv2d or nn.LayerNorm "
                    f"in a module {head!r} outside `modules_to_save`. Check the name."
                )
            leaves += found
        added = set(leaves) - set(known_targets(self.model))
        return [name for name in self.leaves if name in added]

    @property
    def _share(self) -> float | None:
        """`external_share`; 0 or 1 if one kind of adapter is switched off; None without a budget."""
        config = self.config
        if not config.uses_budget:
            return None
        no_external = config.external_modules == set() or (
            config.external_modules is None and config.external_places == ()
        )
        if no_external or (config.target_modules and self._lacks_places):
            return 0.0
        if config.target_modules == set():
            return 1.0
        return float(config.external_share)

    @property
    def _lacks_places(self) -> bool:
        """Whether the places should come from the architecture, but the architecture is not known."""
        return self.config.external_modules is None and not has_known_blocks(self.model)

    def _refuse_foreign(self, name: str, field_name: str) -> None:
        module = self.leaves.get(name)
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SFALayer):
            raise ValueError(
                f"SFAConfig.{field_name} includes {name!r}, which another PEFT method has already adapted "
                f"({type(module).__name__}); name other modules."
            )
        parent = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"SFAConfig.{field_name} includes {name!r}: nn.MultiheadAttention uses its parameters without calling "
                f"that module, so an adapter on it would do nothing. Name a module after the attention."
            )

    def _refuse_merged(self, name: str) -> None:
        if hook_of(self.model.get_submodule(name)) is not None:
            raise ValueError(
                f"{name!r} has external adapters of an earlier merge_and_unload; adapt the original base model "
                f"instead, where several adapters can be active together."
            )

    def _input_of(self, output: str) -> str | None:
        """The module whose input the external adapter on a module reads, or None if it reads that module's output.

        Its name is looked up beside the output, and then in the modules around it, from the inside to the outside.
        """
        given = self.config.external_modules
        if not isinstance(given, dict):
            return None
        ending = max((name for name in given if _matches(output, {name})), key=len)
        name = given[ending]
        if name is None:
            return None
        around = output.split(".")[:-1]
        names = (".".join([*around[:depth], name]) for depth in range(len(around), -1, -1))
        found = next((full for full in names if full in self.names), None)
        if found is None or found == output:
            why = "is that module itself" if found else "is not beside it or around it"
            raise ValueError(
                f"SFAConfig.external_modules={{{ending!r}: {name!r}}} is not valid for {output!r}: {name!r} {why}. "
                f"Name a module that gets its input before {output!r} runs, such as the MLP around it, or None: then "
                f"the adapter reads the output of {output!r}."
            )
        return found

    def _match(self, field_name: str) -> list[str]:
        patterns = getattr(self.config, field_name)
        if isinstance(patterns, dict):
            unused = [name for name in patterns if not self._matched({name})]
            if unused:
                raise NoMatchingPeftModuleError(
                    f"SFAConfig.{field_name}: {unused[0]!r} matches no module of {type(self.model).__name__}. Use the "
                    f"names of modules or their endings, or [] for none."
                )
            patterns = set(patterns)
        if patterns == set():
            return []
        matched = self._matched(patterns)
        allowed = [n for n in matched if self._is_allowed(n)]
        if not allowed:
            shown = sorted(patterns) if isinstance(patterns, set) else patterns
            why = (
                f"matches {matched[0]!r}{' and others' if len(matched) > 1 else ''}, but `modules_to_save`, "
                f"`exclude_modules` or `layers_to_transform` exclude all of them"
                if matched
                else f"matches no module of {type(self.model).__name__}"
            )
            raise NoMatchingPeftModuleError(
                f"SFAConfig.{field_name}={shown!r} {why}. Check the names, or use [] for none."
            )
        return allowed

    def _matched(self, patterns: set[str] | str) -> list[str]:
        if patterns == "all-linear":
            return [name for name, leaf in self.leaves.items() if isinstance(base_layer_of(leaf), nn.Linear)]
        return [name for name, _ in modules_outside(self.model) if name and _matches(name, patterns)]

    def exact(self) -> dict[str, set[str] | dict[str, str | None]]:
        """The fields that are regular expressions or `all-linear`, each as the names of the leaves that it matches.

        Of `external_modules` as a dict, the full names of the leaves and of the modules whose input is read.

        In a saved config there are only names: an adapter loads into the model that it was made for, and an expression
        from a file can be made to run for hours.
        """
        given = {name: getattr(self.config, name) for name in PATTERN_FIELDS}
        found: dict[str, set[str] | dict[str, str | None]] = {
            name: set(self._matched(value)) & self.leaves.keys()
            for name, value in given.items()
            if value and isinstance(value, str)
        }
        external = self.config.external_modules
        if isinstance(external, dict) and not isinstance(self.config, RecordedConfig):
            leaves = [name for name in self._match("external_modules") if name in self.leaves]
            found["external_modules"] = {name: self._input_of(name) for name in leaves}
        return found

    def _is_allowed(self, name: str) -> bool:
        excluded = self.config.exclude_modules
        if in_heads(name, self.heads) or (excluded and _matches(name, _patterns(excluded))):
            return False
        return is_in_layers(self.config, name)

    # How much

    def _sizes_from_budget(
        self, places: list[External], candidates: dict[str, dict[str, nn.Parameter]]
    ) -> tuple[list[External], int]:
        config = self.config
        budget = self.budget()
        externals: list[External] = []
        if places:
            allowance = self.external_allowance() if candidates else budget
            widths = widths_within([p.channels for p in places], allowance, self.conv)
            externals = [replace(p, width=w) for p, w in zip(places, widths, strict=True) if w]
        size = budget - sum(e.cost for e in externals) if candidates else 0
        total = count_elements(candidates)
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

        externals = [replace(p, width=w) for p in places if (w := width_of(p))]
        unused = [pattern for pattern in rules if pattern not in used]
        if places and unused:
            raise ValueError(
                f"SFAConfig.external_width: the pattern {unused[0]!r} matches no place of an external adapter; the "
                f"first place is {places[0].module!r}."
            )
        return externals, self.density_size(candidates)

    def external_allowance(self) -> int:
        """The largest number of parameters of the external adapters."""
        assert self._share is not None
        return int(self._share * self.budget())

    def budget(self) -> int:
        """The budget as a number of parameters."""
        assert self.config.budget is not None
        return absolute_budget(self.config.budget, self._backbone_parameters)

    @cached_property
    def _backbone_parameters(self) -> int:
        return backbone_parameters(self.model, self.config)

    def density_size(self, candidates: dict[str, dict[str, nn.Parameter]]) -> int:
        """The size of the ticket from `internal_density`, in elements."""
        return int((self.config.internal_density or 0) * count_elements(candidates))

    # Which

    def _initial_ticket(self, candidates: dict[str, dict[str, nn.Parameter]], size: int) -> Positions:
        if not candidates:
            return {}
        if any(self._is_without_values(module) for module in candidates):
            warnings.warn(
                f"{type(self.model).__name__} has no values yet (meta device), so the ticket is random, and only its "
                f"sizes are as configured: load the base model's weights before get_peft_model, or load an adapter "
                f"afterwards.",
                stacklevel=2,
            )
        return choose(candidates, self._score, self.config.granularity, size)

    def _is_without_values(self, module: str) -> bool:
        return any(p.is_meta for p in self.leaves[module].parameters())

    def _score(self, name: str, parameter: Tensor) -> Tensor:
        module, _, parameter_name = name.rpartition(".")
        base = base_layer_of(self.leaves[module])
        if parameter_name == "weight" and is_quantized(base):
            parameter = dequantized(base)
        criterion = "random" if parameter.is_meta else self.config.initial_ticket
        return CRITERIA[criterion].score(Evidence(name, parameter, seed=self.config.ticket_seed))

    def _recorded_plan(self, config: RecordedConfig) -> Plan:
        """The plan for a config with recorded sizes. The positions are those of a data-free ticket of these sizes."""
        read = adapter_in_load()
        shapes = read.shapes if read else {}
        saved = read.tensors if read else {}
        plan = Plan(externals=self.recorded_externals(config))
        parameters: dict[str, dict[str, nn.Parameter]] = {}
        for full_name, size in config.ticket_sizes.items():
            module, _, name = full_name.rpartition(".")
            if module not in parameters:
                self._require(module)
                self._refuse_foreign(module, "ticket_sizes")
                parameters[module] = internal_parameters(self.leaves[module])
            if name not in parameters[module]:
                raise CheckpointError(_OTHER_ARCHITECTURE.format(name=full_name, model=type(self.model).__name__))
            parameter = parameters[module][name]
            sealed = shapes.get(full_name)
            if sealed is not None and sealed != tuple(parameter.shape):
                raise CheckpointError(
                    f"{full_name!r} has shape {tuple(parameter.shape)} in this model, and had {sealed} in the model "
                    f"that the adapter was trained on; load the adapter into that model."
                )
            values = saved.get(f"{PREFIX}{module}{INTERNAL}{name}")
            expected = config.granularity.values_shape(parameter.shape, size)
            if values is not None and tuple(values.shape) != expected:
                raise CheckpointError(
                    f"the values of {full_name!r} have shape {tuple(values.shape)} in the adapter, and {expected} in "
                    f"this model; load the adapter into the model that it was trained on."
                )
            units = config.granularity.count(parameter.shape)
            if size > units:
                raise CheckpointError(
                    f"the adapter's ticket has {size:,} units in {full_name!r}, which has only {units:,} in this "
                    f"model; load the adapter into the model that it was trained on."
                )
            plan.positions.setdefault(module, {})[name] = self._recorded_positions(module, name, parameter, size)
        return plan

    def recorded_externals(self, config: RecordedConfig) -> dict[str, list[External]]:
        externals: dict[str, list[External]] = {}
        read = adapter_in_load()
        saved = read.tensors if read else {}
        known = {(p.place, p.module): p.reads for p in known_places(self.model)}
        for place, modules in config.external_widths.items():
            for name, width in modules.items():
                self._require(name)
                if place in ("mlp_parallel", "block") and (place, name) not in known:
                    raise CheckpointError(
                        _OTHER_ARCHITECTURE.format(name=name, model=type(self.model).__name__)
                        + " If its blocks were made known by register_architecture, call that before loading."
                    )
                reads = self._recorded_input(name) if place == MODULE_PARALLEL else known.get((place, name))
                external = self._external(place, name, reads)
                up = saved.get(f"{PREFIX}{name}.{external.kind}.up.weight")
                if up is not None and len(up) != external.channels:
                    raise CheckpointError(
                        f"the external adapter on {name!r} has {len(up)} channels in the adapter, and "
                        f"{external.channels} in this model; load it into the model that it was trained on."
                    )
                externals.setdefault(name, []).append(replace(external, width=width))
        return externals

    def _recorded_input(self, name: str) -> str:
        given = self.config.external_modules
        found = given.get(name) if isinstance(given, dict) else None
        if found is None or found not in self.names or found == name:
            raise CheckpointError(
                f"the external adapter on {name!r} reads the input of {found!r}, which this "
                f"{type(self.model).__name__} does not have; load the adapter into the model that it was trained on."
            )
        return found

    def _recorded_positions(self, module: str, name: str, parameter: Tensor, size: int) -> Tensor:
        is_elsewhere = parameter.is_meta and not is_quantized(base_layer_of(self.leaves[module]))
        if is_elsewhere or LOAD.get():
            return torch.arange(size, dtype=torch.int32)  # placeholders, which the loaded positions replace
        granularity = self.config.granularity
        amount = size * granularity.size(parameter.shape)
        chosen = choose({module: {name: parameter}}, self._score, granularity, amount)
        return chosen[module][name]

    def _require(self, name: str) -> None:
        if name not in self.leaves:
            raise CheckpointError(
                _OTHER_ARCHITECTURE.format(name=name, model=type(self.model).__name__)
                + (f" Or rename: key_mapping={{'{COMPILED}.': ''}}." if COMPILED in name.split(".") else "")
            )


_OTHER_ARCHITECTURE = (
    "the adapter was saved for another architecture: it adapts {name!r}, which this {model} does not have in that "
    "form. Load it into the model that it was trained on."
)


def _patterns(given: Collection[str]) -> set[str] | str:
    return given if isinstance(given, str | set) else set(given)


def _matches(name: str, patterns: set[str] | str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    parts = name.split(".")
    return any(".".join(parts[i:]) in patterns for i in range(len(parts)))

"""SFAModel: injects a plan, installs tickets and external adapters, merges and unloads."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..checkpoint.reader import LOAD
from ..checkpoint.validation import check_positions
from ..config import SFAConfig
from ..layers.adapted import SFALayer, sfa_layers
from ..layers.bottleneck import ExternalAdapter
from ..layers.heads import wrap_heads
from ..layers.kinds import QuantizedLinear
from ..layers.mixed import BASE
from ..layers.statistics import keep_statistics, release_statistics
from ..planning.base import check_base, shared_parameters
from ..planning.budget import External
from ..planning.plan import TASK_HEADS, Plan, Planner, peft_verdict, ticket_sizes
from ..ticket.selection import Positions
from .checks import check_config
from .combining import check_combinable, combined, fill
from .layout import layout_in, lengths
from .mixing import mixing
from .optimizers import holds_any
from .state import decoded, encoded, unpacked, without_adapter_name
from .structure import discard_adapter, unwrap_empty_layers, wrap_leaf


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

    peft_config: dict[str, SFAConfig]  # type: ignore[assignment]  # PEFT says what is common to all methods
    prefix = "sfa_"
    tuner_layer_cls = SFALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (as PEFT declares it)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        load = LOAD.get()
        if load is not None:
            load.before_injection()
        super().__init__(*args, **kwargs)
        self.card_notes: dict[str, Any] = {}  # by adapter, what is kept for its model card

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, plan: Plan | None = None, **kwargs: Any
    ) -> None:
        """Inject an adapter as `BaseTuner.inject_adapter` does, by its config, or by a plan that was made already."""
        with self._unmerged():
            self._inject(model, adapter_name, plan, *args, **kwargs)

    def _inject(self, model: nn.Module, adapter_name: str, plan: Plan | None, *args: Any, **kwargs: Any) -> None:
        # A copy, since injection fills in sizes, and the user may use the config object for another model. One that
        # is loaded is of this adapter, and PEFT hands out the object that it was given.
        config = self.peft_config[adapter_name]
        if config.task_type in TASK_HEADS:  # some of PEFT's classes for tasks name their heads too late
            own = config.modules_to_save or ()
            config.modules_to_save = list(dict.fromkeys((*own, *TASK_HEADS[config.task_type])))
        config = config if LOAD.get() else copy.deepcopy(config)
        planner = Planner(model, config)
        plan = planner.plan() if plan is None else plan
        check_base(model, adapter_name, config, plan.modules)
        config.external_widths = plan.external_widths
        config.ticket_sizes = ticket_sizes(plan.positions)
        config.weights_digest = None
        self.peft_config[adapter_name] = config
        self._plan = plan
        try:
            # PEFT would wrap every module whose name ends as a head's does.
            heads, config.modules_to_save = config.modules_to_save, None
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            finally:
                config.modules_to_save = heads
            is_active = adapter_name in self.active_adapters
            wrap_heads(model, planner.heads, adapter_name, is_active, config.inference_mode)
            keep_statistics(model)
        except BaseException:
            discard_adapter(model, adapter_name)
            raise
        finally:
            del self._plan

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # SFA adapts no embeddings, and some detectors (Deformable DETR, Grounding DINO) raise when PEFT asks for them.
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:
            return []

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    # PEFT's is static, and cannot know the plan.
    def _check_target_module_exists(self, peft_config: SFAConfig, key: str) -> Any:  # type: ignore[override]
        if hasattr(self, "_plan"):
            adapted = self._plan.modules
        else:
            widths = peft_config.external_widths or {}
            adapted = {name for modules in widths.values() for name in modules}
            adapted |= {name.rpartition(".")[0] for name in peft_config.ticket_sizes or {}}
        # What is not adapted is False, or PEFT's false-like mark of an excluded module.
        return True if key in adapted else peft_verdict(peft_config, key) and False

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = (
            target
            if isinstance(target, SFALayer)
            else wrap_leaf(self.model, current_key, adapter_name, self.active_adapters)
        )
        config = self.peft_config[adapter_name]
        positions = self._plan.positions.get(current_key)
        if positions is not None:
            layer.add_internal(adapter_name, positions, config.granularity, init_weights=config.init_weights)
        for external in self._plan.externals.get(current_key, ()):
            adapter = ExternalAdapter(
                external.channels,
                external.width,
                activation=config.external_activation,
                dropout=config.external_dropout,
                scale=config.external_scale,
                channel_dim=external.channel_dim,
                init_weights=config.init_weights,
            )
            container = None if external.mlp_input is None else self.model.get_submodule(external.mlp_input)
            layer.add_external(adapter_name, adapter, container)
        layer.train(layer.training)
        layer.finish_adapter(adapter_name, inference_mode=config.inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies `weight` from the replaced module as well, which a head without one does not have.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, what stays active, or else the first adapter left, is active.

        PEFT asks the first layer which adapters are left, but SFA's adapters need not be on the same layers.
        """
        active = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        self.card_notes.pop(adapter_name, None)
        unwrap_empty_layers(self.model)
        names = active or list(self.peft_config)[:1]
        # Setting the adapters that are active already would unmerge them.
        if names and any(
            own != names
            for own in (self.active_adapters, *(layer.active_adapters for _, layer in sfa_layers(self.model)))
        ):
            self.set_adapter(names[0] if len(names) == 1 else names)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Let each sample of the next forward pass have its own adapter, ``__base__`` for none."""
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - self.peft_config.keys() - {BASE}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        with mixing(self.model, adapter_names, (*args, *kwargs.values())):
            yield

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is a weighted sum of others: ``sum_i weights_i * adapter_i``, exactly.

        The tickets are united, and the values of a position that several have are summed. External adapters stand side
        by side: its width is the sum of theirs. The new adapter is not active, and frozen.

        Args:
            adapters: The adapters; one head of each name at most among them, which the new adapter takes over.
            weights: The weight of each.
            adapter_name: The new adapter. If there is one of that name, nothing is done, as in PEFT.
            combination_type: ``linear``, the only one.

        Raises:
            ValueError: If the adapters cannot be combined.
        """
        if adapter_name in self.peft_config:
            return
        if combination_type != "linear":
            raise ValueError(f"Invalid combination_type: {combination_type}; SFA has 'linear'.")
        check_combinable(self.model, self.peft_config, adapters, weights)
        config, plan = combined(self.model, self.peft_config, adapters)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name, plan=plan)
            fill(self.model, adapters, weights, adapter_name)
        except BaseException:
            discard_adapter(self.model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            raise
        for p in self.parameters_of(adapter_name):
            p.requires_grad_(False)

    def _check_merge_allowed(self) -> None:
        """Refuse what would change another module as well, or cannot be changed.

        Raises:
            ValueError: If a parameter that an internal adapter changes is shared with another module, or quantized.
        """
        super()._check_merge_allowed()
        shared = self.shared_parameters()
        for name, layer in sfa_layers(self.model):
            if isinstance(layer, QuantizedLinear) and layer.sfa_internal:
                raise ValueError(
                    f"internal adapters on {name!r} cannot be merged: its weight is quantized, and would round them "
                    f"away. Load the adapter into the base model as it was before, and merge it there."
                )
            for parameter in {p for delta in layer.sfa_internal.values() for p in delta.changed}:
                names = shared.get(id(getattr(layer.get_base_layer(), parameter)))
                if names:
                    raise ValueError(
                        f"internal adapters on {name!r} cannot be merged: its `{parameter}` is shared "
                        f"({', '.join(names)}), and would change there as well. Go on with the adapter unmerged."
                    )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold internal adapters into the base, as `BaseTuner.merge_adapter` does; all of them, or none.

        Raises:
            ValueError: If a parameter is shared with another module, or with `safe_merge` would not be finite; nothing
                is changed then.
        """
        merged = [(layer, len(layer.merged_adapters)) for _, layer in sfa_layers(self.model)]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer, count in merged:
                if len(layer.merged_adapters) > count:
                    layer.unmerge(keep=count)
            raise

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's says None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:  # before the first layer is unloaded
            self.merge_adapter(adapter_names, safe_merge)
        model = cast(nn.Module, super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names))
        release_statistics(model)
        return model

    def unload(self) -> nn.Module:
        """Give back the base model, its original heads included (PEFT's own `unload` leaves the trained heads in)."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                self.model.set_submodule(name, module.original_module)
        return super().unload()

    def candidates(self, adapter_name: str) -> dict[str, dict[str, nn.Parameter]]:
        """What an adapter's ticket may choose from: for each module, its parameters by name, in model order."""
        return Planner(self.model, self.peft_config[adapter_name]).candidates()

    def shared_parameters(self) -> dict[int, list[str]]:
        """By their `id`, the names of the parameters that have several."""
        return shared_parameters(self.model)

    def places(self, adapter_name: str) -> list[External]:
        """Where an adapter may have external adapters, in model order, whatever their widths are."""
        return Planner(self.model, self.peft_config[adapter_name]).places()

    def positions(self, adapter_name: str) -> Positions:
        """An adapter's ticket: for each module and parameter that it changes, the sorted positions."""
        return {
            name: {p: delta.positions(p) for p in delta.changed}
            for name, layer in sfa_layers(self.model)
            if adapter_name in layer.sfa_internal
            for delta in (layer.sfa_internal[adapter_name],)
        }

    def budget(self, adapter_name: str) -> int:
        """How many parameters an adapter may train."""
        return Planner(self.model, self.peft_config[adapter_name]).budget()

    def external_allowance(self, adapter_name: str) -> int:
        """How many parameters of the budget an adapter's external adapters may take."""
        return Planner(self.model, self.peft_config[adapter_name]).external_allowance()

    def ticket_size(self, adapter_name: str) -> int:
        """How many parameters an adapter's ticket may hold: what its external adapters leave of the budget."""
        config = self.peft_config[adapter_name]
        planner = Planner(self.model, config)
        if not config.uses_budget and config.internal_granularity == "element":
            return sum((config.ticket_sizes or {}).values())
        # Larger units seldom fill their part of the budget: another ticket may come closer to it.
        candidates = planner.candidates()
        if not candidates:
            return 0
        if not config.uses_budget:
            return planner.density_size(candidates)
        externals = [e for own in planner.recorded_externals().values() for e in own]
        return planner.budget() - sum(e.cost for e in externals)

    def install(
        self,
        adapter_name: str,
        positions: Positions | None = None,
        externals: Sequence[External] | None = None,
    ) -> None:
        """Give an adapter another ticket, other external adapters, or both, all without effect at first.

        What they replace is dropped, with its values.

        Args:
            adapter_name: The adapter.
            positions: For each module and parameter, the sorted positions in the config's granularity. None keeps the
                ticket.
            externals: The external adapters; those of width 0 are left out. None keeps what is there.
        """
        config = self.peft_config[adapter_name]
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        own = self.parameters_of(adapter_name)
        upcast = all(p.dtype == torch.float32 for p in own)
        trainable = any(p.requires_grad for p in own)
        plan = Plan.of(positions or {}, externals or ())
        for _, layer in sfa_layers(self.model):
            if positions is not None:
                layer.remove_internal(adapter_name)
            if externals is not None:
                layer.remove_externals(adapter_name)
        self._plan = plan
        try:
            for name in sorted(plan.modules):
                parent, _, child = name.rpartition(".")
                self._create_and_replace(
                    config, adapter_name, self.model.get_submodule(name), child, self.model.get_submodule(parent), name
                )
        finally:
            del self._plan
        unwrap_empty_layers(self.model)
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=upcast)
        if positions is not None:
            config.ticket_sizes = ticket_sizes(plan.positions)
        if externals is not None:
            config.external_widths = plan.external_widths
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)
        kept = {id(p) for p, _ in flags}
        for _, layer in sfa_layers(self.model):
            for p in layer.parameters_of(adapter_name):
                if id(p) not in kept:
                    p.requires_grad_(trainable)

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """All trainable parameters of an adapter outside its heads."""
        return [p for _, layer in sfa_layers(self.model) for p in layer.parameters_of(adapter_name)]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A whole state, as Accelerate saves it, may have been saved after another search than this process has run.
        for adapter_name in self.peft_config:
            self._take_layout(adapter_name, state_dict, f"{prefix}model.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check_config(self, adapter_name: str) -> None:
        """Check that an adapter's config is valid, and says what the adapter is: fields can be set at any time.

        Raises:
            ValueError: If it does not. Names the field.
        """
        check_config(self.model, adapter_name, self.peft_config[adapter_name], self.positions(adapter_name))

    def _take_layout(self, adapter_name: str, state: dict[str, Tensor], prefix: str) -> None:
        """Take over the ticket and the widths that a state has for an adapter, if this one has learned nothing yet.

        Raises:
            CheckpointError: If it has learned something, or an optimizer trains it already, or the positions are none.
        """
        positions, widths = layout_in(state, prefix, adapter_name)
        own, own_widths = layout_in(self.model.state_dict(), "", adapter_name)
        if not (positions or widths) or (lengths(positions), widths) == (lengths(own), own_widths):
            return
        is_fresh = not any(layer.is_changed_by(adapter_name) for _, layer in sfa_layers(self.model))
        if not is_fresh or holds_any(self.parameters_of(adapter_name)):
            why = "an optimizer trains it already" if is_fresh else "it has learned something"
            raise CheckpointError(
                f"the state has another ticket or other widths for adapter {adapter_name!r} than the model, and "
                f"{why}. Give the adapter the ticket before the optimizer is made: install_ticket(model, ticket) with "
                f"the search's `report.ticket`, or load this state into the model then."
            )
        candidates = self.candidates(adapter_name)
        granularity = self.peft_config[adapter_name].granularity
        for module, parameters in positions.items():
            for name, indices in parameters.items():
                parameter = candidates.get(module, {}).get(name)
                units = 0 if parameter is None else granularity.count(parameter.shape)
                key = f"{prefix}{module}.sfa_internal.{adapter_name}.{name}_positions"
                check_positions(key, indices, len(indices), units)
        places = {(p.module, "sfa_parallel" if p.mlp_input else "sfa_external"): p for p in self.places(adapter_name)}
        unknown = widths.keys() - places.keys()
        if unknown:
            raise CheckpointError(
                f"the state has an external adapter on {min(unknown)[0]!r}, where adapter {adapter_name!r} has no "
                f"place; make the adapter with the config that the state was saved with."
            )
        self.install(adapter_name, positions, [replace(places[key], width=width) for key, width in widths.items()])

    @contextmanager
    def other_externals(self, adapter_name: str, externals: Sequence[External]) -> Iterator[None]:
        """Replace an adapter's external adapters for a while; afterwards its own are back, as they were."""
        with self.restoring(adapter_name):
            self.install(adapter_name, externals=externals)
            yield

    @contextmanager
    def restoring(self, adapter_name: str, only_on_error: bool = False) -> Iterator[None]:
        """Give an adapter back what it consists of, the very same modules, after something else was installed."""
        config = self.peft_config[adapter_name]
        sizes = config.ticket_sizes, config.external_widths
        kept = {
            name: (layer.internal_of(adapter_name), layer.externals_of(adapter_name))
            for name, layer in sfa_layers(self.model)
            if adapter_name in layer.adapter_names
        }
        failed = True
        try:
            yield
            failed = False
        finally:
            if failed or not only_on_error:
                layers = dict(sfa_layers(self.model))
                for layer in layers.values():
                    layer.remove_internal(adapter_name)
                    layer.remove_externals(adapter_name)
                for name, (internal, externals) in kept.items():
                    layer = layers.get(name) or self._wrap(name, adapter_name)
                    if internal is not None:
                        layer.sfa_internal[adapter_name] = internal
                    for adapter, container in externals:
                        layer.add_external(adapter_name, adapter, container)
                config.ticket_sizes, config.external_widths = sizes
                unwrap_empty_layers(self.model)

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """The base as it is without its merged adapters; afterwards they are merged again."""
        merged = [(layer, list(layer.merged_adapters)) for _, layer in sfa_layers(self.model) if layer.merged]
        for layer, _ in merged:
            layer.unmerge()
        try:
            yield
        finally:
            for layer, names in merged:
                layer.merge(adapter_names=names)

    def _wrap(self, name: str, adapter_name: str) -> SFALayer:
        return wrap_leaf(self.model, name, adapter_name, self.active_adapters)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return encoded(own)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = unpacked(model, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        return decoded(model, adapter_name, remapped)


def tuner_of(model: PeftModel) -> SFAModel:
    """The tuner of a model whose adapters are SFA's."""
    return cast(SFAModel, model.base_model)

"""SFAModel, the tuner: injects adapters, installs tickets and external adapters, merges and unloads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..checkpoint.names import PREFIX, is_adapter_key, is_positions_key
from ..checkpoint.reader import LOAD, adapter_in_load, is_restored
from ..checkpoint.validation import check_positions
from ..config import SFAConfig
from ..layers.adapted import SFALayer, sfa_layers
from ..layers.bottleneck import ExternalAdapter
from ..layers.grid import Grid
from ..layers.heads import wrap_heads
from ..layers.kept import ChangedParameters
from ..layers.kinds import QuantizedLinear
from ..layers.leaves import CLOSED
from ..layers.mixed import BASE
from ..layers.statistics import keep_statistics, release_statistics
from ..planning.base import check_base, head_tensors, shared_parameters
from ..planning.budget import External
from ..planning.plan import TASK_HEADS, Plan, Planner, ticket_sizes
from ..recorded import RecordedConfig
from ..ticket.selection import Positions
from .checks import check_config
from .combining import check_combinable, combined, fill
from .folding import Widen, fold_externals, warn_of_kept
from .layout import layout_in, lengths
from .mixing import mixing
from .optimizers import holds_any
from .rollback import Rollback
from .state import check_heads, encoded, loadable, unpacked, without_adapter_name
from .structure import sfa_layer, unwrap_empty_layers


class SFAModel(BaseTuner):
    """A base model with Selective Feature Adapters (Deng et al., arXiv 2310.01843).

    Args:
        model (`nn.Module`): The model to adapt, in place.
        peft_config (`SFAConfig` or `dict[str, SFAConfig]`): The config, or one config for each adapter name.
        adapter_name (`str`): The adapter's name. `get_peft_model` uses `"default"`.

    Raises:
        ValueError: If the config does not fit the model. Then the model is not changed.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from sfa_peft import SFAConfig
        >>> model = get_peft_model(base, SFAConfig(budget=0.02, modules_to_save=["decode_head"]))
        ```
    """

    peft_config: dict[str, RecordedConfig]  # type: ignore[assignment]  # PEFT declares the base class
    prefix = "sfa_"
    tuner_layer_cls = SFALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (as PEFT declares it)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        load = LOAD.get()
        if load is not None:
            load.before_injection()
        self.changed = ChangedParameters()
        super().__init__(*args, **kwargs)
        self.card_notes: dict[str, Any] = {}  # for each adapter, the data for its model card

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Inject an adapter as `BaseTuner.inject_adapter` does.

        Args:
            model (`nn.Module`): The base model.
            adapter_name (`str`): The adapter. Its config must be in `peft_config`.
            autocast_adapter_dtype (`bool`, defaults to `True`): Not used, as in PEFT, which casts after the injection.
            low_cpu_mem_usage (`bool`, defaults to `False`): Whether the parameters are made on the meta device.
            state_dict (`dict[str, Tensor]`, *optional*, defaults to `None`):
                Not used. PEFT finds the adapted modules in it, if a config does not say which they are.
            plan (`Plan`, *optional*, defaults to `None`): What to inject. None makes the plan from the config.

        Raises:
            ValueError: If the config does not fit the model. Then the model is not changed.
        """
        merged = [(layer, list(layer.merged_adapters)) for _, layer in sfa_layers(self.model) if layer.merged]
        if not merged and is_restored():
            self._inject(model, adapter_name, plan, low_cpu_mem_usage)
            return

        def merge_again() -> None:
            for layer, names in merged:
                if layer.merged:  # an error may have come between the restored parameters of one layer
                    layer.unmerge()
                layer.merge(adapter_names=names)

        with Rollback(self) as rollback:
            rollback.also(merge_again)
            for layer, _ in merged:
                layer.unmerge()
            self._inject(model, adapter_name, plan, low_cpu_mem_usage)
            merge_again()

    def _inject(self, model: nn.Module, adapter_name: str, plan: Plan | None, low_cpu_mem_usage: bool) -> None:
        # A copy of the user's config, who may use it for another model. A loaded config is used only for this adapter,
        # and PEFT keeps the same object.
        given: SFAConfig = self.peft_config[adapter_name]
        config = given if LOAD.get() else copy.deepcopy(given)
        if config.task_type in TASK_HEADS:  # some of PEFT's task classes add their heads after the injection
            named = config.modules_to_save or ()
            config.modules_to_save = list(dict.fromkeys((*named, *TASK_HEADS[config.task_type])))
        planner = Planner(model, config)
        plan = planner.plan() if plan is None else plan
        for name, modules in planner.exact().items():
            setattr(config, name, modules)
        saved = adapter_in_load()
        if saved is not None:
            check_heads(
                {k.removeprefix(PREFIX): t for k, t in saved.tensors.items() if not is_adapter_key(k)},
                head_tensors(model, planner.heads),
            )
        fingerprint = check_base(model, adapter_name, config, plan.modules)
        sizes, widths = ticket_sizes(plan.positions), plan.external_widths
        if isinstance(config, RecordedConfig):
            config.ticket_sizes, config.external_widths, config.base_fingerprint = sizes, widths, fingerprint
        else:
            config = RecordedConfig.of(config, sizes, widths, fingerprint, planner.external_places, planner.conv)
        self.peft_config[adapter_name] = config
        self.changed.always = config.keep_weights
        # PEFT's version would choose the modules again, by comparing each one with the config, and wrap every module
        # whose name ends with the name of a head.
        has_adapters = any(isinstance(module, CLOSED) for module in model.modules())
        flags = [(p, p.requires_grad and has_adapters) for p in model.parameters()]
        planned = plan.modules
        names = [name for name, _ in model.named_modules() if name in planned]
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for name in names:
                self._adapt(plan, adapter_name, name)
        self.targeted_module_names = list(dict.fromkeys((*self.targeted_module_names, *names)))
        for p, requires_grad in flags:
            p.requires_grad = requires_grad
        is_active = adapter_name in self.active_adapters
        wrap_heads(model, planner.heads, adapter_name, is_active, config.inference_mode)
        keep_statistics(model)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's version goes through all modules of the model, and a load calls it twice.
        if any(p.dtype not in (torch.float32, torch.float64) for p in self.parameters_of(adapter_name)):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    @staticmethod
    def _check_target_module_exists(peft_config: RecordedConfig, key: str) -> bool:  # type: ignore[override]
        # PEFT's `inspect_matched_modules` asks.
        adapted = {name for modules in peft_config.external_widths.values() for name in modules}
        return key in adapted or key in {name.rpartition(".")[0] for name in peft_config.ticket_sizes}

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError  # PEFT declares it, for its own `inject_adapter`

    def _adapt(self, plan: Plan, adapter_name: str, name: str) -> None:
        """Add the parts of an adapter that a plan has for one module."""
        layer = sfa_layer(self.model, name, self.active_adapters, self.changed)
        config = self.peft_config[adapter_name]
        positions = plan.positions.get(name)
        added: list[nn.Module] = []
        if positions is not None:
            layer.add_internal(adapter_name, positions, config.granularity, init_weights=config.init_weights)
            added.append(layer.sfa_internal[adapter_name])
        for external in plan.externals.get(name, ()):
            grid = None
            if external.grid is not None:
                source, argument = external.grid
                grid = Grid(self.model.get_submodule(source), argument)
            adapter = ExternalAdapter(
                external.channels,
                external.width,
                activation=config.external_activation,
                dropout=config.external_dropout,
                scale=config.external_scale,
                channel_dim=external.channel_dim,
                init_weights=config.init_weights,
                conv=external.conv,
                grid=grid,
            )
            container = None if external.reads is None else self.model.get_submodule(external.reads)
            layer.add_external(adapter_name, adapter, external.kind, container)
            added.append(adapter)
        layer.finish(added, adapter_name in self.active_adapters and not config.inference_mode)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # Positions are the same on all processes and not trained, but DistributedDataParallel would send all buffers
        # in every forward pass. It reads this attribute of the module that it wraps; a `PeftModel` asks its tuner.
        return [f"base_model.{name}" for name, _ in self.named_buffers() if is_positions_key(name)]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version also copies `weight` from the replaced module, which a head may not have.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If no other adapter is active, the first remaining one becomes active.

        PEFT's version reads the remaining adapters from the first layer, but SFA adapters may be on different layers.

        Args:
            adapter_name (`str`): The adapter.

        Raises:
            ValueError: If there is no such adapter.
        """
        with Rollback(self):
            active = [name for name in self.active_adapters if name != adapter_name]
            super().delete_adapter(adapter_name)
            self.changed.clear()
            self.card_notes.pop(adapter_name, None)
            unwrap_empty_layers(self.model)
            names = active or list(self.peft_config)[:1]
            # Without this check, adapters that are already active would be unmerged.
            if names and any(
                current != names
                for current in (self.active_adapters, *(layer.active_adapters for _, layer in sfa_layers(self.model)))
            ):
                self.set_adapter(names[0] if len(names) == 1 else names)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Use one adapter per sample in the next forward pass; ``__base__`` means none."""
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
        """Add an adapter that is exactly the weighted sum of others: ``sum_i weights_i * adapter_i``.

        Its ticket is the union of the tickets, and the values at a common position are summed. At each place, its
        width is the sum of the widths. The new adapter is frozen and not active. The method is task arithmetic
        (Ilharco et al., "Editing Models with Task Arithmetic", 2023).

        Args:
            adapters (`Sequence[str]`):
                The adapters. At most one of them may have a certain head, which is copied to the new adapter.
            weights (`Sequence[float]`): The weight of each adapter.
            adapter_name (`str`): The name of the new adapter. If it exists already, nothing is done, as in PEFT.
            combination_type (`str`, defaults to `"linear"`): Only `linear` is supported.

        Raises:
            ValueError: If the adapters cannot be combined.
        """
        if adapter_name in self.peft_config:
            return
        if combination_type != "linear":
            raise ValueError(f"Invalid combination_type: {combination_type}; SFA has 'linear'.")
        check_combinable(self.model, self.peft_config, adapters, weights)
        config, plan = combined(self.model, self.peft_config, adapters)
        with Rollback(self):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name, plan=plan)
            fill(self.model, adapters, weights, adapter_name)
            for p in self.parameters_of(adapter_name):
                p.requires_grad_(False)

    def _check_merge_allowed(self) -> None:
        """Check that merging changes no other module, and that all weights can be changed.

        Raises:
            ValueError: If a parameter that an internal adapter changes is shared with another module, or quantized.
        """
        super()._check_merge_allowed()
        shared = self.shared_parameters()
        for name, layer in sfa_layers(self.model):
            if isinstance(layer, QuantizedLinear) and layer.sfa_internal:
                raise ValueError(
                    f"internal adapters on {name!r} cannot be merged: its weight is quantized, and rounding would "
                    f"remove the changes. Load the adapter into the base model before quantization, and merge it."
                )
            for parameter in {p for delta in layer.sfa_internal.values() for p in delta.changed}:
                names = shared.get(id(getattr(layer.get_base_layer(), parameter)))
                if names:
                    raise ValueError(
                        f"internal adapters on {name!r} cannot be merged: its `{parameter}` is shared "
                        f"({', '.join(names)}), so the other module would change too. Use the adapter unmerged."
                    )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge internal adapters into the base parameters. External adapters stay active as modules.

        If one layer fails, no layer is merged. `unmerge_adapter` restores the base parameters bit for bit.

        Args:
            adapter_names (`list[str]`, *optional*, defaults to `None`): The adapters. None merges the active ones.
            safe_merge (`bool`, defaults to `False`): Whether to check that the merged parameters are finite.

        Raises:
            ValueError: If a parameter is shared with another module or quantized, or, with `safe_merge`, would not be
                finite. Then nothing is changed.
        """
        self.changed.clear()
        with Rollback(self) as rollback:
            rollback.also(self._unmerging())
            super().merge_adapter(adapter_names, safe_merge)

    def _unmerging(self) -> Callable[[], None]:
        """A function that unmerges what will have been merged after now."""
        merged = [(layer, len(layer.merged_adapters)) for _, layer in sfa_layers(self.model)]

        def unmerge() -> None:
            for layer, count in merged:
                if len(layer.merged_adapters) > count:
                    layer.unmerge(keep=count)

        return unmerge

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT declares None, but returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        with Rollback(self) as rollback:
            rollback.also(self._unmerging())
            if merge and safe_merge:  # before the first layer is unloaded
                self.merge_adapter(adapter_names, safe_merge)
            unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
            model = cast(nn.Module, unloaded)
            release_statistics(model)
        return model

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        widen: Widen = "auto",
    ) -> nn.Module:
        """Merge the adapters into the weights, and return the plain model.

        Internal adapters are changes of weights. External adapters at the place `mlp_parallel` with the activation of
        the MLP are folded into a wider MLP, which the config of the returned model describes. Other external adapters
        stay modules, with a warning; `save_pretrained` of such a model is an error, since it would lose them.

        Args:
            progressbar (`bool`, defaults to `False`): Whether to show a progress bar.
            safe_merge (`bool`, defaults to `False`): Whether to check that the merged parameters are finite.
            adapter_names (`list[str]`, *optional*, defaults to `None`): The adapters. None merges the active ones.
            widen (`bool` or `"auto"`, defaults to `"auto"`):
                Whether hidden units of zeros may be added where a config cannot give an MLP exactly the hidden units
                that it needs. With `"auto"`, up to a tenth of the MLPs' parameters. With False nothing is folded.

        Returns:
            The base model, changed in place.

        Raises:
            ValueError: If `widen` is not valid, or as in `merge_adapter`. Then nothing is changed.
        """
        if widen not in (True, False, "auto"):
            raise ValueError(f"widen={widen!r}: use True, False or 'auto'.")
        with Rollback(self, every_attribute=True) as rollback:
            rollback.also(self._unmerging())
            model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
            warn_of_kept(model, fold_externals(model, widen))
            return model

    def unload(self) -> nn.Module:
        """Return the original base model, bit for bit, with its original heads. PEFT's version keeps trained heads."""
        with Rollback(self):
            for name, module in list(self.model.named_modules()):
                if isinstance(module, ModulesToSaveWrapper):
                    self.model.set_submodule(name, module.original_module)
            return super().unload()

    def candidates(self, adapter_name: str) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters that an adapter's ticket may choose from: for each module, by name, in model order."""
        return Planner(self.model, self.peft_config[adapter_name]).candidates()

    def shared_parameters(self) -> dict[int, list[str]]:
        """For each parameter with several names, by its `id`, all its names."""
        return shared_parameters(self.model)

    def places(self, adapter_name: str) -> list[External]:
        """The possible external adapters of an adapter in model order, with width 0."""
        return Planner(self.model, self.peft_config[adapter_name]).places()

    def positions(self, adapter_name: str) -> Positions:
        """The ticket of an adapter: for each module and parameter, the sorted positions."""
        return {
            name: {p: delta.positions(p) for p in delta.changed}
            for name, layer in sfa_layers(self.model)
            if adapter_name in layer.sfa_internal
            for delta in (layer.sfa_internal[adapter_name],)
        }

    def budget(self, adapter_name: str) -> int:
        """The budget of an adapter, as a number of parameters."""
        return Planner(self.model, self.peft_config[adapter_name]).budget()

    def external_allowance(self, adapter_name: str) -> int:
        """The largest number of parameters of an adapter's external adapters."""
        return Planner(self.model, self.peft_config[adapter_name]).external_allowance()

    def ticket_size(self, adapter_name: str) -> int:
        """The largest size of an adapter's ticket, in elements: the budget without the external adapters."""
        config = self.peft_config[adapter_name]
        planner = Planner(self.model, config)
        if not config.uses_budget and config.internal_granularity == "element":
            return sum(config.ticket_sizes.values())
        # Larger units rarely fill their part of the budget, and another ticket may fill more of it.
        candidates = planner.candidates()
        if not candidates:
            return 0
        if not config.uses_budget:
            return planner.density_size(candidates)
        externals = [e for recorded in planner.recorded_externals(config).values() for e in recorded]
        return planner.budget() - sum(e.cost for e in externals)

    def install(
        self,
        adapter_name: str,
        positions: Positions | None = None,
        externals: Sequence[External] | None = None,
    ) -> None:
        """Replace the ticket or the external adapters of an adapter, or both.

        The replaced parts are dropped with their values. The new ones are initialized as in an injection.

        Args:
            adapter_name: The adapter.
            positions: For each module and parameter, the sorted positions in the config's granularity. None keeps the
                ticket.
            externals: The new external adapters. Those of width 0 are left out. None keeps the present ones.

        Raises:
            Exception: Any error, also an interrupt. Then the model is not changed.
        """
        config = self.peft_config[adapter_name]
        replaced = self.parameters_of(adapter_name)
        upcast = all(p.dtype == torch.float32 for p in replaced)
        trainable = any(p.requires_grad for p in replaced)
        plan = Plan.of(positions or {}, externals or ())
        with Rollback(self) as rollback:
            for _, layer in sfa_layers(self.model):
                if positions is not None:
                    layer.remove_internal(adapter_name)
                if externals is not None:
                    layer.remove_externals(adapter_name)
            for name in sorted(plan.modules):
                self._adapt(plan, adapter_name, name)
            unwrap_empty_layers(self.model)
            self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=upcast)
            if positions is not None:
                config.ticket_sizes = ticket_sizes(plan.positions)
            if externals is not None:
                config.external_widths = plan.external_widths
            rollback.restore_flags()
            kept = {id(p) for p in rollback.parameters}
            for p in self.parameters_of(adapter_name):
                if id(p) not in kept:
                    p.requires_grad_(trainable)

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """All parameters of an adapter outside its heads."""
        return [p for _, layer in sfa_layers(self.model) for p in layer.parameters_of(adapter_name)]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The state of a whole model, as Accelerate saves it, may have the ticket of another search. An adapter that is
        # being loaded has been checked.
        if LOAD.get() is None:
            with Rollback(self):
                for adapter_name in self.peft_config:
                    self._take_layout(adapter_name, state_dict, f"{prefix}model.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check_config(self, adapter_name: str) -> None:
        """Check that an adapter's config is valid and describes the adapter, since fields can be set at any time.

        Raises:
            ValueError: If it is not valid or does not match. The message names the field.
        """
        check_config(self.model, adapter_name, self.peft_config[adapter_name], self.positions(adapter_name))

    def _take_layout(self, adapter_name: str, state: dict[str, Tensor], prefix: str) -> None:
        """Install the ticket and the widths of a state dict in an adapter that has not been trained.

        Raises:
            CheckpointError: If the adapter has been trained, an optimizer has its parameters, or the positions or
                places of the state dict are not valid.
        """
        positions, widths = layout_in(state, prefix, adapter_name)
        present_widths = {
            (name, kind): external.width
            for name, layer in sfa_layers(self.model)
            for kind, external in layer.externals_of(adapter_name)
        }
        present = lengths(self.positions(adapter_name)), present_widths
        if not (positions or widths) or (lengths(positions), widths) == present:
            return
        is_fresh = not any(layer.is_changed_by(adapter_name) for _, layer in sfa_layers(self.model))
        if not is_fresh or holds_any(self.parameters_of(adapter_name)):
            why = "an optimizer trains it already" if is_fresh else "it has been trained"
            raise CheckpointError(
                f"the state has another ticket or other widths for adapter {adapter_name!r} than the model, and "
                f"{why}. Before the optimizer is created, install the ticket with install_ticket(model, ticket), "
                f"where `ticket` is the search's `report.ticket`, or load this state into the model."
            )
        candidates = self.candidates(adapter_name)
        granularity = self.peft_config[adapter_name].granularity
        for module, parameters in positions.items():
            for name, indices in parameters.items():
                parameter = candidates.get(module, {}).get(name)
                units = 0 if parameter is None else granularity.count(parameter.shape)
                key = f"{prefix}{module}.sfa_internal.{adapter_name}.{name}_positions"
                check_positions(key, indices, len(indices), units)
        places = {(p.module, p.kind): p for p in self.places(adapter_name)}
        unknown = widths.keys() - places.keys()
        if unknown:
            raise CheckpointError(
                f"the state has an external adapter on {min(unknown)[0]!r}, where adapter {adapter_name!r} has no "
                f"place; create the adapter with the config that the state was saved with."
            )
        self.install(adapter_name, positions, [replace(places[key], width=width) for key, width in widths.items()])

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
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return encoded(model, adapter_name, tensors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return loadable(model, adapter_name, unpacked(model, adapter_name, state_dict))


def tuner_of(model: PeftModel) -> SFAModel:
    """The tuner of a model with SFA adapters."""
    return cast(SFAModel, model.base_model)

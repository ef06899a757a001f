"""The SFA layer: a leaf of the base model with its internal adapters and the external adapters on its output.

Only leaves are wrapped. A wrapped container would rename the leaves inside it, and a checkpoint could not be loaded
next to an adapter that uses other places.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .bottleneck import ExternalAdapter, add_in_dtype
from .granularity import Granularity
from .kept import ChangedParameters
from .leaves import base_parameters_of, channels_of, modules_outside, parameters_in
from .merged import AddExternals
from .mixed import Mixture, in_order, mixture_of
from .offloading import is_hooked, onloaded
from .ops import Op
from .parallel import InputOf, ParallelInput, keep_input
from .sparse import Changeable, SparseDelta, changed_parameter, changes_of, sparse_forward

A = TypeVar("A", bound=nn.Module)

# When adapters are merged and then disabled, the first forward pass unmerges them, and several threads may run it. The
# lock is no attribute of a layer, since layers are copied and pickled.
_UNMERGING = threading.RLock()


class Adapters(Protocol[A]):
    """The type of an `nn.ModuleDict` that maps adapter names to modules of one kind."""

    def __getitem__(self, name: str) -> A: ...

    def __setitem__(self, name: str, adapter: A) -> None: ...

    def __delitem__(self, name: str) -> None: ...

    def __contains__(self, name: str) -> bool: ...

    def __len__(self) -> int: ...

    def values(self) -> Iterable[A]: ...


# The kinds of external adapter, by what they read: the output of the leaf, the input of another module, or their sum.
EXTERNAL_KINDS = ("sfa_external", "sfa_parallel", "sfa_block")


class SFALayer(nn.Module, BaseTunerLayer):
    """A wrapped leaf: ``y = base(x; W + delta)``, then ``y + external(y) + parallel(z) + block(z + y)``.

    `z` is the input of another module: of the MLP for a parallel adapter. For one on the block's output it is the
    residual to which the block adds `y`. The changes of several active adapters are added. This class supports
    external adapters on any leaf; its subclasses also run their kind of leaf with changed parameters.

    Args:
        base_layer (`nn.Module`): The leaf.
        active (`Sequence[str]`): The adapters of the model that are active.
        block (`nn.Module`, *optional*, defaults to `None`):
            For a leaf without parameters: the module around it, whose device and dtype the adapter gets.
        shared (`ChangedParameters`, *optional*, defaults to `None`):
            Keeps the changed parameters of all layers between forward passes.
    """

    adapter_layer_names = ("sfa_internal", *EXTERNAL_KINDS)
    other_param_names = ("parallel_inputs", "block_inputs")
    takes_internal = False
    searching = False

    def __init__(
        self,
        base_layer: nn.Module,
        active: Sequence[str],
        block: nn.Module | None = None,
        shared: ChangedParameters | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._block = (block,)  # in a tuple, so that it does not become a submodule
        self._shared = (shared,)
        self.sfa_internal = cast("Adapters[SparseDelta]", nn.ModuleDict())
        self.sfa_external = cast("Adapters[ExternalAdapter]", nn.ModuleDict())
        self.sfa_parallel = cast("Adapters[ExternalAdapter]", nn.ModuleDict())
        self.sfa_block = cast("Adapters[ExternalAdapter]", nn.ModuleDict())
        self.parallel_inputs: dict[str, ParallelInput] = {}
        self.block_inputs: dict[str, ParallelInput] = {}
        self.merged_adapters: list[str] = []
        self._originals: dict[str, dict[str, tuple[Granularity, Tensor, Tensor]]] = {}  # of each merged adapter
        self._active_adapter = list(active)

    @property
    def in_features(self) -> int | None:
        """Input channels of the leaf, or None if they are not known. PEFT expects this attribute."""
        base = self.get_base_layer()
        return getattr(base, "in_features", None) or getattr(base, "in_channels", None) or self.out_features

    @property
    def out_features(self) -> int | None:
        """Output channels of the leaf, or None if they are not known."""
        channels = channels_of(self.get_base_layer())
        return channels and channels[0]

    @property
    def op(self) -> Op:
        """What the leaf computes, with its gradients.

        Raises:
            AttributeError: If this kind of leaf takes external adapters only.
        """
        raise AttributeError(f"{type(self.get_base_layer()).__name__} takes external adapters only")

    @property
    def changeable(self) -> Changeable:
        """The module whose ``weight`` and ``bias`` the internal adapters change."""
        return cast(Changeable, self.get_base_layer())

    def add_internal(
        self, adapter_name: str, positions: Mapping[str, Tensor], granularity: Granularity, init_weights: bool
    ) -> None:
        """Add an internal adapter.

        Args:
            adapter_name (`str`): The adapter.
            positions (`Mapping[str, Tensor]`):
                For ``weight`` and ``bias``, the sorted positions, 1-D integer tensors.
            granularity (`Granularity`): The unit that a position counts.
            init_weights (`bool`): Whether the values start at zero. With False they are random (for tests).
        """
        self.sfa_internal[adapter_name] = SparseDelta(self.changeable, positions, granularity, init_weights)

    def add_external(
        self,
        adapter_name: str,
        adapter: ExternalAdapter,
        kind: str = "sfa_external",
        container: nn.Module | None = None,
    ) -> None:
        """Add an external adapter.

        Args:
            adapter_name (`str`): The adapter.
            adapter (`ExternalAdapter`): Its bottleneck.
            kind (`str`, defaults to `"sfa_external"`): Of `EXTERNAL_KINDS`.
            container (`nn.Module`, *optional*, defaults to `None`):
                The module whose input it reads. Not needed for one that reads the leaf's output alone.
        """
        getattr(self, kind)[adapter_name] = adapter
        if container is not None:
            self._inputs(kind)[adapter_name] = ParallelInput(container)

    # Every layer needs these in every pass, so they read the dicts of modules: `getattr` of a module is slow.

    @property
    def _leaf(self) -> nn.Module:
        """As `base_layer`."""
        leaf = self._modules["base_layer"]
        assert leaf is not None
        return leaf

    def _by_name(self, kind: str) -> dict[str, Any]:
        """The adapters of a kind, of `adapter_layer_names`."""
        adapters = self._modules[kind]
        assert adapters is not None
        return adapters._modules

    @property
    def _innermost(self) -> nn.Module:
        """As `get_base_layer`: the leaf, also inside other layers that wrap it."""
        leaf = self._leaf
        while (inner := leaf._modules.get("base_layer")) is not None:
            leaf = inner
        return leaf

    def _inputs(self, kind: str) -> dict[str, ParallelInput]:
        return {"sfa_parallel": self.parallel_inputs, "sfa_block": self.block_inputs}.get(kind, {})

    def internal_of(self, adapter_name: str) -> SparseDelta | None:
        """The internal change that an adapter makes in this layer, or None."""
        return self.sfa_internal[adapter_name] if adapter_name in self.sfa_internal else None  # noqa: SIM401 (no dict)

    def externals_of(self, adapter_name: str) -> list[tuple[str, ExternalAdapter]]:
        """An adapter's bottlenecks in this layer, each with its kind."""
        modules = self.modules_of(adapter_name)
        return [(kind, module) for kind, module in modules if isinstance(module, ExternalAdapter)]

    def remove_externals(self, adapter_name: str) -> None:
        self._remove_hooks(adapter_name)
        for kind, _ in self.externals_of(adapter_name):
            del getattr(self, kind)[adapter_name]
            self._inputs(kind).pop(adapter_name, None)

    def _remove_hooks(self, adapter_name: str) -> None:
        for kind, external in self.externals_of(adapter_name):
            external.remove_hooks()
            if adapter_name in self._inputs(kind):
                self._inputs(kind)[adapter_name].remove()

    def remove_internal(self, adapter_name: str) -> None:
        if adapter_name in self.sfa_internal:
            del self.sfa_internal[adapter_name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        (shared,) = self._shared
        if shared is not None:
            shared.forget(self)
        applied: Self = super()._apply(fn, recurse)
        return applied

    def finish(self, added: Iterable[nn.Module], is_trained: bool) -> None:
        """Give new parts of an adapter the device and dtype of the leaf and the mode of the layer; freeze them or not.

        Its other parts stay as they are. They may have been cast to float32 since, and hold trained values.
        """
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for adapter in added:
            self._move(adapter, device, dtype)
            for p in parameters_in(adapter):
                p.requires_grad = is_trained
            if not self.training:
                adapter.eval()

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # PEFT looks for a `weight`. LayerScale has `lambda1`; for a norm without parameters the block decides.
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is not None:
            return device, dtype
        (block,) = self._block
        parameter = next(base_parameters_of(base_layer if block is None else block), None)
        return (None, dtype) if parameter is None else (parameter.device, parameter.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this after it has loaded weights. PEFT's version would drop them while the base is on the meta
        # device, and moves no adapter while another adapter is on the meta device.
        base_device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = device or base_device
        if device is not None and device.type != "meta":
            for _, adapter in self.modules_of(adapter_name):
                self._move(adapter, device, dtype)

    @staticmethod
    def _move(adapter: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            dtype = None
        parameters = list(parameters_in(adapter))
        # `to` takes a while even if there is nothing to do.
        is_there = all(p.device == (device or p.device) and p.dtype == (dtype or p.dtype) for p in parameters)
        if not is_there and not any(p.is_meta for p in parameters):
            adapter.to(device=device, dtype=dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer, with its hooks."""
        self._remove_hooks(adapter_name)
        super().delete_adapter(adapter_name)

    @property
    def adapter_names(self) -> set[str]:
        """The names of all adapters in this layer."""
        return self._get_available_adapters()

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """All parameters of an adapter in this layer."""
        return [p for _, adapter in self.modules_of(adapter_name) for p in parameters_in(adapter)]

    def modules_of(self, adapter_name: str) -> list[tuple[str, nn.Module]]:
        """The modules of an adapter in this layer, each with its kind: the name of the dict that it is in."""
        kinds = ((kind, getattr(self, kind)) for kind in self.adapter_layer_names)
        return [(kind, adapters[adapter_name]) for kind, adapters in kinds if adapter_name in adapters]

    def is_changed_by(self, adapter_name: str) -> bool:
        """Whether an adapter changes the output of this layer: an internal value or an up projection is not zero."""
        outputs = [self.sfa_internal[adapter_name].parameters()] if adapter_name in self.sfa_internal else []
        outputs += [adapter.up.parameters() for _, adapter in self.externals_of(adapter_name)]
        return any(bool(p.any()) for parameters in outputs for p in parameters if not p.is_meta)

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _changed_forward(self, x: Tensor, deltas: Sequence[SparseDelta], keeps: bool = False) -> Tensor:
        base: Any = self._innermost
        hooks = (*base._forward_hooks.values(), *base._forward_pre_hooks.values())
        if hooks and any(not isinstance(hook, InputOf) for hook in hooks):
            warnings.warn(
                f"hooks on the {type(base).__name__} inside an SFA layer are not run while its internal adapter is "
                f"active; register them on the SFA layer, after get_peft_model.",
                stacklevel=2,
            )
        if is_hooked(base):
            with onloaded(base, *deltas):
                return sparse_forward(self.op, x.to(base.weight.device), base.weight, base.bias, deltas)
        op, weight = self.op, base.weight
        dtype, kept = op.compute_dtype(x, weight), None
        (shared,) = self._shared
        if keeps and len(deltas) == 1 and shared is not None and shared.keeps(x):
            kept = shared.of(self, base, deltas[0], dtype)
        return sparse_forward(op, x, weight, base.bias, deltas, kept, dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the leaf with its active adapters; in a mixed batch, each sample with its adapter.

        Args:
            x (`Tensor`): The leaf's input, in any shape that the leaf takes.
            args, kwargs: Passed to the leaf. With an active internal adapter they are ignored.

        Returns:
            A tensor of the shape of the leaf's output.

        Raises:
            ValueError: If the rows of a mixed batch do not match its samples.
            RuntimeError: If a parallel adapter runs before the module whose input it reads.
        """
        if self.disable_adapters:
            if self.merged:
                with _UNMERGING:
                    if self.merged:  # it may have waited for another thread
                        self.unmerge()
            self._forget_inputs()
            return self._base_forward(x, *args, **kwargs)
        mixture = mixture_of(self)
        if mixture is not None:
            return self._mixed_forward(x, mixture, *args, **kwargs)

        names = self.merged_adapters if self.merged else self.active_adapters
        folded = self.merged or self.searching
        internal = self._by_name("sfa_internal")
        deltas = [] if folded else [internal[name] for name in names if name in internal]
        if deltas and (leaf := self._leaf)._forward_pre_hooks:
            keep_input(leaf, x)
        y = self._changed_forward(x, deltas, keeps=True) if deltas else self._base_forward(x, *args, **kwargs)
        y = self._add_externals(y, names)
        self._forget_inputs()
        return y

    def _mixed_forward(self, x: Tensor, mixture: Mixture, *args: Any, **kwargs: Any) -> Tensor:
        """Run each sample with its adapter."""
        rows = mixture.rows(x)
        parts = []
        for name, indices in rows.items():
            part = x.index_select(0, indices)
            deltas = [self.sfa_internal[name]] if name in self.sfa_internal else []
            y = self._changed_forward(part, deltas) if deltas else self._base_forward(part, *args, **kwargs)
            parts.append(self._add_externals(y, [name], mixture))
        if self.base_layer._forward_pre_hooks:
            keep_input(self.base_layer, x)  # of all samples, where the leaf has seen those of one adapter
        self._forget_inputs()
        return in_order(parts, list(rows.values()))

    def _forget_inputs(self) -> None:
        for inputs in (self.parallel_inputs, self.block_inputs):
            for given in inputs.values():
                given.hook.forget()

    def _add_externals(self, y: Tensor, names: Sequence[str], mixture: Mixture | None = None) -> Tensor:
        sequential, parallel, of_block = (self._by_name(kind) for kind in EXTERNAL_KINDS)
        result = y
        for name in names:
            if name in sequential:
                result = add_in_dtype(result, sequential[name](y, keeps_dtype=False))
            if name in parallel:
                value = self._taken(self.parallel_inputs, name, mixture)
                delta = parallel[name](value, keeps_dtype=False)
                result = add_in_dtype(result, delta.to(y.device))
            if name in of_block:
                value = self._taken(self.block_inputs, name, mixture)
                delta = of_block[name](value.to(y.device) + y, keeps_dtype=False)
                result = add_in_dtype(result, delta)
        return result

    @staticmethod
    def _taken(inputs: dict[str, ParallelInput], name: str, mixture: Mixture | None) -> Tensor:
        value = inputs[name].hook.take()
        return value if mixture is None else value.index_select(0, mixture.rows(value)[name])

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> Tensor:
        """The dense change ``delta`` that an adapter makes to a parameter.

        Args:
            adapter (`str`): The adapter.
            parameter (`str`, defaults to `"weight"`): ``weight`` or ``bias``.

        Returns:
            A tensor of the parameter's shape and dtype; zeros where the adapter changes nothing.
        """
        base = getattr(self.changeable, parameter)
        delta = torch.zeros_like(base, memory_format=torch.contiguous_format)
        if adapter in self.sfa_internal:
            changes = [c for c in changes_of([self.sfa_internal[adapter]]) if c.name == parameter]
            delta = changed_parameter(delta, changes, delta.dtype)
        return delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the internal changes to the base parameters. External adapters stay active as modules.

        The original values at the changed positions are kept, so that `unmerge` restores them bit for bit.

        Args:
            safe_merge (`bool`, defaults to `False`): Whether to check that the merged parameters are finite.
            adapter_names (`list[str]`, *optional*, defaults to `None`): The adapters; None merges the active ones.

        Raises:
            ValueError: With `safe_merge`, if a merged parameter would not be finite. That adapter is not merged.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.adapter_names]
        base = self.get_base_layer()
        for name in names:
            changes = changes_of([self.sfa_internal[name]]) if name in self.sfa_internal else []
            new = {c.name: changed_parameter(getattr(base, c.name), [c], getattr(base, c.name).dtype) for c in changes}
            for parameter, value in new.items():
                if safe_merge and not torch.isfinite(value).all():
                    raise ValueError(
                        f"merging adapter {name!r} would make a `{parameter}` of {type(base).__name__} non-finite; "
                        f"the adapter's values have diverged, or are too large for {value.dtype}."
                    )
            originals = {}
            for c in changes:
                positions = c.positions.long()
                old = c.granularity.read(getattr(base, c.name).detach().contiguous(), positions)
                originals[c.name] = (c.granularity, positions, old)
            # The originals are in their place before the first parameter changes, so that an interrupt cannot leave
            # changes that nothing undoes.
            self._originals[name] = originals
            self.merged_adapters.append(name)
            try:
                with torch.no_grad():
                    for parameter, value in new.items():
                        getattr(base, parameter).copy_(value)
            except BaseException:
                self.unmerge(keep=len(self.merged_adapters) - 1)
                raise

    def unmerge(self, keep: int = 0) -> None:
        """Restore the base parameters, bit for bit.

        Args:
            keep (`int`, defaults to 0): The first `keep` merged adapters stay merged.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        with _UNMERGING, torch.no_grad():
            while len(self.merged_adapters) > keep:
                adapter_name = self.merged_adapters[-1]
                for name, (granularity, positions, values) in self._originals[adapter_name].items():
                    parameter = getattr(base, name)
                    restored = parameter.detach().clone(memory_format=torch.contiguous_format)
                    granularity.write(restored, positions.to(restored.device), values.to(restored))
                    parameter.copy_(restored)
                # At last, so that an interrupted call can be repeated, and no other thread takes it for done before.
                self.merged_adapters.pop()
                self._originals.pop(adapter_name, None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the leaf without this wrapper.

        With `merge`, the internal changes are in its parameters, and the external adapters are plain submodules that a
        forward hook calls. Otherwise it is the original leaf.

        Args:
            merge (`bool`): Whether to merge the adapters.
            safe_merge (`bool`): As in `merge`.
            adapter_names (`list[str]` or `None`): As in `merge`.
        """
        if not merge:
            if self.merged:
                self.unmerge()
            for name in self.adapter_names:
                self._remove_hooks(name)
            return self.base_layer
        if set(self.active_adapters if adapter_names is None else adapter_names) - set(self.merged_adapters):
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.base_layer
        inputs: dict[str, InputOf] = {}
        found = [(name, *external) for name in self.merged_adapters for external in self.externals_of(name)]
        for name, kind, external in found:
            child = f"{kind.removeprefix('sfa_')}_{name}"
            base.add_module(child, external)
            if name in self._inputs(kind):
                inputs[child] = self._inputs(kind)[name].hook
        if found:
            base.register_forward_hook(AddExternals(list(self.merged_adapters), inputs))
        for name in self.adapter_names - set(self.merged_adapters):
            self._remove_hooks(name)
        return base

    def __repr__(self) -> str:
        return "sfa." + super().__repr__()


def sfa_layers(model: nn.Module) -> list[tuple[str, SFALayer]]:
    """The names and modules of all SFA layers of a model, in model order."""
    return [(name, module) for name, module in modules_outside(model, (SFALayer,)) if isinstance(module, SFALayer)]

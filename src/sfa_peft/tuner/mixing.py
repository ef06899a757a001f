"""Mixed batches: passes the adapter of each sample to all layers and heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..layers.adapted import SFALayer, sfa_layers
from ..layers.heads import Head
from ..layers.mixed import Mixture
from ..planning.architectures import known_prefixes


@contextmanager
def mixing(model: nn.Module, adapter_names: Sequence[str], inputs: Iterable[Any]) -> Iterator[None]:
    """Use one adapter per sample in a forward pass.

    Args:
        model: The base model.
        adapter_names: The adapter of each sample.
        inputs: The model's arguments.

    Raises:
        ValueError: If the number of inputs differs from that of the adapters, or an adapter is merged.
    """
    batch = next((len(v) for v in inputs if isinstance(v, Tensor) and v.dim()), None)
    if batch not in (None, len(adapter_names)):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
            f"and {batch} respectively."
        )
    if any(layer.merged for _, layer in sfa_layers(model)):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )

    blocks = known_prefixes(model)
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, SFALayer | Head)]
    handles = []
    mixtures = {has_windows: Mixture(tuple(adapter_names), has_windows) for has_windows in (False, True)}
    for name, module in modules:
        chosen = mixtures[bool(blocks) and name.startswith(blocks)]

        def mix(module: nn.Module, args: Any, kwargs: dict[str, Any], mixture: Mixture = chosen) -> Any:
            return args, kwargs | {"mixture": mixture}

        handles.append(module.register_forward_pre_hook(mix, with_kwargs=True))
    heads = [module for _, module in modules if isinstance(module, Head)]
    try:
        for head in heads:
            head.is_mixed = True
        yield
    finally:
        for head in heads:
            head.is_mixed = False
        for handle in handles:
            handle.remove()

"""Mixed batches: passes the adapter of each sample to all layers and heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..layers.adapted import SFALayer, sfa_layers
from ..layers.heads import Head
from ..layers.mixed import Mixture, using
from ..planning.architectures import known_prefixes


@contextmanager
def mixing(model: nn.Module, adapter_names: Sequence[str], inputs: Iterable[Any]) -> Iterator[None]:
    """Use one adapter per sample in a forward pass of this thread. Other threads do not notice it.

    Args:
        model: The base model.
        adapter_names: The adapter of each sample.
        inputs: The model's arguments.

    Raises:
        ValueError: If the number of inputs differs from that of the adapters, an adapter is merged, or the model
            splits the batch over several devices.
    """
    batch = next((len(v) for v in inputs if isinstance(v, Tensor) and v.dim()), None)
    if batch not in (None, len(adapter_names)):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
            f"and {batch} respectively."
        )
    if any(isinstance(m, nn.DataParallel) and len(m.device_ids) > 1 for m in model.modules()):
        raise ValueError(
            "Cannot pass `adapter_names` to a model with nn.DataParallel inside, which splits the batch: put the PEFT "
            "model into nn.DataParallel instead."
        )
    if any(layer.merged for _, layer in sfa_layers(model)):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )

    blocks = known_prefixes(model)
    mixtures = {has_windows: Mixture(tuple(adapter_names), has_windows) for has_windows in (False, True)}
    with using(
        {
            module: mixtures[bool(blocks) and name.startswith(blocks)]
            for name, module in model.named_modules()
            if isinstance(module, SFALayer | Head)
        }
    ):
        yield

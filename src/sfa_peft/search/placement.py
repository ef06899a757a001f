"""Chooses the places and widths of external adapters. Experimental: no gain was measured.

During the search, wide adapters, the probes, are trained at every place. The score of a hidden unit is the credit of
its parameters: the decrease of the loss that is due to them. The units with the highest credit per parameter are kept,
as many as the external share of the budget allows. A place may get none. The kept units go on with the weights of
their probe, or start again with its initial ones, as a winning ticket does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layers.adapted import SFALayer, sfa_layers
from ..layers.bottleneck import ExternalAdapter
from ..planning.budget import External, external_cost, widths_within
from ..ticket.selection import top_units
from ..tuner.model import SFAModel
from .training import DenseTraining, Slot

PROBE_BUDGET = 3  # the parameters of the probes, as a multiple of the external share of the budget
STATISTIC = "credit"


class Placement:
    """The probes of one search.

    Attributes:
        probes: For each place, its probe.
    """

    def __init__(self, tuner: SFAModel, adapter_name: str, places: list[External]) -> None:
        self.tuner, self.adapter_name = tuner, adapter_name
        layers = dict(sfa_layers(tuner.model))
        self.probes = [(place, _adapter_at(layers[place.module], place, adapter_name)) for place in places]

    @classmethod
    def with_probes(cls, tuner: SFAModel, adapter_name: str) -> Placement:
        """Replace an adapter's external adapters by probes at every place."""
        places = tuner.places(adapter_name)
        channels = [place.channels for place in places]
        widths = widths_within(channels, PROBE_BUDGET * tuner.external_allowance(adapter_name))
        tried = [replace(p, width=min(max(w, 2), p.channels)) for p, w in zip(places, widths, strict=True)]
        tuner.install(adapter_name, externals=tried)
        return cls(tuner, adapter_name, tried)

    def statistics(self) -> dict[nn.Parameter, tuple[str, ...]]:
        """The statistics that training sums for the probes' parameters."""
        return {p: (STATISTIC,) for _, probe in self.probes for p in probe.parameters()}

    def score(
        self,
        training: DenseTraining,
        rewind: bool,
        agree: Callable[[Tensor], Tensor] | None = None,
        left_out: Collection[str] = (),
    ) -> None:
        """Score the units of the trained probes.

        Args:
            training: The training of the probes.
            rewind: Whether the units start again with their initial values.
            agree: Gives all processes the same scores.
            left_out: Modules whose probes are not scored.
        """
        self.left_out = {str(i) for i, (place, _) in enumerate(self.probes) if place.module in left_out}
        slots: dict[Tensor, Slot] = {slot.parameter: slot for slot in training.slots}
        self.costs = {str(i): external_cost(place.channels, 1) for i, (place, _) in enumerate(self.probes)}
        self.credit: dict[str, Tensor] = {}
        self.values: list[tuple[Tensor, Tensor, Tensor]] = []
        for i, (_, probe) in enumerate(self.probes):
            trained = [slots[p] for p in (probe.down.weight, probe.down.bias, probe.up.weight)]
            down, bias, up = (slot.sums[STATISTIC].float() for slot in trained)
            credit = (down.sum(1) + bias + up.sum(0)).to(probe.down.weight.device)
            self.credit[str(i)] = (agree(credit) if agree else credit).cpu()
            down, bias, up = (slot.begin if rewind else slot.value.clone() for slot in trained)
            self.values.append((down, bias, up))

    def select(self, allowance: int) -> Chosen:
        """The units with the highest credit per parameter that fit in `allowance` parameters."""
        scored = {name: credit for name, credit in self.credit.items() if name not in self.left_out}
        per_parameter = {name: credit / self.costs[name] for name, credit in scored.items()}
        units = top_units(per_parameter, self.costs, allowance)
        chosen = Chosen()
        for i, (place, _) in enumerate(self.probes):
            kept = units.get(str(i), torch.empty(0)).long()
            down, bias, up = self.values[i]
            at = kept.to(down.device)
            chosen.externals.append(replace(place, width=len(kept)))
            chosen.values.append((down[at], bias[at], up[:, at]))
        return chosen


class Chosen:
    """The external adapters that a placement chose.

    Attributes:
        externals: One for each place; its width may be 0.
        values: Their initial values: the down projection, its bias and the up projection.
    """

    def __init__(self) -> None:
        self.externals: list[External] = []
        self.values: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def cost(self) -> int:
        return sum(external.cost for external in self.externals)

    @torch.no_grad()
    def begin(self, tuner: SFAModel, adapter_name: str) -> None:
        """Set the installed adapters to the initial values of their units."""
        layers = dict(sfa_layers(tuner.model))
        for external, values in zip(self.externals, self.values, strict=True):
            if external.width:
                adapter = _adapter_at(layers[external.module], external, adapter_name)
                for p, value in zip((adapter.down.weight, adapter.down.bias, adapter.up.weight), values, strict=True):
                    p.copy_(value)


def _adapter_at(layer: SFALayer, external: External, adapter_name: str) -> ExternalAdapter:
    adapter: ExternalAdapter = getattr(layer, external.kind)[adapter_name]
    return adapter

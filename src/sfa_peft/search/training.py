"""Dense training for a search: Adam with low memory use, which also sums the statistics of criteria.

Full fine-tuning with AdamW holds four tensors of the model's size: weights, gradients and two moments. A search also
needs the original weights, which it keeps in CPU memory. It holds only one gradient at a time: it updates each
parameter inside backward, as soon as its gradient is computed, and drops the gradient. With several processes, the
gradients are averaged after backward, as in distributed full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..ticket.criteria import STATISTICS, Criterion, Evidence, Step

BETAS = (0.9, 0.999)
EPS = 1e-8
STATES = ("device", "cpu", "bf16")


@dataclass
class Slot:
    """A trained parameter and its state.

    Attributes:
        name: ``"module.parameter"`` for a candidate; a numbered name for parameters of external adapters and heads.
        parameter: The parameter of the model. It is changed in place.
        rate: The learning rate. With 0 the parameter is not changed.
        statistics: The statistics that are summed for the criterion.
        is_candidate: Whether the ticket may choose from the parameter.
        before: The value before the search.
        master: For trained parameters in half precision, a float32 copy that is trained, since half precision would
            lose small updates.
        kept: The mask of the survivors of earlier rounds; None in the first round.
        start: In a resumed search, the value at the start of the original search. For external adapters and heads,
            which may have been initialized again since.
    """

    name: str
    parameter: nn.Parameter
    rate: float
    statistics: tuple[str, ...] = ()
    is_candidate: bool = False
    before: Tensor = field(init=False)
    master: Tensor | None = field(init=False, default=None)
    moments: tuple[Tensor, Tensor] | None = field(init=False, default=None)
    sums: dict[str, Tensor] = field(init=False, default_factory=dict)
    steps: int = field(init=False, default=0)
    kept: Tensor | None = field(init=False, default=None)
    start: Tensor | None = field(init=False, default=None)

    @property
    def value(self) -> Tensor:
        return self.parameter.detach() if self.master is None else self.master

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        self.parameter.copy_(value)
        if self.master is not None:
            self.master.copy_(value)

    @property
    def begin(self) -> Tensor:
        """The value that the parameter is rewound to."""
        return self.before if self.start is None else self.start

    def forget(self) -> None:
        self.steps = 0
        for tensor in (*(self.moments or ()), *self.sums.values()):
            tensor.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """The state of this slot, for a search that resumes."""
        named: dict[str, Tensor | None] = {"value": self.value, "kept": self.kept}
        named["steps"] = torch.tensor(self.steps)
        if not self.is_candidate:
            named["start"] = self.before if self.start is None else self.start
        if self.moments:
            named |= {"first": self.moments[0], "second": self.moments[1]}
        named |= {f"sum.{name}": total for name, total in self.sums.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.set(tensors["value"])
        self.steps = int(tensors["steps"])
        self.kept, self.start = tensors.get("kept"), tensors.get("start")
        if self.kept is not None:
            self.kept = self.kept.to(self.parameter.device)
        if self.moments:
            for moment, saved in zip(self.moments, (tensors["first"], tensors["second"]), strict=True):
                moment.copy_(saved)
        for name, total in self.sums.items():
            total.copy_(tensors[f"sum.{name}"])


class DenseTraining:
    """Adam (Kingma & Ba, 2015) over `Slot`s, one parameter at a time.

    Args:
        slots: The parameters to train.
        state: Where moments and sums are kept. ``device``: in float32 on the device of the parameters. ``cpu``: in
            CPU memory. ``bf16``: in bfloat16 on the device, with stochastic rounding, so that small updates are not
            lost.
        seed: The seed of the stochastic rounding.
    """

    def __init__(self, slots: Sequence[Slot], state: str, seed: int) -> None:
        self.slots = list(slots)
        self.handles: list[RemovableHandle] = []
        self.is_released = False
        self.state = state
        self.dtype = torch.bfloat16 if state == "bf16" else torch.float32
        # On the parameters' device, since noise from another device would have to be copied for each parameter.
        device = self.slots[0].parameter.device if self.slots else "cpu"
        self.rounding = torch.Generator(device).manual_seed(seed)
        for slot in self.slots:
            p = slot.parameter
            slot.before = p.detach().to("cpu", copy=True) if slot.rate else p.detach()
            slot.master = p.detach().float() if slot.rate and p.dtype != torch.float32 else None
            slot.sums = {name: self._zeros(p) for name in slot.statistics}
            if slot.rate:
                slot.moments = (self._zeros(p), self._zeros(p))

    def _zeros(self, p: Tensor) -> Tensor:
        return torch.zeros(p.shape, dtype=self.dtype, device="cpu" if self.state == "cpu" else p.device)

    @contextmanager
    def inside_backward(self) -> Iterator[None]:
        """Update each parameter as soon as its gradient is computed, and drop the gradient."""

        def update(slot: Slot) -> None:
            if not self.is_released:
                self.update(slot)

        self.is_released = False
        try:
            for slot in self.slots:
                hook = slot.parameter.register_post_accumulate_grad_hook(lambda p, slot=slot: update(slot))
                self.handles.append(hook)
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Remove the hooks on the parameters."""
        self.is_released = True  # for a hook without a handle, of an interrupt right after it was registered
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def update(self, slot: Slot) -> None:
        """Update one parameter from its gradient, and drop the gradient. Without a gradient nothing happens."""
        gradient, slot.parameter.grad = slot.parameter.grad, None
        if gradient is None:
            return
        gradient = gradient.float()
        if slot.kept is not None:
            gradient = gradient * slot.kept
        first = second = move = None
        if slot.moments is not None:
            first, second = (m.to(gradient.device, torch.float32) for m in slot.moments)
            if "credit" in slot.sums and slot.steps:
                move = self._move(slot, first, second)
        for name, total in slot.sums.items():
            new = total.to(gradient.device, torch.float32)
            STATISTICS[name](new, Step(slot.value, gradient, move))
            self._write(total, new)
        if slot.moments is None or first is None or second is None:
            return
        slot.steps += 1
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        slot.value.add_(self._move(slot, first, second))
        if slot.master is not None:
            slot.parameter.copy_(slot.master)
        for moment, new in zip(slot.moments, (first, second), strict=True):
            self._write(moment, new)

    @staticmethod
    def _move(slot: Slot, first: Tensor, second: Tensor) -> Tensor:
        """Adam's update, from the moments of step `slot.steps`."""
        denominator = (second / (1 - BETAS[1] ** slot.steps)).sqrt_().add_(EPS)
        return (first / denominator).mul_(-slot.rate / (1 - BETAS[0] ** slot.steps))

    def _write(self, kept: Tensor, new: Tensor) -> None:
        if kept is new:
            return
        if kept.dtype == torch.bfloat16:
            # Stochastic rounding: a bfloat16 is the upper half of a float32, so a random number is added to the lower
            # half before it is cut off. Rounding to nearest would lose every change below 0.4 %.
            device = self.rounding.device
            noise = torch.randint(0, 1 << 16, new.shape, generator=self.rounding, dtype=torch.int32, device=device)
            noise = noise.to(new.device)
            new = ((new.contiguous().view(torch.int32) + noise) & ~0xFFFF).view(torch.float32)
        kept.copy_(new)

    def rewind(self) -> None:
        """Reset all parameters, moments and sums to the start of the search."""
        for slot in self.slots:
            slot.set(slot.begin)
            slot.forget()

    def undo(self) -> None:
        """Reset all parameters to their values before the search, or before it was resumed."""
        for slot in self.slots:
            slot.set(slot.before)

    def evidence(self, slot: Slot, criterion: Criterion, seed: int) -> Evidence:
        """The evidence about a parameter. Its tensors are copies, since a criterion may work in place."""
        device = slot.parameter.device
        return Evidence(
            slot.name,
            slot.before.to(device, copy=True),
            slot.value.clone() if criterion.trains else None,
            {name: total.to(device, torch.float32, copy=True) for name, total in slot.sums.items()},
            seed,
        )

    def fingerprint(self) -> list[float]:
        """Numbers that identify the candidates' values: their count, their elements, and the sum of magnitudes."""
        values = [slot.before for slot in self.slots if slot.is_candidate]
        magnitude = sum(float(v.double().abs().sum()) for v in values)  # one copy at a time
        return [len(values), sum(v.numel() for v in values), magnitude]

    def has_evidence(self) -> bool:
        """Whether any candidate has changed or has had a gradient."""
        return any(
            not torch.equal(slot.value, slot.before.to(slot.value)) or any(total.any() for total in slot.sums.values())
            for slot in self.slots
            if slot.is_candidate
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the training, for a search that resumes."""
        state = {f"{slot.name}:{key}": tensor for slot in self.slots for key, tensor in slot.tensors().items()}
        return state | {"rounding": self.rounding.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for slot in self.slots:
            prefix = f"{slot.name}:"
            slot.restore({key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)})
        self.rounding.set_state(state["rounding"])

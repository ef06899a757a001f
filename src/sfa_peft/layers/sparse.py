"""The internal adapter: trained values at a few positions of frozen parameters, and its autograd function.

Forward computes the changed weight ``W + delta``, uses it and drops it. Backward computes it again, and takes only the
chosen positions from the gradient of the weight (for rows and columns it computes only those). So no tensor of the
weight's size is kept between forward and backward, the optimizer gets none, and `W` gets no gradient. Both use the
changed weight that is kept between forward passes (`ChangedParameters`), if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .bottleneck import autocasts, cast_input
from .granularity import Granularity, position_dtype
from .ops import Op, Used

PARAMETERS = ("weight", "bias")
POSITIONS = {name: f"{name}_positions" for name in PARAMETERS}  # the buffers


class Changeable(Protocol):
    """A leaf that internal adapters change, or tensors with its shapes."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


class SparseDelta(nn.Module):
    """The internal change that one adapter makes to one module.

    For each changed parameter `p` (``weight``, ``bias``) it holds the trained values as parameter `p` and the sorted
    positions as buffer ``p_positions``. A position is the index of a unit. The values of k units have shape ``(k,)``
    for elements and ``(k, unit size)`` for rows and columns.

    Args:
        module: The module whose parameters are changed. Only their shapes, dtypes and devices are read.
        positions: For each changed parameter, the sorted positions, a 1-D integer tensor.
        granularity: The unit that a position counts.
        init_weights: With False the values start as small noise instead of zeros (for tests).
    """

    def __init__(
        self,
        module: Changeable,
        positions: Mapping[str, Tensor],
        granularity: Granularity,
        init_weights: bool = True,
    ) -> None:
        super().__init__()
        self.granularity = granularity
        self.changed = tuple(name for name in PARAMETERS if name in positions)
        for name in self.changed:
            parameter = getattr(module, name)
            shape = self.granularity.values_shape(parameter.shape, len(positions[name]))
            values = torch.zeros(shape) if init_weights else torch.randn(shape) * 0.02
            self.register_parameter(name, nn.Parameter(values.to(dtype=parameter.dtype, device=parameter.device)))
            dtype = position_dtype(self.granularity.count(parameter.shape))
            # Copied, since one ticket may be installed in several models.
            copied = positions[name].to(dtype=dtype, device=parameter.device, copy=True)
            self.register_buffer(POSITIONS[name], copied)

    # Read from the dicts, since a step reads them for every layer, and `getattr` of a module is slow. They may be no
    # parameters there: in replicas of nn.DataParallel, or behind a parametrization.

    def values(self, name: str) -> Tensor:
        values = self._parameters.get(name)
        return getattr(self, name) if values is None else values

    def positions(self, name: str) -> Tensor:
        positions = self._buffers.get(POSITIONS[name])
        return getattr(self, POSITIONS[name]) if positions is None else positions

    @property
    def changes(self) -> list[Change]:
        """The values of each changed parameter, with their positions."""
        return [Change(name, self.granularity, self.positions(name), self.values(name)) for name in self.changed]

    @property
    def num_values(self) -> int:
        return sum(self.values(name).numel() for name in self.changed)

    def extra_repr(self) -> str:
        return f"{self.num_values} values, granularity={self.granularity.name}"


class Kept(NamedTuple):
    """The changed parameters of a leaf, and the version of their memory when they were read."""

    weight: Tensor
    bias: Tensor | None
    flat: Tensor
    version: int

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    @property
    def is_unchanged(self) -> bool:
        return self.flat._version == self.version


class Change(NamedTuple):
    """The values that are added at some positions of one parameter."""

    name: str
    granularity: Granularity
    positions: Tensor
    values: Tensor


def changes_of(deltas: Sequence[SparseDelta]) -> list[Change]:
    return [change for delta in deltas for change in delta.changes]


def changed_parameter(parameter: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """A new tensor ``parameter + changes`` in `dtype`. The sum is computed in the wider dtype of the two terms."""
    result = parameter.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    source = parameter.detach().contiguous()
    for change in changes:
        positions = change.positions.long()
        old = change.granularity.read(source, positions)
        change.granularity.write(result, positions, (old + change.values.detach()).to(dtype))
        source = result
    return result


def _traced_parameter(parameter: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """Same as `changed_parameter`, but without writes to a view, which ONNX's older exporter does not export."""
    source = parameter.detach().reshape(-1)
    result = source.to(dtype)
    numbers = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
    for change in changes:
        at = change.granularity.read(numbers, change.positions.long()).reshape(-1)
        new = source.index_select(0, at) + change.values.reshape(-1)
        result = source = result.scatter(0, at, new.to(dtype))
    return result.view(parameter.shape)


class Call(NamedTuple):
    """How a leaf is run with changes, beside its tensors.

    Attributes:
        op: What it computes.
        dtype: That of the computation.
        layout: For each change, the parameter and the granularity.
        kept: The changed parameters, if they are kept between forward passes.
    """

    op: Op
    dtype: torch.dtype
    layout: tuple[tuple[str, Granularity], ...]
    kept: Kept | None


class SparseDeltaFunction(torch.autograd.Function):
    """The op of a module with changed parameters. Computes gradients of the input and of the values only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, *tensors: Tensor) -> Tensor:
        op, dtype, layout, kept = call
        changed = _changed(weight, bias, _unflatten(layout, tensors), dtype) if kept is None else kept.parameters
        y, saved = op.forward(x, *changed)
        ctx.call, ctx.num_saved = call, len(saved)
        ctx.save_for_backward(x, weight, bias, *saved, *tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *rest = ctx.saved_tensors
        op, dtype, layout, kept = ctx.call
        saved, changes = tuple(rest[: ctx.num_saved]), _unflatten(layout, rest[ctx.num_saved :])
        # The gradient has the dtype of the op's output, which is this dtype, with and without autocast. What is kept
        # may have changed in a later forward pass, such as that of another adapter.
        is_kept = kept is not None and kept.is_unchanged
        new_weight, new_bias = kept.parameters if is_kept else _changed(weight, bias, changes, dtype)

        needs_x, *needs = ctx.needs_input_grad
        is_wanted = needs[FIRST_CHANGE::2]
        grads: list[Tensor | None] = [None] * len(changes)
        for i, change in enumerate(changes):
            if is_wanted[i] and change.name == "weight":
                units = op.grad_units(grad, x, new_weight, change.granularity, change.positions)
                grads[i] = None if units is None else units.reshape(change.values.shape)
        whole = {c.name for c, own, wanted in zip(changes, grads, is_wanted, strict=True) if wanted and own is None}
        grad_x, *dense = op.gradients(
            grad, Used(x, new_weight, new_bias, saved), (needs_x, "weight" in whole, "bias" in whole)
        )

        result: list[Tensor | None] = [grad_x, None, None, None]
        for change, own, wanted in zip(changes, grads, is_wanted, strict=True):
            if wanted:
                if own is None:
                    full = dense[PARAMETERS.index(change.name)].contiguous()
                    own = change.granularity.read(full, change.positions)
                own = own.to(change.values.dtype)
            result += (None, own)
        return tuple(result)


# The arguments of `SparseDeltaFunction.forward` between `x` and the values of the first change.
FIRST_CHANGE = 4


def _unflatten(layout: Sequence[tuple[str, Granularity]], tensors: Sequence[Tensor]) -> list[Change]:
    return [Change(*layout[i], tensors[2 * i], tensors[2 * i + 1]) for i in range(len(layout))]


def _changed(
    weight: Tensor,
    bias: Tensor | None,
    changes: Sequence[Change],
    dtype: torch.dtype,
    change: Callable[[Tensor, Sequence[Change], torch.dtype], Tensor] = changed_parameter,
) -> tuple[Tensor, Tensor | None]:
    def new(parameter: Tensor, name: str) -> Tensor:
        selected = [c for c in changes if c.name == name]
        return change(parameter, selected, dtype) if selected else parameter.to(dtype)

    return new(weight, "weight"), None if bias is None else new(bias, "bias")


def sparse_forward(
    op: Op,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[SparseDelta],
    kept: Kept | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Run `op` on `x`, with the sum of all `deltas` added to `weight` and `bias`.

    `kept` are these sums, and `dtype` that of the computation, if they are known.
    """
    changes = changes_of(deltas)
    dtype = op.compute_dtype(x, weight) if dtype is None else dtype
    if x.dtype != dtype and autocasts(x):
        x = cast_input(x, dtype)
    if torch.jit.is_tracing():  # TorchScript supports no autograd functions
        return op.forward(x, *_changed(weight, bias, changes, dtype, _traced_parameter))[0]
    if not torch.is_grad_enabled():
        return op.forward(x, *(_changed(weight, bias, changes, dtype) if kept is None else kept.parameters))[0]
    layout = tuple((change.name, change.granularity) for change in changes)
    tensors = [t for change in changes for t in (change.positions, change.values)]
    y: Tensor = SparseDeltaFunction.apply(x, weight, bias, Call(op, dtype, layout, kept), *tensors)
    return y

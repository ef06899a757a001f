"""The kinds of leaf that take internal adapters, each with its op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .adapted import SFALayer
from .leaves import base_layer_of
from .ops import Conv2dOp, LayerNormOp, LinearOp
from .quantized import is_quantized, parameters_of, zeros_like_parameters
from .sparse import PARAMETERS, Changeable, SparseDelta, sparse_forward


class Linear(SFALayer):
    """SFA on `nn.Linear`."""

    takes_internal = True

    @property
    def op(self) -> LinearOp:
        return LinearOp()


class Conv2d(SFALayer):
    """SFA on `nn.Conv2d` with any padding, stride, dilation and groups."""

    takes_internal = True

    @property
    def op(self) -> Conv2dOp:
        base = cast(nn.Conv2d, self.get_base_layer())
        padded = base.padding_mode != "zeros"
        padding = (0, 0) if padded or isinstance(base.padding, str) else base.padding
        return Conv2dOp(base.stride, padding, base.dilation, base.groups)

    def _changed_forward(self, x: Tensor, deltas: Sequence[SparseDelta], keeps: bool = False) -> Tensor:
        base = cast(nn.Conv2d, self.get_base_layer())
        unbatched = x.dim() == 3
        if unbatched:
            x = x.unsqueeze(0)
        if base.padding_mode != "zeros" or base.padding == "same":
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
        y = super()._changed_forward(x, deltas, keeps)
        return y.squeeze(0) if unbatched else y


class LayerNorm(SFALayer):
    """SFA on `nn.LayerNorm` with learned weight."""

    takes_internal = True

    @property
    def op(self) -> LayerNormOp:
        base = cast(nn.LayerNorm, self.get_base_layer())
        return LayerNormOp(base.normalized_shape, base.eps)


class QuantizedLinear(SFALayer):
    """SFA on a linear layer with a quantized weight, which is not changed: ``y = base(x) + x @ delta.T``."""

    takes_internal = True

    @property
    def op(self) -> LinearOp:
        return LinearOp()

    @property
    def changeable(self) -> Changeable:
        return zeros_like_parameters(cast(nn.Linear, self.get_base_layer()))

    def _changed_forward(self, x: Tensor, deltas: Sequence[SparseDelta], keeps: bool = False) -> Tensor:
        y = self._base_forward(x)
        zeros = zeros_like_parameters(cast(nn.Linear, self.get_base_layer()), x.dtype)
        return y + sparse_forward(self.op, x, zeros.weight, zeros.bias, deltas).to(y.dtype)


LAYERS: dict[type[nn.Module], type[SFALayer]] = {nn.Linear: Linear, nn.Conv2d: Conv2d, nn.LayerNorm: LayerNorm}


def layer_class(module: nn.Module) -> type[SFALayer]:
    """The SFA layer for a leaf. A subclass that overrides `forward` takes external adapters only."""
    if is_quantized(module):
        return QuantizedLinear
    for kind, layer in LAYERS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return layer
    return SFALayer


def internal_parameters(module: nn.Module | None) -> dict[str, nn.Parameter]:
    """The parameters that a ticket may choose from: the learned ``weight`` and ``bias`` of a leaf.

    Empty if the leaf takes no internal adapters. For a quantized weight it is a meta tensor, which has only the shape.
    """
    if module is None:
        return {}
    module = base_layer_of(module)
    if not layer_class(module).takes_internal:
        return {}
    if is_quantized(module):
        return parameters_of(module)
    return {name: p for name in PARAMETERS if isinstance(p := getattr(module, name, None), nn.Parameter)}

"""Quantized linear layers, of every backend that PEFT can dequantize (bitsandbytes, torchao).

Their weights cannot be changed at a few positions, but an internal change need not touch them: what it adds to the
output is ``x @ delta.T``, whatever the weight is.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeGuard

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # what torchao's tensors and DTensor are


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is another library's, with its numbers elsewhere; a `DTensor` is torch's own."""
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "device_mesh")


def is_quantized(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer with a quantized weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        return False
    return not weight.is_floating_point() or is_wrapped(weight)


def numel(parameter: Tensor) -> int:
    """How many numbers a parameter stands for; bitsandbytes packs two of 4 bits into one."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


class Zeros(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def zeros_like_parameters(module: nn.Linear, dtype: torch.dtype | None = None) -> Zeros:
    """Zeros of the shapes of a quantized layer's ``weight`` and ``bias``, without memory of their own.

    Their dtype is `dtype`, or that of the weight, or float32 for one of integers.
    """
    if dtype is None:
        dtype = module.weight.dtype if module.weight.is_floating_point() else torch.float32
    zero = torch.zeros((), dtype=dtype, device=module.weight.device)
    out, into = module.out_features, module.in_features
    return Zeros(zero.expand(out, into), None if module.bias is None else zero.expand(out))


def parameters_of(module: nn.Linear) -> dict[str, nn.Parameter]:
    """What a ticket may choose from in a quantized layer; the weight has its shape, and no numbers."""
    weight = torch.empty(module.out_features, module.in_features, device="meta")
    found = {"weight": nn.Parameter(weight, requires_grad=False)}
    return found if module.bias is None else found | {"bias": module.bias}


def dequantized(module: nn.Linear) -> Tensor:
    """The weight of a quantized layer as numbers, of shape ``(out_features, in_features)``.

    Raises:
        ValueError: If it cannot be read.
    """
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"bitsandbytes has packed the weight of a {type(module).__name__} for inference on a CPU, where it cannot "
            f"be read any more: add the adapter before the first forward pass in eval mode."
        )
    # PEFT's function puts the weight and the state of bitsandbytes' 8-bit layers into another form, in which they do
    # not run any more; so it gets a module of its own around the same weight.
    shell = copy.copy(module)
    shell._parameters = dict(module._parameters)
    if hasattr(module, "state"):
        shell.state = copy.copy(module.state)
    return dequantize_module_weight(shell).detach().reshape(module.out_features, module.in_features)

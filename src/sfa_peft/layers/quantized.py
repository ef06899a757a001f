"""Quantized linear layers, of every backend that PEFT can dequantize (bitsandbytes, torchao).

The values of a quantized weight cannot be changed one by one. The internal adapter adds ``x @ delta.T`` to the output
instead, which does not depend on the weight.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeGuard

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # what torchao's tensors and DTensor are


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is a quantized tensor subclass, as torchao's. torch's `DTensor` is not one."""
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "device_mesh")


def is_quantized(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer with a quantized weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        return False
    return not weight.is_floating_point() or is_wrapped(weight)


def numel(parameter: Tensor) -> int:
    """The number of elements before quantization. bitsandbytes packs two 4-bit elements into one."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


class Zeros(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def zeros_like_parameters(module: nn.Linear, dtype: torch.dtype | None = None) -> Zeros:
    """Zeros in the shapes of a quantized layer's ``weight`` and ``bias``. They are expanded, so they take no memory.

    Their dtype is `dtype` if given. Otherwise it is the weight's, or float32 if the weight holds integers.
    """
    if dtype is None:
        dtype = module.weight.dtype if module.weight.is_floating_point() else torch.float32
    zero = torch.zeros((), dtype=dtype, device=module.weight.device)
    out, into = module.out_features, module.in_features
    return Zeros(zero.expand(out, into), None if module.bias is None else zero.expand(out))


def parameters_of(module: nn.Linear) -> dict[str, nn.Parameter]:
    """The parameters of a quantized layer that a ticket may choose from. The weight is a meta tensor."""
    weight = torch.empty(module.out_features, module.in_features, device="meta")
    found = {"weight": nn.Parameter(weight, requires_grad=False)}
    return found if module.bias is None else found | {"bias": module.bias}


def dequantized(module: nn.Linear) -> Tensor:
    """The dequantized weight of a quantized layer, of shape ``(out_features, in_features)``.

    Raises:
        ValueError: If bitsandbytes has packed the weight for CPU inference.
    """
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"bitsandbytes has packed the weight of a {type(module).__name__} for inference on a CPU, so it cannot be "
            f"read any more: add the adapter before the first forward pass in eval mode."
        )
    # PEFT's function converts the weight and the state of bitsandbytes' 8-bit layers to a form in which the layer no
    # longer runs. So it gets a copy of the module with the same weight.
    shell = copy.copy(module)
    shell._parameters = dict(module._parameters)
    if hasattr(module, "state"):
        shell.state = copy.copy(module.state)
    return dequantize_module_weight(shell).detach().reshape(module.out_features, module.in_features)

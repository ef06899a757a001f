"""The fingerprint of a base model: identifies the base weights used in training.

One value of every parameter is kept, so that the same weights in another dtype still match. With a hash they would
not. Only a few hundred numbers are read, whatever the size of the model.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Parameters = Sequence[tuple[str, Tensor]]
HALF = (torch.bfloat16, torch.float16)


class BaseMismatchWarning(UserWarning):
    """An adapter is loaded into a base model whose weights differ from the base weights used in training.

    To turn it into an error, so that nothing is loaded:
    ``warnings.simplefilter("error", sfa_peft.BaseMismatchWarning)``.
    """


@dataclass(frozen=True)
class Fingerprint:
    """A sample of a base model's weights.

    Attributes:
        roots: The modules whose parameters are covered; "" is the whole model.
        layout: Digest of the shapes of the parameters, in model order.
        samples: The middle value of each parameter, float32 of shape ``(parameters,)``.
    """

    roots: tuple[str, ...]
    layout: str
    samples: Tensor

    @classmethod
    def of(cls, roots: Sequence[str], parameters: Parameters) -> Fingerprint | None:
        """The fingerprint of parameters. None if one is not readable (quantized, sharded) or not floating-point."""
        if not parameters or any(_is_elsewhere(p) or not p.is_floating_point() for _, p in parameters):
            return None
        layout = hashlib.sha256(str([tuple(p.shape) for _, p in parameters]).encode()).hexdigest()[:16]
        return cls(tuple(roots), layout, _middles([p for _, p in parameters]))

    def differences(self, parameters: Parameters) -> list[str] | None:
        """The names of the parameters whose values differ. A cast to another dtype is no difference.

        None if the shapes differ. Empty if `parameters` have no fingerprint, since then nothing can be compared.
        """
        other = Fingerprint.of(self.roots, parameters)
        if other is None:
            return []
        if self.layout != other.layout or len(self.samples) != len(other.samples):
            return None
        differ = ~_same(self.samples, other.samples)
        return [parameters[i][0] for i in differ.nonzero().flatten().tolist()]

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as JSON values."""
        return {
            "roots": list(self.roots),
            "layout": self.layout,
            "samples": base64.b85encode(self.samples.numpy().astype("<f4").tobytes()).decode(),
        }

    @classmethod
    def from_dict(cls, described: Any) -> Fingerprint:
        """Undo `to_dict`.

        Raises:
            ValueError: If `described` is not a fingerprint.
        """
        try:
            samples = torch.frombuffer(bytearray(base64.b85decode(described["samples"])), dtype=torch.float32)
            roots = tuple(str(root) for root in described["roots"])
            layout = str(described["layout"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a fingerprint: {error}") from error
        return cls(roots, layout, samples)


def _is_elsewhere(p: Tensor) -> bool:
    """Whether the values cannot be read here: meta tensors, tensor subclasses (`DTensor`, torchao's quantized
    tensors), and shards of DeepSpeed's ZeRO-3.
    """
    return p.is_meta or is_traceable_wrapper_subclass(p) or hasattr(p, "ds_id")


@torch.no_grad()
def _middles(parameters: Sequence[Tensor]) -> Tensor:
    """The middle value of each parameter, as float32; 0 for an empty parameter."""
    middles = []
    for p in parameters:
        if p.is_contiguous() and p.numel():
            middles.append(p.as_strided((), (), p.storage_offset() + p.numel() // 2))  # faster than indexing
        else:
            flat = p.reshape(-1)
            middles.append(flat[len(flat) // 2] if len(flat) else torch.zeros(()))
    if len({(m.dtype, m.device) for m in middles}) > 1:
        middles = [m.float().cpu() for m in middles]
    return torch.stack(middles).float().cpu()


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Which values of `a` and `b`, in float32, can be casts of the same value.

    The dtype of a model says little about its values: it may have been cast to half precision and back.
    """
    same = (a == b) | (a.isnan() & b.isnan())
    for chain in (HALF[:1], HALF[1:], HALF, HALF[::-1]):
        same |= (_through(a, chain) == b) | (_through(b, chain) == a)
    a_is, b_is = ([_through(x, (half,)) == x for half in HALF] for x in (a, b))
    # Two roundings of one value: bfloat16 has 8 bits of precision, float16 a smallest step of 2**-24 and a largest
    # value of 65504.
    larger, smaller = torch.maximum(a.abs(), b.abs()), torch.minimum(a.abs(), b.abs())
    are_close = ((a - b).abs() <= 1.3 * 2**-8 * larger) | (larger.isinf() & (smaller >= 65000))
    is_one_of_each = ((a_is[0] & b_is[1]) | (a_is[1] & b_is[0])) & ~(a_is[0] & b_is[0])
    are_tiny = (a - b).abs() <= 2**-23
    return same | (is_one_of_each & are_close) | ((a_is[0] | a_is[1]) & (b_is[0] | b_is[1]) & are_tiny)


def _through(values: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    for dtype in dtypes:
        values = values.to(dtype)
    return values.float()

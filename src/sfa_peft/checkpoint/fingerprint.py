"""The fingerprint of a base model: identifies the base weights used in training.

One value of every parameter is kept, so that the same weights in another dtype still match. With a hash they would
not. Only a few hundred numbers are read, whatever the size of the model.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Parameters = Sequence[tuple[str, Tensor]]
WIDE = (torch.float32, torch.float64)
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
        dtypes: The dtypes of the parameters, run-length encoded: ``((dtype, count), ...)``.
        samples: The middle value of each parameter, float32 of shape ``(parameters,)``.
    """

    roots: tuple[str, ...]
    layout: str
    dtypes: tuple[tuple[str, int], ...]
    samples: Tensor

    @classmethod
    def of(cls, roots: Sequence[str], parameters: Parameters) -> Fingerprint | None:
        """The fingerprint of parameters. None if one is not readable (quantized, sharded) or not floating-point."""
        if not parameters or any(_is_elsewhere(p) or not p.is_floating_point() for _, p in parameters):
            return None
        runs = [
            (str(dtype).removeprefix("torch."), len(list(run)))
            for dtype, run in groupby(p.dtype for _, p in parameters)
        ]
        layout = hashlib.sha256(str([tuple(p.shape) for _, p in parameters]).encode()).hexdigest()[:16]
        return cls(tuple(roots), layout, tuple(runs), _middles([p for _, p in parameters]))

    def differences(self, parameters: Parameters) -> list[str] | None:
        """The names of the parameters whose values differ. A cast to another dtype is no difference.

        None if the shapes differ. Empty if `parameters` have no fingerprint, since then nothing can be compared.
        """
        other = Fingerprint.of(self.roots, parameters)
        if other is None:
            return []
        if self.layout != other.layout or len(self.samples) != len(other.samples):
            return None
        differ = torch.zeros(len(parameters), dtype=torch.bool)
        at = 0
        for (a_dtype, b_dtype), run in groupby(zip(self._each_dtype(), other._each_dtype(), strict=True)):
            end = at + len(list(run))
            differ[at:end] = ~_same(self.samples[at:end], a_dtype, other.samples[at:end], b_dtype)
            at = end
        return [parameters[i][0] for i in differ.nonzero().flatten().tolist()]

    def _each_dtype(self) -> Iterator[torch.dtype]:
        for name, count in self.dtypes:
            yield from repeat(getattr(torch, name), count)

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as JSON values."""
        return {
            "roots": list(self.roots),
            "layout": self.layout,
            "dtypes": [list(run) for run in self.dtypes],
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
            dtypes = tuple((str(name), int(count)) for name, count in described["dtypes"])
            roots = tuple(str(root) for root in described["roots"])
            layout = str(described["layout"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a fingerprint: {error}") from error
        known = all(isinstance(getattr(torch, name, None), torch.dtype) and count > 0 for name, count in dtypes)
        if not known or sum(count for _, count in dtypes) != len(samples):
            raise ValueError("not a fingerprint: dtypes and samples disagree")
        return cls(roots, layout, dtypes, samples)


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


def _same(a: Tensor, a_dtype: torch.dtype, b: Tensor, b_dtype: torch.dtype) -> Tensor:
    """Which values of `a` and `b` can be casts of the same value."""
    if a_dtype == b_dtype or (a_dtype in WIDE and b_dtype in WIDE):
        same = (a == b) | (a.isnan() & b.isnan())
        for half in HALF:  # one of them may have been cast to half precision and back
            same |= (a.to(half) == b) | (b.to(half) == a)
        return same
    if a_dtype in WIDE or b_dtype in WIDE:
        narrow = b_dtype if a_dtype in WIDE else a_dtype
        return a.to(narrow) == b.to(narrow)
    # bfloat16 and float16 round differently: bfloat16 has 8 bits of precision, and float16 a smallest step of 2**-24.
    return (a - b).abs() <= 2**-8 * torch.maximum(a.abs(), b.abs()) + 2**-24

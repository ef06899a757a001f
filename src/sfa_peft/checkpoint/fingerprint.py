"""The fingerprint of a base model: tells the weights that an adapter was trained on from others.

One value of every parameter is kept as it is, so that a cast of the same weights can be told from other weights; a
hash could not do that. Reading them touches some hundred numbers, whatever the size of the model.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Parameters = Sequence[tuple[str, Tensor]]
WIDE = (torch.float32, torch.float64)


class BaseMismatchWarning(UserWarning):
    """An adapter is loaded into a base model with other weights than those that it was trained on.

    To make it an error: ``warnings.simplefilter("error", sfa_peft.BaseMismatchWarning)``. Nothing is loaded then.
    """


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a base model's weights.

    Attributes:
        roots: The modules whose parameters these are; "" is the whole model.
        layout: Digest of the parameters' shapes, in model order.
        dtypes: The parameters' dtypes, run by run: ``((dtype, count), ...)``.
        samples: The value in the middle of each parameter, float32 of shape ``(parameters,)``.
    """

    roots: tuple[str, ...]
    layout: str
    dtypes: tuple[tuple[str, int], ...]
    samples: Tensor

    @classmethod
    def of(cls, roots: Sequence[str], parameters: Parameters) -> Fingerprint | None:
        """The fingerprint of floating-point parameters; None if some cannot be read (quantised, or without data)."""
        if not parameters or any(p.is_meta or not p.is_floating_point() for _, p in parameters):
            return None
        runs: list[tuple[str, int]] = []
        for _, p in parameters:
            name = str(p.dtype).removeprefix("torch.")
            count = runs.pop()[1] if runs and runs[-1][0] == name else 0
            runs.append((name, count + 1))
        shapes = json.dumps([list(p.shape) for _, p in parameters])
        samples = torch.stack([_middle(p).float().cpu() for _, p in parameters])
        return cls(tuple(roots), hashlib.sha256(shapes.encode()).hexdigest()[:16], tuple(runs), samples)

    def differences(self, parameters: Parameters) -> list[str] | None:
        """The names of the parameters that differ, not counting a cast to another dtype.

        None if the parameters have other shapes than those of the fingerprint.
        """
        other = Fingerprint.of(self.roots, parameters)
        if other is None:
            return []
        if self.layout != other.layout or len(self.samples) != len(other.samples):
            return None
        pairs = zip(self._each(), other._each(), parameters, strict=True)
        return [name for (a, a_dtype), (b, b_dtype), (name, _) in pairs if not _same(a, a_dtype, b, b_dtype)]

    def _each(self) -> list[tuple[Tensor, torch.dtype]]:
        dtypes = [getattr(torch, name) for name, count in self.dtypes for _ in range(count)]
        return list(zip(self.samples, dtypes, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "roots": list(self.roots),
            "layout": self.layout,
            "dtypes": [list(run) for run in self.dtypes],
            "samples": base64.b85encode(self.samples.numpy().astype("<f4").tobytes()).decode(),
        }

    @classmethod
    def from_dict(cls, described: Any) -> Fingerprint:
        """From what `to_dict` gave.

        Raises:
            ValueError: If it is something else.
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


def _middle(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)  # a view of what is contiguous
    return flat[len(flat) // 2] if len(flat) else torch.zeros(())


def _same(a: Tensor, a_dtype: torch.dtype, b: Tensor, b_dtype: torch.dtype) -> bool:
    """Whether two values can be casts of one."""
    if a_dtype == b_dtype or (a_dtype in WIDE and b_dtype in WIDE):
        return bool(a == b) or bool(a.isnan() and b.isnan())
    if a_dtype in WIDE or b_dtype in WIDE:
        narrow = b_dtype if a_dtype in WIDE else a_dtype
        return bool(a.to(narrow) == b.to(narrow))
    # Two narrow dtypes: each has rounded the value in its own way. bfloat16 keeps 8 bits, float16 has a smallest step.
    return bool((a - b).abs() <= 2**-8 * torch.maximum(a.abs(), b.abs()) + 2**-24)

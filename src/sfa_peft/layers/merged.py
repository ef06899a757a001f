"""External adapters of a merged model, which run in forward hooks on plain leaves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .parallel import InputOf


class AddExternals:
    """The forward hook that adds a merged model's external adapters. They are submodules of the hooked leaf."""

    def __init__(self, names: list[str], inputs: dict[str, InputOf]) -> None:
        self.names, self.inputs = names, inputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        result = output
        for name in self.names:
            external, parallel = (getattr(module, f"{kind}_{name}", None) for kind in ("external", "parallel"))
            if external is not None:
                result = result + external(output)
            if parallel is not None:
                result = result + parallel(self.inputs[name].take()).to(output)
        return result

"""Launches of a training step and of an inference of each method, counted without a GPU.

A launch is an operation that computes: views and metadata are left out. On a GPU, models up to the size of ViT-B at
usual batch sizes are bound by them. Counted under bfloat16 autocast, as on a GPU, with PyTorch's foreach AdamW.

    python benchmarks/launches.py --model dinov2-s
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from step_time import LINEARS, MODELS, loss_of, methods

# Operations that only describe memory anew.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "lift_fresh", "narrow", "permute",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    "view_as", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "_version", "promote_types", "is_same_size", "_local_scalar_dense", "dropout",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operations inside that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def infer(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)


def counted(function: Any, *args: Any) -> Launches:
    """The launches of one call, after others that have warmed up."""
    for _ in range(3):
        function(*args)
    with Launches() as launches:
        function(*args)
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dinov2-s")
    parser.add_argument("--only", nargs="+", help="Only methods whose names have one of these texts.")
    parser.add_argument("--detail", action="store_true", help="Print the count of each operation.")
    parser.add_argument("--json", type=Path, help="Write the counts to a file.")
    args = parser.parse_args()
    lora = get_peft_model(MODELS[args.model](), LoraConfig(r=8, target_modules=LINEARS))
    budget = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    x = torch.randn(1, 3, 224, 224)
    found: dict[str, tuple[int, int]] = {}
    base = MODELS[args.model]().eval().requires_grad_(False)
    found["base"] = 0, counted(infer, base, x).total
    for name, adapt in methods(budget).items():
        if args.only and not any(text in name for text in ("LoRA", *args.only)):
            continue
        model = adapt(MODELS[args.model]()).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        training = counted(step, model, torch.optim.AdamW(trained, lr=1e-4, foreach=True), x)
        inference = counted(infer, model.eval(), x)
        found[name] = training.total, inference.total
        if args.detail:
            print(name, "step", training.counts.most_common(25))
            print(name, "inference", inference.counts.most_common(12))
    print(f"{args.model}, bfloat16 autocast, foreach AdamW")
    print(f"{'method':<22} {'step':>6} {'to LoRA':>8} {'inference':>10} {'to base':>8}")
    for name, (steps, inferences) in found.items():
        to_lora = steps / found["LoRA r=8"][0]
        print(f"{name:<22} {steps:>6} {to_lora:>8.2f} {inferences:>10} {inferences / found['base'][1]:>8.2f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

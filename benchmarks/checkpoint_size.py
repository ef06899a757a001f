"""Bytes of a saved adapter beside PEFT's LoRA, SHiRA and Super-Tuning with the same number of trained parameters.

Built from configs with random weights, and saved as PEFT saves them. For SFA, the bound is what its values take and
log2 C(n, k) bits for its positions, without names; `overhead` is what the file takes beyond that.


    python benchmarks/checkpoint_size.py --model swin-t
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from math import lgamma, log
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn

from sfa_peft import SFAConfig, ticket_of

from step_time import LINEARS, MODELS

RANKS = (1, 4, 16)


def bound(units: int, count: int) -> float:
    """log2 C(units, count) in bytes."""
    return (lgamma(units + 1) - lgamma(count + 1) - lgamma(units - count + 1)) / log(2) / 8


def positions_bound(model: PeftModel) -> float:
    """The bound for the positions of all parameters."""
    ticket = ticket_of(model)
    return sum(
        bound(ticket.granularity.count(ticket.shapes[name]), len(own)) for name, own in ticket.by_name().items()
    )


def supertuning(model: nn.Module, budget: int) -> PeftModel:
    total = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight") and n.split(".")[-2] in LINEARS)
    return get_peft_model(model, SupertuningConfig(sparsity=1 - budget / total, target_modules=LINEARS))


def methods(rank: int, budget: int) -> dict[str, Callable[[nn.Module], PeftModel]]:
    def sfa(share: float, **options: str) -> Callable[[nn.Module], PeftModel]:
        config = SFAConfig(
            budget=budget, external_share=share, initial_ticket="random", target_modules=LINEARS, **options
        )
        return lambda model: get_peft_model(model, config)

    return {
        "LoRA": lambda model: get_peft_model(model, LoraConfig(r=rank, target_modules=LINEARS)),
        "SHiRA": lambda model: get_peft_model(model, ShiraConfig(r=rank, target_modules=LINEARS)),
        "Super-Tuning": lambda model: supertuning(model, budget),
        "SFA internal": sfa(0.0),
        "SFA internal, bfloat16": sfa(0.0, values_dtype="bfloat16"),
        "SFA internal, rows": sfa(0.0, internal_granularity="row"),
        "SFA both": sfa(0.5),
        "SFA both, bfloat16": sfa(0.5, values_dtype="bfloat16"),
        "SFA external": sfa(1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="swin-t")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="Of LoRA; the others get as many numbers.")
    args = parser.parse_args()
    torch.manual_seed(0)
    base_bytes = sum(p.numel() * p.element_size() for p in MODELS[args.model]().parameters())
    print(f"{args.model}: the whole model takes {base_bytes:,} bytes")
    columns = ("trained", "weights file", "per value", "of LoRA", "of bound", "config", "save ms", "load ms")
    print(f"{'method':<24} " + " ".join(f"{column:>12}" for column in columns))
    for rank in args.ranks:
        lora = get_peft_model(MODELS[args.model](), LoraConfig(r=rank, target_modules=LINEARS))
        budget = sum(p.numel() for p in lora.parameters() if p.requires_grad)
        lora_bytes = None
        for name, adapt in methods(rank, budget).items():
            torch.manual_seed(0)
            model = adapt(MODELS[args.model]())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)  # the first one draws a picture
                began = time.perf_counter()
                model.save_pretrained(folder)
                saving = time.perf_counter() - began
                size = (Path(folder) / "adapter_model.safetensors").stat().st_size
                config = (Path(folder) / "adapter_config.json").stat().st_size
                torch.manual_seed(0)
                fresh = MODELS[args.model]()
                began = time.perf_counter()
                PeftModel.from_pretrained(fresh, folder)
                loading = time.perf_counter() - began
            lora_bytes = lora_bytes or size
            of_bound = ""
            if name.startswith("SFA"):
                width = 2 if "bfloat16" in name else 4
                of_bound = f"{size / (trained * width + positions_bound(model)):.3f}"
            row = (
                *(f"{trained:,}", f"{size:,}", f"{size / trained:.2f}", f"{size / lora_bytes:.2f}", of_bound),
                *(f"{config:,}", f"{1000 * saving:.0f}", f"{1000 * loading:.0f}"),
            )
            print(f"{name:<24} " + " ".join(f"{cell:>12}" for cell in row), flush=True)


if __name__ == "__main__":
    main()

"""What a search needs beside full fine-tuning: memory in tensors, and time per step.

Each way trains the same DINOv2 or Swin of random weights on random images for a few steps, in a process of its own, so
that the peak of one does not hide in another's. The memory is what the process holds above the model after it was
loaded: gradients, moments, copies, statistics and activations together. Full fine-tuning uses torch's AdamW.

    python benchmarks/search_memory.py --model dinov2-s --batch_size 2
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from sfa_peft import SFAConfig, search_ticket

from step_time import MODELS, loss_of

WAYS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {},
    "lottery": {"criterion": "lottery"},
    "lottery, bf16 moments": {"criterion": "lottery", "optimizer_state": "bf16"},
    "credit": {"criterion": "credit"},
    "fisher": {"criterion": "fisher"},
    "gradient": {"criterion": "gradient"},
}


def full(model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for x in batches:
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measure(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = MODELS[args.model]()
    size = sum(p.numel() for p in model.parameters())
    batches = [torch.randn(args.batch_size, 3, 224, 224) for _ in range(args.steps)]
    if args.way != "full fine-tuning":
        model = get_peft_model(model, SFAConfig(budget=0.02, external_share=0.0))
    with torch.no_grad():
        model(batches[0][:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if args.way == "full fine-tuning":
        full(model, batches)
    else:
        search_ticket(model, batches, steps=args.steps, loss_fn=loss_of, progress=False, **WAYS[args.way])
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"way": args.way, "mb": peak, "seconds": seconds / args.steps, "model_mb": 4 * size / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dinov2-s")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--way", choices=WAYS, help="Measure this one here, in this process.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.way:
        measure(args)
        return
    results = []
    for way in WAYS:
        done = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    reference = results[0]
    print(f"{args.model}, {reference['model_mb']:.0f} MB of weights, batch {args.batch_size}, {args.threads} threads")
    print(f"{'way':<24} {'peak MB above the model':>24} {'ratio':>6} {'s/step':>8} {'ratio':>6}")
    for r in results:
        print(
            f"{r['way']:<24} {r['mb']:>24.0f} {r['mb'] / reference['mb']:>6.2f} {r['seconds']:>8.2f} "
            f"{r['seconds'] / reference['seconds']:>6.2f}"
        )


if __name__ == "__main__":
    main()

"""Time to take and to compare the fingerprint of a base model, beside the time to load that model.

transformers maps a file into memory, so loading takes the time of building the modules; the weights are read when they
are used first, from the system's cache or from the disk.

python benchmarks/base_fingerprint.py --layers 16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model

from sfa_peft.checkpoint.fingerprint import Fingerprint


def median(work: Callable[[], object], times: int) -> float:
    """The median time of some calls in ms, after one that is not counted."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        found.append(1000 * (time.perf_counter() - began))
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="Of DINOv2-L's 24; 16 make 200 million parameters.")
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    config = Dinov2Config(hidden_size=1024, num_attention_heads=16, num_hidden_layers=args.layers, image_size=224)
    model = Dinov2Model(config)
    parameters = list(model.named_parameters())
    print(f"{sum(p.numel() for _, p in parameters):,} parameters in {len(parameters)} tensors")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)

        def read() -> None:
            for p in Dinov2Model.from_pretrained(folder).parameters():
                p.sum()

        def read_from_disk() -> None:
            for file in Path(folder).iterdir():
                with open(file, "rb") as handle:
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            read()

        os.sync()
        times = {
            "load the model": median(lambda: Dinov2Model.from_pretrained(folder), args.times),
            "load it and read its weights": median(read, args.times),
            "load it from the disk": median(read_from_disk, args.times),
        }
    for name, taken in times.items():
        print(f"{name:<30} {taken:8.1f} ms")

    def shares(taken: float) -> str:
        return f"{taken:8.2f} ms, " + ", ".join(f"{taken / other:.2%}" for other in times.values()) + " of these"

    recorded = Fingerprint.of([""], parameters)
    assert recorded is not None
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        assert recorded.differences(parameters) == []
        print(f"take it, {dtype!s:<21} {shares(median(lambda: Fingerprint.of([''], parameters), args.times))}")
        print(f"compare it, {dtype!s:<18} {shares(median(lambda: recorded.differences(parameters), args.times))}")
    print(f"{'in adapter_config.json':<30} {len(json.dumps(recorded.to_dict())):8,} bytes")


if __name__ == "__main__":
    main()

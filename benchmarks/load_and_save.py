"""Time to inject, load, save and switch adapters beside PEFT's LoRA of the same size, and what SFA does for a load.

    python benchmarks/load_and_save.py --model dinov2-s

The two take turns in one process. Prints medians of the times and of their ratios, in CPU time, since others may use
the machine. A first save draws the picture of the ticket; those after it, as in a training, do not, and are what is
counted here. Syncs to the disk are left out, since they take what the disk takes.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sfa_peft import SFAConfig
from sfa_peft.checkpoint import coding, seal

from step_time import LINEARS, MODELS

KINDS = ("LoRA r=8", "SFA")


def counted(folder: Path, make: str) -> Counter[str]:
    """How often one load reads and hashes the file, and decodes the positions of a parameter."""
    counts: Counter[str] = Counter()

    def counting(name: str, function, amount=lambda *args: 1):  # noqa: ANN001, ANN202
        def call(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
            counts[name] += amount(*args)
            return function(*args, **kwargs)

        return call

    with (
        mock.patch("sfa_peft.checkpoint.seal.load_tensors", counting("reads", seal.load_tensors)),
        mock.patch("sfa_peft.checkpoint.seal.digest_of", counting("hashes", seal.digest_of)),
        mock.patch("sfa_peft.checkpoint.coding._read_chunk", counting("decoded parameters", coding._read_chunk)),
    ):
        torch.manual_seed(0)
        model = PeftModel.from_pretrained(MODELS[make](), str(folder))
    counts["parameters in the ticket"] = len(model.peft_config["default"].ticket_sizes)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dinov2-s")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        torch.manual_seed(0)
        lora = get_peft_model(MODELS[args.model](), LoraConfig(r=8, target_modules=LINEARS))
        torch.manual_seed(0)
        budget = sum(p.numel() for p in lora.parameters() if p.requires_grad)
        sfa = get_peft_model(MODELS[args.model](), SFAConfig(budget=budget, initial_ticket="random"))
        folders = {kind: Path(folder, str(i)) for i, kind in enumerate(KINDS)}
        models = dict(zip(KINDS, (lora, sfa), strict=True))
        for kind, model in models.items():
            model.save_pretrained(str(folders[kind]))
        whats = ("get_peft_model", "load", "save", "switch")
        times: dict[str, dict[str, list[float]]] = {what: {kind: [] for kind in KINDS} for what in whats}
        configs = {KINDS[0]: LoraConfig(r=8, target_modules=LINEARS), KINDS[1]: SFAConfig(budget=budget)}
        for kind, model in models.items():
            model.add_adapter("other", configs[kind])
        for _ in range(args.rounds + 1):
            for kind, model in models.items():
                torch.manual_seed(0)
                base = MODELS[args.model]()
                gc.collect()
                start = time.process_time()
                get_peft_model(base, configs[kind])
                middle = time.process_time()
                for name in ("other", "default"):
                    model.set_adapter(name)
                times["get_peft_model"][kind].append(middle - start)
                times["switch"][kind].append((time.process_time() - middle) / 2)
                torch.manual_seed(0)
                base = MODELS[args.model]()
                gc.collect()  # not within what is timed
                start = time.process_time()
                PeftModel.from_pretrained(base, str(folders[kind]))
                middle = time.process_time()
                model.save_pretrained(str(folders[kind]), selected_adapters=["default"])
                times["load"][kind].append(middle - start)
                times["save"][kind].append(time.process_time() - middle)
        print(f"{args.model}, {budget:,} trained parameters, {os.cpu_count()} cores, one thread")
        for what, own in times.items():
            a, b = (own[kind][1:] for kind in KINDS)
            ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
            print(
                f"{what}: {KINDS[0]} {1000 * statistics.median(a):.0f} ms, "
                f"{KINDS[1]} {1000 * statistics.median(b):.0f} ms, ratio {ratio:.2f}"
            )
        print("one load:", ", ".join(f"{count} {what}" for what, count in counted(folders["SFA"], args.model).items()))


if __name__ == "__main__":
    main()

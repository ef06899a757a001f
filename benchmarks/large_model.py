"""Peak memory of each step of a user with a DINOv2 of 1.1 billion parameters, as DINOv2-g, in bfloat16 on a CPU.

The model is built from a config with random weights: inject, search by gradient on two batches of one image, save, and
load into a new model.

    python benchmarks/large_model.py
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Dinov2Backbone, Dinov2Config

from sfa_peft import SFAConfig, search_ticket

from step_time import loss_of


def base(layers: int) -> nn.Module:
    config = Dinov2Config(
        hidden_size=1536, num_hidden_layers=layers, num_attention_heads=24, use_swiglu_ffn=True, image_size=224
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Dinov2Backbone(config)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def measured(what: str) -> Iterator[None]:
    gc.collect()
    start = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:<34} {time.perf_counter() - start:>7.1f} s, peak of the process so far {peak:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    args = parser.parse_args()
    with measured("build"):
        model = base(args.layers)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e9:.2f} billion parameters, {2 * size / 2**30:.2f} GiB in bfloat16")
    with measured("get_peft_model, budget 2 %"):
        adapted = get_peft_model(model, SFAConfig(budget=0.02))
    batches = [torch.randn(1, 3, 224, 224, dtype=torch.bfloat16) for _ in range(2)]
    with measured("search by gradient, 2 batches"):
        search_ticket(adapted, batches, steps=2, criterion="gradient", loss_fn=loss_of, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        with measured("save_pretrained"):
            adapted.save_pretrained(folder)
        del adapted, model
        with measured("build another base"):
            other = base(args.layers)
        with measured("PeftModel.from_pretrained"):
            PeftModel.from_pretrained(other, folder)


if __name__ == "__main__":
    main()

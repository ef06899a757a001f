"""What several tasks on one image cost, whose adapters leave the first blocks of the backbone alone.

    python benchmarks/shared_trunk.py

Three adapters on a DINOv2-S, each on the last K of its 12 blocks, answer for one image of 224x224: one after another,
and inside `shared_trunk`. The times are those of the CPU that one thread takes, medians of rounds in which both take
turns, so that other programs matter less. Heads are left out: they cost the same both ways. The outputs must be equal,
bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from sfa_peft import SFAConfig, shared_trunk

BLOCKS, TASKS = 12, ("segmentation", "detection", "depth")


def adapted(last: int) -> PeftModel:
    """A DINOv2-S with an adapter for each task on its last blocks, which are not trained, but do something."""
    torch.manual_seed(0)
    base = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=BLOCKS, image_size=224))
    blocks = list(range(BLOCKS - last, BLOCKS))
    configs = {task: SFAConfig(budget=0.02, layers_to_transform=blocks, init_weights=False) for task in TASKS}
    model = get_peft_model(base, configs[TASKS[0]], TASKS[0])
    for task in TASKS[1:]:
        model.add_adapter(task, configs[task])
    return model.eval()


def answer(model: PeftModel, image: Tensor) -> list[Tensor]:
    """The features for each task."""
    found = []
    for task in TASKS:
        model.set_adapter(task)
        found.append(model(image).last_hidden_state)
    return found


def together(model: PeftModel, image: Tensor) -> list[Tensor]:
    with shared_trunk(model):
        return answer(model, image)


def seconds(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    image = torch.randn(1, 3, 224, 224)
    print("| last blocks | three single runs, ms | together, ms | ratio | blocks computed |")
    print("| --- | --- | --- | --- | --- |")
    for last in (2, 4, 8):
        model = adapted(last)
        if not all(map(torch.equal, answer(model, image), together(model, image))):
            raise SystemExit(f"with the last {last} blocks, the outputs differ")
        calls = (partial(answer, model, image), partial(together, model, image))
        turns = [[seconds(call) for call in calls] for _ in range(args.rounds)]
        single, shared = (1000 * statistics.median(own) for own in zip(*turns, strict=True))
        blocks = (BLOCKS - last + 3 * last) / (3 * BLOCKS)
        print(f"| {last} | {single:.0f} | {shared:.0f} | {shared / single:.2f} | {blocks:.2f} |")
    try:
        together(adapted(BLOCKS), image)
    except ValueError as error:
        print(f"all blocks: {error}")


if __name__ == "__main__":
    main()

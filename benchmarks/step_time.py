"""Time and memory of a training step of SFA beside PEFT's LoRA and SHiRA and full fine-tuning.

All methods train the same number of backbone parameters (full fine-tuning trains all) of a model of the size of Swin-T
or DINOv2-S, built from a config with random weights. They take turns, step by step, in one process, so that a machine
that slows down slows all of them. Prints medians, ratios to LoRA, and the bytes that autograd saves beside parameters.

    python benchmarks/step_time.py --model dinov2-s --steps 10
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import Dinov2Backbone, Dinov2Config, SwinBackbone, SwinConfig

from sfa_peft import SFAConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def dinov2_s() -> nn.Module:
    return Dinov2Backbone(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14))


def swin_t() -> nn.Module:
    model = SwinBackbone(SwinConfig(image_size=224, out_features=["stage1", "stage2", "stage3", "stage4"]))
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # see use_fast_attention in examples/dense/models.py
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"dinov2-s": dinov2_s, "swin-t": swin_t}


def methods(budget: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    def sfa(share: float, granularity: str = "element") -> Callable[[nn.Module], nn.Module]:
        config = SFAConfig(
            budget=budget,
            external_share=share,
            internal_granularity=granularity,
            initial_ticket="random",
            target_modules=LINEARS,
        )
        return lambda model: get_peft_model(model, config)

    return {
        "LoRA r=8": lambda model: get_peft_model(model, LoraConfig(r=8, target_modules=LINEARS)),
        # SHiRA's r counts in_features + out_features of each layer, as LoRA's does: the same r is the same number.
        "SHiRA r=8": lambda model: get_peft_model(model, ShiraConfig(r=8, target_modules=LINEARS)),
        "SFA internal": sfa(0.0),
        "SFA internal, rows": sfa(0.0, "row"),
        "SFA internal, columns": sfa(0.0, "column"),
        "SFA external": sfa(1.0),
        "SFA both": sfa(0.5),
        "full fine-tuning": lambda model: model,
    }


class SavedBytes:
    """Counts the bytes that autograd saves for backward, once per storage, without the model's own tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.seen: dict[int, int] = {}
        self.kept: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in self.own:
                self.seen[storage.data_ptr()] = storage.nbytes()
                self.kept.append(part)  # an address must not be given to another tensor while we count
        return tensor

    def measure(self, forward: Callable[[], Any]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            forward()
        return sum(self.seen.values())


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return sum(f.float().square().mean() for f in model(x).feature_maps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dinov2-s")
    parser.add_argument("--steps", type=int, default=9, help="Counted steps of each method, after two that are not.")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--threads", type=int, help="Threads of torch; by default as it chooses.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    lora = get_peft_model(MODELS[args.model](), LoraConfig(r=8, target_modules=LINEARS))
    budget = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    del lora
    runs: dict[str, tuple[nn.Module, torch.optim.Optimizer, int]] = {}
    saved: dict[str, int] = {}
    one = torch.randn(1, 3, 224, 224, device=device)
    batch = torch.randn(args.batch_size, 3, 224, 224, device=device)

    for name, adapt in methods(budget).items():
        torch.manual_seed(0)
        model = adapt(MODELS[args.model]()).to(device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        runs[name] = (model, torch.optim.AdamW(trained, lr=1e-4), sum(p.numel() for p in trained))
        saved[name] = SavedBytes(model).measure(lambda model=model: loss_of(model, one))
        gc.collect()

    times: dict[str, list[float]] = {name: [] for name in runs}
    for step in tqdm(range(args.steps + 2), desc=f"{args.model}, interleaved steps"):
        for name, (model, optimizer, _) in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step >= 2:
                times[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(t) for name, t in times.items()}
    # Ratios are taken round by round, against LoRA's step of the same round.
    ratios = {
        name: statistics.median(a / b for a, b in zip(t, times["LoRA r=8"], strict=True)) for name, t in times.items()
    }
    print(f"{args.model}, batch {args.batch_size} of 224x224, {device.type}, {torch.get_num_threads()} threads")
    print(f"{'method':<20} {'trained':>12} {'ms/step':>9} {'ratio':>6} {'saved MB, one image':>20} {'ratio':>6}")
    for name, (_, _, trained) in runs.items():
        print(
            f"{name:<20} {trained:>12,} {1000 * medians[name]:>9.0f} {ratios[name]:>6.2f} {saved[name] / 1e6:>20.1f} "
            f"{saved[name] / saved['LoRA r=8']:>6.2f}"
        )


if __name__ == "__main__":
    main()

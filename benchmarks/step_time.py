"""Time and memory of a training step and an inference of SFA beside PEFT's LoRA and SHiRA and full fine-tuning.

All methods train the same number of backbone parameters (full fine-tuning trains all) of a model of the size of Swin-T
or DINOv2-S, built from a config with random weights. They take turns, step by step, in one process, so that a machine
that slows down slows all of them. Prints medians, ratios to LoRA, the bytes that autograd saves beside the parameters,
and on a GPU the peak memory of a step above the model. `benchmarks/launches.py` counts launches. What a step costs the
host, which a GPU waits for, shows in a model whose arithmetic takes no time: `dinov2-thin`.

    python benchmarks/step_time.py --model dinov2-s
    python benchmarks/step_time.py --model dinov2-thin --autocast bfloat16 --batch_size 1 --threads 1 --steps 40
    python benchmarks/step_time.py --model dinov2-b --device cuda --autocast bfloat16 --batch_size 32
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
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


def dinov2_b() -> nn.Module:
    return Dinov2Backbone(Dinov2Config(image_size=224, patch_size=14))


def dinov2_thin() -> nn.Module:
    """The layers of DINOv2-S, with 16 channels and 17 tokens."""
    return Dinov2Backbone(Dinov2Config(hidden_size=16, num_attention_heads=2, image_size=224, patch_size=56))


def swin_t(**sizes: Any) -> nn.Module:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    model = SwinBackbone(SwinConfig(image_size=224, out_features=stages, **sizes))
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # see use_fast_attention in examples/dense/models.py
    return model


def swin_b() -> nn.Module:
    return swin_t(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dinov2-s": dinov2_s,
    "dinov2-b": dinov2_b,
    "dinov2-thin": dinov2_thin,
    "swin-t": swin_t,
    "swin-b": swin_b,
}


LORA = "LoRA r=8"


def methods(budget: int, keep: bool | None = None) -> dict[str, Callable[[nn.Module], nn.Module]]:
    def sfa(share: float, granularity: str = "element", conv: int = 0) -> Callable[[nn.Module], nn.Module]:
        config = SFAConfig(
            budget=budget,
            external_share=share,
            external_conv=conv,
            internal_granularity=granularity,
            initial_ticket="random",
            target_modules=LINEARS,
            keep_weights=keep,
        )
        return lambda model: get_peft_model(model, config)

    return {
        LORA: lambda model: get_peft_model(model, LoraConfig(r=8, target_modules=LINEARS)),
        # SHiRA's r counts in_features + out_features of each layer, as LoRA's does: the same r is the same number.
        "SHiRA r=8": lambda model: get_peft_model(model, ShiraConfig(r=8, target_modules=LINEARS)),
        "SFA internal": sfa(0.0),
        "SFA internal, rows": sfa(0.0, "row"),
        "SFA internal, columns": sfa(0.0, "column"),
        "SFA external": sfa(1.0),
        "SFA external, filters": sfa(1.0, conv=7),
        "SFA both": sfa(0.5),
        "SFA both, filters": sfa(0.5, conv=7),
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


class Clock:
    """Times on the host, or by events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def __call__(self, function: Callable[[], Any]) -> float:
        """The milliseconds of a call."""
        if not self.is_cuda:
            start = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dinov2-s")
    parser.add_argument("--steps", type=int, default=9, help="Counted steps of each method, after some that are not.")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", choices=("no", "bfloat16"), default="no")
    parser.add_argument("--keep", action="store_true", help="SFA keeps the changed weights without autocast too.")
    parser.add_argument("--only", nargs="+", help="Only LoRA and methods whose names have one of these texts.")
    parser.add_argument("--threads", type=int, help="Threads of torch; by default as it chooses.")
    parser.add_argument("--json", type=Path, help="Write the figures to a file.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    lora = get_peft_model(MODELS[args.model](), LoraConfig(r=8, target_modules=LINEARS))
    budget = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    del lora
    batch = torch.randn(args.batch_size, 3, 224, 224, device=device)
    clock = Clock(device)

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16, enabled=args.autocast != "no")

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with autocast():
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer(model: nn.Module) -> None:
        with torch.no_grad(), autocast():
            model(batch)

    rows: dict[str, dict[str, float]] = {}
    runs: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for name, adapt in methods(budget, args.keep or None).items():
        if args.only and name != LORA and not any(text in name for text in args.only):
            continue
        torch.manual_seed(0)
        model = adapt(MODELS[args.model]()).to(device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
        rows[name] = {"trained": sum(p.numel() for p in trained)}
        with autocast():
            rows[name]["saved MB"] = SavedBytes(model).measure(lambda model=model: loss_of(model, batch)) / 1e6
        for _ in range(args.warmup):
            step(model, optimizer)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(model, optimizer)
            rows[name]["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        runs[name] = model, optimizer
        gc.collect()

    times: dict[str, dict[str, list[float]]] = {name: {"step": [], "infer": []} for name in runs}
    for _ in tqdm(range(args.steps), desc=f"{args.model}, steps in turn"):
        for name, (model, optimizer) in runs.items():
            times[name]["step"].append(clock(lambda model=model, optimizer=optimizer: step(model, optimizer)))
    for _ in tqdm(range(args.steps), desc="inferences in turn"):
        for name, (model, _) in runs.items():
            model.eval()
            times[name]["infer"].append(clock(lambda model=model: infer(model)))

    for name, row in rows.items():
        for what, own in times[name].items():
            row[f"{what} ms"] = statistics.median(own)
            # Ratios are taken round by round, against LoRA's of the same round.
            row[f"{what} ratio"] = statistics.median(a / b for a, b in zip(own, times[LORA][what], strict=True))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, batch {args.batch_size} of 224x224, {where}, autocast {args.autocast}; ratios to {LORA}")
    columns = list(next(iter(rows.values())))
    print(f"{'method':<22}" + "".join(f"{column:>13}" for column in columns))
    for name, row in rows.items():
        cells = (f"{row[c]:,.0f}" if c == "trained" else f"{row[c]:.2f}" for c in columns)
        print(f"{name:<22}" + "".join(f"{cell:>13}" for cell in cells))
    if args.json:
        args.json.write_text(json.dumps({"where": where, **vars(args), "rows": rows}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()

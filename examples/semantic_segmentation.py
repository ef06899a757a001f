"""Fine-tune a Swin or DINOv2 model for semantic segmentation with SFA, or with a peer at the same budget.

    python examples/semantic_segmentation.py                                   # embedded data and backbone
    python examples/semantic_segmentation.py --model microsoft/swin-tiny-patch4-window7-224 \
        --dataset me/my-segmentation-set --budget 0.02 --output_dir out

Run it under `accelerate launch` for several processes or mixed precision.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from sfa_peft import describe_adapter, search_ticket

from data import Segmentation, load_segmentation
from methods import METHODS, RATES, Rates, adapt, is_adapter, optimizer_for, trained_backbone_parameters
from metrics import MeanIoU
from models import IGNORE_INDEX, backbone_parameters, build_model, patch_multiple, use_fast_attention
from nano_backbone import pretrained_nano_backbone
from pictures import save_segmentation


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", help="Hub id or folder: an UperNet, Swin or DINOv2 checkpoint. Default: a nano Swin."
    )
    parser.add_argument("--dataset", help="Hub id or folder with `image` and `label`. Default: embedded scenes.")
    parser.add_argument("--method", choices=METHODS, default="sfa")
    parser.add_argument("--budget", type=float, default=0.05, help="Fraction of the backbone that may be trained.")
    parser.add_argument("--external_share", type=float, help="Of SFA's budget, for external adapters. Default: SFA's.")
    parser.add_argument("--head", choices=("upernet", "linear"), default="upernet")
    parser.add_argument("--image_size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--search_steps", type=int, default=80, help="Of the ticket search; 0 keeps the data-free one."
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Per process.")
    parser.add_argument("--learning_rate", type=float, help="Of what is trained in the backbone. Default: by method.")
    parser.add_argument(
        "--internal_learning_rate", type=float, help="Of SFA's internal values. Default: measured best."
    )
    parser.add_argument("--head_learning_rate", type=float, help="Of the head. Default: by method.")
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16", "fp16"), help="Default: as accelerate is configured."
    )
    parser.add_argument("--num_workers", type=int, default=0, help="Processes that load data.")
    parser.add_argument("--output_dir", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    name = args.model or pretrained_nano_backbone(accelerator)

    set_seed(args.seed)
    with accelerator.main_process_first():
        data = load_segmentation(args.dataset, tuple(args.image_size))

    def base_model() -> nn.Module:
        model = build_model(name, data.id2label, args.head)
        use_fast_attention(model, accelerator.device)
        return model.to(accelerator.device)

    set_seed(args.seed)
    model = base_model()
    multiple = patch_multiple(model)
    if any(side % multiple for side in args.image_size):
        raise SystemExit(f"--image_size {args.image_size}: this model needs multiples of {multiple}")
    backbone_size = backbone_parameters(model)
    model = adapt(model, args.method, args.budget, args.external_share)
    trained = trained_backbone_parameters(model) if args.method != "full" else backbone_size
    accelerator.print(
        f"{args.method}: trains {trained:,} of {backbone_size:,} backbone parameters ({trained / backbone_size:.2%}), "
        f"and the head"
    )

    def training_loader(seed: int) -> DataLoader[Any]:
        return DataLoader(
            data.train,
            batch_size=args.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=data.train_batch,
            num_workers=args.num_workers,
            generator=torch.Generator().manual_seed(seed),
        )

    before = evaluate(model, data, accelerator)
    accelerator.print(f"before training: mean IoU {before['mean_iou']:.2%}")
    before_maps = predict(model, data, accelerator, samples(data))

    if args.method == "sfa" and args.search_steps and args.external_share != 1:
        report = search_ticket(
            model, training_loader(args.seed + 1), steps=args.search_steps, accelerator=accelerator, seed=args.seed
        )
        accelerator.print(f"\n{report}\n")
        if accelerator.is_main_process:
            report.ticket.save(args.output_dir / "ticket.safetensors")

    default = RATES[args.method]
    rates = Rates(
        backbone=args.learning_rate or default.backbone,
        internal=args.internal_learning_rate or default.internal,
        head=args.head_learning_rate or default.head,
    )
    set_seed(args.seed)
    started = time.perf_counter()
    model = train(model, optimizer_for(model, args.method, rates), training_loader(args.seed), args.steps, accelerator)
    seconds = time.perf_counter() - started
    after = evaluate(model, data, accelerator)
    accelerator.print(
        f"after {args.steps} steps ({seconds:.0f} s): mean IoU {after['mean_iou']:.2%} "
        f"(before: {before['mean_iou']:.2%}), pixel accuracy {after['pixel_accuracy']:.2%}"
    )

    if args.method == "sfa":
        dataset = args.dataset or "embedded scenes"
        describe_adapter(model, dataset=dataset, split="validation", metrics={"mean_iou": after["mean_iou"]})
    sizes = save(model, args.method, args.output_dir, accelerator)
    if is_adapter(model):
        reloaded = evaluate(PeftModel.from_pretrained(base_model(), str(args.output_dir)), data, accelerator)
        if reloaded["mean_iou"] != after["mean_iou"]:
            raise SystemExit(f"reloaded, the adapter gives {reloaded['mean_iou']}, not {after['mean_iou']}: a bug")
        accelerator.print(f"reloaded into a fresh base model: mean IoU {reloaded['mean_iou']:.2%}, the same")

    indices = samples(data)
    after_maps = predict(model, data, accelerator, indices)
    if accelerator.is_main_process:
        picture = args.output_dir / "predictions.png"
        save_segmentation(
            picture,
            [data.validation[i]["image"] for i in indices],
            {
                "truth": [np.asarray(data.validation[i]["full_label"]) for i in indices],
                "before": before_maps,
                "after": after_maps,
            },
            data.id2label,
            IGNORE_INDEX,
            f"{args.method}, {trained / backbone_size:.1%} of the backbone trained: "
            f"mean IoU {before['mean_iou']:.1%} -> {after['mean_iou']:.1%}",
        )
        results = {
            "method": args.method,
            "seed": args.seed,
            "trained_backbone_parameters": trained,
            "backbone_parameters": backbone_size,
            "mean_iou_before": before["mean_iou"],
            "mean_iou": after["mean_iou"],
            "pixel_accuracy": after["pixel_accuracy"],
            "per_class_iou": dict(zip(data.id2label.values(), after["per_class_iou"], strict=True)),
            "seconds": round(seconds, 1),
            "bytes": sizes,
        }
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        if (args.output_dir / "ticket.png").exists():
            print(f"the ticket: {args.output_dir / 'ticket.png'}")
        print(f"picture: {picture}\nnumbers: {args.output_dir / 'results.json'}")
    accelerator.end_training()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    steps: int,
    accelerator: Accelerator,
) -> nn.Module:
    """Train for a number of steps with a warm-up and a polynomial decay; return the unwrapped model."""
    warm_up = max(1, min(30, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * max(0.0, 1 - step / steps) ** 0.9
    )
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    wrapped.train()
    step = 0
    with tqdm(total=steps, desc="training", disable=not accelerator.is_main_process) as bar:
        while step < steps:
            for batch in loader:
                loss = wrapped(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                if not accelerator.optimizer_step_was_skipped:
                    schedule.step()
                optimizer.zero_grad()
                step += 1
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                if step == steps:
                    break
    return accelerator.unwrap_model(wrapped)


def evaluate(model: nn.Module, data: Segmentation, accelerator: Accelerator) -> dict[str, Any]:
    """Mean IoU on the validation split, at the labels' own size, over all processes."""
    metric = MeanIoU(len(data.id2label), IGNORE_INDEX)
    part = data.validation.shard(accelerator.num_processes, accelerator.process_index)
    for batch in DataLoader(part, batch_size=8, collate_fn=data.eval_batch):
        maps = label_maps(model, batch["pixel_values"], [m.shape for m in batch["full_labels"]], accelerator)
        metric.add_batch(predictions=maps, references=batch["full_labels"])
    counted = torch.from_numpy(metric.confusion).to(accelerator.device)
    metric.confusion = accelerator.reduce(counted, reduction="sum").cpu().numpy()
    return metric.compute()


@torch.no_grad()
def label_maps(
    model: nn.Module, pixel_values: Tensor, sizes: list[tuple[int, int]], accelerator: Accelerator
) -> list[Any]:
    """Predict a batch of label maps, each at its own size."""
    model.eval()
    with accelerator.autocast():
        logits = model(pixel_values=pixel_values.to(accelerator.device)).logits.float()
    return [
        F.interpolate(one[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0).cpu().numpy()
        for one, size in zip(logits, sizes, strict=True)
    ]


def samples(data: Segmentation, count: int = 5) -> list[int]:
    """Evenly spaced validation examples for the picture."""
    return np.linspace(0, len(data.validation) - 1, min(count, len(data.validation))).astype(int).tolist()


def predict(model: nn.Module, data: Segmentation, accelerator: Accelerator, indices: list[int]) -> list[Any]:
    batch = data.eval_batch([data.validation[i] for i in indices])
    return label_maps(model, batch["pixel_values"], [m.shape for m in batch["full_labels"]], accelerator)


def save(model: nn.Module, method: str, folder: Path, accelerator: Accelerator) -> dict[str, int]:
    """Save the adapter, or what else was trained, and say how many bytes it takes."""
    if is_adapter(model):
        model.save_pretrained(folder, is_main_process=accelerator.is_main_process)
        accelerator.wait_for_everyone()
        sizes = checkpoint_bytes(folder / "adapter_model.safetensors")
    else:
        path = folder / "model.safetensors"
        if accelerator.is_main_process:
            save_model(model if method == "full" else model.decode_head, str(path))
        accelerator.wait_for_everyone()
        sizes = {"total": path.stat().st_size}
    accelerator.print("saved bytes: " + ", ".join(f"{part} {count:,}" for part, count in sizes.items()))
    return sizes


def checkpoint_bytes(path: Path) -> dict[str, int]:
    """A saved adapter's bytes by what they are for."""
    sizes = {"external": 0, "internal values": 0, "positions": 0, "head": 0, "other": 0}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is not iterable
            tensor = file.get_tensor(key)
            if ".sfa_internal." in key:
                part = "positions" if key.endswith("positions") else "internal values"
            elif ".sfa_" in key or ".lora_" in key:
                part = "external" if ".sfa_" in key else "other"
            else:
                part = "head"
            sizes[part] += tensor.numel() * tensor.element_size()
    sizes["other"] += path.stat().st_size - sum(sizes.values())
    return {part: count for part, count in sizes.items() if count} | {"total": path.stat().st_size}


if __name__ == "__main__":
    main()

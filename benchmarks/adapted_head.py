"""A pretrained head: saved whole, adapted by SFA as a part of the backbone, or left as it is.

A whole segmentation model (nano Swin and UperNet) is trained on one domain of the embedded scenes and adapted to the
other with the same number of trained backbone parameters. Prints mean IoU and the bytes of the saved adapter.

    python benchmarks/adapted_head.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader

from sfa_peft import SFAConfig, search_ticket
from tickets import Bench

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from data import Segmentation
from methods import HEADS, RATES, optimizer_for
from models import backbone_parameters, build_model, use_fast_attention
from scenes import make_scenes

from semantic_segmentation import evaluate, train

# A budget here is a factor on the budget.
WAYS: dict[str, dict[str, Any]] = {
    "head saved whole": {"modules_to_save": HEADS},
    "head adapted": {"target_heads": HEADS, "modules_to_save": ["batch_norm"]},
    "head adapted, new classifier": {"target_heads": HEADS, "modules_to_save": ["batch_norm", "classifier"]},
    "head adapted, twice the budget": {"target_heads": HEADS, "modules_to_save": ["batch_norm"], "budget": 2},
    "only its norms and classifier": {"modules_to_save": ["batch_norm", "classifier"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--budget", type=float, default=0.05, help="Of the backbone.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--search_steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--only", help="Only ways whose name contains this.")
    args = parser.parse_args()
    args.cpu, args.rates, args.model, args.dataset = False, (), None, None
    bench = Bench(args)
    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        model = build_model(bench.model, bench.data.id2label, "upernet").to(bench.accelerator.device)
        use_fast_attention(model, bench.accelerator.device)
        dusk = make_scenes(400, seed=1, style="dusk")
        data = Segmentation({"train": dusk, "validation": dusk.select([0])}, bench.data.id2label, bench.size)
        loader: DataLoader[Any] = DataLoader(
            data.train, batch_size=8, shuffle=True, drop_last=True, collate_fn=data.train_batch
        )
        model = train(model, optimizer_for(model, "full", RATES["full"]), loader, args.steps, bench.accelerator)
        model.save_pretrained(f"{folder}/base")
        budget = int(args.budget * backbone_parameters(model))
        print(
            f"trained on dusk: mean IoU by day {100 * evaluate(model, bench.data, bench.accelerator)['mean_iou']:.1f}"
        )

        def base() -> Any:
            model = build_model(f"{folder}/base", bench.data.id2label)
            use_fast_attention(model, bench.accelerator.device)
            return model.to(bench.accelerator.device)

        found: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for seed in args.seeds:
            for name, options in WAYS.items():
                if args.only and args.only not in name:
                    continue
                set_seed(seed)
                own = options | {"budget": budget * options.get("budget", 1)}
                model = get_peft_model(base(), SFAConfig(**own))
                search_ticket(model, bench.loader(seed + 1000), steps=args.search_steps, seed=seed, progress=False)
                set_seed(seed)
                optimizer = optimizer_for(model, "sfa", RATES["sfa"])
                model = train(model, optimizer, bench.loader(seed), args.steps, bench.accelerator)
                model.save_pretrained(f"{folder}/adapter")
                loaded = PeftModel.from_pretrained(base(), f"{folder}/adapter")
                found.setdefault(name, []).append(100 * evaluate(loaded, bench.data, bench.accelerator)["mean_iou"])
                sizes[name] = (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size
                print(f"seed {seed}, {name}: mean IoU {found[name][-1]:.2f}, {sizes[name]:,} bytes", flush=True)
    print("| way | mean IoU | spread | bytes |\n| --- | --- | --- | --- |")
    for name, ious in found.items():
        spread = f"{statistics.stdev(ious):.1f}" if len(ious) > 1 else "-"
        print(f"| {name} | {statistics.mean(ious):.1f} | {spread} | {sizes[name]:,} |")


if __name__ == "__main__":
    main()

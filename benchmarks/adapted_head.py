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

from peft import PeftModel, get_peft_model

from sfa_peft import SFAConfig
from tickets import Bench

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from dense.data import Rows
from dense.methods import METHODS
from dense.scenes import make_scenes

HEADS = ["decode_head"]
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
    args.cpu, args.model, args.dataset = False, None, None
    bench = Bench(args, head="upernet")
    day = bench.train_rows
    with tempfile.TemporaryDirectory() as folder:
        dense = bench.base(seed=0)
        budget = int(args.budget * dense.backbone_parameters)
        bench.train_rows = Rows(make_scenes(400, seed=1, style="dusk"), "dusk", "image")
        model = bench.train(dense.model, dense.heads, 0, METHODS["full"].rates, decay=0.01)
        bench.train_rows = day
        model.save_pretrained(f"{folder}/base")
        print(f"trained on dusk: mean IoU by day {100 * bench.scores(model)['mean_iou']:.1f}")

        found: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for seed in args.seeds:
            for name, options in WAYS.items():
                if args.only and args.only not in name:
                    continue
                own = options | {"budget": budget * options.get("budget", 1)}
                model = get_peft_model(bench.base(seed, f"{folder}/base").model, SFAConfig(**own))
                bench.search(model, seed)
                model = bench.train(model, HEADS, seed, METHODS["sfa"].rates)
                model.save_pretrained(f"{folder}/adapter")
                loaded = PeftModel.from_pretrained(bench.base(seed, f"{folder}/base").model, f"{folder}/adapter")
                found.setdefault(name, []).append(100 * bench.scores(loaded)["mean_iou"])
                sizes[name] = (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size
                print(f"seed {seed}, {name}: mean IoU {found[name][-1]:.2f}, {sizes[name]:,} bytes", flush=True)
    print("| way | mean IoU | spread | bytes |\n| --- | --- | --- | --- |")
    for name, ious in found.items():
        spread = f"{statistics.stdev(ious):.1f}" if len(ious) > 1 else "-"
        print(f"| {name} | {statistics.mean(ious):.1f} | {spread} | {sizes[name]:,} |")


if __name__ == "__main__":
    main()

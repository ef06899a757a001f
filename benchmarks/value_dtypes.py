"""What a saved adapter loses when its values and heads are kept in half precision: mean IoU after loading, and bytes.

Trains SFA as benchmarks/tickets.py does, saves each adapter in each dtype, loads it into a fresh base, and evaluates.

    python benchmarks/value_dtypes.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from peft import PeftModel

from tickets import Bench

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from dense.methods import METHODS, adapt

DTYPES = ((None, None), ("bfloat16", None), ("float16", None), ("bfloat16", "bfloat16"), ("float16", "float16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A backbone's Hub id or folder. Default: a nano Swin, pretrained on scenes.")
    parser.add_argument("--dataset", help="Hub id or folder with `image` and `label`. Default: embedded scenes.")
    parser.add_argument("--image_size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--search_steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    args = parser.parse_args()
    args.cpu = False
    bench = Bench(args)

    found: dict[tuple[str | None, str | None], list[tuple[float, int]]] = {}
    for seed in args.seeds:
        dense = bench.base(seed)
        model = adapt(dense, "sfa", args.budget)
        bench.search(model, seed)
        model = bench.train(model, dense.heads, seed, METHODS["sfa"].rates)
        for dtypes in DTYPES:
            config = model.peft_config["default"]
            config.values_dtype, config.heads_dtype = dtypes
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                size = (Path(folder) / "adapter_model.safetensors").stat().st_size
                loaded = PeftModel.from_pretrained(bench.base(seed + 1).model, folder)
            iou = 100 * bench.scores(loaded)["mean_iou"]
            found.setdefault(dtypes, []).append((iou, size))
            print(
                f"seed {seed}, values {dtypes[0]}, heads {dtypes[1]}: mean IoU {iou:.3f}, {size:,} bytes", flush=True
            )

    print("| values | heads | mean IoU | change | largest change | bytes |\n| --- | --- | --- | --- | --- | --- |")
    for (values, heads), own in found.items():
        changes = [iou - whole for (iou, _), (whole, _) in zip(own, found[None, None], strict=True)]
        print(
            f"| {values or 'float32'} | {heads or 'float32'} | {statistics.mean(iou for iou, _ in own):.2f} "
            f"| {statistics.mean(changes):+.3f} | {max(changes, key=abs):+.3f} | {own[0][1]:,} |"
        )


if __name__ == "__main__":
    main()

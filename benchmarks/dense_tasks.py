"""The dense tasks of the examples, every method at one budget, seed by seed: the headline score with its spread.

Runs the examples' own loop, in one process, one run after the other. Each result is appended to a file as soon as it
is there, and what is in the file is not run again. Everything behind `--` is flags of the example.

    python benchmarks/dense_tasks.py depth_estimation --methods sfa lora full --results depth.jsonl -- --steps 300
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from dense.methods import METHODS
from dense.run import run
from dense.task import Task

SCRIPTS = ("semantic_segmentation", "instance_segmentation", "object_detection", "depth_estimation")


def task_of(script: str) -> type[Task]:
    """The task of an example's script."""
    name = "".join(part.capitalize() for part in script.split("_"))
    return getattr(importlib.import_module(script), name)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: Iterable[dict[str, Any]], headline: str) -> str:
    """A Markdown table: the score of each seed, mean and standard deviation, and the seconds of training."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["flags"], result["method"]), []).append(result)
    lines = [
        f"| flags | method | trained | {headline}, by seed | mean | spread | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (flags, method), own in groups.items():
        scores = [r["score"] for r in sorted(own, key=lambda r: r["seed"])]
        spread = f"{statistics.stdev(scores):.3f}" if len(scores) > 1 else "-"
        seconds = statistics.median(r["seconds"] for r in own)
        shown = " / ".join(f"{score:.3f}" for score in scores)
        lines.append(
            f"| {flags} | {method} | {own[0]['trained']:,} | {shown} | {statistics.mean(scores):.3f} | {spread} | "
            f"{seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    given = sys.argv[1:]
    own, flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=SCRIPTS)
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--results", type=Path, default=Path("dense_tasks.jsonl"))
    parser.add_argument("--label", help="What the flags are called in the table; by default as they are.")
    args = parser.parse_args(own)
    task = task_of(args.task)
    label = args.label or " ".join(flags)
    for seed in args.seeds:
        for method in args.methods:
            done = {(r["task"], r["flags"], r["method"], r["seed"]) for r in read(args.results)}
            if (args.task, label, method, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                fixed = ["--method", method, "--seed", str(seed), "--output_dir", folder, "--log_with", "none"]
                results = run(task, [*flags, *fixed])
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
            row = {
                "task": args.task,
                "flags": label,
                "method": method,
                "seed": seed,
                "score": results["after"][task.headline],
                "trained": results["trained_backbone_parameters"],
                "seconds": results["seconds"],
                "after": {name: value for name, value in results["after"].items() if isinstance(value, float)},
                "curve": results["curves"][task.headline],
            }
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print(table([r for r in read(args.results) if r["task"] == args.task], task.headline))


if __name__ == "__main__":
    main()

"""What the choice of the ticket, of places and of widths is worth: accuracy at a budget, against peers.

Every run fine-tunes one backbone for semantic segmentation with a linear head, so that the backbone has to do the
work, with all methods on the same batches for the same number of steps. By default it is a nano Swin pretrained on one
domain of the embedded scenes and adapted to the other; `--model` and `--dataset` take real ones. Each result is
appended to a file as soon as it is there, and what is in the file is not run again, so a suite can be stopped and
continued, and several processes can share the work (`--part 0/2`).

    python benchmarks/tickets.py criteria budgets --results tickets.jsonl
    python benchmarks/tickets.py --results tickets.jsonl --report docs/tickets.png
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from sfa_peft import Quotas, TicketReport, search_ticket

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from dense.arguments import parse
from dense.loading import TrainBatches
from dense.methods import METHODS, Dense, Rates, adapt, trained_backbone_parameters
from dense.nano_backbone import pretrained_nano_backbone
from dense.training import evaluate, fit
from semantic_segmentation import SemanticSegmentation

PARALLEL = ("mlp_parallel",)


@dataclass(frozen=True)
class Run:
    """One way to fine-tune, to be run with several seeds.

    Attributes:
        label: Its name in tables.
        method: Of the examples' `METHODS`.
        budget: The trained part of the backbone.
        config: `SFAConfig`'s fields, beside the budget and the heads.
        search: `search_ticket`'s arguments; None for no search.
        rates: Learning rates other than the tuned ones.
    """

    label: str
    method: str = "sfa"
    budget: float = 0.05
    config: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)


BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)
INTERNAL, EXTERNAL = {"external_share": 0.0}, {"external_share": 1.0}


def suites() -> dict[str, list[Run]]:
    """The runs by the question that they answer."""

    def internal(criterion: str) -> str:
        return "internal" if criterion == "lottery" else f"internal, {criterion}"

    criteria = ("lottery", "fisher", "gradient", "taylor", "movement", "credit", "magnitude", "random")
    return {
        "peers": [Run("full", "full"), Run("head only", "head")],
        "peer rates": [
            *(Run(f"full, rate {r:g}", "full", rates={"backbone": r}) for r in (2.5e-4, 1e-3)),
            *(Run(f"LoRA, rate {r:g}", "lora", rates={"backbone": r}) for r in (2e-3, 5e-3, 1e-2, 2e-2)),
        ],
        "rates": [
            *(Run(f"internal, rate {r:g}", config=INTERNAL, rates={"internal": r}) for r in (8e-3, 1.6e-2, 3.2e-2)),
            *(
                Run(
                    f"external {'+'.join(places)}, rate {r:g}",
                    config=EXTERNAL | {"external_places": places},
                    search=None,
                    rates={"backbone": r},
                )
                for places in (("attention", "mlp"), ("attention", "mlp_parallel"), PARALLEL)
                for r in (5e-3, 1e-2, 2e-2)
            ),
        ],
        "criteria": [
            Run(internal(name), budget=budget, config=INTERNAL, search={"criterion": name})
            for budget, names in ((0.05, criteria), (0.01, ("lottery", "fisher", "credit", "random")))
            for name in names
        ],
        "budgets": [
            run
            for budget in BUDGETS
            for run in (
                Run("LoRA", "lora", budget),
                Run("internal", budget=budget, config=INTERNAL),
                Run("external", budget=budget, config=EXTERNAL, search=None),
                Run("both", budget=budget),
            )
        ],
        "granularity": [
            Run(f"internal, {name}s", config=INTERNAL | {"internal_granularity": name}) for name in ("row", "column")
        ],
        "rounds": [
            Run("internal, prune in 3 rounds", config=INTERNAL, search={"rounds": 3, "steps": 20}),
            Run("internal, goes on from the search", config=INTERNAL, search={"rewind": False}),
            Run("internal, search of 20 steps", config=INTERNAL, search={"steps": 20}),
            Run("internal, search of 180 steps", config=INTERNAL, search={"steps": 180}),
            Run("internal, every layer alike", config=INTERNAL, search={"quotas": Quotas(equal_density=True)}),
            Run("internal, every type alike", config=INTERNAL, search={"quotas": Quotas("type", equal_density=True)}),
        ],
        "placement": [
            Run("external, auto", config=EXTERNAL | {"external_placement": "auto"}),
            Run(
                "external, auto, three places",
                config=EXTERNAL
                | {"external_placement": "auto", "external_places": ("attention", "mlp", "mlp_parallel")},
            ),
            Run("both, auto", config={"external_placement": "auto"}),
            *(Run(f"both, share {share:g}", config={"external_share": share}) for share in (0.1, 0.5, 0.75)),
        ],
    }


class Bench:
    """The data, the backbone, and what does not change between runs.

    Args:
        args: `model`, `dataset`, `image_size`, `steps`, `search_steps` and `cpu`.
        head: Of the segmentation model.
    """

    def __init__(self, args: argparse.Namespace, head: str = "linear") -> None:
        self.args = args
        self.accelerator = Accelerator(cpu=args.cpu)
        size = tuple(args.image_size)
        self.model = args.model or pretrained_nano_backbone(self.accelerator, "swin", size, scenes=1500, steps=2000)
        flags = ["--head", head, "--steps", str(args.steps), "--image_size", *map(str, size)]
        if args.dataset:
            flags += ["--dataset", args.dataset]
        self.task, self.train_rows, self.validation_rows = SemanticSegmentation.load(
            parse(SemanticSegmentation, flags)
        )

    def base(self, seed: int, model: str | None = None) -> Dense:
        """The pretrained backbone with a fresh head, or another model."""
        set_seed(seed)
        return self.task.build(model or self.model, self.accelerator.device)

    def search(self, model: nn.Module, seed: int, **options: Any) -> TicketReport:
        batches = TrainBatches(self.task, self.train_rows, self.accelerator, seed + 1000)
        given = {"steps": self.args.search_steps, "seed": seed, "progress": False, "loss_fn": self.task.loss} | options
        return search_ticket(model, batches, **given)

    def train(self, model: nn.Module, heads: Sequence[str], seed: int, rates: Rates, decay: float = 0.0) -> nn.Module:
        set_seed(seed)
        self.task.args.seed = seed
        model = fit(self.task, model, heads, self.train_rows, self.accelerator, rates=rates, decay=decay)
        self.accelerator.free_memory()
        return model

    def scores(self, model: nn.Module) -> dict[str, Any]:
        return evaluate(self.task, model, self.validation_rows, self.accelerator)

    def run(self, run: Run, seed: int, tuned: dict[str, dict[str, float]]) -> dict[str, Any]:
        started = time.perf_counter()
        dense = self.base(seed)
        whole = dense.backbone_parameters
        model = adapt(dense, run.method, run.budget, **run.config)
        trained = trained_backbone_parameters(model, dense.heads)
        steps = 0
        if run.method == "sfa" and run.search is not None:
            steps = self.search(model, seed, **run.search).steps
        rates = Rates(**(vars(METHODS[run.method].rates) | tuned.get(run.method, {}) | run.rates))
        decay = 0.01 if METHODS[run.method].trains_backbone else 0.0
        result = self.scores(self.train(model, dense.heads, seed, rates, decay))
        return {
            "mean_iou": round(100 * result["mean_iou"], 2),
            "pixel_accuracy": round(100 * result["pixel_accuracy"], 2),
            "trained": trained,
            "backbone": whole,
            "search_steps": steps,
            "seconds": round(time.perf_counter() - started, 1),
        }


def tuned_rates(given: Iterable[str]) -> dict[str, dict[str, float]]:
    """Learning rates by method and kind, of ``METHOD:KIND=RATE``."""
    rates: dict[str, dict[str, float]] = {}
    for one in given:
        found = re.fullmatch(r"(\w+):(\w+)=(.+)", one)
        if found is None:
            raise SystemExit(f"--rates {one!r} is not METHOD:KIND=RATE, such as lora:backbone=0.01")
        method, kind, rate = found.groups()
        rates.setdefault(method, {})[kind] = float(rate)
    return rates


def key(run: Run, seed: int) -> tuple[str, float, int]:
    return run.label, run.budget if METHODS[run.method].config else 0.0, seed


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: Iterable[dict[str, Any]]) -> str:
    """A Markdown table: mean and standard deviation over seeds, best first within a budget."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["budget"], r["label"]), []).append(r)
    rows = []
    for (budget, label), own in groups.items():
        ious = [r["mean_iou"] for r in own]
        spread = f"{statistics.stdev(ious):.1f}" if len(ious) > 1 else "-"
        rows.append(
            (budget, -statistics.mean(ious), label, statistics.mean(ious), spread, len(ious), own[0]["trained"])
        )
    lines = ["| budget | method | trained | mean IoU | spread | seeds |", "| --- | --- | --- | --- | --- | --- |"]
    for budget, _, label, mean, spread, count, trained in sorted(rows):
        lines.append(
            f"| {f'{budget:.1%}' if budget else '-'} | {label} | {trained:,} | {mean:.1f} | {spread} | {count} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Mean IoU over the budget for the methods that were run at several; the others as lines across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    labels = dict.fromkeys(r["label"] for r in results)
    for label in labels:
        by_budget: dict[float, list[float]] = {}
        for r in results:
            if r["label"] == label:
                by_budget.setdefault(r["budget"], []).append(r["mean_iou"])
        means = {b: statistics.mean(v) for b, v in sorted(by_budget.items())}
        if len(means) >= 3:
            spreads = [statistics.stdev(by_budget[b]) if len(by_budget[b]) > 1 else 0 for b in means]
            axis.errorbar(
                [100 * b for b in means], list(means.values()), yerr=spreads, marker="o", capsize=3, label=label
            )
        elif label in ("full", "head only"):
            axis.axhline(means[0.0], linestyle="--", color="grey" if label == "full" else "silver", label=label)
    axis.set_xscale("log")
    axis.set_xticks([100 * b for b in BUDGETS], [f"{b:.1%}" for b in BUDGETS])
    axis.set_xlabel("trained part of the backbone")
    axis.set_ylabel("mean IoU (%)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"Of {', '.join(suites())}; none only reports.")
    parser.add_argument("--model", help="A backbone's Hub id or folder. Default: a nano Swin, pretrained on scenes.")
    parser.add_argument("--dataset", help="Hub id or folder with `image` and `label`. Default: embedded scenes.")
    parser.add_argument("--image_size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--search_steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--budgets", type=float, nargs="+", help="Only runs of these budgets.")
    parser.add_argument("--only", help="Only runs whose label contains this.")
    parser.add_argument("--results", type=Path, default=Path("tickets.jsonl"))
    parser.add_argument("--report", type=Path, metavar="PICTURE", help="Also draw mean IoU over the budget.")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=(),
        metavar="METHOD:KIND=RATE",
        help="Learning rates tuned on this data, such as lora:backbone=0.01; by default the examples' own.",
    )
    parser.add_argument("--part", default="0/1", help="i/n: this process takes every n-th run.")
    parser.add_argument("--threads", type=int, help="Threads of torch; by default as it chooses.")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    every = suites()
    unknown = set(args.suites) - every.keys()
    if unknown:
        parser.error(f"unknown suite {sorted(unknown)[0]!r}; choose from {', '.join(every)}")

    rates = tuned_rates(args.rates)
    part, parts = map(int, args.part.split("/"))
    # Seed by seed, so that a run that is stopped has something to say about everything.
    wanted = {key(run, seed): (run, seed) for seed in args.seeds for name in args.suites for run in every[name]}
    todo = [
        (run, seed)
        for run, seed in wanted.values()
        if (not args.only or args.only in run.label) and (not args.budgets or run.budget in args.budgets)
    ][part::parts]
    bench = Bench(args) if todo else None
    for run, seed in todo:
        label, budget, _ = key(run, seed)
        if any((r["label"], r["budget"], r["seed"]) == (label, budget, seed) for r in read(args.results)):
            continue
        assert bench is not None
        result = {"label": label, "budget": budget, "seed": seed} | bench.run(run, seed, rates)
        with args.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
    results = read(args.results)
    print(table(results))
    if args.report:
        plot(results, args.report)


if __name__ == "__main__":
    main()

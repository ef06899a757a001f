"""Accuracy at a budget: SFA, its peers and full fine-tuning, for the same total number of steps.

Semantic segmentation with a linear head on a pretrained backbone, so that the backbone has to do the work. A search
takes its steps from the training. Forward passes run under bfloat16 autocast, on a CPU too. Each result is stored with
its setting, and what is stored is not run again, so the work can be stopped and continued, and be shared by worker
processes: as many as cores with one thread each on a CPU, many on a GPU.

    python benchmarks/accuracy.py pack scenes.zip --dataset FOLDER
    python benchmarks/accuracy.py run tune --data scenes.zip --model BACKBONE --results accuracy.jsonl
    python benchmarks/accuracy.py run main --data scenes.zip --model BACKBONE --results accuracy.jsonl --seeds 0 1 2
    python benchmarks/accuracy.py report --results accuracy.jsonl --picture accuracy.png
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import SupertuningConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn

from sfa_peft import SFAConfig, search_ticket

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from dense.methods import Dense, adaptformer_config, is_head, lora_config, shira_config, trained_backbone_parameters
from dense.models import LinearHead, load_backbone, load_config

IGNORED = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD_RATE = 2e-3
BATCH, WARMUP, POWER, CLIP, ZOOM = 8, 25, 0.9, 1.0, 1.5
BUDGETS = (0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: Of `METHODS`.
        budget: The fraction of the backbone that is trained. 0 for a method that has no budget.
        rate: The learning rate of what is trained in the backbone; of SFA, of the external adapters.
        internal_rate: That of the internal values of SFA, if it has both kinds.
        search_steps: The steps of the search, taken from the total.
        options: Other fields of `SFAConfig`.
    """

    method: str
    budget: float
    rate: float
    internal_rate: float = 0.0
    search_steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)


# What a method makes of a model and a number of parameters.
Adapts = Callable[[Dense, int, Run], nn.Module]


def _trains(wanted: Callable[[nn.Module, str], bool]) -> Adapts:
    """Fine-tunes the parameters of the backbone that are `wanted`, by their module and their name in it."""

    def adapt(dense: Dense, budget: int, run: Run) -> nn.Module:
        for module in dense.model.get_submodule(dense.backbone).modules():
            for name, p in module.named_parameters(recurse=False):
                p.requires_grad_(wanted(module, name))
        return dense.model

    return adapt


def _peft(config: Callable[[Dense, int], Any]) -> Adapts:
    def adapt(dense: Dense, budget: int, run: Run) -> nn.Module:
        model = get_peft_model(dense.model, config(dense, budget))
        for head in dense.heads:
            dense.model.get_submodule(head).requires_grad_(True)
        return model

    return adapt


def _dora_config(dense: Dense, budget: int) -> Any:
    """DoRA trains a magnitude for each output beside LoRA, which the budget pays for."""
    magnitudes = sum(linear.out_features for linear in dense.linears().values())
    rest = budget - magnitudes
    least = sum(linear.in_features + linear.out_features for linear in dense.linears().values())
    config = lora_config(dense, max(rest, least))
    config.use_dora = True
    return config


def _supertuning_config(dense: Dense, budget: int) -> SupertuningConfig:
    linears = dense.linears()
    return SupertuningConfig(
        target_modules=list(linears), sparsity=1 - budget / sum(linear.weight.numel() for linear in linears.values())
    )


def _sfa(**fields: Any) -> Adapts:
    def adapt(dense: Dense, budget: int, run: Run) -> nn.Module:
        heads = list(dense.heads)
        model: nn.Module = get_peft_model(
            dense.model, SFAConfig(budget=budget, modules_to_save=heads, **fields | run.options)
        )
        return model

    return adapt


class Mona(nn.Module):
    """Mona (Yin et al., "5%>100%", 2025): a scaled LayerNorm, and a bottleneck with depthwise filters of 3, 5 and 7.

    What it adds to tokens of shape (batch, tokens, channels) on a grid of `size`. Tokens before the grid: no filters.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.normed = nn.Parameter(torch.ones(channels) * 1e-6)
        self.plain = nn.Parameter(torch.ones(channels))
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.filters = nn.ModuleList(nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden) for k in (3, 5, 7))
        self.mix = nn.Conv2d(hidden, hidden, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @staticmethod
    def cost(channels: int, hidden: int) -> int:
        return 2 * channels * hidden + 5 * channels + hidden * (1 + 83 + 3 + hidden + 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        h = self.down(self.norm(x) * self.normed + x * self.plain)
        first, tokens = h.split([h.shape[1] - size[0] * size[1], size[0] * size[1]], dim=1)
        grid = tokens.transpose(1, 2).unflatten(2, size)
        grid = grid + sum(f(grid) for f in self.filters) / 3
        grid = grid + self.mix(grid)
        return self.up(F.gelu(torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)))


class Grid:
    """The size of the token grid in the forward pass that is in progress, from the image, level by level."""

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.image = (0, 0)
        backbone.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        self.image = tuple(pixels.shape[2:])

    def size(self, level: int) -> tuple[int, int]:
        patch = self.backbone.config.patch_size
        sides = [-(-side // (patch if isinstance(patch, int) else patch[0])) for side in self.image]
        for _ in range(level):
            sides = [-(-side // 2) for side in sides]
        return sides[0], sides[1]


def blocks_of(backbone: nn.Module) -> list[tuple[nn.Module, int, int]]:
    """The blocks of a Swin or DINOv2 of transformers, with their width and their level in the pyramid."""
    found = []
    for name, module in backbone.named_modules():
        kind = type(module).__name__
        if kind == "SwinLayer":
            level = int(name.split("layers.")[1].split(".")[0])
            found.append((module, module.layernorm_before.normalized_shape[0], level))
        elif kind == "Dinov2Layer":
            found.append((module, module.norm1.normalized_shape[0], 0))
    return found


def _mona(dense: Dense, budget: int, run: Run) -> nn.Module:
    """Mona behind both residual sums of a block, with the largest hidden size in the budget."""
    backbone = dense.model.get_submodule(dense.backbone)
    backbone.requires_grad_(False)
    grid, blocks = Grid(backbone), blocks_of(backbone)

    def cost(hidden: int) -> int:
        return sum(2 * Mona.cost(channels, hidden) for _, channels, _ in blocks)

    hidden = max((h for h in range(1, 1024) if cost(h) <= budget), default=0)
    if not hidden:
        raise ValueError(f"a budget of {budget} does not pay for Mona of 1 hidden unit ({cost(1)})")
    monas = nn.ModuleList()
    for block, channels, level in blocks:
        # Of a residual sum: the module that has one summand as its input, and the one whose output is the other.
        if hasattr(block, "layer_scale1"):
            sums = ((block.norm1, block.layer_scale1), (block.norm2, block.layer_scale2))
        else:
            sums = ((block, block.drop_path), (block.layernorm_after, block.mlp))
        for begins, ends in sums:
            mona = Mona(channels, hidden).to(next(block.parameters()).device)
            monas.append(mona)
            _add_mona(mona, begins, ends, partial(grid.size, level))
    dense.model.add_module("mona", monas)
    return dense.model


def _add_mona(mona: Mona, begins: nn.Module, ends: nn.Module, size: Callable[[], tuple[int, int]]) -> None:
    summands: list[Tensor] = []
    begins.register_forward_pre_hook(lambda module, args: summands.append(args[0]))
    ends.register_forward_hook(lambda module, args, output: output + mona(summands.pop() + output, size()))


METHODS: dict[str, Adapts] = {
    "full": _trains(lambda module, name: True),
    "head": _trains(lambda module, name: False),
    "BitFit": _trains(lambda module, name: name == "bias"),
    "LayerNorm": _trains(lambda module, name: isinstance(module, nn.LayerNorm)),
    "LoRA": _peft(lora_config),
    "DoRA": _peft(_dora_config),
    "SHiRA": _peft(shira_config),
    "Super-Tuning": _peft(_supertuning_config),
    "AdaptFormer": lambda dense, budget, run: get_peft_model(dense.model, adaptformer_config(dense, budget)),
    "Mona": _mona,
    "internal": _sfa(external_share=0.0),
    "internal, random": _sfa(external_share=0.0, initial_ticket="random"),
    "internal, magnitude": _sfa(external_share=0.0),
    "external": _sfa(external_share=1.0),
    "external, no filters": _sfa(external_share=1.0, external_conv=0),
    "both": _sfa(),
    "both, no filters": _sfa(external_conv=0),
}
WITHOUT_BUDGET = {"full", "head", "BitFit", "LayerNorm"}
SEARCHES = {"internal", "both", "both, no filters"}
SEARCH_STEPS = 40
# Where the suite `tune` starts from.
RATES = {
    "full": 1e-3,
    "head": 0.0,
    "BitFit": 1e-2,
    "LayerNorm": 1e-2,
    "LoRA": 1e-2,
    "DoRA": 1e-2,
    "SHiRA": 3e-2,
    "Super-Tuning": 2.4e-2,
    "AdaptFormer": 1e-2,
    "Mona": 1e-2,
    "external": 1e-2,
    "external, no filters": 2e-2,
    "both": 1e-2,
    "both, no filters": 2e-2,
}


def internal_rate(density: float) -> float:
    """The default of `sfa_peft.parameter_groups`."""
    return round(min(7e-3 / density**0.5, 0.1), 4)


def default_run(method: str, budget: float, **changes: Any) -> Run:
    of_both = internal_rate(budget / 2) if method.startswith("both") else 0.0
    run = Run(
        method,
        0.0 if method in WITHOUT_BUDGET else budget,
        internal_rate(budget) if method.startswith("internal") else RATES[method],
        of_both,
        SEARCH_STEPS if method in SEARCHES else 0,
    )
    return replace(run, **changes)


def suites() -> dict[str, list[Run]]:
    """The runs by the question that they answer."""
    return {
        # Each method's rate, on a grid of steps of 2 around the best that is known.
        "tune": [
            replace(default_run(method, budget), rate=default_run(method, budget).rate * factor)
            for budget in (0.005, 0.02)
            for method in METHODS
            if method not in ("head", "both", "both, no filters") and not (method in WITHOUT_BUDGET and budget != 0.02)
            for factor in (0.25, 0.5, 1, 2, 4)
        ]
        + [
            default_run("both", budget, rate=1e-2 * external, internal_rate=internal_rate(budget / 2) * internal)
            for budget in (0.005, 0.02)
            for external in (0.5, 1, 2)
            for internal in (0.5, 1, 2)
        ],
        "main": [default_run(method, budget) for budget in BUDGETS for method in METHODS],
        "share": [
            default_run("both", budget, options={"external_share": share})
            for budget in (0.005, 0.02)
            for share in (0.1, 0.25, 0.75)
        ],
        "search": [
            default_run(method, budget, search_steps=steps)
            for budget in (0.005, 0.02)
            for method in ("internal", "both")
            for steps in (10, 20, 40, 80, 160)
        ],
    }


def pack(dataset: str, out: Path) -> None:
    """Put the images and the labels of a dataset into one file, as they are."""
    import datasets

    folder = Path(dataset)
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
    parts = datasets.load_dataset("parquet", data_files=files) if folder.is_dir() else datasets.load_dataset(dataset)
    with zipfile.ZipFile(out, "w") as file:
        for split in ("train", "validation"):
            for i, row in enumerate(parts[split]):
                for column in ("image", "label"):
                    kind = "JPEG" if row[column].format == "JPEG" else "PNG"
                    data = io.BytesIO()
                    row[column].save(data, kind, quality=95)
                    file.writestr(f"{split}/{i:05}.{column}", data.getvalue())
    print(f"{out}: {out.stat().st_size:,} bytes")


@dataclass
class Data:
    """Images of shape (n, 3, height, width), uint8, and labels of shape (n, height, width)."""

    images: Tensor
    labels: Tensor

    @classmethod
    def read(cls, path: Path, split: str, size: tuple[int, int], classes: int, device: torch.device) -> Data:
        found: dict[str, list[Tensor]] = {"image": [], "label": []}
        with zipfile.ZipFile(path) as file:
            for name in sorted(name for name in file.namelist() if name.startswith(f"{split}/")):
                column = name.rpartition(".")[2]
                picture = Image.open(io.BytesIO(file.read(name)))
                picture = picture.convert("RGB") if column == "image" else picture
                how = Image.Resampling.BILINEAR if column == "image" else Image.Resampling.NEAREST
                found[column].append(torch.from_numpy(np.array(picture.resize(size[::-1], how))))
        labels = torch.stack(found["label"]).long()
        labels[labels >= classes] = IGNORED
        return cls(torch.stack(found["image"]).permute(0, 3, 1, 2).contiguous().to(device), labels.to(device))

    def batch(self, rows: Tensor, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images, normalized, and their labels: flipped or not, zoomed by 1 to `ZOOM`, at a random place."""
        n = len(rows)
        zoom = 1 / (1 + (ZOOM - 1) * torch.rand(n, generator=generator))
        shift = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - zoom)[:, None]
        flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = zoom * flip, zoom
        theta[:, :, 2] = shift
        device = self.images.device
        where = rows.to(device)
        grid = F.affine_grid(theta.to(device), [n, 3, *size], align_corners=False)
        images = F.grid_sample(self.images[where].float(), grid, align_corners=False, padding_mode="border")
        labels = self.labels[where][:, None].float()
        labels = F.grid_sample(labels, grid, mode="nearest", align_corners=False, padding_mode="border")
        return normalized(images), labels[:, 0].round().long()


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


class Segmenter(nn.Module):
    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        config = load_config(name)
        self.backbone = load_backbone(name, config, reshape_hidden_states=True)
        self.decode_head = LinearHead(self.backbone.channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes, height, width) at the size of the images."""
        logits = self.decode_head(self.backbone(images).feature_maps)
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = model(images)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)


class Bench:
    """The data, the backbone, and what does not change between runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.size, self.whole = tuple(args.image_size), tuple(args.eval_size)
        # Large enough for the largest zoom.
        stored = tuple(min(int(side * ZOOM), most) for side, most in zip(self.size, self.whole, strict=True))
        self.train = Data.read(args.data, "train", stored, args.classes, self.device)
        self.validation = Data.read(args.data, "validation", self.whole, args.classes, self.device)
        torch.manual_seed(0)
        self.base = Segmenter(args.model, args.classes)
        if self.device.type == "cpu":  # faster there: twice for Swin's frozen position bias, 1.5 times for DINOv2
            self.base.backbone.set_attn_implementation("eager")

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        rows = itertools.chain.from_iterable(
            torch.randperm(len(self.train.images), generator=generator).split(BATCH) for _ in itertools.count()
        )
        full = (r for r in rows if len(r) == BATCH)
        for chosen in itertools.islice(full, steps):
            yield self.train.batch(chosen, self.size, generator)

    def run(self, run: Run, seed: int) -> dict[str, Any]:
        started = time.perf_counter()
        torch.manual_seed(seed)
        model: nn.Module = copy.deepcopy(self.base).to(self.device)
        for classify in model.decode_head.classifiers:
            classify.reset_parameters()
        dense = Dense(model, "backbone", ["decode_head"])
        whole = dense.backbone_parameters
        model = METHODS[run.method](dense, int(run.budget * whole), run)
        if run.search_steps:
            batches = list(self.batches(seed + 1000, run.search_steps))
            search_ticket(model, batches, steps=run.search_steps, loss_fn=loss_of, seed=seed, progress=False)
        trained = trained_backbone_parameters(model, dense.heads)
        self._train(model, run, seed, self.args.steps - run.search_steps)
        return self.scores(model) | {
            "trained": trained,
            "backbone": whole,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _train(self, model: nn.Module, run: Run, seed: int, steps: int) -> None:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                is_internal = run.internal_rate and ".sfa_internal." in name
                rate = HEAD_RATE if is_head(name, ["decode_head"]) else run.internal_rate if is_internal else run.rate
                groups.setdefault(rate, []).append(p)
        optimizer = torch.optim.AdamW(
            [{"params": params, "lr": rate} for rate, params in groups.items()], weight_decay=0.0, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / WARMUP, 1.0) * (1 - i / steps) ** POWER
        )
        parameters = [p for params in groups.values() for p in params]
        model.train()
        for batch in self.batches(seed, steps):
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    @torch.no_grad()
    def scores(self, model: nn.Module) -> dict[str, float]:
        """On the validation images: mean IoU (of the classes that labels or predictions have) and accuracy in percent,
        and the loss per pixel.
        """
        model.eval()
        n = self.args.classes
        confusion = torch.zeros(n * n, dtype=torch.long, device=self.device)
        loss = 0.0
        for images, labels in zip(self.validation.images.split(4), self.validation.labels.split(4), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = model(normalized(images)).float()
            known = labels != IGNORED
            loss += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            confusion += torch.bincount(labels[known] * n + logits.argmax(1)[known], minlength=n * n)
        table = confusion.view(n, n).double()
        both, either = table.diag(), table.sum(0) + table.sum(1) - table.diag()
        return {
            "mean_iou": round(float(100 * (both / either)[either > 0].mean()), 2),
            "accuracy": round(float(100 * both.sum() / table.sum()), 2),
            "loss": round(loss / float(table.sum()), 4),
        }


def key(setting: dict[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(args: argparse.Namespace, jobs: Any, results: Any) -> None:
    """Take runs from a queue until it has no more."""
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    while (job := jobs.get()) is not None:
        setting, run, seed = job
        try:
            results.put(setting | bench.run(run, seed))
        except Exception:  # told with the run, and the other runs go on
            results.put(setting | {"error": traceback.format_exc()})


def run_all(args: argparse.Namespace) -> None:
    every = suites()
    shared = {
        "model": Path(args.model).name,
        "data": args.data.stem,
        "steps": args.steps,
        "image_size": list(args.image_size),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
    }
    todo = {}
    for seed, name in itertools.product(args.seeds, args.suites):
        for run in every[name]:
            is_wanted = (not args.budgets or run.budget in (0.0, *args.budgets)) and (
                not args.methods or run.method in args.methods
            )
            if is_wanted:
                setting = shared | asdict(run) | {"seed": seed}
                todo[key(setting)] = (setting, run, seed)
    known = {key({k: r.get(k) for k in next(iter(todo.values()))[0]}) for r in read(args.results)} if todo else set()
    todo = {k: job for k, job in todo.items() if k not in known}
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    for job in todo.values():
        jobs.put(job)
    workers = min(args.workers, len(todo))
    for _ in range(workers):
        jobs.put(None)
    processes = [context.Process(target=work, args=(args, jobs, results), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    for done in range(len(todo)):
        result = results.get()
        if "error" in result:
            print(result["method"], result["error"], file=sys.stderr, flush=True)
            continue
        with args.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{done + 1}/{len(todo)} {result['method']} {result['budget']:.1%} {result['mean_iou']}", flush=True)


def grouped(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in results:
        options = " ".join(f"{k}={v}" for k, v in r["options"].items())
        of = (r["data"], r["model"], r["steps"], r["budget"], r["method"], r["rate"], r["internal_rate"])
        groups.setdefault((*of, r["search_steps"], options), []).append(r)
    return groups


def report(results: list[dict[str, Any]]) -> str:
    """A Markdown table for each backbone: every setting's mean and spread over seeds, best first within a budget."""
    lines: list[str] = []
    rows = []
    for of, own in grouped(results).items():
        ious = [r["mean_iou"] for r in own]
        loss = statistics.mean(r["loss"] for r in own)
        rows.append((of[:4], -statistics.mean(ious), of[4:], ious, own[0]["trained"], loss))
    title = None
    for (data, model, steps, budget), mean, (method, rate, internal, search, options), ious, trained, loss in sorted(
        rows, key=lambda row: row[:2]
    ):
        if title != (data, model, steps):
            title = (data, model, steps)
            lines += ["", f"{data}, {model}, {steps} steps", ""]
            columns = ("budget", "method", "rate", "search", "trained", "mean IoU", "spread", "loss", "seeds")
            lines += [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        spread = f"{statistics.stdev(ious):.1f}" if len(ious) > 1 else "-"
        rates = f"{rate:g}" + (f" / {internal:g}" if internal else "")
        lines.append(
            f"| {f'{budget:.1%}' if budget else '-'} | {method} {options} | {rates} | {search} | {trained:,} | "
            f"{-mean:.1f} | {spread} | {loss:.3f} | {len(ious)} |"
        )
    return "\n".join(lines)


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Mean IoU over the budget, with the spread over seeds; of a method the rates with most seeds, of those the best.

    Runs with other options are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(METHODS, plt.get_cmap("tab20").colors, strict=False)) | {"both": "black"}
    models = list(dict.fromkeys(r["model"] for r in results))
    figure, axes = plt.subplots(1, len(models), figsize=(6.5 * len(models), 4.5), layout="constrained", squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        best: dict[tuple[str, float], list[float]] = {}
        for of, own in grouped([r for r in results if r["model"] == model and not r["options"]]).items():
            ious, at = [r["mean_iou"] for r in own], (of[4], of[3])
            if (len(ious), statistics.mean(ious)) > (len(best.get(at, ())), statistics.mean(best.get(at, [0.0]))):
                best[at] = ious
        for method in METHODS:
            found = {b: ious for (m, b), ious in sorted(best.items()) if m == method}
            means = [statistics.mean(ious) for ious in found.values()]
            if method in WITHOUT_BUDGET and found:
                axis.axhline(means[0], linestyle="--", linewidth=1, color="grey")
                axis.annotate(method, (0.01, means[0]), xycoords=("axes fraction", "data"), fontsize=8)
            elif found:
                spreads = [statistics.stdev(ious) if len(ious) > 1 else 0.0 for ious in found.values()]
                axis.errorbar(
                    [100 * b for b in found],
                    means,
                    yerr=spreads,
                    marker="o",
                    capsize=3,
                    color=colours[method],
                    label=method,
                )
        axis.set_xscale("log")
        axis.set_xticks([100 * b for b in BUDGETS], [f"{b:.1%}" for b in BUDGETS])
        axis.minorticks_off()
        axis.set(title=model, xlabel="trained part of the backbone", ylabel="mean IoU (%)")
        axis.grid(alpha=0.3)
    labels = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="put a dataset into one file")
    packing.add_argument("out", type=Path)
    packing.add_argument("--dataset", required=True, help="a folder of parquet files, or a dataset on the Hub")
    running = commands.add_parser("run", help="train")
    running.add_argument("suites", nargs="+", choices=list(suites()))
    running.add_argument("--data", type=Path, required=True, help="the file that `pack` made")
    running.add_argument("--model", required=True, help="a Swin or DINOv2 backbone, a folder or on the Hub")
    running.add_argument("--classes", type=int, default=11, help="labels from this number on are ignored")
    running.add_argument("--image_size", type=int, nargs=2, default=(180, 240), metavar=("HEIGHT", "WIDTH"))
    running.add_argument("--eval_size", type=int, nargs=2, default=(360, 480), metavar=("HEIGHT", "WIDTH"))
    running.add_argument("--steps", type=int, default=400, help="of the training and the search together")
    running.add_argument("--seeds", type=int, nargs="+", default=(0,))
    running.add_argument("--budgets", type=float, nargs="+", help="only these")
    running.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these")
    running.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    running.add_argument("--workers", type=int, default=1)
    running.add_argument("--threads", type=int, default=os.cpu_count(), help="of each worker")
    running.add_argument("--results", type=Path, required=True)
    reporting = commands.add_parser("report", help="show what is stored")
    reporting.add_argument("--results", type=Path, required=True)
    reporting.add_argument("--picture", type=Path, help="also draw mean IoU over the budget")
    args = parser.parse_args()
    if args.command == "pack":
        pack(args.dataset, args.out)
        return
    if args.command == "run":
        run_all(args)
    results = read(args.results)
    print(report(results))
    if args.command == "report" and args.picture:
        picture(results, args.picture)


if __name__ == "__main__":
    main()

"""Accuracy at a budget: SFA, its peers and full fine-tuning, for the same total number of steps.

Semantic segmentation with a linear head on a pretrained backbone, so that the backbone has to do the work, or with an
UperNet head. A search takes its steps from the training. Forward passes run under bfloat16 autocast, on a CPU too.
SFA has its default rates; a peer's rate is searched at the first seed, by steps of 2 until the best is inside, and the
best is run with the other seeds. Each result is stored with its setting, and what is stored is not run again, so the
work can be stopped and continued. It is shared by worker processes: as many as cores, with one thread each. On a GPU
the step of a training is captured once and replayed.

    python benchmarks/accuracy.py pack scenes.zip --dataset FOLDER
    python benchmarks/accuracy.py run sfa peers --data scenes.zip --models BACKBONE BACKBONE --results accuracy.jsonl
    python benchmarks/accuracy.py report --results accuracy.jsonl --picture accuracy.png
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import multiprocessing
import statistics
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import SupertuningConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig, UperNetConfig, UperNetForSemanticSegmentation

from sfa_peft import SFAConfig, search_ticket

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from dense.methods import Dense, adaptformer_config, is_head, lora_config, shira_config, trained_backbone_parameters
from dense.models import LinearHead, load_backbone, load_config

IGNORED = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD_RATE = 2e-3
BATCH, WARMUP, POWER, CLIP, ZOOM = 8, 25, 0.9, 1.0, 1.5
BUDGETS = (0.02, 0.005, 0.05, 0.01)  # those that tell most first


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
        head: ``linear`` or ``upernet``.
        rewind: Whether the training starts again after the search, or else goes on from its end.
        first_steps: For a method without a search, the steps of a first phase at the rates of a search, taken from the
            total.
    """

    method: str
    budget: float
    rate: float
    internal_rate: float = 0.0
    search_steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    head: str = "linear"
    rewind: bool = True
    first_steps: int = 0


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
TUNED = {"full", "BitFit", "LayerNorm", "LoRA", "DoRA", "SHiRA", "Super-Tuning", "AdaptFormer", "Mona"}
MOST_RATES = 6
SEARCHES = {"internal", "both", "both, no filters"}
SEARCH_STEPS = 40
# Of the backbone in a first phase: those of a search.
FIRST_RATE, FIRST_RATES = 2e-3, {"full": 5e-4, "BitFit": 5e-4, "LayerNorm": 5e-4}
# Of peers, where the search of the rate starts.
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


# A run and its seed, and the mean IoU that it had; None if it was not run yet.
Score = Callable[[Run, int], float | None]
Jobs = Iterator[tuple[Run, int]]


def tuned(run: Run, seeds: Sequence[int], score: Score) -> Jobs:
    """What to run to know a method at its best rate, as far as the results so far tell."""
    first, *others = seeds
    rates = [run.rate / 2, run.rate, 2 * run.rate]
    while True:
        runs = [replace(run, rate=float(f"{rate:.3g}")) for rate in rates]
        scores = [score(one, first) for one in runs]
        yield from ((one, first) for one in runs)
        if None in scores:
            return
        best = scores.index(max(scores))
        if best == 0 and len(rates) < MOST_RATES:
            rates.insert(0, rates[0] / 2)
        elif best == len(rates) - 1 and len(rates) < MOST_RATES:
            rates.append(2 * rates[-1])
        else:
            yield from ((runs[best], seed) for seed in others)
            return


def jobs_of(run: Run, seeds: Sequence[int], score: Score) -> Jobs:
    return tuned(run, seeds, score) if run.method in TUNED else ((run, seed) for seed in seeds)


def share_run(budget: float, share: float) -> Run:
    """Both kinds with another share, the internal rate by their density."""
    rate = internal_rate(budget * (1 - share))
    return default_run("both", budget, options={"external_share": share}, internal_rate=rate)


def suites() -> dict[str, list[Run]]:
    """The runs by the question that they answer."""
    return {
        "sfa": [default_run(method, budget) for budget in BUDGETS for method in ("both", "external", "internal")],
        "peers": [default_run("full", 0.0)]
        + [default_run(method, budget) for budget in BUDGETS for method in ("LoRA", "Mona")],
        "other_peers": [default_run(method, 0.0) for method in ("head", "BitFit", "LayerNorm")]
        + [
            default_run(method, budget)
            for budget in BUDGETS
            for method in ("DoRA", "SHiRA", "Super-Tuning", "AdaptFormer")
        ],
        "tickets": [
            default_run(method, budget)
            for budget in BUDGETS
            for method in ("internal, random", "internal, magnitude", "external, no filters")
        ],
        "share": [share_run(budget, share) for budget in BUDGETS for share in (0.75, 0.9)],
        "place": [
            run
            for budget in BUDGETS
            for run in (
                default_run("both", budget, options={"external_places": ["mlp_parallel"]}),
                default_run("external", budget, options={"external_places": ["mlp_parallel"]}),
            )
        ],
        "upernet": [
            run
            for budget in (0.02, 0.005)
            for method in ("both", "external", "internal", "full", "LoRA", "Mona")
            for run in with_first_phase(default_run(method, budget, head="upernet"))
        ],
        "rates": [
            default_run("both", budget, rate=1e-2 * external, internal_rate=internal_rate(budget / 2) * internal)
            for budget in (0.005, 0.02)
            for external in (0.5, 1, 2)
            for internal in (0.5, 1, 2)
        ],
        "search": [
            default_run(method, budget, search_steps=steps)
            for budget in (0.005, 0.02)
            for method in ("internal", "both")
            for steps in (10, 20, 40, 80, 160)
        ],
        "rewind": [
            default_run("both", budget, head=head, rate=rate, rewind=rewind)
            for budget in BUDGETS
            for head, rate in (("linear", RATES["both"]), ("upernet", 5e-3))
            for rewind in (True, False)
        ],
    }


def with_first_phase(run: Run) -> list[Run]:
    """A run, and the same with a first phase: its search, if it has one, or as many steps at the rates of a search."""
    return [run, replace(run, rewind=False) if run.search_steps else replace(run, first_steps=SEARCH_STEPS)]


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
    @cache
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
    """A backbone with a head that `set_head` makes: ``linear``, or ``upernet`` of 64 channels."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = load_backbone(name, load_config(name), reshape_hidden_states=True)

    def set_head(self, head: str, classes: int) -> None:
        if head == "linear":
            self.decode_head = LinearHead(self.backbone.channels, classes)
        else:
            config = UperNetConfig(
                backbone_config=self.backbone.config, hidden_size=64, use_auxiliary_head=False, num_labels=classes
            )
            self.decode_head = UperNetForSemanticSegmentation(config).decode_head

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes, height, width) at the size of the images."""
        logits = self.decode_head(self.backbone(images).feature_maps)
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = model(images)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)


class Replayed:
    """A step on a GPU: run a few times, then captured, and replayed from then on.

    Small models are bound by launches, so that many processes share a GPU well when each has one launch a step.
    """

    EAGER = 5

    def __init__(self, step: Callable[..., None]) -> None:
        self.step = step
        self.done = 0
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> None:
        if self.done < self.EAGER:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.done == self.EAGER:
                self.inputs = [tensor.clone() for tensor in inputs]
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.step(*self.inputs)
            for own, tensor in zip(self.inputs, inputs, strict=True):
                own.copy_(tensor)
            self.graph.replay()
        self.done += 1


def sizes_for(config: PretrainedConfig, args: argparse.Namespace) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of images in training and in validation. A plain transformer needs multiples of its patches."""
    multiple = 1 if hasattr(config, "depths") else config.patch_size
    trained, tested = (
        tuple(side // multiple * multiple for side in size) for size in (args.image_size, args.eval_size)
    )
    return trained, tested


class Bench:
    """The data, the backbone, and what does not change between runs."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self.args = args
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        self.base = Segmenter(model).to(self.device)
        self.size, self.whole = sizes_for(self.base.backbone.config, args)
        # Large enough for the largest zoom.
        stored = tuple(min(int(side * ZOOM), most) for side, most in zip(self.size, self.whole, strict=True))
        self.train = Data.read(args.data, "train", stored, args.classes, self.device)
        self.validation = Data.read(args.data, "validation", self.whole, args.classes, self.device)
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
        segmenter = copy.deepcopy(self.base)
        segmenter.set_head(run.head, self.args.classes)
        dense = Dense(segmenter.to(self.device), "backbone", ["decode_head"])
        whole = dense.backbone_parameters
        model: nn.Module = METHODS[run.method](dense, int(run.budget * whole), run)
        if run.search_steps:
            batches = list(self.batches(seed + 1000, run.search_steps))
            search_ticket(
                model,
                batches,
                steps=run.search_steps,
                rewind=run.rewind,
                loss_fn=loss_of,
                seed=seed,
                progress=False,
            )
        trained = trained_backbone_parameters(model, dense.heads)
        steps = self.args.steps - run.search_steps - run.first_steps

        def rate_of(name: str) -> float:
            is_internal = run.internal_rate and ".sfa_internal." in name
            return run.internal_rate if is_internal else run.rate

        def factor(step: int) -> float:
            return min((step + 1) / WARMUP, 1.0) * (1 - step / steps) ** POWER

        if run.first_steps:
            rate = FIRST_RATES.get(run.method, FIRST_RATE)
            self._train(model, lambda name: rate, lambda step: 1.0, self.batches(seed + 1000, run.first_steps))
        self._train(model, rate_of, factor, self.batches(seed, steps))
        return self.scores(model) | {
            "trained": trained,
            "backbone": whole,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _train(
        self,
        model: nn.Module,
        rate_of: Callable[[str], float],
        factor: Callable[[int], float],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        """Train the head, and what is trained in the backbone at the rate of its name, both times a factor by step."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                rate = HEAD_RATE if is_head(name, ["decode_head"]) else rate_of(name)
                groups.setdefault(rate, []).append(p)
        parameters = [p for params in groups.values() for p in params]
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            [
                {"params": params, "lr": torch.tensor(rate, device=self.device) if on_gpu else rate}
                for rate, params in groups.items()
            ],
            weight_decay=0.0,
            fused=True,
            capturable=on_gpu,
        )

        def step(images: Tensor, labels: Tensor) -> None:
            loss_of(model, (images, labels)).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()

        model.train()
        replayed = Replayed(step) if on_gpu else step
        for i, batch in enumerate(batches):
            part = factor(i)
            for group, rate in zip(optimizer.param_groups, groups, strict=True):
                if on_gpu:
                    group["lr"].fill_(rate * part)
                else:
                    group["lr"] = rate * part
            replayed(*batch)

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
    lines = path.read_text().splitlines() if path.exists() else []
    return [{"head": "linear"} | json.loads(line) for line in lines]


def work(args: argparse.Namespace, jobs: Connection) -> None:
    """Run what comes, until nothing more does."""
    torch.set_num_threads(args.threads)
    bench_of = cache(partial(Bench, args))
    while (job := jobs.recv()) is not None:
        model, run, seed = job
        try:
            jobs.send(bench_of(model).run(run, seed))
        except Exception:  # told with the run, and the other runs go on
            jobs.send({"error": traceback.format_exc()})


class Plan:
    """What is to be run, by the results that there are.

    Attributes:
        results: Of the file, and those that came since.
        failed: Keys of settings that raised.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
        self.sizes = {model: sizes_for(load_config(model), args)[0] for model in args.models}
        self.scores: dict[str, float] = {}
        self.failed: set[str] = set()

    def setting(self, model: str, run: Run, seed: int) -> dict[str, Any]:
        return {
            "model": Path(model).name,
            "data": self.args.data.stem,
            "steps": self.args.steps,
            "image_size": list(self.sizes[model]),
            "device": self.device,
            **asdict(run),
            "seed": seed,
        }

    def learn(self, results: Iterable[dict[str, Any]]) -> None:
        fields = self.setting(self.args.models[0], default_run("head", 0.0), 0)
        for result in results:
            # A field that came later has its default in older results.
            setting = {name: result.get(name, otherwise) for name, otherwise in fields.items()}
            self.scores[key(setting)] = result["mean_iou"]

    def jobs(self) -> Iterator[tuple[str, Run, int]]:
        """What is not known yet, in the order of the suites."""
        every = suites()
        wanted = [run for suite in self.args.suites for run in every[suite] if self._is_wanted(run)]
        for run, model in itertools.product(wanted, self.args.models):

            def score(run: Run, seed: int, model: str = model) -> float | None:
                return self.scores.get(key(self.setting(model, run, seed)))

            for job, seed in jobs_of(run, self.args.seeds, score):
                if score(job, seed) is None:
                    yield model, job, seed

    def _is_wanted(self, run: Run) -> bool:
        of_budget = not self.args.budgets or run.budget in (0.0, *self.args.budgets)
        return of_budget and (not self.args.methods or run.method in self.args.methods)


def run_all(args: argparse.Namespace) -> None:
    plan = Plan(args)
    plan.learn(read(args.results))
    context = multiprocessing.get_context("spawn")
    idle: list[Connection] = []
    for _ in range(args.workers):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(args, theirs), daemon=True).start()
        idle.append(ours)
    running: dict[Connection, tuple[str, dict[str, Any]]] = {}
    done = 0
    while True:
        taken = plan.failed | {k for k, _ in running.values()}
        for job in plan.jobs() if idle else ():
            setting = plan.setting(*job)
            if key(setting) not in taken:
                taken.add(key(setting))
                worker = idle.pop()
                worker.send(job)
                running[worker] = key(setting), setting
                if not idle:
                    break
        if not running:
            break
        for worker in wait(list(running)):
            k, setting = running.pop(worker)
            done += 1
            try:
                result = worker.recv()
                idle.append(worker)
            except EOFError:
                result = {"error": "the worker died"}
            shown = f"{done}: {setting['model']} {setting['method']} {setting['budget']:.1%} {setting['rate']:g}"
            if "error" in result:
                plan.failed.add(k)
                print(shown, result["error"], file=sys.stderr, flush=True)
                continue
            plan.learn([setting | result])
            with args.results.open("a") as file:
                file.write(json.dumps(setting | result) + "\n")
            print(shown, setting["options"] or "", result["mean_iou"], f"{result['seconds']} s", flush=True)
    for worker in idle:
        worker.send(None)


def grouped(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Results by all but the seed: data, model, setting, budget, method, rates, search steps, options."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in results:
        first = {"first_steps": r["first_steps"]} if r.get("first_steps") else {}
        on = {} if r.get("rewind", True) else {"rewind": False}
        options = " ".join(f"{k}={v}" for k, v in (r["options"] | first | on).items())
        setting = f"{r['head']} head, {r['steps']} steps of {r['image_size'][0]}x{r['image_size'][1]}"
        of = (r["data"], r["model"], setting, r["budget"], r["method"], r["rate"], r["internal_rate"])
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
    for (*where, budget), mean, (method, rate, internal, search, options), ious, trained, loss in sorted(
        rows, key=lambda row: row[:2]
    ):
        if title != where:
            title = where
            lines += ["", ", ".join(where), ""]
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
        for of, own in grouped([r for r in results if r["model"] == model]).items():
            if of[-1]:
                continue
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
    running.add_argument("--models", nargs="+", required=True, help="Swin or DINOv2 backbones, folders or on the Hub")
    running.add_argument("--classes", type=int, default=11, help="labels from this number on are ignored")
    running.add_argument("--image_size", type=int, nargs=2, default=(180, 240), metavar=("HEIGHT", "WIDTH"))
    running.add_argument("--eval_size", type=int, nargs=2, default=(360, 480), metavar=("HEIGHT", "WIDTH"))
    running.add_argument("--steps", type=int, default=400, help="of the training and the search together")
    running.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    running.add_argument("--budgets", type=float, nargs="+", help="only these")
    running.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these")
    running.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    running.add_argument("--workers", type=int, default=1)
    running.add_argument("--threads", type=int, default=1, help="of each worker")
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

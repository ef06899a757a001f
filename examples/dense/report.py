"""What a person sees of a run: pictures of its predictions, and one HTML page that opens offline."""

from __future__ import annotations

import base64
import io
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import peft
import torch
import transformers
from accelerate import Accelerator
from PIL import Image
from torch import nn

import sfa_peft
from sfa_peft import Ticket

from .augmentation import finished, to_tensors
from .checkpoints import Progress
from .data import Rows
from .diagram import diagram_of
from .errors import DataError
from .folder import COMPARED, MEASURED, PICTURES, REPORT, RESULTS, TICKET, read_json, write_text
from .loading import read_item, rows_to_show
from .pictures import draw_curves, save_grid, smaller
from .samples import Array, Problems, Sample
from .task import Task, predictions

SAMPLES = 5
BEFORE, LAST = "before.npz", "last.npz"
METHOD_NAMES = {
    "sfa": "SFA",
    "lora": "LoRA",
    "shira": "SHiRA",
    "adaptformer": "AdaptFormer",
    "full": "full fine-tuning",
    "head": "the head alone",
}


class Report:
    """Draws the same validation samples at each evaluation, and writes the page.

    Args:
        task: Paints annotations; has the flags.
        folder: Where the run writes.
        rows: The validation split.
        accelerator: Says where the model is.
        progress: The curves and scores.
        problems: What was wrong with each split.
        doubts: What is doubtful in it.
        command: How the run was started.

    Attributes:
        facts: What else the page tells, by name.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        rows: Rows,
        accelerator: Accelerator,
        progress: Progress,
        problems: Mapping[str, Problems],
        doubts: Mapping[str, Sequence[str]],
        command: str,
    ) -> None:
        self.task, self.folder, self.rows, self.accelerator = task, folder, rows, accelerator
        self.progress, self.problems, self.doubts, self.command = progress, problems, doubts, command
        self.facts: dict[str, Any] = {}
        self.samples: list[Sample] = []

    def read_samples(self) -> None:
        """Read the samples to be drawn.

        Raises:
            DataError: If none of them can be used.
        """
        self.samples, wrong, tried = [], Problems(), 0
        for place, row in rows_to_show(self.rows, SAMPLES):
            item, tried = read_item(self.task, self.rows, row, place, keeps_sample=True), tried + 1
            wrong.merge([item.problems])
            if item.sample is not None:
                self.samples.append(item.sample)
            if len(self.samples) == SAMPLES:
                return
        if not self.samples:
            raise DataError(
                f"{tried} rows of {self.rows.split!r} were tried and none can be used: {'; '.join(wrong.lines())}"
            )

    def photo_size(self) -> list[int]:
        """The usual height and width of the dataset's images."""
        sides = np.median([sample.size for sample in self.samples], axis=0)
        return [round(side) for side in sides.tolist()]

    def draw(self, model: nn.Module) -> None:
        """Draw image, truth, what the model predicted before training, and what it predicts now."""
        task, step, folder = self.task, self.progress.step, self.folder / PICTURES
        folder.mkdir(exist_ok=True)
        images = [np.asarray(sample.image) for sample in self.samples]
        tensors = torch.stack([finished(to_tensors(s, task.size))["image"] for s in self.samples])
        with self.accelerator.autocast():
            found = predictions(task, model, tensors.to(self.accelerator.device), self.samples)
        painted = [task.paint(image, one) for image, one in zip(images, found, strict=True)]
        columns = {
            "image": images,
            "truth": [task.paint(i, task.truth(s)) for i, s in zip(images, self.samples, strict=True)],
        }
        if step == 0:
            np.savez(folder / BEFORE, *painted)
            columns["before"] = painted
        else:
            with np.load(folder / BEFORE) as before:
                columns["before"] = [before[key] for key in before.files]
            columns[f"step {step}"] = painted
        save_grid(self._picture(step), columns, task.legend(), self._summary())
        truths = [task.truth(sample) for sample in self.samples]
        errors = [task.paint_errors(*three) for three in zip(images, truths, found, strict=True)]
        shown = {"image": images, "truth": columns["truth"], "found": painted, "errors": errors}
        small = {f"{name}_{i}": smaller(p) for name, own in shown.items() for i, p in enumerate(own)}
        np.savez_compressed(folder / LAST, **small)

    def write(self) -> None:
        """Write `report.html` into the run's folder, with its pictures in it."""
        args, progress, task = self.task.args, self.progress, self.task
        last = progress.scores[max(progress.scores)]
        names = [name for name, value in last.items() if isinstance(value, float)]
        per_class = next((value for name, value in last.items() if name.startswith("per_class")), [])
        drawn = {step: self._picture(step) for step in sorted(progress.scores)}
        device = self.accelerator.device.type
        compared, ticket = self._compared(), self.folder / TICKET
        facts = {
            "method": f"{args.method}, budget {args.budget:.2%} of the backbone",
            **self.facts,
            "image size": f"{task.size[0]} x {task.size[1]}",
            "steps": f"{progress.step} of {args.steps}, {progress.seconds:.0f} s",
            "seed": args.seed,
            "processes": f"{self.accelerator.num_processes} on {device}, {self.accelerator.mixed_precision}",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, peft {peft.__version__}, sfa_peft {sfa_peft.__version__}",
        }
        curves = {name: {args.method: points} for name, points in progress.series.items() if points}
        for method, results in compared.items():
            for name, points in results["curves"].items():
                if name in curves and points:
                    curves[name][method] = points
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string((Path(__file__).parent / "report.html").read_text()).render(
            title=f"{task.name.capitalize()}: {args.model or 'embedded backbone'} on "
            f"{args.dataset or 'embedded scenes'}",
            sentence=self._sentence(compared),
            rows=self._rows(),
            legend=task.legend(),
            legend_is_scale=task.legend_is_scale,
            error_legend=task.error_legend(),
            score_names=names,
            scores={step: {n: number(s.get(n)) for n in names} for step, s in sorted(progress.scores.items())},
            best=self._best_step(),
            methods=self._methods(compared),
            own=args.method,
            headline=task.headline,
            classes=self._classes(per_class),
            curves={name: _inline(draw_curves(name, own)) for name, own in curves.items()},
            pictures={f"step {step}": _inline(path.read_bytes()) for step, path in drawn.items() if path.is_file()},
            diagram=diagram_of(Ticket.load(ticket)).as_html() if ticket.is_file() else None,
            facts=facts,
            problems=[f"{split}: {line}" for split, own in self.doubts.items() for line in own]
            + [f"{split}: {line}" for split, own in self.problems.items() for line in own.lines()],
            command=self.command,
        )
        write_text(self.folder / REPORT, page)

    def _rows(self) -> list[dict[str, str]]:
        """For each sample its pictures as data, by what they are called; that of the head alone if it was trained."""
        path, head = self.folder / PICTURES / LAST, self.folder.parent / COMPARED / "head" / PICTURES / LAST
        if not path.is_file():
            return []
        method = METHOD_NAMES.get(self.task.args.method, self.task.args.method)
        titles = {"image": "image", "truth": "truth", "head": "head alone", "found": method, "errors": "errors"}
        with np.load(path) as own:
            pictures = {key: own[key] for key in own.files}
        if head.is_file() and "head" in self.task.args.compare:
            with np.load(head) as other:
                pictures |= {key.replace("found", "head"): other[key] for key in other.files if "found" in key}
        count = sum(key.startswith("image_") for key in pictures)
        return [
            {title: _jpeg(pictures[f"{name}_{i}"]) for name, title in titles.items() if f"{name}_{i}" in pictures}
            for i in range(count)
        ]

    def _compared(self) -> dict[str, dict[str, Any]]:
        """What the runs of other methods have ended with."""
        folders = {method: self.folder.parent / COMPARED / method for method in self.task.args.compare}
        return {
            method: read_json(folder / RESULTS, MEASURED, "train it again with --overwrite")
            for method, folder in folders.items()
            if (folder / RESULTS).is_file()
        }

    def _methods(self, compared: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
        """This run and those of other methods in a table; none if there are no others."""
        if not compared:
            return {}
        last, headline = self.progress.scores[max(self.progress.scores)], self.task.headline
        own = {
            "trained in the backbone": self.facts.get("trained in the backbone", ""),
            headline: number(last[headline]),
            "bytes saved": self.facts.get("saved, total", "-").removesuffix(" bytes"),
            "seconds": f"{self.progress.seconds:.0f}",
        }
        others = {
            method: {
                "trained in the backbone": share_of(
                    results["trained_backbone_parameters"], results["backbone_parameters"]
                ),
                headline: number(results["after"][headline]),
                "bytes saved": f"{results['bytes']['total']:,}",
                "seconds": f"{results['seconds']:.0f}",
            }
            for method, results in compared.items()
        }
        return {self.task.args.method: own} | others

    def _classes(self, scores: Sequence[float | None]) -> list[tuple[str, str, float]]:
        """Names, scores and the lengths of their bars, the worst first; classes of which nothing counts at the end."""
        named = list(zip(self.task.id2label.values(), scores, strict=False))
        known = sorted(((n, float(s)) for n, s in named if s is not None and math.isfinite(s)), key=lambda one: one[1])
        unknown = [(name, number(None), 0.0) for name, s in named if s is None or not math.isfinite(s)]
        return [(name, number(score), 100 * score) for name, score in known] + unknown

    def _best_step(self) -> int | None:
        sign = -1 if self.task.lower_is_better else 1
        own = {s: v.get(self.task.headline) for s, v in sorted(self.progress.scores.items())}
        known = {step: sign * value for step, value in own.items() if value is not None and math.isfinite(value)}
        return max(known, key=lambda step: known[step]) if known else None

    def _sentence(self, compared: Mapping[str, Mapping[str, Any]]) -> str:
        """What came out, in one sentence."""
        scores, task, args = self.progress.scores, self.task, self.task.args
        first, last = (number(scores[step][task.headline]) for step in (min(scores), max(scores)))
        method = METHOD_NAMES.get(args.method, args.method)
        trained = self.facts.get("trained in the backbone", "")
        what = f", training {trained} parameters of the backbone," if trained else ""
        text = f"{method}{what} has a {task.score_words} of {last} after {self.progress.step} steps"
        others = [
            f"{METHOD_NAMES.get(name, name)} has {number(results['after'][task.headline])}"
            for name, results in compared.items()
        ]
        best = self._best_step()
        if best is not None and 0 < best < self.progress.step:
            text += f" ({number(scores[best][task.headline])} after {best}, the best)"
        return f"{text}; before training it was {first}" + "".join(f"; {other}" for other in others) + "."

    def _picture(self, step: int) -> Path:
        return self.folder / PICTURES / f"step_{step:06d}.jpg"

    def _summary(self) -> str:
        scores, headline = self.progress.scores, self.task.headline
        ends = [number(scores[step][headline]) for step in sorted({min(scores), max(scores)})]
        return f"{self.task.args.method}: {headline} {' -> '.join(ends)}"


def share_of(trained: int, whole: int) -> str:
    """How many parameters are trained, for people."""
    return f"{trained:,} ({trained / whole:.2%})"


def number(value: Any) -> str:
    """A score for people; a dash where nothing counts."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _jpeg(picture: Array) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

"""What a person sees of a run: pictures of its predictions, and one HTML page that opens offline."""

from __future__ import annotations

import base64
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
from torch import nn

import sfa_peft

from .augmentation import finished, to_tensors
from .checkpoints import Progress
from .data import Rows
from .folder import PICTURES, REPORT, TICKET_PICTURE, write_text
from .loading import read_item, rows_to_show
from .pictures import draw_curves, save_grid
from .samples import DataError, Problems, Sample
from .task import Task, predictions

SAMPLES = 5
BEFORE = "before.npz"


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

    def write(self) -> None:
        """Write `report.html` into the run's folder, with its pictures in it."""
        args, progress, labels = self.task.args, self.progress, self.task.id2label.values()
        last = progress.scores[max(progress.scores)]
        names = [name for name, value in last.items() if isinstance(value, float)]
        per_class = next((value for name, value in last.items() if name.startswith("per_class")), [])
        ticket = self.folder / TICKET_PICTURE
        drawn = {step: self._picture(step) for step in sorted(progress.scores)}
        device = self.accelerator.device.type
        facts = {
            "method": f"{args.method}, budget {args.budget:.2%} of the backbone",
            **self.facts,
            "steps": f"{progress.step} of {args.steps}, {progress.seconds:.0f} s",
            "seed": args.seed,
            "processes": f"{self.accelerator.num_processes} on {device}, {self.accelerator.mixed_precision}",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, peft {peft.__version__}, sfa_peft {sfa_peft.__version__}",
        }
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string((Path(__file__).parent / "report.html").read_text()).render(
            title=f"{self.task.name.capitalize()}: {args.model or 'embedded backbone'} on "
            f"{args.dataset or 'embedded scenes'}",
            summary=self._summary(),
            score_names=names,
            scores={step: {n: number(s.get(n)) for n in names} for step, s in sorted(progress.scores.items())},
            per_class=dict(zip(labels, map(number, per_class), strict=False)),
            curves=_inline(draw_curves(progress.series)),
            pictures={f"step {step}": _inline(path.read_bytes()) for step, path in drawn.items() if path.is_file()},
            ticket=_inline(ticket.read_bytes()) if ticket.is_file() else None,
            facts=facts,
            problems=[f"{split}: {line}" for split, own in self.doubts.items() for line in own]
            + [f"{split}: {line}" for split, own in self.problems.items() for line in own.lines()],
            command=self.command,
        )
        write_text(self.folder / REPORT, page)

    def _picture(self, step: int) -> Path:
        return self.folder / PICTURES / f"step_{step:06d}.jpg"

    def _summary(self) -> str:
        scores, headline = self.progress.scores, self.task.headline
        ends = [number(scores[step][headline]) for step in sorted({min(scores), max(scores)})]
        return f"{self.task.args.method}: {headline} {' -> '.join(ends)}"


def number(value: Any) -> str:
    """A score for people; a dash where nothing counts."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

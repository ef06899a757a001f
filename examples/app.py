"""A page to try adapters on: upload an image, pick a task and an adapter, and see what it changes.

    python examples/app.py --runs out/segmentation out/depth                   # then open http://127.0.0.1:7860
    python examples/app.py                                                     # the adapters of multi_task.py

`--runs` are output folders of the other examples, trained with SFA. Adapters on the same backbone share it in memory.
The page shows the prediction beside that of the base model, and the ticket's picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import gradio
import torch
from accelerate import PartialState

from dense.folder import TICKET_PICTURE
from dense.report import number
from dense.samples import Array, BadSampleError, FlagError, read_image
from dense.switching import Switchboard, Trained
from multi_task import DEFAULT, TASKS

MULTI_TASK = Path("out/multi_task")


class Adapters:
    """The adapters of the page, each on its backbone.

    Args:
        runs: Of any tasks and backbones.
        device: Where to answer.

    """

    def __init__(self, runs: Sequence[Trained], device: torch.device) -> None:
        by_model: dict[str, list[Trained]] = {}
        for trained in runs:
            by_model.setdefault(trained.model, []).append(trained)
        self.boards = {model: Switchboard(own, device) for model, own in by_model.items()}
        self.runs = {str(trained.folder): trained for trained in runs}

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(trained.task.name for trained in self.runs.values()))

    def of_task(self, task: str) -> list[str]:
        """The folders of the adapters for a task."""
        return [folder for folder, trained in self.runs.items() if trained.task.name == task]

    def answer(self, path: str | None, folder: str) -> tuple[Array, Array, str | None, str]:
        """The base model's prediction for an image file, the adapter's, the ticket's picture, and a few words."""
        if path is None:
            raise gradio.Error("Upload an image first.")
        try:
            image = read_image({"path": path, "bytes": None})
        except BadSampleError as error:
            raise gradio.Error(f"This file cannot be used: {error.kind}. {error.detail}") from error
        trained = self.runs[folder]
        pictures = [self.boards[trained.model].paint(trained, image, adapted) for adapted in (False, True)]
        ticket = trained.folder / TICKET_PICTURE
        return *pictures, str(ticket) if ticket.is_file() else None, self.words(folder)

    def words(self, folder: str) -> str:
        """What there is to say of an adapter."""
        trained = self.runs[folder]
        results, headline = trained.results, trained.task.headline
        part = results["trained_backbone_parameters"] / results["backbone_parameters"]
        size = (trained.folder / "adapter_model.safetensors").stat().st_size
        legend = ", ".join(trained.task.id2label.values())
        return (
            f"**{folder}**: {part:.1%} of the backbone trained, {size / 1e6:.2f} MB with its head; {headline} "
            f"{number(results['before'][headline])} before training, {number(results['after'][headline])} after."
            + (f" Classes: {legend}." if legend else "")
        )


# Gradio shows small pictures small.
ENLARGED = """
:is(#upload, #base, #adapted) :is(.image-frame, img) { width: 100% !important; object-fit: contain !important; }
"""


def build(adapters: Adapters) -> gradio.Blocks:
    """The page."""
    first = adapters.tasks[0]
    with gradio.Blocks(title="Selective Feature Adapters", analytics_enabled=False) as page:
        gradio.Markdown("# Selective Feature Adapters\nOne frozen backbone; pick what it should do with your image.")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="filepath", image_mode=None, label="Image", elem_id="upload")
                task = gradio.Dropdown(adapters.tasks, value=first, label="Task", elem_id="task")
                folder = gradio.Dropdown(
                    adapters.of_task(first), value=adapters.of_task(first)[0], label="Adapter", elem_id="adapter"
                )
                button = gradio.Button("Predict", variant="primary", elem_id="predict")
                words = gradio.Markdown(adapters.words(adapters.of_task(first)[0]), elem_id="words")
            with gradio.Column():
                base = gradio.Image(label="Base model", interactive=False, elem_id="base")
                adapted = gradio.Image(label="With the adapter", interactive=False, elem_id="adapted")
        ticket = gradio.Image(label="The ticket: where the internal adapters are", interactive=False, elem_id="ticket")

        def choose(chosen: str) -> gradio.Dropdown:
            own = adapters.of_task(chosen)
            return gradio.Dropdown(own, value=own[0])

        task.change(choose, task, folder)
        # One at a time: an adapter is switched in the one model that all share.
        button.click(adapters.answer, [image, folder], [base, adapted, ticket, words], concurrency_limit=1)
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", nargs="+", type=Path, help=f"Folders of runs. Default: those in {MULTI_TASK}.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(arguments)
    folders = args.runs or [MULTI_TASK / name for name in DEFAULT]
    if args.runs is None and not all(folder.is_dir() for folder in folders):
        raise FlagError(f"there are no adapters in {MULTI_TASK} yet: run multi_task.py first, or give --runs")
    adapters = Adapters([Trained.load(folder, TASKS) for folder in dict.fromkeys(folders)], PartialState().device)
    build(adapters).launch(
        server_name=args.host,
        server_port=args.port,
        css=ENLARGED,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        allowed_paths=[str(folder.resolve()) for folder in folders],
    )


if __name__ == "__main__":
    try:
        main()
    except FlagError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error

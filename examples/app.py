"""A page to try adapters on: upload an image, pick a task and an adapter, and see what it changes.

    python examples/app.py --runs out/demo out/depth_estimation-sfa            # then open http://127.0.0.1:7860
    python examples/app.py                                                     # the adapters of multi_task.py

`--runs` are output folders of the other examples, trained with SFA. Adapters on the same backbone share it in memory.
The page shows the prediction beside that without the adapter, what the colours mean, and the ticket. Without it, the
head is the one that was trained alone, if the run was made with `--compare head`, or else that of before the training.
"""

from __future__ import annotations

import argparse
import html
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dense

# isort: split
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

try:
    import gradio
    from gradio.utils import get_upload_folder
except ModuleNotFoundError as error:
    raise SystemExit(f"the page needs {error.name}: {dense.INSTALL}") from error

from dense.errors import FlagError, told
from dense.folder import PICTURES, TICKET_PICTURE
from dense.limits import whole
from dense.report import LAST, number
from dense.samples import LONGEST_SIDE, Array, BadSampleError, printable, read_picture
from dense.switching import Switchboard, Trained
from multi_task import DEFAULT, TASKS

MULTI_TASK = Path("out/multi_task")
LARGEST_FILE = "30mb"
EXAMPLES = 4


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

    def answer(self, path: str | None, folder: str) -> tuple[Array | None, Array | None, str]:
        """The prediction for an image file before the training and after it; or none, and what is wrong, as HTML."""
        if path is None:
            return None, None, "Upload an image first."
        if folder not in self.runs:
            return None, None, "There is no such adapter."
        try:
            image = read_picture(path)
        except BadSampleError as error:
            return None, None, html.escape(f"This file cannot be used: {printable(str(error))}.")
        trained = self.runs[folder]
        before, adapted = (self.boards[trained.model].paint(trained, image, adapted) for adapted in (False, True))
        return before, adapted, ""

    def before(self, folder: str) -> str:
        """What the model without the adapter is called."""
        trained = self.runs[folder]
        if trained.head_alone is not None:
            return "The head alone, on the frozen backbone"
        is_fresh = self.boards[trained.model].fresh[trained]
        return "Untrained head on the frozen backbone" if is_fresh else "The checkpoint before training"

    def words(self, folder: str) -> str:
        """What there is to say of an adapter, as HTML."""
        trained = self.runs[folder]
        results, headline = trained.results, trained.task.headline
        part = results["trained_backbone_parameters"] / results["backbone_parameters"]
        size = (trained.folder / "adapter_model.safetensors").stat().st_size
        return (
            f"<b>{html.escape(folder)}</b>: {part:.1%} of the backbone trained, {size / 1e6:.2f} MB with its head; "
            f"{headline} {number(results['before'][headline])} before training, "
            f"{number(results['after'][headline])} after."
        )

    def legend(self, folder: str) -> str:
        """The colours of the pictures, as HTML; a scale where they go over into each other."""
        task = self.runs[folder].task
        keys = ((name, " ".join(f"{255 * part:.0f}" for part in colour)) for name, colour in task.legend().items())
        items = "".join(f'<li><i style="background: rgb({rgb})"></i>{html.escape(name)}</li>' for name, rgb in keys)
        return f"<ul{' class=scale' if task.legend_is_scale else ''}>{items}</ul>"

    def examples(self) -> dict[str, Array]:
        """Validation images that the runs have shown in their reports, by the names of the files they go into."""
        found = {}
        for trained in self.runs.values():
            path = trained.folder / PICTURES / LAST
            if path.is_file():
                with np.load(path) as shown:
                    for key in [key for key in shown.files if key.startswith("image_")][:EXAMPLES]:
                        found.setdefault(shown[key].tobytes(), shown[key])
        return {f"example_{i}.png": picture for i, picture in enumerate(list(found.values())[:EXAMPLES], start=1)}

    def ticket(self, folder: str) -> Array | None:
        """The ticket's picture; there is none without internal adapters. Not its file, so that none is served."""
        path = self.runs[folder].folder / TICKET_PICTURE
        try:
            return np.asarray(read_picture(path, longest_side=4 * LONGEST_SIDE)) if path.is_file() else None
        except BadSampleError:
            return None


def uploaded(file: dict[str, Any] | None) -> str | None:
    """The path of an upload. A request may name any file of this machine; another one than an upload is none."""
    path = str(file["path"]) if file else ""
    return path if Path(path).resolve().is_relative_to(_uploads()) else None


def _uploads() -> Path:
    folder = Path(get_upload_folder()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Gradio shows small pictures small.
STYLE = """
:is(#upload, #before, #adapted) :is(.image-frame, img) { width: 100% !important; object-fit: contain !important; }
#legend ul { display: flex; flex-wrap: wrap; gap: .2em 1.2em; margin: 0; padding: 0; list-style: none; }
#legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; border: 1px solid #0004; }
#legend ul.scale { gap: 0; }
#legend ul.scale li { flex: 1 1 3.5em; }
#legend ul.scale i { display: block; width: 100%; margin: 0; border: 0; }
"""


def build(adapters: Adapters) -> gradio.Blocks:
    """The page."""
    task = adapters.tasks[0]
    first = adapters.of_task(task)[0]
    with gradio.Blocks(title="Selective Feature Adapters", analytics_enabled=False) as page:
        gradio.Markdown("# Selective Feature Adapters\nOne frozen backbone; pick what it should do with your image.")
        with gradio.Row():
            with gradio.Column():
                upload = gradio.Image(type="filepath", image_mode=None, label="Image", elem_id="upload")
                tasks = gradio.Dropdown(adapters.tasks, value=task, label="Task", elem_id="task")
                folders = gradio.Dropdown(adapters.of_task(task), value=first, label="Adapter", elem_id="adapter")
                button = gradio.Button("Predict", variant="primary", elem_id="predict")
                # HTML that is escaped, not Markdown, in which a name can be a link or a picture from elsewhere.
                wrong = gradio.HTML(elem_id="wrong")
                pictures = adapters.examples()
                if pictures:
                    # In the folder for uploads: the server gives out no other files.
                    folder = Path(tempfile.mkdtemp(dir=_uploads()))
                    for name, picture in pictures.items():
                        Image.fromarray(picture).save(folder / name)
                    own = [[str(folder / name)] for name in pictures]
                    gradio.Examples(own, [upload], label="Or one of these", cache_examples=False)
                words = gradio.HTML(adapters.words(first), elem_id="words")
            with gradio.Column():
                before = gradio.Image(label=adapters.before(first), interactive=False, elem_id="before")
                adapted = gradio.Image(label="With the adapter", interactive=False, elem_id="adapted")
                legend = gradio.HTML(adapters.legend(first), elem_id="legend")
        ticket = gradio.Image(
            adapters.ticket(first),
            format="png",
            label="The ticket: where the internal adapters are",
            interactive=False,
            elem_id="ticket",
        )

        def of_task(chosen: str) -> gradio.Dropdown:
            own = adapters.of_task(chosen)
            return gradio.Dropdown(own, value=own[0])

        def describe(folder: str) -> tuple[str, str, Array | None, gradio.Image]:
            label = gradio.Image(label=adapters.before(folder))
            return adapters.words(folder), adapters.legend(folder), adapters.ticket(folder), label

        def answer(file: dict[str, Any] | None, folder: str) -> tuple[Array | None, Array | None, str]:
            return adapters.answer(uploaded(file), folder)

        # One at a time: an adapter is switched in the one model that all share. Not preprocessed: Gradio would open
        # the file itself, and say nothing of why it cannot.
        predicted = button.click(
            answer, [upload, folders], [before, adapted, wrong], concurrency_limit=1, preprocess=False
        )
        tasks.change(of_task, tasks, folders)
        # What is shown is of the image and the adapter that are chosen, or nothing is.
        for chosen in (upload, folders):
            chosen.change(lambda: (None, None, ""), None, [before, adapted, wrong], cancels=predicted)
        folders.change(describe, folders, [words, legend, ticket, before])
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", nargs="+", type=Path, help=f"Folders of runs. Default: those in {MULTI_TASK}.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=whole(1, 65535), default=7860)
    args = parser.parse_args(arguments)
    folders = args.runs or [MULTI_TASK / name for name in DEFAULT]
    if args.runs is None and not all(folder.is_dir() for folder in folders):
        raise FlagError(f"there are no adapters in {MULTI_TASK} yet: run multi_task.py first, or give --runs")
    adapters = Adapters([Trained.load(folder, TASKS) for folder in dict.fromkeys(folders)], PartialState().device)
    build(adapters).launch(
        server_name=args.host,
        server_port=args.port,
        css=STYLE,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
    )


if __name__ == "__main__":
    with told(FlagError):
        main()

"""A page to try adapters on: upload an image, pick a task and an adapter, and see what it changes.

    python examples/app.py --runs out/demo out/depth_estimation-sfa            # then open http://127.0.0.1:7860
    python examples/app.py --runs me/street-sfa                                # an adapter on the Hub
    python examples/app.py                                                     # the adapters of multi_task.py

`--runs` are output folders of the other examples, trained with SFA, or any SFA adapters that stand alone: folders that
`save_pretrained` wrote, or repositories on the Hub. Adapters on the same backbone share it in memory. The page shows
the prediction, what the colours mean, and the ticket; and the prediction without the adapter, by the head that was
trained alone, if the run was made with `--compare head`, or by the checkpoint that the training began with.
"""

from __future__ import annotations

import argparse
import hashlib
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
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from safetensors.torch import load_file

from sfa_peft import SFAConfig, ticket_of

try:
    import gradio
    from gradio.utils import get_upload_folder
except ModuleNotFoundError as error:
    raise SystemExit(f"the page needs {error.name}: {dense.INSTALL}") from error

from dense.diagram import diagram_of
from dense.errors import FlagError, told
from dense.folder import COMPARED, MEASURED, PICTURES, RESULTS, read_json
from dense.inference import HEAD, Loaded, Predictor, load
from dense.limits import whole
from dense.report import LAST, number
from dense.samples import Array, BadSampleError, printable, read_picture
from multi_task import DEFAULT, TASKS

MULTI_TASK = Path("out/multi_task")
LARGEST_FILE = "30mb"
EXAMPLES = 4
HEAD_ALONE = Path(COMPARED, "head", HEAD)  # in a run's folder, what `--compare head` has trained


class Adapters:
    """The adapters of the page, each on its model; what is the same in several models is in memory once.

    Args:
        names: Folders of runs, adapters that stand alone, or repositories on the Hub.
        device: Where to answer.

    Raises:
        FlagError: If one of them cannot be loaded or asked, or is no SFA adapter.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.loaded: dict[str, Loaded] = {}
        self.predictors: dict[str, Predictor] = {}
        known: dict[Any, torch.Tensor] = {}
        for name in dict.fromkeys(names):
            loaded = load(name, TASKS, device)
            if not isinstance(loaded.model, PeftModel) or not isinstance(loaded.model.active_peft_config, SFAConfig):
                raise FlagError(f"{name} has no SFA adapter, with which there is nothing to compare: leave it out")
            self.predictors[name] = Predictor(loaded, device)
            if (loaded.folder / HEAD_ALONE).is_file():
                give_head(loaded.model, loaded.folder / HEAD_ALONE)
            share(loaded.model, known)
            self.loaded[name] = loaded

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(predictor.task.name for predictor in self.predictors.values()))

    def of_task(self, task: str) -> list[str]:
        """The names of the adapters for a task."""
        return [name for name, predictor in self.predictors.items() if predictor.task.name == task]

    def answer(self, path: str | None, name: str) -> tuple[Array | None, Array | None, str]:
        """The predictions for an image file without the adapter and with it; or none, and what is wrong, as HTML."""
        if path is None:
            return None, None, "Upload an image first."
        if name not in self.loaded:
            return None, None, "There is no such adapter."
        try:
            image = read_picture(path)
        except BadSampleError as error:
            return None, None, html.escape(f"This file cannot be used: {printable(str(error))}.")
        predictor, model, before = self.predictors[name], self.loaded[name].model, None
        if self.before(name):
            with model.disable_adapter():
                before = predictor.task.paint(np.asarray(image), predictor(image))
        return before, predictor.task.paint(np.asarray(image), predictor(image)), ""

    def before(self, name: str) -> str:
        """What the prediction without the adapter is called; empty if nobody has trained a head for it."""
        loaded = self.loaded[name]
        if (loaded.folder / HEAD_ALONE).is_file():
            return "With the head alone"
        # A model with a fresh head is made from a config, and has no name.
        return "Before the training" if loaded.model.get_base_model().name_or_path else ""

    def words(self, name: str) -> str:
        """What there is to say of an adapter, as HTML."""
        loaded, task = self.loaded[name], self.predictors[name].task
        counts = dict.fromkeys(("adapter", "backbone"), 0)
        for parameter, value in loaded.model.named_parameters():
            if ".modules_to_save." not in parameter and ".original_module." not in parameter:
                counts["adapter" if ".sfa_" in parameter else "backbone"] += value.numel()
        size = (loaded.folder / "adapter_model.safetensors").stat().st_size
        part = counts["adapter"] / counts["backbone"]
        said = [f"{part:.1%} of the backbone trained, {size / 1e6:.2f} MB with its head"]
        scores = scores_of(loaded.folder, task.headline)
        if scores:
            text = f"{task.score_words}: {number(scores[0])} before training, {number(scores[1])} after"
            alone = scores_of((loaded.folder / HEAD_ALONE).parent, task.headline)
            said.append(f"{text}, {number(alone[1])} of the head alone" if alone else text)
        if not self.before(name):
            said.append("without the adapter there is no picture, since its head was new: --compare head trains one")
        return f"<b>{html.escape(name)}</b>: {html.escape('; '.join([*said, *loaded.told]))}."

    def legend(self, name: str) -> str:
        """The colours of the pictures, as HTML; a scale where they go over into each other."""
        task = self.predictors[name].task
        keys = ((name, " ".join(f"{255 * part:.0f}" for part in colour)) for name, colour in task.legend().items())
        items = "".join(f'<li><i style="background: rgb({rgb})"></i>{html.escape(name)}</li>' for name, rgb in keys)
        return f"<ul{' class=scale' if task.legend_is_scale else ''}>{items}</ul>"

    def examples(self) -> dict[str, Array]:
        """Validation images that runs have shown in their reports, by the names of the files they go into."""
        found: dict[bytes, Array] = {}
        for loaded in self.loaded.values():
            path = loaded.folder / PICTURES / LAST
            if path.is_file():
                with np.load(path) as shown:
                    for key in [key for key in shown.files if key.startswith("image_")][:EXAMPLES]:
                        found.setdefault(shown[key].tobytes(), shown[key])
        return {f"example_{i}.png": picture for i, picture in enumerate(list(found.values())[:EXAMPLES], start=1)}

    def ticket(self, name: str) -> str:
        """The ticket on a table of the backbone's blocks, as HTML."""
        return diagram_of(ticket_of(self.loaded[name].model)).as_html()


def give_head(model: PeftModel, path: Path) -> None:
    """Put a head that was trained alone in the place of the one that the training of an adapter began with."""
    tensors = load_file(path)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            try:
                module.original_module.load_state_dict(own)
            except RuntimeError as error:
                raise FlagError(f"{path} does not fit the model beside it: {str(error).splitlines()[0]}") from error


def share(model: torch.nn.Module, known: dict[Any, torch.Tensor]) -> None:
    """Let a model use those tensors of other models that equal its own, and remember the rest for later ones."""
    for parameter in model.parameters():
        content = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        key = (parameter.shape, parameter.dtype, parameter.device, hashlib.sha256(content).digest())
        parameter.data = known.setdefault(key, parameter.data)


def scores_of(folder: Path, headline: str) -> tuple[float | None, float | None] | None:
    """The headline before and after the training; None if no run has measured it here.

    Raises:
        FlagError: If the record of the run is damaged.
    """
    if not (folder / RESULTS).is_file():
        return None
    results = read_json(folder / RESULTS, MEASURED, "remove it, or train again with --overwrite")
    before, after = (results[moment].get(headline) for moment in ("before", "after"))
    if not all(isinstance(score, float | int | None) for score in (before, after)):
        raise FlagError(f"{folder / RESULTS} is damaged ({headline!r} is no number); remove it, or train again")
    return before, after


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
                pictures = adapters.examples()
                if pictures:
                    # In the folder for uploads: the server gives out no other files.
                    folder = Path(tempfile.mkdtemp(dir=_uploads()))
                    for name, picture in pictures.items():
                        Image.fromarray(picture).save(folder / name)
                    own = [[str(folder / name)] for name in pictures]
                    gradio.Examples(own, [upload], label="Or one of these", cache_examples=False)
                tasks = gradio.Dropdown(adapters.tasks, value=task, label="Task", elem_id="task")
                folders = gradio.Dropdown(adapters.of_task(task), value=first, label="Adapter", elem_id="adapter")
                button = gradio.Button("Predict", variant="primary", elem_id="predict")
                # HTML that is escaped, not Markdown, in which a name can be a link or a picture from elsewhere.
                wrong = gradio.HTML(elem_id="wrong")
            with gradio.Column():
                label = adapters.before(first)
                before = gradio.Image(label=label, visible=bool(label), interactive=False, elem_id="before")
                adapted = gradio.Image(label="With the adapter", interactive=False, elem_id="adapted")
                legend = gradio.HTML(adapters.legend(first), elem_id="legend")
                words = gradio.HTML(adapters.words(first), elem_id="words")
        gradio.Markdown("## The ticket: where the adapter is in the backbone")
        ticket = gradio.HTML(adapters.ticket(first), elem_id="ticket")

        def of_task(chosen: str) -> gradio.Dropdown:
            own = adapters.of_task(chosen)
            return gradio.Dropdown(own, value=own[0])

        def describe(folder: str) -> tuple[str, str, str, gradio.Image]:
            label = adapters.before(folder)
            shown = gradio.Image(label=label, visible=bool(label))
            return adapters.words(folder), adapters.legend(folder), adapters.ticket(folder), shown

        def answer(file: dict[str, Any] | None, folder: str) -> tuple[Array | None, Array | None, str]:
            return adapters.answer(uploaded(file), folder)

        # One at a time: an adapter is off for a part of an answer. Not preprocessed: Gradio would open the file
        # itself, and say nothing of why it cannot.
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
    parser.add_argument(
        "--runs",
        "--adapters",
        nargs="+",
        help=f"Folders of runs, or adapters, or their Hub ids. Default: the runs in {MULTI_TASK}.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=whole(1, 65535), default=7860)
    args = parser.parse_args(arguments)
    names = args.runs or [str(MULTI_TASK / name) for name in DEFAULT]
    if args.runs is None and not all(Path(name).is_dir() for name in names):
        raise FlagError(f"there are no adapters in {MULTI_TASK} yet: run multi_task.py first, or give --runs")
    adapters = Adapters(names, PartialState().device)
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

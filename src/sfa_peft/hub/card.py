"""The model card of an adapter. Every save writes or updates it."""

from __future__ import annotations

import json
import keyword
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import peft
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..checkpoint.files import staged
from ..checkpoint.seal import CONFIG, WEIGHTS, digest_of
from ..layers.adapted import sfa_layers
from ..layers.leaves import modules_outside
from ..search import ticket_of
from ..search.install import adapter_of
from ..ticket import Ticket
from ..ticket.picture import draw_ticket
from ..ticket.text import printable
from ..tuner.model import SFAModel, tuner_of
from .base import BASE_CONFIG, Recipe, can_be_repo, hub_id, quiet, recipe_of, source_of
from .readme import Readme, ReadmeError, code, dicts_in, escaped, literal, text_in, with_texts

CARD = "README.md"
PICTURE = "ticket.png"
PROCESSOR = "preprocessor_config.json"
INSTALL = "pip install sfa-peft"

# Endings of class names in transformers, and the names of their tasks on the Hub.
TASKS = {
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "text-generation",
}


@dataclass
class Evaluation:
    """The task, dataset and metrics in a model card; see `describe_adapter`."""

    task: str | None = None
    dataset: str | None = None
    split: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    repo_id: str | None = None


def describe_adapter(
    model: nn.Module,
    *,
    task: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    metrics: Mapping[str, float] | None = None,
    repo_id: str | None = None,
    processor: BaseImageProcessor | None = None,
    adapter_name: str | None = None,
) -> None:
    """Set the task, dataset and metrics in the model card of an adapter, and the image processor beside it.

    The next save or upload writes them.

    Args:
        model (`nn.Module`): The model that `get_peft_model` returned for an `SFAConfig`.
        task (`str`, *optional*, defaults to `None`):
            The name of the task on the Hub, such as `image-segmentation`. None uses that of the base model's class.
        dataset (`str`, *optional*, defaults to `None`):
            The dataset of the training and evaluation, by its name on the Hub or any other name.
        split (`str`, *optional*, defaults to `None`): The split of the dataset that the metrics were measured on.
        metrics (`Mapping[str, float]`, *optional*, defaults to `None`):
            The values of metrics, by their names on the Hub (such as `mean_iou`). They need a `dataset`.
        repo_id (`str`, *optional*, defaults to `None`):
            The repository in the card's code example. Needed if another function than `model.push_to_hub` uploads the
            adapter, such as `Trainer.push_to_hub`.
        processor (`BaseImageProcessor`, *optional*, defaults to `None`):
            The image processor that makes the model's inputs, for `load_dense`. None keeps an earlier one.
        adapter_name (`str`, *optional*, defaults to `None`): The adapter. None means the active one.

    The card shows these texts as they are; line breaks and other characters that cannot be printed become escapes.

    Raises:
        TypeError: If `model` was not returned by `get_peft_model` for an `SFAConfig`, or `metrics` does not map names
            to finite numbers, or `processor` is not an image processor of transformers.
        ValueError: If there is no such adapter, metrics are given without a dataset, a text is empty or not a string,
            or `repo_id` cannot be the name of a repository.
    """
    tuner, name = adapter_of(model, adapter_name)
    said = {"task": task, "dataset": dataset, "split": split, "repo_id": repo_id}
    texts = {argument: _checked(argument, text) for argument, text in said.items() if text is not None}
    if repo_id is not None and not can_be_repo(repo_id):
        raise ValueError(f"repo_id={repo_id!r} cannot be the name of a repository; use one such as 'user/name'.")
    if metrics and not dataset:
        raise ValueError(f"metrics={metrics!r} need a `dataset`: give the name of the one they were measured on.")
    if not isinstance(processor, BaseImageProcessor | None):
        raise TypeError(
            f"processor={processor!r} must be an image processor of transformers, such as AutoImageProcessor gives."
        )
    try:
        values = {metric: float(value) for metric, value in dict(metrics or {}).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"metrics={metrics!r} must map names to numbers: {error}") from error
    if not all(map(math.isfinite, values.values())):
        raise TypeError(f"metrics={metrics!r} must be finite numbers.")
    values = {_checked("metrics", metric): value for metric, value in values.items()}
    notes = notes_of(tuner, name)
    notes.evaluation = Evaluation(metrics=values, **texts)
    notes.processor = processor or notes.processor


def _checked(argument: str, text: Any) -> str:
    """The text as the card shows it."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{argument}={text!r} must be a string that is not empty.")
    return printable(text)


@dataclass
class Notes:
    """The data of an adapter that is kept for its model card, and for the files that make it stand alone.

    Attributes:
        evaluation: The user's description.
        picture: The digest of the ticket and its picture, which is cached, since drawing takes longer than saving.
        processor: The image processor.
        recipe: What the base can be rebuilt from, which is cached, too.
    """

    evaluation: Evaluation = field(default_factory=Evaluation)
    picture: tuple[str, bytes] = ("", b"")
    processor: BaseImageProcessor | None = None
    recipe: Recipe = field(default_factory=Recipe)


def notes_of(tuner: SFAModel, adapter_name: str) -> Notes:
    notes: Notes = tuner.card_notes.setdefault(adapter_name, Notes())
    return notes


def folder_of(folder: Path, adapter_name: str) -> Path:
    """The folder of an adapter in the folder of a model, as in PEFT."""
    return folder if adapter_name == "default" else folder / adapter_name


def write_base(model: PeftModel, adapter_name: str, folder: Path) -> None:
    """Write the files beside an adapter that `load_dense` needs: the base's config, and the image processor."""
    notes = notes_of(tuner_of(model), adapter_name)
    notes.recipe = recipe_of(model.get_base_model(), notes.recipe)
    if notes.recipe.text is not None:
        (folder / BASE_CONFIG).write_text(notes.recipe.text, encoding="utf-8")
    if notes.processor is not None:
        with quiet():
            notes.processor.save_pretrained(folder)


def outdated(folder: Path, earlier: bytes | None) -> list[str]:
    """Which files of an earlier save would be taken for those of an adapter that has none of its own.

    Without `describe_adapter(model, processor=...)` an image processor stays, since the user may have put it there,
    but not that of another base model.

    Args:
        folder: Where the adapter is saved now.
        earlier: The content of the earlier save's `base_config.json`; None if it had none.
    """
    base = folder / BASE_CONFIG
    if earlier is None or (base.is_file() and _is_same(earlier, base.read_bytes())):
        return []
    return [name for name in (BASE_CONFIG, PROCESSOR) if not (folder / name).exists()]


def _is_same(one: bytes, other: bytes) -> bool:
    """Whether two configs of base models are the same, apart from the version that wrote them."""
    try:
        configs = [json.loads(text) | {"transformers_version": None} for text in (one, other)]
    except (ValueError, TypeError, RecursionError):  # an earlier one that is damaged
        return False
    return bool(configs[0] == configs[1])


def write_card(
    model: PeftModel,
    folder: Path,
    source: str,
    *,
    is_repo: bool = False,
    tags: Sequence[str] = (),
    tickets: Mapping[str, Ticket] = MappingProxyType({}),
) -> bool:
    """Write or update the model card in a folder, with a picture for each adapter. Other text in the card is kept.

    It is called once the adapters are saved, and never raises an error: a card is not worth a training. What cannot be
    written is left out, and a warning says what and why.

    Args:
        model: The model that the adapters were saved from.
        folder: The folder with the saved adapters: the default one in the folder itself, others in subfolders.
        source: Where the adapters will be loaded from: a folder or a repository.
        is_repo: Whether `source` is a repository.
        tags: Additional tags.
        tickets: The adapters to describe, with their tickets. None means all that are saved in the folder.

    Returns:
        Whether a card was written, perhaps without pictures.
    """
    missing: list[str] = []
    written = False
    try:
        with staged(folder, last=(PICTURE, CARD)) as stage:
            _write(model, folder, stage, source, is_repo, tags, tickets, missing)
        written = True
    except ReadmeError as error:
        missing.append(f"{CARD} is as it was, since {error}; correct or remove it, and save again")
    except Exception as error:
        missing.append(f"{CARD} is as it was, since writing it failed with {_named(error)}")
    if missing:
        warnings.warn(f"The model card of {source!r} is not complete: {'; '.join(missing)}.", stacklevel=2)
    return written


def _named(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")


def _write(
    model: PeftModel,
    folder: Path,
    stage: Path,
    source: str,
    is_repo: bool,
    tags: Sequence[str],
    tickets: Mapping[str, Ticket],
    missing: list[str],
) -> None:
    """Write the card and the pictures to `stage`. What is left out is added to `missing`."""
    base, tuner = model.get_base_model(), tuner_of(model)
    folders = {name: folder_of(folder, name) for name in tickets or model.peft_config}
    saved = {name: path for name, path in folders.items() if (path / CONFIG).is_file()}
    base_id = hub_id(base_name_of(model, next(iter(saved or model.peft_config))))
    card = _begun(model, folder / CARD)
    _name_base(card.data, base_id, [*_tags_of(base), *tags])
    if saved:
        evaluations = {name: notes_of(tuner, name).evaluation for name in saved}
        first = next(iter(saved))  # the metadata of a card can describe only one adapter
        described = evaluations[first]
        evaluations[first] = said = _with_earlier(described, card.data)
        if not is_repo and said.repo_id:
            source, is_repo = said.repo_id, True
        task = said.task or text_in(card.data, "pipeline_tag") or task_of(base)
        if task:
            card.data["pipeline_tag"] = task
        _add_results(card.data, described, task or "other", source.rpartition("/")[2] if is_repo else None)
    for name, path in saved.items():
        ticket = tickets.get(name) or ticket_of(model, name)
        picture = (path / PICTURE).relative_to(folder)
        try:
            drawn = _draw(ticket, notes_of(tuner, name), stage / picture)
        except Exception as error:
            drawn = False
            missing.append(f"{picture.as_posix()} is not drawn, since drawing failed with {_named(error)}")
        size = (path / WEIGHTS).stat().st_size
        section = [
            _summary(model, name, ticket, evaluations[name], base_id, size),
            *([f"![Where the adapter sits in the backbone]({quote(picture.as_posix())})"] if drawn else []),
            f"```python\n{_snippet(model, name, source, is_repo, (path / BASE_CONFIG).is_file())}\n```",
            _NEEDS_IMPORT + (f" {_not_alone(why)}" if (why := notes_of(tuner, name).recipe.why) else ""),
        ]
        card.set_section(name, "\n\n".join(section))
    card.write(stage / CARD)


def _begun(model: PeftModel, path: Path) -> Readme:
    """The card in a folder, or a new one if there is none, with what PEFT writes in all cards."""
    if path.exists() or path.is_symlink():
        card = Readme.read(path)
    else:
        base = model.get_base_model()
        name = hub_id(getattr(base, "name_or_path", None)) or type(base).__name__
        card = Readme(text=f"\n# Selective Feature Adapter for {escaped(name)}\n")
    card.data["library_name"] = "peft"
    card.add_version("PEFT", peft.__version__)
    return card


def _tags_of(base: nn.Module) -> list[str]:
    """The tags that the base model brings."""
    tags = getattr(base, "model_tags", None)
    own = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list | tuple | set) else []
    return [*own, *(["transformers"] if isinstance(base, PreTrainedModel) else [])]


def _with_earlier(said: Evaluation, data: Mapping[Any, Any]) -> Evaluation:
    """The evaluation, with missing parts filled in from the results of the same dataset in the card."""
    earlier = [e for e in _evaluations_in(data) if said.dataset in (None, e.dataset)]
    if not earlier or said.metrics:
        return said
    first = earlier[0]
    metrics = {name: value for e in earlier if e.dataset == first.dataset for name, value in e.metrics.items()}
    return replace(
        said,
        task=said.task or first.task,
        dataset=first.dataset,
        split=said.split or first.split,
        metrics=metrics,
    )


def _evaluations_in(data: Mapping[Any, Any]) -> list[Evaluation]:
    """The results in a front matter that have a dataset and metrics with numbers."""
    found = []
    for result in _results_in(data):
        dataset = text_in(result, "dataset", "name")
        metrics = {
            name: metric["value"]
            for metric in dicts_in(result.get("metrics"))
            if (name := text_in(metric, "type")) and _is_number(metric.get("value"))
        }
        if dataset and metrics:
            split = text_in(result, "dataset", "split")
            found.append(Evaluation(text_in(result, "task", "type"), dataset, split, metrics))
    return found


def _results_in(data: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    return [result for entry in dicts_in(data.get("model-index")) for result in dicts_in(entry.get("results"))]


def _is_number(value: Any) -> bool:
    limit = sys.float_info.max  # an int may be larger
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit


def _name_base(data: dict[Any, Any], base_id: str | None, tags: Sequence[str]) -> None:
    if base_id:
        data["base_model"] = base_id
    elif isinstance(data.get("base_model"), str) and not hub_id(data["base_model"]):
        del data["base_model"]  # PEFT may have written the name of a folder
    prefix = "base_model:adapter:"
    added = {"sfa", "peft", *(printable(str(tag)) for tag in tags), *([prefix + base_id] if base_id else [])}
    given = data.get("tags") if isinstance(data.get("tags"), list) else [data.get("tags")]
    others = [t for t in given or () if not (isinstance(t, str) and t.startswith(prefix) and t not in added)]
    data["tags"] = with_texts(others, added)


def _add_results(data: dict[Any, Any], evaluation: Evaluation, task: str, model_name: str | None) -> None:
    """Add the dataset and metrics to the metadata, the metrics as a `model-index`. Results of other datasets stay."""
    dataset = evaluation.dataset
    if dataset is None:  # then there are no metrics either
        return
    if hub_id(dataset):
        data["datasets"] = with_texts(data.get("datasets"), [dataset])
    if not evaluation.metrics:
        return
    data["metrics"] = with_texts(data.get("metrics"), evaluation.metrics)
    measured_on = {"name": dataset, "type": dataset} | ({"split": evaluation.split} if evaluation.split else {})
    result = {
        "task": {"type": task},
        "dataset": measured_on,
        "metrics": [{"type": name, "value": value} for name, value in evaluation.metrics.items()],
    }
    names = [name for entry in dicts_in(data.get("model-index")) if (name := text_in(entry, "name"))]
    others = [r for r in _results_in(data) if text_in(r, "dataset", "name") != dataset]
    data["model-index"] = [{"name": model_name or next(iter(names), "sfa-adapter"), "results": [result, *others]}]


def task_of(base: nn.Module) -> str | None:
    """The name on the Hub of the task of a transformers model; None if it is not known."""
    return next((task for ending, task in TASKS.items() if type(base).__name__.endswith(ending)), None)


def base_name_of(model: PeftModel, adapter_name: str) -> str:
    """The folder or repository of the base model; empty if it is not known."""
    return str(
        source_of(model.get_base_model())[0] or tuner_of(model).peft_config[adapter_name].base_model_name_or_path or ""
    )


def _summary(
    model: PeftModel, name: str, ticket: Ticket, evaluation: Evaluation, base_id: str | None, size: int
) -> str:
    config = tuner_of(model).peft_config[name]
    base = model.get_base_model()
    counts = parameter_counts(model, name)
    widths = [w for modules in config.external_widths.values() for w in modules.values()]
    spread = f"{min(widths)}" if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}" if widths else ""
    filters = f", filters of {config.external_conv} x {config.external_conv}" if config.external_conv else ""
    budget = "none (widths and density given)" if config.budget is None else _number(config.budget)
    class_name = escaped(type(base).__name__)
    dataset = escaped(evaluation.dataset or "")
    rows = {
        "Base model": f"{code(base_id)} ({class_name})" if base_id else class_name,
        "Task": escaped(evaluation.task or task_of(base) or ""),
        "Dataset": dataset,
        "Budget": budget,
        "Trained parameters": f"{counts['internal'] + counts['external']:,}, and {counts['heads']:,} in heads",
        "External adapters": f"{len(widths)} at {escaped(', '.join(config.external_widths))}, width {spread}{filters}"
        if widths
        else "none",
        "Ticket": f"{ticket.size:,} positions, density {ticket.density:.2%}, granularity {ticket.granularity.name}"
        if ticket.size
        else "none",
        "Heads": escaped(", ".join(config.modules_to_save or ())) or "none",
        "Weights": f"{size:,} bytes",
    }
    lines = [
        f"## Selective Feature Adapter{'' if name == 'default' else f' {code(name)}'}",
        "",
        "| | |",
        "| --- | --- |",
    ]
    lines += [f"| {title} | {value} |" for title, value in rows.items() if value]
    if evaluation.metrics:
        split = f" ({escaped(evaluation.split)})" if evaluation.split else ""
        lines += ["", "| Metric | Value |", "| --- | --- |"]
        lines += [f"| {escaped(m)} on {dataset}{split} | {v:.4g} |" for m, v in evaluation.metrics.items()]
    return "\n".join(lines)


def _number(budget: int | float) -> str:
    return f"{budget:,}" if isinstance(budget, int) else f"{budget:.4g} of the backbone"


def parameter_counts(model: PeftModel, name: str) -> dict[str, int]:
    """The numbers of parameters of an adapter: `internal`, `external` and `heads`."""
    layers = [layer for _, layer in sfa_layers(model)]
    internal = sum(layer.sfa_internal[name].num_values for layer in layers if name in layer.sfa_internal)
    every = sum(p.numel() for layer in layers for p in layer.parameters_of(name))
    heads = [m for _, m in modules_outside(model) if isinstance(m, ModulesToSaveWrapper) and name in m.modules_to_save]
    of_heads = {id(p): p.numel() for head in heads for p in head.modules_to_save[name].parameters()}
    return {"internal": internal, "external": every - internal, "heads": sum(of_heads.values())}


def _draw(ticket: Ticket, notes: Notes, path: Path) -> bool:
    """Write the ticket's picture, from the cache if it is there. False if matplotlib is not installed."""
    key = digest_of(ticket.by_name()) + json.dumps(ticket.widths, sort_keys=True)
    drawn_of, drawn = notes.picture
    path.parent.mkdir(parents=True, exist_ok=True)
    if drawn_of == key:
        path.write_bytes(drawn)
        return True
    try:
        from PIL import Image

        draw_ticket(ticket, path)
    except ImportError:
        return False
    # A palette keeps the picture smaller than most adapters.
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    notes.picture = (key, path.read_bytes())
    return True


_NEEDS_IMPORT = "Without `import sfa_peft`, PEFT does not know the method, and ends in `KeyError: 'SFA'`."


def _not_alone(why: str) -> str:
    return f"`sfa_peft.load_dense` cannot make this model: {escaped(why)}."


def _snippet(model: PeftModel, name: str, source: str, is_repo: bool, stands_alone: bool) -> str:
    """The code example that loads the adapter, and with an image processor predicts."""
    imports = f"# {INSTALL}\nimport sfa_peft  # registers SFA with PEFT\n"
    named = base_name_of(model, name)
    is_found = bool(named) and (hub_id(named) is not None or not is_repo)
    subfolder = "" if name == "default" else f", subfolder={literal(name)}"
    if not (stands_alone and named):
        return imports + _load_of_both(model, name, source, subfolder, named if is_found else None)
    base = "" if is_found else ', base="..."'  # what the author has is of no use to others
    load = f"model, processor, id2label = sfa_peft.load_dense({literal(source)}{subfolder}{base})"
    if notes_of(tuner_of(model), name).processor is None:
        return f"{imports}\n{load}"
    finish = _finish(type(model.get_base_model()).__name__, notes_of(tuner_of(model), name).processor)
    return (
        f"{imports}import torch\nfrom PIL import Image\n\n{load}\n"
        'image = Image.new("RGB", (640, 480))  # yours: Image.open("street.jpg").convert("RGB")\n'
        'with torch.no_grad():\n    outputs = model(**processor(image, return_tensors="pt"))\n' + finish
    )


def _finish(class_name: str, processor: Any) -> str:
    """The line that makes a prediction out of a model's outputs; empty if the processor has no method for it."""
    tasks = ("semantic_segmentation", "object_detection", "depth_estimation", "instance_segmentation")
    endings = {f"For{task.title().replace('_', '')}": task for task in tasks}
    task = next((t for ending, t in endings.items() if class_name.endswith(ending)), "instance_segmentation")
    method = f"post_process_{task}"
    if not hasattr(processor, method):
        return ""
    return f"prediction = processor.{method}(outputs, target_sizes=[(image.height, image.width)])[0]"


def _load_of_both(model: PeftModel, name: str, source: str, subfolder: str, base_name: str | None) -> str:
    """The code that loads the base model and then the adapter."""
    base = model.get_base_model()
    config = tuner_of(model).peft_config[name]
    options = ""
    num_labels = getattr(getattr(base, "config", None), "num_labels", None)
    if config.modules_to_save and isinstance(num_labels, int):
        options = f", num_labels={num_labels}, ignore_mismatched_sizes=True"
    cls = type(base)
    library = cls.__module__.partition(".")[0]
    module = library if library == "transformers" else cls.__module__
    is_whole = vars(base).get("name_or_path") == base_name  # otherwise the name is the backbone's
    if base_name and is_whole and _is_importable(module, cls.__name__):
        imports = f"from {module} import {cls.__name__}\n"
        make = f"base = {cls.__name__}.from_pretrained({literal(base_name)}{options})"
    else:
        class_name = cls.__name__ if cls.__name__.isidentifier() else literal(cls.__name__)
        imports, make = "", f"base = ...  # the {class_name} that the adapter was trained on"
    return (
        f"from peft import PeftModel\n{imports}\n{make}\n"
        f"model = PeftModel.from_pretrained(base, {literal(source)}{subfolder}).eval()"
    )


def _is_importable(module: str, name: str) -> bool:
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in (*module.split("."), name))

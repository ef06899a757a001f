"""The model card of an adapter. Every save writes or updates it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from torch import nn
from yaml import YAMLError

from ..checkpoint.seal import CONFIG, WEIGHTS, digest_of
from ..layers.adapted import sfa_layers
from ..search import ticket_of
from ..search.install import adapter_of
from ..ticket import Ticket
from ..ticket.picture import draw_ticket
from ..tuner.model import SFAModel, tuner_of

CARD = "README.md"
PICTURE = "ticket.png"
BEGIN = "<!-- sfa_peft: begin {name}; what is between these lines is written anew by each save -->"
END = "<!-- sfa_peft: end {name} -->"

# Endings of class names in transformers, and the names of their tasks on the Hub.
TASKS = {
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
    "ForImageClassification": "image-classification",
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
    adapter_name: str | None = None,
) -> None:
    """Set the task, dataset and metrics in the model card of an adapter. The next save or upload writes them.

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
        adapter_name (`str`, *optional*, defaults to `None`): The adapter. None means the active one.

    Raises:
        TypeError: If `model` was not returned by `get_peft_model` for an `SFAConfig`, or a metric is not a finite
            number.
        ValueError: If there is no such adapter, metrics are given without a dataset, or a name is not one line of text
            without `|`.
    """
    tuner, name = adapter_of(model, adapter_name)
    for field_name, text in (("task", task), ("dataset", dataset), ("split", split), ("repo_id", repo_id)):
        if text is not None and (not isinstance(text, str) or not text.strip() or "\n" in text or "|" in text):
            raise ValueError(
                f"{field_name}={text!r} must be one line of text without `|`, which would end a cell of a table."
            )
    if metrics and not dataset:
        raise ValueError(f"metrics={metrics!r} need a `dataset`: give the name of the one they were measured on.")
    try:
        values = {str(metric): float(value) for metric, value in (metrics or {}).items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"metrics={metrics!r} must map names to numbers: {error}") from error
    if not all(map(math.isfinite, values.values())):
        raise TypeError(f"metrics={metrics!r} must be finite numbers.")
    notes_of(tuner, name).evaluation = Evaluation(task, dataset, split, values, repo_id)


@dataclass
class Notes:
    """The data of an adapter that is kept for its model card.

    Attributes:
        evaluation: The user's description.
        picture: The digest of the ticket and its picture, which is cached, since drawing takes longer than saving.
    """

    evaluation: Evaluation = field(default_factory=Evaluation)
    picture: tuple[str, bytes] = ("", b"")


def notes_of(tuner: SFAModel, adapter_name: str) -> Notes:
    notes: Notes = tuner.card_notes.setdefault(adapter_name, Notes())
    return notes


def folder_of(folder: Path, adapter_name: str) -> Path:
    """The folder of an adapter in the folder of a model, as in PEFT."""
    return folder if adapter_name == "default" else folder / adapter_name


def check_card(folder: Path) -> None:
    """Check that the model card in a folder can be updated, if there is one.

    Raises:
        ValueError: If the model card cannot be read.
    """
    path = folder / CARD
    if not path.exists():
        return
    try:
        ModelCard.load(path)
    except (YAMLError, UnicodeError, ValueError, OSError) as error:
        raise ValueError(
            f"the model card {str(path)!r} cannot be updated: {error}. Correct or remove it; nothing was saved."
        ) from error


def begin_card(model: PeftModel, folder: Path) -> list[str]:
    """Create a model card if there is none, instead of PEFT's template. Returns the tags of an existing card."""
    path = folder / CARD
    if path.is_file():
        return list(ModelCard.load(path).data.tags or ())
    base = model.get_base_model()
    name = hub_id(getattr(base, "name_or_path", None)) or type(base).__name__
    ModelCard(f"---\nlibrary_name: peft\n---\n\n# Selective Feature Adapter for {name}\n").save(path)
    return []


def update_card(
    model: PeftModel,
    folder: Path,
    source: str,
    is_repo: bool = False,
    tags: Sequence[str] = (),
    tickets: Mapping[str, Ticket] = MappingProxyType({}),
) -> None:
    """Update the model card in `folder` with the adapters that are saved there. Other text in the card is kept.

    Args:
        model: The model that the adapters were saved from.
        folder: The folder with the saved adapters: the default one in the folder itself, others in subfolders.
        source: Where the adapters will be loaded from: a folder or a repository.
        is_repo: Whether `source` is a repository.
        tags: Additional tags.
        tickets: Tickets of adapters that are already known, so that they are not made again.
    """
    folders = {name: folder_of(folder, name) for name in model.peft_config}
    saved = {name: path for name, path in folders.items() if (path / CONFIG).is_file()}
    card = ModelCard.load(folder / CARD)
    if not saved:
        card.data.tags = sorted({*(card.data.tags or ()), *tags})
        card.save(folder / CARD)
        return
    base = model.get_base_model()
    first = next(iter(saved))  # the metadata of a card can describe only one adapter
    tuner = tuner_of(model)
    evaluations = {name: notes_of(tuner, name).evaluation for name in saved}
    evaluations[first] = _with_earlier(evaluations[first], card)
    if not is_repo and (repo_id := evaluations[first].repo_id):
        source, is_repo = repo_id, True
    base_id = hub_id(getattr(base, "name_or_path", "") or model.peft_config[first].base_model_name_or_path)
    card.data.pipeline_tag = evaluations[first].task or card.data.pipeline_tag or task_of(base)
    _name_base(card, base_id, tags)
    _add_results(card, evaluations[first], source.rpartition("/")[2] if is_repo else None)
    for name, path in saved.items():
        ticket = tickets.get(name) or ticket_of(model, name)
        picture = (path / PICTURE).relative_to(folder).as_posix()
        drawn = _draw(ticket, notes_of(tuner, name), path / PICTURE)
        size = (path / WEIGHTS).stat().st_size
        section = [
            _summary(model, name, ticket, evaluations[name], base_id, size),
            *([f"![Where the adapter sits in the backbone]({picture})"] if drawn else []),
            f"```python\n{_snippet(model, name, source, is_repo)}\n```",
        ]
        card.text = _with_section(card.text, name, "\n\n".join(section))
    card.save(folder / CARD)


def _data(card: ModelCard) -> ModelCardData:
    return cast(ModelCardData, card.data)  # its declared type is the base class of all kinds of card data


def _with_earlier(said: Evaluation, card: ModelCard) -> Evaluation:
    """The evaluation, with missing parts filled in from the results of the same dataset in the card."""
    earlier = [r for r in _data(card).eval_results or () if said.dataset in (None, r.dataset_name)]
    if not earlier or said.metrics:
        return said
    first = earlier[0]
    metrics = {r.metric_type: r.metric_value for r in earlier if r.dataset_name == first.dataset_name}
    return replace(
        said,
        task=said.task or first.task_type,
        dataset=first.dataset_name,
        split=said.split or first.dataset_split,
        metrics=metrics,
    )


def _name_base(card: ModelCard, base_id: str | None, tags: Sequence[str]) -> None:
    data = _data(card)
    if base_id:
        data.base_model = base_id
    elif not hub_id(data.base_model):  # PEFT may have written the name of a folder
        data.base_model = None
    added = {"sfa", "peft", *tags, *([f"base_model:adapter:{base_id}"] if base_id else [])}
    others = {t for t in data.tags or () if t in added or not t.startswith("base_model:adapter:")}
    data.tags = sorted(others | added)


def _add_results(card: ModelCard, evaluation: Evaluation, model_name: str | None) -> None:
    """Add the dataset and metrics to the metadata, the metrics as a `model-index`. Results of other datasets stay."""
    data, dataset = _data(card), evaluation.dataset
    if dataset is None:  # then there are no metrics either
        return
    if hub_id(dataset):
        data.datasets = sorted({*_as_list(data.datasets), dataset})
    if not evaluation.metrics:
        return
    data.metrics = sorted({*_as_list(data.metrics), *evaluation.metrics})
    data.model_name = model_name or data.model_name or "sfa-adapter"
    results = [
        EvalResult(
            task_type=data.pipeline_tag or "other",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=evaluation.split,
            metric_type=name,
            metric_value=value,
        )
        for name, value in evaluation.metrics.items()
    ]
    others = [r for r in data.eval_results or () if r.dataset_name != dataset]
    data.eval_results = results + others


def task_of(base: nn.Module) -> str | None:
    """The name on the Hub of the task of a transformers model; None if it is not known."""
    return next((task for ending, task in TASKS.items() if type(base).__name__.endswith(ending)), None)


def hub_id(name: Any) -> str | None:
    """The name if it can be a repository on the Hub and is not a local folder, otherwise None."""
    if not isinstance(name, str) or not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _with_section(text: str, name: str, section: str) -> str:
    """The text of a card with the section of one adapter. A new section comes after those of other adapters."""
    begin, end = (mark.format(name=name.replace("--", "- -")) for mark in (BEGIN, END))
    section = f"{begin}\n\n{section}\n\n{end}"
    found = re.search(re.escape(begin) + ".*?" + re.escape(end), text, re.DOTALL)
    if found:
        return text[: found.start()] + section + text[found.end() :]
    ends = [m.end() for m in re.finditer(END.format(name=".*?"), text)]
    at = ends[-1] if ends else text.find("### Framework versions")
    before, after = (text[:at], text[at:]) if at >= 0 else (text, "")
    return f"{before.rstrip()}\n\n{section}\n\n{after.lstrip()}"


def _summary(
    model: PeftModel, name: str, ticket: Ticket, evaluation: Evaluation, base_id: str | None, size: int
) -> str:
    config = tuner_of(model).peft_config[name]
    base = model.get_base_model()
    counts = parameter_counts(model, name)
    widths = [w for modules in (config.external_widths or {}).values() for w in modules.values()]
    spread = f"{min(widths)}" if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}" if widths else ""
    budget = "none (widths and density given)" if config.budget is None else _number(config.budget)
    rows = {
        "Base model": f"`{base_id}` ({type(base).__name__})" if base_id else type(base).__name__,
        "Task": evaluation.task or task_of(base),
        "Dataset": evaluation.dataset,
        "Budget": budget,
        "Trained parameters": f"{counts['internal'] + counts['external']:,}, and {counts['heads']:,} in heads",
        "External adapters": f"{len(widths)} at {', '.join(config.external_widths or {})}, width {spread}"
        if widths
        else "none",
        "Ticket": f"{ticket.size:,} positions, density {ticket.density:.2%}, granularity {ticket.granularity.name}"
        if ticket.size
        else "none",
        "Heads": ", ".join(config.modules_to_save or ()) or "none",
        "Weights": f"{size:,} bytes",
    }
    lines = [f"## Selective Feature Adapter{'' if name == 'default' else f' `{name}`'}", "", "| | |", "| --- | --- |"]
    lines += [f"| {title} | {value} |" for title, value in rows.items() if value]
    if evaluation.metrics:
        split = f" ({evaluation.split})" if evaluation.split else ""
        lines += ["", "| Metric | Value |", "| --- | --- |"]
        lines += [f"| {m} on {evaluation.dataset}{split} | {v:.4g} |" for m, v in evaluation.metrics.items()]
    return "\n".join(lines)


def _number(budget: int | float) -> str:
    return f"{budget:,}" if isinstance(budget, int) else f"{budget:.4g} of the backbone"


def parameter_counts(model: PeftModel, name: str) -> dict[str, int]:
    """The numbers of parameters of an adapter: `internal`, `external` and `heads`."""
    layers = [layer for _, layer in sfa_layers(model)]
    internal = sum(layer.sfa_internal[name].num_values for layer in layers if name in layer.sfa_internal)
    every = sum(p.numel() for layer in layers for p in layer.parameters_of(name))
    heads = [p for key, p in model.named_parameters() if f".modules_to_save.{name}." in key]
    return {"internal": internal, "external": every - internal, "heads": sum(p.numel() for p in heads)}


def _draw(ticket: Ticket, notes: Notes, path: Path) -> bool:
    """Write the ticket's picture, from the cache if it is there. False if matplotlib is not installed."""
    key = digest_of(ticket.by_name()) + json.dumps(ticket.widths, sort_keys=True)
    drawn_of, drawn = notes.picture
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


def _snippet(model: PeftModel, name: str, source: str, is_repo: bool) -> str:
    """The code example that loads the adapter."""
    base = model.get_base_model()
    config = tuner_of(model).peft_config[name]
    options = ""
    num_labels = getattr(getattr(base, "config", None), "num_labels", None)
    if config.modules_to_save and isinstance(num_labels, int):
        options = f", num_labels={num_labels}, ignore_mismatched_sizes=True"
    base_name = getattr(base, "name_or_path", "") or config.base_model_name_or_path
    cls = type(base)
    if base_name and (hub_id(base_name) or not is_repo):
        library = cls.__module__.partition(".")[0]
        imports = f"from {library if library == 'transformers' else cls.__module__} import {cls.__name__}\n"
        make = f"base = {cls.__name__}.from_pretrained({json.dumps(str(base_name))}{options})"
    else:
        imports, make = "", f"base = ...  # the {cls.__name__} that the adapter was trained on"
    subfolder = "" if name == "default" else f", subfolder={json.dumps(name)}"
    return (
        f"import sfa_peft  # registers SFA with PEFT\nfrom peft import PeftModel\n{imports}\n{make}\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(source)}{subfolder}).eval()"
    )

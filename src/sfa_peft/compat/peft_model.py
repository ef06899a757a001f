"""Patches of `PeftModel` for SFA adapters: loading, saving, the model card and the upload.

PEFT asks the tuner for the tensors of a checkpoint, but has no hook for how files are read and written, and for the
content of a card.
"""

from __future__ import annotations

import functools
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from huggingface_hub import CommitInfo
from peft import PeftModel, get_peft_model_state_dict, peft_model
from peft import utils as peft_utils
from peft.utils import hotswap
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..checkpoint.files import staged
from ..checkpoint.names import is_adapter_key
from ..checkpoint.reader import LOAD, adapter_in_load, difference_of
from ..checkpoint.seal import CONFIG, WEIGHTS
from ..checkpoint.writer import write_adapter
from ..config import DTYPES, SFAConfig
from ..hub import card
from ..hub.base import BASE_CONFIG, source_of
from ..hub.upload import upload
from ..layers.adapted import sfa_layers
from ..layers.offloading import is_hooked, onloaded
from ..recorded import RecordedConfig
from ..search import ticket_of
from ..tuner.model import tuner_of
from ..tuner.state import state_of, write
from .hotswap import resize
from .loads import AdapterLoad, readable_errors, restoring
from .patching import Method, arguments_of, in_own_context, patch
from .registration import NAME
from .trainer import watch_trainer


def is_sfa(model: Any) -> bool:
    return getattr(model, "peft_type", None) == NAME


def _onloads_weights(method: Method) -> Method:
    """Load the adapter and head weights that Accelerate has offloaded, for the time of a call."""

    @functools.wraps(method)
    def onloading(original: Method, model: PeftModel, *args: Any, **kwargs: Any) -> Any:
        hooked = [m for n, m in model.named_modules() if is_hooked(m) and (".sfa_" in n or ".modules_to_save." in n)]
        with onloaded(*hooked):
            return method(original, model, *args, **kwargs)

    return onloading


@patch(PeftModel, "save_pretrained", "save_directory", "selected_adapters", "is_main_process", applies=is_sfa)
@_onloads_weights
def save_pretrained(
    original: Method,
    model: PeftModel,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """Save adapters as `PeftModel.save_pretrained` does, atomically, and then write a model card with a picture.

    A process that is killed leaves the old checkpoint or the new one; of several adapters, each is whole. With
    torch.distributed, only rank 0 writes. If the card cannot be written, there is a warning, and the checkpoint is
    complete.

    Raises:
        ValueError: If `safe_serialization` is False, since an SFA checkpoint is never a pickle; if a config no longer
            matches its adapter; if a value is not finite, or not in `values_dtype` or `heads_dtype`; or if
            `save_embedding_layers` is True. Nothing is written then.
    """
    if not safe_serialization:
        raise ValueError(
            "SFA saves safetensors only, since a pickle can run code; leave out safe_serialization=False."
        )
    names = list(model.peft_config) if selected_adapters is None else selected_adapters
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"selected_adapters: {name!r} does not exist; the model has {sorted(model.peft_config)}.")
        tuner_of(model).check_config(name)
    if kwargs.get("path_initial_model_for_weight_conversion") is not None:
        original(save_directory, selected_adapters=names, **kwargs)  # PEFT raises an error for this
    if save_embedding_layers is True:
        raise ValueError(
            "SFA saves no embedding layers, since loading them would change the base: name them in `modules_to_save`."
        )
    tensors = {name: _state_of(model, name, kwargs.get("state_dict")) for name in names}
    if not _writes(is_main_process):
        return
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"save_directory={str(folder)!r} is a file; name a folder.")
    # A save that is killed between two renames leaves a pair of files of two saves. With SFA's weights, SFA reads the
    # config in the weights file. The config of another method would load without an error, so it is replaced first.
    is_foreign = any(_is_of_another_method(card.folder_of(folder, name) / CONFIG) for name in names)
    order = (CONFIG, WEIGHTS) if is_foreign else (WEIGHTS, CONFIG)
    with staged(folder, last=order) as stage:
        tickets = {name: ticket_of(model.base_model, name) for name in names}
        for name in names:
            _write(model, name, tensors[name], tickets[name].shapes, card.folder_of(stage, name))
            there = card.folder_of(folder, name) / BASE_CONFIG
            for file in card.outdated(card.folder_of(stage, name), there.read_bytes() if there.is_file() else None):
                there.with_name(file).unlink(missing_ok=True)
    card.write_card(model, folder, os.fspath(save_directory), tickets=tickets)


def _state_of(model: PeftModel, adapter_name: str, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
    if state_dict is None and not dist.is_initialized():
        return state_of(model, adapter_name)
    state: dict[str, Tensor] = get_peft_model_state_dict(  # on every process, since it may be a collective operation
        model,
        state_dict=state_dict,
        adapter_name=adapter_name,
        save_embedding_layers=False,  # with "auto" PEFT asks the Hub for the base's vocabulary
    )
    return state


def _is_of_another_method(config: Path) -> bool:
    try:
        return config.is_file() and f'"{NAME}"' not in config.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return True


def _write(
    model: PeftModel,
    adapter_name: str,
    tensors: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
) -> None:
    config = tuner_of(model).peft_config[adapter_name]

    def dtype_of(key: str) -> torch.dtype | None:
        name = config.values_dtype if is_adapter_key(key) else config.heads_dtype
        return None if name is None else DTYPES.get(name)

    base = model.get_base_model()
    name, commit = source_of(base)
    config.base_model_name_or_path = config.base_model_name_or_path or name
    if config.revision is None and config.base_model_name_or_path == name:
        config.revision = commit  # the repository may get other weights
    fields = config.to_dict() | {"inference_mode": True}
    if config.task_type is None:  # PEFT's Auto classes read the base's class from it
        fields["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    write_adapter(folder, tensors, fields, shapes, dtype_of)
    card.write_base(model, adapter_name, folder)


def _writes(is_main_process: bool) -> bool:
    """Whether this process is the one that writes."""
    return is_main_process and not (dist.is_initialized() and dist.get_rank() != 0)


@patch(PeftModel, "__init__", "model", "peft_config")
def init(original: Method, model: PeftModel, *args: Any, **kwargs: Any) -> None:
    """Adapt a base as PEFT does. If it fails, the base is as it was."""
    given = arguments_of(original, args, kwargs)
    concerned = isinstance(given.get("peft_config"), SFAConfig) and isinstance(given.get("model"), nn.Module)
    with restoring(given["model"]) if concerned else nullcontext():
        original(*args, **kwargs)
    if concerned:
        watch_trainer()


@patch(PeftModel, "add_adapter", "adapter_name", applies=is_sfa)
def add_adapter(original: Method, model: PeftModel, *args: Any, **kwargs: Any) -> None:
    """Add an adapter as PEFT does. If it fails, the model is as it was; PEFT's version forgets interrupts."""
    with restoring(model):
        original(*args, **kwargs)


@patch(PeftModel, "from_pretrained", "model", "model_id", "adapter_name", "config", "key_mapping", "kwargs")
@in_own_context
def from_pretrained(original: Method, cls: type[PeftModel], *args: Any, **kwargs: Any) -> PeftModel:
    """Load an adapter as `PeftModel.from_pretrained` does. A failed load does not change the model.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    given = arguments_of(original, args, kwargs)
    model, options = given.get("model"), given.get("kwargs", {})
    model_id: Any = given.get("model_id")
    mapping = given.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None)
    with AdapterLoad(model, given.get("adapter_name"), mapping) as load, readable_errors(load, model_id, options):
        config = given.get("config")  # with it, PEFT does not read the saved config
        if isinstance(config, SFAConfig):
            load.begin()
            saved = SFAConfig.from_pretrained(model_id, **options)
            if isinstance(saved, RecordedConfig) and isinstance(config, RecordedConfig):
                _check_same(saved, config)
        loaded: PeftModel = original(*args, **kwargs)
        return loaded


@patch(PeftModel, "load_adapter", "model_id", "adapter_name", "key_mapping", "kwargs", applies=is_sfa)
@in_own_context
def load_adapter(original: Method, model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """Load another adapter as `PeftModel.load_adapter` does. A failed load does not change the model.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    given = arguments_of(original, args, kwargs)
    adapter_name, options = given.get("adapter_name"), given.get("kwargs", {})
    model_id: Any = given.get("model_id")
    if LOAD.get() is not None:  # `from_pretrained` has read and checked it
        return original(*args, **kwargs)
    load = AdapterLoad(model, adapter_name, given.get("key_mapping"))
    with load, readable_errors(load, model_id, options):
        load.begin()
        configs = tuner_of(model).peft_config
        if adapter_name in configs:  # then PEFT does not read the saved config
            if any(adapter_name in layer.merged_adapters for _, layer in sfa_layers(model)):
                raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before loading into it.")
            saved, present = SFAConfig.from_pretrained(model_id, **options), configs[adapter_name]
            if isinstance(saved, RecordedConfig):  # without weights, PEFT's part finds that they are missing
                if _only_sizes_differ(saved, present) and _is_fresh(model, adapter_name):
                    resize(model, adapter_name, saved)
                else:
                    _check_same(saved, present)
        return original(*args, **kwargs)


@patch(peft_model, "load_peft_weights")
@patch(hotswap, "load_peft_weights")
def load_peft_weights(original: Method, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The weights of the adapter that is being loaded. Those of an SFA adapter have been read already.

    Raises:
        CheckpointError: If an SFA adapter has no weights.
    """
    load = LOAD.get()
    if load is None or not load.begun:
        others: dict[str, Tensor] = original(*args, **kwargs)
        return others
    if load.saved is None:
        raise CheckpointError(f"the adapter has no {WEIGHTS}; download it again, or save it with save_pretrained.")
    tensors: dict[str, Tensor] = dict(load.saved.tensors)
    return tensors


@patch(peft, "set_peft_model_state_dict", "model", "peft_model_state_dict", "adapter_name")
@patch(peft_model, "set_peft_model_state_dict", "model", "peft_model_state_dict", "adapter_name")
@patch(peft_utils, "set_peft_model_state_dict", "model", "peft_model_state_dict", "adapter_name")
def set_peft_model_state_dict(original: Method, *args: Any, **kwargs: Any) -> Any:
    """Load a state dict as PEFT does; an error restores the adapter.

    PEFT ends in a KeyError if a tensor of a head is missing, and overwrites one that has the adapter's name in its
    own.

    Raises:
        CheckpointError: If the tensors are damaged, or do not fit the adapter.
    """
    given = arguments_of(original, args, kwargs)
    if not is_sfa(given.get("model")):
        return original(*args, **kwargs)
    tensors: Any = given["peft_model_state_dict"]
    named = [key for key in tensors if f".modules_to_save.{given['adapter_name']}." in key]
    if named:
        raise CheckpointError(
            f"the state dict has {named[0]!r}, with the name of the adapter; save the adapter again."
        )
    try:
        with restoring(given["model"], given["adapter_name"]):
            # PEFT goes through the whole model for this, several times.
            if adapter_in_load() is not None and write(given["model"], given["adapter_name"], tensors):
                return nn.Module().load_state_dict({})  # says that no key is missing or unexpected
            return original(*args, **kwargs)
    except KeyError as error:
        key = error.args[0]
        if key in tensors:
            raise
        raise CheckpointError(
            f"the state dict lacks {key!r} of `modules_to_save`; take it from get_peft_model_state_dict(model)."
        ) from error


def _only_sizes_differ(saved: RecordedConfig, present: RecordedConfig) -> bool:
    sizes = {"ticket_sizes": saved.ticket_sizes, "external_widths": saved.external_widths}
    is_same = difference_of(present.to_dict(), saved.to_dict()) is None
    return not is_same and difference_of(present.to_dict() | sizes, saved.to_dict()) is None


def _is_fresh(model: PeftModel, adapter_name: str) -> bool:
    """Whether an adapter has not been trained, as before a training is resumed."""
    return not any(layer.is_changed_by(adapter_name) for _, layer in sfa_layers(model))


def _check_same(saved: RecordedConfig, present: RecordedConfig) -> None:
    """Check that weights saved with the config `saved` fit an adapter with the config `present`.

    Raises:
        CheckpointError: If they do not fit. The message names the field.
    """
    difference = difference_of(present.to_dict(), saved.to_dict())
    if difference:
        raise CheckpointError(
            f"the adapter and the weights to be loaded differ in {difference}. To load another ticket or other widths "
            f"use PeftModel.from_pretrained(base, path, is_trainable=True), or run the same search first."
        )


@patch(PeftModel, "create_or_update_model_card", "output_dir", applies=is_sfa)
def create_or_update_model_card(original: Method, model: PeftModel, output_dir: str) -> None:
    """Write the model card as `PeftModel.create_or_update_model_card` does, with a section on the saved adapters."""
    card.write_card(model, Path(output_dir), os.fspath(output_dir))


@patch(PeftModel, "push_to_hub", "repo_id", applies=is_sfa)
def push_to_hub(
    original: Method,
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    **save_options: Any,
) -> CommitInfo | None:
    """Save adapters and upload them in one commit, with the card that `save_pretrained` writes.

    transformers' version replaces the card, and also uploads files of an interrupted push.

    Args:
        repo_id (`str`): The repository. It is created if it does not exist.
        commit_message (`str`, *optional*, defaults to `None`): None means "Upload SFA adapter".
        commit_description (`str`, *optional*, defaults to `None`): The description of the commit.
        private (`bool`, *optional*, defaults to `None`): Whether a new repository is private.
        token (`bool` or `str`, *optional*, defaults to `None`): The token. None uses the stored one.
        revision (`str`, *optional*, defaults to `None`): The branch. It is created if it does not exist.
        create_pr (`bool`, defaults to `False`): Whether to open a pull request instead of a commit on the branch.
        tags (`list[str]`, *optional*, defaults to `None`): Additional tags for the card.
        save_options: Arguments of `save_pretrained`, such as `selected_adapters`. `max_shard_size` is ignored.

    Returns:
        The commit, or None on processes that do not write.

    Raises:
        ValueError: If an adapter cannot be saved.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses the upload.
    """
    save_options.pop("max_shard_size", None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **save_options)  # first, so that an error creates no repository
        if not _writes(save_options.get("is_main_process", True)):
            return None
        return upload(
            model,
            Path(folder),
            repo_id,
            message=commit_message or "Upload SFA adapter",
            description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags or (),
        )

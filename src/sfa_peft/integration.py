"""What PEFT and transformers do in another way where adapters are SFA's: save, load, write a card, and push.

PEFT asks the tuner for the tensors of a checkpoint, but has no hook for how files are written and what a card says.
transformers reads an adapter's file by itself, and has no hook for what is coded in it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import CommitInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin

from . import hub
from .base import base_parameters
from .checkpoint import CheckpointError
from .checkpoint.files import staged
from .checkpoint.seal import CONFIG, WEIGHTS, read, seal
from .checkpoint.validation import check_sizes, is_adapter_key
from .config import DTYPES, SFAConfig
from .granularity import position_dtype
from .layer import sfa_layers
from .model import discard_adapter
from .plan import LOADING
from .registration import NAME, extend
from .saved import tensors_of, weights_of
from .ticket.install import ticket_of

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

Method = Callable[..., Any]


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
    """Save adapters as `PeftModel.save_pretrained` does, whole or not at all, with a model card and its picture.

    A kill at any moment leaves the old checkpoint or the new one. Where torch.distributed runs, only rank 0 writes.

    Raises:
        ValueError: If `safe_serialization` is False: an SFA checkpoint is data, never a pickle. If a config was
            changed so that it does not say what its adapter is. If a value is not finite, or does not fit
            `values_dtype` or `heads_dtype`. If there is a model card that cannot be read. Nothing is written then.
    """
    if not safe_serialization:
        raise ValueError(
            "SFA saves safetensors only, since a pickle can run code; leave out safe_serialization=False."
        )
    names = list(model.peft_config) if selected_adapters is None else selected_adapters
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"selected_adapters: there is no {name!r}; the model has {sorted(model.peft_config)}.")
        model.base_model.check_config(name)
    # "auto" asks the Hub for the base's vocabulary; an adapted layer is saved as its change, so there is none to save.
    options = {"selected_adapters": names, "save_embedding_layers": save_embedding_layers is True, **kwargs}
    folder = Path(save_directory)
    if not is_main_process or (dist.is_initialized() and dist.get_rank() != 0):
        # Collecting the tensors may need every process. PEFT makes the folder in any case.
        with tempfile.TemporaryDirectory() as nowhere:
            original(nowhere, is_main_process=False, **options)
        return
    if folder.is_file():
        raise ValueError(f"save_directory={str(folder)!r} is a file; name a folder.")
    hub.check_card(folder)
    with staged(folder, last=(WEIGHTS, CONFIG, hub.PICTURE, hub.CARD)) as stage:
        if (folder / hub.CARD).is_file():
            shutil.copy(folder / hub.CARD, stage / hub.CARD)
        original(str(stage), is_main_process=True, **options)
        for name in names:
            _seal(model, name, stage if name == "default" else stage / name)
        hub.update_card(model, stage, os.fspath(save_directory))


def _seal(model: PeftModel, adapter_name: str, folder: Path) -> None:
    config = model.peft_config[adapter_name]

    def dtype_of(key: str) -> torch.dtype | None:
        return DTYPES.get(config.values_dtype if is_adapter_key(key) else config.heads_dtype)

    seal(folder, ticket_of(model.base_model, adapter_name).shapes, dtype_of)


def from_pretrained(
    original: Method,
    cls: type[PeftModel],
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> PeftModel:
    """Load an adapter as `PeftModel.from_pretrained` does; one that fails to load leaves the model as it was.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    with _loading(model, adapter_name), _readable_errors(model_id, kwargs):
        return original(model, model_id, adapter_name, *args, **kwargs)


def load_adapter(
    original: Method,
    model: PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load one more adapter as `PeftModel.load_adapter` does; one that fails to load leaves the model as it was.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    with _loading(model, adapter_name), _readable_errors(model_id, kwargs):
        return original(model_id, adapter_name, *args, **kwargs)


def load_adapter_in_transformers(
    original: Method,
    model: PreTrainedModel,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: PeftConfig | None = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Load an adapter as transformers' `load_adapter` does, with SFA's checks, and its positions decoded.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    load_config = kwargs.get("load_config")
    source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    options = {
        **(getattr(load_config, "download_kwargs", None) or {}),
        **(kwargs.get("adapter_kwargs") or {}),
        **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs},
    }
    if peft_config is None and source is not None and _type_of(source, options) == NAME:
        peft_config = SFAConfig.from_pretrained(source, **options)
    if not isinstance(peft_config, SFAConfig):
        return original(peft_model_id, adapter_name, peft_config, adapter_state_dict, **kwargs)
    with _loading(model, adapter_name or "default"):
        if adapter_state_dict is None:
            weights = weights_of(source, **options)
            if weights is None:
                raise CheckpointError(f"{source!r} has no {WEIGHTS}.")
            adapter_state_dict = tensors_of(peft_config, read(weights))
        sizes, widths = peft_config.ticket_sizes or {}, peft_config.external_widths or {}
        parameters = base_parameters(model, [""], peft_config)
        units = {name: peft_config.granularity.count(p.shape) for name, p in parameters if name in sizes}
        dtype = position_dtype(max(units.values(), default=0))
        positions = {k: p.to(dtype) for k, p in check_sizes(adapter_state_dict, sizes, widths, units).items()}
        return original(None, adapter_name, peft_config, adapter_state_dict | positions, **kwargs)


def _type_of(source: str, options: dict[str, Any]) -> str | None:
    """The kind of adapter in a folder or repository; None where there is none."""
    try:
        return PeftConfig.from_pretrained(source, **options).peft_type
    except CheckpointError:
        return NAME
    except (ValueError, OSError, KeyError, TypeError):
        return None


def create_or_update_model_card(original: Method, model: PeftModel, output_dir: str) -> None:
    """Write the model card as `PeftModel.create_or_update_model_card` does, with a section on the saved adapters."""
    tags = hub.begin_card(model, Path(output_dir))  # PEFT drops tags that it does not know
    original(output_dir)
    hub.update_card(model, Path(output_dir), os.fspath(output_dir), tags=tags)


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
) -> CommitInfo:
    """Save adapters and upload them in one commit, with the card that `save_pretrained` writes.

    transformers' own replaces the card by one of its own, and uploads the files of an interrupted push again.

    Args:
        repo_id: The repository; made if need be.
        commit_message: "Upload SFA adapter" unless given.
        commit_description: The commit's longer text.
        private: Whether a new repository is private.
        token: The token; the stored one unless given.
        revision: The branch; made if need be.
        create_pr: Open a pull request instead.
        tags: More tags for the card.
        save_options: Of `save_pretrained`, such as `selected_adapters`. `max_shard_size` has no meaning here.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
    """
    save_options.pop("max_shard_size", None)
    message = commit_message or "Upload SFA adapter"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **save_options)  # first: what cannot be saved needs no repository
        push = hub.Push(repo_id, private=private, token=token, revision=revision, create_pr=create_pr)
        if push.fetch_card(Path(folder)):
            model.create_or_update_model_card(folder)
        hub.update_card(model, Path(folder), push.repo_id, is_repo=True, tags=tags or ())
        return push.upload(Path(folder), message, commit_description)


@contextmanager
def _loading(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Inject an adapter whose weights follow; take it out again if an error comes, unless it was there before."""
    if not isinstance(model, nn.Module):
        yield  # PEFT has an error for that
        return
    base = model.base_model.model if isinstance(model, PeftModel) else model
    flags = [(p, p.requires_grad) for p in base.parameters()]
    had_config = hasattr(base, "peft_config")
    had_adapter = adapter_name in getattr(base, "peft_config", {})
    token = LOADING.set(True)
    try:
        yield
    except BaseException:
        is_new = not had_adapter and any(adapter_name in layer.adapter_names for _, layer in sfa_layers(base))
        if is_new:
            discard_adapter(base, adapter_name)
            for p, requires_grad in flags:
                p.requires_grad_(requires_grad)
        if is_new or (not had_adapter and not sfa_layers(base)):
            configs = getattr(base, "peft_config", {})
            if isinstance(configs.get(adapter_name), SFAConfig):
                configs.pop(adapter_name)
            if not had_config and not configs and hasattr(base, "peft_config"):
                del base.peft_config
        raise
    finally:
        LOADING.reset(token)


@contextmanager
def _readable_errors(model_id: str | os.PathLike[str], options: dict[str, Any]) -> Iterator[None]:
    """Make what PEFT trips over in a damaged SFA adapter a `CheckpointError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RecursionError, SafetensorError, JSONDecodeError, UnicodeError) as e:
        if _is_saved_by_sfa(model_id, options):
            what = f"it lacks {e.args[0]!r}" if isinstance(e, KeyError) and e.args else repr(e)
            raise CheckpointError(f"the SFA adapter {str(model_id)!r} is damaged, or incomplete: {what}") from e
        raise


def _is_saved_by_sfa(model_id: str | os.PathLike[str], options: dict[str, Any]) -> bool:
    try:
        weights = weights_of(str(model_id), **options)
        config = Path(model_id, options.get("subfolder") or "", CONFIG)
        if config.is_file() and f'"{NAME}"' in config.read_text(encoding="utf-8", errors="replace"):
            return True
        return weights is not None and any(is_adapter_key(key) for key in read(weights).tensors)
    except (CheckpointError, HfHubHTTPError, HFValidationError, OSError):
        return False


extend(
    PeftModel,
    {
        "save_pretrained": save_pretrained,
        "from_pretrained": from_pretrained,
        "load_adapter": load_adapter,
        "create_or_update_model_card": create_or_update_model_card,
        "push_to_hub": push_to_hub,
    },
    applies=lambda model: getattr(model, "peft_type", None) == NAME,
)
extend(PeftAdapterMixin, {"load_adapter": load_adapter_in_transformers}, applies=lambda model: True)

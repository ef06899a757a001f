"""What PEFT and transformers do in another way where adapters are SFA's: save, load, write a card, and push.

PEFT asks the tuner for the tensors of a checkpoint, but has no hook for how files are written and what a card says.
transformers reads an adapter's file by itself, and has no hook for what is coded in it.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import CommitInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel, get_peft_model_state_dict, peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin

from ..checkpoint import CheckpointError
from ..checkpoint.files import staged
from ..checkpoint.names import is_adapter_key
from ..checkpoint.reader import LOAD, Load, difference_of, weights_of
from ..checkpoint.renaming import KeyMapping
from ..checkpoint.seal import CONFIG, WEIGHTS, read
from ..checkpoint.validation import check_sizes
from ..checkpoint.writer import write_adapter
from ..config import DTYPES, SFAConfig
from ..hub import card
from ..hub.upload import upload
from ..layers.adapted import sfa_layers
from ..layers.granularity import position_dtype
from ..layers.offloading import brought, is_hooked
from ..planning.base import base_parameters
from ..search.install import ticket_of
from ..ticket import Ticket
from ..tuner.model import HANDED_OVER, HandedOverError, discard_adapter
from .hotswap import resized
from .registration import NAME, arguments_of, extend

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

Method = Callable[..., Any]


def _brings_weights(method: Method) -> Method:
    """Have the weights of adapters and heads in place that Accelerate has offloaded."""

    @functools.wraps(method)
    def bringing(original: Method, model: PeftModel, *args: Any, **kwargs: Any) -> Any:
        own = [m for n, m in model.named_modules() if is_hooked(m) and (".sfa_" in n or ".modules_to_save." in n)]
        with brought(*own):
            return method(original, model, *args, **kwargs)

    return bringing


@_brings_weights
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
    if kwargs.get("path_initial_model_for_weight_conversion") is not None:
        original(save_directory, selected_adapters=names, **kwargs)  # PEFT has an error for that
    # "auto" asks the Hub for the base's vocabulary; an adapted layer is saved as its change, so there is none to save.
    tensors = {
        name: get_peft_model_state_dict(  # of every process, which collecting them may need
            model,
            state_dict=kwargs.get("state_dict"),
            adapter_name=name,
            save_embedding_layers=save_embedding_layers is True,
        )
        for name in names
    }
    if not _writes(is_main_process):
        return
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"save_directory={str(folder)!r} is a file; name a folder.")
    card.check_card(folder)
    with staged(folder, last=(WEIGHTS, CONFIG, card.PICTURE, card.CARD)) as stage:
        if (folder / card.CARD).is_file():
            shutil.copyfile(folder / card.CARD, stage / card.CARD)
        tickets = {name: ticket_of(model.base_model, name) for name in names}
        for name in names:
            _write(model, name, tensors[name], tickets[name].shapes, card.folder_of(stage, name))
        _write_card(model, stage, os.fspath(save_directory), tickets)


def _write(
    model: PeftModel,
    adapter_name: str,
    tensors: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
) -> None:
    config = model.peft_config[adapter_name]

    def dtype_of(key: str) -> torch.dtype | None:
        return DTYPES.get(config.values_dtype if is_adapter_key(key) else config.heads_dtype)

    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = vars(base).get("name_or_path") or None
    fields = config.to_dict() | {"inference_mode": True}
    if config.task_type is None:  # how PEFT's Auto classes find the base's class
        fields["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    write_adapter(folder, tensors, fields, shapes, dtype_of)


def _writes(is_main_process: bool) -> bool:
    """Whether this process is the one that writes."""
    return is_main_process and not (dist.is_initialized() and dist.get_rank() != 0)


def from_pretrained(original: Method, cls: type[PeftModel], *args: Any, **kwargs: Any) -> PeftModel:
    """Load an adapter as `PeftModel.from_pretrained` does; one that fails to load leaves the model as it was.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    given = arguments_of(original, args, kwargs)
    model, model_id, options = given.get("model"), given.get("model_id"), given.get("kwargs", {})
    mapping = given.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None)
    with _Load(model, given.get("adapter_name"), mapping) as load, _readable_errors(load, model_id, options):
        config = given.get("config")  # PEFT reads no config then
        if isinstance(config, SFAConfig):
            load.begin()
            _check_same(SFAConfig.from_pretrained(model_id, **options), config)
        return original(*args, **kwargs)


def load_adapter(original: Method, model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """Load one more adapter as `PeftModel.load_adapter` does; one that fails to load leaves the model as it was.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    given = arguments_of(original, args, kwargs)
    model_id, adapter_name, options = given.get("model_id"), given.get("adapter_name"), given.get("kwargs", {})
    if LOAD.get() is not None:  # `from_pretrained` has read and checked it
        return original(*args, **kwargs)
    with ExitStack() as stack:
        load = stack.enter_context(_Load(model, adapter_name, given.get("key_mapping")))
        load.begin()
        stack.enter_context(_readable_errors(load, model_id, options))
        if adapter_name in model.peft_config:  # PEFT reads no config then
            if any(adapter_name in layer.merged_adapters for _, layer in sfa_layers(model)):
                raise ValueError(f"adapter {adapter_name!r} is merged: unmerge_adapter() before others are loaded.")
            saved, own = SFAConfig.from_pretrained(model_id, **options), model.peft_config[adapter_name]
            if _only_sizes_differ(saved, own) and _is_fresh(model, adapter_name):
                stack.enter_context(resized(model, adapter_name, saved))
            else:
                _check_same(saved, own)
        return original(*args, **kwargs)


def load_peft_weights(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The weights of the adapter that is being loaded; of SFA's, those that have been read already."""
    load = LOAD.get()
    return _load_peft_weights(*args, **kwargs) if load is None or load.saved is None else dict(load.saved.tensors)


def _only_sizes_differ(saved: SFAConfig, own: SFAConfig) -> bool:
    sizes = {"ticket_sizes": saved.ticket_sizes, "external_widths": saved.external_widths}
    is_same = difference_of(own.to_dict(), saved.to_dict()) is None
    return not is_same and difference_of(own.to_dict() | sizes, saved.to_dict()) is None


def _is_fresh(model: PeftModel, adapter_name: str) -> bool:
    """Whether an adapter has learned nothing yet, as one that a training is going to be resumed with."""
    return not any(layer.is_changed_by(adapter_name) for _, layer in sfa_layers(model))


def _check_same(saved: SFAConfig, own: SFAConfig) -> None:
    """Check that weights saved with one config can be loaded with another.

    Raises:
        CheckpointError: If not. Names the field.
    """
    difference = difference_of(own.to_dict(), saved.to_dict()) if own.ticket_sizes is not None else None
    if difference:
        raise CheckpointError(
            f"the weights to be loaded were saved with another {difference}. For another ticket or other widths use "
            f"PeftModel.from_pretrained(base, path, is_trainable=True), or run the same search first."
        )


def load_adapter_in_transformers(original: Method, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter as transformers' `load_adapter` does, with SFA's checks, and its positions decoded.

    Raises:
        CheckpointError: If the adapter is damaged, or does not fit the model.
    """
    given = arguments_of(original, args, kwargs)
    config = given.get("peft_config")
    if isinstance(config, SFAConfig):
        return _load_in_transformers(original, model, given)
    # transformers reads the config; only when it comes to SFAModel with it, SFA is concerned.
    token = HANDED_OVER.set(True)
    try:
        return original(*args, **kwargs)
    except HandedOverError:
        pass
    finally:
        HANDED_OVER.reset(token)
    return _load_in_transformers(original, model, given)


def _load_in_transformers(original: Method, model: PreTrainedModel, given: dict[str, Any]) -> Any:
    given = given | given.pop("kwargs", {})
    load_config = given.get("load_config")
    source = given.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    options = {
        **(getattr(load_config, "download_kwargs", None) or {}),
        **(given.get("adapter_kwargs") or {}),
        **{key: given[key] for key in HUB_OPTIONS if key in given},
    }
    config, tensors = given.get("peft_config"), given.get("adapter_state_dict")
    if tensors is None and source is None:
        raise ValueError("an SFA adapter needs `peft_model_id`, or `adapter_state_dict` beside `peft_config`.")
    with _Load(model, given.get("adapter_name") or "default") as load:
        load.begin()
        if tensors is None:
            saved = SFAConfig.from_pretrained(source, **options)
            if load.saved is None:
                raise CheckpointError(f"{source!r} has no {WEIGHTS}.")
            config, tensors = config or saved, load.saved.tensors
        sizes, widths = config.ticket_sizes or {}, config.external_widths or {}
        parameters = base_parameters(model, [""], config)
        units = {name: config.granularity.count(p.shape) for name, p in parameters if name in sizes}
        dtype = position_dtype(max(units.values(), default=0))
        positions = {k: p.to(dtype) for k, p in check_sizes(tensors, sizes, widths, units).items()}
        own = {"peft_model_id": None, "peft_config": config, "adapter_state_dict": tensors | positions}
        try:
            return original(**given | own)
        except RuntimeError as error:  # tensors of other shapes
            raise CheckpointError(f"the adapter does not fit this {type(model).__name__}: {error}") from error


def create_or_update_model_card(original: Method, model: PeftModel, output_dir: str) -> None:
    """Write the model card as `PeftModel.create_or_update_model_card` does, with a section on the saved adapters."""
    _write_card(model, Path(output_dir), os.fspath(output_dir), {})


def _write_card(model: PeftModel, folder: Path, source: str, tickets: Mapping[str, Ticket]) -> None:
    tags = card.begin_card(model, folder)  # PEFT drops tags that it does not know
    _PEFT_CARD(model, str(folder))
    card.update_card(model, folder, source, tags=tags, tickets=tickets)


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

    Returns:
        The commit; None on processes that do not write.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
    """
    save_options.pop("max_shard_size", None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **save_options)  # first: what cannot be saved needs no repository
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


class _Load(Load):
    """One load of an adapter. If it fails, the adapter is taken out again, unless it was there before.

    It begins when a config of SFA is read for it, and before that does nothing: it may be another method's.
    """

    def __init__(self, model: Any, adapter_name: Any, mapping: KeyMapping | None = None) -> None:
        super().__init__(mapping or {})
        self.model, self.adapter_name = model, adapter_name
        self.begun = False

    def begin(self) -> None:
        if self.begun or not isinstance(self.model, nn.Module):  # PEFT has an error for that
            return
        self.begun = True
        self.base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.flags = [(p, p.requires_grad) for p in self.base.parameters()]
        self.had_config = hasattr(self.base, "peft_config")
        self.was_loaded = getattr(self.base, "_hf_peft_config_loaded", None)  # transformers' note that it has adapters
        self.had_adapter = self.adapter_name in getattr(self.base, "peft_config", {})

    def __enter__(self) -> _Load:
        self.token = LOAD.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        LOAD.reset(self.token)
        if kind is not None and self.begun and not self.had_adapter:
            self._undo()

    def _undo(self) -> None:
        base, name = self.base, self.adapter_name
        is_new = any(name in layer.adapter_names for _, layer in sfa_layers(base))
        if is_new:
            discard_adapter(base, name)
        for p, requires_grad in self.flags:
            p.requires_grad_(requires_grad)
        if self.was_loaded is not None:
            base._hf_peft_config_loaded = self.was_loaded
        if is_new or not sfa_layers(base):
            configs = getattr(base, "peft_config", {})
            if isinstance(configs.get(name), SFAConfig):
                configs.pop(name)
            if not self.had_config and not configs and hasattr(base, "peft_config"):
                del base.peft_config


@contextmanager
def _readable_errors(load: _Load, model_id: Any, options: dict[str, Any]) -> Iterator[None]:
    """Make what PEFT trips over in a damaged SFA adapter a `CheckpointError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RecursionError, SafetensorError, JSONDecodeError, UnicodeError) as e:
        is_known = load.begun or _is_of_the_type(e)
        if is_known and isinstance(model_id, str | os.PathLike) and _is_saved_by_sfa(model_id, options):
            SFAConfig.from_pretrained(model_id, **options)  # says what is wrong with it
            if isinstance(e, KeyError):  # of a head, which that does not know
                raise CheckpointError(
                    f"the SFA adapter {str(model_id)!r} is incomplete: it lacks {e.args[0]!r}"
                ) from e
        raise


def _is_of_the_type(error: BaseException) -> bool:
    """Whether PEFT could not read from a config whose adapter it is, so that it may be one of SFA."""
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return "_get_peft_type" in frames or frames[-1] in ("from_pretrained", "load_adapter")


def _is_saved_by_sfa(model_id: str | os.PathLike[str], options: dict[str, Any]) -> bool:
    try:
        weights = weights_of(str(model_id), **options)
        config = Path(model_id, options.get("subfolder") or "", CONFIG)
        if config.is_file() and f'"{NAME}"' in config.read_text(encoding="utf-8", errors="replace"):
            return True
        return weights is not None and any(is_adapter_key(key) for key in read(weights).tensors)
    except (CheckpointError, HfHubHTTPError, HFValidationError, OSError):
        return False


_PEFT_CARD = PeftModel.create_or_update_model_card
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
_load_peft_weights = peft_model.load_peft_weights
peft_model.load_peft_weights = functools.wraps(_load_peft_weights)(load_peft_weights)
extend(PeftAdapterMixin, {"load_adapter": load_adapter_in_transformers}, applies=lambda model: True)

"""The base model of a saved adapter: what is saved of it, so that the adapter stands alone, and how it is loaded.

Whoever made an adapter may have chosen everything that is read here. So classes are those of transformers, weights are
read from safetensors, and code from the Hub, which a config may ask for, is never run: neither modules nor kernels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint import CheckpointError
from ..checkpoint.reader import file_of
from ..config import SFAConfig
from ..layers.leaves import modules_outside

BASE_CONFIG = "base_config.json"
MAX_BASE_CONFIG = 1 << 24  # bytes
# What a config may not choose: attention and kernels from the Hub, classes from the Hub, and where it came from.
_NOT_FROM_A_FILE = {
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"),
    *("_experts_implementation", "use_kernels", "auto_map", "_name_or_path", "_commit_hash"),
}
_TIMM = ("timm_backbone", "timm_wrapper")


def backbone_of(model: nn.Module) -> tuple[str, PreTrainedModel] | None:
    """The name of the backbone in a dense model, and the backbone; None if its config describes none."""
    described = getattr(getattr(model, "config", None), "backbone_config", None)
    if described is None:
        return None
    modules = ((name, module) for name, module in model.named_modules() if name)
    return next(
        ((n, m) for n, m in modules if isinstance(m, PreTrainedModel) and type(m.config) is type(described)), None
    )


def source_of(base: nn.Module) -> tuple[str | None, str | None]:
    """The checkpoint that a base model's weights are from, a folder or a repository, and its commit on the Hub.

    A dense model with a fresh head is made from a config, and has no name. Its backbone has one.
    """
    found = backbone_of(base)
    for module in (base, *([found[1]] if found else [])):
        name = vars(module).get("name_or_path")
        if name and isinstance(name, str):
            return name, _commit_of(name)
    return None, None


def _commit_of(name: str) -> str | None:
    """The commit of a repository that was loaded last, from the Hub's cache: transformers does not keep it."""
    path = try_to_load_from_cache(name, "config.json") if hub_id(name) else None
    return Path(path).parent.name if isinstance(path, str) else None


def hub_id(name: Any) -> str | None:
    """The name if it can be a repository on the Hub and is not a local folder, otherwise None."""
    return name if isinstance(name, str) and can_be_repo(name) and not Path(name).exists() else None


def can_be_repo(name: str) -> bool:
    """Whether a name can be that of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isprintable()  # the Hub's client admits a line break at the end


@dataclass(frozen=True)
class Recipe:
    """What a base model, with the heads that it has, can be rebuilt from.

    Attributes:
        made_for: The config and the structure of the model, to see whether they have changed.
        text: The JSON of the config; None if the model is not what its class makes of its config.
        why: The reason then.
    """

    made_for: Any = None
    text: str | None = None
    why: str = ""


def recipe_of(base: nn.Module, earlier: Recipe) -> Recipe:
    """The recipe of a base model. The model is built once, without memory, to see whether it comes out the same."""
    cls = type(base)
    if not isinstance(base, PreTrainedModel) or getattr(transformers, cls.__name__, None) is not cls:
        return Recipe(why=f"{cls.__name__} is not a class of transformers")
    fields = _cleaned(json.loads(base.config.to_json_string()))
    fields |= {"architectures": [cls.__name__], "dtype": str(base.dtype).removeprefix("torch.")}
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    ours = _structure(base)
    if earlier.made_for == (text, ours):
        return earlier
    try:
        with torch.device("meta"):
            theirs = _structure(_built(cls, _config_from(json.loads(text))))
    except Exception as error:  # a model's own code
        return Recipe((text, ours), why=f"{cls.__name__} cannot be made from its config ({type(error).__name__})")
    for name in dict.fromkeys((*ours, *theirs)):
        if ours.get(name) != theirs.get(name):
            here, there = (found[name][0] if name in found else "nothing" for found in (ours, theirs))
            what = f"{here}, and not {there}" if here != there else f"a {here} with other options"
            return Recipe((text, ours), why=f"its {name or 'model'} is {what} as in {cls.__name__}")
    return Recipe((text, ours), text)


def _structure(model: nn.Module) -> dict[str, tuple[str, str, dict[str, tuple[int, ...]]]]:
    """For each module of a base model, without adapters: its class, its options, the shapes of its parameters."""
    found = {}
    for name, module in modules_outside(model):
        if isinstance(module, ModulesToSaveWrapper):
            members = [(f"{name}.{n}" if n else name, m) for n, m in module.original_module.named_modules()]
        else:
            members = [(name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)]
        for full, own in members:
            shapes = {key: tuple(p.shape) for key, p in own.named_parameters(recurse=False)}
            found[full] = (type(own).__name__, own.extra_repr(), shapes)
    return found


def _cleaned(fields: Any) -> Any:
    """The JSON of a config without what a file may not choose."""
    if isinstance(fields, dict):
        kept = {key: value for key, value in fields.items() if key not in _NOT_FROM_A_FILE}
        return {key: value if key in ("id2label", "label2id") else _cleaned(value) for key, value in kept.items()}
    return [_cleaned(value) for value in fields] if isinstance(fields, list) else fields


def _config_from(fields: Any) -> PreTrainedConfig:
    """A config from its JSON."""
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"model_type={kind!r} is not known to transformers")
    config: PreTrainedConfig = transformers.CONFIG_MAPPING[kind].from_dict(_cleaned(fields))
    inner = getattr(getattr(config, "backbone_config", None), "model_type", None)
    if inner in _TIMM or kind in _TIMM:
        raise ValueError(f"a backbone of timm ({inner or kind}) is not supported, since timm may fetch its weights")
    return config


def _built(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a class, with a backbone of the class that belongs to the backbone's config.

    RF-DETR always makes its own variant of DINOv2, and is also used with a plain one.
    """
    model = cls(config)
    found = backbone_of(model)
    if found is not None:
        name, module = found
        own: Any = transformers.MODEL_FOR_BACKBONE_MAPPING.get(type(module.config), None)
        if own is not None and type(module) is not own:
            model.set_submodule(name, own(module.config))
    return model


def read_base_config(adapter: str, options: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The config of the base model that is saved beside an adapter; None if there is none.

    Args:
        adapter: A folder or repository.
        options: `subfolder`, `revision`, `token`.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = file_of(adapter, BASE_CONFIG, **options)
    if path is None:
        return None
    where = f"{BASE_CONFIG} of {adapter!r}"
    if not path.is_file() or path.stat().st_size > MAX_BASE_CONFIG:
        raise CheckpointError(
            f"{where} is not a file of at most {MAX_BASE_CONFIG:,} bytes; download the adapter again."
        )
    try:
        return _config_from(json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:  # a config can make transformers fail in any way
        raise CheckpointError(f"{where} is not valid: {_why(error)}. Download or save the adapter again.") from error


def source_for(
    config: SFAConfig, options: Mapping[str, Any], base: str | None, argument: str
) -> tuple[str, dict[str, Any]]:
    """Where the base model of a saved adapter is: a folder or repository, and its revision and token; see `load_base`.

    Raises:
        ValueError: If nothing names it.
    """
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"the adapter's config does not name its base model: give {argument} MODEL.")
    where = {key: options[key] for key in ("token",) if key in options}
    if not base and config.revision:
        where["revision"] = config.revision
    return name, where


def load_base(
    adapter: str, config: SFAConfig, options: Mapping[str, Any], base: str | None, argument: str
) -> tuple[nn.Module, list[str]]:
    """The base model of a saved adapter, without its adapter.

    Args:
        adapter: The adapter: a folder or repository.
        config: Its config.
        options: `subfolder`, `revision` and `token` of the adapter. The token is also used for the base.
        base: The base model, a folder or repository. None means the one in the config.
        argument: What the user calls `base`, for messages.

    Returns:
        The model, and the names of the tensors that are in no checkpoint of the base.

    Raises:
        CheckpointError: If a file of the adapter is damaged.
        ValueError: If the base is not named, or cannot be loaded.
    """
    name, where = source_for(config, options, base, argument)
    described = read_base_config(adapter, options)
    if described is None:
        return load_model(name, argument, where, (class_name_of(config),)), []
    with refusing(name, argument):
        own = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        cls = class_for(described.architectures or (), described)
        if cls is None:
            raise CheckpointError(
                f"{BASE_CONFIG} of {adapter!r} names no class of transformers for a {described.model_type}: "
                f"architectures={described.architectures!r}. Download or save the adapter again."
            )
        safe = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True, **where}
        if isinstance(own, type(described)):
            load: Any = cls.from_pretrained  # its return type does not know `output_loading_info`
            model, info = load(name, config=described, dtype=described.dtype, ignore_mismatched_sizes=True, **safe)
            return model, sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        model = _built(cls, described).eval()
        found = backbone_of(model)
        if found is not None and isinstance(own, type(found[1].config)):
            place, backbone = found
            load = type(backbone).from_pretrained
            loaded, info = load(name, config=backbone.config, **safe)
            model.set_submodule(place, loaded)
            model.config.backbone_config = loaded.config  # one object, as in any dense model
            model.to(described.dtype or torch.float32)
            fresh = {key for key in model.state_dict() if not key.startswith(f"{place}.")}
            return model, sorted(fresh | {f"{place}.{key}" for key in info["missing_keys"]})
    inside = f", and the backbone in it a {found[1].config.model_type}" if found else ""
    raise ValueError(
        f"{argument} {name!r} is a {own.model_type}, and the adapter is for a {described.model_type}{inside}; name "
        f"the base model that it was trained on."
    )


def load_model(name: str, argument: str, options: Mapping[str, Any], classes: Sequence[Any]) -> nn.Module:
    """A model in the first of `classes` that fits its config, or otherwise in the class that its config names.

    Args:
        name: A folder or repository.
        argument: What the user calls it, for messages.
        options: Arguments of `from_pretrained`.
        classes: Names of classes. A file may have anything there.

    Raises:
        ValueError: If it cannot be loaded.
    """
    where = {"trust_remote_code": False} | {key: options[key] for key in ("revision", "token") if key in options}
    with refusing(name, argument):
        config = transformers.AutoConfig.from_pretrained(name, **where)
        cls = class_for((*classes, *(config.architectures or ())), config)
        if cls is not None:
            safe: dict[str, Any] = {"use_safetensors": True, "attn_implementation": "eager"}
            model: nn.Module = cls.from_pretrained(name, **dict(options) | where | safe)
            return model
    raise ValueError(f"{argument} {name!r} has a class that transformers does not have; load it in Python.")


@contextmanager
def refusing(name: str, argument: str) -> Iterator[None]:
    """Turn whatever transformers raises for a model into a ValueError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a config can make transformers fail in any way
        why = _why(error)
        if "safetensors" in why:
            why += (
                " Only safetensors are read here, since a pickle can run code. If you trust the model, load it in "
                f"Python, save it with save_pretrained, and give {argument} that folder."
            )
        raise ValueError(f"{argument} {name!r} cannot be loaded: {why}") from error


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"


def class_name_of(config: SFAConfig) -> Any:
    """What a config says of the base model's class. A file may have anything there."""
    return (config.auto_mapping or {}).get("base_model_class")


def class_for(names: Sequence[Any], config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The first class that is named and that transformers has for such a config; None if there is none."""
    for name in names:
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            of = cls.config_class
            if of is not None and isinstance(config, of):
                return cls
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """What transformers logs of a load, such as tables of heads that are about to be loaded, is not printed."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()

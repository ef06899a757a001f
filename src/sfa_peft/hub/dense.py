"""`load_dense`: a dense model with its adapter, image processor and labels, from the adapter alone."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import transformers
from peft import PeftModel
from torch import nn

from ..checkpoint import CheckpointError
from ..checkpoint.fingerprint import BaseMismatchWarning, Fingerprint
from ..checkpoint.reader import file_of
from ..config import SFAConfig
from ..planning.base import base_parameters, head_modules, in_heads
from ..recorded import RecordedConfig
from ..tuner.model import tuner_of
from .base import BASE_CONFIG, load_base, quiet
from .card import PROCESSOR, notes_of, task_of


class Dense(NamedTuple):
    """A dense model that was loaded from its adapter. It unpacks: `model, processor, id2label = load_dense(...)`.

    Attributes:
        model (`PeftModel`): The base model with the adapter, in eval mode.
        processor (`BaseImageProcessor` or None): The image processor; None if none was saved with the adapter.
        id2label (`dict[int, str]`): The names of the classes; empty if the task has none.
    """

    model: PeftModel
    processor: Any
    id2label: dict[int, str]

    @property
    def task(self) -> str | None:
        """The name of the task on the Hub, such as `image-segmentation`; None if it is not known."""
        return task_of(self.model.get_base_model())


def load_dense(
    adapter: str,
    *,
    base: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    is_trainable: bool = False,
) -> Dense:
    """Load a dense model, its image processor and its labels from a saved SFA adapter alone.

    The adapter's files name the base model, and have its head and its config. The base may be a whole dense model, or
    the plain backbone that a fresh head was put on. Nothing that is loaded is run: classes are those of transformers,
    weights are safetensors.

    Args:
        adapter (`str`): A folder, or a repository on the Hub, that `save_pretrained` or `push_to_hub` wrote.
        base (`str`, *optional*, defaults to `None`):
            The base model, a folder or a repository. None means the one that the adapter names, at the commit that it
            was trained on.
        subfolder (`str`, *optional*, defaults to `None`): A subfolder, such as the name of an adapter.
        revision (`str`, *optional*, defaults to `None`): The revision of the adapter's repository.
        token (`str` or `bool`, *optional*, defaults to `None`): The token for the Hub. None uses the stored one.
        is_trainable (`bool`, defaults to `False`): Whether to go on training the adapter.

    Returns:
        The model in eval mode, on the CPU; the image processor, or None; and the names of the classes by their ids.

    Raises:
        CheckpointError: If the adapter is damaged, does not fit the base, or was trained on other base weights.
        ValueError: If there is no such adapter, it was saved without `base_config.json`, or its base model is not
            named or cannot be loaded.

    Example:

        >>> model, processor, id2label = sfa_peft.load_dense("me/street-sfa")
        >>> inputs = processor(image, return_tensors="pt")  # pixel_values (1, 3, height, width)
        >>> logits = model(**inputs).logits  # (1, classes, height / 4, width / 4) for UperNet on Swin
    """
    name = str(adapter)
    given = {"subfolder": subfolder, "revision": revision, "token": token}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    config = SFAConfig.from_pretrained(name, **options)
    if file_of(name, BASE_CONFIG, **options) is None:
        raise ValueError(
            f"{name!r} has no {BASE_CONFIG}: it was saved by sfa_peft 0.1, or its base model is not what its class in "
            f"transformers makes of its config (then its card says why). Make the base model, and load the adapter "
            f"with PeftModel.from_pretrained(base, {name!r})."
        )
    with quiet():
        model = load_with_base(name, config, options, base, "base=", is_trainable)
        processor = processor_of(name, options)
    labels = getattr(model.get_base_model().config, "id2label", None) or {}
    dense = Dense(model.eval(), processor, dict(labels))
    notes_of(tuner_of(model), "default").processor = processor
    return dense if dense.task != "depth-estimation" else dense._replace(id2label={})  # transformers makes some up


def load_with_base(
    adapter: str,
    config: SFAConfig,
    options: dict[str, Any],
    base: str | None,
    argument: str,
    is_trainable: bool = False,
) -> PeftModel:
    """A saved adapter on its base model; see `load_base`. Other base weights than those of the training are an error.

    Raises:
        CheckpointError: If the adapter is damaged, does not fit the base, or was trained on other base weights.
        ValueError: If the base is not named, or cannot be loaded.
    """
    model, missing = load_base(adapter, config, options, base, argument)
    _warn_of_random(model, missing, config)
    return on_base(model, adapter, options, is_trainable)


def on_base(base: nn.Module, adapter: str, options: dict[str, Any], is_trainable: bool = False) -> PeftModel:
    """A saved adapter on a base model. Base weights that are not those of the training are an error.

    Raises:
        CheckpointError: If the adapter is damaged, does not fit the base, or was trained on other base weights.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        try:
            return PeftModel.from_pretrained(base, adapter, is_trainable=is_trainable, **options)
        except BaseMismatchWarning as error:
            raise CheckpointError(str(error)) from error


def _warn_of_random(base: nn.Module, missing: list[str], config: SFAConfig) -> None:
    """Warn of parameters that neither the base's checkpoint nor the adapter has, and that no fingerprint covers."""
    heads, known = head_modules(base, config), set[str]()
    if isinstance(config, RecordedConfig) and config.base_fingerprint:
        roots = Fingerprint.from_dict(config.base_fingerprint).roots
        known = {name for name, _ in base_parameters(base, roots, config)}
    own = {name for name, _ in base.named_parameters()}  # a buffer, such as a loss's weights, is not drawn
    random = [name for name in missing if name in own and name not in known and not in_heads(name, heads)]
    if random:
        others = f" and {len(random) - 1} other parameters are" if len(random) > 1 else " is"
        warnings.warn(
            f"{random[0]!r}{others} neither in the base model nor in the adapter, with initial values. If the "
            f"predictions depend on them (they do not on a head that is used for training alone), name their module "
            f"in `modules_to_save` and train again.",
            stacklevel=4,
        )


def processor_of(adapter: str, options: dict[str, Any]) -> Any:
    """The image processor that is saved with an adapter; None if there is none.

    Raises:
        ValueError: If it cannot be loaded.
    """
    if file_of(adapter, PROCESSOR, **options) is None:
        return None
    try:
        return transformers.AutoImageProcessor.from_pretrained(adapter, trust_remote_code=False, **options)
    except Exception as error:  # a config can make transformers fail in any way
        raise ValueError(
            f"{PROCESSOR} of {adapter!r} cannot be loaded: {error}. Without it, load the model with "
            f"PeftModel.from_pretrained."
        ) from error

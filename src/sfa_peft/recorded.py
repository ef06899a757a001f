"""RecordedConfig: the config of an adapter that exists, in a model or in a file, and how it is read."""

from __future__ import annotations

import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import PeftType

from .checkpoint import CheckpointError
from .checkpoint.fingerprint import Fingerprint
from .checkpoint.names import MODULE, MODULE_PARALLEL
from .checkpoint.reader import LOAD, PICKLE, open_adapter, weights_of
from .checkpoint.seal import CONFIG, WEIGHTS
from .config import DEFAULT_SHARE, PATTERN_FIELDS, PLACES, SFAConfig, is_int
from .layers.granularity import NO_BLOCKS

FORMAT_VERSION = 1
MAX_CONFIG = 1 << 22  # bytes of an adapter_config.json


@dataclass(kw_only=True)
class RecordedConfig(SFAConfig):
    """The config of an adapter that exists: the fields of `SFAConfig`, and what was recorded of the adapter.

    `get_peft_model` makes it from the user's config, which stays as it is, and `save_pretrained` writes it.

    Args:
        ticket_sizes (`dict`):
            For each parameter, the number of its units in the ticket. It changes with the ticket.
        external_widths (`dict`):
            For each place, the width of the external adapter on each module. With both, an adapter can be sized before
            its weights are read.
        base_fingerprint (`dict`, *optional*, defaults to `None`):
            Identifies the base weights used in training.
        weights_digest (`str`, *optional*, defaults to `None`):
            In a file, the digest of the tensors that were saved with this config.
        format_version (`int`, defaults to 1):
            The version of the checkpoint format.

    Raises:
        ValueError: If a value is not valid. The message names the field, the value and what is allowed.
    """

    ticket_sizes: dict[str, int] = field(metadata={"help": "Parameter -> units in the ticket."})
    external_widths: dict[str, dict[str, int]] = field(metadata={"help": "Place -> module -> width."})
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Identifies the base weights used in training."}
    )
    weights_digest: str | None = field(default=None, metadata={"help": "In a file, the digest of the saved tensors."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the checkpoint format."})
    internal_block_size: InitVar[Any] = None  # not a field; files of 0.1 have it, and PEFT warns of unknown fields

    def __new__(cls, **fields: Any) -> Any:
        # PEFT makes every config with the registered class, also that of an adapter that does not exist yet.
        recorded = ("ticket_sizes", "external_widths")
        if all(fields.get(name) is None for name in recorded):
            others = {*recorded, "base_fingerprint", "weights_digest", "format_version", "internal_block_size"}
            return SFAConfig(**{name: value for name, value in fields.items() if name not in others})
        return super().__new__(cls)

    def __reduce__(self) -> Any:
        return object.__new__, (type(self),), vars(self)  # a copy has its fields already

    def __post_init__(self, internal_block_size: Any) -> None:
        # A CheckpointError, since transformers may be reading the adapter of 0.1 that has them.
        if self.internal_granularity == "block":
            raise CheckpointError(f"SFAConfig.internal_granularity='block' is not valid; {NO_BLOCKS}.")
        share: Any = self.external_share
        if share == "auto":  # files of 0.1 have it; the sizes are recorded
            self.external_share = DEFAULT_SHARE
        if self.external_conv is None:  # files of 0.1 have no such field
            self.external_conv = 0
        super().__post_init__()
        self._check_recorded()

    @classmethod
    def of(
        cls,
        config: SFAConfig,
        ticket_sizes: dict[str, int],
        external_widths: dict[str, dict[str, int]],
        base_fingerprint: dict[str, Any] | None,
        external_places: tuple[str, ...],
        external_conv: int,
    ) -> RecordedConfig:
        """The config of an adapter that was made from a user's config."""
        recorded: RecordedConfig = cls(
            **config.to_dict()
            | {
                "external_places": external_places,
                "external_conv": external_conv,
                "ticket_sizes": ticket_sizes,
                "external_widths": external_widths,
                "base_fingerprint": base_fingerprint,
                "weights_digest": None,
            }
        )
        return recorded

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of an `adapter_config.json`.

        Raises:
            CheckpointError: If it is not a JSON object, or not the config of an SFA adapter.
        """
        size = os.path.getsize(path_json_file)
        if size > MAX_CONFIG:
            raise CheckpointError(
                f"{str(path_json_file)!r} has {size:,} bytes, and no config is larger than {MAX_CONFIG:,}."
            )
        try:
            fields = super().from_json_file(path_json_file, **kwargs)
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{str(path_json_file)!r} is not a JSON file, or damaged: {error}") from error
        if not isinstance(fields, dict) or fields.get("peft_type") != PeftType("SFA"):
            raise CheckpointError(f"{str(path_json_file)!r} is not the config of an SFA adapter, or damaged.")
        return cls.without_patterns(fields)

    @staticmethod
    def without_patterns(fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a saved config, with names in place of regular expressions, which versions up to 0.1 saved.

        A saved adapter contains the names of its modules, so an expression in a file is not needed, and is never run.
        """
        sizes, widths = fields.get("ticket_sizes"), fields.get("external_widths")
        if not isinstance(sizes, dict) or not isinstance(widths, dict):
            return fields  # not of an adapter
        others = widths.get(MODULE, {})
        names = {
            "target_modules": sorted({name.rpartition(".")[0] for name in sizes}),
            "exclude_modules": None,
            "external_modules": sorted(others) if isinstance(others, dict) else [],
        }
        patterns = {name for name in PATTERN_FIELDS if fields.get(name) and isinstance(fields[name], str)}
        if "exclude_modules" in patterns and fields.get("target_modules") is None:
            patterns.add("target_modules")
        fields = fields | {name: names[name] for name in patterns}
        if fields.get("layers_to_transform") is not None and "target_modules" in patterns:
            fields |= {"layers_to_transform": None, "layers_pattern": None}
        return fields

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> SFAConfig:
        """Load the config of a saved adapter, and check the weights beside it, if there are any.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder, or a repository on the Hub.
            subfolder (`str`, *optional*, defaults to `None`): A subfolder of it.
            kwargs: `revision`, `token`, `cache_dir` and other arguments of `huggingface_hub.hf_hub_download`.

        Returns:
            The config; a plain `SFAConfig` if it was saved before it was used, without weights.

        Raises:
            CheckpointError: If the config or the weights are damaged, or do not belong together.
            ValueError: If there is no config.
        """
        load = LOAD.get()
        if load is not None:
            load.begin()
        name = str(pretrained_model_name_or_path)
        try:
            # PEFT's own: that of SFAConfig asks for this method.
            config: SFAConfig = super(SFAConfig, cls).from_pretrained(name, subfolder=subfolder, **kwargs)
        except CheckpointError:
            raise
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            if isinstance(error, ValueError) and error.__cause__ is not None:
                raise  # PEFT has not found the config
            raise CheckpointError(f"{CONFIG} of {name!r} is not valid: {error}") from error
        weights = weights_of(name, subfolder, **kwargs)
        if weights is not None:
            beside = config if isinstance(config, RecordedConfig) else None
            saved = open_adapter(beside, weights, load.key_mapping if load else {}, RecordedConfig)
            if load is not None:
                load.saved = saved
            return saved.config
        folder = Path(name, subfolder or "")
        if not folder.is_dir() or (folder / PICKLE).exists():
            raise CheckpointError(
                f"{name!r} has no {WEIGHTS}. SFA reads only this file, since a pickle can run code; save the adapter "
                f"with save_pretrained."
            )
        return config

    def _is_pattern(self, value: Any) -> bool:
        return True  # the expressions of a saved adapter are never run

    def _check_recorded(self) -> None:
        if self.format_version != FORMAT_VERSION:
            self._fail(
                "format_version",
                f"this version of sfa_peft reads version {FORMAT_VERSION}; install the version that wrote the file",
            )
        sizes: Any = self.ticket_sizes
        is_valid = isinstance(sizes, dict) and all(
            isinstance(name, str) and is_int(size) and size >= 0 for name, size in sizes.items()
        )
        self._check("ticket_sizes", is_valid, "it must map parameter names to ints >= 0; it is filled in at injection")
        widths: Any = self.external_widths
        is_valid = isinstance(widths, dict) and all(
            place in (*PLACES, MODULE, MODULE_PARALLEL)
            and isinstance(modules, dict)
            and all(isinstance(name, str) and is_int(width) and width >= 1 for name, width in modules.items())
            for place, modules in widths.items()
        )
        self._check("external_widths", is_valid, "it must map places to {module: width}; it is filled in at injection")
        digest: Any = self.weights_digest
        self._check("weights_digest", isinstance(digest, str | None), "it is filled in when saving")
        fingerprint: Any = self.base_fingerprint
        if fingerprint is not None:
            try:
                Fingerprint.from_dict(fingerprint)
            except ValueError as error:
                self._fail("base_fingerprint", f"it is filled in at injection ({error})")

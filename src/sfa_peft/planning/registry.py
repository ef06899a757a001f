"""The register of architectures: what a user, another package or the built-in table says about a class of blocks."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..config import PLACES

GROUP = "sfa_peft.architectures"  # the entry points of other packages
PATCHES, MAPS = "patches", "maps"  # values of `grid` that are no arguments


class ArchitectureWarning(UserWarning):
    """The architectures of another package could not be registered."""


@dataclass(frozen=True)
class PlainMLP:
    """An MLP ``fc2(activation(fc1(x)))`` that a config can make wider. All names are relative to the block.

    Args:
        field (`str`): The config field that decides the number of hidden units.
        is_ratio (`bool`):
            Whether the field is a multiple of the channels. Otherwise it is the number of hidden units.
        factor (`str`, *optional*, defaults to `None`):
            The parameter of the LayerScale between `fc2` and the place, of shape ``(channels,)``.
        fc1 (`str`, defaults to `"mlp.fc1"`): The first linear layer, from the channels to the hidden units.
        activation (`str`, defaults to `"mlp.activation_fn"`): The elementwise function of the hidden units.
        fc2 (`str`, defaults to `"mlp.fc2"`):
            The second linear layer, whose output is the place or is multiplied by `factor`.

    Raises:
        ValueError: If a name is not a module's name.
    """

    field: str
    is_ratio: bool
    factor: str | None = None
    fc1: str = "mlp.fc1"
    activation: str = "mlp.activation_fn"
    fc2: str = "mlp.fc2"

    def __post_init__(self) -> None:
        for name in ("field", "factor", "fc1", "activation", "fc2"):
            value = getattr(self, name)
            if not _is_name(value) and not (name == "factor" and value is None):
                raise ValueError(f"PlainMLP.{name}={value!r} is not valid; use a name such as 'mlp.fc1'.")
        if not isinstance(self.is_ratio, bool):
            raise ValueError(f"PlainMLP.is_ratio={self.is_ratio!r} is not valid; use True or False.")


@dataclass(frozen=True)
class Architecture:
    """What SFA does with one class of blocks. All names of modules are relative to the block.

    The place of an external adapter is a leaf, and the adapter acts on its output. Where a block scales (LayerScale)
    or normalizes the output of a sub-layer before the residual sum, name the scale or the norm, not the linear layer:
    it would damp or rescale what the adapter adds.

    Args:
        name (`str`): Its name in messages and in the table of architectures. Every name is registered once.
        block (`str`): The name of the block's class. Blocks of subclasses are found too.
        targets (`tuple[str, ...]`, defaults to `()`): The leaves that a ticket may choose from.
        places (`dict[str, str]`, defaults to `{}`):
            For `attention`, `mlp`, `mlp_parallel` and `block`, the leaf on whose output the external adapter acts.
        mlp_input (`str`, *optional*, defaults to `None`):
            The module whose input is the MLP's input. The place `mlp_parallel` needs it.
        block_input (`str`, *optional*, defaults to `None`):
            The module whose input is the residual: the block's output is its input plus the output of the leaf at the
            place `block`, which needs it. In most blocks it is the norm before the MLP.
        mlp (`PlainMLP`, *optional*, defaults to `None`):
            The MLP that `merge_and_unload` can fold external adapters at `mlp_parallel` into. With None they stay
            modules of the merged model.
        optional (`tuple[str, ...]`, defaults to `()`):
            More leaves that a ticket may choose from. Blocks that lack them are no error.
        has (`tuple[str, ...]`, defaults to `()`):
            What a block must have for this description to apply: modules other than `nn.Identity`, or parameters.
            It tells classes of one name apart. Of several descriptions that apply, the last registered one is used.
        inside (`tuple[str, ...]`, defaults to `()`):
            Names of classes: the description applies only to blocks inside a module of one of them. It keeps text
            towers and decoders out that are made of the same blocks.
        note (`str`, defaults to `""`): A remark for the table of architectures.
        grid (`str`, *optional*, defaults to `None`):
            What tells the height and width of the token grid, for `SFAConfig.external_conv`. The name of the argument
            of the block's forward that has them, such as `input_dimensions`; then the places of the MLP can have
            filters. Or `patches`: the grid is that of the patch embedding, the last convolution before the block
            without overlap and with as many channels, and any other tokens of the image come first. Or `maps`: the
            places have maps of shape ``(batch, height, width, channels)``. With None, they have no filters.

    Raises:
        ValueError: If a value is not valid. The message names the field, the value and what is allowed.

    Example:

        ```py
        >>> from sfa_peft import Architecture
        >>> architecture = Architecture(
        ...     name="mine",
        ...     block="MyBlock",
        ...     targets=("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
        ...     places={"attention": "attn.proj", "mlp": "mlp.fc2", "mlp_parallel": "mlp.fc2"},
        ...     mlp_input="mlp",
        ... )
        ```
    """

    name: str
    block: str
    targets: tuple[str, ...] = ()
    places: dict[str, str] = field(default_factory=dict)
    mlp_input: str | None = None
    block_input: str | None = None
    mlp: PlainMLP | None = None
    optional: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    note: str = ""
    grid: str | None = None

    def __post_init__(self) -> None:
        self._check("name", isinstance(self.name, str) and bool(self.name.strip()), "use a name")
        self._check("block", _is_name(self.block) and "." not in self.block, "use the name of the block's class")
        for name in ("targets", "optional", "has", "inside"):
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            are_names = isinstance(value, tuple) and all(map(_is_name, value))
            self._check(name, are_names and len(set(value)) == len(value), "use a tuple of names, each once")
        twice = set(self.targets) & set(self.optional)
        self._check("optional", not twice, f"{sorted(twice)} are in `targets` too")
        is_dict = isinstance(self.places, dict) and all(map(_is_name, self.places.values()))
        self._check(
            "places",
            is_dict and set(self.places) <= set(PLACES),
            f"use a dict from some of {PLACES} to names of leaves",
        )
        object.__setattr__(self, "places", dict(self.places))
        for name in ("mlp_input", "block_input"):
            value = getattr(self, name)
            self._check(name, value is None or _is_name(value), "use the name of a module, or None")
        self._check("mlp", isinstance(self.mlp, PlainMLP | None), "use a PlainMLP, or None")
        self._check("note", isinstance(self.note, str), "use a string")
        is_argument = isinstance(self.grid, str) and self.grid.isidentifier()
        self._check(
            "grid", self.grid is None or is_argument, f"use the name of an argument, {PATCHES!r}, {MAPS!r} or None"
        )
        is_parallel = "mlp_parallel" in self.places
        if is_parallel and self.mlp_input is None:
            self._fail("mlp_input", "the place `mlp_parallel` needs the module whose input is the MLP's input")
        if not is_parallel and (self.mlp_input or self.mlp):
            self._fail("places", "`mlp_input` and `mlp` belong to the place `mlp_parallel`, which is missing")
        if ("block" in self.places) != (self.block_input is not None):
            self._fail("block_input", "the place `block` needs it, and no other place")
        if not self.targets and not self.places:
            self._fail("targets", "there are no places either; name at least one target or place")

    def reads(self, place: str) -> str | None:
        """The module whose input an external adapter at a place reads, or None for the output of its leaf alone."""
        return {"mlp_parallel": self.mlp_input, "block": self.block_input}.get(place)

    def _fail(self, name: str, allowed: str) -> None:
        raise ValueError(f"Architecture.{name}={getattr(self, name)!r} of {self.name!r} is not valid; {allowed}.")

    def _check(self, name: str, is_valid: bool, allowed: str) -> None:
        if not is_valid:
            self._fail(name, allowed)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and all(part.isidentifier() or part.isdecimal() for part in value.split("."))


_registered: dict[str, Architecture] = {}
_by_block: dict[str, list[Architecture]] = {}
_plugins_lock = threading.RLock()
_plugins_loaded = False


def register_architecture(architecture: Architecture, *, replace: bool = False) -> None:
    """Make a class of blocks known, so that `SFAConfig` finds its targets and places by itself.

    An adapter does not contain the description: register it before the adapter is loaded as well. A package can
    register its own with entry points of the group ``sfa_peft.architectures``, each an `Architecture` or a list of
    them; they are loaded when SFA first looks for blocks.

    Args:
        architecture (`Architecture`): The description.
        replace (`bool`, defaults to `False`): Whether it may take the place of another one of the same name.

    Raises:
        TypeError: If it is not an `Architecture`.
        ValueError: If the name is registered already. Names that a model's blocks lack are an error when an adapter
            is added to that model.

    Example:

        ```py
        >>> from sfa_peft import Architecture, register_architecture
        >>> register_architecture(
        ...     Architecture(
        ...         name="torch's encoder",
        ...         block="TransformerEncoderLayer",
        ...         targets=("norm1", "norm2", "linear1", "linear2"),
        ...         places={"mlp": "linear2", "mlp_parallel": "linear2"},
        ...         mlp_input="linear1",
        ...     )
        ... )
        ```
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(f"register_architecture takes an Architecture, not {architecture!r}.")
    present = _registered.get(architecture.name)
    if present is not None and not replace:
        raise ValueError(
            f"an architecture {architecture.name!r} is registered already, for blocks of the class {present.block!r}: "
            f"choose another name, or use replace=True."
        )
    unregister_architecture(architecture.name)
    _registered[architecture.name] = architecture
    _by_block.setdefault(architecture.block, []).append(architecture)


def unregister_architecture(name: str) -> None:
    """Forget a registered architecture. A name that is not registered is no error."""
    present = _registered.pop(name, None)
    if present is not None:
        _by_block[present.block].remove(present)


def registered_architectures() -> tuple[Architecture, ...]:
    """All architectures in the order of their registration, with those of other packages."""
    _load_plugins()
    return tuple(_registered.values())


def descriptions_of(block: str) -> Iterator[Architecture]:
    """The descriptions of blocks of a class, the last registered one first."""
    _load_plugins()
    return reversed(_by_block.get(block, ()))


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded:
        return
    with _plugins_lock:
        if _plugins_loaded:
            return
        _plugins_loaded = True  # at first, since a package that is loaded may look for blocks
        for entry in entry_points(group=GROUP):
            _load_plugin(entry)


def _load_plugin(entry: EntryPoint) -> None:
    try:
        found = entry.load()
        for architecture in [found] if isinstance(found, Architecture) else list(found):
            register_architecture(architecture)
    except Exception as error:  # another package can fail in any way, and must not stop models that are not its own
        package = entry.dist.name if entry.dist is not None else entry.module
        warnings.warn(
            f"the package {package!r} has an entry point {entry.name!r} in the group {GROUP!r} that gives no "
            f"architectures ({type(error).__name__}: {error}). The blocks that it describes are not known; update the "
            f"package, or uninstall it.",
            ArchitectureWarning,
            stacklevel=2,
        )

"""The names of an adapter's tensors in a file."""

from collections.abc import Collection

PREFIX = "base_model.model."  # PEFT puts it before every name in a file
ADAPTER = ".sfa_"  # between the module's name and the kind of adapter
INTERNAL = ".sfa_internal."
KINDS = (INTERNAL, ".sfa_external.", ".sfa_parallel.", ".sfa_block.")
POSITIONS = "_positions"

# The places of external adapters that the user has named: on a module's output, and from another module's input to it.
MODULE, MODULE_PARALLEL = "module", "module_parallel"


def external_kind(place: str) -> str:
    """The kind of the external adapters at a place, which decides what they read: see `SFALayer`."""
    if place == "block":
        return "sfa_block"
    return "sfa_parallel" if place in ("mlp_parallel", MODULE_PARALLEL) else "sfa_external"


def is_adapter_key(key: str) -> bool:
    """Whether a tensor of a checkpoint belongs to an SFA layer, not to a head."""
    return ADAPTER in key and any(kind in key for kind in KINDS)


def is_in_endings(key: str, endings: Collection[str]) -> bool:
    """Whether a tensor of a checkpoint is in a module whose name ends with one of `endings`, as in PEFT."""
    path = key.removeprefix(PREFIX).split(".")
    ends = tuple(endings)
    return any(".".join(path[:depth]).endswith(ends) for depth in range(1, len(path)))


def is_positions_key(key: str) -> bool:
    return INTERNAL in key and key.endswith(POSITIONS)

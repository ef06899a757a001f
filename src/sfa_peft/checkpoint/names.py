"""The names of an adapter's tensors in a file."""

PREFIX = "base_model.model."  # PEFT puts it before every name in a file
ADAPTER = ".sfa_"  # between the module's name and the kind of adapter
INTERNAL = ".sfa_internal."
POSITIONS = "_positions"


def is_adapter_key(key: str) -> bool:
    """Whether a tensor of a checkpoint belongs to an SFA layer, not to a head."""
    return any(f"{ADAPTER}{kind}." in key for kind in ("internal", "external", "parallel"))


def is_positions_key(key: str) -> bool:
    return INTERNAL in key and key.endswith(POSITIONS)

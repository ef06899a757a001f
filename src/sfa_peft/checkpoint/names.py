"""The names of an adapter's tensors in a file."""

PREFIX = "base_model.model."  # of names in a file that PEFT writes
ADAPTER = ".sfa_"  # in front of the kind of adapter that a tensor is of
INTERNAL = ".sfa_internal."
POSITIONS = "_positions"


def is_adapter_key(key: str) -> bool:
    """Whether a tensor of a checkpoint is SFA's own, not a head's."""
    return any(f"{ADAPTER}{kind}." in key for kind in ("internal", "external", "parallel"))


def is_positions_key(key: str) -> bool:
    return INTERNAL in key and key.endswith(POSITIONS)

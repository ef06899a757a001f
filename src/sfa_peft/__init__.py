"""Selective Feature Adapters (SFA) for Hugging Face PEFT. Importing this package registers the method with PEFT."""

from .compat.guard import check_libraries

check_libraries()

from .compat.registration import add_peft_type, register  # noqa: E402

add_peft_type()

from .checkpoint import CheckpointError  # noqa: E402
from .checkpoint.fingerprint import BaseMismatchWarning  # noqa: E402
from .compat import hotswap, peft_model, transformers  # noqa: E402, F401
from .compat.patching import apply_patches  # noqa: E402
from .config import SFAConfig  # noqa: E402
from .hub.card import describe_adapter  # noqa: E402
from .hub.dense import Dense, load_dense  # noqa: E402
from .layers.adapted import SFALayer  # noqa: E402
from .planning.registry import Architecture, ArchitectureWarning, PlainMLP, register_architecture  # noqa: E402
from .recorded import RecordedConfig  # noqa: E402
from .search import (  # noqa: E402
    Extraction,
    TicketSearchError,
    extract_adapter,
    install_ticket,
    search_ticket,
    ticket_of,
)
from .ticket import Evidence, Quotas, Ticket, TicketReport, criterion  # noqa: E402
from .tuner.model import SFAModel  # noqa: E402
from .tuner.optimizers import parameter_groups  # noqa: E402
from .tuner.trunk import shared_trunk  # noqa: E402

apply_patches()
register(RecordedConfig, SFAModel)

__version__ = "0.2.0.dev0"

__all__ = [
    "SFAConfig",
    "RecordedConfig",
    "SFAModel",
    "SFALayer",
    "search_ticket",
    "install_ticket",
    "ticket_of",
    "extract_adapter",
    "parameter_groups",
    "shared_trunk",
    "describe_adapter",
    "load_dense",
    "Dense",
    "criterion",
    "register_architecture",
    "Architecture",
    "PlainMLP",
    "Evidence",
    "Extraction",
    "Quotas",
    "Ticket",
    "TicketReport",
    "TicketSearchError",
    "CheckpointError",
    "BaseMismatchWarning",
    "ArchitectureWarning",
]

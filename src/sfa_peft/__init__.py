"""Selective Feature Adapters (SFA) for Hugging Face PEFT. Importing this package registers the method with PEFT."""

from .registration import add_peft_type, register

add_peft_type()

from . import hotswap, integration  # noqa: E402, F401
from .checkpoint import CheckpointError  # noqa: E402
from .checkpoint.fingerprint import BaseMismatchWarning  # noqa: E402
from .config import SFAConfig  # noqa: E402
from .hub import describe_adapter  # noqa: E402
from .layer import SFALayer  # noqa: E402
from .model import SFAModel  # noqa: E402
from .ticket import (  # noqa: E402
    Evidence,
    Quotas,
    Ticket,
    TicketReport,
    TicketSearchError,
    criterion,
    install_ticket,
    search_ticket,
    ticket_of,
)

register(SFAConfig, SFAModel)

__version__ = "0.1.0"

__all__ = [
    "SFAConfig",
    "SFAModel",
    "SFALayer",
    "search_ticket",
    "install_ticket",
    "ticket_of",
    "describe_adapter",
    "criterion",
    "Evidence",
    "Quotas",
    "Ticket",
    "TicketReport",
    "TicketSearchError",
    "CheckpointError",
    "BaseMismatchWarning",
]

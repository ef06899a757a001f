"""Selective Feature Adapters (SFA) for Hugging Face PEFT. Importing this package registers the method with PEFT."""

from .registration import add_peft_type, register

add_peft_type()

from .checkpoint import CheckpointError  # noqa: E402
from .config import SFAConfig  # noqa: E402
from .layer import SFALayer  # noqa: E402
from .model import SFAModel  # noqa: E402
from .ticket import TicketReport, TicketSearchError, search_ticket  # noqa: E402

register(SFAConfig, SFAModel)

__version__ = "0.1.0"

__all__ = [
    "SFAConfig",
    "SFAModel",
    "SFALayer",
    "search_ticket",
    "TicketReport",
    "TicketSearchError",
    "CheckpointError",
]

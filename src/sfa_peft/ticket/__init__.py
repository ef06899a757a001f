"""The ticket: which positions of the frozen weights the internal adapters may change, and how they are found."""

from .criteria import Evidence, criterion
from .install import install_ticket, ticket_of
from .quotas import Quotas
from .report import TicketReport
from .search import search_ticket
from .steps import TicketSearchError
from .ticket import Ticket

__all__ = [
    "Evidence",
    "Quotas",
    "Ticket",
    "TicketReport",
    "TicketSearchError",
    "criterion",
    "install_ticket",
    "search_ticket",
    "ticket_of",
]

"""The ticket: which positions of the frozen weights the internal adapters may change, and how they are found."""

from .report import TicketReport
from .search import TicketSearchError, search_ticket

__all__ = ["TicketReport", "TicketSearchError", "search_ticket"]

"""The ticket search: trains the candidates of an adapter, chooses its ticket and installs it."""

from .extraction import Extraction, extract_adapter
from .install import install_ticket, ticket_of
from .search import search_ticket
from .steps import TicketSearchError

__all__ = ["Extraction", "TicketSearchError", "extract_adapter", "install_ticket", "search_ticket", "ticket_of"]

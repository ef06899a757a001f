"""The search: trains the candidates of an adapter, and gives it the ticket that this finds."""

from .install import install_ticket, ticket_of
from .search import search_ticket
from .steps import TicketSearchError

__all__ = ["TicketSearchError", "install_ticket", "search_ticket", "ticket_of"]

"""The ticket: the positions of the frozen weights that internal adapters may change, and how they are chosen."""

from .criteria import Evidence, criterion
from .quotas import Quotas
from .report import TicketReport
from .ticket import Ticket

__all__ = ["Evidence", "Quotas", "Ticket", "TicketReport", "criterion"]

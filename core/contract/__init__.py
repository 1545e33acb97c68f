"""The objects that router, dispatcher and experts hand to each other, and the tape that remembers them.

Shape legend, used as suffixes of local names and never of parameters:

    B batch            S sequence            T tokens (B*S, flattened)     G groups
    D model dim        F expert hidden dim   E experts                     K experts per token
    N routed pairs     R rows on the local experts                         C capacity
    P slots per expert

A *routed pair* is one (token, expert) choice. A pair that is not computed (its expert was full, its token is padding,
its second expert was left out) keeps its row with the expert id ``E``: it sorts last, past the last offset.
"""

from .choices import Choices
from .evidence import Evidence
from .groups import TokenGroups
from .routing import Decision, DenseRouting, Loads, MergeRouting, Routing, RoutingContext, SlotRouting
from .rows import RowPlan, Rows, SlotPlan
from .spans import span
from .tape import Entry, Tape, device_of_ranks, record, several_ranks, sum_over_ranks, unwrapped_modules

__all__ = [
    "Choices",
    "DenseRouting",
    "Entry",
    "Evidence",
    "MergeRouting",
    "Routing",
    "RoutingContext",
    "Rows",
    "SlotRouting",
    "Tape",
    "record",
]

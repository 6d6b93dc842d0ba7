"""Where a graph can be cut: the boundary before a node, and the values that cross it."""

from torch import fx

from .nodes import STAGE, computations, node_named, positions
from .operators import is_plain

__all__ = ["boundary_position", "crossing_values", "first_of_stage"]


def boundary_position(gm: fx.GraphModule, start: str) -> int:
    """Return the position of the boundary just before the node named ``start``."""
    return positions(gm.graph)[node_named(gm, start)]


def crossing_values(gm: fx.GraphModule, start: str) -> list[fx.Node]:
    """Return the values computed before the node named ``start`` and used at or after it.

    Inputs and fetched attributes are no computed values; sizes and other plain values carry no
    gradient. Skip edges over the boundary are included: they are uses like any other.
    """
    order = positions(gm.graph)
    boundary = order[node_named(gm, start)]
    return [
        node
        for node in computations(gm.graph)
        if order[node] < boundary
        and any(order[user] >= boundary for user in node.users)
        and not is_plain(node)
    ]


def first_of_stage(gm: fx.GraphModule, stage: int) -> fx.Node:
    """Return the first node that is tagged to lie in ``stage``."""
    found: fx.Node = next(node for node in gm.graph.nodes if node.meta[STAGE] == stage)
    return found

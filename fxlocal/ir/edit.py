"""The few ways in which rewrites change a graph."""

from typing import Any

from torch import fx

from .nodes import Origin, Target

__all__ = ["insert_after", "insert_before", "replace_later_uses"]


def insert_before(
    node: fx.Node, op: str, target: Target, args: tuple[Any, ...], origin: Origin, name: str = ""
) -> fx.Node:
    """Insert a node just before ``node``, stamped with ``origin``, by ``name`` if given."""
    with node.graph.inserting_before(node):
        new = node.graph.create_node(op, target, args, name=name or None)
    new.meta["fxlocal"] = origin
    return new


def insert_after(
    node: fx.Node, op: str, target: Target, args: tuple[Any, ...], origin: Origin, name: str = ""
) -> fx.Node:
    """Insert a node just after ``node``, stamped with ``origin``, by ``name`` if given."""
    return insert_before(node.next, op, target, args, origin, name)


def replace_later_uses(old: fx.Node, new: fx.Node, order: dict[fx.Node, int], start: int) -> None:
    """Let every user of ``old`` at position ``start`` or later use ``new`` instead."""
    for user in list(old.users):
        if user is not new and order.get(user, -1) >= start:
            user.replace_input_with(old, new)

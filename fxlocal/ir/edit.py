"""The few ways in which rewrites change a graph."""

from collections.abc import Callable
from typing import Any

from torch import fx

from .nodes import STAGE, Origin, Target
from .operators import is_container

__all__ = ["insert_after", "insert_before", "insert_each", "insert_in_stage", "replace_later_uses"]


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


def insert_in_stage(
    before: fx.Node,
    stage: int,
    op: str,
    target: Target,
    args: tuple[Any, ...],
    name: str = "",
    *,
    pass_name: str,
) -> fx.Node:
    """Do as `insert_before`; the new node lies in ``stage``, for which it is stamped."""
    new = insert_before(before, op, target, args, Origin(pass_name, f"stage {stage}"), name)
    new.meta[STAGE] = stage
    return new


def insert_each(
    gm: fx.GraphModule,
    before: fx.Node,
    function: tuple[str, Callable[..., Any]],
    value: fx.Node,
    origin: Origin,
    name: str = "",
) -> fx.Node:
    """Insert what makes another of each tensor in ``value``, which may be a container of them.

    ``function`` is the method of one tensor, and the function of a container.
    """
    method, function_of_all = function
    if is_container(gm, value):
        new = insert_before(before, "call_function", function_of_all, (value,), origin, name)
    else:
        new = insert_before(before, "call_method", method, (value,), origin, name)
    if "val" in value.meta:
        new.meta["val"] = value.meta["val"]
    return new


def replace_later_uses(old: fx.Node, new: fx.Node) -> None:
    """Let every user of ``old`` behind ``new`` use ``new`` instead."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user > new)

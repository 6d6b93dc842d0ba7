"""Stop back-propagation at a boundary: detach every value that crosses it, skip edges included.

    %relu = call_module relu(%add)                   %relu = call_module relu(%add)
    %conv = call_module conv(%relu)            ->    %detach = call_method detach(%relu)
    %sum = call_function add(%conv, %relu)           %conv = call_module conv(%detach)
                                                     %sum = call_function add(%conv, %detach)

A value that may be a container of tensors is cut by `fxlocal.ops.values.detach_all`; sizes and
other plain values pass. Inputs of the model are not cut: no parameter lies behind them.
Forward-exact. Cost: none (a view). Refuses a parameter used on both sides of the boundary.
"""

from torch import fx

from fxlocal.errors import PlanError
from fxlocal.ir.boundary import boundary_position, crossing_values
from fxlocal.ir.edit import insert_before, replace_later_uses
from fxlocal.ir.nodes import Origin, node_named, parameter_uses, positions
from fxlocal.ir.operators import is_container
from fxlocal.ops.values import detach_all

__all__ = ["check_cuts", "insert_cuts"]


def insert_cuts(gm: fx.GraphModule, *, start: str, layer: str) -> None:
    """Detach every value computed before the node named ``start`` and used at or after it.

    Args:
        gm: the graph, edited in place.
        start: name of the first node after the boundary.
        layer: path of the transition layer, for the stamps.

    Raises:
        PlanError: if there is no such node, or a parameter is used on both sides.
    """
    check_cuts(gm, start=start)
    crossing = crossing_values(gm, start)
    order = positions(gm.graph)
    first = node_named(gm, start)
    for value in crossing:
        origin = Origin("insert_cuts", layer)
        if is_container(gm, value):
            cut = insert_before(first, "call_function", detach_all, (value,), origin)
        else:
            cut = insert_before(first, "call_method", "detach", (value,), origin)
        replace_later_uses(value, cut, order, order[first])


def check_cuts(gm: fx.GraphModule, *, start: str) -> None:
    """Raise the PlanError of `insert_cuts`, if there is one; nothing is edited."""
    boundary, order = boundary_position(gm, start), positions(gm.graph)
    before: dict[int, str] = {}
    for node, name, parameter in parameter_uses(gm):  # in execution order
        if order[node] < boundary:
            before.setdefault(id(parameter), name)
        elif id(parameter) in before:
            raise PlanError(
                f"cannot cut before {start!r}: the parameter {before[id(parameter)]!r} is used "
                f"before it and, as {name!r}, after it. Tied weights must lie on one side: choose "
                "another boundary"
            )

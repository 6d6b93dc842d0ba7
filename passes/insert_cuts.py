"""Stop back-propagation at a boundary: detach every value that crosses it, skip edges included.

    %relu = call_module relu(%add)                   %relu = call_module relu(%add)
    %conv = call_module conv(%relu)            ->    %detach = call_method detach(%relu)
    %sum = call_function add(%conv, %relu)           %conv = call_module conv(%detach)
                                                     %sum = call_function add(%conv, %detach)

A value that may be a container of tensors is cut by `fxlocal.ops.values.detach_all`; sizes and
other plain values pass. Inputs of the model are not cut: no parameter lies behind them.
Forward-exact. Cost: none (a view). Refuses a parameter used on both sides of the boundary.
"""

from collections.abc import Sequence

from torch import fx

from fxlocal.errors import PlanError
from fxlocal.ir.boundary import crossing_values, first_of_stage, nodes_before
from fxlocal.ir.edit import insert_each, replace_later_uses
from fxlocal.ir.nodes import STAGE, Origin, node_named, parameter_uses
from fxlocal.ops.values import detach_all

__all__ = ["check_cuts", "insert_cuts"]


def insert_cuts(gm: fx.GraphModule, *, start: str | Sequence[int], layer: str = "") -> None:
    """Detach every value computed before a boundary and used behind it.

    Args:
        gm: the graph, edited in place.
        start: name of the first node behind the boundary; or the indices of stages, each of which
            begins behind one. Stages may share weights, and inputs of the model are cut between
            them too: the backward of one would free what they were computed from.
        layer: path of the transition layer, for the stamps.

    Raises:
        PlanError: if there is no such node, or a parameter is used on both sides.
    """
    if isinstance(start, str):
        check_cuts(gm, start=start)
        for value in crossing_values(gm, start):
            _cut(gm, value, node_named(gm, start), layer)
        return
    done: set[fx.Node] = set()  # a value that is cut once goes by its cut from there on
    for stage in start:
        first = first_of_stage(gm, stage)
        for value in _crossing_stages(gm, first):
            if value not in done:
                cut = _cut(gm, value, first, f"stage {stage}", f"cut_{value.name}")
                cut.meta[STAGE] = stage - 1
                done.add(cut)


def _cut(gm: fx.GraphModule, value: fx.Node, first: fx.Node, layer: str, name: str = "") -> fx.Node:
    origin = Origin("insert_cuts", layer)
    cut = insert_each(gm, first, ("detach", detach_all), value, origin, name)
    replace_later_uses(value, cut)
    return cut


def _crossing_stages(gm: fx.GraphModule, first: fx.Node) -> list[fx.Node]:
    """Return the inputs and values that cross into the stage of ``first``."""
    before = nodes_before(gm, first.name)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and "fxlocal" not in n.meta]
    crossing = [n for n in inputs if not before.issuperset(n.users)]
    return crossing + crossing_values(gm, first.name)


def check_cuts(gm: fx.GraphModule, *, start: str, legal: str = "") -> None:
    """Raise the PlanError of `insert_cuts`, if there is one; nothing is edited.

    Args:
        gm: the graph.
        start: name of the first node behind the boundary.
        legal: the nearest boundaries that part no weight, for the message.
    """
    before, names = nodes_before(gm, start), dict[int, str]()
    for node, name, parameter in parameter_uses(gm):  # in execution order
        if node in before:
            names.setdefault(id(parameter), name)
        elif id(parameter) in names:
            raise PlanError(
                f"cannot cut before {start!r}: the parameter {names[id(parameter)]!r} is used "
                f"before it and, as {name!r}, after it. Tied weights must lie on one side: choose "
                f"another boundary{f'. Nearest legal ones: {legal}' if legal else ''}"
            )

"""Stop back-propagation at a boundary: detach every value that crosses it, skip edges included.

    %relu = call_module relu(%add)                   %relu = call_module relu(%add)
    %conv = call_module conv(%relu)            ->    %detach = call_method detach(%relu)
    %sum = call_function add(%conv, %relu)           %conv = call_module conv(%detach)
                                                     %sum = call_function add(%conv, %detach)

A value that may be a container of tensors is cut by `fxlocal.ops.values.detach_all`; sizes and
other plain values pass. Inputs of the model are not cut: no parameter lies behind them.
Forward-exact. Cost: none (a view). Refuses a parameter used on both sides of the boundary, and a
change in place behind it that reaches a value by way of another that shares its memory: of the two
cuts, autograd would know that only one was changed.
"""

from collections.abc import Sequence
from itertools import dropwhile

from torch import fx

from fxlocal.errors import PlanError
from fxlocal.ir.boundary import crossing_values, first_of_stage, nodes_before
from fxlocal.ir.edit import insert_each, replace_later_uses
from fxlocal.ir.nodes import STAGE, Origin, node_named, parameter_uses
from fxlocal.ir.operators import overwrites_shared
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
        PlanError: if there is no such node, a parameter is used on both sides, or values that
            share memory cross and are changed in place.
    """
    if isinstance(start, str):
        check_cuts(gm, start=start)
        for value in crossing_values(gm, start):
            _cut(gm, value, node_named(gm, start), layer)
        return
    done: set[fx.Node] = set()  # a value that is cut once goes by its cut from there on
    for stage in start:
        first = first_of_stage(gm, stage)
        crossing = _crossing(gm, first.name)
        _refuse_changed_twins(gm, first, crossing)
        for value in crossing:
            if value not in done:
                cut = _cut(gm, value, first, f"stage {stage}", f"cut_{value.name}")
                cut.meta[STAGE] = stage - 1
                done.add(cut)


def _cut(gm: fx.GraphModule, value: fx.Node, first: fx.Node, layer: str, name: str = "") -> fx.Node:
    origin = Origin("insert_cuts", layer)
    cut = insert_each(gm, first, ("detach", detach_all), value, origin, name)
    replace_later_uses(value, cut)
    return cut


def _refuse_changed_twins(gm: fx.GraphModule, first: fx.Node, crossing: Sequence[fx.Node]) -> None:
    """Refuse a change in place, behind a boundary, of two values that cross it at once."""
    if len(crossing) < 2:
        return
    behind = dropwhile(lambda node: node is not first, gm.graph.nodes)
    if found := overwrites_shared(gm, behind, crossing):
        node, (one, other, *_) = found
        raise PlanError(
            f"cannot cut before {first.name!r}: {one.name!r} and {other.name!r} share memory and "
            f"cross there, and {node.name!r} changes both in place behind it, which the gradient "
            "of one of them would not know. Make that operation one that is not in place, or "
            "choose another boundary"
        )


def _crossing(gm: fx.GraphModule, start: str) -> list[fx.Node]:
    """Return the inputs and values that cross the boundary before ``start``."""
    before = nodes_before(gm, start)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and "fxlocal" not in n.meta]
    crossing = [n for n in inputs if not before.issuperset(n.users)]
    return crossing + crossing_values(gm, start)


def check_cuts(gm: fx.GraphModule, *, start: str, legal: str = "") -> None:
    """Raise the PlanError of `insert_cuts`, if there is one; nothing is edited.

    Args:
        gm: the graph.
        start: name of the first node behind the boundary.
        legal: the nearest boundaries that part no weight, for the message.
    """
    before, names = nodes_before(gm, start), dict[int, str]()
    for node, name, parameter in parameter_uses(gm):  # in execution order
        if not parameter.requires_grad:  # no gradient to part: it moves on neither side
            continue
        if node in before:
            names.setdefault(id(parameter), name)
        elif first := names.get(id(parameter)):
            other = f", as {name!r}," if name != first else ""
            raise PlanError(
                f"cannot cut before {start!r}: the parameter {first!r} is used "
                f"before it and{other} after it. Tied weights must lie on one side or be "
                "frozen: call its requires_grad_(False), untie them, or choose another boundary"
                f"{f'. Nearest legal ones: {legal}' if legal else ''}"
            )
    _refuse_changed_twins(gm, node_named(gm, start), _crossing(gm, start))

"""Find the skip edges: where a value bypasses layers and is merged again.

A merge node (add, cat, mul) has operands a and b. Where a is an ancestor of b and parameters lie
between, the edge from a to the merge is a skip edge: *residual* if merged by add, *concat* by
cat, *gate* by mul (squeeze-and-excitation). An operand that only selects from an ancestor (chunk,
crop, pad, dropout) counts as that ancestor. Two operands of an add that share an ancestor, with
neither an ancestor of the other, are a residual with a *projection* shortcut.

    %relu -> conv -> bn -> %add(bn, relu)      SkipEdge("relu", "add", "residual", False)

An edge is *long-range* if its span contains a fall and a rise in resolution (U-Net), or is made of
blocks: a concat's, if it contains another concat edge; else, if plain residuals bypass more than
half of what has parameters in it. A small residual in a branch (an adapter, a low-rank update with
a shortcut of its own) is no block.

So may be the operand of a concat that shares an ancestor with the deepest operand and passes
layers of its own, or a long-range gate: it is an edge with a projection if the other way is longer
and the resolution rises on it. Else the operands are parallel branches, which bypass nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import networkx as nx
from torch import fx, nn

from fxlocal.facts import SkipEdge
from fxlocal.ir.boundary import data_flow
from fxlocal.ir.nodes import computations, module_of, parameter_uses
from fxlocal.ir.operators import (
    CONCATS,
    DROPOUT_MODULES,
    DROPOUTS,
    PRODUCTS,
    SELECTIONS,
    SUMS,
    is_plain,
    operator_name,
    resolution_change,
)

__all__ = ["find_skips"]

Kind = Literal["residual", "concat", "gate"]

_Found: TypeAlias = tuple[SkipEdge, set[fx.Node]]  # with the nodes of its span

_KINDS: dict[Kind, frozenset[str]] = {"residual": SUMS, "concat": CONCATS, "gate": PRODUCTS}


def find_skips(gm: fx.GraphModule) -> tuple[SkipEdge, ...]:
    """Return the skip edges of ``gm``, ordered by merge node; see the module's docstring."""
    paths, found = _Paths(gm), _Edges(gm)
    for merge in computations(gm.graph):
        name = operator_name(merge)
        kind = next((kind for kind, names in _KINDS.items() if name in names), None)
        if kind is not None:
            operands = paths.into(merge)
            if kind == "concat":
                operands = found.take_gated(merge, operands, paths)
            found.add(_skips_into(merge, operands, kind, paths), paths)
            if kind == "concat":
                found.add(_projected(merge, operands, found.operands(merge), paths), paths)
    return tuple(edge for edge, _ in found.all)


class _Paths:
    """The paths that lead to a value, searched no further back than a question goes.

    So each costs its span alone. In a residual network of 20,000 nodes, `between` takes 0.05 s for
    all 5,000 sums and `shared` 0.1 s. For 100 of them, `networkx.ancestors` and
    `networkx.descendants` take 2.6 s and `networkx.lowest_common_ancestor` 4.8 s: they go on to the
    ends of the graph.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.flow = gm, data_flow(gm)
        self.order = {node: i for i, node in enumerate(self.flow) if not is_plain(node)}
        uses, self.depth = list(parameter_uses(gm)), dict[fx.Node, int]()
        self.learned = _learned(gm, self.flow, {node for node, _, _ in uses})
        narrow = {node for node, _, p in uses if p.ndim < 2}  # norms are no layers
        wide = {node for node, _, p in uses if p.ndim > 1}
        layers = self.learned - (narrow - wide)
        for node in self.order:
            deepest = max((self.depth[value] for value in self.into(node)), default=0)
            self.depth[node] = deepest + (node in layers)

    def into(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that ``node`` takes."""
        return [value for value in node.all_input_nodes if value in self.order]

    def since(self, first: int, last: fx.Node) -> set[fx.Node]:
        """Return ``last`` and what it depends on, from position ``first`` on."""

        def earlier(node: fx.Node) -> Iterator[fx.Node]:
            return (value for value in self.flow.pred[node] if self.order.get(value, -1) >= first)

        return {last, *(value for _, value in nx.generic_bfs_edges(self.flow, last, earlier))}

    def between(self, source: fx.Node, last: fx.Node) -> set[fx.Node]:
        """Return what lies on the ways from ``source`` to ``last``, and the latter, if any does."""
        found = self.since(self.order[source], last)
        if source not in found:
            return set()

        def later(node: fx.Node) -> Iterator[fx.Node]:
            return (user for user in self.flow.succ[node] if user in found)

        return {user for _, user in nx.generic_bfs_edges(self.flow, source, later)}

    def bypasses(self, span: set[fx.Node]) -> bool:
        """Tell whether a parameter is used in ``span``."""
        return not self.learned.isdisjoint(span)

    def shared(self, a: fx.Node, b: fx.Node) -> fx.Node | None:
        """Return the last value in execution order that both ``a`` and ``b`` depend on."""
        first, step = min(self.order[a], self.order[b]), 1
        while first >= 0:
            if common := self.since(first, a) & self.since(first, b):
                return max(common, key=self.order.__getitem__)
            first, step = max(first - step, -1 if first == 0 else 0), 2 * step
        return None


class _Edges:
    """The edges that are found so far, and which of them are long-range."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.all: list[_Found] = []
        self._into: dict[str, list[_Found]] = {}

    def add(self, edges: Iterable[_Found], paths: _Paths) -> None:
        """Note edges into one merge node, but for projections of a concat that are not long."""
        for edge, span in list(edges):
            if self._is_long_range(edge, span, paths):
                edge = replace(edge, long_range=True)
            if edge.long_range or not (edge.kind == "concat" and edge.projection):
                self.all.append((edge, span))
                self._into.setdefault(edge.target, []).append((edge, span))

    def operands(self, merge: fx.Node) -> set[str]:
        """Return the names of the operands by which edges are known to arrive at ``merge``."""
        return {edge.operand for edge, _ in self._into.get(merge.name, ())}

    def take_gated(
        self, merge: fx.Node, operands: Sequence[fx.Node], paths: _Paths
    ) -> list[fx.Node]:
        """Note the edges of operands that a long-range gate let pass; return the others."""
        gates = {
            operand: edge.source
            for operand in operands
            for edge, _ in self._into.get(operand.name, ())
            if edge.kind == "gate" and edge.long_range
        }
        others = [operand for operand in operands if operand not in gates]
        if not gates or not others:
            return list(operands)
        named = {node.name: node for node in paths.order}
        for operand, source in gates.items():
            span = paths.between(named[source], max(others, key=paths.depth.__getitem__))
            if paths.bypasses(span):
                edge = SkipEdge(source, merge.name, "concat", False, operand.name, True)
                self.add([(edge, span)], paths)
        return others

    def _is_long_range(self, edge: SkipEdge, span: set[fx.Node], paths: _Paths) -> bool:
        changes = {resolution_change(self.gm, node) for node in span}
        projected_concat = edge.kind == "concat" and edge.projection
        if "rise" in changes and ("fall" in changes or projected_concat):
            return True
        names = {node.name for node in span}
        inner = (
            found
            for node in span
            for found in self._into.get(node.name, ())
            if found[0].source in names or found[0].source == edge.source
        )
        if edge.kind == "concat":
            return any(one.kind == "concat" for one, _ in inner)
        plain = (within for one, within in inner if one.kind == "residual" and not one.projection)
        covered = set[fx.Node]().union(*plain) & paths.learned
        return 2 * len(covered & span) > len(paths.learned & span)


def _skips_into(
    merge: fx.Node, operands: Sequence[fx.Node], kind: Kind, paths: _Paths
) -> Iterable[_Found]:
    """Yield each skip edge into ``merge`` with the nodes of its span."""
    if len(operands) < 2:
        return
    bases = {operand: _base(operand, paths) for operand in operands}
    main = max(operands, key=paths.order.__getitem__)
    others = [operand for operand in operands if operand is not main]
    for operand in others:
        source, reached = bases[operand], False
        for long_path in (main, *(other for other in others if other is not operand)):
            span = paths.between(source, long_path)
            reached = reached or bool(span)
            if paths.bypasses(span):
                yield SkipEdge(source.name, merge.name, kind, False, operand.name), span
                break
        else:
            if kind == "residual" and len(operands) == 2 and not reached:
                yield from _shortcut(merge, main, operand, bases[main], paths)


def _shortcut(
    merge: fx.Node, last: fx.Node, operand: fx.Node, base: fx.Node, paths: _Paths
) -> Iterable[_Found]:
    """Yield the skip edge of an add neither of whose operands leads to the last one."""
    span = paths.between(base, operand)
    if paths.bypasses(span):  # the last operand only selects from the other's ancestor
        yield SkipEdge(base.name, merge.name, "residual", False, last.name), span
    elif not span and (shared := paths.shared(last, operand)):
        span = paths.between(shared, last) | paths.between(shared, operand)
        if paths.bypasses(span):
            shortcut = operand if _depth(shared, operand) <= _depth(shared, last) else last
            edge = SkipEdge(shared.name, merge.name, "residual", False, shortcut.name, True)
            yield edge, span


def _projected(
    merge: fx.Node, operands: Sequence[fx.Node], known: set[str], paths: _Paths
) -> Iterable[_Found]:
    """Yield an edge for each operand of a concat that layers of its own make from an ancestor.

    Its span is the way to the deepest operand, which is the main path.
    """
    main = max(operands, key=paths.depth.__getitem__, default=None)
    for operand in operands:
        if main is None or operand.name in known or paths.depth[operand] >= paths.depth[main]:
            continue
        shared = paths.shared(operand, main)
        if shared is not None and shared not in (operand, main):
            edge = SkipEdge(shared.name, merge.name, "concat", False, operand.name, True)
            yield edge, paths.between(shared, main)


def _depth(source: fx.Node, last: fx.Node) -> int:
    """Return the number of steps of the first-argument path from ``last`` up to ``source``.

    `networkx.shortest_path_length` names another operand in some random networks.
    """
    steps = 0
    while last is not source and last.all_input_nodes:
        last = last.all_input_nodes[0]
        steps += 1
    return steps


def _base(operand: fx.Node, paths: _Paths) -> fx.Node:
    """Follow an operand up through nodes that only select from their input."""
    node = operand
    while node.op != "placeholder":
        selects = isinstance(module_of(paths.gm, node), (nn.Identity, *DROPOUT_MODULES))
        selects = selects or operator_name(node) in SELECTIONS | DROPOUTS
        tensors = [n for n in node.all_input_nodes if not is_plain(n)]
        if not selects or len(tensors) != 1 or tensors[0] not in paths.order:
            break
        node = tensors[0]
    return node


def _learned(gm: fx.GraphModule, flow: "nx.DiGraph[fx.Node]", uses: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes at which a parameter comes in, be it computed before, as a normed weight.

    ``uses`` are those that take one as it is. Buffers are none.
    """
    made = set[fx.Node]()
    for node in flow:
        values = [value for value in node.all_input_nodes if value.op != "get_attr"]
        alone = node.op.startswith("call") and all(v in made or is_plain(v) for v in values)
        if alone and module_of(gm, node) is None:
            if node in uses or not made.isdisjoint(values):
                made.add(node)  # of parameters alone: what takes it uses them
        elif not made.isdisjoint(values):
            uses.add(node)
    return uses - made

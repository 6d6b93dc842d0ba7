"""Find the skip edges: where a value bypasses layers and is merged again.

A merge node (add, cat, mul) has operands a and b. Where a is an ancestor of b and parameters lie
between, the edge from a to the merge is a skip edge: *residual* if merged by add, *concat* by
cat, *gate* by mul (squeeze-and-excitation). An operand that only selects from an ancestor (chunk,
crop, pad, dropout) counts as that ancestor. Two operands of an add that share an ancestor, with
neither an ancestor of the other, are a residual with a *projection* shortcut.

    %relu -> conv -> bn -> %add(bn, relu)      SkipEdge("relu", "add", "residual", False)

An edge is *long-range* if its span contains another residual or concat edge, or a fall and a
rise in resolution (U-Net).
"""

import heapq
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlocal.facts import SkipEdge
from fxlocal.ir.nodes import computations, module_of, positions
from fxlocal.ir.operators import is_plain

__all__ = ["find_skips"]

Kind = Literal["residual", "concat", "gate"]

_KINDS: dict[Kind, set[str]] = {
    "residual": {"add", "iadd", "add_", "add.Tensor", "add_.Tensor"},
    "concat": {"cat", "concat", "concatenate", "hstack", "cat.default"},
    "gate": {"mul", "imul", "mul_", "multiply", "mul.Tensor", "mul_.Tensor"},
}
_SELECTIONS = {
    *("getitem", "chunk", "split", "tensor_split", "narrow", "select", "slice", "pad"),
    *("crop", "center_crop", "dropout", "dropout2d", "stochastic_depth", "contiguous", "clone"),
}
_SELECTION_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def find_skips(gm: fx.GraphModule) -> tuple[SkipEdge, ...]:
    """Return the skip edges of ``gm``, ordered by merge node; see the module's docstring."""
    order = positions(gm.graph)
    found: list[tuple[SkipEdge, set[fx.Node]]] = []
    for merge in computations(gm.graph):
        kind = _kind(merge)
        if kind is not None:
            found += _skips_into(gm, merge, kind, order)
    return tuple(_marked_long_range(gm, found))


def _kind(node: fx.Node) -> Kind | None:
    name = _name(node)
    return next((kind for kind, names in _KINDS.items() if name in names), None)


def _name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target if node.op == "call_method" else ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname + "." + node.target._overloadname
    return getattr(node.target, "__name__", "")


def _skips_into(
    gm: fx.GraphModule, merge: fx.Node, kind: Kind, order: dict[fx.Node, int]
) -> Iterable[tuple[SkipEdge, set[fx.Node]]]:
    """Yield each skip edge into ``merge`` with the nodes of its span."""
    operands = [n for n in merge.all_input_nodes if n.op != "get_attr" and not is_plain(n)]
    if len(operands) < 2:
        return
    bases = {operand: _base(gm, operand) for operand in operands}
    main = max(operands, key=order.__getitem__)
    others = [operand for operand in operands if operand is not main]
    for operand in others:
        source, reached = bases[operand], False
        for long_path in (main, *(other for other in others if other is not operand)):
            span = _between(source, long_path, order)
            reached = reached or bool(span)
            if _bypasses(gm, span):
                yield SkipEdge(source.name, merge.name, kind, False, operand.name), span
                break
        else:
            if kind == "residual" and len(operands) == 2 and not reached:
                yield from _shortcut(gm, merge, main, operand, bases[main], order)


def _shortcut(
    gm: fx.GraphModule,
    merge: fx.Node,
    last: fx.Node,
    operand: fx.Node,
    base: fx.Node,
    order: dict[fx.Node, int],
) -> Iterable[tuple[SkipEdge, set[fx.Node]]]:
    """Yield the skip edge of an add neither of whose operands leads to the last one."""
    span = _between(base, operand, order)
    if _bypasses(gm, span):  # the last operand only selects from the other's ancestor
        yield SkipEdge(base.name, merge.name, "residual", False, last.name), span
    elif not span and (shared := _common_ancestor(last, operand, order)):
        span = _between(shared, last, order) | _between(shared, operand, order)
        shortcut = operand if _depth(shared, operand) <= _depth(shared, last) else last
        edge = SkipEdge(shared.name, merge.name, "residual", False, shortcut.name, True)
        yield edge, span


def _bypasses(gm: fx.GraphModule, span: set[fx.Node]) -> bool:
    return any(_has_parameters(gm, node) for node in span)


def _base(gm: fx.GraphModule, operand: fx.Node) -> fx.Node:
    """Follow an operand up through nodes that only select from their input."""
    node = operand
    while node.op not in ("placeholder", "get_attr"):
        selects = _name(node) in _SELECTIONS or isinstance(module_of(gm, node), _SELECTION_MODULES)
        tensors = [n for n in node.all_input_nodes if not is_plain(n)]
        if not selects or len(tensors) != 1:
            break
        node = tensors[0]
    return node


def _between(source: fx.Node, last: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """Return the nodes on paths from ``source`` to ``last``; empty if there is no path."""
    if source is last:
        return set()
    seen: set[fx.Node] = set()
    stack, reached = [last], False
    while stack:
        node = stack.pop()
        reached |= node is source
        if node is source or node in seen or order[node] < order[source]:
            continue
        seen.add(node)
        stack.extend(n for n in node.all_input_nodes if n.op != "get_attr" and not is_plain(n))
    return seen if reached else set()


def _common_ancestor(a: fx.Node, b: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """Return the last node in execution order that both ``a`` and ``b`` depend on."""
    sides = {a: 1, b: 2}
    heap = [(-order[a], a.name, a), (-order[b], b.name, b)]
    heapq.heapify(heap)
    while heap:
        _, _, node = heapq.heappop(heap)
        if sides[node] == 3:
            return node
        for parent in node.all_input_nodes:
            if parent.op == "get_attr" or is_plain(parent):
                continue
            if parent not in sides:
                heapq.heappush(heap, (-order[parent], parent.name, parent))
            sides[parent] = sides.get(parent, 0) | sides[node]
    return None


def _depth(source: fx.Node, last: fx.Node) -> int:
    """Return the number of steps of the first-argument path from ``last`` up to ``source``."""
    steps = 0
    while last is not source and last.all_input_nodes:
        last = last.all_input_nodes[0]
        steps += 1
    return steps


def _has_parameters(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = module_of(gm, node)
    if module is not None:
        return next(module.parameters(), None) is not None
    return any(n.op == "get_attr" for n in node.all_input_nodes)


def _marked_long_range(
    gm: fx.GraphModule, found: list[tuple[SkipEdge, set[fx.Node]]]
) -> Iterable[SkipEdge]:
    into: dict[str, list[SkipEdge]] = {}
    for edge, _ in found:
        if edge.kind != "gate":
            into.setdefault(edge.target, []).append(edge)
    for edge, span in found:
        names = {node.name for node in span}
        inner = (e for name in names for e in into.get(name, ()))
        nested = any(e.source in names or e.source == edge.source for e in inner)
        if nested or {"fall", "rise"} <= {_resolution(gm, node) for node in span}:
            edge = SkipEdge(**{**vars(edge), "long_range": True})
        yield edge


_FALLS = ("pool", "pixel_unshuffle")
_RISES = ("interpolate", "upsample", "pixel_shuffle", "unpool", "conv_transpose")


def _resolution(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Tell whether ``node`` lets the resolution "fall" or "rise", as far as its name says."""
    module = module_of(gm, node)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "rise" if max(module.stride) > 1 else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return "fall" if max(module.stride) > 1 else None
    name = type(module).__name__ if module is not None else _name(node)
    name = name.lower().replace("pixelshuffle", "pixel_shuffle")
    if any(word in name for word in _RISES):
        return "rise"
    if any(word in name for word in _FALLS):
        return "fall"
    if node.target in (F.conv1d, F.conv2d, F.conv3d) or name.startswith("conv"):
        stride = node.kwargs.get("stride", node.args[3] if len(node.args) > 3 else 1)
        steps = (stride,) if isinstance(stride, int) else tuple(stride)  # type: ignore[arg-type]
        return "fall" if max(steps) > 1 else None
    return None

"""Find the residual branches: what a residual sum adds to its shortcut, and nothing else takes.

    %conv -> %bn -> %add(bn, x)        Branch("conv", source="x", merge="add", last="bn", ...)

A branch is what lies on the ways from the source of a residual edge to its sum, but for what the
shortcut is made of too. A residual inside a branch is part of it. Where both ways have layers (a
projection), the branch is the one that takes nothing else that is learned. Long-range residuals,
sums whose branch is used elsewhere too, and sums with a factor are left out.

A model's own DropPath, torchvision's ``stochastic_depth`` or timm's ``drop_path``, is noted where
it is the last operation of a branch.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fxlocal.facts import Branch, DropPath, Layer, SkipEdge
from fxlocal.ir.boundary import learned_values
from fxlocal.ir.nodes import ancestors, nodes_by_name, parameter_uses, shared_path
from fxlocal.ir.operators import operator_name

__all__ = ["find_branches"]


def find_branches(
    gm: fx.GraphModule, *, layers: Sequence[Layer], skips: Sequence[SkipEdge]
) -> tuple[Branch, ...]:
    """Return the residual branches of a captured graph, in the order of their sums."""
    edges = [edge for edge in skips if edge.kind == "residual" and not edge.long_range]
    if not edges:
        return ()
    named, paths = nodes_by_name(gm.graph), {layer.node: layer.path for layer in layers}
    for node, name, parameter in parameter_uses(gm):  # of modules that are kept whole, too
        if parameter.ndim > 1:
            paths.setdefault(node.name, name.rpartition(".")[0])
    learned = learned_values(gm)
    found = [one for edge in edges if (one := _branch_of(edge, named, paths, learned))]
    inner = {name for branch in found for name in branch.nodes}
    outer = [branch for branch in found if branch.merge not in inner]
    repeated = Counter(branch.name for branch in outer)
    firsts = [next(paths[name] for name in branch.nodes if name in paths) for branch in outer]
    return tuple(
        branch if repeated[branch.name] == 1 else replace(branch, name=first)
        for branch, first in zip(outer, firsts, strict=True)
    )


def _branch_of(
    edge: SkipEdge,
    named: Mapping[str, fx.Node],
    paths: Mapping[str, str],
    learned: Collection[fx.Node],
) -> Branch | None:
    merge = named[edge.target]
    operands = [value for value in merge.args if isinstance(value, fx.Node)]
    if len(operands) != 2 or len(merge.args) != 2 or merge.kwargs:
        return None
    operands.sort(key=lambda value: value.name == edge.operand)
    made = _made_of(named[edge.source], merge)
    unused = _unused(made)
    for last, shortcut in (operands, reversed(operands)) if edge.projection else (operands,):
        nodes = ancestors(last, made) - ancestors(shortcut, made)
        for node in made:
            if node in unused and not nodes.isdisjoint(node.all_input_nodes):
                nodes.add(node)
        inside = [paths[node.name] for node in made if node in nodes and node.name in paths]
        taken = {value for node in nodes for value in node.all_input_nodes} - nodes
        others = any(value not in made and value in learned for value in taken)
        leaks = any(user not in nodes and user is not merge for n in nodes for user in n.users)
        if inside and not leaks and not (edge.projection and others):
            own = [node for node in made if node in nodes]
            names, drop_path = tuple(node.name for node in own), _drop_path(last, own)
            path = shared_path(inside)
            return Branch(path, edge.source, edge.target, last.name, names, drop_path)
    return None


def _made_of(source: fx.Node, merge: fx.Node) -> dict[fx.Node, None]:
    """Return ``source`` and what is made of it before ``merge``, in execution order."""
    made, node = {source: None}, source.next
    while node is not merge:
        if any(value in made for value in node.all_input_nodes):
            made[node] = None
        node = node.next
    return made


def _unused(made: Collection[fx.Node]) -> set[fx.Node]:
    """Return what nothing behind is made of: counters of norms, and what is asserted."""
    found = set[fx.Node]()
    for node in reversed([*made]):
        if found.issuperset(node.users):
            found.add(node)
    return found


def _drop_path(last: fx.Node, nodes: Sequence[fx.Node]) -> DropPath | None:
    """Return the model's own DropPath, if ``last`` is one that leaves out rows."""
    args: tuple[Any, ...] = *last.args, *last.kwargs.values()
    if operator_name(last) == "stochastic_depth":
        value, rate, mode, *_ = args
        survival = 1 - float(rate)
        drops = mode == "row" and 0 < survival < 1
        return DropPath(value.name, survival, 1 / survival, (last.name,)) if drops else None
    if operator_name(last) != "mul" or len(args) != 2:
        return None
    value, mask = args
    if not isinstance(mask, fx.Node) or operator_name(mask) != "bernoulli_" or len(mask.args) != 2:
        return None
    kept: Any = mask.args[1]
    divided = any(operator_name(user) == "div_" for user in mask.users)
    own = _noise(last, mask, value, nodes)
    return DropPath(value.name, float(kept), 1 / float(kept) if divided else 1.0, own)


def _noise(
    last: fx.Node, mask: fx.Node, value: fx.Node, nodes: Sequence[fx.Node]
) -> tuple[str, ...]:
    """Return the nodes that make the mask of a branch's ``value``, and use it."""
    made = ancestors(mask, nodes) | {last, *mask.users}
    kept = ancestors(value, nodes)
    return tuple(node.name for node in nodes if node in made - kept)

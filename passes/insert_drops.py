"""Compute residual branches for a part of the batch, or in a part of the steps, alone.

    %conv = call_module conv(%x)           %conv_rows = call_function draw_rows(%x, 0.5, 'conv')
    %add = call_function add(%conv, %x) -> %x_taken = call_function take_rows(%x, %conv_rows)
                                           %conv = call_module conv(%x_taken)
                                           %add = call_function add_rows(%x, %conv, %conv_rows)

All that a branch takes and that has a row for each sample (its input, a mask, the output of an
encoder) is taken at the drawn rows; the shortcut, identity or projection, keeps all. Batch norms in
a branch, and all else that it computes over the batch, see the surviving rows alone.

By block (``mode="block"``) the code generator makes an ``if`` of a branch, whose nodes are tagged;
the sum is scaled. With ``replace`` the model's own DropPath goes, whose rows are each drawn alone.

Forward-changing: opt-in (Huang et al., "Deep networks with stochastic depth", 2016). Cost: a copy
of the rows, and of the shortcut. Refuses changes in place of
what lies outside a branch, and batch norms that would see no row, or a single value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxlocal.errors import PlanError
from fxlocal.facts import Branch, TensorSpec
from fxlocal.ir.edit import insert_before
from fxlocal.ir.fakes import is_of_batch, is_row_count, rows_of, shape_of
from fxlocal.ir.nodes import BLOCK, STAGE, Origin, module_of, nodes_by_name, positions
from fxlocal.ir.operators import (
    is_container,
    is_inplace,
    is_plain,
    operator_name,
    origins,
    overwrites,
)
from fxlocal.ops.drop import add_rows, count_rows, draw_each_row, draw_rows, take_rows
from fxlocal.plan import StochasticDepth

__all__ = ["check_drops", "insert_drops"]

PASS = "insert_drops"

_Taken: TypeAlias = Literal["rows", "size"]
_Spared: TypeAlias = tuple[str, str, object]


@dataclass(frozen=True)
class _Drop:
    """A branch that is left out: ``merge`` adds what ``nodes`` make to ``shortcut``.

    It gets a value from outside as ``taken`` says: ``"rows"`` of it, or a ``"size"`` anew; all else
    whole. ``entry`` is the first that has a row for each sample, ``noise`` and ``scale`` are of the
    model's own DropPath, which goes.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    entry: fx.Node
    last: fx.Node
    shortcut: fx.Node
    merge: fx.Node
    taken: Mapping[fx.Node, _Taken]
    survival: float
    noise: tuple[fx.Node, ...]
    scale: float | None


def insert_drops(
    gm: fx.GraphModule,
    *,
    drop: StochasticDepth,
    branches: Sequence[Branch],
    spared: Sequence[_Spared] = (),
) -> None:
    """Leave out the residual branches of ``gm`` as ``drop`` says.

    Args:
        gm: the graph, edited in place; cuts may have been inserted.
        drop: what is asked for.
        branches: of the model, in order.
        spared: where none may be left out: names of the first node there (empty: of all) and of
            the first behind it, and the part of the Plan that it is of.

    Raises:
        PlanError: if there is no such branch, or one that cannot be left out.
    """
    for index, one in enumerate(check_drops(gm, drop=drop, branches=branches, spared=spared)):
        _tag(one, index) if drop.mode == "block" else _Rows(gm, one).insert()


def check_drops(
    gm: fx.GraphModule,
    *,
    drop: StochasticDepth,
    branches: Sequence[Branch],
    spared: Sequence[_Spared] = (),
) -> list[_Drop]:
    """Return what `insert_drops` leaves out; raise its PlanError, if there is one."""
    pairs = list(zip(branches, drop.survivals(len(branches)), strict=True))
    if drop.replace:
        pairs = [(one, one.drop_path.survival) for one in branches if one.drop_path]
    if not pairs:
        raise PlanError(
            f"{drop!r}: no residual block of the model ends with a DropPath or a stochastic_depth "
            "that leaves out rows: build it with a rate, or give replace=False"
        )
    order, finder = positions(gm.graph), _Finder(gm, drop)
    names = {node.name: place for node, place in order.items()}
    found = [finder.find(branch, survival) for branch, survival in pairs if survival < 1]
    for one in found:
        for start, end, part in spared:
            first = names[start] if start else 0
            if any(first <= order[node] < names[end] for node in one.nodes):
                where = "the blocks that run twice hold" if start else "its prefix holds"
                raise PlanError(
                    f"{drop!r} contradicts {part!r}: {where} the residual block {one.name!r}, "
                    "which stochastic depth leaves out. Leave out one of the two"
                )
        _refuse_inplace(gm, one, drop, order)
        if drop.mode == "row" and not drop.replace:
            _refuse_empty_norms(gm, one, drop)
    return found


class _Finder:
    """Knows the graph that branches are looked up in."""

    def __init__(self, gm: fx.GraphModule, drop: StochasticDepth) -> None:
        self.gm, self.drop = gm, drop
        self.named = nodes_by_name(gm.graph)
        inputs = gm.graph.find_nodes(op="placeholder")
        self.size = next((rows for node in inputs if (rows := rows_of(node))), None)
        self.batched = {*inputs}  # what may have a row for each sample, or be made of their number
        for node in gm.graph.nodes:
            made = not self.batched.isdisjoint(node.all_input_nodes)
            if is_of_batch(node, self.size) if is_plain(node) else made:
                self.batched.add(node)

    def find(self, branch: Branch, survival: float) -> _Drop:
        own = branch.drop_path if self.drop.replace else None
        last, gone = (own.value, set(own.nodes)) if own else (branch.last, set[str]())
        nodes = tuple(self.named[name] for name in branch.nodes if name not in gone)
        merge = self.named[branch.merge]
        shortcut = next(value for value in merge.all_input_nodes if value.name != branch.last)
        taken = self._taken(branch, nodes) if self.drop.mode == "row" else {}
        entry = next((value for value, kind in taken.items() if kind == "rows"), shortcut)
        noise = tuple(self.named[name] for name in own.nodes) if own else ()
        scale = own.scale if own else None
        ends = self.named[last], shortcut, merge
        return _Drop(branch.name, nodes, entry, *ends, taken, survival, noise, scale)

    def _taken(self, branch: Branch, nodes: Sequence[fx.Node]) -> dict[fx.Node, _Taken]:
        source, inside = self.named[branch.source], set(nodes)
        found: dict[fx.Node, _Taken] = {}
        for value in dict.fromkeys(v for node in nodes for v in node.all_input_nodes):
            if value in inside or value not in self.batched:
                continue
            spec = value.meta.get("val")
            if is_plain(value):
                found[value] = "size"
            elif isinstance(spec, TensorSpec) and self.size:
                if spec.shape[:1] == (self.size,):
                    found[value] = "rows"
            elif not self._is_input(value, source):
                raise PlanError(
                    f"{self.drop!r}: the block {branch.name!r} takes {value.name!r} besides its "
                    "input, and it is not known whether that has a row for each sample: give "
                    "example inputs, transform(model, plan, x), or mode='block'"
                )
            else:
                found[value] = "rows"
        self._refuse_other_rows(branch, found)
        return found

    def _refuse_other_rows(self, branch: Branch, taken: Mapping[fx.Node, _Taken]) -> None:
        """Refuse a block whose input, or a term of whose sum, surely has not a row per sample."""
        odd = None if "rows" in taken.values() else branch.source
        rank = len(shape_of(self.named[branch.merge]))
        for value in self.named[branch.merge].all_input_nodes:
            shape = shape_of(value)
            known = self.size and rank and shape
            if known and (shape[0] != self.size or len(shape) != rank):
                odd = odd or value.name
        if odd:
            raise PlanError(
                f"{self.drop!r}: the block {branch.name!r} has {odd!r}, which has not the "
                f"{self.size} rows of the batch: rows are left out, so the batch has to be "
                "dimension 0. Give mode='block'"
            )

    def _is_input(self, value: fx.Node, source: fx.Node) -> bool:
        if value.op != "placeholder" and is_container(self.gm, value):
            return False
        while value is not source and len(value.all_input_nodes) == 1:
            value = value.all_input_nodes[0]
        return value is source


def _refuse_inplace(
    gm: fx.GraphModule, one: _Drop, drop: StochasticDepth, order: Mapping[fx.Node, int]
) -> None:
    """Refuse a change in place of what lies outside the branch: it would change a copy of rows."""
    inside, merge = set(one.nodes), one.merge
    taken = {value for node in inside for value in node.all_input_nodes} - inside
    taken = {value for value in taken if value.op != "get_attr" and not is_plain(value)}
    for node in (node for node in one.nodes if is_inplace(gm, node)):
        if any(overwrites(gm, node, value) for value in taken):
            raise PlanError(
                f"{drop!r}: the residual block {one.name!r} changes its input in place "
                f"({node.name!r}), which others read too: make that operation one that is not"
            )
    if is_inplace(gm, merge) and merge.args[0] is one.shortcut:
        users = [user for value in origins(gm, one.shortcut) for user in value.users]
        if late := [user for user in users if order[user] > order[merge]]:
            raise PlanError(
                f"{drop!r}: the residual block {one.name!r} is added in place ({merge.name!r}) to "
                f"what {late[0].name!r} reads behind it: make that sum one that is not in place"
            )


def _refuse_empty_norms(gm: fx.GraphModule, one: _Drop, drop: StochasticDepth) -> None:
    """Refuse a batch norm of which too little is left, as far as shapes are known."""
    size = rows_of(one.entry)
    count = 2 if size is None else count_rows(size, one.survival)
    for node in one.nodes:
        is_norm = isinstance(module_of(gm, node), nn.modules.batchnorm._BatchNorm)
        if not is_norm and operator_name(node) != "batch_norm":
            continue
        shape = getattr(node.all_input_nodes[0].meta.get("val"), "shape", (0, 0, 2))
        if count * math.prod(shape[2:]) < 2:
            rest = "no row" if count == 0 else "a single value of each channel"
            raise PlanError(
                f"{drop!r}: of a batch of {size}, the batch norm {str(node.target)!r} in the "
                f"residual block {one.name!r} would see {rest}. Give larger batches, or a smaller "
                "rate"
            )


# Editing


def _tag(one: _Drop, index: int) -> None:
    """Let the code generator put a branch, and its sum, into an ``if``."""
    merge = one.merge
    for node in one.nodes:
        merge.prepend(node)
    merge.op, merge.target, merge.args = "call_function", torch.add, (one.shortcut, one.last)
    merge.kwargs = {"alpha": 1 / one.survival}
    merge.meta["fxlocal"] = Origin(PASS, one.name)
    for node in (*one.nodes, merge):
        node.meta[BLOCK] = index, one.survival


class _Rows:
    """Lets one branch run on some rows of what it takes."""

    def __init__(self, gm: fx.GraphModule, one: _Drop) -> None:
        self.gm, self.one, self.size = gm, one, rows_of(one.entry)
        self.inner: dict[fx.Node, fx.Node] = {}

    def insert(self) -> None:
        """Draw rows, take them of what the branch takes, and add them to the shortcut."""
        one, merge = self.one, self.one.merge
        self.rows = self._draw(one.nodes[0])
        for node in one.nodes:
            for value in node.all_input_nodes:
                if value in one.taken:
                    node.replace_input_with(value, self._inner(value, node))
            self._note_rows(node)
        merge.op, merge.target, merge.kwargs = "call_function", add_rows, {}
        scale = () if one.scale is None else (one.scale,)
        merge.args = (one.shortcut, one.last, self.rows, *scale)
        merge.meta["fxlocal"] = Origin(PASS, one.name)
        for node in reversed(one.noise):
            self.gm.graph.erase_node(node)

    def _insert(self, before: fx.Node, target: Any, args: tuple[Any, ...], name: str) -> fx.Node:
        origin = Origin(PASS, self.one.name)
        new = insert_before(before, "call_function", target, args, origin, name)
        if STAGE in before.meta:
            new.meta[STAGE] = before.meta[STAGE]
        return new

    def _draw(self, before: fx.Node) -> fx.Node:
        one, name = self.one, f"{self.one.name.replace('.', '_')}_rows"
        if one.noise:
            return self._insert(before, draw_each_row, (one.entry, one.survival), name)
        args: tuple[Any, ...] = (one.entry, one.survival, one.name)
        if self.size is None:  # else it was checked
            args += (self.gm.graph.find_nodes(op="placeholder")[0],)
        return self._insert(before, draw_rows, args, name)

    def _inner(self, value: fx.Node, user: fx.Node) -> fx.Node:
        """Return what ``user``, inside the branch, takes in the place of ``value``."""
        if value in self.inner:
            return self.inner[value]
        name = f"{value.name}_taken"
        if not is_plain(value):
            new = self.inner[value] = self._insert(user, take_rows, (value, self.rows), name)
            if "val" in value.meta:
                new.meta["val"] = value.meta["val"]
            self._note_rows(new)
            return new
        new = self.inner[value] = self._insert(user, value.target, value.args, name)
        new.op, new.kwargs = value.op, value.kwargs
        if is_row_count(value):
            entry = self._inner(self.one.entry, new)
            new.op, new.target, new.args, new.kwargs = "call_method", "size", (entry, 0), {}
        for part in value.all_input_nodes if new.args == value.args else ():
            if not is_plain(part) or is_of_batch(part, self.size):
                new.replace_input_with(part, self._inner(part, new))
        return new

    def _note_rows(self, node: fx.Node) -> None:
        """Note that a value has as many rows as survive; of a DropPath's, on average."""
        if self.size is None or "val" not in node.meta:
            return
        size, count = self.size, count_rows(self.size, self.one.survival)

        def fewer(spec: object) -> object:
            if isinstance(spec, TensorSpec) and spec.shape and spec.shape[0] % size == 0:
                return replace(spec, shape=(spec.shape[0] // size * count, *spec.shape[1:]))
            return spec

        node.meta["val"] = pytree.tree_map(fewer, node.meta["val"])

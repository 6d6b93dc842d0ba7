"""Sum the deltas of local updates over the ranks of a data parallel run, before they are applied.

    %d1 = fxlocal.conv_delta(...)           %d1 = fxlocal.conv_delta(...)
    %u1 = fxlocal.normalised_add_(          %d2 = fxlocal.conv_delta(...)
              %w1, %d1, %rate)              %wide_0 = fxlocal.widened([%d1, %d2], [%w1, %w2])
    %d2 = fxlocal.conv_delta(...)      ->   %sums_0 = all_reduce_coalesced(%wide_0, 'sum', group)
    %u2 = fxlocal.normalised_add_(          ...                           # the rest of the forward
              %w2, %d2, %rate)              %d1_part = getitem(%sums_0, 0)
    ...                                     %d1_sum = wait_tensor(%d1_part)
                                            %u1 = fxlocal.normalised_add_(%w1, %d1_sum, %rate)

A delta is a partial sum, `fxlocal.ops.ranks`. The deltas go in buckets of about 25 MB, each as soon
as its last one is there, and the updates move to the end of the forward: the wire works meanwhile.
Stages keep theirs where they are, one by one: they hand nothing on that is under way.

A weight that lies in shards over the ranks, `fxlocal.ops.shards`, gets its rows of the sum alone::

    %w = get_attr conv1.weight                    %w = get_attr conv1.weight
                                                  %w_whole = fxlocal.whole(%w, blank=True)
    %d = fxlocal.conv_delta(%x, %y, %w, ...)  ->  %d = fxlocal.conv_delta(%x, %y, %w_whole, ...)
    %u = fxlocal.normalised_add_(%w, %d, %rate)   %d_part = fxlocal.scattered(%d, float32, group)
                                                  ...                     # the rest of the forward
                                                  %d_shard = wait_tensor(%d_part)
                                                  %squares = fxlocal.squares([%d_shard], [])
                                                  %sums = all_reduce(%squares, 'sum', group)
                                                  %u = fxlocal.shard_add_(%w, %d_shard, %sums, 0,
                                                                          %rate)

Forward-exact. Cost: one all-reduce of the prefix, in float32.

The deltas of micro-batches add up first, in `accumulate_deltas`: of all but the last ::

    %d = fxlocal.conv_delta(...)                  %d = fxlocal.conv_delta(...)
    %u = fxlocal.normalised_add_(%w, %d, %rate)   %total = get_attr fxlocal.total_0
                                             ->   %u = fxlocal.add_delta_(%total, %d)

and of the last, which applies them::

                                                  %total = get_attr fxlocal.total_0
                                                  %s = fxlocal.take_total_(%total, %d)
                                                  %u = fxlocal.normalised_add_(%w, %s, %rate)

So k micro-batches move a weight as one batch of all of them does. Cost: a copy of the prefix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from fxlocal.errors import PlanError
from fxlocal.ir.additions import ADDITIONS
from fxlocal.ir.contexts import contexts
from fxlocal.ir.edit import insert_after, insert_before
from fxlocal.ir.network import Network
from fxlocal.ir.nodes import Origin, fetched, positions
from fxlocal.ops.ranks import BUCKET_BYTES

__all__ = ["accumulate_deltas", "find_moved", "reduce_deltas"]

PASS = "reduce_deltas"

_UPDATES = (torch.ops.fxlocal.normalised_add_.default, torch.ops.fxlocal.normalised_step.default)

_BY_SHAPE = (  # deltas that ask a weight for its shape alone
    torch.ops.fxlocal.conv_delta.default,
    torch.ops.fxlocal.linear_delta.default,
)


@dataclass(frozen=True)
class _Update:
    """A local update: its node, what its delta is like, and whether its weight is in shards."""

    node: fx.Node
    kind: tuple[torch.dtype, torch.device]
    num_bytes: int
    sharded: bool


def reduce_deltas(gm: fx.GraphModule, *, group: str, at_end: bool) -> None:
    """Insert the sums of all deltas over ``group``, the name of a process group.

    Args:
        gm: the graph, edited in place, its local updates inserted.
        group: as above.
        at_end: collect the deltas in buckets and move the updates to the end of the forward.

    Raises:
        PlanError: for a narrow weight that each rank would round by random numbers of its own.
    """
    updates = [_describe(gm, node) for node in gm.graph.nodes if node.target in _UPDATES]
    if sharded := [update for update in updates if update.sharded]:
        _scatter(gm, sharded, group)
        updates = [update for update in updates if not update.sharded]
    buckets = _buckets(updates) if at_end else ([update] for update in updates)
    for index, bucket in enumerate(buckets):
        _reduce(gm, [update.node for update in bucket], group, f"_{index}", at_end)


def _describe(gm: fx.GraphModule, node: fx.Node) -> _Update:
    """Return an update with the size of its delta: that of what its weight is, or is made of."""
    weights: Any = [node.args[0]]
    if weights[0].op != "get_attr":
        weights = list(_chain(node))[-1].args[0]
    tensors: list[Tensor] = [fetched(gm, w) for w in weights]
    stochastic = any(one.kwargs.get("stochastic") for one in _chain(node))
    if stochastic and any(tensor.dtype.itemsize < 4 for tensor in tensors):
        raise PlanError(
            f"layer {_layer(node)!r}: stochastic=True rounds its weight of {tensors[0].dtype} by "
            "random numbers that each rank draws for itself, and ranks would drift apart: keep the "
            "weights in float32, with torch.autocast"
        )
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    size = sum(tensor.numel() for tensor in tensors) * dtype.itemsize
    sharded = hasattr(tensors[0], "full_tensor")
    return _Update(node, (dtype, tensors[0].device), size, sharded)


def _scatter(gm: fx.GraphModule, updates: Sequence[_Update], group: str) -> None:
    """Sum deltas of weights in shards, and move the rows of each rank at the end of the forward."""
    ops, functional = torch.ops.fxlocal, torch.ops._c10d_functional
    wait, first = functional.wait_tensor.default, updates[0].node
    put = partial(_put, gm.graph.output_node())
    shards, weights = [], []
    for update in updates:
        node: Any = update.node
        weight, delta, _ = node.args
        _make_whole(gm, node)
        begin, parted = ops.scattered.default, (delta, update.kind[0], group)
        part = _put(delta.next, begin, parted, f"{delta.name}_part", node)
        shards.append(put(wait, (part,), f"{delta.name}_shard", node))
        weights.append(put(weight.target, (), f"{weight.name}_shard", node))
    relative = weights if first.kwargs.get("relative") else []
    squares = put(ops.squares.default, (shards, relative), "squares", first)
    begun = put(functional.all_reduce.default, (squares, "sum", group), "squares_sums", first)
    total = put(wait, (begun,), "squares_sum", first)
    for index, (update, *pair) in enumerate(zip(updates, weights, shards, strict=True)):
        node, args = update.node, (*pair, total, index, update.node.args[2])
        put(ops.shard_add_.default, args, f"{node.name}_shard", node).kwargs = node.kwargs
        gm.graph.erase_node(node)


def _put(before: fx.Node, target: Any, args: tuple[Any, ...], name: str, of: fx.Node) -> fx.Node:
    """Insert a fetch or a call, in the contexts of the update ``of`` and for its layer."""
    op = "get_attr" if isinstance(target, str) else "call_function"
    node = insert_before(before, op, target, args, Origin(PASS, _layer(of)), name)
    node.meta["fxlocal_contexts"] = contexts(of)
    return node


def _make_whole(gm: fx.GraphModule, update: Any) -> None:
    """Give all deltas of a weight, which lie where that may be in shards, the whole of it."""
    fetches = gm.graph.find_nodes(op="get_attr")
    for fetch in [node for node in fetches if node.target == update.args[0].target]:
        users = [node for node in fetch.users if node is not update]
        deltas = {one.target for user in users for one in (user, *user.users)}
        target, name = torch.ops.fxlocal.whole.default, f"{fetch.name}_whole"
        made = _put(fetch.next, target, (fetch,), name, update)
        made.kwargs = {"blank": True} if deltas.intersection(_BY_SHAPE) else {}
        for user in users:
            user.replace_input_with(fetch, made)


def _buckets(updates: Sequence[_Update]) -> Iterator[list[_Update]]:
    """Yield updates whose deltas go together, of one dtype and device."""
    filling: dict[Any, list[_Update]] = {}
    for update in updates:
        bucket = filling.setdefault(update.kind, [])
        bucket.append(update)
        if sum(one.num_bytes for one in bucket) >= BUCKET_BYTES:
            yield filling.pop(update.kind)
    yield from filling.values()


def _chain(update: fx.Node) -> Iterator[fx.Node]:
    """Yield the update's nodes: of a weight that is computed, what is made of its step too."""
    found = {update}
    yield update
    node = update
    while (node := node.next).op != "output":
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
            yield node


def _reduce(
    gm: fx.GraphModule, updates: Sequence[fx.Node], group: str, suffix: str, at_end: bool
) -> None:
    """Insert the sum of one bucket, and give each update its part of it."""
    first, order = updates[0], positions(gm.graph)
    deltas: list[Any] = [update.args[1] for update in updates]
    weights = [update.args[0] for update in updates]
    functional, at = torch.ops._c10d_functional, max(deltas, key=order.__getitem__)
    widened, reduced = torch.ops.fxlocal.widened.default, functional.all_reduce_coalesced.default
    wide = _put(at.next, widened, (deltas, weights), f"wide{suffix}", first)
    sums = _put(wide.next, reduced, (wide, "sum", group), f"sums{suffix}", first)
    end = gm.graph.output_node()
    for index, update in enumerate(updates):
        chain = list(_chain(update))
        before = end if at_end else update
        name, wait = deltas[index].name, functional.wait_tensor.default
        part = _put(before, getitem, (sums, index), f"{name}_part", update)
        total = _put(before, wait, (part,), f"{name}_sum", update)
        update.update_arg(1, total)
        for node in chain if at_end else ():
            end.prepend(node)


def _layer(node: fx.Node) -> str:
    return str(node.meta["fxlocal"].layer)


def accumulate_deltas(gm: Network, *, last: bool) -> None:
    """Give each local update its total, ``gm.fxlocal.total_<index>``, which is there.

    Args:
        gm: the graph, edited in place, its local updates inserted, summed over ranks or not.
        last: of the last micro-batch of a step, which applies them.
    """
    updates = [node for node in gm.graph.nodes if node.target in _UPDATES]
    for index, update in enumerate(updates):
        delta, taker = _raw(update)
        origin = Origin("accumulate_deltas", update.meta["fxlocal"].layer)
        fetch = f"{ADDITIONS}.total_{index}"
        total = insert_after(delta, "get_attr", fetch, (), origin, f"total_{index}")
        op = torch.ops.fxlocal.take_total_ if last else torch.ops.fxlocal.add_delta_
        name, args = f"{delta.name}_total", (total, delta)
        new = insert_after(total, "call_function", op.default, args, origin, name)
        new.meta["fxlocal_contexts"] = contexts(update)
        if last:
            taker.replace_input_with(delta, new)
    if not last:
        _drop(gm, updates)


def find_moved(gm: Network) -> list[Tensor]:
    """Return the weight of each local update, in order; a PlanError if one is computed."""
    updates = [node for node in gm.graph.nodes if node.target in _UPDATES]
    for update in updates:
        if update.target is not _UPDATES[0]:
            raise PlanError(
                f"layer {_layer(update)!r} computes its weight (computed=True), of which deltas of "
                "micro-batches do not add up: give whole batches, or put the boundary before it"
            )
    return [fetched(gm, update.all_input_nodes[0]) for update in updates]


def _raw(update: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return a rank's own delta of an update, and the node that takes it."""
    delta: Any = update.args[1]
    if delta.meta["fxlocal"].pass_name != PASS:
        return delta, update
    part = delta.args[0]
    wide = part.args[0].args[0]
    return wide.args[0][part.args[1]], wide


def _drop(gm: Network, updates: list[fx.Node]) -> None:
    """Erase updates, and what only they are made of or is made of them: steps, sums over ranks."""
    dropped = set(updates)
    for node in gm.graph.nodes:
        if not dropped.isdisjoint(node.all_input_nodes):
            dropped.add(node)
    for node in reversed(gm.graph.nodes):
        origin = node.meta.get("fxlocal")
        sums = isinstance(origin, Origin) and origin.pass_name == PASS
        if node in dropped or (sums and not node.users):
            gm.graph.erase_node(node)

"""Say of each node which stage it lies in; nothing is inserted.

    %x = placeholder x                   stage 0:
    %conv = call_module conv(%x)         %x = placeholder x
    %fc = call_module fc(%conv)    ->    %conv = call_module conv(%x)
                                         stage 1:
                                         %fc = call_module fc(%conv)

Stages are local modules, or what activation checkpointing computes again. The index is kept in
``node.meta["fxlocal_stage"]``; later rewrites go by it. Forward-exact. Refuses
a stage that changes in place what an earlier one made and a later one takes too.
"""

from collections.abc import Mapping, Sequence
from itertools import product

from torch import fx

from fxlocal.errors import PlanError
from fxlocal.facts import StageBoundary
from fxlocal.ir.nodes import STAGE, node_named
from fxlocal.ir.operators import is_inplace, overwrites

__all__ = ["assign_stages"]


def assign_stages(gm: fx.GraphModule, *, stages: Sequence[StageBoundary]) -> None:
    """Note for each node the index of its stage; ``stages`` is where they meet, in order.

    Raises:
        PlanError: if there is no node at which one begins, or a stage changes in place what an
            earlier one made and a later one takes too.
    """
    starts = {node_named(gm, one.start): one.stage + 1 for one in stages}
    stage, found = 0, dict[fx.Node, int]()
    for node in gm.graph.nodes:
        stage = found[node] = starts.get(node, stage)
    for one in stages:
        if one.learns:
            _refuse_overwritten(gm, found, one.stage)
    for node, stage in found.items():
        node.meta[STAGE] = stage


def _refuse_overwritten(gm: fx.GraphModule, found: Mapping[fx.Node, int], stage: int) -> None:
    """Refuse a stage whose change in place would reach others by way of what is cut."""
    older = [n for n, k in found.items() if n.op == "placeholder" or k < stage]
    taken = [
        value
        for value in older
        if value.op != "get_attr" and any(found[user] > stage for user in value.users)
    ]
    changes = [n for n, k in found.items() if k == stage and is_inplace(gm, n)]
    for node, value in product(changes, taken):
        if overwrites(gm, node, value):
            raise PlanError(
                f"stage {stage} changes {value.name!r} in place ({node.name!r}), which was made "
                "before it and is used behind it too: make that operation one that is not in "
                "place, or split elsewhere"
            )

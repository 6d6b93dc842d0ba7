"""Say of each node which stage it lies in; nothing is inserted.

    %x = placeholder x                   stage 0:
    %conv = call_module conv(%x)         %x = placeholder x
    %fc = call_module fc(%conv)    ->    %conv = call_module conv(%x)
                                         stage 1:
                                         %fc = call_module fc(%conv)

Stages are local modules, or what activation checkpointing computes again. The index is kept in
``node.meta["fxlocal_stage"]``; later rewrites go by it. Forward-exact.
"""

from collections.abc import Sequence

from torch import fx

from fxlocal.facts import StageBoundary
from fxlocal.ir.nodes import STAGE, node_named

__all__ = ["assign_stages"]


def assign_stages(gm: fx.GraphModule, *, stages: Sequence[StageBoundary]) -> None:
    """Note for each node the index of its stage.

    Args:
        gm: the graph; its nodes get a tag.
        stages: where stages meet, in execution order.

    Raises:
        PlanError: if there is no node at which one begins.
    """
    starts = {node_named(gm, one.start): one.stage + 1 for one in stages}
    stage = 0
    for node in gm.graph.nodes:
        stage = starts.get(node, stage)
        node.meta[STAGE] = stage

"""Run everything before a boundary under ``torch.no_grad``, so that it keeps no activations.

    %conv = call_module conv(%x)                     with torch.no_grad():
    %detach = call_method detach(%conv)        ->        %conv = call_module conv(%x)
    %fc = call_module fc(%detach)                        %detach = call_method detach(%conv)
                                                     %fc = call_module fc(%detach)

The cuts already stop the gradient; this pass only saves the memory and the time of recording.
The region is a tag on its nodes, outside any context of the model's own; see `fxlocal.ir.nodes`.
Forward-exact.
"""

from torch import fx

from fxlocal.ir.boundary import nodes_before
from fxlocal.ir.contexts import NO_GRAD, contexts
from fxlocal.ir.nodes import computations

__all__ = ["insert_no_grad"]


def insert_no_grad(gm: fx.GraphModule, *, start: str) -> None:
    """Tag each computation before the node named ``start`` to run without recording.

    Raises:
        PlanError: if there is no such node.
    """
    before = nodes_before(gm, start)
    for node in computations(gm.graph):
        if node in before:
            node.meta["fxlocal_contexts"] = (NO_GRAD, *contexts(node))

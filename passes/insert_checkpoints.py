"""Keep nothing of a stage but what crosses its borders; the backward computes it again.

    stage 0:                                         stage 0:
    %x = placeholder x                               %x = placeholder x
    %conv = call_module conv(%x)                     stage 0, computed again in backward:
    %relu = call_module relu(%conv)            ->    %conv = call_module conv(%x)
    stage 1:                                         %relu = call_module relu(%conv)
    %fc = call_module fc(%relu)                      stage 1:
                                                     %fc = call_module fc(%relu)

A stage is a tag on its nodes, from which the code generator makes a function that is called
through `torch.utils.checkpoint`; see `fxlocal.ir.codegen`. The last stage has none: its backward
follows its forward at once. Nor has what lies before the boundary of a local prefix: it keeps
nothing, and its updates must run once. Forward-exact, and exact in gradients, buffers and random
numbers (Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016).

Cost: a second forward of all stages but the last. What a stage overwrites of what it takes is
cloned, so that both forwards find it unchanged; if later stages take it too, `assign_stages` has
refused it. Of two values that share memory and are overwritten at once there is no such clone.
"""

from collections.abc import Sequence

from torch import fx, nn

from fxlocal.errors import PlanError
from fxlocal.ir.edit import insert_each
from fxlocal.ir.network import Network
from fxlocal.ir.nodes import CHECKPOINT, STAGE, Origin, module_of, node_named
from fxlocal.ir.operators import is_inplace, operator_name, overwrites, overwrites_shared
from fxlocal.ops.values import clone_all

__all__ = ["insert_checkpoints"]


def insert_checkpoints(gm: Network, *, start: str | None = None) -> None:
    """Tag the back-propagated nodes of each stage but the last to be computed again in backward.

    Each node knows its stage; ``start`` names the first one that is back-propagated, if not all.

    Raises:
        PlanError: if there is no such node, a stage changes in place two values that it takes, or
            has rrelu.
    """
    last = max(node.meta[STAGE] for node in gm.graph.nodes)
    stages = _stages(gm, start)
    if not stages.keys() - {last}:
        return
    for stage, nodes in stages.items():
        if stage != last and (drawn := [n for n in nodes if _fills_noise(gm, n)]):
            raise PlanError(
                f"stage {stage} has {drawn[0].name!r}: rrelu saves its noise before it draws it, "
                "and torch ends the second forward at what it saves last. Leave it out of the "
                "stages, or take leaky_relu"
            )
        clones = _insert_clones(gm, stage, nodes)
        for node in [*clones, *nodes] if stage != last else ():
            node.meta[CHECKPOINT] = stage


def _fills_noise(gm: Network, node: fx.Node) -> bool:
    return operator_name(node) in ("rrelu", "rrelu_") or isinstance(module_of(gm, node), nn.RReLU)


def _stages(gm: Network, start: str | None) -> dict[int, list[fx.Node]]:
    """Return the nodes of each stage that are back-propagated, attributes they fetch included."""
    first = None if start is None else node_named(gm, start)
    stages: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node is first:
            stages.clear()
        if node.op not in ("placeholder", "output"):
            stages.setdefault(node.meta[STAGE], []).append(node)
    return stages


def _insert_clones(gm: Network, stage: int, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Let a stage overwrite clones in the place of what it takes; return them."""
    inside, clones = set(nodes), list[fx.Node]()
    changes = [node for node in nodes if is_inplace(gm, node)]
    taken = dict.fromkeys(value for node in nodes for value in node.all_input_nodes)
    # An attribute is state of the model's.
    taken = dict.fromkeys(v for v in taken if v not in inside and v.op != "get_attr")
    if found := overwrites_shared(gm, changes, taken):
        node, (one, other, *_) = found
        raise PlanError(
            f"stage {stage} takes {one.name!r} and {other.name!r}, which share memory, and changes "
            f"both in place ({node.name!r}): make that operation one that is not in place, or "
            "split elsewhere"
        )
    for value in taken if changes else ():
        if any(overwrites(gm, node, value) for node in changes):
            origin = Origin("insert_checkpoints", f"stage {stage}")
            clone = insert_each(gm, nodes[0], ("clone", clone_all), value, origin)
            clone.meta[STAGE] = stage
            value.replace_all_uses_with(clone, delete_user_cb=inside.__contains__)
            clones.append(clone)
    return clones

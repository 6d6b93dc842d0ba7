"""Find what each layer costs: FLOPs, bytes kept for backward, parameters.

Read from one run on fake tensors (shapes without data): the kept bytes are counted where autograd
itself saves a tensor, each storage once, parameters, buffers and inputs excluded.

Each node belongs to the layer whose stretch it lies in: from the layer (or its block's start) to
the next one's. A node keeps something with the boundary at layer k if a parameter of layer k or
later lies on a path to it; a storage therefore counts at the last layer for which that holds of
any node that keeps it, and the bytes kept with the boundary at k are the sum from k on.
"""

from collections.abc import Sequence

from torch import fx

from fxlocal.facts import Block, Cost, Layer
from fxlocal.ir.fakes import FakeRun
from fxlocal.ir.nodes import parameter_uses

__all__ = ["find_costs"]


def find_costs(
    gm: fx.GraphModule, run: FakeRun, *, layers: Sequence[Layer], blocks: Sequence[Block]
) -> tuple[Cost, ...]:
    """Return one `Cost` per layer of the unrewritten graph; ``run`` is of it on fake tensors."""
    owner = _owners(gm, layers, blocks)
    flops, saved = [0] * len(layers), [0] * len(layers)
    for name, node_flops in run.flops.items():
        flops[owner[name]] += node_flops
    reach = _reach(gm, owner)
    last: dict[int, tuple[int, int]] = {}
    for name, storages in run.saved.items():
        for storage, num_bytes in storages.items():
            last[storage] = (max(reach[name], last.get(storage, (0, 0))[0]), num_bytes)
    for layer, num_bytes in last.values():
        saved[layer] += num_bytes
    parameters = _parameters(gm, owner, len(layers))
    return tuple(Cost(*values) for values in zip(flops, saved, parameters, strict=True))


def _owners(gm: fx.GraphModule, layers: Sequence[Layer], blocks: Sequence[Block]) -> dict[str, int]:
    """Return, for each node's name, the index of the layer whose stretch it lies in."""
    starts = {layer.node: layer.index for layer in layers}
    for block in blocks:
        starts.pop(layers[block.layers[0]].node, None)
        starts[block.start] = block.layers[0]
    owner, current = {}, 0
    for node in gm.graph.nodes:
        current = max(current, starts.get(node.name, 0))
        owner[node.name] = current
    return owner


def _reach(gm: fx.GraphModule, owner: dict[str, int]) -> dict[str, int]:
    """Return, by node name, the last layer of which a parameter lies on a path to the node."""
    reach = {node.name: 0 for node in gm.graph.nodes}
    for node, _, _ in parameter_uses(gm):
        reach[node.name] = owner[node.name]
    for node in gm.graph.nodes:
        inputs = (reach[n.name] for n in node.all_input_nodes)
        reach[node.name] = max([reach[node.name], *inputs])
    return reach


def _parameters(gm: fx.GraphModule, owner: dict[str, int], num_layers: int) -> list[int]:
    counts, seen = [0] * num_layers, set()
    for node, _, parameter in parameter_uses(gm):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            counts[owner[node.name]] += parameter.numel()
    return counts

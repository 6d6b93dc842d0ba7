"""Find what each layer costs: FLOPs, bytes kept for backward, parameters; and what shapes it meets.

Read from one run on fake tensors (shapes without data): the kept bytes are counted where autograd
itself saves a tensor, each storage once, parameters, buffers and inputs excluded.

Each node belongs to the layer whose stretch it lies in: from the layer (or its block's start) to
the next one's. A node keeps something with the boundary at layer k if a parameter of layer k or
later lies on a path to it; a storage therefore counts at the last layer for which that holds of
any node that keeps it, and the bytes kept with the boundary at k are the sum from k on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxlocal.facts import Block, Cost, Layer, Shapes, TensorSpec
from fxlocal.ir.fakes import FakeRun
from fxlocal.ir.nodes import (
    last_on_path,
    module_of,
    nodes_by_name,
    parameter_uses,
    stretches,
    sums_of,
)
from fxlocal.ir.operators import is_product, layer_arguments

__all__ = ["find_costs", "find_shapes"]


def find_costs(
    gm: fx.GraphModule, run: FakeRun, *, layers: Sequence[Layer], blocks: Sequence[Block]
) -> tuple[Cost, ...]:
    """Return one `Cost` per layer of the unrewritten graph; ``run`` is of it on fake tensors."""
    owner = _owners(gm, layers, blocks)
    flops, saved = [0] * len(layers), [0] * len(layers)
    for name, node_flops in run.flops.items():
        flops[owner[name]] += node_flops
    uses = list(parameter_uses(gm))
    reach = last_on_path(gm, uses, owner)
    last: dict[int, tuple[int, int]] = {}
    for name, storages in run.saved.items():
        for storage, num_bytes in storages.items():
            last[storage] = (max(reach[name], last.get(storage, (0, 0))[0]), num_bytes)
    for layer, num_bytes in last.values():
        saved[layer] += num_bytes
    parameters = sums_of(uses, owner, len(layers), Tensor.numel)
    return tuple(Cost(*values) for values in zip(flops, saved, parameters, strict=True))


def _owners(gm: fx.GraphModule, layers: Sequence[Layer], blocks: Sequence[Block]) -> dict[str, int]:
    """Return, for each node's name, the index of the layer whose stretch it lies in."""
    starts = {layer.node: layer.index for layer in layers}
    for block in blocks:
        starts.pop(layers[block.layers[0]].node, None)
        starts[block.start] = block.layers[0]
    return stretches(gm.graph, starts)


def find_shapes(gm: fx.GraphModule, run: FakeRun, *, layers: Sequence[Layer]) -> tuple[Shapes, ...]:
    """Return one `Shapes` per layer of the unrewritten graph; ``run`` is of it on fake tensors."""
    nodes = nodes_by_name(gm.graph)
    return tuple(_shapes(gm, nodes[layer.node], layer, run.values) for layer in layers)


def _shapes(gm: fx.GraphModule, node: fx.Node, layer: Layer, values: Mapping[str, Any]) -> Shapes:
    args = layer_arguments(node)
    pre: TensorSpec = values[args["input"].name]
    post: TensorSpec = values[node.name]
    module = module_of(gm, node)
    weight = values[args["weight"].name].shape if module is None else _weight_shape(module)
    if module is None and is_product(node):
        weight = weight[::-1]
    last = layer.kind == "linear" or pre.stride[1] == 1
    return Shapes(pre.shape, post.shape, weight, post.dtype, post.device, channels_last=last)


def _weight_shape(module: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight, which is not computed for it: that may move state."""
    if not parametrize.is_parametrized(module, "weight"):
        return tuple(module.weight.shape)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    channels = [module.out_channels, module.in_channels]
    channels = channels[::-1] if module.transposed else channels
    return (channels[0], channels[1] // module.groups, *module.kernel_size)

"""Find what enters each block and leaves the last one, and its shape.

    layer1.0: conv1 bn1 relu   |  %relu: (16, 64, 32, 32)  |   layer1.1: conv1 ...

Of several values that cross a block's edge it is the newest.
"""

from collections.abc import Iterator, Sequence

from torch import fx

from fxlocal.facts import Block, BlockInput, Layer, TensorSpec
from fxlocal.ir.fakes import FakeRun
from fxlocal.ir.nodes import nodes_by_name

__all__ = ["find_block_inputs"]


def find_block_inputs(
    gm: fx.GraphModule, run: FakeRun, *, blocks: Sequence[Block], layers: Sequence[Layer]
) -> tuple[BlockInput, ...]:
    """Return one `BlockInput` per block, for what enters it, and one for the model's output.

    ``gm`` is the unrewritten graph of the source, ``run`` a run of it on fake tensors.
    """
    values = list(_values(gm, blocks))
    tensors = {n: v.shape for n, v in run.values.items() if isinstance(v, TensorSpec)}
    inputs = gm.graph.find_nodes(op="placeholder")
    values[0] = next((node for node in inputs if node.name in tensors), values[0])
    kinds = [layers[block.layers[0] - 1].kind for block in blocks[1:]] + [layers[-1].kind]
    edges = [BlockInput(values[0].name, tensors.get(values[0].name))]
    for value, kind in zip(values[1:], kinds, strict=True):
        while value.name not in tensors and value is not values[-1]:
            if len(value.all_input_nodes) != 1:
                break
            value = value.all_input_nodes[0]  # what is split into the parts that cross
        shape = tensors.get(value.name)
        last = len(shape) - 1 if kind == "linear" and shape else 1
        edges.append(BlockInput(value.name, shape, last))
    return tuple(edges)


def _values(gm: fx.GraphModule, blocks: Sequence[Block]) -> Iterator[fx.Node]:
    named = nodes_by_name(gm.graph)
    first = next(node for node in gm.graph.nodes if node.op == "placeholder")
    for block in blocks:
        yield named[block.values[-1]] if block.values else first
    result = gm.graph.output_node().args[0]
    yield result if isinstance(result, fx.Node) else gm.graph.output_node()

"""Find what enters each block and leaves the last one, and its shape.

    layer1.0: conv1 bn1 relu   |  %relu: (16, 64, 32, 32)  |   layer1.1: conv1 ...

Of the values that cross a block's edge it is the one that the block uses first; long-range skips
are used later.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import fx

from fxlocal.facts import Block, BlockInput, Layer, TensorSpec
from fxlocal.ir.boundary import fixed_values
from fxlocal.ir.fakes import FakeRun
from fxlocal.ir.nodes import positions
from fxlocal.ir.operators import is_plain

__all__ = ["find_block_inputs"]


def find_block_inputs(
    gm: fx.GraphModule, run: FakeRun, *, blocks: Sequence[Block], layers: Sequence[Layer]
) -> tuple[BlockInput, ...]:
    """Return one `BlockInput` per block, for what enters it, and one for the model's output.

    ``gm`` is the unrewritten graph of the source, ``run`` a run of it on fake tensors.
    """
    values = list(_values(gm, blocks))
    tensors = {n: v.shape for n, v in run.values.items() if isinstance(v, TensorSpec)}
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
    order, fixed = positions(gm.graph), fixed_values(gm)
    starts = {block.start for block in blocks[1:]}
    yield next(node for node in gm.graph.nodes if node.op == "placeholder")
    live: list[fx.Node] = []
    for node, position in order.items():
        if node.name in starts:
            live = [value for value in live if max(map(order.__getitem__, value.users)) >= position]
            yield min(reversed(live), key=partial(_next_use, order, position))
        inner = node.op not in ("placeholder", "get_attr") and node not in fixed
        if node.users and inner and not is_plain(node):
            live.append(node)
    result = gm.graph.output_node().args[0]
    yield result if isinstance(result, fx.Node) else gm.graph.output_node()


def _next_use(order: dict[fx.Node, int], position: int, value: fx.Node) -> int:
    return min(order[user] for user in value.users if order[user] >= position)

"""Find what enters each block and leaves the last one, and its shape.

    layer1.0: conv1 bn1 relu   |  %relu: (16, 64, 32, 32)  |   layer1.1: conv1 ...

Of several values that cross a block's edge it is the newest. What leaves a model in a container or
an object is found by name or index, but not what lies deeper, or what a leaf module returns.

    return ImageOutput(loss=%loss, logits=%linear)   ->   "loss": (), "logits": (16, 10)
"""

from collections.abc import Iterator, Sequence

from torch import fx

from fxlocal.facts import Block, BlockInput, Layer, TensorSpec
from fxlocal.ir.fakes import FakeRun
from fxlocal.ir.nodes import nodes_by_name, parts_of

__all__ = ["find_block_inputs", "find_outputs"]


def find_block_inputs(
    gm: fx.GraphModule, run: FakeRun, *, blocks: Sequence[Block], layers: Sequence[Layer]
) -> tuple[BlockInput, ...]:
    """Return one `BlockInput` per block, for what enters it, and one for the model's output.

    ``gm`` is the unrewritten graph of the source, ``run`` a run of it on fake tensors.
    """
    values = list(_values(gm, blocks))
    tensors = {n: v for n, v in run.values.items() if isinstance(v, TensorSpec)}
    inputs = gm.graph.find_nodes(op="placeholder")
    values[0] = next((node for node in inputs if node.name in tensors), values[0])
    kinds = [layers[block.layers[0] - 1].kind for block in blocks[1:]] + [layers[-1].kind]
    edges = [_edge(values[0], tensors.get(values[0].name), False)]
    for value, kind in zip(values[1:], kinds, strict=True):
        while value.name not in tensors and value is not values[-1]:
            if len(value.all_input_nodes) != 1:
                break
            value = value.all_input_nodes[0]  # what is split into the parts that cross
        edges.append(_edge(value, tensors.get(value.name), kind == "linear"))
    return tuple(edges)


def find_outputs(
    gm: fx.GraphModule, run: FakeRun, *, layers: Sequence[Layer]
) -> dict[str | int, BlockInput]:
    """Return each tensor that the model returns; none if it returns one tensor alone.

    ``gm`` is the unrewritten graph of the source, ``run`` a run of it on fake tensors.
    """
    found: dict[str | int, BlockInput] = {}
    for name, part in parts_of(gm.graph.output_node().args[0]).items():
        value = run.values.get(part.name) if isinstance(part, fx.Node) else None
        if isinstance(part, fx.Node) and isinstance(value, TensorSpec):
            found[name] = _edge(part, value, layers[-1].kind == "linear")
    return found


def _edge(node: fx.Node, tensor: TensorSpec | None, is_linear: bool) -> BlockInput:
    """Return what ``node`` makes, behind a layer that is linear or none."""
    if tensor is None:
        return BlockInput(node.name, None)
    last = len(tensor.shape) - 1 if is_linear and tensor.shape else 1
    return BlockInput(node.name, tensor.shape, last, tensor.dtype)


def _values(gm: fx.GraphModule, blocks: Sequence[Block]) -> Iterator[fx.Node]:
    named = nodes_by_name(gm.graph)
    first = next(node for node in gm.graph.nodes if node.op == "placeholder")
    for block in blocks:
        yield named[block.values[-1]] if block.values else first
    result = gm.graph.output_node().args[0]
    yield result if isinstance(result, fx.Node) else gm.graph.output_node()

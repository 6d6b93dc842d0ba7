"""Find what shapes each layer meets.

%conv1: call_module conv1(%x)    ->    Shapes(pre=(128, 3, 32, 32), post=(128, 16, 32, 32), ...)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from fxlocal.facts import Layer, Shapes, TensorSpec
from fxlocal.ir.fakes import FakeRun
from fxlocal.ir.nodes import module_of, nodes_by_name
from fxlocal.ir.operators import is_product, layer_arguments

__all__ = ["find_shapes"]


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

"""Replace the weight gradient of layers: zero, random, or of the largest errors alone.

    %conv = call_module conv(%x)     ->    %conv_weight = get_attr conv.weight
                                           %conv_bias = get_attr conv.bias
                                           %conv = call_function fxlocal.conv_topk(%x, %conv_weight,
                                                       %conv_bias, ..., k=1, scale=1.0)

Rule: an operator of `fxlocal.ops.weight_grads` takes the layer's place and keeps its node's name.
Forward-exact, and so are the gradients of input and bias. `Full` changes nothing; ``Zero`` and
``Random`` apply to every layer, ``TopK`` to all but transposed convolutions and products of rows
that the forward flattened. A layer that is named
in ``exact`` keeps its own gradient. Cost: less than the layer's weight gradient.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxlocal.errors import PlanError
from fxlocal.facts import ConvGeometry, Layer, Shapes, map_size
from fxlocal.ir.contexts import contexts
from fxlocal.ir.edit import insert_before
from fxlocal.ir.nodes import Origin, hooks_of, module_of, nodes_by_name
from fxlocal.ir.operators import (
    arguments_of,
    is_product,
    layer_arguments,
    operator_name,
    weight_parameters,
)
from fxlocal.ops.weight_grads import OPERATORS
from fxlocal.plan import Full, TopK, WeightGrad

__all__ = ["approximate_weight_grads", "check_weight_grads"]

PASS = "approximate_weight_grads"

_NAMES = ("input", "weight", "bias")  # of a call; of a module's, its input alone is sure

_RESHAPES = {"view", "reshape", "flatten", "_unsafe_view", "unflatten"}
_FORWARDS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward}
_FORWARDS |= {nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward}


def approximate_weight_grads(
    gm: fx.GraphModule,
    *,
    approximations: Sequence[tuple[Layer, WeightGrad]],
    shapes: Sequence[Shapes] | None,
    exact: Mapping[str, str],
) -> None:
    """Give each layer the operator of its method.

    Args:
        gm: the graph, edited in place.
        approximations: layers and their methods.
        shapes: of all layers of the model, if known.
        exact: paths of layers that keep their exact gradient, and why.

    Raises:
        PlanError: for a method that a layer's kind has none of, a complex weight, or a k larger
            than the layer's map.
    """
    check_weight_grads(gm, approximations=approximations, shapes=shapes)
    nodes = nodes_by_name(gm.graph)
    for layer, method in approximations:
        if not isinstance(method, Full) and layer.path not in exact:
            _replace(gm, nodes[layer.node], layer, method)


def check_weight_grads(
    gm: fx.GraphModule,
    *,
    approximations: Sequence[tuple[Layer, WeightGrad]],
    shapes: Sequence[Shapes] | None,
) -> None:
    """Raise the PlanError of `approximate_weight_grads`, if there is one; nothing is edited."""
    nodes = nodes_by_name(gm.graph) if approximations else {}
    for layer, method in approximations:
        if not isinstance(method, Full):
            _refuse_complex(gm, nodes[layer.node], layer, method)
            if (module := module_of(gm, nodes[layer.node])) is not None:
                _refuse_special(module, nodes[layer.node], layer, method)
            if isinstance(method, TopK):
                _refuse_flattened(nodes[layer.node], layer, method)
                _refuse_unfit(layer, method, shapes)


def _refuse_complex(gm: fx.GraphModule, node: fx.Node, layer: Layer, method: WeightGrad) -> None:
    if any(p.is_complex() for p in weight_parameters(gm, layer, node)):
        raise PlanError(
            f"layer {layer.path!r} has a complex weight, and the operators of weight gradients are "
            f"for real ones: {method} cannot take its place. Leave it out"
        )


def _refuse_flattened(node: fx.Node, layer: Layer, method: TopK) -> None:
    if not is_product(node):
        return
    pre = layer_arguments(node)["input"]
    if operator_name(pre) in _RESHAPES and any(operator_name(u) in _RESHAPES for u in node.users):
        raise PlanError(
            f"layer {layer.path!r} multiplies rows that the forward flattens from a map and puts "
            f"back (as transformers' Conv1D does), so that it is not known which belong to one "
            f"sample: there is no {method} for it. Give Zero(), Random() or Full()"
        )


def _refuse_unfit(layer: Layer, method: TopK, shapes: Sequence[Shapes] | None) -> None:
    if layer.geometry is not None and layer.geometry.transposed:
        raise PlanError(
            f"layer {layer.path!r} is a transposed convolution, for which there is no {method}: "
            "give Zero(), Random() or Full()"
        )
    if shapes is None:
        return
    size = map_size(layer, shapes[layer.index])
    if method.k > math.prod(size):
        raise PlanError(
            f"{method} for layer {layer.path!r}, whose map of {size} has {math.prod(size)} "
            "positions: make k smaller, or give Full()"
        )


def _refuse_special(module: nn.Module, node: fx.Node, layer: Layer, method: WeightGrad) -> None:
    """Refuse a module that does more than its operator would."""
    if layer.weight is None:
        reason = "computes its weight (a parametrisation)"
    elif any(hooks_of(module).values()):
        reason = "has hooks, which would not run"
    elif type(module).forward not in _FORWARDS:
        reason = f"is a {type(module).__name__} with a forward of its own"
    elif len(arguments_of(node, _NAMES)) > 1:
        reason = "is called with an output size"
    else:
        return
    raise PlanError(f"layer {layer.path!r} {reason}: {method} cannot take its place. Leave it out")


def _replace(gm: fx.GraphModule, node: fx.Node, layer: Layer, method: WeightGrad) -> None:
    """Turn the layer's node into a call of the method's operator."""
    origin = Origin(PASS, layer.path)
    arguments = layer_arguments(node)
    pre, weight, bias = arguments["input"], arguments.get("weight"), arguments.get("bias")
    module = module_of(gm, node)
    if module is not None:
        weight = _insert_fetch(node, "weight", origin)
        bias = None if module.bias is None else _insert_fetch(node, "bias", origin)
    elif is_product(node):
        weight = insert_before(node, "call_method", "t", (weight,), origin)
        weight.meta["fxlocal_contexts"] = contexts(node)
    geometry = layer.geometry
    if geometry is not None and geometry.pad_input:
        padding = (pre, geometry.pad_input, geometry.pad_mode)
        pre = insert_before(node, "call_function", F.pad, padding, origin)
        pre.meta["fxlocal_contexts"] = contexts(node)
    # In place: the cuts of other passes are known by the names of nodes.
    node.op = "call_function"
    node.target = OPERATORS[layer.kind, type(method).__name__.lower()]
    node.args = (pre, weight, bias, *_sliding(geometry))
    node.kwargs = {name: value for name, value in vars(method).items() if name != "force"}
    node.meta["fxlocal"] = origin


def _insert_fetch(node: fx.Node, name: str, origin: Origin) -> fx.Node:
    target = f"{node.target}.{name}"
    return insert_before(node, "get_attr", target, (), origin, f"{node.name}_{name}")


def _sliding(geometry: ConvGeometry | None) -> tuple[Any, ...]:
    """Return what an operator of a convolution takes after the bias; nothing for a linear layer."""
    if geometry is None:
        return ()
    stride, padding, dilation = map(list, (geometry.stride, geometry.padding, geometry.dilation))
    output_padding = list(geometry.output_padding) or [0] * len(padding)
    return stride, padding, dilation, geometry.transposed, output_padding, geometry.groups

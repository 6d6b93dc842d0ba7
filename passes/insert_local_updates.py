"""Give each layer before a boundary its local update, in the forward.

                                      %rate = get_attr fxlocal.rate
    %conv1 = call_module conv1(%x)    %conv1 = call_module conv1(%x)
                                ->    %w = get_attr conv1.weight
                                      %d = call_function fxlocal.conv_delta(%x, %conv1, %w, ...)
                                      %u = call_function fxlocal.normalised_add_(%w, %d, %rate)

Rule (LoCal+SGD, Figure 1 and section 3.7): ``delta = dW(pre, post)``, ``W += rate * delta /
||delta||`` with ``pre`` the layer's input and ``post`` its output before norm and activation.
Where the layer feeds a residual add, through norms and dropout only, post is the add's result;
where its input is a concat with a long-range skip, post is the output plus the skip, if their
shapes agree. An add beyond the boundary is not used: post is then the layer's output.

A layer called more than once gets the sum of its deltas, applied after its last call, so that no
forward sees a half-updated weight. A weight that the user froze (``requires_grad=False``) stays.
Forward-exact: the output of this step is the source's. Cost: one weight-gradient product a layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlocal.errors import PlanError
from fxlocal.facts import Layer, SkipEdge
from fxlocal.graph import (
    Origin,
    insert_after,
    insert_before,
    is_inplace,
    module_of,
    node_named,
    positions,
)
from fxlocal.network import Network
from fxlocal.ops.values import add_where_shapes_agree

__all__ = ["RATE", "insert_local_updates"]

RATE = "rate"  # the name of the 0-dim tensor that holds the rate
PASS = "insert_local_updates"


def insert_local_updates(
    gm: Network,
    *,
    start: str,
    layers: Sequence[Layer],
    skips: Sequence[SkipEdge],
    rate: float,
) -> None:
    """Insert the delta and the update of each of ``layers``.

    Args:
        gm: the graph, edited in place.
        start: name of the first node after the boundary; no post lies at or after it.
        layers: the layers that learn locally, all before ``start``, in execution order.
        skips: the graph's skip edges.
        rate: the rule's rate; kept in the 0-dim tensor ``gm.additions["rate"]``, so that a change
            of rate changes no code.

    Raises:
        PlanError: for a layer whose weight is computed (a parametrisation), not a parameter.
    """
    _refuse_computed(layers)
    order = positions(gm.graph)
    boundary = order[node_named(gm, start)]
    trainable = {name for name, p in gm.named_parameters(remove_duplicate=False) if p.requires_grad}
    deltas: dict[str, list[tuple[Layer, fx.Node]]] = {}
    for layer in layers:
        if layer.weight in trainable:
            delta = _insert_delta(gm, layer, skips, order, boundary)
            deltas.setdefault(str(layer.weight), []).append((layer, delta))
    if deltas:
        rate_node = _insert_rate(gm, rate, next(iter(deltas)), layers[0])
        for weight, parts in deltas.items():
            _insert_update(weight, parts, rate_node)


def _insert_rate(gm: Network, rate: float, weight: str, first: Layer) -> fx.Node:
    """Insert the fetch of the rate, on the device of ``weight``, before the first layer."""
    target = gm.add_tensor(RATE, torch.tensor(float(rate), device=gm.get_parameter(weight).device))
    origin = Origin(PASS, first.path)
    return insert_before(node_named(gm, first.node), "get_attr", target, (), origin, RATE)


def _refuse_computed(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if layer.weight is None:
            raise PlanError(
                f"layer {layer.path!r} computes its weight (a parametrisation or an expression): "
                "a local update would have nothing to move. Put the boundary before it, or use "
                "Freeze()"
            )


def _insert_delta(
    gm: fx.GraphModule,
    layer: Layer,
    skips: Sequence[SkipEdge],
    order: dict[fx.Node, int],
    boundary: int,
) -> fx.Node:
    """Insert the nodes that compute one layer's delta, after its post; return the delta."""
    node, origin = node_named(gm, layer.node), Origin(PASS, layer.path)
    pre = node_named(gm, layer.pre)
    at = post = _residual_sum(gm, node, skips, order, boundary) or node
    if _overwritten(gm, pre, order, order[node], order[post]):
        pre = insert_after(node, "call_method", "clone", (pre,), origin)
    if post is node and (skip := _concat_skip(gm, pre, skips)) is not None:
        at = post = insert_after(at, "call_function", add_where_shapes_agree, (post, skip), origin)
    geometry, name = layer.geometry, f"{layer.node}_delta"
    if geometry is None:
        linear = torch.ops.fxlocal.linear_delta.default
        return insert_after(at, "call_function", linear, (pre, post), origin, name)
    if geometry.pad_input:
        padding = (pre, geometry.pad_input, geometry.pad_mode)
        at = pre = insert_after(at, "call_function", F.pad, padding, origin)
    weight = f"{layer.node}_weight"
    at = weight_node = insert_after(at, "get_attr", str(layer.weight), (), origin, weight)
    args = (
        *(pre, post, weight_node, geometry.stride, geometry.padding, geometry.dilation),
        *(geometry.transposed, geometry.output_padding, geometry.groups),
    )
    conv = torch.ops.fxlocal.conv_delta.default
    return insert_after(at, "call_function", conv, args, origin, name)


def _insert_update(weight: str, parts: list[tuple[Layer, fx.Node]], rate: fx.Node) -> None:
    """Insert, after the last of its deltas, their sum and its application to ``weight``."""
    layer, at = parts[-1]
    origin = Origin(PASS, layer.path)
    total = parts[0][1]
    for _, delta in parts[1:]:
        at = total = insert_after(at, "call_function", torch.add, (total, delta), origin)
    update = torch.ops.fxlocal.normalised_add_.default
    fetched = [node for node in total.all_input_nodes if node.target == weight]
    if not fetched:
        fetched = [insert_after(at, "get_attr", weight, (), origin, f"{layer.node}_weight")]
        at = fetched[0]
    args = (fetched[0], total, rate)
    insert_after(at, "call_function", update, args, origin, f"{layer.node}_update")


_NORMS = (
    *(nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
_NORM_CALLS = {
    *("batch_norm", "group_norm", "layer_norm", "instance_norm", "dropout", "stochastic_depth"),
    *("batch_norm.default", "group_norm.default", "layer_norm.default", "dropout.default"),
}


def _residual_sum(
    gm: fx.GraphModule,
    node: fx.Node,
    skips: Sequence[SkipEdge],
    order: dict[fx.Node, int],
    boundary: int,
) -> fx.Node | None:
    """Return the residual add that ``node`` feeds through norms and dropout only, if any."""
    sums = {edge.target for edge in skips if edge.kind == "residual"}
    value = node
    while len(value.users) == 1:
        value = next(iter(value.users))
        if order.get(value, boundary) >= boundary:
            return None
        if value.name in sums:
            return value
        name = getattr(value.target, "__name__", "")
        if not (isinstance(module_of(gm, value), _NORMS) or name in _NORM_CALLS):
            return None
    return None


def _concat_skip(gm: fx.GraphModule, pre: fx.Node, skips: Sequence[SkipEdge]) -> fx.Node | None:
    """Return the long-range skip that ``pre``, if it is a concat, brings in."""
    for edge in skips:
        if edge.target == pre.name and edge.kind == "concat" and edge.long_range:
            return node_named(gm, edge.operand)
    return None


def _overwritten(
    gm: fx.GraphModule, pre: fx.Node, order: dict[fx.Node, int], first: int, last: int
) -> bool:
    """Tell whether a node between two positions overwrites ``pre`` in place."""
    return any(
        first < order.get(user, -1) <= last and is_inplace(gm, user) and user.args[0] is pre
        for user in pre.users
    )

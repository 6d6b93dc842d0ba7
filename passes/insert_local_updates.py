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

`Oja` inserts ``conv_oja_delta`` and ``linear_oja_delta``, `Custom` the user's function, which is
tried on small tensors of each layer first; with it each update counts, in ``fxlocal.skipped``, the
deltas that were not finite.

Where the weight is computed, `Hebbian.computed` moves what it is computed from instead::

    %s = call_function fxlocal.normalised_step(%weight, %d, %rate)
    %p = call_function pull_back(%s, %w, %mask)        # (dW / dw)^T s
    %u = call_function fxlocal.add_steps_([%w], %p)

A weight used more than once gets the sum of its layers' deltas, applied after its last use, so
that the forward never sees it moved. A weight that the user froze (``requires_grad=False``) stays,
and so does one that is made of no parameter, as a blur's filter.
Forward-exact: the output of this step is the source's. Cost: one weight-gradient product a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlocal.errors import PlanError
from fxlocal.facts import ConvGeometry, Layer, SkipEdge
from fxlocal.ir.additions import ADDITIONS
from fxlocal.ir.computed import Computed, Learned, check_precision, find_computing, find_learned
from fxlocal.ir.edit import insert_after, insert_before
from fxlocal.ir.network import Network
from fxlocal.ir.nodes import Origin, module_of, node_named, nodes_by_name, parameter_uses, positions
from fxlocal.ir.operators import (
    DROPOUT_MODULES,
    DROPOUTS,
    NORMS,
    arguments_of,
    is_product,
    last_changes,
    operator_name,
    overwrites,
)
from fxlocal.ir.source import device_with_data
from fxlocal.ops.computed import bind_pull_back
from fxlocal.ops.custom import DeltaError, bind_delta, for_trial, try_delta
from fxlocal.ops.shards import whole
from fxlocal.ops.values import add_where_shapes_agree, own_rows
from fxlocal.plan import Custom, Hebbian, LearningRule, Oja
from fxlocal.plan.checks import changed

__all__ = ["check_local_updates", "insert_local_updates"]

PASS = "insert_local_updates"

_DELTAS: dict[type, tuple[Any, Any]] = {  # of a convolution, of a linear layer
    Hebbian: (torch.ops.fxlocal.conv_delta.default, torch.ops.fxlocal.linear_delta.default),
    Oja: (torch.ops.fxlocal.conv_oja_delta.default, torch.ops.fxlocal.linear_oja_delta.default),
}


def insert_local_updates(
    gm: Network,
    *,
    start: str,
    layers: Sequence[Layer],
    skips: Sequence[SkipEdge],
    rule: LearningRule,
    rates: Sequence[float] = (),
) -> None:
    """Insert the delta and the update of each of ``layers``.

    Args:
        gm: the graph, edited in place.
        start: name of the first node after the boundary; no post lies at or after it.
        layers: the layers that learn locally, all before ``start``, in execution order.
        skips: the graph's skip edges.
        rule: how they learn; its rate is kept in the 0-dim tensor ``gm.fxlocal.rate``, so
            that a change of rate changes no code.
        rates: one for each layer of the model, those behind the boundary idle, in its place; they
            are kept in the tensor ``gm.fxlocal.rates``.

    Raises:
        PlanError: for a layer whose weight is computed (a parametrisation), not a parameter, unless
            the rule says so and it can be computed again; for one with forward pre-hooks, whose
            input is not the graph's; for a weight so narrow that it would lose the steps; for a
            user's rule that fails, returns no delta of the weight's shape, or changes what it gets.
    """
    weights = check_local_updates(gm, layers=layers, rule=rule)
    check_precision(weights, layers=layers, rule=rule, rates=rates)
    learning = [layer for layer in layers if layer.node in weights]
    if not learning:
        return
    activity = _find_activity(gm, learning, skips, start)
    last_uses = {id(p): node for node, _, p in parameter_uses(gm)}, last_changes(gm)
    deltas: dict[Any, list[tuple[Layer, fx.Node, fx.Node]]] = {}
    first = weights[learning[0].node].value
    device = device_with_data(first)  # as the rate has a value
    state = _insert_state(gm, rule, rates, learning[0], activity[0].node, device)
    for layer, found in zip(learning, activity, strict=True):
        weight = weights[layer.node]
        fetched, delta = _insert_delta(rule, layer, found, weight.computed)
        deltas.setdefault(weight.key, []).append((layer, fetched, delta))
    order = positions(gm.graph)
    for parts in deltas.values():
        weight = weights[parts[0][0].node]
        uses = [of[id(p)] for p in weight.parameters for of in last_uses if id(p) in of]
        # A first call's delta comes last where its post is a sum behind the others.
        at = max(*uses, *(delta for *_, delta in parts), key=order.__getitem__)
        _insert_update(parts, at, rule, state, weight.computed)


def check_local_updates(
    gm: Network, *, layers: Sequence[Layer], rule: LearningRule
) -> dict[str, Learned]:
    """Raise the PlanError of `insert_local_updates` at any rate, if there is one; edit nothing.

    Returns:
        What is learned, by the node of each layer whose weight the user has not frozen.
    """
    if (computing := find_computing(gm, layers)) and not rule.computed:
        raise PlanError(
            f"layer {computing[0].path!r} computes its weight (a parametrisation or an "
            f"expression): a local update would have nothing to move. {type(rule).__name__}(..., "
            "computed=True) moves the parameters that it is computed from; or put the boundary "
            "before it, or use Freeze()"
        )
    weights = find_learned(gm, layers, computing)
    if isinstance(rule, Custom) and (delta := for_trial(rule.delta)) is not None:
        tried = changed(rule, delta=delta)
        for layer in (layer for layer in layers if layer.node in weights):
            try:
                described, geometry = _described(rule, layer), _conv_arguments(layer.geometry)
                value = whole(weights[layer.node].value)
                value = value.t() if layer.transposed else value
                try_delta(_bind(tried, layer), described, value, geometry)
            except DeltaError as error:
                raise PlanError(str(error)) from error.__cause__
    return weights


@dataclass(frozen=True)
class _Activity:
    """Where a layer's pre and post come from, in the graph as it was before any insertion."""

    node: fx.Node
    pre: fx.Node
    post: fx.Node
    pre_is_overwritten: bool  # between the layer and the post
    skip: fx.Node | None  # to be added to the post
    shaped: fx.Node | None  # the output as the post has it, where the layer's own is rows


def _find_activity(
    gm: fx.GraphModule, layers: Sequence[Layer], skips: Sequence[SkipEdge], start: str
) -> list[_Activity]:
    nodes, order = nodes_by_name(gm.graph), positions(gm.graph)
    boundary = order[node_named(gm, start)]
    sums = {edge.target for edge in skips if edge.kind == "residual"}
    long_concats = (edge for edge in skips if edge.kind == "concat" and edge.long_range)
    concats = {edge.target: nodes[edge.operand] for edge in long_concats}
    found = []
    for layer in layers:
        node, pre = nodes[layer.node], nodes[layer.pre]
        shaped = _shaped(node)
        post = _residual_sum(gm, shaped or node, sums, order, boundary) or node
        overwritten = _is_overwritten(gm, pre, node, post)
        skip = concats.get(layer.pre) if post is node else None
        shaped = shaped if post is not node else None
        found.append(_Activity(node, pre, post, overwritten, skip, shaped))
    return found


def _insert_state(
    gm: Network,
    rule: LearningRule,
    rates: Sequence[float],
    first: Layer,
    at: fx.Node,
    device: torch.device,
) -> dict[str, fx.Node]:
    """Insert the fetches of what all updates share, on the device of the first weight."""
    names = ["rates" if rates else "rate"]
    value = torch.tensor(rates or float(rule.rate), dtype=torch.float32, device=device)
    setattr(gm.fxlocal, names[0], value)
    if isinstance(rule, Custom):
        gm.fxlocal.skipped = torch.zeros((), dtype=torch.int64, device=device)
        names.append("skipped")
    origin = Origin(PASS, first.path)
    return {
        name: insert_before(at, "get_attr", f"{ADDITIONS}.{name}", (), origin, name)
        for name in names
    }


def _conv_arguments(geometry: ConvGeometry | None) -> tuple[Any, ...] | None:
    """Return what a delta of a convolution takes beside the three tensors."""
    if geometry is None:
        return None
    sliding = (geometry.stride, geometry.padding, geometry.dilation)
    return (*sliding, geometry.transposed, geometry.groups)


def _bind(rule: Custom, layer: Layer) -> Any:
    return bind_delta(rule.delta, _conv_arguments(layer.geometry), _described(rule, layer))


def _described(rule: Custom, layer: Layer) -> str:
    return f"the rule {rule.name} for layer {layer.path!r}"


def _insert_delta(
    rule: LearningRule, layer: Layer, activity: _Activity, computed: Computed | None
) -> tuple[fx.Node, fx.Node]:
    """Insert the nodes that compute one layer's delta, after its post; return weight and delta."""
    origin, pre = Origin(PASS, layer.path), activity.pre
    args: tuple[Any, ...]
    at = post = activity.post
    if activity.pre_is_overwritten:
        pre = insert_after(activity.node, "call_method", "clone", (pre,), origin)
    if activity.skip is not None:
        args = (post, activity.skip)
        at = post = insert_after(at, "call_function", add_where_shapes_agree, args, origin)
    if activity.shaped is not None:
        args = (post, activity.shaped, activity.node)
        at = post = insert_after(at, "call_function", own_rows, args, origin)
    geometry = layer.geometry
    if geometry is not None and geometry.pad_input:
        padding = (pre, geometry.pad_input, geometry.pad_mode)
        at = pre = insert_after(at, "call_function", F.pad, padding, origin)
    if computed is None:
        name = f"{layer.node}_weight"
        at = weight = insert_after(at, "get_attr", str(layer.weight), (), origin, name)
    elif activity.node.op == "call_module":
        given = _insert_fetches(at, computed, layer)
        name = f"{layer.node}_weight"
        target = computed.compute
        at = weight = insert_after(given[-1], "call_function", target, given, origin, name)
    else:
        weight = arguments_of(activity.node, ("input", "weight"))["weight"]
    fetched = weight
    if layer.transposed:  # deltas are of a weight (outputs, inputs)
        at = weight = insert_after(at, "call_method", "t", (weight,), origin)
    args, others = (pre, post, weight), _conv_arguments(geometry)
    if isinstance(rule, Custom):
        target = _bind(rule, layer)
    else:
        target = _DELTAS[type(rule)][0 if others else 1]
        args += others or ()
    delta = insert_after(at, "call_function", target, args, origin, f"{layer.node}_delta")
    if layer.transposed:
        delta = insert_after(delta, "call_method", "t", (delta,), origin)
    return fetched, delta


def _insert_fetches(at: fx.Node, computed: Computed, layer: Layer) -> tuple[fx.Node, ...]:
    """Insert, after ``at``, the fetches of all that a weight is computed from."""
    origin, behind = Origin(PASS, layer.path), at.next
    return tuple(insert_before(behind, "get_attr", name, (), origin) for name in computed.given)


def _insert_update(
    parts: list[tuple[Layer, fx.Node, fx.Node]],
    at: fx.Node,
    rule: LearningRule,
    state: dict[str, fx.Node],
    computed: Computed | None,
) -> None:
    """Insert, after ``at``, the sum of a weight's deltas and its application to the weight."""
    layer, weight, total = parts[0]
    origin = Origin(PASS, layer.path)
    for *_, delta in parts[1:]:
        at = total = insert_after(at, "call_function", torch.add, (total, delta), origin)
    counted: dict[str, Any] = {name: node for name, node in state.items() if name == "skipped"}
    of_step = counted | ({"relative": True} if rule.relative else {})
    of_sum = counted | ({"stochastic": True} if rule.stochastic else {})
    rate = state.get("rate")
    if rate is None:
        one_of = (state["rates"], layer.index)
        at = rate = insert_after(at, "call_function", getitem, one_of, origin, f"{layer.node}_rate")
    args: tuple[Any, ...] = (weight, total, rate)
    if computed is None:
        target, options = torch.ops.fxlocal.normalised_add_.default, of_step | of_sum
    else:
        target, options = torch.ops.fxlocal.normalised_step.default, of_sum
        at = step = insert_after(at, "call_function", target, args, origin, f"{layer.node}_step")
        step.kwargs = of_step
        given, name = _insert_fetches(at, computed, layer), f"{layer.node}_pulled"
        pull_back = bind_pull_back(computed.compute, computed.count)
        at = insert_after(given[-1], "call_function", pull_back, (step, *given), origin, name)
        target, args = torch.ops.fxlocal.add_steps_.default, (list(given[: computed.count]), at)
    update = insert_after(at, "call_function", target, args, origin, f"{layer.node}_update")
    update.kwargs = options


def _shaped(node: fx.Node) -> fx.Node | None:
    """Return the output of a product of rows as the forward then shapes it, if it does at once."""
    if is_product(node) and len(node.users) == 1:
        user = next(iter(node.users))
        if operator_name(user) in ("view", "reshape", "_unsafe_view", "unflatten"):
            return user
    return None


_NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Identity)


def _residual_sum(
    gm: fx.GraphModule, node: fx.Node, sums: set[str], order: dict[fx.Node, int], boundary: int
) -> fx.Node | None:
    """Return the residual add that ``node`` feeds through norms and dropout only, if any."""
    value = node
    while len(value.users) == 1:
        value = next(iter(value.users))
        if order[value] >= boundary:
            return None
        if value.name in sums:
            return value
        passed = isinstance(module_of(gm, value), (*_NORM_MODULES, *DROPOUT_MODULES))
        if not (passed or operator_name(value) in NORMS | DROPOUTS):
            return None
    return None


def _is_overwritten(gm: fx.GraphModule, pre: fx.Node, node: fx.Node, post: fx.Node) -> bool:
    """Tell whether ``pre``, or what shares its memory, changes between ``node`` and ``post``."""
    while node is not post:
        node = node.next
        if overwrites(gm, node, pre):
            return True
    return False

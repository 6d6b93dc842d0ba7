"""What a layer's weight is computed from, where it is no parameter, and how to compute it again.

    %w = get_attr conv.weight
    %mul = call_function mul(%w, %mask)         ->    Computed(f, ("conv.weight", "mask"), 1)
    %conv2d = call_function conv2d(%x, %mul)

It is computed in the graph, or in a module with a parametrisation. Either way it must depend on
parameters, buffers and constants alone, and come out the same when computed again.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from ..errors import PlanError
from ..facts import Layer
from ..ops.computed import bind_parametrization
from ..plan import LearningRule
from .contexts import contexts
from .nodes import ancestors, fetched, module_of, nodes_by_name
from .operators import arguments_of, is_inplace, overwrites, weight_parameters
from .random_state import random_state, restore_random_state

__all__ = ["Computed", "Learned", "check_precision", "find_computing", "find_learned"]


@dataclass(frozen=True)
class Computed:
    """How one layer's weight is computed.

    Attributes:
        compute: the weight, from the values of ``given``.
        given: qualified names: of the parameters that learn, then of what stays (frozen parameters,
            buffers and constants, or the module that computes).
        count: how many learn.
        value: what it is now.
        key: equal where two layers compute the same from the same.
    """

    compute: Callable[..., Tensor]
    given: tuple[str, ...]
    count: int
    value: Tensor
    key: str


@dataclass(frozen=True)
class Learned:
    """What a layer learns.

    Attributes:
        parameters: those to move: one, unless the weight is computed.
        value: of the weight.
        computed: how it is computed, if it is.
        key: equal for layers that have the same weight.
    """

    parameters: tuple[Tensor, ...]
    value: Tensor
    computed: Computed | None
    key: Any


def find_computing(gm: fx.GraphModule, layers: Sequence[Layer]) -> list[Layer]:
    """Return those of ``layers`` that compute their weight from parameters that learn."""
    if all(layer.weight is not None for layer in layers):
        return []
    nodes = nodes_by_name(gm.graph)
    made = [(x, weight_parameters(gm, x, nodes[x.node])) for x in layers if x.weight is None]
    return [layer for layer, parameters in made if any(p.requires_grad for p in parameters)]


def find_learned(
    gm: fx.GraphModule, layers: Sequence[Layer], computing: Sequence[Layer]
) -> dict[str, Learned]:
    """Return what is learned, by the node of each of ``layers`` whose weight is not frozen.

    Args:
        gm: the graph.
        layers: all that learn.
        computing: those of them that compute their weight.

    Raises:
        PlanError: where it cannot be computed again, or a parameter is shared with another weight;
            where hooks may change a layer's input; or for a weight that is complex.
    """
    computed, learned = _find_computed(gm, layers, computing), dict[str, Learned]()
    for layer in layers:
        if (one := computed.get(layer.node)) is not None:
            parameters = tuple(gm.get_parameter(name) for name in one.given[: one.count])
            learned[layer.node] = Learned(parameters, one.value, one, one.key)
        elif layer.weight is not None and (p := gm.get_parameter(layer.weight)).requires_grad:
            learned[layer.node] = Learned((p,), p, None, id(p))  # tied: one, by several names
    nodes = nodes_by_name(gm.graph) if learned else {}
    for layer in (layer for layer in layers if layer.node in learned):
        _refuse_hooked(module_of(gm, nodes[layer.node]), layer)
        if learned[layer.node].value.is_complex():
            raise PlanError(
                f"layer {layer.path!r} has a complex weight, and local updates are of real ones. "
                "Put the boundary before it, or use Freeze()"
            )
    return learned


def _refuse_hooked(module: nn.Module | None, layer: Layer) -> None:
    """Refuse a layer whose input a hook may change: the graph, and so the rule, sees the other.

    Torch's own change none: they gather or make the weight.
    """
    hooks = module._forward_pre_hooks.values() if module is not None else ()
    if any(not f"{getattr(hook, '__module__', None)}".startswith("torch.") for hook in hooks):
        raise PlanError(
            f"layer {layer.path!r} has forward pre-hooks, which may change its input, and a local "
            "update would not see that. Remove them and change it in the model's forward, or put "
            "the boundary before the layer, or use Freeze()"
        )


def check_precision(
    weights: Mapping[str, Learned],
    *,
    layers: Sequence[Layer],
    rule: LearningRule,
    rates: Sequence[float] = (),
) -> None:
    """Refuse weights so narrow that rounding would lose the steps of ``rule``, or of ``rates``.

    That is where a step is shorter than the weight's last digits are wide: few elements, of a delta
    far above its mean, would keep it. ``weights`` is what `find_learned` returned.
    """
    for weight, layer in ((weights[x.node], x) for x in layers if x.node in weights):
        narrow = [torch.finfo(p.dtype) for p in weight.parameters if p.dtype.itemsize < 4]
        rate = rates[layer.index] if rates else rule.rate
        if rule.stochastic or not rate or not narrow:
            continue
        digit, dtype = max((limits.eps, limits.dtype) for limits in narrow)
        length = torch.linalg.vector_norm(weight.value.detach().float())
        least = digit * (1 if rule.relative else float(length))
        if rate < least:
            raise PlanError(
                f"layer {layer.path!r}: its weight is {dtype}, whose smallest relative step is "
                f"{digit:.2g}, and one of rate {rate:.2g} is {rate / least:.1g} of that: "
                "rounding would lose it. Keep the weights in float32, with torch.autocast; or give "
                f"a rate from {least:.2g}, or {type(rule).__name__}(..., stochastic=True), which "
                "on average loses nothing"
            )


def _find_computed(
    gm: fx.GraphModule, layers: Sequence[Layer], computing: Sequence[Layer]
) -> dict[str, Computed]:
    if not computing:
        return {}
    nodes, found = nodes_by_name(gm.graph), dict[str, Computed]()
    writing = [n for n in gm.graph.nodes if is_inplace(gm, n) or "out" in n.kwargs]
    owners = {id(gm.get_parameter(x.weight)): (x, x.weight) for x in layers if x.weight is not None}
    for layer in computing:
        try:
            module = module_of(gm, node := nodes[layer.node])
            one = _in_module(node, module) if module else _in_graph(gm, node, writing)
        except _Refused as refused:
            raise PlanError(
                f"layer {layer.path!r} computes its weight in a way that a local update cannot "
                f"take back to parameters: {refused}. Put the boundary before it, or use Freeze()"
            ) from refused.__cause__
        if one is None:
            continue
        found[layer.node] = one
        for name in one.given[: one.count]:
            other, key = owners.setdefault(id(gm.get_parameter(name)), (layer, one.key))
            if key != one.key:
                raise PlanError(
                    f"layers {other.path!r} and {layer.path!r}: {name!r} is part of two weights, "
                    "computed in two ways, which a local update would move one after the other. "
                    "Put the boundary before them, or use Freeze()"
                )
    return found


class _Refused(Exception):
    """Why a weight cannot be computed again."""


def _in_graph(gm: fx.GraphModule, layer: fx.Node, writing: Sequence[fx.Node]) -> Computed:
    weight = arguments_of(layer, ("input", "weight"))["weight"]
    needed, named = sorted(ancestors(weight)), dict(gm.named_parameters(remove_duplicate=False))
    learns = {n: getattr(named.get(str(n.target)), "requires_grad", False) for n in needed}
    if "same" in (*layer.args, *layer.kwargs.values()):
        raise _Refused("padding='same' is not known in numbers; give numbers")
    computing = [node for node in needed if node.op != "get_attr"]
    for node in computing:
        if node.op == "placeholder":
            raise _Refused(f"it depends on the input {node.target!r}")
        if node.op == "call_module":
            raise _Refused(f"{node.target!r} is a module; write it as a function of the parameters")
        if contexts(node):
            raise _Refused(f"{node.name!r} runs under {contexts(node)[-1].source} of the model's")
    if changed := [n for n in writing if any(overwrites(gm, n, value) for value in needed)]:
        raise _Refused(f"{changed[0].name!r} changes it, or what it is computed from, in place")
    fetches = [node for node in needed if node.op == "get_attr"]
    fetches.sort(key=lambda node: not learns[node])
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in fetches:
        values[node] = graph.placeholder(node.name)
    for node in computing:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(values[weight])
    compute, given = fx.GraphModule({}, graph), tuple(str(node.target) for node in fetches)
    count = sum(learns[node] for node in fetches)
    value = _try(compute, count, [fetched(gm, node) for node in fetches])
    places = {node: place for place, node in enumerate((*fetches, *computing))}
    calls = [(n.target, *fx.map_arg((n.args, n.kwargs), places.__getitem__)) for n in computing]
    return Computed(compute, given, count, value, repr((given, calls)))


def _in_module(layer: fx.Node, module: nn.Module) -> Computed | None:
    if not parametrize.is_parametrized(module, "weight"):
        raise _Refused(
            "a hook makes it (torch.nn.utils.weight_norm, spectral_norm or prune); "
            "torch.nn.utils.parametrizations has the same, or register one of your own"
        )
    path = f"{layer.target}.parametrizations.weight"
    inner: nn.Module = module.parametrizations.weight  # type: ignore[union-attr, assignment]
    if not (names := [name for name, p in inner.named_parameters() if p.requires_grad]):
        return None
    given = (*(f"{path}.{name}" for name in names), path)
    model = copy.deepcopy(inner)
    random = random_state()
    try:
        with torch.no_grad():
            met = model()  # as the forward does: it may iterate, as spectral norm does
    finally:
        restore_random_state(random)
    refused = _Refused("")
    for still in (False, True):
        compute = bind_parametrization(names, still)
        values = [model.get_parameter(name) for name in names]
        try:
            value = _try(compute, len(names), [*values, model])
        except _Refused as error:
            refused = error
            continue
        if still and sum(node.target == layer.target for node in layer.graph.nodes) > 1:
            raise _Refused("it is called twice, and comes out otherwise each time")
        if torch.allclose(value, met, rtol=0, atol=0, equal_nan=True):
            return Computed(compute, given, len(names), value, path)
        refused = _Refused("it comes out otherwise in evaluation mode")
    raise refused


def _try(compute: Callable[..., Tensor], count: int, given: Sequence[Any]) -> Tensor:
    """Return what ``compute`` does of copies, if a second time would be the same; or `_Refused`."""
    copies = copy.deepcopy(list(given))
    versions = [tensor._version for tensor in _tensors(copies)]
    random = random_state()
    try:
        with torch.enable_grad():
            moved = [value.detach().requires_grad_() for value in copies[:count]]
            weight = compute(*moved, *copies[count:])
            if not _same(random_state(), random):
                raise _Refused("it draws random numbers")
            if versions != [tensor._version for tensor in _tensors(copies)]:
                raise _Refused("it changes in place what it is computed from")
            torch.autograd.grad(weight, moved, torch.ones_like(weight), allow_unused=True)
    except _Refused:
        raise
    except Exception as error:  # the user's code, which may raise anything
        raise _Refused(f"{type(error).__name__}: {error}") from error
    finally:
        restore_random_state(random)
    return weight.detach()


def _same(a: object, b: object) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, nn.Module):
            yield from (*value.parameters(), *value.buffers())
        else:
            yield value

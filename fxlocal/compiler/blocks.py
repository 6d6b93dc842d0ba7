"""Cut a network at its block edges: each block becomes a function of all that it takes.

The graph is cut where a block begins, where gradients are switched on or off, and around what no
compiled code holds: a backward inside the forward, replay buffers, checks. What lies between two
cuts is a function of the values, parameters and modules that it takes, and the network calls one
after the other; what switches gradients stays outside::

    with torch.no_grad():
        block_0 = block_0(x, layer1_0_conv1, layer1_0_bn1, ...)
        block_0_1 = block_0(block_0, layer1_1_conv1, layer1_1_bn1, ...)
        detach = block_0_1.detach()
    block_1 = block_1(detach, layer2_0_conv1, ...)

Two blocks are of one kind where their graphs agree to the node. A value that a block changes in
place, and that nothing reads behind, is cloned first, which compiled code does without.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from operator import getitem
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from ..facts import Block
from ..ir.additions import ADDITIONS
from ..ir.codegen import Generator
from ..ir.contexts import Context, contexts
from ..ir.network import Network
from ..ir.nodes import CHECKPOINT, Origin, fetched
from ..ir.operators import is_inplace, origins
from ..ir.source import train_mode
from ..ops.checkpoint import State
from ..ops.local_modules import backward, keep_gradients, require_target
from ..ops.values import require_given, require_shape, require_value
from .analysis import Analysis
from .resolve import ResolvedPlan

__all__ = ["CutNetwork", "MakeBlock", "count_codes", "describe"]

MakeBlock: TypeAlias = Callable[[Hashable, fx.Graph], Callable[..., Any]]

_CHECKS = {require_target, require_given, require_shape, require_value}


class CutNetwork(Network):
    """A network as calls of its blocks; for what these are part of it asks the network.

    Args:
        network: what is cut.
        starts: names of the nodes at which blocks begin.
        make_block: returns the function of a block, by its kind and graph.
    """

    def __init__(self, network: Network, starts: Collection[str], make_block: MakeBlock) -> None:
        graph = _cut_graph(network, starts, make_block)
        structure = network._structure
        vars(self)["_evaluates"] = network._evaluates
        super().__init__(network.source_model, graph, network.fxlocal, structure=structure)
        vars(self)["whole"] = network  # no child

    def _state_of(self, stage: int) -> State:
        state: State = vars(self)["whole"]._state_of(stage)
        return state


def _cut_graph(network: Network, starts: Collection[str], make_block: MakeBlock) -> fx.Graph:
    graph, known = fx.Graph(), dict[fx.Node | str, fx.Node]()
    for stretch in _stretches(network, starts):
        if isinstance(stretch, fx.Node):
            known[stretch] = graph.node_copy(stretch, known.__getitem__)
            continue
        block = _Block(network, stretch)
        for value in block.inputs:
            if isinstance(value, str) and value not in known:
                known[value] = graph.get_attr(value)
        function = make_block(block.kind, block.graph)
        call = graph.call_function(function, tuple(known[value] for value in block.inputs))
        call.meta = {k: v for k, v in stretch[-1].meta.items() if k == CHECKPOINT}
        call.meta["fxlocal_contexts"] = _recording(stretch[0])
        for index, node in enumerate(block.outputs):
            known[node] = call
            if len(block.outputs) > 1:
                known[node] = graph.call_function(getitem, (call, index))
                known[node].meta = dict(call.meta)
    return graph


def _stretches(network: Network, starts: Collection[str]) -> Iterator[fx.Node | list[fx.Node]]:
    """Yield what lies between cuts, and the nodes that stay as they are."""
    stretch = list[fx.Node]()
    place: object = None
    for node in network._graph.nodes:
        if node.op == "get_attr":
            yield node
            continue
        stays, before, place = _stays(node), place, _place(node)
        if stretch and (stays or node.name in starts or place != before):
            yield stretch
            stretch = []
        if stays:
            yield node
        else:
            stretch.append(node)


def _stays(node: fx.Node) -> bool:
    """Tell whether a node is in no block: an input, a check, a cut, or what no code can hold.

    So is an object that the model returns, whose class torch 2.11 can't trace, and an item of what
    is fetched, one layer's rate, whose index would make it another kind.
    """
    target, origin = node.target, node.meta.get("fxlocal")
    return (
        node.op in ("placeholder", "output")
        or target in (backward, keep_gradients, *_CHECKS)
        or isinstance(target, type)
        or (node.op == "call_module" and str(target).startswith(f"{ADDITIONS}.replay."))
        or (isinstance(origin, Origin) and origin.pass_name == "insert_cuts")
        or (target is getitem and node.all_input_nodes[0].op == "get_attr")
    )


def _place(node: fx.Node) -> object:
    return _recording(node), node.meta.get(CHECKPOINT)


def _recording(node: fx.Node) -> tuple[Context, ...]:
    """Return the outermost contexts of a node that switch gradients on or off."""
    found = contexts(node)
    count = next((i for i, one in enumerate(found) if one.kind == "autocast"), len(found))
    return found[:count]


def _call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


class _Block:
    """A stretch of a network as a function of what it takes.

    Attributes:
        inputs: what it takes, in the order of their use: values, and modules by path.
        outputs: the nodes whose values are used behind it.
        graph: of the function.
        kind: equal for blocks whose graphs are.
    """

    def __init__(self, network: Network, stretch: Sequence[fx.Node]) -> None:
        inside = set(stretch)
        self.network, self.stretch = network, stretch
        self.graph, self.inputs = fx.Graph(), dict[fx.Node | str, fx.Node]()
        for node in stretch:
            taken: list[fx.Node | str] = [*node.all_input_nodes]
            for value in [str(node.target), *taken] if node.op == "call_module" else taken:
                if value not in inside and value not in self.inputs:
                    self.inputs[value] = self.graph.placeholder(f"a{len(self.inputs)}")
        self.outputs = [node for node in stretch if not inside.issuperset(node.users)]
        self._fill(stretch)
        self.graph.set_codegen(Generator())
        self.kind = tuple(map(_text, self.graph.nodes))

    def _fill(self, stretch: Sequence[fx.Node]) -> None:
        known, outer = dict(self.inputs), len(_recording(stretch[0]))
        for value in self._overwritten():
            known[value] = self.graph.call_method("clone", (known[value],))
        for index, node in enumerate(stretch):
            op, target = node.op, node.target
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
            if op == "call_module":
                op, target, args = "call_function", _call, (known[str(target)], *args)
            new = self.graph.create_node(op, target, tuple(args), kwargs, f"v{index}")
            new.meta["fxlocal_contexts"] = contexts(node)[outer:]
            known[node] = new
        made = tuple(known[node] for node in self.outputs)
        self.graph.output(made[0] if len(made) == 1 else made)

    def _overwritten(self) -> Iterator[fx.Node]:
        """Yield what is taken and changed in place, and which nothing else reads behind that.

        Compiled code would write it back; of a clone it makes nothing.
        """
        for node in self.stretch:
            value = node.all_input_nodes[0] if node.all_input_nodes else node
            if value not in self.inputs or not is_inplace(self.network, node):
                continue
            if value.op in ("placeholder", "get_attr") or len([*origins(self.network, value)]) > 1:
                continue
            others = [user for user in value.users if user is not node]
            seen = (user > node or value in {*origins(self.network, user)} for user in others)
            if not any(seen):
                yield value


def _text(node: fx.Node) -> Hashable:
    """Return all that a node is, but for an assertion's message, which tracing makes of names."""
    args = node.args[:1] if node.target is torch._assert else node.args
    return node.op, node.name, node.target, repr(args), repr(node.kwargs), contexts(node)


def count_codes(captured: Network, analysis: Analysis, plans: Iterable[ResolvedPlan]) -> int:
    """Return how many codes the blocks of ``plans`` need, where equal ones in equal roles share.

    The blocks are those of ``captured``, and what the rewrites make of each is told by the Plan.
    """
    starts = {block.start: block for block in analysis.blocks}
    with train_mode(captured):
        stretches = [s for s in _stretches(captured, starts) if isinstance(s, list)]
        kinds = [_kind_and_state(captured, stretch) for stretch in stretches]
    found, block = set[Hashable](), analysis.blocks[0] if analysis.blocks else None
    for stretch, kind in zip(stretches, kinds, strict=True):
        block = starts.get(stretch[0].name, block)
        found.update((kind, block and _role(block, resolved)) for resolved in plans)
    return len(found)


def _kind_and_state(network: Network, stretch: Sequence[fx.Node]) -> Hashable:
    block, state = _Block(network, stretch), list[Hashable]()
    for value in block.inputs:
        if isinstance(value, str):
            state.append(describe(network.get_submodule(value)))
        elif value.op == "get_attr":
            state.append(describe(fetched(network, value)))
        else:
            state.append(repr(value.meta.get("val")))
    return block.kind, tuple(state)


def _role(block: Block, resolved: ResolvedPlan) -> Hashable:
    """Return what a Plan does to a block, which equal ones share."""
    plan, first = resolved.plan.with_rate(0.0), block.layers[0]
    methods = {layer.index - first: method for layer, method in resolved.approximations}
    own = tuple(methods.get(i) for i in range(len(block.layers)))
    dropped = plan.drop and block.name  # each has a probability of its own
    if first < resolved.boundary and plan.local:
        return plan.local.rule, plan.local.norm, bool(plan.rates), dropped
    return first == resolved.boundary > 0, own, dropped, plan.checkpoint, plan.modules


_PLAIN = (bool, int, float, str, tuple, type(None))


def describe(value: Any) -> Hashable:
    """Return what code is compiled for of a value that it takes, as far as torch looks at it.

    So are hooks, which are in the code and which torch by default does not look at again.
    """
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.stride(), value.requires_grad
    if isinstance(value, nn.Module):
        plain = [(name, v) for name, v in vars(value).items() if isinstance(v, _PLAIN)]
        parts = [*value._parameters.items(), *value._buffers.items(), *value._modules.items()]
        held = [own for name, own in vars(value).items() if name.endswith("_hooks")]
        hooks = [hook for own in held for hook in own.values()]
        return type(value), repr(plain), *hooks, *((name, describe(part)) for name, part in parts)
    if isinstance(value, (tuple, list)):
        return type(value), *map(describe, value)
    return type(value), repr(value) if isinstance(value, _PLAIN) else id(value)

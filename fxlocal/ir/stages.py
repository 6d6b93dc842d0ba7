"""Cut a network into parts: at the borders of its local modules, at one boundary, or at any nodes.

A stage runs one local module alone. It computes its module's loss but does not back-propagate it,
so that what it makes for other stages can be handed on before: from process to process
(`fxlocal.parallel`), or between modules that are compiled one by one.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..errors import PlanError
from ..ops.local_modules import backward, keep_gradients
from .additions import ADDITIONS
from .boundary import nodes_before
from .network import Network
from .nodes import FIXED, STAGE, computations, graph_module
from .source import train_mode

__all__ = ["Halves", "Span", "Stage", "cut_spans", "find_halves", "find_stages"]


class _Part(Network):
    """The graph of one stage; it has no evaluation branch."""

    _evaluates = False


@dataclass(frozen=True)
class Stage:
    """One local module's share of a network.

    Attributes:
        index: of the module.
        inputs: names of the values that it takes: the network's inputs, ``"target"``, and outputs
            of earlier stages.
        outputs: names of the values that it makes and later stages take, detached.
        network: the graph; ``(*inputs) -> (outputs, (output, loss))``, the output being the
            network's in the last stage and None before it, and the loss None where nothing learns.
        parameters: by their names in the network, those that it uses, a link's included.
        linked: names of those that a stage uses too, by that stage's index.
    """

    index: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    network: Network
    parameters: dict[str, nn.Parameter]
    linked: dict[int, tuple[str, ...]]

    def __call__(self, *inputs: Any) -> tuple[tuple[Any, ...], tuple[Tensor | None, Tensor | None]]:
        """Run the module forward; back-propagate the loss yourself."""
        values, result = self.network(*inputs)
        return values, result


@dataclass(frozen=True)
class Halves:
    """A network in train mode, parted at a boundary.

    Attributes:
        before: the graph before it; ``(*inputs) -> values``.
        inputs: names of the network's inputs that it takes.
        values: names of what crosses the boundary, plain values such as sizes included.
        behind: the graph behind it; ``(*values, *others) -> output``.
        others: names of the network's inputs that it takes.
    """

    before: Network
    inputs: tuple[str, ...]
    values: tuple[str, ...]
    behind: Network
    others: tuple[str, ...]


def find_halves(network: Network, start: str) -> Halves:
    """Return the parts of ``network`` before and behind the boundary at the node ``start``."""
    with train_mode(network):
        nodes = [n for n in computations(network.graph) if not _checks_fixed(n)]
        lower = nodes_before(network, start)
        crossing = [n for n in nodes if n in lower and not lower.issuperset(n.users)]
        result: Any = network.graph.output_node().args[0]
        below = [n for n in nodes if n in lower]
        before, inputs = _half(network, below, (), tuple(crossing))
        above = [n for n in nodes if n not in lower]
        behind, others = _half(network, above, crossing, result)
    return Halves(before, inputs, tuple(node.name for node in crossing), behind, others)


def _half(
    network: Network, body: Sequence[fx.Node], given: Sequence[fx.Node], result: Any
) -> tuple[Network, tuple[str, ...]]:
    """Return the graph of ``body``, which takes ``given`` first, and the inputs it takes then."""
    graph, inputs = fx.Graph(), list[str]()
    known = {node: graph.placeholder(node.name) for node in given}
    wanted = [value for node in body for value in node.all_input_nodes]
    fx.map_arg(result, wanted.append)
    for value in dict.fromkeys(wanted):
        if value.op == "placeholder" and value not in known:
            inputs.append(str(value.target).lstrip("*"))
            known[value] = graph.placeholder(f"input_{value.name}")
        elif value.op == "get_attr":
            known[value] = graph.node_copy(value)
    for node in body:
        known[node] = graph.node_copy(node, known.__getitem__)
    graph.output(fx.map_arg(result, known.__getitem__))
    state = network.source_model, graph, network.fxlocal.copy()
    part = _Part(*state, structure=network._structure)
    part.meta["fxlocal"] = network.history  # what it draws depends on the Plan
    return part, tuple(inputs)


def find_stages(network: Network) -> tuple[Stage, ...]:
    """Return one stage per local module of ``network``.

    With replay buffers a stage takes what the buffer before it would return, under the names of
    what goes in, and everything on its way to later stages passes through it.

    Raises:
        PlanError: if the network has no local modules.
        TypeError: if it is no network.
    """
    network = graph_module(network, "find_stages")
    history = getattr(network, "history", None)
    modules = history.plan.modules if history else None
    if modules is None:
        raise PlanError(
            "there are stages in a network with local modules only: give what transform returned "
            "for Plan(modules=LocalModules(...))"
        )
    with train_mode(network):
        parts = [_extract(network, k) for k in range(modules.count)]
    used = [_parameters(network, part.graph) for _, _, part in parts]
    return tuple(
        Stage(
            *(k, inputs, outputs, part, used[k]),
            {
                j: shared
                for j, others in enumerate(used)
                if j != k and (shared := tuple(name for name in used[k] if name in others))
            },
        )
        for k, (inputs, outputs, part) in enumerate(parts)
    )


def _extract(network: Network, k: int) -> tuple[tuple[str, ...], tuple[str, ...], Network]:
    """Return what module k takes and makes, and its graph."""
    nodes = [n for n in network.graph.nodes if n.op not in ("get_attr", "output")]
    buffers = {n.meta[STAGE]: n for n in nodes if _is_replay(n)}
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    inputs: list[str] = []

    def take(node: fx.Node, name: str) -> None:
        known[node] = graph.placeholder(name)
        inputs.append(name)

    mine = [n for n in nodes if n.meta[STAGE] == k and not _is_replay(n)]
    body = [n for n in mine if n.op != "placeholder" and n.args[:1] != (buffers.get(k),)]
    body = [n for n in body if n.target not in (backward, keep_gradients) and not _checks_fixed(n)]
    if k in buffers:
        replayed = sorted(buffers[k].users, key=lambda user: int(str(user.args[1])))
        for node, value in zip(replayed, buffers[k].args, strict=False):
            take(node, str(value))
    output, loss = _results(network, k)
    foreign = [v for n in body for v in n.all_input_nodes if v.op != "get_attr"]
    fx.map_arg(output, foreign.append)
    inside = {*body, *known}
    for value in dict.fromkeys(v for v in foreign if v not in inside):
        take(value, str(value.target) if value.op == "placeholder" else value.name)

    def mapped(value: fx.Node) -> fx.Node:
        if value not in known:
            assert value.op == "get_attr"
            known[value] = graph.node_copy(value)
        return known[value]

    for node in body:
        known[node] = graph.node_copy(node, mapped)
    made = _outputs(k, mine, buffers)
    results = tuple(known[node] for node in made), fx.map_arg((output, loss), known.__getitem__)
    graph.output(results)
    part = _Part(network.source_model, graph, network.fxlocal.copy())
    return tuple(inputs), tuple(node.name for node in made), part


def _checks_fixed(node: fx.Node) -> bool:
    """Tell whether a node checks an input that has one value only, so that no stage takes it."""
    return any(FIXED in value.meta for value in node.all_input_nodes)


def _is_replay(node: fx.Node) -> bool:
    return str(node.target).startswith(f"{ADDITIONS}.replay.")


def _outputs(k: int, mine: list[fx.Node], buffers: dict[int, fx.Node]) -> list[fx.Node]:
    """Return the nodes of module k that later modules take."""
    if k + 1 in buffers:
        return buffers[k + 1].all_input_nodes
    made = [node for node in mine if node.op != "placeholder"]
    return [n for n in made if any(u.meta[STAGE] > k for u in n.users)]


def _results(network: Network, k: int) -> tuple[Any, fx.Node | None]:
    """Return the nodes of the output and the loss of module k."""
    results: Any = network.graph.output_node().args[0]
    output, loss = results
    if loss.target is keep_gradients:
        loss = loss.args[0]
    if loss.meta[STAGE] == k:
        return output, loss
    backwards = (n for n in network.graph.nodes if n.target is backward)
    own: Any = next((n.args[0] for n in backwards if n.meta[STAGE] == k), None)
    return None, own


def _parameters(network: Network, graph: fx.Graph) -> dict[str, nn.Parameter]:
    """Return the parameters that ``graph`` uses, by name, whichever form their use has."""
    named = dict(network.named_parameters(remove_duplicate=False))
    targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    return {
        name: parameter
        for name, parameter in named.items()
        if name in targets or any(name.startswith(f"{target}.") for target in targets)
    }


@dataclass(frozen=True)
class Span:
    """A stretch of a network's nodes.

    Attributes:
        inputs: names of the values that it takes: the network's inputs, and outputs of earlier
            spans.
        outputs: names of the values that it makes and later spans, or the caller, take.
        ended: those of its inputs that no later span takes.
        network: the graph; ``(*inputs) -> outputs``.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ended: tuple[str, ...]
    network: Network


def cut_spans(network: Network, starts: Sequence[str]) -> Iterator[Span]:
    """Yield the spans of ``network`` that begin at the nodes named ``starts``, in order.

    What lies before the first of them counts to the first span.
    """
    nodes = list(network.graph.nodes)
    place = {node.name: i for i, node in enumerate(nodes)}
    begins = [place[name] for name in starts[1:]]
    span = {node: bisect_right(begins, i) for i, node in enumerate(nodes)}
    for k in range(len(starts)):
        body = [n for n in computations(network.graph) if span[n] == k]
        yield _span(network, span, k, body)


def _span(network: Network, span: dict[fx.Node, int], k: int, body: list[fx.Node]) -> Span:
    inside = set(body)
    foreign = dict.fromkeys(v for n in body for v in n.all_input_nodes if v not in inside)
    taken = [v for v in foreign if v.op != "get_attr"]
    made = [n for n in body if any(span[u] > k or u.op == "output" for u in n.users)]
    ended = [v for v in taken if all(span[u] <= k and u.op != "output" for u in v.users)]
    inputs, outputs, last = (tuple(v.name for v in values) for values in (taken, made, ended))
    part, _ = _half(network, body, taken, tuple(made))
    return Span(inputs, outputs, last, part)

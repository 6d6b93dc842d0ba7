"""Nodes of a graph: what passes ask of them.

Besides its standard metadata a node carries, in ``node.meta``:

* ``"fxlocal"``: the `Origin` of a node that a rewrite inserted;
* ``"fxlocal_stage"``: the index of the stage that it lies in, where there are any;
* ``"fxlocal_checkpoint"``: the same, where that stage is computed again in the backward;
* ``"fxlocal_block"``: of a block that is left out in some steps: its index among those, and the
  share of steps that it survives;
* ``"fxlocal_contexts"``: each `Context` that it runs under, outermost first. Capture fills them
  with the model's own (``no_grad``, ``autocast``), a rewrite may add more, and the code generator
  turns them back into ``with`` blocks;
* ``"fxlocal_fixed"``: of an input without example, that it is fixed at its default;
* ``"fxlocal_extra"``: of an input, that it is one of those that the model's ``*args`` takes;
* ``"fxlocal_by_name"``: of an input with example, whether that is given by keyword;
* ``"val"``: what its value looks like for the example inputs, a `TensorSpec` in the place of each
  tensor, once `run_on_fakes` has met it; a `torch.export` capture has fake tensors before.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from operator import attrgetter
from typing import Any, cast

from torch import fx, nn

from ..errors import PlanError, nearest

__all__ = [
    "BLOCK",
    "BY_NAME",
    "CHECKPOINT",
    "EXTRA",
    "FIXED",
    "STAGE",
    "Origin",
    "ancestors",
    "computations",
    "fetched",
    "graph_module",
    "hooks_of",
    "last_on_path",
    "module_of",
    "node_named",
    "nodes_by_name",
    "parameter_uses",
    "parts_of",
    "positions",
    "shared_path",
    "stretches",
    "sums_of",
    "unwrapped",
]

BLOCK = "fxlocal_block"
CHECKPOINT, STAGE = "fxlocal_checkpoint", "fxlocal_stage"
FIXED, EXTRA, BY_NAME = "fxlocal_fixed", "fxlocal_extra", "fxlocal_by_name"
Target = str | Callable[..., Any]


@dataclass(frozen=True)
class Origin:
    """Which pass inserted a node, and for which layer; frozen, as copied graphs share it."""

    pass_name: str
    layer: str


def unwrapped(network: Any) -> Any:
    """Return the module in a wrapper of `torch.compile` or of CUDA graphs, else what is given."""
    name = "_orig_mod" if isinstance(network, nn.Module) else "network"
    return getattr(network, name, network)


def graph_module(given: Any, function: str) -> Any:
    """Return the graph module that ``function`` was given, out of its wrapper; or a TypeError."""
    found = unwrapped(given)
    if not isinstance(found, fx.GraphModule):
        raise TypeError(
            f"{function} got {type(given).__name__}: give what fxlocal.transform, fxlocal.capture "
            "or Driver.network returned"
        )
    return found


def nodes_by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return each node by its name."""
    return {node.name: node for node in graph.nodes}


def node_named(gm: fx.GraphModule, name: str) -> fx.Node:
    """Return the node called ``name``; PlanError with the nearest names if there is none."""
    names = nodes_by_name(gm.graph)
    if name not in names:
        raise PlanError(f"no node {name!r} in the graph. Nearest: {nearest(name, names)}")
    return names[name]


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return each node's place in execution order."""
    return {node: i for i, node in enumerate(graph.nodes)}


def computations(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that compute: all but inputs, fetched attributes and the output."""
    for node in graph.nodes:
        if node.op in ("call_module", "call_function", "call_method"):
            yield node


def fetched(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return what a ``get_attr`` fetches, such as a parameter."""
    return attrgetter(str(node.target))(gm)


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that ``node`` calls, if it is a ``call_module``."""
    if node.op != "call_module":
        return None
    module: nn.Module = gm
    for name in str(node.target).split("."):
        module = cast(nn.Module, module._modules[name])  # get_submodule takes twenty times as long
    return module


def hooks_of(module: nn.Module) -> dict[str, Mapping[int, Any]]:
    """Return the hooks of a module's forward and backward, by the attribute that holds them."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return {kind: getattr(module, kind) for kind in kinds}


def parts_of(value: Any) -> dict[str | int, Any]:
    """Return what a container or an object in a graph holds, by name or index; no deeper."""
    if isinstance(value, fx.Node):
        fields = getattr(value.target, "_fields", None)
        if fields is not None:
            return dict(zip(fields, value.args, strict=False)) | value.kwargs
        if value.op == "call_function" and isinstance(value.target, type):  # made by capture
            items: Any = value.args[0] if value.args else {}
            return dict(items) | dict(value.kwargs)
        return {}
    if isinstance(value, dict):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, (tuple, list)) else {}


def parameter_uses(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str, nn.Parameter]]:
    """Yield ``(node, qualified name, parameter)`` for each use of a parameter by a computation."""
    fetches = gm.graph.find_nodes(op="get_attr", sort=False)
    named = dict(gm.named_parameters(remove_duplicate=False)) if fetches else {}
    for node in computations(gm.graph):
        if (module := module_of(gm, node)) is not None:
            own = module._parameters.items()  # named_parameters() walks: ten times as long
            for name, parameter in module.named_parameters() if module._modules else own:
                if parameter is not None:
                    yield node, f"{node.target}.{name}", parameter
        for used in node.all_input_nodes:
            if used.op == "get_attr" and str(used.target) in named:
                yield node, str(used.target), named[str(used.target)]


_Uses = Iterable[tuple[fx.Node, str, nn.Parameter]]


def last_on_path(gm: fx.GraphModule, uses: _Uses, owner: Mapping[str, int]) -> dict[str, int]:
    """Return, by node name, the last owner of a use that lies on a path to it; -1 of none."""
    reach = {node.name: -1 for node in gm.graph.nodes}
    reach |= {node.name: owner[node.name] for node, _, _ in uses}
    for node in gm.graph.nodes:
        inputs = (reach[n.name] for n in node.all_input_nodes)
        reach[node.name] = max([reach[node.name], *inputs])
    return reach


def sums_of(
    uses: _Uses, owner: Mapping[str, int], count: int, size: Callable[[nn.Parameter], int]
) -> list[int]:
    """Return the size of each owner's parameters; a shared one counts once, where it is first."""
    sums, first = [0] * count, {id(p): (node, p) for node, _, p in reversed([*uses])}
    for node, parameter in first.values():
        sums[owner[node.name]] += size(parameter)
    return sums


def ancestors(node: fx.Node, within: Container[fx.Node] | None = None) -> set[fx.Node]:
    """Return ``node`` and all that it is made of; with ``within``, only what lies in there."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        if (node := waiting.pop()) not in found and (within is None or node in within):
            found.add(node)
            waiting += node.all_input_nodes
    return found


def shared_path(paths: Sequence[str]) -> str:
    """Return the module path that all of ``paths`` begin with; the first if there is none."""
    steps = zip(*(path.split(".") for path in paths), strict=False)
    shared = takewhile(lambda step: len(set(step)) == 1, steps)
    return ".".join(step[0] for step in shared) or paths[0]


def stretches(graph: fx.Graph, begins: Mapping[str, int]) -> dict[str, int]:
    """Return, by node name, the highest number that begins at the node or before it."""
    numbers = accumulate((begins.get(node.name, 0) for node in graph.nodes), max)
    return {node.name: number for node, number in zip(graph.nodes, numbers, strict=True)}

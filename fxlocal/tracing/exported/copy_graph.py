"""Copy an exported graph: inputs first, regions inlined, state fetched from the model."""

import operator
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ...errors import CaptureError
from ...ir.additions import ADDITIONS
from ...ir.contexts import ENABLE_GRAD, NO_GRAD, Context
from ...ops.values import leaves_at, require_shape, require_value
from ..examples import Argument, Examples
from ..outputs import Output
from ..state import TracedState
from .asked import Asked

__all__ = ["copy_graph"]

_Met: TypeAlias = dict[Any, tuple[fx.Node, int]]
# Of what `.float()` and `.to` meet while exporting; under autocast it is another dtype. They stay.
_ASSERT = torch.ops.aten._assert_tensor_metadata.default


def copy_graph(
    state: TracedState,
    program: ExportedProgram,
    exported: fx.GraphModule,
    examples: Examples,
    output: Output,
    asked: Asked,
    least: Mapping[Any, int],
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Return the graph of ``exported``, and the constants that it fetches.

    Its inputs are checked: each size that may be any is ``least`` or more.
    """
    copier = _Copier(state)
    flat_inputs = [node for node in exported.graph.nodes if node.op == "placeholder"]
    args, kwargs = pytree.tree_unflatten(flat_inputs, program.call_spec.in_spec)
    by_input = examples.named(args, kwargs)
    values: dict[fx.Node, Any] = {}
    met = _Met()
    for node, leaf in _inputs(copier.graph, examples, by_input):
        values[node] = _checked(copier.graph, leaf, node.meta.get("val"), asked, least, met)
    flat = pytree.tree_leaves(copier.copy_nodes(exported, values, ()))
    copier.graph.output(output.put_together(copier.graph, flat))
    return copier.graph, copier.constants


class _Copier:
    """Copies the nodes behind the inputs, and keeps the constants that they fetch."""

    def __init__(self, state: TracedState) -> None:
        self.state, self.graph = state, fx.Graph()
        self.constants: dict[str, Tensor] = {}

    def copy_nodes(
        self, owner: fx.GraphModule, values: dict[fx.Node, Any], contexts: tuple[Context, ...]
    ) -> Any:
        """Copy the graph of ``owner``, whose inputs are among ``values``; return its output."""
        previous: Context | None = None  # of the region just before, if nothing lies between
        for node in owner.graph.nodes:
            if node.op in ("placeholder", "output") or node.target is _ASSERT:
                continue
            if region := _region(node):
                inner, args, context = region
                if self.state.changes_grad:
                    _refuse_split(context, previous)
                previous = context
                module = owner.get_submodule(str(inner.target))
                assert isinstance(module, fx.GraphModule)
                inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
                mapped = {p: values[a] for p, a in zip(inputs, args, strict=True)}
                values[node] = self.copy_nodes(module, mapped, (*contexts, context))
            elif node.op == "get_attr":
                if isinstance(value := attrgetter(str(node.target))(owner), Tensor):
                    values[node] = self._fetch(node, value, contexts)
            elif _is_item_of_region(node, values):
                values[node] = values[node.all_input_nodes[0]][node.args[1]]
            else:
                previous = None
                values[node] = _tagged(self.graph.node_copy(node, values.__getitem__), contexts)
        return fx.map_arg(owner.graph.output_node().args[0], values.__getitem__)

    def _fetch(self, node: fx.Node, value: Tensor, contexts: tuple[Context, ...]) -> fx.Node:
        """Fetch an attribute from the model's own state, or keep it as a constant."""
        copied = _tagged(self.graph.node_copy(node), contexts)
        path = self.state.path_of(value)
        if path is None:
            path = f"{ADDITIONS}.{str(node.target).replace('.', '_')}"
            self.constants[path.partition(".")[2]] = value.detach()
        copied.target = path
        return copied


def _tagged(node: fx.Node, contexts: tuple[Context, ...]) -> fx.Node:
    if contexts:
        node.meta["fxlocal_contexts"] = contexts
    return node


def _inputs(
    graph: fx.Graph, examples: Examples, exported: Mapping[str, Any]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Insert the model's inputs, and what takes nested ones apart.

    Yields each input of the exported graph, which are in ``exported`` by name and nested as the
    examples are, with what it is in ``graph``.
    """
    inputs = [(argument, _insert_input(graph, argument)) for argument in examples.arguments()]
    for argument, node in inputs:
        if argument.check:
            function, *told = argument.check
            graph.call_function(function, (node, *told))
        if argument.fixed:
            continue
        parts, spec = pytree.tree_flatten(exported[argument.name])
        if spec.is_leaf():
            yield parts[0], node
            continue
        named, _ = pytree.tree_flatten_with_path(exported[argument.name])
        paths = tuple(pytree.keystr(path) for path, _ in named)
        flat = graph.call_function(leaves_at, (node, argument.name, paths))
        for i, part in enumerate(parts):
            yield part, graph.call_function(operator.getitem, (flat, i))


def _insert_input(graph: fx.Graph, argument: Argument) -> fx.Node:
    node = graph.create_node("placeholder", argument.name, argument.default)
    node.meta.update(argument.meta)
    return node


def _checked(
    graph: fx.Graph, node: fx.Node, value: Any, asked: Asked, least: Mapping[Any, int], met: _Met
) -> fx.Node:
    """Check an input against the shape, or the value, for which export's branches hold.

    In ``met`` is where each size that may be any was first.
    """
    if not isinstance(value, Tensor):
        graph.call_function(require_value, (node, value, node.name))
        return node
    bounds, ties = list[tuple[int | None, int | None]](), list[tuple[int, fx.Node, int]]()
    for dimension, size in enumerate(value.shape):
        if isinstance(size, int):
            bounds.append((size, size))
        elif (symbol := size.node.expr) in least:
            bounds.append((least[symbol], asked.most(symbol)))
            first = met.setdefault(symbol, (node, dimension))
            alone = not dimension and size.node.hint == 1  # one row may stand for a batch
            if first != (node, dimension) and not alone:
                ties.append((dimension, *first))
        else:
            known = int(symbol) if symbol.is_Integer else None
            bounds.append((known, known))
    told = (tuple(bounds), tuple(ties)) if ties else (tuple(bounds),)
    return graph.call_function(require_shape, (node, *told))


def _refuse_split(context: Context, previous: Context | None) -> None:
    """Refuse two equal autocast regions in a row: what export leaves of a grad mode in one."""
    if context == previous and context.kind == "autocast":
        raise CaptureError(
            "the model changes the grad mode inside an autocast region, which torch.export drops: "
            "put torch.no_grad outside torch.autocast"
        )


def _region(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...], Context] | None:
    """Return (submodule node, arguments, context) of a grad-mode or autocast region."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == "wrap_with_set_grad_enabled":
        enabled, inner, *args = node.args
        assert isinstance(inner, fx.Node)
        return inner, tuple(args), ENABLE_GRAD if enabled else NO_GRAD
    if name == "wrap_with_autocast":
        device, dtype, enabled, _, inner, *args = node.args
        assert isinstance(inner, fx.Node)
        assert isinstance(device, str)
        assert isinstance(dtype, torch.dtype | None)
        return inner, tuple(args), Context("autocast", device, dtype, bool(enabled))
    return None


def _is_item_of_region(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    first = node.args[0] if node.op == "call_function" and node.args else None
    return isinstance(first, fx.Node) and isinstance(values.get(first), (tuple, list))

"""Capture by `torch.export`: flat ATen calls, for models that symbolic tracing cannot follow."""

import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from operator import attrgetter
from typing import Any, TypeGuard
from unittest.mock import patch
from warnings import warn

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import ExportedProgram
from torch.fx.experimental import _config
from torch.nn.modules.module import _global_buffer_registration_hooks
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..ir.additions import ADDITIONS, Additions
from ..ir.contexts import ENABLE_GRAD, NO_GRAD, Context
from ..ir.network import Network
from ..ir.nodes import positions
from ..ir.operators import is_inplace, operator_name, origins
from ..ops.values import leaves_at, require_shape, require_value
from .assignments import AssignedError, assigns, unchanged
from .doubts import Dtypes
from .examples import Argument, Examples
from .guards import as_in_training, no_random_draws, plain_context, quiet, refuse_names
from .outputs import Output
from .state import TracedState

__all__ = ["capture_by_export"]


def capture_by_export(model: nn.Module, examples: Examples) -> Network:
    """Capture ``model`` as ATen calls over its own parameters, with a dynamic first dimension.

    It is in train mode. The first dimension of each tensor of the inputs is taken as the batch. A
    batch of one is a size as any other, unless a branch of the model asks.

    Raises:
        CaptureError: for outputs that a graph cannot make; for changes through ``.data`` of what
            was used before.
        Exception: whatever `torch.export` raises.
    """
    asked: list[str] = []
    try:
        with as_in_training(model, asked):
            return _capture(model, examples)
    except CaptureError:
        raise
    except Exception:
        if not asked:
            raise
    return _capture(model, examples)  # what the model does for those that compile it, then


def _capture(model: nn.Module, examples: Examples) -> Network:
    rows = {v.shape[0] for v in pytree.tree_leaves(examples.by_argument) if _has_batch(v)}
    fixed = 1 if rows - {1} else 0  # one row beside a batch is for all of it, as a mask is
    state, output = TracedState(model), Output()
    around = state.around_forward(output.take_apart)
    draws = no_random_draws(of_torch=False)
    hooks = patch.dict(_global_buffer_registration_hooks)  # torch leaves one where it fails
    with unchanged(model), plain_context(), quiet(), around, draws, hooks:
        try:
            program = _export_in_some_way(model, examples, fixed)
        except UserWarning as lost:
            paths = re.findall(r"self\.([^\s,]+)", str(lost).partition(" assigned ")[0])
            raise AssignedError(assigns(", ".join(map(repr, paths)))) from lost
    if _fixes_batch(program, examples):
        warn(
            f"the forward of {type(model).__name__} makes a number of the batch's size, by "
            "len(...) or int(...) of it, so its graph is for batches of that size only: leave "
            "out a last batch that is smaller, or take .shape[0]",
            stacklevel=8,
        )
    state.refuse_kept()
    exported = program.module(check_guards=False)  # inputs are checked below
    assert isinstance(exported, fx.GraphModule)
    if assigned := list(program.graph_signature.buffers_to_mutate.values()):
        raise AssignedError(assigns(", ".join(map(repr, assigned))))
    if any("_functorch" in getattr(n.target, "__module__", "") for n in exported.graph.nodes):
        raise CaptureError(
            "the forward uses torch.vmap, whose values a graph cannot keep apart from each other: "
            "write it for whole batches, or make its module a leaf: leaf_modules=(...)"
        )
    graph, constants = _Copier(model, state).copy(program, exported, examples, output)
    refuse_names(graph)
    network = Network(model, graph, Additions(constants))
    _refuse_detached_changes(network)
    network.meta.update(captured_with="by torch.export", asks_for_grad=state.asks_for_grad)
    if state.asks_for_dtype:
        network.meta["dtypes"] = Dtypes(state.asks_for_dtype)
    return network


def _export_in_some_way(model: nn.Module, examples: Examples, fixed: int) -> ExportedProgram:
    """Export ``model`` with first dimensions that are its own, or equal, or some of them fixed."""
    dim = torch.export.Dim
    try:
        return _export(model, examples, fixed, dim.DYNAMIC)
    except UserError as error:
        if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
            raise
        return _export(model, examples, fixed, dim.AUTO)
    except Exception as error:
        if not re.search(r"\bs\d+\b", str(error)):  # torch says that a symbolic size is restricted
            raise
        with suppress(Exception):
            return _export(model, examples, fixed, dim.DYNAMIC, oblivious=False)
        with suppress(Exception):
            return _export(model, examples, fixed, dim("batch"))
        raise


def _export(
    model: nn.Module, examples: Examples, fixed: int, rows: Any, *, oblivious: bool = True
) -> ExportedProgram:
    """Export ``model`` with first dimensions as ``rows`` says, but for those of ``fixed`` rows.

    If ``oblivious``, a batch of one is a size as any other. One that has a name is that of the
    first input, and of all that are as large.
    """
    named = _batch_of(examples) if isinstance(rows, torch.export.Dim) else None

    def shape_of(value: object) -> Any:
        if not _has_batch(value) or value.shape[0] == fixed:
            return None
        return {0: rows} if named in (None, value.shape[0]) else None

    met = set[int]()

    def apart(value: Tensor) -> Tensor:
        """Return a copy of a tensor that was met before: export takes it for the same input."""
        if id(value) not in met:
            met.add(id(value))
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    shapes = {name: pytree.tree_map(shape_of, v) for name, v in examples.by_argument.items()}
    with _config.patch(backed_size_oblivious=oblivious):  # type: ignore[attr-defined]
        args, kwargs = examples.map(apart)
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def _batch_of(examples: Examples) -> int | None:
    """Return how many rows the first tensor of the example has."""
    leaves = pytree.tree_leaves(examples.by_argument)
    return next((leaf.shape[0] for leaf in leaves if _has_batch(leaf)), None)


def _fixes_batch(program: ExportedProgram, examples: Examples) -> bool:
    """Tell whether a first dimension that was to be any is a number now: that of the batch."""
    inputs = program.graph_signature.user_inputs
    values = [n.meta.get("val") for n in program.graph.nodes if n.name in inputs]
    sizes = [v.shape[0] for v in values if _has_batch(v)]
    symbols: list[Any] = [size for size in sizes if isinstance(size, torch.SymInt)]
    fixed = [int(size) for size in symbols if size.node.expr.is_Integer]
    # A table's rows are no batch; where a table comes first, nothing else tells which is.
    return bool(fixed) and (len(fixed) == len(symbols) or _batch_of(examples) in fixed)


def _refuse_detached_changes(network: Network) -> None:
    """Refuse changes through ``.data`` of what was used before: export takes it for ``detach()``.

    Autograd knows of changes through the one, and not of those through the other.
    """
    place = positions(network.graph)
    for node in (node for node in place if is_inplace(network, node)):
        for through in origins(network, node.all_input_nodes[0]):
            if operator_name(through) != "detach":
                continue
            value = through.all_input_nodes[0]
            if any(place[u] < place[node] for u in value.users if operator_name(u) != "detach"):
                raise CaptureError(
                    f"the forward changes {str(value.target)!r} through .data or detach() after it "
                    "was used, which torch.export does not tell from each other: change it before"
                )


def _has_batch(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() > 0


# Of what `.float()` and `.to` meet while exporting; under autocast it is another dtype. They stay.
_ASSERT = torch.ops.aten._assert_tensor_metadata.default


class _Copier:
    """Copies an exported graph: inputs first, regions inlined, state fetched from ``model``."""

    def __init__(self, model: nn.Module, state: TracedState) -> None:
        self.model, self.state, self.graph = model, state, fx.Graph()
        self.constants: dict[str, Tensor] = {}

    def copy(
        self, program: ExportedProgram, exported: fx.GraphModule, examples: Examples, output: Output
    ) -> tuple[fx.Graph, dict[str, Tensor]]:
        """Return the graph, and the constants that it fetches."""
        graph = self.graph
        flat_inputs = [node for node in exported.graph.nodes if node.op == "placeholder"]
        args, kwargs = pytree.tree_unflatten(flat_inputs, program.call_spec.in_spec)
        by_input = examples.named(args, kwargs)
        values: dict[fx.Node, Any] = {}
        for node, leaf in _inputs(graph, examples, by_input):
            values[node] = _checked(graph, leaf, node.meta.get("val"), program.range_constraints)
        flat = pytree.tree_leaves(self._copy_nodes(exported, values, ()))
        graph.output(output.put_together(graph, flat))
        return graph, self.constants

    def _copy_nodes(
        self, owner: fx.GraphModule, values: dict[fx.Node, Any], contexts: tuple[Context, ...]
    ) -> Any:
        """Copy the graph of ``owner``, whose inputs are among ``values``; return its output."""
        previous: Context | None = None  # of the region just before, if nothing lies between
        for node in owner.graph.nodes:
            if node.op in ("placeholder", "output") or node.target is _ASSERT:
                continue
            if region := _region(node):
                inner, args, context = region
                _refuse_split(context, previous)
                previous = context
                module = owner.get_submodule(str(inner.target))
                assert isinstance(module, fx.GraphModule)
                inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
                mapped = {p: values[a] for p, a in zip(inputs, args, strict=True)}
                values[node] = self._copy_nodes(module, mapped, (*contexts, context))
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
            function, told = argument.check
            graph.call_function(function, (node, told))
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


def _checked(graph: fx.Graph, node: fx.Node, value: Any, ranges: Mapping[Any, Any]) -> fx.Node:
    """Check an input against the shape, or the value, for which export's branches hold."""
    if not isinstance(value, Tensor):
        graph.call_function(require_value, (node, value))
        return node
    bounds = []
    for size in value.shape:
        told = size if isinstance(size, int) else size.node.expr
        known = ranges.get(told)
        low, high = (known.lower, known.upper) if known is not None else (told, told)
        low = 2 if known is not None and known.lower < 2 and _asks_for_one(size) else low
        bounds.append((_whole(low), _whole(high)))
    return graph.call_function(require_shape, (node, tuple(bounds)))


def _asks_for_one(size: Any) -> bool:
    """Tell whether the model took a branch because a dynamic size was not one."""
    symbol, one = size.node.expr, size.node.hint == 1
    guards = [guard.expr for guard in size.node.shape_env.guards]
    return not one and any(g.free_symbols == {symbol} and not g.subs(symbol, 1) for g in guards)


def _whole(bound: Any) -> int | None:
    """Return a bound as an int; None for an infinite one, or one that is an expression."""
    return int(bound) if isinstance(bound, int) or getattr(bound, "is_Integer", False) else None


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

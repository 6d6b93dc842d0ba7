"""Graphs of Dynamo's: what they are of, and their form.

Parameters and buffers are inputs of such a graph, and no module is called. `raise_graph` turns it
into a network over the model, which the passes know, and `lower_graph` turns that back::

    %l_self_modules_fc_parameters_weight_ = placeholder    <->    %fc_weight = get_attr fc.weight
    %y = call_function linear(%x, %l_self_..., ...)               %y = call_function linear(...)
"""

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import CompileContext

from ..errors import PlanError
from ..ir.additions import ADDITIONS, Additions
from ..ir.network import Network

__all__ = ["Captured", "lower_graph", "raise_graph", "read_graph"]

_STATE = re.compile(r"(.*?)((?:\._modules\['[^']*'\])*\._(?:parameters|buffers)\['[^']*'\])$")
_STEP = re.compile(r"\['([^']*)'\]")


@dataclass(frozen=True)
class State:
    """A parameter or buffer that a graph takes.

    Attributes:
        path: its qualified name in the model.
        value: itself.
        owner: the source of the module that its own source begins at, if that says one.
        inner: its qualified name in that module.
    """

    path: str
    value: Tensor
    owner: Any
    inner: str

    @property
    def owner_path(self) -> str:
        """The path of that module in the model."""
        return self.path.removesuffix(self.inner).rstrip(".")


@dataclass(frozen=True)
class Captured:
    """A graph that a backend got.

    Attributes:
        gm: the graph.
        inputs: its inputs, the values of this call.
        model: what is compiled; None if the graph holds none of its parameters.
        state: its inputs that are the model's, by the names of their placeholders.
        title: which graph it is, for people.
    """

    gm: fx.GraphModule
    inputs: Sequence[Any]
    model: nn.Module | None
    state: dict[str, State]
    title: str

    @cached_property
    def names(self) -> dict[int, str]:
        """The name of each of the model's parameters, by its id."""
        named = self.model.named_parameters() if self.model is not None else ()
        return {id(parameter): name for name, parameter in named}

    @property
    def trains(self) -> bool:
        """Whether the graph is one of training, as in `Network.trains`."""
        assert self.model is not None
        owners = {state.owner_path for state in self.state.values() if state.owner}
        training = all(self.model.get_submodule(path).training for path in owners)
        return training and torch.is_grad_enabled()

    def watch(self) -> None:
        """Have Dynamo capture anew where a module changes mode, or a weight is frozen or thawed.

        By itself it looks at a flag only where the forward reads it.
        """
        nodes = self.gm.graph.find_nodes(op="placeholder")
        sources = [AttrSource(s.owner, "training") for s in self.state.values() if s.owner]
        sources += [
            AttrSource(node._dynamo_source, "requires_grad")
            for node in nodes
            if node.name in self.state and isinstance(self.state[node.name].value, nn.Parameter)
        ]
        for source in dict.fromkeys(sources):
            install_guard(source.make_guard(GuardBuilder.CONSTANT_MATCH))

    def trained_before(self) -> list[str]:
        """Return the parameters of the model, not of this graph, that its inputs depend on."""
        own = {id(state.value) for state in self.state.values()}
        tensors = [value for value in self.inputs if isinstance(value, Tensor)]
        waiting = [t.grad_fn for t in tensors if t.grad_fn is not None]
        seen, found = set[Any](), list[str]()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            key = id(getattr(node, "variable", None))
            if key in self.names and key not in own:
                found.append(self.names[key])
            waiting += [inner for inner, _ in node.next_functions if inner is not None]
        return found


def read_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Captured:
    """Say what Dynamo captured, while it calls its backend.

    Raises:
        PlanError: if a graph of training takes parameters and does not show whose.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    found = {
        node.name: (value, _parsed(getattr(node, "_dynamo_source", None)))
        for node, value in zip(nodes, inputs, strict=True)
        if isinstance(value, Tensor)
    }
    owners = [parsed[0] for _, parsed in found.values() if parsed is not None]
    model = _find_model(owners)
    named = _names(model) if model is not None else {}
    state: dict[str, State] = {}
    for name, (value, parsed) in found.items():
        owner, inner = parsed or (None, "")
        for path in named.get(id(value), ()):
            if owner is None or f".{path}".endswith(f".{inner}"):
                state[name] = State(path, value, owner, inner)
                break
    learns = [n for n, (v, _) in found.items() if isinstance(v, nn.Parameter) and v.requires_grad]
    if learns and torch.is_grad_enabled() and not any(s.owner for s in state.values()):
        raise PlanError(
            f"{_title()} takes {learns[0]!r} and shows no module that has it, so that no one can "
            "tell which layer that is, or whether it is in training mode: compile the model "
            "itself, torch.compile(model, backend=...)"
        )
    return Captured(gm, inputs, model if state else None, state, _title())


def _parsed(source: Any) -> tuple[Any, str] | None:
    """Return the source of a module and the name of the state there that ``source`` is of."""
    match = _STATE.match(source.name) if source is not None else None
    if match is None:
        return None
    while source.name != match[1]:
        source = source.base
    return source, ".".join(_STEP.findall(match[2]))


def _names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, value in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(value), []).append(name)
    return names


def _find_model(owners: Sequence[Any]) -> nn.Module | None:
    """Return the module that was compiled: the outermost whose call runs, inside the compiled."""
    found = None
    at: FrameType | None = sys._getframe()
    while at is not None and not at.f_code.co_filename.endswith("_dynamo/eval_frame.py"):
        if at.f_code is nn.Module._call_impl.__code__:
            found = at.f_locals["self"]
        at = at.f_back
    if found is not None:
        return found  # type: ignore[no-any-return]
    values = [_value_of(owner, InstructionTranslator.current_tx()) for owner in owners]
    models = list(dict.fromkeys(value for value in values if isinstance(value, nn.Module)))
    if len(models) > 1:
        raise PlanError(
            f"torch.compile was given a function that calls {len(models)} models, "
            f"{', '.join(type(m).__name__ for m in models)}: which of them is the plan for? "
            "Compile that one itself, torch.compile(model, backend=...)"
        )
    return models[0] if models else None


def _value_of(source: Any, translator: Any) -> Any:
    """Return what a variable, or an attribute of one, is in the frame that is captured."""
    if hasattr(source, "local_name"):
        return translator.f_locals.get(source.local_name)
    if hasattr(source, "global_name"):
        return translator.f_globals.get(source.global_name)
    value = _value_of(source.base, translator) if hasattr(source, "base") else None
    member = getattr(source, "member", None)  # a source without one only says more of its base
    return value if member is None else getattr(value, member, None)


def _title() -> str:
    code = InstructionTranslator.current_tx().f_code
    place = f"{code.co_name} ({code.co_filename.rpartition('/')[2]}:{code.co_firstlineno})"
    return f"graph {CompileContext.current_compile_id()} of {place}"


def raise_graph(captured: Captured) -> Network:
    """Return a network over the captured model, whose graph fetches what Dynamo's takes."""
    gm, model = captured.gm, captured.model
    assert model is not None
    holder = nn.Module()  # in train mode, whatever the model's root is in
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(holder, name, getattr(model, name))
    prefixes = {s.owner.name: s.owner_path for s in captured.state.values() if s.owner}
    graph, values, own = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Any]()
    for node in gm.graph.nodes:
        if node.name in captured.state:
            new = graph.get_attr(captured.state[node.name].path)
        elif node.op == "get_attr":
            own[str(node.target)] = getattr(gm, str(node.target))
            new = graph.get_attr(f"{ADDITIONS}.{node.target}")
        else:
            new = graph.node_copy(node, values.__getitem__)
            _name_inplace(new)
        new.meta = _stack(node, prefixes)
        if node.op != "output":
            new.meta["val"] = node.meta.get("example_value")
        values[node] = new
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    modules = {name: value for name, value in own.items() if isinstance(value, nn.Module)}
    network = Network(holder, graph, Additions(tensors, modules))
    network.meta["dynamo"] = {new.name: old for old, new in values.items()}
    return network


def _stack(node: fx.Node, prefixes: dict[str, str]) -> dict[str, Any]:
    """Return the modules that a node lies in, by their paths in the model, as export notes them."""
    stack = {}
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        for owner, prefix in prefixes.items():
            if path == owner or path.startswith(f"{owner}."):
                stack[key] = (f"{prefix}{path.removeprefix(owner)}".lstrip("."), kind)
    return {"nn_module_stack": stack} if stack else {}


def _name_inplace(node: fx.Node) -> None:
    """Give ``inplace`` by its name, as passes look for it; modules give it by its place."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != _FUNCTIONAL:
        return
    names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    if "inplace" in names[: len(node.args)]:
        at = names.index("inplace")
        node.kwargs = {**dict(zip(names[at:], node.args[at:], strict=False)), **node.kwargs}
        node.args = node.args[:at]


_FUNCTIONAL = "torch.nn.functional"


def lower_graph(network: Network, gm: fx.GraphModule, rate: float) -> None:
    """Give ``gm`` the graph of ``network``, the model's state being inputs again.

    The rate of local updates becomes a constant, and no one counts skipped ones.
    """
    olds: dict[str, fx.Node] = network.meta["dynamo"]
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    taken: dict[str, fx.Node] = {}  # by the name of the node that stands for it
    for name, old in olds.items():
        if old.op == "placeholder":
            taken[name] = graph.node_copy(old)
            taken[name]._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    fetches = (node for node in network.graph.nodes if node.op == "get_attr")
    fetched = {str(n.target): taken[n.name] for n in fetches if n.name in taken}
    for node in network.graph.nodes:
        target = str(node.target)
        if node.name in taken:
            values[node] = taken[node.name]
        elif node.op != "get_attr":
            values[node] = new = graph.node_copy(node, values.get)
            new.kwargs = {k: v for k, v in new.kwargs.items() if k != "skipped"}
            new.meta = dict(olds[node.name].meta) if node.name in olds else {}
        elif target in (f"{ADDITIONS}.rate", f"{ADDITIONS}.rates"):
            own = network.get_buffer(target)
            options: dict[str, Any] = {"dtype": torch.float32, "device": own.device}
            if own.dim():
                values[node] = graph.call_function(torch.tensor, (own.tolist(),), options)
            else:
                values[node] = graph.call_function(torch.full, ((), rate), options)
        elif target.startswith(f"{ADDITIONS}."):
            if target != f"{ADDITIONS}.skipped":
                values[node] = graph.get_attr(target.removeprefix(f"{ADDITIONS}."))
        else:
            values[node] = fetched[target]
    gm.graph = graph
    gm.recompile()

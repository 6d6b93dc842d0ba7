"""What lies before the boundary of a Plan, and what backward reaches: for the laws to judge by."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxlocal
from fxlocal import Plan


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def nodes_before(captured: fx.GraphModule, plan: Plan) -> list[fx.Node]:
    analysis = fxlocal.analyze(captured)
    boundary = analysis.boundary(plan.local.until) if plan.local else 0
    if boundary == 0:
        return []
    nodes = list(captured.graph.nodes)
    return nodes[: [node.name for node in nodes].index(analysis.start(boundary))]


def prefix_parameters(model: nn.Module, captured: fx.GraphModule, plan: Plan) -> set[str]:
    """Names of the parameters of every computation before the boundary."""
    return parameters_of(model, captured, nodes_before(captured, plan))


def is_tied_across(model: nn.Module, captured: fx.GraphModule, plan: Plan) -> bool:
    before = nodes_before(captured, plan)
    after = list(captured.graph.nodes)[len(before) :]
    sides = (parameters_of(model, captured, nodes) for nodes in (before, after))
    tied = set.intersection(*sides)
    return any(model.get_parameter(name).requires_grad for name in tied)


def parameters_of(model: nn.Module, captured: fx.GraphModule, nodes: Sequence[fx.Node]) -> set[str]:
    named = dict(model.named_parameters())
    found: set[str] = set()
    for node in nodes:
        if node.op == "call_module":
            inside = captured.get_submodule(str(node.target)).parameters()
            found |= {name for p in inside for name, q in named.items() if p is q}
        for used in node.all_input_nodes if node.op.startswith("call") else ():
            if used.op == "get_attr":
                value = _fetch(captured, str(used.target))
                found |= {name for name, q in named.items() if value is q}
    return found


def _fetch(root: Any, target: str) -> Any:
    for part in target.split("."):
        root = getattr(root, part)
    return root


def reachable(outputs: Any, model: nn.Module) -> set[str]:
    """Names of the parameters that backward from ``outputs`` would reach."""
    names = {id(p): name for name, p in model.named_parameters()}
    stack = [value.grad_fn for value in tensors(outputs)]
    seen: set[Any] = set()
    found: set[str] = set()
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            found.add(names[id(function.variable)])
        stack.extend(previous for previous, _ in function.next_functions)
    return found

"""Let the norms before a boundary use, and keep, their running statistics.

    %bn1 = call_module bn1(%conv1)    ->    %batch_norm = call_function batch_norm(%conv1,
                                                %bn1_running_mean, ..., False, 0.1, 1e-05)

A norm is found as a module, or as a function that batch norm or an instance norm that tracks calls:
of a module that capture looks into, or in ATen; one that keeps no running statistics is left
alone. Forward-changing: opt-in, by ``LocalPrefix(norm="eval")``. Costs less than batch statistics.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from fxlocal.errors import PlanError
from fxlocal.ir.boundary import nodes_before
from fxlocal.ir.contexts import contexts
from fxlocal.ir.edit import insert_before
from fxlocal.ir.nodes import Origin, computations, module_of
from fxlocal.ir.operators import arguments_of, operator_name, overwrites
from fxlocal.ops.values import instance_norm_by_statistics

__all__ = ["replace_norms"]

_FUNCTIONAL = ["input", "running_mean", "running_var", "weight", "bias"]
_ATEN = ["input", "weight", "bias", "running_mean", "running_var"]
_FLAGS = {"batch_norm": "training", "instance_norm": "use_input_stats"}
_FLAGS |= {"native_batch_norm": "training", "cudnn_batch_norm": "training"}
_FLAG_AT = 5  # its place, in both orders
_FORWARDS = {_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward}


def replace_norms(gm: fx.GraphModule, *, start: str) -> None:
    """Fix the statistics of each norm before the node named ``start``.

    Raises:
        PlanError: if there is no such node, or a statistic that no rewrite can fix: of a norm
            inside a module that is kept whole, with a forward or hooks of its own, or changed in
            place.
    """
    before = nodes_before(gm, start)
    nodes = [node for node in computations(gm.graph) if node in before]
    for node in nodes:
        _refuse_hidden(gm, node)
    _refuse_moved(gm, nodes)
    behind = {_owner(n) for n in computations(gm.graph) if n not in before}
    behind -= {_owner(node) for node in nodes}
    for node in nodes:
        module = module_of(gm, node)
        if isinstance(module, _NormBase) and module.running_mean is not None:
            _replace_module(node, module)
        elif _tracked_mean(node) is not None:
            if len(node.args) > _FLAG_AT:
                node.update_arg(_FLAG_AT, False)
            else:
                node.update_kwarg(_FLAGS[operator_name(node)], False)
        elif (counter := _counter_of(node)) is not None:
            if counter.removesuffix("num_batches_tracked") in behind:
                continue  # it counts for a norm that begins the other side
            for user in list(node.users):
                user.replace_input_with(node, node.all_input_nodes[0])
            gm.graph.erase_node(node)


def _tracked_mean(node: fx.Node) -> Any:
    """Return what a norm that is a function takes for its running mean, if it is one."""
    if node.op != "call_function" or operator_name(node) not in _FLAGS:
        return None
    names = _FUNCTIONAL if node.target in (F.batch_norm, F.instance_norm) else _ATEN
    return arguments_of(node, names).get("running_mean")


def _owner(node: fx.Node) -> str | None:
    """Return the path, with its dot, of the module whose statistics a function moves."""
    mean = _tracked_mean(node)
    return str(mean.target).removesuffix("running_mean") if isinstance(mean, fx.Node) else None


def _refuse_hidden(gm: fx.GraphModule, node: fx.Node) -> None:
    """Refuse a norm in a module that is kept whole, or whose own forward would be lost."""
    module = module_of(gm, node)
    inside = module.named_modules() if module is not None else ()
    for name, one in inside:
        path = f"{node.target}.{name}".rstrip(".")
        if not isinstance(one, _NormBase) or one.running_mean is None:
            continue
        if one is not module:
            raise PlanError(
                f"norm='eval' cannot fix the statistics of {path!r}: {str(node.target)!r} is kept "
                "whole. Let capture look into it, or put the boundary before it"
            )
        if type(one).forward not in _FORWARDS:
            raise PlanError(
                f"norm='eval' cannot fix the statistics of {path!r}: {type(one).__name__} has a "
                "forward of its own and is kept whole. Let capture look into it, or put the "
                "boundary before it"
            )
        if one._forward_hooks or one._forward_pre_hooks:
            raise PlanError(
                f"norm='eval' cannot fix the statistics of {path!r}: it has forward hooks, which "
                "would not run. Remove them, or put the boundary before it"
            )


def _refuse_moved(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    """Refuse a buffer of floating-point numbers that one of ``nodes`` changes in place."""
    floats = {n for n, b in gm.named_buffers(remove_duplicate=False) if b.is_floating_point()}
    fetches = [n for n in gm.graph.find_nodes(op="get_attr") if n.target in floats]
    for fetch in fetches:
        if any(overwrites(gm, node, fetch) for node in nodes):
            raise PlanError(
                f"norm='eval' cannot tell whether the buffer {str(fetch.target)!r}, which the "
                "forward changes in place before the boundary, is a running statistic: use "
                "F.batch_norm there, or put the boundary before it"
            )


def _replace_module(node: fx.Node, module: _NormBase) -> None:
    path = str(node.target)
    origin = Origin("replace_norms", path)

    def fetch(name: str) -> fx.Node | None:
        if getattr(module, name) is None:
            return None
        return insert_before(node, "get_attr", f"{path}.{name}", (), origin)

    state = [fetch(name) for name in ("running_mean", "running_var", "weight", "bias")]
    function: Any = F.batch_norm
    args = (*node.args, *state, False, module.momentum or 0.0, module.eps)
    if isinstance(module, _InstanceNorm):  # which takes a sample alone too
        function = instance_norm_by_statistics
        num_spatial = module._get_no_batch_dim() - 1  # type: ignore[no-untyped-call]
        args = (*node.args, *state, module.eps, num_spatial)
    new = insert_before(node, "call_function", function, args, origin)
    if contexts(node):
        new.meta["fxlocal_contexts"] = contexts(node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _counter_of(node: fx.Node) -> str | None:
    """Return the path of the batch counter that ``node`` moves, if it moves one."""
    counter = node.args[0] if node.args and operator_name(node) in ("add_", "iadd") else None
    path = str(counter.target) if isinstance(counter, fx.Node) else ""
    return path if path.endswith("num_batches_tracked") else None

"""Let the batch norms before a boundary use, and keep, their running statistics.

    %bn1 = call_module bn1(%conv1)    ->    %batch_norm = call_function batch_norm(%conv1,
                                                %bn1_running_mean, ..., False, 0.1, 1e-05)

A batch norm is found as a module or as an ATen call; one that keeps no running statistics is left
alone. Forward-changing: opt-in, by ``LocalPrefix(norm="eval")``. Costs less than batch statistics.
"""

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxlocal.ir.boundary import nodes_before
from fxlocal.ir.contexts import contexts
from fxlocal.ir.edit import insert_before
from fxlocal.ir.nodes import Origin, computations, module_of

__all__ = ["replace_norms"]

_ATEN_TRAINING_FLAG = 5  # aten.batch_norm(input, weight, bias, mean, var, training, ...)


def replace_norms(gm: fx.GraphModule, *, start: str) -> None:
    """Fix the statistics of each batch norm before the node named ``start``.

    Raises:
        PlanError: if there is no such node.
    """
    before = nodes_before(gm, start)
    for node in [node for node in computations(gm.graph) if node in before]:
        module = module_of(gm, node)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            _replace_module(node, module)
        elif node.target is torch.ops.aten.batch_norm.default and node.args[3] is not None:
            node.update_arg(_ATEN_TRAINING_FLAG, False)
        elif node.target is torch.ops.aten.add_.Tensor and _counts_batches(node):
            gm.graph.erase_node(node)


def _replace_module(node: fx.Node, module: _BatchNorm) -> None:
    path = str(node.target)
    origin = Origin("replace_norms", path)

    def fetch(name: str) -> fx.Node | None:
        if getattr(module, name) is None:
            return None
        return insert_before(node, "get_attr", f"{path}.{name}", (), origin)

    state = [fetch(name) for name in ("running_mean", "running_var", "weight", "bias")]
    args = (*node.args, *state, False, module.momentum or 0.0, module.eps)
    new = insert_before(node, "call_function", F.batch_norm, args, origin)
    if contexts(node):
        new.meta["fxlocal_contexts"] = contexts(node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _counts_batches(node: fx.Node) -> bool:
    counter = node.args[0]
    return isinstance(counter, fx.Node) and str(counter.target).endswith("num_batches_tracked")

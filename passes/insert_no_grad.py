"""Run everything before a boundary under ``torch.no_grad``, so that it keeps no activations.

    %conv = call_module conv(%x)                     with torch.no_grad():
    %detach = call_method detach(%conv)        ->        %conv = call_module conv(%x)
    %fc = call_module fc(%detach)                        %detach = call_method detach(%conv)
                                                     %fc = call_module fc(%detach)

The cuts already stop the gradient; this pass only saves the memory and the time of recording.
The region is a tag on its nodes, outside any context of the model's own; see `fxlocal.ir.nodes`.

A max pool with no backward to suit reads the layout in which a CPU computes it several times as
fast, and gives back the one of its input::

    %pool = call_module pool(%relu)     ->   %channels_last = call_function channels_last(%relu)
                                             %pool = call_module pool(%channels_last)
                                             %laid_out_as = call_function laid_out_as(%pool, %relu)

Forward-exact: a maximum is the same in any layout.
"""

from torch import fx, nn

from fxlocal.ir.boundary import nodes_before
from fxlocal.ir.contexts import NO_GRAD, contexts
from fxlocal.ir.edit import insert_after, insert_before, replace_later_uses
from fxlocal.ir.nodes import Origin, computations, module_of
from fxlocal.ir.operators import operator_name
from fxlocal.ops.values import channels_last, laid_out_as

__all__ = ["insert_no_grad"]


def insert_no_grad(gm: fx.GraphModule, *, start: str) -> None:
    """Tag each computation before the node named ``start`` to run without recording."""
    before = nodes_before(gm, start)
    for node in [*computations(gm.graph)]:
        if node in before:
            node.meta["fxlocal_contexts"] = (NO_GRAD, *contexts(node))
            if _is_max_pool(gm, node):
                _lay_out(node)


def _is_max_pool(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether ``node`` is a max pool of images that returns nothing else."""
    module = module_of(gm, node)
    found = isinstance(module, nn.MaxPool2d) and not module.return_indices
    return (found or operator_name(node) == "max_pool2d") and len(node.all_input_nodes) == 1


def _lay_out(pool: fx.Node) -> None:
    value, origin = pool.all_input_nodes[0], Origin("insert_no_grad", str(pool.target))
    before = insert_before(pool, "call_function", channels_last, (value,), origin)
    pool.replace_input_with(value, before)
    after = insert_after(pool, "call_function", laid_out_as, (pool, value), origin)
    replace_later_uses(pool, after)
    for new, old in ((before, value), (after, pool)):
        new.meta |= {"fxlocal_contexts": contexts(pool)}
        new.meta |= {"val": old.meta["val"]} if "val" in old.meta else {}

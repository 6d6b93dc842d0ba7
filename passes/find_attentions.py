"""Find where a network attends: values mixed by weights that the network computes itself.

    %scaled_dot_product_attention(q, k, v)                    a fused call, or one of a library
    %attn: call_module nn.MultiheadAttention                  a module that is kept whole
    %softmax -> %dropout -> %matmul(dropout, v)               written out

Known by the names of operators and classes, and of what is written out by a softmax whose result,
dropped out or reshaped perhaps, is multiplied with a matrix. Linear attention without a softmax is
not found.
"""

from torch import fx, nn

from fxlocal.ir.nodes import computations, module_of
from fxlocal.ir.operators import operator_name

__all__ = ["find_attentions"]

_SOFTMAXES = {"softmax", "_softmax", "_safe_softmax"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_CASTS = {"to", "_to_copy", "type_as", "float"}
_VIEWS = {"expand", "view", "_unsafe_view", "reshape", "contiguous", "clone"}
_KEPT = {"dropout", *_CASTS, *_VIEWS}


def find_attentions(gm: fx.GraphModule) -> tuple[str, ...]:
    """Return the names of the nodes that attend, in execution order; see the module's docstring."""
    nodes = list(computations(gm.graph))
    return tuple(node.name for node in nodes if _is_named(gm, node) or _is_written_out(gm, node))


def _is_named(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = module_of(gm, node)
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return True
    name = operator_name(node) if module is None else type(module).__name__
    return "attention" in name.lower()


def _is_written_out(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a softmax weighs the rows of a matrix."""
    if operator_name(node) not in _SOFTMAXES and not isinstance(module_of(gm, node), nn.Softmax):
        return False
    reached = [node]
    for value in reached:  # grows
        for user in value.users:
            name = operator_name(user)
            if name in _PRODUCTS:
                return True
            if name in _KEPT or isinstance(module_of(gm, user), nn.Dropout):
                reached.append(user)
    return False

"""Which residual branches compute nothing once channels are cut, and their blocks without them.

A layer that has lost all its inputs or outputs computes zeros, and so does what follows it in its
branch, until a sum with something else: the sum is that other operand then. The module whose
forward has the sum, a residual block, is replaced by a graph of what is left: its shortcut.
"""

from collections.abc import Collection, Iterator

from torch import fx, nn

from ..errors import PlanError
from ..facts import Layer
from ..ir.nodes import module_of
from ..ir.operators import (
    CONCATS,
    DROPOUTS,
    NORMS,
    PRODUCTS,
    SUMS,
    is_inplace,
    is_plain,
    operator_name,
)
from ..passes import find_layers

__all__ = ["EmptyError", "find_shortened"]

_KEEP_ZERO = {"relu", "relu6", "gelu", "silu", "hardswish", "tanh", "elu", "celu", "selu", "mish"}
_KEEP_ZERO |= {"leakyrelu", "prelu", "identity", "flatten", "contiguous", "clone", "view", "mean"}
_KEEP_ZERO |= {name.replace("_", "") for name in DROPOUTS | NORMS}
_KEEP_ZERO_PARTS = ("pool", "norm", "upsample", "interpolate", "dropout", "pad")


class EmptyError(PlanError):
    """A layer that would lose all channels is in no branch that can be removed; ``path`` is its."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"no channel of {path!r} is left, and {reason}: only the branch of a residual block "
            "can be removed; keep a channel"
        )
        self.path = path


def find_shortened(
    gm: fx.GraphModule, source: nn.Module, empty: Collection[str]
) -> dict[str, fx.GraphModule]:
    """Return, by each of its paths, what to put in the place of a block that loses a branch.

    Args:
        gm: the graph of the whole model.
        source: the model.
        empty: paths of the layers that lose all their inputs or outputs.

    Raises:
        EmptyError: if one of them lies in no such branch.
    """
    owners: dict[str, str] = {}
    for merge, _, path in _merges(gm, find_layers(gm), empty):
        stack = list((merge.meta.get("nn_module_stack") or {}).values())
        owner = str(stack[-1][0]) if stack else ""
        if not owner:
            raise EmptyError(path, f"the sum behind its branch, {merge.name!r}, is in no block")
        owners.setdefault(owner, path)
    blocks = {source.get_submodule(owner): owner for owner in owners}  # one may have several names
    short = {b: _shortened(source, owner, owners[owner], empty) for b, owner in blocks.items()}
    named = source.named_modules(remove_duplicate=False)
    return {name: short[module] for name, module in named if module in short}


def _shortened(source: nn.Module, owner: str, path: str, empty: Collection[str]) -> fx.GraphModule:
    block = source.get_submodule(owner)
    inside = {p.removeprefix(f"{owner}.") for p in empty if p.startswith(f"{owner}.")}
    flags = [(module, module.training) for module in block.modules()]
    try:
        gm, other = (fx.symbolic_trace(block.train(mode)) for mode in (True, False))
    except Exception as error:  # the block's own code runs
        raise EmptyError(path, f"{owner!r} cannot be traced by itself ({error})") from error
    finally:
        for module, flag in flags:
            module.training = flag
    if gm.code != other.code:
        raise EmptyError(path, f"{owner!r} computes something else in evaluation mode")
    merges = list(_merges(gm, find_layers(gm), inside))
    if not merges:
        raise EmptyError(path, f"its layers lie outside of {owner!r}, which adds its branch")
    for merge, rest, _ in merges:
        if any(is_inplace(gm, user) for user in merge.users):
            with gm.graph.inserting_before(merge):
                rest = gm.graph.call_method("clone", (rest,))
        merge.replace_all_uses_with(rest)
    gm.graph.eliminate_dead_code()
    short = fx.GraphModule(gm, gm.graph, type(block).__name__)
    short.training = block.training
    return short


def _merges(
    gm: fx.GraphModule, layers: Collection[Layer], empty: Collection[str]
) -> Iterator[tuple[fx.Node, fx.Node, str]]:
    """Yield each sum of zeros and something else, that, and the layer that makes the zeros."""
    paths = {layer.node: layer.path for layer in layers}
    zero: dict[fx.Node, str] = {}  # which layer's lack of channels makes a value zero
    for node in gm.graph.nodes:
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_plain(n)]
        lost = [n for n in inputs if n in zero]
        if paths.get(node.name) in empty:
            zero[node] = zero[lost[0]] if lost else paths[node.name]
        elif lost and not is_plain(node):
            name = operator_name(node)
            rest = [n for n in inputs if n not in zero]
            if name in SUMS and rest:
                yield node, rest[0], zero[lost[0]]
            elif name in PRODUCTS or node.name in paths or (not rest and _keeps_zero(gm, node)):
                zero[node] = zero[lost[0]]
            else:
                raise EmptyError(zero[lost[0]], f"{node.name!r} needs what it computes")


def _keeps_zero(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a value made of zeros alone is zero, its norm's shift apart."""
    module, name = module_of(gm, node), operator_name(node)
    if node.op == "output":
        return False
    if name in SUMS | CONCATS:
        return True
    name = (name if module is None else type(module).__name__).lower().replace("_", "")
    return name in _KEEP_ZERO or any(part in name for part in _KEEP_ZERO_PARTS)

"""Find the tensors that a model returns in a container or an object, each by its name or index.

    return ImageOutput(loss=%loss, logits=%linear)   ->   "loss": (), "logits": (16, 10)

Those that lie deeper are not found, nor is what a leaf module returns.
"""

from collections.abc import Sequence

from torch import fx

from fxlocal.facts import BlockInput, Layer, TensorSpec
from fxlocal.ir.fakes import FakeRun
from fxlocal.ir.nodes import parts_of

__all__ = ["find_outputs"]


def find_outputs(
    gm: fx.GraphModule, run: FakeRun, *, layers: Sequence[Layer]
) -> dict[str | int, BlockInput]:
    """Return each tensor that the model returns; none if it returns one tensor alone.

    ``gm`` is the unrewritten graph of the source, ``run`` a run of it on fake tensors.
    """
    found: dict[str | int, BlockInput] = {}
    for name, part in parts_of(gm.graph.output_node().args[0]).items():
        value = run.values.get(part.name) if isinstance(part, fx.Node) else None
        if isinstance(part, fx.Node) and isinstance(value, TensorSpec):
            last = len(value.shape) - 1 if layers[-1].kind == "linear" and value.shape else 1
            found[name] = BlockInput(part.name, value.shape, last)
    return found

"""Find what shapes each layer meets.

The graph runs once on fake tensors, under its own contexts and whatever autocast the caller is in.

    %conv1: call_module conv1(%x)    ->    Shapes(pre=(128, 3, 32, 32), post=(128, 16, 32, 32), ...)
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxlocal.facts import Layer, Shapes
from fxlocal.ir.contexts import contexts
from fxlocal.ir.fakes import run_on_fakes
from fxlocal.ir.nodes import module_of

__all__ = ["find_shapes"]


def find_shapes(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, layers: Sequence[Layer]
) -> tuple[Shapes, ...]:
    """Return one `Shapes` per layer.

    Args:
        gm: the graph of the source, unrewritten.
        example_inputs: one batch of inputs; only shapes, dtypes and devices are used.
        layers: what `find_layers` found.
    """
    found: dict[str, Shapes] = {}
    kinds = {layer.node: layer.kind for layer in layers}
    run_on_fakes(gm, example_inputs, partial(_Noter, gm, kinds, found))
    return tuple(found[layer.node] for layer in layers)


class _Noter(fx.Interpreter):
    """Interprets a graph and notes the shapes of some nodes."""

    def __init__(
        self,
        gm: fx.GraphModule,
        kinds: Mapping[str, str],
        found: dict[str, Shapes],
        given: frozenset[int],
    ) -> None:
        super().__init__(gm)
        self.gm, self.kinds, self.found = gm, kinds, found

    def run_node(self, n: fx.Node) -> Any:
        with ExitStack() as stack:
            for context in contexts(n):  # as in the generated code
                stack.enter_context(eval(context, {"torch": torch}))
            result = super().run_node(n)
        if n.name in self.kinds:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            values = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
            pre, module = values["input"], module_of(self.gm, n)
            weight = values["weight"] if module is None else cast(Tensor, module.weight)
            self.found[n.name] = Shapes(
                *(tuple(pre.shape), tuple(result.shape), tuple(weight.shape)),
                dtype=str(result.dtype).removeprefix("torch."),
                device=result.device.type,
                channels_last=self.kinds[n.name] == "linear" or pre.stride(1) == 1,
            )
        return result

"""Hand a network to `torch.compile` or to CUDA graphs, and never fall back in silence."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch

from ..errors import PlanError
from ..ir.network import Network
from ..ir.source import arguments, train_mode
from ..ir.stages import find_stages
from ..ops.local_modules import backward, let_backward_compile
from .cudagraph import GraphedNetwork

__all__ = ["ByModule", "compile_network", "make_callable"]


def make_callable(
    how: bool | Literal["cudagraph"] | Mapping[str, Any],
) -> Callable[[Network], Callable[..., Any]]:
    """Return what makes a network's callable: itself, its compiled form or its CUDA graphs.

    Raises:
        ValueError: if ``how`` is none of the ways of a `fxlocal.Driver` to compile.
    """
    if how == "cudagraph":
        return _graphed
    if isinstance(how, Mapping):
        return partial(compile_network, options=how)
    if not isinstance(how, bool):
        raise ValueError(
            f"compile={how!r}: give True, a dict of torch.compile's keyword arguments, or "
            "'cudagraph'"
        )
    return partial(compile_network, options={}) if how else lambda network: network


def _graphed(network: Network) -> GraphedNetwork:
    _refuse_unsteady(network, "a CUDA graph")
    return GraphedNetwork(network)


def _refuse_unsteady(network: Network, what: str) -> None:
    """Refuse a network that runs other nodes, or on another number of rows, in each step."""
    drop = network.history.plan.drop if network.history else None
    if drop is not None and (drop.mode == "block" or drop.replace):
        reason = "other blocks" if drop.mode == "block" else "another number of rows"
        raise PlanError(
            f"{drop!r}: each step computes {reason}, which {what} cannot hold. Give compile=False, "
            "or StochasticDepth(mode='row')"
        )


def compile_network(network: Network, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile ``network`` as one graph; local modules one by one, if it cannot hold them.

    It cannot with replay buffers between them, or where Dynamo traces no backward.

    Each network has code of its own, so each Plan is compiled once and shares no recompile limit
    with another. A graph break is an error, as `torch.compile` would then run parts in eager,
    unless its ``options`` say ``fullgraph=False``.

    Raises:
        PlanError: if stochastic depth has other nodes, or shapes, in each step.
    """
    _refuse_unsteady(network, "one compiled graph")
    options = {"fullgraph": True, **options}
    added = network.fxlocal
    if added.loss_scale is not None and (added.replay is not None or not let_backward_compile()):
        return ByModule(network, options)
    compiled: Callable[..., Any] = torch.compile(network, **options)
    return compiled


class ByModule:
    """A network whose local modules are compiled one by one, with eager backwards between them."""

    def __init__(self, network: Network, options: Mapping[str, Any]) -> None:
        self.network = network
        with train_mode(network):
            self._graph = network.graph
        self._stages = find_stages(network)
        self._compiled = [torch.compile(stage.network, **options) for stage in self._stages]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the network: output and loss, or in evaluation mode what the model returns."""
        if not self.network.training:
            return self.network(*inputs, **named)
        self.network.prepare_call(*inputs, **named)
        if self.network.fxlocal.rate is not None and self.network.meta["micro_batches"].more:
            raise PlanError(
                "accumulate: local modules that are compiled one by one apply the updates of a "
                "prefix with each micro-batch. Compile nothing, or freeze the prefix (Freeze())"
            )
        values = arguments(self._graph, inputs, named)
        scale, buffers = self.network.fxlocal.loss_scale, self.network.fxlocal.replay
        assert scale is not None
        output = loss = None
        for stage, compiled in zip(self._stages, self._compiled, strict=True):
            if buffers is not None and stage.index > 0:
                names = self._stages[stage.index - 1].outputs
                batch = buffers[stage.index - 1](*(values[name] for name in names))
                values.update(zip(names, batch, strict=True))
            made, (output, loss) = compiled(*(values[name] for name in stage.inputs))
            values.update(zip(stage.outputs, made, strict=True))
            if loss is not None and stage is not self._stages[-1]:
                backward(loss, scale)
        return output, loss

"""Carry out a Plan on a model: capture, analyse, list the rewrites, run them."""

from functools import partial
from typing import Any

from torch import fx, nn

from .analysis import Analysis, analyze
from .capture import capture
from .graph import Origin, parameter_uses, positions
from .network import Network
from .passes import insert_cuts, insert_local_updates, insert_no_grad, replace_norms
from .passes.insert_local_updates import RATE
from .plan import Freeze, Plan
from .runner import Rewrite, run_passes

__all__ = ["emit", "release_gradients", "set_rate", "transform"]


def transform(model: nn.Module, plan: Plan, *example_inputs: Any) -> Network:
    """Return ``model`` rewritten by ``plan``: a GraphModule that shares its state.

    The network trains in the user's own loop and under `torch.compile`; in evaluation mode it
    runs the source's own forward. The source's code is untouched. ``.grad`` of each parameter
    before the boundary is set to None, so that the optimizer leaves it alone.

    Args:
        model: the model, or a network of fxlocal's, whose source is then rewritten afresh.
        plan: what to do.
        example_inputs: one batch of positional inputs, where capture needs shapes.

    Raises:
        CaptureError: if the model cannot be captured.
        PlanError: if the plan does not fit the model; nothing has been changed then.

    Example:
        >>> import torch
        >>> from fxlocal import LocalPrefix
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = transform(model, Plan(local=LocalPrefix(until="2")))
        >>> net(torch.ones(3, 4)).sum().backward()
        >>> [p.grad is not None for p in net.parameters()]
        [False, False, True, True]
    """
    captured = capture(model, *example_inputs)
    network = emit(captured, plan, analyze(captured))
    release_gradients(network)
    return network


def emit(captured: Network, plan: Plan, analysis: Analysis) -> Network:
    """Run the rewrites of ``plan`` on a copy of ``captured``, whose facts are ``analysis``."""
    network = run_passes(captured, build_pipeline(plan, analysis), plan)
    network.meta.update(captured=captured, rebuild=_rebuild)
    return network


def _rebuild(source: nn.Module, plan: Plan, training: bool) -> Network:
    """Make a pickled network again."""
    return transform(source, plan).train(training)


def build_pipeline(plan: Plan, analysis: Analysis) -> tuple[Rewrite, ...]:
    """Return the rewrites of ``plan``, in the order in which they must run.

    Raises:
        PlanError: if the plan does not fit the model.
    """
    prefix = plan.local
    boundary = analysis.boundary(prefix.until) if prefix else 0
    if prefix is None or boundary == 0:
        return ()
    steps: list[Rewrite] = []
    start = analysis.start(boundary)
    if not isinstance(prefix.rule, Freeze):  # first: reads the original producers of pre and post
        local = partial(insert_local_updates, start=start, layers=analysis.layers[:boundary])
        steps.append(partial(local, skips=analysis.skips, rule=prefix.rule))
    if prefix.norm == "eval":
        steps.append(partial(replace_norms, start=start))
    steps.append(partial(insert_cuts, start=start, layer=analysis.layers[boundary].path))
    steps.append(partial(insert_no_grad, start=start))  # last: covers what the others inserted
    return tuple(steps)


def set_rate(network: Network, rate: float) -> None:
    """Give the local updates of ``network`` another rate: a value in a buffer, no new code."""
    if RATE in network.additions:
        network.additions[RATE].fill_(rate)


def release_gradients(network: Network) -> None:
    """Set ``.grad`` to None for each parameter that lies before the cuts of ``network``.

    An optimizer skips a parameter without gradient; with a stale or zero one, momentum and weight
    decay would go on moving it.
    """
    order = positions(network.graph)
    cuts = [order[n] for n in order if _made_by(n, insert_cuts.__name__)]
    for node, _, parameter in parameter_uses(network):
        if cuts and order[node] < max(cuts):
            parameter.grad = None


def _made_by(node: fx.Node, pass_name: str) -> bool:
    origin = node.meta.get("fxlocal")
    return isinstance(origin, Origin) and origin.pass_name == pass_name

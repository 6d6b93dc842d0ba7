"""Carry out a Plan on a model: capture, analyse, list the rewrites, run them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import fx, nn

from .analysis import Analysis, analyze
from .capture import capture
from .compile import let_backward_compile
from .errors import PlanError, nearest
from .facts import Layer, Shapes
from .graph import Origin, parameter_uses, positions
from .local_modules import attach_modules, attached_modules, find_borders
from .network import Network
from .passes import (
    approximate_weight_grads,
    insert_cuts,
    insert_local_modules,
    insert_local_updates,
    insert_no_grad,
    replace_norms,
)
from .passes.insert_local_updates import RATE
from .plan import Freeze, LocalPrefix, Plan, TopK, WeightGrad
from .runner import Rewrite, run_passes
from .topk_time import predict_topk_time

__all__ = ["emit", "release_gradients", "set_rate", "transform"]


def transform(model: nn.Module, plan: Plan, *example_inputs: Any) -> Network:
    """Return ``model`` rewritten by ``plan``: a GraphModule that shares its state.

    The network trains in the user's own loop and under `torch.compile`; in evaluation mode it
    runs the source's own forward. The source's code is untouched. ``.grad`` of each parameter
    before the boundary is set to None, so that the optimizer leaves it alone.

    Args:
        model: the model, or a network of fxlocal's, whose source is then rewritten afresh.
        plan: what to do.
        example_inputs: one batch of positional inputs, where capture or local modules need shapes;
            with them `TopK` leaves layers alone whose exact gradient is predicted to be as fast.

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
    shapes_matter = plan.weight_grads or plan.modules
    analysis = analyze(captured, *(example_inputs if shapes_matter else ()))
    network = emit(captured, plan, analysis)
    release_gradients(network)
    return network


def emit(captured: Network, plan: Plan, analysis: Analysis) -> Network:
    """Run the rewrites of ``plan`` on a copy of ``captured``, whose facts are ``analysis``."""
    pipeline = build_pipeline(plan, analysis)
    if plan.modules is None:
        network = run_passes(captured, pipeline, plan)
    else:
        let_backward_compile()
        with attached_modules(captured, analysis, plan.modules):
            network = run_passes(captured, pipeline, plan)
    network.meta.update(captured=captured, rebuild=partial(_rebuild, analysis))
    return network


def _rebuild(
    analysis: Analysis, source: nn.Module, plan: Plan, training: bool, added: dict[str, nn.Module]
) -> Network:
    """Make a pickled network again, by the facts and with the heads that it had."""
    captured = capture(source)
    if plan.modules is not None:
        attach_modules(captured, analysis, plan.modules, added)
    network = emit(captured, plan, analysis)
    release_gradients(network)
    return network.train(training)


def build_pipeline(plan: Plan, analysis: Analysis) -> tuple[Rewrite, ...]:
    """Return the rewrites of ``plan``, in the order in which they must run.

    Raises:
        PlanError: if the plan does not fit the model.
    """
    prefix = plan.local
    boundary = analysis.boundary(prefix.until) if prefix else 0
    approximated = _approximated(plan, analysis, boundary)
    steps: list[Rewrite] = []
    if prefix is not None and boundary > 0:
        steps += _prefix_steps(prefix, boundary, analysis)
    if approximated:  # after the cuts, so that what it inserts lies behind them
        steps.append(
            partial(
                approximate_weight_grads,
                approximations=approximated,
                shapes=analysis.shapes,
                exact=_kept_exact(approximated, analysis.shapes),
            )
        )
    if plan.modules is not None:  # last, so that what a link repeats is what the others made
        edges = analysis.edges or ()
        steps.append(
            partial(
                insert_local_modules,
                modules=plan.modules,
                borders=find_borders(analysis, plan.modules, boundary),
                first_input=edges[0],
                output=edges[-1],
            )
        )
    return tuple(steps)


def _prefix_steps(prefix: LocalPrefix, boundary: int, analysis: Analysis) -> list[Rewrite]:
    steps: list[Rewrite] = []
    start = analysis.start(boundary)
    if not isinstance(prefix.rule, Freeze):  # first: reads the original producers of pre and post
        local = partial(insert_local_updates, start=start, layers=analysis.layers[:boundary])
        steps.append(partial(local, skips=analysis.skips, rule=prefix.rule))
    if prefix.norm == "eval":
        steps.append(partial(replace_norms, start=start))
    steps.append(partial(insert_cuts, start=start, layer=analysis.layers[boundary].path))
    steps.append(partial(insert_no_grad, start=start))  # covers what the others inserted
    return steps


def _approximated(
    plan: Plan, analysis: Analysis, boundary: int
) -> tuple[tuple[Layer, WeightGrad], ...]:
    """Return the layers whose weight gradient ``plan`` names, and how."""
    paths = {layer.path: layer for layer in reversed(analysis.layers)}  # the first call of each
    for path, method in plan.weight_grads.items():
        if path not in paths:
            raise PlanError(
                f"weight_grads[{path!r}]={method!r}: the model has no such layer. Nearest: "
                f"{nearest(path, paths)}"
            )
        if paths[path].index < boundary:
            raise PlanError(
                f"weight_grads[{path!r}]={method!r}: the layer lies inside the local prefix, "
                f"{plan.local!r}, where nothing is back-propagated. Leave it out of weight_grads, "
                "or put the boundary before it"
            )
    chosen = [layer for layer in analysis.layers if layer.path in plan.weight_grads]
    return tuple((layer, plan.weight_grads[layer.path]) for layer in chosen)


def _kept_exact(
    approximated: Sequence[tuple[Layer, WeightGrad]], shapes: Sequence[Shapes] | None
) -> dict[str, str]:
    """Return the layers for which TopK is predicted to take longer than the exact gradient."""
    kept: dict[str, str] = {}
    for layer, method in approximated:
        if shapes and isinstance(method, TopK) and not method.force:
            time = predict_topk_time(layer, shapes[layer.index], method.k)
            if time.topk >= time.exact:
                kept[layer.path] = f"exact {time.exact:.2f} ms, TopK {time.topk:.2f} ms"
    return kept


def set_rate(network: Network, rate: float) -> None:
    """Give the local updates of ``network`` another rate: a value in a buffer, no new code."""
    if RATE in network.additions:
        network.additions[RATE].fill_(rate)


def release_gradients(network: Network) -> None:
    """Set ``.grad`` to None for each parameter that lies before the cuts of ``network``.

    An optimizer skips a parameter without gradient; with a stale or zero one, momentum and weight
    decay would go on moving it.
    """
    cuts = [n for n in network.graph.nodes if _made_by(n, insert_cuts.__name__)]
    if not cuts:  # the rest takes a while, and networks may change with every step
        return
    order = positions(network.graph)
    last = max(order[cut] for cut in cuts)
    for node, _, parameter in parameter_uses(network):
        if order[node] < last:
            parameter.grad = None


def _made_by(node: fx.Node, pass_name: str) -> bool:
    origin = node.meta.get("fxlocal")
    return isinstance(origin, Origin) and origin.pass_name == pass_name

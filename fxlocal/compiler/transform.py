"""Carry out a Plan on a model: capture, analyse, list the rewrites, run them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..ir.boundary import nodes_before
from ..ir.network import Network
from ..ir.nodes import parameter_uses
from ..ir.source import ONE_AT_A_TIME, device_of, train_mode
from ..ops.local_modules import let_backward_compile
from ..ops.ranks import Group, find_group
from ..plan import Plan
from ..tracing.capture import capture, capture_again
from .accumulation import MicroBatches, choose_micro_batch
from .analysis import Analysis, analyze
from .local_modules import attach_modules, attached_modules
from .pipeline import build_pipeline, check_boundary
from .ranks import Ranks, find_ungraded, warn_without_group
from .resolve import ResolvedPlan, resolve
from .runner import run_passes

__all__ = ["find_prefix", "release_gradients", "rewrite", "set_rate", "transform"]


def transform(
    model: nn.Module,
    plan: Plan,
    *example_inputs: Any,
    leaf_modules: tuple[type[nn.Module], ...] = (),
    process_group: Group = None,
    **example_inputs_by_name: Any,
) -> Network:
    """Return ``model`` rewritten by ``plan``: a GraphModule that shares its state.

    The network trains in the user's own loop and under `torch.compile`; in evaluation mode it
    runs the source's own forward. The source's code is untouched. ``.grad`` of each parameter
    before the boundary is set to None, so that the optimizer leaves it alone.

    Args:
        model: the model, or a network of fxlocal's, whose source is then rewritten afresh.
        plan: what to do.
        example_inputs: one batch, where capture or local modules need shapes; with them `TopK`
            leaves layers alone whose exact gradient is predicted to be as fast. Arguments of the
            model that have a default and no example are fixed at the default, and stay optional.
        leaf_modules: module classes to keep as single nodes, the layers inside them unseen; such a
            network cannot be pickled.
        process_group: whose ranks sum what they learn locally, see docs/parallel.md; by default
            all ranks, where `torch.distributed` is initialised. A group of one rank learns alone.
        example_inputs_by_name: those inputs that are given by keyword, as in ``model(**batch)``.

    Raises:
        CaptureError: if the model cannot be captured.
        TypeError: if the model does not take such a batch.
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
    if not isinstance(plan, Plan):
        raise PlanError(
            f"transform(model, {plan!r}): give a Plan, as in Plan(local=LocalPrefix(1))"
        )
    args, kwargs = example_inputs, example_inputs_by_name
    captured = capture(model, *args, leaf_modules=leaf_modules, **kwargs)
    shapes_matter = plan.weight_grads or plan.modules or plan.checkpoint or plan.drop
    analysis = analyze(captured, *args, **kwargs) if shapes_matter else analyze(captured)
    resolved = resolve(plan, analysis, find_group(process_group))
    if plan.local is not None and isinstance(until := plan.local.until, float):
        asked = until * len(analysis.layers), resolved.boundary
        analysis.warn_if_far(f"until={until}", [asked], stacklevel=2)
    network = rewrite(captured, resolved, analysis)
    release_gradients(network)
    return network


def rewrite(captured: Network, resolved: ResolvedPlan, analysis: Analysis) -> Network:
    """Run the rewrites of a Plan on a copy of ``captured``, whose facts are ``analysis``."""
    from torch._dynamo.eval_frame import skip_code  # slow to import, as any optimizer does

    # The frame of each network's call: Dynamo would take it for one to compile, the same for all.
    skip_code(Network.__call__.__code__)
    if resolved.plan.modules is not None:
        let_backward_compile()
    captured.meta.setdefault("micro_batches", MicroBatches())
    alone = ONE_AT_A_TIME if find_group() is None else nullcontext()  # ranks wait for each other
    with alone, torch.inference_mode(False), train_mode(captured):
        if "shard" in captured.meta:
            captured.meta["shard"].refuse(captured, resolved)
        check_boundary(captured, resolved, analysis)
        with attached_modules(captured, analysis, resolved):
            network = run_passes(captured, build_pipeline(resolved, analysis), resolved.plan)
        prefix, ungraded = find_prefix(network, resolved), find_ungraded(network, resolved)
        values = {n.name: n.meta["val"] for n in captured.graph.nodes if "val" in n.meta}
        network.fxlocal.fill_up(device_of(captured), len(analysis.layers))
        network.finish_call(network.prepare_call())  # they set themselves up, unseen by Dynamo
    again = partial(rewrite, resolved=resolved, analysis=analysis)
    ranks = Ranks(resolved, prefix, ungraded)
    if resolved.group is None and network.fxlocal.rate is not None:
        warn_without_group()
    rebuild = partial(_rebuild, analysis, values, captured.meta.get("examples", ((), {})))
    network.meta.update(captured=captured, prefix=prefix, rewrite=again, rebuild=rebuild)
    network.meta.update(ranks=ranks, silent=[*prefix, *ungraded])
    if network.fxlocal.rate is not None:
        network.meta["choose"] = choose_micro_batch
    return network


def _rebuild(
    analysis: Analysis,
    values: dict[str, Any],
    examples: tuple[tuple[Any, ...], dict[str, Any]],
    source: nn.Module,
    plan: Plan,
    training: bool,
    added: dict[str, nn.Module],
    rates: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Network:
    """Make a pickled network again, by the facts, values, heads and rates that it had."""
    captured = capture_again(source, *examples)
    with train_mode(source):
        for node in captured.graph.nodes:
            if node.name in values:
                node.meta["val"] = values[node.name]
    resolved = resolve(plan, analysis, find_group())
    attach_modules(captured, analysis, resolved, added)
    network = rewrite(captured, resolved, analysis)
    release_gradients(network)
    for name, value in rates.items():
        network.additions[name].copy_(value)
    return network.train(training)


def set_rate(network: Network, rate: float, rates: Sequence[float] = ()) -> None:
    """Give the local updates of ``network`` another rate: a value in a buffer, no new code.

    Where its Plan has one for each layer, it is ``rates`` that they get.
    """
    own = network.fxlocal._buffers  # attributes of modules take microseconds, in each step
    if (one := own["rate"]) is not None:
        one.fill_(rate)
    if (each := own["rates"]) is not None:
        begin = 0
        for value, layers in groupby(rates):  # layers that turned local together: one write
            end = begin + len(list(layers))
            each[begin:end].fill_(value)
            begin = end


def release_gradients(network: Network) -> list[nn.Parameter]:
    """Set ``.grad`` to None for each parameter that lies before the boundary of ``network``.

    An optimizer skips a parameter without gradient; with a stale or zero one, momentum and weight
    decay would go on moving it. Returns them.
    """
    prefix: list[nn.Parameter] = network.meta["prefix"]
    for parameter in prefix:
        parameter.grad = None
    return prefix


def find_prefix(network: Network, resolved: ResolvedPlan) -> list[nn.Parameter]:
    """Return the parameters that are used before the boundary."""
    if not resolved.boundary:
        return []
    before = nodes_before(network, resolved.start)
    return list(dict.fromkeys(p for node, _, p in parameter_uses(network) if node in before))

"""Take one step on a copy and say, layer by layer, what it did: did the trick do anything?"""

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compiler.analysis import Analysis, analyze
from ..compiler.ranks import leave
from ..compiler.resolve import boundary_of, weight_grads_of
from ..errors import NoEffectWarning
from ..ir.network import Network
from ..ir.nodes import unwrapped
from ..ir.random_state import random_state, restore_random_state
from ..ir.source import arguments, train_mode
from ..ops.local_modules import TARGET
from ..ops.values import leaves_of
from ..plan import Freeze, Full, LocalModules, Plan, Random, Rule, WeightGrad, Zero
from ..tracing.capture import capture
from .report import HeadReport, LayerReport, Training, Verification, format_bytes
from .state import State, distance, head_report, length
from .watch import RecordedTensors, Watch, run_step

__all__ = ["random_projection", "verify"]

_Batch: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # by position, and by name
LEARNING_RATE = 0.1  # of the SGD that takes the step unless an optimizer is given


def verify(
    net: Callable[..., Any],
    *batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **batch_by_name: Any,
) -> Verification:
    """Take one step of training on a copy of ``net`` and report what it did to each layer.

    The model, every ``.grad`` (of parameters that only the loss uses too), the batch, the optimizer
    and the state of every random generator stay as they are, also if the step raises. A copy in
    evaluation mode is put in train mode. Of a network that was compiled, or captured as a CUDA
    graph, the graph itself is run.

    Args:
        net: what `transform` or `Driver.network` returned, or any model.
        batch: one batch; with local modules the target is the last, or given as ``target=``.
        loss: from the output to a scalar; by default the output's length along a fixed random
            direction, whose gradient no norm or softmax makes zero; with local modules, their own.
        optimizer: a copy of it takes the step, so that its momentum and its choice of parameters
            show; by default plain SGD over all parameters, ``moved = 0.1 * gradient``.
        batch_by_name: inputs given by keyword, as in ``net(**batch)``.

    Raises:
        CaptureError: if the model cannot be captured.
        TypeError: if ``net`` is no module, or does not take such a batch.
        ValueError: if the loss is no scalar, or the optimizer is another model's.

    Warns:
        NoEffectWarning: for each thing that the plan asks and the step did not show.

    Example:
        >>> from fxlocal import Hebbian, LocalPrefix, transform
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = transform(model, Plan(local=LocalPrefix(until="2", rule=Hebbian(0.01))))
        >>> [layer.trained_by for layer in verify(net, torch.ones(3, 4)).layers]
        ['local rule', 'back-propagation']
    """
    source = unwrapped(net)
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"cannot verify a {type(net).__name__}: give what fxlocal.transform or "
            "Driver.network returned, or a model"
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"loss={loss!r}: give a function from the network's output to a scalar")
    _refuse_foreign(source, optimizer)
    history = source.history if isinstance(source, Network) else None
    plan = history.plan if history else Plan()
    if not source.training:
        warnings.warn(
            "the network is in evaluation mode, in which it runs the model's own forward and "
            "nothing learns: what follows is of train mode. Call net.train()",
            stacklevel=2,
        )
    loss_of = plain_loss = loss or random_projection
    given: _Batch = (batch, batch_by_name)
    plain = given
    if isinstance(source, Network) and plan.modules is not None:
        given = (), _bound(source, *given)
        loss_of, plain_loss, plain = _losses_of_modules(plan.modules, given[1], loss)
    random = random_state()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            analysis, network, found, value, heads = _step(source, given, loss_of, optimizer)
            unmet: tuple[str, ...] = ()
            if plan != Plan():
                restore_random_state(random)
                _, _, without, *_ = _step(source, plain, plain_loss, optimizer, rewritten=False)
                unmet = tuple(_find_unmet(plan, analysis, network, found, without))
                unmet += tuple(f"nothing trained the {head}" for head in heads if not head.moved)
    finally:
        restore_random_state(random)
    for sentence in unmet:
        warnings.warn(sentence, NoEffectWarning, stacklevel=2)
    return Verification(found, value, unmet, heads)


def _losses_of_modules(
    modules: LocalModules, batch: dict[str, Any], loss: object
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor], _Batch]:
    """Return the loss of a network with local modules, and loss and batch of the plain model."""
    if loss is not None:
        raise ValueError("loss= is for networks without local modules, which have their own")
    inputs = {name: value for name, value in batch.items() if name != TARGET}
    if (target := batch[TARGET]) is None:
        count = len(inputs)
        raise TypeError(f"verify(net, *batch, target) got {count} inputs: give the target too")
    function: Any = modules.loss if callable(modules.loss) else F.cross_entropy
    picked = modules.prediction
    return (lambda got: got[1]), (lambda got: function(picked(got), target)), ((), inputs)


def _refuse_foreign(net: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer={optimizer!r}: give a torch.optim.Optimizer, or leave it out")
    own = {id(parameter) for parameter in net.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not own & {id(parameter) for parameter in held}:
        raise ValueError(
            f"the optimizer holds none of the network's {len(own)} parameters: give the one that "
            "was made for this model, or none"
        )


def _step(
    source: nn.Module,
    batch: _Batch,
    loss: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer | None,
    rewritten: bool = True,
) -> tuple[Analysis, Network, tuple[LayerReport, ...], float, tuple[HeadReport, ...]]:
    """Take one step on a copy of ``source``, or of what it was before it was rewritten."""
    with RecordedTensors():
        model, optimizer = copy.deepcopy((source, optimizer))
    if not model.training:
        model.train()
    if isinstance(model, Network):
        leave(model)
        model.prepare_call()
    args, kwargs = pytree.tree_map_only(Tensor, copied, batch)
    captured = capture(model, *args, **kwargs)
    network = model if rewritten and isinstance(model, Network) else captured
    inputs = tuple(_bound(network, args, kwargs).values())
    analysis = analyze(captured)
    starts = [analysis.start(layer.index) for layer in analysis.layers]
    watch = Watch(network, analysis.layers, starts)
    before, heads = State(watch), [list(one.parameters()) for one in network.fxlocal.heads or ()]
    first = [[p.detach().clone() for p in own] for own in heads]
    value = run_step(watch, inputs, loss)
    between = State(watch)
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    optimizer.step()
    reports = _reports(analysis, watch, (before, between, State(watch)))
    judged = tuple(map(head_report, count(), heads, first))
    return analysis, network, tuple(reports), float(value), judged


def copied(tensor: Tensor) -> Tensor:
    """Return a copy, a leaf that asks for a gradient if ``tensor`` does."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _bound(network: Network, batch: tuple[Any, ...], by_name: dict[str, Any]) -> dict[str, Any]:
    try:
        with train_mode(network):
            return arguments(network.graph, batch, by_name)
    except TypeError as error:
        raise TypeError(
            f"verify(net, *batch) got {len(batch) + len(by_name)} inputs for a forward"
            f"{inspect.signature(network.forward)}: {error}"
        ) from None


def random_projection(output: Any) -> Tensor:
    """Return the length of the output's floating tensors along one fixed random direction."""
    tensors = [t for t in leaves_of(output) if isinstance(t, Tensor)]
    tensors = [t for t in tensors if t.is_floating_point() and t.numel()]
    if not tensors:
        raise ValueError(
            f"no floating-point tensor in the output, a {type(output).__name__}: give loss=, a "
            "function from output to scalar"
        )
    generator, parts = torch.Generator().manual_seed(0), []
    for tensor in tensors:
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        direction = torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor.numel())
        parts.append((tensor * direction.to(tensor)).sum())
    return torch.stack([part.to(parts[0]) for part in parts]).sum()


def _reports(
    analysis: Analysis, watch: Watch, states: tuple[State, State, State]
) -> Iterator[LayerReport]:
    """Yield each layer's report, given the states before and after the forward and at the end."""
    before, between, after = states
    saved_bytes = watch.saved_bytes
    for i, layer in enumerate(analysis.layers):
        weights = watch.weights[i]
        pairs = list(zip(before.statistics[i], after.statistics[i], strict=True))
        gradients = [w.grad for w in weights if w.grad is not None]
        gradient = length(gradients) if gradients else None
        touched = before.versions[i] != between.versions[i]
        size, moved = length(before.weights[i]), distance(before.weights[i], after.weights[i])
        requires_grad = any(w.requires_grad for w in weights)
        trained_by: Training
        if distance(before.weights[i], between.weights[i]):
            trained_by = "local rule"
        elif moved and gradient:  # momentum and weight decay move a weight of zero gradient too
            trained_by = "back-propagation"
        elif moved or touched or (requires_grad and watch.records[i]):
            trained_by = "nothing"
        else:
            trained_by = "frozen"
        yield LayerReport(
            path=layer.path,
            kind=layer.kind,
            trained_by=trained_by,
            requires_grad=requires_grad,
            gradient=gradient,
            moved=moved,
            relative=moved / size if size else math.inf if moved else 0.0,
            finite=all(bool(w.isfinite().all()) for w in weights),
            saved_bytes=saved_bytes[i],
            statistics_moved=not all(torch.equal(*pair) for pair in pairs) if pairs else None,
            weight_gradient_kernels=watch.products[i],
        )


def _find_unmet(
    plan: Plan,
    analysis: Analysis,
    network: Network,
    found: Sequence[LayerReport],
    plain: Sequence[LayerReport],
) -> Iterator[str]:
    """Say what ``plan`` asks and ``found`` does not show; ``plain`` is the same step without it."""
    if all(_same(a, b) for a, b in zip(found, plain, strict=True)):
        yield f"{plan!r} changed nothing: every layer was trained as in the model without it"
        return
    yield from _find_unmet_methods(weight_grads_of(plan, analysis), found)
    boundary = boundary_of(plan, analysis)
    if plan.local is None or boundary == 0:
        return
    prefix, asked = found[:boundary], f"the plan trains the layers before {found[boundary].path!r}"
    if reached := [layer for layer in prefix if layer.has_gradient]:
        yield f"{asked} without back-propagation, but a gradient reached {_names(reached)}"
    if keeping := [layer for layer in prefix if layer.saved_bytes]:
        num_bytes = sum(layer.saved_bytes for layer in keeping)
        yield (
            f"{asked} without back-propagation, but {format_bytes(num_bytes)} are kept for it by "
            f"{_names(keeping)}"
        )
    own = network.fxlocal.rate if network.fxlocal.rates is None else network.fxlocal.rates
    rates = torch.as_tensor(plan.rate if own is None else own).expand(len(found)).tolist()
    rate = max(rates, key=abs)
    learning = [x for x, own in zip(prefix, rates, strict=False) if own and x.requires_grad]
    still = [layer for layer in learning or prefix if layer.trained_by != "local rule"]
    if rate and still:
        yield f"{asked} by a local rule of rate {rate:g}, which did not move {_names(still)}"
    yield from _find_rounded(plan.local.rule, analysis, network, prefix, rates)
    if plan.local.norm == "eval" and (moving := [x for x in prefix if x.statistics_moved]):
        yield (
            f"{asked} with running statistics that stay, but they moved between {_names(moving)} "
            "and the next layer"
        )


def _find_rounded(
    rule: Rule,
    analysis: Analysis,
    network: Network,
    prefix: Sequence[LayerReport],
    rates: Sequence[float],
) -> Iterator[str]:
    """Say which weights are so narrow that rounding kept less than half of a local step."""
    if isinstance(rule, Freeze) or rule.stochastic:
        return
    for layer, report, rate in zip(analysis.layers, prefix, map(abs, rates), strict=False):
        moved = report.relative if rule.relative else report.moved
        if layer.weight is None or not report.requires_grad or moved >= rate / 2:
            continue
        if (dtype := network.get_parameter(layer.weight).dtype).itemsize < 4:
            yield (
                f"the local step of {layer.path!r} is {moved:.1g} long instead of {rate:.1g}: its "
                f"weight is {dtype}, which rounds small steps away. Keep it in float32 and use "
                f"torch.autocast, or {type(rule).__name__}(..., stochastic=True)"
            )


def _find_unmet_methods(
    weight_grads: Mapping[str, WeightGrad], found: Sequence[LayerReport]
) -> Iterator[str]:
    """Say which layers do not have the weight gradient that the plan names."""
    named = [(layer, weight_grads.get(layer.path, Full())) for layer in found]
    exact = [x for x, how in named if isinstance(how, Zero | Random) and x.weight_gradient_kernels]
    if exact:
        yield f"the plan skips the exact weight gradient, but it was computed of {_names(exact)}"
    if full := [layer for layer, how in named if isinstance(how, Zero) and layer.gradient]:
        yield f"the plan asks for no weight gradient, but one arrived at {_names(full)}"


def _same(a: LayerReport, b: LayerReport) -> bool:
    """Tell whether two reports of a layer differ by rounding at most."""
    close = math.isclose(a.moved, b.moved, rel_tol=1e-4)
    same_gradient = a.has_gradient == b.has_gradient
    b = replace(b, moved=a.moved, relative=a.relative, gradient=a.gradient)
    return close and same_gradient and a == b


def _names(layers: Sequence[LayerReport]) -> str:
    return ", ".join(repr(layer.path) for layer in layers)

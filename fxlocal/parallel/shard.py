"""Weights in shards over the ranks, `fully_shard` of FSDP2, for networks that learn locally.

A graph calls leaves, and no hook of a container runs. So what FSDP2 gathers together are leaves:
those of one block, and at the root all that is not a leaf's own (batch norms, weights that are tied
or that an expression uses). The root is the model itself, within whose call a network's forward
runs. The rows of deltas are the work of `fxlocal.passes.reduce_deltas`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase

from ..compiler.analysis import Analysis
from ..compiler.ranks import describe, refuse_unlike, spread
from ..compiler.resolve import ResolvedPlan
from ..compiler.transform import release_gradients
from ..errors import PlanError
from ..ir.computed import find_computing
from ..ir.network import Network
from ..ir.nodes import module_of, positions
from ..ir.source import train_mode
from ..ops.ranks import find_group, group_named
from ..plan import Freeze
from ..runtime.driver import Driver
from .replicate import check_group, networks_of

__all__ = ["Sharding", "shard"]

Mesh = Any  # a DeviceMesh; torch is built without it on some systems
_Given = TypeVar("_Given")


def shard(
    network_or_driver: _Given,
    mesh: Mesh = None,
    *,
    mp_policy: Any = None,
    keep_prefix: bool = False,
) -> _Given:
    """Train a network, or the networks of a driver, with weights in shards; return what was given.

    The `fully_shard` of networks that learn locally: call it on all ranks, before the optimizer is
    made, of parameters that then are DTensors. All ranks begin with the weights and buffers of the
    first. A prefix is gathered block by block in the forward, and not in the backward; a rank gets
    its rows of the deltas alone. On one rank it changes nothing.

    Args:
        network_or_driver: what `fxlocal.transform` returned, or a `Driver`; its model is sharded in
            place.
        mesh: a `DeviceMesh` of one dimension, by default of all ranks.
        mp_policy: a `MixedPrecisionPolicy`; batch norms stay in their own precision.
        keep_prefix: keep what lies before the boundary whole on each rank: nothing is gathered.

    Raises:
        RuntimeError: if a rank has another model, Plan or kind of device, or there is no process
            group.
        PlanError: for a Plan, a weight or a mesh that this does not do; nothing was changed then.
        TypeError: for anything else.

    Example:
        >>> from fxlocal import Plan, transform
        >>> net = transform(nn.Sequential(nn.Linear(4, 2)), Plan())
        >>> # after init_process_group(): net = shard(net)
    """
    _, told, given = networks_of(network_or_driver, "shard")
    network: Network | None = None if isinstance(given, Driver) else given
    captured: Network = given.captured if network is None else network.meta["captured"]
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("shard: call torch.distributed.init_process_group(), transform, then it")
    mesh = mesh or _default_mesh(captured)
    group = _group_of(mesh, captured)
    if not group:
        return network_or_driver
    check_group(given, group, "shard")
    _refuse(given, captured, keep_prefix)
    analysis = (
        network.meta["rewrite"].keywords["analysis"] if network is not None else given.analysis
    )
    units = find_units(captured, analysis)
    inside = {id(p) for unit in units for module in unit for p in module.parameters()}
    named = list(captured.named_parameters(remove_duplicate=False))
    at_root = {name for name, p in named if id(p) not in inside}
    sharding = Sharding(captured.source_model, units, at_root)
    own = [] if network is None else [network.meta["rewrite"].keywords["resolved"]]
    for resolved in own or given.resolved.values():  # those to come, as far as a schedule tells
        sharding.refuse(captured, resolved)
    refuse_unlike({**told, **describe(captured)}, group_named(group), captured)
    state = captured.state_dict(keep_vars=True).values()
    spread([value for value in state if isinstance(value, Tensor)], group_named(group))
    kept = {*network.meta["prefix"]} if network is not None and keep_prefix else set()
    _fully_shard(units, captured.source_model, mesh, mp_policy, kept)
    captured.meta["shard"] = sharding
    captured._structure.new_hooks()  # FSDP2's, of which nobody is warned
    if network is None:
        given.networks.clear()
    else:
        network._seen, network._ids = network._structure.read(), network._structure.ids()
        network._rewrite_again(frozen=True)
        release_gradients(network)
    return network_or_driver


class Sharding:
    """What the networks of one model in shards have in common.

    Args:
        source: the model.
        units: the leaves that are gathered together, in execution order.
        at_root: names of the parameters that are gathered with the model, and not with a leaf.
    """

    def __init__(
        self, source: nn.Module, units: Sequence[Sequence[nn.Module]], at_root: set[str]
    ) -> None:
        self._source, self._at_root = source, at_root
        self._firsts: list[Any] = [unit[0] for unit in units]
        self._units = units
        self._last: Network | None = None

    def run(self, network: Network, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``call(*args, **kwargs)``, a network's, within a call of the model."""
        if network is not self._last:
            self._spare_prefix(network)
            self._last = network
        source = self._source
        source.forward = call
        try:
            return source(*args, **kwargs)
        finally:
            del source.forward

    def _spare_prefix(self, network: Network) -> None:
        """Keep the backward from gathering what lies before the boundary, as its next block."""
        prefix = {id(p) for p in network.meta["prefix"]}
        behind = [
            first
            for first, unit in zip(self._firsts, self._units, strict=True)
            if any(id(p) not in prefix for module in unit for p in module.parameters())
        ]
        last: Any = (behind or [self._source])[0]
        for module in (*self._firsts, self._source):
            module.set_modules_to_backward_prefetch([module] if module is last else [])

    def refuse(self, captured: Network, resolved: ResolvedPlan) -> None:
        """Refuse a Plan that networks in shards do not carry out, naming what does not fit."""
        plan = resolved.plan
        parts = ("weight_grads", "modules", "drop", "checkpoint")
        if (part := next((name for name in parts if getattr(plan, name)), None)) is not None:
            raise PlanError(
                f"shard: a Plan with {part}={getattr(plan, part)!r}; weights in shards go with a "
                "LocalPrefix alone. Leave it out, or use fxlocal.replicate"
            )
        if plan.local is None or isinstance(plan.local.rule, Freeze):
            return
        for layer in find_computing(captured, resolved.prefix):
            raise PlanError(
                f"shard: layer {layer.path!r} computes its weight, of which no rank has all that "
                f"it is made of. {_ADVICE}"
            )
        for layer in resolved.prefix:
            if layer.weight in self._at_root:
                raise PlanError(
                    f"shard: the weight of layer {layer.path!r} is tied, or an expression uses it "
                    f"in place of a module, and FSDP2 gives that a copy. {_ADVICE}"
                )


_ADVICE = "Put the boundary before it, or use Freeze(), or fxlocal.replicate"


def find_units(captured: Network, analysis: Analysis) -> list[list[nn.Module]]:
    """Return the leaves that are gathered together: those of a block that are called once.

    One that is called several times is alone. Those are left out whose parameters are tied, or
    fetched by the graph, as those of batch norms may be.
    """
    with train_mode(captured):
        order = positions(captured.graph)
        called = [n for n in order if n.op == "call_module"]
        fetched = {str(n.target) for n in order if n.op == "get_attr"}
        leaves = {node: module_of(captured, node) for node in called}
        starts = sorted(
            order[n] for n in order if n.name in {block.start for block in analysis.blocks}
        )
    named = list(captured.named_parameters(remove_duplicate=False))
    uses = Counter(id(p) for _, p in named)
    outside = {id(p) for name, p in named if name in fetched or uses[id(p)] > 1}
    calls = Counter(id(module) for module in leaves.values())
    units: dict[Any, list[nn.Module]] = {}
    for node, module in leaves.items():
        parameters = [*module.parameters()] if module is not None else []
        if module is None or isinstance(module, _NormBase) or not parameters:
            continue
        if any(id(p) in outside for p in parameters):
            continue
        block = sum(start <= order[node] for start in starts)
        key = block if calls[id(module)] == 1 else module
        if module not in (unit := units.setdefault(key, [])):
            unit.append(module)
    return list(units.values())


def _fully_shard(
    units: list[list[nn.Module]], source: nn.Module, mesh: Mesh, policy: Any, kept: set[Any]
) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import

    policy = policy or MixedPrecisionPolicy()
    shared = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": kept}
    for unit in units:
        fully_shard(unit if len(unit) > 1 else unit[0], mp_policy=policy, **shared)
    fully_shard(source, mp_policy=replace(policy, param_dtype=None), **shared)


def _default_mesh(captured: Network) -> Mesh:
    from torch.distributed.device_mesh import init_device_mesh

    device = next(captured.parameters(), torch.empty(0)).device
    return init_device_mesh(device.type, (distributed.get_world_size(),))


def _group_of(mesh: Mesh, captured: Network) -> str | None:
    if mesh.ndim != 1:
        raise PlanError(f"shard: {mesh!r} has {mesh.ndim} dimensions: give one of them, mesh[name]")
    device = next(captured.parameters(), torch.empty(0)).device
    if mesh.device_type != device.type:
        raise PlanError(
            f"shard: the mesh is of {mesh.device_type!r} and the model on {device}: move the model "
            "first"
        )
    return find_group(mesh.get_group())


def _refuse(given: Any, captured: Network, keep_prefix: bool) -> None:
    """Refuse what was wrapped or made too early."""
    reason = ""
    if any(hasattr(p, "full_tensor") for p in captured.parameters()):
        reason = "the model is in shards already"
    elif "reducer" in captured.meta:
        reason = "fxlocal.replicate has the model already"
    elif isinstance(given, Driver) and given.optimizer is not None:
        reason = (
            "the driver's optimizer holds the whole parameters: make the Driver without, shard it, "
            "then set driver.optimizer"
        )
    elif isinstance(given, Driver) and given.how is not False:
        reason = "compile=...: FSDP2 gathers by hooks, which one compiled graph does not run"
    elif isinstance(given, Driver) and keep_prefix:
        reason = "keep_prefix=True, and the driver may move the boundary: give it a network"
    if reason:
        raise PlanError(f"shard: {reason}")

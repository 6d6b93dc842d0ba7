"""The ranks of a data parallel run: equal at the start, and told where a wrapper would part them.

A network meets its ranks in its first forward that trains. `DistributedDataParallel` is not told of
what never has a gradient (`silent`): it neither waits for it nor sends it. So the network itself
gives all ranks the prefix of the first one, as that wrapper does for the rest.
"""

import socket
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..ir.network import Network
from ..ir.nodes import parameter_uses
from ..ir.source import device_of
from ..ops.ranks import Group, find_group, group_named
from ..plan import Freeze, Zero
from .debug import launched_ranks
from .resolve import ResolvedPlan

__all__ = [
    "Ranks",
    "active_wrapper",
    "describe",
    "find_ungraded",
    "leave",
    "refuse_unlike",
    "spread",
    "warn_without_group",
]


def active_wrapper() -> DistributedDataParallel | None:
    """Return what wraps the model, in its forward."""
    find: Any = DistributedDataParallel._get_active_ddp_module
    wrapper: DistributedDataParallel | None = find()
    return wrapper


def warn_without_group() -> None:
    """Warn of a rank that a launcher started, and that has joined no process group."""
    rank, size = launched_ranks()
    if size > 1 and rank is not None:
        warnings.warn(
            f"RANK={rank} of WORLD_SIZE={size} is set, and there is no process group: what this "
            "rank learns locally would stay its own. Call "
            "torch.distributed.init_process_group() before the model is transformed",
            stacklevel=3,
        )


def leave(network: Network) -> None:
    """Let a network, a copy say, run on this rank alone."""
    ranks = network.meta.pop("ranks", None)
    if ranks is not None and ranks.group:
        sums = torch.ops._c10d_functional.all_reduce_coalesced.default
        for node in network.graph.find_nodes(op="call_function", target=sums):
            node.replace_all_uses_with(node.all_input_nodes[0])
            network.graph.erase_node(node)
        network.generate_code()


class Ranks:
    """Whom a network trains with.

    Args:
        resolved: its Plan, and the group that its deltas are summed in.
        prefix: what lies before its boundary.
        ungraded: the weights behind it that have no gradient by its Plan.
    """

    def __init__(
        self,
        resolved: ResolvedPlan,
        prefix: Sequence[nn.Parameter],
        ungraded: Sequence[nn.Parameter],
    ) -> None:
        local = resolved.plan.local
        self.group, self.prefix, self.ungraded = resolved.group, prefix, ungraded
        self._learns = bool(prefix) and local is not None and not isinstance(local.rule, Freeze)
        self._modules = resolved.plan.modules is not None and bool(resolved.stages)
        self._plan = resolved.plan
        self._met: Callable[[], Any] | None = None  # the wrapper within which, a weak reference

    def meet(self, network: Network) -> None:
        """Look around before a forward that trains; a RuntimeError if a rank is amiss."""
        if "shard" in network.meta:  # its ranks have met
            return
        if self._learns:
            self._refuse_shards(network)
        wrapper = active_wrapper()
        if self._met is not None and self._met() is wrapper:
            return
        # Ranks may differ in other parts of their Plans, so that networks are new at other steps.
        seen: set[Any] = network.meta["captured"].meta.setdefault("met", set())
        key = repr(self._plan.with_rate(0.0).local), id(wrapper)
        if self._learns and self.group is None and find_group():
            size = distributed.get_world_size()
            raise RuntimeError(
                f"this network was made before the process group of its {size} ranks, and does "
                "not sum what they learn locally: transform again after init_process_group(), or "
                "make a new Driver. A rank that is to learn alone gives process_group="
                "torch.distributed.new_group([rank], use_local_synchronization=True)"
            )
        if wrapper is not None:
            self._refuse_wrapper(wrapper, network)
        group = self.group if wrapper is None else find_group(wrapper.process_group)
        equal = key in seen or "reducer" in network.meta
        if group and not equal and (self._learns or wrapper is not None):
            seen.add(key)
            told = {"Plan": repr(self._plan.local), **describe(network)}
            refuse_unlike(told, group_named(group), network)
            spread([*self.prefix, *self.ungraded], group_named(group))
        self._met = (lambda: None) if wrapper is None else weakref.ref(wrapper)

    def _refuse_shards(self, network: Network) -> None:
        """Refuse weights that a forward gets a copy of, as what they learn there is lost."""
        if any(hasattr(kind, "full_tensor") for kind in network._structure.kinds):
            raise RuntimeError(
                "weights are in shards of fully_shard, of which a forward gets a copy: what they "
                "learn locally would be lost. Use fxlocal.shard(net, mesh) in its place, before "
                "the optimizer is made"
            )

    def _refuse_wrapper(self, wrapper: DistributedDataParallel, network: Network) -> None:
        """Refuse a wrapper that would average wrongly, or wait for what never comes."""
        name, advice = "DistributedDataParallel", "or use fxlocal.replicate in its place"
        reduced = {id(p) for p in wrapper._module_parameters if p.requires_grad}
        names = {id(p): name for name, p in network.named_parameters()}
        group = find_group(wrapper.process_group)
        if self._learns and self.group != group:
            raise RuntimeError(
                f"deltas are summed in the process group {self.group!r} and gradients averaged in "
                f"{group!r} ('' is a rank alone): give both the same process_group"
            )
        found = next((p for p in self.ungraded if id(p) in reduced), None)
        if found is not None:
            raise RuntimeError(
                f"Zero(none=True) for {names[id(found)]!r}, to which {name} would give zeros that "
                f"momentum and weight decay take for a gradient: give Zero(), {advice}"
            )
        tolerant = wrapper.find_unused_parameters or wrapper.static_graph
        found = next((p for p in self.prefix if p.requires_grad and id(p) in reduced), None)
        if found is not None and not tolerant:
            raise RuntimeError(
                f"{name} waits for a gradient of {names[id(found)]!r}, which lies before the "
                "boundary: no gradient would be averaged. Wrap what fxlocal.transform returned "
                f"itself, give find_unused_parameters=True, {advice}"
            )
        if self._modules and not wrapper.find_unused_parameters:
            raise RuntimeError(
                f"local modules leave gradients in the forward, which {name} averages with "
                f"find_unused_parameters=True only: give that, {advice}"
            )


def find_ungraded(network: Network, resolved: ResolvedPlan) -> list[nn.Parameter]:
    """Return the weights that never get a gradient by ``Zero(none=True)``."""
    layers = {
        layer.node
        for layer, method in resolved.approximations
        if method == Zero(none=True) and layer.path not in resolved.exact
    }
    if not layers:
        return []
    nodes = [node for node in network.graph.nodes if node.name in layers]
    weights = {node.args[1] for node in nodes}
    weights |= {w.args[0] for w in weights if w.op == "call_method"}  # of a product, transposed
    uses: dict[nn.Parameter, set[bool]] = {}
    for node, name, parameter in parameter_uses(network):
        fetched = any(v in weights and v.target == name for v in node.all_input_nodes)
        given = fetched and (node in nodes or node in weights)
        uses.setdefault(parameter, set()).add(given)
    return [parameter for parameter, found in uses.items() if found == {True}]


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what has to be alike on all ranks, in plain values by name."""
    shapes = {f"{n!r}": tuple(p.shape) for n, p in model.named_parameters()}
    return {"kind of device": device_of(model).type, **shapes}


def refuse_unlike(told: dict[str, Any], group: Group, model: nn.Module) -> None:
    """Refuse ranks of which one differs in what it tells; all of the group have to call this.

    Raises:
        RuntimeError: naming the rank, and what differs; the same on all ranks.
    """
    device = device_of(model)
    alone = device.type == "cuda" and "nccl" in distributed.get_backend_config(group)
    place = f"{socket.gethostname()}'s {device}" if alone else ""
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, (told, place), group=group)
    first = found[0][0]
    for rank, (theirs, _) in enumerate(found):
        for name in (*first, *theirs):
            if first.get(name) != theirs.get(name):
                raise RuntimeError(
                    f"rank {rank} differs from rank 0: {name} is {theirs.get(name)} there and "
                    f"{first.get(name)} on rank 0. Every rank has to make the same model and Plan"
                )
    shared = Counter(place for _, place in found if place)
    if (double := next((p for p, count in shared.items() if count > 1), None)) is not None:
        ranks = [rank for rank, (_, place) in enumerate(found) if place == double]
        raise RuntimeError(
            f"ranks {', '.join(map(str, ranks))} have their models on {double}: call "
            "torch.cuda.set_device(local rank), and move each model there"
        )


def spread(tensors: Sequence[Tensor], group: Group) -> None:
    """Give all ranks the tensors of the first one, in place; all of the group have to call this."""
    source = distributed.get_global_rank(group, 0)
    for tensor in tensors:
        sent = tensor.detach().contiguous()
        distributed.broadcast(sent, source, group=group)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(sent)

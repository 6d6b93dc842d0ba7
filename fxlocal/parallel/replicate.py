"""Data parallel training for networks that change: gradients averaged, nothing sent for a prefix.

`DistributedDataParallel` settles which parameters it averages when it wraps a module. This reducer
asks the network of each step, so that a boundary may move and networks may change by the step.
Gradients go in buckets, in the order in which the backward makes them, each once it is full; when
the backward ends all have arrived, so that what clips or steps next finds the averages.

Equation (ours), g_r the gradient of a mean over the n_r samples of rank r::

    grad = sum over r of n_r * g_r / sum over r of n_r

which is that of the mean over all samples, also where a last batch is ragged. A rank without a
gradient counts as zeros, unless no rank has one.
"""

from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from ..compiler.accumulation import MicroBatches
from ..compiler.debug import launched_ranks
from ..compiler.ranks import describe, refuse_unlike, spread
from ..errors import PlanError
from ..ir.network import Network
from ..ir.nodes import STAGE, parameter_uses, unwrapped
from ..ir.source import train_mode
from ..ops.ranks import BUCKET_BYTES, Group, find_group, group_named
from ..runtime.driver import Driver
from ..runtime.losses import refuse_uneven

__all__ = ["Reducer", "replicate"]

_Given = TypeVar("_Given")
_REDUCERS: "WeakKeyDictionary[nn.Module, Reducer]" = WeakKeyDictionary()


def replicate(network_or_driver: _Given, process_group: Group = None) -> _Given:
    """Train a network, or the networks of a driver, data parallel; return what was given.

    The plan-aware twin of `DistributedDataParallel`: call it on all ranks, before the first step,
    and train as on one. All ranks begin with the weights and buffers of the first. Gradients are
    averaged over samples when a backward ends; a prefix sends its deltas alone. Running statistics
    stay each rank's own. On one rank it changes nothing.

    Args:
        network_or_driver: what `fxlocal.transform` returned, or a `Driver`; its model is trained
            in place.
        process_group: as given to that, by default all ranks.

    Raises:
        RuntimeError: if a rank has another model, Plan or kind of device, or a launcher started
            several ranks and there is no process group.
        PlanError: if the groups differ, or gradients are sparse.
        TypeError: for anything else.

    Example:
        >>> from fxlocal import Plan, transform
        >>> net = replicate(transform(nn.Sequential(nn.Linear(4, 2)), Plan()))
    """
    networks, told, given = networks_of(network_or_driver, "replicate")
    group = find_group(process_group)
    _, size = launched_ranks()
    if group is None and size > 1:
        raise RuntimeError(
            f"WORLD_SIZE={size} is set, and there is no process group: call "
            "torch.distributed.init_process_group() first, then transform, then replicate"
        )
    if not group:
        return network_or_driver
    networks[0].meta.setdefault("micro_batches", MicroBatches())
    check_group(given, group, "replicate")
    for path, module in networks[0].named_modules():
        if getattr(module, "sparse", False) is True:
            raise PlanError(f"{path!r} makes sparse gradients, which replicate does not average")
    members = group_named(group)
    refuse_unlike({**told, **describe(networks[0])}, members, networks[0])
    state = networks[0].state_dict(keep_vars=True).values()
    spread([value for value in state if isinstance(value, Tensor)], members)
    source = networks[0].source_model
    if (earlier := _REDUCERS.pop(source, None)) is not None:
        earlier.remove()
    _REDUCERS[source] = reducer = Reducer(networks[0], group)
    for network in networks:
        network.meta["reducer"] = reducer
    return network_or_driver


def networks_of(network_or_driver: Any, name: str) -> tuple[list[Network], dict[str, Any], Any]:
    """Return the networks of what was given, what ranks tell of it, and itself; or a TypeError."""
    given = network_or_driver
    given = given if isinstance(given, Driver) else unwrapped(given)
    if isinstance(given, Driver):
        networks = [given.captured, *(network for network, _ in given.networks.values())]
        return networks, {"schedule": repr(given.schedule)}, given
    if isinstance(given, Network) and "captured" in given.meta:
        plan = repr(given.history.plan.local) if given.history else ""
        return [given, given.meta["captured"]], {"Plan": plan}, given
    raise TypeError(
        f"{name}({type(given).__name__}): give what fxlocal.transform returned, or a Driver"
    )


def check_group(given: Any, group: str, name: str) -> None:
    """Refuse another group than that which deltas are summed in."""
    own = given.group if isinstance(given, Driver) else given.meta["ranks"].group
    if own != group:
        raise PlanError(
            f"{name} in the process group {group!r}, and deltas are summed in {own!r}: give "
            "both the same process_group, and make the network after init_process_group()"
        )


class Reducer:
    """Averages the gradients of a model over the samples of all ranks, backward by backward.

    Attributes:
        share: this rank's share of the samples of the last step, times the number of ranks; 0-dim.
        sent_bytes: of gradients, deltas and counts that this rank has handed to the process group.
    """

    def __init__(self, network: Network, group: str) -> None:
        self._group, self._size = group_named(group), distributed.get_world_size(group_named(group))
        self._parameters = list(network.parameters())
        self._micro_batches: MicroBatches = network.meta["micro_batches"]
        self._handles: dict[nn.Parameter, Any] = {}  # of what has required a gradient
        self.share: Tensor | float = 1.0
        self.sent_bytes = self._delta_bytes = 0
        self._samples, self._is_counted = 0, False
        self._key: Any = None
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._next = 0  # the first bucket that was not sent
        self._by_stage = self._is_queued = False
        self._total: tuple[Any, Tensor] | None = None

    def remove(self) -> None:
        """Let go of the parameters."""
        for handle in self._handles.values():
            handle.remove()

    def begin(self, network: Network, inputs: Any) -> None:
        """Take the network of a forward, and how many samples it is given."""
        if self._is_counted:
            self._samples, self._is_counted = 0, False
        leaves = pytree.tree_leaves(inputs)
        sizes = (len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim())
        self._samples += next(sizes, 1)
        if self._key != (network, network._seen, network._ids):
            self._key = network, network._seen, network._ids
            self._fill(network)
            self._delta_bytes = _count_deltas(network)
        if self._micro_batches.more or not leaves or not self._parameters:
            return  # what prepares a network, and takes no step, gives it nothing
        self.sent_bytes += self._delta_bytes
        self._count(self._parameters[0].device)
        if self._delta_bytes:  # before the first delta is sent
            self._receive_count()

    def _fill(self, network: Network) -> None:
        """Make the buckets of a network: all but its prefix, last layers first."""
        prefix = {id(p) for p in network.meta["prefix"]}
        stages: dict[nn.Parameter, int] = {}
        with train_mode(network):
            for node, _, parameter in parameter_uses(network):
                stages.setdefault(parameter, node.meta.get(STAGE, 0))
        plan = network.history.plan if network.history else None
        self._by_stage = plan is not None and plan.modules is not None
        self._buckets, filling = [], dict[Any, _Bucket]()
        self._parameters = list(network.parameters())  # a branch that is cut away has none
        for p in reversed(self._parameters):
            if not p.requires_grad or id(p) in prefix:
                continue
            key = stages.get(p, 0) if self._by_stage else 0, p.dtype, p.device
            if key not in filling or filling[key].num_bytes >= BUCKET_BYTES:
                filling[key] = _Bucket()
                self._buckets.append(filling[key])
            filling[key].add(p)
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        register: Any = Tensor.register_post_accumulate_grad_hook
        for p in self._bucket_of.keys() - self._handles.keys():
            self._handles[p] = register(p, self._arrive)
        self._next = 0

    def _arrive(self, parameter: Tensor) -> None:
        """Note that a gradient has been made."""
        bucket = self._bucket_of.get(parameter)  # type: ignore[call-overload]
        if bucket is None or self._micro_batches.more:
            return
        if not self._is_queued:
            self._is_queued = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end)
            if self._total is None:  # of one more backward of a forward
                self._count(parameter.device)
        bucket.num_arrived += 1
        while not self._by_stage and self._next < len(self._buckets):
            if not self._buckets[self._next].is_full:
                break
            self._send()

    def _count(self, device: torch.device) -> None:
        """Send how many samples this rank has had since gradients were averaged last.

        As an epoch's end does, `fxlocal.runtime.losses.refuse_uneven`: the first message of a step.
        """
        if self._total is not None:  # of a forward without a backward
            self._total[0].wait()
        told = [max(self._samples, 1), 0, 0]
        total = torch.tensor(told, dtype=torch.float64, device=device)
        work = distributed.all_reduce(total, group=self._group, async_op=True)
        self._total = work, total
        self.sent_bytes += total.nbytes

    def _receive_count(self) -> Tensor:
        """Return the samples of all ranks; on a CPU, once it is sure that all take this step."""
        assert self._total is not None
        work, total = self._total
        work.wait()
        if total.device.type == "cpu":  # a GPU is not waited for: there that rank's error ends all
            refuse_uneven(float(total[2]))
        return total[0]

    def _send(self) -> None:
        bucket, self._next = self._buckets[self._next], self._next + 1
        # A stage's backward fills its own buckets alone.
        if bucket.num_arrived or not self._by_stage:
            self.sent_bytes += bucket.send(max(self._samples, 1), self._group)

    def _end(self) -> None:
        """Send what is left, wait for all, and put the averages into ``.grad``."""
        while self._next < len(self._buckets):
            self._send()
        total = self._receive_count()
        self.share = self._size * max(self._samples, 1) / total
        for bucket in self._buckets:
            bucket.receive(total)
        self._next, self._total, self._is_queued = 0, None, False
        self._is_counted = True


class _Bucket:
    """Parameters of one dtype and device whose gradients go in one message."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.num_bytes = self.num_arrived = 0
        self._sent: tuple[Any, Tensor] | None = None

    def add(self, parameter: nn.Parameter) -> None:
        self.parameters.append(parameter)
        self.num_bytes += parameter.numel() * parameter.dtype.itemsize

    @property
    def is_full(self) -> bool:
        return self.num_arrived == len(self.parameters)

    def send(self, samples: int, group: Group) -> int:
        """Send the gradients, and which there are, ``samples`` times: a sum over samples.

        Returns:
            How many bytes they are.
        """
        like = self.parameters[0]
        dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
        there = torch.tensor([p.grad is not None for p in self.parameters], device=like.device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([part.reshape(-1).to(dtype) for part in (*parts, there)])
        flat.mul_(samples)
        self._sent = distributed.all_reduce(flat, group=group, async_op=True), flat
        return flat.nbytes

    def receive(self, total: Tensor) -> None:
        """Put the averages into ``.grad``."""
        self.num_arrived = 0
        if self._sent is None:
            return
        (work, flat), self._sent = self._sent, None
        work.wait()
        sizes = [*map(Tensor.numel, self.parameters), len(self)]
        *parts, there = torch.split(flat.div_(total), sizes)
        absent = any(p.grad is None for p in self.parameters)
        anywhere = there.tolist() if absent else [True] * len(self)  # waits for the device
        for p, part, has_any in zip(self.parameters, parts, anywhere, strict=True):
            if p.grad is not None:
                p.grad.copy_(part.view_as(p))
            elif has_any:
                p.grad = part.view_as(p).to(p.dtype, copy=True)

    def __len__(self) -> int:
        return len(self.parameters)


def _count_deltas(network: Network) -> int:
    """Return the bytes of the deltas that a forward of ``network`` sums over ranks."""
    named, total = dict(network.named_parameters()), 0
    target = torch.ops.fxlocal.widened.default
    for node in network.graph.find_nodes(op="call_function", target=target):
        for weight in node.args[1]:
            while weight.op != "get_attr":  # of a product, transposed
                weight = weight.args[0]
            like = named[weight.target]
            total += like.numel() * torch.promote_types(like.dtype, torch.float32).itemsize
    return total
